"""The three matrix products of experts' linear layers, each one call or a loop.

A rows sorted by expert, E experts, K and N sizes of a matrix. counts: int64 (E,), rows of each expert.

PyTorch's grouped_mm serves where dtypes and alignment allow it. On the CPU it is a loop as well, but without
Python in it (1 to 3 % faster for 512 rows of 256 x 1,024 per expert, 25 % for 8 rows of 64 x 128; backward
alike). On a GPU it is one kernel in bf16 on Hopper and Blackwell, which does not wait for the counts; for
other dtypes and devices PyTorch reads them and goes from expert to expert (in 2.13, file GroupedBlas.cpp).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import statistics_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16
"""Bytes that grouped_mm wants rows to be multiples of, and to begin at."""


def row_bounds(counts: Tensor, rows: int) -> list[tuple[int, int]]:
    """[(start, end)] of each expert's rows. Reads the values, a sync on an accelerator.

    Raises ValueError when the counts do not sum to the number of rows.
    """
    bounds, start = [], 0
    for count in counts.tolist():
        bounds.append((start, start + count))
        start += count
    if start != rows:
        raise ValueError(f"counts sum to {start}, but there are {rows} rows; each row has one expert")
    return bounds


def one_call(*operands: Tensor) -> bool:
    """Whether grouped_mm takes operands like these: contiguous tensors of one dtype."""
    first = operands[0]
    return first.dtype in DTYPES and all(
        x.dtype == first.dtype
        and x.numel() > 0
        and x.is_contiguous()
        and x.data_ptr() % ALIGNMENT == 0
        and x.shape[-1] * x.element_size() % ALIGNMENT == 0
        for x in operands
    )


@torch.compiler.assume_constant_result
def _has_kernel(device: str) -> bool:
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def no_kernel(device: torch.device, dtype: torch.dtype, *sizes: int) -> str | None:
    """Why grouped_mm would go from expert to expert on a GPU, waiting for the counts; None where not."""
    if dtype != torch.bfloat16:
        return f"PyTorch's grouped_mm has a kernel for bf16 alone, not for {dtype}"
    if any(size * dtype.itemsize % ALIGNMENT for size in sizes):
        return f"sizes {sizes} do not fill {ALIGNMENT} bytes, as PyTorch's grouped_mm wants them to"
    if not _has_kernel(str(device)):
        return "PyTorch's grouped_mm has a kernel for Hopper and Blackwell alone"
    return None


def needs_gpu(device: torch.device) -> str | None:
    """Why there is no such kernel on a device."""
    return None if device.type == "cuda" else "a GPU's kernel; form torch calls grouped_mm here too"


def _ends(counts: Tensor, rows: int) -> Tensor:
    """int32 (E,): where each expert's rows end."""
    if counts.device.type == "cpu":
        row_bounds(counts, rows)
    return counts.cumsum(0).to(torch.int32)


def forward_rows(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x (A, K) @ weight[e].T, weight (E, N, K) -> (A, N)."""
    if one_call(x, weight) and weight.shape[1] * x.element_size() % ALIGNMENT == 0:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=_ends(counts, x.shape[0]))
    y = x.new_empty(x.shape[0], weight.shape[1])
    for e, (start, end) in enumerate(row_bounds(counts, x.shape[0])):
        torch.mm(x[start:end], weight[e].T, out=y[start:end])
    return y


def backward_rows(dy: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """dy (A, N) @ weight[e], weight (E, N, K) -> (A, K)."""
    if one_call(dy, weight):
        return F.grouped_mm(dy, weight, offs=_ends(counts, dy.shape[0]))
    dx = dy.new_empty(dy.shape[0], weight.shape[2])
    for e, (start, end) in enumerate(row_bounds(counts, dy.shape[0])):
        torch.mm(dy[start:end], weight[e], out=dx[start:end])
    return dx


def weight_gradient(dy: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """dy[rows of e].T @ x[rows of e]: dy (A, N), x (A, K) -> (E, N, K); zero for an expert without rows."""
    if one_call(dy, x):
        return F.grouped_mm(dy.T, x, offs=_ends(counts, x.shape[0]))
    dweight = x.new_empty(counts.shape[0], dy.shape[1], x.shape[1])
    for e, (start, end) in enumerate(row_bounds(counts, x.shape[0])):
        torch.mm(dy[start:end].T, x[start:end], out=dweight[e])
    return dweight


def add_bias(y: Tensor, bias: Tensor, counts: Tensor) -> Tensor:
    """Add bias[e], bias (E, N), to the rows of each expert in y (A, N), in place."""
    if y.is_cuda:
        return add_bias_at_once(y, bias, counts)
    for e, (start, end) in enumerate(row_bounds(counts, y.shape[0])):
        y[start:end] += bias[e]
    return y


def bias_gradient(dy: Tensor, counts: Tensor) -> Tensor:
    """Sums of each expert's rows, added up in fp32 at least: dy (A, N) -> (E, N) of dy's dtype."""
    if dy.is_cuda:
        return bias_gradient_at_once(dy, counts)
    dtype = statistics_dtype(dy)
    sums = torch.zeros(counts.shape[0], dy.shape[1], dtype=dtype, device=dy.device)
    for e, (start, end) in enumerate(row_bounds(counts, dy.shape[0])):
        if end > start:
            torch.sum(dy[start:end], 0, dtype=dtype, out=sums[e])
    return sums.to(dy.dtype)


def add_bias_at_once(y: Tensor, bias: Tensor, counts: Tensor) -> Tensor:
    """`add_bias` that does not wait for the counts, but has a bias for each row for a moment."""
    return y.add_(bias.repeat_interleave(counts, dim=0, output_size=y.shape[0]))


def bias_gradient_at_once(dy: Tensor, counts: Tensor) -> Tensor:
    """`bias_gradient` that does not wait for the counts."""
    if dy.numel() == 0:
        return dy.new_zeros(counts.shape[0], dy.shape[1])
    wide = dy.to(statistics_dtype(dy))
    return torch.segment_reduce(wide, "sum", lengths=counts, axis=0, unsafe=True).to(dy.dtype)
