"""The objective of a run is that of its model's family."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tests.training.objectives.batches import model_config
from triptych.models.families import read_config
from triptych.training.config import TrainConfig
from triptych.training.objectives import DiffusionObjective, LanguageModeling, build_objective


def run(model: Any, **train: Any) -> Any:
    values = {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, **train}
    return SimpleNamespace(model=model, train=TrainConfig.model_validate(values))


def test_denoisers_are_trained_by_their_section() -> None:
    sections = {"objective": {"path": "ddpm", "label_drop": 0.2}, "tread": {"start": 1, "end": 3}}
    objective = build_objective(run(model_config(), **sections))
    assert isinstance(objective, DiffusionObjective)
    assert (objective.config.predict, objective.config.label_drop) == ("noise", 0.2)
    assert objective.tread is not None and objective.tread.end == 3
    assert build_objective(run(model_config())).metric_names == ("mse",)
    with pytest.raises(ValueError, match=r"train\.tread\.end=9"):
        build_objective(run(model_config(), tread={"end": 9}))


def test_language_models_predict_tokens() -> None:
    config = read_config({"vocab_size": 8, "hidden_size": 8, "num_layers": 1, "attention": {"num_heads": 1}})
    objective = build_objective(run(config))
    assert isinstance(objective, LanguageModeling)
    batch = {"tokens": object(), "targets": object()}
    assert objective.prepare(batch, 1, training=False) == (batch, batch["targets"])


def test_the_configuration_may_be_imported_first() -> None:
    """Its section `train.objective` lives in the package that reads the configuration."""
    subprocess.run([sys.executable, "-c", "import triptych.training.config"], check=True)
