"""What selective recomputation drops in a denoiser's blocks, and what it computes again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.denoisers import build_denoiser, denoiser_config, image_batch
from triptych.models import DiffusionConfig, DiffusionModel
from triptych.models.mixers.attention import Attention
from triptych.parallel.recompute import apply_recompute
from triptych.tools.kept import kept_by_backward, total_bytes

LAYERS = 3


def config_with(**options: Any) -> DiffusionConfig:
    return denoiser_config(pattern=["attention+gelu"], num_layers=LAYERS, **options)


def ours(config: DiffusionConfig, policy: Any) -> tuple[DiffusionModel, dict[str, Tensor]]:
    model = build_denoiser(config)
    apply_recompute(model, policy)
    batch = image_batch(config)
    return model, {name: batch[name] for name in ("x", "times", "labels")}


def loss(model: DiffusionModel, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).square().sum()


@pytest.mark.parametrize("position", ["sincos", "rope"])
def test_gradients_stay_the_same(position: str) -> None:
    found = []
    for policy in ("none", "selective"):
        model, inputs = ours(config_with(position=position), policy)
        loss(model, inputs).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-12, atol=1e-12, msg=name)


def test_the_output_of_the_activation_is_dropped() -> None:
    config = config_with()

    def bytes_kept(policy: str) -> int:
        model, inputs = ours(config, policy)
        return total_bytes(kept_by_backward(model, lambda: loss(model, inputs)))

    _, inputs = ours(config, "none")
    values = inputs["x"].shape[0] * config.num_tokens * 4 * config.hidden_size * LAYERS
    dropped = bytes_kept("none") - bytes_kept("selective")
    assert dropped == values * inputs["x"].element_size()


@pytest.mark.parametrize(("options", "runs"), [({}, 1), ({"position": "rope"}, 2)])
def test_a_fused_kernel_alone_runs_once(
    options: dict[str, Any], runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    attend = Attention.attend

    def counted(self: Attention, *args: Any) -> Tensor:
        calls.append(self)
        return attend(self, *args)

    monkeypatch.setattr(Attention, "attend", counted)
    model, inputs = ours(config_with(**options), "selective")
    loss(model, inputs).backward()
    assert len(calls) == runs * LAYERS
