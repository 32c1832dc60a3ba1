"""The families of models: which configuration builds which model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Tag, TypeAdapter

from triptych.models.config import LanguageConfig, ModelConfig
from triptych.models.diffusion import DiffusionModel
from triptych.models.diffusion_config import DiffusionConfig
from triptych.models.lm import LanguageModel
from triptych.models.vision import VisionModel
from triptych.models.vision_config import VisionConfig

Model = LanguageModel | DiffusionModel | VisionModel


def _family(values: Any) -> str:
    family = values.get("family", "lm") if isinstance(values, Mapping) else getattr(values, "family", "lm")
    return f"({family})"


# Parentheses tell a tag from a key in the locations of pydantic's errors.
AnyModelConfig = Annotated[
    Annotated[LanguageConfig, Tag("(lm)")]
    | Annotated[DiffusionConfig, Tag("(diffusion)")]
    | Annotated[VisionConfig, Tag("(vision)")],
    Discriminator(_family),
]
"""Section `model:`; `family` says which, lm where it is not given."""


def read_config(values: Mapping[str, Any]) -> LanguageConfig | DiffusionConfig | VisionConfig:
    """A model's configuration from plain values. Raises pydantic's ValidationError."""
    return TypeAdapter(AnyModelConfig).validate_python(values)


def model_class(config: ModelConfig) -> type[Model]:
    """The class that the configuration builds."""
    if isinstance(config, VisionConfig):
        return VisionModel
    return DiffusionModel if isinstance(config, DiffusionConfig) else LanguageModel


def build(config: ModelConfig, layers: range | None = None, first: bool = True, last: bool = True) -> Model:
    """The model of a configuration, or a stage of it; values are unset until `initialize`."""
    return model_class(config)(config, layers=layers, first=first, last=last)  # type: ignore[arg-type]
