"""Heads against loops and formulas; the contrastive one over two real ranks against one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.models.tasks import features_of, heads_of, initialised, staged_config, texts, vision_config
from triptych.models.context import Context
from triptych.models.heads import Contrast, Heads, output_shapes
from triptych.models.heads.dense import FOREGROUND_PRIOR, Neck
from triptych.models.sharding import GlobalBatch
from triptych.models.vision_config import VisionConfig

Distributed = Callable[..., list[Any]]
TASKS_B = torch.tensor([0, 1, 2, 3, 3])


def outputs_of(config: VisionConfig, heads: Heads, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    features, earlier, grid = features_of(config, len(TASKS_B), dtype)
    context = Context(tasks=TASKS_B)
    return heads(features, *earlier, context=context, grid=grid, text=texts(len(TASKS_B)).to(dtype))


@pytest.mark.parametrize(
    "config",
    [
        vision_config(),
        vision_config(class_token=True, registers=2, task_weighting="uncertainty"),
        vision_config(patch_size=2, input_size=[6, 10]),
        vision_config(patch_size=(4, 8)),
        vision_config(("captions", "digits")),
        staged_config(),
        staged_config(patch_size=8, input_size=[32, 64], norm="rmsnorm"),
    ],
    ids=["tokens", "prefix", "patch2", "oblong", "pooled", "stages", "stages_of_patch8"],
)
def test_outputs_have_the_shapes_that_are_told_without_them(config: VisionConfig) -> None:
    outputs = outputs_of(config, heads_of(config))
    batch = {"x": torch.empty(len(TASKS_B), 1, *config.input_size, device="meta")}
    assert [tuple(output.shape) for output in outputs] == output_shapes(config, batch)
    assert all(bool(torch.isfinite(output).all()) and output.dtype == torch.float64 for output in outputs)
    names = [name for name, _ in heads_of(config).named_parameters() if not name.startswith("log_variance")]
    assert {name.split(".")[0] for name in names} == set(config.tasks)


def test_packed_rows_have_a_class_per_image() -> None:
    """The mean over an image's tokens, whatever stands in the padding."""
    config = vision_config(("digits",))
    heads = heads_of(config)
    x = torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 3, 3], [0, 1, 2, 2, 2, 2, 2, 2, 3]])
    x[ids == 3] = 1e30
    valid = torch.tensor([[True, True, False], [True, True, True]])
    context = Context(images=ids.clamp(max=2), padding=ids == 3)
    (logits,) = heads(x, context=context, grid=None, valid=valid)
    batch = {"x": x, "document_ids": ids, "sizes": torch.zeros(2, 3, 2)}
    assert [tuple(logits.shape)] == output_shapes(config, batch)
    for row in range(2):
        for image in range(3):
            mine = x[row][ids[row] == image]
            mean = mine.mean(dim=0) if len(mine) else torch.zeros(16, dtype=torch.float64)
            torch.testing.assert_close(logits[row, image], heads.get_submodule("digits").proj(mean))  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("task", ["shapes", "boxes", "captions"])
def test_other_tasks_refuse_packed_rows(task: str) -> None:
    heads = heads_of(vision_config((task,)))
    ids = torch.zeros(1, 4, dtype=torch.int64)
    context = Context(images=ids, padding=ids > 0)
    with pytest.raises(ValueError, match=rf"model\.tasks\.{task}\.kind=.*only classify"):
        heads(torch.zeros(1, 4, 16).double(), context=context, grid=None, valid=ids[:, :1] == 0)


def test_classes_are_read_from_the_class_token_or_the_mean() -> None:
    for prefix in ({"class_token": True, "registers": 1}, {"registers": 2}, {}):
        config = vision_config(("digits",), **prefix)
        heads = heads_of(config)
        features, _, grid = features_of(config, 3)
        (logits,) = heads(features, context=Context(), grid=grid)
        seen = features[:, 0] if config.class_token else features[:, config.num_prefix_tokens :].mean(dim=1)
        torch.testing.assert_close(logits, heads.get_submodule("digits").proj(seen))  # type: ignore[operator, union-attr]


def test_a_token_fills_the_cells_of_its_patch() -> None:
    """Patches of 8 x 12 in cells of 4: token (i, j) gives the 2 x 3 cells from (2 i, 3 j) on."""
    config = vision_config(("shapes",), patch_size=(8, 12), input_size=[16, 36], registers=1)
    neck = initialised(Neck(config, config.tasks["shapes"], size=3))
    features, _, grid = features_of(config, 2)
    x = neck(features, (), grid)
    assert x.shape == (2, 4, 9, 3)
    values = neck.laterals[0](features[:, 1:]).view(2, 2, 3, 2, 3, 3)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(x[:, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3], values[:, i, j])


