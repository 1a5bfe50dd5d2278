"""One fine-tuning run from arguments to adapter: the place where the three folders meet.

`train` reads in time order: seed, data, model, adapter, optimizer, resume, fit, save. From there it
is one hop to `loop.fit` and a second to `loop.training_step`, where `optimizer.step()` is.
"""

import dataclasses
import datetime
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minilora.bert import data, packaged, tables, tasks, weights
from minilora.durable import exclusive, sweep_leftovers, write_file
from minilora.errors import MiniloraError
from minilora.lora.adapter_files import find_adapter, load_adapter, read_config, save_adapter
from minilora.lora.config import LoraConfig, config_from_dict
from minilora.lora.inject import add_adapter
from minilora.lora.merge import merge_and_unload
from minilora.training.checkpoint import (
    environment,
    is_trainer_checkpoint,
    load_checkpoint,
    load_trainer_checkpoint,
    rotate_checkpoints,
    save_checkpoint,
    sorted_checkpoints,
    verify,
)
from minilora.training.config import (
    LORA_DEFAULTS,
    TrainConfig,
    reconcile,
    refuse_bending,
    train_config_from_dict,
)
from minilora.training.loop import (
    Batch,
    Cadence,
    TrainState,
    evaluate_model,
    example_shares,
    fit,
    is_finished,
    mean_loss,
    trainer_shares,
)
from minilora.training.optim import build_optimizer, build_scheduler
from minilora.training.rng import draw_loader_seed, seed_all
from minilora.training.run import (
    METRICS_NAME,
    MetricsFile,
    ResumePoint,
    clear_way,
    find_resume_point,
    new_output_dir,
    write_run,
)
from minilora.training.trainer_files import recorded_arguments, trainer_state

# Parts of the environment on which bit-exactness depends; the others are recorded for the reader.
EXACTNESS = ("torch", "cpu_capability", "num_threads", "cuda")


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    global_step: int
    metrics: dict[str, float]
    """train_runtime (seconds of the loop in this process), train_samples_per_second, train_loss,
    and the last (or best) evaluation's eval_..., and test_... with a test file."""
    output_dir: str
    log_history: list[dict[str, Any]]


@dataclass(frozen=True)
class TaskData:
    """The rows of a run, by part ("train", and where given "validation" and "test"), and what their
    labels mean.
    """

    rows: dict[str, list[tables.Row]]
    files: dict[str, str]
    """Where each part came from, for errors."""
    fingerprints: dict[str, str]
    """SHA-256 of each part's file."""
    labels: list[str] | None
    """Class names in id order; None for regression."""


def fine_tune(train_config: TrainConfig, lora_config: LoraConfig | None = None) -> TrainResult:
    """Run, or resume, one fine-tuning; what `python -m minilora.train` runs. Signals are left
    alone.

    With `resume_from_checkpoint`, arguments at their defaults mean "as recorded".

    Raises:
        MiniloraError: bad arguments or data, named; nothing that existed before is lost.
    """
    lora_arguments = {}
    if lora_config is not None:
        resumes = train_config.resume_from_checkpoint is not None
        lora_arguments = _changed(lora_config) if resumes else dataclasses.asdict(lora_config)
    return run_fine_tuning(_changed(train_config), lora_arguments, should_stop=lambda: False)


def run_fine_tuning(
    train_arguments: dict[str, Any], lora_arguments: dict[str, Any], should_stop: Callable[[], bool]
) -> TrainResult:
    """Run, or resume, one fine-tuning from the arguments that were given (an absent one means its
    default, or on a resume its recorded value).

    Args:
        should_stop: asked after each step; when true, a checkpoint is saved and the run ends.
    """
    path = train_arguments.get("resume_from_checkpoint")
    if path is None:
        config = TrainConfig(**train_arguments)
        lora_config = new_lora_config(config, lora_arguments)
        point = None
        output_dir = Path(config.output_dir or _dated_directory())
        new_output_dir(output_dir)
    else:
        point = find_resume_point(Path(path))
        config, lora_config = resumed_arguments(point, train_arguments, lora_arguments)
        output_dir = point.output_dir
        if point.checkpoint is None and point.run and "result" in point.run:
            raise MiniloraError(
                f"{output_dir} is finished and kept no checkpoint (save_strategy no): nothing to resume"
            )
    with exclusive(output_dir):
        sweep_leftovers(output_dir)
        if point is not None:
            clear_way(point)
        return train(config, lora_config, output_dir, point, should_stop)


