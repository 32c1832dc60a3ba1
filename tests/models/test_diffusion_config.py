"""Section `model:` of denoisers: defaults, sizes by name, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tests.models.common import small_config
from tests.models.denoisers import denoiser_config
from triptych import models


def test_defaults_are_those_of_dit() -> None:
    config = models.DiffusionConfig(in_channels=4, input_size=32, hidden_size=384, num_layers=2)
    assert config.input_size == (32, 32) and config.grid == (16, 16) and config.num_tokens == 256
    assert (config.norm, config.norm_affine, config.norm_eps) == ("layernorm", False, 1e-6)
    assert (config.ffn.kind, config.ffn.bias, config.init) == ("gelu", True, "xavier")
    assert config.predicted_channels == 4 and config.patch_elements == 4
    assert config.rope_axes == 0 and config.scan.orders_of(3) == ("raster",)
    assert [spec.kind for spec in config.layer_specs()] == ["attention+gelu"] * 2


def test_a_size_of_the_feed_forward_leaves_its_kind() -> None:
    ffn = denoiser_config(ffn={"intermediate_size": 40}).ffn
    assert (ffn.kind, ffn.bias, ffn.intermediate_size) == ("gelu", True, 40)
    assert denoiser_config(ffn={"kind": "swiglu"}).ffn.bias is False


def test_config_round_trips_through_its_own_dump() -> None:
    config = denoiser_config(
        position="rope", attention={"num_heads": 2}, modulation={"kind": "lora", "rank": 3}
    )
    assert models.DiffusionConfig.model_validate(config.model_dump(mode="json")) == config


SIZES: dict[str, Any] = {
    "S": {"num_layers": 1, "hidden_size": 8, "attention": {"num_heads": 2}},
    "L": {"num_layers": 3, "hidden_size": 32, "attention": {"num_heads": 4, "qk_norm": True}},
}


def sized(size: str | None, **given: Any) -> models.DiffusionConfig:
    values = {"family": "diffusion", "in_channels": 1, "input_size": 4, "sizes": SIZES, "size": size}
    return models.DiffusionConfig.model_validate(values | given)


def test_a_size_gives_what_is_not_given() -> None:
    config = sized("L", attention={"bias": True, "num_heads": 8}, num_layers=2)
    assert (config.num_layers, config.hidden_size) == (2, 32)
    assert (config.attention.num_heads, config.attention.qk_norm, config.attention.bias) == (8, True, True)
    # Once read, a configuration is what it says: nothing is taken a second time.
    assert config.size is None and config.sizes == {}
    assert models.DiffusionConfig.model_validate(config.model_dump()) == config


def test_sizes_without_a_choice_give_nothing() -> None:
    config = sized(None, num_layers=1, hidden_size=16, attention={"num_heads": 4})
    assert config.hidden_size == 16 and config.sizes == {}
    with pytest.raises(ValidationError, match="hidden_size"):
        sized(None)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": "M"}, r"model.size='M' is not among model.sizes; use one of S, L"),
        ({"size": "S", "sizes": {}}, r"model.size='S' is not among model.sizes"),
        ({"size": "S", "sizes": {"S": {"layers": 3}}}, "layers"),
    ],
)
def test_unknown_sizes_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        sized(**values)


def test_a_size_without_sizes_is_refused() -> None:
    with pytest.raises(
        ValidationError, match=r"model.size='XL' needs model.sizes, a mapping of sizes by name"
    ):
        denoiser_config(size="XL")
    with pytest.raises(ValidationError, match=r"model.size='XL' needs model.sizes"):
        small_config(size="XL")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"input_size": [8, 5]},
            r"model.patch_size=2 does not divide model.input_size\[1\]=5; use one of 1, 5",
        ),
        ({"input_size": [2, 2, 2, 2]}, "input_size"),
        ({"in_channels": 0}, "in_channels"),
        ({"scan": {"orders": ["spiral"]}}, "spiral.*raster"),
        ({"scan": {"orders": ["zigzag:9"]}}, "zigzag:9"),
        ({"scan": {"orders": []}}, "orders"),
        ({"scan": {"orders": ["hilbert"], "line_ends": True}}, "hilbert.*line"),
        (
            {"local_convs": True, "input_size": [8]},
            r"local_convs=true needs images, and model.input_size=\[8\] has 1 dim",
        ),
        (
            {"position": "rope", "attention": {"num_heads": 4}},
            r"position=rope needs channels per head \(6\) in pairs for each of 2 axes; use a multiple of 4",
        ),
        ({"hidden_size": 30}, "sincos needs model.hidden_size=30 to be a multiple of 4; change it or use"),
        ({"position": "alibi"}, "position"),
        ({"conditioning": {"kind": "audio"}}, "conditioning.kind"),
        ({"conditioning": {"num_classes": 0}}, "num_classes"),
        ({"modulation": {"kind": "lora", "rank": 0}}, "rank"),
        ({"rope_scaling": {"kind": "linear"}}, "rope_scaling"),
        (
            {"position": "rope", "attention": {"num_heads": 2, "rope_theta": None}},
            "model.position=rope with model.attention.rope_theta=null turns nothing; give a rope_theta, or",
        ),
        (
            {"position": "rope", "attention": {"num_heads": 2}, "rope_scaling": {"trained": [8]}},
            r"model.rope_scaling.trained=\[8\] must be 2 numbers of tokens, .*input_size=\[8, 4\] has 2",
        ),
        (
            {"conditioning": {"kind": "text"}},
            r"conditioning.kind=text, and no block of model.pattern=\['attention'\] reads the text; add",
        ),
        (
            {"shared_block_every": 1, "pattern": ["mamba1"], "attention": {"num_heads": 7}},
            "num_heads=7 does not divide",
        ),
        ({"pattern": ["cross_attention"]}, "cross_attention.*conditioning.kind=class gives it none"),
        ({"vocab_size": 8}, "vocab_size"),
        (
            {"pattern": ["dimsum"], "attention": {"num_heads": 2}, "input_size": [8, 4]},
            r"wavelet_levels=2 needs a grid that 4 divides, and model.input_size\[1\]=4",
        ),
        (
            {"attention": {"num_heads": 3, "window": 4}},
            "model.attention.window=4 looks back only, and a denoiser looks both ways; remove it",
        ),
    ],
)
def test_bad_values_are_refused_with_key_value_and_mend(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        denoiser_config(**overrides)


def test_rules_of_attention_do_not_matter_without_it() -> None:
    """Rotary positions let a scan model take images of any size; its heads are nobody's."""
    config = denoiser_config(
        position="rope", pattern=["mamba1+none"], attention={"num_heads": 7, "window": 3}
    )
    assert config.rope_axes == 2


