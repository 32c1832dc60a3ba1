"""Samples belong to their keys; packed and whole images are drawn alike; what does not fit is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.training.objectives.batches import PATCH, keys, model_config, normal, objective_config, pack
from tests.training.sampling.gaussians import Gaussian
from triptych.models.patches import patchify
from triptych.training.objectives.draws import image_noise
from triptych.training.sampling import Denoiser, SamplerConfig, draw, sample_keys

SHAPE = (2, 8, 8)
MEANS = [0.1 * label for label in range(10)] + [-0.5]
METHODS: list[dict[str, Any]] = [
    {"method": "euler"},
    {"method": "heun"},
    {"method": "ddim", "eta": 0.8},
    {"method": "ddpm"},
    {"method": "sde"},
]


def config(**options: Any) -> SamplerConfig:
    return SamplerConfig.model_validate({"steps": 4, "guidance": {"scale": 2.0}} | options)


@pytest.mark.parametrize("options", METHODS)
@pytest.mark.parametrize(("path", "kind"), [("linear", "velocity"), ("ddpm", "noise"), ("edm", "edm")])
def test_a_sample_does_not_depend_on_its_neighbours(path: str, kind: str, options: dict[str, Any]) -> None:
    denoiser = Gaussian(path, kind, means=MEANS).denoiser
    labels = torch.tensor([1, 4, 9, 10, 1])
    together = draw(denoiser, config(**options), keys(5), SHAPE, {"labels": labels})
    for part in (slice(0, 1), slice(1, 4), slice(4, 5)):
        alone = draw(denoiser, config(**options), keys(5)[part], SHAPE, {"labels": labels[part]})
        assert torch.equal(alone, together[part])
    # The same label, another key.
    assert not torch.allclose(together[0], together[4])


def test_keys_are_those_of_a_seed_and_a_number() -> None:
    many = sample_keys(3, torch.arange(100))
    assert many.dtype == torch.int64 and len(many.unique()) == 100
    assert int(sample_keys(3, torch.tensor([41]))) == int(many[41])
    assert not bool((many == sample_keys(4, torch.arange(100))).any())
    assert torch.equal(sample_keys(3, torch.arange(6).view(2, 3)), many[:6].view(2, 3))


@pytest.mark.parametrize("options", METHODS)
def test_packed_images_are_drawn_as_whole_ones(options: dict[str, Any]) -> None:
    """The same keys and labels, one by one and packed with others of other sizes."""
    sizes, labels = [(4, 8), (8, 8), (2, 6)], torch.tensor([3, 5, 10])
    batch = {"labels": labels, "valid": torch.ones(3, dtype=torch.bool), "sample_keys": keys(3)}
    packed = pack(batch, [normal(0, 2, *size) for size in sizes], [[0, 2], [1]], length=18)
    # The empty place behind the image of the second row.
    packed["labels"][1, 1] = 10

    def predict(batch: dict[str, Any]) -> Tensor:
        """Any function of a token's values, its time and label."""
        wide = [batch[name].double() for name in ("times", "labels")]
        if "document_ids" in batch:
            wide = [value.gather(1, batch["document_ids"].clamp(max=1)).unsqueeze(-1) for value in wide]
        else:
            wide = [value.view(-1, 1, 1, 1) for value in wide]
        return torch.tanh(batch["x"] * wide[0] / 500 + wide[1])

    denoiser = Denoiser(objective_config(), model_config(), predict, dtype=torch.float64)
    conditioning = {name: packed[name] for name in ("positions", "document_ids", "sizes", "labels")}
    tokens = draw(denoiser, config(**options), packed["image_keys"], (18, 8), conditioning)
    assert tokens.shape == (2, 18, 8)
    for number, (row, first) in enumerate(((0, 0), (1, 0), (0, 8))):
        key, label = keys(3)[number : number + 1], labels[number : number + 1]
        image = draw(denoiser, config(**options), key, (2, *sizes[number]), {"labels": label})
        expected = patchify(image, PATCH)[0]
        torch.testing.assert_close(tokens[row, first : first + len(expected)], expected, rtol=1e-12, atol=0)


