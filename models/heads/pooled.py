"""One vector per image, and its class.

Shape legend: B rows, T tokens, C hidden size, G images of a packed row.
"""

from __future__ import annotations

import torch
from torch import nn

from triptych.models.init import ZEROS, Init, Normal
from triptych.models.linear import Linear
from triptych.models.norms import wide
from triptych.models.vision_config import TaskConfig, VisionConfig


class Classify(nn.Module):
    """A linear of the image's vector: (B, C) -> (B, classes), or (B, G, C) -> (B, G, classes)."""

    def __init__(self, config: VisionConfig, task: TaskConfig) -> None:
        super().__init__()
        assert task.num_classes is not None, "the configuration asks for it"
        self.proj = Linear(config.stage_configs[-1].hidden_size, task.num_classes)
        self.std = config.init_std

    def init(self) -> dict[str, Init]:
        return {"proj.weight": Normal(self.std), "proj.bias": ZEROS}

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence."""
        return 2 * self.proj.weight.numel()

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        dtype = self.proj.weight.dtype
        return self.proj(pooled.to(dtype)).to(dtype)


def pool(features_BTC: torch.Tensor, config: VisionConfig) -> torch.Tensor:
    """The class token, or the mean of the grid's tokens: (B, T, C) -> (B, C), in fp32 at least."""
    if config.class_token:
        return wide(features_BTC[:, 0])
    return wide(features_BTC[:, config.num_prefix_tokens :]).mean(dim=1)


def pool_packed(
    features_BTC: torch.Tensor, images_BT: torch.Tensor, padding_BT: torch.Tensor, num_images: int
) -> torch.Tensor:
    """The mean over each image's tokens: (B, T, C) -> (B, G, C), in fp32 at least; 0 for an image of none.

    images: which of the G images of its row a token belongs to. padding: True for tokens of no image.
    """
    features_BTC = wide(features_BTC)
    place_G = torch.arange(num_images, device=images_BT.device)
    member_BGT = (images_BT.unsqueeze(1) == place_G.view(1, -1, 1)) & ~padding_BT.unsqueeze(1)
    share_BGT = member_BGT.to(features_BTC.dtype)
    # The dimension beside keeps a product with no fixed order of sums, and autocast's rounding, away.
    with torch.autocast(features_BTC.device.type, enabled=False):
        return share_BGT @ features_BTC / share_BGT.sum(dim=2, keepdim=True).clamp(min=1)
