"""What was read for the optimizer and the schedule, checked before either takes it.

torch checks the number of groups and parameters only: a moment of the wrong shape, or a text where
a number should be, would surface, if at all, at the first step.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.errors import MiniloraError

MOMENTS = ("exp_avg", "exp_avg_sq")
# What AdamW does with these is another algorithm, which keeps other states.
SWITCHES = ("amsgrad", "maximize", "capturable", "differentiable")


def check_optimizer(optimizer: torch.optim.Optimizer, loaded: Any, place: Path) -> None:
    """Refuse an optimizer state that is not of this optimizer's groups and parameter shapes.

    Raises:
        MiniloraError: names the first difference.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not (
        isinstance(loaded, dict)
        and isinstance(loaded.get("state"), dict)
        and isinstance(loaded.get("param_groups"), list)
        and all(_is_group(group) for group in loaded["param_groups"])
    ):
        raise MiniloraError(f"{place} is not an optimizer's state")
    ours = [len(group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in loaded["param_groups"]]
    if ours != theirs:
        raise MiniloraError(
            f"{place} has parameter groups of sizes {theirs}, this run {ours}: it is of another run"
        )
    if [i for group in loaded["param_groups"] for i in group["params"]] != [
        *range(len(parameters))
    ]:
        raise MiniloraError(f"{place}: its groups do not number the parameters in order")
    for group, other in zip(optimizer.param_groups, loaded["param_groups"], strict=True):
        for name in group.keys() - {"params"}:
            _check_setting(name, group[name], other.get(name, group[name]), place)
    for index, values in loaded["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters):
            raise MiniloraError(f"{place} has a state of parameter {index!r}, which there is not")
        _check_moments(index, values, parameters[index], place)


def check_every_moment(optimizer: torch.optim.Optimizer, loaded: Any, place: Path) -> None:
    """Refuse a state, already checked, that lacks a parameter: its moments would begin anew.

    Raises:
        MiniloraError: says of how many it holds none.
    """
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    missing = count - len(loaded["state"])
    if missing:
        raise MiniloraError(f"{place} holds no moments of {missing} of the {count} parameters")


def check_scheduler(
    scheduler: torch.optim.lr_scheduler.LRScheduler, loaded: Any, place: Path
) -> None:
    """Refuse what is not a schedule's state, of as many groups as this one's.

    Raises:
        MiniloraError: names what is missing or of the wrong type.
    """
    if not isinstance(loaded, dict):
        raise MiniloraError(f"{place} is not a schedule's state")
    ours = scheduler.state_dict()
    for name, value in ours.items():
        if name not in loaded and name in ("last_epoch", "_last_lr", "base_lrs"):
            raise MiniloraError(f"{place} is not a schedule's state: it has no {name}")
        if not _same_kind(value, loaded.get(name, value)):
            raise MiniloraError(f"{place}: {name} is {loaded[name]!r}, which no schedule's is")


def check_schedule_agrees(
    scheduler: torch.optim.lr_scheduler.LRScheduler, loaded: dict[str, Any], place: Path
) -> None:
    """Refuse a schedule, already checked, that is elsewhere at its step than this run's would be:
    another lr_scheduler_type, warmup, learning rate or length.

    Raises:
        MiniloraError: with both learning rates.
    """
    assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
    step, theirs = loaded["last_epoch"], loaded["_last_lr"][0]
    ours = scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step)
    if ours != theirs:
        raise MiniloraError(
            f"{place}: the learning rate after step {step} is {theirs} there and {ours} with this "
            "run's learning_rate, lr_scheduler_type, warmup_steps and max_steps: give Trainer's"
        )


def _is_group(group: Any) -> bool:
    return isinstance(group, dict) and isinstance(group.get("params"), list) and "lr" in group


def _check_setting(name: str, ours: Any, theirs: Any, place: Path) -> None:
    if name in SWITCHES and ours != theirs:
        raise MiniloraError(f"{place}: {name} is {theirs!r} there and {ours!r} here")
    # foreach and fused are None where torch is to choose.
    if not (
        _same_kind(ours, theirs) or (name in ("foreach", "fused") and theirs in (None, True, False))
    ):
        raise MiniloraError(f"{place}: {name} is {theirs!r}, which AdamW cannot use")


def _check_moments(index: int, values: Any, parameter: Tensor, place: Path) -> None:
    if not isinstance(values, dict) or {"step", *MOMENTS} - values.keys():
        raise MiniloraError(f"{place}: the state of parameter {index} is not AdamW's")
    for name, shape in {"step": (), **dict.fromkeys(MOMENTS, tuple(parameter.shape))}.items():
        found = values[name]
        if not isinstance(found, Tensor) or not found.is_floating_point():
            raise MiniloraError(f"{place}: {name} of parameter {index} is no floating-point tensor")
        if tuple(found.shape) != shape:
            raise MiniloraError(
                f"{place}: {name} of parameter {index} has shape {tuple(found.shape)}, this run's {shape}"
            )


def _same_kind(ours: Any, theirs: Any) -> bool:
    """Whether two values have the same type, item by item; int and float are both numbers, and an
    int that a float cannot hold is none.
    """
    if type(ours) in (int, float):
        return type(theirs) is float or (type(theirs) is int and abs(theirs) < 2**63)
    if isinstance(ours, (list, tuple)):
        return (
            type(theirs) is type(ours)
            and len(theirs) == len(ours)
            and all(map(_same_kind, ours, theirs))
        )
    return type(ours) is type(theirs)
