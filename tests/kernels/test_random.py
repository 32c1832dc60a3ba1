"""Counter-based random numbers: the published sequence, the distribution, independence of the layout."""

from __future__ import annotations

import pytest
import torch

from triptych.kernels import hash_bits, hash_normal, hash_uniform, string_key
from triptych.kernels.random import mix64

MASK = (1 << 64) - 1


def splitmix64(z: int) -> int:
    """The finaliser in unbounded integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def signed(z: int) -> int:
    return z - (1 << 64) if z >> 63 else z


def test_published_sequence() -> None:
    golden = 0x9E3779B97F4A7C15
    states = torch.tensor([signed((1234567 + i * golden) & MASK) for i in range(1, 4)])
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(x) & MASK for x in mix64(states)] == expected


def test_bits_are_those_of_exact_integers() -> None:
    golden = 0x9E3779B97F4A7C15
    index = torch.tensor([0, 1, 2, 2**40, -1])
    for key in (0, 1, -7, 2**63 + 11, 2**64 - 1):
        start = splitmix64((key + golden) & MASK)
        expected = [signed(splitmix64((start + (i + 1) * golden) & MASK)) for i in index.tolist()]
        assert hash_bits(key, index).tolist() == expected
        assert hash_bits(torch.tensor(signed(key & MASK)), index).tolist() == expected


def test_uniforms() -> None:
    u = hash_uniform(5, torch.arange(200_000))
    assert u.dtype == torch.float64 and float(u.min()) > 0 and float(u.max()) < 1
    counts = torch.histc(u, bins=100, min=0, max=1)
    chi_squared = float(((counts - 2000) ** 2 / 2000).sum())
    assert 50 < chi_squared < 160, "99 degrees of freedom"
    assert abs(float(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1])) < 0.01


def test_normals() -> None:
    z = hash_normal(5, torch.arange(200_000))
    assert abs(float(z.mean())) < 0.01 and abs(float(z.std()) - 1) < 0.01
    assert abs(float(z.pow(4).mean()) - 3) < 0.1
    assert z.isfinite().all()


def test_neighbouring_keys_are_independent() -> None:
    index = torch.arange(20_000)
    drawn = hash_uniform(torch.arange(8).unsqueeze(1), index)
    assert drawn.shape == (8, 20_000)
    correlations = torch.corrcoef(drawn) - torch.eye(8)
    assert float(correlations.abs().max()) < 0.04


def test_a_part_is_drawn_as_in_the_whole() -> None:
    whole = hash_normal(9, torch.arange(100))
    assert torch.equal(hash_normal(9, torch.arange(30, 60)), whole[30:60])


def test_string_keys_differ_and_stay() -> None:
    assert string_key(0, "blocks.0.mixer.a_log") == 1864025565304633209
    assert len({string_key(s, n) for s in range(10) for n in ("a", "b", "1:a")}) == 30
    assert all(0 <= string_key(s, "x") < 2**63 for s in range(100))


def test_index_must_be_int64() -> None:
    with pytest.raises(ValueError, match=r"index must be int64.*index\.long\(\)"):
        hash_bits(0, torch.arange(3, dtype=torch.int32))
