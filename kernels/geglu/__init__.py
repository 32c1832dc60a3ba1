"""The activation of a GEGLU feed-forward."""

from __future__ import annotations

from torch import Tensor

from triptych.kernels import dispatch, external_packages, triton_launch
from triptych.kernels.geglu import examples, reference
from triptych.kernels.geglu import torch as fast
from triptych.kernels.library import operator
from triptych.kernels.swiglu import liger_supports


@operator()
def geglu(gate: Tensor, up: Tensor, *, form: str | None = None) -> Tensor:
    """gelu(gate) * up (arXiv 2002.05202), GELU in its tanh form (arXiv 1606.08415), computed in fp32 at
    least, in the inputs' common dtype.

    gate, up: of one shape, any. Saves the two inputs. Raises ValueError for shapes that differ.
    """
    if gate.shape != up.shape:
        raise ValueError(f"geglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")
    return dispatch.choose("geglu", form, gate.device, gate, up).run(gate, up)


dispatch.register("geglu", triton_launch.form("triptych.kernels.geglu.triton", "geglu"))
dispatch.register(
    "geglu",
    external_packages.form(
        "liger", "liger_kernel", "triptych.kernels.geglu.external", "geglu", supports=liger_supports
    ),
)
dispatch.register("geglu", dispatch.Form("torch", fast.geglu))
dispatch.register("geglu", dispatch.Form("reference", reference.geglu))
dispatch.register_examples("geglu", geglu, examples.MAKERS)
