"""Exercise 3: the loop."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    learning_rate: float = 0.02
    epochs: int = 3
    batch_size: int = 4
    accumulation: int = 2
    warmup: int = 2
    max_grad_norm: float = 0.5
    logging_steps: int = 2
    seed: int = 7


def share_of_peak(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return step / warmup
    return (total - step) / (total - warmup)


def epoch_batches(examples: Batch, batch_size: int, seed: int, epoch: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(len(examples["labels"]), generator=generator)
    parts = order.split(batch_size)
    return [{name: tensor[part] for name, tensor in examples.items()} for part in parts]


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch], max_grad_norm: float
) -> tuple[float, float]:
    count, step_loss = sum(len(batch["labels"]) for batch in batches), 0.0
    for batch in batches:
        loss = model(**batch).loss * (len(batch["labels"]) / count)
        loss.backward()
        step_loss += loss.item()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return step_loss, norm.item()


def train(model: nn.Module, examples: Batch, settings: Settings) -> list[dict[str, float]]:
    batches = math.ceil(len(examples["labels"]) / settings.batch_size)
    total = math.ceil(batches / settings.accumulation) * settings.epochs
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, settings.learning_rate, weight_decay=0.0)
    scheduler = LambdaLR(optimizer, lambda step: share_of_peak(step, settings.warmup, total))
    model.train()
    step, losses, log = 0, [], []
    for epoch in range(settings.epochs):
        parts = epoch_batches(examples, settings.batch_size, settings.seed, epoch)
        for start in range(0, len(parts), settings.accumulation):
            rate = scheduler.get_last_lr()[0]
            of_step = parts[start : start + settings.accumulation]
            loss, norm = training_step(model, optimizer, of_step, settings.max_grad_norm)
            scheduler.step()
            step, losses = step + 1, [*losses, loss]
            if step % settings.logging_steps == 0:
                mean, losses = sum(losses) / len(losses), []
                row = {"step": step, "loss": mean, "grad_norm": norm, "learning_rate": rate}
                log.append(row)
    return log
