"""Where the tokens of a forward pass stand, and sequences of them in scan orders.

Shape legend: B batch, T tokens in a row, G images in a row, L pads in a row, K scan orders, C channels,
N places of a scan (T + L).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from triptych import kernels
from triptych.models.context import document_bounds, has_values
from triptych.models.scan_order import inverse, line_ends, scan_order

if TYPE_CHECKING:
    from triptych.models.config import ModelConfig
    from triptych.models.context import Context

Shape = tuple[int, ...]


class Arranged(NamedTuple):
    """Tokens in scan order.

    x: (K B, N, C), order-major: row k B + b is row b in order k. cu_seqlens: of those rows.
    restore: (K B, N, C') -> (B, T, C'): every token back at its place, the mean over the K orders (a mean, so
    that the size of activations does not depend on K), without the pads.
    """

    x: torch.Tensor
    cu_seqlens: torch.Tensor | None
    restore: Callable[[torch.Tensor], torch.Tensor]


class _Places(NamedTuple):
    """K orders of N places, the same for all rows (K, N) or each row's own (K, B, N).

    orders: which of [tokens, pads] stands at each place; inverse: of each; pads: how many there are.
    """

    orders: torch.Tensor
    inverse: torch.Tensor
    pads: int


@dataclass(frozen=True)
class Scan:
    """Where the tokens of a pass stand. Made once per forward pass; its index tensors are made when they are
    first asked for, and kept.

    rows: the sizes of the images in each row, in tokens, one after the other; a single entry holds for every
    row of the batch. Tokens behind a row's images are padding, and stay there.
    length: T before routing. document_ids: (B, T) of packed rows. kept: (B, T after routing), ascending.
    """

    rows: tuple[tuple[Shape, ...], ...]
    length: int
    device: torch.device
    document_ids: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of_grid(shape: Shape, device: torch.device | str) -> Scan:
        """Each row is one image of this many tokens along its axes, in raster order."""
        return Scan(((tuple(shape),),), math.prod(shape), torch.device(device))

    @staticmethod
    def of_packed(sizes_BGA: torch.Tensor, document_ids_BT: torch.Tensor) -> Scan:
        """Rows of images of their own sizes.

        sizes: int (B, G, A), tokens along each of A axes, zeros for no image. document_ids: int (B, T): the
        number in its row of the image that a token belongs to, and G for the padding behind them. Where
        sizes have no values (models/context.py), all tokens count as padding.
        Raises ValueError for images that do not fit into their row.
        """
        B, T = document_ids_BT.shape
        device = document_ids_BT.device
        if not has_values(sizes_BGA):
            return Scan(((),), T, device, document_ids_BT)
        rows = tuple(tuple(tuple(image) for image in row if min(image) > 0) for row in sizes_BGA.tolist())
        for row, images in enumerate(rows):
            if sum(map(math.prod, images)) > T:
                raise ValueError(
                    f"sizes: the images {list(images)} of row {row} do not fit into its {T} tokens"
                )
        assert len(rows) == B, f"sizes are of {len(rows)} rows, document_ids of {B}"
        return Scan(rows, T, device, document_ids_BT)

    def route(self, kept_BK: torch.Tensor) -> Scan:
        """Where only the tokens kept, int64 (B, K) ascending, are left (TREAD, arXiv 2501.04765). They keep
        their order in every scan, and all line ends stay."""
        kept_BK = kept_BK if self.kept is None else self.kept.gather(1, kept_BK)
        return replace(self, kept=kept_BK, cache={})

    @property
    def num_tokens(self) -> int:
        """T: tokens in a row."""
        return self.length if self.kept is None else self.kept.shape[1]

    def whole_grid(self, user: str) -> Shape:
        """The shape of the one image in each row.

        Raises ValueError, naming the user, where rows are packed or tokens are routed around the layer.
        """
        if self.document_ids is not None:
            raise ValueError(
                f"{user} needs images of one size, a row each; packed rows cannot be given to it"
            )
        if self.kept is not None:
            raise ValueError(
                f"{user} needs every token of the grid, but train.tread leaves {self.num_tokens} of "
                f"{self.length}; choose train.tread.start and end without that layer, or drop train.tread"
            )
        (shape,) = self.rows[0]
        return shape

    def subbands(self, levels: int, user: str) -> Scan:
        """Where the coefficients of kernels.haar stand: 4^levels subbands one after the other, each a grid of
        its own that is scanned before the next one. Raises ValueError as whole_grid does."""
        shape = self.whole_grid(user)
        key = ("subbands", levels)
        if key not in self.cache:
            band = tuple(side >> levels for side in shape)
            self.cache[key] = Scan(((band,) * 4**levels,), self.length, self.device)
        return self.cache[key]

    def arrange(
        self,
        x_BTC: torch.Tensor,
        orders: tuple[str, ...],
        *,
        pad: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> Arranged:
        """Every image's tokens in each of the scan orders; images stay where they are in their row.

        pad: (C,), stands behind the last token of every line. Rows with fewer lines than others have more at
        their end, where nothing follows them. cu_seqlens: documents of x, None where a row is one.
        Raises ValueError for orders that models/scan_order.py refuses, and for x of another size.
        """
        self._check(x_BTC)
        if orders == ("raster",) and pad is None:
            return Arranged(x_BTC, cu_seqlens, _same)
        places = self._places(orders, pad is not None)
        x_BNC = x_BTC
        if pad is not None:
            pads = pad.to(x_BTC.dtype).expand(x_BTC.shape[0], places.pads, -1)
            x_BNC = torch.cat([x_BTC, pads], dim=1)
        return Arranged(
            kernels.scan_gather(x_BNC, places.orders, inverse=places.inverse),
            self._bounds(cu_seqlens, orders, places, x_BTC.shape[0]),
            functools.partial(_restore, places),
        )

    def neighbour(self, x_BTC: torch.Tensor, offset: Shape) -> torch.Tensor:
        """For the token at each position, x of the one at position + offset; (B, T, C) like x.

        offset: (0, 1) is the next token of an image's row, (-1, 0) the one above. Zeros where there is none:
        beyond the edge of the image, in padding, or routed around the layer.
        Raises ValueError for x of another size.
        """
        self._check(x_BTC)
        back = tuple(-step for step in offset)
        return _TakeOrZero.apply(x_BTC, self._neighbours(offset), self._neighbours(back))

    def _check(self, x_BTC: torch.Tensor) -> None:
        rows = len(self.rows) if self.kept is None else self.kept.shape[0]
        if x_BTC.shape[1] != self.num_tokens or (rows > 1 and x_BTC.shape[0] != rows):
            raise ValueError(
                f"x is {tuple(x_BTC.shape)}, but this pass has {self.num_tokens} tokens in each of its rows"
            )

    def _places(self, orders: tuple[str, ...], padded: bool) -> _Places:
        key = (orders, padded)
        if key not in self.cache:
            ends = [self._line_ends(order)[0] for order in orders] if padded else []
            pads = max((each.shape[1] for each in ends), default=0)
            found = torch.stack([
                self._order(self._ranks(order), _fill(ends[i], pads, self.length) if padded else None)
                for i, order in enumerate(orders)
            ])  # fmt: skip
            self.cache[key] = _Places(found, kernels.invert_orders(found), pads)
        return self.cache[key]

    def _order(self, ranks: torch.Tensor, ends: torch.Tensor | None) -> torch.Tensor:
        """(N,), or (B, N) where rows differ. ranks: (R, T), R 1 or B, each token's position in the scan.
        ends: (R, L), those pads follow."""
        if self.kept is not None:
            ranks = ranks.expand(self.kept.shape[0], -1).gather(1, self.kept)
        keys = 2 * ranks
        if ends is not None:
            keys = torch.cat([keys, 2 * ends.expand(keys.shape[0], -1) + 1], dim=1)
        order = keys.argsort(dim=1, stable=True)
        return order[0] if order.shape[0] == 1 else order

    def _ranks(self, name: str) -> torch.Tensor:
        """int64 (R, T): each token's position in the scan of its row."""
        rows = []
        for images in self.rows:
            start, parts = 0, []
            for shape in images:
                parts.append(inverse(scan_order(name, shape)) + start)
                start += math.prod(shape)
            rows.append(torch.cat([*parts, _counted(start, self.length)]))
        return torch.stack(rows).to(self.device)

    def _line_ends(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 (R, L): the positions at which lines end, and the images that they belong to; self.length and
        -1 behind them in rows with fewer lines than L."""
        ends, owners = [], []
        for images in self.rows:
            start, row, owner = 0, [_counted(0, 0)], [_counted(0, 0)]
            for number, shape in enumerate(images):
                row.append(line_ends(name, shape) + start)
                owner.append(torch.full_like(row[-1], number))
                start += math.prod(shape)
            ends.append(torch.cat(row))
            owners.append(torch.cat(owner))
        most = max(row.numel() for row in ends)
        padded = torch.stack([_fill(row, most, self.length) for row in ends])
        numbers = torch.stack([_fill(row, most, -1) for row in owners])
        return padded.to(self.device), numbers.to(self.device)

    def _bounds(
        self, cu_seqlens: torch.Tensor | None, orders: tuple[str, ...], places: _Places, batch: int
    ) -> torch.Tensor | None:
        """cu_seqlens of the arranged rows, (K B, N)."""
        if cu_seqlens is None:
            return None
        if places.pads == 0:
            tokens = batch * self.num_tokens
            starts = [cu_seqlens[:-1] + k * tokens for k in range(len(orders))]
            return torch.cat([*starts, cu_seqlens.new_tensor([len(orders) * tokens])])
        key = ("bounds", orders)
        if key not in self.cache:
            ids = [self._arranged_ids(name, order, places.pads) for name, order in zip(orders, places.orders)]
            self.cache[key] = document_bounds(torch.cat(ids))[0]
        return self.cache[key]

    def _arranged_ids(self, name: str, order: torch.Tensor, pads: int) -> torch.Tensor:
        """(B, N): the image that each place of a padded scan belongs to."""
        assert self.document_ids is not None, "cu_seqlens are of packed rows"
        ids = self.document_ids if self.kept is None else self.document_ids.gather(1, self.kept)
        owners = _fill(self._line_ends(name)[1], pads, -1)
        # Pads that no line has stand behind all tokens, and may as well belong to the last.
        owners = torch.where(owners < 0, ids[:, -1:], owners.expand(ids.shape[0], -1))
        return _take(torch.cat([ids, owners], dim=1).unsqueeze(-1), order).squeeze(-1)

    def _neighbours(self, offset: Shape) -> torch.Tensor:
        """int64 (T,) or (B, T): the token at each one's position + offset, T where there is none."""
        key = ("neighbours", offset)
        if key not in self.cache:
            rows = []
            for images in self.rows:
                start, parts = 0, []
                for shape in images:
                    parts.append(_neighbours_on_grid(shape, offset, start, self.length))
                    start += math.prod(shape)
                rows.append(torch.cat([*parts, _fill(_counted(0, 0), self.length - start, self.length)]))
            index = torch.stack(rows).to(self.device)
            if self.kept is not None:
                index = self._among_kept(index.expand(self.kept.shape[0], -1).gather(1, self.kept))
            self.cache[key] = index[0] if index.shape[0] == 1 else index
        return self.cache[key]

    def _among_kept(self, tokens_BK: torch.Tensor) -> torch.Tensor:
        """Tokens by their number before routing -> by their number among the kept, K where they are not."""
        assert self.kept is not None, "called where tokens are routed"
        B, K = self.kept.shape
        numbers = torch.full((B, self.length + 1), K, device=self.device)
        numbers = numbers.scatter(1, self.kept, torch.arange(K, device=self.device).expand(B, K))
        return numbers.gather(1, tokens_BK)


def arrange(
    x_BTC: torch.Tensor, context: Context, orders: tuple[str, ...], pad: torch.Tensor | None = None
) -> Arranged:
    """Scan.arrange for a mixer; x as it is where the pass has no scan, as in language models."""
    if context.scan is None:
        return Arranged(x_BTC, context.cu_seqlens, _same)
    return context.scan.arrange(x_BTC, orders, pad=pad, cu_seqlens=context.cu_seqlens)


def orders_of(config: ModelConfig, layer: int) -> tuple[str, ...]:
    """The orders in which the mixer of a block scans; none in language models."""
    return () if config.scan is None else config.scan.orders_of(layer)


def scanned_length(config: ModelConfig, layer: int, length: int) -> int:
    """Places in all scans of a block over `length` tokens, pads included, which FLOPs are counted for.

    Pads are counted on the model's own grid; a row of another length has them in proportion.
    """
    orders = orders_of(config, layer)
    if config.scan is None or not config.scan.line_ends:
        return max(1, len(orders)) * length
    grid: Shape = config.grid  # type: ignore[attr-defined]
    pads = max(line_ends(order, grid).numel() for order in orders)
    return len(orders) * (length + round(pads * length / math.prod(grid)))


class _TakeOrZero(torch.autograd.Function):
    """y[t] = x[index[t]] along T, zeros where index is T. adjoint: the index of the transposed map, so that
    backward takes as well instead of adding up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, adjoint: torch.Tensor) -> torch.Tensor:
        # Kept as they are: the Scan holds them anyway.
        ctx.index, ctx.adjoint = index, adjoint
        return _take(torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], dim=1), index)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return _TakeOrZero.apply(grads[0], ctx.adjoint, ctx.index), None, None


def _take(x_BTC: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """index: (N,), or (B, N) with each row's own -> (B, N, C)."""
    if index.ndim == 1:
        return x_BTC.index_select(1, index)
    B, T, _ = x_BTC.shape
    rows = torch.arange(0, B * T, T, device=index.device).unsqueeze(1)
    return x_BTC.flatten(0, 1).index_select(0, (index + rows).flatten()).unflatten(0, index.shape)


def _restore(places: _Places, y: torch.Tensor) -> torch.Tensor:
    """(K B, N, C) -> (B, T, C)."""
    tokens = kernels.scan_scatter(y, places.orders, inverse=places.inverse, reduce="mean")
    return tokens[:, : tokens.shape[1] - places.pads] if places.pads else tokens


def _same(y: torch.Tensor) -> torch.Tensor:
    return y


def _counted(first: int, end: int) -> torch.Tensor:
    """int64: first .. end - 1, on the CPU whatever the default device is."""
    return torch.arange(first, end, device="cpu")


def _fill(x: torch.Tensor, size: int, value: int) -> torch.Tensor:
    """The last dimension filled up with `value` to `size`."""
    return torch.nn.functional.pad(x, (0, size - x.shape[-1]), value=value)


def _neighbours_on_grid(shape: Shape, offset: Shape, start: int, none: int) -> torch.Tensor:
    """int64 (T,): the number of each token's neighbour on a grid whose first token has the number start."""
    if len(offset) != len(shape):
        raise ValueError(f"a grid of {len(shape)} sides has no neighbours at {offset}")
    inner = _counted(start, start + math.prod(shape)).view(shape)
    for axis, (step, side) in enumerate(zip(offset, shape)):
        shift = max(-side, min(side, step))
        inner = inner.narrow(axis, max(0, shift), side - abs(shift))
        edge = [0, 0] * (len(shape) - 1 - axis) + [max(0, -shift), max(0, shift)]
        inner = torch.nn.functional.pad(inner, edge, value=none)
    return inner.flatten()
