"""One fine-tuning run from arguments to adapter: the place where the three folders meet.

`train` reads in time order: data, seed, model, adapter, optimizer, resume, fit, save. From there it is
one hop to `loop.fit` and a second to `loop.training_step`, where `optimizer.step()` is.
"""

import dataclasses
import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from minilora.bert import data, tasks, weights
from minilora.bert.batching import Batching
from minilora.bert.parts import Parts, read_parts, tokenize_parts
from minilora.durable import exclusive, scratch_directory, sweep_leftovers, write_file
from minilora.errors import MiniloraError
from minilora.execution import chosen_device, prepare_training
from minilora.lora.adapter_files import CARD_NAME, load_adapter, save_adapter
from minilora.lora.config import LoraConfig
from minilora.model_card import model_card
from minilora.starting_model import (
    StartingModel,
    attach_adapter,
    describe_start,
    load_model,
    new_lora_config,
)
from minilora.training.config import TrainConfig
from minilora.training.evaluation import Batch, evaluate_model
from minilora.training.loop import (
    TrainState,
    example_shares,
    fit,
    is_finished,
    mean_loss,
    trainer_shares,
)
from minilora.training.plan import (
    Saver,
    build_optimisation,
    build_scaler,
    plan_cadence,
    resolve_modes,
)
from minilora.training.progress import TrainingBar, say
from minilora.training.resume import begin, check_same_inputs, describe_run, resumed_arguments
from minilora.training.rng import draw_loader_seed, seed_all
from minilora.training.run import (
    METRICS_NAME,
    MetricsFile,
    ResumePoint,
    explained,
    find_resume_point,
    new_output_dir,
    write_run,
)


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    global_step: int
    metrics: dict[str, float]
    """train_runtime (seconds of the loop in this process), train_samples_per_second, train_loss,
    and the last (or best) evaluation's eval_..., and test_... with a test file."""
    output_dir: str
    log_history: list[dict[str, Any]]


def fine_tune(train_config: TrainConfig, lora_config: LoraConfig | None = None) -> TrainResult:
    """Run, or resume, one fine-tuning; what `python -m minilora.train` runs. Signals are left
    alone.

    With `resume_from_checkpoint`, arguments at their defaults mean "as recorded".

    Raises:
        MiniloraError: bad arguments or data, named; nothing that existed before is lost.
        OSError: the disk refuses; says what to do, and nothing that existed before is lost.
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
        with explained(output_dir):
            new_output_dir(output_dir)
    else:
        with explained(Path(path)):
            point = find_resume_point(Path(path))
        config, lora_config = resumed_arguments(point, train_arguments, lora_arguments)
        output_dir = point.output_dir
        if point.checkpoint is None and point.run and "result" in point.run:
            raise MiniloraError(
                f"{output_dir} is finished and kept no checkpoint (save_strategy no): nothing to resume"
            )
    with explained(output_dir), exclusive(output_dir):
        sweep_leftovers(output_dir)
        return train(config, lora_config, output_dir, point, should_stop)


def train(
    config: TrainConfig,
    lora_config: LoraConfig,
    output_dir: Path,
    point: ResumePoint | None,
    should_stop: Callable[[], bool],
) -> TrainResult:
    """The run itself, holding `output_dir`'s lock."""
    device = chosen_device(config.device)
    config = resolve_modes(config, device)
    parts = read_data(config)

    seed_all(config.seed)
    start = load_model(config, parts.labels)
    model, tokenizer = start.model, start.tokenizer
    libraries = {"transformers": transformers.__version__}
    run = describe_run(
        config,
        lora_config,
        parts.labels,
        parts.have_pairs(),
        parts.fingerprints,
        start.sha256,
        libraries,
    )
    if point is not None:
        check_same_inputs(point, run)
    max_length = input_length(config.max_length, weights.longest_input(model, tokenizer))
    examples = tokenize_parts(parts, tokenizer, max_length)
    report_truncation(parts, examples, max_length)
    cadence = plan_cadence(config, len(examples["train"]), validates="validation" in examples)

    attach_adapter(start, config.on_adapter, lora_config, getattr(torch, config.dtype))
    model.to(device)  # pyright: ignore[reportArgumentType]
    batching = prepare_training(config, model, weights.pad_token_id(tokenizer), device)
    describe_start(start, config.on_adapter, str(output_dir))
    optimizer, scheduler = build_optimisation(config, model, cadence.max_steps)
    scaler = build_scaler(config.dtype, device)
    seed_all(config.seed)  # again, as Trainer does: how much was drawn so far depends on the model

    state = begin(config, cadence, output_dir, run, point, model, optimizer, scheduler, scaler)
    metrics_file = MetricsFile(output_dir / METRICS_NAME, state.log_history)
    evaluate = evaluator(config, model, parts, examples, batching, device)
    if evaluates_at_start(config, parts) and not state.log_history:
        state.log_history.append({"step": 0, "epoch": 0.0, **evaluate("validation", "eval")})
        metrics_file.append(state.log_history[-1])

    save = Saver(config, cadence, output_dir, run, model, optimizer, scheduler, scaler)
    with TrainingBar(cadence.max_steps, state.global_step) as bar:
        fit(
            model,
            optimizer,
            scheduler,
            scaler,
            state,
            cadence,
            config.max_grad_norm,
            updates=training_updates(config, examples["train"], batching, device),
            loss=tasks.training_loss(config.task, config.label_smoothing_factor, batching.forward),
            evaluate=partial(evaluate, "validation", "eval") if "validation" in examples else None,
            record=metrics_file.append,
            save=save,
            should_stop=should_stop,
            progress=bar.advance,
            shares=trainer_shares if config.hf_parity else example_shares,
            begin_epoch=draw_loader_seed if config.hf_parity else draw_nothing,
        )
    metrics_file.finish()
    save.finish()
    metrics = {**bar.speed(), "train_loss": mean_loss(state)}
    if is_finished(state, cadence):
        if config.load_best_model_at_end and state.best_step is not None:
            load_adapter(model, output_dir / f"checkpoint-{state.best_step}", is_trainable=True)
        metrics |= reported_evaluation(config, state)
        metrics |= evaluate("test", "test") if "test" in examples else {}
        write_final_files(config, start, output_dir, {**run, "result": metrics})
    return TrainResult(state.global_step, metrics, str(output_dir), state.log_history)


