"""Byte-level BPE: trained here, or any tokenizer.json of Hugging Face's `tokenizers`.

Byte-level: the 256 bytes are in the vocabulary, so any text can be written and read back exactly.
`<|endoftext|>` (id 0 where trained here) ends each document. In running text it is encoded as ordinary
characters: a document that quotes it does not end there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_DOCUMENT = "<|endoftext|>"

# Names under which published tokenizers know the end of a document, the most likely first.
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


class TextTokenizer:
    """A loaded tokenizer: text to ids and back.

    `vocab_size` is the highest id plus one; `digest` is the SHA-256 of the tokenizer's JSON in canonical
    form, by which a corpus remembers it.
    """

    def __init__(self, text: str, *, eod_token: str | None = None, where: str = "the tokenizer") -> None:
        """text: contents of a tokenizer.json; where: its name in errors. Raises ValueError if unusable."""
        try:
            self._tokenizer = Tokenizer.from_str(text)
            canonical = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
        except Exception as error:  # `tokenizers` raises bare Exception for any fault of the file
            raise ValueError(f"{where} is no tokenizer.json that `tokenizers` can read ({error})") from error
        # Special tokens as ordinary text: see the head of the file. Truncation or padding set in a given
        # file would bend documents.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.text = text
        self.digest = hashlib.sha256(canonical.encode()).hexdigest()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        candidates = (eod_token,) if eod_token else _KNOWN_ENDS
        self._end = next(((name, vocabulary[name]) for name in candidates if name in vocabulary), None)
        self._no_end = (
            f"{where} has none of {', '.join(candidates)} to end a document; name one with eod_token"
        )
        if eod_token and self._end is None:
            raise ValueError(self._no_end)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, eod_token: str | None = None) -> TextTokenizer:
        """Reads a tokenizer.json, or the one in a directory. Raises ValueError with the path if it cannot."""
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"tokenizer {file} cannot be read ({error}); give the path of a tokenizer.json"
            ) from error
        return cls(text, eod_token=eod_token, where=f"tokenizer {file}")

    def _get_end(self) -> tuple[str, int]:
        if self._end is None:
            raise ValueError(self._no_end)
        return self._end

    @property
    def eod_token(self) -> str:
        """The token that ends a document. Raises ValueError if the tokenizer has none that is known."""
        return self._get_end()[0]

    @property
    def eod_id(self) -> int:
        """Id of `eod_token`."""
        return self._get_end()[1]

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without an end of document."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Ids of all texts back to back, each with the end-of-document token, and the length of each."""
        eod_id = self.eod_id
        pieces: list[int] = []
        lengths = np.zeros(len(texts), np.int64)
        for i, encoding in enumerate(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)):
            ids = encoding.ids
            pieces += ids
            pieces.append(eod_id)
            lengths[i] = len(ids) + 1
        return np.asarray(pieces, np.int32), lengths

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Text of the ids; bytes that are no UTF-8 (a cut character) become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=not keep_special)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Byte-level BPE of at most vocab_size entries (fewer, if the texts give no more merges).

    The same texts in the same order give the same tokenizer. Raises ValueError if vocab_size < 257.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 1:
        raise ValueError(f"vocab_size={vocab_size} is below 257, the 256 bytes and {END_OF_DOCUMENT}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(texts), trainer)
    return TextTokenizer(tokenizer.to_str())
