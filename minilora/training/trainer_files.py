"""HF Trainer's checkpoint: its names, its progress file, what it tells (transformers 5.23).

Trainer's files are read strictly: Trainer itself resumes silently, and wrongly, without its
optimizer, scheduler or random state. `training_args.bin` is a pickle that can run code and is never
opened; what it says is learned from the other files, where they tell.
"""

import json
import math
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import torch

from minilora.errors import MiniloraError
from minilora.reading import check_like
from minilora.training.config import TrainConfig
from minilora.training.loop import Timetable, Training, TrainState, epochs_done

STATE_NAME = "trainer_state.json"
OPTIMIZER_NAME = "optimizer.pt"
SCHEDULER_NAME = "scheduler.pt"
SCALER_NAME = "scaler.pt"
REQUIRED = (OPTIMIZER_NAME, SCHEDULER_NAME)  # beside generators, or the resumed run is another one
RNG_NAME = "rng_state.pth"
TRAINING_ARGS_NAME = "training_args.bin"
GENERATORS = re.compile(r"rng_state(_(\d+))?\.pth")  # of several processes, by rank

# What numpy's generator state is pickled with, and all that loading it may call.
NUMPY_GLOBALS = (
    numpy._core.multiarray._reconstruct,  # pyright: ignore[reportAttributeAccessIssue]
    numpy.ndarray,
    numpy.dtype,
    numpy.dtypes.UInt32DType,
)

# The log of a long run; 100 bytes a row.
MAX_STATE_BYTES = 100_000_000

# Trainer's default, which it wants to see where nothing is due by steps.
UNUSED_STEPS = 500

PROGRESS = {"global_step": int, "epoch": float, "max_steps": int, "log_history": list[dict]}
BEST = {"best_metric": float | None, "best_global_step": int | None}


def progress_bytes(training: Training, arguments: TrainConfig, output_dir: Path) -> bytes:
    """The contents of `trainer_state.json`, with exactly Trainer's keys: it refuses one it does not
    know, and fails later without `stateful_callbacks`, those of early stopping included.
    """
    state, timetable = training.state, training.timetable
    place = output_dir.resolve()  # as a resume knows it
    best = None if state.best_step is None else str(place / f"checkpoint-{state.best_step}")
    control = {
        "should_epoch_stop": False,
        "should_evaluate": False,
        "should_log": False,
        "should_save": True,
        "should_training_stop": 0 < timetable.max_steps <= state.global_step,
    }
    callbacks: dict[str, Any] = {"TrainerControl": {"args": control, "attributes": {}}}
    if (patience := arguments.early_stopping_patience) is not None:
        asked = {"early_stopping_patience": patience, "early_stopping_threshold": 0.0}
        counted = {"early_stopping_patience_counter": state.evaluations_since_best}
        callbacks["EarlyStoppingCallback"] = {"args": asked, "attributes": counted}
    values = {
        "best_global_step": state.best_step,
        "best_metric": state.best_metric,
        "best_model_checkpoint": best,
        "epoch": epochs_done(state, timetable),
        "eval_steps": timetable.eval_steps or timetable.logging_steps or UNUSED_STEPS,
        "global_step": state.global_step,
        "log_history": state.log_history,
        "logging_steps": timetable.logging_steps or UNUSED_STEPS,
        "max_steps": timetable.max_steps or state.global_step,
        "num_train_epochs": math.ceil(timetable.max_steps / timetable.steps_per_epoch),
        "save_steps": timetable.save_steps or UNUSED_STEPS,
        "stateful_callbacks": callbacks,
        "train_batch_size": arguments.per_device_train_batch_size,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "num_input_tokens_seen": 0,
        "total_flos": 0,
        "trial_name": None,
        "trial_params": None,
    }
    return (json.dumps(values, indent=2) + "\n").encode()


