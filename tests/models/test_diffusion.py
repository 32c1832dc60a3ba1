"""Denoisers: DiT against an independent writing of it, packed rows against each image alone, long skips,
sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.denoisers import (
    build_denoiser,
    denoiser_config,
    image_batch,
    largest_difference,
    packed_batch,
)
from tests.models.plain_dit import PlainDiT, translated
from triptych import models
from triptych.models.diffusion import DiffusionModel, names_between
from triptych.models.patches import patchify, unpatchify

TOLERANCE = 1e-12


def run(model: DiffusionModel, batch: dict[str, Any], **options: Any) -> torch.Tensor:
    keywords = {name: value for name, value in (batch | options).items() if name != "x"}
    return model(batch["x"], **keywords)


def test_dit_is_the_papers() -> None:
    """Forward and every gradient, against plain PyTorch with the same weights."""
    config = denoiser_config(out_channels=6, ffn={"kind": "gelu", "bias": True, "intermediate_size": 40})
    model = build_denoiser(config)
    plain = PlainDiT((8, 4), 2, (3, 6), 24, 2, 3, 40, 5).double()
    plain.take(dict(model.named_parameters()))
    batch = image_batch(config, rows=3)
    ours, theirs = run(model, batch), plain(batch["x"], batch["times"], batch["labels"])
    assert ours.shape == (3, 6, 8, 4)
    assert largest_difference(ours, theirs) < TOLERANCE
    weights = torch.randn(ours.shape, dtype=torch.float64)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in plain.named_parameters():
        found = translated(name, gradients, 2).reshape(parameter.shape)
        assert largest_difference(found, parameter.grad) < TOLERANCE, name


def test_as_initialised_the_output_is_exactly_zero() -> None:
    """The head is zero, and so are all gates: the blocks leave the tokens as they are."""
    config = denoiser_config()
    model = build_denoiser(config, disturb=0.0)
    batch = image_batch(config)
    assert torch.count_nonzero(run(model, batch)) == 0
    with torch.no_grad():
        model.head.proj.weight.normal_(generator=torch.Generator().manual_seed(0))
    one_less = build_denoiser(denoiser_config(num_layers=1), disturb=0.0)
    one_less.load_state_dict({name: model.state_dict()[name] for name in one_less.state_dict()})
    assert torch.equal(run(model, batch), run(one_less, batch)), "a block is the identity"
    assert torch.count_nonzero(run(model, batch)) > 0


def test_a_zero_denoiser_gets_gradients_where_it_should() -> None:
    """The first step moves the head; the second, the rest."""
    config = denoiser_config()
    model = build_denoiser(config, disturb=0.0)
    run(model, image_batch(config)).sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"head.proj.weight", "head.proj.bias"}


@pytest.mark.parametrize(
    "pattern",
    [["attention"], ["mamba2"], ["mamba1"], ["mlstm"], ["wkv+channel_mix"], ["mamba2", "attention+swiglu"]],
)
def test_packed_rows_are_each_image_alone(pattern: list[str]) -> None:
    """FiT's packing: attention within an image, each with its own time and label; padding changes nothing."""
    registered(*pattern)
    config = denoiser_config(
        position="rope",
        attention={"num_heads": 2, "qk_norm": True},
        mamba2={"state_size": 4, "head_dim": 6, "chunk_size": 8},
        pattern=pattern,
        ffn={"kind": "gelu"},
        scan={"orders": ["zigzag:3", "column"], "merge": "sum"},
    )
    model = build_denoiser(config)
    batch = packed_batch(config, [[(3, 2), (1, 4)], [(2, 5)]], length=12, places=3)
    found = run(model, batch)
    assert found.shape == (2, 12, 12)
    for row, image, start, grid in ((0, 0, 0, (3, 2)), (0, 1, 6, (1, 4)), (1, 0, 0, (2, 5))):
        tokens = batch["x"][row : row + 1, start : start + grid[0] * grid[1]]
        one = model(
            unpatchify(tokens, grid, 2),
            times=batch["times"][row, image : image + 1],
            labels=batch["labels"][row, image : image + 1],
        )
        mine = found[row : row + 1, start : start + grid[0] * grid[1]]
        assert largest_difference(mine, patchify(one, 2)) < TOLERANCE, (row, image)
    again = {**batch, "x": batch["x"].clone()}
    again["x"][0, 10:], again["x"][1, 10:] = 1e3, -7.0
    changed = run(model, again)
    assert torch.equal(changed[:, :10], found[:, :10])


