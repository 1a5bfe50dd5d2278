"""`minilora.json`, written last into a checkpoint: what it holds, and the hashes that prove it.

Verifying comes before parsing anything else, so that a flipped bit, a truncated or a swapped file is an
error that names the file.
"""

import dataclasses
import hashlib
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import safetensors
import torch

from minilora import __version__
from minilora.errors import MiniloraError
from minilora.lora.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from minilora.training.loop import TrainState
from minilora.training.trainer_files import (
    OPTIMIZER_NAME,
    RNG_NAME,
    SCHEDULER_NAME,
    STATE_NAME,
    TRAINING_ARGS_NAME,
)

MANIFEST_NAME = "minilora.json"
SCHEMA_VERSION = 1

# A manifest is a few kB of arguments and hashes; parsing something huge could exhaust memory.
MAX_MANIFEST_BYTES = 50_000_000


@dataclass(frozen=True)
class Manifest:
    """What `minilora.json` says beside its list of files."""

    state: dict[str, Any]
    """`TrainState`, without its log_history (which `trainer_state.json` holds)."""
    run: dict[str, Any]
    """What the caller recorded: the arguments, fingerprints and label names."""
    environment: dict[str, Any]
    """What bit-exactness is promised for; see `environment`."""


def manifest_bytes(state: TrainState, run: dict[str, Any], files: dict[str, bytes]) -> bytes:
    """The contents of `minilora.json` for a checkpoint of these files."""
    values = {
        f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "log_history"
    }
    document = {
        "schema_version": SCHEMA_VERSION,
        "state": values,
        "run": run,
        "environment": environment(),
        "files": {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        },
    }
    return (
        json.dumps({**document, "sha256": _own_hash(document)}, indent=2, sort_keys=True) + "\n"
    ).encode()


def verify(path: Path) -> Manifest:
    """Check size and SHA-256 of every file of a checkpoint, and that none is missing.

    Raises:
        MiniloraError: names the file and what is wrong with it.
    """
    document = _read_manifest(path)
    for name, expected in document["files"].items():
        file = path / name
        if os.path.basename(name) != name or file.is_symlink() or not file.is_file():
            raise MiniloraError(f"{file} is missing or not a plain file: the checkpoint is damaged")
        if file.stat().st_size != expected["size"]:
            raise MiniloraError(
                f"{file} has {file.stat().st_size} bytes where {expected['size']} were written: "
                "the checkpoint is damaged; resume from another one"
            )
        if hashlib.sha256(file.read_bytes()).hexdigest() != expected["sha256"]:
            raise MiniloraError(
                f"{file} is not what was written (SHA-256 differs); resume from another checkpoint"
            )
    return Manifest(document["state"], document["run"], document["environment"])


def environment() -> dict[str, Any]:
    """What a run's bits depend on, beside its arguments: resuming elsewhere is allowed,
    bit-exactness not promised.
    """
    return {
        "minilora": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _own_hash(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST_NAME
    if not file.is_file():
        hint = (
            "written by HF Trainer"
            if (path / TRAINING_ARGS_NAME).exists()
            else "incomplete or not a checkpoint"
        )
        raise MiniloraError(
            f"{path} has no {MANIFEST_NAME}: it is {hint}; give a checkpoint that minilora wrote"
        )
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise MiniloraError(
            f"{file} is {file.stat().st_size:,} bytes: it is not a manifest of minilora's"
        )
    try:
        document = json.loads(file.read_bytes())
        recorded = document.pop("sha256")
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise MiniloraError(f"{file} is damaged: {error}") from None
    if document.get("schema_version") != SCHEMA_VERSION:
        raise MiniloraError(
            f"{file} has schema version {document.get('schema_version')!r}, this minilora reads {SCHEMA_VERSION}: "
            "use the version that wrote it"
        )
    if recorded != _own_hash(document):
        raise MiniloraError(f"{file} was changed after it was written (its checksum differs)")
    expected = {WEIGHTS_NAME, CONFIG_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, RNG_NAME, STATE_NAME}
    if expected - set(document["files"]):
        raise MiniloraError(f"{file} does not list {sorted(expected - set(document['files']))}")
    return document
