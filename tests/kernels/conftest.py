"""What the kernel tests share: poisoned memory, one thread, comparison of two forms with all gradients."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so an output that is not written cannot pass; one thread; a fixed seed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory, "PyTorch fills empty tensors with NaN here"
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def run_with_gradients(function: Callable[..., Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs, and the gradients of every floating input under a random cotangent; empty ones left out."""
    leaves = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    result = function(**leaves)
    outputs = [y for y in (result if isinstance(result, tuple) else (result,)) if y is not None and y.numel()]
    generator = torch.Generator().manual_seed(1)
    torch.autograd.backward(
        outputs, [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]
    )
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"gradient of {k}": v.grad for k, v in leaves.items() if v.requires_grad and v.numel()}
    missing = [k for k, v in found.items() if v is None]
    assert not missing, f"no value for {missing}"
    return found


def errors_between(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference relative to the largest expected value (to 1 if that is 0); NaN is infinite."""
    assert found.keys() == expected.keys()
    errors = {}
    for name, value in found.items():
        assert value.shape == expected[name].shape, f"{name}: {value.shape} is not {expected[name].shape}"
        scale = float(expected[name].double().abs().max()) or 1.0
        error = (value.double() - expected[name].double()).abs().max() / scale
        errors[name] = float(error.nan_to_num(nan=float("inf")))
    return errors


@pytest.fixture
def with_gradients() -> Callable[..., dict[str, Tensor]]:
    """`run_with_gradients`."""
    return run_with_gradients


@pytest.fixture
def errors() -> Callable[..., dict[str, float]]:
    """`errors_between`."""
    return errors_between


@pytest.fixture
def agree() -> Callable[..., None]:
    """agree(first, second, inputs, tolerance): outputs and all gradients of two functions are the same."""

    def check(
        first: Callable[..., Any],
        second: Callable[..., Any],
        inputs: dict[str, Tensor],
        tolerance: float = 1e-12,
    ) -> None:
        found = errors_between(run_with_gradients(first, inputs), run_with_gradients(second, inputs))
        wrong = {name: error for name, error in found.items() if not error <= tolerance}
        assert not wrong, f"relative errors above {tolerance}: {wrong}"

    return check


@pytest.fixture
def accurate() -> Callable[..., None]:
    """accurate(form, plain, inputs, floor): against the plain form in fp64, `form` errs at most twice as much
    as the plain form in the inputs' own dtype, or less than `floor`."""

    def check(
        form: Callable[..., Any], plain: Callable[..., Any], inputs: dict[str, Tensor], floor: float
    ) -> None:
        exact = run_with_gradients(
            plain, {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        )
        ours = errors_between(run_with_gradients(form, inputs), exact)
        theirs = errors_between(run_with_gradients(plain, inputs), exact)
        wrong = {k: (e, theirs[k]) for k, e in ours.items() if not e <= max(2 * theirs[k], floor)}
        assert not wrong, f"(error, error of the plain form): {wrong}"

    return check


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """fla and Liger, from the folder that the Makefile makes for them."""
    folder = Path(sys.prefix) / "peers"
    if not folder.is_dir():
        pytest.skip(f"other packages' kernels are not in {folder}; make install-dev puts them there")
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    importlib.invalidate_caches()
