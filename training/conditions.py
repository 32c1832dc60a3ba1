"""What samples are drawn for: the label or text of each, as a function of its number alone.

Shape legend: B samples, M texts, L tokens of a text, E their channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from triptych.models.diffusion_config import ConditioningConfig


@dataclass(frozen=True)
class Conditions:
    """Labels and texts that samples take in turn: sample n has labels[n % len(labels)].

    `training.sampling.sample_keys` gives the noise likewise, so that sample n is the same image whatever
    batch, rank or worker draws it. Make one with `conditions`.
    """

    labels: tuple[int, ...] = ()
    """Empty for a model without classes."""
    texts: Tensor | None = None
    """Embedded texts (M, L, E) of a model that reads them."""

    def labels_of(self, numbers: Tensor) -> Tensor:
        """Labels int64 (B,) of samples numbered int64 (B,)."""
        return torch.tensor(self.labels, dtype=torch.int64, device=numbers.device)[numbers % len(self.labels)]

    def of(self, numbers: Tensor) -> dict[str, Tensor]:
        """What the denoiser is told of samples numbered int64 (B,)."""
        found = {}
        if self.labels:
            found["labels"] = self.labels_of(numbers)
        if self.texts is not None:
            found["text"] = self.texts.to(numbers.device)[numbers % len(self.texts)]
        return found


def conditions(
    config: ConditioningConfig, labels: Sequence[int] | None = None, texts: str | Path | None = None
) -> Conditions:
    """What a model with this conditioning can be asked for.

    labels: classes, taken in turn; None: all of them, so that a set is balanced. texts: a .npy of embedded
    texts (M, L, E), taken in turn. Raises ValueError for labels or texts that the model does not know.
    """
    if config.kind != "class" and labels is not None:
        raise ValueError(
            f"labels {list(labels)} for a model of model.conditioning.kind={config.kind}; leave them out"
        )
    if config.kind != "text" and texts is not None:
        raise ValueError(
            f"texts {texts} for a model of model.conditioning.kind={config.kind}; leave them out"
        )
    if config.kind == "class":
        chosen = tuple(range(config.num_classes)) if labels is None else tuple(labels)
        unknown = [label for label in chosen if not 0 <= label < config.num_classes]
        if unknown or not chosen:
            raise ValueError(
                f"labels {unknown} are not among the model's classes; give one or more from 0 to "
                f"{config.num_classes - 1} (model.conditioning.num_classes={config.num_classes})"
            )
        return Conditions(labels=chosen)
    return Conditions(texts=_read_texts(config, texts)) if config.kind == "text" else Conditions()


def _read_texts(config: ConditioningConfig, path: str | Path | None) -> Tensor:
    wanted = f"(texts, {config.text_length}, {config.text_size})"
    if path is None:
        raise ValueError(
            "the model draws from embedded texts (model.conditioning.kind=text); give a .npy of shape "
            f"{wanted}, made by the encoder of its training data"
        )
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"texts {path} cannot be read ({error}); give a .npy of shape {wanted}") from error
    if found.ndim != 3 or not len(found) or found.shape[1:] != (config.text_length, config.text_size):
        raise ValueError(f"texts {path} have shape {found.shape}; the model wants {wanted}")
    return torch.from_numpy(found.astype(np.float32))
