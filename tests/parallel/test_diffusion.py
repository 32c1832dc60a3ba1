"""Denoisers train and predict the same under every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.backbones import BACKBONES, shrunk, tread
from tests.models.denoisers import image_batch, packed_batch
from tests.parallel import denoising
from triptych.launcher.config import RunConfig
from triptych.models import DiffusionConfig
from triptych.parallel.config import ParallelConfig
from triptych.parallel.layout import Layout
from triptych.tools.verify import verify

Distributed = Callable[..., list[Any]]
TOLERANCE = 1e-9
WITH_ATTENTION = "model.pattern=[dimsum+swiglu, attention, attention, dimsum+swiglu]"


def run_of(name: str, routed: bool, *overrides: str) -> RunConfig:
    """A shrunk backbone; with TREAD around all blocks but the ends, which DiMSUM's own mixer does not
    bear."""
    if routed and name == "dimsum":
        overrides = (WITH_ATTENTION, *overrides)
    run = shrunk(name, *overrides)
    return shrunk(name, tread(run), *overrides) if routed else run


def assert_same(run: RunConfig, layouts: list[str]) -> None:
    report = verify(run, layouts, steps=2, tolerance=TOLERANCE, synthetic=True, timeout=300)
    assert report.ok, (report.failed, [result for result in report.results if not result.ok])
    assert len(report.results) == len(layouts) and min(report.losses) > 0


# Each backbone, each kind of collective and each recomputation at least once.
@pytest.mark.parametrize(
    ("name", "routed", "layouts"),
    [
        ("dit", True, ["tp2.pp2+selective"]),
        ("fit", True, ["tp2"]),
        ("fitv2", True, ["pp2.dp_shard2+full"]),
        ("dit-text", True, ["tp2+nosp", "tp2+selective"]),
        ("zigma", False, ["dp_shard2+selective"]),
        ("dim", True, ["tp2.pp2+full"]),
        ("dimsum", False, ["tp2+full"]),
        ("rwkv", True, ["pp2+selective"]),
        ("hybrid", True, ["tp2.dp_shard2"]),
    ],
)
def test_layouts_are_the_same_training(name: str, routed: bool, layouts: list[str]) -> None:
    assert_same(run_of(name, routed), layouts)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("routed", [False, True], ids=["whole", "tread"])
@pytest.mark.parametrize("name", [name for name in BACKBONES if not name.startswith("demo")])
def test_every_backbone_on_every_layout(name: str, routed: bool) -> None:
    layouts = ["tp2", "pp2", "dp_shard2", "tp2.pp2"] if routed else ["dp_shard2", "tp2", "tp2.pp2"]
    if name == "dimsum":
        layouts = [layout for layout in layouts if "pp" not in layout]
    assert_same(run_of(name, routed), layouts)


def test_dropout_of_packed_rows_is_keyed_by_their_samples() -> None:
    dropped = ("model.dropout=0.1", "model.attention.dropout=0.1")
    assert_same(run_of("fit", True, *dropped), ["tp2.pp2+selective"])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["dit", "dit-text", "dimsum", "hybrid"])
def test_dropout_is_keyed_by_samples(name: str) -> None:
    dropped = ("model.dropout=0.1", "model.attention.dropout=0.1")
    layouts = ["tp2+selective", "tp2+nosp", "dp_shard2+full"]
    assert_same(run_of(name, False, *dropped), layouts if name == "dimsum" else [*layouts, "tp2.pp2+full"])


def test_fewer_micro_batches_than_stages() -> None:
    """Two samples, of which TREAD keeps half of the tokens, through three stages."""
    small = ("train.global_batch_size=2", "train.micro_batch_size=2", "model.num_layers=5")
    assert_same(run_of("dim", True, *small), ["pp3"])


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, 5), (0, 2), (2, 3), (3, 5)],
)
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_any_range_is_skipped_over_any_stages(start: int, end: int) -> None:
    """Long skips and the tokens aside cross the cuts between stages."""
    routed = f"train.tread={{rate: 0.5, start: {start}, end: {end}}}"
    assert_same(shrunk("dim", routed), ["pp2", "pp4+full", "tp2.pp2"])


PREDICTED = [
    pytest.param("dit", {"pp": 2}, marks=pytest.mark.slow),
    ("dit", {"tp": 2, "dp_shard": 2}),
    ("dit-text", {"tp": 2, "pp": 2, "sequence_parallel": False}),
    ("dim", {"tp": 2, "pp": 2}),
    pytest.param("rwkv", {"dp_shard": 2}, marks=pytest.mark.slow),
    ("fit", {"tp": 2}),
    ("fitv2", {"pp": 2}),
]


@pytest.mark.parametrize(("name", "parallel"), PREDICTED)
def test_predictions_are_those_of_one_process(
    distributed: Distributed, name: str, parallel: dict[str, Any]
) -> None:
    """ParallelModel.predict, evaluation and training in turn, on batches of several sizes, against plain
    autograd."""
    # What is dropped in training must not be in a prediction.
    config = shrunk(name, "model.dropout=0.1").model
    assert isinstance(config, DiffusionConfig)
    batches = batches_of(name, config)
    expected = denoising.work_alone(config, batches)
    layout = ParallelConfig(**parallel)
    ranks = distributed(layout.world_size, denoising.work_under, config, layout, batches)
    for rank, seen in enumerate(ranks):
        for n in range(len(batches)):
            start, stop = seen["rows"][n]
            right = expected["predictions"][n][start:stop]
            assert torch.count_nonzero(right) > 0
            torch.testing.assert_close(
                seen["predictions"][n], right, rtol=0, atol=1e-12 * float(right.abs().max())
            )
        for what in ("evaluated", "losses", "norms"):
            assert seen[what] == pytest.approx(expected[what], rel=1e-11), (rank, what)
    assert {seen["rows"][0] for seen in ranks} == {
        (part * 4 // layout.dp, (part + 1) * 4 // layout.dp) for part in range(layout.dp)
    }


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "hybrid" else pytest.mark.slow) for name in BACKBONES]
)
def test_bfloat16_stays_between_the_matrix_products(distributed: Distributed, name: str) -> None:
    """Autocast over fp32 parameters: what passes between stages, gradients and predictions are fp32; loss and
    gradient are those of fp32 to bfloat16's precision."""
    config = shrunk(name).model
    assert isinstance(config, DiffusionConfig)
    batch = batches_of(name, config)[0]
    tokens = config.num_tokens if "document_ids" not in batch else batch["x"].shape[1]
    layouts = [{"tp": 2, "recompute": "selective"}, {"pp": 2, "recompute": "full"}]
    (expected,) = distributed(1, denoising.autocast_step, config, ParallelConfig(), tokens, batch, False)
    for parallel in layouts[: 1 if name == "dimsum" else 2]:
        layout = ParallelConfig.model_validate(parallel)
        seen = distributed(2, denoising.autocast_step, config, layout, tokens, batch, True)[0]
        assert seen["dtypes"] == {torch.float32}
        assert seen["loss"] == pytest.approx(expected["loss"], rel=5e-3)
        assert seen["norm"] == pytest.approx(expected["norm"], rel=2e-2)
        assert seen["loss"] != expected["loss"]


