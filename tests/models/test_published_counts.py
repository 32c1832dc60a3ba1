"""Parameters and multiply-adds of the packaged configurations against published ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from triptych.launcher.config import load
from triptych.models import VisionConfig, flops_per_token, parameter_count
from triptych.models.mixers.mamba1 import SCAN_PRODUCTS

VISION = "configs/vision/{}.yaml"


def config_of(name: str, *overrides: str) -> VisionConfig:
    model = load(VISION.format(name), overrides).model
    assert isinstance(model, VisionConfig)
    return model


@pytest.mark.parametrize(("size", "parameters"), [("T", 30_249_064), ("S", 50_147_752), ("B", 88_557_800)])
def test_vmamba(size: str, parameters: int) -> None:
    assert parameter_count(config_of("vmamba", f"model.size={size}"))["total"] == parameters


@pytest.mark.parametrize(("size", "published"), [("T", 4.9), ("S", 8.7), ("B", 15.4)])
def test_multiply_adds_of_vmamba(size: str, published: float) -> None:
    """To the printed digit, counted as its authors do: multiply-adds of linears and convolutions once; 9
    operations per channel and state of a scan and one for d, where ours are 3 multiply-adds; 5 per value of a
    norm."""
    config = config_of("vmamba", f"model.size={size}")
    multiply_adds = flops_per_token(config, config.num_tokens)["total"] * config.num_tokens / 2
    first = config.stage_configs[0]
    # The stem's first norm is over half of the channels of four times as many tokens.
    scans, normed = 0.0, config.num_tokens * 4 * first.hidden_size / 2 + config.num_tokens * first.hidden_size
    for number, (stage, spec) in enumerate(zip(config.stage_configs, config.stages, strict=True)):
        tokens, width = config.num_tokens >> 2 * number, stage.hidden_size
        inner = config.ss2d.expand * width
        scans += spec["depth"] * 4 * inner * tokens
        normed += tokens * (spec["depth"] * (2 * width + inner) + width)
    theirs = multiply_adds + scans * (10 - SCAN_PRODUCTS) + 5 * normed
    assert theirs / 1e9 == pytest.approx(published, abs=0.05)
    assert multiply_adds < theirs < 1.04 * multiply_adds


@pytest.mark.parametrize(
    ("size", "parameters", "multiply_adds"),
    [("S", 22_050_664, 4.6), ("B", 86_567_656, 17.5), ("L", 304_326_632, 61.6)],
)
def test_vit(size: str, parameters: int, multiply_adds: float) -> None:
    """timm's parameters, less the class token's position, which it adds to another learned vector."""
    config = config_of("vit", f"model.size={size}")
    assert parameter_count(config)["total"] == parameters - config.hidden_size
    tokens = config.num_tokens + 1
    found = flops_per_token(config, tokens)["total"] * tokens / 2e9
    assert found == pytest.approx(multiply_adds, rel=0.02)


# Channels of each of Taskonomy's dense targets: four of one, and so on, as in Mod-Squad's code.
DENSE_CHANNELS = (1, 1, 1, 1, 1, 1, 3, 2, 3, 1, 1)
CLASSES = (1000, 365)


def taskonomy(name: str, *overrides: str) -> VisionConfig:
    """A packaged model with 13 tasks, the kinds of which only the heads see."""
    values = load(VISION.format(name), overrides).model.model_dump(exclude_unset=True)
    sizes: list[int] = [*CLASSES, *DENSE_CHANNELS]
    values["tasks"] = {f"task{n}": {"kind": "classify", "num_classes": size} for n, size in enumerate(sizes)}
    return VisionConfig.model_validate(values)


def heads(width: int) -> int:
    """Parameters of Mod-Squad's heads: a norm and a linear for classes; for a dense target a linear of each
    token to the 16 x 16 pixels that it stands for."""
    classify = sum(2 * width + (width + 1) * classes for classes in CLASSES)
    return classify + sum((width + 1) * 256 * channels for channels in DENSE_CHANNELS)


@pytest.mark.parametrize(
    ("size", "overrides", "published"),
    [
        # The printed size is that of 15 attention experts; the code beside it, and the paper, say 24.
        ("base", ["model.attention_moe.num_experts=15"], "195.80"),
        ("base", [], "206.96"),
        ("small", [], "34.17"),
    ],
)
def test_mod_squad(size: str, overrides: Sequence[str], published: str) -> None:
    """To the printed digits, with the published heads in place of ours. All else that differs: a class token
    that nothing reads and its position, a second last norm for classes, and biases of key and value."""
    config = taskonomy("mod-squad", f"model.size={size}", *overrides)
    count = parameter_count(config)
    width, moe_layers = config.hidden_size, config.num_layers // 2
    own = count["total"] - count["parts"]["heads"]
    more = 2 * width + 2 * width + moe_layers * 2 * config.attention_moe.head_dim
    assert f"{(own + more + heads(width)) / 1e6:.2f}" == published


def test_experts_that_a_token_meets_in_mod_squad() -> None:
    """12 of 24 heads and 4 of 16 feed-forwards: active parameters are those of a dense model of such
    blocks."""
    config = taskonomy("mod-squad")
    (attention, feed_forward) = parameter_count(config)["per_block"][:2]
    width, head, tasks = config.hidden_size, config.attention_moe.head_dim, len(config.tasks)
    gates = width * (tasks * 24 - 24)
    assert attention["total"] - attention["active"] == 12 * 2 * width * head + gates
    expert = 2 * width * width + 2 * width
    assert feed_forward["total"] - feed_forward["active"] == 12 * expert + width * (tasks * 16 - 16)


@pytest.mark.parametrize("size", ["attention", "mamba1", "mamba2", "ss2d", "mlstm", "wkv"])
def test_metaformers_differ_in_their_mixers_alone(size: str) -> None:
    def skeleton(config: VisionConfig) -> Any:
        count = parameter_count(config)
        blocks = [(block["ffn"], block["other"]) for block in count["per_block"]]
        return count["parts"], blocks, sum(block["mixer"] for block in count["per_block"])

    *of_pool, none = skeleton(config_of("metaformer"))
    *found, mixers = skeleton(config_of("metaformer", f"model.size={size}"))
    assert found == of_pool and none == 0 < mixers


def test_jamba() -> None:
    """transformers' model of the released sizes to the unit, but for norms of dt, b and c, which are not
    built; the paper (arXiv 2403.19887, section 3) prints 52B and 12B."""
    transformers = pytest.importorskip("transformers")
    config = load("configs/lm/moe-jamba.yaml").model
    count = parameter_count(config)
    mamba = config.mamba1
    norms = 28 * ((mamba.dt_rank or 0) + 2 * mamba.state_size)
    with torch.device("meta"):
        theirs = transformers.JambaForCausalLM(transformers.JambaConfig())
    assert count["total"] + norms == sum(parameter.numel() for parameter in theirs.parameters())
    assert (round(count["total"] / 1e9), round(count["active"] / 1e9)) == (52, 12)
    kinds = [(spec.mixer, spec.ffn) for spec in config.layer_specs()]
    for layer, (mixer, ffn) in enumerate(kinds):
        assert mixer == ("attention" if layer % 8 == 4 else "mamba1")
        assert ffn == ("moe" if layer % 2 == 1 else "swiglu")
