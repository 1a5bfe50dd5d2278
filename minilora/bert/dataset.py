"""Examples as flat arrays of tokens, the order of an epoch, and batches.

The whole data set is a few arrays, however many examples it has; a batch is a slice of them and a
pad. Nothing here draws from a global generator: the order of an epoch is a pure function of (seed,
epoch), so a resume jumps to its position without reading what it skips.

Not here: files (`rows`), what a task makes of a row (`tasks`), rows without padding (`packing`).

N examples; B batch; T tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from minilora.bert import token_cache
from minilora.bert.rows import Row
from minilora.bert.tasks import Batch, Task

# Rows per call of the tokenizer: enough to use all its threads, few enough to keep the bar moving.
TOKENIZE_CHUNK = 1000


@dataclass(frozen=True)
class Examples:
    """N tokenised examples, end to end."""

    input_ids: np.ndarray  # (total tokens,) int32
    # (total tokens,) int8: 0 in the first text, 1 in the second; None if the model takes none.
    token_type_ids: np.ndarray | None
    offsets: np.ndarray  # (N + 1,) int64: example i is input_ids[offsets[i]:offsets[i + 1]]
    # (N,) int64 class ids or float32 values. (A task that labels tokens would lay its labels end to
    # end as input_ids are, and the collate functions would slice and pad them likewise.)
    labels: np.ndarray
    row: np.ndarray  # (N,) int64: of which row of the file; a task may make several of one
    truncated: int  # how many were longer than max_length

    def __len__(self) -> int:
        return len(self.offsets) - 1


# (examples, indices (B,)) to a batch, whose "labels" and "row" (B,) are in indices' order.
Collate = Callable[[Examples, np.ndarray], Batch]


def tokenize(
    rows: list[Row], task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, place: str
) -> Examples:
    """Tokenise `rows`, with a progress bar, or take what an earlier run made of them.

    Rows without labels, which are to be predicted, are not kept. `max_length` counts the special
    tokens, too; `place` is the rows' file, for errors.
    """
    labelled = rows[0].label is not None
    entry = token_cache.entry_of(rows, task, tokenizer, max_length) if labelled else None
    arrays = token_cache.read_entry(entry) if entry else None
    if arrays is None:
        chunks = []
        starts = range(0, len(rows), TOKENIZE_CHUNK)
        # A bar only where there is something to wait for (delay: seconds).
        for start in tqdm(starts, desc="tokenizing", unit="k", leave=False, delay=1):
            chunk = rows[start : start + TOKENIZE_CHUNK]
            chunks.append(task.encode(chunk, tokenizer, max_length, place))
            chunks[-1]["row"] += start
        arrays = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
        if entry:
            token_cache.write_entry(entry, arrays)
    return Examples(
        input_ids=arrays["input_ids"],
        token_type_ids=arrays.get("token_type_ids"),
        offsets=np.concatenate([[0], np.cumsum(arrays["lengths"])]),
        labels=arrays["labels"],
        row=arrays["row"],
        truncated=int(arrays["truncated"].sum()),
    )


def token_positions(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., start + length - 1 for each pair, end to end: (total,) int64."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1])


def collate_padded(examples: Examples, indices: np.ndarray, pad_token_id: int) -> Batch:
    """The examples `indices` (B,) padded on the right to the longest: (B, T); labels, row (B,)."""
    starts, ends = examples.offsets[indices], examples.offsets[indices + 1]
    lengths = ends - starts
    real = np.arange(lengths.max()) < lengths[:, None]  # (B, T), False where padding
    flat = token_positions(starts, lengths)

    def padded(values: np.ndarray, filler: int) -> Tensor:
        filled = np.full(real.shape, filler, dtype=np.int64)
        filled[real] = values[flat]
        return torch.from_numpy(filled)

    batch = {"input_ids": padded(examples.input_ids, pad_token_id)}
    if examples.token_type_ids is not None:
        batch["token_type_ids"] = padded(examples.token_type_ids, 0)
    batch["attention_mask"] = torch.from_numpy(real.astype(np.int64))
    batch["labels"] = torch.from_numpy(examples.labels[indices])
    batch["row"] = torch.from_numpy(examples.row[indices])
    return batch


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` examples in an epoch, (count,) int64: torch's permutation from seed +
    epoch, as accelerate's `SeedableRandomSampler` draws it, and so HF Trainer.
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).numpy()


def epoch_batches(
    examples: Examples,
    seed: int,
    batch_size: int,
    accumulation: int,
    collate: Collate,
    device: torch.device,
) -> Callable[[int, int], Iterator[list[Batch]]]:
    """A function of (epoch, steps to skip) to the batches of each optimizer step of that epoch.

    The last step may have fewer batches, and its last batch fewer examples; nothing is dropped.
    """

    def steps(epoch: int, skip: int) -> Iterator[list[Batch]]:
        order = epoch_order(len(examples), seed, epoch)
        per_step = batch_size * accumulation
        for start in range(skip * per_step, len(order), per_step):
            of_step = order[start : start + per_step]
            cuts = range(batch_size, len(of_step), batch_size)
            yield [to_device(collate(examples, part), device) for part in np.split(of_step, cuts)]

    return steps


def batches_in_order(
    examples: Examples, batch_size: int, collate: Collate, device: torch.device, description: str
) -> Iterator[Batch]:
    """Every example once, in the file's order, with a progress bar."""
    with tqdm(total=len(examples), desc=description, unit=" examples", leave=False) as bar:
        for start in range(0, len(examples), batch_size):
            indices = np.arange(start, min(start + batch_size, len(examples)))
            yield to_device(collate(examples, indices), device)
            bar.update(len(indices))


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}
