"""What the arguments mean for the loop: when things happen, with which optimizer, saved how."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from minilora.durable import NotConfirmed
from minilora.errors import MiniloraError
from minilora.training.checkpoint import rotate_checkpoints, save_checkpoint, sorted_checkpoints
from minilora.training.config import TrainConfig
from minilora.training.loop import Cadence, TrainState, is_finished
from minilora.training.optim import build_optimizer, build_scheduler
from minilora.training.progress import say
from minilora.training.trainer_files import trainer_state


def resolve_modes(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The arguments with `batching` and `dropout` decided, as run.json records them.

    Raises:
        MiniloraError: float16 on a CPU, which has no fast float16 products.
    """
    if config.dtype == "float16" and device.type == "cpu":
        raise MiniloraError("dtype float16 needs a GPU: on a CPU use bfloat16 or float32")
    plain = config.hf_parity or config.torch_compile
    return dataclasses.replace(
        config,
        batching=config.batching or ("padded" if plain else "packed"),
        dropout=config.dropout or ("torch" if plain or device.type != "cpu" else "fast"),
    )


def plan_cadence(config: TrainConfig, examples: int, validates: bool) -> Cadence:
    """When to log, evaluate, save and end, in optimizer steps."""
    batches = math.ceil(examples / config.per_device_train_batch_size)
    steps_per_epoch = math.ceil(batches / config.gradient_accumulation_steps)
    by_epochs = math.ceil(config.num_train_epochs * steps_per_epoch)
    eval_strategy = config.eval_strategy or ("epoch" if validates else "no")
    return Cadence(
        max_steps=config.max_steps if config.max_steps > 0 else by_epochs,
        steps_per_epoch=steps_per_epoch,
        batches_per_epoch=batches,
        batches_per_step=config.gradient_accumulation_steps,
        logging_steps=config.logging_steps,
        eval_steps=(config.eval_steps or config.logging_steps) if eval_strategy == "steps" else 0,
        eval_each_epoch=eval_strategy == "epoch",
        save_steps=config.save_steps if config.save_strategy == "steps" else 0,
        save_each_epoch=config.save_strategy == "epoch",
        best_metric=config.best_metric(),
        best_is_greatest=config.best_is_greatest(),
        early_stopping_patience=config.early_stopping_patience,
    )


def build_optimisation(
    config: TrainConfig, model: nn.Module, max_steps: int
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """AdamW over the trainable parameters, and its schedule."""
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = build_optimizer(
        model, config.learning_rate, config.weight_decay, betas, config.adam_epsilon
    )
    return optimizer, build_scheduler(
        optimizer, config.lr_scheduler_type, config.warmup_steps, max_steps
    )


def build_scaler(dtype: str, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling for float16, whose smallest gradients would be zero; for others it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=dtype == "float16")


class Saver:
    """Writes a checkpoint of a state, and then deletes what is over the limit.

    When one cannot be written (the disk is full, for one) and an older one is there, it warns, lets
    the run go on and tries again at the next save; the last save of a run has no next one, and
    fails.
    """

    def __init__(
        self,
        config: TrainConfig,
        cadence: Cadence,
        output_dir: Path,
        run: dict[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler,
        scaler: torch.amp.GradScaler,
    ) -> None:
        """What every checkpoint of a run has in common."""
        self.config, self.cadence, self.output_dir, self.run = config, cadence, output_dir, run
        self.trained = (model, optimizer, scheduler)
        self.scaler = scaler
        self.failure: OSError | None = None

    def __call__(self, state: TrainState) -> None:
        """Write the checkpoint of `state`.

        Raises:
            OSError: it cannot be written, and the run is over or has no older checkpoint.
        """
        self.failure = None
        try:
            self._write(state)
        except OSError as error:
            if is_finished(state, self.cadence) or not sorted_checkpoints(self.output_dir):
                raise
            self.failure = error
            step = state.global_step
            is_there = isinstance(error, NotConfirmed)
            what = f"checkpoint-{step} is" if is_there else f"no checkpoint at step {step}:"
            say(f"warning: {what} {error.strerror}; training goes on")
            return
        if self.config.save_total_limit is not None:
            self._rotate(self.config.save_total_limit, state.best_step)

    def finish(self) -> None:
        """Say so if the run ends, stopped by a signal perhaps, without its last checkpoint.

        Raises:
            OSError: what the last save failed with.
        """
        if self.failure is not None:
            raise self.failure

    def _write(self, state: TrainState) -> None:
        best = state.best_step
        for_trainer = trainer_state(
            state,
            self.cadence,
            math.ceil(self.cadence.max_steps / self.cadence.steps_per_epoch),
            self.config.per_device_train_batch_size,
            None if best is None else str(self.output_dir / f"checkpoint-{best}"),
        )
        save_checkpoint(self.output_dir, *self.trained, state, for_trainer, self.run, self.scaler)

    def _rotate(self, limit: int, best_step: int | None) -> None:
        try:
            rotate_checkpoints(self.output_dir, limit, best_step)
        except OSError as error:
            say(f"warning: an old checkpoint cannot be deleted: {error.strerror}")
