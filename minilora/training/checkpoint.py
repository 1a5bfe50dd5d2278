"""A checkpoint directory, complete or absent: saved, read once, restored.

    checkpoint-<step>/
      adapter_model.safetensors  adapter_config.json    the adapter, as PEFT writes it
      optimizer.pt  scheduler.pt                        torch state dicts; read weights_only
      rng_state.pth                                     every generator's state; the same
      scaler.pt                                         with float16: the loss scale
      trainer_state.json                                HF Trainer's progress and log
      minilora.json                                     written last (training/record)

minilora resumes from all of them, HF Trainer from all but the last. A file's bytes are read once,
hashed, and parsed from memory: what was verified is what is used. Not here: PEFT's keys
(lora/peft_files), what each state must look like (optim, rng), where a resume begins (resume).
"""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minilora.errors import MiniloraError
from minilora.files import commit_directory, make_directory
from minilora.lora import peft_files
from minilora.reading import MAX_JSON_BYTES, check_like, parse_json, parse_torch, read_bytes
from minilora.training import optim, trainer_files
from minilora.training.config import TrainConfig
from minilora.training.loop import Timetable, Training, TrainState
from minilora.training.record import MANIFEST_NAME, Manifest, RunRecord, manifest_bytes
from minilora.training.rng import check_rng_state, mask_stream, rng_state, set_rng_state
from minilora.training.trainer_files import (
    OPTIMIZER_NAME,
    RNG_NAME,
    SCALER_NAME,
    SCHEDULER_NAME,
    STATE_NAME,
    TRAINING_ARGS_NAME,
)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
TORCH_FILES = (OPTIMIZER_NAME, SCHEDULER_NAME, RNG_NAME)
LARGEST = {STATE_NAME: trainer_files.MAX_STATE_BYTES}


@dataclass(frozen=True)
class Stored:
    """A checkpoint's parts, verified and parsed. A part that HF Trainer's lacks is None."""

    path: Path
    manifest: Manifest | None  # None where HF Trainer wrote the checkpoint
    adapter: peft_files.StoredAdapter
    progress: dict[str, Any]  # the contents of trainer_state.json
    optimizer: Any
    scheduler: Any
    generators: Any
    scaler: Any

    @property
    def record(self) -> RunRecord | None:
        """What the run began with; None where a loop of the user's own, or HF Trainer, has been."""
        return None if self.manifest is None else self.manifest.record

    def missing(self) -> list[str]:
        """Names of the files without which a resumed run would be another one."""
        parts = zip(TORCH_FILES, (self.optimizer, self.scheduler, self.generators), strict=True)
        return [name for name, part in parts if part is None]


def save_checkpoint(
    output_dir: str | Path, training: Training, record: RunRecord | None = None
) -> Path:
    """Write `output_dir/checkpoint-<global_step>` and return its path. After a crash at any moment
    it is complete or absent; an `OSError` (disk full, read-only) leaves nothing of it.

    Args:
        record: the run's arguments and inputs, with which `train` resumes it. A loop of your own
            needs none.
    """
    output_dir, state = Path(output_dir), training.state
    arguments = TrainConfig() if record is None else record.arguments
    files = peft_files.adapter_files(training.model)
    files[OPTIMIZER_NAME] = _torch_bytes(training.optimizer.state_dict())
    files[SCHEDULER_NAME] = _torch_bytes(training.scheduler.state_dict())
    if training.scaler.is_enabled():
        files[SCALER_NAME] = _torch_bytes(training.scaler.state_dict())
    files[RNG_NAME] = _torch_bytes(rng_state(training.model))
    batch_size = arguments.per_device_train_batch_size
    files[STATE_NAME] = trainer_files.progress_bytes(training, batch_size, output_dir)
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
    if stored.missing():
        raise MiniloraError(f"{path} lacks {', '.join(stored.missing())}")
    return restore(stored, training)


def read_checkpoint(path: str | Path) -> Stored:
    """Read a checkpoint once: each file's bytes are hashed, and parsed from memory."""
    path = Path(path)
    refuse_links(path)
    if is_trainer_checkpoint(path):
        return _read_trainers(path)
    file = path / MANIFEST_NAME
    if not file.is_file():
        raise MiniloraError(
            f"{path} has no {MANIFEST_NAME} and no {TRAINING_ARGS_NAME}: it is incomplete or not a "
            "checkpoint"
        )
    manifest = Manifest.parse(read_bytes(file, MAX_JSON_BYTES), file)
    step = manifest.state["global_step"]
    if CHECKPOINT.fullmatch(path.name) and path.name != f"checkpoint-{step}":
        raise MiniloraError(
            f"{path} holds step {step}: it was renamed; call it checkpoint-{step} again"
        )
    contents = {name: read_bytes(path / name) for name in manifest.files}
    for name, data in contents.items():
        manifest.check(data, path / name)
    return _parsed(path, contents, manifest)


