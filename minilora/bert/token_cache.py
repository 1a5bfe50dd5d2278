"""Tokens kept between runs, so that the same text is tokenised once.

    ~/.cache/minilora/<key>.safetensors        (or under XDG_CACHE_HOME); safe to delete at any time

The key is a hash of everything the tokens depend on: the texts, the tokenizer's whole state, and the
length they are cut at. What is read is checked against its own hash; whatever is wrong with a file, or
with the directory, the text is tokenised as if there were no cache.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from transformers import PreTrainedTokenizerBase

from minilora.bert.data import Examples, tokenize
from minilora.bert.tables import Row
from minilora.durable import write_file

# Part of the key: raised whenever the meaning of the arrays changes.
FORMAT = 1


def tokenize_once(
    rows: list[Row],
    labels: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    fingerprint: str | None,
    max_length: int,
    description: str,
) -> Examples:
    """`data.tokenize`, or what it returned for the same text in an earlier run.

    Args:
        fingerprint: the tokenizer's; None leaves the cache alone.
    """
    if fingerprint is None:
        return tokenize(rows, labels, tokenizer, max_length, description)
    path = cache_directory() / f"{_key(rows, fingerprint, max_length)}.safetensors"
    cached = _read(path, labels)
    if cached is not None:
        return cached
    examples = tokenize(rows, labels, tokenizer, max_length, description)
    _write(path, examples)
    return examples


def cache_directory() -> Path:
    """Where tokens are kept (the XDG base directory specification's cache)."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "minilora"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of all that a fast tokenizer's output depends on; None for a slow one, whose state is
    Python code. Take it before the first text: a call leaves its truncation in the state.
    """
    if not tokenizer.is_fast:
        return None
    state = tokenizer.backend_tokenizer.to_str()  # pyright: ignore
    names = f"{type(tokenizer).__name__} {tokenizer.model_input_names}"
    sides = f"{tokenizer.truncation_side} {tokenizer.padding_side}"
    return hashlib.sha256(f"{names} {sides} {state}".encode()).hexdigest()


def _key(rows: list[Row], fingerprint: str, max_length: int) -> str:
    texts = json.dumps([FORMAT, fingerprint, max_length, [[row.text, row.pair] for row in rows]])
    return hashlib.sha256(texts.encode()).hexdigest()


def _read(path: Path, labels: np.ndarray) -> Examples | None:
    try:
        arrays = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError):
        return None
    digest = arrays.pop("sha256", None)
    if digest is None or digest.tobytes() != _digest(arrays):
        return None
    return Examples(
        input_ids=arrays["input_ids"],
        token_type_ids=arrays.get("token_type_ids"),
        offsets=arrays["offsets"],
        labels=labels,
        truncated=int(arrays["truncated"][0]),
    )


def _write(path: Path, examples: Examples) -> None:
    arrays = {
        "input_ids": examples.input_ids,
        "offsets": examples.offsets,
        "truncated": np.array([examples.truncated]),
    }
    if examples.token_type_ids is not None:
        arrays["token_type_ids"] = examples.token_type_ids
    arrays["sha256"] = np.frombuffer(_digest(arrays), dtype=np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, safetensors.numpy.save(arrays))
    except OSError:
        pass  # a full disk or a home that cannot be written costs time, not the run


def _digest(arrays: dict[str, np.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()
