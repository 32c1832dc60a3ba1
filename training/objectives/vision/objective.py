"""Several tasks at once: each image has the labels of one of them.

Shape legend: B samples (or rows of packed images), G images of a row, M boxes of an image, N cells of the
map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from triptych.kernels import statistics_dtype
from triptych.models.context import has_values
from triptych.models.vision_config import VisionConfig
from triptych.training.objectives.config import VisionTaskConfig
from triptych.training.objectives.protocol import Batch
from triptych.training.objectives.vision.boxes import assign, centers, crop
from triptych.training.objectives.vision.losses import LOSSES, Targets
from triptych.training.objectives.vision.meters import VisionMeter

NEEDED = {
    "classify": ("labels",),
    "segment": ("masks",),
    "detect": ("boxes", "box_labels"),
    "contrast": ("text",),
}
"""What a batch must hold for each kind of task."""
LABELS = ("labels", "labels_other", "share", "masks", "boxes", "box_labels")
"""What the model is not shown."""
CLASSES = {"labels": "classify", "labels_other": "classify", "masks": "segment", "box_labels": "detect"}
"""Which of them are numbers of classes, and of which kind of task."""
# Keys of train.tasks that one kind of task has.
_KEYS = {"loss": "classify", "label_smoothing": "classify", "dice": "segment"}


class VisionObjective:
    """The sum over tasks of weight times the mean loss of the task over its terms in the global batch.

    Terms: labelled images (classify), labelled pixels (segment), cells that have a box (detect; at least 1),
    images (contrast). With model.task_weighting=uncertainty a task counts as exp(-s) loss + s, s learned
    (Kendall et al., arXiv 1705.07115, for losses that are means; their 1/2 is in s). A task without a term
    counts nothing.
    """

    def __init__(self, model: VisionConfig, tasks: Mapping[str, VisionTaskConfig]) -> None:
        """Raises ValueError where train.tasks does not fit the model's."""
        check(model, tasks)
        self.model = model
        self.tasks = {name: tasks.get(name, VisionTaskConfig()) for name in model.tasks}
        self.losses = {name: LOSSES[task.kind](task, self.tasks[name]) for name, task in model.tasks.items()}
        self.metric_names: tuple[str, ...] = tuple(f"{name}/loss" for name in model.tasks)

    def prepare(self, batch: Batch, step: int, training: bool = True) -> tuple[Batch, Targets]:
        """What the model sees, and what it should say.

        batch: x (B, C, *space), tasks, sample_keys and valid (B,), and for the kinds of tasks that the model
            has labels, labels_other and share (B,), masks (B, H, W), boxes (B, M, 4) and box_labels (B, M),
            text (B, L, E); or packed patches x (B, T, P) with positions, document_ids, sizes, and image_keys,
            valid and labels (B, G).
        Raises ValueError for what is missing, and for tasks and classes out of range.
        """
        self._check(batch)
        packed = "document_ids" in batch
        x, valid = batch["x"], batch["valid"]
        tasks = batch.get("tasks")
        if tasks is None:
            tasks = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        keys = batch["image_keys"] if packed else batch["sample_keys"]
        targets: Targets = {"tasks": tasks, "valid": valid, "sample_keys": keys}
        targets |= {name: batch[name] for name in LABELS if name in batch}
        inputs = {name: value for name, value in batch.items() if name not in (*LABELS, "image_keys")}
        inputs["tasks"] = tasks
        if not packed:
            # What could not be read may hold anything.
            inputs["x"] = x.masked_fill(~valid.view(-1, *(1,) * (x.ndim - 1)), 0.0)
        if "text" in batch:
            inputs["text"] = batch["text"].masked_fill(~valid.view(-1, 1, 1), 0.0)
        if any(task.kind == "detect" for task in self.model.tasks.values()):
            targets |= self._cells(batch)
        return inputs, targets

    def count(self, targets: Targets) -> Tensor:
        """Terms of each task, int64 (tasks,)."""
        counts = [
            self.losses[name].count(targets, members(targets, number))
            for number, name in enumerate(self.model.tasks)
        ]
        return torch.stack(counts)

    def metric_counts(self, targets: Targets) -> dict[str, Tensor]:
        """What each metric's sum over the global batch is divided by, at least 1."""
        return dict(zip(self.metric_names, self.count(targets), strict=True))

    def loss(self, outputs: Sequence[Tensor], targets: Targets) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Weighted sums (tasks,) in float32 at least, counts (tasks,), and metrics: each task's plain sum."""
        counts = self.count(targets)
        sums, metrics = [], {}
        for number, (name, config) in enumerate(self.tasks.items()):
            total = self.losses[name].sum(outputs[number], targets, members(targets, number))
            metrics[f"{name}/loss"] = total.detach()
            if self.model.task_weighting == "uncertainty":
                s = outputs[-1][number].to(total.dtype)
                total = torch.exp(-s) * total + s * counts[number]
            sums.append(config.weight * total)
        return torch.stack(sums), counts, metrics

    def meter(self) -> VisionMeter:
        """A new meter of accuracy, for a validation."""
        return VisionMeter(self.model)

    def _cells(self, batch: Batch) -> Targets:
        """Boxes within the image, and which of them each cell of the map is to find."""
        x, stride = batch["x"], self.model.dense_stride
        height, width = x.shape[2:]
        boxes, labels = crop(batch["boxes"].to(statistics_dtype(x)), batch["box_labels"], height, width)
        grid = (height // stride, width // stride)
        cell_labels, cell_sides = assign(boxes, labels, grid, stride)
        return {
            "boxes": boxes,
            "box_labels": labels,
            "cell_labels": cell_labels,
            "cell_sides": cell_sides,
            "points": centers(grid, stride, x.device, boxes.dtype),
        }

    def _check(self, batch: Batch) -> None:
        packed = "document_ids" in batch
        self._check_channels(batch["x"], packed)
        if "tasks" not in batch and len(self.model.tasks) > 1:
            raise ValueError(
                f"the model has the tasks {', '.join(self.model.tasks)} and the data do not say which one a "
                "sample is for; give each data source a task"
            )
        for name, task in self.model.tasks.items():
            for key in NEEDED[task.kind]:
                if key not in batch:
                    raise ValueError(
                        f"model.tasks.{name}.kind={task.kind} needs {key} and the data have none; use other "
                        "data or remove the task"
                    )
            if packed and task.kind != "classify":
                raise ValueError(
                    f"model.tasks.{name}.kind={task.kind} needs images, a row each, and rows are packed; "
                    "only classify takes packed rows"
                )
        if has_values(batch["x"]):
            self._check_numbers(batch)

    def _check_channels(self, x: Tensor, packed: bool) -> None:
        model = self.model
        dim, wanted = (2, model.in_channels * model.patch_elements) if packed else (1, model.in_channels)
        if x.shape[dim] != wanted:
            what = f"values per token (channels * {model.patch_elements})" if packed else "channels"
            raise ValueError(
                f"the data have {x.shape[dim]} {what} and model.in_channels={model.in_channels} wants "
                f"{wanted}; change model.in_channels or the data"
            )

    def _check_numbers(self, batch: Batch) -> None:
        """Tasks and classes in range, with one wait for the device where all is well."""
        rows = batch["x"].shape[0]
        valid = batch["valid"]
        tasks = batch.get("tasks", torch.zeros(rows, dtype=torch.int64, device=valid.device))
        of_row = valid.reshape(rows, -1).any(dim=1)
        found: list[tuple[str, str, Tensor, Tensor]] = []
        for number, (name, task) in enumerate(self.model.tasks.items()):
            for key, kind in CLASSES.items():
                if kind == task.kind and key in batch:
                    value = batch[key]
                    # valid stands in front of what an image has of its own.
                    mine = (of_row & (tasks == number)).view(-1, *(1,) * (value.ndim - 1))
                    if value.shape == valid.shape:
                        mine = mine & valid
                    found.append((name, key, value, mine & ((value < -1) | (value >= task.num_classes))))
        lost = of_row & ((tasks < 0) | (tasks >= len(self.model.tasks)))
        if not bool(torch.stack([lost.any(), *(wrong.any() for *_, wrong in found)]).any()):
            return
        if bool(lost.any()):
            raise ValueError(
                f"a sample is for task number {int(tasks[lost][0])} and the model has "
                f"{len(self.model.tasks)}: {', '.join(self.model.tasks)}; mend the data's tasks"
            )
        name, key, value, wrong = next(entry for entry in found if bool(entry[3].any()))
        classes = self.model.tasks[name].num_classes or 0
        raise ValueError(
            f"{key} of the data hold {int(value[wrong][0])}, out of range: model.tasks.{name}.num_classes="
            f"{classes} allows 0 to {classes - 1}, and -1 for none; raise it or mend the data"
        )


def members(targets: Targets, number: int) -> Tensor:
    """Whose task has this number: bool (B,), or (B, G) in packed rows."""
    valid, mine = targets["valid"], targets["tasks"] == number
    return valid & mine.view(-1, *(1,) * (valid.ndim - 1))


def check(model: VisionConfig, tasks: Mapping[str, VisionTaskConfig]) -> None:
    """Raises ValueError for sections of train.tasks that no task of the model, or not its kind, has."""
    for name, config in tasks.items():
        if name not in model.tasks:
            raise ValueError(
                f"train.tasks.{name} is about no task of the model; model.tasks has {', '.join(model.tasks)}"
            )
        kind = model.tasks[name].kind
        for key, wanted in _KEYS.items():
            value = getattr(config, key)
            if kind != wanted and value != VisionTaskConfig.model_fields[key].default:
                raise ValueError(
                    f"train.tasks.{name}.{key}={value} is for tasks of kind {wanted}, and model.tasks.{name} "
                    f"is of kind {kind}; remove it"
                )
