"""Experts of a trained run: who uses which, a smaller model for one task, a task more beside the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.data_pipeline.images.samples import png, write_shards
from tests.tools import vision_runs
from tests.tools.vision_runs import EXPERTS, HEADS, STEP, vision_run, write_run
from triptych import models
from triptych.data_pipeline.images.index import MASK
from triptych.data_pipeline.loader import BatchLoader
from triptych.models.routers import Router
from triptych.parallel.freezing import is_frozen
from triptych.tools.evaluate_vision import evaluate_vision
from triptych.tools.experts import Source
from triptych.tools.experts_add import add_task, freeze_patterns
from triptych.tools.experts_prune import chosen_experts, prune
from triptych.tools.experts_use import expert_use, measure, observe
from triptych.tools.trained import Trained, load_trained
from triptych.training.data import open_validation
from triptych.training.evaluation import prepare
from triptych.training.finetune import FinetuneConfig, start_from
from triptych.training.group import Group
from triptych.training.objectives import build_objective
from triptych.training.shards import Window

LAYERS = ["blocks.0.mixer", "blocks.1.ffn"]
FP64 = {"precision": "fp64", "steps": STEP, "global_batch_size": 4, "micro_batch_size": 2}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, labelled for three tasks."""
    directory = tmp_path_factory.mktemp("shards")
    draw = np.random.default_rng(0)

    def image() -> bytes:
        return png(draw.integers(0, 256, (8, 8)))

    write_shards(directory / "digits", [{"png": image(), "cls": str(n % 5).encode()} for n in range(18)])
    masks = [{"png": image(), MASK: png(draw.integers(0, 3, (8, 8)))} for _ in range(10)]
    write_shards(directory / "parts", masks)
    for task in ("parity", "again"):
        write_shards(directory / task, [{"png": image(), "cls": str(n % 2).encode()} for n in range(12)])
    return directory


