"""One side of a comparison of `triptych bench train`, in its own process.

`python -m triptych.tools.bench_sides '{"kind": "ssd", "side": "ours", ...}'` prints one line of JSON:
{"seconds": [...], "peak_bytes": ..., "versions": {...}}, and leaves what it computed in the file `result`.

B batch, T length, H heads, P head dim, G groups, N state, V vocabulary, D hidden size.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from triptych.tools.bench_weights import load_into_transformers, unfuse

if TYPE_CHECKING:
    from triptych.models import LanguageConfig, LanguageModel

WARM_UP = 2


class Program:
    """What a side runs: `once` is timed, `check` gives named tensors to hold against the other side's."""

    def __init__(self, once: Callable[[], object], check: Callable[[], dict[str, Tensor]]) -> None:
        self.once = once
        self.check = check


def ssd_program(side: str, shape: dict[str, Any]) -> Program:
    """The scan on leaves drawn from one seed: x (B,T,H,P), dt (B,T,H), a and d (H,), b and c (B,T,G,N)."""
    size_b, size_t, heads = shape["batch"], shape["length"], shape["heads"]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(size_b, size_t, heads, shape["head_dim"], generator=draw)
    dt = 0.001 + 0.099 * torch.rand(size_b, size_t, heads, generator=draw)
    a = -1 - 15 * torch.rand(heads, generator=draw)
    b = torch.randn(size_b, size_t, shape["groups"], shape["state"], generator=draw)
    c = torch.randn(size_b, size_t, shape["groups"], shape["state"], generator=draw)
    d = torch.randn(heads, generator=draw)
    upstream = torch.randn(x.shape, generator=draw)
    leaves = {"x": x, "dt": dt, "a": a, "b": b, "c": c, "d": d}
    for leaf in leaves.values():
        leaf.requires_grad_()
    scan = our_scan() if side == "ours" else their_scan(shape["chunk"])

    def run() -> Tensor:
        for leaf in leaves.values():
            leaf.grad = None
        y = scan(x, dt, a, b, c, d)
        y.backward(upstream)
        return y

    def check() -> dict[str, Tensor]:
        y = run().detach()
        return {"y": y} | {f"grad {name}": _grad(leaf) for name, leaf in leaves.items()}

    return Program(run, check)


def our_scan() -> Callable[..., Tensor]:
    """The scan as the models call it."""
    from triptych.kernels import ssd

    return lambda x, dt, a, b, c, d: ssd(x, dt, a, b, c, d=d)


def their_scan(chunk: int) -> Callable[..., Tensor]:
    """The plain PyTorch scan that transformers' Mamba-2 runs where mamba-ssm is not installed."""
    import transformers
    from transformers.models.mamba2 import modeling_mamba2

    scan = getattr(modeling_mamba2, "mamba2_chunk_scan", None)
    if scan is None:
        raise RuntimeError(
            f"transformers {transformers.__version__} has no separate Mamba-2 scan to measure; "
            "install the version of constraints.txt"
        )
    # The name is a dispatcher to a hub kernel; what it wraps is the fallback, and nothing is to be
    # downloaded.
    fallback = getattr(scan, "__wrapped__", scan)
    return lambda x, dt, a, b, c, d: fallback(x, dt, a, b, c, chunk, D=d)


def model_config(shape: dict[str, Any]) -> LanguageConfig:
    """The hybrid of the comparison: Mamba-2 with attention at `attention_layers`, SwiGLU everywhere."""
    from triptych.models import LanguageConfig

    attention = set(shape["attention_layers"])
    return LanguageConfig.model_validate({
        "family": "lm",
        "vocab_size": shape["vocab_size"],
        "hidden_size": shape["hidden_size"],
        "num_layers": shape["layers"],
        "pattern": ["attention" if layer in attention else "mamba2" for layer in range(shape["layers"])],
        "attention": {"num_heads": shape["num_heads"], "num_kv_heads": shape["num_kv_heads"]},
        "mamba2": {
            "state_size": shape["state"], "head_dim": shape["head_dim"], "num_groups": shape["groups"],
        },
        "ffn": {"kind": "swiglu", "intermediate_size": shape["intermediate_size"]},
        "norm": "rmsnorm",
        "norm_eps": 1e-5,
    })  # fmt: skip


def our_model(shape: dict[str, Any]) -> LanguageModel:
    """Our model with weights from seed 0; both sides start from these."""
    from triptych.models import LanguageModel, initialize

    model = LanguageModel(model_config(shape))
    initialize(model, seed=0)
    return model


def their_model(shape: dict[str, Any]) -> nn.Module:
    """transformers' Bamba of the same shape, before our weights are copied in."""
    from transformers import BambaConfig, BambaForCausalLM

    heads = 2 * shape["hidden_size"] // shape["head_dim"]
    config = BambaConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["hidden_size"], num_hidden_layers=shape["layers"],
        intermediate_size=shape["intermediate_size"], attn_layer_indices=shape["attention_layers"],
        num_attention_heads=shape["num_heads"], num_key_value_heads=shape["num_kv_heads"], rms_norm_eps=1e-5,
        mamba_n_heads=heads, mamba_d_head=shape["head_dim"], mamba_n_groups=shape["groups"],
        mamba_d_state=shape["state"], mamba_chunk_size=shape["chunk"], pad_token_id=None, use_cache=False,
    )  # fmt: skip
    # Bamba rotates half of each head whatever it is told; ours rotates all of it, and so does Bamba now.
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    return BambaForCausalLM(config).train()


