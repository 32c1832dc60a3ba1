"""`triptych data coco`: boxes of COCO's JSON, by category and image, become those of the shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych.data_pipeline import CocoOptions, ImageNeeds, ImageValidation, TaskNeeds, build_coco
from triptych.data_pipeline.images.description import Description
from triptych.data_pipeline.images.shards import Shards, find_shards
from triptych.data_pipeline.images.writing import ImageReport

from .samples import config, png

CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
RANDOM = np.random.default_rng(0)


def box(image: int, category: int, bbox: Any, **more: Any) -> dict[str, Any]:
    return {"id": 0, "image_id": image, "category_id": category, "bbox": bbox, **more}


BOXES = [
    box(7, 18, [1, 2, 3, 4]),
    box(7, 1, [5.5, 0, 10, 3.25], iscrowd=0),
    box(7, 3, [0, 0, 8, 6], iscrowd=1),
    box(9, 3, [-2, -3, 5, 100]),
    box(9, 3, [8, 0, 4, 4]),
    box(9, 3, [1, 1, 0, 4]),
    box(9, 1, [1, 1, -3, 4]),
    box(9, 1, [1, 1, 3]),
    box(9, 1, [1, 1, float("nan"), 2]),
]


def write(root: Path, name: str = "train", **changes: Any) -> tuple[str, str]:
    """Images of 6 x 8, ids 7, 9 and 11, the last without boxes; the directory and the JSON file."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for number in (7, 9, 11):
        (folder / f"{number:03d}.png").write_bytes(png(RANDOM.integers(0, 256, (6, 8, 3))))
    images = [{"id": n, "file_name": f"{n:03d}.png", "height": 6, "width": 8} for n in (9, 7, 11)]
    content = {"images": images, "annotations": BOXES, "categories": CATEGORIES, "info": {}, **changes}
    file = root / f"{name}.json"
    file.write_text(json.dumps(content))
    return str(folder), str(file)


def build(root: Path, paths: tuple[str, str], out: str = "out", **options: Any) -> ImageReport:
    values = {
        "images": paths[0],
        "annotations": paths[1],
        "out": str(root / out),
        "valid_share": 0.0,
        **options,
    }
    return build_coco(CocoOptions.model_validate(values))


def contents(directory: Path) -> dict[bytes, list[dict[str, Any]]]:
    shards = Shards(find_shards(str(directory)))
    read = [shards.read(n) for n in range(len(shards))]
    return {members["png"]: json.loads(members["boxes.json"]) for members in read}


def test_boxes_become_corners_in_the_image(tmp_path: Path) -> None:
    paths = write(tmp_path)
    report = build(tmp_path, paths)
    assert report.manifest.splits == {"train": 3} and report.manifest.bad_count == 0
    found = contents(tmp_path / "out" / "train")
    by_id = {n: found[(Path(paths[0]) / f"{n:03d}.png").read_bytes()] for n in (7, 9, 11)}
    assert by_id[7] == [{"box": [1, 2, 4, 6], "label": 2}, {"box": [5.5, 0, 8, 3.25], "label": 0}]
    assert by_id[9] == [{"box": [0, 0, 3, 6], "label": 1}] and by_id[11] == []
    assert report.manifest.dropped == {
        "boxes of crowds": 1,
        "boxes outside their image or of no area": 3,
        "boxes that are no four finite numbers": 2,
    }
    assert "left out: 3 boxes outside their image or of no area" in report.summary()
    told = Description.read(tmp_path / "out" / "train")
    assert told.classes == ("person", "car", "dog") and told.size == (6, 8) and told.count == 3
    assert build(tmp_path, paths).reused
    needs = ImageNeeds(tasks={"coco": TaskNeeds("detect", 0, num_classes=3)})
    data = config(
        str(tmp_path / "out" / "train"),
        valid=[str(tmp_path / "out" / "train")],
        channels=3,
        image_size=[6, 8],
    )
    rows = [ImageValidation(data, needs).sample(i) for i in range(3)]
    kept = sorted(each["label"] for boxes in by_id.values() for each in boxes)
    assert sorted(label for row in rows for label in row["box_labels"] if label >= 0) == kept


def test_two_splits(tmp_path: Path) -> None:
    train = write(tmp_path)
    valid = write(tmp_path, "val", annotations=[box(11, 1, [0, 0, 2, 2])])
    report = build(tmp_path, train, valid_images=valid[0], valid_annotations=valid[1])
    assert report.manifest.splits == {"train": 3, "valid": 3}
    found = contents(tmp_path / "out" / "valid")
    assert sorted(map(len, found.values())) == [0, 0, 1]
    other = write(tmp_path, "other", categories=CATEGORIES[:2], annotations=[])
    with pytest.raises(ValueError, match=r"other.json has other categories than .*train.json"):
        build(tmp_path, train, "else", valid_images=other[0], valid_annotations=other[1])
    with pytest.raises(ValueError, match="go together; give both or neither"):
        build(tmp_path, train, "else", valid_images=other[0])


def test_images_that_cannot_serve_are_counted(tmp_path: Path) -> None:
    paths = write(tmp_path)
    folder = Path(paths[0])
    (folder / "007.png").unlink()
    (folder / "009.png").write_bytes(png(np.zeros((8, 6, 3))))
    report = build(tmp_path, paths)
    assert report.manifest.splits == {"train": 1} and report.manifest.bad_count == 2
    told = sorted(report.manifest.bad)
    assert told[0].startswith("007.png: is missing (") and told[1].startswith(
        "009.png: has height and width [8, 6]"
    )
    with pytest.raises(ValueError, match="2 inputs cannot be used, more than max_bad_samples=1"):
        build(tmp_path, paths, "strict", max_bad_samples=1)
    assert not (tmp_path / "strict").exists()
    (folder / "007.png").write_bytes(png(np.zeros((6, 8, 3))))
    assert build(tmp_path, paths).manifest.splits == {"train": 2}, "an input has changed"
    for path in folder.iterdir():
        path.write_bytes(b"torn")
    with pytest.raises(ValueError, match="none of 3 images can be used for training"):
        build(tmp_path, paths, "torn")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"images": []}, "lists no images, no categories, or an id of those twice"),
        ({"categories": []}, "category_id=18 is none of its categories"),
        ({"categories": [*CATEGORIES, {"id": 3, "name": "van"}]}, "an id of those twice"),
        ({"annotations": [box(8, 1, [0, 0, 1, 1])]}, "has boxes of image 8, which its images do not list"),
        ({"annotations": [box(7, 2, [0, 0, 1, 1])]}, "category_id=2 is none of its categories"),
        (
            {"annotations": [{"image_id": 7}]},
            r"cannot be read as COCO's instances \(KeyError: 'category_id'\)",
        ),
        ({"images": [{"id": 7}]}, r"cannot be read as COCO's instances \(KeyError: 'file_name'\)"),
        ({"categories": None}, "cannot be read as COCO's instances"),
    ],
)
def test_files_of_another_format(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        build(tmp_path, write(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    paths = write(tmp_path)
    with pytest.raises(ValueError, match=r"images=.*nowhere is no directory"):
        build(tmp_path, (str(tmp_path / "nowhere"), paths[1]))
    with pytest.raises(ValueError, match=r"annotations=.*nowhere.json cannot be read .*FileNotFoundError"):
        build(tmp_path, (paths[0], str(tmp_path / "nowhere.json")))
    Path(paths[1]).write_text("[1, 2")
    with pytest.raises(ValueError, match=r"cannot be read as COCO's instances \(JSONDecodeError"):
        build(tmp_path, paths)
