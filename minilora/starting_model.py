"""The model a run starts from: a base, or an adapter to continue or to merge into its base."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minilora.bert import tasks, weights
from minilora.errors import MiniloraError
from minilora.lora.adapter_files import find_adapter, load_adapter, read_config, read_tensors
from minilora.lora.base_precision import train_modules_in_float32
from minilora.lora.config import LoraConfig
from minilora.lora.inject import add_adapter
from minilora.lora.merge import merge_and_unload
from minilora.training.config import LORA_DEFAULTS, TrainConfig
from minilora.training.progress import say
from minilora.training.resume import changes


@dataclass(frozen=True)
class StartingModel:
    """A loaded model before the run's adapter is attached."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sha256: str
    """Fingerprint of its encoder, and of the adapter that is to be continued."""
    base: weights.Located
    adapter: weights.Located | None
    """The adapter directory it was given as, if it was one."""
    new_tensors: list[str]
    """What the checkpoint lacked and was drawn: usually the head."""


def new_lora_config(config: TrainConfig, lora_arguments: dict[str, Any]) -> LoraConfig:
    """The adapter to train: as asked, or, when an adapter directory is continued, as its file says.

    Raises:
        MiniloraError: an argument contradicts the adapter that is to be continued.
    """
    name = config.model_name_or_path
    found = weights.locate(name, config.model_revision) if name is not None else None
    if found is None or config.on_adapter == "merge" or not found.is_adapter:
        given = {**LORA_DEFAULTS, **lora_arguments, "task_type": tasks.PEFT_TASK_TYPE}
        return LoraConfig(**given)
    stored = read_config(find_adapter(found.location))
    refused = changes(stored, lora_arguments, ignored=("task_type",))
    if refused:
        raise MiniloraError(
            f"{name} is to be continued and its adapter has other settings: "
            f"{', '.join(refused)}; leave them out, or use --on_adapter merge for a new adapter"
        )
    return dataclasses.replace(stored, inference_mode=False)


def load_model(config: TrainConfig, labels: list[str] | None) -> StartingModel:
    """Load what `model_name_or_path` names, its base if that is an adapter, merged if so asked."""
    found = weights.locate(config.model_name_or_path, config.model_revision)
    base, revision = base_of(found) if found.is_adapter else (found, config.model_revision)
    model, new_tensors = weights.load_classifier(base.location, revision, labels, config.task)
    tokenizer = weights.load_tokenizer(base.location, revision)
    if found.is_adapter and config.on_adapter == "merge":
        load_adapter(model, found.location)
        merge_and_unload(model)
    sha256 = weights.model_fingerprint(model)
    if found.is_adapter and config.on_adapter == "continue":
        tensors = read_tensors(find_adapter(found.location))
        sha256 = f"{sha256} {weights.tensors_fingerprint(tensors)}"
    return StartingModel(
        model, tokenizer, sha256, base, found if found.is_adapter else None, new_tensors
    )


def attach_adapter(
    start: StartingModel, on_adapter: str, lora_config: LoraConfig, dtype: torch.dtype
) -> None:
    """A new adapter, or the one that is to be continued, trainable, over a base of `dtype`.

    What trains is float32 whatever the base is: a step of AdamW is often smaller than what bfloat16
    can add to a weight.

    Raises:
        MiniloraError: the base model's own biases are to train in half precision.
    """
    if dtype != torch.float32 and lora_config.bias != "none":
        raise MiniloraError(
            f"bias={lora_config.bias!r} trains the base model's biases, which dtype {dtype} would "
            "round away: use dtype float32, or bias none"
        )
    start.model.to(dtype)  # pyright: ignore[reportArgumentType]
    if start.adapter is not None and on_adapter == "continue":
        load_adapter(start.model, start.adapter.location, is_trainable=True)
    else:
        add_adapter(start.model, lora_config)
    if dtype != torch.float32:
        train_modules_in_float32(start.model)


def describe_start(start: StartingModel, on_adapter: str, output_dir: str) -> None:
    """Say what is about to be trained, with PEFT's line on trainable parameters."""
    new = ", ".join(start.new_tensors) or "-"
    say(f"model: {start.base.description}, a {type(start.model).__name__}; new: {new}")
    if start.adapter is not None:
        done = "continued" if on_adapter == "continue" else "merged into it"
        say(f"{start.adapter.description}: {done}")
    say(trainable_line(start.model))
    say(f"output: {output_dir}")


def trainable_line(model: nn.Module) -> str:
    """PEFT's `print_trainable_parameters`."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    share = 100 * trainable / total
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"


def base_of(adapter: weights.Located) -> tuple[weights.Located, str | None]:
    """The model that an adapter directory was trained on, and its revision, as its config names
    them.

    Raises:
        MiniloraError: it names none, or there is none where it says.
    """
    directory = find_adapter(adapter.location)
    config = read_config(directory)
    name = config.base_model_name_or_path
    if not name:
        raise MiniloraError(f"{directory} does not name its base model (base_model_name_or_path)")
    try:
        base = weights.locate(name, config.revision)
    except MiniloraError as error:
        raise MiniloraError(f"{directory} names the base model {name!r}: {error}") from None
    if base.is_adapter:
        raise MiniloraError(f"{directory} names as its base model {name!r}, which is an adapter")
    return base, config.revision
