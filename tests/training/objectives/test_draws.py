"""Draws belong to images: the same whole and packed, alone and among others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.objectives.batches import PATCH, image_batch, keys, kolmogorov_smirnov, normal, pack
from triptych.models.patches import patchify
from triptych.training.objectives.draws import (
    Rows,
    image_noise,
    kept_packed_tokens,
    kept_tokens,
    token_noise,
)

SIZES = [(4, 8), (8, 8), (2, 6), (10, 4), (8, 2)]


def packed(rows: list[list[int]], length: int) -> dict[str, Any]:
    images = [normal(number, 2, *size) for number, size in enumerate(SIZES)]
    return pack(image_batch(len(SIZES)), images, rows, length)


def rows_of(batch: dict[str, Any]) -> Rows:
    return Rows(batch["positions"], batch["document_ids"], batch["sizes"])


def test_noise_is_standard_normal() -> None:
    noise = image_noise(keys(50), (3, 16, 16), "test")
    values = noise.flatten()
    cumulative = 0.5 * (1 + torch.erf(values / 2**0.5))
    assert kolmogorov_smirnov(values, cumulative) < 1.95
    # Neither between images nor between purposes is there a correlation.
    flat = noise.flatten(1)
    other = image_noise(keys(50), (3, 16, 16), "other").flatten(1)
    correlations = (flat @ flat.T / flat.shape[1]).fill_diagonal_(0.0)
    assert float(correlations.abs().max()) < 5 / flat.shape[1] ** 0.5
    assert float((flat * other).mean().abs()) < 5 / flat.numel() ** 0.5


def test_noise_of_an_image_does_not_know_the_batch() -> None:
    together = image_noise(keys(5), (2, 4, 6), "test")
    for number in range(5):
        alone = image_noise(keys(5)[number : number + 1], (2, 4, 6), "test")
        assert torch.equal(alone[0], together[number])


def test_packed_images_have_the_noise_of_whole_ones() -> None:
    batch = packed([[1, 2], [0, 3, 4]], length=24)
    noise = token_noise(batch["image_keys"], rows_of(batch), 2, PATCH, "test")
    starts = {1: (0, 0), 2: (0, 16), 0: (1, 0), 3: (1, 8), 4: (1, 18)}
    for number, (row, start) in starts.items():
        whole = image_noise(keys(5)[number : number + 1], (2, *SIZES[number]), "test")
        tokens = patchify(whole, PATCH)[0]
        assert torch.equal(noise[row, start : start + len(tokens)], tokens)
    assert bool((noise[batch["document_ids"] == 3] == 0).all())
    assert int((batch["document_ids"] == 3).sum()) == 7


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.73])
@pytest.mark.parametrize("length", [1, 7, 64])
def test_kept_tokens_are_sorted_and_as_many_as_the_paper_keeps(length: int, rate: float) -> None:
    kept = kept_tokens(keys(30), length, rate)
    assert kept.dtype == torch.int64 and kept.shape == (30, length - int(length * rate))
    assert bool((kept.diff(dim=1) > 0).all())
    assert int(kept.min()) >= 0 and int(kept.max()) < length


def test_every_token_is_kept_as_often() -> None:
    kept = kept_tokens(keys(4000), 16, 0.5)
    counts = torch.bincount(kept.flatten(), minlength=16).double()
    # Binomial(4000, 1/2): standard deviation 32.
    assert float((counts - 2000).abs().max()) < 4.5 * 32
    # And pairs of tokens as often as in draws without replacement: 7 / 15 of the times that one is.
    first = (kept == 0).any(dim=1)
    both = (first & (kept == 9).any(dim=1)).sum() / first.sum()
    assert float(both) == pytest.approx(7 / 15, abs=4.5 * 0.012)


def test_kept_tokens_belong_to_the_key() -> None:
    together = kept_tokens(keys(6), 32, 0.4)
    for number in range(6):
        assert torch.equal(kept_tokens(keys(6)[number : number + 1], 32, 0.4)[0], together[number])
    assert not torch.equal(together[0], together[1])


def test_kept_tokens_of_a_lone_packed_image_are_those_of_the_whole_one() -> None:
    batch = packed([[1]], length=16)
    kept = kept_packed_tokens(batch["sample_keys"], batch["image_keys"], rows_of(batch), 0.5)
    assert torch.equal(kept, kept_tokens(keys(5)[1:2], 16, 0.5))


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.8])
def test_each_packed_image_keeps_its_share(rate: float) -> None:
    batch = packed([[1, 2], [0, 3, 4], [4, 0]], length=26)
    kept = kept_packed_tokens(batch["sample_keys"], batch["image_keys"], rows_of(batch), rate)
    assert kept.shape == (3, 26 - int(26 * rate))
    assert bool((kept.diff(dim=1) > 0).all())
    ids = batch["document_ids"]
    for row in range(3):
        for document in range(4):
            size = int((ids[row] == document).sum())
            count = int((ids[row].gather(0, kept[row]) == document).sum())
            assert abs(count - size * (1 - rate)) <= 1


def test_which_tokens_of_a_packed_image_go_first_is_its_own() -> None:
    """Among other neighbours an image may keep one token more or less, but of the same order."""

    def kept_of_first(rows: list[list[int]]) -> Tensor:
        batch = packed(rows, length=24)
        kept = kept_packed_tokens(batch["sample_keys"], batch["image_keys"], rows_of(batch), 0.5)
        of_first = kept[0][batch["document_ids"][0].gather(0, kept[0]) == 0]
        return set(of_first.tolist())

    alone, beside = kept_of_first([[3]]), kept_of_first([[3, 2]])
    assert alone <= beside or beside <= alone
    assert abs(len(alone) - len(beside)) <= 1


def test_sums_over_images_leave_padding_out() -> None:
    batch = packed([[1, 2], [0, 3, 4]], length=24)
    rows = rows_of(batch)
    values = normal(5, 2, 24)
    values[batch["document_ids"] == 3] = float("nan")
    sums = rows.sums(values)
    assert torch.equal(rows.sums(torch.ones(2, 24)), torch.tensor([[16.0, 3, 0], [8, 10, 4]]))
    torch.testing.assert_close(sums[1, 1], values[1, 8:18].sum())
    assert float(sums[0, 2]) == 0