def check_progress(values: dict[str, Any], place: Path) -> None:
    """Refuse contents of trainer_state.json whose parts we use are missing or of other types."""
    check_like(PROGRESS | BEST, dict.fromkeys(BEST) | values, place)
    counts = ("global_step", "max_steps", "best_global_step")
    if any((values.get(name) or 0) < 0 for name in counts):
        raise MiniloraError(f"{place} is damaged: one of {', '.join(counts)} is negative")
    for row in values["log_history"]:  # Trainer's last row, of the whole run, has a step, too
        check_like({"step": int, **({"loss": float} if "loss" in row else {})}, row, place, "a row")


def state_of_progress(progress: dict[str, Any], timetable: Timetable, place: Path) -> TrainState:
    """Where Trainer's run stood, as our `TrainState`.

    Trainer does not save the sum of losses since its last log row, nor does its resume make up for
    it; as there, the next row's mean begins at the checkpoint.
    """
    step, log_history = progress["global_step"], progress["log_history"]
    if timetable.max_steps == 0:
        raise MiniloraError(f"{place} counts its position in epochs: give Training a timetable")
    rows = [{"step": 0}, *(row for row in log_history if "loss" in row)]
    evaluated = [row["step"] for row in log_history if "eval_loss" in row]
    best_step, length = progress.get("best_global_step"), timetable.steps_per_epoch
    # Saved by steps as an epoch ended, it stands before the evaluation that was due there.
    is_pending = timetable.eval_each_epoch and step % length == 0 < step and step not in evaluated
    sums = (row["loss"] * (row["step"] - last["step"]) for last, row in pairwise(rows))
    state = TrainState(
        global_step=step,
        epoch=step // length - is_pending,
        step_in_epoch=length if is_pending else step % length,
        loss_total=sum(sums, 0.0),
        logged_step=step,
        best_metric=progress.get("best_metric"),
        best_step=best_step,
        evaluations_since_best=sum(at > best_step for at in evaluated) if best_step else 0,
        log_history=log_history,
    )
    here = epochs_done(state, timetable)
    if not math.isclose(here, progress["epoch"], abs_tol=1e-6):
        differ = f"step {step} is epoch {progress['epoch']:.4f} there and {here:.4f} here"
        advice = "give Trainer's data, per_device_train_batch_size, gradient_accumulation_steps"
        raise MiniloraError(f"{place}: {differ}: {advice}")
    return state


def generators_in(names: Iterable[str]) -> list[str]:
    """Those among the names of files that hold generators' states, by rank."""
    matches = [found for found in map(GENERATORS.fullmatch, names) if found]
    return [found[0] for found in sorted(matches, key=lambda found: int(found[2] or 0))]


def generators_name(rank: int, world_size: int) -> str:
    """The file of a process's generators' states."""
    return RNG_NAME if world_size == 1 else f"rng_state_{rank}.pth"


def recorded_arguments(
    progress: dict[str, Any], parts: dict[str, Any], place: Path
) -> dict[str, Any]:
    """The arguments of `TrainConfig` that the contents of Trainer's files in `place` tell."""
    found: dict[str, Any] = {"max_steps": progress["max_steps"]}
    if type(progress.get("train_batch_size")) is int and progress["train_batch_size"] > 0:
        found["per_device_train_batch_size"] = progress["train_batch_size"]
    if OPTIMIZER_NAME in parts:
        numbers = {"initial_lr": float, "weight_decay": float, "betas": (0.0, 0.0), "eps": float}
        optimizer = parts[OPTIMIZER_NAME]
        check_like({"param_groups": [numbers, dict]}, optimizer, place / OPTIMIZER_NAME)
        group = optimizer["param_groups"][0]
        found |= {"learning_rate": group["initial_lr"], "weight_decay": group["weight_decay"]}
        found["adam_beta1"], found["adam_beta2"] = group["betas"]
        found["adam_epsilon"] = group["eps"]
    if generators := generators_in(parts):
        # A generator's state begins with its seed; Trainer seeded these.
        generator = torch.Generator()
        generator.set_state(parts[generators[0]]["cpu"])
        found["seed"] = generator.initial_seed()
    return found
