"""Any number of labels for each text, or pair of texts.

They stand in a list (json, jsonl), in one field between separators, or in a column of 0 and 1 for
each label. An empty list or field is a text without a label.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from minilora.bert.examples import Arrays, Batch, Examples, Logits, Tokenizer
from minilora.bert.lines import bad
from minilora.bert.metrics import best_threshold, precision_recall_f1, scores_by_class
from minilora.bert.rows import Columns, Row, read_rows, text_of
from minilora.bert.tables import Source
from minilora.bert.tasks import Arguments, Predictions, set_labels, unknown_label
from minilora.bert.texts import WholeTexts, encode_texts, of_whole_texts
from minilora.errors import MiniloraError

VALUES = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}


class MultiLabelClassification:
    """Binary cross entropy of logits (B, C) and labels (B, C) of 0 and 1, the mean over both: the
    operations of `BertForSequenceClassification.forward`.
    """

    name = "multi_label_classification"
    auto_class = AutoModelForSequenceClassification
    peft_task_type = "SEQ_CLS"
    foreign_outputs = range(0)  # as many as the other task of this type: nothing tells them apart
    pipeline_tag = "text-classification"
    logits_of = "examples"

    def __init__(self, arguments: Arguments, labels: list[str] | None) -> None:
        assert labels is not None
        self.labels = labels
        self.stride = arguments.stride
        # None while an evaluation is yet to choose it.
        self.threshold = None if arguments.threshold == "best" else arguments.threshold

    @staticmethod
    def read_rows(path: Source, arguments: Arguments, labelled: bool) -> Iterator[Row]:
        """Each label is {name: 0 or 1} of those that the row names."""
        label = arguments.label_column if labelled else None
        asked = tuple(arguments.label_columns or []) if labelled else ()
        columns = Columns(arguments.text_column, arguments.text_pair_column, label, asked)
        read = _values_of if asked else partial(_names_of, separator=arguments.label_separator)
        return read_rows(path, columns, labelled, read)

    @staticmethod
    def find_labels(rows: Iterable[Row], path: str) -> list[str]:
        """The labels in ascending order."""
        columns, names, is_single = set(), set(), True
        for row in rows:
            columns |= row.label.keys()
            names |= {name for name, value in row.label.items() if value}
            is_single &= len(row.label) == 1 and all(row.label.values())
        if never := sorted(columns - names):
            raise MiniloraError(f"{path}: no text has the label {never[0]!r}: nothing to learn")
        if is_single:
            hint = "give --label_separator, or use --task sequence_classification"
            raise MiniloraError(f"{path}: each text has one label, such as {min(names)!r}: {hint}")
        if not names:
            raise MiniloraError(f"{path}: no text has a label: nothing to learn")
        return sorted(names)

    def configure(self, config: Any) -> None:
        set_labels(config, self.labels)
        config.problem_type = "multi_label_classification"  # the pipeline's sigmoid, for one

    def encode(self, rows: list[Row], tokenizer: Tokenizer, max_length: int, place: str) -> Arrays:
        ids = {name: index for index, name in enumerate(self.labels)}
        labels = np.zeros((len(rows), len(ids)), dtype=np.float32)
        for row, values in zip(rows, labels, strict=True):
            for name, value in (row.label or {}).items():
                if name not in ids:
                    raise unknown_label(place, row.line, f"label {name!r}", self.labels)
                values[ids[name]] = value
        return encode_texts(rows, labels, tokenizer, max_length, self.stride)

    def recall(self, result: dict[str, Any]) -> None:
        """Take the threshold that the run's evaluation chose."""
        if self.threshold is None:
            found = result.get("eval_threshold")
            if not isinstance(found, float) or not 0 <= found <= 1:
                told = f"records no threshold in [0, 1], but {found!r}"
                raise MiniloraError(f"threshold is best, and the run {told}: evaluate it first")
            self.threshold = found

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, batch["labels"].to(logits.dtype))

    training_loss = loss

    def loss_weight(self, batch: Batch) -> int:
        return len(batch["labels"])

    def scorer(self, rows: Sequence[Row], examples: Examples) -> "LabelScorer":
        return LabelScorer(self, examples)

    def predictions(self, rows: list[Row], examples: Examples, logits: Logits) -> Predictions:
        found, of_texts = [], torch.from_numpy(of_whole_texts(logits, examples.row))
        for row in of_texts.sigmoid().tolist():
            by_label = dict(zip(self.labels, row, strict=True))
            given = [label for label, value in by_label.items() if value >= self.threshold]
            found.append({"labels": given, "probabilities": by_label})
        return found


class LabelScorer:
    """f1_micro, f1_macro, accuracy (all labels of a text right), and threshold, the one they are
    at. All probabilities are kept.
    """

    def __init__(self, task: MultiLabelClassification, examples: Examples) -> None:
        self.names, self.threshold = task.labels, task.threshold
        self.whole_texts = WholeTexts(examples.row)
        self.probabilities: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.counts: list[np.ndarray] = []  # as in `scores_by_class`

    def add(self, logits: Tensor, batch: Batch) -> None:
        self.probabilities.append(logits.double().sigmoid().numpy())
        self.labels.append(batch["labels"].cpu().numpy() > 0)

    def metrics(self) -> dict[str, float]:
        probabilities, labels = np.concatenate(self.probabilities), np.concatenate(self.labels)
        if self.threshold is None:
            self.threshold = best_threshold(probabilities, labels)
        given = probabilities >= self.threshold
        self.counts = [marks.sum(axis=0) for marks in (given & labels, given, labels)]
        micro = precision_recall_f1(*(int(count.sum()) for count in self.counts))
        macro = np.mean([scores["f1"] for scores in self.by_class().values()])
        accuracy = (given == labels).all(axis=1).mean()
        found = {"f1_micro": micro["f1"], "f1_macro": macro, "accuracy": accuracy}
        return {name: float(value) for name, value in found.items()} | {"threshold": self.threshold}

    def by_class(self) -> dict[str, dict[str, float]]:
        return scores_by_class(self.names, *self.counts)


def _names_of(path: Source, line: int, value: Any, separator: str) -> dict[str, int]:
    if not isinstance(value, list):
        text = text_of(path, line, "label", value).strip()
        value = text.split(separator) if text else []
    names = [text_of(path, line, "label", name).strip() for name in value]
    if odd := [name for name in names if name.lower() in ("", "nan") or names.count(name) > 1]:
        what = f"{odd[0]!r} is empty, nan or there twice"
        raise bad(path, line, f"the label {what}: between labels stands {separator!r}")
    return dict.fromkeys(names, 1)


def _values_of(path: Source, line: int, value: dict[str, Any]) -> dict[str, int]:
    if wrong := [name for name, one in value.items() if str(one).strip().lower() not in VALUES]:
        shown = f"column {wrong[0]!r} is {value[wrong[0]]!r}"
        raise bad(path, line, f"{shown}; a column of --label_columns is 0 or 1")
    return {name: VALUES[str(one).strip().lower()] for name, one in value.items()}
