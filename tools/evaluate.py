"""Validation loss of a checkpoint, beside a bigram model on the same targets: `triptych evaluate`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from triptych.data_pipeline.baseline import bigram_baseline
from triptych.data_pipeline.dataset import IGNORE, SequentialDataset
from triptych.data_pipeline.loader import BatchLoader, open_validation
from triptych.data_pipeline.tokenizer import TextTokenizer
from triptych.tools.render import table_of
from triptych.tools.trained import TrainedLanguageModel, load_language_model

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Evaluation:
    """Cross-entropies in nats per token over `targets` validation targets."""

    step: int
    loss: float
    samples: int
    targets: int
    bits_per_byte: float | None
    """None where the run names no tokenizer that can be read."""
    bigram_loss: float | None
    """None where no baseline was asked for."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def beats_bigram(self) -> bool | None:
        """Whether the loss is below the bigram model's; None without one."""
        return None if self.bigram_loss is None else self.loss < self.bigram_loss

    def table(self) -> RenderableType:
        """The numbers as a rich renderable."""
        rows = [
            ["validation loss (nats per token)", f"{self.loss:.4f}"],
            ["perplexity", f"{self.perplexity:.3f}"],
        ]
        if self.bits_per_byte is not None:
            rows.append(["bits per byte", f"{self.bits_per_byte:.4f}"])
        if self.bigram_loss is not None:
            verdict = "the model is better" if self.beats_bigram else "the model is NOT better"
            rows.append(["interpolated bigram model, same targets", f"{self.bigram_loss:.4f} ({verdict})"])
        rows += [["targets", str(self.targets)], ["samples", str(self.samples)]]
        return table_of(f"Step {self.step}", ["figure", "value"], rows)

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        perplexity = self.perplexity if math.isfinite(self.perplexity) else None
        return asdict(self) | {"perplexity": perplexity, "beats_bigram": self.beats_bigram}


def evaluate(
    path: str | Path,
    *,
    samples: int | None = None,
    baseline: bool = False,
    batch_size: int = 8,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Validation loss of the checkpoint at `path` (run directory or checkpoint, of any layout) on one device.

    samples: validation sequences to use, the first of the validation order; None takes as many as the run's
    own evaluation (train.eval_samples). batch_size: sequences at a time.
    baseline: also fit the interpolated bigram model on the whole training split and give its cross-entropy on
    exactly the same targets.
    Raises ValueError when checkpoint or corpora are not where the run says they are, or a size is below 1.
    """
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} evaluates nothing; give 1 or more")
    say = progress or (lambda line: None)
    trained = load_language_model(path, device)
    validation = open_validation(
        trained.data, limit=samples or trained.train.eval_samples, vocab_size=trained.model.vocab_size
    )
    if validation is None:
        raise ValueError(
            "the run's configuration names no validation corpus (data.valid): there is nothing to evaluate on"
        )
    say(f"step {trained.step}: {len(validation)} samples of {trained.data.seq_len} tokens")
    total, targets = cross_entropy(trained, validation, batch_size)
    if not targets:
        raise ValueError(
            "the validation samples hold no target; give a longer validation corpus (data.valid)"
        )
    bigram = None
    if baseline:
        say("fitting the bigram model on the training split")
        bigram = bigram_baseline(trained.data, trained.model.vocab_size, validation).nats_per_token
    size = target_bytes(trained, validation)
    return Evaluation(
        step=trained.step,
        loss=total / targets,
        samples=len(validation),
        targets=targets,
        bits_per_byte=total / math.log(2) / size if size else None,
        bigram_loss=bigram,
    )


@torch.no_grad()
def cross_entropy(
    trained: TrainedLanguageModel, validation: SequentialDataset, batch_size: int
) -> tuple[float, int]:
    """Sum of the cross-entropy in nats over all targets, accumulated in float64, and their number."""
    total, targets = 0.0, 0
    for first in range(0, len(validation), batch_size):
        size = min(batch_size, len(validation) - first)
        with BatchLoader(validation, size, size, consumed=first, read_ahead=0) as loader:
            (batch,) = next(loader)
        place = {
            name: value.to(trained.device) for name, value in batch.items() if isinstance(value, torch.Tensor)
        }
        with trained.autocast():
            nll = trained.module(
                place["tokens"], document_ids=place["document_ids"], targets=place["targets"]
            )
        total += float(nll.double().sum())
        targets += int((place["targets"] != IGNORE).sum())
    return total, targets


def target_bytes(trained: TrainedLanguageModel, validation: SequentialDataset) -> int | None:
    """UTF-8 bytes of the text that the targets spell; None where the run's tokenizer cannot be read.

    The first token of each document is no target, and neither are its bytes; the end of a document is a
    target of no bytes. A character cut by the edge of a sample counts as the three bytes of U+FFFD.
    """
    if trained.data.tokenizer is None:
        return None
    try:
        words = TextTokenizer.load(trained.data.tokenizer)
    except ValueError:
        return None
    size = 0
    for number in range(len(validation)):
        row = validation.sample(number)["targets"]
        size += len(words.decode(row[row != IGNORE].tolist()).encode())
    return size
