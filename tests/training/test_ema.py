"""The average against its closed form, alone and under every layout, and read back by another layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parallel.training import model_config, parallel_model
from tests.training.runs import fit, make_run, write_corpus
from triptych.parallel.config import ParallelConfig
from triptych.parallel.model import ParallelModel
from triptych.training import store
from triptych.training.checkpoint import Checkpointer
from triptych.training.ema import EMA, EMAConfig
from triptych.training.shards import Window

LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    # Uneven parts.
    "dp_shard3": {"dp_shard": 3},
    "dp_replicate2": {"dp_replicate": 2},
    "tp2 dp_shard2": {"tp": 2, "dp_shard": 2},
}
CONFIG = EMAConfig(decay=0.5)
STEPS = 7


def drift(parameter: Tensor, step: int) -> None:
    """A stand-in for a training step that every layout can do: elementwise."""
    parameter.mul_(1.0 - 0.1 * step).add_(0.01 * step)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=["fp64", "fp32"]
)
@pytest.mark.parametrize("warmup", [True, False])
def test_follows_the_closed_form(dtype: torch.dtype, tolerance: float, warmup: bool) -> None:
    """ema_T = prod(d) p_0 + sum_t (1 - d_t) prod_{s > t}(d_s) p_t, written out in float64."""
    generator = torch.Generator().manual_seed(0)
    history = torch.randn(STEPS + 1, 3, 4, dtype=torch.float64, generator=generator).to(dtype)
    config = EMAConfig(decay=0.6, warmup=warmup)
    parameter = nn.Parameter(history[0].clone())
    ema = EMA([("w", parameter)], config)
    for step in range(1, STEPS + 1):
        parameter.data.copy_(history[step])
        ema.update(step)
    decays = [min(0.6, (1 + t) / (10 + t)) if warmup else 0.6 for t in range(1, STEPS + 1)]
    weights = [1.0]
    for decay in decays:
        weights = [weight * decay for weight in weights] + [1.0 - decay]
    expected = torch.einsum("t,tij->ij", torch.tensor(weights, dtype=torch.float64), history.double())
    with ema.swapped():
        assert parameter.dtype == dtype
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=tolerance, atol=tolerance)


def test_the_memory_grows_to_the_decay() -> None:
    config = EMAConfig()
    decays = [config.decay_at(step) for step in (1, 10, 100, 89_991, 10**6)]
    assert decays == pytest.approx([2 / 11, 11 / 20, 101 / 110, 0.9999, 0.9999])
    assert decays == sorted(decays)
    assert EMAConfig(warmup=False).decay_at(1) == 0.9999


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_is_none(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        EMAConfig(decay=decay)


def moving() -> tuple[nn.Linear, EMA]:
    """A module whose parameters are twos, and their average, which is 2 of them short of ones."""
    module = nn.Linear(2, 1)
    nn.init.ones_(module.weight)
    nn.init.ones_(module.bias)
    ema = EMA(module.named_parameters(), EMAConfig(decay=0.75, warmup=False))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(2.0)
    ema.update(1)
    return module, ema


def test_swapped_computes_with_the_average_and_comes_back() -> None:
    module, ema = moving()
    x = torch.ones(1, 2)
    assert float(module(x).detach()) == 6.0
    before = [parameter.data_ptr() for parameter in module.parameters()]
    with ema.swapped():
        assert float(module(x).detach()) == 3 * 1.25
        assert [parameter.data_ptr() for parameter in module.parameters()] == before
    assert float(module(x).detach()) == 6.0
    with pytest.raises(KeyError, match="body"), ema.swapped():
        raise KeyError("body")
    assert float(module(x).detach()) == 6.0
    with ema.swapped():
        assert float(module(x).detach()) == 3 * 1.25


def test_what_would_spoil_the_average_is_refused() -> None:
    module, ema = moving()
    with ema.swapped():
        with pytest.raises(AssertionError, match="within swapped"):
            ema.update(2)
        with pytest.raises(AssertionError, match="within swapped"):
            next(ema.shards([]))
        with pytest.raises(AssertionError, match="does not nest"), ema.swapped():
            pass
    assert float(module.bias.detach()) == 2.0
    with pytest.raises(AssertionError, match=r"w is kept in torch\.bfloat16"):
        EMA([("w", torch.zeros(2, dtype=torch.bfloat16))], CONFIG)


def test_restart_forgets() -> None:
    module, ema = moving()
    ema.restart()
    with ema.swapped():
        assert float(module.bias.detach()) == 2.0


def averaged(parallel: dict[str, Any]) -> tuple[ParallelModel, EMA]:
    """A model under a layout after `STEPS` steps of `drift`, and its average."""
    model = parallel_model(model_config(), ParallelConfig(**parallel), micro_batch_size=1)
    ema = EMA(model.named_parameters(), CONFIG)
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            for shard in model.shards():
                drift(shard.tensor, step)
        ema.update(step)
    return model, ema


def whole_average(model: ParallelModel, ema: EMA) -> dict[str, Tensor]:
    with ema.swapped():
        return model.gather(lambda parameter: parameter)


def average_and_save(parallel: dict[str, Any], root: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Body of a rank: the whole average, and the whole parameters after the exchange; a checkpoint too."""
    model, ema = averaged(parallel)
    checkpointer = Checkpointer(root)
    checkpointer.save(STEPS, ema.shards(model.shards()), {})
    checkpointer.wait()
    return whole_average(model, ema), model.gather(lambda parameter: parameter)


