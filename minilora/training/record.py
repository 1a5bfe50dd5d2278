"""What is written down of a run, so that it can be rebuilt, proved, and told from another.

run.json is a `RunRecord`, minilora.json a `Manifest`, which has a checksum of itself, too. That is
no signature: whoever edits it can compute it. So its contents are checked like any other's.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minilora import __version__
from minilora.errors import MiniloraError
from minilora.files import json_text, write_file
from minilora.lora.config import LoraConfig, config_from_dict
from minilora.lora.peft_files import CONFIG_NAME, WEIGHTS_NAME
from minilora.reading import check_like, read_bytes, read_json
from minilora.training import distributed
from minilora.training.config import TrainConfig, train_config_from_dict
from minilora.training.loop import TrainState
from minilora.training.trainer_files import (
    REQUIRED,
    RNG_NAME,
    SCALER_NAME,
    STATE_NAME,
    generators_in,
)

RUN_NAME, MANIFEST_NAME = "run.json", "minilora.json"
BASE_NAME = "base"  # the directory of a base into which an adapter was merged first
WAITING_BASE = f".tmp-{BASE_NAME}-00000000"  # until run.json stands beside it: else a leftover
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
SCHEMA_VERSION = 1
PARTS = (WEIGHTS_NAME, CONFIG_NAME, *REQUIRED, STATE_NAME)

# Of a `TrainState`, all but the last rows of the log, which trainer_state.json holds.
STATE = {n: hint for n, hint in typing.get_type_hints(TrainState).items() if n != "log_history"}

PATHS = ("train_file", "validation_file", "test_file", "dataset_name", "model_name_or_path")

# The parts of `environment` on which a run's bits depend; the others are for the reader.
EXACTNESS = ("torch", "cpu_capability", "num_threads", "cuda", "world_size")


@dataclass(frozen=True)
class RunRecord:
    """A run's arguments and inputs."""

    arguments: TrainConfig
    lora: LoraConfig
    labels: list[str] | None  # names in id order; None where the task has none
    pairs: bool | None  # whether examples are pairs of texts; None where nobody recorded it
    data_sha256: dict[str, str]  # of each split's file
    model_sha256: str  # of the base, and behind a space of the adapter that was continued
    environment: dict[str, Any]  # what it ran on
    result: dict[str, Any] | None = None  # the final metrics of a finished run
    world_size: int = 1  # processes that it began with: a step has their batches, whoever trains it
    extended: list[int] = field(default_factory=list)  # the steps at which its end was moved
    resumed: list[int] = field(default_factory=list)  # those at which it was gone on with
    # What stands beside the base's weights; older versions did not record it.
    base_settings: dict[str, Any] = field(default_factory=dict)  # of its config.json
    tokens_sha256: dict[str, str] = field(default_factory=dict)  # its tokenizer's, of each split

    def to_json(self) -> dict[str, Any]:
        """The object that is written, its paths absolute."""
        arguments = dataclasses.asdict(self.arguments)
        for name in PATHS:
            if arguments[name] is not None and Path(arguments[name]).exists():
                arguments[name] = str(Path(arguments[name]).resolve())
        # Where the run lies and what it was resumed from is known to whoever resumes it.
        arguments["output_dir"] = arguments["resume_from_checkpoint"] = None
        arguments["extend"] = False  # it is asked anew each time
        values = vars(self) | {"arguments": arguments, "lora": dataclasses.asdict(self.lora)}
        return {n: value for n, value in values.items() if value or n not in ("result", "resumed")}

    def write(self, output_dir: Path) -> None:
        """As run.json, before the first step, also of a resume, and with the result at the end. A
        merged base that waits for it gets its name.
        """
        text = json_text(self.to_json(), indent=2)
        write_file(output_dir / RUN_NAME, f"{text}\n".encode())
        with contextlib.suppress(FileNotFoundError):
            os.rename(output_dir / WAITING_BASE, output_dir / BASE_NAME)

    @staticmethod
    def read(output_dir: Path) -> "RunRecord":
        path = output_dir / RUN_NAME
        return RunRecord.from_json(read_json(path), str(path))

    @staticmethod
    def from_json(values: dict[str, Any], place: str) -> "RunRecord":
        """What `to_json` returned, whichever version wrote it."""
        hints = typing.get_type_hints(RunRecord) | {"arguments": dict, "lora": dict}
        absent = {"labels": None, "pairs": None, "environment": {}, "result": None}
        absent |= {"world_size": 1, "base_settings": {}, "tokens_sha256": {}}
        absent |= {"extended": [], "resumed": []}
        found = {**absent, **{name: values[name] for name in hints.keys() & values.keys()}}
        check_like(hints, found, f"{place} does not record a run")
        arguments = train_config_from_dict(found.pop("arguments"), place)
        return RunRecord(arguments, config_from_dict(found.pop("lora"), place), **found)


