"""The model a run starts from, and how it runs: where the method, the model and the loop meet.

Training begins here, and so does what opens a trained model again.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minilora.bert import load
from minilora.bert.dropout import MaskStream, use_fast_dropout
from minilora.bert.forward import Packed, Padded, can_pack
from minilora.bert.tasks import Task, task_class
from minilora.errors import MiniloraError
from minilora.files import disk_errors, new_directory
from minilora.lora import peft_files
from minilora.lora.adapters import add_adapter, set_fused
from minilora.lora.config import BOOKKEEPING, LoraConfig, differing_fields
from minilora.lora.heads import train_heads_in_float32
from minilora.lora.merge import merge_and_unload
from minilora.lora.targets import is_saved, resolve_config, saved_modules
from minilora.training import distributed
from minilora.training.config import LORA_DEFAULTS, TrainConfig
from minilora.training.progress import say
from minilora.training.record import BASE_NAME, WAITING_BASE

# Rows are filled up to a multiple of this: oneDNN prepares its bfloat16 products for each new shape
# and keeps what it prepared. Without it, 60 different lengths took the process from 0.7 to 1.5 GB
# (`benchmarks/README.md`).
BFLOAT16_MULTIPLE = 32

# Where each length of batches is compiled, and recorded as a CUDA graph, it is a multiple of the
# one, so that there are few, and torch may compile as many as the other.
GRAPH_MULTIPLE, GRAPHS = 32, 64

# Of a config.json: what says nothing of how a model computes.
NAMES = {
    "_name_or_path", "architectures", "dtype", "id2label", "label2id", "output_attentions",
    "problem_type", "return_dict", "transformers_version",
}  # fmt: skip


@dataclass(frozen=True)
class StartingModel:
    """A loaded model before the run's adapter is attached."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sha256: str  # of its encoder, and behind a space of the adapter that is to be continued
    base: load.Located
    adapter: load.Located | None  # what it was given as, if that is an adapter
    new_modules: list[str]  # what the base's files lacked and was drawn: usually the head

    def settings(self) -> dict[str, Any]:
        """The base's config.json, names and labels aside: what the model does with its weights, and
        the dropout of its training.
        """
        found = json.loads(self.model.config.to_json_string())
        return {name: found[name] for name in found.keys() - NAMES}


def chosen_device(name: str | None) -> torch.device:
    """The device called `name`, as `TrainConfig` has it; by default a GPU where there is one."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MiniloraError(f"device is {name} and there is none here: give --device cpu")
    return distributed.own_device(device)


def emulates_bfloat16() -> bool:
    """Whether the CPU lacks AVX512-BF16 or AMX, or on Arm bf16: AVX512 alone does not suffice, as
    `torch.ops.mkldnn._is_mkldnn_bf16_supported` would have it.
    """
    # torch 2.10 cannot tell, and then nothing is said.
    capabilities = getattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})()
    return not any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def resolve_modes(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The arguments with everything decided that was left open, as run.json records them."""
    if config.dtype == "float16" and device.type == "cpu":
        raise MiniloraError("dtype float16 needs a GPU: on a CPU use bfloat16 or float32")
    if config.dtype == "bfloat16" and device.type == "cpu" and emulates_bfloat16():
        say("warning: this CPU has no bfloat16 products and emulates them: float32 may be faster")
    plain = config.hf_parity or config.torch_compile
    return dataclasses.replace(
        config,
        batching=config.batching or ("padded" if plain else "packed"),
        dropout=config.dropout or ("torch" if plain or device.type != "cpu" else "fast"),
        # With 500, the default of TrainingArguments, a short run would have no loss curve.
        logging_steps=config.logging_steps or (500 if config.hf_parity else 10),
    )


def new_lora_config(config: TrainConfig, lora_arguments: dict[str, Any]) -> LoraConfig:
    """The adapter to train: as asked, or, when an adapter is continued, as its file says."""
    name = config.model_name_or_path
    if name is not None and config.on_adapter == "continue":
        found = load.locate(name, config.model_revision)
        if found.is_adapter:
            stored = dataclasses.asdict(peft_files.read_config(Path(found.location)))
            asked = {key: lora_arguments[key] for key in lora_arguments.keys() - {*BOOKKEEPING}}
            return LoraConfig(**{**stored, **asked, "inference_mode": False})
    task_type = task_class(config.task).peft_task_type
    return LoraConfig(**{**LORA_DEFAULTS, **lora_arguments, "task_type": task_type})


