"""`TrainConfig`: everything a run is told, under the names and defaults of HF `TrainingArguments`.

Imports nothing but the standard library, so that a command can build its flags without torch. Each
field says in which group `--help` shows it, its unit, and what a resume may do with it.
"""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

from minilora.errors import MiniloraError

TASKS = ("sequence_classification", "regression")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
STRATEGIES = ("no", "steps", "epoch")
DTYPES = ("float32", "bfloat16", "float16")

# The fields of LoraConfig in which a run differs from PEFT's defaults, chosen by measurement
# (`benchmarks/README.md`).
LORA_DEFAULTS: dict[str, Any] = {"lora_alpha": 16, "lora_dropout": 0.1}

# What a resume may change, and why. Everything else would bend the run and is refused.
FREE = "free"  # no number of the training depends on it
CHECKED = "checked"  # a path may change, for what it names is recognised by its fingerprint


def option(
    default: Any, group: str, help: str, on_resume: str | None = None, choices: Any = None
) -> Any:
    """A field with what the command line needs to know about it."""
    metadata = {"group": group, "help": help, "on_resume": on_resume, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """The arguments of a run.

    Defaults are TrainingArguments', except learning rate, epochs and batch size, which were chosen
    by measurement (`benchmarks/README.md`), and evaluation and saving, which happen once per epoch.

    Raises:
        MiniloraError: all values out of range or contradicting each other, at once.
    """

    # fmt: off
    model_name_or_path: str | None = option(None, "model", "a directory or hub id; by default the packaged MiniLM", CHECKED)
    model_revision: str | None = option(None, "model", "branch, tag or commit of a hub id", CHECKED)
    on_adapter: str = option("continue", "model", "when the model is an adapter directory: go on training that adapter, or merge it and train a new one", choices=("continue", "merge"))
    task: str = option("sequence_classification", "model", "what the head predicts", choices=TASKS)

    train_file: str | None = option(None, "data", "csv, tsv, json or jsonl; by default the packaged sentences", CHECKED)
    validation_file: str | None = option(None, "data", "the same, for evaluation during training", CHECKED)
    test_file: str | None = option(None, "data", "the same, evaluated once after training", CHECKED)
    validation_split: float = option(0.0, "data", "share of train_file to hold out when there is no validation_file")
    text_column: str | None = option(None, "data", "name, or number from 0 in a file without header, of the text")
    text_pair_column: str | None = option(None, "data", "the same for the second text of a pair")
    label_column: str | None = option(None, "data", "the same for the label")
    max_length: int | None = option(None, "data", "tokens kept of each text; by default what the model can take")

    output_dir: str | None = option(None, "output", "a new or empty directory; by default runs/<date-time>", FREE)
    resume_from_checkpoint: str | None = option(None, "output", "an output_dir or a checkpoint in it; needs no other flag", FREE)
    allow_inexact_resume: bool = option(False, "output", "resume a checkpoint of HF Trainer's that lacks a part", FREE)
    save_strategy: str = option("epoch", "output", "when to write a checkpoint", FREE, STRATEGIES)
    save_steps: int = option(500, "output", "optimizer steps between checkpoints, with save_strategy steps", FREE)
    save_total_limit: int | None = option(None, "output", "checkpoints kept; the newest and the best are never deleted", FREE)
    logging_steps: int = option(500, "output", "optimizer steps between rows of metrics.jsonl", FREE)

    num_train_epochs: float = option(3.0, "training", "passes over the training set")
    max_steps: int = option(-1, "training", "optimizer steps in all; overrides num_train_epochs when above 0")
    per_device_train_batch_size: int = option(16, "training", "examples in a batch")
    gradient_accumulation_steps: int = option(1, "training", "batches in an optimizer step")
    learning_rate: float = option(1e-3, "training", "AdamW's peak learning rate")
    lr_scheduler_type: str = option("linear", "training", "course of the learning rate", choices=SCHEDULES)
    warmup_steps: float = option(0, "training", "steps of rising learning rate; below 1, a share of the run")
    weight_decay: float = option(0.0, "training", "AdamW's decay, on everything but biases and LayerNorms")
    adam_beta1: float = option(0.9, "training", "AdamW's decay of the first moment")
    adam_beta2: float = option(0.999, "training", "AdamW's decay of the second moment")
    adam_epsilon: float = option(1e-8, "training", "AdamW's epsilon")
    max_grad_norm: float = option(1.0, "training", "gradients are clipped to this norm; 0 turns clipping off")
    label_smoothing_factor: float = option(0.0, "training", "share of the target spread over all classes")
    seed: int = option(42, "training", "of every random draw")
    data_seed: int | None = option(None, "training", "of the order of examples; by default seed")
    hf_parity: bool = option(False, "training", "the losses, bit for bit, of HF Trainer + PEFT: its random draws, and its sum of accumulated means")
    device: str | None = option(None, "training", "cpu, cuda, cuda:1, ...; by default cuda where there is one", FREE)

    batching: str | None = option(None, "speed", "packed leaves out padding; by default packed", choices=("packed", "padded"))
    dropout: str | None = option(None, "speed", "whose masks: fast is ours, for CPUs; by default fast on a CPU, else torch", choices=("fast", "torch"))
    dtype: str = option("float32", "speed", "of the frozen weights and the activations; what trains is float32. float16 needs a GPU", choices=DTYPES)
    gradient_checkpointing: bool = option(False, "speed", "save memory: recompute each layer's activations in the backward pass")
    torch_compile: bool = option(False, "speed", "compile the model's forward; takes padded batches and torch's dropout")

    eval_strategy: str | None = option(None, "evaluation", "when to evaluate; by default each epoch if there is validation data", FREE, STRATEGIES)
    eval_steps: int | None = option(None, "evaluation", "optimizer steps between evaluations; by default logging_steps", FREE)
    eval_on_start: bool = option(False, "evaluation", "evaluate the untrained model, too")
    per_device_eval_batch_size: int = option(32, "evaluation", "examples in a batch")
    load_best_model_at_end: bool = option(False, "evaluation", "end with the best checkpoint's adapter instead of the last")
    metric_for_best_model: str | None = option(None, "evaluation", "loss, accuracy, f1, matthews, pearson, spearman")
    greater_is_better: bool | None = option(None, "evaluation", "by default true unless the metric is a loss")
    early_stopping_patience: int | None = option(None, "evaluation", "stop after this many evaluations without a better metric")
    # fmt: on

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise MiniloraError("; ".join(problems))

    def best_metric(self) -> str | None:
        """The metric that ranks checkpoints, as an `eval_...` key; None when nothing asks for a
        ranking.
        """
        asked = self.load_best_model_at_end or self.early_stopping_patience is not None
        name = self.metric_for_best_model or ("loss" if asked else None)
        return None if name is None else f"eval_{name.removeprefix('eval_')}"

    def best_is_greatest(self) -> bool:
        """Whether a higher metric is a better one."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not (self.best_metric() or "").endswith("loss")


def train_config_from_dict(values: dict[str, Any], place: str) -> TrainConfig:
    """A `TrainConfig` from recorded arguments.

    Raises:
        MiniloraError: a field that this version does not know, or a bad value.
    """
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise MiniloraError(
            f"{place}: unknown arguments {unknown}: it was written by another version of minilora"
        )
    hints = typing.get_type_hints(TrainConfig)
    wrong = [f"{k} is {v!r}" for k, v in values.items() if not has_type(v, hints[k])]
    if wrong:
        raise MiniloraError(f"{place}: of the wrong type: {', '.join(wrong)}")
    try:
        return TrainConfig(**values)
    except MiniloraError as error:
        raise MiniloraError(f"{place}: {error}") from None


def has_type(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is of a field's type (`int`, `float | None`, ...). An integer
    is a float, too, unless no float can hold it.
    """
    kinds = typing.get_args(hint) or (hint,)
    if type(value) is int:
        return (int in kinds or float in kinds) and abs(value) < 2**63
    return type(value) in kinds


def reconcile(recorded: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """The recorded arguments with the `given` ones applied, where that leaves the run what it was.

    Raises:
        MiniloraError: lists every argument that would bend the run, old -> new.
    """
    bending = []
    for field in dataclasses.fields(TrainConfig):
        old, new = (
            getattr(recorded, field.name),
            given.get(field.name, getattr(recorded, field.name)),
        )
        if new != old and field.metadata["on_resume"] is None:
            bending.append(f"{field.name}: {old} -> {new}")
    refuse_bending(bending)
    return dataclasses.replace(recorded, **given)


def refuse_bending(changes: list[str]) -> None:
    """Refuse to resume with `changes`, a list of "name: old -> new".

    Raises:
        MiniloraError: unless the list is empty.
    """
    if changes:
        raise MiniloraError(
            f"a resumed run cannot change {', '.join(changes)}: leave these out to continue the run as it was, "
            "or start a new run with another --output_dir"
        )


def _problems(c: TrainConfig) -> list[str]:
    found = []
    for field in dataclasses.fields(c):
        value, choices = getattr(c, field.name), field.metadata["choices"]
        if choices and value is not None and value not in choices:
            found.append(f"{field.name} is {value!r}; it must be one of {', '.join(choices)}")
    minimum = {
        "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
        "logging_steps": 1, "save_steps": 1, "eval_steps": 1, "save_total_limit": 1, "early_stopping_patience": 1,
        "max_length": 3, "learning_rate": 0, "weight_decay": 0, "warmup_steps": 0, "max_grad_norm": 0, "seed": 0,
        "data_seed": 0,
    }  # fmt: skip
    for name, least in minimum.items():
        value = getattr(c, name)
        # `not (value >= least)` rather than `value < least`: it is true of NaN as well.
        if value is not None and not (value >= least):
            found.append(f"{name} is {value}; it must be {least} or more")
    for name in ("validation_split", "label_smoothing_factor", "adam_beta1", "adam_beta2"):
        if not 0.0 <= getattr(c, name) < 1.0:
            found.append(f"{name} is {getattr(c, name)}; it must be in [0, 1)")
    if not c.num_train_epochs > 0 and not c.max_steps > 0:
        found.append(
            f"num_train_epochs is {c.num_train_epochs}; it must be above 0 unless max_steps is"
        )
    if c.adam_epsilon <= 0:
        found.append(f"adam_epsilon is {c.adam_epsilon}; it must be above 0")
    if c.validation_split > 0 and c.validation_file:
        found.append("validation_split and validation_file are both given: leave one out")
    if c.task == "regression" and c.label_smoothing_factor:
        found.append("label_smoothing_factor is for classification")
    for mode in ("hf_parity", "torch_compile"):
        plain = {"batching": "padded", "dropout": "torch"}
        plain |= (
            {"dtype": "float32", "gradient_checkpointing": False} if mode == "hf_parity" else {}
        )
        for name, needed in plain.items():
            if getattr(c, mode) and getattr(c, name) not in (needed, None):
                found.append(f"{mode} needs {name} {needed}, not {getattr(c, name)}: leave one out")
    if c.eval_strategy == "no" and c.best_metric():
        found.append(f"{c.best_metric()} is asked to rank checkpoints, and eval_strategy is no")
    if c.load_best_model_at_end:
        eval_strategy = c.eval_strategy or "epoch"
        if eval_strategy != c.save_strategy:
            found.append(
                f"load_best_model_at_end needs a checkpoint at each evaluation: eval_strategy is {eval_strategy}, "
                f"save_strategy is {c.save_strategy}; make them the same"
            )
        elif c.save_strategy == "steps" and (c.eval_steps or c.logging_steps) % c.save_steps:
            found.append(
                f"load_best_model_at_end needs a checkpoint at each evaluation: eval_steps "
                f"({c.eval_steps or c.logging_steps}) must be a multiple of save_steps ({c.save_steps})"
            )
    return found
