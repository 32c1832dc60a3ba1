"""The learning rate as a pure function of the step, so that a resumed run needs no state of it."""

from __future__ import annotations

import math

from triptych.training.config import ScheduleConfig


def factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Factor on the peak learning rate in step `step` = 1..steps of `steps`.

    Warm-up of w steps: step / w. After it, with progress p in (0, 1] that is 1 at the last step and
    m = min_ratio: cosine m + (1 - m)(1 + cos(pi p)) / 2, linear m + (1 - m)(1 - p), constant 1. wsd stays
    at 1 and has progress over its last `decay` steps only: m + (1 - m)(1 - sqrt(p)) (arXiv 2405.18392).
    """
    assert 1 <= step <= steps, f"step {step} is not one of 1..{steps}"
    if step <= config.warmup:
        return step / config.warmup
    if config.kind == "constant":
        return 1.0
    length = steps - config.warmup
    if config.kind == "wsd":
        length = min(length, config.decay if config.decay is not None else max(1, steps // 5))
    progress = max(0.0, (step - (steps - length)) / length)
    if config.kind == "cosine":
        height = (1.0 + math.cos(math.pi * progress)) / 2.0
    elif config.kind == "linear":
        height = 1.0 - progress
    else:
        height = 1.0 - math.sqrt(progress)
    return config.min_ratio + (1.0 - config.min_ratio) * height
