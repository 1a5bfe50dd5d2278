"""What PEFT's files hold when the base beneath an adapter is no longer what its own files say.

Two cases: embeddings that were resized lie beside the adapter, and an update that began by reducing
the base's weights (pissa, olora) can be written as one over the base as it was.

Source: peft 0.21 `utils/save_and_load.py`, and `LoraModel.subtract_mutated_init`.
"""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora import reading
from minilora.errors import MiniloraError
from minilora.lora.adapters import adapter_layers, adapters_of
from minilora.lora.config import LoraConfig
from minilora.lora.embedding import TrainableTokens
from minilora.lora.heads import ModulesToSave
from minilora.lora.layer import LoRALinear
from minilora.lora.targets import plain_modules, reduces_base, unwrapped

PREFIX = "base_model.model."
MAX_CONFIG_BYTES = 50_000_000  # it may list very many labels


def base_embeddings(model: Any) -> dict[str, nn.Parameter]:
    """PEFT's key -> parameter, of the base's input and output embeddings."""
    model = unwrapped(model)
    getters = ("get_input_embeddings", "get_output_embeddings")
    layers = [getattr(model, getter, lambda: None)() for getter in getters]
    found = {}
    for name, module in plain_modules(model):
        # One trained in full is in the file anyway.
        if module in layers and not isinstance(module, ModulesToSave):
            place = f"{name}.token_adapter" if isinstance(module, TrainableTokens) else name
            base = {k: p for k, p in module.named_parameters() if not k.startswith("adapters.")}
            found |= {f"{PREFIX}{place}.{key}": parameter for key, parameter in base.items()}
    return found


def embeddings_to_write(model: Any, config: LoraConfig) -> dict[str, nn.Parameter]:
    """`base_embeddings`, if the vocabulary is not that of the base's files or they came from an
    adapter's; else none.
    """
    found, replaced = base_embeddings(model), adapters_of(model).originals
    came = any(key.endswith("weight") and p in replaced for key, p in found.items())
    return found if came or _is_resized(unwrapped(model), config.base_model_name_or_path) else {}


def keep_embeddings(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Keep the base's embeddings aside where an adapter's `tensors` bring others."""
    record = adapters_of(model)
    for key, p in base_embeddings(model).items():
        if key in tensors and not torch.equal(p, tensors[key].to(p)):
            if len(record.configs) > 1:
                problem = f"brings another {key} than the base's: it must be alone on its model"
                raise MiniloraError(f"the adapter {problem}")
            # Tied ones are one parameter under two keys.
            record.originals.setdefault(p, p.detach().clone())


@torch.no_grad()
def as_plain_update(
    model: nn.Module, adapter_name: str, tensors: dict[str, Tensor], initial: dict[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A pissa or olora adapter as a plain one over the original base, of twice the rank.

        W = W_res + s B_0 A_0,   W_res + s B A - W = s [B, -B_0] [A; A_0]

    `initial` are the adapter's `tensors` from before training. Heads and trained biases stay.
    """
    record = adapters_of(model, "convert an adapter")
    config, given = record.configs[adapter_name], "path_initial_model_for_weight_conversion"
    if not reduces_base(config) or config.use_dora:
        problem = "is for adapters that reduced their base: pissa or olora, without DoRA"
        raise MiniloraError(f"{given} {problem}")
    updates = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    reading.check_like(updates, initial, given)
    doubled = {}
    for name, layer in adapter_layers(model):
        if not isinstance(layer, LoRALinear):
            continue
        key_A, key_B = (f"{PREFIX}{name}.lora_{matrix}.weight" for matrix in "AB")
        A, B, weight = initial[key_A], initial[key_B], layer.base_layer.weight
        whole = weight + layer.adapters[adapter_name].scaling * (B @ A).to(weight)
        if not torch.allclose(whole, record.originals[weight].to(weight), rtol=1e-2, atol=1e-3):
            raise MiniloraError(f"{given} holds another {name} than what was taken from the base")
        doubled[key_A] = torch.cat([tensors[key_A], A.to(tensors[key_A])])
        doubled[key_B] = torch.cat([tensors[key_B], -B.to(tensors[key_B])], dim=1)
    # The scaling stays: lora_alpha / r, or with rslora lora_alpha / sqrt(r).
    factor = math.sqrt(2) if config.use_rslora else 2
    plain = dataclasses.replace(
        config,
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: factor * alpha for key, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )
    return plain, {**tensors, **doubled}


def _is_resized(model: Any, base: str | None) -> bool:
    """Whether a base, a directory or a hub id in the local cache, has another `vocab_size`."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if base is None or size is None:
        return False
    from huggingface_hub import try_to_load_from_cache  # slow to import

    with contextlib.suppress(ValueError):  # no hub id; no JSON
        path = Path(base, "config.json")
        found = path if path.is_file() else try_to_load_from_cache(base, "config.json")
        if isinstance(found, str | Path):
            return reading.read_json(Path(found), MAX_CONFIG_BYTES).get("vocab_size", size) != size
    return False