def load_starting_model(config: TrainConfig, task: Task, kept: Path | None = None) -> StartingModel:
    """Load what `model_name_or_path` names, its base if that is an adapter, merged if so asked, or
    once `keep_merged` has been, what it `kept`.
    """
    if config.on_adapter == "merge" and kept is not None and kept.is_dir():
        config = dataclasses.replace(config, model_name_or_path=str(kept.resolve()))
    found = load.locate(config.model_name_or_path, config.model_revision)
    adapter, directory = found if found.is_adapter else None, Path(found.location)
    base, revision = base_of(directory) if adapter else (found, config.model_revision)
    model, new_modules = load.load_model(base.location, revision, task)
    tokenizer = load.load_tokenizer(base.location, revision)
    if adapter is not None:
        check_new_modules(new_modules, peft_files.read_config(directory), directory)
    if adapter is not None and config.on_adapter == "merge":
        peft_files.load_adapter(model, directory)
        merge_and_unload(model)
        new_modules = []
    sha256 = load.model_fingerprint(model, new_modules)
    if config.on_adapter == "merge" and not new_modules:  # a run of it begins with its head, too
        sha256 += f" {load.tensors_fingerprint(model.state_dict())}"
    if adapter is not None and config.on_adapter == "continue":
        sha256 += f" {load.tensors_fingerprint(peft_files.read_adapter(directory).tensors)}"
    return StartingModel(model, tokenizer, sha256, base, adapter, new_modules)


def keep_merged(start: StartingModel, config: TrainConfig, place: Path) -> None:
    """Write a base into which an adapter was merged, whole or not at all, as a model directory that
    the new adapter's config will name: on the base as it was, it would be another model.
    """
    if start.adapter is None or config.on_adapter == "continue":
        return
    start.model.name_or_path = str(place.resolve())
    with new_directory(place.with_name(WAITING_BASE)) as directory, disk_errors(place):
        start.model.save_pretrained(directory)
        start.tokenizer.save_pretrained(directory)


def merged_base(directory: Path) -> str | None:
    """The base that was written for the adapter in a run's directory, or in its checkpoint's: where
    its config says or, once moved, beside it.
    """
    named = Path(peft_files.read_config(directory).base_model_name_or_path or "")
    beside = [place / BASE_NAME for place in (directory, directory.resolve().parent)]
    there = [str(place) for place in (named, *beside) if (place / "config.json").is_file()]
    return there[0] if there and named.name == BASE_NAME else None


def with_new_modules(lora: LoraConfig, start: StartingModel) -> LoraConfig:
    """The adapter's config, with every new module among those that it trains in full, and saves."""
    saved = saved_modules(lora)
    names = [name for name in start.new_modules if not is_saved(name, saved)]
    ends = [name.rpartition(".")[2] for name in names]
    return dataclasses.replace(lora, modules_to_save=[*(lora.modules_to_save or []), *ends] or None)


def check_new_modules(new_modules: list[str], lora: LoraConfig, place: Path) -> None:
    """Refuse an adapter without a module that its base's files lack, too: it would be random."""
    random = [name for name in new_modules if not is_saved(name, saved_modules(lora))]
    if random:
        lack = f"neither the adapter nor its base model holds {', '.join(random)}"
        raise MiniloraError(f"{place}: {lack}: train it again with --modules_to_save")


def base_of(directory: Path) -> tuple[load.Located, str | None]:
    """The model that an adapter was trained on, and its revision, as its config names them."""
    config = peft_files.read_config(directory)
    name = merged_base(directory) or config.base_model_name_or_path
    if not name:
        raise MiniloraError(f"{directory} does not name its base model (base_model_name_or_path)")
    try:
        base = load.locate(name, config.revision)
    except MiniloraError as error:
        raise MiniloraError(f"{directory} names the base model {name!r}: {error}") from None
    if base.is_adapter:
        raise MiniloraError(f"{directory} names as its base {name!r}, which is an adapter")
    return base, config.revision


def attach_adapter(start: StartingModel, config: TrainConfig, lora: LoraConfig) -> None:
    """A new adapter, or the one that is to be continued, trainable, over a base of `config.dtype`.

    What trains is float32 whatever the base is: a step of AdamW is often smaller than what bfloat16
    can add to a weight.
    """
    dtype = getattr(torch, config.dtype)
    if dtype != torch.float32 and lora.bias != "none":
        lost = f"trains the base model's biases, which dtype {config.dtype} would round away"
        raise MiniloraError(f"bias={lora.bias!r} {lost}: use dtype float32, or bias none")
    if start.adapter is not None and config.on_adapter == "continue":
        directory = Path(start.adapter.location)
        stored = resolve_config(start.model, peft_files.read_config(directory))
        differing = differing_fields(stored, resolve_config(start.model, lora))
        if differing:
            asked = f"is to be continued and has other settings: {', '.join(differing)}"
            advice = "leave them out, or merge it first (--on_adapter merge)"
            raise MiniloraError(f"{directory} {asked}; {advice}")
        load_trained(start.model, directory, dtype, is_trainable=True)
        return
    start.model.to(dtype)
    add_adapter(start.model, lora)
    if dtype != torch.float32:
        train_heads_in_float32(start.model)


