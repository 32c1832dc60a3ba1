"""Counter-based random numbers in plain int64 arithmetic: a value is a function of (key, index), of nothing
else.

SplitMix64 (Steele, Lea, Flood 2014): the state is hash(key) + index * golden ratio, and the output is its
finaliser. No generator state exists, so any shard, rank or device computes any element by itself.
PyTorch's int64 wraps around on overflow, as two's complement does; >> is arithmetic, hence the masks.

Bits and uniforms are identical on every device; normals are so up to libm's log and cos.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 that has the same 64 bits as `value` modulo 2^64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def mix64(x: Tensor) -> Tensor:
    """The SplitMix64 finaliser, a bijection of int64, elementwise."""
    x = (x ^ _shift_right(x, 30)).mul_(_MULTIPLIER_1)
    x = x.bitwise_xor_(_shift_right(x, 27)).mul_(_MULTIPLIER_2)
    return x.bitwise_xor_(_shift_right(x, 31))


def _stream(key: Tensor | int, index: Tensor) -> Tensor:
    if index.dtype != torch.int64:
        raise ValueError(f"index must be int64, it is {index.dtype}; use index.long()")
    if isinstance(key, int):
        start: Tensor | int = _signed(int(mix64(torch.tensor(_signed(key + _GOLDEN)))))
    else:
        start = mix64(key.to(torch.int64) + _GOLDEN)
    return start + (index + 1) * _GOLDEN


def hash_bits(key: Tensor | int, index: Tensor) -> Tensor:
    """64 random bits (int64) for each pair of key and index, which broadcast.

    key: an int (taken modulo 2^64) or an integer tensor. index: int64 tensor, any value.
    """
    return mix64(_stream(key, index))


def hash_uniform(key: Tensor | int, index: Tensor) -> Tensor:
    """float64, uniform in the open interval (0, 1), of 52 random bits; shapes as in `hash_bits`."""
    # 52 bits and a half: with 53 the largest value would round to 1.
    return (_shift_right(hash_bits(key, index), 12).double() + 0.5).mul_(2.0**-52)


def hash_normal(key: Tensor | int, index: Tensor) -> Tensor:
    """float64, standard normal (Box-Muller on the uniforms at 2*index and 2*index + 1)."""
    radius = hash_uniform(key, 2 * index).log_().mul_(-2.0).sqrt_()
    return radius * hash_uniform(key, 2 * index + 1).mul_(2.0 * math.pi).cos_()


def string_key(seed: int, name: str) -> int:
    """A key in [0, 2^63) for the pair (seed, name): the head of SHA-256, the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
