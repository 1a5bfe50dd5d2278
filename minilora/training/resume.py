"""What a resume may change, what it must find unchanged, and where it begins."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from minilora.errors import MiniloraError
from minilora.lora.adapter_files import read_config
from minilora.lora.config import LoraConfig, config_from_dict
from minilora.training.checkpoint import (
    is_trainer_checkpoint,
    load_checkpoint,
    load_trainer_checkpoint,
)
from minilora.training.config import (
    TrainConfig,
    reconcile,
    refuse_bending,
    train_config_from_dict,
)
from minilora.training.loop import Cadence, TrainState
from minilora.training.manifest import environment, verify
from minilora.training.progress import say
from minilora.training.run import ResumePoint, clear_way, write_run
from minilora.training.trainer_files import recorded_arguments

# Parts of the environment on which bit-exactness depends; the others are recorded for the reader.
EXACTNESS = ("torch", "cpu_capability", "num_threads", "cuda")


def resumed_arguments(
    point: ResumePoint, train_arguments: dict[str, Any], lora_arguments: dict[str, Any]
) -> tuple[TrainConfig, LoraConfig]:
    """The recorded arguments, with those applied that a resume may change.

    Where only HF Trainer has been, the arguments are the given ones, completed by what its files
    tell.

    Raises:
        MiniloraError: lists every given argument that would bend the run, old -> new.
    """
    place = str(point.checkpoint or point.output_dir)
    foreign = point.checkpoint is not None and is_trainer_checkpoint(point.checkpoint)
    told = recorded_arguments(point.checkpoint) if foreign and point.checkpoint else {}
    if point.run is None:
        assert point.checkpoint is not None
        lora_config = dataclasses.replace(read_config(point.checkpoint), inference_mode=False)
        config = TrainConfig(**{**told, **train_arguments})
    else:
        lora_config = config_from_dict(point.run["lora"], place)
        config = reconcile(train_config_from_dict(point.run["arguments"], place), train_arguments)
    bending = changes(lora_config, lora_arguments, ignored=("task_type",))
    if config.max_steps <= 0:
        told.pop("max_steps", None)  # counted in epochs here; the schedule's check compares them
    refuse_bending(bending + [f"{c} (in {place})" for c in changes(config, told)])
    return config, lora_config


def changes(
    config: TrainConfig | LoraConfig, values: dict[str, Any], ignored: tuple[str, ...] = ()
) -> list[str]:
    """ "name: old -> new" for each of `values` that `config` does not have."""
    return [
        f"{name}: {getattr(config, name)} -> {value}"
        for name, value in values.items()
        if value != getattr(config, name) and name not in ignored
    ]


def describe_run(
    config: TrainConfig,
    lora_config: LoraConfig,
    labels: list[str] | None,
    pairs: bool,
    data_sha256: dict[str, str],
    model_sha256: str,
    libraries: dict[str, str],
) -> dict[str, Any]:
    """What `run.json` and every checkpoint record: enough to rebuild the run, and to notice that it
    is another.
    """
    arguments = dataclasses.asdict(config)
    for name in ("train_file", "validation_file", "test_file", "model_name_or_path"):
        if arguments[name] is not None and Path(arguments[name]).exists():
            arguments[name] = str(Path(arguments[name]).resolve())
    # Where the run lies and what it was resumed from is known to whoever resumes it.
    arguments["output_dir"] = arguments["resume_from_checkpoint"] = None
    return {
        "arguments": arguments,
        "lora": dataclasses.asdict(lora_config),
        "labels": labels,
        "pairs": pairs,
        "data_sha256": data_sha256,
        "model_sha256": model_sha256,
        "environment": {**environment(), **libraries},
    }


def check_same_inputs(point: ResumePoint, run: dict[str, Any]) -> None:
    """Refuse to resume on another base model or on other data than the recorded.

    Raises:
        MiniloraError: lists what changed.
    """
    recorded = point.run
    if recorded is None:
        return  # Trainer records neither
    changed = [
        f"{part} file ({run['arguments'][f'{part}_file'] or 'packaged'})"
        for part, digest in recorded["data_sha256"].items()
        if run["data_sha256"].get(part) != digest
    ]
    if run["model_sha256"] != recorded["model_sha256"]:
        changed.append(
            f"base model or adapter ({run['arguments']['model_name_or_path'] or 'packaged'})"
        )
    if changed or run["labels"] != recorded["labels"]:
        raise MiniloraError(
            f"cannot resume {point.output_dir}: not what the run began with: {', '.join(changed) or 'the labels'}; "
            "restore it, or start a new run"
        )


def begin(
    config: TrainConfig,
    cadence: Cadence,
    output_dir: Path,
    run: dict[str, Any],
    point: ResumePoint | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    scaler: torch.amp.GradScaler,
) -> TrainState:
    """The state to train from: a checkpoint's, or a fresh one."""
    if point is None or point.run is None or point.checkpoint is None:
        write_run(output_dir, run)
    if point is None:
        return TrainState()
    if point.checkpoint is None:
        clear_way(point)  # whatever lies there was not fit to resume from
        return TrainState()
    if is_trainer_checkpoint(point.checkpoint):
        state = load_trainer_checkpoint(
            point.checkpoint,
            model,
            optimizer,
            scheduler,
            cadence,
            scaler,
            config.allow_inexact_resume,
        )
    else:
        warn_if_elsewhere(point.checkpoint)
        state = load_checkpoint(point.checkpoint, model, optimizer, scheduler, scaler)
    check_position(state, cadence, point.checkpoint)
    clear_way(point)
    say(f"resuming {point.checkpoint} at step {state.global_step}")
    return state


def check_position(state: TrainState, cadence: Cadence, checkpoint: Path) -> None:
    """Refuse a position that is none in this run's data: skipping to it would find nothing, for
    ever.

    Raises:
        MiniloraError: with both.
    """
    length = cadence.steps_per_epoch
    inside = state.step_in_epoch < length or (state.epoch_ends and state.step_in_epoch == length)
    if not inside or state.global_step != state.epoch * length + state.step_in_epoch:
        raise MiniloraError(
            f"{checkpoint} stands at step {state.step_in_epoch} of epoch {state.epoch} and step "
            f"{state.global_step} in all, where an epoch has {length}: it was edited"
        )


def warn_if_elsewhere(checkpoint: Path) -> None:
    """Say so where the machine or its libraries differ in what a run's bits depend on."""
    recorded, here = verify(checkpoint).environment, environment()
    for name in EXACTNESS:
        if recorded.get(name) != here[name]:
            say(
                f"warning: {name} was {recorded.get(name)} and is {here[name]}: the resume may not "
                "be bit-exact"
            )
