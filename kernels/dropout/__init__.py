"""Dropout that does not depend on the layout. B samples."""

from __future__ import annotations

from torch import Tensor

from triptych.kernels.dropout.torch import dropout_op
from triptych.kernels.library import operator


@operator(integers=("keys",))
def dropout(x: Tensor, p: float, keys: Tensor, *, start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Zero each element with probability p and scale the rest by 1/(1-p).

    x: (B, *window), the window at offset `start` of a whole per-sample tensor of `shape`. keys: (B,) int64,
    one per sample. An element's fate is a hash of its sample's key and its index in the whole tensor, so any
    sharding of it and any recomputation draws the same mask. Saves a 1-byte mask. p = 0 returns x.
    Raises ValueError for p outside [0, 1) and for windows that lie outside `shape`.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout: p={p} must lie in [0, 1)")
    if keys.shape != x.shape[:1]:
        raise ValueError(
            f"dropout: keys must be ({x.shape[0]},), one per sample; they are {tuple(keys.shape)}"
        )
    window = x.shape[1:]
    fits = len(start) == len(shape) == len(window)
    if not fits or any(s < 0 or s + n > whole for s, n, whole in zip(start, window, shape)):
        raise ValueError(f"dropout: window {tuple(window)} at start={start} does not lie in shape={shape}")
    if p == 0.0:
        return x
    return dropout_op(x, p, keys, list(start), list(shape))[0]