def restore(stored: Stored, training: Training) -> TrainState:
    """Put a stored checkpoint's parts back, the random generators last. Everything is checked
    before anything is changed. What HF Trainer's lacks begins anew, and the run is marked inexact.
    """
    state = _checked_state(stored, training)
    peft_files.assign_adapter(training.model, stored.adapter)
    if stored.optimizer is not None:
        training.optimizer.load_state_dict(stored.optimizer)
    if stored.scheduler is not None:
        training.scheduler.load_state_dict(stored.scheduler)
    if training.scaler.is_enabled():
        training.scaler.load_state_dict(stored.scaler)
    stream = mask_stream(training.model)
    if stored.manifest is None and stream is not None:
        # Trainer knows nothing of our masks: from here on they are a function of (seed, step).
        stream.restart(state.global_step)
    if stored.generators is not None:
        set_rng_state(stored.generators, training.model)
    training.state = state
    return state


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint of ours with the highest step that verifies, or None. Changes nothing."""
    for path in sorted_checkpoints(output_dir):
        try:
            if read_checkpoint(path).manifest is not None:
                return path
        except MiniloraError:
            continue
    return None


def sorted_checkpoints(output_dir: str | Path) -> list[Path]:
    """Directories (and links to some) named exactly checkpoint-<step>, the highest step first,
    whatever is in them: those that HF Trainer sees.
    """
    found = []
    if Path(output_dir).is_dir():
        for entry in Path(output_dir).iterdir():
            match = CHECKPOINT.fullmatch(entry.name)
            if match and entry.is_dir():
                found.append((int(match.group(1)), entry))
    return [path for _, path in sorted(found, reverse=True)]


def is_trainer_checkpoint(path: Path) -> bool:
    """Whether HF Trainer wrote this checkpoint. Its files are not synced: after a crash one may be
    there and empty.
    """
    arguments = path / TRAINING_ARGS_NAME
    is_there = arguments.is_file() and arguments.stat().st_size > 0
    return is_there and not (path / MANIFEST_NAME).exists()


def refuse_links(checkpoint: Path) -> None:
    """Refuse a checkpoint in which anything is a symbolic link: what it points to belongs to
    somebody else, and may change.
    """
    if not checkpoint.is_dir():
        raise MiniloraError(f"{checkpoint} is not a directory: give a checkpoint")
    for entry in [checkpoint, *checkpoint.iterdir()]:
        if entry.is_symlink():
            raise MiniloraError(f"{entry} is a symbolic link: a checkpoint holds its own files")


def _read_trainers(path: Path) -> Stored:
    names = (STATE_NAME, *TORCH_FILES, SCALER_NAME)
    present = [name for name in names if (path / name).is_file() and (path / name).stat().st_size]
    if STATE_NAME not in present:
        raise MiniloraError(f"{path} lacks {STATE_NAME}: HF Trainer was stopped while writing it")
    contents = {name: read_bytes(path / name, LARGEST.get(name)) for name in present}
    return _parsed(path, contents, None)


def _parsed(path: Path, contents: dict[str, bytes], manifest: Manifest | None) -> Stored:
    progress = parse_json(contents[STATE_NAME], path / STATE_NAME)
    trainer_files.check_progress(progress, path / STATE_NAME)
    parts = {
        name: parse_torch(contents[name], path / name, trainer_files.NUMPY_GLOBALS)
        for name in (*TORCH_FILES, SCALER_NAME)
        if name in contents
    }
    if RNG_NAME in parts:
        check_rng_state(parts[RNG_NAME], path / RNG_NAME)
    if manifest is None:
        adapter = peft_files.read_adapter(path)
    else:
        config, weights = contents[peft_files.CONFIG_NAME], contents[peft_files.WEIGHTS_NAME]
        adapter = peft_files.parse_adapter(path, config, weights)
    named = (parts.get(name) for name in (*TORCH_FILES, SCALER_NAME))
    return Stored(path, manifest, adapter, progress, *named)


def _checked_state(stored: Stored, training: Training) -> TrainState:
    """The state that is stored, everything else checked against what it is to be restored into."""
    path, is_trainers = stored.path, stored.manifest is None
    peft_files.check_adapter(training.model, stored.adapter)
    if stored.optimizer is not None:
        optim.check_optimizer(training.optimizer, stored.optimizer, path / OPTIMIZER_NAME)
        if is_trainers:
            optim.check_every_moment(training.optimizer, stored.optimizer, path / OPTIMIZER_NAME)
    if stored.scheduler is not None:
        optim.check_scheduler(training.scheduler, stored.scheduler, path / SCHEDULER_NAME)
        if is_trainers:
            optim.check_schedule_agrees(training.scheduler, stored.scheduler, path / SCHEDULER_NAME)
    if training.scaler.is_enabled():
        if stored.scaler is None:
            raise MiniloraError(f"{path} has no {SCALER_NAME}: it is of a run that was not float16")
        check_like(training.scaler.state_dict(), stored.scaler, path / SCALER_NAME)
    log_history = stored.progress["log_history"]
    if stored.manifest is None:
        state = trainer_files.state_of_progress(
            stored.progress, training.timetable, path / STATE_NAME
        )
        if stored.missing() or mask_stream(training.model) is not None:
            state.inexact_from = state.global_step
    else:
        state = TrainState(**stored.manifest.state, log_history=log_history)
        _check_position(state, training.timetable, path)
    return state


def _check_position(state: TrainState, timetable: Timetable, path: Path) -> None:
    """Refuse a position that is none in this data: skipping to it would find nothing, for ever."""
    length = timetable.steps_per_epoch
    is_whole = state.global_step == state.epoch * length + state.step_in_epoch
    if timetable.max_steps > 0 and not (is_whole and state.step_in_epoch <= length):
        raise MiniloraError(
            f"{path} stands at step {state.step_in_epoch} of epoch {state.epoch} and step "
            f"{state.global_step} in all, where an epoch has {length}: it was edited"
        )


def _torch_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