@pytest.fixture(scope="module")
def base(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in fp32, with averages."""
    return write_run(vision_run(shards), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def precise(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in fp64, without."""
    return write_run(vision_run(shards, train=FP64), tmp_path_factory.mktemp("precise"))


def batches(trained: Trained, batch_size: int = 7) -> list[dict[str, Any]]:
    """The validation data of a run, as its model takes them."""
    run: Any = trained
    validation, objective = open_validation(run), build_objective(run)
    with BatchLoader(validation, batch_size, batch_size) as loader:
        return [prepare(objective, batch, 0, training=False)[0] for batch in loader]


@torch.no_grad()
def outputs(trained: Trained, inputs: list[dict[str, Any]], heads: int) -> list[list[Tensor]]:
    """What the first heads say to each batch."""
    module: Any = trained.module
    return [list(module(batch["x"], **module.keywords(batch))[:heads]) for batch in inputs]


def counted(path: Path) -> dict[tuple[str, str], Tensor]:
    """Choices of each expert by layer and task, counted from what the routers return."""
    trained = load_trained(path, "cpu")
    tasks = trained.model.task_names
    found: dict[tuple[str, str], Tensor] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(router: Any, inputs: tuple[Tensor, Any], routing: Any) -> None:
            x, context = inputs
            numbers = torch.zeros(x.shape[0], dtype=torch.int64) if context.tasks is None else context.tasks
            rows = routing.experts.view(x.shape[0], -1)
            for number, task in enumerate(tasks):
                of_task = rows[numbers == number]
                total = torch.bincount(of_task[of_task >= 0], minlength=router.num_experts)
                found[name, task] = found.get((name, task), 0) + total

        return hook

    for name, module in trained.module.named_modules():
        if isinstance(module, Router):
            module.register_forward_hook(count(name.removesuffix(".router")))
    measure(trained, None, 5)
    return found


class TestUse:
    def test_shares_are_those_of_the_routers_choices(self, base: Path, tmp_path: Path) -> None:
        report = expert_use(base, out=tmp_path / "use.png", batch_size=5)
        expected = counted(base)
        assert [(use.name, use.task) for use in report.uses] == [
            (layer, task) for layer in LAYERS for task in ("digits", "parts")
        ]
        for use in report.uses:
            counts = expected[use.name, use.task].double()
            assert use.shares == pytest.approx((counts / counts.sum()).tolist(), abs=1e-12)
            # Images of 4 tokens with two experts each.
            assert counts.sum() == {"digits": 18, "parts": 10}[use.task] * 4 * 2
        assert report.uses[2].shares != report.uses[3].shares
        assert report.metrics == evaluate_vision(base, batch_size=5).metrics
        picture = np.asarray(Image.open(tmp_path / "use.png"))
        assert picture.shape[2] == 3 and picture.std() > 10
        assert json.loads(json.dumps(report.to_json()))["uses"][0]["name"] == LAYERS[0]

    def test_of_one_task(self, base: Path) -> None:
        report = expert_use(base, task="parts", samples=4)
        assert {use.task for use in report.uses} == {"parts"}
        with pytest.raises(ValueError, match="--task part: the model's tasks are digits, parts"):
            expert_use(base, task="part")

    def test_observing_leaves_nothing_behind(self, base: Path) -> None:
        trained = load_trained(base, "cpu")
        first, second = observe(trained, 4, 4), observe(trained, 4, 4)
        routers = [module for module in trained.module.modules() if isinstance(module, Router)]
        assert len(routers) == 2 and not any(router.observing for router in routers)
        for (_, loads), (_, again) in zip(first.loads, second.loads, strict=True):
            assert all(torch.equal(loads[task], again[task]) for task in loads)

    def test_a_model_without_experts_is_refused(self, shards: Path, tmp_path: Path) -> None:
        run = write_run(vision_run(shards, {"pattern": ["attention+gelu"], "moe": {}}), tmp_path)
        with pytest.raises(ValueError, match="has no routed experts"):
            expert_use(run)


class TestChoice:
    SHARES = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2], dtype=torch.float64)

    @pytest.mark.parametrize(
        ("full", "top_k", "keep", "least", "expected"),
        [
            (5, 1, 0.7, None, [1, 3]),
            (5, 1, 0.71, None, [1, 3, 4]),
            (5, 1, 1.0, None, [0, 1, 3, 4]),
            (5, 1, 0.1, None, [1]),
            (5, 3, 0.1, None, [1, 3, 4]),
            (5, 5, 0.1, None, [0, 1, 2, 3, 4]),
            (5, 1, 0.99, 0.2, [1, 3, 4]),
            (5, 2, 0.99, 0.35, [1, 3]),
            # The last two stay whatever they are for, and count.
            (3, 1, 0.9, None, [1]),
            (3, 3, 0.1, None, [1]),
            (3, 4, 0.1, None, [0, 1]),
        ],
    )
    def test_by_hand(
        self, full: int, top_k: int, keep: float, least: float | None, expected: list[int]
    ) -> None:
        assert chosen_experts(self.SHARES, full, top_k, keep, least) == expected

    def test_of_equal_shares_the_first_stay(self) -> None:
        assert chosen_experts(torch.full((4,), 0.25, dtype=torch.float64), 4, 1, 0.5, None) == [0, 1]


def expected_parameters(kept: dict[str, list[int]]) -> int:
    """Of a model of one task with so many experts, by hand."""
    C, D, F, dense = 16, 8, 12, 24
    heads = len(kept["blocks.0.mixer"]) * (C + C * D + D + D * C + C) + 2 * (C * D + D)
    gelu = 2 * C * dense + dense + C
    attention = 4 * C * C
    moe = len(kept["blocks.1.ffn"]) * (C + 3 * C * F + 2 * F + C)
    norms = 5 * 2 * C
    stem = 16 * C + C + 4 * C
    classify, task_embedding, log_variance = C * 5 + 5, C, 1
    return heads + gelu + attention + moe + norms + stem + classify + task_embedding + log_variance


