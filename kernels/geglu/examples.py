"""Small calls for self-checks."""

from __future__ import annotations

from typing import Any

import torch


def plain(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Some thousand elements, so that more than one block is at work."""
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(3, 41, 37, generator=generator).to(device, dtype) for _ in range(2))
    return {"gate": gate, "up": up}


MAKERS = {"plain": plain}
