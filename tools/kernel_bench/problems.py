"""What `triptych bench kernels` times: operators at the sizes that models have them. Letters as in
`problem.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from triptych.tools.kernel_bench import peers
from triptych.tools.kernel_bench.problem import Arguments, Draw, Peer, Problem, Shape, Target, eight_documents

LONG = [{"B": 1, "T": 8192, "H": 96, "D": 128}, {"B": 2, "T": 16384, "H": 16, "D": 128}]
"""Where flash-linear-attention publishes its times."""
LONGEST = {"B": 1, "T": 131072, "H": 8, "D": 128}
PACKED_COST = 1.15
"""Eight documents in a row may cost that much more than one of the same length."""


def _heads(cpu: Shape) -> dict[str, list[Shape]]:
    """Shapes of operators with heads of D channels."""
    return {
        "cpu": [cpu],
        "cuda": [*LONG, LONGEST],
        "check": [{"B": 1, "T": 192, "H": 2, "D": 64}],
        "tiny": [{"B": 1, "T": 64, "H": 2, "D": 16}],
    }


def _ssd(shape: Shape, draw: Draw) -> Arguments:
    B, T, H, D, G, N = (shape.get(k, default) for k, default in zip("BTHDGN", (1, 1, 1, 1, 1, 128)))
    return {
        "x": draw.normal("x", B, T, H, D),
        "dt": draw.uniform("dt", 0.001, 0.1, B, T, H, wide=True),
        "a": draw.uniform("a", -16.0, -1.0, H, wide=True),
        "b": draw.normal("b", B, T, G, N),
        "c": draw.normal("c", B, T, G, N),
        "d": draw.normal("d", H, wide=True),
    }


def _selective_scan(shape: Shape, draw: Draw) -> Arguments:
    B, T, D, N = (shape[k] for k in "BTDN")
    return {name: draw.normal(name, B, T, D) for name in ("x", "dt", "z")} | {
        "a": draw.uniform("a", -16.0, -1.0, D, N, wide=True),
        "b": draw.normal("b", B, T, N),
        "c": draw.normal("c", B, T, N),
        "d": draw.normal("d", D, wide=True),
        "dt_bias": draw.uniform("dt_bias", -6.0, -2.0, D, wide=True),
    }


def _gla(shape: Shape, draw: Draw) -> Arguments:
    size = [shape[k] for k in "BTHD"]
    g = F.logsigmoid(draw.normal("g", *size, wide=True)) / 16
    return {name: draw.normal(name, *size) for name in "qkv"} | {"g": g}


def _wkv6(shape: Shape, draw: Draw) -> Arguments:
    size = [shape[k] for k in "BTHD"]
    w = -(draw.normal("w", *size, wide=True) - 3.0).exp()
    return {name: draw.normal(name, *size) for name in "rkv"} | {
        "w": w,
        "u": draw.normal("u", shape["H"], shape["D"], wide=True),
    }


def _delta_rule(shape: Shape, draw: Draw) -> Arguments:
    size = [shape[k] for k in "BTHD"]
    return {
        "q": F.normalize(draw.normal("q", *size), dim=-1),
        "k": F.normalize(draw.normal("k", *size), dim=-1),
        "v": draw.normal("v", *size),
        "g": F.logsigmoid(draw.normal("g", *size[:3], wide=True)) / 16,
        "beta": draw.normal("beta", *size[:3]).sigmoid(),
    }


def _mlstm(shape: Shape, draw: Draw) -> Arguments:
    size = [shape[k] for k in "BTHD"]
    return {name: draw.normal(name, *size) for name in "qkv"} | {
        "igate": draw.normal("igate", *size[:3], wide=True),
        "fgate": draw.normal("fgate", *size[:3], wide=True) + 3,
    }


def _linear_recurrence(shape: Shape, draw: Draw) -> Arguments:
    size = [shape[k] for k in "BTD"]
    return {"a": draw.normal("a", *size).sigmoid(), "b": draw.normal("b", *size)}


def _conv(shape: Shape, draw: Draw) -> Arguments:
    B, T, D = (shape[k] for k in "BTD")
    return {
        "x": draw.normal("x", B, T, D),
        "weight": draw.normal("weight", D, 4),
        "bias": draw.normal("bias", D),
        "activation": "silu",
    }


def _long_conv(shape: Shape, draw: Draw) -> Arguments:
    B, T, D = (shape[k] for k in "BTD")
    return {"x": draw.normal("x", B, T, D), "kernel": draw.normal("kernel", D, T) / T**0.5}


def _attention(shape: Shape, draw: Draw) -> Arguments:
    B, T, H, D = (shape[k] for k in "BTHD")
    return {
        "q": draw.normal("q", B, T, H, D),
        "k": draw.normal("k", B, T, max(1, H // 4), D),
        "v": draw.normal("v", B, T, max(1, H // 4), D),
    }


def _rms_norm(shape: Shape, draw: Draw) -> Arguments:
    B, T, D = (shape[k] for k in "BTD")
    return {"x": draw.normal("x", B, T, D), "weight": draw.normal("weight", D)}


def _gated_rms_norm(shape: Shape, draw: Draw) -> Arguments:
    return _rms_norm(shape, draw) | {"z": draw.normal("z", *(shape[k] for k in "BTD"))}


def _modulated(shape: Shape, draw: Draw) -> Arguments:
    B, T, D = (shape[k] for k in "BTD")
    return {
        "x": draw.normal("x", B, T, D),
        "shift": draw.normal("shift", B, 1, D),
        "scale": draw.normal("scale", B, 1, D),
    }


def _rotary(shape: Shape, draw: Draw) -> Arguments:
    B, T, H, D = (shape[k] for k in "BTHD")
    return {"x": draw.normal("x", B, T, H, D), "positions": torch.arange(T, device=draw.device).expand(B, T)}


def _gate_up(shape: Shape, draw: Draw) -> Arguments:
    return {name: draw.normal(name, *(shape[k] for k in "BTD")) for name in ("gate", "up")}


def _cross_entropy(shape: Shape, draw: Draw) -> Arguments:
    T, D, V = (shape[k] for k in "TDV")
    return {
        "hidden": draw.normal("hidden", T, D),
        "weight": draw.normal("weight", V, D) / D**0.5,
        "targets": draw.integers("targets", V, T),
    }


def _grouped(shape: Shape, draw: Draw) -> Arguments:
    T, D, E, F_ = (shape[k] for k in "TDEF")
    rows = draw.integers("experts", E, T).bincount(minlength=E)
    return {"x": draw.normal("x", T, D), "weight": draw.normal("weight", E, F_, D) / D**0.5, "counts": rows}


def _packed(problem: Problem) -> Problem:
    """The same with eight documents in a row, beside one document of that length."""

    def inputs(shape: Shape, draw: Draw) -> Arguments:
        bounds = eight_documents(shape["B"], shape["T"], draw.device)
        return problem.inputs(shape, draw) | {"cu_seqlens": bounds}

    whole = Peer("one document", problem.run(), without=("cu_seqlens",))
    return Problem(
        f"{problem.name}, 8 documents",
        problem.op,
        inputs,
        {kind: shapes[:1] for kind, shapes in problem.shapes.items()},
        (whole,),
        tuple(Target("one document", speed=1 / PACKED_COST, device=device) for device in ("cpu", "cuda")),
    )


def _wide(cpu: Shape) -> dict[str, list[Shape]]:
    """Shapes of operators on rows of D channels."""
    return {
        "cpu": [cpu],
        "cuda": [{"B": 4, "T": 8192, "D": 8192}],
        "check": [{"B": 2, "T": 96, "D": 1024}],
        "tiny": [{"B": 1, "T": 16, "D": 64}],
    }


def problems() -> list[Problem]:
    """All of them."""
    rows = _wide({"B": 4, "T": 1024, "D": 1024})
    ssd = Problem(
        "ssd",
        "ssd",
        _ssd,
        _heads({"B": 1, "T": 1024, "H": 8, "D": 64, "N": 64}),
        (
            Peer("transformers", peers.ssd_transformers, "transformers"),
            Peer("loop", peers.ssd_loop, devices=("cpu",)),
            Peer("einsum, the paper's listing", peers.ssd_einsum),
        ),
        (
            Target("transformers", speed=20),
            Target("loop", speed=2),
            Target("einsum, the paper's listing", speed=1),
            Target("mamba_ssm", speed=1, device="cuda", dtype=torch.bfloat16),
        ),
    )
    selective_scan = Problem(
        "selective_scan",
        "selective_scan",
        _selective_scan,
        {
            "cpu": [{"B": 1, "T": 1024, "D": 128, "N": 16}],
            "cuda": [{"B": 2, "T": 8192, "D": 4096, "N": 16}],
            "check": [{"B": 1, "T": 96, "D": 64, "N": 16}],
            "tiny": [{"B": 1, "T": 32, "D": 16, "N": 4}],
        },
        (
            Peer("mamba-ssm's reference", peers.selective_scan_reference, devices=("cpu",)),
            Peer("transformers", peers.selective_scan_transformers, "transformers", devices=("cpu",)),
            Peer("loop", peers.selective_scan_loop, devices=("cpu",)),
        ),
        (Target("mamba-ssm's reference", speed=10), Target("transformers", speed=10)),
        repeats=3,
    )
    gla = Problem(
        "gated_linear_attention",
        "gated_linear_attention",
        _gla,
        _heads({"B": 1, "T": 1024, "H": 8, "D": 64}),
        (
            Peer("fla, naive", peers.gla_fla, "fla", devices=("cpu",)),
            Peer("loop", peers.gla_loop, devices=("cpu",)),
        ),
        (Target("fla, naive", speed=10), Target("fla", speed=1, device="cuda", dtype=torch.bfloat16)),
        repeats=3,
    )
    simple = Problem(
        "gated_linear_attention, per head",
        "gated_linear_attention",
        lambda shape, draw: (arguments := _gla(shape, draw)) | {"g": arguments["g"][..., 0].contiguous()},
        _heads({"B": 1, "T": 1024, "H": 8, "D": 64}),
    )
    delta = Problem(
        "gated_delta_rule",
        "gated_delta_rule",
        _delta_rule,
        _heads({"B": 1, "T": 1024, "H": 8, "D": 64}),
        (
            Peer("transformers", peers.delta_rule_transformers, "transformers"),
            Peer("loop", peers.delta_rule_loop, devices=("cpu",)),
        ),
    )
    recurrence = Problem(
        "linear_recurrence",
        "linear_recurrence",
        _linear_recurrence,
        {
            "cpu": [{"B": 1, "T": 4096, "D": 512}],
            "cuda": [{"B": 1, "T": 32768, "D": 2048}],
            "check": [{"B": 2, "T": 300, "D": 64}],
            "tiny": [{"B": 1, "T": 64, "D": 16}],
        },
        (Peer("loop", peers.linear_recurrence_loop, devices=("cpu",)),),
        (Target("loop", speed=10),),
    )
    conv = Problem("causal_conv1d", "causal_conv1d", _conv, rows, (Peer("PyTorch", peers.conv_pytorch),))
    attention = Problem(
        "attention",
        "attention",
        _attention,
        _heads({"B": 1, "T": 1024, "H": 8, "D": 64}),
        (Peer("eager", peers.attention_eager, devices=("cpu",)),),
    )
    found = [
        ssd,
        _packed(ssd),
        selective_scan,
        _packed(selective_scan),
        gla,
        _packed(gla),
        simple,
        Problem(
            "wkv6",
            "wkv6",
            _wkv6,
            _heads({"B": 1, "T": 1024, "H": 8, "D": 64}),
            (Peer("loop", peers.wkv6_loop, devices=("cpu",)),),
        ),
        delta,
        _packed(delta),
        Problem("mlstm", "mlstm", _mlstm, _heads({"B": 1, "T": 1024, "H": 8, "D": 64})),
        recurrence,
        _packed(recurrence),
        conv,
        _packed(conv),
        Problem(
            "long_conv",
            "long_conv",
            _long_conv,
            {
                "cpu": [{"B": 1, "T": 1024, "D": 64}],
                "cuda": [{"B": 1, "T": 32768, "D": 1024}],
                "check": [{"B": 1, "T": 96, "D": 16}],
                "tiny": [{"B": 1, "T": 32, "D": 8}],
            },
            (Peer("PyTorch", peers.long_conv_pytorch, devices=("cpu",)),),
        ),
        attention,
        _packed(attention),
        Problem(
            "rms_norm",
            "rms_norm",
            _rms_norm,
            rows,
            (Peer("transformers", peers.rms_norm_transformers), Peer("PyTorch", peers.rms_norm_pytorch)),
        ),
        Problem(
            "gated_rms_norm",
            "gated_rms_norm",
            _gated_rms_norm,
            rows,
            (Peer("transformers", peers.gated_rms_norm_plain),),
        ),
        Problem(
            "modulated_layer_norm",
            "modulated_layer_norm",
            _modulated,
            rows,
            (Peer("DiT", peers.modulated_plain),),
        ),
        Problem(
            "rotary",
            "rotary",
            _rotary,
            _heads({"B": 4, "T": 1024, "H": 8, "D": 64}),
            (Peer("transformers", peers.rotary_transformers),),
        ),
        Problem("swiglu", "swiglu", _gate_up, rows, (Peer("PyTorch", peers.swiglu_plain),)),
        Problem("geglu", "geglu", _gate_up, rows, (Peer("PyTorch", peers.geglu_plain),)),
        Problem(
            "linear_cross_entropy",
            "linear_cross_entropy",
            _cross_entropy,
            {
                "cpu": [{"T": 4096, "D": 512, "V": 128256}],
                "cuda": [{"T": 8192, "D": 4096, "V": 128256}],
                "check": [{"T": 64, "D": 64, "V": 1024}],
                "tiny": [{"T": 16, "D": 16, "V": 64}],
                "compile": [{"T": 16, "D": 64, "V": 128256}],
            },
            (Peer("eager", peers.cross_entropy_eager),),
            (
                Target("eager", speed=0.9, memory=0.25),
                Target("liger", speed=1.0, memory=1.0, device="cuda", dtype=torch.bfloat16),
            ),
            repeats=2,
            as_mean=True,
        ),
        Problem(
            "grouped_linear",
            "grouped_linear",
            _grouped,
            {
                "cpu": [{"T": 4096, "D": 256, "E": 16, "F": 1024}],
                "cuda": [{"T": 65536, "D": 2048, "E": 64, "F": 1408}],
                "check": [{"T": 128, "D": 64, "E": 5, "F": 96}],
                "tiny": [{"T": 32, "D": 16, "E": 3, "F": 16}],
            },
            (Peer("loop over experts", peers.grouped_loop),),
        ),
    ]
    return found


def chosen(ops: Sequence[str]) -> list[Problem]:
    """Those of the operators named, all where none is. Raises ValueError for one that is not measured."""
    known = problems()
    unknown = set(ops) - {problem.op for problem in known}
    if unknown:
        names = sorted({problem.op for problem in known})
        raise ValueError(f"op={min(unknown)!r} is not measured; use one of {names}")
    return [problem for problem in known if not ops or problem.op in ops]
