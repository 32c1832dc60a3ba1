"""What is frozen gets no gradient, counts in no norm and never moves, on any shard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.parallel import training
from triptych.parallel.config import ParallelConfig
from triptych.parallel.freezing import (
    Pattern,
    check_freeze,
    count_trainable,
    freeze,
    is_frozen,
    mask_frozen_rows,
    parse,
    trained_rows,
)
from triptych.parallel.shards import Window

ROWS = "blocks.1.ffn.up_proj.weight[5:17]"
FREEZE = (
    "blocks.0.*",
    "embedding.*",
    ROWS,
    "blocks.3.ffn.up_proj.weight[:3]",
    "blocks.3.ffn.up_proj.weight[20:]",
)
# All of the first stage of two.
STAGE = ("embedding.*", "blocks.[01].*")


def test_patterns_are_globs_with_or_without_rows() -> None:
    assert parse("blocks.*") == Pattern("blocks.*") and parse("blocks.*").whole
    assert parse("a.up_proj[0:16]") == Pattern("a.up_proj", 0, 16)
    assert parse("a.up_proj[3:]") == Pattern("a.up_proj", 3, None)
    assert parse("a.up_proj[:3]") == Pattern("a.up_proj", 0, 3)
    assert parse("blocks.[01].*") == Pattern("blocks.[01].*")
    assert is_frozen("blocks.1.norm.weight", STAGE) and not is_frozen("blocks.2.norm.weight", STAGE)
    assert not is_frozen("blocks.1.ffn.up_proj.weight", [ROWS])


def test_trained_rows_of_every_window() -> None:
    size, patterns = 9, ("w[1:3]", "w[2:4]", "*[8:]", "other[0:9]", "w*")
    frozen = np.array([row in (1, 2, 3, 8) for row in range(size)])
    for start in range(size + 1):
        for stop in range(start, size + 1):
            held = Window((start, 0), (stop - start, 2), (size, 2))
            rows = trained_rows("w", held, patterns)
            assert rows is not None
            kept = np.zeros(stop - start, dtype=bool)
            for part in rows:
                assert part.start < part.stop
                kept[part] = True
            np.testing.assert_array_equal(kept, ~frozen[start:stop])
    assert trained_rows("v", Window((0,), (4,), (4,)), ("w[1:3]",)) is None


def test_whole_parameters_ask_for_no_gradient() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    freeze(module, ["0.*", "1.weight[0:1]"])
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"1.weight", "1.bias"}
    module(torch.ones(1, 2)).sum().backward()
    before = module[1].weight.grad.clone()
    mask_frozen_rows(module.named_parameters(), ["0.*", "1.weight[0:1]"])
    expected = before.clone()
    expected[0] = 0
    assert before[0].abs().max() > 0
    torch.testing.assert_close(module[1].weight.grad, expected, rtol=0, atol=0)


def test_counts_what_is_trained() -> None:
    config = training.model_config()
    trained, total = count_trainable(config, FREEZE)
    model = training.models.build(config)
    assert total == sum(p.numel() for p in model.parameters())
    whole = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("blocks.0.", "embedding.")))
    # Rows of 16 channels: 12 of block 1, and 3 + 4 of the 24 of block 3.
    assert total - trained == whole + 16 * (12 + 3 + 4)
    assert count_trainable(config, ()) == (total, total)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["block.0.*"], r"'block\.0\.\*' matches no parameter.*begin with blocks, embedding, head, norm"),
        (["embedding.*", "blocks.7.*"], r"'blocks\.7\.\*' matches no parameter"),
        (["blocks.1.ffn.up_proj.weight[5:25]"], r"asks for rows that .*\(24, 16\).*0:24"),
        (["blocks.1.ffn.up_proj.weight[5:5]"], "asks for rows that"),
        (["*"], "leaves nothing to train"),
    ],
)
def test_patterns_that_mean_nothing_are_refused(patterns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_freeze(training.model_config(), patterns)
    check_freeze(training.model_config(), FREEZE)


@pytest.mark.parametrize(
    ("parallel", "ranks", "patterns"),
    [
        ({}, 1, FREEZE),
        ({"dp_shard": 2}, 2, FREEZE),
        ({"dp_shard": 3, "recompute": "full"}, 3, FREEZE),
        ({"tp": 2}, 2, FREEZE),
        ({"tp": 2, "dp_shard": 2, "recompute": "selective"}, 4, FREEZE),
        ({"pp": 2}, 2, FREEZE),
        ({"pp": 2}, 2, STAGE),
        ({"dp_shard": 2}, 2, STAGE),
    ],
    ids=["alone", "dp_shard2", "dp_shard3", "tp2", "tp2 dp_shard2", "pp2", "pp2 stage", "dp_shard2 stage"],
)
def test_gradients_of_the_rest_are_what_they_were(
    parallel: dict[str, Any], ranks: int, patterns: tuple[str, ...], distributed: Callable[..., list[Any]]
) -> None:
    config = training.model_config()
    expected = training.train_alone(config)["gradients"]
    seen = distributed(ranks, training.frozen_gradients, config, ParallelConfig(**parallel), patterns)[0]
    trained = {name: gradient for name, gradient in expected.items() if not is_frozen(name, patterns)}
    for name, rows in (
        (
            ("blocks.1.ffn.up_proj.weight", slice(5, 17)),
            ("blocks.3.ffn.up_proj.weight", [0, 1, 2, 20, 21, 22, 23]),
        )
        if patterns is FREEZE
        else ()
    ):
        assert trained[name][rows].abs().max() > 0
        trained[name][rows] = 0
    assert seen["gradients"].keys() == trained.keys() and len(trained) < len(expected)
    for name, gradient in trained.items():
        scale = gradient.abs().max()
        assert (seen["gradients"][name] - gradient).abs().max() <= 1e-9 * scale, name
    norm = sum(gradient.square().sum() for gradient in trained.values()) ** 0.5
    assert seen["norm"] == pytest.approx(float(norm), rel=1e-9)
