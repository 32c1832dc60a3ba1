"""Text from a checkpoint: `triptych sample`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def sample(
    path: str | Path,
    *,
    prompts: Sequence[str],
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    tokenizer: str | Path | None = None,
) -> list[str]:
    """Continue each prompt; returns prompt + continuation, one string per prompt.

    path: a run directory (its latest good checkpoint) or one checkpoint directory, of any layout.
    tokenizer: tokenizer.json to use in place of the one that the run's configuration names.
    Raises ValueError when there is no checkpoint or no tokenizer at the places named.
    """
    raise NotImplementedError
