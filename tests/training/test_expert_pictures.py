"""Expert use as numbers and pictures: what routers saw is what the event file says."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.expert_runs import EXPERTS, KINDS, expert_run, fit, observe, write_digits
from triptych.training.expert_pictures import by_task, load_picture, load_pictures, natural, scalars_of

LAYERS = ("blocks.0.mixer", "blocks.1.ffn")
DARKEST, EMPTY = (38, 70, 150), (245, 245, 240)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


def logged(data: Path, **parallel: Any) -> Any:
    log = {"tensorboard": True, "every": 2}
    return expert_run(data, log=log, parallel=parallel, train={"steps": 3, "micro_batch_size": 4})


def board_of(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0}).Reload()


def picture_of(board: EventAccumulator, tag: str, number: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(board.Images(tag)[number].encoded_image_string)))


def test_the_event_file_says_what_the_routers_saw(
    data: Path, tmp_path: Path, distributed: Callable[..., list[Any]]
) -> None:
    """Of two pipeline stages, each with a layer of experts, on four ranks."""
    run = logged(data, dp_replicate=2, ep=2, pp=2)
    reports = distributed(4, fit, run, tmp_path / "run", timeout=100)[0]
    seen = observe(logged(data), tmp_path / "alone")["routing"]
    expected = [dict(sorted(stages[0].items(), key=lambda item: natural(item[0]))) for stages in seen]
    board = board_of(tmp_path / "run")
    assert [report.step for report in reports] == [2, 3]
    for tag, value in scalars_of(expected[1]).items():
        first, second = board.Scalars(f"experts/{tag}")
        assert (first.step, second.step) == (2, 3)
        assert first.value == pytest.approx(value, rel=1e-6)
        assert reports[0].routing[tag] == pytest.approx(value, rel=1e-9)
    assert {
        f"experts/{layer}/{name}" for layer in LAYERS for name in ("dropped", "entropy", "busiest")
    } <= set(board.Tags()["scalars"])
    assert "experts/blocks.0.mixer/mutual_information" in board.Tags()["scalars"]
    for number, figures in enumerate(expected[1:]):
        for tag, picture in load_pictures(figures).items():
            # A share on the edge of two shades may fall on either side.
            difference = np.abs(picture_of(board, tag, number).astype(int) - picture.astype(int))
            assert difference.max() <= 1
    assert board.Tags()["images"] == ["experts/load", "experts/load_by_task"]
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["routing"].keys() == scalars_of(expected[2]).keys()


def figures(load: list[float], **tasks: list[float]) -> dict[str, Any]:
    return {
        "load": torch.tensor(load, dtype=torch.float64),
        "dropped": 0.25,
        "entropy": 1.5,
        "losses": {"switch": 1.0},
        "task_load": {task: torch.tensor(each, dtype=torch.float64) for task, each in tasks.items()},
    }


def test_scalars() -> None:
    assert scalars_of({"blocks.3.ffn.router": figures([0.5, 0.25, 0.125, 0.125])}) == {
        "blocks.3.ffn/dropped": 0.25,
        "blocks.3.ffn/entropy": 1.5,
        "blocks.3.ffn/busiest": 2.0,
        "blocks.3.ffn/idlest": 0.5,
        "blocks.3.ffn/switch": 1.0,
    }
    idle = scalars_of({"blocks.3.ffn.router": figures([0.0] * 4)})
    assert idle["blocks.3.ffn/busiest"] == idle["blocks.3.ffn/idlest"] == 0.0


def cells(picture: np.ndarray, count: int) -> list[list[tuple[int, ...]]]:
    """Colours within the cells of each line, found by their frames; of the scale below in the last line."""
    frames = (picture == (200, 200, 195)).all(-1)
    lines = [y for y in range(1, len(frames)) if frames[y].sum() > 20 and not frames[y - 1].sum() > 20]
    found = []
    for y in lines[::2]:
        edges = [x for x in range(1, frames.shape[1]) if frames[y, x] and not frames[y, x - 1]]
        found.append([tuple(int(v) for v in picture[y + 3, x + 3]) for x in edges][:count])
    return found


def test_darker_is_busier() -> None:
    rows = {"a": [1.0, 0.0, 0.0, 0.0], "b": [0.25] * 4, "c": [0.0] * 4, "d": [0.5, 0.5]}
    picture = load_picture({name: torch.tensor(shares) for name, shares in rows.items()})
    assert picture.dtype == np.uint8
    *lines, scale = cells(picture, 5)
    middle = tuple((d + e) // 2 for d, e in zip(DARKEST, EMPTY))
    assert lines == [[DARKEST, EMPTY, EMPTY, EMPTY], [middle] * 4, [EMPTY] * 4, [middle] * 2]
    assert [scale[0], scale[2], scale[4]] == [EMPTY, middle, DARKEST]


def test_tasks_stand_below_each_other_and_layers_apart() -> None:
    routing = {
        "blocks.1.ffn.router": figures([0.5, 0.5], one=[1.0, 0.0], two=[0.0, 1.0]),
        "blocks.12.ffn.router": figures([0.5, 0.5], one=[0.5, 0.5], two=[0.0, 0.0]),
    }
    assert list(by_task(routing)) == [
        f"blocks.{layer}.ffn  {task}" for layer in (1, 12) for task in ("one", "two")
    ]
    pictures = load_pictures(routing)
    *lines, _ = cells(pictures["experts/load_by_task"], 2)
    middle = tuple((d + e) // 2 for d, e in zip(DARKEST, EMPTY))
    assert lines == [[DARKEST, EMPTY], [EMPTY, DARKEST], [middle] * 2, [EMPTY] * 2]
    alone = {"blocks.1.ffn.router": figures([0.5, 0.5], only=[0.5, 0.5])}
    assert list(load_pictures(alone)) == ["experts/load"], "of one task there is nothing to compare"


def test_layers_in_the_order_of_the_model() -> None:
    names = ["blocks.10.ffn", "blocks.2.mixer", "blocks.2.ffn", "blocks.1.ffn"]
    assert sorted(names, key=natural) == ["blocks.1.ffn", "blocks.2.ffn", "blocks.2.mixer", "blocks.10.ffn"]


def test_loads_are_shares(data: Path, tmp_path: Path) -> None:
    for stages in observe(logged(data), tmp_path)["routing"]:
        assert set(stages[0]) == {f"{layer}.router" for layer in LAYERS}
        for figures in stages[0].values():
            assert list(figures["task_load"]) == list(KINDS)
            for load in (figures["load"], *figures["task_load"].values()):
                assert len(load) == EXPERTS and float(load.sum()) == pytest.approx(1.0, rel=1e-12)
