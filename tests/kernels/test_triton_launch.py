"""Where Triton runs: reasons, the interpreter, kernels compiled without a GPU, no Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from triptych.kernels import swiglu, triton_launch

CPU = torch.device("cpu")


def run_apart(program: str) -> Any:
    """What a program prints, as JSON, in a process without the interpreter."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=inherited, cwd=Path(__file__).parent,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_launch.why_not(CPU) is None, "the interpreter is on in tests"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert triton_launch.why_not(CPU) == "Triton needs a GPU; for tests on the CPU set TRITON_INTERPRET=1"
    with pytest.raises(RuntimeError, match="swiglu: form='triton' cannot run on cpu: Triton needs a GPU"):
        swiglu(torch.ones(2), torch.ones(2), form="triton")
    monkeypatch.setattr(triton_launch.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in str(triton_launch.why_not(CPU))


def test_the_interpreter_is_never_chosen_by_itself() -> None:
    rows = {row.form: row for row in triton_launch_table()}
    assert rows["triton"].installed and not rows["triton"].default and not rows["triton"].trusted
    assert rows["torch"].default


def triton_launch_table() -> list[Any]:
    from triptych.kernels import table

    return [row for row in table("cpu") if row.op == "swiglu"]


def test_importing_needs_and_loads_no_triton() -> None:
    program = (
        "import sys, json; sys.modules['triton'] = None\n"  # import triton raises ImportError
        "import torch\nfrom triptych import kernels\n"
        "y = kernels.swiglu(torch.ones(3), torch.ones(3))\n"
        "reasons = {r.form: r.reason for r in kernels.table('cpu') if r.op == 'swiglu'}\n"
        "print(json.dumps([y.tolist(), reasons['triton']]))"
    )
    y, reason = run_apart(program)
    assert y == pytest.approx([1 / (1 + 2.718281828**-1)] * 3)
    assert reason.startswith("Triton is not installed")
    ours = "[m for m in sys.modules if m.startswith('triptych') and 'triton' in m.rpartition('.')[2]]"
    # PyTorch itself imports Triton where it is installed; we import no kernel.
    loaded = run_apart(f"import sys, json; import triptych.kernels; print(json.dumps({ours}))")
    assert loaded == ["triptych.kernels.triton_launch"]


def test_kernels_compile_for_a_gpu_that_is_not_here() -> None:
    program = """
import json, torch
from triptych import kernels
from triptych.kernels import triton_launch
with triton_launch.compile_only("sm_90") as found:
    gate = torch.randn(300, requires_grad=True)
    kernels.swiglu(gate, torch.randn(300), form="triton").sum().backward()
print(json.dumps([[k.name, k.target, k.registers, k.spilled_bytes, k.fits] for k in found]))
"""
    (forward, backward) = run_apart(program)
    assert (forward[0], backward[0]) == ("forward_kernel", "backward_kernel")
    for _, target, registers, spilled, fits in (forward, backward):
        assert target == "sm_90" and 0 < registers <= 255 and spilled == 0 and fits


def test_compile_only_says_what_it_needs() -> None:
    unknown = r"target='sm_70' is not known; use one of \['sm_80', 'sm_90'\]"
    with pytest.raises(ValueError, match=unknown), triton_launch.compile_only("sm_70"):
        pass
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"), triton_launch.compile_only():
        pass


def test_powers_of_two() -> None:
    assert [triton_launch.power_of_2(n) for n in (1, 16, 17, 100, 128)] == [16, 16, 32, 128, 128]
    assert triton_launch.power_of_2(3, at_least=1) == 4
