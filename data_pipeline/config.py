"""The `data:` section of a run's configuration, and the options of `triptych data text`."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class SourceConfig(BaseModel):
    """One corpus in Megatron's .bin/.idx format. May be written as the path alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(min_length=1)
    """Path without suffix: `data/stdlib/train` means train.bin and train.idx there."""

    weight: float = 1.0
    """Share of the samples, relative to the other sources' weights; any positive number."""

    name: str | None = None
    """Name in messages and in the saved data position; None means the path."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("path")
    @classmethod
    def _without_suffix(cls, path: str) -> str:
        return path.removesuffix(".bin").removesuffix(".idx")

    @field_validator("weight")
    @classmethod
    def _positive(cls, weight: float) -> float:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"weight={weight} must be a positive finite number; leave out a source not wanted"
            )
        return weight

    @property
    def label(self) -> str:
        """The name under which the source is reported and its position saved."""
        return self.name or self.path


class DataConfig(BaseModel):
    """Section `data:` of text: which corpora, how long a sample, in which order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["text"] = "text"
    """Token files."""

    sources: tuple[SourceConfig, ...]
    """Training corpora, mixed by weight."""

    valid: tuple[SourceConfig, ...] | None = None
    """Validation corpora, in file order one after the other (weights are not used); None means none."""

    tokenizer: str | None = None
    """Path of a tokenizer.json (Hugging Face tokenizers); needed to sample, checked against the corpora."""

    seq_len: int = Field(gt=0)
    """Tokens of one sample, T."""

    seed: int | None = None
    """Seed of the order of the data; None means train.seed."""

    # Not Field(min_length=1): with one source that is wrong, pydantic would also say that there is none.
    @field_validator("sources")
    @classmethod
    def _at_least_one(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        if not sources:
            raise ValueError("no corpus is listed; give at least one, such as data/stdlib/train")
        return sources

    @field_validator("sources", "valid")
    @classmethod
    def _distinct(cls, sources: tuple[SourceConfig, ...] | None) -> tuple[SourceConfig, ...] | None:
        labels = [source.label for source in sources or ()]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"{twice[0]} is listed twice; list each corpus once and raise its weight")
        return sources


class TextCorpusOptions(BaseModel):
    """What `triptych data text` is asked to build."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: tuple[str, ...] = Field(min_length=1)
    """`stdlib` (the running Python's standard library), or files and directories: text, JSONL, Parquet.
    A text file is one document, and so is a line of JSONL and a row of Parquet."""

    out: str = Field(min_length=1)
    """Directory of the corpus: train/valid .bin/.idx, tokenizer.json, manifest.json."""

    tokenizer: str | None = None
    """A tokenizer.json to use; None trains a byte-level BPE."""

    vocab_size: int = Field(default=512, ge=257)
    """Entries of the BPE to train: 256 bytes, <|endoftext|>, and merges. Not used with a given tokenizer."""

    valid_share: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the documents held out for validation, chosen by a hash of their content; 0 means none."""

    tokenizer_bytes: int = Field(default=8_000_000, gt=0)
    """The BPE is trained on this many bytes of the training documents, or a little more; all if fewer."""

    extensions: tuple[str, ...] = (".txt", ".md", ".rst", ".py", ".jsonl", ".parquet")
    """Endings of the files taken from a directory; a file named itself is taken whatever its ending."""

    jsonl_key: str = "text"
    """Key of a JSON line that holds the document."""

    parquet_column: str = "text"
    """Column of a Parquet file that holds the documents."""

    eod_token: str | None = None
    """Token written at the end of each document; None means the tokenizer's <|endoftext|> or the like."""

    strict: bool = False
    """Refuse bad input (undecodable file, broken JSON line); otherwise it is left out, counted and named."""

    workers: int | None = Field(default=None, gt=0)
    """Processes that tokenize; None means one per available core. The result does not depend on it."""

    overwrite: bool = False
    """Replace a corpus in `out` that was made with other options."""

    @field_validator("source", mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("source", "extensions")
    @classmethod
    def _nonempty_strings(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if not all(values):
            raise ValueError("an empty string stands for nothing; remove it")
        return values