class TestPrune:
    def test_without_unused_experts_the_outputs_are_the_same(self, precise: Path, tmp_path: Path) -> None:
        report = prune(precise, out=tmp_path / "out", task="digits", keep_share=1.0)
        used = {name: counts.nonzero().flatten().tolist() for (name, task), counts in counted(precise).items()
                if task == "digits"}  # fmt: skip
        assert {kept.name: kept.experts for kept in report.layers} == used
        assert any(kept.of > len(kept.experts) for kept in report.layers)
        old, new = load_trained(precise, "cpu"), load_trained(tmp_path / "out", "cpu")
        inputs = [
            {name: value for name, value in batch.items() if name != "targets"} for batch in batches(new)
        ]
        for (alone,), (before,) in zip(outputs(new, inputs, 1), outputs(old, inputs, 1), strict=True):
            torch.testing.assert_close(alone, before, rtol=0, atol=1e-12)
        assert report.before == pytest.approx(report.after, abs=1e-12)
        assert report.before.keys() == {"digits/loss", "digits/top1"}
        assert report.parameters_after == expected_parameters(used)
        assert report.parameters_after == sum(p.numel() for p in new.module.parameters())
        assert report.parameters_before == sum(p.numel() for p in old.module.parameters())
        assert new.model.task_names == ("digits",) and new.step == STEP
        assert [source.task for source in new.data.sources] == ["digits"]  # type: ignore[union-attr]

    def test_rows_of_parameters_and_averages(self, base: Path, tmp_path: Path) -> None:
        report = prune(base, out=tmp_path / "out", task="parts", min_share=0.2)
        old, new = Source.open(base), Source.open(tmp_path / "out")
        heads, experts = (kept.experts for kept in report.layers)
        assert 2 <= len(experts) < EXPERTS and 2 <= len(heads) <= HEADS
        for prefix in ("model/", "ema/"):
            before, after = old.tensors(prefix), new.tensors(prefix)
            assert after.keys() == {name for name in before if not name.startswith("heads.digits.")}
            ffn, mixer = "blocks.1.ffn", "blocks.0.mixer"
            changed = {f"{ffn}.router.weight": before[f"{ffn}.router.weight"][1:2][:, experts]}
            changed |= {name: before[name][1:2] for name in ("task_embedding.weight", "heads.log_variance")}
            changed |= {name: before[name][experts] for name in before if name.startswith(f"{ffn}.experts.")}
            changed |= {
                name: before[name][heads]
                for name in before
                if name.startswith((f"{mixer}.router.", f"{mixer}.q_experts.", f"{mixer}.o_experts."))
            }
            assert len(changed) == 1 + 2 + 6 + 5
            for name, tensor in after.items():
                assert torch.equal(tensor, changed.get(name, before[name])), name
        config = models.read_config(new.sections["model"])
        assert config.moe.num_experts_of == {1: len(experts)} and config.moe.losses.mutual_information == 0
        assert config.attention_moe.num_experts_of == {0: len(heads)}
        assert report.after == evaluate_vision(tmp_path / "out").metrics

    def test_another_run_starts_from_it(self, base: Path, tmp_path: Path) -> None:
        prune(base, out=tmp_path / "out", task="digits")
        source = Source.open(tmp_path / "out")
        config = models.read_config(source.sections["model"])
        model = models.build(config)
        windows = [
            Window(name, p.detach(), tuple(p.shape), (0,) * p.ndim) for name, p in model.named_parameters()
        ]
        report = start_from(windows, FinetuneConfig(checkpoint=str(tmp_path / "out")), config, Group())
        assert not report.left and len(report.taken) == len(windows)

    def test_it_trains_on(self, base: Path, tmp_path: Path) -> None:
        prune(base, out=tmp_path / "out", task="digits")
        start = f"train.finetune.checkpoint={tmp_path / 'out'}"
        config = tmp_path / "out" / "config.yaml"
        reports = vision_runs.fit_config(config, ["train.steps=2", start], tmp_path / "run")
        assert [report.step for report in reports] == [1, 2]

    def test_a_dry_run_writes_nothing(self, base: Path, tmp_path: Path) -> None:
        report = prune(base, out=tmp_path / "out", task="digits", dry_run=True)
        assert report.after is None and report.checkpoint is None and not (tmp_path / "out").exists()
        assert report.parameters_after < report.parameters_before

    def test_what_cannot_be_is_refused(self, base: Path, shards: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="not both"):
            prune(base, out=tmp_path / "out", task="digits", keep_share=0.9, min_share=0.1)
        with pytest.raises(ValueError, match=r"--keep-share=1\.5 must be above 0"):
            prune(base, out=tmp_path / "out", task="digits", keep_share=1.5)
        with pytest.raises(ValueError, match="--task None: the model's tasks are digits, parts"):
            prune(base, out=tmp_path / "out")
        with pytest.raises(ValueError, match="is taken; give a new directory"):
            prune(base, out=base, task="digits")
        silent = vision_run(shards)
        data = silent.data.model_copy(update={"valid": silent.data.valid[:1]})
        run = write_run(silent.model_copy(update={"data": data}), tmp_path / "silent")
        with pytest.raises(ValueError, match="--task parts: no sample of the validation data"):
            prune(run, out=tmp_path / "out", task="parts")

    def test_a_language_model_of_unlike_experts(
        self, runs: ModuleType, trained_run: Any, tmp_path: Path
    ) -> None:
        moe = {"num_experts": 8, "top_k": 2, "low_rank": 2, "rank": 3, "identity": 1, "router": "sigmoid"}
        moe |= {"expert": {"intermediate_size": 8}}
        model = {**runs.make_run().model.model_dump(mode="json"), "pattern": ["attention+moe"], "moe": moe}
        train = {**FP64, "optimizer": {"lr": 0.01}, "eval_samples": 3}
        run = write_run(runs.make_run(trained_run.corpus, model=model, train=train), tmp_path / "run")
        report = prune(run, out=tmp_path / "out", keep_share=1.0)
        assert report.task == "" and report.before == pytest.approx(report.after, abs=1e-12)
        assert report.parameters_after < report.parameters_before
        smaller = load_trained(tmp_path / "out", "cpu").module
        for kept in report.layers:
            router: Any = smaller.get_submodule(f"{kept.name}.router")
            assert router.num_experts == len(kept.experts) + 3


