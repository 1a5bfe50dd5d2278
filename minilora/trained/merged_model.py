"""A trained adapter folded into its base model and written as an ordinary model directory.

    MERGED/
      config.json  model.safetensors      as transformers saves them, id2label included; above
                                          `max_shard_size`, model-0000x-of-0000y.safetensors and an index
      tokenizer files

Nothing in it needs minilora: `AutoModelForSequenceClassification.from_pretrained` loads it.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from minilora.durable import new_directory
from minilora.errors import MiniloraError
from minilora.lora.adapter_files import load_adapter
from minilora.lora.combine import combine_adapters
from minilora.lora.merge import merge_and_unload
from minilora.trained.run import Record, load_base, read_record

DTYPES = ("float32", "bfloat16", "float16")


def write_merged_model(
    paths: list[str | Path],
    output_dir: str | Path,
    weights: list[float] | None = None,
    max_shard_size: str = "5GB",
    dtype: str = "float32",
    model_name_or_path: str | None = None,
) -> Path:
    """Merge one run, or several with weights, and write the model to `output_dir`: all of it, or
    nothing. Returns the directory.

    One run is folded in as `merge_and_unload` does, several as `combine_adapters` does.

    Args:
        paths: runs, checkpoints or adapters on the same base model, with the same labels.
        weights: one for each path; needed if there are several.
        max_shard_size: "5GB", "200MB", ...
        dtype: of the written weights; sums are taken in the base's.
        model_name_or_path: the base model, if it has moved.

    Raises:
        MiniloraError: `output_dir` exists, or the runs do not fit each other or their base.
    """
    if dtype not in DTYPES:
        raise MiniloraError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if weights is None and len(paths) > 1:
        raise MiniloraError(f"{len(paths)} adapters need --weights, a number for each")
    with new_directory(Path(output_dir)) as directory:
        records = [read_record(Path(path), model_name_or_path) for path in paths]
        _check_together(records)
        model, tokenizer = load_base(records[0])
        if weights is None:
            load_adapter(model, records[0].adapter)
            merge_and_unload(model)
        else:
            combine_adapters(model, [record.adapter for record in records], weights)
        model.to(getattr(torch, dtype))
        _save(model, directory, max_shard_size)
        tokenizer.save_pretrained(directory)
    return Path(output_dir)


def _check_together(records: list[Record]) -> None:
    first = records[0]
    for record in records[1:]:
        if (record.config.task, record.labels) != (first.config.task, first.labels):
            raise MiniloraError(
                f"{record.adapter} predicts {_labels(record)}, {first.adapter} {_labels(first)}: only "
                "adapters with the same labels can be merged"
            )
        known = {record.model_sha256, first.model_sha256} - {None}
        if len(known) > 1:
            raise MiniloraError(
                f"{record.adapter} is an adapter for another base model than {first.adapter}"
            )


def _labels(record: Record) -> str:
    return ", ".join(record.labels[:20]) if record.labels else "a number"


def _save(model: PreTrainedModel, directory: Path, max_shard_size: str) -> None:
    try:
        model.save_pretrained(directory, max_shard_size=max_shard_size)
    except ValueError as error:
        raise MiniloraError(f"max_shard_size {max_shard_size!r}: {error}") from None
