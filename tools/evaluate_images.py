"""FID, inception-like score, precision, recall and class agreement of a sample set: `triptych evaluate`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from triptych.tools.image_metrics.classifier import TRUSTED_ACCURACY
from triptych.tools.image_metrics.features import Extractor, Measured, measure
from triptych.tools.image_metrics.fid import Statistics, frechet_distance, load_statistics, save_statistics
from triptych.tools.image_metrics.images import ImageSet, holds_images, open_images
from triptych.tools.image_metrics.scores import inception_score, precision_recall
from triptych.tools.render import table_of
from triptych.training.session import versions

if TYPE_CHECKING:
    from rich.console import RenderableType

Progress = Callable[[str], None]

SHOWN = 8
"""Entries of a condition that the table shows; what is longer, as a share for each class, is in the JSON."""


@dataclass(frozen=True)
class Figure:
    """One number and what it depends on beyond the conditions that all figures of a report share."""

    value: float | None
    """None where it could not be had; `conditions["why"]` says why."""
    conditions: dict[str, Any]
    spread: float | None = None
    """Standard deviation over the splits, where there are any."""

    def text(self, form: str) -> str:
        """The number for people."""
        if self.value is None:
            return "-"
        return f"{self.value:{form}}" + ("" if self.spread is None else f" ± {self.spread:{form}}")


@dataclass(frozen=True)
class ImageReport:
    """How near the samples are to the reference, and under which conditions that was found."""

    fid: Figure
    inception_score: Figure
    precision: Figure
    recall: Figure
    class_agreement: Figure
    """Share of the samples that the extractor recognises as the class they were made for."""
    conditions: dict[str, Any]
    """Extractor and hash, both sets, how the samples were drawn, versions and date."""
    warnings: tuple[str, ...]

    def table(self) -> RenderableType:
        """The numbers with their conditions as a rich renderable."""
        names = {
            "fid": ("FID", ".4g"),
            "inception_score": ("inception-like score", ".3f"),
            "precision": ("precision", ".4f"),
            "recall": ("recall", ".4f"),
            "class_agreement": ("recognised as their class", ".1%"),
        }
        rows = []
        for key, (name, form) in names.items():
            figure: Figure = getattr(self, key)
            rows.append([name, figure.text(form), _words(figure.conditions)])
        lines = [
            f"{key}: {_words(value) if isinstance(value, dict) else value}"
            for key, value in self.conditions.items()
        ]
        lines += [f"warning: {warning}" for warning in self.warnings]
        title = f"{self.conditions['samples']['name']} against {self.conditions['reference']['name']}"
        return table_of(title, ["figure", "value", "from"], rows, caption="\n".join(lines))

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        figures = ("fid", "inception_score", "precision", "recall", "class_agreement")
        return {
            **{key: _figure_json(getattr(self, key)) for key in figures},
            "conditions": self.conditions,
            "warnings": list(self.warnings),
        }


def _figure_json(figure: Figure) -> dict[str, Any]:
    spread = {} if figure.spread is None else {"spread": figure.spread}
    return {"value": figure.value, **spread, "conditions": figure.conditions}


def _words(conditions: dict[str, Any]) -> str:
    """{"a": 1, "b": {"c": 2}} -> "a 1, b c 2"; hashes are cut, and what is long is left to the JSON."""
    shown = []
    for key, value in conditions.items():
        name = key.replace("_", " ")
        if isinstance(value, dict):
            if 0 < len(value) <= SHOWN:
                shown.append(f"{name} {_words(value)}")
        elif not isinstance(value, list | tuple) or len(value) <= SHOWN:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            shown.append(f"{name} {text[:12] if key.endswith('sha256') else text}")
    return ", ".join(shown)


@dataclass(frozen=True)
class _Reference:
    """What a figure can be compared with: images, statistics of them, or both."""

    name: str
    images: ImageSet | None
    statistics: Statistics | None


def compare_samples(
    samples: str | Path | ImageSet,
    reference: str | Path | ImageSet,
    extractor: Extractor,
    *,
    batch_size: int = 128,
    splits: int = 10,
    neighbours: int = 3,
    neighbour_limit: int = 50_000,
    progress: Progress | None = None,
) -> ImageReport:
    """Compare a set of samples with real images, by the features of `extractor`.

    samples, reference: an .npz (`arr_0` uint8 (N, H, W, C), labels in `arr_1`), a directory of PNG files, or
    an ImageSet (`array_images` makes one). The reference may also be an .npz of statistics (`mu`, `sigma`),
    by `write_reference` or ADM's; from statistics alone there are no precision and recall.
    splits: of the inception-like score. neighbours: k of precision and recall, which use at most
    `neighbour_limit` images of each set.
    Raises ValueError for sets that cannot be read, do not suit the extractor or each other, and for
    statistics of another extractor.
    """
    say = progress or (lambda line: None)
    ours = samples if isinstance(samples, ImageSet) else open_images(samples)
    theirs = _open_reference(reference, extractor)
    if theirs.images and theirs.images.shape[2] != ours.shape[2]:
        raise ValueError(
            f"{ours.name} has {ours.shape[2]} channels and {theirs.name} {theirs.images.shape[2]}; "
            "compare sets of the same kind of image"
        )

    def seen(images: ImageSet) -> Measured:
        say(f"{images.name}: {images.count} images of {'x'.join(map(str, images.shape))}")
        return measure(images, extractor, batch_size=batch_size, keep=neighbour_limit, progress=progress)

    made = seen(ours)
    real = seen(theirs.images) if theirs.images else None
    say("comparing")
    precision, recall = _precision_recall(made, real, neighbours)
    conditions = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "extractor": extractor.conditions(),
        "samples": _described(ours, made),
        "reference": {"name": theirs.name}
        | (_described(theirs.images, real) if theirs.images and real else {}),
        "sampling": ours.settings,
        "versions": versions(),
    }
    return ImageReport(
        fid=_fid(made, real, theirs.statistics, extractor),
        inception_score=_inception_score(made, splits),
        precision=precision,
        recall=recall,
        class_agreement=_class_agreement(ours, made, theirs.images, real, extractor),
        conditions=conditions,
        warnings=tuple(_warnings(ours, made, theirs, real, extractor)),
    )


def write_reference(
    path: Path,
    images: str | Path | ImageSet,
    extractor: Extractor,
    *,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> None:
    """Write mean and covariance of a set's features to the .npz `path`, to be a reference many times."""
    found = images if isinstance(images, ImageSet) else open_images(images)
    measured = measure(found, extractor, batch_size=batch_size, keep=0, progress=progress)
    if measured.gaussian is None:
        raise ValueError(f"{found.name} holds one image; statistics need 2 or more")
    save_statistics(path, measured.gaussian, extractor.identity)


