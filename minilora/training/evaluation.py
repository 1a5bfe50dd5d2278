"""Scoring a model on data, without a trace in the run."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilora.errors import MiniloraError
from minilora.training import distributed

Batch = dict[str, Tensor]
"""What one forward pass takes (bert/forward says what), and labels."""

TIMING_KEYS = ("runtime", "samples_per_second", "steps_per_second")


def evaluate_model(
    model: nn.Module, task: Any, hf_parity: bool, batches: Iterator[Batch], scorer: Any, prefix: str
) -> dict[str, float]:
    """Metrics of `model`, from a batch to logits, under `<prefix>_...` keys, timing keys last.

    Draws nothing from any generator and leaves the model in the mode it was in, so that it changes
    no training number. `task` and `scorer` are those of bert/tasks.
    """
    start, losses, examples = time.perf_counter(), [], 0
    # Trainer reports the training loss, smoothed; there each example counts once, whatever the loss
    # is a mean over.
    loss = task.training_loss if hf_parity else task.loss
    whole_texts = getattr(scorer, "whole_texts", lambda *output: output)
    with torch.no_grad(), evaluation_mode(model):
        for logits, batch in distributed.in_turns(lambda batch: (model(batch), batch), batches):
            logits, batch = whole_texts(logits, batch)
            # What the loss is averaged over counts once each, whatever the size of the last batch;
            # float32, as Trainer averages.
            weight = len(batch["example"]) if hf_parity else task.loss_weight(batch)
            losses.append(np.full(weight, loss(logits, batch).item(), dtype=np.float32))
            examples += len(batch["example"])
            on_host = {name: tensor.cpu() for name, tensor in batch.items()}
            scorer.add(logits.float().cpu(), on_host)
    weighted = np.concatenate(losses)
    found = {"loss": weighted.mean().item(), **scorer.metrics()}
    seconds = time.perf_counter() - start
    speed = (seconds, examples / seconds, len(losses) / seconds)
    found |= dict(zip(TIMING_KEYS, speed, strict=True))
    return {f"{prefix}_{name}": float(value) for name, value in found.items()}


def check_computed(metric: str, found: dict[str, float]) -> None:
    """Refuse a metric that is to rank and is none of those `found`."""
    if metric not in found:
        computed = ", ".join(name for name in found if not name.endswith(TIMING_KEYS))
        raise MiniloraError(f"metric_for_best_model: there is no {metric}; computed are {computed}")


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and afterwards every module in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
