"""One side of a comparison of `triptych bench diffusion`, in its own process.

`python -m triptych.tools.bench_diffusion_sides '{"side": "ours", ...}'` takes turns as `bench_sides.serve`
has it; what it computes is compared with `bench_dit.DiT` of the same weights.

Shape legend: B batch, T tokens, K tokens kept.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from triptych.kernels import hash_normal, string_key
from triptych.models import DiffusionConfig, build, initialize
from triptych.parallel.recompute import apply_recompute
from triptych.tools.bench_dit import DiT, as_published, timm_layers
from triptych.tools.bench_sides import say, serve
from triptych.training.config import OptimizerConfig
from triptych.training.objectives.draws import kept_tokens
from triptych.training.optimizer import AdamW

LEARNING_RATE = 1e-4
STD = 0.02
"""Of what starts at zero: modulations and head, without which most gradients would be zero."""


def model_config(shape: dict[str, Any]) -> DiffusionConfig:
    """A DiT of these sizes with 4-channel latents and learned variance."""
    return DiffusionConfig.model_validate({
        "family": "diffusion",
        "in_channels": 4,
        "out_channels": 8,
        "input_size": [shape["input_size"]] * 2,
        "patch_size": 2,
        "num_layers": shape["num_layers"],
        "hidden_size": shape["hidden_size"],
        "pattern": ["attention"],
        "attention": {"num_heads": shape["num_heads"], "bias": True},
        "conditioning": {"kind": "class", "num_classes": 1000},
    })  # fmt: skip


def our_model(config: DiffusionConfig, recompute: Any = "none") -> nn.Module:
    """Ours, with weights from seed 0 and no zeros among them."""
    model = build(config)
    initialize(model, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any():
                index = torch.arange(parameter.numel()).view(parameter.shape)
                parameter.copy_(STD * hash_normal(string_key(1, name), index))
    apply_recompute(model, recompute)
    return model.train()


def reference_model(config: DiffusionConfig) -> nn.Module:
    """The published formulation with the weights of ours."""
    model = DiT(config)
    weights = as_published(config, our_model(config).state_dict())
    model.load_state_dict(weights | {"pos_embed": model.pos_embed})
    return model.train()


@dataclass(frozen=True)
class Batch:
    """One fixed batch; kept and routed as TREAD draws them, where the shape has a rate."""

    x: Tensor
    times: Tensor
    labels: Tensor
    target: Tensor
    kept: Tensor | None
    routed: tuple[int, int]

    @classmethod
    def of(cls, config: DiffusionConfig, shape: dict[str, Any]) -> Batch:
        draw = torch.Generator().manual_seed(1)
        rows, rate = shape["batch"], shape.get("rate", 0.0)
        image = (rows, config.in_channels, *config.input_size)
        return cls(
            x=torch.randn(image, generator=draw),
            times=1000 * torch.rand(rows, generator=draw),
            labels=torch.randint(config.conditioning.num_classes, (rows,), generator=draw),
            target=torch.randn(rows, config.predicted_channels, *config.input_size, generator=draw),
            kept=kept_tokens(torch.arange(rows), config.num_tokens, rate) if rate else None,
            routed=tuple(shape.get("routed", (0, 0))),
        )

    def predict(self, model: nn.Module) -> Tensor:
        """The model's output, ours or the reference's."""
        if isinstance(model, DiT):
            return model(self.x, self.times, self.labels, self.kept, self.routed)
        return model(self.x, times=self.times, labels=self.labels, kept=self.kept, routed=self.routed)

    def loss(self, model: nn.Module) -> Tensor:
        """Mean squared difference to the target."""
        return (self.predict(model) - self.target).square().mean()


class Program:
    """A side ready to run."""

    def __init__(self, side: str, shape: dict[str, Any]) -> None:
        self.config = model_config(shape)
        self.batch = Batch.of(self.config, shape)
        is_ours = side == "ours"
        self.model = our_model(self.config, shape["recompute"]) if is_ours else reference_model(self.config)
        self.optimizer = AdamW(self.model.named_parameters(), OptimizerConfig())

    def once(self) -> None:
        """Forward, backward and AdamW."""
        self.batch.loss(self.model).backward()
        self.optimizer.step(LEARNING_RATE)
        self.model.zero_grad(set_to_none=True)

    def versions(self) -> dict[str, str]:
        """Of what both sides stand on."""
        return {"torch": str(torch.__version__), "timm": timm_layers()[2]}

    def difference(self) -> float:
        """Largest difference between ours and the reference with our present weights, over the prediction and
        all gradients, relative to each tensor's largest element; 0 for the reference."""
        if isinstance(self.model, DiT):
            return 0.0
        published = reference_model(self.config)
        weights = as_published(self.config, self.model.state_dict())
        published.load_state_dict(weights | {"pos_embed": published.pos_embed})
        found = []
        for model in (self.model, published):
            model.zero_grad(set_to_none=True)
            self.batch.loss(model).backward()
            gradients = {name: _grad(parameter) for name, parameter in model.named_parameters()}
            if model is self.model:
                gradients = as_published(self.config, gradients)
            with torch.no_grad():
                found.append(gradients | {"prediction": self.batch.predict(model)})
        return max(_relative(found[0][name], expected) for name, expected in found[1].items())


def _relative(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape, f"{tuple(value.shape)} is not {tuple(expected.shape)}"
    scale = float(expected.double().abs().max())
    assert scale > 0, "the comparison means something only where numbers are not zero"
    return float((value.double() - expected.double()).abs().max()) / scale


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "backward reached every parameter"
    return parameter.grad


if __name__ == "__main__":
    serve(Program, json.loads(sys.argv[1]), sys.stdin, say)
