"""What the package promises as a whole."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import triptych.data_pipeline as data_pipeline


def test_every_exported_name_exists() -> None:
    for name in data_pipeline.__all__:
        assert getattr(data_pipeline, name) is not None, f"{name} is exported and missing"
    assert set(data_pipeline._HOME) == set(data_pipeline.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'shuffle'"):
        data_pipeline.shuffle  # noqa: B018


def test_building_a_corpus_does_not_import_torch() -> None:
    """Each tokenizing process imports this; torch would cost it more than a second."""
    code = (
        "import sys; from triptych.data_pipeline import build_text_corpus, DataConfig, PackedDataset, "
        "check_vocabulary, bigram_baseline; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_modules_state_their_purpose() -> None:
    for module in {*data_pipeline._HOME.values(), "order", "sources", "building"}:
        assert importlib.import_module(f"triptych.data_pipeline.{module}").__doc__
