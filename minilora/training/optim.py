"""AdamW over what is trainable, the course of its learning rate, and what was read for them."""

import functools
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from minilora.errors import MiniloraError
from minilora.lora.heads import ModulesToSave
from minilora.reading import check_like
from minilora.training.config import TrainConfig

# Not decayed, as in transformers 5.23 `Trainer.get_decay_parameter_names`: biases and norms.
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")

# Of embeddings in LoRA+, whatever the others' is: PEFT's default, of the paper's authors.
EMBEDDING_RATE = 1e-6

# What AdamW does with these is another algorithm, which keeps other states.
SWITCHES = ("amsgrad", "maximize", "capturable", "differentiable")


def build_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW (arXiv:1711.05101) with HF Trainer's two groups: decayed first, then not decayed. With
    `loraplus_lr_ratio` they are the four of peft 0.21 `create_loraplus_optimizer`
    (arXiv:2402.12354); `head_learning_rate` adds two for modules trained in full.

    Groups exist even when empty: a checkpoint of Trainer's names its groups by position. `fused`
    is Trainer's default and not a matter of speed alone, for its rounding differs from the unfused
    loop's.
    """
    rate, of_heads, decayed = config.learning_rate, config.head_learning_rate, config.weight_decay
    pairs = [(rate, decayed), (rate, 0.0)]
    if config.loraplus_lr_ratio is not None:  # A and all that is not named here, embeddings, B
        fast = rate * config.loraplus_lr_ratio
        pairs = [(rate, decayed), (EMBEDDING_RATE, decayed), (fast, decayed), (fast, 0.0)]
    if of_heads is not None:
        pairs += [(of_heads, decayed), (of_heads, 0.0)]
    groups = [{"params": [], "weight_decay": decay, "lr": lr} for lr, decay in pairs]
    in_norms, in_heads = _parameters_in(model, nn.LayerNorm), _parameters_in(model, ModulesToSave)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = bool(parameter in in_norms or NO_DECAY.search(name.lower()))
        if of_heads is not None and parameter in in_heads:
            index = len(groups) - 2 + exempt
        elif config.loraplus_lr_ratio is None:
            index = int(exempt)
        elif "lora_embedding" in name:
            index = 1
        else:  # a head's bias is among the fast ones, too, as in PEFT
            index = 2 + exempt if "lora_B" in name or parameter.ndim == 1 else 0
        groups[index]["params"].append(parameter)
    if of_heads is not None and not groups[-2]["params"] + groups[-1]["params"]:
        raise MiniloraError("head_learning_rate: no module is trained in full; leave it out")
    betas = (config.adam_beta1, config.adam_beta2)
    return AdamW(groups, config.learning_rate, betas, config.adam_epsilon, fused=True)


def _parameters_in(model: nn.Module, kind: type[nn.Module]) -> set[nn.Parameter]:
    return {p for m in model.modules() if isinstance(m, kind) for p in m.parameters()}


def build_scheduler(optimizer: Optimizer, config: TrainConfig, max_steps: int) -> LambdaLR:
    """The learning rate as a share of its peak, stepped once per optimizer step of `max_steps`.

    A `functools.partial` rather than a closure: LambdaLR stores a partial as `{}` and a closure as
    None, and Trainer's files hold the former.
    """
    schedule, asked = config.lr_scheduler_type, config.warmup_steps
    # A fraction is a share of the run, rounded up, as in transformers 5.
    warmup = math.ceil(max_steps * asked) if asked < 1 else int(asked)
    warmup = 0 if schedule == "constant" else warmup
    share = functools.partial(_share_of_peak, schedule=schedule, warmup=warmup, total=max_steps)
    return LambdaLR(optimizer, share)


def follow_schedule(scheduler: LRScheduler) -> None:
    """Set the rates to the schedule's at its step: those restored are of a schedule that ended
    sooner, and of its last step zero.
    """
    assert isinstance(scheduler, LambdaLR)
    step, groups = scheduler.last_epoch, scheduler.optimizer.param_groups
    for group, peak, share in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = peak * share(step)
    scheduler._last_lr = [group["lr"] for group in groups]


# The arithmetic, order included, of transformers 5.23 `optimization.py`: a different association
# would give different last bits.
def _share_of_peak(step: int, *, schedule: str, warmup: int, total: int) -> float:
    if step < warmup:
        return step / max(1, warmup)
    if schedule == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    if schedule == "cosine":
        progress = (step - warmup) / max(1, total - warmup)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress)))
    return 1.0


def check_optimizer(optimizer: Optimizer, loaded: Any, place: Path, is_trainers: bool) -> None:
    """Refuse a state that is not AdamW's over these groups and parameter shapes; if it is HF
    Trainer's, one that lacks a parameter, too: its moments would begin anew.

    torch checks the number of groups and parameters only: a moment of the wrong shape, or a text
    where a number should be, would surface, if at all, at the first step.
    """
    groups = optimizer.state_dict()["param_groups"]
    numbers = [{"params": group["params"]} for group in groups]
    check_like({"state": dict, "param_groups": numbers}, loaded, place)
    for ours, theirs in zip(groups, loaded["param_groups"], strict=True):
        # None where torch is to choose; an older torch lacks some settings.
        expected = {**ours, "foreach": bool | None, "fused": bool | None}
        required = {name: expected[name] for name in expected.keys() & {*theirs, "lr"}}
        check_like(required, theirs, place, "param_groups")
        for name in ("params", *SWITCHES):
            if theirs.get(name, ours[name]) != ours[name]:
                raise MiniloraError(f"{place}: {name} is {theirs[name]!r} there, {ours[name]} here")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, moments in loaded["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters):
            raise MiniloraError(f"{place} has a state of parameter {index!r}, which there is not")
        shape = parameters[index]
        expected = {"step": torch.zeros(()), "exp_avg": shape, "exp_avg_sq": shape}
        check_like(expected, moments, place, f"state of parameter {index}")
    count = len(parameters)
    if is_trainers and (missing := count - len(loaded["state"])):
        raise MiniloraError(f"{place} holds no moments of {missing} of the {count} parameters")


def check_scheduler(scheduler: LRScheduler, loaded: Any, place: Path, is_trainers: bool) -> None:
    """Refuse what is not a schedule's state, of as many groups as this one's; if it is HF
    Trainer's, one that is not at its step where this run's would be, too.
    """
    check_like(dict, loaded, place)
    ours = {**scheduler.state_dict(), "last_epoch": int}
    if is_trainers:  # its constant schedule is a closure, of which nothing is stored
        ours["lr_lambdas"] = [dict | None] * len(scheduler.base_lrs)
    known = loaded.keys() | {"last_epoch", "_last_lr", "base_lrs"}
    check_like({name: ours[name] for name in ours.keys() & known}, loaded, place)
    if is_trainers:
        assert isinstance(scheduler, LambdaLR)
        step, theirs = loaded["last_epoch"], loaded["_last_lr"][0]
        here = scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step)
        if here != theirs:
            rates = f"the learning rate after step {step} is {theirs} there and {here} here"
            advice = "give Trainer's learning_rate, lr_scheduler_type, warmup_steps and max_steps"
            raise MiniloraError(f"{place}: {rates}: {advice}")