def batches_of(name: str, config: DiffusionConfig) -> list[dict[str, Any]]:
    """Batches of 4 and 8 rows; with rotary positions also of another size or packing."""
    if config.position != "rope":
        batches = [image_batch(config, 4), image_batch(config, 8, seed=2)]
    elif name == "fit":
        rows = [[(2, 2), (1, 3)], [(3, 3)], [(2, 4), (1, 1)], [(1, 2)]]
        batches = [
            packed_batch(config, rows, length=12, places=2),
            packed_batch(config, rows, length=16, places=3),
        ]
    else:
        batches = [image_batch(config, 4), image_batch(config, 4, space=(4, 12)), image_batch(config, 8)]
    for batch in batches:
        shape = list(batch["x"].shape)
        channel = 1 if "document_ids" not in batch else 2
        shape[channel] = shape[channel] * config.predicted_channels // config.in_channels
        batch["targets"] = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return batches


@pytest.mark.parametrize(
    ("name", "parallel", "words"),
    [
        ("dimsum", {"pp": 2}, r"parallel.pp=2 with model.shared_block_every=2.*use parallel.pp=1 or"),
        (
            "dimsum",
            {"tp": 4},
            r"parallel.tp=4 does not divide half of model.attention.num_heads.*=2; use 1 or 2",
        ),
        ("dit", {"tp": 3}, "parallel.tp=3 does not divide model.attention.num_heads=4; use 1, 2 or 4"),
        ("dit", {"pp": 5}, "parallel.pp=5 exceeds model.num_layers=4"),
        ("zigma", {"tp": 5}, "parallel.tp=5 does not divide"),
    ],
)
def test_illegal_layouts_say_why(name: str, parallel: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Layout(ParallelConfig(**parallel)).check(
            shrunk(name).model, seq_len=16, global_batch_size=8, micro_batch_size=2
        )


def test_heads_of_a_shared_block_count_too() -> None:
    """No block of the pattern attends, and 6 heads of 8 channels go well into 3, 2 or 1, not into 4."""
    config = shrunk(
        "zigma", "model.shared_block_every=2", "model.attention={num_heads: 6, num_kv_heads: 2, bias: true}"
    ).model
    with pytest.raises(ValueError, match=r"parallel.tp=4 does not divide model.attention.num_heads=6"):
        Layout(ParallelConfig(tp=4)).check(config, seq_len=16, global_batch_size=8, micro_batch_size=2)
