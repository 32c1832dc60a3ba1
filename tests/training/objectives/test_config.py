"""What train.objective and train.tread refuse, by name; what they fill in."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tests.training.objectives.batches import model_config, objective_config
from triptych.training.objectives import ObjectiveConfig, TreadConfig
from triptych.training.objectives.diffusion import check


def test_a_path_brings_what_goes_with_it() -> None:
    assert ObjectiveConfig().predict == "velocity"
    assert objective_config("ddpm").predict == "noise"
    edm = objective_config("edm", times={"mean": -0.4})
    assert (edm.predict, edm.times.kind, edm.times.mean) == ("edm", "edm", -0.4)
    assert ObjectiveConfig.model_validate(edm.model_dump()) == edm


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"path": "edm", "predict": "noise"}, r"train\.objective\.path=edm .*predict=noise.* both"),
        ({"path": "linear", "predict": "edm"}, r"train\.objective\.path=linear .*predict=edm"),
        ({"path": "edm", "times": {"kind": "uniform"}}, r"objective\.times\.kind=uniform .* path edm"),
        ({"path": "gvp", "times": {"kind": "edm"}}, r"objective\.times\.kind=edm .* path gvp"),
        ({"path": "ddpm", "predict": "velocity"}, r"predict=velocity .* use noise, v, x0"),
        ({"learn_sigma": True}, r"train\.objective\.learn_sigma=true .*of linear.* path: ddpm"),
        ({"min_snr_gamma": 5.0}, r"train\.objective\.min_snr_gamma=5.0 .*weighting: min_snr"),
        ({"times": {"kind": "uniform", "mean": 1.0}}, r"train\.objective\.times\.mean=1.0 .*not uniform"),
        ({"times": {"kind": "mode", "std": 1.0}}, r"train\.objective\.times\.std=1.0 .*not mode"),
        ({"times": {"scale": 1.0}}, r"train\.objective\.times\.scale=1.0 .*kind mode"),
        ({"times": {"kind": "mode", "scale": 2.0}}, r"train\.objective\.times\.scale=2.0 .*-1 to 1.75"),
        ({"path": "edm", "times": {"shift": 2.0}}, r"train\.objective\.times\.shift=2.0 .*remove"),
        ({"path": "edm", "edm": {"sigma_min": 90.0}}, r"edm\.sigma_min=90.0 is not below sigma_max=80"),
        ({"label_drop": 1.5}, r"label_drop"),
        ({"pathh": "linear"}, r"pathh"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ObjectiveConfig.model_validate(values)


def test_tread_needs_blocks_to_skip() -> None:
    assert TreadConfig(start=2, end=8).rate == 0.5
    with pytest.raises(ValidationError, match=r"train\.tread\.start=3 .*train\.tread\.end=3"):
        TreadConfig(start=3, end=3)
    with pytest.raises(ValidationError, match="rate"):
        TreadConfig(rate=1.0, end=3)
    with pytest.raises(ValueError, match=r"train\.tread\.end=5 .*model\.num_layers=4, so use 3 to 4"):
        check(objective_config(), model_config(), TreadConfig(start=2, end=5))


def test_channels_of_the_output_fit_the_objective() -> None:
    learned = objective_config("ddpm", learn_sigma=True)
    with pytest.raises(ValueError, match=r"learn_sigma=true .*out_channels=2 .*set model\.out_channels=4"):
        check(learned, model_config())
    check(learned, model_config(out_channels=4))
    # As in SiT, whose second half of the channels is ignored.
    check(objective_config(), model_config(out_channels=4))
    with pytest.raises(ValueError, match=r"model\.out_channels=3 is neither .*in_channels=2 nor twice"):
        check(objective_config(), model_config(out_channels=3))
