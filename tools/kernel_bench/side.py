"""One side of a comparison of `triptych bench kernels`, in its own process.

`python -m triptych.tools.kernel_bench.side '{...}'` builds what the request names, warms up and answers; then
it makes a step for each line it reads, answering the seconds of forward and of forward and backward; at the
end it answers what it took and how far it is from the reference in float64.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from triptych.kernels import saved_for_backward
from triptych.kernels.selfcheck import error_of
from triptych.tools.bench_sides import peak_bytes, say, settled_bytes
from triptych.tools.kernel_bench.problem import Arguments, Draw, Problem, Shape, make_importable
from triptych.tools.kernel_bench.problems import problems

STEPS = 20
"""At most so many are timed together, as one alone may be shorter than what a start varies by."""
LONG_ENOUGH = 0.2
"""Seconds of steps together from which on there are no more, on a CPU."""


class Call:
    """A function on leaves with gradients, forward alone or with backward under a fixed cotangent."""

    def __init__(self, function: Callable[..., Any], arguments: Arguments, as_mean: bool = False) -> None:
        self.function, self.arguments, self.as_mean = function, arguments, as_mean
        self.leaves = {
            k: v.requires_grad_()
            for k, v in arguments.items()
            if isinstance(v, Tensor) and v.is_floating_point()
        }
        self.cotangent: Tensor | None = None

    def forward(self) -> Tensor:
        """The first output."""
        result = self.function(**self.arguments)
        return result[0] if isinstance(result, tuple) else result

    def both(self) -> Tensor:
        """Forward and backward; leaves gradients at the leaves."""
        for leaf in self.leaves.values():
            leaf.grad = None
        y = self.forward()
        if self.cotangent is None:
            generator = torch.Generator(y.device).manual_seed(1)
            drawn = torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype)
            self.cotangent = torch.full_like(y, 1 / y.numel()) if self.as_mean else drawn
        y.backward(self.cotangent)
        return y


def side_function(problem: Problem, side: str) -> tuple[Callable[..., Any], tuple[str, ...], str]:
    """What a side runs, arguments it goes without, and the package it stands on."""
    for peer in problem.peers:
        if peer.name == side:
            return peer.run, peer.without, peer.package
    return problem.run(None if side == "ours" else side), (), ""


def difference(problem: Problem, side: str, device: torch.device, dtype: torch.dtype) -> float:
    """Of outputs and gradients to the reference in float64 on a small shape, relative to the largest
    element."""
    function, without, _ = side_function(problem, side)
    made = problem.inputs(problem.shapes["check"][0], Draw(device, dtype))
    return error_of(function, problem.run("reference"), {k: v for k, v in made.items() if k not in without})[
        0
    ]


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    """Of one step, the mean of some."""
    if device.type != "cuda":
        start, steps, passed = time.perf_counter(), 0, 0.0
        while steps < STEPS and passed < LONG_ENOUGH:
            step()
            steps, passed = steps + 1, time.perf_counter() - start
        return passed / steps
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(STEPS):
        step()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3 / STEPS


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes/s of a copy (read and written) and FLOP/s of a matrix product, the best of some."""
    elements = (1 << 30 if device.type == "cuda" else 1 << 26) // dtype.itemsize
    source = torch.ones(elements, device=device, dtype=dtype)
    target = torch.empty_like(source)
    size = 8192 if device.type == "cuda" else 1536
    a = torch.randn(size, size, device=device).to(dtype)
    copies = [seconds_of(lambda: target.copy_(source), device) for _ in range(8)]
    products = [seconds_of(lambda: torch.mm(a, a), device) for _ in range(8)]
    return {
        "bytes_per_second": 2 * source.nbytes / min(copies),
        "flops_per_second": 2 * size**3 / min(products),
    }


def counts(call: Call) -> dict[str, int | None]:
    """Least traffic in bytes and FLOPs of forward and backward, and bytes kept beyond the arguments."""
    with FlopCounterMode(display=False) as counter:
        y = call.both()
    tensors = [x for x in call.arguments.values() if isinstance(x, Tensor)]
    read = sum(x.nbytes for x in tensors)
    written = sum(x.grad.nbytes for x in tensors if x.grad is not None)
    try:
        kept = saved_for_backward(call.function, **call.arguments)
    except (ValueError, RuntimeError, NotImplementedError):
        # What the call keeps depends on values, such as the bounds of documents.
        kept = None
    return {
        "moved_bytes": 2 * read + 2 * y.nbytes + written,
        "flops": counter.get_total_flops(),
        "saved_bytes": None if kept is None else sum(one.num_bytes for one in kept if one.argument is None),
    }


def serve(request: dict[str, Any]) -> None:
    """The conversation that the head of this file tells."""
    torch.set_num_threads(request["threads"])
    make_importable()
    side, what = request["side"], request["shape"]
    device, dtype = torch.device(what["device"]), getattr(torch, what["dtype"])
    if side == "ceilings":
        say(ceilings(device, dtype))
        return
    problem = next(one for one in problems() if one.name == what["problem"])
    function, without, package = side_function(problem, side)

    def build(shape: Shape) -> Call:
        arguments = problem.inputs(shape, Draw(device, dtype))
        return Call(function, {k: v for k, v in arguments.items() if k not in without}, problem.as_mean)

    # What is imported and compiled on first use is paid for on shapes that cost nothing.
    build(problem.shapes["tiny"][0]).both()
    gc.collect()
    before = _settled(device)
    call = build(what["sizes"])
    _settled(device)
    call.both()
    say("ready")
    for _ in sys.stdin:
        say({"forward": seconds_of(call.forward, device), "both": seconds_of(call.both, device)})
    peak = (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()) - before
    counted = counts(call) if side == "ours" else None
    del call
    say(
        {
            "peak_bytes": peak,
            "difference": difference(problem, side, device, dtype),
            "versions": _versions(package),
            "counts": counted,
        }
    )


def _settled(device: torch.device) -> int:
    if device.type != "cuda":
        return settled_bytes()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _versions(package: str) -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    if package:
        found[package] = getattr(__import__(package.partition(".")[0]), "__version__", "?")
    return found


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
