"""Mixup, CutMix and RandAugment: what they do to pixels, and the distributions of their draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from scipy import stats

from triptych.data_pipeline import BatchLoader, ImageDataset, ImageNeeds, ImageValidation, TaskNeeds
from triptych.data_pipeline.images import randaugment as operations
from triptych.data_pipeline.images.augment import mirrored, part, pixels
from triptych.data_pipeline.images.config import AugmentConfig, RandAugmentConfig
from triptych.data_pipeline.images.draws import beta
from triptych.data_pipeline.images.mixing import cutmix, mix, partner_of
from triptych.data_pipeline.images.randaugment import randaugment

from .samples import config, image, number_of, png, write_shards

RANDOM = np.random.default_rng(0)
DIGITS = ImageNeeds(channels=1, tasks={"digits": TaskNeeds("classify", 0, num_classes=10)})


@pytest.mark.parametrize("alpha", [0.2, 0.4, 1.0, 3.5])
def test_beta_has_its_distribution(alpha: float) -> None:
    drawn = np.array([beta(key, "mixup", alpha) for key in range(4000)])
    assert drawn.min() >= 0 and drawn.max() <= 1 and np.isfinite(drawn).all()
    assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert beta(7, "mixup", alpha) == drawn[7] != beta(7, "cutmix", alpha)


def test_tiny_alpha_gives_one_or_the_other() -> None:
    drawn = np.array([beta(key, "mixup", 1e-3) for key in range(400)])
    assert np.isfinite(drawn).all() and ((drawn < 1e-6) | (drawn > 1 - 1e-6)).mean() > 0.95
    assert 150 < (drawn > 0.5).sum() < 250


def test_partners_are_others_each_as_likely() -> None:
    found = np.array([partner_of(3, 8, key) for key in range(7000)])
    counts = np.bincount(found, minlength=8)
    assert counts[3] == 0 and abs(np.delete(counts, 3) - 1000).max() < 5 * 1000**0.5
    assert partner_of(0, 1, 5) is None and partner_of(1, 2, 5) == 0


def test_cutmix_takes_the_share_it_tells() -> None:
    """Of a white image and a black one, the share is what is left white; whole boxes have 1 - share."""
    white, black = np.ones((1, 20, 30), np.float32), np.zeros((1, 20, 30), np.float32)
    whole = 0
    for key in range(500):
        mixed, share = cutmix(white, black, 0.75, key)
        assert mixed.mean() == pytest.approx(share, abs=1e-6) and set(np.unique(mixed)) <= {0.0, 1.0}
        box = np.argwhere(mixed[0] == 0)
        height, width = box.max(axis=0) - box.min(axis=0) + 1
        assert height * width == len(box) and height in range(1, 11) and width in range(1, 16)
        whole += share == 0.75
    # The centre is even, and the box whole where it lies in the middle half each way.
    assert abs(whole / 500 - 0.25) < 5 * (0.25 * 0.75 / 500) ** 0.5 + 0.05
    assert white.all(), "the images themselves are left alone"


def test_mixup_blends() -> None:
    first, other = RANDOM.random((2, 3, 5, 4)).astype(np.float32)
    mixed, share = mix(first, other, AugmentConfig(mixup=0.4), 11)
    assert share == beta(11, "mixup", 0.4)
    assert np.allclose(mixed, share * first.astype(np.float64) + (1 - share) * other, atol=1e-6)
    both = AugmentConfig(mixup=0.4, cutmix=1.0)
    cut = sum(np.isin(mix(first, other, both, key)[0], [first, other]).all() for key in range(1000))
    assert abs(cut - 500) < 5 * 250**0.5 + 20


@pytest.fixture(scope="module")
def shades(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 images of 4 x 4 whose shade, 6 n, tells their number."""
    samples = [image(6 * n) | {"cls": str(n % 10).encode()} for n in range(40)]
    return write_shards(tmp_path_factory.mktemp("shades"), samples)


def mixing(path: str, **options: Any) -> ImageDataset:
    return ImageDataset(config(path, **options), 1, DIGITS)


def test_rows_are_mixed_with_others_of_their_source(shades: str) -> None:
    plain, mixed = mixing(shades), mixing(shades, augment={"mixup": 0.5})
    partners = set()
    for i in range(80):
        one, two = plain.sample(i), mixed.sample(i)
        assert one["sample_keys"] == two["sample_keys"] and one["labels"] == two["labels"]
        assert one["share"] == 1 and one["labels_other"] == one["labels"], "unmixed"
        share = float(two["share"])
        assert 0 <= share <= 1 and two["x"].dtype == np.float32 and two["share"].dtype == np.float32
        (n,) = number_of(one["x"][None])
        if share < 0.9:
            # The other one's shade, from the blend.
            other = ((two["x"][0, 0, 0] - share * one["x"][0, 0, 0]) / (1 - share) + 1) * 127.5
            assert other == pytest.approx(6 * round(other / 6), abs=0.05), "the shade of some image"
            assert round(other) != n and round(other / 6) % 10 == two["labels_other"]
            partners.add(round(other / 6))
    assert len(partners) > 20


