"""A checkpoint directory, complete or absent, and what proves it.

    checkpoint-<step>/
      adapter_model.safetensors  adapter_config.json    the adapter, as PEFT writes it
      optimizer.pt  scheduler.pt                        torch state dicts; load with weights_only=True
      rng_state.pth                                     every generator's state; the same
      scaler.pt                                         with float16: the loss scale
      trainer_state.json                                HF Trainer's progress and log
      minilora.json                                     written last: `TrainState`, the run's arguments, what it ran
                                                        on, and size and SHA-256 of every other file
                                                        and of itself

HF Trainer resumes from the first six, minilora from all seven. Reading verifies every hash before
it parses anything, so that a flipped bit, a truncated or a swapped file is an error that names the
file, and never a wrong run.
"""

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.durable import commit_directory, make_directory, remove_directory
from minilora.errors import MiniloraError
from minilora.lora.adapter_files import (
    WEIGHTS_NAME,
    adapter_files,
    assign_tensors,
    check_same_adapter,
    read_config,
    read_tensors,
)
from minilora.lora.inject import adapters_of
from minilora.reading import read_torch
from minilora.training.loop import Cadence, TrainState
from minilora.training.manifest import CHECKPOINT, MANIFEST_NAME, manifest_bytes, verify
from minilora.training.optimizer_state import (
    check_every_moment,
    check_optimizer,
    check_schedule_agrees,
    check_scheduler,
)
from minilora.training.rng import mask_stream, rng_state, set_rng_state
from minilora.training.trainer_files import (
    NUMPY_GLOBALS,
    OPTIMIZER_NAME,
    RNG_NAME,
    SCALER_NAME,
    SCHEDULER_NAME,
    STATE_NAME,
    TRAINING_ARGS_NAME,
    missing_parts,
    progress_state,
    read_progress,
    read_rng,
)


def save_checkpoint(
    output_dir: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    state: TrainState,
    trainer_state: bytes,
    run: dict[str, Any] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    adapter_name: str = "default",
) -> Path:
    """Write `output_dir/checkpoint-<global_step>` and return its path. After a crash at any moment
    it is complete or absent.

    Args:
        trainer_state: the contents of trainer_state.json (`trainer_files.trainer_state`).
        run: anything JSON that a resume needs to rebuild the run; kept as it is.

    Raises:
        OSError: the disk is full or the directory cannot be written; nothing has changed then.
    """
    files = adapter_files(model, adapter_name)
    files[OPTIMIZER_NAME] = _torch_bytes(optimizer.state_dict())
    files[SCHEDULER_NAME] = _torch_bytes(scheduler.state_dict())
    if scaler is not None and scaler.is_enabled():
        files[SCALER_NAME] = _torch_bytes(scaler.state_dict())
    files[RNG_NAME] = _torch_bytes(rng_state(model))
    files[STATE_NAME] = trainer_state
    files[MANIFEST_NAME] = manifest_bytes(state, run or {}, files)
    path = Path(output_dir) / f"checkpoint-{state.global_step}"
    make_directory(path.parent)
    commit_directory(path, files)
    return path


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler | None = None,
    adapter_name: str = "default",
) -> TrainState:
    """Put everything back as it was when the checkpoint was saved, the random generators last.

    The model must carry the same adapter (its values are overwritten); optimizer and scheduler must
    be built over it.

    Raises:
        MiniloraError: a file is missing, damaged or of another run. Generators and optimizer are
            untouched then.
    """
    path = Path(path)
    manifest = verify(path)
    check_same_adapter(adapters_of(model).configs[adapter_name], read_config(path), path)
    optimizer_state = read_torch(path / OPTIMIZER_NAME, NUMPY_GLOBALS)
    scheduler_state = read_torch(path / SCHEDULER_NAME, NUMPY_GLOBALS)
    scaler_state = _read_scaler(path, scaler)
    generators = read_rng(path)
    state = TrainState(**manifest.state, log_history=read_progress(path)["log_history"])
    check_optimizer(optimizer, optimizer_state, path / OPTIMIZER_NAME)
    check_scheduler(scheduler, scheduler_state, path / SCHEDULER_NAME)
    assign_tensors(model, read_tensors(path), adapter_name, path / WEIGHTS_NAME)
    optimizer.load_state_dict(optimizer_state)
    scheduler.load_state_dict(scheduler_state)
    if scaler is not None and scaler_state is not None:
        scaler.load_state_dict(scaler_state)
    set_rng_state(generators, model)
    return state


