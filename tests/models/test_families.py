"""Which configuration builds which model."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from tests.models.common import small_config
from tests.models.denoisers import denoiser_config
from triptych import models
from triptych.models.config import LanguageConfig
from triptych.models.families import AnyModelConfig


def test_a_family_is_read_and_built() -> None:
    for config, kind in ((small_config(), models.LanguageModel), (denoiser_config(), models.DiffusionModel)):
        plain = config.model_dump(mode="json")
        assert models.read_config(plain) == config
        assert models.model_class(config) is kind
        assert isinstance(models.build(config), kind)
        assert TypeAdapter(AnyModelConfig).validate_python(config) is config


def test_language_models_need_not_say_so() -> None:
    values = small_config().model_dump(mode="json")
    values.pop("family")
    assert isinstance(models.read_config(values), LanguageConfig)


def test_an_unknown_family_is_refused_with_those_there_are() -> None:
    values = denoiser_config().model_dump(mode="json") | {"family": "speech"}
    with pytest.raises(ValidationError, match=r"(?s)speech.*lm.*diffusion.*vision"):
        models.read_config(values)


def test_keys_of_another_family_are_unknown() -> None:
    values = denoiser_config().model_dump(mode="json")
    with pytest.raises(ValidationError, match="vocab_size"):
        models.read_config(values | {"vocab_size": 8})
    with pytest.raises(ValidationError, match="patch_size"):
        models.read_config(small_config().model_dump(mode="json") | {"patch_size": 2})


def test_causality_belongs_to_the_family() -> None:
    """A denoiser's attention looks both ways, a language model's back."""
    assert LanguageConfig.causal and not models.DiffusionConfig.causal
    model = models.build(denoiser_config(num_layers=1)).double()
    models.initialize(model, 0)
    assert model.blocks["0"].mixer.causal is False


def test_a_stage_is_the_same_class() -> None:
    config = denoiser_config(num_layers=3)
    stage = models.build(config, range(1, 2), first=False, last=False)
    assert isinstance(stage, models.DiffusionModel)
    assert {name.split(".")[0] for name, _ in stage.named_parameters()} == {"blocks"}
    with pytest.raises(ValueError, match=r"layers=range\(2, 5\) leaves the model; it has model.num_layers=3"):
        models.build(config, range(2, 5))


def test_what_nobody_initialised_is_not_a_number() -> None:
    model = models.build(denoiser_config(position="learned", local_convs=True))
    assert all(bool(torch.isnan(parameter).all()) for parameter in model.parameters())
