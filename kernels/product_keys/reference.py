"""All experts scored, and experts' vectors fetched for each token. Letters as in the package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import statistics_dtype


def product_key_topk(queries: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Shapes as in the public function; autograd by PyTorch."""
    dtype = statistics_dtype(queries, keys)
    first, second = queries.to(dtype).chunk(2, dim=-1)
    keys = keys.to(dtype)
    halves = (
        torch.einsum("nhd,hid->nhi", first, keys[:, 0]),
        torch.einsum("nhd,hjd->nhj", second, keys[:, 1]),
    )
    every = halves[0].unsqueeze(-1) + halves[1].unsqueeze(-2)  # (N, H, n, n)
    scores, experts = every.flatten(-2).topk(top_k, dim=-1)
    return scores, experts


def rank_one_experts(
    x: Tensor, down: Tensor, up: Tensor, experts: Tensor, weights: Tensor, activation: str
) -> Tensor:
    """experts, weights: (N, J); otherwise as the public function; autograd by PyTorch."""
    dtype = statistics_dtype(x, down, weights)
    inner = torch.einsum("nc,njc->nj", x.to(dtype), down.to(dtype)[experts])
    if activation == "gelu":
        inner = F.gelu(inner, approximate="tanh")
    else:
        inner = F.silu(inner) if activation == "silu" else F.relu(inner)
    return torch.einsum("nj,njc->nc", weights.to(dtype) * inner, up.to(dtype)[experts]).to(x.dtype)
