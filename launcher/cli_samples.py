"""`triptych sample` and `triptych evaluate`, for whichever family a run trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from triptych.launcher.cli_common import Device, DryRun, Json, show, to_stderr

Run = Annotated[Path, typer.Argument(help="A run directory (its newest checkpoint) or a checkpoint.")]


def sample(
    path: Run,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given again.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens to add, at most (128).")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token (0.8).")] = None,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Choose among the likeliest tokens of this mass.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json; default: the run's own.")] = None,
    num: Annotated[int | None, typer.Option(help="Images to draw (64).")] = None,
    labels: Annotated[str | None, typer.Option(help="Classes in turn, as 0,3,7; default: all.")] = None,
    texts: Annotated[Path | None, typer.Option(help="A .npy of embedded texts, taken in turn.")] = None,
    method: Annotated[str | None, typer.Option(help="euler, heun, ddim, ddpm or sde.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps from noise to image.")] = None,
    eta: Annotated[float | None, typer.Option(help="Noise of ddim, 0 to 1.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Scale of classifier-free guidance; 1: none.")
    ] = None,
    interval: Annotated[str | None, typer.Option(help="Guidance acts at t in LOW,HIGH (0 is data).")] = None,
    channels: Annotated[int | None, typer.Option(help="Guidance acts on the first so many channels.")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH other than the model's (rope).")] = None,
    ema: Annotated[
        bool | None, typer.Option("--ema/--no-ema", help="Averaged parameters; default: if there are any.")
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="AutoencoderKL that decodes latents.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images at a time on each worker (32).")] = None,
    workers: Annotated[int | None, typer.Option(help="Ray workers that draw; 1 without Ray.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join, as cluster.address.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the images; default: in the run's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same samples (0).")] = None,
    device: Device = "cpu",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Let a language model continue text, or a diffusion model draw images.

    \b
    triptych sample runs/demo --prompt "def __init__(self" --prompt "import os"
    triptych sample runs/demo --prompt "class" --temperature 0 --max-new-tokens 32
    triptych sample runs/digits --num 100 --steps 25 --guidance 1.5
    triptych sample runs/fit --size 40x24 --method heun --workers 2 --out samples

    Images go to samples.png (a grid), samples.npz (arr_0 uint8, as ADM's evaluator reads it) and
    samples.json (how they were drawn).
    """
    from triptych.tools.trained import family_of

    of_text = {
        "prompts": prompt,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "tokenizer": tokenizer,
    }
    of_images = {
        "num": num,
        "labels": labels,
        "texts": texts,
        "method": method,
        "steps": steps,
        "eta": eta,
        "guidance": guidance,
        "interval": interval,
        "channels": channels,
        "size": size,
        "ema": ema,
        "vae": vae,
        "batch_size": batch_size,
        "workers": workers,
        "address": address,
        "out": out,
    }
    family = family_of(path)
    if family == "lm":
        _refuse(of_images | {"dry_run": dry_run or None}, "diffusion", family)
        _sample_text(path, {**of_text, "seed": seed}, device, as_json)
        return
    _refuse(of_text, "lm", family)
    from triptych.launcher.ray_sample import sample as run

    show(run(path, **_image_options(of_images, seed), device=device, dry_run=dry_run), as_json)


