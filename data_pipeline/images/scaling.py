"""How latents are scaled, held against what wrote them, so that nothing is scaled twice."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from triptych.data_pipeline.images.config import ImageDataConfig
from triptych.data_pipeline.images.description import Description


@dataclass(frozen=True)
class LatentScale:
    """A model sees (z - shift) * factor."""

    factor: float
    shift: float


# Latents whose standard deviation is this many times off are no longer explained by the data.
_FAR = 2.5


def latent_scale(
    label: str, config: ImageDataConfig, description: Description | None, values: npt.NDArray[np.floating]
) -> LatentScale:
    """How the latents of a source are to be scaled.

    values: of some of its latents (or none), held against what dataset.json says. Raises ValueError where
    section `data.vae` and dataset.json disagree, neither gives a factor, or the values are scaled already.
    """
    vae, told = config.vae, description or Description("latents", config.channels, None, 0, 0)
    if vae.id is not None and told.vae is not None and vae.id != told.vae:
        raise ValueError(
            f"source {label} holds latents of {told.vae}, not of data.vae.id={vae.id}; set it so, or encode "
            "again"
        )
    for name in ("scale_factor", "shift_factor"):
        wanted, given = getattr(vae, name), getattr(told, name)
        if not told.scaled and None not in (wanted, given) and not math.isclose(wanted, given, rel_tol=1e-6):
            raise ValueError(
                f"data.vae.{name}={wanted}, but dataset.json of source {label} says {given}; remove the first"
            )
    if told.scaled:
        if vae.scale_factor not in (None, 1.0) or vae.shift_factor not in (None, 0.0):
            raise ValueError(
                f"the latents of source {label} are scaled already (dataset.json: scaled true), and "
                f"data.vae.scale_factor={vae.scale_factor}, shift_factor={vae.shift_factor} would do it "
                "twice; remove both"
            )
        return LatentScale(1.0, 0.0)
    factor = vae.scale_factor if vae.scale_factor is not None else told.scale_factor
    shift = vae.shift_factor if vae.shift_factor is not None else told.shift_factor
    if factor is None:
        raise ValueError(
            f"nothing says how the latents of source {label} are scaled: it has no dataset.json with "
            "scale_factor; set data.vae.scale_factor (0.18215 for Stable Diffusion's autoencoder; 1 if they "
            "are scaled already)"
        )
    if values.size:
        _refuse_scaled_values(label, factor, told.latent_std, float(np.std(values, dtype=np.float64)))
    return LatentScale(factor, shift or 0.0)


def _refuse_scaled_values(label: str, factor: float, recorded: float | None, found: float) -> None:
    """Raises ValueError if latents of standard deviation `found` look like scaled ones.

    They should have the one recorded in dataset.json, and without a record about 1 / factor, which is how
    factors are chosen. Scaled ones have `factor` times that. Where the two are close nothing can be told.
    """
    raw = recorded if recorded is not None else 1.0 / factor
    scaled = raw * factor
    off = abs(math.log(max(found, 1e-12) / raw))
    if off > math.log(_FAR) and off > 2 * abs(math.log(max(found, 1e-12) / scaled)):
        raise ValueError(
            f"the latents of source {label} have standard deviation {found:.3g}, which is that of scaled "
            f"ones (about {scaled:.3g}; before scaling {raw:.3g}), and scale_factor={factor} would scale "
            "them twice. If they are scaled, say so with scaled: true in dataset.json, or "
            "data.vae.scale_factor: 1 where there is none; if the autoencoder does give such values, record "
            "their latent_std in dataset.json"
        )
