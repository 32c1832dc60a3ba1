import pytest
import torch

from tests.models.common import ThreadShards, on_ranks, set_parameter, small_config
from triptych.models.norms import GatedRMSNorm, LayerNorm, RMSNorm, build_norm


def test_the_norm_is_the_one_that_the_configuration_names():
    assert isinstance(build_norm(small_config()), RMSNorm)
    assert isinstance(build_norm(small_config(norm="layernorm")), LayerNorm)


def test_norms_equal_their_equations():
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    rms, layer = RMSNorm(8, 1e-3).double(), LayerNorm(8, 1e-3).double()
    for norm in (rms, layer):
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)
    torch.testing.assert_close(rms(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * rms.weight)
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(layer(x), scaled * layer.weight + layer.bias)


def test_norms_give_the_type_of_autocast():
    norm = RMSNorm(8, 1e-5)
    x = torch.randn(2, 3, 8)
    torch.nn.init.ones_(norm.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
    assert norm(x).dtype == torch.float32


@pytest.mark.parametrize(("num_groups", "tp"), [(1, 2), (2, 4), (2, 8), (1, 4)])
def test_a_group_that_spans_shards(num_groups, tp):
    """Against the whole norm: values and every gradient."""
    norm = GatedRMSNorm(16, num_groups, eps=1e-3).double()
    torch.nn.init.normal_(norm.weight)
    x, gate, weights = (torch.randn(2, 5, 16, dtype=torch.float64) for _ in range(3))

    def run(norm, x, gate, weights):
        x, gate = x.clone().requires_grad_(), gate.clone().requires_grad_()
        y = norm(x, gate)
        return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, gate, norm.weight])]

    def shard(rank, group):
        local = GatedRMSNorm(16, num_groups, eps=1e-3)
        held = slice(rank * 16 // tp, (rank + 1) * 16 // tp)
        set_parameter(local, "weight", norm.weight[held])
        local.shards = ThreadShards(group, rank, start=rank // (tp // num_groups))
        return run(local, x[..., held], gate[..., held], weights[..., held])

    for parts, whole in zip(zip(*on_ranks(tp, shard)), run(norm, x, gate, weights)):
        torch.testing.assert_close(torch.cat(parts, dim=-1), whole, rtol=1e-11, atol=1e-12)


def test_the_spanning_norm_passes_gradcheck_and_keeps_types():
    norm = GatedRMSNorm(8, 1, eps=1e-3).double()
    norm.group_size = 16
    torch.nn.init.normal_(norm.weight)
    x, gate = (torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(norm, (x, gate))
    assert norm.float()(x.bfloat16(), gate.bfloat16()).dtype == torch.bfloat16
