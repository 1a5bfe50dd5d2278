"""`TrainConfig`: everything a run is told, under the names of HF `TrainingArguments`."""

# ruff: noqa: RUF009 (each call of option() makes a new field)

import dataclasses
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minilora.errors import MiniloraError
from minilora.options import check, differences, option

# One file each, whose name is the task's.
TASKS = tuple(sorted(f.stem for f in Path(__file__).parents[1].glob("bert/tasks/[!_]*.py")))
# Masked words are their texts' own; Trainer's recipe for them draws masks of its own.
LABELLED = tuple(task for task in TASKS if task != "masked_lm")
ONE_CLASS = ("sequence_classification", "token_classification")
SEVERAL = ("multi_label_classification",)
WHOLE_TEXTS = ("sequence_classification", "regression", *SEVERAL)
# Of each two, one may be given.
EITHER = (
    ("train_file", "dataset_name"), ("validation_file", "validation_split_name"),
    ("test_file", "test_split_name"), ("validation_split", "validation_file"),
    ("validation_split", "validation_split_name"), ("label_column", "label_columns"),
    ("class_weights", "label_smoothing_factor"),
)  # fmt: skip
TRAINER_LACKS = ("head_learning_rate", "loraplus_lr_ratio", "class_weights", "stride")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
STRATEGIES = ("no", "steps", "epoch")
DTYPES = ("float32", "bfloat16", "float16")

# Where a run differs from PEFT's defaults, chosen by measurement (`benchmarks/README.md`).
LORA_DEFAULTS: dict[str, Any] = {"lora_alpha": 16, "lora_dropout": 0.1}

# What a resume may change: no number of the training depends on it (on a device, only last bits);
# what a path names is recognised by its fingerprint. All else would bend the run and is refused.
free = partial(option, is_free=True)


