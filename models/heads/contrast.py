"""Images against embedded texts, over the samples of the global batch.

Shape legend: B samples of this rank, N of all ranks, C hidden size, L text tokens, E channels of a text's
tokens, D channels in which both are compared.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from triptych.models.init import Constant, Init, Xavier
from triptych.models.linear import Linear, unset
from triptych.models.norms import wide
from triptych.models.sharding import GlobalBatch
from triptych.models.vision_config import TaskConfig, VisionConfig

FIRST_TEMPERATURE = 0.07
"""Of CLIP (arXiv 2103.00020)."""
LARGEST_SCALE = 100.0
"""Logits are cosines times at most this (likewise)."""


class Contrast(nn.Module):
    """Which text belongs to which image (CLIP, arXiv 2103.00020; with the text encoder locked: LiT, arXiv
    2111.07991).

    Image and text are projected, normalised and compared; a sample's loss is the mean of two cross-entropies,
    of its text among all texts and of its image among all images.
    """

    one_pass = "a contrastive loss compares all samples of the global batch"

    def __init__(self, config: VisionConfig, task: TaskConfig) -> None:
        super().__init__()
        self.image = Linear(config.stage_configs[-1].hidden_size, task.embed_size, bias=False)
        self.text = Linear(task.text_size, task.embed_size, bias=False)
        self.log_scale = unset(1)
        self.batch = GlobalBatch()

    def init(self) -> dict[str, Init]:
        return {
            "image.weight": Xavier(*self.image.weight.shape),
            "text.weight": Xavier(*self.text.weight.shape),
            "log_scale": Constant(-math.log(FIRST_TEMPERATURE)),
        }

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sample, without those of the comparison, which grow with the global batch."""
        return 2 * (self.image.weight.numel() + self.text.weight.numel())

    def forward(
        self, pooled_BC: torch.Tensor, text_BLE: torch.Tensor, members_B: torch.Tensor
    ) -> torch.Tensor:
        """members: True for the samples that take part; the others are compared with nothing.

        Text tokens that are all zeros are padding. Returns (B, 2) in fp32 at least: the loss in nats, and 1
        where the image is nearest to its own text, of all; both 0 for samples that take no part.
        """
        with torch.autocast(pooled_BC.device.type, enabled=False):
            dtype = self.image.weight.dtype
            images = F.normalize(wide(self.image(pooled_BC.to(dtype))), dim=1)
            texts = F.normalize(wide(self.text(mean_text(text_BLE.to(dtype)))), dim=1)
            scale = wide(self.log_scale).clamp(max=math.log(LARGEST_SCALE)).exp()
            images_ND = gather(images, self.batch)
            texts_ND = gather(texts, self.batch)
            members_N = self.batch.gather(members_B)
            own_B = self.batch.rank * images.shape[0] + torch.arange(images.shape[0], device=images.device)
            to_texts_BN = (scale * images @ texts_ND.T).masked_fill(~members_N, -torch.inf)
            to_images_BN = (scale * texts @ images_ND.T).masked_fill(~members_N, -torch.inf)
            # Whoever takes no part gets a finite row, so that nothing undefined is multiplied by zero below.
            outside_B1 = ~members_B.unsqueeze(1)
            to_texts_BN = to_texts_BN.masked_fill(outside_B1, 0.0)
            to_images_BN = to_images_BN.masked_fill(outside_B1, 0.0)
            losses_B = 0.5 * (_surprise(to_texts_BN, own_B) + _surprise(to_images_BN, own_B))
            hits_B = (to_texts_BN.argmax(dim=1) == own_B).to(losses_B.dtype)
            return torch.stack([losses_B, hits_B], dim=1) * members_B.unsqueeze(1)


def mean_text(text_BLE: torch.Tensor) -> torch.Tensor:
    """The mean of the tokens that are not all zeros: (B, L, E) -> (B, E); 0 where there are none."""
    present_BL1 = (text_BLE != 0).any(dim=2, keepdim=True).to(text_BLE.dtype)
    return (text_BLE * present_BL1).sum(dim=1) / present_BL1.sum(dim=1).clamp(min=1)


def gather(x_BD: torch.Tensor, batch: GlobalBatch) -> torch.Tensor:
    """x of all ranks (N, D); the gradient that any rank has for a row comes back to the rank it is from."""
    return _Gather.apply(x_BD, batch)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, batch: GlobalBatch) -> torch.Tensor:
        ctx.batch, ctx.rows = batch, x.shape[0]
        return batch.gather(x.contiguous()).view(-1, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = ctx.batch.sum(grads[0].contiguous())
        return total.narrow(0, ctx.batch.rank * ctx.rows, ctx.rows), None


def _surprise(logits_BN: torch.Tensor, own_B: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the own column, (B,)."""
    return -logits_BN.log_softmax(dim=1).gather(1, own_B.unsqueeze(1)).squeeze(1)
