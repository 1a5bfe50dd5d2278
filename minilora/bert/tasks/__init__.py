"""The tasks: what a head predicts, and the seam that each of them fills.

A task is one file here and in it one class of its name: `sequence_classification.py` holds
`SequenceClassification`. Nothing outside this folder knows a task's name; another task is another
file. `Task` lists what it says of itself and does, in the order of a run; `docs/add_a_task.md`
walks through it.

B examples of a batch; T tokens of the longest; N tokens of a packed row; C outputs of the head.
"""

import importlib
import pkgutil
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from minilora.bert.rows import Row

Arguments = Any  # the run's `TrainConfig`, which stands above this folder
Arrays = dict[str, np.ndarray]
Batch = dict[str, Tensor]
# What one row of logits is of. Of examples: (B, C). Of tokens: (B, T, C), or packed (N, C). Of
# masked tokens: (M, C), for the places batch["masked"] (M,) among the B * T, or the N.
LogitsOf = Literal["examples", "tokens", "masked tokens"]

NO_LABEL = -100  # of a token: torch's cross entropy ignores it


@dataclass(frozen=True)
class Examples:
    """N tokenised examples, end to end."""

    input_ids: np.ndarray  # (total tokens,) int32
    # (total tokens,) int8: 0 in the first text, 1 in the second; None if the model takes none.
    token_type_ids: np.ndarray | None
    offsets: np.ndarray  # (N + 1,) int64: example i is input_ids[offsets[i]:offsets[i + 1]]
    # (N, ...) of examples, or (total tokens,) of tokens, end to end as input_ids are.
    labels: np.ndarray
    row: np.ndarray  # (N,) int64: of which row of the file; a task may make several of one
    truncated: int  # how many were longer than max_length
    extra: Arrays = field(default_factory=dict)  # whatever else the task's `encode` made
    logits_of: LogitsOf = "examples"

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def labels_tokens(self) -> bool:
        """Whether a label is a token's. (Places of an answer (N, 2) are labels of an example.)"""
        return self.logits_of != "examples" and self.labels.ndim == 1


class Scorer(Protocol):
    """Takes batches as they come, on the CPU, logits in float32, and never keeps them all.

    It may have, too, after the last batch: `confusion`, counts (C, C), true class by predicted; and
    `by_class()`, {"precision", "recall", "f1", "support"} of each class's name. And where examples
    may be windows of a text, a `texts.WholeTexts`, `whole_texts`: what of each batch is scored.
    """

    def add(self, logits: Tensor, batch: Batch) -> None: ...
    def metrics(self) -> dict[str, float]: ...


class Task(Protocol):
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
    @staticmethod
    def read_rows(path: Path, arguments: Arguments, labelled: bool) -> list[Row]: ...

    # What the labels of the training rows mean.
    @staticmethod
    def find_labels(rows: list[Row], path: str) -> list[str] | None: ...

    # Gives transformers' config the head's size and labels.
    def configure(self, config: Any) -> None: ...

    # The arrays that `texts.encode_texts` says, and any others, each of N examples or of all
    # tokens. A row may become several examples. `place` is the rows' file, for errors.
    def encode(
        self, rows: list[Row], tokenizer: Tokenizer, max_length: int, place: str
    ) -> Arrays: ...

    # Only where examples differ from epoch to epoch (see `varied`):
    #     def vary(self, examples: Examples, epoch: int | None) -> Examples
    # Only where C is a vocabulary: what is kept of a batch's logits until `predictions`, as long.
    #     def condense(self, logits: np.ndarray, tokenizer: Tokenizer) -> np.ndarray
    # Only where the batches that Trainer makes for the task hold no "labels", but, say, places:
    #     trainer_averages = True

    # Only where the loss depends on what is to be learned, as by balanced weights:
    #     def weigh(self, examples: Examples) -> None

    # Only where an evaluation chooses what is kept, as a threshold; `result` is its metrics:
    #     def recall(self, result: dict[str, Any]) -> None

    # The mean that is minimised, label smoothing included; the mean that is reported; how many
    # things they are means over: examples, or labelled tokens. Where the first is a weighted mean,
    # its weight is another:
    #     def training_weight(self, batch: Batch) -> float
    def training_loss(self, logits: Tensor, batch: Batch) -> Tensor: ...
    def loss(self, logits: Tensor, batch: Batch) -> Tensor: ...
    def loss_weight(self, batch: Batch) -> int: ...

    # batch["example"] (B,) are indices into the examples, and so, by `row`, into the rows.
    def scorer(self, rows: list[Row], examples: Examples) -> Scorer: ...

    # What to say of each row; one array of logits for each example: (C,), (T, C) or (M, C), or of
    # what `condense` made of them.
    def predictions(
        self, rows: list[Row], examples: Examples, logits: list[np.ndarray]
    ) -> list[dict[str, Any]]: ...


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


def call_tokenizer(rows: list[Row], tokenizer: Tokenizer, max_length: int) -> Any:
    """What transformers makes of the rows' texts: `encodings`, of a fast tokenizer, knows more."""
    texts = [row.text for row in rows]
    pairs = None if rows[0].pair is None else [row.pair or "" for row in rows]
    return tokenizer(
        texts, pairs, truncation=True, max_length=max_length, return_attention_mask=False
    )


def arrays_of(encoded: Any, max_length: int) -> Arrays:
    """input_ids, lengths, truncated and, if the model takes them, token_type_ids."""
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    # A text that just fills its example lost nothing. (A slow tokenizer does not tell.)
    told, cut = encoded.encodings, (lengths == max_length).tolist()
    cut = [full and (not told or bool(told[i].overflowing)) for i, full in enumerate(cut)]
    arrays = {
        "input_ids": np.fromiter(chain.from_iterable(encoded["input_ids"]), dtype=np.int32),
        "lengths": lengths,
        "truncated": np.array(cut),
    }
    if "token_type_ids" in encoded:
        types = chain.from_iterable(encoded["token_type_ids"])
        arrays["token_type_ids"] = np.fromiter(types, dtype=np.int8)
    return arrays


def set_labels(config: Any, labels: list[str]) -> None:
    """Give transformers' config the names of the head's outputs, and with them their number."""
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}


def by_example(values: np.ndarray, batch: Batch) -> list[np.ndarray]:
    """What is of tokens, apart: each example's (T, ...), without padding, in the batch's order.

    Of masked tokens, each example's own, in the order of its tokens. `batch` is on the CPU.
    """
    if "place" in batch:  # packed, in the row's order
        owner = np.repeat(np.argsort(batch["place"].numpy()), batch["lengths"].numpy())
    else:
        real = batch["attention_mask"].numpy()
        owner = np.where(real, np.arange(len(real))[:, None], -1).reshape(-1)
        if "masked" not in batch:
            values = values.reshape(len(owner), *values.shape[2:])
    if "masked" in batch:
        owner = owner[batch["masked"].numpy()]
    return [values[: len(owner)][owner == index] for index in range(len(batch["example"]))]


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
