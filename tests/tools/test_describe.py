"""What `describe` says is what is built."""

from __future__ import annotations

import io
import json
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.backbones import shrunk
from triptych.models import build, flops_per_token
from triptych.parallel.collectives import Axis
from triptych.tools.counting import StageSpec, count_stage_on
from triptych.tools.describe import describe
from triptych.tools.kept import total_bytes


def text_of(renderable: Any) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_one_rank(runs: ModuleType, trained_run: Any) -> None:
    run = runs.make_run(trained_run.corpus)
    description = describe(run)
    parameters = sum(parameter.numel() for parameter in build(run.model).parameters())
    assert description.parameters == description.active_parameters == parameters
    blocks = sum(len(block.layers) * block.parameters for block in description.blocks)
    ends = sum(part.parameters for part in description.parts)
    assert blocks + ends == parameters
    assert [block.layers for block in description.blocks] == [[0, 2], [1, 3]]
    assert description.train_flops_per_token == 3 * flops_per_token(run.model, 16)["total"]
    (rank,) = description.ranks
    assert rank.parameters == parameters
    assert (rank.weight_bytes, rank.optimizer_bytes) == (4 * parameters, 8 * parameters)
    assert rank.activation_bytes > 0 and rank.weight_copy_bytes < 1000
    batch = description.batch
    assert (batch.tokens_per_step, batch.tokens, batch.micro_batches_per_rank) == (64, 384, 4)
    assert batch.samples_per_epoch is not None and batch.steps_per_epoch is not None
    (samples,) = batch.samples_per_epoch.values()
    assert batch.steps_per_epoch == pytest.approx(samples / 4)


def test_every_rank_of_a_layout(runs: ModuleType) -> None:
    layout = {"tp": 2, "pp": 2, "dp_shard": 2, "recompute": "selective"}
    description = describe(runs.make_run(parallel=layout, train={"precision": "bf16"}))
    assert [row.rank for row in description.ranks] == list(range(8))
    assert description.batch.corpus_note is not None
    first, last = description.ranks[0], description.ranks[-1]
    assert (first.ends, last.ends) == (["embedding"], ["head"])
    assert sorted(first.layers + last.layers) == [0, 1, 2, 3]
    assert (first.micro_batches_in_flight, last.micro_batches_in_flight) == (2, 1)
    assert first.weight_copy_bytes > 0
    text = text_of(description.table())
    assert "pp 1 dp_shard 1 tp 1" in text and "not known" in text
    assert json.loads(json.dumps(description.to_json()))["ranks"][7]["total_bytes"] == last.total_bytes


def test_parameters_of_data_shards_add_up(runs: ModuleType) -> None:
    whole = describe(runs.make_run()).parameters
    sharded = describe(runs.make_run(parallel={"dp_shard": 4}))
    assert sum(row.parameters for row in sharded.ranks) == whole


def test_layouts_keep_less_in_the_right_order(runs: ModuleType) -> None:
    def activations(**parallel: Any) -> int:
        return describe(runs.make_run(parallel=parallel)).ranks[0].activation_bytes

    whole, cut = activations(), activations(tp=2)
    assert cut < activations(tp=2, sequence_parallel=False) < whole
    assert activations(recompute="full") < activations(recompute="selective") < whole


def test_a_large_model_takes_no_memory(runs: ModuleType) -> None:
    model = {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "num_layers": 8,
        "attention": {"num_heads": 64, "num_kv_heads": 8},
        "mamba2": {"state_size": 128, "head_dim": 64, "num_groups": 8},
        "ffn": {"intermediate_size": 28672},
    }
    description = describe(runs.make_run(model=model, data={"seq_len": 4096}, parallel={"tp": 8}))
    assert description.parameters > 7e9


def test_an_illegal_layout_is_refused(runs: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"parallel\.pp=8 exceeds model\.num_layers=4"):
        describe(runs.make_run(parallel={"pp": 8}))


@pytest.mark.parametrize("name", ["dit-text", "fit", "fitv2", "dim", "rwkv", "hybrid"])
def test_fake_tensors_keep_what_real_ones_do_in_denoisers(name: str) -> None:
    """Both stages of a pipeline of two, in bytes; what `describe` says of a denoiser's activations."""
    run = shrunk(name, "parallel.pp=2", "train.micro_batch_size=2")
    packing = getattr(run.data, "packing", None)
    images = None if packing is None else packing.max_images
    rows = describe(run).ranks
    assert len(rows) == 2
    for stage, row in enumerate(rows):
        layers = range(row.layers[0], row.layers[-1] + 1)
        length = 16 if packing is None else packing.max_tokens
        spec = StageSpec(
            run.model, run.parallel, layers, stage == 0, stage == 1, 2, length, torch.float32, images=images
        )
        real = count_stage_on(spec, Axis(1))
        assert row.activation_bytes == total_bytes(real.kept) > 0
        assert row.parameters == sum(torch.Size(shape).numel() for shape in real.parameter_shapes)


def test_packed_rows_keep_modulations_of_every_token() -> None:
    """Shift, scale and gate of two branches: at least 6 C values per token and block more than whole
    images."""
    packed, whole = (shrunk("fit", *more) for more in ((), ("data.packing=null", "data.image_size=[8,12]")))
    counts = [describe(run).ranks[0].activation_bytes for run in (packed, whole)]
    assert counts[0] - counts[1] > 0.9 * 4 * 24 * 4 * 6 * 48


def test_denoisers_are_told_in_full() -> None:
    description = describe(shrunk("dit"))
    text = text_of(description.table())
    for part in ("patch_embedding", "time_embedding", "label_embedding", "attention+gelu", "head"):
        assert part in text
    assert "Model: diffusion, hidden size 48" in text and "twice its multiply-adds" in text
    assert description.forward_flops_per_sample == 16 * description.forward_flops_per_token
    assert (
        sum(part.parameters for part in description.parts)
        + sum(len(block.layers) * block.parameters for block in description.blocks)
        == description.parameters
    )
    assert json.loads(json.dumps(description.to_json()))["parts"][0]["name"] == "patch_embedding"
