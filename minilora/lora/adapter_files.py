"""PEFT's adapter directory, read and written: the only room that spells PEFT's keys.

    adapter_config.json          the LoraConfig, keys and lists sorted, `inference_mode` true
    adapter_model.safetensors    metadata {"format": "pt"}; keys as below
    README.md                    a short model card, written where there is none

A key is `base_model.model.<module path>.<tensor>`, the adapter's name left out:

    base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight        (r, in_features)
    base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight        (out_features, r)
    base_model.model.bert.embeddings.word_embeddings.lora_embedding_A               (r, num_embeddings), no ".weight"
    base_model.model.classifier.weight                                              modules_to_save: the plain name
    base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.bias      bias="lora_only" or "all"

Source: peft 0.21 `utils/save_and_load.py` and its checkpoint format guide.
"""

import json
import re
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from minilora.durable import make_directory, write_file
from minilora.errors import MiniloraError
from minilora.lora.config import LoraConfig, config_from_dict, config_to_dict, differing_fields
from minilora.lora.inject import (
    adapter_layers,
    adapters_of,
    add_adapter,
    remove_adapter,
    set_active,
    trained_biases,
)
from minilora.reading import read_json, read_safetensors, read_torch

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"  # PEFT before 0.7
CARD_NAME = "README.md"
PREFIX = "base_model.model."
DEFAULT_ADAPTER = "default"

# Keys PEFT writes by mistake with bias="all": both copies of a head's biases beside the head itself,
# `classifier.original_module.bias`, `pooler.modules_to_save.default.dense.bias`.
JUNK = re.compile(r"\.(modules_to_save|original_module)\.(.+\.)?bias")


def save_adapter(model: nn.Module, path: str | Path, adapter_name: str = DEFAULT_ADAPTER) -> None:
    """Write what `PeftModel.save_pretrained` writes. Each file is complete or absent, and the same
    bytes every time.

    An adapter not called "default" goes to `path/<adapter_name>/`, as in PEFT. Saving while merged
    is fine: A and B are not changed by merging. Files get the permissions the umask gives
    (safetensors' own writer leaves 0600).

    Raises:
        MiniloraError: no such adapter, or `path` is a file.
    """
    directory = _adapter_directory(Path(path), adapter_name)
    if directory.exists() and not directory.is_dir():
        raise MiniloraError(f"{directory} is a file: give a directory to save the adapter in")
    files = adapter_files(model, adapter_name)
    make_directory(directory)
    # The weights first: a crash in between leaves a directory without a config, which nothing takes
    # for an adapter.
    for name, data in files.items():
        write_file(directory / name, data)
    if not (directory / CARD_NAME).exists():
        write_file(directory / CARD_NAME, _model_card(adapters_of(model).configs[adapter_name]))


def load_adapter(
    model: nn.Module,
    path: str | Path,
    adapter_name: str = DEFAULT_ADAPTER,
    is_trainable: bool = False,
) -> list[str]:
    """Read an adapter directory written by minilora or PEFT and return the keys loaded from it.

    If the model has no adapter of that name, one is injected as the file's config says, without
    disturbing torch's generator; it is active if it is the model's first. If it has one, the file's
    config must agree with it, and the values are copied into the existing parameters, so that an
    optimizer holding them stays valid.

    Checked, in this order: the config (every field honoured or refused), the set of keys (none
    missing, none unexpected), every shape. The model is as it was if a check fails. Values are
    converted to the parameters' dtype.

    Args:
        is_trainable: False freezes the adapter, as PEFT does.

    Raises:
        MiniloraError: names the file and what is wrong with it.
    """
    directory = find_adapter(path, adapter_name)
    config = read_config(directory)
    tensors = read_tensors(directory)
    _check_ranks(config, tensors, directory)
    config.inference_mode = not is_trainable
    existing = getattr(model, "minilora_adapters", None)
    if existing is not None and adapter_name in existing.configs:
        check_same_adapter(existing.configs[adapter_name], config, directory)
        assign_tensors(model, tensors, adapter_name, directory)
        existing.configs[adapter_name].inference_mode = not is_trainable
        set_active(model, existing.active)
        return sorted(tensors)
    with torch.random.fork_rng(devices=[]):
        add_adapter(model, config, adapter_name)
    try:
        assign_tensors(model, tensors, adapter_name, directory)
    except BaseException:
        remove_adapter(model, adapter_name)
        raise
    return sorted(tensors)