@dataclass(frozen=True)
class TrainConfig:
    """The arguments of a run, by default TrainingArguments', except learning rate, epochs and batch
    size, chosen by measurement (`benchmarks/README.md`), evaluation and saving, once per epoch.
    """

    # fmt: off
    model_name_or_path: str | None = free(
        None, "a directory or hub id; by default the packaged MiniLM", group="model")
    model_revision: str | None = free(None, "branch, tag or commit of a hub id")
    on_adapter: str = option(
        "continue", "go on with a given adapter, or merge it first", choices=("continue", "merge"))
    task: str = option("sequence_classification", "what the head predicts", choices=TASKS)

    train_file: str | None = free(
        None, "csv, tsv, json, parquet, CoNLL or txt; by default packaged sentences", group="data")
    validation_file: str | None = free(None, "the same, for evaluation during training")
    test_file: str | None = free(None, "the same, evaluated once after training")
    dataset_name: str | None = free(None, "instead: a hub id, or a directory that `datasets` reads")
    dataset_config_name: str | None = free(None, "which of its configurations")
    # Called as in transformers' run_classification.py; validation_split is a share.
    train_split_name: str | None = free(None, "which of its splits; by default train")
    validation_split_name: str | None = free(None, "the same; by default validation, if there")
    test_split_name: str | None = free(None, "the same; by default none")
    validation_split: float = option(0.0, "share of the training set to hold out", least=0, below=1)
    text_column: str | None = option(None, "the text's name, or number from 0 without a header")
    text_pair_column: str | None = option(
        None, "the same for the second text of a pair", tasks=LABELLED)
    label_column: str | None = option(None, "the same for the label", tasks=LABELLED)
    label_columns: list[str] | None = option(
        None, "a column of 0 and 1 for each label, instead of label_column", tasks=SEVERAL)
    label_separator: str = option(",", "between the labels of a text's field", tasks=SEVERAL)
    label_all_tokens: bool = option(
        False, "label every sub-token of a word, not the first", tasks=("token_classification",))
    line_by_line: bool = option(
        False, "an example of each text, not of max_length tokens", tasks=("masked_lm",))
    mlm_probability: float = option(
        0.15, "share of tokens to mask", least=0, below=1, tasks=("masked_lm",))
    doc_stride: int = option(
        128, "tokens that windows of a long passage share; at most half of those they have for it",
        least=0, tasks=("question_answering",))
    max_length: int | None = option(None, "tokens of a text; by default the model's limit", least=3)
    stride: int | None = option(
        None, "cut no text, but make windows of max_length that share so many tokens", least=0,
        tasks=WHOLE_TEXTS)

    output_dir: str | None = free(None, "new or empty; by default runs/<date-time>", group="output")
    resume_from_checkpoint: str | None = free(None, "a run or its checkpoint; needs no other flag")
    extend: bool = free(False, "resume, and train to a higher max_steps or num_train_epochs")
    allow_inexact_resume: bool = free(False, "take a checkpoint of HF Trainer's that lacks a part")
    save_strategy: str = free("epoch", "when to write a checkpoint", choices=STRATEGIES)
    save_steps: int = free(500, "between checkpoints; its flag means save_strategy steps", least=1)
    save_total_limit: int | None = free(None, "checkpoints kept, newest and best always", least=1)
    logging_steps: int | None = free(
        None, "steps between rows of metrics.jsonl; by default 10, with hf_parity 500", least=1)
    report_to: str = free("none", "tensorboard: those rows as curves, too, in output_dir/runs")

    num_train_epochs: float = option(3.0, "passes over the training set", group="training")
    max_steps: int = option(-1, "optimizer steps in all; above 0, it overrides num_train_epochs")
    per_device_train_batch_size: int = option(16, "examples in a batch", least=1)
    gradient_accumulation_steps: int = option(1, "batches in an optimizer step", least=1)
    learning_rate: float = option(1e-3, "AdamW's peak learning rate", least=0)
    head_learning_rate: float | None = option(
        None, "of modules trained in full, such as the head; by default learning_rate", least=0)
    loraplus_lr_ratio: float | None = option(
        None, "LoRA+: B's learning rate is so many times learning_rate", least=1)
    lr_scheduler_type: str = option("linear", "course of the learning rate", choices=SCHEDULES)
    warmup_steps: float = option(0, "steps of rising rate; below 1, a share of the run", least=0)
    weight_decay: float = option(0.0, "AdamW's, of all but biases and LayerNorms", least=0)
    adam_beta1: float = option(0.9, "AdamW's decay of the first moment", least=0, below=1)
    adam_beta2: float = option(0.999, "AdamW's decay of the second moment", least=0, below=1)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: never", least=0)
    label_smoothing_factor: float = option(
        0.0, "share spread over all classes", least=0, below=1, tasks=ONE_CLASS)
    class_weights: list[str] | None = option(
        None, "balanced, or name=weight of some; the training loss is their weighted mean",
        tasks=("sequence_classification",))
    threshold: float | str = option(
        0.5, "probability from which on a label is given; best: of the highest micro F1 in "
        "evaluation", least=0, below=1, tasks=SEVERAL)
    seed: int = option(42, "of every random draw", least=0, below=2**32)  # numpy's bound
    data_seed: int | None = option(None, "of the order of examples; by default seed", least=0)
    hf_parity: bool = option(
        False, "HF Trainer + PEFT's losses, bit for bit: their random draws, their sums of means",
        tasks=LABELLED)
    disable_tqdm: bool = free(False, "no bars, but a line every half minute, as without a terminal")
    ddp_timeout: int = free(
        1800, "with torchrun, seconds that processes wait for each other", least=1)
    device: str | None = free(None, "cpu, cuda, cuda:1, ...; by default cuda where there is one")

    batching: str | None = option(
        None, "packed, the default, has no padding", choices=("packed", "padded"), group="speed")
    dropout: str | None = option(
        None, "whose masks; by default fast, ours, on a CPU, else torch", choices=("fast", "torch"))
    dtype: str = option("float32", "of frozen weights and activations only", choices=DTYPES)
    gradient_checkpointing: bool = free(False, "recompute activations instead of keeping them")
    torch_compile: bool = option(
        False, "compile the forward, on a GPU as CUDA graphs; with padding and torch's dropout")

    eval_strategy: str | None = free(
        None, "by default epoch, given validation data", choices=STRATEGIES, group="evaluation")
    eval_steps: int = free(500, "with eval_strategy steps, how often; at the end, too", least=1)
    eval_on_start: bool = option(False, "evaluate the untrained model, too")
    per_device_eval_batch_size: int = option(32, "examples in a batch", least=1)
    load_best_model_at_end: bool = option(False, "end with the best checkpoint, not the last")
    metric_for_best_model: str | None = option(None, "such as loss, accuracy, f1 or pearson")
    greater_is_better: bool | None = option(None, "by default not of loss, mse, perplexity")
    early_stopping_patience: int | None = option(
        None, "stop after this many evaluations without a better metric", least=1)
    # fmt: on

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Path):
                object.__setattr__(self, name, str(value))
        check(self, _relations)

    def best_metric(self) -> str | None:
        """The metric that ranks checkpoints, as an `eval_...` key; None if nothing asks for one."""
        asked = self.load_best_model_at_end or self.early_stopping_patience is not None
        name = self.metric_for_best_model or ("loss" if asked else None)
        return None if name is None else f"eval_{name.removeprefix('eval_')}"

    def best_is_greatest(self) -> bool:
        """Whether a higher metric is a better one."""
        is_error = (self.best_metric() or "").endswith(("loss", "mse", "perplexity"))
        return not is_error if self.greater_is_better is None else self.greater_is_better


