"""A backbone of timm in place of ours.

Shape legend: B batch, C channels, H and W pixels, T tokens.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from triptych.models.context import has_values
from triptych.models.init import Init
from triptych.models.timm_init import recorded
from triptych.models.torchvision_shim import prepare_torchvision
from triptych.models.vision_config import VisionConfig

FINEST = 4
"""Pixels per cell of the finest map that dense heads get, at least."""


class TimmShape(NamedTuple):
    """Channels and grid of each stage that heads read, first to last; without dense tasks the channels of the
    last one alone."""

    channels: tuple[int, ...]
    grids: tuple[tuple[int, ...], ...]


class TimmBackbone(nn.Module):
    """timm's model without its classifier; its parameters, under timm's names, behind `model.`.

    Initial values follow timm's distributions, as functions of (seed, name, element); nothing is downloaded.
    Dropout and drop-path are off: their masks would come from a generator's state.
    Raises ValueError for a name that timm has not, and for a model whose results would depend on the layout.
    """

    tp_refusal = "timm's layers declare no cut"
    pp_refusal = "a backbone of timm is one piece"

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        assert config.timm is not None, "the configuration names a backbone of timm"
        self.name, self.in_channels, self.input_size = config.timm, config.in_channels, config.input_size
        device = torch.get_default_device()
        self.model, self._table = _create(config.timm, config.in_channels, config.input_size)
        # Tables that timm's forward reads, such as relative positions. to_empty would lose them.
        self._constants = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.model.to("meta")
        self._dense = config.has_dense_tasks
        self._places = _stage_places(self.model) if self._dense else ()
        self.grid = timm_shape(config).grids[-1] if self._dense else ()
        if device.type != "meta":
            self.to_empty(device=device)
            for parameter in self.parameters():
                nn.init.constant_(parameter, torch.nan)

    def init(self) -> dict[str, Init]:
        return {f"model.{name}": init for name, init in self._table.items()}

    def flops(self, length: int) -> int:
        """Forward FLOPs of one image of the configured size; `length` has no say in it."""
        twin = copy.deepcopy(self).to("meta")
        with FlopCounterMode(display=False) as counter:
            twin(torch.zeros(1, self.in_channels, *self.input_size, device="meta"))
        return counter.get_total_flops()

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, C, H, W) -> the last stage's tokens (B, 1 + T, C), then those of the stages before it, first to
        last: (B, T, C).

        In front stands the vector that timm's own classifier would read. Without dense tasks it is alone.
        """
        if tuple(x.shape[2:]) != self.input_size:
            raise ValueError(
                f"an input of size {list(x.shape[2:])} for model.timm={self.name} with model.input_size="
                f"{list(self.input_size)}; timm's backbones take one size; resize or crop to it"
            )
        x = x.to(next(self.model.parameters()).dtype)
        if not self._dense:
            return [self._pooled(self.model.forward_features(x)).unsqueeze(1)]
        features, maps = self.model.forward_intermediates(
            x, indices=list(self._places), norm=True, output_fmt="NCHW"
        )
        tokens = [map_.flatten(2).transpose(1, 2) for map_ in maps]
        return [torch.cat([self._pooled(features).unsqueeze(1), tokens[-1]], dim=1), *tokens[:-1]]

    def _pooled(self, features: torch.Tensor) -> torch.Tensor:
        return self.model.forward_head(features, pre_logits=True)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> TimmBackbone:
        """After any move or cast the constant tables hold their values again."""
        super()._apply(fn, recurse)
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                if has_values(buffer):
                    buffer.copy_(self._constants[name])
        return self


def timm_shape(config: VisionConfig) -> TimmShape:
    """What heads find behind a backbone of timm. Raises ValueError for one that does not serve them."""
    assert config.timm is not None, "the configuration names a backbone of timm"
    return _shape(config.timm, config.in_channels, config.input_size, config.has_dense_tasks)


