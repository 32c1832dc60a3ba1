"""The Mamba-2 mixer against transformers' and against a loop over time in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.common import ThreadShards, on_ranks, set_parameter, small_config, small_model, window_of
from triptych.models.context import Context, build_context
from triptych.models.mixers import Mamba2


def build(num_groups: int = 2, dtype: torch.dtype = torch.float64, **settings) -> Mamba2:
    mamba2 = {"state_size": 5, "head_dim": 6, "num_groups": num_groups, "chunk_size": 8} | settings
    return small_model(small_config(pattern="M", mamba2=mamba2), dtype=dtype).blocks["0"].mixer


def by_hand(mixer: Mamba2, x: torch.Tensor) -> torch.Tensor:
    """Equation by equation, one token after the other."""
    s = mixer.settings
    z, u, b, c, dt = (
        x @ p.weight.T for p in (mixer.z_proj, mixer.x_proj, mixer.b_proj, mixer.c_proj, mixer.dt_proj)
    )

    def conv(signal, layer):
        taps = layer.weight.shape[1]
        padded = F.pad(signal, (0, 0, taps - 1, 0))
        y = sum(padded[:, k : k + signal.shape[1]] * layer.weight[:, k] for k in range(taps)) + layer.bias
        return y * torch.sigmoid(y)

    u, b, c = conv(u, mixer.conv_x), conv(b, mixer.conv_b), conv(c, mixer.conv_c)
    dt = torch.log1p(torch.exp(dt + mixer.dt_bias)).clamp(*s.dt_limit)
    B, T, H = dt.shape
    u, b, c = u.view(B, T, H, -1), b.view(B, T, s.num_groups, -1), c.view(B, T, s.num_groups, -1)
    state = u.new_zeros(B, H, s.head_dim, s.state_size)
    y = torch.zeros_like(u)
    for t in range(T):
        for h in range(H):
            g = h // (H // s.num_groups)
            decay = torch.exp(-torch.exp(mixer.a_log[h]) * dt[:, t, h])[:, None, None]
            update = dt[:, t, h, None, None] * u[:, t, h, :, None] * b[:, t, g, None, :]
            state[:, h] = decay * state[:, h] + update
            y[:, t, h] = (state[:, h] * c[:, t, g, None, :]).sum(-1) + mixer.d[h] * u[:, t, h]
    y = (y.flatten(-2) * z * torch.sigmoid(z)).unflatten(-1, (s.num_groups, -1))
    y = y / (y.square().mean(-1, keepdim=True) + mixer.norm.eps).sqrt()
    return (y.flatten(-2) * mixer.norm.weight) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("num_groups", [1, 2, 8])
@pytest.mark.parametrize("length", [1, 3, 21])
@torch.no_grad()
def test_mixer_equals_a_loop_in_float64(num_groups, length):
    mixer = build(num_groups, dt_limit=(0.2, 1.5))
    x = torch.randn(2, length, 24, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, Context()), by_hand(mixer, x), rtol=0, atol=1e-11)


class NormOfGroups(torch.nn.Module):
    """The gated norm as mamba-ssm defines it, for releases of transformers that take it over all groups."""

    def __init__(self, channels, num_groups):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(channels))
        self.num_groups = num_groups

    def forward(self, x, gate):
        groups = (x * F.silu(gate)).unflatten(-1, (self.num_groups, -1))
        return F.rms_norm(groups, groups.shape[-1:], eps=1e-5).flatten(-2) * self.weight


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_mixer_and_gradients_equal_transformers(num_groups):
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    ours = build(num_groups, torch.float32)
    settings = transformers.Mamba2Config(
        hidden_size=24, num_heads=8, head_dim=6, expand=2, state_size=5, n_groups=num_groups, conv_kernel=4,
        chunk_size=8, use_bias=False, use_conv_bias=True, layer_norm_epsilon=1e-5, num_hidden_layers=1,
        time_step_limit=(0.0, float("inf")),
    )  # fmt: skip
    their = Mamba2Mixer(settings, layer_idx=0).eval()
    if not hasattr(their.norm, "group_size"):
        their.norm = NormOfGroups(48, num_groups)
    convs = (ours.conv_x, ours.conv_b, ours.conv_c)
    # Their order: z, then x, b, c that go through one convolution, then dt.
    projections = (ours.z_proj, ours.x_proj, ours.b_proj, ours.c_proj, ours.dt_proj)
    their.load_state_dict(
        {
            "in_proj.weight": torch.cat([p.weight for p in projections]).detach(),
            "conv1d.weight": torch.cat([conv.weight for conv in convs]).detach().unsqueeze(1),
            "conv1d.bias": torch.cat([conv.bias for conv in convs]).detach(),
            "A_log": ours.a_log.detach(),
            "D": ours.d.detach(),
            "dt_bias": ours.dt_bias.detach(),
            "norm.weight": ours.norm.weight.detach(),
            "out_proj.weight": ours.out_proj.weight.detach(),
        }
    )
    x = torch.randn(2, 21, 24, requires_grad=True)
    expected, y = their(x), ours(x, Context())
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=2e-5)
    weights = torch.randn_like(y)
    (their_dx,) = torch.autograd.grad((expected * weights).sum(), x, retain_graph=True)
    (our_dx,) = torch.autograd.grad((y * weights).sum(), x, retain_graph=True)
    torch.testing.assert_close(our_dx, their_dx, rtol=1e-3, atol=1e-4)
    for mine, name in [
        (ours.a_log, "A_log"),
        (ours.d, "D"),
        (ours.dt_bias, "dt_bias"),
        (ours.norm.weight, "norm.weight"),
    ]:
        (a,) = torch.autograd.grad((y * weights).sum(), mine, retain_graph=True)
        (b,) = torch.autograd.grad((expected * weights).sum(), their.get_parameter(name), retain_graph=True)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_packed_documents_equal_separate_ones():
    mixer = build()
    x = torch.randn(2, 20, 24, dtype=torch.float64)
    ids = torch.tensor([[0] * 7 + [1] * 13, [0] * 1 + [1] * 9 + [2] * 10])
    packed = mixer(x, build_context(ids))
    for row, first, last in [(0, 0, 7), (0, 7, 20), (1, 0, 1), (1, 1, 10), (1, 10, 20)]:
        alone = mixer(x[row : row + 1, first:last], Context())
        torch.testing.assert_close(packed[row : row + 1, first:last], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("num_groups", [1, 2, 8])
def test_partial_sums_and_gradients_of_shards_add_up(tp, num_groups):
    """The sharding table and GatedRMSNorm.shards, set as their docstrings ask."""
    mixer = build(num_groups)
    parameters = {name: parameter.detach() for name, parameter in mixer.named_parameters()}
    x = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 9, 24, dtype=torch.float64)

    def shard(rank, group):
        local = build(num_groups)
        for name, value in parameters.items():
            set_parameter(local, name, value[window_of(mixer.sharding.get(name), value.shape, tp, rank)])
        if tp > num_groups:
            local.norm.shards = ThreadShards(group, rank, start=rank // (tp // num_groups))
        y = local(x, Context())
        return y.detach(), *torch.autograd.grad(
            (y * weights).sum(), [x, local.norm.weight, local.z_proj.weight]
        )

    y = mixer(x, Context())
    dx, dnorm, dz = torch.autograd.grad((y * weights).sum(), [x, mixer.norm.weight, mixer.z_proj.weight])
    ys, dxs, dnorms, dzs = zip(*on_ranks(tp, shard))
    torch.testing.assert_close(sum(ys), y.detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(sum(dxs), dx, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(torch.cat(dnorms), dnorm, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(torch.cat(dzs), dz, rtol=1e-10, atol=1e-11)


def test_decay_parameters_stay_in_fp32_and_go_to_float64():
    assert {p.dtype for p in build(dtype=torch.float64).parameters()} == {torch.float64}
    torch.set_default_dtype(torch.bfloat16)
    try:
        mixer = Mamba2(small_config(), 0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert mixer.x_proj.weight.dtype == torch.bfloat16
    assert {mixer.a_log.dtype, mixer.d.dtype, mixer.dt_bias.dtype} == {torch.float32}
