"""A few training steps, on one process without any of parallel/, and under a layout: what the tests compare.

Shape legend: N samples, T length, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from triptych import models
from triptych.models.config import LanguageConfig
from triptych.parallel.config import ParallelConfig
from triptych.parallel.layout import Layout, build_mesh
from triptych.parallel.model import ParallelModel
from triptych.parallel.parallelize import parallelize
from triptych.parallel.shards import local_part

SEED = 7
GLOBAL_BATCH, SEQ_LEN, VOCABULARY = 12, 16, 24
STEPS, MAX_NORM = 2, 0.5
MIXERS: dict[str, Any] = {
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4},
    "mamba2": {"state_size": 4, "head_dim": 4, "expand": 2, "num_groups": 1, "chunk_size": 8},
}


def model_config(**changes: Any) -> LanguageConfig:
    """Four blocks, mamba2 and attention in turn, 16 channels; small but with every kind of cut."""
    whole: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_layers": 4,
        "pattern": ["mamba2", "attention+gelu"],
        "ffn": {"intermediate_size": 24, "bias": True},
        "init_std": 0.3,
        **MIXERS,
    }
    for key, value in changes.items():
        whole[key] = {**whole.get(key, {}), **value} if isinstance(value, dict) else value
    return LanguageConfig(**whole)


def global_batch(step: int) -> dict[str, torch.Tensor]:
    """Packed documents, some of them ending within a row, and targets of which a few do not count."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (GLOBAL_BATCH, SEQ_LEN), generator=generator)
    targets = torch.randint(VOCABULARY, (GLOBAL_BATCH, SEQ_LEN), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = -100
    ends = torch.rand(tokens.shape, generator=generator) < 0.15
    document_ids = ends.cumsum(dim=1)
    sample_keys = torch.randint(2**60, (GLOBAL_BATCH,), generator=generator)
    return {"tokens": tokens, "targets": targets, "document_ids": document_ids, "sample_keys": sample_keys}


def loss_function(count: int) -> Any:
    return lambda nll, targets: nll.sum() / count


def counted(batch: dict[str, torch.Tensor]) -> int:
    return int((batch["targets"] != -100).sum())


def train_alone(config: LanguageConfig) -> dict[str, Any]:
    """The reference: one process, one batch, plain autograd."""
    model = models.build(config).to(torch.float64)
    models.initialize(model, SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen: dict[str, Any] = {"initial": _copies(model), "losses": [], "norms": [], "evaluations": []}
    for step in range(STEPS):
        batch = global_batch(step)
        inputs = {name: batch[name] for name in ("document_ids", "sample_keys", "targets")}
        loss = model(batch["tokens"], **inputs).sum() / counted(batch)
        loss.backward()
        if step == 0:
            seen["gradients"] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        for router in filter(lambda module: getattr(module, "balanced", False), model.modules()):
            router.update(router.take_record())
        model.eval()
        with torch.no_grad():
            seen["evaluations"].append(float(model(batch["tokens"], **inputs).sum() / counted(batch)))
        model.train()
        seen["losses"].append(float(loss.detach()))
        seen["norms"].append(float(norm))
    seen["parameters"] = _copies(model)
    return seen


def parallel_model(
    config: LanguageConfig, parallel: ParallelConfig, micro_batch_size: int, **options: Any
) -> ParallelModel:
    layout = Layout(parallel)
    return parallelize(
        config,
        parallel,
        mesh=build_mesh(layout, "cpu"),
        device=torch.device("cpu"),
        seed=SEED,
        seq_len=SEQ_LEN,
        micro_batch_size=micro_batch_size,
        num_micro_batches=GLOBAL_BATCH // layout.dp_size // micro_batch_size,
        **{"dtype": torch.float64, **options},
    )


def without_documents(config: LanguageConfig, parallel: ParallelConfig) -> dict[str, float]:
    """Loss of a step in which some or all micro-batches have no document_ids."""
    model = parallel_model(config, parallel, micro_batch_size=6)
    loss_fn = loss_function(1)
    losses = {}
    for which in ("all", "first"):
        batches = local_micro_batches(model.layout, 0, 6)
        for batch in batches if which == "all" else batches[:1]:
            batch["document_ids"] = None  # type: ignore[assignment]
        losses[which] = float(model.sum_over_data(model.forward_backward(batches, loss_fn)))
    return losses


def local_micro_batches(layout: Layout, step: int, micro_batch_size: int) -> list[dict[str, torch.Tensor]]:
    """This rank's part of the global batch, cut into micro-batches."""
    per_rank = GLOBAL_BATCH // layout.dp_size
    first = layout.dp_rank(dist.get_rank()) * per_rank
    return [
        {name: value[start : start + micro_batch_size] for name, value in global_batch(step).items()}
        for start in range(first, first + per_rank, micro_batch_size)
    ]


def train_under(config: LanguageConfig, parallel: ParallelConfig, micro_batch_size: int) -> dict[str, Any]:
    """The same steps on this rank of a layout; rank 0 returns what `train_alone` does, others less."""
    layout = Layout(parallel)
    model = parallel_model(config, parallel, micro_batch_size)
    # Element by element, so on the local parts; as DTensors they would cost a minute of sharding propagation.
    local = [shard.tensor for shard in model.shards()]
    optimizer = torch.optim.AdamW(local, lr=1e-2)
    seen: dict[str, Any] = {
        "initial": model.gather(lambda p: p),
        "losses": [],
        "norms": [],
        "evaluations": [],
    }
    for step in range(STEPS):
        loss_fn = loss_function(counted(global_batch(step)))
        micro_batches = local_micro_batches(layout, step, micro_batch_size)
        loss = model.forward_backward(micro_batches, loss_fn)
        model.reduce_gradients()
        if step == 0:
            seen["gradients"] = model.gather(lambda p: p.grad)
        norm = model.grad_norm()
        model.scale_gradients(torch.clamp(MAX_NORM / (norm + 1e-6), max=1.0))
        for tensor, (_, parameter) in zip(local, model.named_parameters()):
            tensor.grad = None if parameter.grad is None else local_part(parameter.grad)
        optimizer.step()
        model.zero_grad()
        model.update_routers()
        seen["losses"].append(float(model.sum_over_data(loss)))
        seen["norms"].append(float(norm))
        seen["evaluations"].append(float(model.sum_over_data(model.forward(micro_batches, loss_fn))))
    seen["parameters"] = model.gather(lambda p: p)
    seen["writers"] = _count_writers(model)
    return seen


def logits_alone(config: LanguageConfig) -> torch.Tensor:
    model = models.build(config).to(torch.float64).eval()
    models.initialize(model, SEED)
    with torch.no_grad():
        return model(global_batch(0)["tokens"][:2])


def logits_under(config: LanguageConfig, parallel: ParallelConfig) -> torch.Tensor:
    model = parallel_model(config, parallel, micro_batch_size=1)
    model.module.eval()
    with torch.no_grad():
        return model.module(global_batch(0)["tokens"][:2])


def frozen_gradients(
    config: LanguageConfig, parallel: ParallelConfig, patterns: tuple[str, ...]
) -> dict[str, Any]:
    """Gradients and their norm in the first step, on rank 0, with parameters or rows of them frozen."""
    layout = Layout(parallel)
    per_rank = GLOBAL_BATCH // layout.dp_size
    model = parallel_model(config, parallel, per_rank // 2, frozen=patterns)
    batches = local_micro_batches(layout, 0, per_rank // 2)
    model.forward_backward(batches, loss_function(counted(global_batch(0))))
    model.reduce_gradients()
    return {"gradients": model.gather(lambda p: p.grad), "norm": float(model.grad_norm())}


def autocast_loss(config: LanguageConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Loss and gradient norm of one step with bfloat16 matmuls over fp32 parameters."""
    model = parallel_model(config, parallel, 3, dtype=torch.float32, autocast_dtype=torch.bfloat16)
    loss_fn = loss_function(counted(global_batch(0)))
    loss = model.forward_backward(local_micro_batches(model.layout, 0, 3), loss_fn)
    model.reduce_gradients()
    dtypes = {p.grad.dtype for _, p in model.named_parameters() if p.grad is not None}
    return {"loss": float(model.sum_over_data(loss)), "norm": float(model.grad_norm()), "dtypes": dtypes}


def largest_difference(seen: Any, expected: Any) -> tuple[float, str]:
    """Largest difference relative to the largest magnitude of each tensor, and where it is."""
    worst = (0.0, "nowhere")
    for what, value in expected.items():
        for name, tensor in value.items() if isinstance(value, dict) else ((what, torch.tensor(value)),):
            other = torch.as_tensor(seen[what][name] if isinstance(value, dict) else seen[what])
            scale = tensor.abs().max().clamp(min=1e-8)
            difference = float((other - tensor).abs().max() / scale)
            if not difference <= worst[0]:
                worst = (difference, f"{what} {name}")
    return worst


def _copies(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _count_writers(model: ParallelModel) -> bool:
    """Whether over all ranks the writers' parts make up each whole exactly once."""
    written: dict[str, int] = {}
    gathered: list[Any] = [None] * dist.get_world_size()
    shards = [(s.name, s.tensor.numel() if s.is_writer else 0, s.global_shape) for s in model.shards()]
    dist.all_gather_object(gathered, shards)
    for name, elements, _ in (shard for rank in gathered for shard in rank):
        written[name] = written.get(name, 0) + elements
    wholes = {name: torch.Size(shape).numel() for rank in gathered for name, _, shape in rank}
    return written == wholes
