"""Exercise 3: the loop. A head and a LoRA trained on a few sentences.

A step is one update of the optimizer; it may see several batches (accumulation). A row of the log
is written after every `logging_steps` steps. The model is one of transformers': called with a
batch's tensors (input_ids, attention_mask, labels) it returns an object with `.loss`, the mean over
the batch.

Build, in this order:

1. `share_of_peak`: the learning rate's course, linear up, then linear down.
2. `epoch_batches`: an epoch's batches, in an order that depends on the seed and the epoch alone:
   torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).
3. `training_step`: forward and backward of each batch, then once: clip, step, zero the gradients.
   Two batches of 4 and 2 examples must give the gradient of one batch of 6.
4. `train`: AdamW without weight decay over what is trainable, and nothing else; LambdaLR; epochs,
   steps, the log. Mind the mode: dropout is for training.

Run: python -m pytest examples/exercises/test_loop.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    learning_rate: float = 0.02
    epochs: int = 3
    batch_size: int = 4
    accumulation: int = 2  # batches in a step; the last step of an epoch takes what is left
    warmup: int = 2  # steps
    max_grad_norm: float = 0.5
    logging_steps: int = 2
    seed: int = 7


def share_of_peak(step: int, warmup: int, total: int) -> float:
    """The learning rate after `step` steps as a share of its peak: from 0 to 1 in `warmup` steps,
    then down to 0 at `total`.
    """
    raise NotImplementedError


def epoch_batches(examples: Batch, batch_size: int, seed: int, epoch: int) -> list[Batch]:
    """All examples, tensors (N, ...), in the epoch's order, cut into batches; the last may be
    smaller. Draws nothing from torch's global generator.
    """
    raise NotImplementedError


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch], max_grad_norm: float
) -> tuple[float, float]:
    """One update from these batches.

    Returns the mean loss over all their examples, and the gradient's norm before clipping.
    """
    raise NotImplementedError


def train(model: nn.Module, examples: Batch, settings: Settings) -> list[dict[str, float]]:
    """Train `model` in place, and return the log: rows of

    step             steps taken so far
    loss             mean of the steps' losses since the last row
    grad_norm        of this step, before clipping
    learning_rate    with which this step was taken
    """
    raise NotImplementedError
