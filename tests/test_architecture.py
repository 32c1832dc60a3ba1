"""The arrows of the house: an import never points up, and no room pulls in a heavy one on its own import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What each room may import; `docs/architecture.md` draws it.
MAY_IMPORT = {
    "kernels": set(),
    "models": {"kernels"},
    "data_pipeline": set(),
    "parallel": {"models", "kernels"},
    "training": {"parallel", "models", "data_pipeline", "kernels"},
    "tools": {"training", "parallel", "models", "data_pipeline", "kernels"},
    "launcher": {"tools", "training", "parallel", "models", "data_pipeline", "kernels"},
}


def rooms_imported_by(path: Path) -> set[str]:
    """The rooms that a file imports, absolutely; inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "triptych" else {module}
    return {name.split(".")[1] for name in names if name.startswith("triptych.")}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_never_point_up(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        upward = rooms_imported_by(path) - MAY_IMPORT[room] - {room}
        assert not upward, (
            f"{path.relative_to(ROOT)} imports {sorted(upward)}; {room} may import {sorted(MAY_IMPORT[room])}"
        )


def test_help_needs_no_torch() -> None:
    """`triptych --help` answers at once: torch and Ray are loaded only by the verbs that need them."""
    program = "import sys, triptych.launcher.cli; print([m for m in ('torch', 'ray') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_operators_are_used_by_their_public_names() -> None:
    """What stands in kernels/ has one door, so that a form can change without anyone above knowing."""
    for room in ("models", "data_pipeline", "parallel", "training"):
        for path in (ROOT / room).rglob("*.py"):
            inside = [
                node.module
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("triptych.kernels.")
            ]
            assert not inside, f"{path.relative_to(ROOT)} imports from {inside}; use triptych.kernels"
