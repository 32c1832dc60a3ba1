"""Solvers against the analytic transport and marginals of Gaussian data."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.objectives.batches import COMBINATIONS, keys, model_config, objective_config
from tests.training.sampling.gaussians import MEAN, STD, Gaussian, observed_order
from triptych.training.objectives.draws import image_noise
from triptych.training.sampling import Denoiser, SamplerConfig, draw
from triptych.training.sampling.solvers import step_times

SHAPE = (2, 8, 8)
ODE = [(path, kind) for path, kind in COMBINATIONS]


def labels(count: int) -> dict[str, Tensor]:
    return {"labels": torch.zeros(count, dtype=torch.int64)}


def sample(model: Gaussian, count: int = 2, **options: Any) -> Tensor:
    return draw(model.denoiser, SamplerConfig.model_validate(options), keys(count), SHAPE, labels(count))


def start(model: Gaussian, times: list[float], count: int = 2) -> Tensor:
    return model.at(times[0]).sigma * image_noise(keys(count), SHAPE, "sampling.start")


def error(model: Gaussian, **options: Any) -> float:
    """Largest distance from the analytic answer, in which the last step starts at the same time."""
    times = step_times(SamplerConfig.model_validate(options), model.objective, model.path)
    x = start(model, times)
    if model.objective.path in ("linear", "gvp"):
        exact = model.transported(x, times[0], 0.0)
    else:
        exact = model.predicted(model.transported(x, times[0], times[-1]), times[-1])
    return float((sample(model, **options) - exact).abs().max())


# Of ddpm, numbers of steps that leave equal distances: divisors of 999, plus 1.
STEPS = {"ddpm": (28, 112)}


@pytest.mark.parametrize(("path", "kind"), ODE)
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("ddim", 1)])
def test_ode_solvers_have_their_order(path: str, kind: str, method: str, order: int) -> None:
    steps = STEPS.get(path, (60, 120))
    found = observed_order(lambda n: error(Gaussian(path, kind), method=method, steps=n), steps)
    assert found == pytest.approx(order, abs=0.1)
    assert error(Gaussian(path, kind), method=method, steps=steps[1]) < (0.1 if order == 1 else 0.01)


@pytest.mark.parametrize(("path", "kind"), ODE)
@pytest.mark.parametrize("method", ["euler", "ddim"])
def test_one_step_is_the_image_predicted_from_noise(path: str, kind: str, method: str) -> None:
    model = Gaussian(path, kind)
    times = step_times(SamplerConfig(steps=1), model.objective, model.path)
    assert len(times) == 1 and times[0] == pytest.approx(80 if path == "edm" else 1, abs=1.1e-3)
    expected = model.predicted(start(model, times), times[0])
    torch.testing.assert_close(sample(model, steps=1, method=method), expected)


@pytest.mark.parametrize("method", ["euler", "heun", "ddim", "ddpm", "sde"])
def test_evaluations_are_as_many_as_the_configuration_says(method: str) -> None:
    model = Gaussian("linear", "velocity")
    sample(model, steps=6, method=method)
    assert len(model.times) == (11 if method == "heun" else 6)
    assert min(model.times) > 0


def test_all_kinds_of_output_make_the_same_samples() -> None:
    for path, kinds in (("gvp", ("velocity", "v", "x0")), ("ddpm", ("noise", "score", "v", "x0"))):
        first, *others = (sample(Gaussian(path, kind), steps=10, method="heun") for kind in kinds)
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-7, atol=1e-8)


def test_ddim_is_exact_where_the_image_is_certain() -> None:
    """All data one point: any number of steps ends there, and x_t has the exact marginals on the way."""
    for path, kind in (("ddpm", "noise"), ("vp", "v"), ("gvp", "velocity")):
        for eta in (0.0, 0.7):
            model = Gaussian(path, kind, std=1e-9)
            torch.testing.assert_close(
                sample(model, steps=3, method="ddim", eta=eta), torch.full((2, *SHAPE), MEAN).double()
            )


def moments_by_recursion(model: Gaussian, times: list[float], eta: float) -> tuple[float, float]:
    """Mean and variance of what DDIM draws, by following both through its linear steps (arXiv 2010.02502,
    equations 12 and 16, with alpha-bar = alpha^2)."""
    first = model.at(times[0])
    mean, variance = 0.0, float(first.sigma) ** 2
    for t, s in zip(times, [*times[1:], 0.0]):
        at_t, at_s = model.at(t), model.at(s)
        bar_t, bar_s = float(at_t.alpha) ** 2, float(at_s.alpha) ** 2
        z = eta * math.sqrt((1 - bar_s) / (1 - bar_t)) * math.sqrt(1 - bar_t / bar_s)
        gain = float(at_t.alpha) * STD**2 / float(model.variance(at_t))
        # x0 = gain x + (1 - gain alpha) mean, and the noise is what is left of x.
        of_noise = math.sqrt(1 - bar_s - z**2)
        rest = (1 - float(at_t.alpha) * gain) * MEAN
        factor = math.sqrt(bar_s) * gain + of_noise * (1 - float(at_t.alpha) * gain) / float(at_t.sigma)
        shift = math.sqrt(bar_s) * rest - of_noise * float(at_t.alpha) * rest / float(at_t.sigma)
        mean, variance = factor * mean + shift, factor**2 * variance + z**2
    return mean, variance


def check_moments(images: Tensor, mean: float, variance: float) -> None:
    """Within 4.5 standard deviations of the moments' own spread."""
    count = images.numel()
    assert float(images.mean()) == pytest.approx(mean, abs=4.5 * math.sqrt(variance / count))
    assert float(images.var()) == pytest.approx(variance, rel=4.5 * math.sqrt(2 / count))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("path", "kind"), [("ddpm", "noise"), ("vp", "velocity")])
