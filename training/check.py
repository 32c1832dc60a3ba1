"""What can be seen to be wrong with a run before any rank of it exists."""

from __future__ import annotations

from triptych.data_pipeline.vocabulary import check_vocabulary
from triptych.parallel.layout import Layout
from triptych.training.sections import RunSections


def check(run: RunSections) -> None:
    """Raise ValueError for sections that do not go together; reads the headers of the data."""
    Layout(run.parallel).check(
        run.model,
        seq_len=run.data.seq_len,
        global_batch_size=run.train.global_batch_size,
        micro_batch_size=run.train.micro_batch_size,
    )
    check_vocabulary(run.data, run.model.vocab_size)
    if run.train.eval_every and not run.data.valid:
        raise ValueError(
            f"train.eval_every={run.train.eval_every} needs validation data; name it in data.valid or set "
            "train.eval_every=0"
        )
