"""What a head predicts: its labels, its loss, its metrics."""

import math
from collections.abc import Callable

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.bert.metrics import classification_metrics, regression_metrics
from minilora.bert.tables import Row
from minilora.errors import MiniloraError

# Both tasks predict from the pooled first token, with a linear head: PEFT's task type is the same.
PEFT_TASK_TYPE = "SEQ_CLS"

# Above this many classes, and more classes than a tenth of the examples, the labels are hardly
# classes.
MANY_CLASSES = 50


def label_names(rows: list[Row], path: str) -> list[str]:
    """The classes in ascending order, numerically if all are integers; a label's id is its place in
    the list.

    Raises:
        MiniloraError: fewer than two classes, or labels that look like measurements.
    """
    names = {_class_name(row.label or "") for row in rows}
    if len(names) < 2:
        raise MiniloraError(
            f"{path} has a single label, {names.pop()!r}: there is nothing to tell apart"
        )
    fractional = [name for name in names if _is_float(name) and not _is_integer(name)]
    if len(fractional) == len(names) or len(names) > max(MANY_CLASSES, len(rows) / 10):
        raise MiniloraError(
            f"{path} has {len(names)} different labels in {len(rows)} examples, such as {sorted(names)[0]!r}: if they "
            "are measurements, use --task regression; if not, check --label_column"
        )
    return sorted(names, key=int) if all(map(_is_integer, names)) else sorted(names)


def class_ids(rows: list[Row], names: list[str], path: str) -> np.ndarray:
    """Each row's class id, (N,) int64.

    Raises:
        MiniloraError: a label that is not in `names`, with its line.
    """
    ids = {name: index for index, name in enumerate(names)}
    for row in rows:
        if _class_name(row.label or "") not in ids:
            raise MiniloraError(
                f"{path}, line {row.line}: label {row.label!r} does not occur in the training data, which has "
                f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
            )
    return np.array([ids[_class_name(row.label or "")] for row in rows], dtype=np.int64)


def real_values(rows: list[Row], path: str) -> np.ndarray:
    """Each row's label as a number, (N,) float32.

    Raises:
        MiniloraError: a label that is not a finite number, with its line.
    """
    for row in rows:
        if not _is_float(row.label or ""):
            raise MiniloraError(
                f"{path}, line {row.line}: label {row.label!r} is not a finite number"
            )
    return np.array([float(row.label or "") for row in rows], dtype=np.float32)


Forward = Callable[[nn.Module, dict[str, Tensor]], Tensor]
"""(model, batch) to logits (B, C), in the order of the batch's labels."""


def training_loss(
    task: str, label_smoothing: float, forward: Forward
) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """A function of (model, batch) to the batch's mean loss, a scalar."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return batch_loss(task, forward(model, batch), batch["labels"], label_smoothing)

    return loss


def evaluation_loss(
    task: str, forward: Forward
) -> Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, Tensor]]:
    """A function of (model, batch) to the batch's mean loss and its logits (B, C)."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = forward(model, batch)
        return batch_loss(task, logits, batch["labels"]), logits

    return loss


def batch_loss(task: str, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of logits (B, C) with class ids (B,), or squared error of logits (B, 1) with
    values (B,).

    The same operations as in transformers' `BertForSequenceClassification.forward`, hence the same
    bits.
    """
    if task == "regression":
        return F.mse_loss(logits.squeeze(-1), labels)
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def metrics_of(
    task: str, kinds: list[str | None]
) -> Callable[[np.ndarray, np.ndarray], dict[str, float]]:
    """A function of (logits, labels) that scores the task; with kinds (N,), also the accuracy
    within each.
    """
    if task == "regression":
        return regression_metrics

    def metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return classification_metrics(logits, labels) | accuracy_by_kind(logits, labels, kinds)

    return metrics


def accuracy_by_kind(
    logits: np.ndarray, labels: np.ndarray, kinds: list[str | None]
) -> dict[str, float]:
    """`accuracy_<kind>` for each kind of example, in alphabetical order; nothing where none is
    named.
    """
    correct = logits.argmax(axis=-1) == labels
    names = np.array([kind or "" for kind in kinds])
    return {
        f"accuracy_{kind}": float(correct[names == kind].mean())
        for kind in sorted(set(names.tolist()) - {""})
    }


def _class_name(label: str) -> str:
    # pandas turns a column of integers with a gap into "0.0", "1.0": those are the classes 0 and 1.
    return label[:-2] if label.endswith(".0") and _is_integer(label[:-2]) else label


def _is_integer(value: str) -> bool:
    return value.removeprefix("-").isdecimal()


def _is_float(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False
