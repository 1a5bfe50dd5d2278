"""The loop: all that a step changes, one optimizer step, and the order in which things happen.

Not here: what a batch is, what the model makes of it (bert/forward), what a loss is (bert/tasks),
files (checkpoint). The order is HF Trainer's (5.23): update, log, evaluate, save. What is due at
the end of an epoch comes before the save, so that no checkpoint stands between the two.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from minilora.errors import MiniloraError
from minilora.training import distributed
from minilora.training.config import TrainConfig
from minilora.training.evaluation import Batch, check_computed
from minilora.training.rng import draw_loader_seed


@dataclass
class TrainState:
    """Where a run stands. A step is an optimizer update taken.

    The position in the data is (epoch, step_in_epoch): the order of an epoch is a pure function of
    the seed and its number, so two integers suffice.
    """

    global_step: int = 0  # steps taken in the whole run
    epoch: int = 0  # epochs completed, their evaluation included
    step_in_epoch: int = 0  # steps taken in the current epoch
    loss_sum: float = 0.0  # of the steps since the last logged row
    loss_total: float = 0.0  # of the steps before that row
    logged_step: int = 0  # `global_step` at the last logged row
    best_metric: float | None = None  # of the metric that ranks checkpoints
    best_step: int | None = None  # `global_step` of that evaluation
    evaluations_since_best: int = 0  # for early stopping
    stopped_early: bool = False  # whether that has ended the run
    # From here on the run is not the uninterrupted one: a resume lacked a part and went on.
    inexact_from: int | None = None
    # Of metrics.jsonl when the run was last saved; without them log_history is the whole log.
    metrics_size: int = 0
    metrics_sha256: str = ""
    log_history: list[dict[str, Any]] = field(default_factory=list)  # the last rows of it


@dataclass(frozen=True)
class Timetable:
    """When a run logs, evaluates, saves and ends. Counts are optimizer steps; 0 means never."""

    max_steps: int = 0  # 0: no end of its own, and no check of the position on a resume
    steps_per_epoch: int = 1
    batches_per_epoch: int = 1
    batches_per_step: int = 1
    logging_steps: int = 0
    eval_steps: int = 0
    eval_each_epoch: bool = False
    save_steps: int = 0
    save_each_epoch: bool = False


def plan_timetable(
    config: TrainConfig, examples: int, validates: bool, world_size: int = 1
) -> Timetable:
    """What resolved arguments mean for so many training examples, with validation data or none, and
    steps of batches for so many processes.
    """
    batches = math.ceil(examples / (config.per_device_train_batch_size * world_size))
    steps_per_epoch = math.ceil(batches / config.gradient_accumulation_steps)
    by_epochs = math.ceil(config.num_train_epochs * steps_per_epoch)
    eval_strategy = config.eval_strategy or ("epoch" if validates else "no")
    return Timetable(
        max_steps=config.max_steps if config.max_steps > 0 else by_epochs,
        steps_per_epoch=steps_per_epoch,
        batches_per_epoch=batches,
        batches_per_step=config.gradient_accumulation_steps,
        logging_steps=config.logging_steps or 0,
        eval_steps=config.eval_steps if eval_strategy == "steps" else 0,
        eval_each_epoch=eval_strategy == "epoch",
        save_steps=config.save_steps if config.save_strategy == "steps" else 0,
        save_each_epoch=config.save_strategy == "epoch",
    )


@dataclass
class Training:
    """What a step changes, and what it is done with."""

    model: nn.Module  # with an adapter; its trainable parameters are the optimizer's
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    forward: nn.Module | None = None  # `fit` calls it, batch to logits; by default the model
    task: Any = None  # one of bert/tasks: what `fit` makes of logits
    # Scales the loss for float16; one that is not enabled does nothing.
    scaler: GradScaler = field(default_factory=lambda: GradScaler("cpu", enabled=False))
    timetable: Timetable = field(default_factory=Timetable)
    state: TrainState = field(default_factory=TrainState)


@dataclass(frozen=True)
class Callbacks:
    """What the loop asks of the run around it, and what it tells."""

    batches: Callable[[int, int], Iterator[list[Batch]]]  # each step's, by (epoch, steps to skip)
    evaluate: Callable[[], dict[str, float]] | None  # validation's metrics under `eval_...` keys
    log: Callable[[dict[str, Any]], None]  # takes a row of metrics.jsonl
    save: Callable[[], None]  # writes a checkpoint
    should_stop: Callable[[], bool]  # asked before each step; if true, the loop saves and ends
    progress: Callable[[list[Batch], float, float], None]  # told of each step: its loss, its rate


def fit(training: Training, config: TrainConfig, run: Callbacks) -> None:
    """Train from `training.state` to the end of the run, or until `run.should_stop`.

    A loss or gradient that is not finite is an error; the parameters are then those of the last
    good step.
    """
    state, timetable = training.state, training.timetable
    saved_step = state.global_step
    if state.step_in_epoch == timetable.steps_per_epoch:
        # HF Trainer and the first version of minilora save before the evaluation that is due here.
        end_epoch(training, config, run)
    while not is_finished(state, timetable):
        for batches in run.batches(state.epoch, state.step_in_epoch):
            distributed.reached(f"step {state.global_step + 1}")
            if distributed.summed(run.should_stop()):
                if saved_step != state.global_step:
                    run.save()
                return
            if state.step_in_epoch == 0 and config.hf_parity:
                draw_loader_seed()
            learning_rate = float(training.scheduler.get_last_lr()[0])
            losses, grad_norm = training_step(training, config, batches)
            state.global_step += 1
            state.step_in_epoch += 1
            for loss in losses:
                # In float32, as Trainer sums: the logged means then agree to the last bit.
                state.loss_sum = float(np.float32(state.loss_sum) + np.float32(loss))
            run.progress(batches, sum(losses), learning_rate)
            if is_due(timetable.logging_steps, state):
                log_loss(training, run, grad_norm, learning_rate)
            if is_due(timetable.eval_steps, state, timetable.max_steps):
                evaluate_and_rank(training, config, run)
            ends = state.step_in_epoch == timetable.steps_per_epoch or is_finished(state, timetable)
            if ends:
                end_epoch(training, config, run)
            due = is_due(timetable.save_steps, state) or (ends and timetable.save_each_epoch)
            # A run that saves by steps saves at its very end, too.
            if due or (timetable.save_steps and is_finished(state, timetable)):
                run.save()
                saved_step = state.global_step
            if ends:
                break


def training_step(
    training: Training, config: TrainConfig, batches: list[Batch]
) -> tuple[list[float], float]:
    """One optimizer update from one or more batches: forward, backward, clip, step. Of several
    processes one may have none, and they all return the sum of their losses.

    Returns (each batch's share of the loss, norm of the gradient before clipping). Where a scaled
    gradient overflows, the scaler lowers its scale and neither the parameters nor the learning rate
    move, as in Trainer; the step counts.
    """
    forward = training.model if training.forward is None else training.forward
    task, scaler = training.task, training.scaler
    forward.train()
    losses = []
    # Where its batches hold no "labels", as places of answers are none, Trainer takes the mean.
    divisor = len(batches) if config.hf_parity and hasattr(task, "trainer_averages") else 1
    for batch, share in zip(batches or [None], loss_shares(task, config, batches), strict=True):
        with distributed.without_sums(forward, is_last=not batches or batch is batches[-1]):
            loss = forward(batch)
            if batch is not None:
                loss = task.training_loss(loss, batch) * share / divisor
            scaler.scale(loss * distributed.world_size()).backward()
        losses.append(loss.item())
    if distributed.world_size() > 1:
        losses = [distributed.summed(sum(losses))]
    scaler.unscale_(training.optimizer)
    # An infinite bound computes the norm and clips nothing.
    bound = config.max_grad_norm or math.inf
    grad_norm = nn.utils.clip_grad_norm_(training.model.parameters(), bound).item()
    if not math.isfinite(sum(losses) + (0.0 if scaler.is_enabled() else grad_norm)):
        found = f"the loss is {sum(losses)} and the gradient norm {grad_norm}"
        advice = "lower --learning_rate, or resume from the last checkpoint"
        step = training.state.global_step + 1
        raise MiniloraError(f"step {step}: {found}; training stops before this step: {advice}")
    scale = scaler.get_scale()
    scaler.step(training.optimizer)  # optimizer.step(), unless a scaled gradient overflowed
    scaler.update()
    if scaler.get_scale() >= scale:
        training.scheduler.step()
    training.optimizer.zero_grad()
    return losses, grad_norm


def loss_shares(task: Any, config: TrainConfig, batches: list[Batch]) -> list[float]:
    """The weight of each batch's mean loss in the step's: its share of what the mean is over, so
    that accumulating k batches, or sharing them among processes, equals one batch k times as large.
    """
    if config.hf_parity:
        # HF Trainer 5.23 adds up the means for BERT's heads, so that the loss grows with the
        # accumulation (transformers#47688), and with the processes.
        averages = config.label_smoothing_factor or hasattr(task, "trainer_averages")
        return [1.0 / distributed.world_size() if averages else 1.0] * len(batches)
    weight = getattr(task, "training_weight", task.loss_weight)
    weights = [weight(batch) for batch in batches]
    total = distributed.summed(sum(weights)) or 1  # of masked words there may be none
    return [own / total for own in weights] or [0.0]  # 1.0 of a single batch changes no bit


def log_loss(training: Training, run: Callbacks, grad_norm: float, learning_rate: float) -> None:
    """Log the mean loss since the last row, and start a new mean."""
    state = training.state
    mean = state.loss_sum / (state.global_step - state.logged_step)
    state.loss_total += state.loss_sum
    state.loss_sum, state.logged_step = 0.0, state.global_step
    log(training, run, {"loss": mean, "grad_norm": grad_norm, "learning_rate": learning_rate})


def evaluate_and_rank(training: Training, config: TrainConfig, run: Callbacks) -> None:
    """Evaluate, log the metrics, remember the best, and notice when early stopping is due."""
    if run.evaluate is None:
        return
    state, best = training.state, config.best_metric()
    distributed.reached(f"the evaluation after step {state.global_step}")
    metrics = run.evaluate()
    log(training, run, metrics)
    if best is None:
        return
    check_computed(best, metrics)
    sign = 1 if config.best_is_greatest() else -1
    score = sign * metrics[best]
    to_beat = -math.inf if state.best_metric is None else sign * state.best_metric
    if to_beat < score < math.inf:  # NaN is no best
        state.best_metric, state.best_step = metrics[best], state.global_step
        state.evaluations_since_best = 0
    else:
        state.evaluations_since_best += 1
        patience = config.early_stopping_patience
        state.stopped_early = patience is not None and state.evaluations_since_best >= patience


def log(training: Training, run: Callbacks, values: dict[str, Any]) -> None:
    """Add a row to the log, under Trainer's keys."""
    state = training.state
    epoch = epochs_done(state, training.timetable)
    state.log_history.append({"step": state.global_step, "epoch": epoch, **values})
    run.log(state.log_history[-1])


def end_epoch(training: Training, config: TrainConfig, run: Callbacks) -> None:
    """What is due when an epoch, or the run in its midst, ends: evaluation, then the position."""
    state, timetable = training.state, training.timetable
    if timetable.eval_each_epoch:
        evaluate_and_rank(training, config, run)
    if state.step_in_epoch == timetable.steps_per_epoch:
        state.epoch, state.step_in_epoch = state.epoch + 1, 0


def is_due(every: int, state: TrainState, end: int = 0) -> bool:
    """Whether what happens every so many steps, and at an `end`, happens now; 0 is never."""
    return every > 0 and (state.global_step % every == 0 or state.global_step == end)


def is_finished(state: TrainState, timetable: Timetable) -> bool:
    return 0 < timetable.max_steps <= state.global_step or state.stopped_early


def epochs_done(state: TrainState, timetable: Timetable) -> float:
    """Trainer's `epoch`: passes over the data, the fraction counted in batches."""
    batches = min(state.step_in_epoch * timetable.batches_per_step, timetable.batches_per_epoch)
    return state.epoch + batches / timetable.batches_per_epoch
