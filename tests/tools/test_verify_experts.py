"""Experts over every layout that the issue names: a vision model of three tasks and a Jamba-like hybrid have
the losses, gradients and parameters of one process."""

from __future__ import annotations

import pytest

from triptych.launcher.config import RunConfig, load
from triptych.tools.verify import verify

LAYOUTS = ("ep2", "ep4", "ep2.tp2", "ep2.pp2", "ep2.dp_shard2")
STEPS = 3
"""Gates per task are zero at first: in the first step all tokens go to the same experts."""
TRAIN = (
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.optimizer.lr=1.0e-2",
    "train.schedule.warmup=1",
    "model.hidden_size=16",
    # Large enough that tokens do not all prefer the same experts, and losses of balance have a say.
    "model.init_std=0.3",
    "model.ffn.intermediate_size=24",
    "model.moe.num_experts=4",
    "model.moe.expert.intermediate_size=12",
    "model.attention.num_heads=4",
)
SHRUNK: dict[str, tuple[str, ...]] = {
    "vision/demo": (
        "model.num_layers=4",
        "model.input_size=[16,16]",
        "data.image_size=16",
        "model.moe.losses.mutual_information=0.1",
        "model.moe.losses.z=0.05",
    ),
    "lm/moe": (
        "model.vocab_size=24",
        "data.seq_len=16",
        "model.attention.num_kv_heads=2",
        "model.mamba1.state_size=4",
        "model.moe.losses.switch=0.1",
        "parallel={}",
    ),
}
DROPLESS = ("model.moe.routing=dropless",)
# Fewer places than choices, so that tokens are dropped in every layer.
CAPACITY = ("model.moe.routing=capacity", "model.moe.capacity_factor=0.6")


def shrunk(name: str, *overrides: str) -> RunConfig:
    return load(f"configs/{name}.yaml", [*TRAIN, *SHRUNK[name], *overrides])


def assert_same(run: RunConfig, layouts: tuple[str, ...]) -> None:
    report = verify(run, layouts, steps=STEPS, tolerance=1e-9, synthetic=True, timeout=150)
    assert report.ok, report.to_json()
    assert [result.layout for result in report.results] == list(layouts)
    assert len(set(report.losses)) == STEPS and not report.skipped


def test_a_vision_model_of_three_tasks() -> None:
    run = shrunk("vision/demo", *DROPLESS)
    assert {spec.ffn for spec in run.model.layer_specs()} == {"gelu", "moe"}
    assert_same(run, ("ep2.tp2",))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("routing", [DROPLESS, CAPACITY], ids=["dropless", "capacity"])
@pytest.mark.parametrize("name", SHRUNK)
def test_every_layout(name: str, routing: tuple[str, ...]) -> None:
    assert_same(shrunk(name, *routing), LAYOUTS)


def test_the_hybrid_keeps_its_order() -> None:
    """Eight blocks as in the packaged file: Mamba-1 but for one attention, experts in every second."""
    specs = shrunk("lm/moe").model.layer_specs()
    assert [spec.mixer for spec in specs] == ["mamba1"] * 4 + ["attention"] + ["mamba1"] * 3
    assert [spec.ffn for spec in specs] == ["swiglu", "moe"] * 4
