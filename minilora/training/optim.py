"""AdamW over what is trainable, and the course of its learning rate."""

import functools
import math
import re

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

# transformers 5.23 `Trainer.get_decay_parameter_names`: biases and normalisation layers are not
# decayed.
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.AdamW:
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
        {"params": decayed, "weight_decay": weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


def build_scheduler(
    optimizer: torch.optim.Optimizer, schedule: str, warmup_steps: float, max_steps: int
) -> LambdaLR:
    """The learning rate as a share of its peak, stepped once per optimizer step.

    A `functools.partial` rather than a closure: LambdaLR stores a partial as `{}` and a closure as
    None, and Trainer's files hold the former.

    Args:
        schedule: linear, cosine, constant or constant_with_warmup. warmup_steps: steps; a fraction
        below 1 is a share of `max_steps`, rounded up, as in transformers 5. max_steps: optimizer
        steps in the whole run.
    """
    warmup = math.ceil(max_steps * warmup_steps) if warmup_steps < 1 else int(warmup_steps)
    share = {
        "linear": functools.partial(_linear, warmup=warmup, total=max_steps),
        "cosine": functools.partial(_cosine, warmup=warmup, total=max_steps),
        "constant": functools.partial(_constant_with_warmup, warmup=0),
        "constant_with_warmup": functools.partial(_constant_with_warmup, warmup=warmup),
    }[schedule]
    return LambdaLR(optimizer, share)


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
