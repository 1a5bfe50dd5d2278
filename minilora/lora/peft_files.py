"""PEFT's adapter directory, read and written: the only room that spells PEFT's keys.

    adapter_config.json          the LoraConfig, keys and lists sorted, `inference_mode` true
    adapter_model.safetensors    metadata {"format": "pt"}
    README.md                    a short model card, written where there is none

A key is `base_model.model.<module's name>.<tensor>`, whatever the adapter is called:

    base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight    (r, in_features)
    base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight    (out_features, r)
    base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.bias  a trained bias
    base_model.model.bert.embeddings.word_embeddings.lora_embedding_A           no ".weight" here
    base_model.model.classifier.weight                                          modules_to_save

Source: peft 0.21 `utils/save_and_load.py` and its checkpoint format guide.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from minilora import reading
from minilora.errors import MiniloraError, harmless
from minilora.files import make_directory, write_file
from minilora.lora import adapters, peft_bases
from minilora.lora.adapters import adapters_of
from minilora.lora.config import LoraConfig, config_from_dict, config_to_dict, differing_fields
from minilora.lora.embedding import TiedOutput
from minilora.lora.peft_bases import PREFIX
from minilora.lora.targets import check_known, unwrapped

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"  # PEFT before 0.7
CARD_NAME = "README.md"
# Where a tensor is not called on disk as it is inside its adapter.
ON_DISK = {
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
    "trainable_tokens_delta": "token_adapter.trainable_tokens_delta",
}
# Keys PEFT writes by mistake with bias="all" and of resized embeddings: both copies of a module
# beside the module itself, `classifier.original_module.bias`, `....modules_to_save.default.weight`.
JUNK = re.compile(r"\.(modules_to_save|original_module)\.(.+\.)?(bias|weight)")
# What these fields come to depends on the model; it is compared by the tensors' keys.
SELECTING = ("target_modules", "exclude_modules", "modules_to_save", "layers_")


@dataclass(frozen=True)
class StoredAdapter:
    """What an adapter directory holds; old and mistaken keys are put right."""

    directory: Path
    config: LoraConfig
    tensors: dict[str, Tensor]


def save_adapter(
    model: nn.Module,
    path: str | Path,
    adapter_name: str = "default",
    path_initial_model_for_weight_conversion: str | Path | None = None,
) -> None:
    """Write what `PeftModel.save_pretrained` writes, the same bytes every time, merged or not.

    Each file is complete or absent and has the permissions the umask gives (safetensors' own writer
    leaves 0600). An adapter not called "default" goes to `path/<adapter_name>/`, as in PEFT. Given
    the directory to which a pissa or olora adapter was saved before training, it is written as a
    plain adapter over the original base (`peft_bases.as_plain_update`).
    """
    directory = Path(path) if adapter_name == "default" else Path(path) / adapter_name
    if not directory.is_dir() and (directory.exists() or directory.is_symlink()):
        raise MiniloraError(f"{directory} is no directory: give one to save the adapter in")
    initial = path_initial_model_for_weight_conversion
    started = None if initial is None else read_adapter(initial, adapter_name)
    files = adapter_files(model, adapter_name, started)
    if not (directory / CARD_NAME).exists():
        files[CARD_NAME] = _model_card(adapters_of(model).configs[adapter_name])
    make_directory(directory)
    for name, data in files.items():
        write_file(directory / name, data)


def load_adapter(
    model: nn.Module,
    path: str | Path,
    adapter_name: str = "default",
    is_trainable: bool = False,
    autocast_adapter_dtype: bool = True,
) -> list[str]:
    """Read an adapter directory written by minilora or PEFT and return the keys loaded from it.

    If the model has no adapter of that name, one is added as the file's config says, without
    disturbing torch's generator. If it has one, the values are copied into its parameters, so that
    an optimizer holding them stays valid.

    Each field of the config is honoured or refused, no key may be missing, none unexpected, each
    shape must be right; after an error the model is as it was. Values are converted to the
    parameters' dtype. `is_trainable=False` freezes the adapter and puts the model into eval mode,
    as PEFT does.
    """
    model = unwrapped(model)
    is_plain = not hasattr(model, "minilora_adapters")
    is_new = is_plain or adapter_name not in adapters_of(model, "load an adapter").configs
    stored = read_adapter(path, adapter_name)
    if is_new:
        with torch.random.fork_rng(devices=[]):
            adapters.add_adapter(model, stored.config, adapter_name, autocast_adapter_dtype)
    try:
        assign_adapter(model, stored, adapter_name)
    except BaseException:
        if is_new:
            adapters.delete_adapter(model, adapter_name)
        raise
    record = adapters_of(model)
    record.configs[adapter_name].inference_mode = not is_trainable
    adapters.set_active(model, record.active)
    if not is_trainable:
        model.eval()
    return sorted(stored.tensors)


def adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors (not copies) under PEFT's on-disk keys."""
    record = adapters_of(model, "read an adapter", even="merged")
    check_known(record.configs, [adapter_name])
    found: dict[str, Tensor] = {}
    for name, layer in adapters.adapter_layers(model):
        # A tied output layer reads the rows that its embedding brings along.
        if adapter_name in layer.adapters and not isinstance(layer, TiedOutput):
            parameters = layer.adapters[adapter_name].named_parameters(remove_duplicate=False)
            for key, parameter in parameters:
                found[f"{PREFIX}{name}.{ON_DISK.get(key, key)}"] = parameter.detach()
    for name, parameter in adapters.trained_biases(model, record.configs[adapter_name].bias):
        # Merging folds lora_bias into a trained bias, which is kept aside.
        found[f"{PREFIX}{name}"] = record.unmerged.get(name, parameter).detach().to(parameter)
    return found


