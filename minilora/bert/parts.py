"""The data of a run: its files read together, and what their labels mean."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from minilora.bert import packaged, tasks
from minilora.bert.data import Examples, file_fingerprint, split_rows
from minilora.bert.tables import Row, read_rows
from minilora.bert.token_cache import tokenize_once, tokenizer_fingerprint
from minilora.errors import MiniloraError


@dataclass(frozen=True)
class Parts:
    """The rows of a run, by part: "train", and where given "validation" and "test"."""

    rows: dict[str, list[Row]]
    files: dict[str, str]
    """Where each part came from, for errors."""
    fingerprints: dict[str, str]
    """SHA-256 of each part's file."""
    labels: list[str] | None
    """Class names in id order; None for regression."""

    def have_pairs(self) -> bool:
        """Whether each example is a pair of texts; all parts agree."""
        return next(iter(self.rows.values()))[0].pair is not None


def read_parts(
    task: str,
    files: dict[str, str | None],
    columns: tuple[str | None, str | None, str | None],
    validation_split: float,
    seed: int,
) -> Parts:
    """Read every file of a run and fix what its labels mean.

    Args:
        files: part to path; without a "train" file, the packaged sentences.
        columns: the text's, the second text's and the label's, where they are given.
        validation_split: share of the training rows to hold out, where there is no validation file.

    Raises:
        MiniloraError: names the file, the line and what is wrong.
    """
    if files["train"] is None:
        files = {**files, "train": str(packaged.TRAIN_FILE)}
        files["validation"] = files["validation"] or str(packaged.VALIDATION_FILE)
    given = {part: path for part, path in files.items() if path is not None}
    rows = {part: read_rows(Path(path), *columns) for part, path in given.items()}
    if validation_split > 0:
        rows["train"], rows["validation"] = split_rows(rows["train"], validation_split, seed)
        given["validation"] = given["train"]
    _check_pairs(rows, given)
    labels = None if task == "regression" else tasks.label_names(rows["train"], given["train"])
    fingerprints = {part: file_fingerprint(Path(path)) for part, path in given.items()}
    return Parts(rows, given, fingerprints, labels)


def tokenize_parts(
    parts: Parts, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Examples]:
    """Each part as flat token arrays with its labels, from the cache where it has been tokenised."""
    fingerprint = tokenizer_fingerprint(tokenizer)
    return {
        part: tokenize_once(
            rows, _labels(parts, part), tokenizer, fingerprint, max_length, f"tokenizing {part}"
        )
        for part, rows in parts.rows.items()
    }


def _labels(parts: Parts, part: str) -> np.ndarray:
    rows, place = parts.rows[part], parts.files[part]
    if parts.labels is None:
        return tasks.real_values(rows, place)
    return tasks.class_ids(rows, parts.labels, place)


def _check_pairs(rows: dict[str, list[Row]], files: dict[str, str]) -> None:
    has_pair = {part: examples[0].pair is not None for part, examples in rows.items()}
    for part, pair in has_pair.items():
        if pair != has_pair["train"]:
            one, other = ("two texts", "one") if pair else ("one text", "two")
            raise MiniloraError(
                f"{files[part]} has {one} a row, {files['train']} has {other}: name --text_pair_column"
            )
