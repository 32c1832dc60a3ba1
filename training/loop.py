"""The training loop of one rank. Steps count from 1; every rank runs the same lines in the same order."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triptych.training.session import Session


def train(session: Session) -> None:
    """Run the steps that a session still has to do.

    Raises NonFiniteLoss, on all ranks in the same step, when more steps than train.max_skipped_steps were not
    finite.
    """
    config, checkpoint = session.run.train, session.run.checkpoint
    for step in range(session.step + 1, config.steps + 1):
        batch = session.fetch(step)
        loss = session.forward_backward(batch)
        grad_norm = session.reduce_and_clip()
        session.update(step, loss, grad_norm)
        if due(step, config.eval_every, config.steps):
            session.evaluate()
        session.report(step, loss, grad_norm)
        if due(step, session.grids_every, config.steps):
            session.draw_grid(step)
        if due(step, checkpoint.every, config.steps) or step == config.steps:
            session.save(step)


def due(step: int, every: int, steps: int) -> bool:
    """Whether something done every `every` steps (0: never) and after the last is done after `step`."""
    return every > 0 and (step % every == 0 or step == steps)
