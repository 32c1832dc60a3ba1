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
from triptych.training.optimizer import AdamW, decays

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