def adapter_files(
    model: nn.Module, adapter_name: str = "default", initial: StoredAdapter | None = None
) -> dict[str, bytes]:
    """Name -> contents of an adapter's two files, converted if `initial` is what it began as.

    The weights come first: a crash between the two leaves a directory without a config, which
    nothing takes for an adapter.
    """
    tensors = adapter_state_dict(model, adapter_name)
    config = adapters_of(model).configs[adapter_name]
    if initial is not None:
        config, tensors = peft_bases.as_plain_update(model, adapter_name, tensors, initial.tensors)
    for key, tensor in {**tensors, **peft_bases.embeddings_to_write(model, config)}.items():
        # Tied or sliced tensors would be refused by safetensors; each is stored on its own.
        tensors[key] = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
    return {
        WEIGHTS_NAME: safetensors.torch.save(tensors, metadata={"format": "pt"}),
        CONFIG_NAME: json.dumps(config_to_dict(config), indent=2, sort_keys=True).encode(),
    }


def read_config(directory: Path) -> LoraConfig:
    path = directory / CONFIG_NAME
    return config_from_dict(reading.read_json(path), place=str(path))


def read_adapter(path: str | Path, adapter_name: str = "default") -> StoredAdapter:
    """The adapter in `path/<adapter_name>` if that has a config, else in `path`.

    `.safetensors` wins over `.bin`, as in PEFT.
    """
    named = Path(path) if adapter_name == "default" else Path(path) / adapter_name
    directory = named if (named / CONFIG_NAME).is_file() else Path(path)
    if not (directory / CONFIG_NAME).is_file():
        raise MiniloraError(f"no adapter in {path}: found no {named / CONFIG_NAME}")
    weights, pickled = directory / WEIGHTS_NAME, directory / PICKLE_NAME
    if weights.is_file():
        tensors = reading.parse_safetensors(reading.read_bytes(weights), weights)
    elif pickled.is_file():
        tensors = reading.parse_torch(reading.read_bytes(pickled), pickled)
        items = tensors.items() if isinstance(tensors, dict) else [(None, None)]
        if not all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in items):
            raise MiniloraError(f"{pickled} does not hold a dictionary of tensors")
    else:
        raise MiniloraError(f"{directory} has neither {WEIGHTS_NAME} nor {PICKLE_NAME}")
    return _stored(directory, read_config(directory), tensors)