def test_stages_are_added_at_the_finest_grid() -> None:
    config = staged_config(("shapes",))
    neck = initialised(Neck(config, next(iter(config.tasks.values())), size=5))
    features, earlier, grid = features_of(config, 2)
    expected = torch.zeros(2, 5, 8, 16, dtype=torch.float64)
    for number, tokens in enumerate([*earlier, features]):
        normed = neck.norms[number](tokens) if number < 2 else tokens
        image = neck.laterals[number](normed).transpose(1, 2).unflatten(2, config.grid_of(number))
        expected += F.interpolate(image, size=(8, 16), mode="nearest")
    torch.testing.assert_close(neck(features, tuple(earlier), grid), expected.permute(0, 2, 3, 1))


def test_maps_move_with_the_tokens() -> None:
    """The prediction of a cell depends on the neighbourhood of its token alone, not on where that is."""
    config = vision_config(("shapes", "boxes"), input_size=[8, 48], patch_size=4)
    heads = heads_of(config)
    image = torch.zeros(1, 2, 12, 16, dtype=torch.float64)
    image[:, :, 3] = torch.randn(1, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = image.roll(4, dims=2)
    classes, boxes = heads(image.flatten(1, 2), context=Context(), grid=(2, 12))
    classes_moved, boxes_moved = heads(moved.flatten(1, 2), context=Context(), grid=(2, 12))
    # Two convolutions look two cells around, and beyond the edge is something else.
    torch.testing.assert_close(classes_moved[..., 6:10], classes[..., 2:6])
    boxes, boxes_moved = boxes.unflatten(1, (2, 12)), boxes_moved.unflatten(1, (2, 12))
    torch.testing.assert_close(boxes_moved[:, :, 6:10], boxes[:, :, 2:6])
    assert not torch.allclose(classes[..., 3], classes[..., 8])


def test_every_class_is_rare_at_first_and_boxes_have_sides() -> None:
    config = vision_config(("boxes",))
    (output,) = outputs_of(config, heads_of(config, moved=0.0))
    # Weights are small, not zero, so that gradients reach the backbone from the first step on.
    probability = output[..., :3].sigmoid()
    assert 0.9 * FOREGROUND_PRIOR < probability.min() < probability.max() < 1.1 * FOREGROUND_PRIOR
    assert output[..., 3:7].min() > 0.5 and output[..., 3:7].max() < 1.0
    (moved,) = outputs_of(config, heads_of(config, moved=3.0))
    assert moved[..., 3:7].min() >= 0 and moved[..., :3].min() < 0


@pytest.mark.parametrize(
    "config",
    [vision_config(registers=1), staged_config(patch_size=8, input_size=[32, 64])],
    ids=["tokens", "stages"],
)
def test_flops_equal_those_counted(config: VisionConfig) -> None:
    heads = heads_of(config)
    features, earlier, grid = features_of(config, 1)
    with FlopCounterMode(display=False) as counter:
        heads(features, *earlier, context=Context(), grid=grid, text=texts(1).double())
    length = (earlier[0] if earlier else features).shape[1]
    # The comparison of one image with one text, both ways: 6 channels.
    assert heads.flops(length) + 2 * 2 * 6 == counter.get_total_flops()


def test_every_parameter_has_a_gradient_and_the_variance_is_no_view() -> None:
    config = vision_config(task_weighting="uncertainty")
    heads = heads_of(config)
    outputs = outputs_of(config, heads)
    assert outputs[-1].data_ptr() != heads.log_variance.data_ptr()  # type: ignore[union-attr]
    sum(output.sum() for output in outputs).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is not None for parameter in heads.parameters())


def test_autocast_keeps_outputs_and_comparison_in_fp32() -> None:
    config = vision_config()
    heads = heads_of(config, torch.float32)
    expected = outputs_of(config, heads, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = outputs_of(config, heads, torch.float32)
    for name, output, exact in zip(config.tasks, outputs, expected, strict=True):
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, exact, rtol=0.1, atol=0.1)
        assert (name == "captions") == torch.equal(output, exact)


def test_what_a_head_cannot_be_made_of_is_named() -> None:
    named = {
        "input_size": 8,
        "patch_size": 4,
        "hidden_size": 8,
        "num_layers": 1,
        "attention": {"num_heads": 2},
    }
    with pytest.raises(ValueError, match=r"model\.tasks\.forward: a task cannot have this name"):
        Heads(
            VisionConfig.model_validate(
                {**named, "tasks": {"forward": {"kind": "classify", "num_classes": 2}}}
            )
        )
    with pytest.raises(ValueError, match=r"model\.tasks\.boxes\.kind=detect needs images of two axes"):
        Heads(vision_config(("digits", "boxes"), input_size=[8, 8, 8]))
    with pytest.raises(
        ValueError, match=r"map of 4 pixels per cell, which does not divide patches of \[6, 6\]"
    ):
        task = {"shapes": {"kind": "segment", "num_classes": 2, "stride": 4}}
        Heads(VisionConfig.model_validate({**named, "input_size": 12, "patch_size": 6, "tasks": task}))
    with pytest.raises(ValueError, match=r"model\.tasks\.captions\.kind=contrast needs text"):
        config = vision_config(("captions",))
        features, _, grid = features_of(config, 2)
        heads_of(config)(features, context=Context(), grid=grid)


