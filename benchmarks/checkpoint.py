"""What a checkpoint costs: HF Trainer + PEFT and minilora, the same model and adapter, alternating.

    python benchmarks/checkpoint.py [--saves 15]

Randomly drawn models in the shapes of MiniLM-L6 and BERT-base, r=8 on query and value. For each:
milliseconds of a save (median) and bytes of a checkpoint; then, for the smaller one, milliseconds
from asking for a resume to its first step, 10 and 10,000 steps into an epoch; and a save's after 10,
1,000 and 100,000 rows of the log, kept in trainer_state.json, as Trainer does and a loop of one's
own, or in metrics.jsonl, as a run does. The last line is JSON.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from minilora import (
    LoraConfig,
    RunRecord,
    TrainConfig,
    Training,
    TrainState,
    add_adapter,
    load_checkpoint,
    save_checkpoint,
)
from minilora.bert.dataset import epoch_batches, epoch_order
from minilora.bert.examples import Batch, Examples
from minilora.bert.forward import Padded
from minilora.bert.tasks import build_task
from minilora.starting_model import resolve_modes
from minilora.training.loop import plan_timetable, training_step
from minilora.training.metrics_file import KEPT_ROWS, METRICS_NAME, MetricsFile
from minilora.training.optim import build_optimizer, build_scheduler
from minilora.training.record import environment

SHAPES = {
    "MiniLM-L6": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "BERT-base": {},
}
EXAMPLES, TOKENS, BATCH = 20_100, 16, 2
STEPS = EXAMPLES // BATCH


def base(shape: str) -> BertForSequenceClassification:
    set_seed(0)
    return BertForSequenceClassification(BertConfig(**SHAPES[shape]))


class Rows(torch.utils.data.Dataset):
    """Sentences of the same length, all alike: only their number matters here."""

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": [1] * TOKENS, "attention_mask": [1] * TOKENS, "labels": index % 2}


class Clock(TrainerCallback):
    """Notes when the first step begins, and ends the training after it."""

    began = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = self.began or time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


class Theirs:
    """HF Trainer + PEFT after one step."""

    def __init__(self, shape: str, directory: Path) -> None:
        self.directory = directory
        self.clock = Clock()
        config = PeftConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
        arguments = TrainingArguments(
            output_dir=str(directory),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        self.trainer = Trainer(
            get_peft_model(base(shape), config),
            arguments,
            train_dataset=Rows(),
            callbacks=[self.clock],
        )
        self.trainer.remove_callback(PrinterCallback)

    def prepare(self) -> None:
        self.trainer.train()

    def save(self, step: int) -> Path:
        self.trainer.state.global_step = step
        self.trainer._save_checkpoint(self.trainer.model, None)
        return self.directory / f"checkpoint-{step}"

    def resume(self, step: int) -> float:
        """Seconds from asking to the first step."""
        path = self.directory / f"checkpoint-{step}"
        file = path / "trainer_state.json"
        values = {**json.loads(file.read_text()), "global_step": step, "epoch": step / STEPS}
        file.write_text(json.dumps(values))
        self.clock.began = 0.0
        start = time.perf_counter()
        self.trainer.train(resume_from_checkpoint=str(path))
        return self.clock.began - start


class Ours:
    """minilora after one step."""

    def __init__(self, shape: str, directory: Path) -> None:
        self.directory = directory
        config = TrainConfig(max_steps=STEPS, per_device_train_batch_size=BATCH)
        self.config = resolve_modes(config, torch.device("cpu"))
        lora = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
        self.record = RunRecord(self.config, lora, ["0", "1"], False, {}, "-", environment())
        model = base(shape)
        add_adapter(model, lora)
        optimizer = build_optimizer(model, self.config)
        self.training = Training(
            model,
            optimizer,
            build_scheduler(optimizer, self.config, STEPS),
            Padded(model, pad_token_id=0),
            build_task(self.config, ["0", "1"]),
            timetable=plan_timetable(self.config, EXAMPLES, validates=False),
        )
        examples = Examples(
            input_ids=np.ones(EXAMPLES * TOKENS, dtype=np.int32),
            token_type_ids=None,
            offsets=np.arange(EXAMPLES + 1) * TOKENS,
            labels=np.arange(EXAMPLES) % 2,
            row=np.arange(EXAMPLES),
            truncated=0,
        )
        self.examples = examples

    def batches(self, epoch: int, skip: int) -> list[Batch]:
        """Of the first step that is not skipped."""
        order = epoch_order(EXAMPLES, 42, epoch)[skip * BATCH :]
        how = (BATCH, lambda of_step: [of_step], self.training.forward.collate, torch.device("cpu"))
        return next(epoch_batches(self.examples, order, *how))

    def prepare(self) -> None:
        training_step(self.training, self.config, self.batches(0, 0))

    def save(self, step: int) -> Path:
        self.training.state = TrainState(global_step=step, step_in_epoch=step)
        return save_checkpoint(self.directory, self.training, self.record)

    def resume(self, step: int) -> float:
        """Seconds from asking to the first step."""
        start = time.perf_counter()
        state = load_checkpoint(self.directory / f"checkpoint-{step}", self.training)
        self.batches(state.epoch, state.step_in_epoch)
        return time.perf_counter() - start


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def measure(shape: str, directory: str | None, saves: int, resume: bool = False) -> dict:
    """Of both sides: the seconds of each save, and a checkpoint's bytes; if asked, those of a resume."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        sides = {
            "trainer": Theirs(shape, Path(place, "theirs")),
            "minilora": Ours(shape, Path(place, "ours")),
        }
        Path(place, "ours").mkdir()
        for side in sides.values():
            side.prepare()
        found: dict = {"seconds": {name: [] for name in sides}, "bytes": {}}
        gc.disable()
        for step in range(1, saves + 2):
            for name, side in sides.items():
                start = time.perf_counter()
                path = side.save(step)
                found["seconds"][name].append(time.perf_counter() - start)
                found["bytes"][name] = size(path)
        gc.enable()
        for of_side in found["seconds"].values():
            del of_side[0]  # to warm up
        more = {"resume_ms": resumes(sides), "log": logs(sides["minilora"])} if resume else {}
        return found | more


