"""Real digits, as arrays."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits


@pytest.fixture(scope="session")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits: uint8 (N, 8, 8, 1) and labels (N,)."""
    found = load_digits()
    return np.round(found.images * 255 / 16).astype(np.uint8)[..., None], found.target
