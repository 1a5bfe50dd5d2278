"""What training wrote, opened again: where evaluate, predict and merge begin.

OUT                     run.json tells all; the final adapter, or while there is none, the newest checkpoint's
OUT/checkpoint-<step>   its manifest tells all, after every hash has been verified
another adapter         PEFT's or HF Trainer's: its config names the base, its head tells the number of
                        labels, the base's config their names
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minilora.bert import weights
from minilora.bert.batching import Batching
from minilora.errors import MiniloraError
from minilora.execution import choose_batching, chosen_device
from minilora.fine_tuning import input_length
from minilora.lora.adapter_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    find_adapter,
    load_adapter,
    read_config,
    read_tensors,
)
from minilora.lora.base_precision import train_modules_in_float32
from minilora.starting_model import base_of, load_model
from minilora.trained import kinds
from minilora.training.checkpoint import latest_checkpoint
from minilora.training.config import TrainConfig, train_config_from_dict
from minilora.training.manifest import verify
from minilora.training.plan import resolve_modes
from minilora.training.progress import say
from minilora.training.run import read_run

HEADS = ("classifier", "score")


@dataclass(frozen=True)
class Record:
    """What the files say of a trained adapter, before any model is loaded."""

    adapter: Path
    """The directory that holds it."""
    config: TrainConfig
    """The run's arguments; defaults where nobody recorded them."""
    labels: list[str] | None
    """Class names in id order; None for regression."""
    pairs: bool | None
    """Whether it was trained on pairs of texts; None where nobody recorded it."""
    model_sha256: str | None
    """Fingerprint of the base model; None where nobody recorded it."""


@dataclass(frozen=True)
class TrainedRun:
    """A trained adapter on its base model, ready to predict."""

    record: Record
    model: PreTrainedModel
    """In eval mode, on `device`; the adapter is attached, not merged."""
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    """Tokens kept of each text, special tokens included."""
    device: torch.device
    batching: Batching
    """As in training."""


def open_run(
    path: str | Path, model_name_or_path: str | None = None, device: str | None = None
) -> TrainedRun:
    """Load what `train` wrote to `path`, one of its checkpoints, or any PEFT adapter, on its base
    model.

    Args:
        model_name_or_path: the base model, if it is no longer where the files say.
        device: by default the recorded one, or cuda where there is one.

    Raises:
        MiniloraError: nothing usable there, or the base model is another one than in training.
    """
    record = read_record(Path(path), model_name_or_path)
    placed = chosen_device(device or record.config.device)
    config = resolve_modes(_runnable(record.config, placed), placed)
    model, tokenizer = load_base(record)
    attach_trained(model, record.adapter, getattr(torch, config.dtype))
    model.to(placed).eval()  # pyright: ignore[reportArgumentType]
    length = input_length(config.max_length, weights.longest_input(model, tokenizer))
    batching = choose_batching(config, model, weights.pad_token_id(tokenizer), placed)
    record = dataclasses.replace(record, config=config)
    return TrainedRun(record, model, tokenizer, length, placed, batching)


def read_record(path: Path, model_name_or_path: str | None = None) -> Record:
    """What the files at `path` say, the base model's name replaced by the given one.

    Raises:
        MiniloraError: not an adapter, unfinished without a checkpoint, or damaged.
    """
    kind = kinds.kind_of(path)
    if kind == kinds.CHECKPOINT_OF_OURS:
        return _recorded(verify(path).run, path, model_name_or_path)
    if kind == kinds.RUN:
        return _recorded(read_run(path), _adapter_of_run(path), model_name_or_path)
    if kind == kinds.INCOMPLETE:
        raise MiniloraError(f"{path} is an incomplete checkpoint: give another one")
    if kind == kinds.MODEL:
        raise MiniloraError(
            f"{path} holds a model and no adapter ({CONFIG_NAME}): load it with transformers, for "
            f'example pipeline("text-classification", "{path}")'
        )
    return _of_foreign_adapter(find_adapter(path), model_name_or_path)


def load_base(record: Record) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The plain model that the adapter was trained on, and the tokenizer.

    Raises:
        MiniloraError: not to be found, or another one.
    """
    # A head that is drawn anew will be replaced by the adapter's: the caller's generator is left alone.
    with torch.random.fork_rng(devices=[]):
        start = load_model(record.config, record.labels)
    # Behind the base's fingerprint stands that of the adapter which the run went on from, if any.
    expected, found = (record.model_sha256 or "").partition(" ")[0], start.sha256.partition(" ")[0]
    if expected not in ("", found):
        raise MiniloraError(
            f"{record.adapter} is an adapter for another base model than {start.base.location} "
            f"(fingerprint {expected[:12]}, not {found[:12]}): give the one it was "
            "trained on with --model_name_or_path"
        )
    saved_beside = (record.adapter / "tokenizer_config.json").is_file()
    return start.model, (
        weights.load_tokenizer(str(record.adapter), None) if saved_beside else start.tokenizer
    )


def attach_trained(model: PreTrainedModel, adapter: Path, dtype: torch.dtype) -> None:
    """The adapter, over a base of the dtype in which it was trained."""
    model.to(dtype)  # pyright: ignore[reportArgumentType]
    load_adapter(model, adapter)
    if dtype != torch.float32:
        train_modules_in_float32(model)


def _runnable(config: TrainConfig, device: torch.device) -> TrainConfig:
    # A run of a GPU's float16 is as good in float32 where there is none.
    float16_here = config.dtype != "float16" or device.type != "cpu"
    return config if float16_here else dataclasses.replace(config, dtype="float32")


def _recorded(run: dict[str, Any], adapter: Path, model_name_or_path: str | None) -> Record:
    config = train_config_from_dict(run["arguments"], str(adapter))
    if model_name_or_path is not None:
        config = dataclasses.replace(config, model_name_or_path=model_name_or_path)
    return Record(adapter, config, run["labels"], run.get("pairs"), run["model_sha256"])


def _adapter_of_run(output_dir: Path) -> Path:
    if all((output_dir / name).is_file() for name in (WEIGHTS_NAME, CONFIG_NAME)):
        return output_dir
    checkpoint = latest_checkpoint(output_dir)
    if checkpoint is None:
        raise MiniloraError(
            f"{output_dir} has no adapter yet, neither final nor in a checkpoint: "
            f"python -m minilora.train --resume_from_checkpoint {output_dir}"
        )
    say(f"{output_dir} is not finished: this is {checkpoint.name}")
    return checkpoint


def _of_foreign_adapter(adapter: Path, model_name_or_path: str | None) -> Record:
    name, revision = model_name_or_path, read_config(adapter).revision
    if name is None:
        base, _ = base_of(weights.Located(str(adapter), True, f"the adapter in {adapter}"))
        name = base.location
    classes = _head_size(adapter)
    config = TrainConfig(
        model_name_or_path=name,
        model_revision=revision,
        task="regression" if classes == 1 else "sequence_classification",
    )
    labels = None if classes == 1 else weights.recorded_labels(name, revision, classes)
    return Record(adapter, config, labels, None, None)


def _head_size(adapter: Path) -> int:
    shapes = {key: tensor.shape for key, tensor in read_tensors(adapter).items()}
    for key, shape in shapes.items():
        parts = key.split(".")
        # A head may be one linear layer, or end in one called out_proj.
        if set(parts) & set(HEADS) and key.endswith(".weight") and "dense" not in parts:
            return shape[0]
    raise MiniloraError(
        f"{adapter} has no head ({' or '.join(HEADS)}) that classifies texts: it was trained for another task"
    )
