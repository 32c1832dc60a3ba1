"""Runs of several tasks and experts where things go wrong: starved experts, missing tasks, broken data.

Each run is whole: shards, sampler, model, layout, optimizer. What no rank may do is hang or say NaN, and what
one process says every layout says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data_pipeline.images.samples import png, write_shards
from tests.training.expert_runs import EXPERTS, KINDS, expert_run, observe, write_digits
from triptych.data_pipeline.images.index import BOXES, MASK
from triptych.launcher.config import RunConfig
from triptych.training.data import open_training

pytestmark = pytest.mark.timeout(120)
Distributed = Callable[..., list[Any]]
EP2 = {"dp_replicate": 2, "ep": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": EP2,
    "ep2.dp_shard2": {"dp_shard": 2, "ep": 2, "recompute": "full"},
    "ep2.dp_shard4": {"dp_shard": 4, "ep": 2},
    "ep2.tp2": {"dp_replicate": 2, "ep": 2, "tp": 2},
    "ep2.pp2": {"dp_replicate": 2, "ep": 2, "pp": 2},
}
STACKED = "blocks.1.ffn.experts."
GATES = ("blocks.0.mixer.router.weight", "blocks.1.ffn.router.weight")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


def starved(data: Path, parallel: dict[str, Any], weight_decay: float = 0.0, **moe: Any) -> RunConfig:
    """All tokens to the first expert, in attention to the first two: gates are zero and frozen, and of equals
    the first are chosen."""
    return expert_run(
        data,
        model={
            "attention_moe": {"losses": {}},
            "moe": {"router": "softmax", "top_k": 1, "per_task": True, "losses": {}, **moe},
        },
        parallel=parallel,
        train={
            "steps": 3,
            "freeze": ["*.router.weight"],
            "optimizer": {"lr": 0.01, "weight_decay": weight_decay},
            **({"micro_batch_size": 8 // parallel.get("dp_replicate", 1)} if moe else {}),
        },
    )


def run_on(distributed: Distributed, run: RunConfig, run_dir: Path) -> dict[str, Any]:
    """What `observe` saw on rank 0."""
    return distributed(run.parallel.world_size, observe, run, run_dir, timeout=60)[0]


def assert_finite(seen: dict[str, Any]) -> None:
    for metrics in seen["metrics"]:
        assert all(map(math.isfinite, metrics.values())), metrics
    assert all(map(math.isfinite, [*seen["losses"], *seen["norms"]])), seen["losses"]
    for tensors in (*seen["gradients"], seen["after"]):
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    for stages in seen["routing"]:
        for figures in (figures for stage in stages for figures in stage.values()):
            scalars = [figures["dropped"], figures["entropy"], *figures["losses"].values()]
            assert all(map(math.isfinite, scalars)), figures
            assert bool(figures["load"].isfinite().all())
            assert all(bool(load.isfinite().all()) for load in figures["task_load"].values())


def assert_same(seen: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("losses", "norms"):
        assert seen[key] == pytest.approx(expected[key], rel=1e-9), key
    for got, wanted in zip(seen["gradients"], expected["gradients"], strict=True):
        assert got.keys() == wanted.keys()
        for name, tensor in wanted.items():
            scale = max(float(tensor.abs().max()), 1e-6)
            assert float((got[name] - tensor).abs().max()) <= 1e-9 * scale, name


# ---- experts that get everything, and those that get nothing


@pytest.fixture(scope="module")
def starved_alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return observe(starved(data, {}), tmp_path_factory.mktemp("alone"))


def assert_first_alone_learns(seen: dict[str, Any], factor: float = 1.0) -> None:
    """factor: by which weights without a gradient shrink."""
    assert_finite(seen)
    stacked = [name for name in seen["before"] if name.startswith(STACKED)]
    assert len(stacked) == 4
    for name in stacked:
        for gradients in seen["gradients"]:
            assert float(gradients[name][0].abs().max()) > 0
            assert not gradients[name][1:].any(), f"{name}: the gradient of an idle expert is not exactly 0"
        before, after = seen["before"][name], seen["after"][name]
        assert not (after[0] == before[0]).all()
        expected = before[1:] * (1.0 if name.endswith("bias") else factor)
        assert float((after[1:] - expected).abs().max()) <= (0.0 if factor == 1.0 else 1e-15)
    heads = [name for name in seen["before"] if name.startswith("blocks.0.mixer.") and "_experts." in name]
    assert len(heads) == 4
    for name in heads:
        assert seen["gradients"][-1][name][:2].any() and not seen["gradients"][-1][name][2:].any()
        assert bool((seen["after"][name][2:] == seen["before"][name][2:]).all()) == (
            factor == 1.0 or name.endswith("bias")
        )


def test_idle_experts_train_nothing(starved_alone: dict[str, Any]) -> None:
    assert_first_alone_learns(starved_alone)
    loads = [stages[0]["blocks.1.ffn.router"]["load"].tolist() for stages in starved_alone["routing"]]
    assert loads == [[1.0] + [0.0] * (EXPERTS - 1)] * 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_without_a_row(
    data: Path, starved_alone: dict[str, Any], tmp_path: Path, distributed: Distributed, layout: str
) -> None:
    """The second rank of ep holds experts that nobody chooses."""
    seen = run_on(distributed, starved(data, LAYOUTS[layout]), tmp_path)
    assert_first_alone_learns(seen)
    assert_same(seen, starved_alone)


def test_weight_decay_is_all_that_moves_idle_experts(data: Path, tmp_path: Path) -> None:
    """As it moves every matrix in every step, whatever its gradient; biases stay."""
    run = starved(data, {}, weight_decay=0.5)
    rates = [0.01 * factor for factor in _schedule(run)]
    assert_first_alone_learns(observe(run, tmp_path), math.prod(1 - 0.5 * rate for rate in rates))


def _schedule(run: RunConfig) -> list[float]:
    from triptych.training import schedule

    return [schedule.factor(run.train.schedule, step, run.train.steps) for step in (1, 2, 3)]


def test_all_to_one_expert_of_little_capacity(data: Path, tmp_path: Path, distributed: Distributed) -> None:
    small = {"routing": "capacity", "capacity_factor": 1.0}
    alone = observe(starved(data, {}, **small), tmp_path / "alone")
    assert_first_alone_learns(alone)
    dropped = [stages[0]["blocks.1.ffn.router"]["dropped"] for stages in alone["routing"]]
    assert dropped == pytest.approx([1 - 1 / EXPERTS] * 3, rel=1e-12)
    assert_same(run_on(distributed, starved(data, EP2, **small), tmp_path / "ep2"), alone)


# ---- tasks that are not there


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
def test_a_task_that_is_missing_for_many_steps(
    data: Path, tmp_path: Path, distributed: Distributed, weighting: str
) -> None:
    """A weight of a thousandth: the first such sample would come in step 63."""
    sources = [
        {"path": str(data / task / "train"), "task": task, "weight": 1e-3 if task == "boxes" else 1.0}
        for task in KINDS
    ]

    def run(**parallel: Any) -> RunConfig:
        return expert_run(
            data,
            model={
                "task_weighting": weighting,
                "moe": {"per_task": True, "losses": {"mutual_information": 0.1}},
            },
            data={"sources": sources},
            parallel=parallel,
            train={"steps": 5, "optimizer": {"lr": 0.01, "weight_decay": 0.0}},
        )

    alone = observe(run(), tmp_path / "alone")
    assert_finite(alone)
    assert all(math.isfinite(value) for value in alone["valid"][1].values()), "its validation is there"
    assert [metrics["boxes/loss"] for metrics in alone["metrics"]] == [0.0] * 5
    number = list(KINDS).index("boxes")
    rows = dict.fromkeys((*GATES, "task_embedding.weight"), number)
    if weighting == "uncertainty":
        rows["heads.log_variance"] = number
    for name, before in alone["before"].items():
        # Of keys' biases a softmax knows nothing; what moves them is rounding.
        if name.endswith("k_proj.bias"):
            continue
        row = rows.get(name, slice(None))
        still = bool((before[row] == alone["after"][name][row]).all())
        assert still == (name in rows or name.startswith("heads.boxes.")), name
    assert_same(run_on(distributed, run(**EP2), tmp_path / "ep2"), alone)


def test_ranks_whose_samples_are_for_other_tasks(
    data: Path, tmp_path: Path, distributed: Distributed
) -> None:
    """One sample to a rank: two of three tasks are missing on each, and one in the global batch."""

    def run(**parallel: Any) -> RunConfig:
        return expert_run(
            data, parallel=parallel, train={"steps": 4, "global_batch_size": 2, "micro_batch_size": 1}
        )

    alone = observe(run(), tmp_path / "alone")
    assert_finite(alone)
    absent = [sum(value == 0.0 for value in metrics.values()) for metrics in alone["metrics"]]
    assert min(absent) >= 1, "some task is missing in every step"
    for layout in ("ep2", "ep2.dp_shard2"):
        assert_same(run_on(distributed, run(**LAYOUTS[layout]), tmp_path / layout), alone)


# ---- data


def canvas(n: int, seed: int = 0) -> bytes:
    return png(np.random.default_rng(n + 100 * seed).integers(0, 256, (32, 32)))


def boxes(*found: tuple[list[float], int]) -> bytes:
    return json.dumps([{"box": box, "label": label} for box, label in found]).encode()


def torn(image: bytes) -> bytes:
    """A PNG whose header is whole and whose pixels end too early."""
    return image[:60] + bytes(len(image) - 60)


def write_tasks(
    directory: Path, count: int = 6, broken: tuple[int, ...] = (), **members: dict[int, dict[str, bytes]]
) -> Path:
    """Shards of noise for the three tasks; `members` of a task replace those of single samples."""
    good = {
        "digits": lambda n: {"png": canvas(n), "cls": str(n % 10).encode()},
        "shapes": lambda n: {"png": canvas(n, 1), MASK: png(np.full((32, 32), n % 11))},
        "boxes": lambda n: {"png": canvas(n, 2), BOXES: boxes(([4, 4, 20, 24], n % 10))},
    }
    for task, make in good.items():
        samples = [make(n) | members.get(task, {}).get(n, {}) for n in range(count)]
        for n in broken:
            samples[n]["png"] = torn(samples[n]["png"])
        write_shards(directory / task / "train", samples, per_shard=3)
    return directory


def noise_run(
    data: Path, parallel: dict[str, Any], batch: int = 8, steps: int = 4, **options: Any
) -> RunConfig:
    return expert_run(
        data,
        data={"valid": None, **options},
        parallel=parallel,
        train={
            "steps": steps,
            "global_batch_size": batch,
            "micro_batch_size": max(1, batch // 4),
        },
    )


def test_sources_that_end_early(tmp_path: Path, distributed: Distributed) -> None:
    """Three images of a task, of which a step draws as many: each step is another epoch."""
    data = write_tasks(tmp_path, count=3)
    alone = observe(noise_run(data, {}, steps=6), tmp_path / "alone")
    assert_finite(alone)
    assert alone["losses"][-1] < alone["losses"][0]
    assert_same(run_on(distributed, noise_run(data, EP2, steps=6), tmp_path / "ep2"), alone)


@pytest.mark.parametrize("stream", [False, True], ids=["files", "stream"])
def test_fewer_shards_than_readers(tmp_path: Path, distributed: Distributed, stream: bool) -> None:
    """A shard of three samples for each task, and four ranks."""
    data = write_tasks(tmp_path, count=3)
    options: dict[str, Any] = {"stream": {"shuffle": 2}} if stream else {}
    run = noise_run(data, LAYOUTS["ep2.dp_shard4"], **options)
    seen = run_on(distributed, run, tmp_path / "run")
    assert_finite(seen)
    if not stream:
        assert_same(seen, observe(noise_run(data, {}), tmp_path / "alone"))


def test_images_that_cannot_be_read(tmp_path: Path, distributed: Distributed) -> None:
    """A global batch of two, a sample to a rank: in some steps a rank has nothing to read, in some both."""
    data = write_tasks(tmp_path, broken=(0, 1, 3))
    alone = observe(noise_run(data, {}, batch=2, steps=9), tmp_path / "alone")
    assert_finite(alone)
    whole = [_readable(noise_run(data, {}, batch=2), range(2 * step, 2 * step + 2)) for step in range(9)]
    assert {0, 1} <= set(whole), "the order of the samples has batches of none and of one"
    for readable, loss, metrics, gradients in zip(
        whole, alone["losses"], alone["metrics"], alone["gradients"], strict=True
    ):
        assert (loss == 0.0) == (readable == 0)
        assert sum(value > 0 for value in metrics.values()) <= readable
        assert readable or not any(bool(gradient.any()) for gradient in gradients.values())
    assert len(alone["bad"][0]) == 9
    for layout in ("ep2", "ep2.dp_shard2"):
        seen = run_on(distributed, noise_run(data, LAYOUTS[layout], batch=2, steps=9), tmp_path / layout)
        assert_same(seen, alone)
        assert {name for rank in seen["bad"] for name in rank} == set(alone["bad"][0])


def _readable(run: RunConfig, numbers: range) -> int:
    dataset = open_training(run)
    return sum(bool(dataset.sample(i)["valid"]) for i in numbers)


def test_boxes_outside_the_image(tmp_path: Path, distributed: Distributed) -> None:
    """Those outside are left out, those across the edge cut, one that ends before it begins is a fault."""
    odd = {
        0: boxes(([40, 40, 50, 60], 1)),
        1: boxes(([-4, -4, 8, 8], 2), ([10, 10, 4000, 20], 3)),
        2: boxes(([20, 20, 4, 24], 4)),
        3: boxes(([5, 5, 5, 5], 5)),
        4: boxes(),
        5: boxes(([-1e12, 0, 5, 5], 6)),
    }
    data = write_tasks(tmp_path, boxes={n: {BOXES: value} for n, value in odd.items()})
    alone = observe(noise_run(data, {}, steps=3), tmp_path / "alone")
    assert_finite(alone)
    told = " ".join(alone["bad"][0])
    assert len(alone["bad"][0]) == 2 and "ends before it begins" in told and "of finite numbers" in told
    rows = [open_training(noise_run(data, {})).sample(i) for i in range(2, 18, 3)]
    within = [row["boxes"][row["box_labels"] >= 0] for row in rows]
    assert all((each >= 0).all() and (each <= 32).all() for each in within)
    assert sorted(map(len, within)) == [0, 0, 0, 0, 0, 1], "a tenth of the area at least is inside"
    assert [0, 0, 8, 8] in [each.tolist()[0] for each in within if len(each)]
    assert_same(run_on(distributed, noise_run(data, EP2, steps=3), tmp_path / "ep2"), alone)


def test_classes_out_of_range_are_refused_at_once(tmp_path: Path, distributed: Distributed) -> None:
    """Labels of images are known before the first step, on every rank alike."""
    data = write_tasks(tmp_path, digits={2: {"cls": b"10"}})
    told = r"1 of 6 samples of source .*digits/train have labels outside 0 .. 9 \(model.tasks.digits"
    with pytest.raises(ValueError, match=told):
        run_on(distributed, noise_run(data, EP2), tmp_path / "run")


def test_classes_out_of_range_within_images_are_counted(tmp_path: Path, distributed: Distributed) -> None:
    """Those of masks and boxes come to light as they are read: left out, named, and too many end the run."""
    odd: dict[str, Any] = {
        "shapes": {1: {MASK: png(np.full((32, 32), 11))}},
        "boxes": {4: {BOXES: boxes(([4, 4, 20, 24], 10))}},
    }
    data = write_tasks(tmp_path, **odd)
    alone = observe(noise_run(data, {}, steps=3), tmp_path / "alone")
    assert_finite(alone)
    told = " ".join(alone["bad"][0])
    assert len(alone["bad"][0]) == 2
    assert "has class 11, outside 0 .. 10" in told and "has label 10, outside 0 .. 9" in told
    assert_same(run_on(distributed, noise_run(data, EP2, steps=3), tmp_path / "ep2"), alone)
    with pytest.raises(ValueError, match=r"could not be used, more than data\.max_bad_samples=0"):
        run_on(distributed, noise_run(data, EP2, steps=3, max_bad_samples=0), tmp_path / "none")
