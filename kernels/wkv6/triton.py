"""WKV of RWKV-6 by the Triton kernels of gated linear attention, in their exclusive form."""

from typing import Any

from torch import Tensor

from triptych.kernels.gated_linear_attention.triton import attend
from triptych.kernels.wkv6.directions import both_ways


def wkv6(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Arguments as of the reference."""
    return both_ways(attend, r, k, v, w, u, **options)
