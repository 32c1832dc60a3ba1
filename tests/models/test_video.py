"""Mamba-ND on video: three axes, one after the other. No single frame shows what is asked for."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from triptych import models
from triptych.models import VisionConfig

FRAMES, EDGE = 4, 8
ORDERS = ("axis:0", "axis:0+reverse", "axis:1", "axis:1+reverse", "axis:2", "axis:2+reverse")


def videos(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 1, frames, H, W) bars that go round a noisy image one step per frame: to the right (0), or left
    (1)."""
    generator = torch.Generator().manual_seed(seed)
    ways = torch.randint(2, (count,), generator=generator)
    starts = torch.randint(EDGE // 2, (count,), generator=generator)
    x = torch.randn(count, 1, FRAMES, EDGE, EDGE, generator=generator) * 0.1
    for frame in range(FRAMES):
        places = (starts + (1 - 2 * ways) * frame) % (EDGE // 2)
        for n, place in enumerate(places.tolist()):
            x[n, 0, frame, :, 2 * place : 2 * place + 2] += 1
    return x, ways


def test_mamba_nd_learns_which_way_things_move() -> None:
    config = VisionConfig(
        input_size=(FRAMES, EDGE, EDGE),
        patch_size=(1, 2, 2),
        in_channels=1,
        hidden_size=24,
        num_layers=len(ORDERS),
        pattern=["mamba1+none"],
        mamba1={"state_size": 4, "chunk_size": 16},
        scan={"orders": ORDERS},
        position="learned",
        tasks={"way": {"kind": "classify", "num_classes": 2}},
    )
    model = models.build(config)
    models.initialize(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(40):
        x, ways = videos(16, step)
        (logits,) = model(x)
        optimizer.zero_grad()
        F.cross_entropy(logits, ways).backward()
        optimizer.step()
    assert config.grid == (FRAMES, EDGE // 2, EDGE // 2)
    x, ways = videos(128, 1000)
    with torch.no_grad():
        right = (model(x)[0].argmax(dim=1) == ways).float().mean()
        # Played backwards, it is the other way.
        backwards = (model(x.flip(2))[0].argmax(dim=1) == 1 - ways).float().mean()
    assert float(right) > 0.95 and float(backwards) > 0.95
