"""Do the tokenizer, the corpora and the model speak of the same vocabulary? Asked before a run starts."""

from __future__ import annotations

from pathlib import Path

from triptych.data_pipeline.config import DataConfig, SourceConfig
from triptych.data_pipeline.indexed import IndexedTokens
from triptych.data_pipeline.manifest import Manifest
from triptych.data_pipeline.tokenizer import TextTokenizer

# Without a manifest, this many tokens from the start of a corpus are looked at before a run. The rest is
# checked as it is read (PackedSource.read).
_LOOKED_AT = 1 << 24


def check_vocabulary(config: DataConfig, vocab_size: int) -> None:
    """Raises ValueError if an id of the tokenizer or of a corpus is no row of the model's embedding.

    Also if a corpus records another tokenizer than data.tokenizer. Ids may be fewer than the model's
    vocabulary, which is often padded to a multiple.
    """
    tokenizer = None
    if config.tokenizer is not None:
        tokenizer = TextTokenizer.load(config.tokenizer)
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"tokenizer {config.tokenizer} has {tokenizer.vocab_size} ids but model.vocab_size="
                f"{vocab_size}; set model.vocab_size to {tokenizer.vocab_size} or more"
            )
    for source in (*config.sources, *(config.valid or ())):
        _check_source(source, vocab_size, config.tokenizer, tokenizer)


def _check_source(
    source: SourceConfig, vocab_size: int, tokenizer_path: str | None, tokenizer: TextTokenizer | None
) -> None:
    path = Path(source.path)
    manifest = Manifest.read(path.parent)
    if manifest is None or f"{path.name}.bin" not in manifest.files:
        corpus = IndexedTokens(source.path)
        largest, smallest = int(corpus.flat[:_LOOKED_AT].max()), int(corpus.flat[:_LOOKED_AT].min())
        limit = vocab_size if tokenizer is None else tokenizer.vocab_size
        if largest >= limit or smallest < 0:
            owner = (
                f"model.vocab_size={vocab_size}"
                if tokenizer is None
                else f"tokenizer {tokenizer_path} has {limit}"
            )
            wrong = largest if largest >= limit else smallest
            raise ValueError(
                f"corpus {source.path} holds token {wrong} but {owner}; it was made with another tokenizer"
            )
        return
    if manifest.vocab_size > vocab_size:
        raise ValueError(
            f"corpus {source.path} was made with a vocabulary of {manifest.vocab_size} but model.vocab_size="
            f"{vocab_size}; set model.vocab_size to {manifest.vocab_size} or more"
        )
    if tokenizer is not None and manifest.tokenizer_digest != tokenizer.digest:
        raise ValueError(
            f"corpus {source.path} was made with another tokenizer (vocabulary {manifest.vocab_size}) than "
            f"data.tokenizer={tokenizer_path} (vocabulary {tokenizer.vocab_size}); "
            f"use {path.parent}/tokenizer.json"
        )