@pytest.mark.parametrize("kind", ["ntk", "yarn"])
def test_positions_are_scaled_for_more_tokens_than_were_trained_alone(kind: str) -> None:
    """An image of another aspect and no more tokens is what packed rows have it to be in training."""
    scaled = denoiser_config(
        position="rope", attention={"num_heads": 2}, rope_scaling={"kind": kind, "trained": [4, 4]}
    )
    config = scaled.model_copy(update={"rope_scaling": denoiser_config().rope_scaling})
    model, plain = build_denoiser(scaled), build_denoiser(config)
    batch = packed_batch(scaled, [[(2, 8)]], length=16, places=1)
    alone = model(unpatchify(batch["x"], (2, 8), 2), times=batch["times"][:, 0], labels=batch["labels"][:, 0])
    assert largest_difference(run(model, batch), patchify(alone, 2)) < TOLERANCE
    for space, same in (((4, 16), True), ((8, 8), True), ((6, 16), False), ((16, 8), False)):
        found = [run(each, image_batch(scaled, space=space)) for each in (model, plain)]
        assert torch.equal(*found) == same, space


def test_more_padding_and_more_places_change_nothing() -> None:
    config = denoiser_config(position="rope", attention={"num_heads": 2})
    model = build_denoiser(config)
    batch = packed_batch(config, [[(3, 2), (1, 4)]], length=10, places=2)
    roomy = packed_batch(config, [[(3, 2), (1, 4)]], length=17, places=5)
    roomy["x"][:, :10] = batch["x"]
    roomy["times"][:, :2], roomy["labels"][:, :2] = batch["times"], batch["labels"]
    assert largest_difference(run(model, roomy)[:, :10], run(model, batch)) < TOLERANCE


def test_packed_rows_with_a_table_of_sines() -> None:
    """Positions of packed tokens are those in their own image."""
    config = denoiser_config(position="sincos", pattern=["attention"])
    model = build_denoiser(config)
    batch = packed_batch(config, [[(4, 2)]], length=8, places=1)
    alone = model(unpatchify(batch["x"], (4, 2), 2), times=batch["times"][:, 0], labels=batch["labels"][:, 0])
    assert largest_difference(run(model, batch), patchify(alone, 2)) < TOLERANCE


def test_long_skips_join_the_halves() -> None:
    """Block i of 5 feeds block 4 - i through proj([x, skip]); the middle one has none."""
    config = denoiser_config(num_layers=5, long_skips=True)
    model = build_denoiser(config)
    assert [config.skips_from(layer) for layer in range(5)] == [None, None, None, 1, 0]
    assert [name for name, p in model.named_parameters() if "skip" in name and p.ndim == 2] == [
        "blocks.3.skip.proj.weight",
        "blocks.4.skip.proj.weight",
    ]
    seen: dict[int, torch.Tensor] = {}
    inputs: dict[int, torch.Tensor] = {}
    for block in model.blocks.values():
        block.register_forward_hook(lambda block, args, y: seen.update({block.layer: y}))
        if block.skip is not None:
            parts = (block.skip.proj.weight, block.skip.proj.bias)
            block.skip.register_forward_hook(
                lambda skip, args, y, layer=block.layer, parts=parts: inputs.update({layer: (y, *parts)})
            )
    run(model, image_batch(config))
    for layer, source in ((3, 1), (4, 0)):
        found, weight, bias = inputs[layer]
        left, right = weight.chunk(2, dim=1)
        expected = seen[layer - 1] @ left.T + seen[source] @ right.T + bias
        assert largest_difference(found, expected) < TOLERANCE


