"""AdamW on the local shards of a model whose parameters are cut in any way.

The update is elementwise, so a shard is updated exactly as its part of the whole tensor would be, and the
moments are windows of whole tensors under the parameter's name, which any layout can read back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.parallel.freezing import trained_rows
from triptych.parallel.shards import local_part, window
from triptych.training.config import OptimizerConfig
from triptych.training.shards import Shard, Window

# Bounds the temporary of the update, which is as large as what is updated at once.
_BUCKET_ELEMENTS = 2**26
_EXEMPT_LEAVES = frozenset({"a_log", "d"})
# Modules whose rows most steps do not see.
_TABLES = frozenset({"embedding", "task_embedding"})
# First parts of names of what stands behind the blocks, or has its place at many depths.
_BEHIND = frozenset({"norm", "head", "heads", "last_conv", "shared_block"})


def decays(name: str, shape: tuple[int, ...]) -> bool:
    """Whether weight decay acts on the parameter `name` of the whole shape `shape`: on matrices only.

    Exempt are vectors and scalars (residual scales), everything of a norm, biases, Mamba-2's a_log, d and
    dt_bias, and token and task embeddings, whose rows would shrink in every step that does not see them
    (OLMo 2, arXiv 2501.00656, section 3). Convolution filters decay, as in the published Mamba-2, which
    exempts only a_log, d and dt_bias.
    """
    path = name.split(".")
    # Biases of stacked experts have two dimensions, and are vectors all the same.
    vector = path[-1] in _EXEMPT_LEAVES or path[-1].endswith("bias")
    exempt = vector or any("norm" in part or part in _TABLES for part in path)
    return len(shape) >= 2 and not exempt


def layer_of(name: str, num_blocks: int) -> int:
    """Depth of the parameter `name` of a model of so many blocks: stem and embeddings 0, block i is i + 1.

    What stands behind the blocks, or acts at many depths (norm, heads, a shared block), is num_blocks + 1; a
    downsampling is as deep as the block behind it, whose number it has.
    """
    parts = name.split(".")
    for part, number in itertools.pairwise(parts):
        if part in ("blocks", "downsamples") and number.isdigit():
            return int(number) + 1
    return num_blocks + 1 if parts[0] in _BEHIND else 0


def layer_factor(name: str, num_blocks: int, decay: float) -> float:
    """Factor on the learning rate: decay ** (num_blocks + 1 - layer) (BEiT, arXiv 2106.08254, appendix)."""
    return decay ** (num_blocks + 1 - layer_of(name, num_blocks))


@dataclass
class _Slot:
    """One parameter's local values and moments, all of one shape."""

    name: str
    parameter: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    decays: bool
    factor: float
    """On the learning rate."""
    rows: list[slice] | None
    """Those that are trained; None: all."""

    def trained(self, tensor: Tensor) -> list[Tensor]:
        """The trained parts of a tensor of the slot's shape."""
        return [tensor] if self.rows is None else [tensor[rows] for rows in self.rows]


class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101), moments in the parameter's own precision.

    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g², p = p (1 - lr wd) - lr m̂ / (sqrt(v̂) + eps), where m̂ and v̂
    are m / (1 - b1^t) and v / (1 - b2^t) and t counts the updates.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        config: OptimizerConfig,
        *,
        num_blocks: int = 0,
        frozen: Sequence[str] = (),
    ) -> None:
        """parameters: this rank's, under their names in the whole model; what asks for no gradient is left
        out. num_blocks: of the whole model, for layer_decay. frozen: `train.freeze`, whose rows stay as they
        are."""
        assert num_blocks or config.layer_decay == 1.0, "layer_decay counts the blocks of the whole model"
        self.config = config
        self.num_blocks = num_blocks
        self.frozen = tuple(frozen)
        self.updates = 0
        self._slots = [
            self._slot(name, parameter) for name, parameter in parameters if parameter.requires_grad
        ]

    def _slot(self, name: str, parameter: Tensor) -> _Slot:
        values = local_part(parameter)
        return _Slot(
            name=name,
            parameter=parameter,
            exp_avg=torch.zeros_like(values),
            exp_avg_sq=torch.zeros_like(values),
            decays=decays(name, tuple(parameter.shape)),
            factor=layer_factor(name, self.num_blocks, self.config.layer_decay),
            rows=trained_rows(name, window(parameter), self.frozen),
        )

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient, at learning rate `lr`."""
        self.updates += 1
        alike: dict[tuple[bool, float], list[_Slot]] = {}
        for slot in self._slots:
            if slot.parameter.grad is not None:
                alike.setdefault((slot.decays, slot.factor), []).append(slot)
        for (decay, factor), slots in alike.items():
            for bucket in _buckets(slots):
                self._update(bucket, lr * factor, self.config.weight_decay if decay else 0.0)

    def _update(self, slots: list[_Slot], lr: float, weight_decay: float) -> None:
        beta1, beta2 = self.config.betas
        values, gradients, means, squares = [], [], [], []
        for slot in slots:
            assert slot.parameter.grad is not None, f"{slot.name} is updated without a gradient"
            values += slot.trained(local_part(slot.parameter))
            gradients += slot.trained(local_part(slot.parameter.grad))
            means += slot.trained(slot.exp_avg)
            squares += slot.trained(slot.exp_avg_sq)
        if not values:
            return
        if weight_decay:
            torch._foreach_mul_(values, 1.0 - lr * weight_decay)
        torch._foreach_lerp_(means, gradients, 1.0 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1.0 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, math.sqrt(1.0 - beta2**self.updates))
        torch._foreach_add_(roots, self.config.eps)
        torch._foreach_addcdiv_(values, means, roots, -lr / (1.0 - beta1**self.updates))

    def shards(self, model_shards: Iterable[Shard]) -> Iterator[Window]:
        """The moments as windows; each has the window of its parameter, given by `model_shards`. What is
        frozen as a whole has none."""
        slots = {slot.name: slot for slot in self._slots}
        for shard in model_shards:
            slot = slots.get(shard.name)
            if slot is None:
                continue
            for key, whole in (("exp_avg", slot.exp_avg), ("exp_avg_sq", slot.exp_avg_sq)):
                assert whole.shape == shard.tensor.shape, (
                    f"{shard.name}: moments of shape {tuple(whole.shape)} beside a window of "
                    f"{tuple(shard.tensor.shape)}"
                )
                yield Window(
                    name=f"optimizer/{shard.name}/{key}",
                    tensor=whole,
                    global_shape=tuple(shard.global_shape),
                    offset=tuple(shard.offset),
                    is_writer=shard.is_writer,
                )


def _buckets(slots: list[_Slot]) -> Iterator[list[_Slot]]:
    bucket: list[_Slot] = []
    elements = 0
    for slot in slots:
        if bucket and elements + slot.exp_avg.numel() > _BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
        bucket.append(slot)
        elements += slot.exp_avg.numel()
    if bucket:
        yield bucket
