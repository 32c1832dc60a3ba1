"""Mistakes in train:, checkpoint: and log: are named with key, value and mend."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from triptych.training.config import CheckpointConfig, LogConfig, TrainConfig

GOOD = {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"micro_batch_size": 3}, r"train.micro_batch_size=3 does not divide .*=8; use one of 1, 2, 4, 8"),
        ({"schedule": {"warmup": 11}}, r"warmup=11 .*longer than train.steps=10; shorten"),
        ({"schedule": {"kind": "wsd", "warmup": 5, "decay": 6}}, r"warmup=5 and decay=6"),
        ({"schedule": {"decay": 5}}, r"decay=5 belongs to kind wsd, not cosine"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, r"train.optimizer.betas=\[0.9, 1.0\]"),
        ({"precision": "fp16"}, r"precision"),
        ({"stepz": 1}, r"stepz"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainConfig.model_validate(GOOD | changes)


def test_defaults_hold_together() -> None:
    config = TrainConfig.model_validate(GOOD)
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config
    assert CheckpointConfig().resume == "auto"
    assert LogConfig().profile is None
