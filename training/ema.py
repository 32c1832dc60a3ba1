"""Exponential moving averages of the parameters, on the local shards of a model cut in any way.

The average is elementwise, so a shard is averaged exactly as its part of the whole tensor would be; no rank
holds more than its own part, and in a checkpoint the averages are windows of whole tensors, which any layout
can read back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from triptych.parallel.shards import local_part
from triptych.training.shards import Shard, Window

PREFIX = "ema/"
"""Of the averages' names in a checkpoint, before the parameter's name in the whole model."""
# The ramp of the warm-up: (1 + t) / (10 + t) reaches .9 after 80 updates and .9999 after 90 thousand.
_RAMP = 10.0


class EMAConfig(BaseModel):
    """`train.ema:`, an average of the parameters over the steps, which samples and evaluates better."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    decay: float = Field(default=0.9999, ge=0.0, lt=1.0)
    """Weight of the average against the new parameters in each step; 1 / (1 - decay) steps are remembered."""
    warmup: bool = True
    """Start with a short memory: the decay after step t is at most (1 + t) / (10 + t), so that a run of few
    steps does not remain at its random start. false uses `decay` from the first step, as DiT does."""

    def decay_at(self, step: int) -> float:
        """The decay of the update after step `step`, the first of which is 1."""
        return min(self.decay, (1.0 + step) / (_RAMP + step)) if self.warmup else self.decay


class EMA:
    """ema = decay ema + (1 - decay) parameter after every step; starts as a copy of the parameters.

    parameters: this rank's, under their names in the whole model; fp32 or fp64, DTensors where cut. The
    averages have the precision of their parameters. What is averaged is a function of the parameters and the
    step alone, so a checkpoint needs no state besides `shards`.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], config: EMAConfig) -> None:
        self.config = config
        self._parameters = dict(parameters)
        for name, parameter in self._parameters.items():
            # A step of bf16 is coarser than 1 - decay: such an average would never move.
            assert parameter.dtype in (torch.float32, torch.float64), f"{name} is kept in {parameter.dtype}"
        self._averages = {name: local_part(value).clone() for name, value in self._parameters.items()}
        self._is_swapped = False

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as they are after step `step`."""
        assert not self._is_swapped, "the parameters are the averages themselves within swapped()"
        torch._foreach_lerp_(list(self._averages.values()), self._local(), 1.0 - self.config.decay_at(step))

    @torch.no_grad()
    def restart(self) -> None:
        """Forget everything: the averages become the parameters, as they are now."""
        assert not self._is_swapped, "the parameters are the averages themselves within swapped()"
        torch._foreach_copy_(list(self._averages.values()), self._local())

    def shards(self, model_shards: Iterable[Shard]) -> Iterator[Window]:
        """The averages as windows named "ema/<parameter>", each with the window of its parameter."""
        assert not self._is_swapped, "within swapped() the averages are in the model"
        for shard in model_shards:
            average = self._averages[shard.name]
            assert average.shape == shard.tensor.shape, (
                f"{shard.name}: an average of shape {tuple(average.shape)} beside a window of "
                f"{tuple(shard.tensor.shape)}"
            )
            yield Window(
                name=PREFIX + shard.name,
                tensor=average,
                global_shape=tuple(shard.global_shape),
                offset=tuple(shard.offset),
                is_writer=shard.is_writer,
            )

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within, the model computes with the averages; afterwards with its own parameters again.

        Values are exchanged in place, one tensor at a time, and back whatever is raised within. All ranks
        of a group that shares parameters must enter and leave together, between steps.
        """
        assert not self._is_swapped, "swapped() does not nest"
        self._exchange()
        self._is_swapped = True
        try:
            yield
        finally:
            self._exchange()
            self._is_swapped = False

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, value in zip(self._averages.values(), self._local(), strict=True):
            kept = value.clone()
            value.copy_(average)
            average.copy_(kept)

    def _local(self) -> list[Tensor]:
        return [local_part(parameter) for parameter in self._parameters.values()]
