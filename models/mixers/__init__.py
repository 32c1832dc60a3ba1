"""Sequence mixers; importing a file here registers its mixer."""

from triptych.models.mixers.attention import Attention
from triptych.models.mixers.mamba2 import Mamba2

__all__ = ["Attention", "Mamba2"]