def test_progress_counts_the_steps() -> None:
    seen: list[tuple[int, int]] = []
    model = Gaussian("linear", "velocity")
    labels = {"labels": torch.zeros(1, dtype=torch.int64)}
    draw(model.denoiser, config(steps=3), keys(1), SHAPE, labels, lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_predicted_images_are_clamped_in_every_step() -> None:
    labels = {"labels": torch.zeros(4, dtype=torch.int64)}
    for path, kind in (("linear", "velocity"), ("ddpm", "noise")):
        wide = Gaussian(path, kind, means=0.9, std=0.8)
        free = draw(wide.denoiser, config(), keys(4), SHAPE, labels)
        clipped = draw(wide.denoiser, config(clip=1.0), keys(4), SHAPE, labels)
        assert float(free.max()) > 1.2 and float(clipped.max()) == 1.0
        # In DDIM: alpha_s x0 + sigma_s (x - alpha_t x0) / sigma_t with the clamped x0, by hand for two steps.
        found = draw(wide.denoiser, config(steps=2, method="ddim", clip=0.5), keys(4), SHAPE, labels)
        x = wide.at(1.0).sigma * image_noise(keys(4), SHAPE, "sampling.start")
        middle = 0.5 if path == "linear" else 0.001
        at_t, at_s = wide.at(1.0), wide.at(middle)
        x0 = wide.predicted(x, 1.0, 0.9).clamp(-0.5, 0.5)
        x = at_s.alpha * x0 + at_s.sigma * (x - at_t.alpha * x0) / at_t.sigma
        torch.testing.assert_close(found, wide.predicted(x, middle, 0.9).clamp(-0.5, 0.5))


def test_samples_come_in_the_dtype_of_the_model_and_without_a_graph() -> None:
    weight = torch.ones((), requires_grad=True)
    denoiser = Denoiser(objective_config(), model_config(), lambda batch: batch["x"] * weight)
    images = draw(denoiser, config(), keys(2), SHAPE, {"labels": torch.tensor([0, 10])})
    assert images.dtype == torch.float32 and not images.requires_grad


class TestErrors:
    """What does not fit, by name."""

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"method": "euler", "eta": 0.5}, r"eta=0.5 belongs to method ddim, not euler"),
            ({"method": "heun", "diffusion": "sbdm"}, r"diffusion=sbdm belongs to method sde"),
            ({"method": "ddpm", "last_step": 0.1}, r"last_step=0.1 belongs to method sde"),
            ({"steps": 0}, "steps"),
            ({"method": "rk4"}, "method"),
            ({"guidance": {"interval": [0.7, 0.2]}}, r"guidance\.interval=\[0.7, 0.2\] is no interval"),
            ({"guidance": {"scale": -1.0}}, "scale"),
            ({"scale": 4.0}, "scale"),
        ],
    )
    def test_options(self, values: dict[str, Any], words: str) -> None:
        with pytest.raises(ValidationError, match=words):
            SamplerConfig.model_validate(values)

    @pytest.mark.parametrize(
        ("path", "values", "words"),
        [
            ("ddpm", {"steps": 1001}, r"steps=1001 is more than the 1000 of train\.objective\.path=ddpm"),
            ("ddpm", {"shift": 2.0}, r"shift=2.0 .*path=ddpm has steps of its own"),
            ("edm", {"shift": 2.0}, r"shift=2.0 .*path=edm"),
            ("linear", {"guidance": {"channels": 3}}, r"guidance\.channels=3 .*model\.in_channels=2"),
            (
                "linear",
                {"guidance": {"interval": [2, 9]}},
                r"interval=\[2.0, 9.0\] .*t=1; t is 0 at the data",
            ),
            ("edm", {"guidance": {"interval": [90, 99]}}, r"interval=.*beyond the noise at t=80; t is sigma"),
        ],
    )
    def test_sampler_and_objective(self, path: str, values: dict[str, Any], words: str) -> None:
        denoiser = Denoiser(objective_config(path), model_config(), lambda batch: batch["x"])
        with pytest.raises(ValueError, match=words):
            draw(denoiser, config(**values), keys(1), SHAPE, {"labels": torch.tensor([0])})

    def test_guidance_without_conditions(self) -> None:
        model = model_config(conditioning={"kind": "none"})
        denoiser = Denoiser(objective_config(), model, lambda batch: batch["x"])
        with pytest.raises(ValueError, match=r"guidance\.scale=2.0 needs a conditional model"):
            draw(denoiser, config(), keys(1), SHAPE, {})
        plain = SamplerConfig(steps=2)
        assert draw(denoiser, plain, keys(1), SHAPE, {}).shape == (1, *SHAPE)

    def test_conditioning(self) -> None:
        denoiser = Denoiser(objective_config(), model_config(), lambda batch: batch["x"])
        with pytest.raises(ValueError, match=r"conditioning\.kind=class draws with labels"):
            draw(denoiser, config(), keys(1), SHAPE, {})
        with pytest.raises(ValueError, match=r"labels of shape \[3\] for \[2\] samples"):
            draw(denoiser, config(), keys(2), SHAPE, {"labels": torch.zeros(3, dtype=torch.int64)})
        with pytest.raises(ValueError, match=r"label 11 is out of range: use 0 to 9, or 10 for none"):
            draw(denoiser, config(), keys(1), SHAPE, {"labels": torch.tensor([11])})
