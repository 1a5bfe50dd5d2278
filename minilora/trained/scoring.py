"""A labelled file scored after training, in the very bits in which training scores."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minilora.bert import tasks
from minilora.bert.metrics import confusion_matrix
from minilora.bert.parts import Parts, tokenize_parts
from minilora.bert.tables import read_rows
from minilora.errors import MiniloraError
from minilora.fine_tuning import report_truncation, score
from minilora.trained.run import TrainedRun


@dataclass(frozen=True)
class Scores:
    """What a model is worth on a labelled file."""

    metrics: dict[str, float]
    """eval_loss, eval_accuracy, ..., under training's names, timing keys last."""
    confusion: np.ndarray | None
    """Counts (C, C), row the true class, column the predicted one; None for regression."""


def evaluate_file(
    run: TrainedRun,
    file: str | Path,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
) -> Scores:
    """Score `run` on a labelled file. On training's validation file, on the same device: bitwise
    the numbers that training recorded.

    Args:
        text_column, text_pair_column, label_column: by default as in training.

    Raises:
        MiniloraError: the file cannot be used, or has a label that the training data has not.
    """
    record, part = run.record, Path(file).name
    config = record.config
    rows = read_rows(
        Path(file),
        text_column or config.text_column,
        text_pair_column or config.text_pair_column,
        label_column or config.label_column,
    )
    parts = Parts({part: rows}, {part: str(file)}, {}, record.labels)
    if record.pairs not in (None, parts.have_pairs()):
        there, here = ("two texts", "one") if record.pairs else ("one text", "two")
        raise MiniloraError(f"{file} has {here} a row, training had {there}: name the columns")
    examples = tokenize_parts(parts, run.tokenizer, run.max_length)
    report_truncation(parts, examples, run.max_length)
    counts: list[np.ndarray] = []
    metrics_of_task = tasks.metrics_of(config.task, [row.kind for row in rows])

    def metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        if record.labels is not None:
            classes = len(record.labels)
            counts.append(confusion_matrix(logits.argmax(axis=-1), labels, classes))
        return metrics_of_task(logits, labels)

    found = score(
        config, run.model, examples[part], metrics, run.batching, run.device, part, "eval"
    )
    return Scores(found, counts[0] if counts else None)
