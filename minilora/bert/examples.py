"""A tokenised data set, and what comes of it batch by batch.

B examples of a batch; T tokens of the longest; N tokens of a packed row; C outputs of the head.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Arrays = dict[str, np.ndarray]
Batch = dict[str, Tensor]
Tokenizer = PreTrainedTokenizerBase
Logits = list[np.ndarray]  # of each example: (C,), (T, C) or (M, C)
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

    def apart(self, name: str) -> list[np.ndarray]:
        """`extra[name]`, of all tokens, for each example: (T, ...)."""
        return np.split(self.extra[name], self.offsets[1:-1])


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
