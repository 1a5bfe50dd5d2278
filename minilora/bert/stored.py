"""A model's weights as they lie on disk, read without building the model."""

from collections.abc import Iterator

from torch import Tensor
from transformers.modeling_utils import load_state_dict
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from minilora.bert.load import WEIGHT_FILES
from minilora.errors import MiniloraError
from minilora.reading import first_line


def stored_tensors(location: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each weight of a model, file by file; pickled ones cannot run code."""
    for file in _weight_files(location):
        try:
            yield from load_state_dict(file, map_location="cpu", weights_only=True).items()
        except Exception as error:  # damaged bytes fail in many ways, none of them ours
            raise MiniloraError(f"{file} cannot be read safely: {first_line(error)}") from None


def _weight_files(location: str) -> list[str]:
    # Of a directory, or of the local cache of a hub id.
    for name in WEIGHT_FILES:
        try:
            file = cached_file(
                location, name, local_files_only=True, _raise_exceptions_for_missing_entries=False
            )
            if file is not None and name.endswith(".index.json"):
                shards, _ = get_checkpoint_shard_files(location, file, local_files_only=True)
                return shards or []
        except Exception as error:  # no hub id; a damaged index
            raise MiniloraError(f"{location}: {name} is damaged: {first_line(error)}") from None
        if file is not None:
            return [file]
    return []