def adapter_state_dict(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> dict[str, Tensor]:
    """The adapter's tensors (not copies) under PEFT's on-disk keys."""
    return {
        key: parameter.detach() for key, parameter in _keyed_parameters(model, adapter_name).items()
    }


def adapter_files(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> dict[str, bytes]:
    """The contents of the weights and config files, by name."""
    config = adapters_of(model).configs.get(adapter_name)
    if config is None:
        raise MiniloraError(
            f"no adapter named {adapter_name!r}; this model has {', '.join(adapters_of(model).configs)}"
        )
    tensors = {
        # Tied or sliced tensors would be refused by safetensors; each is stored on its own.
        key: tensor.to("cpu").clone(memory_format=torch.contiguous_format)
        for key, tensor in adapter_state_dict(model, adapter_name).items()
    }
    text = json.dumps(config_to_dict(config), indent=2, sort_keys=True)
    return {
        WEIGHTS_NAME: safetensors.torch.save(tensors, metadata={"format": "pt"}),
        CONFIG_NAME: text.encode(),
    }


def find_adapter(path: str | Path, adapter_name: str = DEFAULT_ADAPTER) -> Path:
    """The directory that holds adapter `adapter_name`: `path/<adapter_name>` if it has a config,
    else `path`.

    Raises:
        MiniloraError: neither does; lists what was looked for.
    """
    candidates = dict.fromkeys([_adapter_directory(Path(path), adapter_name), Path(path)])
    for directory in candidates:
        if (directory / CONFIG_NAME).is_file():
            return directory
    looked_for = " nor ".join(str(directory / CONFIG_NAME) for directory in candidates)
    raise MiniloraError(f"no adapter in {path}: found no {looked_for}")


def read_config(directory: Path) -> LoraConfig:
    """The `LoraConfig` in a directory's adapter_config.json.

    Raises:
        MiniloraError: unreadable, not a JSON object, or a field is refused.
    """
    path = directory / CONFIG_NAME
    return config_from_dict(read_json(path), place=str(path))


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter directory under PEFT's keys, on the CPU; old and mistaken keys put
    right.

    `adapter_model.safetensors` wins over `adapter_model.bin`, as in PEFT; the latter is read with
    `weights_only=True`, which cannot run code.

    Raises:
        MiniloraError: neither file, or one that cannot be read.
    """
    weights, pickled = directory / WEIGHTS_NAME, directory / PICKLE_NAME
    if weights.is_file():
        tensors = read_safetensors(weights)
    elif pickled.is_file():
        tensors = _read_pickle(pickled)
    else:
        raise MiniloraError(
            f"{directory} has a config but no weights: neither {WEIGHTS_NAME} nor {PICKLE_NAME}"
        )
    return {key: tensor for key, tensor in tensors.items() if not JUNK.search(key)}


def check_same_adapter(ours: LoraConfig, theirs: LoraConfig, directory: Path) -> None:
    """Refuse a file whose config asks for another adapter than the injected one.

    Raises:
        MiniloraError: lists every differing field.
    """
    # What target_modules and modules_to_save resolve to is compared by the tensors' keys, below.
    resolved = (
        "target_modules",
        "modules_to_save",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    )
    differing = {
        name: values
        for name, values in differing_fields(theirs, ours).items()
        if name not in resolved
    }
    if differing:
        listed = "; ".join(
            f"{name}: {a!r} in the file, {b!r} here" for name, (a, b) in differing.items()
        )
        raise MiniloraError(f"{directory / CONFIG_NAME} is of another adapter: {listed}")


@torch.no_grad()
def assign_tensors(
    model: nn.Module, tensors: dict[str, Tensor], adapter_name: str, place: Path
) -> None:
    """Copy `tensors` into the adapter's parameters: exactly the same keys, exactly the same shapes.

    Raises:
        MiniloraError: a missing, unexpected or misshapen tensor, named; nothing has been copied
            then.
    """
    parameters = _keyed_parameters(model, adapter_name)
    tensors = {_current_key(key, parameters): tensor for key, tensor in tensors.items()}
    _check_keys(set(parameters), set(tensors), place)
    for key, parameter in parameters.items():
        tensor = tensors[key]
        if tensor.shape != parameter.shape:
            raise MiniloraError(
                f"{place}: {key} has shape {tuple(tensor.shape)}, the model expects {tuple(parameter.shape)}"
            )
        if not tensor.is_floating_point():
            raise MiniloraError(
                f"{place}: {key} has dtype {tensor.dtype}, not a floating-point one"
            )
    for key, parameter in parameters.items():
        parameter.copy_(tensors[key])


def _keyed_parameters(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    config = adapters_of(model).configs[adapter_name]
    found: dict[str, Tensor] = {}
    for module_name, module in adapter_layers(model):
        for tensor_name, parameter in module.adapter_parameters(adapter_name).items():
            found[f"{PREFIX}{module_name}.{tensor_name}"] = parameter
    for name, parameter in trained_biases(model, config.bias):
        found[f"{PREFIX}{name}"] = parameter
    return found


def _current_key(key: str, parameters: dict[str, Tensor]) -> str:
    # PEFT up to 0.6 had no base_layer: a trained bias was "...query.bias", which PEFT 0.21 silently
    # ignores.
    if key not in parameters and key.endswith(".bias"):
        renamed = f"{key.removesuffix('.bias')}.base_layer.bias"
        return renamed if renamed in parameters else key
    return key


def _check_ranks(config: LoraConfig, tensors: dict[str, Tensor], place: Path) -> None:
    # Before memory is taken for it: a few bytes of JSON can ask for any amount.
    highest = max([config.r, *config.rank_pattern.values()])
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    if highest > largest:
        raise MiniloraError(
            f"{place / CONFIG_NAME} asks for rank {highest}; no tensor of the file is that large"
        )


def _check_keys(expected: set[str], found: set[str], place: Path) -> None:
    for what, keys in (("lacks", expected - found), ("has unexpected", found - expected)):
        if keys:
            first = sorted(keys)[0]
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise MiniloraError(f"{place}: the adapter {what} tensor {first}{more}")


def _read_pickle(path: Path) -> dict[str, Tensor]:
    tensors = read_torch(path, allowed=[])
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in tensors.items()
    ):
        raise MiniloraError(f"{path} does not hold a dictionary of tensors")
    return tensors


def _adapter_directory(path: Path, adapter_name: str) -> Path:
    return path if adapter_name == DEFAULT_ADAPTER else path / adapter_name


def _model_card(config: LoraConfig) -> bytes:
    base = config.base_model_name_or_path
    header = ["---", "library_name: peft", "tags:", "- lora", "- minilora"]
    # The Hub takes only its own ids here; a local directory would be refused.
    if base and not Path(base).exists():
        header.insert(1, f"base_model: {base}")
    body = f"A LoRA adapter (r={config.r}, lora_alpha={config.lora_alpha}) for `{base}`, written by minilora."
    return "\n".join([*header, "---", "", body, ""]).encode()
