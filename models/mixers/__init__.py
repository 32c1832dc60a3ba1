"""Sequence mixers; importing a file here registers its mixer."""

from triptych.models.mixers.attention import Attention
from triptych.models.mixers.attention_moe import AttentionMoE
from triptych.models.mixers.cross_attention import CrossAttention
from triptych.models.mixers.dimsum import Dimsum
from triptych.models.mixers.mamba1 import Mamba1
from triptych.models.mixers.mamba2 import Mamba2
from triptych.models.mixers.mlstm import MLSTM
from triptych.models.mixers.pool import Pool
from triptych.models.mixers.ss2d import SS2D
from triptych.models.mixers.wkv import WKV

__all__ = [
    "MLSTM",
    "SS2D",
    "WKV",
    "Attention",
    "AttentionMoE",
    "CrossAttention",
    "Dimsum",
    "Mamba1",
    "Mamba2",
    "Pool",
]
