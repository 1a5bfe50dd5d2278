"""HF Trainer's checkpoint, written and read (transformers 5.23).

Written is only `trainer_state.json`, with exactly Trainer's keys (it refuses one it does not know,
and fails later without `stateful_callbacks`); the other files have Trainer's structure anyway.

Read strictly: Trainer itself resumes silently, and wrongly, without its optimizer, scheduler or
random state. `training_args.bin` is a pickle that can run code and is never opened; what it says is
learned from the other files, where they tell (`recorded_arguments`).
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy
import torch

from minilora.errors import MiniloraError
from minilora.reading import first_line, read_json, read_torch
from minilora.training.loop import Cadence, TrainState, epochs_done

STATE_NAME = "trainer_state.json"
OPTIMIZER_NAME = "optimizer.pt"
SCHEDULER_NAME = "scheduler.pt"
SCALER_NAME = "scaler.pt"
RNG_NAME = "rng_state.pth"
TRAINING_ARGS_NAME = "training_args.bin"
REQUIRED = (STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, RNG_NAME)

# What numpy's generator state is pickled with, and all that loading it may call.
NUMPY_GLOBALS = [
    numpy._core.multiarray._reconstruct,  # pyright: ignore[reportAttributeAccessIssue]
    numpy.ndarray,
    numpy.dtype,
    numpy.dtypes.UInt32DType,
]

# The log of a long run; 100 bytes a row.
MAX_STATE_BYTES = 100_000_000


def trainer_state(
    state: TrainState,
    cadence: Cadence,
    num_train_epochs: int,
    train_batch_size: int,
    best_checkpoint: str | None,
) -> bytes:
    """The bytes of `trainer_state.json`.

    Args:
        best_checkpoint: path of the best checkpoint, as Trainer records it.
    """
    values: dict[str, Any] = {
        "best_global_step": state.best_step,
        "best_metric": state.best_metric,
        "best_model_checkpoint": best_checkpoint,
        "epoch": epochs_done(state, cadence),
        "eval_steps": cadence.eval_steps or cadence.logging_steps,
        "global_step": state.global_step,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": state.log_history,
        "logging_steps": cadence.logging_steps,
        "max_steps": cadence.max_steps,
        "num_input_tokens_seen": 0,
        "num_train_epochs": num_train_epochs,
        "save_steps": cadence.save_steps or 500,
        "stateful_callbacks": {"TrainerControl": _control(state.global_step >= cadence.max_steps)},
        "total_flos": 0,
        "train_batch_size": train_batch_size,
        "trial_name": None,
        "trial_params": None,
    }
    return (json.dumps(values, indent=2) + "\n").encode()


def _control(finished: bool) -> dict[str, Any]:
    switches = {
        "should_epoch_stop": False,
        "should_evaluate": False,
        "should_log": False,
        "should_save": True,
        "should_training_stop": finished,
    }
    return {"args": switches, "attributes": {}}


def missing_parts(checkpoint: Path) -> list[str]:
    """Names of the files a resume needs and Trainer's checkpoint lacks (or has empty, as after a
    crash)."""
    return [
        name
        for name in REQUIRED
        if not (checkpoint / name).is_file() or (checkpoint / name).stat().st_size == 0
    ]


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """The contents of trainer_state.json, the parts we use checked for their types.

    Raises:
        MiniloraError: missing, damaged, or of the wrong types.
    """
    path = checkpoint / STATE_NAME
    values = read_json(path, MAX_STATE_BYTES)
    required = {
        "global_step": _is_count,
        "epoch": _is_number,
        "max_steps": _is_count,
        "log_history": _is_log,
    }
    optional = {"best_metric": _is_number, "best_global_step": _is_count}
    wrong = [name for name, is_right in required.items() if not is_right(values.get(name))]
    wrong += [
        name
        for name, is_right in optional.items()
        if values.get(name) is not None and not is_right(values[name])
    ]
    if wrong:
        raise MiniloraError(
            f"{path} is damaged: {', '.join(wrong)} is missing or of the wrong type"
        )
    return values


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _is_log(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        return False
    # Trainer's last row, of the whole run, has step and epoch, too.
    steps = all(_is_count(row.get("step")) for row in value)
    return steps and all(_is_number(row["loss"]) for row in value if "loss" in row)


def recorded_arguments(checkpoint: Path) -> dict[str, Any]:
    """The arguments of `TrainConfig` that Trainer's files tell, without opening training_args.bin.

    Raises:
        MiniloraError: a file is damaged.
    """
    found: dict[str, Any] = {}
    progress = read_progress(checkpoint)
    found["max_steps"] = progress["max_steps"]
    if _is_count(progress.get("train_batch_size")):
        found["per_device_train_batch_size"] = progress["train_batch_size"]
    missing = missing_parts(checkpoint)
    if OPTIMIZER_NAME not in missing:
        found |= _adamw_arguments(checkpoint)
    if RNG_NAME not in missing:
        # A generator's state begins with its seed; Trainer seeded this one.
        generator = torch.Generator()
        generator.set_state(read_rng(checkpoint)["cpu"])
        found["seed"] = generator.initial_seed()
    return found


def read_rng(checkpoint: Path) -> dict[str, Any]:
    """Trainer's random state, in the structure of `rng.rng_state`.

    Raises:
        MiniloraError: damaged, or not states that the generators can take.
    """
    path = checkpoint / RNG_NAME
    state = read_torch(path, NUMPY_GLOBALS)
    if not isinstance(state, dict) or {"python", "numpy", "cpu"} - set(state):
        raise MiniloraError(f"{path} does not hold the states of python, numpy and torch")
    try:  # on generators of no consequence: the run's own are untouched if one is refused
        version, keys, gauss_next = state["python"]
        random.Random().setstate((version, tuple(keys), gauss_next))
        numpy.random.RandomState().set_state(tuple(state["numpy"]))
        position = state["numpy"][2]
        if not 0 <= position <= 624:  # numpy does not check, and would read beyond its array
            raise ValueError(f"numpy's position is {position}")
        torch.Generator().set_state(state["cpu"])
        masks = state.get("mask_stream", torch.zeros(4, dtype=torch.int64))
        if masks.shape != (4,) or masks.dtype != torch.int64:
            raise ValueError("the state of a mask stream is four int64")
        if state.get("cuda") is not None and not isinstance(state["cuda"], torch.Tensor):
            raise ValueError("CUDA's state is no tensor")
    except Exception as error:  # each generator complains in its own way
        raise MiniloraError(f"{path} holds no generators' states: {first_line(error)}") from None
    return state


def progress_state(checkpoint: Path, cadence: Cadence) -> TrainState:
    """Where Trainer's run stood, as our `TrainState`.

    Trainer does not save the sum of losses since its last log row, nor does its resume make up for
    it; as there, the next row's mean begins at the checkpoint.

    Raises:
        MiniloraError: its step and epoch do not fit this run's data, batch size and accumulation.
    """
    progress = read_progress(checkpoint)
    step = progress["global_step"]
    state = TrainState(
        global_step=step,
        epoch=step // cadence.steps_per_epoch,
        step_in_epoch=step % cadence.steps_per_epoch,
        loss_total=_logged_losses(progress["log_history"]),
        logged_step=step,
        best_metric=progress.get("best_metric"),
        best_step=progress.get("best_global_step"),
        log_history=progress["log_history"],
    )
    if not math.isclose(epochs_done(state, cadence), progress["epoch"], abs_tol=1e-6):
        raise MiniloraError(
            f"{checkpoint / STATE_NAME}: step {step} is epoch {progress['epoch']:.4f} there and "
            f"{epochs_done(state, cadence):.4f} with this data, per_device_train_batch_size and "
            "gradient_accumulation_steps: give those of Trainer's run"
        )
    return state


def _adamw_arguments(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / OPTIMIZER_NAME
    try:
        group = read_torch(path, NUMPY_GLOBALS)["param_groups"][0]
        beta1, beta2 = group["betas"]
        learning_rate = group.get("initial_lr", group["lr"])
        values = [learning_rate, group["weight_decay"], beta1, beta2, group["eps"]]
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise MiniloraError(f"{path} is not AdamW's state: {error!r}") from None
    names = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    if not all(map(_is_number, values)):
        raise MiniloraError(f"{path} is not AdamW's state: {names} are {values}")
    return dict(zip(names, values, strict=True))


def _logged_losses(log_history: list[dict[str, Any]]) -> float:
    total, last = 0.0, 0
    for row in log_history:
        if "loss" in row and "step" in row:
            total, last = total + row["loss"] * (row["step"] - last), row["step"]
    return total
