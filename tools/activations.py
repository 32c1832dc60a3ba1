"""Bytes that autograd keeps for one block, per layout, against formulas: `triptych bench activations`.

The attention + GELU block is held against the table of Korthikanti et al. 2022 (arXiv 2205.05198, table 2),
the Mamba-2 block against a table of the same kind that is given here; docs/activations.md explains both.
Whatever a formula does not have is listed by name, and formula and extras together are the measured bytes to
the byte.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from rich.console import Group
from rich.text import Text
from torch.distributed.device_mesh import init_device_mesh

from triptych.parallel.collectives import Axis
from triptych.parallel.config import ParallelConfig
from triptych.parallel.local import run_local
from triptych.tools.activation_formulas import FORMULAS, Block, Term, attention_block, mamba2_block
from triptych.tools.counting import StageSpec, count_stage, count_stage_on
from triptych.tools.kept import Kept, total_bytes
from triptych.tools.render import table_of

if TYPE_CHECKING:
    from rich.console import RenderableType

LAYER_NORM_STATISTICS = "mean and 1/std of the layer norms"
SAMPLE_KEYS = "keys of the samples, for the dropouts that run again"
UNEXPLAINED = "UNEXPLAINED"


@dataclass(frozen=True)
class ActivationRow:
    """One block under one layout, bytes per rank and micro-batch."""

    block: str
    tensor_parallel: int
    sequence_parallel: bool
    recompute: str
    measured: int
    terms: list[Term]
    """The formula's terms."""
    extras: list[Term]
    """What is kept beyond the formula; with the formula's terms they add up to `measured`."""
    of_weights: int
    """Bytes kept that were computed from parameters alone; not in `measured`."""

    @property
    def formula(self) -> int:
        """Bytes that the formula gives."""
        return sum(term.num_bytes for term in self.terms)


@dataclass(frozen=True)
class ActivationReport:
    """Every block under every layout."""

    blocks: list[Block]
    rows: list[ActivationRow]
    counted: str
    """Where: on fake tensors, or in real processes."""

    @property
    def ok(self) -> bool:
        """True when nothing is unexplained."""
        return all(extra.name != UNEXPLAINED for row in self.rows for extra in row.extras)

    def table(self) -> RenderableType:
        """A table per block, and for each block its formula on one device."""
        parts: list[RenderableType] = []
        for block in self.blocks:
            rows = [row for row in self.rows if row.block == block.name]
            columns = ["layout", "recompute", "measured", "formula", "difference", "which is"]
            lines = [
                [
                    _layout_text(row),
                    row.recompute,
                    f"{row.measured:,}",
                    f"{row.formula:,}",
                    f"{row.measured - row.formula:,}",
                    "; ".join(f"{extra.name} {extra.num_bytes:,}" for extra in row.extras) or "-",
                ]
                for row in rows
            ]
            parts.append(table_of(f"{_title(block)}: bytes kept for backward, bf16", columns, lines))
            terms = FORMULAS[block.name](block, ParallelConfig())
            lines = [[term.name, term.formula, f"{term.num_bytes:,}"] for term in terms]
            parts.append(
                table_of(f"{block.name}: the formula, on one device", ["kept", "bytes", "here"], lines)
            )
        return Group(*parts, Text(f"Counted {self.counted}."))

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        rows = [asdict(row) | {"formula": row.formula} for row in self.rows]
        shapes = {
            block.name: {
                "batch": block.batch,
                "seq_len": block.seq_len,
                "model": block.model.model_dump(mode="json"),
            }
            for block in self.blocks
        }
        return {"ok": self.ok, "counted": self.counted, "blocks": shapes, "rows": rows}


