"""AdamW against a float64 transcript of its equations, and which parameters decay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.training.runs import make_run
from triptych import models
from triptych.training import optimizer as module
from triptych.training.config import OptimizerConfig
from triptych.training.optimizer import AdamW, decays, layer_factor, layer_of
from triptych.training.shards import Window

CONFIG = OptimizerConfig(lr=0.02, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)


def reference(start: np.ndarray, gradients: list[np.ndarray], decay: float, rates: list[float]) -> np.ndarray:
    """The update of the class docstring in float64, one element at a time."""
    (b1, b2), eps = CONFIG.betas, CONFIG.eps
    p, m, v = start.astype(np.float64).copy(), np.zeros(start.shape), np.zeros(start.shape)
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        p = p - lr * decay * p - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return p


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
@pytest.mark.parametrize("bucket", [1, 2**26])
def test_updates_follow_the_equations(
    dtype: torch.dtype, tolerance: float, bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUCKET_ELEMENTS", bucket)
    random = np.random.default_rng(0)
    shapes = {"a.weight": (3, 4), "b.weight": (2, 5), "a.bias": (3,), "norm.weight": (4,)}
    start = {name: random.normal(size=shape) for name, shape in shapes.items()}
    gradients = [{name: random.normal(size=shape) for name, shape in shapes.items()} for _ in range(5)]
    rates = [0.01, 0.02, 0.02, 0.015, 0.001]
    parameters = {name: nn.Parameter(torch.tensor(value, dtype=dtype)) for name, value in start.items()}
    adam = AdamW(parameters.items(), CONFIG)
    for step, rate in zip(gradients, rates, strict=True):
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(step[name], dtype=dtype)
        adam.step(rate)
    for name, parameter in parameters.items():
        decay = CONFIG.weight_decay if len(shapes[name]) == 2 else 0.0
        expected = reference(start[name], [step[name] for step in gradients], decay, rates)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=tolerance, atol=tolerance)


def test_decay_falls_on_matrices_only(tmp_path: object) -> None:
    run = make_run(
        tmp_path,  # type: ignore[arg-type]
        model={
            "residual_scale": "learned",
            "attention": {"num_heads": 2, "num_kv_heads": 2, "qk_norm": True},
        },
    )
    with torch.device("meta"):
        model = models.build(run.model)
    decaying = {name for name, p in model.named_parameters() if decays(name, tuple(p.shape))}
    exempt = {name for name, _ in model.named_parameters()} - decaying
    assert {"head.weight", "blocks.0.mixer.x_proj.weight", "blocks.0.mixer.conv_x.weight"} <= decaying
    assert {
        "embedding.weight",
        "norm.weight",
        "blocks.0.mixer.a_log",
        "blocks.0.mixer.d",
        "blocks.0.mixer.dt_bias",
        "blocks.0.mixer.norm.weight",
        "blocks.0.mixer_norm.weight",
    } <= exempt
    assert all(len(model.get_parameter(name).shape) == 2 for name in decaying)
    assert not any("norm" in name or "bias" in name for name in decaying)


@pytest.mark.parametrize(
    ("name", "decaying"),
    [
        ("blocks.1.ffn.experts.up_proj", True),
        ("blocks.1.ffn.experts.up_bias", False),
        ("blocks.0.mixer.q_experts.bias", False),
        ("blocks.0.mixer.dt_weight", True),
        ("task_embedding.weight", False),
        ("patch_embedding.proj.weight", True),
    ],
)
def test_biases_of_experts_and_rows_of_tasks_do_not_decay(name: str, decaying: bool) -> None:
    """Stacked biases have a dimension more, and are biases all the same."""
    assert decays(name, (4, 8, 8) if decaying else (4, 8)) == decaying


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("embedding.weight", 0),
        ("patch_embedding.positions", 0),
        ("time_embedding.first.weight", 0),
        ("prefix.tokens", 0),
        ("blocks.0.mixer_norm.weight", 1),
        ("blocks.11.ffn.experts.up_proj", 12),
        ("downsamples.4.proj.weight", 5),
        ("norm.weight", 13),
        ("head.norm.weight", 13),
        ("heads.digits.proj.weight", 13),
        ("shared_block.mixer.q_proj.weight", 13),
        ("last_conv.weight", 13),
    ],
)
def test_layers_count_from_the_stem_to_the_head(name: str, layer: int) -> None:
    assert layer_of(name, 12) == layer
    assert layer_factor(name, 12, 0.75) == pytest.approx(0.75 ** (13 - layer), rel=1e-15)
    assert layer_factor(name, 12, 1.0) == 1.0


def test_layers_learn_at_their_own_rates() -> None:
    """Two blocks and a decay of a half: 1/8 of the rate at the stem, 1/4, 1/2, and all of it at the head."""
    random = np.random.default_rng(1)
    multipliers = {
        "embedding.weight": 0.125,
        "blocks.0.a.weight": 0.25,
        "blocks.1.a.weight": 0.5,
        "head.weight": 1,
    }
    start = {name: random.normal(size=(3, 2)) for name in multipliers}
    gradients = [{name: random.normal(size=(3, 2)) for name in multipliers} for _ in range(4)]
    rates = [0.01, 0.02, 0.02, 0.015]
    parameters = {name: nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    config = OptimizerConfig.model_validate({**CONFIG.model_dump(), "layer_decay": 0.5})
    adam = AdamW(parameters.items(), config, num_blocks=2)
    for step, rate in zip(gradients, rates, strict=True):
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(step[name])
        adam.step(rate)
    for name, parameter in parameters.items():
        decay = 0.0 if name.startswith("embedding") else CONFIG.weight_decay
        own = [rate * multipliers[name] for rate in rates]
        expected = reference(start[name], [step[name] for step in gradients], decay, own)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-14, atol=1e-14)


def test_frozen_rows_and_parameters_stay_bit_by_bit() -> None:
    """Also with weight decay, and with moments that are not zero, as after another run; the others move as
    ever."""
    random = np.random.default_rng(2)
    start = {"a.weight": random.normal(size=(6, 3)), "b.weight": random.normal(size=(2, 3))}
    start["a.weight"][2] = -0.0
    gradients = [random.normal(size=(6, 3)) for _ in range(3)]
    parameters = {name: nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    parameters["b.weight"].requires_grad_(False)
    adam = AdamW(parameters.items(), CONFIG, frozen=("b.*", "a.weight[1:3]", "a.weight[5:]"))
    shards = [Window(n, p.detach(), tuple(p.shape), (0, 0)) for n, p in parameters.items()]
    moments = {window.name: window.tensor for window in adam.shards(shards)}
    assert moments.keys() == {"optimizer/a.weight/exp_avg", "optimizer/a.weight/exp_avg_sq"}
    kept = [1, 2, 5]
    for tensor in moments.values():
        tensor[kept] = 0.5
    for gradient in gradients:
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradient[: len(start[name])]) if parameter.requires_grad else None
        adam.step(0.02)
    a, b = (parameters[name].detach().numpy() for name in ("a.weight", "b.weight"))
    assert (
        a[kept].tobytes() == start["a.weight"][kept].tobytes() and b.tobytes() == start["b.weight"].tobytes()
    )
    assert all((tensor[kept] == 0.5).all() for tensor in moments.values())
    expected = reference(start["a.weight"], gradients, CONFIG.weight_decay, [0.02] * 3)
    np.testing.assert_allclose(a[[0, 3, 4]], expected[[0, 3, 4]], rtol=1e-14, atol=1e-14)