# --- contrast ---


def contrast_module() -> Contrast:
    config = vision_config(("captions",))
    module: Contrast = initialised(Contrast(config, config.tasks["captions"]))
    return module


def pooled(rows: int) -> Tensor:
    return torch.randn(rows, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def plain_losses(module: Contrast, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and hits of samples that all take part, one at a time."""
    ours, theirs = module.image(images), module.text(text.mean(dim=1))
    cosines = torch.stack([F.cosine_similarity(image.unsqueeze(0), theirs) for image in ours])
    logits = cosines * module.log_scale.exp()
    losses, hits = [], []
    for number in range(len(images)):
        of_texts = logits[number].exp() / logits[number].exp().sum()
        of_images = logits[:, number].exp() / logits[:, number].exp().sum()
        losses.append(-(of_texts[number].log() + of_images[number].log()) / 2)
        hits.append(float(of_texts.argmax() == number))
    return torch.stack(losses), torch.tensor(hits, dtype=torch.float64)


def test_contrast_is_two_softmaxes_over_those_who_take_part() -> None:
    module, images, text = contrast_module(), pooled(6), texts(6).double()
    members = torch.tensor([True, False, True, True, False, True])
    output = module(images, text, members)
    losses, hits = plain_losses(module, images[members], text[members])
    torch.testing.assert_close(output[members], torch.stack([losses, hits], dim=1), rtol=1e-12, atol=0)
    assert not output[~members].any()


def test_who_takes_no_part_has_no_gradient() -> None:
    module, images, text = contrast_module(), pooled(4).requires_grad_(), texts(4).double()
    members = torch.tensor([True, False, True, True])
    module(images, text, members).sum().backward()
    assert not images.grad[1].any() and images.grad[members].any(dim=1).all()
    # Nobody at all: zeros, not None.
    module.zero_grad()
    nobody = module(images, torch.zeros(4, 3, 5).double(), torch.zeros(4, dtype=torch.bool))
    nobody[:, 0].sum().backward()
    assert not nobody.any()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_text_padding_counts_nothing_and_the_scale_is_bounded() -> None:
    module, images, text = contrast_module(), pooled(3), texts(3).double()
    everyone = torch.ones(3, dtype=torch.bool)
    padded = torch.cat([text, torch.zeros(3, 4, 5).double()], dim=1)
    torch.testing.assert_close(module(images, padded, everyone), module(images, text, everyone))
    with torch.no_grad():
        module.log_scale.fill_(9.0)
    bounded = module(images, text, everyone)
    with torch.no_grad():
        module.log_scale.fill_(math.log(100.0))
    torch.testing.assert_close(module(images, text, everyone), bounded)


class RankBatch(GlobalBatch):
    """The verbs over all ranks of the default group."""

    def __init__(self) -> None:
        self.count, self.rank = dist.get_world_size(), dist.get_rank()

    def sum(self, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    def gather(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.count)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)


def contrast_of_a_rank(members: Tensor) -> dict[str, Any]:
    """Losses of this rank's samples, and the gradients of their weighted sum, as each rank has them."""
    module = contrast_module()
    size = len(members)
    share, rank = (size, 0)
    if dist.is_initialized():
        module.batch = RankBatch()
        share, rank = size // dist.get_world_size(), dist.get_rank()
    mine = slice(rank * share, (rank + 1) * share)
    images = pooled(size)[mine].clone().requires_grad_()
    text = texts(size).double()[mine].clone().requires_grad_()
    output = module(images, text, members[mine])
    weights = torch.arange(1.0, size + 1, dtype=torch.float64)[mine]
    (output[:, 0] * weights).sum().backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"output": output.detach(), "images": images.grad, "text": text.grad, "parameters": grads}


@pytest.mark.parametrize("members", [[1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 0, 1], [0, 0, 0, 1, 0, 1]])
def test_contrast_over_two_ranks_equals_one_process(distributed: Distributed, members: list[int]) -> None:
    members_B = torch.tensor(members, dtype=torch.bool)
    whole = contrast_of_a_rank(members_B)
    parts = distributed(2, contrast_of_a_rank, members_B)
    for name in ("output", "images", "text"):
        joined = torch.cat([part[name] for part in parts])
        torch.testing.assert_close(joined, whole[name], rtol=1e-11, atol=1e-13)
    # A rank's gradients of its own loss, and of the others' through what they gathered from it, add up.
    for name, grad in whole["parameters"].items():
        total = sum(part["parameters"][name] for part in parts)
        torch.testing.assert_close(total, grad, rtol=1e-11, atol=1e-13)
