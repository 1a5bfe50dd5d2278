"""Texts to labels with probabilities.

Texts are taken in windows of a few thousand: a window is tokenised, sorted by length (so that
batches hold little padding), predicted, and put back in the order it came in. Of a stream, however
long, only one window is in memory at a time.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from minilora.bert import data
from minilora.bert.batching import Batching
from minilora.bert.tables import Row, read_rows
from minilora.errors import MiniloraError
from minilora.trained.run import Record, TrainedRun
from minilora.training.evaluation import evaluation_mode

# A window ends at so many texts, or characters, whichever comes first.
WINDOW_TEXTS = 2048
WINDOW_CHARACTERS = 2_000_000


@dataclass(frozen=True)
class Window:
    """The predictions of a few thousand texts, in their order."""

    rows: list[dict[str, Any]]
    """{"index", "label", "score", "probabilities"} of each text; for regression {"index", "score"}
    with the value as the score."""
    truncated: int
    """How many of the texts were longer than the model takes, and were cut."""


def predict_texts(
    run: TrainedRun, texts: Iterable[str | tuple[str, str]], batch_size: int | None = None
) -> Iterator[dict[str, Any]]:
    """One prediction for each text, or pair of texts, in their order; see `Window.rows`.

    A prediction depends on the batch size and on the other texts by float rounding only. Texts are
    taken as they are needed: an endless stream is fine.

    Args:
        batch_size: by default training's per_device_eval_batch_size.

    Raises:
        MiniloraError: pairs where the run was trained on single texts, or the other way round.
    """
    for window in predict_windows(run, rows_of_texts(texts), batch_size):
        yield from window.rows


def rows_of_texts(texts: Iterable[str | tuple[str, str]]) -> Iterator[Row]:
    """Texts, or pairs of texts, as rows numbered from 1."""
    for line, text in enumerate(texts, start=1):
        first, second = text if isinstance(text, tuple) else (text, None)
        yield Row(first, second, None, None, line)


def rows_of_lines(stream: Iterable[bytes]) -> Iterator[Row]:
    """One text for each line of UTF-8, an empty line being an empty text.

    Raises:
        MiniloraError: a line is not UTF-8.
    """
    for number, line in enumerate(stream, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise MiniloraError(f"standard input, line {number}: not UTF-8") from None
        yield Row(text.rstrip("\r\n"), None, None, None, number)


def unlabelled_rows(
    record: Record, file: Path, text_column: str | None = None, text_pair_column: str | None = None
) -> list[Row]:
    """The texts of a file, in columns called as in training unless given here; labels are not
    looked at, and second texts only where training had them.

    Raises:
        MiniloraError: the file cannot be used; names the line.
    """
    text = text_column or record.config.text_column
    pair = text_pair_column or record.config.text_pair_column
    rows = read_rows(file, text, pair, labelled=False)
    return [dataclasses.replace(row, pair=None) for row in rows] if record.pairs is False else rows


def predict_windows(
    run: TrainedRun, rows: Iterable[Row], batch_size: int | None = None
) -> Iterator[Window]:
    """The same for rows of a file, window by window."""
    size = batch_size or run.record.config.per_device_eval_batch_size
    done = 0
    total = len(rows) if isinstance(rows, list) else None
    with tqdm(total=total, desc="predicting", unit=" texts", leave=False, delay=1) as bar:
        for window in _windows(rows):
            _check_pairs(run, window)
            none = np.zeros(len(window), dtype=np.int64)
            examples = data.tokenize(window, none, run.tokenizer, run.max_length, "tokenizing")
            logits = logits_by_length(
                run.model, examples, size, run.batching, run.device, advance=bar.update
            )
            yield Window(_as_rows(logits, run.record.labels, done), examples.truncated)
            done += len(window)


def logits_by_length(
    model: nn.Module,
    examples: data.Examples,
    batch_size: int,
    batching: Batching,
    device: torch.device,
    advance: Callable[[int], object],
) -> np.ndarray:
    """Logits (N, C) in the examples' order, computed in batches of similar length.

    Args:
        advance: told how many examples each batch had.
    """
    order = np.argsort(np.diff(examples.offsets), kind="stable")
    found = []
    with torch.inference_mode(), evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = data.to_device(batching.collate(examples, indices), device)
            found.append(batching.forward(model, batch).float().cpu().numpy())
            advance(len(indices))
    by_length = np.concatenate(found)
    logits = np.empty_like(by_length)
    logits[order] = by_length
    return logits


def _windows(rows: Iterable[Row]) -> Iterator[list[Row]]:
    window, characters = [], 0
    for row in rows:
        window.append(row)
        characters += len(row.text) + len(row.pair or "")
        if len(window) == WINDOW_TEXTS or characters >= WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


def _check_pairs(run: TrainedRun, window: list[Row]) -> None:
    pairs = run.record.pairs
    if pairs is None:
        pairs = window[0].pair is not None
    for row in window:
        if (row.pair is not None) != pairs:
            what = "has no second text" if pairs else "has a second text"
            trained = "pairs" if pairs else "single texts"
            raise MiniloraError(f"text {row.line} {what}; the run was trained on {trained}")


def _as_rows(logits: np.ndarray, labels: list[str] | None, start: int) -> list[dict[str, Any]]:
    if labels is None:
        values = logits.reshape(-1).tolist()
        return [{"index": start + i, "score": value} for i, value in enumerate(values)]
    # Softmax in float64: the float32 logits are all that was rounded.
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return [
        {
            "index": start + i,
            "label": labels[best],
            "score": row[best],
            "probabilities": dict(zip(labels, row, strict=True)),
        }
        for i, (row, best) in enumerate(
            zip(probabilities.tolist(), logits.argmax(axis=-1).tolist(), strict=True)
        )
    ]
