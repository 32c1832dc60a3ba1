"""Section `model:` of vision backbones: what is filled in, and errors that name key, value and mend."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from triptych.models import VisionConfig
from triptych.models.vision_config import SCANNING

TASKS: dict[str, Any] = {"digits": {"kind": "classify", "num_classes": 10}}
STAGES: list[dict[str, Any]] = [{"depth": 1, "hidden_size": 16}, {"depth": 2, "hidden_size": 32}]


def config(**changes: Any) -> VisionConfig:
    values: dict[str, Any] = {
        "input_size": 32,
        "patch_size": 4,
        "tasks": TASKS,
        "attention": {"num_heads": 2},
    }
    if "stages" not in changes:
        values |= {"hidden_size": 16, "num_layers": 2}
    return VisionConfig.model_validate({"family": "vision", **values, **changes})


def test_what_is_not_said_is_filled_in() -> None:
    plain = config()
    assert plain.input_size == (32, 32) and plain.patch_sizes == (4, 4) and plain.grid == (8, 8)
    assert plain.ffn.kind == "gelu" and plain.ffn.bias and plain.norm == "layernorm" and not plain.causal
    assert config(ffn={"intermediate_size": 8}).ffn.kind == "gelu"
    assert config(ffn={"kind": "swiglu", "intermediate_size": 8}).ffn.kind == "swiglu"
    assert config(class_token=True, registers=3).num_prefix_tokens == 4
    assert plain.task_names == ("digits",) and not plain.has_dense_tasks and plain.dense_stride == 4
    assert plain.rope_axes == 0 and config(position="rope").rope_axes == 2


def test_video_has_three_axes() -> None:
    video = config(input_size=[4, 8, 8], patch_size=[1, 2, 2])
    assert video.grid == (4, 4, 4) and video.num_tokens == 64 and video.patch_elements == 4


def test_stages_say_width_and_depth() -> None:
    staged = config(stages=STAGES, pattern=["attention+gelu", "attention+swiglu"])
    assert (staged.hidden_size, staged.num_layers) == (32, 3)
    assert [staged.stage_of(layer) for layer in range(3)] == [0, 1, 1]
    assert [staged.first_layer(stage) for stage in range(2)] == [0, 1]
    assert [staged.grid_of(stage) for stage in range(2)] == [(8, 8), (4, 4)]
    assert [staged.length_at(layer, 64) for layer in range(3)] == [64, 16, 16]
    # The pattern begins anew with each stage.
    assert [spec.ffn for spec in staged.layer_specs()] == ["gelu", "gelu", "swiglu"]
    first, second = staged.stage_configs
    assert (first.hidden_size, second.hidden_size) == (16, 32)
    own = [{**STAGES[0], "attention": {"num_heads": 1}}, {**STAGES[1], "attention": {"num_heads": 4}}]
    heads = [each.attention for each in config(stages=own).stage_configs]
    assert [(each.num_heads, each.num_kv_heads) for each in heads] == [(1, 1), (4, 4)]


def test_a_dump_is_read_back_as_the_same() -> None:
    for each in (config(), config(stages=STAGES), config(position="rope", registers=1, input_size=[16, 24])):
        assert VisionConfig.model_validate(each.model_dump()) == each


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no classes": (
        {"tasks": {"a": {"kind": "classify"}}},
        r"num_classes=None: a task of kind classify needs it; give their number",
    ),
    "classes of contrast": (
        {"tasks": {"a": {"kind": "contrast", "num_classes": 3}}},
        r"num_classes=3: a task of kind contrast has no classes; remove it",
    ),
    "no tasks": ({"tasks": {}}, r"tasks"),
    "axes": (
        {"patch_size": [4, 4, 4]},
        r"model.patch_size=\[4, 4, 4\] has 3 numbers and model.input_size=\[32, 32\] has 2; give one",
    ),
    "patches": ({"patch_size": 5}, r"model.patch_size=5 does not divide model.input_size\[0\]=32; use"),
    "conv of video": (
        {"stem": "conv", "input_size": [4, 32, 32], "patch_size": 4, "position": "none"},
        r"model.stem=conv convolves images, and model.input_size=\[4, 32, 32\] has 3 .*; use stem: patch",
    ),
    "conv in steps": (
        {"stem": "conv", "patch_size": 8, "position": "none"},
        r"model.stem=conv takes images in steps of 4 .* patch_size=8, position=none; set patch_size: 4",
    ),
    "conv with a table": (
        {"stem": "conv"},
        r"model.stem=conv .* position=learned; set patch_size: 4 and position: none or rope",
    ),
    "stage without depth": (
        {"stages": [{"hidden_size": 16}], "num_layers": 1, "hidden_size": 16},
        r"model.stages\[0\]=\{'hidden_size': 16\} needs depth and hidden_size",
    ),
    "depth in words": (
        {"stages": [{"depth": "two", "hidden_size": 16}]},
        r"model.stages\[0\]=\{'depth': 'two', 'hidden_size': 16\} needs depth and hidden_size",
    ),
    "stage without width": (
        {"stages": [STAGES[0], {"depth": 1}]},
        r"model.stages\[1\]=\{'depth': 1\} needs depth and hidden_size",
    ),
    "other depth": (
        {"stages": STAGES, "num_layers": 4},
        r"model.num_layers=4 is not the sum 3 of the depths of model.stages; leave num_layers out",
    ),
    "other width": (
        {"stages": STAGES, "hidden_size": 16},
        r"model.hidden_size=16 is not that of the last stage, 32; leave hidden_size out",
    ),
    "prefix in stages": (
        {"stages": STAGES, "class_token": True},
        r"model.class_token and model.registers have no place on the grid .* class_token: false",
    ),
    "odd grid": (
        {"stages": STAGES, "input_size": [32, 36]},
        r"model.stages\[1\] halves the grid \[8, 9\] .* is odd; change model.input_size=\[32, 36\]",
    ),
    "stages of a line": (
        {"stages": STAGES, "input_size": [32], "position": "none"},
        r"model.stages need images, and model.input_size=\[32\] has 1 dimension\(s\); remove stages",
    ),
    "prefix and scans": (
        {"pattern": ["mamba2"], "registers": 1, "mamba2": {"head_dim": 8}},
        r"have no place on the grid that mamba2 goes through; use class_token: false and registers: 0",
    ),
    "sincos": (
        {"position": "sincos", "hidden_size": 18},
        r"model.position=sincos needs model.hidden_size=18 to be a multiple of 4; change it or use",
    ),
    "window": (
        {"attention": {"num_heads": 2, "window": 3}},
        r"model.attention.window=3 looks back only, and images are seen both ways; remove it",
    ),
    "rope of odd heads": (
        {"position": "rope", "attention": {"num_heads": 8}},
        r"model.position=rope turns the 2 channels of each head of attention .* use a multiple of 4",
    ),
    "rope without theta": (
        {"position": "rope", "attention": {"num_heads": 2, "rope_theta": None}},
        r"rope_theta=None; use a multiple of 4 and a rope_theta",
    ),
    "timm with stages": (
        {"timm": "resnet18", "stages": STAGES, "hidden_size": 32},
        r"model.timm=resnet18 brings its own tokens and stages; remove stages",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_named(name: str) -> None:
    changes, told = REFUSED[name]
    with pytest.raises(ValidationError, match=told):
        config(**changes)


def test_every_scanning_mixer_is_one_of_the_registry() -> None:
    """The table is by name, so a mixer that is renamed must be renamed there."""
    from triptych.models.registry import MIXERS

    assert set(SCANNING) <= set(MIXERS)