def activation_report(
    *,
    tensor_parallel: Sequence[int] = (1, 2, 4),
    processes: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ActivationReport:
    """Measure an attention + GELU block and a Mamba-2 block in bf16 under each layout, against the formulas.

    processes: count in real gloo processes, on small blocks, instead of on fake tensors of the size of
    published models (the attention block is a layer of the paper's 22B model).
    Raises ValueError for a degree that does not divide the blocks' heads and groups.
    """
    blocks = small_blocks() if processes else published_blocks()
    rows = []
    for block in blocks:
        for parallel in layouts(tensor_parallel):
            if progress is not None:
                progress(f"{block.name}, tp {parallel.tp}, recompute {parallel.recompute}")
            rows.append(measure(block, parallel, processes=processes))
    counted = (
        "in real gloo processes, on the CPU; every rank kept the same"
        if processes
        else "on fake tensors (shapes without memory), as the CPU's operators would keep"
    )
    return ActivationReport(blocks, rows, counted)


def published_blocks() -> list[Block]:
    """A layer of the 22B model of arXiv 2205.05198, and a Mamba-2 layer of 8B models."""
    return [
        attention_block(batch=4, seq_len=2048, hidden_size=6144, num_heads=64),
        mamba2_block(batch=4, seq_len=2048, hidden_size=4096),
    ]


def small_blocks() -> list[Block]:
    """Blocks that four processes can run in no time."""
    return [
        attention_block(batch=2, seq_len=64, hidden_size=64, num_heads=4),
        mamba2_block(
            batch=2, seq_len=64, hidden_size=64, head_dim=16, state_size=8, num_groups=4, chunk_size=16
        ),
    ]


def layouts(tensor_parallel: Sequence[int]) -> Iterator[ParallelConfig]:
    """Each degree, without and with sequence parallelism, with each recomputation."""
    for tp in tensor_parallel:
        for sequence_parallel in (False, True) if tp > 1 else (False,):
            for recompute in ("none", "selective", "full"):
                yield ParallelConfig(tp=tp, sequence_parallel=sequence_parallel, recompute=recompute)


def measure(block: Block, parallel: ParallelConfig, *, processes: bool) -> ActivationRow:
    """Count one block under one layout.

    In real processes all ranks must keep the same number of bytes.
    """
    spec = StageSpec(
        block.model, parallel, range(1), False, False, block.batch, block.seq_len, torch.bfloat16
    )  # fmt: skip
    if processes:
        ranks = run_local(parallel.tp, count_on_rank, spec)
        totals = {total_bytes(kept) for kept in ranks}
        assert len(totals) == 1, f"ranks keep different numbers of bytes: {sorted(totals)}"
        kept = ranks[0]
    else:
        kept = count_stage(spec).kept
    terms = FORMULAS[block.name](block, parallel)
    return ActivationRow(
        block=block.name,
        tensor_parallel=parallel.tp,
        sequence_parallel=parallel.sequence_parallel,
        recompute=parallel.recompute,
        measured=total_bytes(kept),
        terms=terms,
        extras=_extras(kept, total_bytes(kept) - sum(term.num_bytes for term in terms)),
        of_weights=total_bytes(kept, weights=True),
    )


def count_on_rank(spec: StageSpec) -> list[Kept]:
    """Body of one real process."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return count_stage_on(spec, Axis.of(mesh)).kept


def _extras(kept: Sequence[Kept], difference: int) -> list[Term]:
    """Name the `difference` between what is kept and the formula."""
    sizes: dict[str, int] = defaultdict(int)
    for one in kept:
        # (B, T): mean and rstd; the norm's output has channels besides.
        if one.op == "triptych.layer_norm" and len(one.shape) == 2:
            sizes[LAYER_NORM_STATISTICS] += one.num_bytes
        elif one.dtype == "int64" and len(one.shape) == 1:
            sizes[SAMPLE_KEYS] += one.num_bytes
    extras = [Term(name, size) for name, size in sizes.items()]
    rest = difference - sum(sizes.values())
    return [*extras, Term(UNEXPLAINED, rest)] if rest else extras


def _layout_text(row: ActivationRow) -> str:
    if row.tensor_parallel == 1:
        return "one device"
    return f"tp {row.tensor_parallel}" + (" + sequence" if row.sequence_parallel else "")


def _title(block: Block) -> str:
    model = block.model
    sizes = f"s {block.seq_len}, b {block.batch}, h {model.hidden_size}"
    if block.name == "mamba2":
        mamba2 = model.mamba2
        sizes += (
            f", i {model.mamba2_inner_size}, H {model.mamba2_num_heads}, G {mamba2.num_groups}, "
            f"N {mamba2.state_size}, q {mamba2.chunk_size}"
        )
    else:
        sizes += f", a {model.attention.num_heads}"
    return f"{block.name} block ({sizes})"
