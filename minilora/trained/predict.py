"""Texts to labels with probabilities.

Texts are taken in windows: a window is tokenised, sorted by length (so that batches hold little
padding), predicted, and put back in its order. Of a stream, only one window is in memory.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from minilora.bert.dataset import to_device, tokenize
from minilora.bert.examples import Examples, by_example
from minilora.bert.lines import bad
from minilora.bert.rows import Row
from minilora.errors import MiniloraError
from minilora.trained.opened import TrainedRun
from minilora.training import distributed
from minilora.training.evaluation import evaluation_mode

# A window ends at so many texts, or characters, whichever comes first.
WINDOW_TEXTS = 2048
WINDOW_CHARACTERS = 2_000_000


def predict_texts(
    run: TrainedRun, texts: Iterable[str | tuple[str, str]], batch_size: int | None = None
) -> Iterator[dict[str, Any]]:
    """{"index"} and the task's prediction for each text, or pair of texts, in their order: of
    classes {"label", "score", "probabilities"}, of a number {"score"}, the value.

    A prediction depends on the batch size (by default training's for evaluation) and on the other
    texts by float rounding only. Texts are taken as they are needed: an endless stream is fine.
    """
    for predictions, _ in predict_windows(run, rows_of_texts(texts), batch_size):
        yield from predictions


def rows_of_texts(texts: Iterable[str | tuple[str, str | None]]) -> Iterator[Row]:
    """Texts, or pairs of texts, as rows numbered from 1."""
    for line, text in enumerate(texts, start=1):
        first, second = text if isinstance(text, tuple) else (text, None)
        yield Row(first, second, None, None, line)


def texts_of_lines(stream: Iterable[bytes]) -> Iterator[str]:
    """One text for each line of UTF-8, an empty line being an empty text."""
    for number, line in enumerate(stream, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise MiniloraError(f"standard input, line {number}: not UTF-8") from None


def rows_of_file(
    run: TrainedRun, file: str | Path, columns: Iterable[str | None], labelled: bool
) -> list[Row]:
    """The rows of a file, in columns (text, second text, label) called as in training unless given
    here. Where they need no labels, second texts are looked at only if training had them.
    """
    names = ("text_column", "text_pair_column", "label_column")
    asked = zip(names, columns, strict=False)
    given = {name: column for name, column in asked if column is not None}
    config = dataclasses.replace(run.record.arguments, **given)
    rows = list(run.task.read_rows(Path(file), config, labelled))
    if run.record.pairs is False and not labelled:
        return [row._replace(pair=None) for row in rows]
    return rows


def predict_windows(
    run: TrainedRun, rows: Iterable[Row], batch_size: int | None = None, place: str = "the texts"
) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """The same for the rows of a place, by window: predictions, and how many texts were too long,
    and cut.
    """
    size = batch_size or run.record.arguments.per_device_eval_batch_size
    total, done = len(rows) if isinstance(rows, list) else None, 0
    looks = {"unit": " texts", "leave": False, "delay": 1, "disable": None}
    with tqdm(total=total, desc="predicting", **looks) as bar:
        for window in _windows(rows):
            check_pairs(run, window, place)
            how = (run.task, run.tokenizer, run.max_length)
            examples = tokenize(window, *how, place, keep=False)
            logits = _logits(run, examples, size, bar)
            predictions = run.task.predictions(window, examples, logits)
            yield [{"index": i, **p} for i, p in enumerate(predictions, done)], examples.truncated
            done += len(window)


def _logits(run: TrainedRun, examples: Examples, batch_size: int, bar: tqdm) -> list[np.ndarray]:
    """Each example's logits, (C,) or of its tokens, computed in batches of similar length."""
    order = np.argsort(np.diff(examples.offsets), kind="stable")
    found: list[np.ndarray] = []

    def compute(indices: np.ndarray) -> list[np.ndarray]:
        batch = run.forward.collate(examples, indices)
        logits = run.forward(to_device(batch, run.model.device)).float().cpu().numpy()
        if hasattr(run.task, "condense"):
            logits = run.task.condense(logits, run.tokenizer)  # pyright: ignore
        return list(logits) if examples.logits_of == "examples" else by_example(logits, batch)

    with torch.inference_mode(), evaluation_mode(run.forward):
        batches = np.split(order, range(batch_size, len(order), batch_size))
        for apart in distributed.in_turns(compute, batches):
            found.extend(apart)
            bar.update(len(apart))
    return [found[place] for place in np.argsort(order)]


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


def check_pairs(run: TrainedRun, rows: list[Row], place: str) -> None:
    """Refuse pairs where training had single texts, and the other way round."""
    pairs = rows[0].pair is not None if run.record.pairs is None else run.record.pairs
    has, trained = ("no", "pairs") if pairs else ("a", "single texts")
    for row in rows:
        if (row.pair is not None) != pairs:
            advice = f"the run was trained on {trained}: name the columns?"
            raise bad(place, row.line, f"there is {has} second text; {advice}")
