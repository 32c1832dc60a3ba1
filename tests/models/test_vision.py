"""The vision backbone: transformers' ViT with the same weights, packing, prefix tokens, stages, halves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from tests.models.tasks import initialised, staged_config, vision_config
from triptych import models
from triptych.models import VisionConfig
from triptych.models.patches import patchify
from triptych.models.vision import VisionModel
from triptych.tools.vision_batches import vision_batch

CLASSES = 5


def vit(**changes: Any) -> VisionConfig:
    """Two blocks of attention on images of 12 x 16 pixels, 3 x 4 tokens, one task."""
    values: dict[str, Any] = {
        "hidden_size": 16,
        "num_layers": 2,
        "attention": {"num_heads": 4, "bias": True, "rope_theta": None},
        "ffn": {"intermediate_size": 24},
        "input_size": [12, 16],
        "patch_size": 4,
        "init_std": 0.3,
        "tasks": {"digits": {"kind": "classify", "num_classes": CLASSES}},
    }
    return VisionConfig.model_validate({"family": "vision", **values, **changes})


def built(config: VisionConfig) -> VisionModel:
    model = initialised(models.build(config))
    assert isinstance(model, VisionModel)
    return model.eval()


def images(config: VisionConfig, count: int = 3, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, config.in_channels, *config.input_size, generator=draw, dtype=torch.float64)


# ---- the same as transformers'


def their_vit() -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        image_size=(12, 16),
        patch_size=4,
        num_channels=3,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-6,
        hidden_act="gelu_pytorch_tanh",
    )
    theirs = ViTForImageClassification(config).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * noise + (parameter.ndim == 1))
    return theirs


def ours_from(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their parameters under our names."""
    table = theirs["vit.embeddings.position_embeddings"][0]
    found = {
        "prefix.tokens": theirs["vit.embeddings.cls_token"][0] + table[:1],
        "patch_embedding.positions": table[1:],
        "patch_embedding.proj.weight": theirs["vit.embeddings.patch_embeddings.projection.weight"].flatten(1),
        "patch_embedding.proj.bias": theirs["vit.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": theirs["vit.layernorm.weight"],
        "norm.bias": theirs["vit.layernorm.bias"],
        "heads.digits.proj.weight": theirs["classifier.weight"],
        "heads.digits.proj.bias": theirs["classifier.bias"],
    }
    names = {
        "layernorm_before": "mixer_norm",
        "layernorm_after": "ffn_norm",
        "attention.q_proj": "mixer.q_proj",
        "attention.k_proj": "mixer.k_proj",
        "attention.v_proj": "mixer.v_proj",
        "attention.o_proj": "mixer.o_proj",
        "mlp.fc1": "ffn.up_proj",
        "mlp.fc2": "ffn.down_proj",
    }
    for layer in range(2):
        for their_name, our_name in names.items():
            for leaf in ("weight", "bias"):
                value = theirs[f"vit.layers.{layer}.{their_name}.{leaf}"]
                found[f"blocks.{layer}.{our_name}.{leaf}"] = value
    return found


def test_vit_equals_transformers_with_the_same_weights() -> None:
    config = vit(class_token=True)
    theirs, ours = their_vit(), models.build(config).double().eval()
    ours.load_state_dict(ours_from(dict(theirs.named_parameters())), strict=True)
    x = images(config)
    labels = torch.tensor([0, 3, 4])
    expected = theirs(pixel_values=x).logits
    (found,) = ours(x)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    torch.nn.functional.cross_entropy(expected, labels).backward()
    torch.nn.functional.cross_entropy(found, labels).backward()
    table = theirs.vit.embeddings.position_embeddings.grad
    assert table is not None
    gradients = ours_from({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    # The class token and its place add up to one vector, whose gradient is that of either.
    gradients["prefix.tokens"] = table[0, :1]
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, gradients[name], rtol=1e-10, atol=1e-12), name


# ---- prefix tokens and sizes


@pytest.mark.parametrize(("class_token", "registers"), [(False, 0), (True, 0), (False, 2), (True, 3)])
@pytest.mark.parametrize("position", ["learned", "sincos", "rope", "none"])
def test_prefix_tokens_stand_in_front_and_heads_read_the_right_ones(
    class_token: bool, registers: int, position: str
) -> None:
    """The class token where there is one, else the mean of the grid's tokens; never a register."""
    attention = {"num_heads": 4, "rope_theta": 100.0 if position == "rope" else None}
    config = vit(class_token=class_token, registers=registers, position=position, attention=attention)
    model, x = built(config), images(vit())
    seen: list[Tensor] = []
    assert model.norm is not None
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    (logits,) = model(x)
    (features,) = seen
    prefix = class_token + registers
    assert features.shape == (3, prefix + 12, 16)
    read = features[:, 0] if class_token else features[:, prefix:].mean(1)
    head = model.get_submodule("heads.digits.proj")
    assert torch.allclose(logits, head(read), rtol=1e-12, atol=1e-12)
    names = dict(model.named_parameters())
    assert ("prefix.tokens" in names) == (prefix > 0)
    assert not prefix or names["prefix.tokens"].shape == (prefix, 16)
    assert ("patch_embedding.positions" in names) == (position == "learned")


def test_without_positions_the_order_of_tokens_says_nothing() -> None:
    """And with each kind of them it does."""
    for position in ("none", "learned", "sincos", "rope"):
        attention = {"num_heads": 4, "rope_theta": 100.0 if position == "rope" else None}
        config = vit(position=position, class_token=True, attention=attention)
        model, x = built(config), images(vit())
        turned = x.unflatten(3, (4, 4)).roll(1, 3).flatten(3)
        same = torch.allclose(model(x)[0], model(turned)[0], rtol=1e-10)
        assert same == (position == "none"), position


def test_rotary_positions_are_relative() -> None:
    """An image says the same wherever it stands."""
    config = vit(position="rope", attention={"num_heads": 4, "rope_theta": 100.0})
    model = built(config)
    x = images(vit(), 2)
    packed = pack(config, [[x[0]], [x[1]]], 14)
    moved = {**packed, "positions": packed["positions"] + torch.tensor([5, 11])}
    assert torch.allclose(run(model, packed), run(model, moved), rtol=1e-10)


@pytest.mark.parametrize("position", ["rope", "learned", "sincos", "none"])
def test_other_sizes_are_for_rotary_positions(position: str) -> None:
    attention = {"num_heads": 4, "rope_theta": 100.0 if position == "rope" else None}
    model = built(vit(position=position, class_token=True, registers=1, attention=attention))
    larger = torch.randn(2, 3, 20, 8, dtype=torch.float64)
    if position != "rope":
        told = rf"\[20, 8\] for model.input_size=\[12, 16\] with model.position={position}; only .* rope"
        with pytest.raises(ValueError, match=told):
            model(larger)
        return
    assert model(larger)[0].shape == (2, CLASSES)
    with pytest.raises(ValueError, match=r"\[20, 10\] is not divisible by model.patch_size=4"):
        model(torch.randn(2, 3, 20, 10, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"has 1 channels, and model\.in_channels=3"):
        model(torch.randn(2, 1, 20, 8, dtype=torch.float64))


def test_a_task_embedding_is_added_to_every_token_of_its_rows() -> None:
    tasks = {name: {"kind": "classify", "num_classes": CLASSES} for name in ("one", "two")}
    model = built(vit(task_embedding=True, tasks=tasks))
    x = images(vit(), 1).expand(2, -1, -1, -1)
    assert model.task_embedding is not None
    first, second = model(x, tasks=torch.tensor([0, 1]))[0]
    assert not torch.allclose(first, second)
    with torch.no_grad():
        model.task_embedding.weight[1] = model.task_embedding.weight[0]
    again, other = model(x, tasks=torch.tensor([0, 1]))[0]
    assert torch.equal(again, other) and torch.allclose(again, first, rtol=1e-12)


# ---- packing


def pack(config: VisionConfig, rows: list[list[Tensor]], length: int, most: int = 3) -> dict[str, Tensor]:
    """Images (C, H, W) of each row as tokens one after the other, and padding."""
    batch = {
        "x": torch.zeros(len(rows), length, config.in_channels * 16, dtype=torch.float64),
        "positions": torch.zeros(len(rows), length, 2, dtype=torch.int64),
        "document_ids": torch.full((len(rows), length), most),
        "sizes": torch.zeros(len(rows), most, 2, dtype=torch.int64),
        "valid": torch.zeros(len(rows), most, dtype=torch.bool),
        "tasks": torch.zeros(len(rows), dtype=torch.int64),
    }
    for r, row in enumerate(rows):
        start = 0
        for n, image in enumerate(row):
            height, width = image.shape[1] // 4, image.shape[2] // 4
            place = slice(start, start + height * width)
            batch["x"][r, place] = patchify(image[None], 4)[0]
            batch["positions"][r, place] = torch.cartesian_prod(torch.arange(height), torch.arange(width))
            batch["document_ids"][r, place] = n
            batch["sizes"][r, n] = torch.tensor([height, width])
            batch["valid"][r, n] = True
            start += height * width
    return batch


def run(model: VisionModel, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"], **model.keywords(batch))[0]


@pytest.mark.parametrize("pattern", [["attention+gelu"], ["attention+moe", "attention_moe+gelu"]])
def test_packed_images_are_what_each_is_alone_at_its_own_size(pattern: list[str]) -> None:
    config = vit(
        position="rope",
        attention={"num_heads": 4, "rope_theta": 100.0},
        pattern=pattern,
        moe={"num_experts": 4, "top_k": 2, "expert": {"intermediate_size": 8}},
        attention_moe={"num_experts": 4, "top_k": 2, "head_dim": 4},
    )
    model = built(config)
    draw = torch.Generator().manual_seed(3)
    sizes = [[(12, 16), (4, 8)], [(8, 8), (20, 4), (4, 4)], [(16, 16)]]
    rows = [[torch.randn(3, *size, generator=draw, dtype=torch.float64) for size in row] for row in sizes]
    batch = pack(config, rows, length=18)
    packed = run(model, batch)
    assert packed.shape == (3, 3, CLASSES)
    for r, row in enumerate(rows):
        for n, image in enumerate(row):
            assert torch.allclose(packed[r, n], model(image[None])[0][0], rtol=1e-10, atol=1e-12), (r, n)
    # What cannot be read, and what padding holds, is no business of the others.
    batch["valid"][1, 1] = False
    batch["x"][1, batch["document_ids"][1] == 1] = 7.0
    batch["x"][batch["document_ids"] == 3] = 100.0
    torn = run(model, batch)
    kept = batch["valid"]
    assert torch.equal(torn.isfinite(), torch.ones_like(torn, dtype=torch.bool))
    assert torch.allclose(torn[kept], packed[kept], rtol=1e-10, atol=1e-12)


# ---- stages of the backbone, stages of a pipeline


def all_tasks_at_once(**changes: Any) -> VisionConfig:
    return staged_config(("digits", "shapes", "boxes"), **changes)


CUT: dict[str, VisionConfig] = {
    "plain": vit(num_layers=3, class_token=True, registers=1),
    "one stage, dense": vision_config(("digits", "shapes", "boxes"), num_layers=2),
    "stages": staged_config(("digits",)),
    "stages, dense": all_tasks_at_once(),
    "stages, dense, merge, deeper": all_tasks_at_once(
        downsample="merge",
        stages=[
            {"depth": 2, "hidden_size": 8, "attention": {"num_heads": 2}},
            {"depth": 2, "hidden_size": 16},
        ],
    ),
}


@pytest.mark.parametrize("name", CUT)
def test_halves_of_a_pipeline_are_the_whole(name: str) -> None:
    """At every cut, with the shapes that are told beforehand; outputs and gradients."""
    config = CUT[name]
    whole = built(config)
    shape = (config.in_channels, *config.input_size)
    draw = torch.Generator().manual_seed(0)
    batch = vision_batch(config, shape, 4, draw, torch.float64)
    keywords = whole.keywords(batch)
    outputs = whole(batch["x"], **keywords)
    weights = [torch.randn(each.shape, generator=draw, dtype=torch.float64) for each in outputs]
    gradients = torch.autograd.grad(
        sum((o * w).sum() for o, w in zip(outputs, weights)), list(whole.parameters()), allow_unused=True
    )
    expected = dict(zip((name for name, _ in whole.named_parameters()), gradients, strict=True))
    assert [list(each.shape) for each in outputs] == [
        list(shape) for shape in whole.between(config, batch, config.num_layers, 1)
    ]
    for cut in range(1, config.num_layers):
        front = models.build(config, range(cut), first=True, last=False).double().eval()
        back = models.build(config, range(cut, config.num_layers), first=False, last=True).double().eval()
        for half in (front, back):
            half.load_state_dict({key: whole.state_dict()[key] for key in half.state_dict()})
        assert set(front.state_dict()) | set(back.state_dict()) == set(whole.state_dict())
        assert not set(front.state_dict()) & set(back.state_dict())
        sent = front(batch["x"], **keywords)
        assert [tuple(each.shape) for each in sent] == list(whole.between(config, batch, cut, 1))
        received = back(*sent, **keywords)
        for got, wanted in zip(received, outputs, strict=True):
            assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-12)
        sum((o * w).sum() for o, w in zip(received, weights)).backward()
        for key, parameter in (*front.named_parameters(), *back.named_parameters()):
            wanted = expected[key]
            assert (parameter.grad is None) == (wanted is None), key
            assert wanted is None or torch.allclose(parameter.grad, wanted, rtol=1e-9, atol=1e-11), key


def test_stages_halve_the_grid() -> None:
    """Each block sees the tokens of its stage; the heads' maps are those of the finest."""
    model = built(all_tasks_at_once())
    seen = []
    for block in model.blocks.values():
        block.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    x = torch.randn(2, 1, 16, 32, dtype=torch.float64)
    _, masks, boxes = model(x, tasks=torch.tensor([0, 1]))
    assert seen == [(2, 128, 8), (2, 32, 16), (2, 8, 32)]
    assert masks.shape == (2, 4, 8, 16) and boxes.shape == (2, 128, 3 + 5)