@functools.cache
def _shape(name: str, in_channels: int, input_size: tuple[int, ...], dense: bool) -> TimmShape:
    model, _ = _create(name, in_channels, input_size)
    model.to("meta")
    image = torch.zeros(1, in_channels, *input_size, device="meta")
    with torch.no_grad():
        if not dense:
            return TimmShape(
                (model.forward_head(model.forward_features(image), pre_logits=True).shape[1],), ()
            )
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(f"model.timm={name} gives no maps for dense tasks; {_DENSE}")
        features, maps = model.forward_intermediates(
            image, indices=list(_stage_places(model)), norm=True, output_fmt="NCHW"
        )
        pooled = model.forward_head(features, pre_logits=True).shape[1]
    shape = TimmShape(tuple(map_.shape[1] for map_ in maps), tuple(tuple(map_.shape[2:]) for map_ in maps))
    last = shape.grids[-1]
    doubled = [tuple(size << before for size in last) for before in range(len(maps) - 1, -1, -1)]
    if list(shape.grids) != doubled or any(size % cells for size, cells in zip(input_size, doubled[0])):
        raise ValueError(
            f"model.timm={name} has maps of {' and '.join(map(str, shape.grids))} cells on images of "
            f"{list(input_size)}, and dense heads want each to be twice the next; {_DENSE}"
        )
    if pooled != shape.channels[-1]:
        raise ValueError(
            f"model.timm={name} classifies from {pooled} channels, and its last map has "
            f"{shape.channels[-1]}: dense tasks and others cannot share it; {_DENSE}"
        )
    return shape


_DENSE = "use a swin, convnext, poolformer or vit for tasks of kind segment and detect"


def _create(name: str, in_channels: int, input_size: tuple[int, ...]) -> tuple[Any, dict[str, Init]]:
    """timm's model on the CPU, what would be random left at 0, and the parameters' distributions."""
    timm = import_timm()
    if len(input_size) != 2:
        raise ValueError(f"model.timm={name} takes images, and model.input_size={list(input_size)}; give two")
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise ValueError(
            f"model.timm={name} is not a model of timm {timm.__version__}"
            + (f"; it has {near}" if near else "")
        )
    options: dict[str, Any] = {"pretrained": False, "num_classes": 0, "in_chans": in_channels}
    # Convolutional backbones take any size and do not know the argument.
    sized = options | {"img_size": input_size}
    try:
        model, table = recorded(lambda: timm.create_model(name, **sized))
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        model, table = recorded(lambda: timm.create_model(name, **options))
    _refuse_running_statistics(name, model)
    for module in model.modules():
        _without_dropout(module)
    return model, table


def import_timm() -> Any:
    """The package, beside a torchvision with or without its compiled part. Raises ValueError without it."""
    prepare_torchvision()
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"model.timm needs timm and torchvision, which cannot be imported ({error}); "
            "pip install 'triptych[timm]'"
        ) from error
    return timm


def _refuse_running_statistics(name: str, model: nn.Module) -> None:
    """A batch's statistics depend on how it is cut, and those of batches past are in no checkpoint."""
    for place, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or "running_var" in module._buffers:
            raise ValueError(
                f"model.timm={name} normalises over the batch ({place}: {type(module).__name__}), so its "
                "results would depend on the layout; use a backbone without batch norm, such as resnet50_gn, "
                "a vit, swin, convnext or poolformer"
            )


def _without_dropout(module: Any) -> None:
    """timm's dropout and drop-path draw from a generator, whose state depends on the layout."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        module.p = 0.0
    for attribute in ("drop_prob", "prob"):
        if isinstance(getattr(module, attribute, None), float):
            setattr(module, attribute, 0.0)


def _stage_places(model: Any) -> tuple[int, ...]:
    """Of timm's feature maps, the last of each size, from FINEST pixels per cell on."""
    info = model.feature_info
    reductions = [each["reduction"] for each in info] if isinstance(info, list) else info.reduction()
    sizes = sorted({size for size in reductions if size >= FINEST})
    return tuple(max(place for place, size in enumerate(reductions) if size == wanted) for wanted in sizes)
