"""How the model runs: its batches, its dropout, its precision. The arguments of `--help`'s group "speed"."""

import torch
from transformers import PreTrainedModel

from minilora.bert.batching import Batching, packed_batching, padded_batching
from minilora.bert.dropout import MaskStream, use_fast_dropout
from minilora.bert.recomputation import recompute_activations
from minilora.errors import MiniloraError
from minilora.lora.base_precision import linear_in_base_precision
from minilora.training.config import TrainConfig
from minilora.training.progress import say

# Rows are filled up to a multiple of this: see `packing.collate_packed`. Without it, 60 different
# lengths took the process from 0.7 to 1.5 GB (`benchmarks/README.md`).
BFLOAT16_MULTIPLE = 32


def chosen_device(name: str | None) -> torch.device:
    """The device called `name`; by default a GPU where there is one.

    Raises:
        MiniloraError: torch knows no such device, or there is none here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise MiniloraError(f"device {name!r} is unknown; give cpu, cuda, cuda:1, ...") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MiniloraError(f"device is {name} and there is none here: give --device cpu")
    return device


def prepare_training(
    config: TrainConfig, model: PreTrainedModel, pad_token_id: int, device: torch.device
) -> Batching:
    """Make the model run as `dropout`, `gradient_checkpointing` and `torch_compile` ask, and choose
    its batches.

    The masks are seeded like everything else, and drawn from a stream of their own.
    """
    contexts = None
    if config.dropout == "fast":
        stream = MaskStream(config.seed)
        use_fast_dropout(model, stream)
        contexts = stream.checkpoint_contexts
    if config.gradient_checkpointing:
        recompute_activations(model, contexts)
    if config.torch_compile:
        model.compile()
    return choose_batching(config, model, pad_token_id, device)


def choose_batching(
    config: TrainConfig, model: PreTrainedModel, pad_token_id: int, device: torch.device
) -> Batching:
    """Packed batches if asked for and known for the model's family, said if not; else padded."""
    if config.batching == "packed":
        half_on_cpu = config.dtype == "bfloat16" and device.type == "cpu"
        multiple = BFLOAT16_MULTIPLE if half_on_cpu else 1
        packed = packed_batching(model, pad_token_id, linear_in_base_precision, multiple)
        if packed is not None:
            return packed
        say(f"batches are padded: a {model.config.model_type} is not known how to pack")
    return padded_batching(pad_token_id)
