"""Random numbers as functions of a sample's key, in numpy: no generator state, no global seed.

The same SplitMix64 as in `order.permutation`. Uniforms are the same everywhere, normals up to libm's log and
cos.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from triptych.data_pipeline.order import key

_TRIES = 32


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


def beta(sample_key: int, purpose: str, alpha: float) -> float:
    """A number from Beta(alpha, alpha), in [0, 1].

    Of two gamma variates the share of the first, by Marsaglia and Tsang's rejection (ACM TOMS 26, 2000), in
    logarithms, as for small alpha both may be tiny.
    """
    first, second = (_log_gamma_variate(sample_key, f"{purpose} {side}", alpha) for side in "ab")
    return float(1.0 / (1.0 + np.exp(np.clip(second - first, -700.0, 700.0))))


def _log_gamma_variate(sample_key: int, purpose: str, alpha: float) -> float:
    """The logarithm of a number from Gamma(alpha, 1), alpha > 0."""
    # For alpha below 1 from Gamma(alpha + 1), times a uniform to the power 1 / alpha.
    raised = alpha + 1.0 if alpha < 1.0 else alpha
    d = raised - 1.0 / 3.0
    z = normals(sample_key, f"{purpose} normal", (_TRIES,))
    accept = uniforms(sample_key, f"{purpose} uniform", _TRIES)
    v = (1.0 + z / np.sqrt(9.0 * d)) ** 3
    logs = np.log(np.maximum(v, 1e-300))
    taken = (v > 0) & (np.log(accept) < 0.5 * z**2 + d - d * v + d * logs)
    # More than 95 of 100 tries are taken, so that none of them is taken once in 1e40.
    found = float(np.log(d) + logs[int(np.argmax(taken))])
    if alpha >= 1.0:
        return found
    return found + float(np.log(uniforms(sample_key, f"{purpose} power", 1)[0])) / alpha
