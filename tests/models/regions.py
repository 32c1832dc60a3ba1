"""One mixer and one feed-forward, alone and cut over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from triptych.models.config import ModelConfig
from triptych.models.context import Context
from triptych.models.diffusion_config import DiffusionConfig
from triptych.models.init import initialize
from triptych.models.registry import FEEDFORWARDS, MIXERS
from triptych.models.scan import Scan
from triptych.parallel.collectives import Axis
from triptych.parallel.config import Recompute
from triptych.parallel.recompute import apply_recompute
from triptych.parallel.tensor import apply_tensor_parallel

LENGTH = 12


class Pair(nn.Module):
    """x + mixer(x), then x + ffn(x), of the first layer of a configuration; initialised, moved a bit."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        spec = config.layer_specs()[0]
        self.mixer = MIXERS[spec.mixer](config, 0) if spec.mixer else None
        self.ffn = FEEDFORWARDS[spec.ffn](config, 0) if spec.ffn else None
        self.double()
        initialize(self, 0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise * 0.1)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        for part in (self.mixer, self.ffn):
            x = x if part is None else x + part(x, context)
        return x


def context_of(config: ModelConfig) -> Context:
    """Of whole rows: a scan for denoisers."""
    return Context(scan=Scan.of_grid(config.grid, "cpu") if isinstance(config, DiffusionConfig) else None)


def gradients(
    config: ModelConfig, *, cut: bool = False, sequence_parallel: bool = True, recompute: Recompute = "none"
) -> dict[str, torch.Tensor]:
    """Output, and the gradients of the input and of every parameter, all whole.

    cut: over the ranks of the process group that this runs in.
    """
    generator = torch.Generator().manual_seed(1)
    x, weights = torch.randn(2, 2, LENGTH, config.hidden_size, generator=generator, dtype=torch.float64)
    pair: Any = Pair(config)
    if cut:
        axis = Axis.of(init_device_mesh("cpu", (dist.get_world_size(),)))
        apply_tensor_parallel(pair, axis, sequence_parallel=sequence_parallel)
        if sequence_parallel:
            x, weights = (t.chunk(axis.size, 1)[axis.rank].contiguous() for t in (x, weights))
    apply_recompute(pair, recompute)
    x.requires_grad_()
    y = pair(x, context_of(config))
    (y * weights).sum().backward()
    found = {"output": y.detach(), "input": x.grad}
    if cut and sequence_parallel:
        found = {name: _joined(value) for name, value in found.items()}
    grads = {name: parameter.grad for name, parameter in pair.named_parameters()}
    return found | {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}


def cut_gradients(
    config: ModelConfig, sequence_parallel: bool, recompute: Recompute
) -> dict[str, torch.Tensor]:
    """`gradients` on this rank of a process group."""
    return gradients(config, cut=True, sequence_parallel=sequence_parallel, recompute=recompute)


def check_cuts(config: ModelConfig, distributed: Callable[..., list[Any]]) -> None:
    """Two ranks find what one process does: with sequence parallelism and without, recomputed or not."""
    expected = gradients(config)
    for options in ((True, "none"), (True, "selective"), (False, "none")):
        for found in distributed(2, cut_gradients, config, *options):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(
                    found[name], value, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
                )


def _joined(value: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts, 1)
