"""The section `data:` refuses what it cannot mean."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from triptych.data_pipeline import DataConfig, TextCorpusOptions


def test_a_source_may_be_written_as_its_path() -> None:
    config = DataConfig.model_validate(
        {"sources": ["data/a/train.bin", {"path": "b", "weight": 2}], "seq_len": 8}
    )
    assert [(source.path, source.weight) for source in config.sources] == [("data/a/train", 1.0), ("b", 2.0)]
    assert DataConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("weight", [0, -1.5, float("nan"), float("inf")])
def test_wrong_weights_are_refused(weight: float) -> None:
    with pytest.raises(ValidationError, match="must be a positive finite number; leave out"):
        DataConfig.model_validate({"sources": [{"path": "a", "weight": weight}], "seq_len": 8})


def test_a_source_listed_twice_is_refused() -> None:
    with pytest.raises(
        ValidationError, match="a is listed twice; list each corpus once and raise its weight"
    ):
        DataConfig.model_validate({"sources": ["a", "b", "a"], "seq_len": 8})


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"sources": ["a"], "seq_len": 8, "sequence_length": 8}, "sequence_length"),
        ({"sources": [{"path": "a", "wieght": 1}], "seq_len": 8}, "sources.0.wieght"),
        ({"sources": ["a"]}, "seq_len"),
        ({"sources": ["a"], "seq_len": 0}, "seq_len"),
        ({"sources": [], "seq_len": 8}, "sources"),
        ({"sources": [""], "seq_len": 8}, "sources.0.path"),
    ],
)
def test_unknown_and_missing_keys_are_named(section: dict[str, object], key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DataConfig.model_validate(section)
    assert [".".join(map(str, error["loc"])) for error in caught.value.errors()] == [key]


def test_corpus_options_take_one_source_or_several() -> None:
    assert TextCorpusOptions(source="stdlib", out="x").source == ("stdlib",)
    assert TextCorpusOptions(source=("a", "b"), out="x").source == ("a", "b")
    for wrong in ({"vocab_size": 256}, {"valid_share": 1.0}, {"workers": 0}, {"source": ""}, {"vocab": 512}):
        with pytest.raises(ValidationError):
            TextCorpusOptions.model_validate({"source": "stdlib", "out": "x", **wrong})
