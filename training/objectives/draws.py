"""Random draws that belong to a sample: noise and kept tokens as functions of its key, of nothing else.

However a batch is cut over ranks and micro-batches, and however images are packed into rows, an image has the
same noise: its element of channel c at pixel (h, w) is number (c H + h) W + w of its key's stream.

Shape legend: B rows, G images of a row, T tokens of a row, C channels, P patch edge, N kept tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.kernels import hash_normal, hash_uniform, string_key


@dataclass(frozen=True)
class Rows:
    """Rows of packed images, as the data pipeline makes them.

    positions: (B, T, 2), row and column of each token in its image. document_ids: (B, T), which image of the
    row it belongs to, G for padding. sizes: (B, G, 2), rows and columns of each image in tokens.
    """

    positions: Tensor
    document_ids: Tensor
    sizes: Tensor

    @property
    def num_images(self) -> int:
        """G, the places for images in a row."""
        return self.sizes.shape[1]

    def spread(self, values_BG: Tensor, padding: float = 0.0) -> Tensor:
        """The value of its image for each token, (B, G) -> (B, T); `padding` for tokens of none."""
        beyond_B1 = values_BG.new_full((values_BG.shape[0], 1), padding)
        return torch.cat([values_BG, beyond_B1], dim=1).gather(1, self.document_ids)

    def sums(self, values_BT: Tensor) -> Tensor:
        """Sums over the tokens of each image, (B, T) -> (B, G)."""
        images_G = torch.arange(self.num_images, device=values_BT.device)
        # Adding up by index has no fixed order on a GPU, and autocast would round the factors of a product.
        member_BTG = self.document_ids.unsqueeze(-1) == images_G
        return torch.where(member_BTG, values_BT.unsqueeze(-1), 0.0).sum(dim=1)

    def places(self) -> Tensor:
        """Number of each token in the raster order of its image, (B, T)."""
        columns_BT = self.spread(self.sizes[..., 1])
        return self.positions[..., 0] * columns_BT + self.positions[..., 1]


def stream(keys: Tensor, purpose: str) -> Tensor:
    """The keys (int64) under which these samples draw for `purpose`."""
    return keys ^ string_key(0, purpose)


def image_noise(keys_B: Tensor, shape: tuple[int, ...], purpose: str) -> Tensor:
    """Standard normal numbers (B, *shape) in float64; `shape` is (C, *space)."""
    index = torch.arange(math.prod(shape), device=keys_B.device)
    noise = hash_normal(stream(keys_B, purpose).unsqueeze(1), index)
    return noise.view(keys_B.shape[0], *shape)


def token_noise(keys_BG: Tensor, rows: Rows, channels: int, patch: int, purpose: str) -> Tensor:
    """The noise of `image_noise` for packed images: (B, T, C P P) in float64, 0 in padding.

    keys_BG: one key per image.
    """
    device = keys_BG.device
    within = torch.arange(channels * patch * patch, device=device)
    channel, row, column = within // patch**2, within // patch % patch, within % patch
    height_BT1 = (rows.spread(rows.sizes[..., 0]) * patch).unsqueeze(-1)
    width_BT1 = (rows.spread(rows.sizes[..., 1]) * patch).unsqueeze(-1)
    y_BTE = rows.positions[..., :1] * patch + row
    x_BTE = rows.positions[..., 1:] * patch + column
    index_BTE = (channel * height_BT1 + y_BTE) * width_BT1 + x_BTE
    keys_BT1 = rows.spread(stream(keys_BG, purpose)).unsqueeze(-1)
    padding_BT1 = (rows.document_ids == rows.num_images).unsqueeze(-1)
    return hash_normal(keys_BT1, index_BTE).masked_fill_(padding_BT1, 0.0)


def kept_tokens(keys_B: Tensor, num_tokens: int, rate: float) -> Tensor:
    """TREAD's tokens that stay, of images of T tokens: int64 (B, T - int(T rate)), ascending in each row."""
    rank_BT = _uniform(keys_B.unsqueeze(1), torch.arange(num_tokens, device=keys_B.device))
    return _smallest(rank_BT, rate)


def kept_packed_tokens(keys_B: Tensor, keys_BG: Tensor, rows: Rows, rate: float) -> Tensor:
    """TREAD's tokens that stay in packed rows: int64 (B, T - int(T rate)), ascending in each row.

    The number is the same for all rows, whatever is in them, and each image, and the padding, keeps its share
    to within a token. Which tokens of an image are the first to stay is a function of its key alone.
    """
    length = rows.document_ids.shape[1]
    padding_BT = rows.document_ids == rows.num_images
    keys_BT = torch.where(padding_BT, keys_B.unsqueeze(1), rows.spread(keys_BG))
    place_BT = torch.where(padding_BT, torch.arange(length, device=keys_B.device), rows.places())
    # By image, then by draw: two stable sorts, the last one decides.
    order_BT = _uniform(keys_BT, place_BT).argsort(dim=1)
    ids_BT = rows.document_ids.gather(1, order_BT)
    ids_BT, by_image_BT = ids_BT.sort(dim=1, stable=True)
    order_BT = order_BT.gather(1, by_image_BT)
    first_BT = torch.searchsorted(ids_BT, ids_BT)
    size_BT = torch.searchsorted(ids_BT, ids_BT, right=True) - first_BT
    rank_BT = torch.arange(length, device=keys_B.device) - first_BT
    share_BT = (rank_BT + 0.5) / size_BT
    return _smallest(torch.empty_like(share_BT).scatter_(1, order_BT, share_BT), rate)


def _uniform(keys: Tensor, index: Tensor) -> Tensor:
    return hash_uniform(stream(keys, "objective.tread"), index)


def _smallest(values_BT: Tensor, rate: float) -> Tensor:
    """Where the T - int(T rate) smallest values of each row are, ascending; of equal ones the first."""
    length = values_BT.shape[1]
    keep = length - int(length * rate)
    return values_BT.argsort(dim=1, stable=True)[:, :keep].sort(dim=1).values
