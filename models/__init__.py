"""Single-device mathematics: configuration, blocks, mixers, feed-forwards, language models, denoisers.

model = models.build(config)
models.initialize(model, seed=0)
nll = model(tokens, targets=targets)
"""

from triptych.models import feedforwards, mixers
from triptych.models.cache import Cache
from triptych.models.config import LanguageConfig, ModelConfig
from triptych.models.context import Context
from triptych.models.count import flops_per_token, parameter_count
from triptych.models.diffusion import DiffusionModel
from triptych.models.diffusion_config import DiffusionConfig
from triptych.models.families import AnyModelConfig, Model, build, model_class, read_config
from triptych.models.generate import generate
from triptych.models.init import fill, init_table, initialize
from triptych.models.lm import LanguageModel
from triptych.models.sharding import Cut, Shards
from triptych.models.vision_config import VisionConfig

__all__ = [
    "AnyModelConfig",
    "Cache",
    "Context",
    "Cut",
    "DiffusionConfig",
    "DiffusionModel",
    "LanguageConfig",
    "LanguageModel",
    "Model",
    "ModelConfig",
    "Shards",
    "VisionConfig",
    "build",
    "feedforwards",
    "fill",
    "flops_per_token",
    "generate",
    "init_table",
    "initialize",
    "mixers",
    "model_class",
    "parameter_count",
    "read_config",
]
