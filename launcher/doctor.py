"""What is installed here, which devices there are, and which kernels would run: `triptych doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

CORE = (
    "torch",
    "ray",
    "numpy",
    "pydantic",
    "PyYAML",
    "typer",
    "rich",
    "tokenizers",
    "safetensors",
    "tensorboard",
)
EXTRAS = {
    "transformers": "hf: bench train, conversion",
    "megatron-core": "megatron: parity of token files",
    "deepspeed": "deepspeed: ZeRO and offload",
    "triton": "comes with torch for CUDA",
    "flash-attn": "cuda: attention kernels",
    "mamba-ssm": "cuda: Mamba-2 kernels",
    "causal-conv1d": "cuda: convolution kernels",
    "flash-linear-attention": "cuda: linear attention kernels",
    "liger-kernel": "cuda: norms, activations, cross-entropy",
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ok: fine, missing (and not needed), or broken (and needed)."""

    name: str
    state: str
    value: str


@dataclass(frozen=True)
class Report:
    """All findings, and the table of kernels."""

    machine: list[Finding]
    packages: list[Finding]
    kernels: list[dict[str, Any]]
    checks: list[dict[str, Any]]
    """Of each form that this machine can run, against the reference; empty where it was not asked for."""

    @property
    def ok(self) -> bool:
        """True unless something that training needs is missing, or wrong."""
        needed = (*self.machine, *self.packages)
        wrong = [check for check in self.checks if check["trusted"] and check["problem"]]
        return not wrong and all(finding.state != "broken" for finding in needed)

    def table(self) -> RenderableType:
        """Three tables, one below the other."""
        tables = []
        for title, findings in (("Machine", self.machine), ("Packages", self.packages)):
            table = Table("", "", "", title=title, title_justify="left", show_header=False)
            for finding in findings:
                style = {"ok": "green", "missing": "dim", "broken": "bold red"}[finding.state]
                table.add_row(finding.name, f"[{style}]{finding.state}[/]", finding.value)
            tables.append(table)
        table = Table(
            "operator", "form", "would run", "why not", title="Kernels on this device", title_justify="left"
        )
        for row in self.kernels:
            choice = "default" if row["default"] else "on request" if row["installed"] else "no"
            table.add_row(row["op"], row["form"], choice, row["reason"])
        return Group(*tables, table, *([self._checks()] if self.checks else []))

    def _checks(self) -> Table:
        table = Table(
            "operator", "form", "call", "dtype", "", title="Self-check against the reference in float64",
            title_justify="left",
        )  # fmt: skip
        for check in self.checks:
            problem = check["problem"]
            verdict = f"[bold red]disabled: {escape(problem)}[/]" if problem else "[green]right[/]"
            table.add_row(check["op"], check["form"], check["call"], check["dtype"], verdict)
        return table

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {"ok": self.ok, **asdict(self)}


def examine(*, check_kernels: bool = False) -> Report:
    """Look at this machine. Imports torch and Ray, starts nothing.

    check_kernels: hold every form that can run here against the reference, on small calls.
    """
    packages = [
        *(_package(name, "") for name in CORE),
        *(_package(name, what) for name, what in EXTRAS.items()),
    ]
    machine = [_python(), _system(), _memory(), _shared_memory(), *_devices(), _ray_directory()]
    try:
        from triptych import kernels

        rows = [row._asdict() for row in kernels.table()]
        checks = _check_kernels() if check_kernels else []
    except ImportError as error:
        rows, checks = [], []
        machine.append(Finding("kernels", "broken", str(error)))
    return Report(machine, packages, rows, checks)


def _check_kernels() -> list[dict[str, Any]]:
    import torch

    from triptych import kernels

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = []
    for row in kernels.table(device):
        if not row.installed or row.form == "reference":
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for call, problem in kernels.check(row.op, row.form, device, dtype).items():
                found.append(
                    {"op": row.op, "form": row.form, "call": call, "trusted": row.trusted, "problem": problem}
                    | {"dtype": str(dtype).removeprefix("torch.")}
                )
    return found


def _package(name: str, extra: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing" if extra else "broken", extra or "needed: pip install triptych")


def _python() -> Finding:
    right = (3, 10) <= sys.version_info[:2] <= (3, 13)
    value = f"{platform.python_version()} at {sys.executable}"
    return Finding(
        "python", "ok" if right else "broken", value if right else f"{value}; triptych needs 3.10 to 3.13"
    )


def _system() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("system", "ok", f"{platform.platform()}, {cores} cores")


def _memory() -> Finding:
    try:
        pages = {
            name: os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
            for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")
        }
    except (ValueError, OSError):
        return Finding("memory", "missing", "unknown")
    total, free = pages["SC_PHYS_PAGES"] / 2**30, pages["SC_AVPHYS_PAGES"] / 2**30
    return Finding("memory", "ok", f"{total:.1f} GiB, {free:.1f} GiB free")


def _shared_memory() -> Finding:
    """Ray keeps its object store there; a container often has 64 MiB of it."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("/dev/shm", "missing", "Ray falls back to /tmp")
    free = shutil.disk_usage(path).free / 2**20
    return Finding(
        "/dev/shm", "ok" if free >= 192 else "missing", f"{free:,.0f} MiB free; Ray takes up to 128 MiB"
    )


def _ray_directory() -> Finding:
    try:
        from triptych.launcher.ray_cluster import short_temp_dir

        return Finding("ray sockets", "ok", f"below {short_temp_dir()}")
    except (RuntimeError, ImportError) as error:
        return Finding("ray sockets", "broken", str(error))


def _devices() -> list[Finding]:
    try:
        import torch
    except ImportError as error:
        return [Finding("torch", "broken", str(error))]
    if not torch.cuda.is_available():
        return [
            Finding("gpu", "missing", f"none that torch {torch.__version__} sees; training runs on the CPU")
        ]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        value = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}"
        found.append(Finding(f"cuda:{index}", "ok", value))
    return [*found, Finding("nccl", "ok", ".".join(map(str, torch.cuda.nccl.version())))]
