"""A trained adapter folded into its base model and written as an ordinary model directory, with
tokenizer and label names: `from_pretrained` loads it, and nothing in it needs minilora.
"""

from pathlib import Path

import torch

from minilora.errors import MiniloraError
from minilora.files import disk_errors, new_directory
from minilora.lora.combine import combine_adapters
from minilora.lora.merge import merge_and_unload
from minilora.lora.peft_files import load_adapter
from minilora.trained.opened import load_base, read_record
from minilora.training.config import DTYPES


def write_merged_model(
    paths: list[str | Path],
    output_dir: str | Path,
    weights: list[float] | None = None,
    max_shard_size: str = "5GB",
    dtype: str = "float32",
    model_name_or_path: str | None = None,
) -> Path:
    """Merge one run, or several on the same base model and with the same labels (and `weights`, one
    each, as for `combine_adapters`), and write the model to `output_dir`: all of it, or nothing.
    Sums are taken in the base's dtype, and written in `dtype`. Returns the directory.
    """
    if dtype not in DTYPES:
        raise MiniloraError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if weights is None and len(paths) > 1:
        raise MiniloraError(f"{len(paths)} adapters need --weights, a number for each")
    with new_directory(Path(output_dir)) as directory:
        found = [read_record(Path(path), model_name_or_path) for path in paths]
        (first, expected), adapters = found[0], [adapter for adapter, _ in found]
        for adapter, record in found:
            if (record.arguments.task, record.labels) != (expected.arguments.task, expected.labels):
                raise MiniloraError(f"{adapter} predicts other labels than {first}")
            bases = {one.model_sha256.partition(" ")[0] for one in (record, expected)}
            if len(bases - {""}) > 1:
                raise MiniloraError(f"{adapter} is an adapter for another base model than {first}")
        model, tokenizer = load_base(first, expected)
        if weights is None:
            load_adapter(model, adapters[0])
            merge_and_unload(model)
        else:
            combine_adapters(model, adapters, weights)
        model.to(getattr(torch, dtype))
        with disk_errors(Path(output_dir)):
            try:
                model.save_pretrained(directory, max_shard_size=max_shard_size)
            except ValueError as error:
                raise MiniloraError(f"max_shard_size {max_shard_size!r}: {error}") from None
            tokenizer.save_pretrained(directory)
    return Path(output_dir)
