"""What training wrote, opened again: where evaluate, predict and merge begin.

OUT                     run.json tells all; the final adapter, or while there is none, the newest
                        checkpoint's
OUT/checkpoint-<step>   its manifest tells all, after every hash has been verified
another adapter         PEFT's or HF Trainer's: its config names the base, its head tells the number
                        of labels, the base's config their names
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minilora import starting_model
from minilora.bert.forward import Packed, Padded
from minilora.bert.load import input_length, load_tokenizer, recorded_labels
from minilora.bert.tables import file_fingerprint
from minilora.bert.tasks import Task, build_task, foreign_task
from minilora.errors import MiniloraError
from minilora.lora.peft_files import CONFIG_NAME, StoredAdapter, read_adapter
from minilora.trained.directory import kind_of
from minilora.training import distributed
from minilora.training.checkpoint import latest_checkpoint, read_checkpoint
from minilora.training.config import TrainConfig
from minilora.training.progress import say
from minilora.training.record import RunRecord, environment

# The last layer of a head, itself trained or adapted.
HEAD = re.compile(r"\.(classifier|score|qa_outputs)\.(out_proj\.)?(lora_B\.)?weight$")


@dataclass(frozen=True)
class TrainedRun:
    """A trained adapter on its base model, ready to predict."""

    adapter: Path  # the directory that holds it
    record: RunRecord  # of a foreign adapter: what its files tell, and defaults
    model: PreTrainedModel  # in eval mode, on `device`; the adapter is attached, not merged
    tokenizer: PreTrainedTokenizerBase
    task: Task
    forward: Packed | Padded  # makes batches and runs the model as in training
    max_length: int  # tokens kept of each text, special tokens included


def open_run(
    path: str | Path, model_name_or_path: str | None = None, device: str | None = None
) -> TrainedRun:
    """Load what `train` wrote to `path`, one of its checkpoints, or any PEFT adapter, on its base
    model (`model_name_or_path`, if that has moved) and device (by default the recorded, or cuda).
    """
    adapter, record = read_record(Path(path), model_name_or_path)
    config = record.arguments
    if device is not None:
        config = dataclasses.replace(config, device=device)
    placed = starting_model.chosen_device(config.device)
    if config.dtype == "float16" and placed.type == "cpu":
        # A run of a GPU's float16 is as good in float32 where there is none.
        config = dataclasses.replace(config, dtype="float32")
    config = starting_model.resolve_modes(config, placed)
    model, tokenizer = load_base(adapter, record)
    starting_model.load_trained(model, adapter, getattr(torch, config.dtype), is_trainable=False)
    forward = starting_model.choose_forward(config, model.eval(), tokenizer, placed)
    length = input_length(model, tokenizer, config.max_length)
    record = dataclasses.replace(record, arguments=config)
    task = build_task(config, record.labels)
    if hasattr(task, "recall"):
        task.recall(record.result or {})  # pyright: ignore[reportAttributeAccessIssue]
    return TrainedRun(adapter, record, model, tokenizer, task, forward, length)


def check_ranks(run: TrainedRun, asked: dict[str, Any]) -> None:
    """Refuse several processes whose arguments, adapter, "file" or versions are not the same."""
    if distributed.world_size() > 1:
        files = [*run.adapter.glob("adapter_*"), *([Path(asked["file"])] if asked["file"] else [])]
        digests = {path.name: file_fingerprint(path) for path in files}
        distributed.check_agreement(asked | environment(run.record.arguments.device) | digests)


def read_record(path: Path, model_name_or_path: str | None = None) -> tuple[Path, RunRecord]:
    """The adapter's directory and its record, the base named as given. No model is loaded."""
    kind, record = kind_of(path), None
    if kind == "incomplete checkpoint":
        raise MiniloraError(f"{path} is an incomplete checkpoint: give another one")
    if kind == "model":
        raise MiniloraError(f"{path} holds a model and no adapter: load it with transformers")
    if kind == "run" and (path / CONFIG_NAME).is_file():  # the last file of an adapter
        record = RunRecord.read(path)
    elif kind == "run":
        found = latest_checkpoint(path)
        if found is None:
            go_on = f"python -m minilora.train --resume_from_checkpoint {path}"
            raise MiniloraError(f"{path} has no adapter yet: {go_on}")
        say(f"{path} is not finished: this is {found.name}")
        path, kind = found, "checkpoint"
    if kind == "checkpoint":
        stored = read_checkpoint(path)
        evaluations = [row for row in stored.progress["log_history"] if "eval_loss" in row]
        last = evaluations[-1] if evaluations else None
        record = stored.record and dataclasses.replace(stored.record, result=last)
    if record is None:
        return path, _record_of_foreign(read_adapter(path), model_name_or_path)
    if record.arguments.on_adapter == "merge":
        model_name_or_path = model_name_or_path or starting_model.merged_base(path)
    if model_name_or_path is not None:
        moved = dataclasses.replace(record.arguments, model_name_or_path=model_name_or_path)
        record = dataclasses.replace(record, arguments=moved)
    return path, record


def load_base(adapter: Path, record: RunRecord) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The plain model that the adapter was trained on, and the tokenizer."""
    # A head drawn anew will be replaced by the adapter's: the caller's generator is left alone.
    with torch.random.fork_rng(devices=[]):
        task = build_task(record.arguments, record.labels)
        start = starting_model.load_starting_model(record.arguments, task)
    starting_model.check_new_modules(start.new_modules, record.lora, adapter)
    # Behind the base's fingerprint stands that of the adapter which the run went on from, if any.
    expected, found = record.model_sha256.partition(" ")[0], start.sha256.partition(" ")[0]
    if expected not in ("", found):
        raise MiniloraError(
            f"{adapter} is an adapter for another base model than {start.base.location} "
            f"(fingerprint {expected[:12]}, not {found[:12]}): give --model_name_or_path"
        )
    saved_beside = (adapter / "tokenizer_config.json").is_file()
    return start.model, load_tokenizer(str(adapter), None) if saved_beside else start.tokenizer


def _record_of_foreign(adapter: StoredAdapter, name: str | None) -> RunRecord:
    outputs = next((t.shape[0] for name, t in adapter.tensors.items() if HEAD.search(name)), 0)
    task = foreign_task(adapter.config.task_type, outputs) or foreign_task("SEQ_CLS", outputs)
    if task is None:
        raise MiniloraError(f"{adapter.directory} has no head (classifier, score, qa_outputs)")
    revision = adapter.config.revision
    name = name or starting_model.base_of(adapter.directory)[0].location
    labels = None if outputs < 2 else recorded_labels(name, revision, outputs)
    arguments = TrainConfig(model_name_or_path=name, model_revision=revision, task=task)
    return RunRecord(arguments, adapter.config, labels, None, {}, model_sha256="", environment={})
