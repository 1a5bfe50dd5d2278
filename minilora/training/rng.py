"""Every random generator a run draws from: seeded together, saved together, restored together."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilora.errors import MiniloraError, first_line
from minilora.reading import check_like


def seed_all(seed: int) -> None:
    """Seed python, numpy and torch (all devices), in the order of transformers' `set_seed`."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state(model: nn.Module) -> dict[str, Any]:
    """The state of every generator, in HF Trainer's structure (`rng_state.pth`), and of the stream
    of masks. numpy's key is a list instead of an array: Trainer restores it all the same, and the
    file then loads with plain `weights_only=True`, no numpy reconstruction function allowed.
    """
    name, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, [int(key) for key in keys], *rest),
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state(_gpu_of(model))
    stream = mask_stream(model)
    if stream is not None:
        state["mask_stream"] = stream.get_state()
    return state


def set_rng_state(state: dict[str, Any], model: nn.Module) -> None:
    """Restore what `rng_state` returned. Call it last: whatever is built after it may draw."""
    stream = mask_stream(model)
    if stream is not None and "mask_stream" in state:  # HF Trainer's has none
        stream.set_state(state["mask_stream"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if state.get("cuda") is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"], _gpu_of(model))


def check_rng_state(state: Any, place: Path) -> None:
    """Refuse what `set_rng_state` could not restore. The run's own generators are untouched."""
    check_like({"python": None, "numpy": None, "cpu": Tensor}, state, place)
    check_like(Tensor | None, cuda := state.get("cuda"), place, "cuda")
    try:
        random.Random().setstate(state["python"])
        np.random.RandomState().set_state(state["numpy"])
        # Among MT19937's 624 words; numpy does not check it, and would read beyond its array.
        if not 0 <= state["numpy"][2] <= 624:
            raise ValueError(f"numpy's position is {state['numpy'][2]}")
        torch.Generator().set_state(state["cpu"])
        masks = state.get("mask_stream", torch.zeros(4, dtype=torch.int64))
        if masks.shape != (4,) or masks.dtype != torch.int64:
            raise ValueError("the state of a mask stream is four int64")
        if cuda is not None and torch.cuda.is_available():
            torch.Generator("cuda").set_state(cuda)
    except Exception as error:  # each generator complains in its own way
        raise MiniloraError(f"{place} holds no generators' states: {first_line(error)}") from None


def mask_stream(model: nn.Module) -> Any:
    """The stream of fast dropout (bert/dropout), which its modules share; None if it is torch's."""
    streams = (getattr(module, "mask_stream", None) for module in model.modules())
    return next((stream for stream in streams if stream is not None), None)


def _gpu_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters() if p.is_cuda), torch.device("cuda"))


def draw_loader_seed() -> None:
    """Draw what each iteration of torch's DataLoader does: a seed for workers, even without any."""
    torch.empty((), dtype=torch.int64).random_()
