"""The logits of a chunk by PyTorch's operators. n tokens, V vocabulary rows held."""

import torch
from torch import Tensor

from triptych.kernels.linear_cross_entropy.operators import operators


def _cap(logits: Tensor, softcap: float) -> Tensor:
    """s = c tanh(x / c), in place."""
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


def _slope(capped: Tensor, softcap: float) -> Tensor | None:
    """ds / dx = 1 - (s / c)^2."""
    return 1 - (capped / softcap).square_() if softcap else None


def _picked(capped: Tensor, targets: Tensor) -> Tensor:
    return capped.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1).mul_(targets >= 0)


def _add_at_target(gradient: Tensor, targets: Tensor, added: Tensor, slope: Tensor | None) -> Tensor:
    """Add to each row at its target, where it has one, and go through the cap; in place."""
    gradient.scatter_add_(1, targets.clamp(min=0).unsqueeze(1), (added * (targets >= 0)).unsqueeze(1))
    return gradient if slope is None else gradient.mul_(slope)


class TorchRows:
    """`operators.Rows`."""

    def statistics(self, logits: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
        """As in `operators.Rows`."""
        capped = _cap(logits, softcap)
        picked = _picked(capped, targets)
        top = capped.amax(-1, keepdim=True)
        lse = capped.sub_(top).exp_().sum(-1).log_().add_(top.squeeze(-1))
        return lse, picked

    def gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        lse: Tensor,
        dlse: Tensor,
        dpicked: Tensor,
        softcap: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """As in `operators.Rows`."""
        capped = _cap(logits, softcap)
        slope = _slope(capped, softcap)
        gradient = capped.sub_(lse.unsqueeze(1)).exp_().mul_(dlse.unsqueeze(1))
        return _add_at_target(gradient, targets, dpicked, slope).to(dtype)

    def loss_and_gradient(
        self, logits: Tensor, targets: Tensor, z_loss: float, softcap: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As in `operators.Rows`."""
        capped = _cap(logits, softcap)
        slope = _slope(capped, softcap)
        picked, top = _picked(capped, targets), capped.amax(-1)
        gradient = torch.softmax(capped, -1, out=capped)
        # The largest probability is 1 / sum of e^(s - top).
        lse = top.sub_(gradient.amax(-1).log_())
        counted = targets >= 0
        gradient.mul_((1 + 2 * z_loss * lse).mul_(counted).unsqueeze(1))
        gradient = _add_at_target(gradient, targets, -torch.ones_like(lse), slope)
        return (lse - picked + z_loss * lse.square()).where(counted, 0), lse, gradient.to(dtype)


linear_cross_entropy = operators("", TorchRows())
