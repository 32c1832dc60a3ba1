import math

import pytest
from pydantic import ValidationError

from tests.models.common import small_config
from triptych.models.config import LanguageConfig, LayerSpec
from triptych.models.registry import register_ffn, register_mixer


def specs(num_layers: int = 4, **overrides) -> list[str]:
    return [spec.kind for spec in small_config(num_layers=num_layers, **overrides).layer_specs()]


def test_pattern_list_is_repeated_and_may_end_in_its_middle():
    assert specs(5, pattern=["mamba2", "attention+gelu", "none+swiglu"]) == [
        "mamba2+swiglu",
        "attention+gelu",
        "none+swiglu",
        "mamba2+swiglu",
        "attention+gelu",
    ]


def test_pattern_string_means_the_list():
    assert specs(4, pattern="MMM*") == specs(4, pattern=["mamba2", "mamba2", "mamba2", "attention"])


def test_pattern_string_with_a_dash_writes_every_feed_forward_out():
    assert specs(4, pattern="M-*-") == ["mamba2+none", "none+swiglu", "attention+none", "none+swiglu"]


def test_default_feed_forward_of_items():
    assert specs(2, ffn={"kind": "none"}) == ["mamba2+none", "attention+none"]
    assert specs(2, ffn={"kind": "gelu"}, pattern=["mamba2+none", "attention"]) == [
        "mamba2+none",
        "attention+gelu",
    ]


def test_defaults_that_depend_on_other_keys():
    config = LanguageConfig(vocab_size=8, hidden_size=64, num_layers=2, attention={"num_heads": 4})
    assert config.attention.num_kv_heads == 4
    assert LanguageConfig(vocab_size=8, hidden_size=64, num_layers=1).attention.num_kv_heads == 8
    assert config.head_dim == 16
    assert (config.mamba2_inner_size, config.mamba2_num_heads) == (128, 2)
    assert config.branch_init_std == pytest.approx(0.02 / math.sqrt(4))
    deep = config.model_copy(update={"residual_scale": "depth"})
    assert deep.branch_init_std == config.init_std


def test_config_round_trips_through_its_own_dump():
    config = small_config(pattern="M*", residual_scale="learned")
    assert LanguageConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"hiden_size": 3}, "hiden_size"),
        ({"family": "vision"}, "family"),
        ({"vocab_size": 1}, "vocab_size"),
        ({"num_layers": 0}, "num_layers"),
        ({"pattern": []}, "pattern"),
        (
            {"pattern": ["mamba3"]},
            "mixer 'mamba3' of item 'mamba3' is unknown; use one of attention, .*mamba2.*, none",
        ),
        (
            {"pattern": ["mamba2+relu"]},
            r"feed-forward 'relu' of item 'mamba2\+relu' is unknown; use one of .*gelu, .*swiglu, .*none",
        ),
        (
            {"pattern": "M?"},
            r"pattern='M\?': character '\?' is unknown; use '\*' \(attention\), .*'M' \(mamba2\).*, '-'",
        ),
        (
            {"pattern": ["none"], "ffn": {"kind": "none"}},
            "has an empty block; name a mixer or a feed-forward",
        ),
        ({"ffn": {"kind": "relu"}}, "model.ffn.kind='relu' is unknown; use one of .*gelu, .*swiglu, .*none"),
        (
            {"attention": {"num_heads": 6, "num_kv_heads": 4, "head_dim": 8}},
            "attention.num_kv_heads=4 does not divide model.attention.num_heads=6; use one of 1, 2, 3, 6",
        ),
        (
            {"attention": {"num_heads": 7}},
            "model.attention.num_heads=7 does not divide model.hidden_size=24; use one",
        ),
        (
            {"attention": {"num_heads": 4, "head_dim": 3}},
            "head_dim=3 is odd.*use an even head_dim, or .*rope_theta",
        ),
        (
            {"attention": {"num_heads": 4, "dropout": 0.1, "form": "sdpa"}},
            "dropout=0.1 needs materialised scores.*form='sdpa' never has; use form: reference",
        ),
        ({"attention": {"window": 0}}, "window"),
        ({"mamba2": {"head_dim": 7}}, "model.mamba2.head_dim=7 does not divide .*=48; use one of 1, 2, 3"),
        (
            {"mamba2": {"head_dim": 6, "num_groups": 3}},
            "num_groups=3 does not divide .*heads=8; use one of 1, 2, 4, 8",
        ),
        ({"mamba2": {"head_dim": 6, "expand": 1.3}}, "expand=1.3 times model.hidden_size=24 is not whole"),
        ({"mamba2": {"head_dim": 6, "dt_min": 0.2}}, "dt_min=0.2 is above model.mamba2.dt_max=0.1"),
        (
            {"mamba2": {"head_dim": 6, "dt_limit": (1.0, 1.0)}},
            r"dt_limit=\(1.0, 1.0\) is no range; use 0 <= low < high",
        ),
        ({"dropout": 1.0}, "dropout"),
        ({"residual_scale": "zero"}, "residual_scale"),
    ],
)
def test_bad_values_are_refused_with_key_value_and_mend(overrides, words):
    with pytest.raises(ValidationError, match=words):
        small_config(**overrides)


def test_rules_of_mixers_that_the_pattern_lacks_do_not_matter():
    assert small_config(pattern="M", attention={"num_heads": 7}).layer_specs()[0] == LayerSpec(
        "mamba2", "swiglu"
    )


def test_names_and_characters_are_registered_once():
    with pytest.raises(AssertionError, match="registered twice"):
        register_mixer("mamba2", char="Z")
    with pytest.raises(AssertionError, match="character 'M'"):
        register_mixer("mamba9", char="M")
    with pytest.raises(AssertionError, match="registered twice"):
        register_ffn("gelu")
