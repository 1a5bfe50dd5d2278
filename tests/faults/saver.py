"""A whole run without transformers: starts or resumes in a directory, trains a tiny module, saves and
rotates checkpoints, ends with an adapter. The rooms are minilora's own; only the model is a toy.

    python -m tests.faults.saver
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from minilora import LoraConfig, MiniloraError, TrainConfig, add_adapter, save_adapter
from minilora.bert.dropout import MaskStream, use_fast_dropout
from minilora.durable import exclusive, sweep_leftovers
from minilora.training.loop import example_shares, fit
from minilora.training.plan import Saver, build_optimisation, plan_cadence
from minilora.training.resume import begin, check_same_inputs, describe_run
from minilora.training.rng import seed_all
from minilora.training.run import (
    METRICS_NAME,
    MetricsFile,
    ResumePoint,
    explained,
    find_resume_point,
    new_output_dir,
)
from tests.faults.forks import serve

STEPS, EXAMPLES, WIDTH = 4, 6, 4
CONFIG = TrainConfig(
    max_steps=STEPS,
    per_device_train_batch_size=2,
    logging_steps=1,
    save_strategy="steps",
    save_steps=1,
    save_total_limit=2,
)
ADAPTER = LoraConfig(r=2, target_modules=["query"], lora_dropout=0.5)


class Toy(nn.Module):
    """Something to adapt: dropout on the way, so that a wrong random state is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x)


def updates(epoch: int, skip: int):
    generator = torch.Generator().manual_seed(epoch)
    data = torch.randn(EXAMPLES // 2, 2, WIDTH, generator=generator)
    for batch in data[skip:]:
        yield [{"x": batch, "labels": batch.sum(-1)}]


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["x"]).sum(-1) - batch["labels"]).square().mean()


def where_to_begin(output_dir: Path) -> ResumePoint | None:
    """As a user who says "go on, or start if there is nothing to go on from"."""
    try:
        return find_resume_point(output_dir)
    except MiniloraError:
        new_output_dir(output_dir)
        return None


def run(output_dir: Path) -> int:
    """What `fine_tuning.train` does, without text."""
    with explained(output_dir):
        point = where_to_begin(output_dir)
    with explained(output_dir), exclusive(output_dir):
        sweep_leftovers(output_dir)
        seed_all(CONFIG.seed)
        model = Toy()
        run = describe_run(CONFIG, ADAPTER, None, False, {}, "toy", {})
        if point is not None:
            check_same_inputs(point, run)
        cadence = plan_cadence(CONFIG, EXAMPLES, validates=False)
        add_adapter(model, ADAPTER)
        use_fast_dropout(model, MaskStream(CONFIG.seed))
        optimizer, scheduler = build_optimisation(CONFIG, model, STEPS)
        scaler = torch.amp.GradScaler("cpu")  # not that float32 needs one: it is saved, too
        trained = (model, optimizer, scheduler, scaler)
        state = begin(CONFIG, cadence, output_dir, run, point, *trained)
        metrics = MetricsFile(output_dir / METRICS_NAME, state.log_history)
        save = Saver(CONFIG, cadence, output_dir, run, *trained)
        fit(
            *trained, state, cadence, CONFIG.max_grad_norm, updates, loss, None, metrics.append,
            save, lambda: False, lambda *_: None, example_shares, lambda: None,
        )  # fmt: skip
        save(state)  # once more: a checkpoint that is there is replaced
        metrics.finish()
        save.finish()
        save_adapter(model, output_dir)
    return 0


if __name__ == "__main__":
    serve(run)
