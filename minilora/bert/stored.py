"""A model's weights as they lie on disk, read without building the model."""

import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path

import safetensors
import torch
from torch import Tensor
from transformers.utils.hub import cached_file

from minilora.bert.weights import WEIGHT_FILES
from minilora.errors import MiniloraError


def stored_tensors(location: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each weight of a model, one at a time.

    `.bin` files are read with `weights_only=True`, which cannot run code.

    Raises:
        MiniloraError: a file is missing or damaged.
    """
    for file in weight_files(location):
        try:
            if file.suffix == ".safetensors":
                with safetensors.safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (no mapping)
                        yield name, opened.get_tensor(name)
            else:
                yield from torch.load(
                    file, map_location="cpu", weights_only=True, mmap=True
                ).items()
        except (
            safetensors.SafetensorError,
            pickle.UnpicklingError,
            RuntimeError,
            OSError,
        ) as error:
            first_line = str(error).splitlines()[0]
            raise MiniloraError(f"{file} cannot be read safely: {first_line}") from None


def parameter_count(location: str) -> int | None:
    """How many numbers a model's safetensors files hold, told from their headers alone; None where
    there are none on this machine.
    """
    try:
        files = weight_files(location)
    except MiniloraError:
        return None
    if not files or files[0].suffix != ".safetensors":
        return None
    total = 0
    for file in files:
        with safetensors.safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                total += math.prod(opened.get_slice(name).get_shape())
    return total


def weight_files(location: str) -> list[Path]:
    """The files that hold a model's weights: of a directory, or of the local cache of a hub id.

    Raises:
        MiniloraError: an index names a file that is not there.
    """
    for name in WEIGHT_FILES:
        file = _local(location, name)
        if file is None:
            continue
        if not name.endswith(".index.json"):
            return [file]
        shards = [_local(location, shard) for shard in _shards(file)]
        if None in shards:
            raise MiniloraError(f"{file} names files that are not there")
        return [shard for shard in shards if shard is not None]
    return []


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MiniloraError(f"{index} is damaged: {error!r}") from None


def _local(location: str, name: str) -> Path | None:
    if Path(location).is_dir():
        file = Path(location) / Path(name).name  # an index must not point elsewhere
        return file if file.is_file() else None
    try:
        found = cached_file(location, name, local_files_only=True)
    except OSError:
        return None
    return Path(found) if found else None
