"""The loop: state, one optimizer step, evaluation, and the order in which things happen.

Knows neither BERT nor files: batches, the loss and the metrics come in as functions, rows and
checkpoints go out through functions. The order within a step is HF Trainer's (5.23): update, log,
evaluate, save.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilora.errors import MiniloraError
from minilora.training.evaluation import TIMING_KEYS, Batch


@dataclass
class TrainState:
    """Everything the loop changes, apart from the model, optimizer, scheduler and random
    generators.

    A step is an optimizer update taken. The position in the data is (epoch, step_in_epoch): the
    order of an epoch is a pure function of the seed and its number, so two integers suffice.
    """

    global_step: int = 0
    """Steps taken in the whole run."""
    epoch: int = 0
    """Epochs completed, their evaluation and checkpoint included."""
    step_in_epoch: int = 0
    """Steps taken in the current epoch."""
    epoch_ends: bool = False
    """The last step of the epoch (or run) is taken, and what is due at its end, evaluation and
    checkpoint, is still to come. A checkpoint may be written in between."""
    loss_sum: float = 0.0
    """Sum of the step losses since the last logged row."""
    loss_total: float = 0.0
    """Sum of the step losses before that row."""
    logged_step: int = 0
    """`global_step` at the last logged row."""
    best_metric: float | None = None
    """Best value so far of the metric that ranks checkpoints."""
    best_step: int | None = None
    """`global_step` of that evaluation."""
    evaluations_since_best: int = 0
    """Evaluations since then, for early stopping."""
    stopped_early: bool = False
    """Whether early stopping has ended the run."""
    inexact_from: int | None = None
    """`global_step` from which the run is not the uninterrupted one, because a resume lacked a part
    and was allowed to go on."""
    log_history: list[dict[str, Any]] = field(default_factory=list)
    """The rows of metrics.jsonl so far, under Trainer's keys."""


@dataclass(frozen=True)
class Cadence:
    """When the loop logs, evaluates, saves and ends. Counts are optimizer steps; 0 means not by
    steps.
    """

    max_steps: int
    steps_per_epoch: int
    batches_per_epoch: int
    batches_per_step: int
    logging_steps: int
    eval_steps: int
    eval_each_epoch: bool
    save_steps: int
    save_each_epoch: bool
    best_metric: str | None
    best_is_greatest: bool
    early_stopping_patience: int | None


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    state: TrainState,
    cadence: Cadence,
    max_grad_norm: float,
    updates: Callable[[int, int], Iterator[list[Batch]]],
    loss: Callable[[nn.Module, Batch], Tensor],
    evaluate: Callable[[], dict[str, float]] | None,
    record: Callable[[dict[str, Any]], None],
    save: Callable[[TrainState], None],
    should_stop: Callable[[], bool],
    progress: Callable[[int, float, float], None],
    shares: Callable[[list[Batch]], list[float]],
    begin_epoch: Callable[[], None],
) -> None:
    """Train from `state` to the end of the run, or until `should_stop`. Changes `state` in place.

    Args:
        scaler: scales the loss for float16; one that is not enabled does nothing.
        updates: (epoch, steps to skip) to an iterator over the batches of each optimizer step.
        evaluate: metrics of the validation data under `eval_...` keys, or None.
        record: takes one row of metrics.jsonl.
        save: writes a checkpoint of `state` and everything else.
        should_stop: asked before each step; when true, a checkpoint is saved and the loop ends.
        progress: told (examples, loss, learning rate) after each step.
        shares: the weight of each batch of a step in the step's loss: `example_shares`, or
            `trainer_shares`.
        begin_epoch: called before the first step of each epoch.

    Raises:
        MiniloraError: a loss or gradient is not finite. The parameters are those of the last good
            step.
    """
    saved_step = state.global_step
    while True:
        if state.epoch_ends and end_epoch(state, cadence, evaluate, record, save):
            saved_step = state.global_step
        if is_finished(state, cadence):
            return
        if state.step_in_epoch == 0:
            begin_epoch()
        for batches in updates(state.epoch, state.step_in_epoch):
            if should_stop():
                if saved_step != state.global_step:
                    save(state)
                return
            learning_rate = float(scheduler.get_last_lr()[0])
            losses, grad_norm = training_step(
                model,
                optimizer,
                scheduler,
                scaler,
                batches,
                shares(batches),
                max_grad_norm,
                loss,
                state,
            )
            state.global_step += 1
            state.step_in_epoch += 1
            for part in losses:
                # In float32, as Trainer sums: the logged means then agree to the last bit.
                state.loss_sum = float(np.float32(state.loss_sum) + np.float32(part))
            progress(sum(len(batch["labels"]) for batch in batches), sum(losses), learning_rate)
            if _due(cadence.logging_steps, state):
                log_loss(state, cadence, grad_norm, learning_rate, record)
            if evaluate and _due(cadence.eval_steps, state):
                evaluate_and_rank(state, cadence, evaluate, record)
            run_ends = is_finished(state, cadence)
            state.epoch_ends = run_ends or state.step_in_epoch >= cadence.steps_per_epoch
            if _due(cadence.save_steps, state) and not run_ends:
                save(state)
                saved_step = state.global_step
            if state.epoch_ends:
                break


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    batches: list[Batch],
    shares: list[float],
    max_grad_norm: float,
    loss: Callable[[nn.Module, Batch], Tensor],
    state: TrainState,
) -> tuple[list[float], float]:
    """One optimizer update from one or more batches: forward, backward, clip, step.

    Returns (each batch's share of the loss, norm of the gradient before clipping). Where a scaled
    gradient overflows, the scaler lowers its scale and neither the parameters nor the learning rate
    move, as in Trainer; the step counts.

    Raises:
        MiniloraError: the loss is not finite, or the gradient norm without a scaler; names the step.
    """
    model.train()
    losses = []
    for batch, share in zip(batches, shares, strict=True):
        # A single batch's share is 1.0, which changes no bit.
        batch_loss = loss(model, batch) * share
        scaler.scale(batch_loss).backward()
        losses.append(batch_loss.item())
    scaler.unscale_(optimizer)
    # An infinite bound computes the norm and clips nothing.
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf).item()
    if not math.isfinite(sum(losses) + (0.0 if scaler.is_enabled() else grad_norm)):
        raise MiniloraError(
            f"step {state.global_step + 1}: the loss is {sum(losses)} and the gradient norm "
            f"{grad_norm}; training stops before this step. Lower --learning_rate, or resume from "
            "the last checkpoint"
        )
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    if scaler.get_scale() >= scale:
        scheduler.step()
    optimizer.zero_grad()
    return losses, grad_norm


