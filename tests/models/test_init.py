import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.common import small_config
from triptych import models
from triptych.models import init
from triptych.models.init import fill


def drawn(distribution: init.Init, *shape: int, seed: int = 0, name: str = "w") -> torch.Tensor:
    whole = torch.empty(shape, dtype=torch.float64)
    fill(whole, distribution, seed, name, (0,) * len(shape), shape)
    return whole


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_shard_equals_the_slice_of_the_whole(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    windows = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in shape]
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    distribution = data.draw(
        st.sampled_from([init.Normal(0.5), init.Uniform(-1, 2), init.LogOfUniform(1, 16)])
    )
    whole = torch.empty(shape, dtype=dtype)
    fill(whole, distribution, 3, "blocks.0.w", (0,) * len(shape), shape)
    shard = torch.full([high - low for low, high in windows], torch.nan, dtype=dtype)
    fill(shard, distribution, 3, "blocks.0.w", tuple(low for low, _ in windows), shape)
    assert torch.equal(shard, whole[tuple(slice(low, high) for low, high in windows)])


def test_large_tensors_are_filled_piece_by_piece_alike(monkeypatch):
    whole = drawn(init.Normal(1.0), 37, 11)
    monkeypatch.setattr(init, "ELEMENTS_AT_ONCE", 50)
    assert torch.equal(drawn(init.Normal(1.0), 37, 11), whole)


def test_statistics_of_normal():
    x = drawn(init.Normal(0.02), 500, 400)
    n = x.numel()
    assert abs(x.mean()) < 4 * 0.02 / math.sqrt(n)
    assert x.std().item() == pytest.approx(0.02, rel=4 / math.sqrt(2 * n))
    assert (x.abs() < 0.02).double().mean().item() == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.005)
    # Rows and columns are independent of one another.
    correlation = torch.corrcoef(torch.stack([x[:-1].flatten(), x[1:].flatten(), x.roll(1, 1)[1:].flatten()]))
    assert (correlation - torch.eye(3)).abs().max() < 0.01


def test_statistics_of_the_mamba2_parameters():
    a_log = drawn(init.LogOfUniform(1, 16), 100_000)
    assert a_log.exp().mean().item() == pytest.approx(8.5, abs=0.05)
    assert a_log.exp().min() >= 1 and a_log.exp().max() <= 16.0001
    dt = torch.nn.functional.softplus(drawn(init.InverseSoftplusOfLogUniform(1e-3, 0.1), 100_000))
    assert dt.min() >= 0.999e-3 and dt.max() <= 0.1001
    assert dt.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.02)


def test_seed_and_name_decide():
    x = drawn(init.Normal(1.0), 1000)
    for other in (drawn(init.Normal(1.0), 1000, seed=1), drawn(init.Normal(1.0), 1000, name="v")):
        assert abs(torch.corrcoef(torch.stack([x, other]))[0, 1]) < 0.15


def test_every_parameter_of_a_model_has_its_distribution():
    config = small_config(pattern=["mamba2", "attention+gelu"], norm="layernorm", residual_scale="learned")
    config = config.model_copy(
        update={"attention": config.attention.model_copy(update={"bias": True, "qk_norm": True})}
    )
    model = models.build(config)
    assert all(parameter.isnan().all() for parameter in model.parameters())
    models.initialize(model, seed=0)
    parameters = dict(model.named_parameters())
    assert all(parameter.isfinite().all() for parameter in parameters.values())
    for name, expected in [("norm.weight", 1), ("norm.bias", 0), ("blocks.1.mixer.q_proj.bias", 0)]:
        assert (parameters[name] == expected).all()
    assert (parameters["blocks.0.mixer_branch.scale"] == 1).all()
    out = parameters["blocks.1.ffn.down_proj.weight"].std() / parameters["blocks.1.ffn.up_proj.weight"].std()
    assert out.item() == pytest.approx(1 / math.sqrt(2 * config.num_layers), rel=0.15)


def test_a_stage_and_a_sharded_model_get_the_values_of_the_whole():
    config = small_config(num_layers=4)
    whole, stage = models.build(config), models.build(config, layers=range(1, 3), first=False, last=False)
    models.initialize(whole, seed=5)
    models.initialize(stage, seed=5)
    parameters = dict(whole.named_parameters())
    assert next(stage.named_parameters())[0].startswith("blocks.1.")
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in stage.named_parameters())

    rows = {name: slice(p.shape[0] // 2, None) for name, p in parameters.items()}
    halves = {name: torch.full_like(p[rows[name]], torch.nan) for name, p in parameters.items()}
    models.initialize(
        whole,
        seed=5,
        local_window=lambda name, p: (halves[name], (rows[name].start, *(0,) * (p.ndim - 1)), tuple(p.shape)),
    )
    assert all(torch.equal(halves[name], parameter[rows[name]]) for name, parameter in parameters.items())


def test_float64_and_float32_start_from_the_same_values():
    config = small_config()
    double, single = models.build(config).double(), models.build(config)
    models.initialize(double, seed=0)
    models.initialize(single, seed=0)
    for name, parameter in single.named_parameters():
        assert torch.equal(parameter, double.get_parameter(name).float())


def test_a_parameter_that_no_table_names_is_a_bug():
    with pytest.raises(AssertionError, match=r"names the parameters \['weight', 'bias'\]"):
        models.init_table(torch.nn.Linear(2, 2))


def test_a_window_outside_the_whole_is_a_bug():
    with pytest.raises(AssertionError, match="leaves the whole"):
        fill(torch.empty(3), init.ZEROS, 0, "w", (2,), (4,))


def test_meta_tensors_are_left_alone():
    with torch.device("meta"):
        model = models.build(small_config())
    models.initialize(model, seed=0)