def read_data(config: TrainConfig) -> Parts:
    """Read every file of the run.

    Raises:
        MiniloraError: names the file, the line and what is wrong, or there is nothing to evaluate on.
    """
    files = {
        "train": config.train_file,
        "validation": config.validation_file,
        "test": config.test_file,
    }
    columns = (config.text_column, config.text_pair_column, config.label_column)
    parts = read_parts(config.task, files, columns, config.validation_split, config.seed)
    asked = config.best_metric() or config.eval_strategy not in (None, "no")
    if asked and "validation" not in parts.rows:
        raise MiniloraError(
            "evaluation is asked for without data: give --validation_file or --validation_split"
        )
    return parts


def input_length(asked: int | None, longest: int) -> int:
    """Tokens kept of each example.

    Raises:
        MiniloraError: more are asked for than the model has positions.
    """
    if asked is not None and asked > longest:
        raise MiniloraError(f"max_length is {asked}; this model takes {longest} tokens at most")
    return asked or longest


def report_truncation(parts: Parts, examples: dict[str, data.Examples], max_length: int) -> None:
    """Say how many texts were cut: a setting that loses data is never silent."""
    for part, encoded in examples.items():
        if encoded.truncated:
            place, count = parts.files[part], len(encoded)
            say(f"{place}: {encoded.truncated} of {count} texts were cut at {max_length} tokens")


def training_updates(
    config: TrainConfig, examples: data.Examples, batching: Batching, device: torch.device
) -> Callable[[int, int], Iterator[list[Batch]]]:
    """The batches of each optimizer step, as `fit` asks for them."""
    seed = config.seed if config.data_seed is None else config.data_seed
    batch_size, accumulation = (
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
    )
    return data.training_updates(examples, seed, batch_size, accumulation, batching.collate, device)


def evaluator(
    config: TrainConfig,
    model: nn.Module,
    parts: Parts,
    examples: dict[str, data.Examples],
    batching: Batching,
    device: torch.device,
) -> Callable[[str, str], dict[str, float]]:
    """A function of (part of the data, prefix of the keys) to the model's metrics there."""

    def evaluate(part: str, prefix: str) -> dict[str, float]:
        metrics = tasks.metrics_of(config.task, [row.kind for row in parts.rows[part]])
        return score(config, model, examples[part], metrics, batching, device, part, prefix)

    return evaluate


def score(
    config: TrainConfig,
    model: nn.Module,
    examples: data.Examples,
    metrics: Callable[[np.ndarray, np.ndarray], dict[str, float]],
    batching: Batching,
    device: torch.device,
    part: str,
    prefix: str,
) -> dict[str, float]:
    """One evaluation, during training or after it: the same batches, hence the same bits."""
    if config.hf_parity:
        draw_loader_seed()
    size, shown = config.per_device_eval_batch_size, f"evaluating {part}"
    batches = data.batches_in_order(examples, size, batching.collate, device, shown)
    loss = tasks.evaluation_loss(config.task, batching.forward)
    return evaluate_model(model, batches, loss, metrics, prefix)


def draw_nothing() -> None:
    """What beginning an epoch takes from the random generators, unless Trainer is imitated."""


def evaluates_at_start(config: TrainConfig, parts: Parts) -> bool:
    """Whether the untrained model is evaluated: on request, and on the packaged data, to show what
    training adds.
    """
    return "validation" in parts.rows and (config.eval_on_start or config.train_file is None)


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
    config: TrainConfig, start: StartingModel, output_dir: Path, run: dict[str, Any]
) -> None:
    """The adapter as PEFT writes it, its model card (one that is there already is kept), the
    tokenizer's files, and run.json with the result.
    """
    if not (output_dir / CARD_NAME).exists():
        merged = start.adapter if config.on_adapter == "merge" else None
        name, base = output_dir.resolve().name, start.base.location
        card = model_card(name, base, merged and merged.location, run)
        write_file(output_dir / CARD_NAME, card.encode(errors="replace"))
    save_adapter(start.model, output_dir)
    with scratch_directory(output_dir) as directory:
        for file in weights.save_tokenizer(start.tokenizer, directory):
            if Path(file).is_file():
                write_file(output_dir / Path(file).name, Path(file).read_bytes())
    write_run(output_dir, run)


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
