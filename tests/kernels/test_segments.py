"""Packed documents: what is refused, and what is derived."""

from __future__ import annotations

import pytest
import torch

from triptych.kernels.segments import check_cu_seqlens, document_bounds, segment_ids


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (torch.tensor([0]), r"num_docs \+ 1 entries"),
        (torch.tensor([[0, 8]]), r"num_docs \+ 1 entries, its shape is \(1, 2\)"),
        (torch.tensor([0.0, 4.0, 8.0]), "must be int32 or int64"),
        (
            torch.tensor([1, 4, 8]),
            r"must start at 0 and end at B\*T = 2\*4 = 8; it starts at 1 and ends at 8",
        ),
        (torch.tensor([0, 4, 9]), "ends at 9"),
        (torch.tensor([0, 4, 4, 8]), "must increase strictly"),
        (torch.tensor([0, 3, 8]), "a document never crosses a row; 4 is missing"),
    ],
)
def test_errors_say_what_to_mend(bounds: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_cu_seqlens(bounds, 2, 4)


def test_derived() -> None:
    bounds = torch.tensor([0, 1, 4, 8], dtype=torch.int32)
    check_cu_seqlens(bounds, 2, 4)
    assert segment_ids(bounds, 2, 4).tolist() == [[0, 1, 1, 1], [2, 2, 2, 2]]
    assert document_bounds(bounds) == [(0, 1), (1, 4), (4, 8)]
