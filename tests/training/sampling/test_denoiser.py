"""What a denoiser makes of a model's outputs, and classifier-free guidance of Gaussians, which is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.objectives.batches import COMBINATIONS, keys, model_config, normal, objective_config
from tests.training.sampling.gaussians import MEAN, Gaussian
from triptych.training.objectives.draws import image_noise
from triptych.training.sampling import Denoiser, GuidanceConfig, SamplerConfig, draw
from triptych.training.sampling.denoiser import doubled

SHAPE = (2, 8, 8)
MEANS = [0.1 * label for label in range(10)] + [-0.5]
LABELS = torch.tensor([2, 7, 10])


def guided_mean(label: int, scale: float) -> float:
    """Of the Gaussian whose denoiser is the guided one: all of equal width, so means are extrapolated."""
    return MEANS[10] + scale * (MEANS[label] - MEANS[10])


def guided(model: Gaussian, method: str = "euler", steps: int = 4, **guidance: Any) -> Tensor:
    config = SamplerConfig.model_validate({"method": method, "steps": steps, "guidance": guidance})
    return draw(model.denoiser, config, keys(3), SHAPE, {"labels": LABELS})


def drawn_with_means(path: str, kind: str, means: list[float], method: str, steps: int = 4) -> Tensor:
    """Samples 0, 1, 2 of unconditional Gaussians of these means."""
    images = []
    for number, mean in enumerate(means):
        model = Gaussian(path, kind, means=mean)
        config = SamplerConfig.model_validate({"method": method, "steps": steps})
        key = keys(3)[number : number + 1]
        images.append(draw(model.denoiser, config, key, SHAPE, {"labels": LABELS[:1]}))
    return torch.cat(images)


@pytest.mark.parametrize(("path", "kind"), COMBINATIONS)
def test_outputs_become_image_and_noise(path: str, kind: str) -> None:
    model = Gaussian(path, kind)
    x = normal(0, 3, *SHAPE)
    for t in (0.02, 0.9):
        seen = model.denoiser(x, t, {"labels": LABELS})
        expected = model.predicted(x, t)
        torch.testing.assert_close(seen.x0, expected, rtol=1e-8, atol=1e-8)
        at = model.at(t)
        torch.testing.assert_close(seen.noise, (x - at.alpha * expected) / at.sigma, rtol=1e-7, atol=1e-7)
        assert seen.variance is None


@pytest.mark.parametrize(("path", "kind"), COMBINATIONS)
def test_guidance_of_gaussians_extrapolates_their_means(path: str, kind: str) -> None:
    means = [guided_mean(int(label), 3.0) for label in LABELS]
    assert means[2] == MEANS[10]
    for method in ("heun", "ddim"):
        found = guided(Gaussian(path, kind, means=MEANS), method, scale=3.0)
        expected = drawn_with_means(path, kind, means, method)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_scale_of_one_asks_once_and_zero_for_nothing() -> None:
    model = Gaussian("linear", "velocity", means=MEANS)
    plain = guided(model, scale=1.0)
    assert model.rows == [3] * 4
    expected = drawn_with_means("linear", "velocity", [MEANS[label] for label in LABELS], "euler")
    torch.testing.assert_close(plain, expected)
    model = Gaussian("linear", "velocity", means=MEANS)
    none = guided(model, scale=0.0)
    assert model.rows == [6] * 4
    torch.testing.assert_close(none, drawn_with_means("linear", "velocity", [MEANS[10]] * 3, "euler"))


def test_guidance_acts_within_its_interval_alone() -> None:
    model = Gaussian("linear", "velocity", means=MEANS)
    found = guided(model, steps=10, scale=4.0, interval=[0.35, 0.7])
    assert model.times == pytest.approx([1 - i / 10 for i in range(10)])
    assert model.rows == [6 if 0.35 <= t <= 0.7 else 3 for t in model.times]
    # Euler by hand, with the mean that is valid in each step.
    x = image_noise(keys(3), SHAPE, "sampling.start")
    for number in range(10):
        t = 1 - number / 10
        scale = 4.0 if 0.35 <= t <= 0.7 else 1.0
        x = torch.stack(
            [
                row + (model.predicted(row, t, guided_mean(int(label), scale)) - row) / t / 10
                for row, label in zip(x, LABELS)
            ]
        )
    torch.testing.assert_close(found, x)


def test_guidance_acts_on_the_chosen_channels_alone() -> None:
    found = guided(Gaussian("ddpm", "noise", means=MEANS), scale=2.5, channels=1)
    all_guided = guided(Gaussian("ddpm", "noise", means=MEANS), scale=2.5)
    conditional = guided(Gaussian("ddpm", "noise", means=MEANS))
    torch.testing.assert_close(found[:, :1], all_guided[:, :1])
    torch.testing.assert_close(found[:, 1:], conditional[:, 1:])
    assert float((all_guided - conditional)[:2].abs().min()) > 0.01
    every = guided(Gaussian("ddpm", "noise", means=MEANS), scale=2.5, channels=2)
    torch.testing.assert_close(every, all_guided)


def test_channels_of_packed_tokens_are_those_of_the_image() -> None:
    """Values of a token are channel-major: the first of two channels is the first half."""

    def predict(batch: dict[str, Any]) -> Tensor:
        value = torch.where(batch["labels"] == 10, 1.0, 2.0).double()
        return value.gather(1, batch["document_ids"].clamp(max=1)).unsqueeze(-1).expand_as(batch["x"])

    denoiser = Denoiser(objective_config(), model_config(), predict, dtype=torch.float64)
    conditioning = {
        "document_ids": torch.tensor([[0, 0, 0, 1, 1, 2]]),
        "positions": torch.zeros(1, 6, 2, dtype=torch.int64),
        "sizes": torch.tensor([[[1, 3], [2, 1]]]),
        "labels": torch.tensor([[4, 10]]),
    }
    x = torch.zeros(1, 6, 8, dtype=torch.float64)
    seen = denoiser(x, 0.5, conditioning, GuidanceConfig(scale=3.0, channels=1))
    # Velocity u at x = 0 is an image of -t u: u is 1 + 3 (2 - 1) = 4 where guided, 2 where conditional alone.
    image = torch.tensor([-2.0] * 4 + [-1.0] * 4, dtype=torch.float64)
    torch.testing.assert_close(seen.x0[0, :3], image.expand(3, 8))
    torch.testing.assert_close(seen.x0[0, 3:5], torch.full((2, 8), -0.5, dtype=torch.float64))


def test_the_second_half_of_a_batch_has_no_label_and_no_text() -> None:
    batch = {
        "x": normal(0, 2, 3),
        "times": torch.tensor([1.0, 2.0]),
        "labels": torch.tensor([3, 4]),
        "text": normal(1, 2, 3, 4),
    }
    both = doubled(batch, num_classes=10)
    assert both["labels"].tolist() == [3, 4, 10, 10] and both["times"].tolist() == [1, 2, 1, 2]
    assert torch.equal(both["x"][2:], batch["x"]) and torch.equal(both["text"][:2], batch["text"])
    assert bool((both["text"][2:] == 0).all())
    # What was given stays as it was.
    assert batch["labels"].tolist() == [3, 4] and bool((batch["text"] != 0).any())


def test_a_learned_variance_is_the_conditional_one() -> None:
    def predict(batch: dict[str, Any]) -> Tensor:
        label = batch["labels"].view(-1, 1, 1, 1).double().expand(-1, 2, 8, 8)
        return torch.cat([label, 100 + label], dim=1)

    x = torch.zeros(3, *SHAPE, dtype=torch.float64)
    model = model_config(out_channels=4)
    learned = Denoiser(objective_config("ddpm", learn_sigma=True), model, predict)
    for guidance in (GuidanceConfig(scale=2.0), GuidanceConfig(scale=2.0, channels=1), None):
        seen = learned(x, 0.5, {"labels": LABELS}, guidance)
        assert seen.variance is not None and seen.variance[:, 1, 0, 0].tolist() == [102, 107, 110]
    # As in SiT, outputs beyond the mean may be there for nothing.
    ignoring = Denoiser(objective_config("linear"), model, predict)
    seen = ignoring(x, 0.5, {"labels": LABELS}, GuidanceConfig(scale=2.0))
    assert seen.variance is None and seen.x0[:, 1, 0, 0].tolist() == [3.0, -2.0, -5.0]


def test_the_model_is_called_in_its_own_dtype() -> None:
    seen: list[dict[str, Tensor]] = []

    def predict(batch: dict[str, Any]) -> Tensor:
        seen.append(batch)
        return batch["x"]

    denoiser = Denoiser(objective_config(), model_config(), predict)
    prediction = denoiser(normal(0, 3, *SHAPE), 0.25, {"labels": LABELS})
    assert seen[0]["x"].dtype == seen[0]["times"].dtype == torch.float32
    assert seen[0]["times"].tolist() == [250.0] * 3
    assert prediction.x0.dtype == torch.float64


def test_an_objective_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"learn_sigma=true .*set model\.out_channels=4"):
        Denoiser(objective_config("ddpm", learn_sigma=True), model_config(), lambda batch: batch["x"])
    wrong = Denoiser(objective_config(), model_config(), lambda batch: batch["x"][:, :1])
    with pytest.raises(ValueError, match=r"outputs have shape \[3, 1, 8, 8\].* means \[3, 2, 8, 8\]"):
        wrong(normal(0, 3, *SHAPE), 0.5, {"labels": LABELS})


def test_gaussians_of_one_mean_need_no_label() -> None:
    """The tests' own oracle: a single mean is that of all labels."""
    images = guided(Gaussian("linear", "velocity"), scale=5.0)
    one = drawn_with_means("linear", "velocity", [MEAN] * 3, "euler")
    torch.testing.assert_close(images, one)
