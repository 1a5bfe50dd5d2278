"""Exercise 4: exact resume. A run that is killed and started again ends in the same bits.

`train(directory, tell)` is called by the tests in a process of its own. That is killed at some step
(SIGKILL: no handler, no cleanup), and `train` is called again, in another process, with the same
directory: it goes on where the last checkpoint was. Every row, every parameter, and what the
generators would draw next must then be those of a run that was never killed.

Build, in this order (docs/12_exercises.md says more about each):

1. `epoch_order`: a pure function of SEED and the epoch.
2. `train` without checkpoints: seed, model, optimizer, scheduler, then the loop.
3. `save`: what a step reads and changes, in one file that is complete or absent.
4. `restore`, called when all is built, and the generators last.
5. `train` with both: begin where the checkpoint says.

A step, number s of TOTAL_STEPS (1, 2, ...):
    its examples are the next BATCH_SIZE * ACCUMULATION of the epoch's order, or what is left of it;
    each batch of BATCH_SIZE of them: loss_sum(model, batch) / examples in the step, backward;
    one optimizer step, one scheduler step, gradients to zero;
    tell(row), and then a checkpoint if s is a multiple of SAVE_STEPS, or the last.

A row is a dictionary of plain numbers:
    "step"            s
    "examples"        list of int: the step's examples, in their order
    "learning_rate"   with which the step was taken
    "loss"            the sum of what its batches contributed: the mean over the examples
    "mean_loss"       if s is a multiple of LOGGING_STEPS, the mean of the losses since the last
                      such step, else None

Optimizer: torch.optim.AdamW(trainable parameters, lr=LEARNING_RATE). Scheduler:
torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak).

Run: python -m pytest examples/exercises/test_resume.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ex4_given import (  # noqa: F401
    ACCUMULATION,
    BATCH_SIZE,
    EPOCHS,
    EXAMPLES,
    LEARNING_RATE,
    LOGGING_STEPS,
    SAVE_STEPS,
    SEED,
    STEPS_PER_EPOCH,
    TOTAL_STEPS,
    Model,
    loss_sum,
    share_of_peak,
)
from torch import nn

CHECKPOINT = "checkpoint.pt"


def epoch_order(epoch: int) -> list[int]:
    """The indices 0 to EXAMPLES - 1 in the order of this epoch (0, 1, ...): another in each epoch,
    always the same for the same one. Touches no global generator.
    """
    raise NotImplementedError


def save(path: Path, *parts: Any) -> None:
    """Write all that the rest of the run depends on to `path`, in place of what was there. Killed
    at any moment, it leaves the old file or the new one. The parts are yours to choose.
    """
    raise NotImplementedError


def restore(path: Path, *parts: Any) -> Any:
    """Put everything back, the generators last; return what is yours to keep in variables."""
    raise NotImplementedError


def train(directory: Path, tell: Callable[[dict[str, Any]], None]) -> nn.Module:
    """Train to the end, from the checkpoint in `directory` (it exists) if there is one. Return the
    model. A run that has ended already takes no step.
    """
    raise NotImplementedError
