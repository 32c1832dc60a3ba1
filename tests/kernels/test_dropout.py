"""Dropout: any window draws the whole tensor's mask; the share, what is saved, errors."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from triptych.kernels import dropout
from triptych.kernels.dropout.torch import dropout_op

SHAPE = (6, 40, 50)
keyed = partial(dropout, p=0.25, keys=torch.tensor([11, 12]), shape=SHAPE)


def test_share_and_scale() -> None:
    y = keyed(torch.ones(2, *SHAPE), start=(0, 0, 0))
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(float((y == 0).float().mean()) - 0.25) < 0.01


@pytest.mark.parametrize(
    ("start", "window"), [((0, 10, 0), (6, 10, 50)), ((3, 0, 7), (2, 40, 1)), ((5, 39, 49), (1, 1, 1))]
)
def test_a_window_draws_as_the_whole(start: tuple[int, ...], window: tuple[int, ...]) -> None:
    x = torch.randn(2, *SHAPE)
    cut = (slice(None), *(slice(s, s + n) for s, n in zip(start, window)))
    assert torch.equal(keyed(x[cut], start=start), keyed(x, start=(0, 0, 0))[cut])


def test_a_sample_draws_by_its_own_key() -> None:
    x = torch.randn(2, *SHAPE)
    both = keyed(x, start=(0, 0, 0))
    alone = dropout(x[1:], 0.25, torch.tensor([12]), start=(0, 0, 0), shape=SHAPE)
    assert torch.equal(alone[0], both[1])
    assert not torch.equal(both[0] == 0, both[1] == 0)


def test_gradient_and_what_is_saved() -> None:
    x = torch.randn(2, *SHAPE, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = keyed(x, start=(0, 0, 0))
    assert [(t.dtype, t.shape) for t in saved] == [(torch.bool, x.shape)]
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (y.detach() != 0) / 0.75)


def test_registration() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    torch.library.opcheck(dropout_op, (x, 0.5, torch.arange(2), [0, 0], [3, 4]))


def test_zero_probability_is_the_identity() -> None:
    x = torch.randn(2, *SHAPE)
    assert keyed(x, p=0.0, start=(0, 0, 0)) is x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": 1.0}, r"p=1.0 must lie in \[0, 1\)"),
        ({"keys": torch.arange(3)}, r"keys must be \(2,\)"),
        ({"start": (0, 1, 0)}, "does not lie in shape"),
        ({"start": (0, 0)}, "does not lie in shape"),
    ],
)
def test_errors_say_what_to_mend(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keyed(torch.ones(2, *SHAPE), **{"start": (0, 0, 0), **change})
