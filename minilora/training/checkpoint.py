"""A checkpoint directory, complete or absent: saved, read once, restored.

docs/04_checkpoint.md lists its files. minilora resumes from all of them, HF Trainer from all but
minilora.json, which is written last. A file's bytes are read once, hashed, and parsed from memory:
what was verified is what is used. Not here: PEFT's keys (lora/peft_files), what each state must
look like (optim, rng), where a resume begins (resume).
"""

import contextlib
import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minilora.errors import MiniloraError
from minilora.files import commit_directory, json_text, make_directory
from minilora.lora import peft_files
from minilora.reading import check_like, parse_json, parse_torch, read_bytes
from minilora.training import distributed, optim, trainer_files
from minilora.training.config import TrainConfig
from minilora.training.loop import Training, TrainState
from minilora.training.metrics_file import METRICS_NAME, read_rows, text_of
from minilora.training.record import CHECKPOINT, MANIFEST_NAME, Manifest, RunRecord, manifest_bytes
from minilora.training.rng import check_rng_state, mask_stream, rng_state, set_rng_state
from minilora.training.trainer_files import (
    OPTIMIZER_NAME,
    REQUIRED,
    RNG_NAME,
    SCALER_NAME,
    SCHEDULER_NAME,
    STATE_NAME,
    generators_in,
    generators_name,
)


@dataclass(frozen=True)
class Stored:
    """A checkpoint, verified and parsed."""

    path: Path
    manifest: Manifest | None  # None where HF Trainer wrote the checkpoint
    adapter: peft_files.StoredAdapter
    progress: dict[str, Any]  # the contents of trainer_state.json
    parts: dict[str, Any]  # what torch saved, by file name; HF Trainer's may lack some

    @property
    def record(self) -> RunRecord | None:
        """What the run began with; None where a loop of the user's own, or HF Trainer, has been."""
        return None if self.manifest is None else self.manifest.record

    def missing(self) -> list[str]:
        """Names of the files without which a resumed run would be another one."""
        lacks = [name for name in REQUIRED if name not in self.parts]
        return lacks if generators_in(self.parts) else [*lacks, RNG_NAME]

    def metrics(self) -> bytes | None:
        """What metrics.jsonl held when this was saved; None where it does not any more."""
        path, rows = self.path.parent / METRICS_NAME, self.progress["log_history"]
        state = {} if self.manifest is None else self.manifest.state
        with contextlib.suppress(MiniloraError):
            if not state:  # HF Trainer's rows go on from the last ones of ours that it found
                old, new = read_rows(path.parent), [json_text(row, indent=0) for row in rows]
                while old and json_text(old[-1], indent=0) not in new:
                    old.pop()
                begin = new.index(json_text(old[-1], indent=0)) + 1 if old else 0
                return text_of([*old, *rows[begin:]])
            if state["metrics_size"] == 0:  # an older version's, or a loop's of one's own: all
                return text_of(rows)
            contents = read_bytes(path)[: state["metrics_size"]]
            if hashlib.sha256(contents).hexdigest() == state["metrics_sha256"]:
                return contents
        return None

    def stopped_early(self) -> bool:
        return self.manifest is not None and self.manifest.state["stopped_early"]

    def generators(self) -> Any:
        """The states of this process's generators; None where as many processes did not save."""
        names = generators_in(self.parts)
        is_same = len(names) == distributed.world_size()
        return self.parts[names[distributed.rank()]] if is_same else None


def save_checkpoint(
    output_dir: str | Path, training: Training, run: RunRecord | None = None
) -> Path:
    """Write `output_dir/checkpoint-<global_step>` and return its path. After a crash at any moment
    it is complete or absent; an `OSError` (disk full, read-only) leaves nothing of it. `train`
    resumes it by the record of its `run`, which a loop of your own does not need. Of several
    processes all call it, the first writes, and it holds the generators of all.
    """
    generators = distributed.gathered(rng_state(training.model))
    return distributed.by_first(lambda: _write(Path(output_dir), training, run, generators))


def _write(
    output_dir: Path, training: Training, record: RunRecord | None, generators: list[dict[str, Any]]
) -> Path:
    state, files = training.state, peft_files.adapter_files(training.model)
    for name, part in _stateful(training).items():
        files[name] = _torch_bytes(part.state_dict())
    for rank, own in enumerate(generators):
        files[generators_name(rank, len(generators))] = _torch_bytes(own)
    arguments = record.arguments if record else TrainConfig()
    files[STATE_NAME] = trainer_files.progress_bytes(training, arguments, output_dir)
    files[MANIFEST_NAME] = manifest_bytes(state, record, files)
    path = output_dir / f"checkpoint-{state.global_step}"
    make_directory(output_dir)
    commit_directory(path, files)
    return path


def load_checkpoint(path: str | Path, training: Training) -> TrainState:
    """Put everything back as it was when the checkpoint at `path`, ours or HF Trainer's, was saved,
    the random generators last, and return the state, which is `training.state` from then on.

    The model must carry the same adapter (its values are overwritten); optimizer and scheduler must
    be built over it. If anything is missing, damaged or of another run, nothing is changed.
    """
    stored = read_checkpoint(path)
    if lacks := stored.missing():
        raise MiniloraError(f"{path} lacks {', '.join(lacks)}")
    return restore(stored, training)


