"""From files to batches: token files, tokenizers, corpora, packing, mixing, one global order.

Names are loaded on first use: the processes that build a corpus import this package too, and only
`loader` needs torch, whose import costs each of them more than a second.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.data_pipeline.baseline import BaselineReport, Bigram, bigram_baseline, fit_bigram
    from triptych.data_pipeline.config import DataConfig, SourceConfig, TextCorpusOptions
    from triptych.data_pipeline.dataset import IGNORE, PackedDataset, Sample, SequentialDataset
    from triptych.data_pipeline.images.coco import build_coco
    from triptych.data_pipeline.images.config import ImageDataConfig, ImageSourceConfig
    from triptych.data_pipeline.images.dataset import ImageDataset, ImageValidation
    from triptych.data_pipeline.images.digits import build_digits
    from triptych.data_pipeline.images.folder import build_image_folder
    from triptych.data_pipeline.images.latents import build_latents
    from triptych.data_pipeline.images.masks import build_masks
    from triptych.data_pipeline.images.needs import ImageNeeds, TaskNeeds
    from triptych.data_pipeline.images.options import (
        CocoOptions,
        DigitsOptions,
        ImageFolderOptions,
        LatentsOptions,
        MaskOptions,
    )
    from triptych.data_pipeline.images.streaming import StreamedImages
    from triptych.data_pipeline.indexed import IndexedTokens, IndexedWriter, best_dtype
    from triptych.data_pipeline.loader import BatchLoader, MicroBatch, open_training, open_validation
    from triptych.data_pipeline.manifest import CorpusReport, Manifest
    from triptych.data_pipeline.text import build_text_corpus
    from triptych.data_pipeline.tokenizer import TextTokenizer, train_tokenizer
    from triptych.data_pipeline.vocabulary import check_vocabulary

_HOME = {
    "BaselineReport": "baseline",
    "Bigram": "baseline",
    "bigram_baseline": "baseline",
    "fit_bigram": "baseline",
    "DataConfig": "config",
    "SourceConfig": "config",
    "TextCorpusOptions": "config",
    "IGNORE": "dataset",
    "PackedDataset": "dataset",
    "Sample": "dataset",
    "SequentialDataset": "dataset",
    "ImageDataConfig": "images.config",
    "ImageSourceConfig": "images.config",
    "ImageDataset": "images.dataset",
    "ImageValidation": "images.dataset",
    "build_coco": "images.coco",
    "build_digits": "images.digits",
    "build_image_folder": "images.folder",
    "build_latents": "images.latents",
    "build_masks": "images.masks",
    "ImageNeeds": "images.needs",
    "TaskNeeds": "images.needs",
    "CocoOptions": "images.options",
    "DigitsOptions": "images.options",
    "ImageFolderOptions": "images.options",
    "LatentsOptions": "images.options",
    "MaskOptions": "images.options",
    "StreamedImages": "images.streaming",
    "IndexedTokens": "indexed",
    "IndexedWriter": "indexed",
    "best_dtype": "indexed",
    "BatchLoader": "loader",
    "MicroBatch": "loader",
    "open_training": "loader",
    "open_validation": "loader",
    "CorpusReport": "manifest",
    "Manifest": "manifest",
    "build_text_corpus": "text",
    "TextTokenizer": "tokenizer",
    "train_tokenizer": "tokenizer",
    "check_vocabulary": "vocabulary",
}

__all__ = [
    "IGNORE",
    "BaselineReport",
    "BatchLoader",
    "Bigram",
    "CocoOptions",
    "CorpusReport",
    "DataConfig",
    "DigitsOptions",
    "ImageDataConfig",
    "ImageDataset",
    "ImageFolderOptions",
    "ImageNeeds",
    "ImageSourceConfig",
    "ImageValidation",
    "IndexedTokens",
    "IndexedWriter",
    "LatentsOptions",
    "Manifest",
    "MaskOptions",
    "MicroBatch",
    "PackedDataset",
    "Sample",
    "SequentialDataset",
    "SourceConfig",
    "StreamedImages",
    "TaskNeeds",
    "TextCorpusOptions",
    "TextTokenizer",
    "best_dtype",
    "bigram_baseline",
    "build_coco",
    "build_digits",
    "build_image_folder",
    "build_latents",
    "build_masks",
    "build_text_corpus",
    "check_vocabulary",
    "fit_bigram",
    "open_training",
    "open_validation",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