def train(
    config: TrainConfig,
    lora_config: LoraConfig,
    output_dir: Path,
    point: ResumePoint | None,
    should_stop: Callable[[], bool],
) -> TrainResult:
    """The run itself, holding `output_dir`'s lock."""
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    task_data = read_data(config)

    seed_all(config.seed)
    found = weights.locate(config.model_name_or_path)
    base = base_of(found) if found.is_adapter else found
    model, new_tensors = weights.load_classifier(
        base.location, config.model_revision, task_data.labels, config.task
    )
    tokenizer = weights.load_tokenizer(base.location, config.model_revision)
    if found.is_adapter and config.on_adapter == "merge":
        load_adapter(model, found.location)
        merge_and_unload(model)
    run = describe_run(config, lora_config, task_data, weights.model_fingerprint(model))
    if point is not None:
        check_same_inputs(point, run)
    pad_token_id = weights.pad_token_id(tokenizer)
    examples = tokenize_data(
        task_data, tokenizer, input_length(config.max_length, model, tokenizer)
    )
    cadence = plan_cadence(config, len(examples["train"]), validates="validation" in examples)

    if found.is_adapter and config.on_adapter == "continue":
        load_adapter(model, found.location, is_trainable=True)
    else:
        add_adapter(model, lora_config)
    model.to(device)  # pyright: ignore[reportArgumentType]
    report_start(model, found, base, config, new_tensors, output_dir)
    optimizer, scheduler = build_optimisation(config, model, cadence.max_steps)
    seed_all(config.seed)  # again, as Trainer does: how much was drawn so far depends on the model

    state = begin(config, cadence, output_dir, run, point, model, optimizer, scheduler)
    metrics_file = MetricsFile(output_dir / METRICS_NAME, state.log_history)
    evaluate = evaluator(config, model, task_data, examples, pad_token_id, device)
    if evaluates_at_start(config, task_data) and not state.log_history:
        state.log_history.append({"step": 0, "epoch": 0.0, **evaluate("validation", "eval")})
        metrics_file.append(state.log_history[-1])

    with TrainingBar(cadence.max_steps, state.global_step) as bar:
        fit(
            model,
            optimizer,
            scheduler,
            state,
            cadence,
            config.max_grad_norm,
            updates=training_updates(config, examples["train"], pad_token_id, device),
            loss=tasks.training_loss(config.task, config.label_smoothing_factor),
            evaluate=partial(evaluate, "validation", "eval") if "validation" in examples else None,
            record=metrics_file.append,
            save=saver(config, cadence, output_dir, run, model, optimizer, scheduler),
            should_stop=should_stop,
            progress=bar.advance,
            shares=trainer_shares if config.hf_parity else example_shares,
            begin_epoch=draw_loader_seed if config.hf_parity else draw_nothing,
        )
    metrics = {**bar.speed(), "train_loss": mean_loss(state)}
    if not is_finished(state, cadence):
        return TrainResult(state.global_step, metrics, str(output_dir), state.log_history)

    if config.load_best_model_at_end and state.best_step is not None:
        load_adapter(model, output_dir / f"checkpoint-{state.best_step}", is_trainable=True)
    metrics |= reported_evaluation(config, state)
    if "test" in examples:
        metrics |= evaluate("test", "test")
    write_final_files(output_dir, model, tokenizer, {**run, "result": metrics})
    return TrainResult(state.global_step, metrics, str(output_dir), state.log_history)


def new_lora_config(config: TrainConfig, lora_arguments: dict[str, Any]) -> LoraConfig:
    """The adapter to train: as asked, or, when an adapter directory is continued, as its file says.

    Raises:
        MiniloraError: an argument contradicts the adapter that is to be continued.
    """
    found = weights.locate(config.model_name_or_path)
    if not found.is_adapter or config.on_adapter == "merge":
        given = {**LORA_DEFAULTS, **lora_arguments, "task_type": tasks.PEFT_TASK_TYPE}
        return LoraConfig(**given)
    stored = read_config(find_adapter(found.location))
    refused = changes(stored, lora_arguments, ignored=("task_type",))
    if refused:
        raise MiniloraError(
            f"{found.location} is to be continued and its adapter has other settings: "
            f"{', '.join(refused)}; leave them out, or use --on_adapter merge for a new adapter"
        )
    return dataclasses.replace(stored, inference_mode=False)


def base_of(adapter: weights.Located) -> weights.Located:
    """The model that an adapter directory was trained on, as its config names it.

    Raises:
        MiniloraError: it names none, or there is none where it says.
    """
    directory = find_adapter(adapter.location)
    name = read_config(directory).base_model_name_or_path
    if not name:
        raise MiniloraError(f"{directory} does not name its base model (base_model_name_or_path)")
    try:
        base = weights.locate(name)
    except MiniloraError as error:
        raise MiniloraError(f"{directory} names the base model {name!r}: {error}") from None
    if base.is_adapter:
        raise MiniloraError(f"{directory} names as its base model {name!r}, which is an adapter")
    return base


