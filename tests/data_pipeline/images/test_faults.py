"""What is left out, what is counted, what stops the run, and what is a mistake from the start."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych.data_pipeline import BatchLoader, ImageDataset, ImageNeeds
from triptych.data_pipeline.images.description import Description
from triptych.data_pipeline.images.faults import Faults

from .samples import CLASSES, config, image, npy, number_of, png, write_shards

TEXT = ImageNeeds(text=(4, 2))
NOISE = np.random.default_rng(0).integers(0, 256, (40, 40))


def corrupt() -> bytes:
    """A PNG whose header is well and whose pixels are not."""
    data = bytearray(png(NOISE))
    data[200:260] = bytes(60)
    return bytes(data)


HEADERS: dict[str, tuple[dict[str, bytes], ImageNeeds, dict[str, Any], str]] = {
    "no image": ({"cls": b"1"}, CLASSES, {}, r"has no image \(png, jpg, jpeg, webp\)"),
    "no label": ({"png": png(np.zeros((4, 4)))}, CLASSES, {}, "has no label"),
    "bad label": ({"png": png(np.zeros((4, 4))), "cls": b"cat"}, CLASSES, {}, "its label is no integer"),
    "torn header": ({"png": b"\x89PNG\r\n", "cls": b"1"}, CLASSES, {}, "the header of its image is damaged"),
    "no text": (image(1), TEXT, {}, "has no text.npy"),
    "bad text": (image(1) | {"text.npy": b"torn"}, TEXT, {}, "its text.npy is no array"),
    "no std": ({"mean.npy": npy(np.zeros((1, 4, 4)))}, ImageNeeds(), {"latents": True}, "has no std.npy"),
}


def good(n: int, latents: bool) -> dict[str, bytes]:
    if latents:
        return {name: npy(np.full((1, 4, 4), float(n))) for name in ("mean.npy", "std.npy")}
    return image(n) | {"text.npy": npy(np.zeros((3, 2), np.float32))}


@pytest.mark.parametrize("fault", HEADERS)
def test_what_headers_show_stands_in_no_row(
    fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members, needs, options, reason = HEADERS[fault]
    latents = bool(options)
    more: dict[str, Any] = {"content": "latents", "vae": {"scale_factor": 1.0}} if latents else {}
    samples = [good(n, latents) for n in range(8)]
    samples[3] = members
    path = write_shards(tmp_path, samples)
    data = ImageDataset(config(path, **more), 0, needs)
    assert len(data.bad) == 1 and data.num_images == data.sources[0].samples_per_epoch == 7
    (name,) = data.bad.names
    assert name.startswith(f"{path}/part-000.tar:003: ") and name in caplog.text.replace("left out ", "")
    assert re.search(reason, name)
    assert all(data.sample(i)["valid"] for i in range(7))
    with pytest.raises(ValueError, match=rf"more than data.max_bad_samples=0; the first are: .*{reason}"):
        ImageDataset(config(path, max_bad_samples=0, **more), 0, needs)


def test_a_label_matters_only_where_it_is_asked_for(tmp_path: Path) -> None:
    path = write_shards(tmp_path, [{"png": png(np.zeros((4, 4)))}, image(1) | {"cls": b"cat"}])
    assert ImageDataset(config(path), 0).num_images == 2


def test_torn_shards_are_named_and_the_rest_serves(tmp_path: Path) -> None:
    path = write_shards(tmp_path, [image(n) for n in range(15)])
    os.truncate(tmp_path / "part-001.tar", 2 * 2048 + 700)
    data = ImageDataset(config(path), 0, CLASSES)
    # The tear is one fault, and the sample that it cuts through (its label is gone) another.
    assert data.num_images == 12 and len(data.bad) == 2
    assert "part-001.tar: is truncated at byte 4796; what is whole before it is used" in data.bad.names[0]
    assert "part-001.tar:007: has no label" in data.bad.names[1]
    seen = sorted(int(number_of(data.sample(i)["x"][None])[0]) for i in range(12))
    assert seen == [0, 1, 2, 3, 4, 5, 6, 10, 11, 12, 13, 14]


@pytest.mark.parametrize("kind", ["grid", "buckets", "packing"])
def test_what_decoding_shows_keeps_its_place(kind: str, tmp_path: Path) -> None:
    """The layout of all other rows is what it would be without the fault."""
    options: dict[str, Any] = {
        "grid": {},
        "buckets": {"buckets": {"sizes": [[40, 40], [4, 8]]}},
        "packing": {"packing": {"max_tokens": 120, "max_images": 3, "patch_size": 8}},
    }[kind]
    samples = [image(n, (40, 40)) for n in range(10)]
    whole = write_shards(tmp_path / "whole", samples)
    samples[4] = {"png": corrupt(), "cls": b"4"}
    torn = write_shards(tmp_path / "torn", samples)
    data, expected = (
        ImageDataset(config(path, **options), 0, CLASSES, global_batch_size=5) for path in (torn, whole)
    )
    assert len(data.bad) == 0, "its header is well"
    rows = data.sources[0].samples_per_epoch
    lost = 0
    for i in range(2 * rows):
        one, two = data.sample(i), expected.sample(i)
        missing = two["valid"] & ~one["valid"] if kind == "packing" else two["valid"] and not one["valid"]
        lost += int(np.sum(missing))
        for name in one:
            if not np.any(missing) or name in (
                "sizes",
                "positions",
                "document_ids",
                "image_keys",
                "sample_keys",
            ):
                assert np.array_equal(one[name], two[name])
        if kind == "packing":
            gone = np.isin(one["document_ids"], np.flatnonzero(missing))
            assert not one["x"][gone].any() and np.array_equal(one["x"][~gone], two["x"][~gone])
            assert not one["labels"][missing].any()
        elif missing:
            assert one["labels"] == 0 and not one["x"].any()
    assert lost == 2, "once per epoch"
    assert len(data.bad) == 1 and "part-000.tar:004: " in data.bad.names[0], "counted once over all epochs"


def test_too_many_stop_the_run(tmp_path: Path) -> None:
    """The error reaches whoever asks for the batch, also from other threads."""
    bad = {"png": corrupt(), "cls": b"1"}
    path = write_shards(tmp_path, [bad if n % 2 else image(n, (40, 40)) for n in range(20)])
    for threads in (1, 3):
        data = ImageDataset(config(path, max_bad_samples=9, decode_threads=threads), 0, CLASSES)
        told = r"10 samples could not be used, more than data.max_bad_samples=9; the first are"
        with BatchLoader(data, 4, 4) as loader, pytest.raises(ValueError, match=told):
            for _ in range(5):
                next(loader)
    data = ImageDataset(config(path, max_bad_samples=10), 0, CLASSES)
    with BatchLoader(data, 4, 4) as loader:
        assert sum(int((~next(loader)[0]["valid"]).sum()) for _ in range(10)) == 20
    assert len(data.bad) == 10


def test_faults_are_counted_once_and_logged_a_few_times(caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults(30)
    for n in [*range(30), *range(30)]:
        faults.add(f"sample {n}", "torn")
    assert len(faults) == 30 and faults.names[0] == "sample 0: torn" and len(faults.names) == 20
    assert len(caplog.records) == 6 and "no longer logged" in caplog.text
    with pytest.raises(ValueError, match="31 samples could not be used"):
        faults.add("sample 30", "torn")


def test_a_file_system_that_refuses_raises_at_once(tmp_path: Path) -> None:
    """It may be one rank's alone: rows of the same number must not differ between ranks."""
    path = write_shards(tmp_path, [image(n) for n in range(5)])
    data = ImageDataset(config(path), 0, CLASSES)
    (tmp_path / "part-000.tar").unlink()
    with pytest.raises(FileNotFoundError):
        data.sample(0)
    assert len(data.bad) == 0


