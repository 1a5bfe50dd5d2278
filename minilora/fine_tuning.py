"""One fine-tuning run, from arguments to adapter.

`train` reads in time order: data, model, adapter, optimizer, fit, save. Not here: flags and exit
codes (train, command), how the model is found and how it runs (starting_model).
"""

import dataclasses
import datetime
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minilora import starting_model
from minilora.bert import dataset, load
from minilora.bert.examples import Examples
from minilora.bert.forward import Packed, Padded
from minilora.bert.splits import Splits, read_splits
from minilora.bert.tasks import Task, build_task, tables_of, varied
from minilora.errors import MiniloraError
from minilora.files import disk_errors, scratch_directory, write_file
from minilora.lora.config import LoraConfig
from minilora.lora.peft_files import CARD_NAME, assign_adapter, save_adapter
from minilora.model_card import model_card
from minilora.options import changed
from minilora.starting_model import StartingModel
from minilora.training import distributed, resume
from minilora.training.checkpoint import read_checkpoint
from minilora.training.config import TrainConfig
from minilora.training.evaluation import Batch, evaluate_model
from minilora.training.loop import Training, TrainState, is_finished, plan_timetable
from minilora.training.metrics_file import read_rows
from minilora.training.optim import build_optimizer, build_scheduler
from minilora.training.progress import say
from minilora.training.record import BASE_NAME, RunRecord, environment
from minilora.training.rng import draw_loader_seed, seed_all
from minilora.training.run_directory import fit_in_directory, holding


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    global_step: int
    # train_runtime (seconds of the loop in this process), train_samples_per_second, train_loss, the
    # last (or best) evaluation's eval_..., and test_... with a test file
    metrics: dict[str, float]
    output_dir: str

    @property
    def log_history(self) -> list[dict[str, Any]]:
        """Every row of the run, read from its metrics.jsonl."""
        return read_rows(Path(self.output_dir))


@dataclass(frozen=True)
class Pieces:
    """What a run is made of: the data, the task, the model, and how it runs."""

    config: TrainConfig
    splits: Splits
    examples: dict[str, Examples]
    task: Task
    start: StartingModel
    forward: Packed | Padded
    world_size: int  # processes whose batches a step has
    scorers: dict[str, Any] = field(default_factory=dict)  # of each split, what scored it last

    def batches(self, epoch: int, skip: int) -> Iterator[list[Batch]]:
        """The batches of each optimizer step of an epoch, without the first `skip` steps'."""
        config, examples = self.config, varied(self.task, self.examples["train"], epoch)
        seed = config.seed if config.data_seed is None else config.data_seed
        size, lengths = config.per_device_train_batch_size, np.diff(examples.offsets)
        per_step = size * config.gradient_accumulation_steps * self.world_size
        order = dataset.epoch_order(len(examples), seed, epoch)

        def deal(of_step: np.ndarray) -> list[np.ndarray]:
            return distributed.own_batches(of_step, lengths[of_step], size)

        if config.hf_parity:
            order = distributed.trainers_order(order, size)
            deal = partial(distributed.trainers_batches, batch_size=size)
        how = (per_step, deal, self.forward.collate, self.start.model.device)
        return dataset.epoch_batches(examples, order[skip * per_step :], *how)

    def evaluate(self, split: str, prefix: str) -> dict[str, float]:
        """The model's metrics on a split, under `<prefix>_...` keys."""
        config, device = self.config, self.start.model.device
        if config.hf_parity:
            draw_loader_seed()
        shown = "" if config.disable_tqdm else f"evaluating {split}"
        examples = varied(self.task, self.examples[split], None)
        how = (config.per_device_eval_batch_size, self.forward.collate, device, shown)
        scorer = self.scorers[split] = self.task.scorer(self.splits.rows[split], examples)
        batches = dataset.batches_in_order(examples, *how)
        return evaluate_model(self.forward, self.task, config.hf_parity, batches, scorer, prefix)

    def by_class(self, evaluation: dict[str, Any], state: TrainState) -> dict[str, Any]:
        """What the final model gets right by class; evaluated anew if it was not scored last."""
        scorer = self.scorers.get("validation")
        is_last = evaluation.get("step") == state.global_step or not hasattr(scorer, "by_class")
        if evaluation and (scorer is None or not is_last):
            self.evaluate("validation", "eval")
        return tables_of(self.scorers.get("validation"), "eval")