def resumed_arguments(
    point: ResumePoint, train_arguments: dict[str, Any], lora_arguments: dict[str, Any]
) -> tuple[TrainConfig, LoraConfig]:
    """The recorded arguments, with those applied that a resume may change.

    Where only HF Trainer has been, the arguments are the given ones, completed by what its files
    tell.

    Raises:
        MiniloraError: lists every given argument that would bend the run, old -> new.
    """
    place = str(point.checkpoint or point.output_dir)
    foreign = point.checkpoint is not None and is_trainer_checkpoint(point.checkpoint)
    told = recorded_arguments(point.checkpoint) if foreign and point.checkpoint else {}
    if point.run is None:
        assert point.checkpoint is not None
        lora_config = dataclasses.replace(read_config(point.checkpoint), inference_mode=False)
        config = TrainConfig(**{**told, **train_arguments})
    else:
        lora_config = config_from_dict(point.run["lora"], place)
        config = reconcile(train_config_from_dict(point.run["arguments"], place), train_arguments)
    bending = changes(lora_config, lora_arguments, ignored=("task_type",))
    if config.max_steps <= 0:
        told.pop("max_steps", None)  # counted in epochs here; the schedule's check compares them
    refuse_bending(bending + [f"{c} (in {place})" for c in changes(config, told)])
    return config, lora_config


def changes(
    config: TrainConfig | LoraConfig, values: dict[str, Any], ignored: tuple[str, ...] = ()
) -> list[str]:
    """ "name: old -> new" for each of `values` that `config` does not have."""
    return [
        f"{name}: {getattr(config, name)} -> {value}"
        for name, value in values.items()
        if value != getattr(config, name) and name not in ignored
    ]


def read_data(config: TrainConfig) -> TaskData:
    """Read every file of the run and fix what its labels mean.

    Raises:
        MiniloraError: names the file, the line and what is wrong.
    """
    files = {
        "train": config.train_file,
        "validation": config.validation_file,
        "test": config.test_file,
    }
    if config.train_file is None:
        files["train"] = str(packaged.TRAIN_FILE)
        files["validation"] = config.validation_file or str(packaged.VALIDATION_FILE)
    rows = {
        part: tables.read_rows(
            Path(file), config.text_column, config.text_pair_column, config.label_column
        )
        for part, file in files.items()
        if file is not None
    }
    if config.validation_split > 0:
        rows["train"], rows["validation"] = data.split_rows(
            rows["train"], config.validation_split, config.seed
        )
        files["validation"] = files["train"]
    if "validation" not in rows and (
        config.best_metric() or config.eval_strategy not in (None, "no")
    ):
        raise MiniloraError(
            "evaluation is asked for without data: give --validation_file or --validation_split"
        )
    check_pairs(rows, files)
    return TaskData(
        rows=rows,
        labels=None
        if config.task == "regression"
        else tasks.label_names(rows["train"], str(files["train"])),
        fingerprints={
            part: data.file_fingerprint(Path(file))
            for part, file in files.items()
            if file is not None
        },
        files={part: str(file) for part, file in files.items()},
    )


def check_pairs(rows: dict[str, list[tables.Row]], files: dict[str, str | None]) -> None:
    """Refuse files of which some have a second text and some have not.

    Raises:
        MiniloraError: names two that differ.
    """
    has_pair = {part: examples[0].pair is not None for part, examples in rows.items()}
    for part, pair in has_pair.items():
        if pair != has_pair["train"]:
            one, other = ("two texts", "one") if pair else ("one text", "two")
            raise MiniloraError(
                f"{files[part]} has {one} a row, {files['train']} has {other}: name --text_pair_column"
            )


def tokenize_data(
    task_data: TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, data.Examples]:
    """Each part of the data as flat token arrays. Says how many texts were cut."""
    examples = {}
    for part, rows in task_data.rows.items():
        place = task_data.files[part]
        if task_data.labels is None:
            labels = tasks.real_values(rows, place)
        else:
            labels = tasks.class_ids(rows, task_data.labels, place)
        examples[part] = data.tokenize(rows, labels, tokenizer, max_length, f"tokenizing {part}")
        if examples[part].truncated:
            say(
                f"{place}: {examples[part].truncated} of {len(rows)} texts were cut at {max_length} tokens"
            )
    return examples