def _open_reference(reference: str | Path | ImageSet, extractor: Extractor) -> _Reference:
    """A file with images and statistics of another extractor, as ADM's, serves by its images."""
    if isinstance(reference, ImageSet):
        return _Reference(reference.name, reference, None)
    path = Path(reference).expanduser()
    if not path.exists():
        raise ValueError(f"the reference {path} does not exist; give an .npz or a directory of PNG files")
    statistics = None if path.is_dir() else load_statistics(path)
    images = open_images(path) if statistics is None or holds_images(path) else None
    if statistics is None:
        return _Reference(str(path), images, None)
    named = statistics.extractor
    if named == extractor.identity or (named is None and extractor.reads_adm_statistics):
        return _Reference(str(path), images, statistics)
    if images is None:
        origin = (
            f"were made with {named}" if named else "name no extractor, so they are taken as TensorFlow's"
        )
        raise ValueError(
            f"the statistics in {path} {origin}, and this extractor is {extractor.identity}: their distance "
            "means nothing; give the images themselves, or statistics made with this extractor"
        )
    return _Reference(str(path), images, None)


def _fid(
    made: Measured, real: Measured | None, statistics: Statistics | None, extractor: Extractor
) -> Figure:
    gaussian = statistics.gaussian if statistics else real.gaussian if real else None
    count = gaussian.count if gaussian else None
    conditions = {
        "samples": made.count,
        "reference": "a file that does not say" if count is None else count,
        "features": extractor.feature_size,
    }
    if made.gaussian is None or gaussian is None:
        return Figure(None, {"why": "one image has no covariance"})
    return Figure(frechet_distance(made.gaussian, gaussian), conditions)