def test_images_with_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triptych.data_pipeline.images.needs.MAX_PIXELS", 20)
    path = write_shards(tmp_path, [image(1), image(2, (5, 5))])
    data = ImageDataset(config(path), 0)
    assert data.num_images == 1 and "more than 20 pixels" in data.bad.names[0]


def test_mistakes_are_errors_from_the_start(tmp_path: Path) -> None:
    path = write_shards(tmp_path / "a", [image(n, (4, 6)) for n in range(12)])
    with pytest.raises(
        ValueError, match=r"3 of 12 samples of source .* have labels outside 0 .. 6 .*with 7. Raise"
    ):
        ImageDataset(config(path), 0, ImageNeeds(num_classes=7))
    with pytest.raises(
        ValueError, match=r"12 of 12 .* not in data.image_size=\[\[4, 4\]\].* with \[4, 6\]. To mend it, use"
    ):
        ImageDataset(config(path, augment={"crop": "none"}), 0)
    assert ImageDataset(config(path, augment={"crop": "none"}, image_size=[4, 6]), 0).num_images == 12
    packing = {"max_tokens": 4, "patch_size": 4}
    with pytest.raises(ValueError, match=r"no multiples of data.packing.patch_size=4"):
        ImageDataset(config(path, augment={"crop": "none"}, packing=packing), 0)
    texts = write_shards(
        tmp_path / "b", [image(n) | {"text.npy": npy(np.zeros((2 + n, 2), np.float32))} for n in range(4)]
    )
    assert ImageDataset(config(texts), 0, ImageNeeds(text=(5, 2))).num_images == 4
    for needs in (ImageNeeds(text=(4, 2)), ImageNeeds(text=(5, 3))):
        with pytest.raises(ValueError, match=r"embedded texts that do not fit model.conditioning"):
            ImageDataset(config(texts), 0, needs)
    nothing = write_shards(tmp_path / "c", [{"txt": b"a cat"}])
    with pytest.raises(ValueError, match=r"no usable sample in 1 shards; .*:000: has no image"):
        ImageDataset(config(nothing), 0)


def test_the_description_is_held_against_the_configuration(tmp_path: Path) -> None:
    path = write_shards(tmp_path, [image(1)])
    Description("latents", 4, (4, 4), 1, 1).write(tmp_path)
    with pytest.raises(ValueError, match=r"holds latents \(dataset.json\) and data.content=images"):
        ImageDataset(config(path), 0)
    for content in ('{"version": 1, "kind": "sounds"}', '{"version": 2, "kind": "images"}', "[]", "{torn"):
        (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(ValueError, match=r"dataset.json cannot be used .*; write the shards again"):
            ImageDataset(config(path), 0)