def environment(device: str | None = None) -> dict[str, Any]:
    """What a run's bits depend on beside its arguments: resuming elsewhere is allowed,
    bit-exactness not promised there. `device` is TrainConfig's.
    """
    others = ("numpy", "safetensors", "transformers")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    return {
        "minilora": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in others},
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if on_gpu else None,
        "world_size": distributed.world_size(),
    }


@dataclass(frozen=True)
class Manifest:
    """What `minilora.json` says."""

    state: dict[str, Any]  # with the keys of `STATE`
    record: RunRecord | None  # None where a user's own loop wrote the checkpoint without one
    environment: dict[str, Any]  # what bit-exactness is promised for

    @staticmethod
    def read(checkpoint: Path) -> tuple["Manifest", dict[str, bytes]]:
        """The manifest of a checkpoint of ours, and the contents of every other file, which are
        what was written.
        """
        path = checkpoint / MANIFEST_NAME
        if not path.is_file():
            raise MiniloraError(f"{path} is missing, nor is this HF Trainer's: it is incomplete")
        document = read_json(path)
        recorded = document.pop("sha256", None)
        version = document.get("schema_version")
        if version != SCHEMA_VERSION:
            advice = f"this minilora reads {SCHEMA_VERSION}: use the version that wrote it"
            raise MiniloraError(f"{path} has schema version {version!r}, {advice}")
        try:
            found = _checksum(document)
        except RecursionError:  # json reads deeper nesting than it writes
            found = "none"
        if recorded != found:
            raise MiniloraError(f"{path} was changed after it was written (its checksum differs)")
        check_like(dict.fromkeys(("state", "run", "environment", "files"), dict), document, path)
        # Older versions had the whole log in trainer_state.json.
        state = {"metrics_size": 0, "metrics_sha256": "", **document["state"]}
        files = document["files"]
        # The first version's mark that an evaluation is still to come; the position says so.
        state.pop("epoch_ends", None)
        check_like(STATE, state, path, "state")
        wrong = sorted(state.keys() - STATE.keys())
        wrong += [name for name, value in state.items() if type(value) is int and value < 0]
        required = (*PARTS, *(generators_in(files) or [RNG_NAME]))
        wrong += [f"no entry for {name}" for name in required if name not in files]
        known = (*required, SCALER_NAME)
        wrong += [f"an entry for {name!r}" for name in files if name not in known]
        if wrong:
            raise MiniloraError(f"{path} was not written by minilora: it has {wrong[0]}")
        step_name = f"checkpoint-{state['global_step']}"
        if CHECKPOINT.fullmatch(checkpoint.name) and checkpoint.name != step_name:
            held = f"holds step {state['global_step']}: it was renamed"
            raise MiniloraError(f"{checkpoint} {held}; call it {step_name} again")
        record = RunRecord.from_json(document["run"], str(path)) if document["run"] else None
        contents = {name: read_bytes(checkpoint / name) for name in files}
        for name, data in contents.items():
            if _described(data) != files[name]:
                reason = f"is not what was written (its SHA-256 differs from {MANIFEST_NAME}'s)"
                raise MiniloraError(f"{checkpoint / name} {reason}: resume from another checkpoint")
        return Manifest(state, record, document["environment"]), contents

    def inexactness(self, device: str | None) -> list[str]:
        """Why a resume here, on TrainConfig's `device`, may not be bit-exact."""
        # Older versions knew one process only.
        there, here = {"world_size": 1, **self.environment}, environment(device)
        return [
            f"{name} was {there.get(name)} and is {here[name]}: the resume may not be bit-exact"
            for name in EXACTNESS
            if there.get(name) != here[name]
        ]


def manifest_bytes(state: TrainState, record: RunRecord | None, files: dict[str, bytes]) -> bytes:
    """The contents of `minilora.json` for a checkpoint of these files."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "state": {name: getattr(state, name) for name in STATE},
        # A checkpoint is the uninterrupted run's: to the byte, but for times in its log.
        "run": {} if record is None else dataclasses.replace(record, resumed=[]).to_json(),
        "environment": environment(None if record is None else record.arguments.device),
        "files": {name: _described(data) for name, data in files.items()},
    }
    signed = {**document, "sha256": _checksum(document)}
    return (json.dumps(signed, indent=2, sort_keys=True) + "\n").encode()


def _described(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _checksum(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
