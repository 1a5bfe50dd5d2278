"""One class for each text, or pair of texts."""

from collections import defaultdict
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from minilora.bert.metrics import classification_metrics, softmax
from minilora.bert.rows import Row, is_number, read_texts
from minilora.bert.tasks import (
    Arguments,
    Arrays,
    Batch,
    Examples,
    Tokenizer,
    encode_texts,
    smoothed_cross_entropy,
)
from minilora.errors import MiniloraError

# Labels of more values than this, and than a tenth of the examples, are hardly classes.
MANY_CLASSES = 50


class SequenceClassification:
    """Cross entropy of logits (B, C): the operations of `BertForSequenceClassification.forward`."""

    name = "sequence_classification"
    auto_class = AutoModelForSequenceClassification
    peft_task_type = "SEQ_CLS"
    foreign_outputs = range(2, 2**31)
    pipeline_tag = "text-classification"
    logits_of = "examples"
    read_rows = staticmethod(read_texts)

    def __init__(self, arguments: Arguments, labels: list[str] | None) -> None:
        assert labels is not None
        self.labels = labels
        self.label_smoothing = arguments.label_smoothing_factor

    @staticmethod
    def find_labels(rows: list[Row], path: str) -> list[str]:
        """The classes in ascending order, numerically if all are integers."""
        names = {_class_name(row.label or "") for row in rows}
        if len(names) < 2:
            only = f"{path} has a single label, {names.pop()!r}"
            raise MiniloraError(f"{only}: nothing to tell apart")
        are_fractions = all(is_number(name) and not _is_integer(name) for name in names)
        if are_fractions or len(names) > max(MANY_CLASSES, len(rows) / 10):
            found = f"{len(names)} different labels in {len(rows)} examples, such as {min(names)!r}"
            hint = "use --task regression for measurements, or check --label_column"
            raise MiniloraError(f"{path} has {found}: {hint}")
        # By themselves, too: "1" and "01" are the same number, and a set has no order.
        are_integers = all(map(_is_integer, names))
        return sorted(names, key=(lambda name: (int(name), name)) if are_integers else None)

    def configure(self, config: Any) -> None:
        config.id2label = dict(enumerate(self.labels))  # and with it num_labels
        config.label2id = {label: index for index, label in enumerate(self.labels)}
        config.problem_type = "single_label_classification"

    def encode(self, rows: list[Row], tokenizer: Tokenizer, max_length: int, place: str) -> Arrays:
        ids = {name: index for index, name in enumerate(self.labels)}
        for row in rows:
            if row.label is not None and _class_name(row.label) not in ids:
                unknown = f"{place}, line {row.line}: label {row.label!r}"
                known = f"the training data, which has {', '.join(self.labels[:20])}"
                raise MiniloraError(f"{unknown} does not occur in {known}")
        labels = [0 if row.label is None else ids[_class_name(row.label)] for row in rows]
        return encode_texts(rows, np.array(labels, dtype=np.int64), tokenizer, max_length)

    def training_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        if self.label_smoothing == 0:
            return self.loss(logits, batch)
        return smoothed_cross_entropy(logits, batch["labels"], self.label_smoothing)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(logits, batch["labels"])

    def loss_weight(self, batch: Batch) -> int:
        return len(batch["labels"])

    def scorer(self, rows: list[Row], examples: Examples) -> "ClassScorer":
        return ClassScorer(len(self.labels), [rows[row].kind for row in examples.row])

    def predictions(
        self, rows: list[Row], examples: Examples, logits: list[np.ndarray]
    ) -> list[dict[str, Any]]:
        stacked, found = np.stack(logits), []  # (N, C)
        for best, row in zip(stacked.argmax(axis=-1), softmax(stacked).tolist(), strict=True):
            label, by_label = self.labels[best], dict(zip(self.labels, row, strict=True))
            found.append({"label": label, "score": row[best], "probabilities": by_label})
        return found


class ClassScorer:
    """accuracy, f1, matthews, and accuracy_<kind> for each kind of example."""

    def __init__(self, classes: int, kinds: list[str | None]) -> None:
        self.confusion = np.zeros((classes, classes), dtype=np.int64)  # as in `metrics`
        self.kinds = kinds
        self.correct: dict[str | None, list[bool]] = defaultdict(list)

    def add(self, logits: Tensor, batch: Batch) -> None:
        predicted, labels = logits.numpy().argmax(axis=-1), batch["labels"].cpu().numpy()
        np.add.at(self.confusion, (labels, predicted), 1)
        for example, correct in zip(batch["example"].tolist(), predicted == labels, strict=True):
            self.correct[self.kinds[example]].append(bool(correct))

    def metrics(self) -> dict[str, float]:
        named = sorted((kind, correct) for kind, correct in self.correct.items() if kind)
        by_kind = {f"accuracy_{kind}": sum(correct) / len(correct) for kind, correct in named}
        return classification_metrics(self.confusion) | by_kind


def _class_name(label: str) -> str:
    # pandas writes integers as floats where a value is missing, and turns 0, 1 into "0.0", "1.0":
    # those are the classes 0 and 1.
    return label[:-2] if label.endswith(".0") and _is_integer(label[:-2]) else label


def _is_integer(value: str) -> bool:
    # Python reads no more than 4,300 digits; what has that many is a name.
    return value.removeprefix("-").isdecimal() and len(value) < 1000
