"""Noised inputs and losses of denoising, whole and packed, against formulas and against each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.objectives.batches import (
    COMBINATIONS,
    PATCH,
    image_batch,
    keys,
    model_config,
    normal,
    objective_config,
    pack,
)
from tests.training.objectives.test_variational import ddpm_bound
from triptych import models
from triptych.models.patches import patchify
from triptych.training.objectives import DiffusionObjective, TreadConfig
from triptych.training.objectives.diffusion import NOISE
from triptych.training.objectives.draws import image_noise, kept_tokens


def objective(path: str = "linear", predict: str | None = None, **changes: Any) -> DiffusionObjective:
    channels = 4 if changes.get("learn_sigma") else None
    return DiffusionObjective(objective_config(path, predict, **changes), model_config(out_channels=channels))


def mean_loss(of: DiffusionObjective, outputs: Tensor, targets: dict[str, Tensor]) -> float:
    total, count, _ = of.loss(outputs, targets)
    return float((total / count).detach())


def test_a_zero_model_loses_one_for_noise_and_two_for_velocity() -> None:
    """The first losses of a zero-initialised denoiser on unit-Gaussian data."""
    batch = image_batch(400)
    outputs = torch.zeros_like(batch["x"])
    # The mean of 51,200 squares of (nearly) standard normal numbers has a standard deviation of 0.006.
    for path, kind, expected in (
        ("ddpm", "noise", 1),
        ("linear", "noise", 1),
        ("linear", "velocity", 2),
        ("linear", "score", 1),
        ("vp", "v", 1),
        ("linear", "x0", 1),
        ("gvp", "velocity", math.pi**2 / 4),
    ):
        of = objective(path, kind)
        _, targets = of.prepare(batch, step=1)
        assert mean_loss(of, outputs, targets) == pytest.approx(expected, abs=0.03 * expected), (path, kind)
    of = objective("edm", edm={"sigma_data": 1.0})
    _, targets = of.prepare(batch, step=1)
    assert mean_loss(of, outputs, targets) == pytest.approx(1, abs=0.03)


def test_a_new_denoiser_is_such_a_model() -> None:
    """Head and modulation start at zero (adaLN-Zero), so the first losses of a run are those."""
    batch = image_batch(100)
    batch["x"] = batch["x"].float()
    for channels, path, expected in ((None, "linear", 2), (4, "ddpm", 1)):
        config = model_config(out_channels=channels)
        model = models.build(config)
        models.initialize(model, seed=0)
        of = DiffusionObjective(objective_config(path), config)
        inputs, targets = of.prepare(batch, step=1)
        outputs = model(inputs["x"], **model.keywords(inputs))
        assert bool((outputs == 0).all())
        assert mean_loss(of, outputs, targets) == pytest.approx(expected, abs=0.05 * expected)


@pytest.mark.parametrize(("path", "kind"), COMBINATIONS)
def test_inputs_and_targets_hold_the_image_and_the_noise(path: str, kind: str) -> None:
    """A model that knows the keys, and so the noise, has no loss; its formulas are the path's."""
    of = objective(path, kind)
    batch = image_batch(6)
    inputs, targets = of.prepare(batch, step=1)
    noise = image_noise(batch["sample_keys"], (2, 8, 8), NOISE)
    times = inputs["times"]
    t = {"ddpm": (times + 1) / 1000, "edm": torch.exp(4 * times)}.get(path, times / 1000)
    t = t.view(-1, 1, 1, 1)
    at = of.path.at(t)
    scale = 1 / (t**2 + 0.25).sqrt() if path == "edm" else 1.0
    torch.testing.assert_close(inputs["x"], scale * (at.alpha * batch["x"] + at.sigma * noise))
    known = {
        "noise": noise,
        "x0": batch["x"],
        "velocity": at.d_alpha * batch["x"] + at.d_sigma * noise,
        "score": -noise / at.sigma,
        "v": at.alpha * noise - at.sigma * batch["x"],
        "edm": (t * batch["x"] - 0.25 * noise) / (0.5 * (t**2 + 0.25).sqrt()),
    }[kind]
    # Times came back from what the model is told, with its rounding.
    assert mean_loss(of, known, targets) < 1e-15
    assert mean_loss(of, known + 0.1, targets) > 1e-9