def test_layouts_do_not_change_the_mixture(shades: str) -> None:
    augment = {"mixup": 0.4, "cutmix": 1.0, "randaugment": {}, "flip": True, "crop": "random_resized"}
    data = mixing(shades, augment=augment)
    expected = data.collate([data.sample(i) for i in range(24)])
    for ranks, micro, threads in ((1, 12, 1), (2, 3, 3), (4, 1, 2), (3, 2, 1)):
        opened = mixing(shades, augment=augment, decode_threads=threads)
        loaders = [BatchLoader(opened, 12, micro, rank, ranks) for rank in range(ranks)]
        for step in range(2):
            parts = [each for loader in loaders for each in next(loader)]
            for name, values in expected.items():
                joined = np.concatenate([each[name].numpy() for each in parts])
                assert np.array_equal(joined, values[12 * step : 12 * step + 12].numpy()), name
        for loader in loaders:
            loader.close()


def test_validation_is_not_mixed(shades: str) -> None:
    data = config(shades, valid=[shades], augment={"mixup": 1.0, "randaugment": {"magnitude": 10}})
    valid = ImageValidation(data, DIGITS)
    for i in range(40):
        row = valid.sample(i)
        assert number_of(row["x"][None])[0] == 6 * i and row["share"] == 1 and row["labels_other"] == i % 10


def test_a_partner_that_cannot_be_read_leaves_the_row_unmixed(tmp_path: Path) -> None:
    torn = png(RANDOM.integers(0, 256, (40, 40)))[:200]
    path = write_shards(tmp_path, [image(60) | {"cls": b"6"}, {"png": torn, "cls": b"1"}])
    data = mixing(path, augment={"mixup": 1.0})
    rows = [data.sample(i) for i in range(6)]
    assert sum(row["valid"] for row in rows) == 3 and len(data.bad) == 1
    for row in rows:
        if row["valid"]:
            assert row["share"] == 1 and row["labels"] == row["labels_other"] == 6
            assert number_of(row["x"][None])[0] == 60
        else:
            assert row["labels"] == row["labels_other"] == -1 and not row["x"].any() and row["share"] == 1
    alone = mixing(write_shards(tmp_path / "alone", [image(6)]), augment={"mixup": 1.0})
    assert alone.sample(0)["share"] == 1, "a source of one sample has no partner"


def test_mixing_is_for_classification_at_random_places(shades: str) -> None:
    boxes = ImageNeeds(tasks={"boxes": TaskNeeds("detect", 0, num_classes=10)})
    for needs in (boxes, ImageNeeds()):
        with pytest.raises(ValueError, match="which only tasks of kind classify have; remove them"):
            needs.check(config(shades, augment={"mixup": 0.1}))
    with pytest.raises(ValueError, match="randaugment is for the tasks of vision models"):
        ImageNeeds().check(config(shades, augment={"randaugment": {}}))
    for more in ({"stream": True}, {"packing": {"max_tokens": 4, "patch_size": 2}}):
        with pytest.raises(
            ValidationError, match=r"augment.mixup=0 and cutmix=1 take another image .* remove"
        ):
            config(shades, augment={"cutmix": 1.0}, **more)


NAMES = ["identity", "autocontrast", "equalize", "solarize", "posterize", "colour", "contrast", "brightness",
         "sharpness", "rotate", "shear x", "shear y", "move x", "move y"]  # fmt: skip


def applied(name: str, picture: Image.Image, strength: float, sign: int) -> np.ndarray:
    chosen = [*operations._COLOURS, *operations._SHAPES][NAMES.index(name)]
    found = chosen(picture, strength, sign)
    assert found.size == picture.size and found.mode == picture.mode
    return np.asarray(found).astype(int)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_operations_keep_size_and_mode_and_do_nothing_at_no_strength(name: str, channels: int) -> None:
    values = RANDOM.integers(40, 200, (30, 40) if channels == 1 else (30, 40, 3)).astype(np.uint8)
    picture = Image.fromarray(values)
    strong = applied(name, picture, 1.0, 1)
    if name not in ("autocontrast", "equalize"):
        assert np.abs(applied(name, picture, 0.0, 1) - values).max() <= 1
    changes = name != "identity" and not (name == "colour" and channels == 1)
    assert (strong != values).any() == changes


