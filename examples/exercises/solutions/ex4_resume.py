"""Exercise 4: exact resume."""

import os
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ex4_given import (
    ACCUMULATION,
    BATCH_SIZE,
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


@dataclass
class Progress:
    """The position, from which epoch and place in it follow, and the sum that is under way."""

    step: int = 0  # steps taken
    losses: float = 0.0  # since the last step with a mean_loss


def epoch_order(epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(SEED + epoch)
    return torch.randperm(EXAMPLES, generator=generator).tolist()


def generators() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    # A list instead of numpy's array: torch.load then needs no more than weights_only=True.
    numpy = (name, keys.tolist(), *rest)
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}


def save(path: Path, progress: Progress, **parts: Any) -> None:
    states = {name: part.state_dict() for name, part in parts.items()}
    whole = {**states, "progress": asdict(progress), "generators": generators()}
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        torch.save(whole, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def restore(path: Path, **parts: Any) -> Progress:
    stored = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(stored[name])
    random.setstate(stored["generators"]["python"])
    np.random.set_state(stored["generators"]["numpy"])
    torch.set_rng_state(stored["generators"]["torch"])
    return Progress(**stored["progress"])


def train(directory: Path, tell: Callable[[dict[str, Any]], None]) -> nn.Module:
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    model = Model()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    path, progress = directory / CHECKPOINT, Progress()
    if path.exists():
        progress = restore(path, **parts)
    while progress.step < TOTAL_STEPS:
        epoch, place = divmod(progress.step, STEPS_PER_EPOCH)
        size = BATCH_SIZE * ACCUMULATION
        examples = epoch_order(epoch)[place * size : (place + 1) * size]
        rate, loss = optimizer.param_groups[0]["lr"], 0.0
        for start in range(0, len(examples), BATCH_SIZE):
            batch = examples[start : start + BATCH_SIZE]
            contribution = loss_sum(model, batch) / len(examples)
            contribution.backward()
            loss += contribution.item()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        progress.step += 1
        progress.losses += loss
        row = {"step": progress.step, "examples": examples, "learning_rate": rate, "loss": loss}
        row["mean_loss"] = None
        if progress.step % LOGGING_STEPS == 0:
            row["mean_loss"], progress.losses = progress.losses / LOGGING_STEPS, 0.0
        tell(row)
        if progress.step % SAVE_STEPS == 0 or progress.step == TOTAL_STEPS:
            save(path, progress, **parts)
    return model