def test_a_loss_is_the_mean_of_means_over_valid_images() -> None:
    batch = image_batch(5)
    batch["valid"] = torch.tensor([True, False, True, True, False])
    batch["labels"][1] = -1
    batch["x"][4] = float("nan")
    of = objective("vp", "v", weighting="min_snr")
    inputs, targets = of.prepare(batch, step=1)
    outputs = normal(9, 5, 2, 8, 8).requires_grad_()
    total, count, metrics = of.loss(outputs, targets)
    t = inputs["times"] / 1000
    snr = of.path.at(t).alpha ** 2 / of.path.at(t).sigma ** 2
    weight = snr.clamp(max=5) / (snr + 1)
    expected = [((outputs[i] - targets["value"][i]) ** 2).mean() for i in (0, 2, 3)]
    assert int(count) == int(of.count(targets)) == 3
    torch.testing.assert_close(total, sum(weight[i] * e for i, e in zip((0, 2, 3), expected)))
    torch.testing.assert_close(metrics["mse"], sum(expected).detach(), check_dtype=False)
    assert tuple(metrics) == of.metric_names == ("mse",)
    total.backward()
    assert outputs.grad is not None
    assert bool((outputs.grad[[1, 4]] == 0).all()) and bool((outputs.grad[0] != 0).all())
    assert inputs["labels"][[1, 4]].tolist() == [10, 10]


def test_however_a_batch_is_cut_the_sums_are_the_same() -> None:
    of = objective("ddpm", learn_sigma=True)
    batch = image_batch(7)
    outputs = 0.5 * normal(3, 7, 4, 8, 8)
    _, targets = of.prepare(batch, step=1)
    whole, _, whole_metrics = of.loss(outputs, targets)
    total, parts = 0.0, dict.fromkeys(of.metric_names, 0.0)
    for start, end in ((0, 1), (1, 4), (4, 7)):
        part = {name: value[start:end] for name, value in batch.items()}
        # Neither the step nor the place in the batch matters.
        _, part_targets = of.prepare(part, step=start)
        value, _, metrics = of.loss(outputs[start:end], part_targets)
        total += float(value)
        parts = {name: parts[name] + float(metrics[name]) for name in parts}
    assert total == pytest.approx(float(whole), rel=1e-12)
    assert parts == pytest.approx({name: float(value) for name, value in whole_metrics.items()}, rel=1e-12)


