"""The vision backbone: patches, blocks in one or several stages, a head per task; whole, or a stage of it.

Shape legend: B batch, T tokens (prefix tokens in front of the grid's), C hidden size, A axes of the grid,
P values of a patch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from triptych.models.block import Blocks, build_blocks
from triptych.models.context import Context, document_bounds, has_values
from triptych.models.dropout import salt_dropouts
from triptych.models.heads import Heads, output_shapes
from triptych.models.init import ZEROS, Init, Normal
from triptych.models.linear import unset
from triptych.models.norms import build_norm
from triptych.models.patches import PatchEmbedding, patchify
from triptych.models.positions import Rope, axial_rope, grid_positions
from triptych.models.scan import Scan
from triptych.models.stems import ConvStem, Downsample
from triptych.models.timm_backbone import TimmBackbone
from triptych.models.vision_config import VisionConfig

Shape = tuple[int, ...]


class Prefix(nn.Module):
    """Class token and registers, in front of the tokens. tokens: (prefix tokens, C)."""

    sequence = "whole"

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.tokens = unset(config.num_prefix_tokens, config.hidden_size)
        self.std = config.init_std

    def init(self) -> dict[str, Init]:
        return {"tokens": Normal(self.std)}

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        tokens = self.tokens.to(x_BTC.dtype).expand(x_BTC.shape[0], -1, -1)
        return torch.cat([tokens, x_BTC], dim=1)


class TaskEmbedding(nn.Module):
    """A vector per task, on every token of its rows. weight: (tasks, C)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.weight = unset(len(config.tasks), config.stage_configs[0].hidden_size)

    def init(self) -> dict[str, Init]:
        return {"weight": ZEROS}

    def forward(self, x_BTC: torch.Tensor, tasks_B: torch.Tensor) -> torch.Tensor:
        return x_BTC + self.weight[tasks_B].unsqueeze(1).to(x_BTC.dtype)


