"""The data of a run: its files read together, and what their labels mean."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minilora.bert.stored_rows import StoredRows, find_labels, store_rows
from minilora.bert.tables import Source, file_fingerprint, read_dataset
from minilora.bert.tasks import Arguments, task_class
from minilora.errors import MiniloraError

# Short opinions in English, written for this project; a kind says what makes a sentence hard:
# plain, negation, mixed (praise and blame, one prevailing), comparison, irony.
SENTENCES = Path(__file__).parent / "sentences"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Splits:
    """The rows of a run, by split: "train", and where given "validation" and "test"."""

    rows: dict[str, StoredRows]
    files: dict[str, str]
    fingerprints: dict[str, str]  # SHA-256 of what each split was read from
    labels: list[str] | None  # what the task's ids mean; None where they are no names

    def has_pairs(self) -> bool:
        """Whether each row is a pair of texts; all splits agree."""
        return self.rows["train"][0].pair is not None


def read_splits(arguments: Arguments) -> Splits:
    """Read all data of a run, by default the packaged sentences, and fix what its labels mean."""
    task, held_out = task_class(arguments.task), arguments.validation_split
    files = {split: getattr(arguments, f"{split}_file") for split in SPLITS}
    dataset = arguments.dataset_name
    if files["train"] is None and dataset is None:
        files = {**files, "train": str(SENTENCES / "train.tsv")}
        files["validation"] = files["validation"] or str(SENTENCES / "validation.tsv")
    sources: dict[str, Source] = {s: Path(file) for s, file in files.items() if file is not None}
    if dataset is not None:
        left = [s for s in SPLITS if files[s] is None and not (held_out and s == "validation")]
        asked = {split: getattr(arguments, f"{split}_split_name") for split in left}
        sources |= read_dataset(dataset, arguments.dataset_config_name, asked)
    for source in sources.values():
        if isinstance(source, Path) and not os.path.isfile(source):
            list(task.read_rows(source, arguments, True))  # raises: it knows what is allowed
    fingerprints = {split: file_fingerprint(source) for split, source in sources.items()}
    rows = {s: store_rows(file, task, arguments, fingerprints[s]) for s, file in sources.items()}
    given = {split: str(source) for split, source in sources.items()}
    if held_out > 0:
        parts = hold_out(len(rows["train"]), held_out, arguments.seed)
        rows["train"], rows["validation"] = (rows["train"].take(part) for part in parts)
        given["validation"], fingerprints["validation"] = given["train"], fingerprints["train"]
    for split, path in given.items():
        has_pairs = rows[split][0].pair is not None
        if has_pairs != (rows["train"][0].pair is not None):
            one, other = ("two texts", "one") if has_pairs else ("one text", "two")
            disagree = f"{path} has {one} a row, {given['train']} has {other}"
            raise MiniloraError(f"{disagree}: name --text_pair_column")
    labels = find_labels(rows["train"], task, given["train"])
    return Splits(rows, given, fingerprints, labels)


def hold_out(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out `share` of so many rows at random: (train, validation), both in the file's order."""
    held_out = round(count * share)
    if not 0 < held_out < count:
        of_rows = f"validation_split={share} of {count} examples"
        raise MiniloraError(f"{of_rows} leaves {held_out} for validation")
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
