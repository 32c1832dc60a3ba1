"""Experts: feed-forwards, low-rank maps and linears, stacked, on rows sorted by expert.

Shape legend: A rows, C hidden size, E experts, F intermediate size, R rank, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import nn

from triptych import kernels
from triptych.models.config import ModelConfig
from triptych.models.init import ZEROS, Init
from triptych.models.linear import unset
from triptych.models.sharding import EXPERT_COLUMN, EXPERT_ROW, EXPERT_ROW_BIAS, EXPERTS, Cut, Exchange


class Experts(nn.Module):
    """Feed-forward e: down_e(silu(gate_e x) * (up_e x)), or without gate down_e(gelu(up_e x)).

    gate_proj (swiglu only), up_proj: (E, F, C). down_proj: (E, C, F). gate_bias, up_bias: (E, F), down_bias:
    (E, C). Under tensor parallelism the output is a partial sum.
    """

    expert_parallel = True

    def __init__(self, config: ModelConfig, num_experts: int, kind: str, size: int, bias: bool) -> None:
        super().__init__()
        E, F, C = num_experts, size, config.hidden_size
        self.kind = kind
        self.linear_init = config.linear_init
        self.exchange = Exchange()
        gated = kind == "swiglu"
        self.gate_proj = unset(E, F, C) if gated else None
        self.up_proj = unset(E, F, C)
        self.down_proj = unset(E, C, F)
        self.gate_bias = unset(E, F) if gated and bias else None
        self.up_bias = unset(E, F) if bias else None
        self.down_bias = unset(E, C) if bias else None
        columns = ("gate_proj", "up_proj", "gate_bias", "up_bias")
        self.sharding: dict[str, Cut] = dict.fromkeys(columns, EXPERT_COLUMN)
        self.sharding |= {"down_proj": EXPERT_ROW, "down_bias": EXPERT_ROW_BIAS}

    def init(self) -> dict[str, Init]:
        """As of one expert's linears."""
        _, F, C = self.up_proj.shape
        first, last = self.linear_init(F, C), self.linear_init(C, F, last=True)
        weights = {"gate_proj": first, "up_proj": first, "down_proj": last}
        table: dict[str, Init] = weights | dict.fromkeys(("gate_bias", "up_bias", "down_bias"), ZEROS)
        return {name: init for name, init in table.items() if getattr(self, name) is not None}

    def forward(self, rows_AC: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """(A, C), of each expert counts (E,) rows -> (A, C)."""
        sent = self.exchange.there(rows_AC, counts_E)
        rows = kernels.grouped_mlp(
            sent.rows,
            self.up_proj,
            self.down_proj,
            sent.counts,
            gate=self.gate_proj,
            up_bias=self.up_bias,
            gate_bias=self.gate_bias,
            down_bias=self.down_bias,
            activation="swiglu" if self.gate_proj is not None else "gelu",
        )
        return sent.back(rows)


class LowRankExperts(nn.Module):
    """Map e: up_e down_e x. down_proj: (E, R, C), up_proj: (E, C, R)."""

    expert_parallel = True

    def __init__(self, config: ModelConfig, num_experts: int, rank: int) -> None:
        super().__init__()
        self.linear_init = config.linear_init
        self.exchange = Exchange()
        self.down_proj = unset(num_experts, rank, config.hidden_size)
        self.up_proj = unset(num_experts, config.hidden_size, rank)
        self.sharding: dict[str, Cut] = {"down_proj": EXPERT_COLUMN, "up_proj": EXPERT_ROW}

    def init(self) -> dict[str, Init]:
        _, C, R = self.up_proj.shape
        return {"down_proj": self.linear_init(R, C), "up_proj": self.linear_init(C, R, last=True)}

    def forward(self, rows_AC: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """As in Experts."""
        sent = self.exchange.there(rows_AC, counts_E)
        low = kernels.grouped_linear(sent.rows, self.down_proj, sent.counts)
        return sent.back(kernels.grouped_linear(low, self.up_proj, sent.counts))


class ExpertLinear(nn.Module):
    """Linear e. weight: (E, O, I), bias: (E, O)."""

    expert_parallel = True

    def __init__(
        self,
        config: ModelConfig,
        num_experts: int,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        last: bool = False,
    ) -> None:
        """last: of its residual branch."""
        super().__init__()
        self.weight_init = config.linear_init(outputs, inputs, last=last)
        self.exchange = Exchange()
        self.weight = unset(num_experts, outputs, inputs)
        self.bias = unset(num_experts, outputs) if bias else None
        self.sharding: dict[str, Cut] = {"weight": EXPERTS, "bias": EXPERTS}

    def init(self) -> dict[str, Init]:
        biases: dict[str, Init] = {} if self.bias is None else {"bias": ZEROS}
        return {"weight": self.weight_init} | biases

    def forward(self, rows_AI: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """(A, I) -> (A, O)."""
        sent = self.exchange.there(rows_AI, counts_E)
        return sent.back(kernels.grouped_linear(sent.rows, self.weight, sent.counts, self.bias))