def example_shares(batches: list[Batch]) -> list[float]:
    """Each batch's share of the examples: the step's loss is the mean over all of them, so that
    accumulating k batches equals one batch k times as large."""
    counts = [len(batch["labels"]) for batch in batches]
    return [count / sum(counts) for count in counts]


def trainer_shares(batches: list[Batch]) -> list[float]:
    """1 for each batch: HF Trainer 5.23 adds up the batches' means for BERT's heads, so that the
    loss grows with the accumulation (transformers#47688). Only to reproduce its bits."""
    return [1.0] * len(batches)


def log_loss(
    state: TrainState,
    cadence: Cadence,
    grad_norm: float,
    learning_rate: float,
    record: Callable[[dict[str, Any]], None],
) -> None:
    """Record the mean loss since the last row, and start a new mean."""
    row = {
        "loss": state.loss_sum / (state.global_step - state.logged_step),
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
    }
    state.loss_total += state.loss_sum
    state.loss_sum, state.logged_step = 0.0, state.global_step
    _record(state, cadence, row, record)


def evaluate_and_rank(
    state: TrainState,
    cadence: Cadence,
    evaluate: Callable[[], dict[str, float]],
    record: Callable[[dict[str, Any]], None],
) -> None:
    """Evaluate, record the metrics, remember the best, and notice when early stopping is due.

    Raises:
        MiniloraError: the metric that ranks checkpoints is not among those computed.
    """
    metrics = evaluate()
    _record(state, cadence, metrics, record)
    if cadence.best_metric is None:
        return
    if cadence.best_metric not in metrics:
        computed = ", ".join(name for name in metrics if not name.endswith(TIMING_KEYS))
        raise MiniloraError(
            f"metric_for_best_model: there is no {cadence.best_metric}; computed are {computed}"
        )
    value = metrics[cadence.best_metric]
    sign = 1 if cadence.best_is_greatest else -1
    if state.best_metric is None or sign * value > sign * state.best_metric:
        state.best_metric, state.best_step, state.evaluations_since_best = (
            value,
            state.global_step,
            0,
        )
    else:
        state.evaluations_since_best += 1
        patience = cadence.early_stopping_patience
        state.stopped_early = patience is not None and state.evaluations_since_best >= patience


def end_epoch(
    state: TrainState,
    cadence: Cadence,
    evaluate: Callable[[], dict[str, float]] | None,
    record: Callable[[dict[str, Any]], None],
    save: Callable[[TrainState], None],
) -> bool:
    """What is due when an epoch, or the run in its midst, ends: evaluation, then the position, then
    a checkpoint. Returns whether one was saved.

    A run that saves by steps saves here at its very end, too, after the last evaluation.
    """
    if evaluate and cadence.eval_each_epoch:
        evaluate_and_rank(state, cadence, evaluate, record)
    if state.step_in_epoch >= cadence.steps_per_epoch:
        state.epoch, state.step_in_epoch = state.epoch + 1, 0
    state.epoch_ends = False
    saves = cadence.save_each_epoch or (cadence.save_steps > 0 and is_finished(state, cadence))
    if saves:
        save(state)
    return saves


def is_finished(state: TrainState, cadence: Cadence) -> bool:
    """Whether nothing is left to train."""
    return state.global_step >= cadence.max_steps or state.stopped_early


def mean_loss(state: TrainState) -> float:
    """Mean step loss of the whole run, resumes included."""
    return (state.loss_total + state.loss_sum) / max(1, state.global_step)


def epochs_done(state: TrainState, cadence: Cadence) -> float:
    """Trainer's `epoch`: passes over the data, the fraction counted in batches."""
    batches = min(state.step_in_epoch * cadence.batches_per_step, cadence.batches_per_epoch)
    return state.epoch + batches / cadence.batches_per_epoch


def _due(every: int, state: TrainState) -> bool:
    return every > 0 and state.global_step % every == 0


def _record(
    state: TrainState,
    cadence: Cadence,
    values: dict[str, Any],
    record: Callable[[dict[str, Any]], None],
) -> None:
    row = {"step": state.global_step, "epoch": epochs_done(state, cadence), **values}
    state.log_history.append(row)
    record(row)