def read_back(parallel: dict[str, Any], root: Path) -> dict[str, Tensor]:
    """Body of a rank: the whole average that a checkpoint gives to an untrained model."""
    model = parallel_model(model_config(), ParallelConfig(**parallel), micro_batch_size=1)
    ema = EMA(model.named_parameters(), CONFIG)
    directory = store.find_latest(root)
    assert directory is not None
    with store.open_reader(directory) as reader:
        for window in ema.shards(model.shards()):
            reader.read_into(window)
    return whole_average(model, ema)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Tensor], Path]:
    """Average, parameters and checkpoint of one process."""
    from triptych.parallel.local import run_local

    root = tmp_path_factory.mktemp("alone")
    ((averages, parameters),) = run_local(1, average_and_save, {}, root)
    return averages, parameters, root


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "alone"])
def test_every_layout_averages_alike(
    layout: str,
    alone: tuple[dict[str, Tensor], dict[str, Tensor], Path],
    distributed: Callable[..., list[Any]],
    tmp_path: Path,
) -> None:
    parallel = LAYOUTS[layout]
    expected, parameters, root = alone
    size = ParallelConfig(**parallel).world_size
    averages, own = distributed(size, average_and_save, parallel, tmp_path)[0]
    torch.testing.assert_close(averages, expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(own, parameters, rtol=1e-13, atol=1e-14)
    assert all((averages[name] - own[name]).abs().max() > 1e-6 for name in own)
    # Each reads what the other wrote.
    torch.testing.assert_close(distributed(size, read_back, parallel, root)[0], expected, rtol=0.0, atol=0.0)
    torch.testing.assert_close(distributed(1, read_back, {}, tmp_path)[0], averages, rtol=0.0, atol=0.0)


TRAIN: dict[str, Any] = {"ema": {"decay": 0.5, "warmup": False}}


def train_and_stop(corpus: Path, parallel: dict[str, Any], run_dir: Path, steps: int) -> None:
    """Body of a rank: a run of so many steps, gone on with where it has begun."""
    train = make_run(corpus).train.model_dump() | TRAIN | {"steps": steps, "schedule": {"kind": "constant"}}
    fit(make_run(corpus, parallel=parallel, train=train), run_dir)


def saved(run_dir: Path, prefix: str, step: int) -> dict[str, Tensor]:
    """Whole tensors of a checkpoint, without the prefix of their names."""
    found = {}
    with store.open_reader(run_dir / "checkpoints" / f"step-{step:08d}") as reader:
        for name, entry in reader.index.items():
            if name.startswith(prefix):
                whole = torch.empty(entry.shape, dtype=torch.float64)
                reader.read_into(Window(name, whole, entry.shape, (0,) * len(entry.shape)))
                found[name.removeprefix(prefix)] = whole
    return found


@pytest.mark.parametrize("layout", ["alone", "tp2", "pp2", "dp_shard2"])
def test_a_run_keeps_its_average_over_a_stop_and_another_layout(
    layout: str, distributed: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """Two steps in one process, then two under the layout, against the recurrence on saved parameters."""
    write_corpus(tmp_path)
    parallel = {"alone": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "dp_shard2": {"dp_shard": 2}}[layout]
    size = ParallelConfig(**parallel).world_size
    run_dir = tmp_path / "run"
    distributed(1, train_and_stop, tmp_path, {}, run_dir, 2)
    for steps in (3, 4):
        before = saved(run_dir, "ema/", steps - 1)
        distributed(size, train_and_stop, tmp_path, parallel, run_dir, steps)
        after, parameters = saved(run_dir, "ema/", steps), saved(run_dir, "model/", steps)
        assert after.keys() == parameters.keys()
        for name, parameter in parameters.items():
            expected = 0.5 * before[name] + 0.5 * parameter
            torch.testing.assert_close(after[name], expected, rtol=1e-13, atol=1e-15)
        assert any(not torch.equal(after[name], parameters[name]) for name in after)
