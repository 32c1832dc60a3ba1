"""`verify` of denoisers: which samples it takes, that it sees what is wrong, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.backbones import shrunk, tread
from tests.configs.shards import BROKEN, write_latents
from triptych.data_pipeline.images.config import PackingConfig
from triptych.launcher.config import RunConfig, load
from triptych.parallel.config import ParallelConfig
from triptych.parallel.local import run_local
from triptych.tools import verify as verify_module
from triptych.tools.layouts import parse_layout
from triptych.tools.verify import verify
from triptych.tools.verify_rank import Job, run_rank
from triptych.tools.verify_samples import corpus_samples, synthetic_samples
from triptych.training.objectives import build_objective
from triptych.training.sections import tokens_per_sample


def test_synthetic_images_have_all_that_a_batch_has() -> None:
    first, second = synthetic_samples(shrunk("dit"), 2)
    assert first["x"].shape == (8, 4, 8, 8) and first["x"].dtype == torch.float64
    assert first["labels"].shape == first["sample_keys"].shape == (8,)
    assert int(first["labels"].max()) < 10
    # One sample of the batch could not be read.
    assert first["valid"].tolist() == [True] * 7 + [False]
    assert not torch.equal(first["x"], second["x"])
    assert torch.equal(first["x"], synthetic_samples(shrunk("dit"), 1)[0]["x"]), "the same every time"
    assert "labels" not in synthetic_samples(shrunk("dit-text"), 1)[0]
    assert synthetic_samples(shrunk("dit-text"), 1)[0]["text"].shape == (8, 3, 6)


def test_a_batch_of_two_is_whole() -> None:
    (samples,) = synthetic_samples(shrunk("dit", "train.global_batch_size=2", "train.micro_batch_size=1"), 1)
    assert bool(samples["valid"].all())


def test_synthetic_rows_hold_images_of_unlike_sizes_and_padding() -> None:
    run = shrunk("fit")
    (samples,) = synthetic_samples(run, 1)
    packing = run.data.packing
    assert isinstance(packing, PackingConfig)
    assert samples["x"].shape == (8, 24, 16)
    sizes, ids = samples["sizes"], samples["document_ids"]
    counts = sizes.prod(-1)
    for row in range(8):
        for image in range(packing.max_images):
            tokens = ids[row] == image
            assert int(tokens.sum()) == int(counts[row, image])
            height, width = sizes[row, image].tolist()
            places = samples["positions"][row, tokens]
            assert places.tolist() == [[h, w] for h in range(height) for w in range(width)]
    assert len(set(map(tuple, sizes.flatten(0, 1).tolist()))) > 3
    assert bool((ids == packing.max_images).any())
    # There is an image in the row, and it could not be read.
    assert int(counts[-1, 0]) > 0 and not bool(samples["valid"][-1, 0])
    assert torch.equal(samples["valid"][:-1], counts[:-1] > 0)


def test_samples_of_the_runs_own_shards(tmp_path: Path) -> None:
    path = write_latents(tmp_path / "latents")
    words = [f"data.sources=[{path}]", "data.vae.scale_factor=1.0"]
    batches = corpus_samples(shrunk("dit", *words), 3)
    assert [tuple(batch["x"].shape) for batch in batches] == [(8, 4, 8, 8)] * 3
    keys = torch.cat([batch["sample_keys"] for batch in batches])
    assert len(keys.unique()) == 24
    # The torn one of the 24 is there, and counts nothing.
    assert sum(int((~batch["valid"]).sum()) for batch in batches) == 1 and BROKEN < 24
    report = verify(shrunk("dit", *words), ["pp2"], steps=3)
    assert report.ok and len(report.losses) == 3


def test_missing_shards_point_to_synthetic() -> None:
    with pytest.raises(ValueError, match=r"imagenet-latents/train.*--synthetic"):
        verify(shrunk("dit"), ["tp2"])


def test_another_noise_is_found_and_named(tmp_path: Path) -> None:
    """Labels that another layout would drop move one gradient above all."""
    run = shrunk("sit", "train.objective.label_drop=0.5")
    train = run.train.model_copy(update={"precision": "fp64", "micro_batch_size": 8})
    samples = synthetic_samples(run, 1)
    job = Job(run.model, ParallelConfig(), train, build_objective(run), 16, samples, str(tmp_path))
    (reference,) = run_local(1, run_rank, job, None)
    assert reference.losses[0] > 0 and reference.gradients["label_embedding.weight"].absolute > 0
    keys = samples[0]["sample_keys"].clone()
    keys[0] += 1
    ranks = run_local(1, run_rank, replace(job, samples=[{**samples[0], "sample_keys": keys}]), reference)
    result = verify_module._judge(parse_layout("tp1", ParallelConfig()), reference, ranks, 1e-9, 0.0)
    assert not result.ok and result.gradient.relative > 1e-3


def test_no_gradient_hides_behind_a_gate_of_zeros(tmp_path: Path) -> None:
    """What a denoiser starts with zeros is disturbed, so that every parameter has a part in the loss."""
    for name in ("dit", "fitv2", "dit-text", "dim"):
        run = shrunk(name)
        train = run.train.model_copy(update={"precision": "fp64", "micro_batch_size": 8})
        samples = synthetic_samples(run, 1)
        length = tokens_per_sample(run)
        job = Job(run.model, ParallelConfig(), train, build_objective(run), length, samples, str(tmp_path))
        (reference,) = run_local(1, run_rank, job, None)
        largest = max(worst.absolute for worst in reference.gradients.values())
        silent = {n for n, worst in reference.gradients.items() if worst.absolute < 1e-12 * largest}
        # A bias of the keys moves all scores of a query alike, which softmax does not see.
        assert all(n.endswith("k_proj.bias") for n in silent), name


def test_default_layouts_of_a_shared_block_leave_pipelines_out_with_the_reason() -> None:
    chosen, skipped = verify_module._choose(shrunk("dimsum"), None)
    assert {layout.text for layout in chosen} == {
        "tp2+selective",
        "dp_shard2+selective",
        "dp_replicate2+none",
        "dp_shard2.dp_replicate2+full",
        "tp2.dp_shard2+full",
    }
    assert all("model.shared_block_every=2" in why for name, why in skipped.items() if "pp" in name)
    assert "half of model.attention.num_heads" in skipped["tp4+none"]


def routed(name: str, rate: float) -> RunConfig:
    return shrunk(name, tread(shrunk(name), rate))


@pytest.mark.parametrize(
    ("run", "layout", "words"),
    [
        (routed("dimsum", 0.5), "tp2", "train.tread leaves tokens out of blocks 1 to 2, where dimsum stands"),
        (
            routed("dit", 0.45),
            "tp2",
            r"parallel.tp=2 does not divide the 9 of 16 tokens that train.tread.rate=0.45",
        ),
        (shrunk("dimsum"), "pp2", "model.shared_block_every=2.*use parallel.pp=1"),
        (shrunk("fit"), "tp3", "parallel.tp=3 does not divide model.attention.num_heads=4"),
        (
            shrunk("fit", "data.packing=null", "data.buckets={sizes: [[8, 8], [6, 10]]}"),
            "tp2",
            "parallel.tp=2 does not divide the 15 tokens of one of the sizes in data.buckets",
        ),
        (shrunk("dit", "data.image_size=6"), "pp2", r"data.image_size=\[6, 6\] is not model.input_size"),
    ],
)
def test_what_a_layout_cannot_run_is_refused(run: RunConfig, layout: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        verify(run, [layout], synthetic=True)


def test_kept_tokens_need_not_be_divided_without_sequence_parallelism() -> None:
    report = verify(routed("dit", 0.45), ["tp2+nosp"], steps=1, synthetic=True)
    assert report.ok


def test_images_for_a_language_model_are_refused() -> None:
    run = load("configs/lm/tiny.yaml").model_copy(update={"data": shrunk("dit").data})
    with pytest.raises(ValueError, match=r"data.kind=images does not serve model.family=lm"):
        verify(run, ["tp2"], synthetic=True)
    run = shrunk("dit").model_copy(update={"data": load("configs/lm/tiny.yaml").data})
    with pytest.raises(ValueError, match=r"data: is text .*model.family=diffusion"):
        verify(run, ["tp2"], synthetic=True)