@pytest.mark.parametrize("layers", [4, 5])
def test_what_goes_between_stages(layers: int) -> None:
    """Skips that are open at a cut are carried over it, and no others."""
    config = denoiser_config(num_layers=layers, long_skips=True, modulation={"kind": "lora", "rank": 4})
    for cut in range(1, layers):
        expected = [str(i) for i in range(cut) if i < layers - 1 - i and layers - 1 - i >= cut]
        assert names_between(config, cut, False) == ["x", "conditioning", "shared", *expected]
        assert "aside" in names_between(config, cut, True)


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_layers": 5, "long_skips": True, "local_convs": True},
        {"position": "rope", "attention": {"num_heads": 2}, "modulation": {"kind": "lora", "rank": 4}},
        {
            "pattern": ["attention+none", "cross_attention+gelu"],
            "num_layers": 4,
            "conditioning": {"kind": "text", "text_size": 7, "text_length": 3},
        },
        {"position": "learned", "conditioning": {"kind": "none"}, "residual_scale": "learned"},
    ],
)
@pytest.mark.parametrize("tread", [None, (1, 2), (0, 2)])
def test_stages_make_up_the_whole(overrides: dict[str, Any], tread: tuple[int, int] | None) -> None:
    """Cut anywhere, with the shapes that `between` foretells and the values of the whole."""
    config = denoiser_config(**overrides)
    whole = build_denoiser(config)
    batch = image_batch(config)
    if tread is not None:
        batch |= {"kept": torch.tensor([[0, 1, 3, 6], [1, 2, 5, 7]]), "routed": tread}
    keywords = DiffusionModel.keywords(batch)
    expected = whole(batch["x"], **keywords)
    for cut in range(1, config.num_layers):
        first = models.build(config, range(cut), last=False).double()
        last = models.build(config, range(cut, config.num_layers), first=False).double()
        for stage in (first, last):
            stage.load_state_dict({name: whole.state_dict()[name] for name in stage.state_dict()})
            stage.eval()
        carried = first(batch["x"], **keywords)
        assert [tuple(t.shape) for t in carried] == DiffusionModel.between(config, batch, cut, 1)
        assert torch.equal(last(*carried, **keywords), expected), cut
    assert DiffusionModel.between(config, batch, config.num_layers, 1) == [tuple(expected.shape)]


def test_local_convolutions_see_the_grid() -> None:
    """x + conv(x), first and last, against torch.conv2d of each channel on its own."""
    config = denoiser_config(local_convs=True, num_layers=1)
    model = build_denoiser(config)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for conv in (model.first_conv, model.last_conv):
        conv.register_forward_hook(lambda conv, args, y: seen.append((args[0], y)))
    run(model, image_batch(config))
    assert len(seen) == 2
    for (x, y), conv in zip(seen, (model.first_conv, model.last_conv)):
        for channel in (0, 23):
            image = x[..., channel].reshape(2, 1, 4, 2)
            kernel = conv.weight[channel].reshape(1, 1, 3, 3)
            expected = image + torch.conv2d(image, kernel, conv.bias[channel : channel + 1], padding=1)
            assert largest_difference(y[..., channel].reshape(2, 1, 4, 2), expected) < TOLERANCE


def test_a_shared_block_stands_behind_every_second() -> None:
    config = denoiser_config(num_layers=5, shared_block_every=2)
    model = build_denoiser(config)
    order: list[Any] = []
    for block in (*model.blocks.values(), model.shared_block):
        block.register_forward_hook(lambda block, args, y: order.append(block.layer))
    run(model, image_batch(config))
    assert order == [0, 1, 5, 2, 3, 5, 4]
    assert model.uses("shared_block") == 2 and model.uses("head") == 1
    with pytest.raises(
        ValueError, match=r"shared_block_every=2 needs all its places in one stage.*parallel\.pp=1"
    ):
        models.build(config, range(2), last=False)


@pytest.mark.parametrize(("space", "grid"), [((12,), (6,)), ((8, 4), (4, 2)), ((4, 4, 6), (2, 2, 3))])
@pytest.mark.parametrize("position", ["sincos", "rope", "learned", "none"])
def test_signals_of_one_to_three_dimensions(
    space: tuple[int, ...], grid: tuple[int, ...], position: str
) -> None:
    config = denoiser_config(
        input_size=list(space), position=position, attention={"num_heads": 2}, in_channels=1, num_layers=1
    )
    assert config.grid == grid
    model = build_denoiser(config)
    batch = image_batch(config)
    assert run(model, batch).shape == (2, 1, *space)
    # Moving the content along each axis is seen unless nothing tells places apart.
    alike = run(model, {**batch, "x": torch.roll(batch["x"], 2, dims=-1)})
    back = torch.roll(alike, -2, dims=-1)
    assert (largest_difference(back, run(model, batch)) < TOLERANCE) == (position == "none")


def test_dropped_labels_and_no_conditioning() -> None:
    """The last row of the table is "no label"; without conditioning there is no table."""
    config = denoiser_config()
    model = build_denoiser(config)
    batch = image_batch(config)
    assert model.label_embedding.weight.shape == (6, 24)
    with torch.no_grad():
        model.label_embedding.weight[5] = 0
    told = run(model, {**batch, "labels": torch.tensor([5, 5])})
    plain = build_denoiser(denoiser_config(conditioning={"kind": "none"}))
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    batch.pop("labels")
    assert torch.equal(told, run(plain, batch))


