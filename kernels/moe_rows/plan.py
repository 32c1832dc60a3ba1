"""Which row each choice of an expert becomes. N tokens, K choices of a token, A rows, E experts."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@torch.compiler.disable
def moe_plan(experts: Tensor, num_experts: int, *, all_rows: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Sort choices by expert, those of one expert in the order of their tokens.

    experts: int64 (N, K) of 0 .. num_experts; num_experts itself means nowhere. Returns
    tokens: int64 (A,), the token of each row, rows sorted by expert; slots: int64 (N, K), the row of each
    choice, -1 for nowhere; counts: int64 (E,), rows of each expert. A is the number of choices that lead
    somewhere, for which an accelerator is waited for; without values (meta, fake) it is N*K.
    all_rows: A is N*K, and nothing is waited for. Choices that lead nowhere then have rows after all others,
    which no slot names, so that no result or gradient depends on them. Of the products of experts,
    form="triton" takes such rows, past the sum of the counts, and makes zeros of them.
    Outside autograd. Raises ValueError for experts outside their range, which are noticed on the CPU.
    """
    size_n, size_k = experts.shape
    if experts.is_meta or isinstance(experts, FakeTensor):
        tokens = experts.new_empty(size_n * size_k, dtype=torch.int64)
        return tokens, torch.empty_like(experts), experts.new_empty(num_experts)
    flat = experts.detach().flatten()
    if (
        flat.device.type == "cpu"
        and flat.numel()
        and not 0 <= int(flat.min()) <= int(flat.max()) <= num_experts
    ):
        raise ValueError(
            f"moe_plan: experts must lie in 0 .. {num_experts} (which means nowhere); they lie in "
            f"{int(flat.min())} .. {int(flat.max())}"
        )
    counts = _counts(flat, num_experts + 1)
    order = _stable_order(flat, num_experts)
    slots = torch.empty_like(order)
    slots[order] = torch.arange(order.numel(), device=order.device)
    rows = order.numel() if all_rows else order.numel() - int(counts[-1])
    slots = slots.masked_fill_(flat == num_experts, -1).view(size_n, size_k)
    return order[:rows].div(size_k, rounding_mode="floor"), slots, counts[:-1]


def _counts(flat: Tensor, size: int) -> Tensor:
    """How often each of 0 .. size - 1 stands in flat. Sums of whole numbers, so in any order the same."""
    # On a GPU deterministic mode refuses bincount.
    return flat.bincount(minlength=size) if flat.device.type == "cpu" else _counts_by_sorting(flat, size)


def _counts_by_sorting(flat: Tensor, size: int) -> Tensor:
    edges = torch.arange(size + 1, device=flat.device)
    return torch.searchsorted(flat.sort().values, edges).diff()


def _stable_order(flat: Tensor, largest: int) -> Tensor:
    """int64: the permutation that sorts flat, equal ones in their order. Few bits are sorted faster."""
    small = flat.to(torch.int16) if largest < 2**15 else flat
    return small.sort(stable=True).indices