def step_program(side: str, shape: dict[str, Any]) -> Program:
    """Forward, backward and AdamW of the whole model on one fixed batch of random tokens (B, T)."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(shape["vocab_size"], (shape["batch"], shape["length"]), generator=draw)
    # The last token has no successor: its target is ignored, as transformers does by shifting.
    targets = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], dim=1)
    count = int((targets != -100).sum())
    if side == "ours":
        model: nn.Module = our_model(shape)
    else:
        model = their_model(shape)
        load_into_transformers(our_model(shape), model)

    def loss_of() -> Tensor:
        if side == "ours":
            return model(tokens, targets=targets).sum() / count
        return model(input_ids=tokens, labels=tokens).loss

    update = our_update(model) if side == "ours" else their_update(model)

    def once() -> None:
        loss_of().backward()
        update()
        model.zero_grad(set_to_none=True)

    def check() -> dict[str, Tensor]:
        if side == "ours":
            model.load_state_dict(our_model(shape).state_dict())
        else:
            load_into_transformers(our_model(shape), model)
        model.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        with torch.no_grad():
            logits = model(tokens) if side == "ours" else model(input_ids=tokens).logits
        gradients = {name: _grad(parameter) for name, parameter in model.named_parameters()}
        if side != "ours":
            gradients = unfuse(our_model(shape), gradients)
        found = {"loss": loss.detach().reshape(1), "logits": logits}
        return found | {f"grad {name}": value for name, value in gradients.items()}

    return Program(once, check)


def our_update(model: nn.Module) -> Callable[[], None]:
    """One AdamW update as the training loop makes it."""
    from triptych.training.config import OptimizerConfig
    from triptych.training.optimizer import AdamW

    optimizer = AdamW(model.named_parameters(), OptimizerConfig())
    return lambda: optimizer.step(1e-3)


def their_update(model: nn.Module) -> Callable[[], None]:
    """One AdamW update as transformers' Trainer makes it by default."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def update() -> None:
        optimizer.step()

    return update


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None, "backward reached every leaf"
    return leaf.grad.detach()


def settled_bytes() -> int:
    """Resident memory once everything unused is given back, from where `peak_bytes` counts on.

    Where the system does not say (not Linux), the peak so far.
    """
    gc.collect()
    # Freed memory that the C library keeps for later would hide what the next step takes.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return peak_bytes()


def peak_bytes() -> int:
    """Largest resident memory since `settled_bytes`, or since the start where that is all there is."""
    try:
        return _status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def versions(side: str) -> dict[str, str]:
    """Versions of what the side stands on."""
    found = {"torch": str(torch.__version__)}
    if side == "transformers":
        import transformers

        found["transformers"] = transformers.__version__
    return found


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Build, warm up, time, then compute what is compared; returns the line that is printed.

    peak_bytes: weights or inputs, gradients, optimizer states and all that a step takes, above a process that
    has run such a program before.
    """
    torch.set_num_threads(request["threads"])
    make = {"ssd": ssd_program, "step": step_program}[request["kind"]]
    # What is imported and compiled on first use is paid for on shapes that cost nothing.
    make(request["side"], request["warm_up_shape"]).once()
    before = settled_bytes()
    program = make(request["side"], request["shape"])
    settled_bytes()
    for _ in range(WARM_UP):
        program.once()
    seconds = []
    for _ in range(request["repeats"]):
        start = time.perf_counter()
        program.once()
        seconds.append(time.perf_counter() - start)
    peak = peak_bytes() - before
    save_file({name: value.contiguous() for name, value in program.check().items()}, request["result"])
    return {"seconds": seconds, "peak_bytes": peak, "versions": versions(request["side"])}


class TurnsProgram(Protocol):
    """What `serve` runs: `once` is timed; `difference` is to what the oracle computes, relative."""

    def once(self) -> None: ...
    def difference(self) -> float: ...
    def versions(self) -> dict[str, str]: ...


def serve(
    make: Callable[[str, dict[str, Any]], TurnsProgram],
    request: dict[str, Any],
    turns: Iterable[str],
    answer: Callable[[Any], None],
) -> None:
    """Build make(side, shape), warm up and answer; then make a step for each of `turns` and answer its
    seconds, so that sides can take turns; at last answer {"peak_bytes", "difference", "versions"}.

    peak_bytes: weights, gradients, optimizer states and all that a step takes, above a process that has run
    such a program before.
    """
    torch.set_num_threads(request["threads"])
    # What is imported and compiled on first use is paid for on shapes that cost nothing.
    make(request["side"], request["warm_up_shape"]).once()
    before = settled_bytes()
    program = make(request["side"], request["shape"])
    settled_bytes()
    for _ in range(WARM_UP):
        program.once()
    answer("ready")
    for _ in turns:
        start = time.perf_counter()
        program.once()
        answer(time.perf_counter() - start)
    peak = peak_bytes() - before
    answer({"peak_bytes": peak, "difference": program.difference(), "versions": program.versions()})


def say(value: Any) -> None:
    """An answer as a line of JSON."""
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