GROWN: dict[str, dict[str, Any]] = {
    "gates per task": {},
    "common gates": {"moe": {"num_experts": EXPERTS, "top_k": 2, "router": "noisy"}},
    "sigmoid": {"moe": {"num_experts": EXPERTS, "top_k": 3, "router": "sigmoid", "shared_experts": 1}},
}


class TestAddTask:
    @pytest.mark.parametrize("model", GROWN.values(), ids=GROWN.keys())
    def test_the_others_outputs_keep_every_bit(
        self, shards: Path, tmp_path: Path, model: dict[str, Any]
    ) -> None:
        run = write_run(vision_run(shards, model), tmp_path / "base")
        report = self.add(run, shards, tmp_path / "wide")
        vision_runs.fit_config(tmp_path / "wide" / "config.yaml", SHORT, tmp_path / "trained")
        self.compare(run, tmp_path / "wide", tmp_path / "trained", heads=2)
        assert report.layers == {LAYERS[0]: (HEADS, HEADS + 2), LAYERS[1]: (EXPERTS, EXPERTS + 2)}

    def test_under_expert_parallelism(
        self, base: Path, shards: Path, tmp_path: Path, distributed: Callable[..., list[Any]]
    ) -> None:
        self.add(base, shards, tmp_path / "wide")
        words = [*SHORT, "parallel.dp_shard=2", "parallel.ep=2"]
        distributed(2, vision_runs.fit_config, tmp_path / "wide" / "config.yaml", words, tmp_path / "trained")
        self.compare(base, tmp_path / "wide", tmp_path / "trained", heads=2)

    def test_a_second_one(self, base: Path, shards: Path, tmp_path: Path) -> None:
        self.add(base, shards, tmp_path / "wide")
        vision_runs.fit_config(tmp_path / "wide" / "config.yaml", SHORT, tmp_path / "trained")
        self.add(tmp_path / "trained", shards, tmp_path / "wider", task="again")
        vision_runs.fit_config(tmp_path / "wider" / "config.yaml", SHORT, tmp_path / "more")
        self.compare(tmp_path / "trained", tmp_path / "wider", tmp_path / "more", heads=3)
        visible = load_trained(tmp_path / "more", "cpu").model.moe.visible
        assert visible == {"digits": EXPERTS, "parts": EXPERTS, "parity": EXPERTS + 2}

    def add(self, run: Path, shards: Path, out: Path, task: str = "parity") -> Any:
        places = [str(shards / task)]
        return add_task(
            run, out=out, task=task, kind="classify", num_classes=2, experts=2, data=places, valid=places
        )

    def compare(self, old: Path, wide: Path, trained: Path, heads: int) -> None:
        """Old tasks' outputs bit by bit; what is new has moved."""
        before, start, after = (load_trained(path, "cpu") for path in (old, wide, trained))
        inputs = batches(before)
        assert {int(number) for batch in inputs for number in batch["tasks"]} == set(range(heads))
        expected = outputs(before, inputs, heads)
        for model in (start, after):
            for batch, found, wanted in zip(inputs, outputs(model, inputs, heads), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), batch["tasks"]
        values = dict(start.module.named_parameters())
        old_values = dict(before.module.named_parameters())
        moved = set()
        for name, parameter in after.module.named_parameters():
            same = parameter == values[name]
            if name not in old_values:
                moved.add(name)
                assert name.startswith(f"heads.{after.model.task_names[-1]}.") and not same.all()
            elif old_values[name].shape == parameter.shape:
                assert same.all() and torch.equal(parameter, old_values[name]), name
            else:
                rows = old_values[name].shape[0]
                assert same[:rows].all(), name
                if not same.all():
                    moved.add(name)
        # The new task found its experts in both layers.
        assert {"blocks.1.ffn.router.weight", "blocks.1.ffn.experts.up_proj"} <= moved
        assert {"blocks.0.mixer.router.weight", "blocks.0.mixer.q_experts.weight"} <= moved

    def test_what_is_written(self, base: Path, shards: Path, tmp_path: Path) -> None:
        report = self.add(base, shards, tmp_path / "wide")
        wide = Source.open(tmp_path / "wide")
        assert set(evaluate_vision(tmp_path / "wide").metrics) >= {"digits/top1", "parts/miou", "parity/top1"}
        config = models.read_config(wide.sections["model"])
        assert config.task_names == ("digits", "parts", "parity")
        assert config.moe.visible == {"digits": EXPERTS, "parts": EXPERTS}
        assert config.attention_moe.visible == {"digits": HEADS, "parts": HEADS}
        assert [source["task"] for source in wide.sections["data"]["sources"]] == ["parity"]
        assert [source["task"] for source in wide.sections["data"]["valid"]] == ["digits", "parts", "parity"]
        C, D, F = 16, 8, 12
        experts = 2 * (3 * C * F + 2 * F + C) + 2 * (C * D + D + D * C + C)
        gates = 1 * (EXPERTS + 2) * C + 2 * C
        assert report.trained == experts + gates + (2 * C + 2) + C + 1
        gate = wide.tensors("model/")["blocks.1.ffn.router.weight"]
        assert gate.shape == (3, EXPERTS + 2, C)
        assert (gate[:2, EXPERTS:] == 0).all() and (gate[2] != 0).all()

    def test_a_dry_run_writes_nothing(self, base: Path, tmp_path: Path) -> None:
        options: dict[str, Any] = {"task": "parity", "kind": "classify", "num_classes": 2}
        report = add_task(base, out=tmp_path / "out", **options, dry_run=True)
        assert report.checkpoint is None and not (tmp_path / "out").exists()
        assert report.layers[LAYERS[1]] == (EXPERTS, EXPERTS + 4)

    def test_what_cannot_be_is_refused(self, base: Path, shards: Path, tmp_path: Path) -> None:
        options: dict[str, Any] = {"kind": "classify", "num_classes": 2, "out": tmp_path / "out"}
        for task, message in (("parts", "has this task already"), ("a.b", "give a name of letters")):
            with pytest.raises(ValueError, match=message):
                add_task(base, task=task, **options)
        with pytest.raises(ValueError, match="--kind contrast is unknown; use classify, segment, detect"):
            add_task(base, task="parity", **options | {"kind": "contrast"})
        with pytest.raises(ValueError, match="is listed twice"):
            add_task(base, task="parity", **options, valid=[str(shards / "digits")])
        with pytest.raises(ValueError, match="--experts=0: give 1 or more"):
            add_task(base, task="parity", **options, experts=0)
        unlike = {"moe": {"num_experts": EXPERTS, "top_k": 2, "low_rank": 2}}
        chosen = {"moe": {"num_experts": EXPERTS, "top_k": 2, "router": "expert_choice"}}
        uneven = {"pattern": ["attention+moe"], "moe": {"num_experts": EXPERTS, "num_experts_of": {1: 5}}}
        for number, (model, message) in enumerate(
            ((unlike, "low_rank=2"), (chosen, "expert_choice"), (uneven, "have 5, 6 experts"))
        ):
            run = write_run(vision_run(shards, model), tmp_path / str(number))
            with pytest.raises(ValueError, match=message):
                add_task(run, task="parity", **options)

    def test_patterns_freeze_what_was_there(self) -> None:
        old = {
            "stem.a": (2,),
            "blocks.0.norm": (3,),
            "blocks.0.ffn.a": (4, 2),
            "heads.x.w": (2,),
            "heads.y": (1,),
        }
        new = {**old, "blocks.0.ffn.a": (6, 2), "heads.z.w": (2,)}
        patterns = freeze_patterns(old, new)
        assert patterns == ["stem.*", "blocks.0.norm", "heads.x.*", "heads.y", "blocks.0.ffn.a[0:4]"]
        assert [name for name in new if not is_frozen(name, patterns)] == ["blocks.0.ffn.a", "heads.z.w"]


SHORT = ["train.steps=4", "train.optimizer.lr=0.05", "train.schedule.warmup=0"]
