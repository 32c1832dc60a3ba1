"""Denoising: noise is laid over images, and the model says what is beneath it.

Shape legend: B samples (or rows of packed images), G images of a row, T tokens, C channels, P patch edge.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels import hash_uniform
from triptych.models.diffusion_config import DiffusionConfig
from triptych.training.objectives import variational
from triptych.training.objectives.config import ObjectiveConfig, TreadConfig
from triptych.training.objectives.draws import (
    Rows,
    image_noise,
    kept_packed_tokens,
    kept_tokens,
    stream,
    token_noise,
)
from triptych.training.objectives.paths import DDPMPath, build_path
from triptych.training.objectives.predictions import Prediction, from_output, to_output
from triptych.training.objectives.protocol import Batch
from triptych.training.objectives.times import draw_times
from triptych.training.objectives.weighting import error_weight

NOISE = "objective.noise"


class DiffusionObjective:
    """The squared error of what train.objective.predict names, averaged over the valid images.

    An image's error is the mean over its elements, times a weight by its time. With learn_sigma the
    variational bound of the variance is added, in bits per element and divided by 1000 / steps as its paper
    does; it does not act on the mean.

    Draws are functions of the images' keys, computed in float64 and then cast: times and noise, whose label
    or text is dropped (the label becomes num_classes, the text all zeros, of which the model's projection
    makes its learned bias), and which tokens TREAD keeps.
    """

    def __init__(
        self, config: ObjectiveConfig, model: DiffusionConfig, tread: TreadConfig | None = None
    ) -> None:
        """Raises ValueError where the three sections do not go together."""
        check(config, model, tread)
        self.config = config
        self.model = model
        self.tread = tread
        self.path = build_path(config)
        self.metric_names: tuple[str, ...] = ("mse", "vlb") if config.learn_sigma else ("mse",)

    def prepare(self, batch: Batch, step: int, training: bool = True) -> tuple[Batch, dict[str, Tensor]]:
        """Noised inputs, and what the model should say.

        batch: x (B, C, *space) and sample_keys, valid (B,), labels (B,), text (B, L, E); or packed tokens
            x (B, T, C P P) with positions, document_ids, sizes, image_keys, valid and labels (B, G).
        Returns the batch with x noised, `times` as the model's embedding wants them, labels or text with some
        dropped (in training) and, in training with TREAD, `kept` (the tokens that stay) and `routed` (the
        blocks that the others go around). Raises ValueError for wrong channels, a size that the patch does
        not divide, a missing or unknown label.
        """
        rows = _rows(batch)
        self._check_shape(batch["x"], rows)
        keys = batch["sample_keys"] if rows is None else batch["image_keys"]
        valid = batch["valid"]
        x = batch["x"]
        x0 = x.double().masked_fill(~_per_element(valid, x, rows), 0.0)
        if rows is None:
            noise = image_noise(keys, tuple(x.shape[1:]), NOISE)
        else:
            noise = token_noise(keys, rows, self.model.in_channels, self.model.patch_size, NOISE)
        times = draw_times(self.config.times, self.path, keys)
        t = _per_element(times, x, rows, padding=0.5)
        at = self.path.at(t)
        noised = (self.path.input_scale(t) * (at.alpha * x0 + at.sigma * noise)).to(x.dtype)
        inputs = {
            name: value for name, value in batch.items() if name not in ("labels", "text", "image_keys")
        }
        inputs |= {"x": noised, "times": self.path.embed(times).to(x.dtype)}
        inputs |= self._conditioning(batch, keys, valid, training)
        if training and self.tread is not None:
            inputs["kept"] = self._kept(batch, keys, rows)
            inputs["routed"] = (self.tread.start, self.tread.end)
        return inputs, self._targets(x0, noise, t, times, valid, noised, rows)

    def count(self, targets: dict[str, Tensor]) -> Tensor:
        """Valid images."""
        return targets["valid"].sum()

    def loss(self, outputs: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum over the valid images, in float32 at least; metrics mse (without weights) and vlb."""
        wide = outputs if outputs.dtype == torch.float64 else outputs.float()
        mean, variance = self._split(wide, targets)
        # The score is compared after multiplication by sigma, which keeps it finite at the data.
        scaled = mean * targets["scale"] if "scale" in targets else mean
        error = _image_means((scaled - targets["value"]).square(), targets)
        valid = targets["valid"]
        weighted = error * targets["weight"]
        metrics = {"mse": torch.where(valid, error, 0.0).sum()}
        if variance is not None:
            vlb = _image_means(self._bound(mean, variance, targets), targets)
            weighted = weighted + vlb
            metrics["vlb"] = torch.where(valid, vlb, 0.0).sum()
        return torch.where(valid, weighted, 0.0).sum(), self.count(targets), metrics

    def metric_counts(self, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Valid images, for each."""
        return dict.fromkeys(self.metric_names, self.count(targets))

    def meter(self) -> None:
        """There is none: samples are judged by `triptych evaluate`."""

    def _targets(
        self,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        times: Tensor,
        valid: Tensor,
        noised: Tensor,
        rows: Rows | None,
    ) -> dict[str, Tensor]:
        """What `loss` reads; t are the times of elements and `times` those of images."""
        config, dtype = self.config, noised.dtype
        targets = {"valid": valid, "weight": error_weight(config, self.path, times)}
        if config.predict == "score":
            targets["scale"] = self.path.at(t).sigma.to(dtype)
            targets["value"] = (-noise).to(dtype)
        else:
            targets["value"] = to_output(config.predict, self.path, x0, noise, t).to(dtype)
        if config.learn_sigma:
            targets |= {"x0": x0.to(dtype), "x": noised, "t": t}
        if rows is not None:
            targets |= {"document_ids": rows.document_ids, "positions": rows.positions, "sizes": rows.sizes}
        return targets

    def _conditioning(self, batch: Batch, keys: Tensor, valid: Tensor, training: bool) -> Batch:
        """Labels or text, with some of them dropped in training."""
        section = self.model.conditioning
        if section.kind == "none":
            return {}
        rate = self.config.label_drop if training else 0.0
        dropped = hash_uniform(stream(keys, "objective.label"), torch.zeros_like(keys)) < rate
        if section.kind == "class":
            labels = _required(batch, "labels", section.kind)
            _check_labels(labels, valid, section.num_classes)
            return {"labels": labels.masked_fill(dropped | ~valid, section.num_classes)}
        text = _required(batch, "text", section.kind)
        if keys.shape != text.shape[:1]:
            raise ValueError(
                "model.conditioning.kind=text wants one text per row, and packed rows hold several images; "
                "use class or none, or data without packing"
            )
        return {"text": text.masked_fill(dropped[:, None, None], 0.0)}

    def _kept(self, batch: Batch, keys: Tensor, rows: Rows | None) -> Tensor:
        assert self.tread is not None
        if rows is not None:
            return kept_packed_tokens(batch["sample_keys"], keys, rows, self.tread.rate)
        num_tokens = batch["x"].shape[2:].numel() // self.model.patch_elements
        return kept_tokens(keys, num_tokens, self.tread.rate)

    def _split(self, outputs: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Mean and, if learned, variance; a second half that is not learned is left out."""
        mean, rest = split_output(
            outputs, targets["value"].shape, self.model, packed="document_ids" in targets
        )
        return mean, rest if self.config.learn_sigma else None

    def _bound(self, mean: Tensor, variance: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """The bound's terms, elementwise, in bits; the mean gets no gradient from it."""
        assert isinstance(self.path, DDPMPath), "check() refuses learn_sigma elsewhere"
        t = targets["t"]
        seen = from_output(self.config.predict, self.path, mean.detach(), targets["x"], t)
        prediction = Prediction(seen.x0.to(mean.dtype), seen.noise.to(mean.dtype), variance)
        return self.path.steps / 1000 * variational.bound(self.path, targets["x0"], prediction, t)

    def _check_shape(self, x: Tensor, rows: Rows | None) -> None:
        model = self.model
        dim, expected = (
            (1, model.in_channels) if rows is None else (2, model.in_channels * model.patch_elements)
        )
        what = "channels" if rows is None else f"values per token (channels * {model.patch_elements})"
        if x.shape[dim] != expected:
            raise ValueError(
                f"the data have {x.shape[dim]} {what} and model.in_channels={model.in_channels} wants "
                f"{expected}; change model.in_channels or the data"
            )
        for size in x.shape[2:] if rows is None else ():
            if size % model.patch_size:
                raise ValueError(
                    f"images of {list(x.shape[2:])} are not divisible by model.patch_size="
                    f"{model.patch_size}; resize or crop them, or use a patch_size that divides {size}"
                )


def check(config: ObjectiveConfig, model: DiffusionConfig, tread: TreadConfig | None = None) -> None:
    """Raises ValueError, naming the keys, where the objective does not fit the model."""
    if config.learn_sigma and model.predicted_channels != 2 * model.in_channels:
        raise ValueError(
            f"train.objective.learn_sigma=true needs a mean and a variance per channel: "
            f"model.out_channels={model.predicted_channels} is not twice model.in_channels="
            f"{model.in_channels}; set model.out_channels={2 * model.in_channels}"
        )
    if model.predicted_channels not in (model.in_channels, 2 * model.in_channels):
        raise ValueError(
            f"model.out_channels={model.predicted_channels} is neither model.in_channels={model.in_channels} "
            f"nor twice it; use {model.in_channels}, or {2 * model.in_channels} with a learned variance"
        )
    if tread is not None and tread.end > model.num_layers:
        raise ValueError(
            f"train.tread.end={tread.end} is beyond the last block; model.num_layers={model.num_layers}, so "
            f"use {tread.start + 1} to {model.num_layers}"
        )


def split_output(
    outputs: Tensor, shape: torch.Size, model: DiffusionConfig, packed: bool
) -> tuple[Tensor, Tensor | None]:
    """A model's output as what is predicted, of `shape`, and a second half of the channels if it has one.

    Raises ValueError for outputs of another shape.
    """
    dim = 2 if packed else 1
    expected = list(shape)
    expected[dim] = shape[dim] * model.predicted_channels // model.in_channels
    if list(outputs.shape) != expected:
        raise ValueError(
            f"the model's outputs have shape {list(outputs.shape)}, and model.out_channels="
            f"{model.predicted_channels} means {expected}"
        )
    if expected[dim] == shape[dim]:
        return outputs, None
    first, second = outputs.split(shape[dim], dim=dim)
    return first, second


def _rows(batch: Batch) -> Rows | None:
    """Where the images of a packed batch are; None for a batch of whole images."""
    if "document_ids" not in batch:
        return None
    return Rows(batch["positions"], batch["document_ids"], batch["sizes"])


def _per_element(values: Tensor, x: Tensor, rows: Rows | None, padding: float = 0.0) -> Tensor:
    """One value per image, (B,) or (B, G), in a shape that broadcasts against x."""
    if rows is None:
        return values.view(-1, *(1,) * (x.ndim - 1))
    return rows.spread(values, padding).unsqueeze(-1)


def _image_means(values: Tensor, targets: dict[str, Tensor]) -> Tensor:
    """Means over the elements of each image, (B,) or (B, G); 0 where a packed row has no image."""
    rows = _rows(targets)
    if rows is None:
        return values.flatten(1).mean(dim=1)
    tokens_BT = values.mean(dim=2)
    return rows.sums(tokens_BT) / rows.sums(torch.ones_like(tokens_BT)).clamp(min=1)


def _required(batch: Batch, name: str, kind: str) -> Tensor:
    if name not in batch:
        raise ValueError(
            f"model.conditioning.kind={kind} needs {name} and the data have none; use other data or "
            "kind: none"
        )
    value: Tensor = batch[name]
    return value


def _check_labels(labels: Tensor, valid: Tensor, num_classes: int) -> None:
    wrong = valid & ((labels < 0) | (labels >= num_classes))
    if bool(wrong.any()):
        raise ValueError(
            f"label {int(labels[wrong][0])} of the data is out of range: model.conditioning.num_classes="
            f"{num_classes} allows 0 to {num_classes - 1}; raise it or mend the data"
        )
