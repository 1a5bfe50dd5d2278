"""AdamW over what is trainable, the course of its learning rate, and what was read for them."""

import functools
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from minilora.errors import MiniloraError
from minilora.reading import check_like
from minilora.training.config import TrainConfig

# transformers 5.23 `Trainer.get_decay_parameter_names`: biases and normalisation layers are not
# decayed.
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")

# What AdamW does with these is another algorithm, which keeps other states.
SWITCHES = ("amsgrad", "maximize", "capturable", "differentiable")


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) with HF Trainer's two groups: decayed first, then not decayed.

    Both groups exist even when one is empty: a checkpoint of Trainer's names its groups by
    position. `fused` is Trainer's default and not a matter of speed alone, for its rounding differs
    from the unfused loop's.
    """
    inside_norm = {
        f"{name}.{child}" if name else child
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for child, _ in module.named_parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = name in inside_norm or NO_DECAY.search(name.lower())
            (not_decayed if exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True
    )


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, max_steps: int
) -> LambdaLR:
    """The learning rate as a share of its peak, stepped once per optimizer step of `max_steps`.

    A `functools.partial` rather than a closure: LambdaLR stores a partial as `{}` and a closure as
    None, and Trainer's files hold the former.
    """
    # A fraction is a share of the run, rounded up, as in transformers 5.
    share = config.warmup_steps
    warmup = math.ceil(max_steps * share) if share < 1 else int(share)
    course = {
        "linear": functools.partial(_linear, warmup=warmup, total=max_steps),
        "cosine": functools.partial(_cosine, warmup=warmup, total=max_steps),
        "constant": functools.partial(_constant_with_warmup, warmup=0),
        "constant_with_warmup": functools.partial(_constant_with_warmup, warmup=warmup),
    }[config.lr_scheduler_type]
    return LambdaLR(optimizer, course)


# The arithmetic, order included, of transformers 5.23 `optimization.py`: a different association
# would give different last bits.
def _linear(step: int, *, warmup: int, total: int) -> float:
    if step < warmup:
        return float(step) / float(max(1, warmup))
    return max(0.0, float(total - step) / float(max(1, total - warmup)))


def _cosine(step: int, *, warmup: int, total: int) -> float:
    if step < warmup:
        return float(step) / float(max(1, warmup))
    progress = float(step - warmup) / float(max(1, total - warmup))
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress)))


def _constant_with_warmup(step: int, *, warmup: int) -> float:
    if step < warmup:
        return float(step) / float(max(1.0, warmup))
    return 1.0


def check_optimizer(optimizer: torch.optim.Optimizer, loaded: Any, place: Path) -> None:
    """Refuse a state that is not AdamW's over these groups and parameter shapes.

    torch checks the number of groups and parameters only: a moment of the wrong shape, or a text
    where a number should be, would surface, if at all, at the first step.
    """
    check_like({"state": dict, "param_groups": list[dict]}, loaded, place)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    sizes = [len(group.get("params") or ()) for group in loaded["param_groups"]]
    if sizes != [len(group["params"]) for group in groups]:
        raise MiniloraError(
            f"{place} has parameter groups of sizes {sizes}, this run "
            f"{[len(group['params']) for group in groups]}: it is of another run"
        )
    for ours, theirs in zip(groups, loaded["param_groups"], strict=True):
        # None where torch is to choose; an older torch lacks some settings.
        expected = {**ours, "foreach": bool | None, "fused": bool | None}
        required = {name: expected[name] for name in expected.keys() & {*theirs, "params", "lr"}}
        check_like(required, theirs, place, "param_groups")
        if theirs["params"] != ours["params"]:
            raise MiniloraError(f"{place}: its groups do not number the parameters in order")
        for name in SWITCHES:
            if theirs.get(name, ours[name]) != ours[name]:
                raise MiniloraError(f"{place}: {name} is {theirs[name]!r} there, {ours[name]} here")
    for index, moments in loaded["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters):
            raise MiniloraError(f"{place} has a state of parameter {index!r}, which there is not")
        shape = parameters[index]
        expected = {"step": torch.zeros(()), "exp_avg": shape, "exp_avg_sq": shape}
        check_like(expected, moments, place, f"state of parameter {index}")


def check_every_moment(optimizer: torch.optim.Optimizer, loaded: Any, place: Path) -> None:
    """Refuse a state, already checked, that lacks a parameter: its moments would begin anew."""
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    missing = count - len(loaded["state"])
    if missing:
        raise MiniloraError(f"{place} holds no moments of {missing} of the {count} parameters")


def check_scheduler(scheduler: LRScheduler, loaded: Any, place: Path) -> None:
    """Refuse what is not a schedule's state, of as many groups as this one's."""
    ours = scheduler.state_dict()
    check_like(dict, loaded, place)
    known = loaded.keys() | {"last_epoch", "_last_lr", "base_lrs"}
    check_like({name: ours[name] for name in ours.keys() & known}, loaded, place)


def check_schedule_agrees(scheduler: LRScheduler, loaded: dict[str, Any], place: Path) -> None:
    """Refuse a schedule, already checked, that is elsewhere at its step than this run's would be:
    another lr_scheduler_type, warmup, learning rate or length.
    """
    assert isinstance(scheduler, LambdaLR)
    step, theirs = loaded["last_epoch"], loaded["_last_lr"][0]
    ours = scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step)
    if ours != theirs:
        raise MiniloraError(
            f"{place}: the learning rate after step {step} is {theirs} there and {ours} with this "
            "run's learning_rate, lr_scheduler_type, warmup_steps and max_steps: give Trainer's"
        )