def load_trainer_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    cadence: Cadence,
    scaler: torch.amp.GradScaler | None = None,
    allow_inexact: bool = False,
    adapter_name: str = "default",
) -> TrainState:
    """The same for a checkpoint that HF Trainer wrote for a PEFT model, in Trainer's order.

    Args:
        cadence: this run's, against which Trainer's position is checked.
        allow_inexact: go on without a missing optimizer, scheduler or random state. The run is
            marked as inexact from there.

    Raises:
        MiniloraError: a part is missing, damaged, or of a run with other arguments.
    """
    path = Path(path)
    refuse_links(path)
    missing = missing_parts(path)
    if missing and (not allow_inexact or STATE_NAME in missing):
        raise MiniloraError(
            f"{path} lacks {', '.join(missing)}: the resumed run would be another one"
            + ("" if STATE_NAME in missing else " (--allow_inexact_resume goes on all the same)")
        )
    check_same_adapter(adapters_of(model).configs[adapter_name], read_config(path), path)
    tensors = read_tensors(path)
    state = progress_state(path, cadence)
    state.inexact_from = state.global_step if missing else None
    scaler_state = _read_scaler(path, scaler)
    optimizer_state = scheduler_state = generators = None
    if OPTIMIZER_NAME not in missing:
        optimizer_state = read_torch(path / OPTIMIZER_NAME, NUMPY_GLOBALS)
        check_optimizer(optimizer, optimizer_state, path / OPTIMIZER_NAME)
        check_every_moment(optimizer, optimizer_state, path / OPTIMIZER_NAME)
    if SCHEDULER_NAME not in missing:
        scheduler_state = read_torch(path / SCHEDULER_NAME, NUMPY_GLOBALS)
        check_scheduler(scheduler, scheduler_state, path / SCHEDULER_NAME)
        check_schedule_agrees(scheduler, scheduler_state, path / SCHEDULER_NAME)
    if RNG_NAME not in missing:
        generators = read_rng(path)
    assign_tensors(model, tensors, adapter_name, path / WEIGHTS_NAME)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    if scheduler_state is not None:
        scheduler.load_state_dict(scheduler_state)
    if scaler is not None and scaler_state is not None:
        scaler.load_state_dict(scaler_state)
    stream = mask_stream(model)
    if stream is not None:
        # Trainer knows nothing of our masks: from here on they are a function of (seed, step).
        stream.restart(state.global_step)
        state.inexact_from = state.global_step
    if generators is not None:
        set_rng_state(generators, model)
    return state


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint with the highest step that verifies, or None. Changes nothing."""
    for path in sorted_checkpoints(output_dir):
        try:
            verify(path)
        except MiniloraError:
            continue
        return path
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


def rotate_checkpoints(output_dir: str | Path, limit: int, best_step: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, never the newest and never the best."""
    checkpoints = [path for path in sorted_checkpoints(output_dir) if not path.is_symlink()]
    protected = {checkpoints[0].name, f"checkpoint-{best_step}"} if checkpoints else set()
    removable = [path for path in checkpoints if path.name not in protected]
    excess = len(checkpoints) - max(limit, len(checkpoints) - len(removable))
    for path in removable[len(removable) - excess :] if excess > 0 else []:
        remove_directory(path)


def refuse_links(checkpoint: Path) -> None:
    """Refuse a checkpoint in which anything is a symbolic link: what it points to belongs to
    somebody else, and may change.

    Raises:
        MiniloraError: names the link.
    """
    for entry in [checkpoint, *checkpoint.iterdir()]:
        if entry.is_symlink():
            raise MiniloraError(f"{entry} is a symbolic link: a checkpoint holds its own files")


def is_trainer_checkpoint(path: Path) -> bool:
    """Whether a directory is a checkpoint that HF Trainer wrote, complete or not."""
    return not (path / MANIFEST_NAME).exists() and (path / TRAINING_ARGS_NAME).exists()


def _read_scaler(path: Path, scaler: torch.amp.GradScaler | None) -> dict[str, Any] | None:
    if scaler is None or not scaler.is_enabled():
        return None
    if not (path / SCALER_NAME).is_file():
        raise MiniloraError(f"{path} has no {SCALER_NAME}: it is of a run that was not float16")
    state = read_torch(path / SCALER_NAME, [])
    numbers = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
    if not isinstance(state, dict) or not all(
        type(state.get(name)) in (int, float) for name in numbers
    ):
        raise MiniloraError(f"{path / SCALER_NAME} is not a loss scaler's state")
    return state


def _torch_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
