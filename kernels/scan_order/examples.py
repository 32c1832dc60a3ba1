"""Small calls for self-checks: an image of 7 x 10 tokens, in rows, in columns and both backwards."""

from __future__ import annotations

from typing import Any

import torch

from triptych.kernels.dispatch import Examples


def _orders(device: torch.device) -> torch.Tensor:
    rows = torch.arange(70)
    columns = rows.view(7, 10).t().flatten()
    return torch.stack([rows, columns, rows.flip(0), columns.flip(0)]).to(device)


def _of_rows(device: torch.device) -> torch.Tensor:
    """Another order for each of 2 rows, (2, 2, 70)."""
    return _orders(device).view(2, 2, 70)


def _tokens(rows: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 70, 37, generator=generator).to(device, dtype)


def gather(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Four orders for all rows."""
    return {"x": _tokens(2, device, dtype), "orders": _orders(device)}


def gather_by_row(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Two orders for each row."""
    return {"x": _tokens(2, device, dtype), "orders": _of_rows(device)}


def scatter(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The sum over four orders."""
    return {"y": _tokens(8, device, dtype), "orders": _orders(device)}


def scatter_by_row(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The mean over each row's two orders."""
    return {"y": _tokens(4, device, dtype), "orders": _of_rows(device), "reduce": "mean"}


MAKERS: dict[str, Examples] = {
    "scan_gather": {"shared": gather, "by_row": gather_by_row},
    "scan_scatter": {"shared": scatter, "by_row": scatter_by_row},
}
