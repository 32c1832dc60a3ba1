"""The activation of a SwiGLU feed-forward."""

from __future__ import annotations

from torch import Tensor

from triptych.kernels import dispatch, external_packages, triton_launch
from triptych.kernels.library import operator
from triptych.kernels.swiglu import examples, reference
from triptych.kernels.swiglu import torch as fast

_LIGER_CHANNELS = 65536
_LIGER_DTYPES = ("torch.float32", "torch.float16", "torch.bfloat16")


@operator()
def swiglu(gate: Tensor, up: Tensor, *, form: str | None = None) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202), computed in fp32 at least, in the inputs' common dtype.

    gate, up: of one shape, any. Saves the two inputs. Raises ValueError for shapes that differ.
    """
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")
    return dispatch.choose("swiglu", form, gate.device, gate, up).run(gate, up)


def liger_supports(gate: Tensor, up: Tensor) -> str | None:
    """Why Liger's activations of gated feed-forwards cannot serve a call; None where they can."""
    if gate.dtype != up.dtype or str(gate.dtype) not in _LIGER_DTYPES:
        return f"Liger wants one dtype of fp32, fp16 and bf16, not {gate.dtype} and {up.dtype}"
    if gate.dim() == 0 or gate.shape[-1] > _LIGER_CHANNELS:
        return f"Liger takes rows of up to {_LIGER_CHANNELS} elements, not {tuple(gate.shape)}"
    return None


dispatch.register("swiglu", triton_launch.form("triptych.kernels.swiglu.triton", "swiglu"))
dispatch.register(
    "swiglu",
    external_packages.form(
        "liger", "liger_kernel", "triptych.kernels.swiglu.external", "swiglu", supports=liger_supports
    ),
)
dispatch.register("swiglu", dispatch.Form("torch", fast.swiglu))
dispatch.register("swiglu", dispatch.Form("reference", reference.swiglu))
dispatch.register_examples("swiglu", swiglu, examples.MAKERS)
