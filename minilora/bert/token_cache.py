"""Tokens kept between runs, so that the same text is tokenised once.

    ~/.cache/minilora/<key>.safetensors     (or under XDG_CACHE_HOME); safe to delete at any time

The key is a hash of everything the arrays depend on: the rows, the task and its settings, the
tokenizer's whole state, and the length texts are cut at. What is read is checked against its own
hash; whatever is wrong with a file, or with the directory, the text is tokenised anew.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import torch
from transformers import PreTrainedTokenizerBase

from minilora.bert.load import tensors_fingerprint
from minilora.bert.rows import Row
from minilora.bert.tasks import Task
from minilora.files import write_file

# Part of the key: raised whenever the meaning of the arrays changes.
FORMAT = 4


def entry_of(
    rows: list[Row], task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Path | None:
    """Where the arrays of these rows are kept; None for a slow tokenizer, whose state is code, and
    where there is no home.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not tokenizer.is_fast or not home.is_absolute():
        return None
    # A call leaves truncation and padding in the state: this one, the same whatever was before.
    tokenizer("", truncation=True, max_length=max_length)
    state = tokenizer.backend_tokenizer.to_str()  # pyright: ignore
    names = [type(tokenizer).__name__, tokenizer.model_input_names, tokenizer.truncation_side]
    names.append(tokenizer.split_special_tokens)
    texts = [[row.text, row.pair, row.label, row.fields] for row in rows]
    key = json.dumps([FORMAT, task.name, vars(task), max_length, names, state, texts])
    return home / "minilora" / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


def read_entry(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays kept at `path`; None where there are none, or damaged ones."""
    try:
        arrays = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError):
        return None
    digest = arrays.pop("sha256", np.zeros(0))
    return arrays if digest.tobytes() == _digest(arrays) else None


def write_entry(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Keep the arrays at `path`, if the disk allows it."""
    digest = np.frombuffer(_digest(arrays), dtype=np.uint8)
    # A full disk or a home that cannot be written costs time, not the run.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, safetensors.numpy.save(arrays | {"sha256": digest}))


def _digest(arrays: dict[str, np.ndarray]) -> bytes:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return bytes.fromhex(tensors_fingerprint(tensors))
