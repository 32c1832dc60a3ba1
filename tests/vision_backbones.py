"""Every packaged vision configuration, shrunk: the same blocks, orders, tasks and routers, a few layers of a
few channels on small colour images."""

from __future__ import annotations

from collections.abc import Sequence

from triptych.launcher.config import RunConfig, load

# Laid over every configuration.
SHRUNK = (
    "parallel.dp_shard=1",
    "parallel.ep=1",
    "train.steps=6",
    "train.global_batch_size=8",
    "train.micro_batch_size=8",
    "train.optimizer.lr=1.0e-3",
    "train.precision=fp32",
    "train.schedule.warmup=2",
    "data.decode_threads=1",
    "cluster.threads_per_worker=1",
)
ISOTROPIC = (
    "model.size=null",
    "model.input_size=16",
    "model.patch_size=4",
    "model.hidden_size=24",
    "model.num_layers=4",
    "data.image_size=16",
)
"""16 tokens."""
HEADS = ("model.attention.num_heads=2", "model.ffn.intermediate_size=32")
CLASSES = ("model.tasks.imagenet.num_classes=10",)
SCAN = ("model.mamba1.state_size=4", "model.mamba1.chunk_size=8")
_STAGE = "{{depth: {}, hidden_size: {}, attention: {{num_heads: {}}}}}"
STAGES = (
    "model.input_size=32",
    "data.image_size=32",
    f"model.stages=[{_STAGE.format(1, 8, 1)}, {_STAGE.format(2, 16, 2)}]",
)
"""64 tokens, then 16."""
EXPERTS = ("model.moe.num_experts=4", "model.moe.top_k=2", "model.moe.expert.intermediate_size=16")

BACKBONES: dict[str, Sequence[str]] = {
    "demo": (
        *ISOTROPIC,
        *HEADS,
        "model.in_channels=3",
        "data.channels=3",
        "model.moe.num_experts=4",
        "model.moe.expert.intermediate_size=16",
    ),
    "vit": (*ISOTROPIC, *HEADS, *CLASSES),
    "vit-packed": (
        *ISOTROPIC[:-1],
        *HEADS,
        *CLASSES,
        "data.packing={max_tokens: 24, max_images: 3, patch_size: 4, max_image_tokens: 16}",
    ),
    "vmoe": (*ISOTROPIC, *HEADS, *CLASSES, *EXPERTS),
    "mod-squad": (
        *ISOTROPIC,
        *HEADS,
        *CLASSES,
        *EXPERTS,
        "model.attention.head_dim=16",
        "model.attention_moe.num_experts=5",
        "model.attention_moe.top_k=2",
        "model.attention_moe.head_dim=8",
        "model.tasks.coco.num_classes=10",
        "model.tasks.coco.hidden_size=8",
        "model.tasks.ade20k.num_classes=11",
        "model.tasks.ade20k.hidden_size=8",
    ),
    "vim": (*ISOTROPIC, *CLASSES, *SCAN),
    "localmamba": (*ISOTROPIC, *CLASSES, *SCAN),
    "mamba-nd": (*ISOTROPIC, *CLASSES, *SCAN),
    "vil": (*ISOTROPIC, *CLASSES, "model.mlstm.num_heads=2", "model.mlstm.chunk_size=8"),
    "vmamba": ("model.size=T", *CLASSES, *STAGES),
    "metaformer": (*CLASSES, *STAGES),
    "timm": (
        "model.timm=test_convnext",
        "model.input_size=32",
        "data.image_size=32",
        *CLASSES,
    ),
    "contrastive": (
        *ISOTROPIC,
        *HEADS,
        "model.tasks.pairs={kind: contrast, embed_size: 8, text_size: 6, text_length: 3}",
    ),
}
"""Name of a file of configs/vision -> what is laid over it."""


def shrunk(name: str, *overrides: str) -> RunConfig:
    """configs/vision/<name>.yaml with the small sizes and `overrides` laid over it."""
    return load(f"configs/vision/{name}.yaml", [*SHRUNK, *BACKBONES[name], *overrides])