@pytest.mark.parametrize(("path", "kind"), [("linear", "velocity"), ("ddpm", "noise"), ("edm", "edm")])
def test_packed_images_are_trained_as_whole_ones(path: str, kind: str) -> None:
    """Inputs, times, labels, losses and gradients of each image, whatever it is packed with."""
    sizes = [(4, 8), (8, 8), (2, 6), (10, 4)]
    images = [normal(number, 2, *size) for number, size in enumerate(sizes)]
    batch = image_batch(4)
    learned = path == "ddpm"
    of = objective(path, kind, weighting="min_snr", label_drop=0.5, learn_sigma=learned)
    packed = pack(batch, images, [[1, 0], [3, 2]], length=28)
    inputs, targets = of.prepare(packed, step=1)
    outputs = normal(5, 2, 28, (16 if learned else 8)).requires_grad_()
    total, count, _ = of.loss(outputs, targets)
    total.backward()
    assert int(count) == 4 and "image_keys" not in inputs
    assert inputs["x"].shape == (2, 28, 8) and inputs["times"].shape == (2, 2)
    sums, places = 0.0, {1: (0, 0, 0), 0: (0, 1, 16), 3: (1, 0, 0), 2: (1, 1, 10)}
    for number, (row, place, start) in places.items():
        alone = {name: value[number : number + 1] for name, value in batch.items()}
        alone["x"] = images[number].unsqueeze(0)
        whole_inputs, whole_targets = of.prepare(alone, step=1)
        tokens = patchify(whole_inputs["x"], PATCH)[0]
        end = start + len(tokens)
        torch.testing.assert_close(inputs["x"][row, start:end], tokens)
        assert float(inputs["times"][row, place]) == float(whole_inputs["times"])
        assert int(inputs["labels"][row, place]) == int(whole_inputs["labels"])
        # The tokens' outputs as an image: channel-major within a patch, the variance behind the mean.
        grid = [size // PATCH for size in sizes[number]]
        part = outputs[row, start:end].detach().view(1, *grid, -1, PATCH, PATCH)
        image = part.permute(0, 3, 1, 4, 2, 5).reshape(1, -1, *sizes[number]).requires_grad_()
        value, _, _ = of.loss(image, whole_targets)
        value.backward()
        sums += float(value.detach())
        assert image.grad is not None and outputs.grad is not None
        gradient = patchify(image.grad, PATCH)[0]
        torch.testing.assert_close(outputs.grad[row, start:end], gradient)
    assert float(total.detach()) == pytest.approx(sums, rel=1e-12)
    padding = packed["document_ids"] == 2
    assert int(padding.sum()) == 4 + 15 and bool((inputs["x"][padding] == 0).all())
    assert bool((outputs.grad[padding] == 0).all())


def test_places_without_an_image_count_nothing() -> None:
    images = [normal(number, 2, 4, 4) for number in range(3)]
    packed = pack(image_batch(3), images, [[0, 1], [2]], length=8)
    packed["valid"][0, 1] = False
    of = objective()
    inputs, targets = of.prepare(packed, step=1)
    outputs = torch.zeros(2, 8, 8, dtype=torch.float64)
    total, count, _ = of.loss(outputs, targets)
    values = targets["value"]
    assert int(count) == 2
    expected = values[0, :4].square().mean() + values[1, :4].square().mean()
    torch.testing.assert_close(total, expected)
    assert inputs["labels"].tolist()[1][1] == inputs["labels"].tolist()[0][1] == 10


class TestLearnedSigma:
    """arXiv 2102.09672: the bound trains the variance and not the mean."""

    def test_the_loss_is_error_plus_bound(self) -> None:
        of = objective("ddpm", learn_sigma=True)
        batch = image_batch(3)
        batch["x"] = batch["x"].clamp(-0.9, 0.9)
        inputs, targets = of.prepare(batch, step=1)
        noise = image_noise(batch["sample_keys"], (2, 8, 8), NOISE)
        seen, output = noise + 0.2 * normal(1, 3, 2, 8, 8), normal(2, 3, 2, 8, 8)
        total, _, metrics = of.loss(torch.cat([seen, output], dim=1), targets)
        error, vlb = 0.0, 0.0
        for number, k in enumerate(inputs["times"].round().long().tolist()):
            error += float((seen[number] - noise[number]).square().mean())
            terms = ddpm_bound(k, batch["x"][number], noise[number], seen[number], (output[number] + 1) / 2)
            vlb += float(terms.mean())
        assert float(metrics["mse"]) == pytest.approx(error)
        # K / 1000 = 1 of these 1000 steps.
        assert float(metrics["vlb"]) == pytest.approx(vlb, rel=1e-6)
        assert float(total) == pytest.approx(error + vlb, rel=1e-6)
        assert of.metric_names == ("mse", "vlb")

    def test_the_bound_has_no_gradient_to_the_mean(self) -> None:
        batch = image_batch(4)
        outputs = normal(1, 4, 4, 8, 8).requires_grad_()
        learned = objective("ddpm", learn_sigma=True)
        _, targets = learned.prepare(batch, step=1)
        (gradient,) = torch.autograd.grad(learned.loss(outputs, targets)[0], outputs)
        _, plain = objective("ddpm").prepare(batch, step=1)
        mean = outputs[:, :2].detach().requires_grad_()
        (of_mean,) = torch.autograd.grad(objective("ddpm").loss(mean, plain)[0], mean)
        torch.testing.assert_close(gradient[:, :2], of_mean)
        assert bool((gradient[:, 2:] != 0).all())

    def test_a_half_that_is_not_learned_is_ignored(self) -> None:
        of = DiffusionObjective(objective_config(), model_config(out_channels=4))
        batch = image_batch(2)
        _, targets = of.prepare(batch, step=1)
        outputs = normal(1, 2, 4, 8, 8)
        expected = mean_loss(objective(), outputs[:, :2], targets)
        outputs[:, 2:] = 1e9
        assert mean_loss(of, outputs, targets) == expected


def test_labels_are_dropped_by_key_and_in_training_alone() -> None:
    batch = image_batch(4000, size=(2, 2))
    of = objective(label_drop=0.1)
    inputs, _ = of.prepare(batch, step=1)
    dropped = inputs["labels"] == 10
    # Binomial: standard deviation 0.0047.
    assert float(dropped.double().mean()) == pytest.approx(0.1, abs=0.02)
    assert torch.equal(inputs["labels"][~dropped], batch["labels"][~dropped])
    again, _ = of.prepare({name: value[5:9] for name, value in batch.items()}, step=7)
    assert torch.equal(again["labels"], inputs["labels"][5:9])
    quiet, _ = of.prepare(batch, step=1, training=False)
    assert torch.equal(quiet["labels"], batch["labels"])
    assert bool((objective(label_drop=1.0).prepare(batch, step=1)[0]["labels"] == 10).all())
    # The same noise and time as in training.
    assert torch.equal(quiet["x"], inputs["x"]) and torch.equal(quiet["times"], inputs["times"])


def test_dropped_text_is_zero() -> None:
    batch = image_batch(200, size=(2, 2))
    batch["text"] = normal(4, 200, 3, 5)
    model = model_config(
        pattern=["cross_attention"], conditioning={"kind": "text", "text_size": 5, "text_length": 3}
    )
    of = DiffusionObjective(objective_config(label_drop=0.3), model)
    inputs, _ = of.prepare(batch, step=1)
    zero = (inputs["text"] == 0).all(dim=(1, 2))
    assert 30 < int(zero.sum()) < 90
    assert torch.equal(inputs["text"][~zero], batch["text"][~zero])
    assert torch.equal(of.prepare(batch, step=1, training=False)[0]["text"], batch["text"])
    assert "labels" not in inputs


def test_an_unconditional_model_is_told_nothing() -> None:
    of = DiffusionObjective(objective_config(), model_config(conditioning={"kind": "none"}))
    inputs, _ = of.prepare(image_batch(2), step=1)
    assert inputs.keys() == {"x", "times", "valid", "sample_keys"}


def test_tread_keeps_tokens_in_training_alone() -> None:
    tread = TreadConfig(rate=0.4, start=1, end=3)
    of = DiffusionObjective(objective_config(), model_config(), tread)
    batch = image_batch(3)
    inputs, _ = of.prepare(batch, step=1)
    assert torch.equal(inputs["kept"], kept_tokens(keys(3), 16, 0.4))
    assert inputs["kept"].shape == (3, 16 - 6) and inputs["routed"] == (1, 3)
    assert of.prepare(batch, step=1, training=False)[0].keys() == inputs.keys() - {"kept", "routed"}
    images = [normal(number, 2, 4, 4) for number in range(3)]
    packed, _ = of.prepare(pack(image_batch(3), images, [[0, 1], [2]], length=10), step=1)
    assert packed["kept"].shape == (2, 10 - 4)


def test_dtypes_are_those_of_the_data() -> None:
    batch = image_batch(2)
    batch["x"] = batch["x"].float()
    of = objective("ddpm", learn_sigma=True)
    inputs, targets = of.prepare(batch, step=1)
    assert inputs["x"].dtype == inputs["times"].dtype == targets["value"].dtype == torch.float32
    # Noised in float64 and rounded once.
    batch["x"] = batch["x"].double()
    exact, _ = of.prepare(batch, step=1)
    assert torch.equal(inputs["x"], exact["x"].float())
    narrow = torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    total, _, _ = of.loss(narrow, targets)
    total.backward()
    assert torch.isfinite(total) and narrow.grad is not None and bool(torch.isfinite(narrow.grad).all())


def test_images_of_one_and_three_dimensions() -> None:
    for space in ((16,), (4, 8, 4)):
        of = DiffusionObjective(
            objective_config(), model_config(input_size=list(space), position="none"), TreadConfig(end=4)
        )
        inputs, targets = of.prepare(image_batch(2, size=space), step=1)
        tokens = math.prod(size // PATCH for size in space)
        assert inputs["kept"].shape == (2, tokens - tokens // 2)
        assert mean_loss(of, targets["value"] + 1.0, targets) == pytest.approx(1)


class TestErrors:
    """What the data get wrong, by name."""

    def test_channels(self) -> None:
        batch = image_batch(2)
        batch["x"] = torch.zeros(2, 3, 8, 8)
        with pytest.raises(ValueError, match=r"data have 3 channels and model\.in_channels=2 wants 2"):
            objective().prepare(batch, step=1)
        packed = pack(image_batch(1), [normal(0, 2, 4, 4)], [[0]], length=4)
        packed["x"] = torch.zeros(1, 4, 12)
        with pytest.raises(ValueError, match=r"12 values per token .*model\.in_channels=2 wants 8"):
            objective().prepare(packed, step=1)

    def test_size(self) -> None:
        with pytest.raises(ValueError, match=r"images of \[8, 7\] .*model\.patch_size=2.* divides 7"):
            objective().prepare(image_batch(2, size=(8, 7)), step=1)

    @pytest.mark.parametrize("label", [-1, 10, 1000])
    def test_labels_out_of_range(self, label: int) -> None:
        batch = image_batch(3)
        batch["labels"][1] = label
        with pytest.raises(ValueError, match=rf"label {label} of the data .*num_classes=10 allows 0 to 9"):
            objective().prepare(batch, step=1)

    def test_labels_missing(self) -> None:
        batch = image_batch(3)
        del batch["labels"]
        with pytest.raises(ValueError, match=r"conditioning\.kind=class needs labels .*kind: none"):
            objective().prepare(batch, step=1)

    def test_text_in_packed_rows(self) -> None:
        packed = pack(image_batch(1), [normal(0, 2, 4, 4)], [[0]], length=4)
        packed["text"] = torch.zeros(1, 3, 5)
        of = DiffusionObjective(
            objective_config(),
            model_config(
                pattern=["cross_attention"], conditioning={"kind": "text", "text_size": 5, "text_length": 3}
            ),
        )
        with pytest.raises(ValueError, match=r"kind=text wants one text per row"):
            of.prepare(packed, step=1)

    def test_outputs_of_another_shape(self) -> None:
        of = objective("ddpm", learn_sigma=True)
        _, targets = of.prepare(image_batch(2), step=1)
        with pytest.raises(ValueError, match=r"\[2, 2, 8, 8\].*out_channels=4 means \[2, 4, 8, 8\]"):
            of.loss(torch.zeros(2, 2, 8, 8), targets)