def test_language_models_refuse_what_is_for_images() -> None:
    for overrides, words in (
        ({"scan": {"orders": ["raster"]}}, "model.scan orders the tokens of images; remove it"),
        ({"pattern": ["cross_attention"]}, "cross_attention.*model.family=lm gives it none"),
        ({"pattern": ["wkv"]}, "wkv.*model.family=lm must not look ahead"),
        ({"pattern": ["dimsum"]}, "dimsum.*model.family=lm"),
    ):
        with pytest.raises(ValidationError, match=words):
            small_config(**overrides)


def test_scan_orders_of_layers() -> None:
    cycle = denoiser_config(scan={"orders": ["raster", "column"], "merge": "cycle"}).scan
    assert [cycle.orders_of(layer) for layer in range(3)] == [("raster",), ("column",), ("raster",)]
    both = denoiser_config(scan={"orders": ["raster", "column"], "merge": "sum"}).scan
    assert both.orders_of(1) == ("raster", "column")


@pytest.mark.parametrize(
    ("layers", "sources"), [(4, [None, None, 1, 0]), (5, [None, None, None, 1, 0]), (1, [None])]
)
def test_long_skips_join_the_halves(layers: int, sources: list[int | None]) -> None:
    config = denoiser_config(num_layers=layers, long_skips=True)
    assert [config.skips_from(layer) for layer in range(layers)] == sources
    assert denoiser_config(num_layers=layers).skips_from(layers - 1) is None


def test_shared_blocks_follow_every_so_many() -> None:
    config = denoiser_config(num_layers=5, shared_block_every=2)
    assert [config.followed_by_shared(layer) for layer in range(5)] == [False, True, False, True, False]
    assert not any(map(denoiser_config(num_layers=5).followed_by_shared, range(5)))
