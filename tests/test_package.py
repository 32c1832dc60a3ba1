"""The wheel: every room is in it, importable from it alone, with its configurations."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ["launcher", "parallel", "models", "kernels", "data_pipeline", "training", "tools"]


@pytest.fixture(scope="module")
def installed_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of the sources and unpack it into an empty folder."""
    source = tmp_path_factory.mktemp("source")
    for name in [*ROOMS, "configs"]:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ["pyproject.toml", "setup.py", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, source / name)
    wheels, target = source / "wheels", tmp_path_factory.mktemp("target")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, source], check=True
    )
    (wheel,) = wheels.glob("triptych-*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", target, wheel], check=True)
    return target


def test_wheel_has_every_module_of_every_room(installed_wheel: Path) -> None:
    for room in ROOMS:
        ours = {p.relative_to(ROOT / room) for p in (ROOT / room).rglob("*.py")}
        theirs = {
            p.relative_to(installed_wheel / "triptych" / room)
            for p in (installed_wheel / "triptych" / room).rglob("*.py")
        }
        assert ours == theirs, f"triptych.{room} lacks {sorted(map(str, ours - theirs))} in the wheel"


def test_wheel_has_the_configurations(installed_wheel: Path) -> None:
    ours = {p.relative_to(ROOT) for p in (ROOT / "configs").rglob("*.yaml")}
    assert ours, "no configuration in configs/"
    assert ours == {p.relative_to(installed_wheel / "triptych") for p in installed_wheel.rglob("*.yaml")}


def test_rooms_import_from_the_wheel_alone(installed_wheel: Path, tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(installed_wheel)!r})
import importlib
for room in {ROOMS!r}:
    module = importlib.import_module("triptych." + room)
    assert module.__file__.startswith({str(installed_wheel)!r}), module.__file__
from triptych.launcher.config import load
print(load("configs/lm/demo.yaml", []).model.vocab_size)
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 0
