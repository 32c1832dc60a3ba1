"""The arithmetic of the global order: permutations by hash, and which source a sample comes from.

Everything here is a pure function of integers and weights. No stateful generator is involved, so the
order is the same under every version of numpy, and any sample can be found without those before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt


def key(*parts: str | int) -> int:
    """64-bit hash of the parts, each of which must contain no newline."""
    text = "\n".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def permutation(n: int, seed_key: int) -> npt.NDArray[np.int64]:
    """A permutation of range(n), keyed: the indices sorted by a 64-bit hash of (seed_key, index).

    The hash is the SplitMix64 finaliser (Steele, Lea & Flood, OOPSLA 2014) over a Weyl sequence that
    starts at seed_key; it is a bijection of 64 bits, so no two indices tie.
    """
    with np.errstate(over="ignore"):
        z = np.uint64(seed_key) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.argsort(z, kind="stable").astype(np.int64)


class Mixture:
    """Which source the i-th sample comes from, and which sample of that source it is.

    Time is cut into blocks of BLOCK samples, all alike. In a block, source s has n_s places, the
    weights' shares of BLOCK rounded by largest remainder; its k-th place is where (k + 1/2) / n_s of the
    block has passed, merged over the sources (ties: the first source first). So for any i

        i = block * BLOCK + place    source = source_at[place]    sample = block * n_source + rank_at[place]

    takes constant time, every prefix holds each source's share to within half the number of sources,
    and shares are exact to 1/(2 * BLOCK).
    """

    BLOCK = 1 << 16

    def __init__(self, weights: Sequence[float], names: Sequence[str]) -> None:
        """Raises ValueError for a weight too small to have one place in a block."""
        shares = [Fraction(weight) * self.BLOCK / sum(map(Fraction, weights)) for weight in weights]
        counts = [int(share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda s: (counts[s] - shares[s], s))
        for s in by_remainder[: self.BLOCK - sum(counts)]:
            counts[s] += 1
        for name, weight, count in zip(names, weights, counts):
            if count == 0:
                raise ValueError(
                    f"weight={weight} of source {name} is below 1/{self.BLOCK} of the sum of the weights, "
                    "so it would never be drawn; raise it or remove the source"
                )
        self.counts = np.asarray(counts, np.int64)

    @cached_property
    def _schedule(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """source_at and rank_at, both (BLOCK,)."""
        sources = np.repeat(np.arange(len(self.counts)), self.counts)
        ranks = np.concatenate([np.arange(count) for count in self.counts])
        order = np.argsort((2 * ranks + 1) / (2 * self.counts[sources]), kind="stable")
        return sources[order], ranks[order]

    def locate(self, i: int) -> tuple[int, int]:
        """(source, sample of that source) of global sample i >= 0."""
        if len(self.counts) == 1:
            return 0, i
        source_at, rank_at = self._schedule
        block, place = divmod(i, self.BLOCK)
        source = int(source_at[place])
        return source, block * int(self.counts[source]) + int(rank_at[place])

    def consumed(self, total: int) -> list[int]:
        """How many samples of each source are among the first `total`."""
        if len(self.counts) == 1:
            return [total]
        block, place = divmod(total, self.BLOCK)
        part = np.bincount(self._schedule[0][:place], minlength=len(self.counts))
        return [int(count) for count in block * self.counts + part]