def parse_adapter(directory: Path, config: bytes, weights: bytes) -> StoredAdapter:
    """The same from what was read from `directory` already: the bytes of its two files."""
    config_path, weights_path = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    parsed = config_from_dict(reading.parse_json(config, config_path), place=str(config_path))
    return _stored(directory, parsed, reading.parse_safetensors(weights, weights_path))


def check_adapter(
    model: nn.Module, stored: StoredAdapter, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """Refuse a stored adapter that is another than the model's: by config, keys, shapes, dtypes.

    Return the model's own tensors (not copies) under the stored ones' keys.
    """
    own = adapter_state_dict(model, adapter_name)
    place, config = stored.directory, adapters_of(model).configs[adapter_name]
    changes = [c for c in differing_fields(stored.config, config) if not c.startswith(SELECTING)]
    if changes:
        problem = f"is of another adapter than the model's: {', '.join(changes)}"
        raise MiniloraError(f"{place / CONFIG_NAME} {problem}")
    base = peft_bases.base_embeddings(model)
    for key in sorted(stored.tensors.keys() & base.keys() - own.keys()):
        own[key], rows = base[key].detach(), next(iter(stored.tensors[key].shape), 0)
        if rows != len(own[key]):
            found = f"{key} has {rows} rows, not {len(own[key])}"
            raise MiniloraError(f"{place}: {found}: call resize_token_embeddings({rows}) before")
    lacking, extra = own.keys() - stored.tensors.keys(), stored.tensors.keys() - own.keys()
    for what, keys in (("lacks", lacking), ("has unexpected", extra)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise MiniloraError(f"{place}: the adapter {what} tensor {min(keys)}{more}")
    reading.check_like(own, stored.tensors, place)
    return own


def assign_adapter(model: nn.Module, stored: StoredAdapter, adapter_name: str = "default") -> None:
    """Check a stored adapter, then copy its values into the model's."""
    own = check_adapter(model, stored, adapter_name)
    peft_bases.keep_embeddings(model, stored.tensors)
    for key, tensor in own.items():
        tensor.copy_(stored.tensors[key])


def _stored(directory: Path, config: LoraConfig, tensors: dict[str, Tensor]) -> StoredAdapter:
    # Before memory is taken for it: a few bytes of JSON can ask for any amount.
    highest = max([config.r, *config.rank_pattern.values()])
    if highest > max((size for tensor in tensors.values() for size in tensor.shape), default=0):
        path = directory / CONFIG_NAME
        raise MiniloraError(f"{path} asks for rank {highest}; no tensor of the file is that large")
    found = {key: tensor for key, tensor in tensors.items() if not JUNK.search(key)}
    # PEFT up to 0.6 had no base_layer: a trained bias was "...query.bias", which 0.21 just ignores.
    for key in tensors:
        module = key.removesuffix(".bias")
        if module != key and f"{module}.lora_A.weight" in found:
            found[f"{module}.base_layer.bias"] = found.pop(key)
    return StoredAdapter(directory, config, found)


def _model_card(config: LoraConfig) -> bytes:
    base = config.base_model_name_or_path
    # The Hub takes only its own ids here; a local directory would be refused. JSON's texts are
    # YAML's, with nothing that could end one.
    named = f"base_model: {json.dumps(base)}\n" if base and not Path(base).exists() else ""
    tag = f"- {json.dumps(f'base_model:adapter:{base}')}\n" if base else ""
    head = f"---\n{named}library_name: peft\ntags:\n{tag}- lora\n- minilora\n---\n"
    numbers = f"r={config.r}, lora_alpha={config.lora_alpha}"
    shown = harmless(" ".join((base or "").split()))
    return f"{head}\nA LoRA adapter ({numbers}) for `{shown}`, written by minilora.\n".encode()
