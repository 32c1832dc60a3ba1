"""Which settings of a router go together."""

from __future__ import annotations

from triptych.models.config import ModelConfig
from triptych.models.moe_config import RouterConfig


def check_router(
    config: ModelConfig, settings: RouterConfig, section: str, num_experts: dict[int, int]
) -> None:
    """Raises ValueError for settings that do not go together.

    section: such as model.moe. num_experts: experts of all kinds, of each layer with such a router.
    """
    for layer, count in num_experts.items():
        _check_counts(settings, section, layer, count)
    for layer in settings.num_experts_of:
        if layer not in num_experts:
            raise ValueError(
                f"{section}.num_experts_of.{layer}: block {layer} of model.pattern has no such experts; use "
                f"one of {', '.join(map(str, num_experts))}"
            )
    tasks = config.task_names
    for task in settings.visible:
        if task not in tasks:
            known = ", ".join(tasks) if any(tasks) else "none in this family"
            raise ValueError(f"{section}.visible.{task}: no task has that name; there are {known}")
    losses = settings.losses
    if losses.load and (settings.router != "noisy" or settings.noise_std == 0):
        raise ValueError(
            f"{section}.losses.load={losses.load} is of noise, and router={settings.router} with noise_std="
            f"{settings.noise_std} has none; use router: noisy, or losses.importance"
        )
    if losses.mutual_information and len(tasks) == 1:
        raise ValueError(
            f"{section}.losses.mutual_information={losses.mutual_information} is of tasks and experts, and "
            "there is one task; use losses.switch"
        )
    by_expert = settings.router == "expert_choice"
    if settings.normalize and (settings.top_k == 1 or by_expert):
        raise ValueError(
            f"{section}.normalize=true with top_k={settings.top_k} and router={settings.router}: the weight "
            "of an only expert would be 1 and teach the router nothing; leave normalize out"
        )
    if by_expert and config.causal:
        raise ValueError(
            f"{section}.router=expert_choice compares tokens with later ones, which model.family="
            f"{config.family} must not see; use softmax, noisy or sigmoid"
        )
    if by_expert and settings.routing == "capacity":
        raise ValueError(
            f"{section}.routing=capacity with router=expert_choice, whose experts take capacity_factor's "
            "share anyway; leave routing out"
        )


def _check_counts(settings: RouterConfig, section: str, layer: int, count: int) -> None:
    if not settings.top_k <= count:
        raise ValueError(
            f"{section}.top_k={settings.top_k} exceeds the {count} experts of layer {layer}; use at most "
            f"{count}"
        )
    for task, seen in settings.visible.items():
        if not settings.top_k <= seen <= count:
            raise ValueError(
                f"{section}.visible.{task}={seen} must be at least {section}.top_k={settings.top_k} and at "
                f"most {count}, the experts of layer {layer}"
            )
