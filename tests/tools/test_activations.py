"""Activation bytes against the published table, and shape arithmetic against real processes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from triptych.parallel.collectives import Axis
from triptych.parallel.config import ParallelConfig
from triptych.tools import activations
from triptych.tools.activation_formulas import attention_terms, mamba2_block
from triptych.tools.activations import (
    LAYER_NORM_STATISTICS,
    SAMPLE_KEYS,
    activation_report,
    layouts,
    measure,
    published_blocks,
    small_blocks,
)
from triptych.tools.counting import StageSpec, build_stage, stage_forward
from triptych.tools.kept import hook_bytes

ATTENTION, MAMBA2 = small_blocks()
S, B, H, A = ATTENTION.seq_len, ATTENTION.batch, ATTENTION.model.hidden_size, 4

# facts/recomputation.md, line by line: (t, sequence parallel, recompute) -> bytes.
PUBLISHED = {
    (1, False, "none"): S * B * H * (34 + 5 * A * S // H),
    (2, False, "none"): S * B * H * (10 + 24 // 2 + 5 * A * S // (H * 2)),
    (4, False, "none"): S * B * H * (10 + 24 // 4 + 5 * A * S // (H * 4)),
    (2, True, "none"): S * B * H // 2 * (34 + 5 * A * S // H),
    (4, True, "none"): S * B * H // 4 * (34 + 5 * A * S // H),
    (2, False, "selective"): S * B * H * (10 + 24 // 2),
    (4, False, "selective"): S * B * H * (10 + 24 // 4),
    (2, True, "selective"): 34 * S * B * H // 2,
    (4, True, "selective"): 34 * S * B * H // 4,
    (1, False, "full"): 2 * S * B * H,
    (2, False, "full"): 2 * S * B * H,
}


@pytest.mark.parametrize(("layout", "expected"), PUBLISHED.items(), ids=str)
def test_attention_block_keeps_the_published_bytes(layout: tuple[int, bool, Any], expected: int) -> None:
    tp, sequence_parallel, recompute = layout
    parallel = ParallelConfig(tp=tp, sequence_parallel=sequence_parallel, recompute=recompute)
    row = measure(ATTENTION, parallel, processes=False)
    assert row.formula == expected
    assert row.measured == expected + sum(extra.num_bytes for extra in row.extras)
    # The named bytes, themselves predicted: two fp32 numbers per token and norm, int64 keys.
    tokens = S * B // (tp if sequence_parallel else 1)
    named = {extra.name: extra.num_bytes for extra in row.extras}
    expected_named = {} if recompute == "full" else {LAYER_NORM_STATISTICS: 2 * 2 * 4 * tokens}
    if recompute != "none":
        expected_named[SAMPLE_KEYS] = 8 * B
    assert named == expected_named


@pytest.mark.parametrize(
    "parallel", list(layouts([1, 2, 4])), ids=lambda p: f"tp{p.tp}-{p.sequence_parallel}-{p.recompute}"
)
def test_mamba2_block_keeps_the_bytes_of_our_table(parallel: ParallelConfig) -> None:
    row = measure(MAMBA2, parallel, processes=False)
    assert {extra.name for extra in row.extras} <= {SAMPLE_KEYS}
    assert row.measured - row.formula == (0 if parallel.recompute == "none" else 8 * MAMBA2.batch)


def test_mamba2_table_holds_where_groups_are_shared_by_ranks_and_chunks_do_not_divide() -> None:
    block = mamba2_block(
        batch=1, seq_len=24, hidden_size=32, head_dim=8, state_size=4, num_groups=2, chunk_size=16
    )
    row = measure(block, ParallelConfig(tp=4), processes=False)
    assert row.measured == row.formula


def test_limits_of_dt_keep_one_more_tensor() -> None:
    free = MAMBA2.model.mamba2
    limited = MAMBA2.model.model_copy(update={"mamba2": free.model_copy(update={"dt_limit": (0.0, 0.5)})})
    block = type(MAMBA2)("mamba2", limited, MAMBA2.batch, MAMBA2.seq_len)
    row = measure(block, ParallelConfig(), processes=False)
    assert row.measured == row.formula


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_real_processes_keep_what_fake_tensors_do(recompute: Any) -> None:
    parallel = ParallelConfig(tp=2, recompute=recompute)
    for block in small_blocks():
        real = measure(block, parallel, processes=True)
        assert real == measure(block, parallel, processes=False)


def test_saved_tensor_hooks_see_the_same() -> None:
    for block in small_blocks():
        spec = StageSpec(
            block.model, ParallelConfig(), range(1), False, False, block.batch, block.seq_len, torch.bfloat16
        )
        model = build_stage(spec, Axis(1))
        measured = measure(block, ParallelConfig(), processes=False)
        seen = hook_bytes(model, lambda spec=spec, model=model: stage_forward(spec, model))
        assert seen == measured.measured + measured.of_weights


def test_formula_of_a_22b_layer_is_the_papers() -> None:
    block = published_blocks()[0]
    total = sum(term.num_bytes for term in attention_terms(block, ParallelConfig()))
    s, b, h, a = 2048, 4, 6144, 64
    assert total == s * b * h * 34 + 5 * a * s * s * b


def test_report_of_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "published_blocks", small_blocks)
    said: list[str] = []
    report = activation_report(tensor_parallel=(1, 2), progress=said.append)
    assert report.ok
    assert len(report.rows) == len(said) == 2 * (3 + 6)
    found = json.loads(json.dumps(report.to_json()))
    assert found["rows"][0]["formula"] == PUBLISHED[1, False, "none"]
    assert report.table() is not None
