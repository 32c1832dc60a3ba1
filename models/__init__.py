"""Single-device mathematics: configuration, blocks, mixers, feed-forwards, language model.

model = models.build(config)
models.initialize(model, seed=0)
nll = model(tokens, targets=targets)
"""

from triptych.models import feedforwards, mixers
from triptych.models.cache import Cache
from triptych.models.config import ModelConfig
from triptych.models.context import Context
from triptych.models.count import flops_per_token, parameter_count
from triptych.models.generate import generate
from triptych.models.init import fill, init_table, initialize
from triptych.models.lm import LanguageModel
from triptych.models.sharding import Cut, Shards


def build(
    config: ModelConfig, layers: range | None = None, first: bool = True, last: bool = True
) -> LanguageModel:
    """The model of a configuration, or a stage of it; values are unset until `initialize`."""
    return LanguageModel(config, layers=layers, first=first, last=last)


__all__ = [
    "Cache",
    "Context",
    "Cut",
    "LanguageModel",
    "ModelConfig",
    "Shards",
    "build",
    "feedforwards",
    "fill",
    "flops_per_token",
    "generate",
    "init_table",
    "initialize",
    "mixers",
    "parameter_count",
]