def fine_tune(train_config: TrainConfig, lora_config: LoraConfig | None = None) -> TrainResult:
    """Run, or resume, one fine-tuning; what `python -m minilora.train` runs. Signals are left
    alone. An `OSError` says what to do about the disk; nothing that existed before is lost.

    With `resume_from_checkpoint`, arguments at their defaults mean "as recorded".

    Args:
        lora_config: exactly the adapter to train, its task type aside; by default the command's,
            which is PEFT's with lora_alpha 16 and lora_dropout 0.1.
    """
    lora_arguments = {}
    if lora_config is not None:
        resumes = train_config.resume_from_checkpoint is not None
        lora_arguments = changed(lora_config) if resumes else dataclasses.asdict(lora_config)
    given = changed(train_config)
    if train_config.extend and train_config.max_steps <= 0:  # to the default, too
        given["num_train_epochs"] = train_config.num_train_epochs
    return run_fine_tuning(given, lora_arguments, should_stop=lambda: False)


def run_fine_tuning(
    train_arguments: dict[str, Any], lora_arguments: dict[str, Any], should_stop: Callable[[], bool]
) -> TrainResult:
    """The same from the arguments that were given: an absent one means its default, or on a resume
    its recorded value. `should_stop` is asked before each step; if true, the run saves and ends.
    """
    with distributed.joined(train_arguments.get("ddp_timeout", TrainConfig.ddp_timeout)):
        return _run(resume.after_a_loss(train_arguments), lora_arguments, should_stop)


def _run(
    train_arguments: dict[str, Any], lora_arguments: dict[str, Any], should_stop: Callable[[], bool]
) -> TrainResult:
    path = train_arguments.get("resume_from_checkpoint")
    if path is None:
        config = TrainConfig(**train_arguments)
        lora = starting_model.new_lora_config(config, lora_arguments)
        if config.output_dir is None and distributed.is_launched():
            raise MiniloraError("torchrun's processes need one directory: give --output_dir")
        # With milliseconds, so that the bare command can be repeated, even by a script.
        dated = datetime.datetime.now().strftime("runs/%Y%m%d-%H%M%S-%f")[:-3]
        plan = resume.ResumePlan(Path(config.output_dir or dated), config, lora)
        with distributed.held_by_first(holding(plan.output_dir, is_new=True), plan.output_dir):
            return train(plan, should_stop)
    own, output_dir = resume.directories(Path(path), train_arguments.get("output_dir"))
    is_new = output_dir != own and not distributed.restarts()
    with distributed.held_by_first(holding(output_dir, is_new), output_dir):
        plan = resume.plan_resume(Path(path), train_arguments, lora_arguments).accepted()
        return train(plan, should_stop)


def train(plan: resume.ResumePlan, should_stop: Callable[[], bool]) -> TrainResult:
    """The run itself, holding its directory's lock."""
    assert plan.config is not None and plan.lora is not None
    lora, output_dir = plan.lora, plan.output_dir
    device = starting_model.chosen_device(plan.config.device)
    config = starting_model.resolve_modes(plan.config, device)
    splits = read_data(config)
    task = build_task(config, splits.labels)

    seed_all(config.seed)
    start = starting_model.load_starting_model(config, task, output_dir / BASE_NAME)
    if plan.stored is None and plan.record is None:
        lora = starting_model.with_new_modules(lora, start)
    starting_model.check_new_modules(start.new_modules, lora, output_dir)
    examples = tokenize_all(config, splits, task, start)
    plan = dataclasses.replace(plan, config=config, lora=lora)
    record = new_record(plan, splits, start, examples)
    resume.check_same_inputs(plan, record)
    distributed.by_first(lambda: starting_model.keep_merged(start, config, output_dir / BASE_NAME))
    resume.check_ranks(plan, record, len(examples["train"]))
    if hasattr(task, "weigh"):
        task.weigh(examples["train"])  # pyright: ignore[reportAttributeAccessIssue]

    starting_model.attach_adapter(start, config, lora)
    forward = starting_model.choose_forward(config, start.model, start.tokenizer, device)
    trained = starting_model.prepare_training(config, forward)

    optimizer = build_optimizer(start.model, config)
    lengths = (len(examples["train"]), "validation" in examples, record.world_size)
    timetable = plan_timetable(config, *lengths)
    starting_model.describe_start(start, config, examples, timetable.max_steps, output_dir)
    scheduler = build_scheduler(optimizer, config, timetable.max_steps)
    # Only float16 needs scaling: its smallest gradients would be zero.
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
    training = Training(start.model, optimizer, scheduler, trained, task, scaler, timetable)

    pieces = Pieces(config, splits, examples, task, start, forward, record.world_size)
    evaluate = partial(pieces.evaluate, "validation", "eval") if "validation" in examples else None
    metrics = fit_in_directory(training, record, pieces.batches, evaluate, plan, should_stop)

    state = training.state
    if is_finished(state, training.timetable):
        evaluation = final_evaluation(training, output_dir, config)
        metrics |= {name: evaluation[name] for name in evaluation if name.startswith("eval_")}
        metrics |= pieces.evaluate("test", "test") if "test" in examples else {}
        finished = dataclasses.replace(record, result=metrics | pieces.by_class(evaluation, state))
        distributed.by_first(lambda: write_final_files(start, output_dir, finished))
    return TrainResult(state.global_step, metrics, str(output_dir))


