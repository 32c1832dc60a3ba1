"""Every packaged denoiser, shrunk: the same blocks, orders, conditioning and objective, a few layers of a few
channels on 8 x 8 latents."""

from __future__ import annotations

from collections.abc import Sequence

from triptych.launcher.config import RunConfig, load

# Laid over every configuration; sizes by name are left aside.
SHRUNK = (
    "model.size=null",
    "model.hidden_size=48",
    "model.num_layers=4",
    "model.input_size=[8,8]",
    "model.attention.num_heads=4",
    "model.ffn.intermediate_size=64",
    "model.conditioning.num_classes=10",
    "data.channels=4",
    "parallel.dp_shard=1",
    "train.steps=6",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.optimizer.lr=1.0e-3",
    "train.precision=fp32",
    "cluster.threads_per_worker=1",
)
GRID = ("data.image_size=8",)
"""16 tokens."""
PACKED = ("data.packing={max_tokens: 24, max_images: 3, patch_size: 2, max_image_tokens: 16}",)
SCAN = ("model.mamba1.state_size=4", "model.mamba1.chunk_size=8")
DEMO = (*GRID, "data.channels=1", "train.schedule.warmup=2", "train.eval_every=0", "log.images=null")

BACKBONES: dict[str, Sequence[str]] = {
    "demo": DEMO,
    "demo-hybrid": (*DEMO, "model.mamba2.head_dim=12", "model.mamba2.state_size=4"),
    "demo-mamba": (*DEMO, *SCAN),
    "dit": GRID,
    "sit": GRID,
    "dit-moe": (*GRID, "model.moe.num_experts=4", "model.moe.expert.intermediate_size=16", "parallel.ep=1"),
    "dit-text": (*GRID, "model.conditioning.text_size=6", "model.conditioning.text_length=3"),
    "fit": (*PACKED, "model.rope_scaling.trained=[4,4]"),
    "fitv2": (*PACKED, "model.rope_scaling.trained=[4,4]", "model.modulation.rank=6"),
    "zigma": (*GRID, *SCAN),
    "dim": (*GRID, *SCAN, "model.num_layers=5"),
    "dimsum": (*GRID, *SCAN, "model.shared_block_every=2"),
    "rwkv": (*GRID, "model.num_layers=5"),
    "hybrid": (*GRID, "model.mamba2.head_dim=12", "model.mamba2.state_size=4", "model.mamba2.chunk_size=8"),
}
"""Name of a file of configs/diffusion -> what is laid over it besides."""


def shrunk(name: str, *overrides: str) -> RunConfig:
    """configs/diffusion/<name>.yaml with the small sizes and `overrides` laid over it."""
    return load(f"configs/diffusion/{name}.yaml", [*SHRUNK, *BACKBONES[name], *overrides])


def tread(config: RunConfig, rate: float = 0.5) -> str:
    """The override that routes tokens around all blocks but the first and the last."""
    return f"train.tread={{rate: {rate}, start: 1, end: {config.model.num_layers - 1}}}"
