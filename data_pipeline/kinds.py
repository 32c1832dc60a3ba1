"""The kinds of data: which configuration reads what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Tag, TypeAdapter

from triptych.data_pipeline.config import DataConfig
from triptych.data_pipeline.images.config import ImageDataConfig


def _kind(values: Any) -> str:
    kind = values.get("kind", "text") if isinstance(values, Mapping) else getattr(values, "kind", "text")
    return f"({kind})"


# Parentheses tell a tag from a key in the locations of pydantic's errors.
AnyDataConfig = Annotated[
    Annotated[DataConfig, Tag("(text)")] | Annotated[ImageDataConfig, Tag("(images)")], Discriminator(_kind)
]
"""Section `data:`; `kind` says which, text where it is not given."""


def read_config(values: Mapping[str, Any]) -> DataConfig | ImageDataConfig:
    """The data of a run from plain values. Raises pydantic's ValidationError."""
    return TypeAdapter(AnyDataConfig).validate_python(values)
