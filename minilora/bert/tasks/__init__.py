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
from transformers import PreTrainedTokenizerBase

from minilora.bert.rows import Row


class Scorer(Protocol):
    def add(self, logits: Tensor, batch: dict[str, Tensor]) -> None: ...
    def metrics(self) -> dict[str, float]: ...


class Task(Protocol):
    name: str
    labels: list[str] | None  # names in id order
    auto_class: Any  # transformers' Auto class with the task's head
    peft_task_type: str | None
    pipeline_tag: str  # the Hub's name of the task

    def __init__(self, labels: list[str] | None, label_smoothing: float) -> None: ...

    @staticmethod
    def find_labels(rows: list[Row], path: str) -> list[str] | None:
        """What the labels of the training rows mean."""

    def configure(self, config: Any, location: str) -> None:
        """Give transformers' config the head's size and labels; refuse a trained head of others."""

    def encode(
        self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, place: str
    ) -> dict[str, np.ndarray]:
        """What `encode_texts` says. A row may become several examples. Labels are made last: those
        of tokens or answers need the tokens' places in the text."""
        ...

    def training_loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The mean that is minimised, label smoothing included."""
        ...

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The mean that is reported."""
        ...

    def loss_weight(self, batch: dict[str, Tensor]) -> int:
        """What they are means over: examples, or for a task that labels tokens, those."""
        ...

    def scorer(self, rows: list[Row]) -> Scorer:
        """Takes batches as they come, with float32 logits on the CPU, and never keeps them all."""
        ...

    def predictions(self, logits: np.ndarray) -> list[dict[str, Any]]:
        """What to say of each example."""
        ...


def build_task(name: str, labels: list[str] | None = None, label_smoothing: float = 0.0) -> Task:
    """The task called `name`, for these labels."""
    return task_class(name)(labels, label_smoothing)


def task_class(name: str) -> type[Task]:
    """The class in `<name>.py`."""
    module = importlib.import_module(f"minilora.bert.tasks.{name}")
    return getattr(module, name.title().replace("_", ""))


def encode_texts(
    rows: list[Row], labels: np.ndarray, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, np.ndarray]:
    """One example for each row, with its label; the longer text of a pair is truncated first.

    The arrays of `dataset.Examples`, of n examples: `lengths` (n,) instead of offsets, `row` counted
    from the first of `rows`, `truncated` (n,).
    """
    with_types = "token_type_ids" in tokenizer.model_input_names
    encoded: Any = tokenizer(
        [row.text for row in rows],
        None if rows[0].pair is None else [row.pair or "" for row in rows],
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=with_types,
    )
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    arrays = {
        "input_ids": np.fromiter(chain.from_iterable(encoded["input_ids"]), dtype=np.int32),
        "lengths": lengths,
        "labels": labels,
        "row": np.arange(len(rows)),
        # Those that fill max_length exactly count, too: telling the two apart would mean tokenising
        # twice, and this is only for a warning.
        "truncated": lengths == max_length,
    }
    if with_types:
        types = chain.from_iterable(encoded["token_type_ids"])
        arrays["token_type_ids"] = np.fromiter(types, dtype=np.int8)
    return arrays
