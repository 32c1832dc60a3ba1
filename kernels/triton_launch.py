"""Where Triton can run, and how this room starts a Triton kernel: on a GPU, interpreted on a CPU, or compiled
only.

Triton is imported at the first launch and not before: a machine without it, or without a GPU, imports this
room at no cost. Nothing here tunes itself: sizes of blocks are functions of shapes and dtypes, so that what
comes out does not depend on what a timer said.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from triptych.kernels.dispatch import Form, always
from triptych.kernels.interpreter import mend_interpreter

if TYPE_CHECKING:
    import triton.language as tl

INTERPRETER_VARIABLE = "TRITON_INTERPRET"
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""Bytes of shared memory a block may have (CUDA programming guide, table of compute capabilities)."""


def interpreted() -> bool:
    """True where Triton kernels run in Triton's interpreter, on tensors of the CPU."""
    return os.environ.get(INTERPRETER_VARIABLE, "0") == "1"


def why_not(device: torch.device) -> str | None:
    """Why no Triton kernel can run on `device`; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton (it comes with PyTorch for CUDA)"
    if _compiling or (device.type == "cpu" and interpreted()):
        return None
    if device.type != "cuda":
        return f"Triton needs a GPU; for tests on the CPU set {INTERPRETER_VARIABLE}=1"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0 (A100) or newer"
    return None


def form(module: str, function: str, *, supports: Callable[..., str | None] = always) -> Form:
    """The form "triton": `function` of `module`, which is imported when first called.

    On a CPU it runs by name only; on a GPU it has to pass the self-check before an automatic choice takes it.
    """

    def serves(*args: Any, **kwargs: Any) -> str | None:
        wide = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dtype == torch.float64]
        if wide and wide[0].is_cuda:
            return "Triton's matrix products have no double precision"
        return supports(*args, **kwargs)

    return Form(
        "triton",
        lazily(module, function),
        supports=serves,
        installed=why_not,
        trusted=False,
        by_name_only=lambda device: device.type != "cuda",
    )


def lazily(module: str, function: str) -> Callable[..., Any]:
    """`function` of `module`, imported at the first call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    return call


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **constexprs: Any
) -> None:
    """Start `kernel` (a `triton.jit` function) over `grid` on the device of the first tensor of `args`."""
    if _compiling:
        _compiling[-1](kernel, *args, num_warps=num_warps, num_stages=num_stages, **constexprs)
        return
    if interpreted():
        mend_interpreter()
    device = next(x.device for x in args if isinstance(x, Tensor))
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constexprs)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Triton's type of sums and states for inputs of `dtype`: float64 for float64, else float32."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot for operands of `dtype`, as PyTorch's own products would have it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def fp32_too_wide(x: Tensor, channels: int) -> str | None:
    """Why kernels whose products fill a block's registers should not take heads of so many channels in fp32.

    Seen with Triton 3.6: at 128 channels they take minutes to compile and spill most of what they hold.
    """
    if x.is_cuda and x.dtype == torch.float32 and channels > 64:
        return f"in fp32 heads of {channels} channels, above 64, take Triton minutes to compile"
    return None


def power_of_2(n: int, at_least: int = 16) -> int:
    """The smallest power of two that is neither below n nor below `at_least` (tl.dot takes 16 and more)."""
    return max(at_least, 1 << (n - 1).bit_length())


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for a GPU that need not be here. Registers and spilled bytes are of one thread."""

    name: str
    target: str
    dtypes: tuple[str, ...]
    num_warps: int
    shared_bytes: int
    registers: int
    spilled_bytes: int

    @property
    def fits(self) -> bool:
        """True where the target's blocks have that much shared memory."""
        return self.shared_bytes <= SHARED_MEMORY[self.target]


_compiling: list[Callable[..., None]] = []


@contextlib.contextmanager
def compile_only(target: str = "sm_90") -> Iterator[list[Compiled]]:
    """Within, `launch` compiles for `target` and runs nothing: results are whatever memory held.

    So operators called with form="triton" on CPU tensors show that all their kernels compile, and what these
    need. target: "sm_80" (A100) or "sm_90" (H100, H200). Raises ValueError for another, RuntimeError where
    Triton's interpreter has taken the kernels' place.
    """
    if target not in SHARED_MEMORY:
        raise ValueError(f"compile_only: target={target!r} is not known; use one of {list(SHARED_MEMORY)}")
    if interpreted():
        raise RuntimeError(f"compile_only: unset {INTERPRETER_VARIABLE}, which leaves nothing to compile")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    arch = int(target.removeprefix("sm_"))

    class Absent:
        """The driver of a GPU that is not here."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            # Triton caches kernels by device.
            return arch

        def get_current_stream(self, device: int) -> int:
            return 0

    found: dict[str, Compiled] = {}

    def compile_(kernel: Any, *args: Any, **options: Any) -> None:
        compiled = kernel.run(*args, grid=(1,), warmup=True, **options)
        if compiled.hash not in found:
            dtypes = tuple(str(x.dtype).removeprefix("torch.") for x in args if isinstance(x, Tensor))
            metadata = compiled.metadata
            registers, spilled = _resources(compiled.asm["cubin"])
            found[compiled.hash] = Compiled(
                metadata.name, target, dtypes, metadata.num_warps, metadata.shared, registers, spilled
            )
            results.append(found[compiled.hash])

    results: list[Compiled] = []
    before = driver._active
    driver.set_active(Absent())
    _compiling.append(compile_)
    try:
        yield results
    finally:
        _compiling.pop()
        driver._active = before


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, from NVIDIA's own tool that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    fields = dict(item.split(":", 1) for item in text.split() if item.count(":") == 1)
    return int(fields["REG"]), int(fields["STACK"])
