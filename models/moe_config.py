"""Subsections of `model:` for layers with routed experts."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from triptych.models.sections import Section


class BalanceConfig(Section):
    """Weights of the losses that keep experts busy, each over the global batch; 0: none.

    Their gradients are added where they arise; the loss that is printed does not hold them.
    """

    switch: float = Field(default=0.0, ge=0)
    """Switch Transformer's load times importance (arXiv 2101.03961); 1 at uniform routing."""
    importance: float = Field(default=0.0, ge=0)
    """Squared coefficient of variation of the summed probabilities (arXiv 1701.06538)."""
    load: float = Field(default=0.0, ge=0)
    """The same of the smooth load of noisy top-k (arXiv 1701.06538, 2106.05974); needs router: noisy."""
    z: float = Field(default=0.0, ge=0)
    """Mean squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906)."""
    mutual_information: float = Field(default=0.0, ge=0)
    """Minus the mutual information of task and expert (Mod-Squad, arXiv 2212.08066)."""
    latency: float = Field(default=0.0, ge=0)
    """importance, with each expert's share times its cost: cheaper experts get more (ShiftAddViT, arXiv
    2306.06446)."""


class RouterConfig(Section):
    """How tokens find experts."""

    num_experts: int = Field(default=8, ge=1)
    """Full experts of a layer; low-rank and identity ones come on top."""
    num_experts_of: dict[int, int] = Field(default={})
    """Full experts of single layers, by their number, where it is another than num_experts (as after
    pruning)."""
    top_k: int = Field(default=2, ge=1)
    """Experts of a token."""
    router: Literal["softmax", "noisy", "sigmoid", "expert_choice"] = "softmax"
    """softmax: the k largest probabilities. noisy: the same of logits with noise in training (V-MoE).
    sigmoid:
    scores by themselves, chosen with a bias that evens out the load without a loss (arXiv 2408.15664).
    expert_choice: each expert takes its best tokens of the batch (arXiv 2202.09368)."""
    per_task: bool = False
    """Each task has gate weights of its own, zero at first. Ties go to the first experts, so that router:
    noisy or a loss must tell them apart."""
    noise_std: float | None = Field(default=None, ge=0)
    """For noisy: of the logits, in training; unset: 1 / number of experts (V-MoE)."""
    normalize: bool | None = None
    """The weights of a token's experts sum to 1; unset: true, except with top_k 1, where the one weight would
    teach the router nothing, and with expert_choice."""
    scale: float = Field(default=1.0, gt=0)
    """Factor on those weights."""
    bias_rate: float = Field(default=1e-3, ge=0)
    """For sigmoid: step of the bias after each optimizer step."""
    routing: Literal["dropless", "capacity"] = "dropless"
    """dropless: experts take what comes. capacity: at most a share of the global batch, the tokens of largest
    weight first (batch-prioritised, arXiv 2106.05974); what is over goes around the experts."""
    capacity_factor: float = Field(default=1.25, gt=0)
    """Capacity, and tokens that an expert chooses, in units of tokens * top_k / experts."""
    min_capacity: int = Field(default=4, ge=1)
    """Tokens that an expert may always take."""
    losses: BalanceConfig = BalanceConfig()
    """What keeps experts busy."""
    visible: dict[str, int] = Field(default={})
    """By task: only so many of the first experts may be chosen; unset: all (see `triptych experts
    add-task`)."""


class ExpertConfig(Section):
    """The feed-forward that an expert is."""

    kind: Literal["swiglu", "gelu"] = "swiglu"
    """Gated, or a plain one with GELU."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Inner channels of a full expert; unset: those of model.ffn's rule for its kind."""
    bias: bool = False
    """Biases in the projections."""


class MoEConfig(RouterConfig):
    """`model.moe`: feed-forwards of kind moe."""

    expert: ExpertConfig = ExpertConfig()
    """What a full expert is."""
    low_rank: int = Field(default=0, ge=0)
    """Experts besides that are a product of two matrices of rank `rank`."""
    rank: int = Field(default=16, ge=1)
    """Of low-rank experts."""
    identity: int = Field(default=0, ge=0)
    """Experts besides that return their input."""
    costs: tuple[float, float, float] | None = None
    """Cost of a token in a full, a low-rank and an identity expert, for losses.latency; unset: their
    multiply-adds, and one per channel for identity."""
    shared_experts: int = Field(default=0, ge=0)
    """Experts that every token meets, as one feed-forward of so many times the inner channels."""
    residual: bool = False
    """A dense feed-forward of an expert's size beside the experts; a learned pair of weights per token mixes
    the two (DeepSpeed-MoE, arXiv 2201.05596)."""

    @model_validator(mode="after")
    def _one_beside(self) -> MoEConfig:
        if self.residual and self.shared_experts:
            raise ValueError(
                f"model.moe.residual=true with shared_experts={self.shared_experts}: both are a dense "
                "feed-forward beside the experts; choose one"
            )
        return self


class AttentionMoEConfig(RouterConfig):
    """`model.attention_moe`: attention whose experts own query and output projections (Mod-Squad)."""

    num_experts: int = Field(default=24, ge=1)
    """Experts of a layer."""
    top_k: int = Field(default=12, ge=1)
    """Experts, which are query heads, of a token."""
    head_dim: int = Field(default=64, ge=1)
    """Channels of a head; key and value have one head, which all experts share."""
    bias: bool = False
    """Biases in the projections."""


class ProductKeysConfig(Section):
    """`model.product_keys`: feed-forwards of kind product_keys: very many experts of rank one (PEER, arXiv
    2407.04153)."""

    num_experts: int = Field(default=4096, ge=4)
    """Experts; a square number."""
    num_heads: int = Field(default=4, ge=1)
    """Queries of a token, each of which finds its own experts."""
    top_k: int = Field(default=8, ge=1)
    """Experts of a query."""
    key_size: int = Field(default=128, ge=2)
    """Channels of a query, half for each of the two keys of an expert; even."""
    shared: bool = True
    """A dense feed-forward after model.ffn's size beside the experts (cross-domain MoE)."""

    @model_validator(mode="before")
    @classmethod
    def _square(cls, values: Any) -> Any:
        number = values.get("num_experts") if isinstance(values, dict) else None
        if isinstance(number, int) and number > 0 and math.isqrt(number) ** 2 != number:
            edge = math.isqrt(number)
            below, above = edge**2, (edge + 1) ** 2
            raise ValueError(
                f"model.product_keys.num_experts={number} is not a square, so keys would miss some experts; "
                f"use {below} or {above}"
            )
        return values