def read_checkpoint(path: str | Path) -> Stored:
    """Read a checkpoint once: each file's bytes are hashed, and parsed from memory."""
    path = Path(path)
    if not path.is_dir():
        raise MiniloraError(f"{path} is not a directory: give a checkpoint")
    for entry in [path, *path.iterdir()]:
        if entry.is_symlink():  # what it points to may change
            raise MiniloraError(f"{entry} is a symbolic link: a checkpoint holds its own files")
    if is_trainer_checkpoint(path):
        known = (STATE_NAME, *REQUIRED, SCALER_NAME, *generators_in(os.listdir(path)))
        names = [name for name in known if is_written(path / name)]
        if STATE_NAME not in names:
            raise MiniloraError(f"{path} lacks {STATE_NAME}: HF Trainer was stopped while saving")
        manifest, adapter = None, peft_files.read_adapter(path)
        contents = {name: read_bytes(path / name) for name in names}
    else:
        manifest, contents = Manifest.read(path)
        config, weights = contents[peft_files.CONFIG_NAME], contents[peft_files.WEIGHTS_NAME]
        adapter = peft_files.parse_adapter(path, config, weights)
    parts = {
        name: parse_torch(data, path / name, trainer_files.NUMPY_GLOBALS)
        for name, data in contents.items()
        if name in (*REQUIRED, SCALER_NAME, *generators_in(contents))
    }
    for name in generators_in(parts):
        check_rng_state(parts[name], path / name)
    progress = parse_json(contents[STATE_NAME], path / STATE_NAME, trainer_files.MAX_STATE_BYTES)
    trainer_files.check_progress(progress, path / STATE_NAME)
    return Stored(path, manifest, adapter, progress, parts)


def restore(stored: Stored, training: Training) -> TrainState:
    """Put a stored checkpoint's parts back, the random generators last. Everything is checked
    before anything is changed. What HF Trainer's lacks begins anew, and so do generators where
    other processes than now saved theirs: the run is then marked inexact.
    """
    state, parts, generators = _checked_state(stored, training), stored.parts, stored.generators()
    peft_files.assign_adapter(training.model, stored.adapter)
    for name, part in _stateful(training).items():
        if name in parts:
            part.load_state_dict(parts[name])
    stream = mask_stream(training.model)
    if (stored.manifest is None or generators is None) and stream is not None:
        # Trainer knows nothing of our masks: from here on they are a function of (seed, step).
        stream.restart(state.global_step)
    if generators is not None:
        set_rng_state(generators, training.model)
    training.state = state
    return state


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint of ours with the highest step that verifies, or None. Changes nothing."""
    checkpoints = sorted_checkpoints(output_dir)
    stored = first_valid([path for path in checkpoints if not is_trainer_checkpoint(path)])
    return stored and stored.path


def first_valid(checkpoints: list[Path]) -> Stored | None:
    """The first that verifies."""
    for path in checkpoints:
        with contextlib.suppress(MiniloraError):
            return read_checkpoint(path)
    return None


def sorted_checkpoints(output_dir: str | Path) -> list[Path]:
    """Directories (and links to some) named exactly checkpoint-<step>, the highest step first,
    whatever is in them: those that HF Trainer sees.
    """
    entries = Path(output_dir).iterdir() if Path(output_dir).is_dir() else []
    found = [entry for entry in entries if CHECKPOINT.fullmatch(entry.name) and entry.is_dir()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def is_trainer_checkpoint(path: Path) -> bool:
    is_ours = (path / MANIFEST_NAME).exists()
    return not is_ours and is_written(path / trainer_files.TRAINING_ARGS_NAME)


def is_written(path: Path) -> bool:
    """Whether a file of HF Trainer's is there and not empty, as unsynced ones are after a crash."""
    return path.is_file() and path.stat().st_size > 0


def _checked_state(stored: Stored, training: Training) -> TrainState:
    """The state that is stored, everything else checked against what it is to be restored into."""
    path, parts, is_trainers = stored.path, stored.parts, stored.manifest is None
    peft_files.check_adapter(training.model, stored.adapter)
    if OPTIMIZER_NAME in parts:
        loaded, place = parts[OPTIMIZER_NAME], path / OPTIMIZER_NAME
        optim.check_optimizer(training.optimizer, loaded, place, is_trainers)
    if SCHEDULER_NAME in parts:
        loaded, place = parts[SCHEDULER_NAME], path / SCHEDULER_NAME
        optim.check_scheduler(training.scheduler, loaded, place, is_trainers)
    if training.scaler.is_enabled():
        if SCALER_NAME not in parts:
            raise MiniloraError(f"{path} has no {SCALER_NAME}: it is of a run that was not float16")
        check_like(training.scaler.state_dict(), parts[SCALER_NAME], path / SCALER_NAME)
    timetable = training.timetable
    if stored.manifest is None:
        state = trainer_files.state_of_progress(stored.progress, timetable, path / STATE_NAME)
        if stored.missing() or stored.generators() is None or mask_stream(training.model):
            state.inexact_from = state.global_step
        return state
    state = TrainState(**stored.manifest.state, log_history=stored.progress["log_history"])
    if stored.generators() is None:
        state.inexact_from = state.global_step
    length = timetable.steps_per_epoch
    is_whole = state.global_step == state.epoch * length + state.step_in_epoch
    if timetable.max_steps > 0 and not (is_whole and state.step_in_epoch <= length):
        # Skipping to a position that is none in this data would find nothing, for ever.
        at = f"step {state.step_in_epoch} of epoch {state.epoch} and step {state.global_step}"
        raise MiniloraError(f"{path} is at {at} in all, where an epoch has {length}: it was edited")
    return state


def _stateful(training: Training) -> dict[str, Any]:
    """What torch saves and loads as a state dict, by its file's name."""
    parts = {OPTIMIZER_NAME: training.optimizer, SCHEDULER_NAME: training.scheduler}
    return parts | ({SCALER_NAME: training.scaler} if training.scaler.is_enabled() else {})


def _torch_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
