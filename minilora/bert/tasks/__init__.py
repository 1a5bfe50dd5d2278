"""The tasks: what a head predicts, and the seam that each of them fills.

A task is one file here and in it one class of its name: `sequence_classification.py` holds
`SequenceClassification`. Nothing outside this folder knows a task's name; another task is another
file. `Task` lists what it says of itself and does, in the order of a run; `docs/add_a_task.md`
walks through it.
"""

import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from minilora.bert.examples import NO_LABEL, Arrays, Batch, Examples, Logits, LogitsOf, Tokenizer
from minilora.bert.lines import bad
from minilora.bert.rows import Row
from minilora.bert.tables import Source
from minilora.errors import MiniloraError

# What of a run's arguments says how a file is read; `read_rows` is given no other.
READING = ("text_column", "text_pair_column", "label_column", "label_columns", "label_separator")

Arguments = Any  # the run's `TrainConfig`, which stands above this folder
Predictions = list[dict[str, Any]]
FEW_CLASSES = 20  # whose confusion matrix fits on a page


class Scorer(Protocol):
    """Takes batches as they come, on the CPU, logits in float32, and never keeps them all.

    It may have, too, after the last batch: `confusion`, counts (C, C), true class by predicted; and
    `by_class()`, {"precision", "recall", "f1", "support"} of each class's name. And where examples
    may be windows of a text, a `texts.WholeTexts`, `whole_texts`: what of each batch is scored.
    """

    def add(self, logits: Tensor, batch: Batch) -> None: ...
    def metrics(self) -> dict[str, float]: ...


class Task(Protocol):
    """What every task has. Some have, too:

    vary(examples, epoch): see `varied`
    condense(logits, tokenizer): where C is a vocabulary, what is kept of logits (M, C) until
        `predictions`, as long
    trainer_averages = True: where the batches that Trainer makes for the task hold no "labels"
    weigh(examples): where the loss depends on what is to be learned, as by balanced weights
    training_weight(batch): where `training_loss` is a weighted mean, its weight
    recall(result): where an evaluation chooses what is kept, as a threshold, from its metrics
    """

    name: str
    labels: list[str] | None  # names in id order
    auto_class: Any  # transformers' Auto class with the task's head
    peft_task_type: str | None
    # Sizes of the head by which an adapter of that type, of which no more is known, is this task's.
    foreign_outputs: range
    pipeline_tag: str  # the Hub's name of the task
    logits_of: LogitsOf

    # Its attributes are plain data: they are part of the token cache's key.
    def __init__(self, arguments: Arguments, labels: list[str] | None) -> None: ...

    # The rows of a file, by the readers of `rows`; without labels where they are to be predicted.
    # As JSON says them: a tuple comes back as a list.
    @staticmethod
    def read_rows(path: Source, arguments: Arguments, labelled: bool) -> Iterable[Row]: ...

    # What the labels of the training rows mean.
    @staticmethod
    def find_labels(rows: Iterable[Row], path: str) -> list[str] | None: ...

    # Gives transformers' config the head's size and labels.
    def configure(self, config: Any) -> None: ...

    # The arrays that `texts.arrays_of` says, labels, and any others, each of N examples or of all
    # tokens. A row may become several examples. `place` is the rows' file, for errors.
    def encode(
        self, rows: list[Row], tokenizer: Tokenizer, max_length: int, place: str
    ) -> Arrays: ...

    # The mean that is minimised, label smoothing included; the mean that is reported; how many
    # things they are means over: examples, or labelled tokens.
    def training_loss(self, logits: Tensor, batch: Batch) -> Tensor: ...
    def loss(self, logits: Tensor, batch: Batch) -> Tensor: ...
    def loss_weight(self, batch: Batch) -> int: ...

    # batch["example"] (B,) are indices into the examples, and so, by `row`, into the rows.
    def scorer(self, rows: Sequence[Row], examples: Examples) -> Scorer: ...

    # What to say of each row; the logits are of examples, or what `condense` made of them.
    def predictions(self, rows: list[Row], examples: Examples, logits: Logits) -> Predictions: ...


def build_task(arguments: Arguments, labels: list[str] | None = None) -> Task:
    """The task of a run, for these labels."""
    return task_class(arguments.task)(arguments, labels)


def task_class(name: str) -> type[Task]:
    """The class in `<name>.py`."""
    module = importlib.import_module(f"minilora.bert.tasks.{name}")
    return getattr(module, name.title().replace("_", ""))


def foreign_task(peft_task_type: str | None, outputs: int) -> str | None:
    """The name of the task that an adapter of PEFT's with a head of this size was trained for."""
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        task = task_class(name)
        if task.peft_task_type == peft_task_type and outputs in task.foreign_outputs:
            return name
    return None


def varied(task: Task, examples: Examples, epoch: int | None) -> Examples:
    """The examples of an epoch, or of every evaluation (None), such as with other tokens masked: a
    pure function of the run's seed, the epoch and the example, so that a resume finds the same.
    """
    vary = getattr(task, "vary", None)
    return examples if vary is None else vary(examples, epoch)


def tables_of(scorer: Any, prefix: str) -> dict[str, Any]:
    """What a scorer has counted by class, if it has, as run.json keeps it; of few, the matrix."""
    counts, found = getattr(scorer, "confusion", None), {}
    if hasattr(scorer, "by_class"):
        found[f"{prefix}_per_class"] = scorer.by_class()
    if counts is not None and len(counts) <= FEW_CLASSES:
        found[f"{prefix}_confusion_matrix"] = counts.tolist()
    return found


def set_labels(config: Any, labels: list[str]) -> None:
    """Give transformers' config the names of the head's outputs, and with them their number."""
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}


def unknown_label(place: str, line: int, what: str, labels: list[str]) -> MiniloraError:
    """The error that a file has `what`, a label that training's had not."""
    known = f"the training data, which has {', '.join(labels[:20])}"
    return bad(place, line, f"{what} does not occur in {known}")


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """transformers' LabelSmoother, operation by operation: torch's own differs in the last bits.

    logits (..., C); labels (...), of which `NO_LABEL` counts nowhere.
    """
    negative, labels = -F.log_softmax(logits, dim=-1), labels[..., None]
    ignored = labels == NO_LABEL
    nll = negative.gather(dim=-1, index=labels.clamp(min=0)).masked_fill(ignored, 0.0)
    uniform = negative.sum(dim=-1, keepdim=True).masked_fill(ignored, 0.0)
    counted = ignored.numel() - ignored.long().sum()
    uniform = uniform.sum() / (counted * logits.shape[-1])
    return (1 - smoothing) * (nll.sum() / counted) + smoothing * uniform
