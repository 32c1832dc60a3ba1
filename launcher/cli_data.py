"""`triptych data`: corpora of text, shards of images and latents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from triptych.launcher.cli_common import Device, Json

app = typer.Typer(help="Make corpora and shards.", no_args_is_help=True, rich_markup_mode=None)
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what was made with other options.")]
PerShard = Annotated[int, typer.Option(help="Images of a shard.")]
MaxBad = Annotated[int, typer.Option(help="Files that cannot be used that may be left out.")]


@app.command()
def text(
    out: Annotated[Path, typer.Option(help="Directory of the corpus.")],
    source: Annotated[
        list[str] | None,
        typer.Option(help="stdlib, or a file or directory of text, JSONL or Parquet; may be given again."),
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Vocabulary of the byte-level BPE to train.")] = 512,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer.json to use in place of training one.")
    ] = None,
    valid_share: Annotated[
        float, typer.Option(help="Share of the documents held out for validation.")
    ] = 0.05,
    jsonl_key: Annotated[str, typer.Option(help="Key of a JSON line that holds the document.")] = "text",
    parquet_column: Annotated[
        str, typer.Option(help="Column of a Parquet file that holds the documents.")
    ] = "text",
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse bad documents instead of counting them.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes that tokenize; default: one per core.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a corpus made with other options.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a corpus (Megatron .bin/.idx) and its tokenizer from text; a complete one is reused.

    \b
    triptych data text --source stdlib --vocab-size 512 --out data/stdlib-512
    triptych data text --source notes/ --source more.jsonl --tokenizer tokenizer.json --out data/mine
    """
    from triptych.launcher import corpora

    options = {
        "source": source or ["stdlib"],
        "out": str(out),
        "vocab_size": vocab_size,
        "tokenizer": str(tokenizer) if tokenizer else None,
        "valid_share": valid_share,
        "jsonl_key": jsonl_key,
        "parquet_column": parquet_column,
        "strict": strict,
        "workers": workers,
        "overwrite": overwrite,
    }
    corpora.text_corpus(options, as_json=as_json)


