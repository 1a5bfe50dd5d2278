"""`minilora.json`, written last into a checkpoint: what it holds, and the hashes that prove it.

Verifying comes before parsing anything else, so that a flipped bit, a truncated or a swapped file is an
error that names the file.
"""

import dataclasses
import hashlib
import json
import platform
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import safetensors
import torch

from minilora import __version__
from minilora.errors import MiniloraError
from minilora.lora.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from minilora.reading import read_json
from minilora.training.config import has_type
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

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # no path, no link out of the directory
SHA256 = re.compile(r"[0-9a-f]{64}")


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
    """Check size and SHA-256 of every file of a checkpoint, that none is missing, and that the
    directory's name is the step that was saved.

    Raises:
        MiniloraError: names the file and what is wrong with it.
    """
    if path.is_symlink():
        raise MiniloraError(f"{path} is a symbolic link, not a checkpoint: name what it points to")
    document = _read_manifest(path)
    for name, expected in document["files"].items():
        _verify_file(path / name, expected["size"], expected["sha256"])
    step = document["state"]["global_step"]
    if CHECKPOINT.fullmatch(path.name) and path.name != f"checkpoint-{step}":
        raise MiniloraError(
            f"{path} holds step {step}: it was renamed; call it checkpoint-{step} again"
        )
    return Manifest(document["state"], document["run"], document["environment"])


def _verify_file(file: Path, size: int, sha256: str) -> None:
    if file.is_symlink() or not file.is_file():
        raise MiniloraError(f"{file} is missing or not a plain file: the checkpoint is damaged")
    try:
        found = file.stat().st_size
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:  # a bad sector, for one
        raise MiniloraError(f"{file} cannot be read: {error.strerror}") from None
    if found != size:
        raise MiniloraError(
            f"{file} has {found} bytes where {size} were written: "
            "the checkpoint is damaged; resume from another one"
        )
    if digest != sha256:
        raise MiniloraError(
            f"{file} is not what was written (SHA-256 differs); resume from another checkpoint"
        )


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
    if file.is_symlink() or not file.is_file():
        hint = (
            "written by HF Trainer"
            if (path / TRAINING_ARGS_NAME).exists()
            else "incomplete or not a checkpoint"
        )
        raise MiniloraError(
            f"{path} has no {MANIFEST_NAME}: it is {hint}; give a checkpoint that minilora wrote"
        )
    document = read_json(file)
    recorded = document.pop("sha256", None)
    if document.get("schema_version") != SCHEMA_VERSION:
        raise MiniloraError(
            f"{file} has schema version {document.get('schema_version')!r}, this minilora reads {SCHEMA_VERSION}: "
            "use the version that wrote it"
        )
    try:
        unchanged = recorded == _own_hash(document)
    except RecursionError:
        raise MiniloraError(f"{file} is damaged: it is nested too deeply") from None
    if not unchanged:
        raise MiniloraError(f"{file} was changed after it was written (its checksum differs)")
    # The checksum is no signature: whoever edits the file can compute it, too.
    wrong = _wrong_parts(document)
    if wrong:
        raise MiniloraError(f"{file} was not written by minilora: {', '.join(wrong)}")
    return document


def _wrong_parts(document: dict[str, Any]) -> list[str]:
    """What is missing, or not of its type, in a manifest's object."""
    objects = ("state", "run", "environment", "files")
    wrong = [f"{name} is no object" for name in objects if not isinstance(document.get(name), dict)]
    if wrong:
        return wrong
    hints = typing.get_type_hints(TrainState)
    hints.pop("log_history")
    state = document["state"]
    wrong += [f"state has no {name}" for name in sorted(set(hints) - set(state))]
    wrong += [f"state has an unknown {name}" for name in sorted(set(state) - set(hints))]
    wrong += [
        f"{name} of the state is {value!r}"
        for name, value in state.items()
        if name in hints and not _is_right(value, hints[name])
    ]
    for name, expected in document["files"].items():
        described = isinstance(expected, dict) and expected.keys() == {"size", "sha256"}
        if not (described and _is_right(expected["size"], int) and FILE_NAME.fullmatch(name)):
            wrong.append(f"its entry for {name!r} cannot be")
        elif not SHA256.fullmatch(str(expected["sha256"])):
            wrong.append(f"its entry for {name!r} has no SHA-256")
    parts = {WEIGHTS_NAME, CONFIG_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, RNG_NAME, STATE_NAME}
    return wrong + [f"{name} is not listed" for name in sorted(parts - set(document["files"]))]


def _is_right(value: Any, hint: Any) -> bool:
    is_negative = (
        type(value) is int and value < 0 and float not in (typing.get_args(hint) or (hint,))
    )
    return has_type(value, hint) and not is_negative
