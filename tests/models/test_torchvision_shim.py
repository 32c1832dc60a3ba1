"""torchvision's import with and without its compiled part, in fresh processes: an import leaves traces."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Stands for a torchvision that needs its operators at import, as the real one does.
NEEDS_NMS = """
import torch
torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: dets.new_empty(0))
"""


def run(program: str, first_on_path: Path | None = None) -> str:
    environment = dict(os.environ)
    if first_on_path:
        environment["PYTHONPATH"] = str(first_on_path)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torchvision_imports_and_says_so_where_its_operators_are_missing() -> None:
    aside = Path(sys.prefix) / "timm"
    if importlib.util.find_spec("torchvision") is None and not aside.is_dir():
        pytest.skip("torchvision is not installed")
    found = run(
        "from triptych.models.torchvision_shim import prepare_torchvision\n"
        "declared = prepare_torchvision()\n"
        "import torch\n"
        "import torchvision\n"
        "boxes = torch.tensor([[0., 0., 1., 1.], [0., 0., 1., 1.]])\n"
        "try:\n"
        "    kept = torchvision.ops.nms(boxes, torch.tensor([1., 2.]), 0.5).tolist()\n"
        "    print(declared, kept)\n"
        "except RuntimeError as error:\n"
        "    print(declared, 'Couldn\\'t load custom C++ ops' in str(error))\n"
        "print(prepare_torchvision() == declared)\n",
        aside,
    )
    # Either the real operators, untouched, or declared ones that raise torchvision's own error.
    assert found.splitlines() in (["False [1]", "True"], ["True True", "True"])


def test_a_torchvision_without_compiled_part_can_be_imported(tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(NEEDS_NMS)
    # As a library that was built for another torch: it is there and does not load.
    (package / "_C.so").write_bytes(b"no library")
    plain = "import torchvision"
    with pytest.raises(AssertionError, match="torchvision::nms does not exist"):
        run(plain, tmp_path)
    shim = "from triptych.models.torchvision_shim import prepare_torchvision\nprint(prepare_torchvision())\n"
    assert run(shim + plain, tmp_path) == "True"


def test_without_torchvision_nothing_is_declared() -> None:
    found = run(
        "import importlib.util, torch\n"
        "importlib.util.find_spec = lambda name: None\n"
        "from triptych.models.torchvision_shim import prepare_torchvision\n"
        "print(prepare_torchvision(), hasattr(torch.ops.torchvision, 'nms'))"
    )
    assert found == "False False"
