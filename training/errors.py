"""Failures of a run that are the run's own, not the machine's."""

from __future__ import annotations


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient stopped being a number; raised on every rank in the same step.

    Starting again from the last checkpoint would meet the same data with the same numbers, so a launcher must
    not retry: `retryable` is False.
    """

    retryable = False

    def __init__(self, step: int, data_ranks: tuple[int, ...], what: str, skipped: int) -> None:
        self.step = step
        self.data_ranks = data_ranks
        self.what = what
        self.skipped = skipped
        where = (
            f"it arose on data rank {', '.join(map(str, data_ranks))}"
            if data_ranks
            else "the loss was finite on every data rank"
        )
        before = f" after {skipped} skipped steps" if skipped else ""
        super().__init__(
            f"{what} is not finite in step {step}{before}; {where}. Checkpoints are untouched. Lower "
            "train.optimizer.lr, lengthen train.schedule.warmup, or let such steps pass with "
            "train.max_skipped_steps"
        )

    def __reduce__(self) -> tuple[type[NonFiniteLoss], tuple[int, tuple[int, ...], str, int]]:
        return type(self), (self.step, self.data_ranks, self.what, self.skipped)
