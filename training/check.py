"""What can be seen to be wrong with a run before any rank of it exists."""

from __future__ import annotations

from triptych.models import DiffusionConfig, VisionConfig
from triptych.models.registry import MIXERS
from triptych.parallel.config import ParallelConfig
from triptych.parallel.freezing import check_freeze
from triptych.parallel.layout import Layout
from triptych.training.data import check_data, check_sections
from triptych.training.image_grids import check_grids
from triptych.training.objectives import build_objective
from triptych.training.sections import RunSections, lengths, tokens_per_sample


def check(run: RunSections) -> None:
    """Raise ValueError for sections that do not go together; reads the headers of the data."""
    check_sections(run)
    if run.train.tasks and not isinstance(run.model, VisionConfig):
        raise ValueError(f"train.tasks is for vision, and model.family={run.model.family}; remove it")
    if not isinstance(run.model, DiffusionConfig):
        for key, value in (("train.tread", run.train.tread), ("log.images", run.log.images)):
            if value is not None:
                raise ValueError(f"{key} is for denoisers, and model.family={run.model.family}; remove it")
    check_data(run)
    build_objective(run)
    if run.log.images is not None:
        check_grids(run)
    check_freeze(run.model, run.train.freeze)
    _check_layer_decay(run)
    check_layout(run, run.parallel, run.train.micro_batch_size)
    if run.train.eval_every and not run.data.valid:
        raise ValueError(
            f"train.eval_every={run.train.eval_every} needs validation data; name it in data.valid or set "
            "train.eval_every=0"
        )


def _check_layer_decay(run: RunSections) -> None:
    """It goes by the numbers of blocks, which a backbone of timm has not got."""
    decay, timm = run.train.optimizer.layer_decay, getattr(run.model, "timm", None)
    if decay != 1.0 and timm is not None:
        raise ValueError(
            f"train.optimizer.layer_decay={decay} goes by the model's blocks, and model.timm={timm} has "
            "names of its own; set layer_decay=1, or freeze parts of it by train.freeze"
        )


def check_layout(run: RunSections, parallel: ParallelConfig, micro_batch_size: int) -> None:
    """Raise ValueError where the run cannot have this layout, with micro-batches of so many samples."""
    check_sections(run)
    Layout(parallel).check(
        run.model,
        seq_len=tokens_per_sample(run),
        global_batch_size=run.train.global_batch_size,
        micro_batch_size=micro_batch_size,
    )
    _check_routing(run)
    if parallel.tp > 1 and parallel.sequence_parallel:
        _check_lengths(run, parallel.tp)


def _check_routing(run: RunSections) -> None:
    """TREAD with these mixers."""
    tread = run.train.tread
    if tread is None:
        return
    for spec in run.model.layer_specs()[tread.start : tread.end]:
        if reason := getattr(MIXERS.get(spec.mixer or ""), "tread_refusal", None):
            raise ValueError(
                f"train.tread leaves tokens out of blocks {tread.start} to {tread.end - 1}, where "
                f"{spec.mixer} stands: {reason}; remove train.tread, or choose other blocks"
            )


def _check_lengths(run: RunSections, tp: int) -> None:
    """Sequence parallelism cuts along T: the tokens of every size, and those of them that TREAD keeps."""
    tread = run.train.tread
    for tokens in lengths(run):
        if tokens % tp:
            raise ValueError(
                f"parallel.tp={tp} does not divide the {tokens} tokens of one of the sizes in data.buckets; "
                "leave that size out, or set parallel.sequence_parallel=false"
            )
        kept = tokens - int(tokens * tread.rate) if tread is not None else tokens
        if tread is not None and kept % tp:
            raise ValueError(
                f"parallel.tp={tp} does not divide the {kept} of {tokens} tokens that train.tread.rate="
                f"{tread.rate} keeps; change the rate, or set parallel.sequence_parallel=false"
            )