def input_length(
    asked: int | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> int:
    """Tokens kept of each example.

    Raises:
        MiniloraError: more are asked for than the model has positions.
    """
    longest = weights.longest_input(model, tokenizer)
    if asked is not None and asked > longest:
        raise MiniloraError(f"max_length is {asked}; this model takes {longest} tokens at most")
    return asked or longest


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


def describe_run(
    config: TrainConfig, lora_config: LoraConfig, task_data: TaskData, model_fingerprint: str
) -> dict[str, Any]:
    """What `run.json` and every checkpoint record: enough to rebuild the run, and to notice that it
    is another.
    """
    arguments = dataclasses.asdict(config)
    for name in ("train_file", "validation_file", "test_file", "model_name_or_path"):
        if arguments[name] is not None and Path(arguments[name]).exists():
            arguments[name] = str(Path(arguments[name]).resolve())
    # Where the run lies and what it was resumed from is known to whoever resumes it.
    arguments["output_dir"] = arguments["resume_from_checkpoint"] = None
    return {
        "arguments": arguments,
        "lora": dataclasses.asdict(lora_config),
        "labels": task_data.labels,
        "data_sha256": task_data.fingerprints,
        "model_sha256": model_fingerprint,
        "environment": {**environment(), "transformers": transformers.__version__},
    }


def check_same_inputs(point: ResumePoint, run: dict[str, Any]) -> None:
    """Refuse to resume on another base model or on other data than the recorded.

    Raises:
        MiniloraError: lists what changed.
    """
    recorded = point.run
    if recorded is None:
        return  # Trainer records neither
    changed = [
        f"{part} file ({run['arguments'][f'{part}_file'] or 'packaged'})"
        for part, digest in recorded["data_sha256"].items()
        if run["data_sha256"].get(part) != digest
    ]
    if run["model_sha256"] != recorded["model_sha256"]:
        changed.append(f"base model ({run['arguments']['model_name_or_path'] or 'packaged'})")
    if changed or run["labels"] != recorded["labels"]:
        raise MiniloraError(
            f"cannot resume {point.output_dir}: not what the run began with: {', '.join(changed) or 'the labels'}; "
            "restore it, or start a new run"
        )


def begin(
    config: TrainConfig,
    cadence: Cadence,
    output_dir: Path,
    run: dict[str, Any],
    point: ResumePoint | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
) -> TrainState:
    """The state to train from: a checkpoint's, or a fresh one."""
    if point is None or point.run is None or point.checkpoint is None:
        write_run(output_dir, run)
    if point is None or point.checkpoint is None:
        return TrainState()
    if is_trainer_checkpoint(point.checkpoint):
        state = load_trainer_checkpoint(
            point.checkpoint, model, optimizer, scheduler, cadence, config.allow_inexact_resume
        )
    else:
        warn_if_elsewhere(point.checkpoint)
        state = load_checkpoint(point.checkpoint, model, optimizer, scheduler)
    say(f"resuming {point.checkpoint} at step {state.global_step}")
    return state


def warn_if_elsewhere(checkpoint: Path) -> None:
    """Say so where the machine or its libraries differ in what a run's bits depend on."""
    recorded, here = verify(checkpoint).environment, environment()
    for name in EXACTNESS:
        if recorded.get(name) != here[name]:
            say(
                f"warning: {name} was {recorded.get(name)} and is {here[name]}: the resume may not "
                "be bit-exact"
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


def training_updates(
    config: TrainConfig, examples: data.Examples, pad_token_id: int, device: torch.device
) -> Callable[[int, int], Iterator[list[Batch]]]:
    """The batches of each optimizer step, as `fit` asks for them."""
    seed = config.seed if config.data_seed is None else config.data_seed
    batch_size, accumulation = (
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
    )
    return data.training_updates(examples, seed, batch_size, accumulation, pad_token_id, device)


def evaluator(
    config: TrainConfig,
    model: nn.Module,
    task_data: TaskData,
    examples: dict[str, data.Examples],
    pad_token_id: int,
    device: torch.device,
) -> Callable[[str, str], dict[str, float]]:
    """A function of (part of the data, prefix of the keys) to the model's metrics there."""

    def evaluate(part: str, prefix: str) -> dict[str, float]:
        if config.hf_parity:
            draw_loader_seed()
        batches = data.batches_in_order(
            examples[part],
            config.per_device_eval_batch_size,
            pad_token_id,
            device,
            f"evaluating {part}",
        )
        metrics = tasks.metrics_of(config.task, [row.kind for row in task_data.rows[part]])
        return evaluate_model(model, batches, tasks.evaluation_loss(config.task), metrics, prefix)

    return evaluate


def draw_nothing() -> None:
    """What beginning an epoch takes from the random generators, unless Trainer is imitated."""


def evaluates_at_start(config: TrainConfig, task_data: TaskData) -> bool:
    """Whether the untrained model is evaluated: on request, and on the packaged data, to show what
    training adds.
    """
    return "validation" in task_data.rows and (config.eval_on_start or config.train_file is None)


def saver(
    config: TrainConfig,
    cadence: Cadence,
    output_dir: Path,
    run: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
) -> Callable[[TrainState], None]:
    """A function that writes a checkpoint of a state, and then deletes what is over the limit.

    When the disk is full, an older checkpoint is still there and the run is not over, it warns and
    lets the run go on.
    """
    epochs = math.ceil(cadence.max_steps / cadence.steps_per_epoch)

    def save(state: TrainState) -> None:
        best = (
            None if state.best_step is None else str(output_dir / f"checkpoint-{state.best_step}")
        )
        for_trainer = trainer_state(
            state, cadence, epochs, config.per_device_train_batch_size, best
        )
        try:
            save_checkpoint(output_dir, model, optimizer, scheduler, state, for_trainer, run)
        except OSError as error:
            if is_finished(state, cadence) or not sorted_checkpoints(output_dir):
                raise
            say(
                f"warning: no checkpoint at step {state.global_step}: {error.strerror}; training goes on"
            )
            return
        if config.save_total_limit is not None:
            rotate_checkpoints(output_dir, config.save_total_limit, state.best_step)

    return save


class TrainingBar:
    """A progress bar on stderr, and the speed of the loop under Trainer's names."""

    def __init__(self, max_steps: int, done: int) -> None:
        self.bar = tqdm(total=max_steps, initial=done, desc="training", unit="step")
        self.start = time.perf_counter()
        self.examples = self.steps = 0

    def __enter__(self) -> "TrainingBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def advance(self, examples: int, loss: float, learning_rate: float) -> None:
        """One step of so many examples is done."""
        self.examples += examples
        self.steps += 1
        rate = self.examples / (time.perf_counter() - self.start)
        shown = f"loss {loss:.4f}, lr {learning_rate:.2e}, {rate:.0f} examples/s"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()

    def speed(self) -> dict[str, float]:
        """Seconds, examples and steps per second of the loop in this process, evaluation and saving
        included.
        """
        seconds = time.perf_counter() - self.start
        return {
            "train_runtime": seconds,
            "train_samples_per_second": self.examples / seconds,
            "train_steps_per_second": self.steps / seconds,
        }


def reported_evaluation(config: TrainConfig, state: TrainState) -> dict[str, float]:
    """The evaluation that describes the final adapter: the best one if that is loaded, else the
    last.
    """
    evaluations = [row for row in state.log_history if "eval_loss" in row]
    if config.load_best_model_at_end:
        evaluations = [row for row in evaluations if row["step"] == state.best_step]
    return {
        name: value for name, value in (evaluations or [{}])[-1].items() if name.startswith("eval_")
    }


def write_final_files(
    output_dir: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase, run: dict[str, Any]
) -> None:
    """The adapter as PEFT writes it, the tokenizer's files, and run.json with the result."""
    save_adapter(model, output_dir)
    with tempfile.TemporaryDirectory() as directory:
        for file in tokenizer.save_pretrained(directory):
            if Path(file).is_file():
                write_file(output_dir / Path(file).name, Path(file).read_bytes())
    write_run(output_dir, run)


def report_start(
    model: nn.Module,
    found: weights.Located,
    base: weights.Located,
    config: TrainConfig,
    new_tensors: list[str],
    output_dir: Path,
) -> None:
    """Say what is about to be trained, with PEFT's line on trainable parameters."""
    say(
        f"model: {base.description}, a {type(model).__name__}; new: {', '.join(new_tensors) or '-'}"
    )
    if found.is_adapter:
        done = "continued" if config.on_adapter == "continue" else "merged into it"
        say(f"{found.description}: {done}")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    share = 100 * trainable / total
    say(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")
    say(f"output: {output_dir}")


def say(line: str) -> None:
    """A line for the person who watches; stdout is for the result."""
    tqdm.write(line, file=sys.stderr)


def _changed(config: TrainConfig | LoraConfig) -> dict[str, Any]:
    default = type(config)()
    names = [field.name for field in dataclasses.fields(config)]
    return {
        name: getattr(config, name)
        for name in names
        if getattr(config, name) != getattr(default, name)
    }


def _dated_directory() -> Path:
    # With milliseconds, so that the bare command can be repeated, even by a script.
    return Path("runs") / datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
