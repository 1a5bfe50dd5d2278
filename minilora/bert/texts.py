"""Texts as examples, one for each, or one for each window of a long one.

A window is an example with its text's label; what is said of the text is the mean of its windows'
logits. For tasks whose label is of a whole text.

B windows of a batch, b texts; N windows in all; C outputs of the head.
"""

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilora.bert.rows import Row
from minilora.bert.tasks import Arrays, Batch, Tokenizer, arrays_of, call_tokenizer
from minilora.errors import MiniloraError


def encode_texts(
    rows: list[Row],
    labels: np.ndarray,
    tokenizer: Tokenizer,
    max_length: int,
    stride: int | None = None,
) -> Arrays:
    """One example for each row, with its label; the longer text of a pair is truncated first. With
    a `stride`, one for each window of a row's text; neighbours share so many tokens.

    The arrays of `Examples` for n examples, with `lengths` (n,) for its offsets, `truncated` (n,),
    and `row` counted from the first of `rows`.
    """
    if stride is None:
        encoded, row = call_tokenizer(rows, tokenizer, max_length), np.arange(len(rows))
        return {**arrays_of(encoded, max_length), "labels": labels, "row": row}
    encoded = _windows(rows, tokenizer, max_length, stride)
    row = np.array(encoded["overflow_to_sample_mapping"])
    nothing_cut = {"truncated": np.zeros(len(row), dtype=bool)}
    return {**arrays_of(encoded, max_length), **nothing_cut, "labels": labels[row], "row": row}


def _windows(rows: list[Row], tokenizer: Tokenizer, max_length: int, stride: int) -> Any:
    special, problem = tokenizer.num_special_tokens_to_add(), None
    if not tokenizer.is_fast:
        problem = f"a {type(tokenizer).__name__} cannot make windows: it is no fast tokenizer"
    elif rows[0].pair is not None:
        problem = "these are pairs of texts, and windows are of single ones"
    elif stride >= max_length - special:
        problem = f"it must be below {max_length - special}, the tokens of a text in a window"
    if problem:
        raise MiniloraError(f"stride is {stride}: {problem}")
    texts, how = [row.text for row in rows], {"truncation": True, "max_length": max_length}
    how |= {"stride": stride, "return_overflowing_tokens": True, "return_attention_mask": False}
    encoded = tokenizer(texts, **how)
    call_tokenizer(rows[:1], tokenizer, max_length)  # leaves its state, which is saved, as always
    return encoded


class WholeTexts:
    """Takes batches of windows; gives of each text whose last one has come the mean logits."""

    def __init__(self, row: np.ndarray) -> None:
        self.row, self.windows = row, np.bincount(row)
        self.waiting: dict[int, list[Tensor]] = defaultdict(list)

    def __call__(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Batch]:
        """From logits (B, C) to those (b, C) of texts, and their labels."""
        if self.windows.max() == 1:
            return logits, batch
        means, last = [logits[:0]], []
        for place, example in enumerate(batch["example"].tolist()):
            row = int(self.row[example])
            self.waiting[row].append(logits[place])
            if len(self.waiting[row]) == self.windows[row]:
                windows = torch.stack(self.waiting.pop(row)).double()
                means.append(windows.mean(dim=0, keepdim=True).to(logits.dtype))
                last.append(place)
        return torch.cat(means), {name: batch[name][last] for name in ("labels", "example")}


def of_whole_texts(logits: list[np.ndarray], row: np.ndarray) -> np.ndarray:
    """The mean logits of each text's windows, (texts, C) float64; `row` (N,) says whose each is."""
    sums = np.zeros((row[-1] + 1, len(logits[0])))
    np.add.at(sums, row, np.stack(logits))
    return sums / np.bincount(row)[:, None]
