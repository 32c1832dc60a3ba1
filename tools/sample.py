"""Text from a checkpoint: `triptych sample`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from triptych.data_pipeline.tokenizer import TextTokenizer
from triptych.models import generate
from triptych.tools.trained import TrainedLanguageModel, load_language_model


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

    path: a run directory (its newest valid checkpoint) or one checkpoint directory, of any layout.
    max_new_tokens: most tokens to add; a text ends earlier where the model ends its document.
    temperature: 0 takes the likeliest token. top_k, top_p: see models.generate.
    tokenizer: tokenizer.json to use in place of the one that the run's configuration names.
    An empty prompt begins a document. The result is a function of the checkpoint, the prompt, the options and
    the seed; it does not depend on the other prompts.
    Raises ValueError when there is no checkpoint or no tokenizer at the places named.
    """
    trained = load_language_model(path, device)
    words = load_tokenizer(trained, tokenizer)
    texts = []
    # One prompt at a time: prompts of different lengths would need padding, which a state cache cannot
    # ignore.
    for prompt in prompts:
        # Documents stand behind the end of the one before them.
        ids = words.encode(prompt) or [words.eod_id]
        with trained.autocast():
            (row,) = generate(
                trained.module,
                torch.tensor([ids], device=trained.device),
                max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                eos=words.eod_id,
            ).tolist()
        new = row[len(ids) :]
        if words.eod_id in new:
            new = new[: new.index(words.eod_id)]
        texts.append(words.decode((ids if prompt else []) + new))
    return texts


def load_tokenizer(trained: TrainedLanguageModel, tokenizer: str | Path | None) -> TextTokenizer:
    """The tokenizer at `tokenizer`, else of the run.

    Raises ValueError when neither names one, when the file cannot be read, or when it has ids that the model
    has not.
    """
    place = str(tokenizer) if tokenizer is not None else trained.data.tokenizer
    if place is None:
        raise ValueError(
            "the run's configuration names no data.tokenizer; give the tokenizer.json of its corpus with "
            "--tokenizer"
        )
    words = TextTokenizer.load(place)
    if words.vocab_size > trained.model.vocab_size:
        raise ValueError(
            f"tokenizer {place} has {words.vocab_size} ids but the model {trained.model.vocab_size}; "
            "give the one that the model was trained with"
        )
    return words
