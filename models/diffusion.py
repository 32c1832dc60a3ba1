"""The denoiser: patches, blocks under a conditioning, head; whole, or one pipeline stage of it.

Shape legend: B batch, G images per row, T tokens, C hidden size, P values of a patch, A axes of the grid,
L text tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from triptych.models.block import Block, build_blocks
from triptych.models.conditioning import LabelEmbedding, SharedModulation, TextProjection, TimeEmbedding
from triptych.models.context import Context, document_bounds, has_values
from triptych.models.diffusion_config import DiffusionConfig
from triptych.models.dropout import salt_dropouts
from triptych.models.patches import DenoiserHead, LocalConv, PatchEmbedding, patchify, unpatchify
from triptych.models.positions import axial_rope, grid_positions
from triptych.models.routing import Leave, Return, take
from triptych.models.scan import Scan

PACKED_DIMS = 3
"""Dimensions of packed rows (B, T, P); whole images have more or channels before space."""


@dataclass
class Stream:
    """What goes from block to block, and from stage to stage in this order.

    x: (B, T, C). conditioning: (B, G, C). memory: (B, L, C) with text. shared: (B, G, 6 C) with low-rank
    modulation. aside: (B, T, C), all tokens as they were when some of them left. skips: by the block they
    come from.
    """

    x: torch.Tensor
    conditioning: torch.Tensor
    memory: torch.Tensor | None = None
    shared: torch.Tensor | None = None
    aside: torch.Tensor | None = None
    skips: dict[int, torch.Tensor] = field(default_factory=dict)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All there are."""
        parts = (self.x, self.conditioning, self.memory, self.shared, self.aside)
        return (*(part for part in parts if part is not None), *self.skips.values())

    @classmethod
    def of(cls, tensors: tuple[torch.Tensor, ...], names: list[str]) -> Stream:
        """The stream of such tensors by the names of `names_between`."""
        named = dict(zip(names, tensors, strict=True))
        skips = {int(name): named.pop(name) for name in names if name.isdigit()}
        return cls(**named, skips=skips)


