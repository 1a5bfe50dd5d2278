"""A labelled file scored after training, in the very bits in which training scores."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minilora.bert.dataset import batches_in_order, shortening, tokenize
from minilora.bert.tasks import varied
from minilora.trained.opened import TrainedRun
from minilora.trained.predict import check_pairs, rows_of_file
from minilora.training.evaluation import evaluate_model
from minilora.training.progress import say


@dataclass(frozen=True)
class Scores:
    """What a model is worth on a labelled file."""

    metrics: dict[str, float]  # eval_loss, eval_accuracy, ...: training's names, timing keys last
    # Where the task has classes: counts (C, C), true class by predicted; and "precision", "recall",
    # "f1" and "support" by class.
    confusion: np.ndarray | None
    by_class: dict[str, dict[str, float]]


def evaluate_file(
    run: TrainedRun,
    file: str | Path,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
) -> Scores:
    """Score `run` on a labelled file, its columns called as in training unless given here. On
    training's validation file, on the same device: bitwise the numbers that training recorded.
    """
    config, columns = run.record.arguments, (text_column, text_pair_column, label_column)
    rows = rows_of_file(run, file, columns, labelled=True)
    check_pairs(run, rows, str(file))
    examples = tokenize(rows, run.task, run.tokenizer, run.max_length, str(file))
    if told := shortening(examples, len(rows), run.max_length):
        say(f"{file}: {told}")
    size, shown = config.per_device_eval_batch_size, f"evaluating {Path(file).name}"
    examples = varied(run.task, examples, None)
    batches = batches_in_order(examples, size, run.forward.collate, run.model.device, shown)
    scorer = run.task.scorer(rows, examples)
    how = (run.task, config.hf_parity)
    metrics = evaluate_model(run.forward, *how, batches, scorer, "eval")
    by_class = getattr(scorer, "by_class", dict)()
    return Scores(metrics, getattr(scorer, "confusion", None), by_class)
