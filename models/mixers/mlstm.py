"""The mLSTM layer of xLSTM (arXiv 2405.04517) as Vision-LSTM has it (ViL, arXiv 2406.04303, section 3).

Shape legend: B batch, T length, C hidden size, I inner channels = H D, H heads, D channels per head.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from triptych import kernels
from triptych.models.config import ModelConfig, require_divides
from triptych.models.context import Context
from triptych.models.init import ONES, ZEROS, Init, Normal
from triptych.models.linear import CausalConv, Linear, unset
from triptych.models.norms import wide
from triptych.models.registry import register_mixer
from triptych.models.scan import arrange, orders_of, scanned_length
from triptych.models.sharding import COLUMN, ROW, Cut, Shards
from triptych.models.shift import Ramp
from triptych.models.sums import sum_inside

FORGET_BIAS = (3.0, 6.0)
"""Of the first head and the last, at initialisation: they remember for longer and longer."""
INPUT_BIAS_STD = 0.1


class BlockLinear(nn.Module):
    """A linear within blocks of channels. weight: (blocks, block, block), of each the outputs first."""

    def __init__(self, channels: int, block: int) -> None:
        super().__init__()
        self.weight = unset(channels // block, block, block)

    def init(self) -> dict[str, Init]:
        return {"weight": Normal(math.sqrt(2 / (5 * self.weight.shape[-1])))}

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        blocks = x_BTC.unflatten(-1, (-1, self.weight.shape[-1]))
        return torch.einsum("btni,noi->btno", blocks, self.weight).flatten(-2)


@register_mixer("mlstm", char="l")
class MLSTM(nn.Module):
    """x, z = projections of the input; q and k of u = silu(conv(x)), v of x, each within small blocks of
    channels; input and forget gates of [q, k, v]; per head the mLSTM cell and a norm, and
    out_proj((norm(cell) + skip u) * silu(z)).

    The first version of ViL, with a causal convolution along the scan. Differs from the published code:
    projections that are one there stand on their own (same mathematics), so that each can be cut over ranks;
    the norm's weight is not stored less 1; nothing is added to the cell's denominator. The gates of a head
    need all channels of q, k and v, of which a rank holds some: their partial sums are added up inside the
    region.

    In an image (model.scan) the tokens are arranged in scan orders before the projections and put back before
    out_proj; ViL's are [raster, raster+reverse], in turn. With line_ends, pad_token (C,) stands behind each
    line. Language models generate with the convolution's inputs and the cell's state in the cache.

    selective recomputation keeps the outputs of x_proj and z_proj and the input of out_proj. It drops, and
    computes again in backward, all between them.
    """

    tp_region = True
    sums_inside = True
    selective = ("core",)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        settings = config.mlstm
        inner, heads = int(settings.expand * config.hidden_size), settings.num_heads
        self.layer = layer
        self.settings = settings
        self.head_dim = inner // heads
        self.eps = config.norm_eps
        self.init_std, self.linear_init = config.init_std, config.linear_init
        self.x_proj = Linear(config.hidden_size, inner, bias=False)
        self.z_proj = Linear(config.hidden_size, inner, bias=False)
        self.conv_x = CausalConv(inner, settings.conv_kernel)
        self.q_proj = BlockLinear(inner, settings.qkv_block)
        self.k_proj = BlockLinear(inner, settings.qkv_block)
        self.v_proj = BlockLinear(inner, settings.qkv_block)
        # Input gates of all heads, then forget gates.
        self.q_gates = Linear(inner, 2 * heads, bias=False)
        self.k_gates = Linear(inner, 2 * heads, bias=False)
        self.v_gates = Linear(inner, 2 * heads, bias=False)
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.input_bias = unset(heads, dtype=dtype)
        self.forget_bias = unset(heads, dtype=dtype)
        self.norm_weight = unset(inner)
        self.skip = unset(inner)
        self.out_proj = Linear(inner, config.hidden_size, bias=False)
        self.orders = orders_of(config, layer)
        self.scanned_length = functools.partial(scanned_length, config, layer)
        with_pads = config.scan is not None and config.scan.line_ends
        self.pad_token = unset(config.hidden_size) if with_pads else None
        self.shards = Shards()
        modules = ("x_proj", "z_proj", "conv_x", "q_proj", "k_proj", "v_proj")
        own = ("conv_x.bias", "input_bias", "forget_bias", "norm_weight", "skip")
        self.sharding: dict[str, Cut] = dict.fromkeys((*(f"{name}.weight" for name in modules), *own), COLUMN)
        of_channels = ("q_gates", "k_gates", "v_gates", "out_proj")
        self.sharding |= dict.fromkeys((f"{name}.weight" for name in of_channels), ROW)

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raises ValueError for sizes that do not go together."""
        settings = config.mlstm
        inner = int(settings.expand * config.hidden_size)
        if inner != settings.expand * config.hidden_size:
            raise ValueError(
                f"model.mlstm.expand={settings.expand} times model.hidden_size={config.hidden_size} is not "
                "whole; use 2, or another factor that gives a whole number of inner channels"
            )
        key = "model.mlstm.expand * model.hidden_size"
        require_divides("model.mlstm.num_heads", settings.num_heads, key, inner)
        per_head = inner // settings.num_heads
        require_divides("model.mlstm.qkv_block", settings.qkv_block, "channels per head of mlstm", per_head)

    def init(self) -> dict[str, Init]:
        heads = self.forget_bias.shape[0]
        low, high = FORGET_BIAS
        table: dict[str, Init] = {
            f"{name}.weight": self.linear_init(*getattr(self, name).weight.shape, last=name == "out_proj")
            for name in ("x_proj", "z_proj", "out_proj")
        }
        table |= {f"{name}.weight": ZEROS for name in ("q_gates", "k_gates", "v_gates")}
        table["input_bias"] = Normal(INPUT_BIAS_STD)
        table["forget_bias"] = Ramp(max(1, heads - 1), 1.0, low=low, span=high - low)
        table["norm_weight"] = table["skip"] = ONES
        if self.pad_token is not None:
            table["pad_token"] = Normal(self.init_std)
        return table

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence, the cell in chunks: q k^T and its product with v within each, the
        memories that go in and come out between them. The last chunk counts as full. In an image all but
        out_proj is done for every place of every scan."""
        modules = (self.x_proj, self.z_proj, self.conv_x, self.q_proj, self.k_proj, self.v_proj)
        gates = (self.q_gates, self.k_gates, self.v_gates)
        weights = sum(module.weight.numel() for module in (*modules, *gates))
        inner = self.x_proj.weight.shape[0]
        heads, dim = inner // self.head_dim, self.head_dim
        places, scans = self.scanned_length(length), max(1, len(self.orders))
        chunk = min(self.settings.chunk_size, places // scans)
        padded = -(-places // scans // chunk) * chunk * scans
        cell = heads * (chunk * (2 * dim + 1) + 2 * dim * (dim + 1))
        return 2 * (places * weights + length * self.out_proj.weight.numel() + padded * cell)

    def forward(self, x_BTC: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        x_BTC, cu_seqlens, restore = arrange(x_BTC, context, self.orders, self.pad_token)
        parameters = (self.input_bias, self.forget_bias, self.norm_weight, self.skip)
        y_BTI = self.core(self.x_proj(x_BTC), self.z_proj(x_BTC), parameters, cu_seqlens, context)
        return self.out_proj(restore(y_BTI))

    def core(
        self,
        x_BTI: torch.Tensor,
        z_BTI: torch.Tensor,
        parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        cu_seqlens: torch.Tensor | None,
        context: Context,
    ) -> torch.Tensor:
        """Outputs of the projections (B, T, I), biases of the gates (H,), norm_weight and skip (I,),
        documents -> (B, T, I).

        The parameters of the mixer itself are arguments, so that recomputation sees those of forward.
        """
        input_bias, forget_bias, norm_weight, skip = parameters
        held = context.cache.layer(self.layer) if context.cache is not None else None
        u_BTI = self.conv_x(x_BTI, cu_seqlens=cu_seqlens, cache=held, cache_name="conv_x")
        q, k, v = self.q_proj(u_BTI), self.k_proj(u_BTI), self.v_proj(x_BTI)
        gates = sum_inside(self.q_gates(q) + self.k_gates(k) + self.v_gates(v), self.shards)
        heads = input_bias.shape[0]
        first = self.shards.start * heads if self.shards.count > 1 else 0
        igate, fgate = (gate[..., first : first + heads] for gate in wide(gates).chunk(2, dim=-1))
        qkv = tuple(x.unflatten(-1, (heads, self.head_dim)) for x in (q, k, v))
        y_BTHD = self._cell((*qkv, igate + wide(input_bias), fgate + wide(forget_bias)), cu_seqlens, held)
        y_BTI = kernels.layer_norm(y_BTHD, eps=self.eps).flatten(-2) * norm_weight.to(y_BTHD.dtype)
        return (y_BTI + skip.to(u_BTI.dtype) * u_BTI) * F.silu(z_BTI)

    def _cell(
        self,
        inputs: tuple[torch.Tensor, ...],
        cu_seqlens: torch.Tensor | None,
        held: dict[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        """q, k, v (B, T, H, D) and gates (B, T, H) -> (B, T, H, D). Reads and replaces held["memory"]
        (B, H, D, D + 1) and held["memory_log"] (B, H)."""
        size = self.settings.chunk_size
        if held is None:
            return kernels.mlstm(*inputs, cu_seqlens=cu_seqlens, chunk_size=size)
        state = (held["memory"], held["memory_log"]) if "memory" in held else None
        if state is not None and inputs[0].shape[1] == 1:
            q, k, v, igate, fgate = (x[:, 0] for x in inputs)
            y_BHD, state = kernels.mlstm_step(state, q, k, v, igate, fgate)
            y_BTHD = y_BHD.unsqueeze(1)
        else:
            y_BTHD, state = kernels.mlstm(
                *inputs, initial_state=state, return_final_state=True, chunk_size=size
            )
        held["memory"], held["memory_log"] = state
        return y_BTHD