class DiffusionModel(nn.Module):
    """A denoiser or stage of it, built on the default device (torch.device("meta") for sizes alone).

    layers: blocks of this stage, None for all. first: with embeddings. last: with norm and head.
    Names of parameters are those of the whole model in every stage. Values are unset until `initialize`.
    Raises ValueError for layers outside the model, and for a shared block cut between stages.
    """

    main_input: ClassVar[str] = "x"
    several_outputs: ClassVar[bool] = False
    targets_inside: ClassVar[bool] = False

    def __init__(
        self, config: DiffusionConfig, layers: range | None = None, first: bool = True, last: bool = True
    ) -> None:
        super().__init__()
        if config.shared_block_every and first != last:
            raise ValueError(
                f"model.shared_block_every={config.shared_block_every} needs all its places in one stage, "
                "since they share weights; use parallel.pp=1, or shared_block_every: 0"
            )
        kind = config.conditioning.kind
        self.config = config
        self.patch_embedding = PatchEmbedding(config) if first else None
        self.time_embedding = TimeEmbedding(config) if first else None
        self.label_embedding = LabelEmbedding(config) if first and kind == "class" else None
        self.text_projection = TextProjection(config) if first and kind == "text" else None
        lora = config.modulation.kind == "lora"
        self.shared_modulation = SharedModulation(config) if first and lora else None
        self.first_conv = LocalConv(config) if first and config.local_convs else None
        self.blocks = build_blocks(config, layers)
        shared = bool(config.shared_block_every)
        self.shared_block = Block(config, config.shared_spec, config.num_layers) if shared else None
        self.leave, self.comeback = Leave(), Return()
        self.last_conv = LocalConv(config) if last and config.local_convs else None
        self.head = DenoiserHead(config) if last else None
        salt_dropouts(self)

    @property
    def exit(self) -> Any:
        """What stands behind the last block, None in other stages."""
        return self.head

    def uses(self, part: str) -> int:
        """How often a forward pass goes through a part outside the blocks."""
        return (
            sum(map(self.config.followed_by_shared, range(self.config.num_layers)))
            if (part == "shared_block")
            else 1
        )

    @staticmethod
    def keywords(batch: Mapping[str, Any]) -> dict[str, Any]:
        """What every stage is called with besides its main input, of the batch."""
        names = ("times", "labels", "text", "positions", "document_ids", "sizes", "kept", "sample_keys")
        found = {name: batch[name] for name in names if batch.get(name) is not None}
        x = batch["x"]
        packed = "document_ids" in found
        return found | {"space": None if packed else tuple(x.shape[2:]), "routed": batch.get("routed")}

    @staticmethod
    def between(config: DiffusionConfig, batch: Mapping[str, Any], layer: int, shards: int) -> list[Any]:
        """Shapes of what enters block `layer` from a stage before; behind the last block, of the output.

        shards: parts in which T is cut.
        """
        x, rows = batch["x"], batch["x"].shape[0]
        packed = batch.get("document_ids") is not None
        if layer == config.num_layers:
            if packed:
                return [(*x.shape[:2], config.predicted_channels * config.patch_elements)]
            return [(rows, config.predicted_channels, *x.shape[2:])]
        length = x.shape[1] if packed else math.prod(s // config.patch_size for s in x.shape[2:])
        kept = batch.get("kept")
        images, size = (batch["sizes"].shape[1] if packed else 1), config.hidden_size
        routed = batch.get("routed")

        def tokens(inside: bool) -> tuple[int, int, int]:
            count = kept.shape[1] if inside and kept is not None else length
            return rows, count // shards, size

        now_inside = _inside(routed, layer, strictly=True)
        shapes: dict[str, Any] = {
            "x": tokens(now_inside),
            "conditioning": (rows, images, size),
            "memory": (rows, config.conditioning.text_length, size),
            "shared": (rows, images, 6 * size),
            "aside": tokens(False),
        }
        return [
            shapes[name] if name in shapes else tokens(now_inside and _inside(routed, int(name)))
            for name in names_between(config, layer, now_inside)
        ]

    def forward(
        self,
        x: torch.Tensor,
        *carried: torch.Tensor,
        times: torch.Tensor,
        labels: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        sizes: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
        routed: tuple[int, int] | None = None,
        sample_keys: torch.Tensor | None = None,
        space: tuple[int, ...] | None = None,
    ) -> Any:
        """One forward pass of the stage.

        x: whole images (B, channels, *space), or packed rows of patches (B, T, P) with positions (B, T, A),
            document_ids (B, T) (0, 1, ... for the images of a row, G for padding) and sizes (B, G, A) in
            tokens; in later stages tokens (B, T, C), followed by the rest of the Stream in `carried`.
        times: (B,) or (B, G), on the scale of the embedding. labels: int, likewise, num_classes for none.
        text: (B, L, text_size). kept: int64 (B, K), ascending, the tokens that go through blocks routed[0] to
            routed[1] - 1, while the others go around. space: of the images, where x does not show it.
        Returns in the last stage the prediction, shaped as the input; elsewhere the Stream's tensors.
        """
        packed = document_ids is not None
        grid = None
        if not packed:
            grid = self._grid(tuple(x.shape[2:]) if space is None else space)
        context = self._context(x, grid, positions, document_ids, sizes, sample_keys)
        if self.patch_embedding is not None:
            stream = self._enter(x, grid, context, times, labels, text)
        else:
            inside = _inside(routed, self._first_layer, strictly=True)
            stream = Stream.of((x, *carried), names_between(self.config, self._first_layer, inside))
        context = dataclasses.replace(
            context,
            conditioning=F.silu(stream.conditioning),
            memory=stream.memory,
            shared_modulation=stream.shared,
        )
        self._run_blocks(stream, context, kept, routed, document_ids)
        if self.head is None:
            # Not the very tensors that came in: the pipeline takes a stage's outputs for its own.
            first = self.patch_embedding is not None
            return tuple(t if first or t is stream.x else t.clone() for t in stream.tensors())
        if self.last_conv is not None:
            stream.x = self.last_conv(stream.x, grid)
        output = self.head(stream.x, context)
        return output if grid is None else unpatchify(output, grid, self.config.patch_size)

    def _grid(self, space: tuple[int, ...]) -> tuple[int, ...]:
        config = self.config
        if config.position != "rope" and space != config.input_size:
            raise ValueError(
                f"an input of size {list(space)} for model.input_size={list(config.input_size)} with "
                f"model.position={config.position}; only position: rope serves other sizes"
            )
        if any(size % config.patch_size for size in space):
            raise ValueError(
                f"an input of size {list(space)} is not divisible by model.patch_size={config.patch_size}; "
                "resize or crop it"
            )
        return tuple(size // config.patch_size for size in space)

    def _context(
        self,
        x: torch.Tensor,
        grid: tuple[int, ...] | None,
        positions: torch.Tensor | None,
        document_ids: torch.Tensor | None,
        sizes: torch.Tensor | None,
        sample_keys: torch.Tensor | None,
    ) -> Context:
        config = self.config
        if grid is not None:
            scan = Scan.of_grid(grid, x.device)
            positions, cu_seqlens, images = grid_positions(grid, x.device), None, None
        else:
            assert document_ids is not None and sizes is not None, "packed rows have document_ids and sizes"
            scan = Scan.of_packed(sizes, document_ids)
            cu_seqlens = document_bounds(document_ids)[0] if has_values(document_ids) else None
            images = document_ids.clamp(max=sizes.shape[1] - 1)
        rope = None
        if config.rope_axes and config.attention.rope_theta is not None:
            trained = config.rope_scaling.trained or config.grid
            theta = config.attention.rope_theta
            kind = config.rope_scaling.kind
            # Packed rows are trained unscaled at any aspect, and so is a grid of no more tokens.
            now = grid if grid is not None and math.prod(grid) > math.prod(trained) else trained
            rope = axial_rope(config.head_dim, theta, now, trained, kind, x.device)
        return Context(
            cu_seqlens=cu_seqlens,
            positions=positions,
            sample_keys=sample_keys,
            scan=scan,
            rope=rope,
            images=images,
        )

    def _enter(
        self,
        x: torch.Tensor,
        grid: tuple[int, ...] | None,
        context: Context,
        times: torch.Tensor,
        labels: torch.Tensor | None,
        text: torch.Tensor | None,
    ) -> Stream:
        """From the input to the stream before the first block."""
        assert self.patch_embedding is not None and self.time_embedding is not None, "the first stage"
        channels = self.config.in_channels * (1 if grid is not None else self.config.patch_elements)
        held = x.shape[1] if grid is not None else x.shape[2]
        if held != channels:
            raise ValueError(
                f"an input of shape {tuple(x.shape)} has {held} channels, and model.in_channels="
                f"{self.config.in_channels} wants {channels}; the data and the model are not for each other"
            )
        tokens_BTP = x if grid is None else patchify(x, self.config.patch_size)
        conditioning = self.time_embedding(times.reshape(times.shape[0], -1))
        if self.label_embedding is not None:
            if labels is None:
                raise ValueError("model.conditioning.kind=class needs labels, and the batch has none")
            conditioning = conditioning + self.label_embedding(labels.reshape(labels.shape[0], -1))
        if self.text_projection is not None and text is None:
            raise ValueError("model.conditioning.kind=text needs embedded text, and the batch has none")
        stream = Stream(
            x=self.patch_embedding(tokens_BTP, grid, context.positions),
            conditioning=conditioning,
            memory=None if self.text_projection is None else self.text_projection(text),
            shared=None if self.shared_modulation is None else self.shared_modulation(F.silu(conditioning)),
        )
        if self.first_conv is not None:
            if grid is None:
                raise ValueError("model.local_convs=true needs whole images, not packed rows; set it false")
            stream.x = self.first_conv(stream.x, grid)
        return stream

    def _run_blocks(
        self,
        stream: Stream,
        context: Context,
        kept: torch.Tensor | None,
        routed: tuple[int, int] | None,
        document_ids: torch.Tensor | None,
    ) -> None:
        """Take the stream through the blocks of this stage, a part of its tokens around some of them."""
        inner = context if kept is None else _routed(context, kept, document_ids)
        for block in self.blocks.values():
            layer = block.layer
            if kept is not None and routed is not None and layer == routed[0]:
                stream.aside, stream.x = stream.x, self.leave(stream.x, kept)
            inside = _inside(routed, layer)
            here = inner if inside else context
            source = self.config.skips_from(layer)
            skip = None if source is None else stream.skips.pop(source)
            if skip is not None and inside and not _inside(routed, source):
                skip = self.leave(skip, kept)
            stream.x = block(stream.x, here, skip)
            if self.config.skips_from(self.config.num_layers - 1 - layer) == layer:
                stream.skips[layer] = stream.x
            if self.shared_block is not None and self.config.followed_by_shared(layer):
                stream.x = self.shared_block(stream.x, here)
            if kept is not None and routed is not None and layer == routed[1] - 1:
                stream.x = self.comeback(stream.x, stream.aside, kept)
                for origin in filter(lambda origin: _inside(routed, origin), stream.skips):
                    stream.skips[origin] = self.comeback(stream.skips[origin], stream.aside, kept)
                stream.aside = None

    @property
    def _first_layer(self) -> int:
        return next(iter(self.blocks.values())).layer


def names_between(config: DiffusionConfig, layer: int, inside: bool) -> list[str]:
    """Names of the Stream's tensors that enter block `layer` from a stage before; skips by their origin.

    inside: some tokens are on their way around it.
    """
    names = ["x", "conditioning"]
    names += ["memory"] if config.conditioning.kind == "text" else []
    names += ["shared"] if config.modulation.kind == "lora" else []
    names += ["aside"] if inside else []
    open_skips = [
        origin
        for origin in range(layer)
        if config.skips_from(config.num_layers - 1 - origin) == origin
        and config.num_layers - 1 - origin >= layer
    ]
    return names + [str(origin) for origin in open_skips]


def _inside(routed: tuple[int, int] | None, layer: int | None, strictly: bool = False) -> bool:
    """Whether tokens go around block `layer`; strictly: and went around the one before it, too."""
    if routed is None or layer is None:
        return False
    return routed[0] + strictly <= layer < routed[1]


def _routed(context: Context, kept: torch.Tensor, document_ids: torch.Tensor | None) -> Context:
    """The context of the tokens that stay."""
    cu_seqlens = None
    if document_ids is not None and has_values(document_ids):
        cu_seqlens = document_bounds(take(document_ids, kept))[0]
    assert context.scan is not None and context.positions is not None, "a denoiser's context has places"
    return dataclasses.replace(
        context,
        cu_seqlens=cu_seqlens,
        positions=take(context.positions, kept),
        images=None if context.images is None else take(context.images, kept),
        scan=context.scan.route(kept),
    )