def train_config_from_dict(values: dict[str, Any], place: str) -> TrainConfig:
    """A `TrainConfig` from recorded arguments; `place` is where they are recorded."""
    if unknown := sorted(values.keys() - vars(TrainConfig()).keys()):
        raise MiniloraError(f"{place}: unknown arguments {unknown}, of another version of minilora")
    if values.get("eval_steps") is None:  # which meant logging_steps to an older version
        values = {**values, "eval_steps": values.get("logging_steps") or TrainConfig().eval_steps}
    try:
        return TrainConfig(**values)
    except MiniloraError as error:
        raise MiniloraError(f"{place}: {error}") from None


def reconcile(recorded: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """The recorded arguments with the `given` ones; those that would bend the run are refused. With
    `extend` the end may be a later one, or the same, so that the command can be repeated.
    """
    fields = dataclasses.fields(TrainConfig)
    fixed = {field.name for field in fields if not field.metadata.get("is_free")}
    if recorded.hf_parity or recorded.best_metric():
        # There evaluation draws from the generators, or chooses the end.
        fixed |= {"eval_strategy", "eval_steps"}
    if given.get("extend"):
        end = "max_steps" if recorded.max_steps > 0 else "num_train_epochs"
        if given.get(end, 0) < getattr(recorded, end):
            advice = f"the run ends by {end} {getattr(recorded, end)}: give --{end} above it"
            raise MiniloraError(f"extend: {advice}")
        fixed -= {end}
    refuse_bending(differences(recorded, {name: given[name] for name in fixed & given.keys()}))
    return dataclasses.replace(recorded, **given)


def refuse_bending(changes: list[str]) -> None:
    """Refuse to resume with `changes`, a list of "NAME: OLD -> NEW", unless it is empty."""
    if changes:
        advice = "leave these out to go on as before, or start a new run in another --output_dir"
        if any(change.startswith(("max_steps", "num_train_epochs")) for change in changes):
            advice += "; --extend trains longer"
        raise MiniloraError(f"a resumed run cannot change {', '.join(changes)}: {advice}")


def _relations(c: TrainConfig) -> list[tuple[Any, str]]:
    evaluates = c.eval_strategy or "epoch"
    checks = [
        (c.device is not None and not re.fullmatch("cpu|cuda(:[0-9]{1,3})?", c.device),
         f"device is {c.device!r}; it must be cpu, cuda, cuda:1, ..."),
        ((c.best_metric() or "").endswith(("runtime", "per_second")),
         f"metric_for_best_model is {c.metric_for_best_model!r}; it must not be a timing"),
        (c.num_train_epochs <= 0 and c.max_steps <= 0,
         f"num_train_epochs is {c.num_train_epochs}; it must be above 0 unless max_steps is"),
        (c.report_to not in ("none", "tensorboard"),
         f"report_to is {c.report_to!r}; it must be none or tensorboard: into any other tracker "
         "examples/follow_metrics.py takes metrics.jsonl"),
        (c.extend and c.resume_from_checkpoint is None,
         "extend is for a run that is resumed: give --resume_from_checkpoint"),
        (c.adam_epsilon <= 0, f"adam_epsilon is {c.adam_epsilon}; it must be above 0"),
        (c.dataset_name is None and (c.dataset_config_name or c.train_split_name
         or c.validation_split_name or c.test_split_name),
         "dataset_config_name and the names of splits are for a dataset_name: give it"),
        (c.hf_parity and c.label_smoothing_factor and c.gradient_accumulation_steps > 1,
         "hf_parity with label_smoothing_factor needs gradient_accumulation_steps 1: only smoothed "
         "losses does Trainer divide by the labels of a whole step"),
        (c.eval_strategy == "no" and c.best_metric(),
         f"{c.best_metric()} is asked to rank checkpoints, and eval_strategy is no"),
        (c.load_best_model_at_end and evaluates != c.save_strategy,
         "load_best_model_at_end needs a checkpoint at each evaluation: eval_strategy is "
         f"{evaluates}, save_strategy is {c.save_strategy}; make them the same"),
        (c.load_best_model_at_end and evaluates == c.save_strategy == "steps"
         and c.eval_steps % max(c.save_steps, 1),
         "load_best_model_at_end needs a checkpoint at each evaluation: eval_steps "
         f"({c.eval_steps}) must be a multiple of save_steps ({c.save_steps})"),
    ]  # fmt: skip
    plain = {"batching": "padded", "dropout": "torch"}
    exact = {**plain, "dtype": "float32", "gradient_checkpointing": False}
    exact |= dict.fromkeys(TRAINER_LACKS)
    for mode, settings in (("hf_parity", exact), ("torch_compile", plain)):
        for name, needed in settings.items():
            value = getattr(c, name)
            is_wrong = getattr(c, mode) and value not in (needed, None)
            checks.append((is_wrong, f"{mode} needs {name} {needed}, not {value}: leave one out"))
    return checks + _relations_of_tasks(c)


def _relations_of_tasks(c: TrainConfig) -> list[tuple[Any, str]]:
    evaluates = c.eval_strategy or "epoch"
    checks = [
        (c.mlm_probability == 0, "mlm_probability is 0; it must be above, or nothing is masked"),
        (isinstance(c.threshold, str) and c.threshold != "best",
         f"threshold is {c.threshold!r}; it must be a number or best"),
        (c.threshold == "best" and evaluates != "epoch",
         f"threshold best is chosen as an epoch ends; eval_strategy is {evaluates}: leave it out"),
        (not c.label_separator, "label_separator is empty; it must be a character or more"),
    ]  # fmt: skip
    for one, other in EITHER:
        both = getattr(c, one) and getattr(c, other)
        checks.append((both, f"{one} and {other} are both given: leave one out"))
    for field in dataclasses.fields(TrainConfig):
        tasks, is_given = field.metadata.get("tasks"), getattr(c, field.name) != field.default
        if tasks is not None and c.task not in tasks:
            checks.append((is_given, f"{field.name} is for {' and '.join(tasks)}, not {c.task}"))
    return checks
