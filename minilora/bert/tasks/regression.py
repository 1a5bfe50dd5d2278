"""One number for each text, or pair of texts."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from minilora.bert.examples import Arrays, Batch, Examples, Logits, Tokenizer
from minilora.bert.lines import bad
from minilora.bert.metrics import regression_metrics
from minilora.bert.rows import Row, is_number, read_texts
from minilora.bert.tasks import Arguments, Predictions
from minilora.bert.texts import WholeTexts, encode_texts, of_whole_texts


class Regression:
    """Squared error of logits (B, 1): the operations of `BertForSequenceClassification.forward`."""

    name = "regression"
    labels = None
    auto_class = AutoModelForSequenceClassification
    peft_task_type = "SEQ_CLS"
    foreign_outputs = range(1, 2)
    pipeline_tag = "text-classification"
    logits_of = "examples"
    read_rows = staticmethod(read_texts)

    def __init__(self, arguments: Arguments, labels: list[str] | None) -> None:
        self.stride = arguments.stride

    @staticmethod
    def find_labels(rows: Iterable[Row], path: str) -> None: ...

    def configure(self, config: Any) -> None:
        config.num_labels = 1
        config.problem_type = "regression"

    def encode(self, rows: list[Row], tokenizer: Tokenizer, max_length: int, place: str) -> Arrays:
        for row in rows:
            if row.label is not None and not is_number(row.label):
                raise bad(place, row.line, f"label {row.label!r} is not a finite number")
        labels = np.array([float(row.label or 0) for row in rows], dtype=np.float32)
        return encode_texts(rows, labels, tokenizer, max_length, self.stride)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return F.mse_loss(logits.squeeze(-1), batch["labels"])

    training_loss = loss

    def loss_weight(self, batch: Batch) -> int:
        return len(batch["labels"])

    def scorer(self, rows: Sequence[Row], examples: Examples) -> "ValueScorer":
        return ValueScorer(examples)

    def predictions(self, rows: list[Row], examples: Examples, logits: Logits) -> Predictions:
        values = of_whole_texts(logits, examples.row)[:, 0]
        return [{"score": value} for value in values.tolist()]


class ValueScorer:
    """mse, pearson, spearman; two numbers of each text are kept."""

    def __init__(self, examples: Examples) -> None:
        self.whole_texts = WholeTexts(examples.row)
        self.predictions: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []

    def add(self, logits: Tensor, batch: Batch) -> None:
        self.predictions.append(logits.squeeze(-1).numpy())
        self.labels.append(batch["labels"].cpu().numpy())

    def metrics(self) -> dict[str, float]:
        return regression_metrics(np.concatenate(self.predictions), np.concatenate(self.labels))
