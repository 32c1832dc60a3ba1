import pytest
import torch

from triptych.models.cache import Cache
from triptych.models.context import build_context, document_bounds


def test_bounds_and_positions_of_packed_documents():
    ids = torch.tensor([[4, 4, 4, 9, 9], [9, 9, 1, 1, 0]])
    cu_seqlens, positions = document_bounds(ids)
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, 3, 5, 7, 9, 10]
    assert positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 0]]


def test_one_document_per_row_needs_no_bounds():
    assert document_bounds(torch.tensor([[3, 3, 3], [3, 3, 3]])) == (None, None)
    context = build_context(torch.zeros(2, 3, dtype=torch.int64))
    assert context.cu_seqlens is None
    assert context.positions_of(3, torch.device("cpu")).tolist() == [0, 1, 2]


def test_documents_on_meta_have_no_bounds():
    assert build_context(torch.zeros(2, 3, dtype=torch.int64, device="meta")).cu_seqlens is None


def test_positions_go_on_from_the_cache():
    context = build_context(cache=Cache(length=7))
    assert context.positions_of(2, torch.device("cpu")).tolist() == [7, 8]
    with pytest.raises(ValueError, match="document_ids with a cache"):
        build_context(torch.zeros(1, 2, dtype=torch.int64), cache=Cache())