@app.command()
def digits(
    task: Annotated[
        str,
        typer.Option(help="classify: single digits; detect, segment: several to an image, boxes or masks."),
    ] = "classify",
    out: Annotated[
        Path | None, typer.Option(help="Directory of the shards; default: data/digits, data/digits-TASK.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Edge of the images in pixels; default: 8, or 32 for several digits.")
    ] = None,
    train_images: Annotated[int, typer.Option(help="Images of several digits to train on.")] = 3000,
    valid_images: Annotated[int, typer.Option(help="Images of several digits held out.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the images of several digits.")] = 0,
    shards: Annotated[int, typer.Option(help="Shards of the training split.")] = 4,
    valid_share: Annotated[float, typer.Option(help="Share of each class held out.")] = 0.2,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """scikit-learn's 1,797 handwritten digits as image shards; complete ones are reused.

    \b
    triptych data digits --out data/digits
    triptych data digits --size 32 --out data/digits-32
    triptych data digits --task detect --out data/digits-detect
    triptych data digits --task segment --out data/digits-segment
    """
    from triptych.launcher import corpora

    options: dict[str, Any] = {"task": task, "train_images": train_images, "valid_images": valid_images}
    options |= {"seed": seed, "shards": shards, "valid_share": valid_share, "overwrite": overwrite}
    options |= {"out": str(out)} if out is not None else {}
    options |= {"size": size} if size is not None else {}
    corpora.images("digits", options, as_json=as_json)


@app.command()
def images(
    source: Annotated[Path, typer.Option(help="Directory with a subdirectory of images per class.")],
    out: Annotated[Path, typer.Option(help="Directory of the shards.")],
    samples_per_shard: PerShard = 1000,
    valid_share: Annotated[float, typer.Option(help="Share held out where source has no valid/.")] = 0.05,
    max_bad_samples: MaxBad = 100,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Shards of a folder of images, ImageNet-style.

    \b
    triptych data images --source imagenet/train --out data/imagenet
    """
    from triptych.launcher import corpora

    options = {"source": str(source), "out": str(out), "samples_per_shard": samples_per_shard}
    options |= {"valid_share": valid_share, "max_bad_samples": max_bad_samples, "overwrite": overwrite}
    corpora.images("images", options, as_json=as_json)


@app.command()
def coco(
    images: Annotated[Path, typer.Option(help="Directory of the image files.")],
    annotations: Annotated[Path, typer.Option(help="Their instances JSON, of COCO's format.")],
    out: Annotated[Path, typer.Option(help="Directory of the shards.")],
    valid_images: Annotated[Path | None, typer.Option(help="Directory of those for validation.")] = None,
    valid_annotations: Annotated[Path | None, typer.Option(help="Their instances JSON.")] = None,
    samples_per_shard: PerShard = 1000,
    valid_share: Annotated[float, typer.Option(help="Or: share held out of the others.")] = 0.05,
    max_bad_samples: MaxBad = 100,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Shards of images with boxes, from COCO's JSON.

    \b
    triptych data coco --images train2017 --annotations instances_train2017.json \\
        --valid-images val2017 --valid-annotations instances_val2017.json --out data/coco
    """
    from triptych.launcher import corpora

    options: dict[str, Any] = {"images": str(images), "annotations": str(annotations), "out": str(out)}
    options |= {"valid_images": _path(valid_images), "valid_annotations": _path(valid_annotations)}
    options |= {"samples_per_shard": samples_per_shard, "valid_share": valid_share}
    options |= {"max_bad_samples": max_bad_samples, "overwrite": overwrite}
    corpora.images("coco", options, as_json=as_json)


@app.command()
def masks(
    images: Annotated[Path, typer.Option(help="Directory of the image files.")],
    masks: Annotated[
        Path, typer.Option(help="Directory of PNG files of the same names, a class id per pixel.")
    ],
    out: Annotated[Path, typer.Option(help="Directory of the shards.")],
    valid_images: Annotated[Path | None, typer.Option(help="Directory of those for validation.")] = None,
    valid_masks: Annotated[Path | None, typer.Option(help="Directory of their masks.")] = None,
    samples_per_shard: PerShard = 1000,
    valid_share: Annotated[float, typer.Option(help="Or: share held out of the others.")] = 0.05,
    max_bad_samples: MaxBad = 100,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Shards of images with masks of classes, grey or palette; 255 is ignored in training.

    \b
    triptych data masks --images ade/images/training --masks ade/annotations/training --out data/ade
    """
    from triptych.launcher import corpora

    options: dict[str, Any] = {"images": str(images), "masks": str(masks), "out": str(out)}
    options |= {"valid_images": _path(valid_images), "valid_masks": _path(valid_masks)}
    options |= {"samples_per_shard": samples_per_shard, "valid_share": valid_share}
    options |= {"max_bad_samples": max_bad_samples, "overwrite": overwrite}
    corpora.images("masks", options, as_json=as_json)


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)


@app.command()
def latents(
    source: Annotated[Path, typer.Option(help="Directory of image shards, or of splits of them.")],
    vae: Annotated[Path, typer.Option(help="Directory of diffusers' AutoencoderKL.")],
    out: Annotated[Path, typer.Option(help="Directory of the shards.")],
    vae_id: Annotated[str | None, typer.Option(help="Its name in the shards; default: of its path.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels each way of what is encoded.")] = None,
    sizes: Annotated[
        list[str] | None, typer.Option(help="Or HEIGHTxWIDTH between which each image chooses; again.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Or: own aspect ratio, at most so many squares of --multiple.")
    ] = None,
    multiple: Annotated[int, typer.Option(help="With --max-tokens: multiples of so many pixels.")] = 16,
    dtype: Annotated[str, typer.Option(help="float16 or float32, of what is stored.")] = "float16",
    batch_size: Annotated[int, typer.Option(help="Images encoded at a time.")] = 8,
    device: Device = "cpu",
    samples_per_shard: Annotated[int, typer.Option(help="Latents of a shard.")] = 1000,
    max_bad_samples: Annotated[int, typer.Option(help="Unreadable samples that may be left out.")] = 100,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Latents of image shards, mean and standard deviation, by diffusers' autoencoder (triptych[hf]).

    \b
    triptych data latents --source data/imagenet --vae vae/ --image-size 256 --out data/latents
    """
    from triptych.launcher import corpora

    options: dict[str, Any] = {
        "source": str(source),
        "vae": str(vae),
        "out": str(out),
        "vae_id": vae_id,
        "image_size": image_size,
        "sizes": [corpora.size_of(text) for text in sizes] if sizes else None,
        "max_tokens": max_tokens,
        "multiple": multiple,
        "dtype": dtype,
        "batch_size": batch_size,
        "device": device,
        "samples_per_shard": samples_per_shard,
        "max_bad_samples": max_bad_samples,
        "overwrite": overwrite,
    }
    corpora.images("latents", options, as_json=as_json)
