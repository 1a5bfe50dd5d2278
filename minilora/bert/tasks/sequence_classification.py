"""One class for each text, or pair of texts."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from minilora.bert.examples import Arrays, Batch, Examples, Logits, Tokenizer
from minilora.bert.metrics import classification_metrics, scores_by_class, softmax
from minilora.bert.rows import Row, is_number, read_texts
from minilora.bert.tasks import (
    Arguments,
    Predictions,
    set_labels,
    smoothed_cross_entropy,
    unknown_label,
)
from minilora.bert.texts import WholeTexts, encode_texts, of_whole_texts
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
        self.stride = arguments.stride
        self.is_balanced = arguments.class_weights == ["balanced"]
        self.class_weights = _class_weights(arguments.class_weights, labels)

    @staticmethod
    def find_labels(rows: Iterable[Row], path: str) -> list[str]:
        """The classes in ascending order, numerically if all are integers."""
        counts = Counter(_class_name(row.label or "") for row in rows)
        names, total = set(counts), counts.total()
        if len(names) < 2:
            only = f"{path} has a single label, {names.pop()!r}"
            raise MiniloraError(f"{only}: nothing to tell apart")
        are_fractions = all(is_number(name) and not _is_integer(name) for name in names)
        if are_fractions or len(names) > max(MANY_CLASSES, total / 10):
            found = f"{len(names)} different labels in {total} examples, such as {min(names)!r}"
            hint = "use --task regression for measurements, or check --label_column"
            raise MiniloraError(f"{path} has {found}: {hint}")
        # By themselves, too: "1" and "01" are the same number, and a set has no order.
        are_integers = all(map(_is_integer, names))
        return sorted(names, key=(lambda name: (int(name), name)) if are_integers else None)

    def configure(self, config: Any) -> None:
        set_labels(config, self.labels)
        config.problem_type = "single_label_classification"

    def encode(self, rows: list[Row], tokenizer: Tokenizer, max_length: int, place: str) -> Arrays:
        ids = {name: index for index, name in enumerate(self.labels)}
        labels = np.zeros(len(rows), dtype=np.int64)
        for index, row in enumerate(rows):
            if row.label is not None:
                if _class_name(row.label) not in ids:
                    raise unknown_label(place, row.line, f"label {row.label!r}", self.labels)
                labels[index] = ids[_class_name(row.label)]
        return encode_texts(rows, labels, tokenizer, max_length, self.stride)

    def weigh(self, examples: Examples) -> None:
        """Balanced weights as scikit-learn's: N / (C * examples of the class)."""
        if self.is_balanced:
            counts = np.bincount(examples.labels, minlength=len(self.labels))
            self.class_weights = (len(examples) / (len(counts) * counts)).tolist()

    def training_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        if self.class_weights is not None:
            weights = torch.tensor(self.class_weights, dtype=logits.dtype, device=logits.device)
            return F.cross_entropy(logits, batch["labels"], weight=weights)
        if self.label_smoothing == 0:
            return self.loss(logits, batch)
        return smoothed_cross_entropy(logits, batch["labels"], self.label_smoothing)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(logits, batch["labels"])

    def loss_weight(self, batch: Batch) -> int:
        return len(batch["labels"])

    def training_weight(self, batch: Batch) -> float:
        """The sum of the weights, which torch's weighted mean is divided by."""
        if self.class_weights is None:
            return self.loss_weight(batch)
        return float(np.array(self.class_weights)[batch["labels"].cpu().numpy()].sum())

    def scorer(self, rows: Sequence[Row], examples: Examples) -> "ClassScorer":
        return ClassScorer(self.labels, rows, examples)

    def predictions(self, rows: list[Row], examples: Examples, logits: Logits) -> Predictions:
        stacked, found = of_whole_texts(logits, examples.row), []  # (texts, C)
        for best, row in zip(stacked.argmax(axis=-1), softmax(stacked).tolist(), strict=True):
            label, by_label = self.labels[best], dict(zip(self.labels, row, strict=True))
            found.append({"label": label, "score": row[best], "probabilities": by_label})
        return found


class ClassScorer:
    """accuracy, f1, matthews, and accuracy_<kind> for each kind of text."""

    def __init__(self, labels: list[str], rows: Sequence[Row], examples: Examples) -> None:
        kinds = [row.kind for row in rows]
        self.labels, self.kinds = labels, [kinds[row] for row in examples.row]
        self.confusion = np.zeros((len(labels), len(labels)), dtype=np.int64)  # as in `metrics`
        self.whole_texts = WholeTexts(examples.row)
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

    def by_class(self) -> dict[str, dict[str, float]]:
        counts = self.confusion
        return scores_by_class(self.labels, np.diag(counts), counts.sum(axis=0), counts.sum(axis=1))


def _class_weights(asked: list[str] | None, labels: list[str]) -> list[float] | None:
    # None where none are asked for, or balanced ones, which only the training examples tell.
    if asked is None or asked == ["balanced"]:
        return None
    found: dict[str, float] = {}
    for name, equals, weight in (item.rpartition("=") for item in asked):
        problem = None
        if not equals:
            problem = f"{weight!r} is not name=weight, nor balanced alone"
        elif name not in labels:
            problem = f"there is no class {name!r}; there are {', '.join(labels[:20])}"
        elif name in found or not is_number(weight) or float(weight) <= 0:
            problem = f"{name}={weight}: give a class once, with a number above 0"
        if problem:
            raise MiniloraError(f"class_weights: {problem}")
        found[name] = float(weight)
    return [found.get(label, 1.0) for label in labels]


def _class_name(label: str) -> str:
    # pandas writes integers as floats where a value is missing, and turns 0, 1 into "0.0", "1.0":
    # those are the classes 0 and 1.
    return label[:-2] if label.endswith(".0") and _is_integer(label[:-2]) else label


def _is_integer(value: str) -> bool:
    # Python reads no more than 4,300 digits; what has that many is a name.
    return value.removeprefix("-").isdecimal() and len(value) < 1000
