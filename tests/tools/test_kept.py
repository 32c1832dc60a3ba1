"""The count of what autograd keeps, on modules whose answer is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from triptych.tools.kept import hook_bytes, kept_by_backward, total_bytes

ROWS, SIZE = 10, 16


class MLP(nn.Module):
    """Keeps its input, the input of GELU, and GELU's output, of which views are saved too."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(SIZE, 4 * SIZE)
        self.down = nn.Linear(4 * SIZE, SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


def make_input(device: str = "cpu") -> torch.Tensor:
    return torch.randn(ROWS, SIZE, device=device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counts_each_storage_once_and_no_parameters(device: str) -> None:
    model = MLP().to(device)
    kept = kept_by_backward(model, lambda: model(make_input(device)))
    assert total_bytes(kept) == 4 * ROWS * SIZE * (1 + 4 + 4)
    assert hook_bytes(model, lambda: model(make_input(device))) == total_bytes(kept)


def test_names_what_is_kept() -> None:
    model = MLP()
    kept = kept_by_backward(model, lambda: model(make_input()))
    assert [(one.op, one.module) for one in kept[1:]] == [("aten.addmm", "up"), ("aten.gelu", "")]
    assert kept[1].shape == (ROWS, 4 * SIZE)
    assert kept[1].dtype == "float32"


def test_an_input_with_gradient_is_held_by_the_graph() -> None:
    model = nn.Linear(SIZE, SIZE)
    kept = kept_by_backward(model, lambda: model(2 * make_input().requires_grad_()))
    assert total_bytes(kept) == 4 * ROWS * SIZE * 2


def test_checkpoint_keeps_its_input_only() -> None:
    model = MLP()

    def forward() -> torch.Tensor:
        return checkpoint(model, make_input(), use_reentrant=False)

    assert total_bytes(kept_by_backward(model, forward)) == 4 * ROWS * SIZE


def test_casts_of_weights_are_told_apart() -> None:
    model = MLP()

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(make_input())

    kept = kept_by_backward(model, forward)
    # The first layer's weight is for the input's gradient, which nobody asked for.
    assert total_bytes(kept, weights=True) == 2 * 4 * SIZE * SIZE
    # Of the input only the bf16 copy is needed.
    assert total_bytes(kept) == 2 * ROWS * SIZE * (1 + 4 + 4)


def test_nothing_kept_without_parameters_is_a_defect() -> None:
    with pytest.raises(AssertionError, match="must depend on"):
        kept_by_backward(nn.Identity(), lambda: torch.zeros(3))
