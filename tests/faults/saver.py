"""A whole run without transformers: starts or resumes in a directory, trains a tiny module, saves
and rotates checkpoints, ends with an adapter. All but the model is minilora's own.

    python -m tests.faults.saver
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from minilora import (
    LoraConfig,
    MiniloraError,
    RunRecord,
    TrainConfig,
    Training,
    add_adapter,
    save_adapter,
    save_checkpoint,
)
from minilora.bert.dropout import MaskStream, use_fast_dropout
from minilora.files import exclusive, sweep_leftovers
from minilora.training.loop import plan_timetable
from minilora.training.optim import build_optimizer, build_scheduler
from minilora.training.record import environment
from minilora.training.resume import ResumePlan, check_same_inputs, plan_resume
from minilora.training.rng import seed_all
from minilora.training.run_directory import advice_on_disk_errors, fit_in_directory, new_output_dir
from tests.faults.forks import serve

STEPS, EXAMPLES, WIDTH = 4, 6, 4
CONFIG = TrainConfig(
    max_steps=STEPS,
    per_device_train_batch_size=2,
    logging_steps=1,
    save_strategy="steps",
    save_steps=1,
    save_total_limit=2,
    train_file="toy",
)
ADAPTER = LoraConfig(r=2, target_modules=["query"], lora_dropout=0.5)


class Toy(nn.Module):
    """Something to adapt: dropout on the way, so that a wrong random state is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.query(batch["x"]).sum(-1)


class Sum:
    """The task: each row's sum."""

    def training_loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (logits - batch["labels"]).square().mean()

    def loss_weight(self, batch: dict[str, Tensor]) -> int:
        return len(batch["labels"])


def batches(epoch: int, skip: int):
    generator = torch.Generator().manual_seed(epoch)
    data = torch.randn(EXAMPLES // 2, 2, WIDTH, generator=generator)
    for batch in data[skip:]:
        yield [{"x": batch, "labels": batch.sum(-1), "example": torch.arange(len(batch))}]


def build() -> Training:
    """The toy with its adapter, and everything that a step changes."""
    model = Toy()
    add_adapter(model, ADAPTER)
    use_fast_dropout(model, MaskStream(CONFIG.seed))
    optimizer = build_optimizer(model, CONFIG)
    return Training(
        model,
        optimizer,
        build_scheduler(optimizer, CONFIG, STEPS),
        task=Sum(),
        scaler=torch.amp.GradScaler("cpu"),  # not that float32 needs one: it is saved, too
        timetable=plan_timetable(CONFIG, EXAMPLES, validates=False),
    )


def run(output_dir: Path) -> int:
    """Go on, or start if there is nothing to go on from; save once more at the end."""
    with advice_on_disk_errors(output_dir):
        try:
            plan_resume(output_dir)
            resumes = True
        except MiniloraError:
            new_output_dir(output_dir)
            resumes = False
        with exclusive(output_dir):
            sweep_leftovers(output_dir)
            plan = ResumePlan(output_dir, CONFIG, ADAPTER)
            plan = plan_resume(output_dir) if resumes else plan
            seed_all(CONFIG.seed)
            record = RunRecord(CONFIG, ADAPTER, None, False, {}, "toy", environment())
            check_same_inputs(plan, record)
            training = build()
            fit_in_directory(training, record, batches, None, plan, lambda: False)
            save_checkpoint(output_dir, training, record)  # one that is there is replaced
            save_adapter(training.model, output_dir)
    return 0


if __name__ == "__main__":
    serve(run)