class VisionModel(nn.Module):
    """A backbone or stage of it, built on the default device (torch.device("meta") for sizes alone).

    layers: blocks of this pipeline stage, None for all. first: with the stem. last: with norm and heads.
    Names of parameters are those of the whole model in every stage. Values are unset until `initialize`.
    Raises ValueError for layers outside the model.
    """

    main_input: ClassVar[str] = "x"
    several_outputs: ClassVar[bool] = True
    targets_inside: ClassVar[bool] = False

    def __init__(
        self, config: VisionConfig, layers: range | None = None, first: bool = True, last: bool = True
    ) -> None:
        super().__init__()
        self.config = config
        entrance = config.stage_configs[0]
        self.timm = TimmBackbone(config) if config.timm is not None else None
        own = first and self.timm is None
        self.patch_embedding = PatchEmbedding(entrance) if own and config.stem == "patch" else None
        self.conv_stem = ConvStem(entrance) if own and config.stem == "conv" else None
        self.prefix = Prefix(config) if own and config.num_prefix_tokens else None
        self.task_embedding = TaskEmbedding(config) if own and config.task_embedding else None
        self.blocks = Blocks() if self.timm is not None else build_blocks(config, layers)
        self.downsamples = nn.ModuleDict(
            {
                str(layer): self._downsample(layer)
                for layer in self._stage_starts()
                if str(layer) in self.blocks
            }
        )
        self.norm = build_norm(config.stage_configs[-1]) if last and self.timm is None else None
        self.heads = Heads(config) if last else None
        salt_dropouts(self)

    def _stage_starts(self) -> list[int]:
        """The first blocks of the stages behind the first."""
        return [self.config.first_layer(stage) for stage in range(1, len(self.config.stage_configs))]

    def _downsample(self, layer: int) -> Downsample:
        stage, configs = self.config.stage_of(layer), self.config.stage_configs
        return Downsample(configs[stage - 1].hidden_size, configs[stage].hidden_size, self.config)

    @property
    def exit(self) -> Any:
        """What stands behind the last block, None in other stages."""
        return self.heads

    def uses(self, part: str) -> int:
        """How often a forward pass goes through a part outside the blocks."""
        return 1

    @staticmethod
    def keywords(batch: Mapping[str, Any]) -> dict[str, Any]:
        """What every stage is called with besides its main input, of the batch."""
        names = ("tasks", "valid", "text", "positions", "document_ids", "sizes", "sample_keys")
        found = {name: batch[name] for name in names if batch.get(name) is not None}
        packed = "document_ids" in found
        return found | {"space": None if packed else tuple(batch["x"].shape[2:])}

    @staticmethod
    def between(config: VisionConfig, batch: Mapping[str, Any], layer: int, shards: int) -> list[Any]:
        """Shapes of what enters block `layer` from a stage before; behind the last block, of the outputs.

        shards: parts in which T is cut.
        """
        if layer == config.num_layers:
            return output_shapes(config, batch)
        x = batch["x"]
        packed = batch.get("document_ids") is not None

        def tokens(stage: int) -> Shape:
            length = x.shape[1] if packed else math.prod(_grid(config, tuple(x.shape[2:]), stage))
            prefix = 0 if packed else config.num_prefix_tokens
            return x.shape[0], (length + prefix) // shards, config.stage_configs[stage].hidden_size

        now = config.stage_of(layer - 1)
        earlier = range(now) if config.has_dense_tasks else ()
        return [tokens(now), *map(tokens, earlier)]

    def forward(
        self,
        x: torch.Tensor,
        *earlier: torch.Tensor,
        tasks: torch.Tensor | None = None,
        valid: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        sizes: torch.Tensor | None = None,
        sample_keys: torch.Tensor | None = None,
        space: Shape | None = None,
    ) -> Any:
        """One forward pass of the stage.

        x: images (B, channels, *space), or packed rows of patches (B, T, P) with positions (B, T, A),
            document_ids (B, T) (0, 1, ... for the images of a row, G for padding) and sizes (B, G, A) in
            tokens; in later stages tokens (B, T, C), followed by the outputs of earlier stages of a
            hierarchical backbone with dense tasks.
        tasks: int64 (B,), the number of each row's task. valid: bool (B,) or (B, G), False for images that
            could not be read. text: (B, L, E), for contrast. space: of the images, where x does not show it.
        Returns in the last stage the outputs of the heads (models/heads.py); elsewhere tokens and earlier
        outputs.
        """
        packed = document_ids is not None
        if space is None and not packed:
            space = tuple(x.shape[2:])
        base = Context(tasks=tasks, sample_keys=sample_keys)
        contexts: dict[int, Context] = {}

        def at(stage: int) -> Context:
            if stage not in contexts:
                if space is None:
                    contexts[stage] = self._packed_context(base, positions, document_ids, sizes, valid)
                else:
                    contexts[stage] = self._grid_context(base, space, stage, valid, x.device)
            return contexts[stage]

        stream = [x, *earlier]
        if self.timm is not None:
            stream = list(self.timm(x))
        elif self.patch_embedding is not None or self.conv_stem is not None:
            stream = [self._enter(x, at(0), space)]
        for block in self.blocks.values():
            stage = self.config.stage_of(block.layer)
            if str(block.layer) in self.downsamples:
                assert space is not None, "packed rows have one stage"
                kept = stream if self.config.has_dense_tasks else stream[:0]
                halved = self.downsamples[str(block.layer)](stream[0], self._grid(space, stage - 1))
                stream = [halved, *kept[1:], *kept[:1]]
            stream[0] = block(stream[0], at(stage))
        if self.heads is None:
            # Not the very tensors that came in: the pipeline takes a stage's outputs for its own.
            return tuple(part.clone() if any(part is e for e in (x, *earlier)) else part for part in stream)
        if self.norm is not None:
            stream[0] = self.norm(stream[0])
        last = len(self.config.stage_configs) - 1
        if self.timm is not None:
            return self.heads(*stream, context=base, grid=self.timm.grid, text=text, valid=valid)
        grid = None if space is None else self._grid(space, last)
        return self.heads(*stream, context=at(last), grid=grid, text=text, valid=valid)

    def _grid(self, space: Shape, stage: int) -> Shape:
        """Tokens of an image of this size along each axis."""
        if self.config.position != "rope" and space != self.config.input_size:
            raise ValueError(
                f"an input of size {list(space)} for model.input_size={list(self.config.input_size)} with "
                f"model.position={self.config.position}; only position: rope serves other sizes"
            )
        return _grid(self.config, space, stage)

    def _enter(self, x: torch.Tensor, context: Context, space: Shape | None) -> torch.Tensor:
        """From the input to the tokens before the first block."""
        config = self.config
        channels = config.in_channels * (1 if space is not None else config.patch_elements)
        held = x.shape[1] if space is not None else x.shape[2]
        if held != channels:
            raise ValueError(
                f"an input of shape {tuple(x.shape)} has {held} channels, and model.in_channels="
                f"{config.in_channels} wants {channels}; the data and the model are not for each other"
            )
        if self.conv_stem is not None:
            x_BTC = self.conv_stem(x)
        else:
            assert self.patch_embedding is not None, "the first stage has a stem"
            grid = None if space is None else self._grid(space, 0)
            places = context.positions if grid is None else grid_positions(grid, x.device)
            assert places is not None, "packed rows have positions"
            tokens_BTP = x if grid is None else patchify(x, config.patch_sizes)
            x_BTC = self.patch_embedding(tokens_BTP, grid, places)
        if self.prefix is not None:
            x_BTC = self.prefix(x_BTC)
        if self.task_embedding is not None:
            assert context.tasks is not None, "model.task_embedding needs the rows' tasks"
            x_BTC = self.task_embedding(x_BTC, context.tasks)
        return x_BTC

    def _packed_context(
        self,
        base: Context,
        positions: torch.Tensor | None,
        document_ids: torch.Tensor | None,
        sizes: torch.Tensor | None,
        valid: torch.Tensor | None,
    ) -> Context:
        """Of rows of images of their own sizes."""
        assert document_ids is not None and sizes is not None, "packed rows have document_ids and sizes"
        number = sizes.shape[1]
        padding = document_ids >= number
        if valid is not None:
            readable = torch.cat([valid, valid.new_zeros(valid.shape[0], 1)], dim=1)
            padding = ~readable.gather(1, document_ids)
        return dataclasses.replace(
            base,
            cu_seqlens=document_bounds(document_ids)[0] if has_values(document_ids) else None,
            positions=positions,
            scan=Scan.of_packed(sizes, document_ids),
            rope=self._rope(self.config, self.config.grid, document_ids.device),
            images=document_ids.clamp(max=number - 1),
            padding=padding,
        )

    def _grid_context(
        self, base: Context, space: Shape, stage: int, valid: torch.Tensor | None, device: torch.device
    ) -> Context:
        """Of whole images in one stage."""
        config = self.config.stage_configs[stage]
        grid, prefix = self._grid(space, stage), config.num_prefix_tokens
        places = grid_positions(grid, device)
        length = prefix + math.prod(grid)
        return dataclasses.replace(
            base,
            # Prefix tokens stand at the origin, where a rotation turns nothing.
            positions=torch.cat([places.new_zeros(1, prefix, len(grid)), places], dim=1),
            scan=None if prefix else Scan.of_grid(grid, device),
            rope=self._rope(config, grid, device),
            padding=None if valid is None else (~valid).unsqueeze(1).expand(-1, length),
        )

    def _rope(self, config: VisionConfig, grid: Shape, device: torch.device) -> Rope | None:
        if not config.rope_axes or config.attention.rope_theta is None:
            return None
        mixers = {spec.mixer for spec in config.layer_specs()}
        size = config.head_dim if "attention" in mixers else config.attention_moe.head_dim
        return axial_rope(size, config.attention.rope_theta, grid, config.grid, "none", device)


def _grid(config: VisionConfig, space: Shape, stage: int) -> Shape:
    """Tokens of an image along each axis in a stage."""
    if any(size % (patch << stage) for size, patch in zip(space, config.patch_sizes)):
        raise ValueError(
            f"an input of size {list(space)} is not divisible by model.patch_size={config.patch_size} in "
            f"each of {stage + 1} stage(s), which halve the grid; resize or crop it"
        )
    return tuple(size // patch >> stage for size, patch in zip(space, config.patch_sizes))
