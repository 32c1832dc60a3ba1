"""Random numbers as functions of a sample's key, in numpy: no generator state, no global seed.

The same SplitMix64 as in `order.permutation`. Uniforms are the same everywhere, normals up to libm's log and
cos.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from triptych.data_pipeline.order import key


def uniforms(sample_key: int, purpose: str, count: int) -> npt.NDArray[np.float64]:
    """(count,) in the open interval (0, 1), of 52 bits each; purpose parts the draws of one sample."""
    with np.errstate(over="ignore"):
        start = np.uint64(key(sample_key, purpose))
        z = start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def normals(sample_key: int, purpose: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Standard normals of that shape (Box-Muller)."""
    count = int(np.prod(shape))
    radius, angle = uniforms(sample_key, purpose, 2 * count).reshape(2, count)
    return (np.sqrt(-2.0 * np.log(radius)) * np.cos(2.0 * np.pi * angle)).reshape(shape)
