"""Small calls for self-checks."""

from __future__ import annotations

from typing import Any

import torch


def retrieval(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The best 4 of 49 experts."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(37, 2, 16, generator=generator).to(device, dtype)
    keys = torch.randn(2, 2, 7, 8, generator=generator).to(device, dtype)
    return {"queries": queries, "keys": keys, "top_k": 4}


def experts(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Six of 49 experts for each token, some of them twice."""
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(37, n, generator=generator).to(device, dtype) for n in (16, 6))
    down, up = (torch.randn(49, 16, generator=generator).to(device, dtype) for _ in range(2))
    chosen = torch.randint(49, (37, 6), generator=generator).to(device)
    return {"x": x, "down": down, "up": up, "experts": chosen, "weights": weights}
