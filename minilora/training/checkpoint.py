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
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.durable import commit_directory, remove_directory
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
from minilora.training.loop import Cadence, TrainState
from minilora.training.manifest import MANIFEST_NAME, manifest_bytes, verify
from minilora.training.rng import mask_stream, rng_state, set_rng_state
from minilora.training.trainer_files import (
    OPTIMIZER_NAME,
    RNG_NAME,
    SCALER_NAME,
    SCHEDULER_NAME,
    STATE_NAME,
    TRAINING_ARGS_NAME,
    missing_parts,
    progress_state,
    read_rng,
    read_torch,
)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")


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
    path.parent.mkdir(parents=True, exist_ok=True)
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
    optimizer_state = read_torch(path / OPTIMIZER_NAME)
    scheduler_state = read_torch(path / SCHEDULER_NAME)
    scaler_state = _read_scaler(path, scaler)
    generators = read_rng(path)
    check_optimizer(optimizer, optimizer_state, path / OPTIMIZER_NAME)
    assign_tensors(model, read_tensors(path), adapter_name, path / WEIGHTS_NAME)
    optimizer.load_state_dict(optimizer_state)
    scheduler.load_state_dict(scheduler_state)
    if scaler is not None and scaler_state is not None:
        scaler.load_state_dict(scaler_state)
    log_history = json.loads((path / STATE_NAME).read_bytes())["log_history"]
    state = TrainState(**manifest.state, log_history=log_history)
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
    optimizer_state = None if OPTIMIZER_NAME in missing else read_torch(path / OPTIMIZER_NAME)
    scheduler_state = None if SCHEDULER_NAME in missing else read_torch(path / SCHEDULER_NAME)
    scaler_state = _read_scaler(path, scaler)
    generators = None if RNG_NAME in missing else read_rng(path)
    if optimizer_state is not None:
        check_optimizer(optimizer, optimizer_state, path / OPTIMIZER_NAME)
    if scheduler_state is not None:
        check_scheduler(scheduler, scheduler_state, path / SCHEDULER_NAME)
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
    """Directories named exactly checkpoint-<step>, the highest step first, whatever is in them."""
    found = []
    if Path(output_dir).is_dir():
        for entry in Path(output_dir).iterdir():
            match = CHECKPOINT.fullmatch(entry.name)
            if match and entry.is_dir() and not entry.is_symlink():
                found.append((int(match.group(1)), entry))
    return [path for _, path in sorted(found, reverse=True)]


def rotate_checkpoints(output_dir: str | Path, limit: int, best_step: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, never the newest and never the best."""
    checkpoints = sorted_checkpoints(output_dir)
    protected = {checkpoints[0].name, f"checkpoint-{best_step}"} if checkpoints else set()
    removable = [path for path in checkpoints if path.name not in protected]
    excess = len(checkpoints) - max(limit, len(checkpoints) - len(removable))
    for path in removable[len(removable) - excess :] if excess > 0 else []:
        remove_directory(path)


def check_optimizer(optimizer: torch.optim.Optimizer, loaded: Any, place: Path) -> None:
    """Refuse an optimizer state that is not of this optimizer's groups and parameter shapes.

    torch itself checks the number of groups and parameters only; a moment of the wrong shape would
    surface, if at all, as a broadcasting error at the first step.

    Raises:
        MiniloraError: names the first difference.
    """
    if not isinstance(loaded, dict) or {"state", "param_groups"} - set(loaded):
        raise MiniloraError(f"{place} is not an optimizer's state")
    ours = [len(group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in loaded["param_groups"]]
    if ours != theirs:
        raise MiniloraError(
            f"{place} has parameter groups of sizes {theirs}, this run {ours}: it is of another run"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in loaded["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            shape = tuple(values[name].shape)
            if shape != tuple(parameters[index].shape):
                raise MiniloraError(
                    f"{place}: {name} of parameter {index} has shape {shape}, this run's {tuple(parameters[index].shape)}"
                )


def check_scheduler(
    scheduler: torch.optim.lr_scheduler.LRScheduler, loaded: Any, place: Path
) -> None:
    """Refuse a schedule that is elsewhere at its step than this run's would be: another
    lr_scheduler_type, warmup, learning rate or length.

    Raises:
        MiniloraError: with both learning rates.
    """
    assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
    try:
        step, theirs = loaded["last_epoch"], loaded["_last_lr"][0]
        ours = scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step)
    except (KeyError, TypeError, IndexError) as error:
        raise MiniloraError(f"{place} is not a schedule's state: {error!r}") from None
    if ours != theirs:
        raise MiniloraError(
            f"{place}: the learning rate after step {step} is {theirs} there and {ours} with this "
            "run's learning_rate, lr_scheduler_type, warmup_steps and max_steps: give Trainer's"
        )


def is_trainer_checkpoint(path: Path) -> bool:
    """Whether a directory is a checkpoint that HF Trainer wrote, complete or not."""
    return not (path / MANIFEST_NAME).exists() and (path / TRAINING_ARGS_NAME).exists()


def _read_scaler(path: Path, scaler: torch.amp.GradScaler | None) -> dict[str, Any] | None:
    if scaler is None or not scaler.is_enabled():
        return None
    if not (path / SCALER_NAME).is_file():
        raise MiniloraError(f"{path} has no {SCALER_NAME}: it is of a run that was not float16")
    return read_torch(path / SCALER_NAME)


def _torch_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