def load_trained(
    model: PreTrainedModel, adapter: Path, dtype: torch.dtype, is_trainable: bool
) -> None:
    """The adapter in a directory, over a base of `dtype`. Modules trained in full stay float32."""
    model.to(dtype)  # pyright: ignore[reportArgumentType]
    peft_files.load_adapter(model, adapter, is_trainable=is_trainable)
    if dtype != torch.float32:
        train_heads_in_float32(model)
        # Once more: it was rounded to `dtype`.
        peft_files.assign_adapter(model, peft_files.read_adapter(adapter))


def choose_forward(
    config: TrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> Packed | Padded:
    """The forward of an adapted model, on `device`: how its batches are made and its layers run."""
    pad_token_id = load.pad_token_id(tokenizer)
    model.to(device)  # pyright: ignore[reportArgumentType]
    set_fused(model, not config.hf_parity)
    if config.batching == "packed":
        if can_pack(model):
            half_on_cpu = config.dtype == "bfloat16" and device.type == "cpu"
            return Packed(model, pad_token_id, BFLOAT16_MULTIPLE if half_on_cpu else 1)
        say(f"batches are padded: a {model.config.model_type} is not known how to pack")
    # A divisor of what the model has positions for: no batch is filled up to more.
    graphs_multiple = math.gcd(GRAPH_MULTIPLE, load.positions(model) or 0)
    multiple = graphs_multiple if has_graphs(config, device) else 1
    return Padded(model, pad_token_id, tokenizer.padding_side, multiple)


def has_graphs(config: TrainConfig, device: torch.device) -> bool:
    """Whether a step replays CUDA graphs: of a small model, it is spent launching kernels. (Not
    where gradients outlive their graph, to be added up: its next run writes over them.)
    """
    is_alone = config.gradient_accumulation_steps == distributed.world_size() == 1
    return config.torch_compile and device.type == "cuda" and is_alone


def prepare_training(config: TrainConfig, forward: Packed | Padded) -> nn.Module:
    """Make the model train as `dropout`, `gradient_checkpointing` and `torch_compile` ask; returns
    the forward to train, of which every process has one.
    """
    model = forward.model
    checkpointing: dict[str, Any] = {"use_reentrant": False}
    if config.dropout == "fast":
        stream = MaskStream(config.seed, distributed.rank())
        use_fast_dropout(model, stream)
        checkpointing["context_fn"] = stream.checkpoint_contexts
    if config.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            family = model.config.model_type
            raise MiniloraError(f"gradient_checkpointing: a {family} has no layers that can do it")
        # Its name until transformers 5.23.
        old_name = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", old_name)(checkpointing)
    if has_graphs(config, model.device):
        torch._dynamo.config.recompile_limit = GRAPHS
        model.base_model.compile(mode="reduce-overhead", dynamic=False)
    elif config.torch_compile:
        forward.compile()
    return distributed.replicated(forward)


def describe_start(
    start: StartingModel, config: TrainConfig, data: dict[str, Any], steps: int, place: Path
) -> None:
    """Say what is about to be trained, with PEFT's line on trainable parameters, and on what."""
    new = ", ".join(start.new_modules) or "-"
    say(f"model: {start.base.description}, a {type(start.model).__name__}; new: {new}")
    if start.adapter is not None:
        merged = f"merged into it, in {place / BASE_NAME}"
        done = "continued" if config.on_adapter == "continue" else merged
        say(f"{start.adapter.description}: {done}")
    trainable, total = (start.model.num_parameters(only) for only in (True, False))
    counts = f"trainable params: {trainable:,} || all params: {total:,}"
    say(f"{counts} || trainable%: {100 * trainable / total:.4f}")
    sizes = ", ".join(f"{len(examples):,} {split}" for split, examples in data.items())
    file = config.train_file or config.dataset_name or "the packaged sentences"
    say(f"data: {file}, {sizes} examples; {steps:,} steps on {start.model.device}\noutput: {place}")