def evaluate(
    path: Annotated[
        Path, typer.Argument(help="A run directory, a checkpoint, or (with --reference) a set of images.")
    ],
    samples: Annotated[
        int | None, typer.Option(help="Validation sequences, or images to draw (500); default: the run's.")
    ] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Text: also a bigram model, on the same targets.")
    ] = False,
    batch_size: Annotated[int | None, typer.Option(help="Sequences (8) or images (32) at a time.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Real images: .npz or directory; default: the run's validation data.")
    ] = None,
    extractor: Annotated[
        str | None, typer.Option(help="classifier (trained on the run's images), or inception:FILE.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Sampler of the images: euler, heun, ...")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of classifier-free guidance.")] = None,
    workers: Annotated[int | None, typer.Option(help="Ray workers that draw; 1 without Ray.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the images' noise (0).")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Validation loss of a language model; FID, precision, recall and recognised share of images; top-1, mIoU
    and mAP of a vision model's tasks.

    \b
    triptych evaluate runs/demo --baseline
    triptych evaluate runs/demo/checkpoints/step-00000100 --samples 256 --json
    triptych evaluate runs/digits --samples 500
    triptych evaluate runs/vision
    triptych evaluate samples.npz --reference VIRTUAL_imagenet256.npz --extractor inception:weights.pth
    """
    from triptych.tools.trained import family_of

    drawing = {
        "method": method,
        "steps": steps,
        "guidance": guidance,
        "workers": workers,
        "batch_size": batch_size,
    }
    if path.suffix == ".npz" or (path.is_dir() and any(path.glob("*.png"))):
        _refuse(drawing | {"samples": samples, "baseline": baseline or None, "seed": seed}, "run", "images")
        _compare_sets(path, reference, extractor, device, as_json)
        return
    family = family_of(path)
    if family == "lm":
        of_images = {**drawing, "reference": reference, "extractor": extractor, "seed": seed}
        _refuse({**of_images, "batch_size": None}, "diffusion", family)
        from triptych.tools.evaluate import evaluate as run

        report = run(
            path,
            samples=samples,
            baseline=baseline,
            batch_size=8 if batch_size is None else batch_size,
            device=device,
            progress=to_stderr,
        )
        show(report, as_json)
        return
    _refuse({"baseline": baseline or None}, "lm", family)
    if family == "vision":
        _refuse(
            {**drawing, "batch_size": None, "reference": reference, "extractor": extractor, "seed": seed},
            "diffusion",
            family,
        )
        from triptych.tools.evaluate_vision import evaluate_vision

        size = 32 if batch_size is None else batch_size
        vision = evaluate_vision(path, samples=samples, batch_size=size, device=device, progress=to_stderr)
        show(vision, as_json)
        return
    from triptych.launcher.ray_sample import sample as draw
    from triptych.tools.evaluate_run import CLASSIFIER, evaluate_run

    options = _image_options({**drawing, "num": samples or 500}, seed)
    drawn = draw(path, **options, device=device)
    show(
        evaluate_run(
            path,
            drawn.files["samples"],
            extractor=extractor or CLASSIFIER,
            reference=reference,
            device=device,
            progress=to_stderr,
        ),
        as_json,
    )


def _sample_text(path: Path, options: dict[str, Any], device: str, as_json: bool) -> None:
    from triptych.tools.sample import sample as run

    given = {name: value for name, value in options.items() if value is not None}
    texts = run(path, **{"prompts": [""], **given}, device=device)
    if as_json:
        typer.echo(json.dumps(texts))
        return
    for number, continuation in enumerate(texts):
        typer.echo(("" if number == 0 else "-" * 40 + "\n") + continuation)


def _compare_sets(
    path: Path, reference: Path | None, extractor: str | None, device: str, as_json: bool
) -> None:
    from triptych.tools.evaluate_images import compare_samples
    from triptych.tools.evaluate_run import CLASSIFIER, build_extractor

    if reference is None:
        raise ValueError(f"{path} is a set of images; give real ones to compare it with by --reference")
    eyes = build_extractor(extractor or CLASSIFIER, None, None, device, to_stderr)
    show(compare_samples(path, reference, eyes, progress=to_stderr), as_json)


def _image_options(given: dict[str, Any], seed: int | None) -> dict[str, Any]:
    """Options of the command line as `sample_images` takes them."""
    given = {name: value for name, value in given.items() if value is not None}
    sampler: dict[str, Any] = {name: given.pop(name) for name in ("method", "steps", "eta") if name in given}
    guidance: dict[str, Any] = {}
    if "guidance" in given:
        guidance["scale"] = given.pop("guidance")
    if "interval" in given:
        guidance["interval"] = _numbers("--interval", given.pop("interval"), float, 2)
    if "channels" in given:
        guidance["channels"] = given.pop("channels")
    if guidance:
        sampler["guidance"] = guidance
    if seed is not None:
        sampler["seed"] = seed
    if "labels" in given:
        given["labels"] = _numbers("--labels", given["labels"], int)
    if "size" in given:
        from triptych.launcher.corpora import size_of

        given["size"] = size_of(given["size"])
    return {**given, "sampler": sampler}


def _numbers(option: str, text: str, kind: type[int] | type[float], count: int | None = None) -> list[Any]:
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} {text!r} is not a list of numbers such as 0,1") from error
    if count is not None and len(values) != count:
        raise ValueError(f"{option} {text!r} has {len(values)} numbers; give {count}")
    return values


def _refuse(options: dict[str, Any], belongs: str, family: str) -> None:
    """Raises ValueError for an option of another family than the run's."""
    wrong = [f"--{name.rstrip('s') if name == 'prompts' else name.replace('_', '-')}"
             for name, value in options.items() if value]  # fmt: skip
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)} belongs to family {belongs}, and this is of family {family}; leave it out"
        )
