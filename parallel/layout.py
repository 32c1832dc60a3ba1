"""Which layouts are legal for a model and a batch, and where each rank stands in one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from triptych.models.config import LanguageConfig, ModelConfig
from triptych.models.count import build_on_meta
from triptych.models.diffusion_config import DiffusionConfig
from triptych.models.sharding import Cut
from triptych.parallel.config import AXES, ParallelConfig


class Layout:
    """The ranks of a `parallel:` section, in the order of the mesh (`AXES`, row-major)."""

    def __init__(self, config: ParallelConfig) -> None:
        self.config = config
        self.world_size = config.world_size
        self.dp_size = config.dp

    def coordinates(self, rank: int) -> dict[str, int]:
        """Index of a rank along each axis, outermost axis first."""
        assert 0 <= rank < self.world_size, f"rank {rank} is outside a world of {self.world_size}"
        place = {}
        for axis in reversed(AXES):
            rank, place[axis] = divmod(rank, self.config.degree(axis))
        return {axis: place[axis] for axis in AXES}

    def dp_rank(self, rank: int) -> int:
        """Which of the dp_size parts of a global batch a rank reads."""
        place = self.coordinates(rank)
        return place["dp_replicate"] * self.config.dp_shard + place["dp_shard"]

    def table(self) -> list[dict[str, int]]:
        """Rank by rank: rank, its coordinates, and the part of the batch (`dp_rank`) it reads."""
        return [
            {"rank": rank, **self.coordinates(rank), "dp_rank": self.dp_rank(rank)}
            for rank in range(self.world_size)
        ]

    def tensor_parallel_groups(self) -> list[list[int]]:
        """Lists of ranks that exchange activations within a layer, and so belong on one node."""
        tp = self.config.tp
        return [list(range(first, first + tp)) for first in range(0, self.world_size, tp)]

    def check(
        self, model: ModelConfig, *, seq_len: int, global_batch_size: int, micro_batch_size: int
    ) -> None:
        """Raises ValueError, with the reason and the mend, for what this layout cannot run.

        seq_len in tokens; batch sizes in samples (global_batch_size: of all ranks, per optimizer step).
        """
        self._check_batch(global_batch_size, micro_batch_size)
        whole = build_on_meta(model)
        self._check_tensor(model, seq_len, whole)
        self._check_pipeline(model, whole)
        self._check_experts(whole, global_batch_size, micro_batch_size)

    def _check_batch(self, global_batch_size: int, micro_batch_size: int) -> None:
        unit = self.dp_size * micro_batch_size
        if global_batch_size % unit:
            below = global_batch_size // unit * unit
            use = f"{below} or {below + unit}" if below else f"{unit}"
            raise ValueError(
                f"train.global_batch_size={global_batch_size} is not a multiple of "
                f"dp_replicate * dp_shard * micro_batch_size = {self.config.dp_replicate} * "
                f"{self.config.dp_shard} * {micro_batch_size} = {unit}; use {use}, "
                "or change train.micro_batch_size"
            )

    def _check_tensor(self, model: ModelConfig, seq_len: int, whole: nn.Module) -> None:
        tp = self.config.tp
        if tp == 1:
            return
        for name, module in whole.named_modules():
            if reason := getattr(module, "tp_refusal", None):
                raise ValueError(f"parallel.tp={tp} does not serve {name}: {reason}; use parallel.tp=1")
        for stage in model.stage_configs:
            _check_mixers(tp, stage)
        if isinstance(model, LanguageConfig):
            _require_divides(tp, "model.vocab_size", model.vocab_size)
        if self.config.sequence_parallel:
            self._check_sequence(model, seq_len)
        _check_tables(whole, tp)

    def _check_sequence(self, model: ModelConfig, seq_len: int) -> None:
        """The tokens of every stage, and those of the grid alone, are cut in equal parts."""
        key = "data.seq_len" if isinstance(model, LanguageConfig) else "tokens per sample"
        mend = "; or set parallel.sequence_parallel=false"
        _require_divides(self.config.tp, key, seq_len, mend)
        if prefix := getattr(model, "num_prefix_tokens", 0):
            _require_divides(self.config.tp, "tokens of the grid", seq_len - prefix, mend)
        last = model.length_at(model.num_layers - 1, seq_len)
        _require_divides(self.config.tp, "tokens of the last of model.stages", last, mend)

    def _check_experts(self, whole: nn.Module, global_batch_size: int, micro_batch_size: int) -> None:
        reason = one_pass(whole)
        passes = global_batch_size // (self.dp_size * micro_batch_size)
        if reason and passes > 1:
            raise ValueError(
                f"{reason}, and train.micro_batch_size={micro_batch_size} on {self.dp_size} data rank(s) "
                f"takes {passes} passes for train.global_batch_size={global_batch_size}; set "
                f"train.micro_batch_size={global_batch_size // self.dp_size}"
            )
        ep = self.config.ep
        if ep == 1:
            return
        stacked = {n: m for n, m in whole.named_modules() if getattr(m, "expert_parallel", False)}
        if not stacked:
            raise ValueError(
                f"parallel.ep={ep} divides experts, and no block of model.pattern has any; use parallel.ep=1"
            )
        for name, module in stacked.items():
            count = next(module.parameters()).shape[0]
            if count % ep:
                use = _listed(_divisors(count))
                raise ValueError(f"parallel.ep={ep} does not divide the {count} experts of {name}; use {use}")

    def _check_pipeline(self, model: ModelConfig, whole: nn.Module) -> None:
        pp = self.config.pp
        for name, module in whole.named_modules() if pp > 1 else ():
            if reason := getattr(module, "pp_refusal", None):
                raise ValueError(f"parallel.pp={pp} does not serve {name}: {reason}; use parallel.pp=1")
        if pp > model.num_layers:
            raise ValueError(
                f"parallel.pp={pp} exceeds model.num_layers={model.num_layers}: a stage would have no block; "
                f"use at most {model.num_layers}"
            )
        if pp > 1 and isinstance(model, DiffusionConfig) and model.shared_block_every:
            raise ValueError(
                f"parallel.pp={pp} with model.shared_block_every={model.shared_block_every}: places of one "
                "block in several stages would share its weights, which is not built; use parallel.pp=1 or "
                "model.shared_block_every=0"
            )
        if pp > 1 and isinstance(model, LanguageConfig) and model.tie_embeddings:
            raise ValueError(
                f"parallel.pp={pp} with model.tie_embeddings=true: the first and the last stage would share "
                "a weight, which is not built; use parallel.pp=1 or model.tie_embeddings=false"
            )


def build_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """The device mesh of a layout, over all ranks of the default process group.

    Raises RuntimeError when the group has another size than the layout.
    """
    world_size = torch.distributed.get_world_size()
    if world_size != layout.world_size:
        degrees = _product(layout.config)
        raise RuntimeError(
            f"the layout has {layout.world_size} ranks ({degrees}), but {world_size} are running"
        )
    shape = tuple(layout.config.degree(axis) for axis in AXES)
    return init_device_mesh(device_type, shape, mesh_dim_names=AXES)


def declared_cuts(model: nn.Module) -> dict[str, Cut]:
    """Name of each parameter that some module's table declares -> its cut. The innermost table wins."""
    cuts: dict[str, Cut] = {}
    for prefix, module in model.named_modules():
        for name, cut in getattr(module, "sharding", {}).items():
            cuts[f"{prefix}.{name}" if prefix else name] = cut
    return cuts


