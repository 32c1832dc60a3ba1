"""What has to be mended of the interpreter of Triton 3.6, which runs the kernels on a CPU in tests."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def mend_interpreter() -> None:
    """With NumPy 2.4 `range` does not take loaded numbers; tl.dot multiplies the bits of bf16 numbers; casts
    to bf16 cut off where a GPU rounds to the nearest."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    tensors, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot
    convert = interpreter._convert_float

    def patch(tensor: Any, scope: Any) -> None:
        tensors(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16 or x.data.dtype != np.uint16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def convert_float(x: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return convert(x, source, target, rounding)
        bits = np.ascontiguousarray(x).view(np.uint32)
        rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(bits.view(np.float32)), np.uint16(0x7FC0), rounded)

    interpreter._patch_lang_tensor = patch
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float = convert_float