def _inception_score(made: Measured, splits: int) -> Figure:
    splits = min(splits, made.count)
    score, spread = inception_score(made.probabilities, splits)
    return Figure(score, {"samples": made.count, "splits": splits}, spread)


def _precision_recall(made: Measured, real: Measured | None, neighbours: int) -> tuple[Figure, Figure]:
    if real is None:
        nothing = Figure(None, {"why": "the reference is statistics without images"})
        return nothing, nothing
    conditions = {"samples": len(made.features), "reference": len(real.features), "k": neighbours}
    if min(len(made.features), len(real.features)) <= neighbours:
        nothing = Figure(None, {**conditions, "why": f"more than k={neighbours} images of each are needed"})
        return nothing, nothing
    precision, recall = precision_recall(real.features, made.features, neighbours)
    return Figure(precision, conditions), Figure(recall, conditions)


def _class_agreement(
    ours: ImageSet, made: Measured, theirs: ImageSet | None, real: Measured | None, extractor: Extractor
) -> Figure:
    """With the same share of the reference's own images beside it, which samples should come near."""
    if not extractor.knows_labels:
        return Figure(None, {"why": "the extractor's classes are not the data's labels"})
    if ours.labels is None:
        return Figure(None, {"why": "the samples carry no labels"})
    right = made.recognised(ours.labels)
    numbers = np.unique(ours.labels)
    conditions: dict[str, Any] = {
        "samples": made.count,
        "classes": len(numbers),
        "per_class": {str(number): float(right[ours.labels == number].mean()) for number in numbers},
    }
    if theirs is not None and real is not None and theirs.labels is not None:
        conditions["of_reference"] = float(real.recognised(theirs.labels).mean())
    return Figure(float(right.mean()), conditions)


def _described(images: ImageSet, measured: Measured) -> dict[str, Any]:
    """A set as conditions."""
    height, width, channels = images.shape
    described: dict[str, Any] = {
        "name": images.name,
        "images": images.count,
        "shape": f"{height}x{width}x{channels}",
        "pixels_sha256": measured.pixels_sha256,
    }
    if images.left_out:
        described["left_out"] = images.left_out
    if images.labels is not None:
        numbers, counts = np.unique(images.labels, return_counts=True)
        described |= {"classes": len(numbers), "fewest_of_a_class": int(counts.min())}
        described["most_of_a_class"] = int(counts.max())
    return described


def _warnings(
    ours: ImageSet, made: Measured, theirs: _Reference, real: Measured | None, extractor: Extractor
) -> list[str]:
    """What makes the figures less than they look."""
    found = []
    size = extractor.feature_size
    behind = theirs.statistics.gaussian.count if theirs.statistics else real.count if real else None
    for name, count in (("samples", made.count), ("reference images", behind)):
        if count is not None and count <= size:
            found.append(
                f"{count} {name} for {size} features: their covariance is singular and FID far too high; "
                "use several times as many images as features"
            )
    if theirs.images and theirs.images.shape[:2] != ours.shape[:2]:
        found.append(f"samples and reference differ in size, {ours.shape[:2]} and {theirs.images.shape[:2]}")
    if ours.settings is None:
        found.append("no sampler settings (a JSON file beside the samples): the numbers cannot be made again")
    accuracy = extractor.conditions().get("accuracy", math.nan)
    if accuracy < TRUSTED_ACCURACY:
        found.append(
            f"the classifier recognises {accuracy:.1%} of held-out real images only; train a better one"
        )
    return found
