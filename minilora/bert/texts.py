"""From texts to tokens: one example for each text, or one for each window of a long one.

Where a label is of a whole text, a window is an example with its text's label; what is said of the
text is the mean of its windows' logits.

B windows of a batch, b texts; N windows in all; C outputs of the head.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilora.bert.examples import Arrays, Batch, Logits, Tokenizer
from minilora.bert.rows import Row
from minilora.errors import MiniloraError, first_line

UNCUT = 2**31  # tokens; no text has as many


def arrays_of(ids: Sequence, types: Sequence | None, row: Sequence[int] | np.ndarray) -> Arrays:
    """The arrays of `Examples` but labels, with `lengths` (N,) for its offsets, from each example's
    ids (T,), token types (T,), if the model takes them, and row. `truncated` (N,) is not known yet.
    """
    arrays = {
        "input_ids": np.fromiter(chain.from_iterable(ids), dtype=np.int32),
        "lengths": np.array([len(each) for each in ids]),
        "row": np.array(row),
        "truncated": np.zeros(len(ids), dtype=bool),
    }
    if types is not None:
        arrays["token_type_ids"] = np.fromiter(chain.from_iterable(types), dtype=np.int8)
    return arrays


def tokenized(rows: list[Row], tokenizer: Tokenizer, max_length: int) -> tuple[Any, Arrays]:
    """What transformers makes of the rows' texts, cut at `max_length`, the longer text of a pair
    first (of a fast tokenizer, `encodings` know more), and the arrays of an example for each.
    """
    how: dict[str, Any] = {"max_length": max_length, "return_attention_mask": False}
    encoded = _encoded(rows, tokenizer, truncation=True, **how)
    ids: Any = encoded["input_ids"]
    arrays = arrays_of(ids, encoded.get("token_type_ids"), np.arange(len(rows)))
    if max_length < UNCUT:
        _check_tokens(rows, arrays["lengths"], tokenizer)
    full = np.flatnonzero(arrays["lengths"] == max_length)
    for index in full:  # a text may just fill its example
        if encoded.encodings:
            is_cut = bool(encoded.encodings[index].overflowing)
        else:  # of a slow tokenizer, which does not tell
            more = _encoded([rows[index]], tokenizer, truncation=True, max_length=max_length + 1)
            is_cut = len(more["input_ids"][0]) > max_length
        arrays["truncated"][index] = is_cut
    return encoded, arrays


def whole_encodings(rows: list[Row], tokenizer: Tokenizer, max_length: int) -> list[Any]:
    """The tokens of each row, none cut, and where in its texts they are."""
    check_fast(tokenizer)
    encoded = _encoded(rows, tokenizer, truncation=False, verbose=False)
    tokenized(rows[:1], tokenizer, max_length)  # leaves its state, which is saved, as always
    found = encoded.encodings or []
    _check_tokens(rows, [len(encoding.ids) for encoding in found], tokenizer)
    return found


def _encoded(rows: list[Row], tokenizer: Tokenizer, **how: Any) -> Any:
    texts = [row.text for row in rows]
    pairs = None if rows[0].pair is None else [row.pair or "" for row in rows]
    try:
        return tokenizer(texts, pairs, **how)
    except Exception as error:
        if type(error) is not Exception:  # as code in Rust raises, of a word that it lacks
            raise
        problem = f"the tokenizer {tokenizer.name_or_path!r} fails: {first_line(error)}"
        raise MiniloraError(problem) from error


def _check_tokens(rows: list[Row], lengths: Any, tokenizer: Tokenizer) -> None:
    # A tokenizer without special tokens may leave nothing of a text: nothing to be attended to.
    for row, length in zip(rows, lengths, strict=True):
        if not length:
            said = f"the tokenizer {tokenizer.name_or_path!r} makes no token of {row.text[:80]!r}"
            raise MiniloraError(f"line {row.line}: {said}")


def check_fast(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that is written in python."""
    if not tokenizer.is_fast:
        slow = f"{type(tokenizer).__name__} does not tell where in a text its tokens are"
        raise MiniloraError(f"{slow}: this needs a fast tokenizer")


def token_spans(encoding: Any, text: str, sequence: int) -> np.ndarray:
    """Where each token is in `text`, a row's first (`sequence` 0) or second (1), in characters:
    (tokens, 2), and (-1, -1) of a token that is not of it.
    """
    spans = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)
    # Some tokenizers count the space before a word to its first token.
    spans[:, 0] += [text[start:end][:1].isspace() for start, end in spans]
    is_of_text = np.array([each == sequence for each in encoding.sequence_ids], dtype=bool)
    return np.where(is_of_text[:, None], spans, -1)


def windows(is_cut: np.ndarray, max_length: int, stride: int) -> Iterator[np.ndarray]:
    """Which of a row's tokens each window has, (T,): all that are never cut, and of the others,
    where `is_cut` (tokens,), as many as there is room for. Neighbours share `stride` of those, as
    in transformers.
    """
    text, others = np.flatnonzero(is_cut), np.flatnonzero(~is_cut)
    room, start = max_length - len(others), 0
    while start == 0 or start + stride < len(text):
        yield np.sort(np.concatenate([others, text[start : start + room]]))
        start += room - stride


def encode_texts(
    rows: list[Row], labels: np.ndarray, tokenizer: Tokenizer, max_length: int, stride: int | None
) -> Arrays:
    """The arrays of one example for each row, with its label. With a `stride`, of one for each
    window of a row's text; neighbours share so many tokens.
    """
    if stride is None:
        return tokenized(rows, tokenizer, max_length)[1] | {"labels": labels}
    room = max_length - tokenizer.num_special_tokens_to_add()
    if rows[0].pair is not None or stride >= room:
        is_long = f"it must be below {room}, the tokens of a text in a window"
        problem = is_long if rows[0].pair is None else "windows are of single texts, not of pairs"
        raise MiniloraError(f"stride is {stride}: {problem}")
    ids, types, owners = [], [], []
    for index, encoding in enumerate(whole_encodings(rows, tokenizer, max_length)):
        is_text = np.array([sequence is not None for sequence in encoding.sequence_ids])
        for at in windows(is_text, max_length, stride):
            ids.append(np.array(encoding.ids)[at])
            types.append(np.array(encoding.type_ids)[at])
            owners.append(index)
    takes_types = "token_type_ids" in tokenizer.model_input_names
    return arrays_of(ids, types if takes_types else None, owners) | {"labels": labels[owners]}


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
                of_text = torch.stack(self.waiting.pop(row)).double()
                means.append(of_text.mean(dim=0, keepdim=True).to(logits.dtype))
                last.append(place)
        return torch.cat(means), {name: batch[name][last] for name in ("labels", "example")}


def of_whole_texts(logits: Logits, row: np.ndarray) -> np.ndarray:
    """The mean logits of each text's windows, (texts, C) float64; `row` (N,) says whose each is."""
    sums = np.zeros((row[-1] + 1, len(logits[0])))
    np.add.at(sums, row, np.stack(logits))
    return sums / np.bincount(row)[:, None]