def test_ddim_draws_what_its_equations_say(path: str, kind: str, eta: float) -> None:
    model = Gaussian(path, kind)
    options: dict[str, Any] = {"method": "ddim", "steps": 12, "eta": eta}
    times = step_times(SamplerConfig.model_validate(options), model.objective, model.path)
    check_moments(sample(model, count=300, **options), *moments_by_recursion(model, times, eta))


def test_ddim_with_all_of_its_noise_is_ddpm() -> None:
    ddpm = sample(Gaussian("ddpm", "noise"), steps=10, method="ddpm")
    torch.testing.assert_close(sample(Gaussian("ddpm", "noise"), steps=10, method="ddim", eta=1.0), ddpm)


@pytest.mark.parametrize(
    ("path", "kind", "options"),
    [
        ("ddpm", "noise", {"method": "ddpm", "steps": 250}),
        ("vp", "velocity", {"method": "ddpm", "steps": 250}),
        ("linear", "velocity", {"method": "ddpm", "steps": 250}),
        ("linear", "velocity", {"method": "sde", "steps": 400, "last_step": 0.01}),
        ("linear", "velocity", {"method": "sde", "steps": 400, "last_step": 0.01, "diffusion_scale": 0.3}),
        ("linear", "velocity", {"method": "sde", "steps": 400, "last_step": 0.01, "diffusion": "constant"}),
        ("gvp", "score", {"method": "sde", "steps": 400, "last_step": 0.01}),
        ("vp", "noise", {"method": "sde", "steps": 400, "last_step": 0.01, "diffusion": "sbdm"}),
        ("gvp", "velocity", {"method": "sde", "steps": 400, "last_step": 0.01, "diffusion": "sbdm"}),
        ("ddpm", "noise", {"method": "sde", "steps": 400}),
        ("edm", "edm", {"method": "sde", "steps": 400}),
    ],
)
def test_stochastic_samplers_draw_the_data(path: str, kind: str, options: dict[str, Any]) -> None:
    images = sample(Gaussian(path, kind), count=100, **options)
    # Standard deviations of the moments over 12,800 elements: 0.0053 and 1.25 %; the steps add their error.
    assert float(images.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(images.std()) == pytest.approx(STD, rel=0.035)
    # What is left of the start: its share decays at the rate w / variance of x_t, from noise to data.
    begin = image_noise(keys(100), SHAPE, "sampling.start").flatten()
    correlation = float(torch.corrcoef(torch.stack([begin, images.flatten()]))[0, 1])
    assert correlation == pytest.approx(math.exp(-decay(path, kind, options)), abs=0.04)


def decay(path: str, kind: str, options: dict[str, Any]) -> float:
    """The integral of w / (alpha^2 std^2 + sigma^2) over the times of the steps, by the midpoint rule; the
    ancestral sampler has, in the limit of small steps, the noise of the forward SDE."""
    model = Gaussian(path, kind)
    times = step_times(SamplerConfig.model_validate(options), model.objective, model.path)
    edges = torch.linspace(times[-1] ** 0.25, times[0] ** 0.25, 20_001, dtype=torch.float64) ** 4
    t = (edges[1:] + edges[:-1]) / 2
    alpha, sigma, d_alpha, d_sigma = at = model.path.at(t)
    w = {"sigma": sigma, "constant": torch.ones_like(t)}.get(options.get("diffusion", "sigma"))
    if w is None or options["method"] == "ddpm":
        w = sigma * d_sigma - sigma**2 * d_alpha / alpha
    w = w * options.get("diffusion_scale", 1.0)
    return float((w / model.variance(at) * edges.diff()).sum())


def test_the_sde_without_noise_is_the_ode() -> None:
    model = Gaussian("gvp", "velocity")
    options: dict[str, Any] = {"method": "sde", "steps": 9, "diffusion_scale": 0.0}
    times = step_times(SamplerConfig.model_validate(options), model.objective, model.path)
    assert times[-1] == pytest.approx(0.04)
    x = start(model, times)
    for t, s in pairwise(times):
        at = model.at(t)
        x0 = model.predicted(x, t)
        x = x + (s - t) * (at.d_alpha * x0 + at.d_sigma * (x - at.alpha * x0) / at.sigma)
    torch.testing.assert_close(sample(model, **options), model.predicted(x, times[-1]))


def test_a_learned_variance_is_used_between_its_bounds() -> None:
    """Variance outputs of 1: DDPM's steps with beta; of -1: with beta tilde, as without a learned
    variance."""

    def drawn(output: float) -> Tensor:
        model = Gaussian("ddpm", "noise")

        def predict(batch: dict[str, Any]) -> Tensor:
            mean = model.predict(batch)
            return torch.cat([mean, torch.full_like(mean, output)], dim=1)

        objective = objective_config("ddpm", learn_sigma=True)
        denoiser = Denoiser(objective, model_config(out_channels=4), predict, dtype=torch.float64)
        config = SamplerConfig(method="ddpm", steps=4)
        return draw(denoiser, config, keys(2), SHAPE, labels(2))

    fixed = sample(Gaussian("ddpm", "noise"), method="ddpm", steps=4)
    torch.testing.assert_close(drawn(-1.0), fixed)
    # By hand, with betas between the steps that are taken: 1 - alpha-bar_t / alpha-bar_s.
    model = Gaussian("ddpm", "noise")
    times = [1.0, 0.667, 0.334, 0.001]
    x = start(model, times)
    for number, (t, s) in enumerate(pairwise(times)):
        bar_t, bar_s = float(model.at(t).alpha) ** 2, float(model.at(s).alpha) ** 2
        beta = 1 - bar_t / bar_s
        x0 = model.predicted(x, t)
        mean = (
            math.sqrt(bar_s) * beta / (1 - bar_t) * x0 + math.sqrt(1 - beta) * (1 - bar_s) / (1 - bar_t) * x
        )
        x = mean + math.sqrt(beta) * image_noise(keys(2), SHAPE, f"sampling.step.{number}")
    torch.testing.assert_close(drawn(1.0), model.predicted(x, 0.001))


class TestTimes:
    """Where the steps are."""

    def times(self, path: str, predict: str | None = None, **options: Any) -> list[float]:
        objective = objective_config(path, predict)
        model = Denoiser(objective, model_config(), lambda batch: batch["x"])
        return step_times(SamplerConfig.model_validate(options), objective, model.path)

    def test_continuous_paths_are_cut_evenly(self) -> None:
        assert self.times("linear", steps=4) == [1.0, 0.75, 0.5, 0.25]
        assert self.times("gvp", "noise", steps=2) == pytest.approx([0.999, 0.4995])
        assert self.times("vp", steps=3) == pytest.approx([1.0, 0.5005, 0.001])
        shifted = self.times("linear", steps=4, shift=3.0)
        assert shifted == pytest.approx([1.0, 0.9, 0.75, 0.5])

    def test_ddpm_takes_steps_from_the_last_to_the_first(self) -> None:
        assert self.times("ddpm", steps=4) == [1.0, 0.667, 0.334, 0.001]
        assert self.times("ddpm", steps=1000) == [k / 1000 for k in range(1000, 0, -1)]

    def test_edm_is_karras_schedule(self) -> None:
        """arXiv 2206.00364, equation 5."""
        exact = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
        assert self.times("edm", steps=18) == pytest.approx(exact)
        assert self.times("edm", steps=3, rho=1.0) == pytest.approx([80, 40.001, 0.002])

    def test_the_sde_ends_where_it_is_told(self) -> None:
        assert self.times("linear", steps=3, method="sde") == pytest.approx([1.0, 0.52, 0.04])
        assert self.times("linear", steps=2, method="sde", diffusion="sbdm")[0] == 0.999
