"""The activation of a SwiGLU feed-forward."""

from __future__ import annotations

from torch import Tensor

from triptych.kernels import dispatch, triton_launch
from triptych.kernels.swiglu import examples, reference
from triptych.kernels.swiglu import torch as fast


def swiglu(gate: Tensor, up: Tensor, *, form: str | None = None) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202), computed in fp32 at least, in the inputs' common dtype.

    gate, up: of one shape, any. Saves the two inputs. Raises ValueError for shapes that differ.
    """
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")
    return dispatch.choose("swiglu", form, gate.device).run(gate, up)


dispatch.register("swiglu", triton_launch.form("triptych.kernels.swiglu.triton", "swiglu"))
dispatch.register("swiglu", dispatch.Form("torch", fast.swiglu))
dispatch.register("swiglu", dispatch.Form("reference", reference.swiglu))
dispatch.register_examples("swiglu", swiglu, examples.MAKERS)
