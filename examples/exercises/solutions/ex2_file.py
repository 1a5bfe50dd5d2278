"""Exercise 2: the file."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PREFIX = "base_model.model."
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
REFUSED = ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern")


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, not copies, under their keys on disk."""
    named = model.named_parameters()
    return {PREFIX + name: p.detach() for name, p in named if p.requires_grad}


def write_adapter(model: nn.Module, directory: Path, config: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.contiguous() for key, tensor in trained(model).items()}
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    whole = {**config, "peft_type": "LORA", "inference_mode": True}
    (directory / CONFIG_NAME).write_text(json.dumps(whole, indent=2, sort_keys=True))


def read_config(directory: Path) -> dict[str, Any]:
    config = json.loads((directory / CONFIG_NAME).read_text())
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {config.get('peft_type')!r}, not 'LORA'")
    for name in REFUSED:
        if config.get(name):
            raise ValueError(f"{name} is {config[name]!r}, which is not known here")
    return {**DEFAULTS, **config}


@torch.no_grad()
def read_adapter(model: nn.Module, directory: Path) -> None:
    stored, own = load_file(directory / WEIGHTS_NAME), trained(model)
    for key in sorted(own.keys() ^ stored.keys()):
        raise ValueError(f"{key} is {'missing' if key in own else 'unexpected'}")
    for key, tensor in own.items():
        if tensor.shape != stored[key].shape:
            shapes = f"{tuple(stored[key].shape)}, not {tuple(tensor.shape)}"
            raise ValueError(f"{key} has the shape {shapes}")
    for key, tensor in own.items():
        tensor.copy_(stored[key])
