"""Norms, rotary positions and activations compile for GPUs that are not here, at the sizes of real models."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys, torch
from triptych import kernels
from triptych.kernels import triton_launch

def leaf(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, requires_grad=True)

with triton_launch.compile_only(sys.argv[1]) as found:
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, channels in ((4096, 128), (1024, 1152), (1024, 4096), (16, 16384)):
            x, weight = leaf(1, tokens, channels, dtype=dtype), leaf(channels)
            kernels.rms_norm(x, weight, form="triton").sum().backward()
            kernels.layer_norm(x, weight, weight, form="triton").sum().backward()
            for length in (1, tokens):
                m = leaf(1, length, 3 * channels, dtype=dtype).chunk(3, dim=-1)
                y = kernels.modulated_layer_norm(x, m[0], m[1], form="triton")
                kernels.gated_residual(x, y, m[2], form="triton").sum().backward()
        x, z, weight = leaf(1, 1024, 4096, dtype=dtype), leaf(1, 1024, 4096, dtype=dtype), leaf(4096)
        for order in (True, False):
            kernels.gated_rms_norm(
                x, z, weight, group_size=512, norm_before_gate=order, form="triton"
            ).sum().backward()
        for activation in (kernels.swiglu, kernels.geglu):
            activation(x, z, form="triton").sum().backward()
        for head in (64, 128):
            q = leaf(1, 1024, 12, head, dtype=dtype)
            where = torch.empty(1024, 2, dtype=torch.int64)
            kernels.rotary(q, where[:, 0], form="triton").sum().backward()
            kernels.axial_rotary(q, where, form="triton").sum().backward()
print(json.dumps([[k.name, k.dtypes[0], k.num_warps, k.registers, k.spilled_bytes, k.fits] for k in found]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_compile(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, target], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) >= 60
    for name, dtype, warps, registers, spilled, fits in found:
        # Rows of 16,384 channels have 16 elements of each tensor per thread, and spill some in backward;
        # sines keep a table for angles that they never get.
        assert fits and spilled <= (320 if warps == 32 else 40), (name, dtype, warps, spilled)
        assert registers * warps * 32 * (2 if warps <= 8 else 1) <= 65536, (name, dtype, warps, registers)