def cut_dim(cut: Cut, tp: int) -> int | None:
    """The dimension that is divided among tp ranks, or None when each rank holds the whole tensor."""
    if cut.kind in ("column", "vocab"):
        return 0
    if cut.kind in ("row", "expert_column"):
        return 1
    if cut.kind == "expert_row":
        return 2
    if cut.kind in ("kv_heads", "groups"):
        assert cut.count is not None, "kv_heads and groups are counted"
        return 0 if cut.count % tp == 0 else None
    return None


def one_pass(model: nn.Module) -> str | None:
    """Why the global batch must be one forward pass, if some module has a reason."""
    reasons = (getattr(module, "one_pass", None) for module in model.modules())
    return next(filter(None, reasons), None)


def _check_mixers(tp: int, model: ModelConfig) -> None:
    """The numbers of heads and groups of one stage."""
    mixers = {spec.mixer for spec in model.layer_specs()}
    if getattr(model, "shared_block_every", 0):
        mixers.add("attention")
    heads, kv_heads = model.attention.num_heads, model.attention.num_kv_heads
    if mixers & {"attention", "cross_attention"}:
        _require_divides(tp, "model.attention.num_heads", heads)
        _require_groups(tp, "model.attention.num_kv_heads", kv_heads, heads)
    if "dimsum" in mixers:
        _require_divides(tp, "half of model.attention.num_heads (dimsum)", heads // 2)
        _require_groups(tp, "half of model.attention.num_kv_heads (dimsum)", kv_heads // 2, heads // 2)
    if "mamba2" in mixers:
        heads = model.mamba2_num_heads
        _require_divides(tp, "expand * hidden_size / head_dim (heads) of model.mamba2", heads)
        _require_groups(tp, "model.mamba2.num_groups", model.mamba2.num_groups, heads)
    if "attention_moe" in mixers:
        _require_divides(tp, "model.attention_moe.top_k", model.attention_moe.top_k)


def _check_tables(model: nn.Module, tp: int) -> None:
    parameters = dict(model.named_parameters())
    for name, cut in declared_cuts(model).items():
        if name not in parameters:
            continue
        dim = cut_dim(cut, tp)
        if dim is not None:
            key = "model.ffn.intermediate_size" if ".ffn." in name else f"dimension {dim} of {name}"
            _require_divides(tp, key, parameters[name].shape[dim])
        elif cut.count is not None:
            _require_groups(tp, f"the number of {cut.kind} of {name}", cut.count, cut.count * tp)


def _require_divides(tp: int, key: str, number: int, mend: str = "") -> None:
    if number % tp:
        raise ValueError(
            f"parallel.tp={tp} does not divide {key}={number}; use {_listed(_divisors(number))}{mend}"
        )


def _require_groups(tp: int, key: str, groups: int, heads: int) -> None:
    """Groups are either divided among the ranks or each is shared by an equal number of them."""
    if groups % tp and tp % groups:
        fitting = [n for n in _divisors(heads) if groups % n == 0 or n % groups == 0]
        raise ValueError(
            f"parallel.tp={tp} is neither a divisor nor a multiple of {key}={groups}; use {_listed(fitting)}"
        )


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _listed(numbers: Iterable[int]) -> str:
    words = [str(n) for n in itertools.islice(numbers, 8)]
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _product(config: ParallelConfig) -> str:
    return (
        " * ".join(f"{axis} {config.degree(axis)}" for axis in AXES if config.degree(axis) > 1)
        or "all axes 1"
    )