def new_record(
    plan: resume.ResumePlan, splits: Splits, start: StartingModel, examples: dict[str, Examples]
) -> RunRecord:
    """What is written down of the run before its first step."""
    assert plan.config is not None and plan.lora is not None
    return RunRecord(
        plan.config,
        plan.lora,
        splits.labels,
        splits.has_pairs(),
        splits.fingerprints,
        start.sha256,
        environment(plan.config.device),
        world_size=plan.record.world_size if plan.record else distributed.world_size(),
        extended=plan.extended(),
        resumed=plan.resumed(),
        base_settings=start.settings(),
        tokens_sha256={s: dataset.tokens_fingerprint(found) for s, found in examples.items()},
    )


def read_data(config: TrainConfig) -> Splits:
    """Read every file of the run."""
    if (config.train_file or config.dataset_name) is None and config.task != TrainConfig.task:
        packaged = f"the packaged sentences are for {TrainConfig.task}"
        raise MiniloraError(f"{packaged}, not {config.task}: give --train_file or --dataset_name")
    splits = read_splits(config)
    evaluates = config.eval_strategy not in (None, "no") or config.threshold == "best"
    if (evaluates or config.best_metric()) and "validation" not in splits.rows:
        advice = "give --validation_file or --validation_split"
        raise MiniloraError(f"evaluation is asked for without data: {advice}")
    return splits


def tokenize_all(
    config: TrainConfig, splits: Splits, task: Task, start: StartingModel
) -> dict[str, Examples]:
    """Every split as token arrays. How many texts were cut is said: no loss of data is silent."""
    max_length = load.input_length(start.model, start.tokenizer, config.max_length)
    examples = {}
    for split, rows in splits.rows.items():
        file = splits.files[split]
        examples[split] = dataset.tokenize(rows, task, start.tokenizer, max_length, file)
        if told := dataset.shortening(examples[split], len(rows), max_length):
            say(f"{file}: {told}")
    return examples


def final_evaluation(training: Training, output_dir: Path, config: TrainConfig) -> dict[str, Any]:
    """The row of the log that the final adapter was evaluated with: the last one.

    With `load_best_model_at_end` it is the best, and the model is put back to it: of the
    checkpoints that are there and verify, for one may have been deleted, or never written to a full
    disk, and step 0 has none.
    """
    metric, rows = config.best_metric() or "", training.state.log_history
    every = read_rows(output_dir) if config.load_best_model_at_end else []
    ranked = [row for row in every if row["step"] and row.get(metric) is not None]  # null is NaN
    ranked.sort(key=lambda row: row[metric], reverse=config.best_is_greatest())
    for row in ranked:
        try:
            best = read_checkpoint(output_dir / f"checkpoint-{row['step']}")
        except MiniloraError as error:
            say(f"warning: the best is passed over for the next: {error}")
            continue
        assign_adapter(training.model, best.adapter)
        return {name: math.nan if value is None else value for name, value in row.items()}
    return next((row for row in reversed(rows) if "eval_loss" in row), {})


def write_final_files(start: StartingModel, output_dir: Path, record: RunRecord) -> None:
    """The adapter, its model card (one that is there is kept), the tokenizer, and the result."""
    if not (output_dir / CARD_NAME).exists():
        is_merged = (output_dir / BASE_NAME).is_dir()
        merged = record.arguments.model_name_or_path if is_merged else None
        card = model_card(output_dir.resolve().name, start.base.location, merged, record)
        write_file(output_dir / CARD_NAME, card.encode(errors="replace"))
    save_adapter(start.model, output_dir)
    with scratch_directory(output_dir / "tokenizer") as directory, disk_errors(directory):
        for file in start.tokenizer.save_pretrained(directory):
            if Path(file).is_file():
                write_file(output_dir / Path(file).name, Path(file).read_bytes())
    record.write(output_dir)
