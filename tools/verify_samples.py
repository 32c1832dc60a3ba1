"""The batches on which `verify` compares layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from triptych.data_pipeline.config import DataConfig
from triptych.data_pipeline.images.config import PackingConfig
from triptych.data_pipeline.loader import BatchLoader
from triptych.models import DiffusionConfig, LanguageConfig, VisionConfig
from triptych.tools.vision_batches import packed_vision_batch, vision_batch
from triptych.training.data import open_training
from triptych.training.objectives import Batch

if TYPE_CHECKING:
    from triptych.training.sections import RunSections


def corpus_samples(run: RunSections, steps: int) -> list[Batch]:
    """The first `steps` global batches of the run's own data.

    Raises ValueError when a source of `data.sources` cannot be read.
    """
    try:
        dataset = open_training(run)
    except ValueError as error:
        raise ValueError(f"{error}; or give --synthetic to verify on random samples") from error
    size = run.train.global_batch_size
    with BatchLoader(dataset, size, size, read_ahead=0) as loader:
        return [next(loader)[0] for _ in range(steps)]


def synthetic_samples(run: RunSections, steps: int) -> list[Batch]:
    """`steps` global batches of random samples, shaped as those of the run's data."""
    draw = torch.Generator().manual_seed(run.train.seed)
    return [_synthetic(run, draw) for _ in range(steps)]


def _synthetic(run: RunSections, draw: torch.Generator) -> Batch:
    count = run.train.global_batch_size
    sample_keys = torch.randint(2**62, (count,), generator=draw)
    if isinstance(run.data, DataConfig):
        assert isinstance(run.model, LanguageConfig), "refused by check_data"
        return {**_documents(run.model, run.data.seq_len, count, draw), "sample_keys": sample_keys}
    model = run.model
    if isinstance(model, VisionConfig) and run.data.packing is None:
        return vision_batch(model, run.data.shapes[0], count, draw, torch.float64)
    if isinstance(model, VisionConfig):
        assert run.data.packing is not None, "asked just above"
        packed = {**_packed(model, run.data.packing, count, draw), "sample_keys": sample_keys}
        return packed_vision_batch(packed, model, draw)
    assert isinstance(run.model, DiffusionConfig), "refused by check_data"
    if run.data.packing is not None:
        return {**_packed(run.model, run.data.packing, count, draw), "sample_keys": sample_keys}
    return {**_images(run.model, run.data.shapes[0], count, draw), "sample_keys": sample_keys}


def _documents(model: LanguageConfig, size_t: int, count: int, draw: torch.Generator) -> Batch:
    """Rows of two or three documents (one in a row of fewer than 4 tokens).

    tokens, targets, document_ids: int64 (count, T). The last token of a document has no target (-100).
    """
    tokens = torch.randint(model.vocab_size, (count, size_t), generator=draw)
    document_ids = torch.zeros_like(tokens)
    if size_t >= 4:
        cuts = torch.randint(1, size_t, (count, 2), generator=draw)
        places = torch.arange(size_t)
        document_ids = (places >= cuts[:, :1]).long() + (places >= cuts[:, 1:]).long()
    targets = torch.full_like(tokens, -100)
    same = document_ids[:, 1:] == document_ids[:, :-1]
    targets[:, :-1] = torch.where(same, tokens[:, 1:], -100)
    return {"tokens": tokens, "targets": targets, "document_ids": document_ids}


def _images(model: DiffusionConfig, shape: tuple[int, ...], count: int, draw: torch.Generator) -> Batch:
    """Whole images x (count, *shape), one of them unreadable, with what the model is told."""
    told = model.conditioning
    batch: Batch = {"x": torch.randn(count, *shape, generator=draw, dtype=torch.float64)}
    batch["valid"] = torch.arange(count) != count - 1 if count > 2 else torch.ones(count, dtype=torch.bool)
    if told.kind == "class":
        batch["labels"] = torch.randint(told.num_classes, (count,), generator=draw)
    if told.kind == "text":
        size = (count, told.text_length, told.text_size)
        batch["text"] = torch.randn(size, generator=draw, dtype=torch.float64)
    return batch


def _packed(
    model: DiffusionConfig | VisionConfig, packing: PackingConfig, count: int, draw: torch.Generator
) -> Batch:
    """Rows of two images of unlike sizes and padding behind them, one of the images unreadable; shapes as
    data_pipeline/images gives."""
    edge = max(1, int((packing.max_tokens // 3) ** 0.5))
    images = min(2, packing.max_images)
    sizes = torch.zeros(count, packing.max_images, 2, dtype=torch.int64)
    sizes[:, :images] = torch.randint(1, edge + 1, (count, images, 2), generator=draw)
    document_ids = torch.full((count, packing.max_tokens), packing.max_images)
    positions = torch.zeros(count, packing.max_tokens, 2, dtype=torch.int64)
    for row in range(count):
        start = 0
        for image, (height, width) in enumerate(sizes[row, :images].tolist()):
            stop = start + height * width
            document_ids[row, start:stop] = image
            place = torch.arange(height * width)
            positions[row, start:stop] = torch.stack([place // width, place % width], dim=1)
            start = stop
    valid = sizes.prod(dim=-1) > 0
    valid[-1, 0] &= count <= 2
    values = model.in_channels * model.patch_elements
    batch: Batch = {
        "x": torch.randn(count, packing.max_tokens, values, generator=draw, dtype=torch.float64),
        "positions": positions,
        "document_ids": document_ids,
        "sizes": sizes,
        "valid": valid,
        "image_keys": torch.randint(2**62, (count, packing.max_images), generator=draw),
    }
    if isinstance(model, DiffusionConfig) and model.conditioning.kind == "class":
        labels = (count, packing.max_images)
        batch["labels"] = torch.randint(model.conditioning.num_classes, labels, generator=draw)
    return batch
