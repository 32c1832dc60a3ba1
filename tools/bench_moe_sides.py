"""One side of a comparison of `triptych bench moe`, in its own process.

`python -m triptych.tools.bench_moe_sides '{"side": "ours", ...}'` takes turns as `bench_sides.serve` has it.
Letters as in `bench_moe_peers.py`.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import torch
from torch import Tensor

from triptych.kernels import hash_normal, product_key_topk, string_key
from triptych.models import LanguageConfig, initialize
from triptych.models.context import Context
from triptych.models.feedforwards.moe import MoE
from triptych.tools.bench_moe_peers import (
    DenseMoE,
    LoopMoE,
    PlainMoE,
    best_of_scores,
    best_of_sums,
    keys_of_table,
    table_of_keys,
)
from triptych.tools.bench_sides import TurnsProgram, say, serve

CHECKED = 256
"""Tokens of the comparison with the formulas in fp64; what becomes of a token depends on it alone."""
NAMES = {
    "router": "router.weight",
    "gate_proj": "experts.gate_proj",
    "up_proj": "experts.up_proj",
    "down_proj": "experts.down_proj",
}
"""Of the weights here and in our layer."""


def draw(name: str, *shape: int) -> Tensor:
    """Standard normal numbers, the same in every process."""
    return hash_normal(string_key(0, name), torch.arange(math.prod(shape)).view(shape)).float()


def our_layer(shape: dict[str, Any]) -> MoE:
    """Our layer with weights from seed 0."""
    config = LanguageConfig.model_validate({
        "family": "lm",
        "vocab_size": 2,
        "hidden_size": shape["hidden_size"],
        "num_layers": 1,
        "pattern": ["none+moe"],
        "moe": {
            "num_experts": shape["experts"],
            "top_k": shape["top_k"],
            "router": "softmax",
            "normalize": True,
            "expert": {"kind": "swiglu", "intermediate_size": shape["intermediate_size"]},
        },
    })  # fmt: skip
    layer = MoE(config, 0)
    initialize(layer, seed=0)
    return layer.train()


class Layer:
    """The layer of experts: ours, or a peer with its weights."""

    def __init__(self, side: str, shape: dict[str, Any]) -> None:
        layer = our_layer(shape)
        self.top_k = shape["top_k"]
        self.module: MoE | PlainMoE = layer
        if side != "ours":
            peer = {"loop": LoopMoE, "dense": DenseMoE}[side]
            self.module = peer(_weights(layer), self.top_k)
        size = (shape["tokens"], shape["hidden_size"])
        self.x_NC, self.dy_NC = draw("x", *size).requires_grad_(), draw("dy", *size)

    def once(self) -> None:
        """Forward and backward; gradients of all parameters and of x."""
        self._run(self.module, self.x_NC, self.dy_NC)
        self.x_NC.grad = None
        self.module.zero_grad(set_to_none=True)

    def difference(self) -> float:
        """To every expert on every token in fp64, over output and gradients of the first tokens."""
        x_NC, dy_NC = self.x_NC.detach()[:CHECKED], self.dy_NC[:CHECKED]
        module = self.module
        weights = _weights(module) if isinstance(module, MoE) else _stacked(module)
        oracle = DenseMoE({name: weight.double() for name, weight in weights.items()}, self.top_k)
        found = []
        for one, dtype in ((module, x_NC.dtype), (oracle, torch.float64)):
            leaf = x_NC.to(dtype, copy=True).requires_grad_()
            y_NC = self._run(one, leaf, dy_NC.to(dtype))
            gradients = _gradients(one) if isinstance(one, MoE) else one.gradients()
            found.append(gradients | {"y": y_NC.detach(), "x": grad(leaf)})
        return largest(*found)

    def versions(self) -> dict[str, str]:
        """Of what all sides stand on."""
        return {"torch": str(torch.__version__)}

    @staticmethod
    def _run(module: MoE | PlainMoE, x_NC: Tensor, dy_NC: Tensor) -> Tensor:
        if isinstance(module, MoE):
            y_NC = module(x_NC.unsqueeze(0), Context()).squeeze(0)
        else:
            y_NC = module(x_NC)
        y_NC.backward(dy_NC)
        return y_NC


class Retrieval:
    """The best experts of each query: by product keys, from all scores, or from all sums."""

    def __init__(self, side: str, shape: dict[str, Any]) -> None:
        heads, size = shape["heads"], shape["key_size"]
        self.side, self.top_k, self.n = side, shape["top_k"], math.isqrt(shape["experts"])
        self.queries_NHD = draw("queries", shape["tokens"], heads, size).requires_grad_()
        self.keys_H2nd = draw("keys", heads, 2, self.n, size // 2)
        self.table = (table_of_keys(self.keys_H2nd) if side == "scores" else self.keys_H2nd).requires_grad_()
        self.dscores_NHk = draw("dscores", shape["tokens"], heads, self.top_k)

    def once(self) -> None:
        """Forward and backward; gradients of queries and keys."""
        self._best(self.queries_NHD)[0].backward(self.dscores_NHk)
        self.queries_NHD.grad = self.table.grad = None

    def difference(self) -> float:
        """To the best of all scores in fp64, over scores, experts and gradients of the first tokens."""
        queries, dscores = self.queries_NHD.detach()[:CHECKED], self.dscores_NHk[:CHECKED]
        mine = queries.clone().requires_grad_()
        scores, experts = self._best(mine)
        scores.backward(dscores)
        dkeys = grad(self.table) if self.side != "scores" else keys_of_table(grad(self.table), self.n)

        exact, table = queries.double().requires_grad_(), table_of_keys(self.keys_H2nd.double().detach())
        table.requires_grad_()
        expected, places = best_of_scores(exact, table, self.top_k)
        expected.backward(dscores.double())
        if not torch.equal(experts, places):
            return math.inf
        found = {"scores": scores.detach(), "queries": grad(mine), "keys": dkeys}
        dtable = keys_of_table(grad(table), self.n)
        return largest(found, {"scores": expected.detach(), "queries": grad(exact), "keys": dtable})

    def versions(self) -> dict[str, str]:
        """Of what all sides stand on."""
        return {"torch": str(torch.__version__)}

    def _best(self, queries_NHD: Tensor) -> tuple[Tensor, Tensor]:
        if self.side == "ours":
            return product_key_topk(queries_NHD, self.table, self.top_k)
        best = best_of_scores if self.side == "scores" else best_of_sums
        return best(queries_NHD, self.table, self.top_k)


def largest(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Largest difference over all tensors, relative to each one's largest element."""
    assert found.keys() == expected.keys(), f"{sorted(found)} are not {sorted(expected)}"
    worst = 0.0
    for name, value in expected.items():
        assert found[name].shape == value.shape, f"{name} is {tuple(found[name].shape)}"
        scale = float(value.abs().max())
        assert scale > 0, f"{name}: the comparison means something only where numbers are not zero"
        worst = max(worst, float((found[name].double() - value.double()).abs().max()) / scale)
    return worst


def grad(leaf: Tensor) -> Tensor:
    """The gradient, which backward has left."""
    assert leaf.grad is not None, "backward reached every leaf"
    return leaf.grad


def _weights(layer: MoE) -> dict[str, Tensor]:
    parameters = dict(layer.named_parameters())
    assert parameters.keys() == set(NAMES.values()), f"the layer has {sorted(parameters)}"
    return {name: parameters[ours].detach() for name, ours in NAMES.items()}


def _gradients(layer: MoE) -> dict[str, Tensor]:
    parameters = dict(layer.named_parameters())
    return {name: grad(parameters[ours]) for name, ours in NAMES.items()}


def _stacked(peer: PlainMoE) -> dict[str, Tensor]:
    matrices = {
        name: torch.stack([one.detach() for one in getattr(peer, name)])
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    return matrices | {"router": peer.router.detach()}


def program(side: str, shape: dict[str, Any]) -> TurnsProgram:
    """What a side of this kind runs."""
    kinds: dict[str, type[Layer] | type[Retrieval]] = {"layer": Layer, "retrieval": Retrieval}
    return kinds[shape["kind"]](side, shape)


if __name__ == "__main__":
    serve(program, json.loads(sys.argv[1]), sys.stdin, say)