def test_cross_attention_reads_the_projected_text() -> None:
    """Independently: softmax(q k^T) v over the text, added through its gate."""
    config = denoiser_config(
        pattern=["cross_attention+none"],
        num_layers=1,
        conditioning={"kind": "text", "text_size": 7, "text_length": 3},
    )
    model = build_denoiser(config)
    batch = image_batch(config)
    seen: dict[str, Any] = {}
    mixer = model.blocks["0"].mixer
    mixer.register_forward_hook(lambda mixer, args, y: seen.update(x=args[0], y=y))
    run(model, batch)
    memory = batch["text"] @ model.text_projection.proj.weight.T + model.text_projection.proj.bias
    q = (seen["x"] @ mixer.q_proj.weight.T + mixer.q_proj.bias).unflatten(-1, (3, 8))
    k = (memory @ mixer.k_proj.weight.T + mixer.k_proj.bias).unflatten(-1, (3, 8))
    v = (memory @ mixer.v_proj.weight.T + mixer.v_proj.bias).unflatten(-1, (3, 8))
    scores = torch.einsum("bthd,blhd->bhtl", q, k) / 8**0.5
    y = torch.einsum("bhtl,blhd->bthd", scores.softmax(-1), v).flatten(2)
    assert largest_difference(seen["y"], y @ mixer.o_proj.weight.T + mixer.o_proj.bias) < TOLERANCE


def test_rope_serves_other_sizes_and_others_refuse_them() -> None:
    config = denoiser_config(position="rope", attention={"num_heads": 2})
    assert run(build_denoiser(config), image_batch(config, space=(6, 10))).shape == (2, 3, 6, 10)
    for position in ("sincos", "learned", "none"):
        fixed = denoiser_config(position=position)
        words = rf"size \[6, 10\] for model.input_size=\[8, 4\] with model.position={position}"
        with pytest.raises(ValueError, match=words):
            run(build_denoiser(fixed), image_batch(fixed, space=(6, 10)))


@pytest.mark.parametrize(
    ("overrides", "change", "words"),
    [
        ({}, {"x": torch.zeros(2, 4, 8, 4)}, r"\(2, 4, 8, 4\) has 4 channels, .*in_channels=3 wants 3"),
        ({"position": "rope", "attention": {"num_heads": 2}}, {"x": torch.zeros(2, 3, 8, 5)},
         r"size \[8, 5\] is not divisible by model.patch_size=2; resize or crop"),
        ({}, {"labels": None}, "model.conditioning.kind=class needs labels, and the batch has none"),
        ({"conditioning": {"kind": "text"}, "pattern": ["cross_attention"]}, {"text": None},
         "needs embedded text"),
    ],
)  # fmt: skip
def test_batches_that_do_not_fit_are_refused(
    overrides: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    config = denoiser_config(**overrides)
    batch = image_batch(config) | change
    with pytest.raises(ValueError, match=words):
        run(build_denoiser(config), batch)


def test_packed_rows_that_do_not_fit_are_refused() -> None:
    config = denoiser_config(position="rope", attention={"num_heads": 2})
    model = build_denoiser(config)
    batch = packed_batch(config, [[(2, 2)]], length=4, places=1)
    with pytest.raises(ValueError, match=r"has 13 channels, and model.in_channels=3 wants 12"):
        run(model, {**batch, "x": torch.zeros(1, 4, 13, dtype=torch.float64)})
    convs = build_denoiser(denoiser_config(position="rope", attention={"num_heads": 2}, local_convs=True))
    with pytest.raises(ValueError, match=r"model.local_convs=true needs whole images"):
        run(convs, batch)
    learned = build_denoiser(denoiser_config(position="learned"))
    with pytest.raises(ValueError, match=r"model.position=learned knows 8 places"):
        run(learned, batch)


def test_names_are_those_of_the_whole_model_in_every_stage() -> None:
    config = denoiser_config(num_layers=4, local_convs=True, modulation={"kind": "lora", "rank": 4})
    whole = {name for name, _ in models.build(config).named_parameters()}
    first = {name for name, _ in models.build(config, range(2), last=False).named_parameters()}
    last = {name for name, _ in models.build(config, range(2, 4), first=False).named_parameters()}
    assert first | last == whole and not first & last
    assert "shared_modulation.proj.weight" in first and "head.proj.weight" in last


def registered(*items: str) -> None:
    """Skip where a mixer or feed-forward of the pattern is not there."""
    for item in items:
        mixer, _, ffn = item.partition("+")
        if mixer not in models.registry.MIXERS or (ffn and ffn not in models.registry.FEEDFORWARDS):
            pytest.skip(f"{item} is not built")
