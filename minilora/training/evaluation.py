"""Scoring a model on data, without a trace in the run."""

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
"""What one forward pass takes: input_ids (B, T), attention_mask (B, T), ..., and labels (B,)."""

TIMING_KEYS = ("runtime", "samples_per_second", "steps_per_second")


def evaluate_model(
    model: nn.Module,
    batches: Iterator[Batch],
    loss: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]],
    metrics: Callable[[np.ndarray, np.ndarray], dict[str, float]],
    prefix: str,
) -> dict[str, float]:
    """Metrics of the model over `batches` under `<prefix>_...` keys, timing keys last.

    Draws nothing from any generator and leaves the model in the mode it was in, so that it changes
    no training number.

    Args:
        loss: (model, batch) to the batch's mean loss and its logits (B, C).
        metrics: (logits, labels) of all examples to named numbers.
    """
    start, steps = time.perf_counter(), 0
    losses, logits, labels = [], [], []
    with torch.no_grad(), evaluation_mode(model):
        for batch in batches:
            batch_loss, batch_logits = loss(model, batch)
            # Each example counts once, whatever the size of the last batch; float32, as Trainer
            # averages.
            losses.append(np.full(len(batch["labels"]), batch_loss.item(), dtype=np.float32))
            logits.append(batch_logits.float().cpu().numpy())
            labels.append(batch["labels"].cpu().numpy())
            steps += 1
    found = {"loss": np.concatenate(losses).mean().item()}
    found |= metrics(np.concatenate(logits), np.concatenate(labels))
    seconds = time.perf_counter() - start
    examples = sum(len(part) for part in labels)
    found |= dict(zip(TIMING_KEYS, (seconds, examples / seconds, steps / seconds), strict=True))
    return {f"{prefix}_{name}": value for name, value in found.items()}


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
