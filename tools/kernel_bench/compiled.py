"""Every Triton kernel compiled for a GPU that need not be here: registers, spills, shared memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from triptych import kernels
from triptych.kernels.triton_launch import Compiled, compile_only
from triptych.tools.kernel_bench.problem import Draw, Problem, Shape
from triptych.tools.kernel_bench.problems import chosen
from triptych.tools.kernel_bench.side import Call
from triptych.tools.render import table_of

if TYPE_CHECKING:
    from rich.console import RenderableType

LARGEST = {"B": 1, "T": 192, "H": 2, "E": 4, "F": 256}
"""What does not change a kernel's blocks is kept small, as results are made room for on the CPU."""


@dataclass(frozen=True)
class CompiledReport:
    """Kernels by problem."""

    target: str
    dtype: str
    kernels: list[tuple[str, Compiled]]

    @property
    def ok(self) -> bool:
        """True when every kernel fits the target's shared memory."""
        return all(kernel.fits for _, kernel in self.kernels)

    def table(self) -> RenderableType:
        """A line per kernel."""
        columns = ["problem", "kernel", "warps", "registers", "spilled bytes", "shared KiB"]
        rows = [
            [
                problem,
                one.name,
                one.num_warps,
                one.registers,
                one.spilled_bytes,
                f"{one.shared_bytes / 1024:.1f}{'' if one.fits else ' TOO MUCH'}",
            ]
            for problem, one in self.kernels
        ]
        return table_of(f"Triton kernels compiled for {self.target}, {self.dtype}", columns, rows)

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        found = [asdict(one) | {"problem": problem} for problem, one in self.kernels]
        return {"ok": self.ok, "target": self.target, "dtype": self.dtype, "kernels": found}


def compiled_kernels(
    target: str,
    *,
    ops: Sequence[str] = (),
    dtype: str = "bfloat16",
    progress: Callable[[str], None] | None = None,
) -> CompiledReport:
    """Compile what forward and backward of every problem launch at the sizes of heads that it has on a GPU.

    target: "sm_80" or "sm_90". Raises ValueError for what is not known, RuntimeError under Triton's
    interpreter, and whatever Triton raises for a kernel that does not compile.
    """
    found: list[tuple[str, Compiled]] = []
    for problem in chosen(ops):
        if "triton" not in kernels.forms(problem.op):
            continue
        if progress is not None:
            progress(problem.name)
        arguments = problem.inputs(_shape(problem), Draw(torch.device("cpu"), getattr(torch, dtype)))
        with compile_only(target) as compiled:
            Call(problem.run("triton"), arguments).both()
        found += [(problem.name, one) for one in compiled]
    return CompiledReport(target, dtype, found)


def _shape(problem: Problem) -> Shape:
    shape = problem.shapes.get("compile", problem.shapes["cuda"])[0]
    return {name: min(size, LARGEST.get(name, size)) for name, size in shape.items()}
