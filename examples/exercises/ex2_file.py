"""Exercise 2: the file. PEFT's adapter directory, written and read.

    adapter_config.json          what makes the tensors a function: r, lora_alpha, ...
    adapter_model.safetensors    the tensors, metadata {"format": "pt"}

The model has exercise 1's layers, so that its parameters are called

    bert.encoder.layer.0.attention.self.query.base_layer.weight    frozen
    bert.encoder.layer.0.attention.self.query.lora_A.weight        trained
    classifier.weight                                              trained in full

and on disk a trained one is called "base_model.model." and its name.

Build, in this order:

1. `write_adapter`: the trained parameters and no others, under their keys, and the config with
   "peft_type": "LORA" and "inference_mode": true.
2. `read_config`: PEFT's default stands for a field that the file lacks (DEFAULTS). Whatever would
   change the numbers and is not known here (REFUSED) is an error, not ignored.
3. `read_adapter`: copy the file's tensors into the model's. A tensor that is missing, that the
   model has no place for, or that has another shape is a ValueError that names its key; then the
   model is left exactly as it was.

Run: python -m pytest examples/exercises/test_file.py
"""

from pathlib import Path
from typing import Any

from torch import nn

PREFIX = "base_model.model."
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
REFUSED = ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern")


def write_adapter(model: nn.Module, directory: Path, config: dict[str, Any]) -> None:
    """Write the adapter of `model` as PEFT does. `config` holds r, lora_alpha, target_modules,
    modules_to_save and task_type; it is not changed. `directory` may not exist yet.
    """
    raise NotImplementedError


def read_config(directory: Path) -> dict[str, Any]:
    """What adapter_config.json says, DEFAULTS standing for what it does not say.

    Raises:
        ValueError: peft_type is not "LORA", or a field of REFUSED is there and is not empty, false
            or null. The message names the field.
    """
    raise NotImplementedError


def read_adapter(model: nn.Module, directory: Path) -> None:
    """Copy the tensors into the model's trained parameters, all of them or none.

    Raises:
        ValueError: a key is missing or unexpected, or its tensor has another shape than the
            parameter. The message names the key.
    """
    raise NotImplementedError