def resumes(sides: dict) -> dict:
    """Milliseconds to the first step, by side and step; the median of nine after one to warm up."""
    found = {}
    for step in (10, 10_000):
        for name, side in sides.items():
            side.save(step)
            times = [side.resume(step) for _ in range(10)]
            found[f"{name} at step {step}"] = 1000 * statistics.median(times[1:])
    return found


def logs(ours: Ours) -> dict:
    """(milliseconds of a save, bytes of the checkpoint), by rows of the log and where they are."""
    found = {}
    gc.disable()
    for count in (10, 1_000, 100_000):
        for name in ("trainer_state.json", METRICS_NAME):
            state = ours.training.state = TrainState(global_step=count)
            state.log_history = [
                {
                    "step": n,
                    "epoch": n / STEPS,
                    "loss": 1 / n,
                    "grad_norm": n**0.5,
                    "learning_rate": n,
                }
                for n in range(1, count + 1)
            ]
            metrics = MetricsFile(ours.directory / METRICS_NAME, state, None, print)
            if name == METRICS_NAME:
                del state.log_history[:-KEPT_ROWS]
            times = []
            for _ in range(6):
                state.global_step += 1
                start = time.perf_counter()
                metrics.sync()
                path = save_checkpoint(ours.directory, ours.training, ours.record)
                times.append(time.perf_counter() - start)
            found[f"{count} rows in {name}"] = [1000 * statistics.median(times[1:]), size(path)]
    gc.enable()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=15)
    parser.add_argument("--directory", help="where to write; the disk matters")
    asked = parser.parse_args()
    torch.set_num_threads(2)
    results = {}
    for shape in SHAPES:
        found = results[shape] = measure(
            shape, asked.directory, asked.saves, resume=shape == "MiniLM-L6"
        )
        ms = {name: 1000 * statistics.median(of_side) for name, of_side in found["seconds"].items()}
        print(
            f"{shape:10} Trainer {ms['trainer']:.1f} ms {found['bytes']['trainer']:,} bytes; "
            f"minilora {ms['minilora']:.1f} ms {found['bytes']['minilora']:,} bytes; "
            f"ratio of times {ms['minilora'] / ms['trainer']:.2f}"
        )
        for name, value in found.get("resume_ms", {}).items():
            print(f"{shape:10} first step after a resume: {name}: {value:.0f} ms")
        for name, (ms_of_it, in_bytes) in found.get("log", {}).items():
            print(f"{shape:10} a save after {name}: {ms_of_it:.1f} ms {in_bytes:,} bytes")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