def test_operations_against_formulas() -> None:
    values = RANDOM.integers(0, 256, (10, 20)).astype(np.uint8)
    picture = Image.fromarray(values)
    wide = values.astype(int)
    assert np.array_equal(applied("solarize", picture, 0.5, 1), np.where(wide >= 128, 255 - wide, wide))
    assert np.array_equal(applied("posterize", picture, 1.0, 1), wide & 0xF0)
    assert np.abs(applied("brightness", picture, 1.0, -1) - wide * 0.1).max() <= 1
    assert np.abs(applied("brightness", picture, 1.0, 1) - (wide * 1.9).clip(0, 255)).max() <= 1
    mean = round(wide.mean())
    assert np.abs(applied("contrast", picture, 1.0, -1) - (mean + 0.1 * (wide - mean))).max() <= 1.5
    # 150 / 331 of 20 columns at a strength of 0.331 / 1.5: two columns.
    moved = applied("move x", picture, 0.331 / 1.5 * 1.0, 1)
    assert np.array_equal(moved[:, :18], wide[:, 2:]) and not moved[:, 18:].any()
    moved = applied("move y", picture, 0.331 / 1.5, -1)
    assert np.array_equal(moved[1:], wide[:-1]) and not moved[0].any()


def test_a_turned_image_is_turned() -> None:
    """A bar through the middle, by 30 degrees: the direction of most spread says by how much."""
    values = np.zeros((61, 61), np.uint8)
    values[28:33, 10:51] = 255
    for sign in (1, -1):
        y, x = np.nonzero(applied("rotate", Image.fromarray(values), 1.0, sign) > 127)
        spread, axes = np.linalg.eigh(np.cov(x, -y))
        angle = np.degrees(np.arctan(axes[1, spread.argmax()] / axes[0, spread.argmax()]))
        assert angle == pytest.approx(30 * sign, abs=1)


def test_which_operations_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as likely, num_ops of them, and those of shape only where a label is all there is."""
    drawn: list[tuple[str, float, int]] = []

    def recorder(name: str) -> Any:
        def operation(picture: Image.Image, strength: float, sign: int) -> Image.Image:
            drawn.append((name, strength, sign))
            return picture

        return operation

    monkeypatch.setattr(operations, "_COLOURS", [recorder(name) for name in NAMES[:9]])
    monkeypatch.setattr(operations, "_SHAPES", [recorder(name) for name in NAMES[9:]])
    picture = Image.fromarray(np.zeros((4, 4), np.uint8))
    for reshape, names in ((True, NAMES), (False, NAMES[:9])):
        drawn.clear()
        for key in range(1000):
            randaugment(picture, RandAugmentConfig(num_ops=3, magnitude=4), key, reshape=reshape)
        assert len(drawn) == 3000 and {strength for _, strength, _ in drawn} == {0.4}
        counts = np.array([[name for name, _, _ in drawn].count(name) for name in names])
        assert counts.sum() == 3000 and abs(counts - 3000 / len(names)).max() < 5 * (3000 / len(names)) ** 0.5
        assert abs(sum(sign for _, _, sign in drawn)) < 5 * 3000**0.5


def test_randaugment_is_keyed_and_comes_after_the_crop() -> None:
    picture = Image.fromarray(RANDOM.integers(0, 256, (40, 50, 3)).astype(np.uint8))
    augment = AugmentConfig(crop="random_resized", flip=True, randaugment=RandAugmentConfig())
    plain = augment.model_copy(update={"randaugment": None})
    different = 0
    for key in range(50):
        found = pixels(picture, (8, 8), augment, key, reshape=True)
        assert np.array_equal(found, pixels(picture, (8, 8), augment, key, reshape=True))
        assert np.isfinite(found).all() and abs(found).max() <= 1
        different += not np.array_equal(found, pixels(picture, (8, 8), plain, key))
        assert part((40, 50), (8, 8), augment, key) == part((40, 50), (8, 8), plain, key)
        assert mirrored(augment, key) == mirrored(plain, key)
    assert different > 40


def test_sources_may_be_augmented_each_in_its_own_way(shades: str) -> None:
    data = ImageDataset(
        config(
            {"path": shades, "name": "a", "augment": {"mixup": 0.4}},
            {"path": shades, "name": "b"},
            valid=[shades],
        ),
        1,
        DIGITS,
    )
    shares = {"a": [], "b": []}
    for i in range(40):
        s, _ = data.mixture.locate(i)
        shares["ab"[s]].append(data.sample(i)["share"])
    assert all(share < 1 for share in shares["a"]) and all(share == 1 for share in shares["b"])
    with pytest.raises(ValidationError, match="validation takes the centre of the image as it is; remove it"):
        config(shades, valid=[{"path": shades, "augment": {"flip": True}}])
