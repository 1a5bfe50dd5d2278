"""The tasks: what a head predicts, and the seam that each of them fills.

A task is one file here and in it one class of its name: `sequence_classification.py` holds
`SequenceClassification`. Nothing outside this folder knows a task's name; another task is another
file. `Task` lists what it says of itself and does, in the order of a run.
"""

import importlib
from itertools import chain
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from minilora.bert.rows import Row

Arrays = dict[str, np.ndarray]
Batch = dict[str, Tensor]


class Scorer(Protocol):
    def add(self, logits: Tensor, batch: Batch) -> None: ...
    def metrics(self) -> dict[str, float]: ...


class Task(Protocol):
    name: str
    labels: list[str] | None  # names in id order
    auto_class: Any  # transformers' Auto class with the task's head
    peft_task_type: str | None
    pipeline_tag: str  # the Hub's name of the task

    def __init__(self, labels: list[str] | None, label_smoothing: float) -> None: ...

    # What the labels of the training rows mean.
    @staticmethod
    def find_labels(rows: list[Row], path: str) -> list[str] | None: ...

    # Gives transformers' config the head's size and labels.
    def configure(self, config: Any) -> None: ...

    # What `encode_texts` says. A row may become several examples. Labels are made last: those of
    # tokens or answers need the tokens' places in the text.
    def encode(
        self, rows: list[Row], tokenizer: Tokenizer, max_length: int, place: str
    ) -> Arrays: ...

    # The mean that is minimised, label smoothing included; the mean that is reported; what they are
    # means over: examples, or, for a task that labels tokens, those.
    def training_loss(self, logits: Tensor, batch: Batch) -> Tensor: ...
    def loss(self, logits: Tensor, batch: Batch) -> Tensor: ...
    def loss_weight(self, batch: Batch) -> int: ...

    # Takes batches as they come, with float32 logits on the CPU, and never keeps them all.
    def scorer(self, rows: list[Row]) -> Scorer: ...

    # What to say of each example.
    def predictions(self, logits: np.ndarray) -> list[dict[str, Any]]: ...


def build_task(name: str, labels: list[str] | None = None, label_smoothing: float = 0.0) -> Task:
    """The task called `name`, for these labels."""
    return task_class(name)(labels, label_smoothing)


def task_class(name: str) -> type[Task]:
    """The class in `<name>.py`."""
    module = importlib.import_module(f"minilora.bert.tasks.{name}")
    return getattr(module, name.title().replace("_", ""))


def encode_texts(
    rows: list[Row], labels: np.ndarray, tokenizer: Tokenizer, max_length: int
) -> Arrays:
    """One example for each row, with its label; the longer text of a pair is truncated first.

    The arrays of `dataset.Examples` for n examples, with `lengths` (n,) for its offsets,
    `truncated` (n,), and `row` counted from the first of `rows`.
    """
    texts = [row.text for row in rows]
    pairs = None if rows[0].pair is None else [row.pair or "" for row in rows]
    encoded: Any = tokenizer(
        texts, pairs, truncation=True, max_length=max_length, return_attention_mask=False
    )
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    # A text that just fills its example lost nothing. (A slow tokenizer does not tell.)
    told, cut = encoded.encodings, (lengths == max_length).tolist()
    cut = [full and (not told or bool(told[i].overflowing)) for i, full in enumerate(cut)]
    arrays = {
        "input_ids": np.fromiter(chain.from_iterable(encoded["input_ids"]), dtype=np.int32),
        "lengths": lengths,
        "labels": labels,
        "row": np.arange(len(rows)),
        "truncated": np.array(cut),
    }
    if "token_type_ids" in encoded:  # the model takes them
        types = chain.from_iterable(encoded["token_type_ids"])
        arrays["token_type_ids"] = np.fromiter(types, dtype=np.int8)
    return arrays
