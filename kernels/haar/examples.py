"""Small calls for self-checks."""

from __future__ import annotations

from typing import Any

import torch


def image(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Two levels of an image that is not square."""
    x = torch.randn(2, 8, 12, 3, generator=torch.Generator().manual_seed(0))
    return {"x": x.to(device, dtype), "levels": 2}


def coefficients(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Of such an image."""
    x = torch.randn(2, 16, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    return {"coefficients": x.to(device, dtype), "levels": 2}
