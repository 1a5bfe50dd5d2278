"""Rows as flat arrays of tokens, the order of an epoch, and batches.

The whole data set is a few arrays, however many examples it has; a batch is a slice of them and a
pad. Nothing here draws from a global generator: the order of an epoch is a pure function of (seed,
epoch), so a resume jumps to its position without reading what it skips.

Not here: files (`rows`), what a task makes of a row (`tasks`), rows without padding (`packing`).

N examples; B batch; T tokens.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from minilora.bert import cache
from minilora.bert.examples import NO_LABEL, Arrays, Batch, Examples
from minilora.bert.rows import Row
from minilora.bert.stored_rows import CHUNK, tokens_key
from minilora.bert.tasks import Task

# (examples, indices (B,)) to a batch, whose "example" (B,) is indices.
Collate = Callable[[Examples, np.ndarray], Batch]


def tokenize(
    rows: Sequence[Row],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    place: str,
    keep: bool = True,
) -> Examples:
    """Tokenise `rows`, with a progress bar, or take what an earlier run made of them, and `keep`
    what is made for a later one. `max_length` counts the special tokens, too; `place` is the rows'
    file, for errors.
    """
    pieces = partial(_pieces, rows, task, tokenizer, max_length, place)
    if keep:
        arrays = cache.mapped(tokens_key(rows, task, tokenizer, max_length), pieces)
    else:
        arrays = cache.joined(pieces())
    return Examples(
        input_ids=arrays.pop("input_ids"),
        token_type_ids=arrays.pop("token_type_ids", None),
        offsets=np.concatenate([[0], np.cumsum(arrays.pop("lengths"))]),
        labels=arrays.pop("labels"),
        row=arrays.pop("row"),
        truncated=int(arrays.pop("truncated").sum()),
        extra=arrays,
        logits_of=task.logits_of,
    )


def _pieces(
    rows: Sequence[Row], task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, place: str
) -> Iterator[Arrays]:
    # A bar only where there is something to wait for (delay: seconds).
    starts = range(0, len(rows), CHUNK)
    for start in tqdm(starts, desc="tokenizing", unit="k", leave=False, delay=1, disable=None):
        arrays = task.encode(list(rows[start : start + CHUNK]), tokenizer, max_length, place)
        yield arrays | {"row": arrays["row"] + start}


def tokens_fingerprint(examples: Examples) -> str:
    """SHA-256 of what a run sees of its texts."""
    found = hashlib.sha256()
    told = (examples.offsets, examples.input_ids, examples.token_type_ids, examples.labels)
    for array in (*told, *(examples.extra[name] for name in sorted(examples.extra))):
        if array is not None:
            found.update(np.ascontiguousarray(array).data)
            cache.release(array)
    return found.hexdigest()


def shortening(examples: Examples, rows: int, max_length: int) -> str:
    """What became of the texts that are too long for the model; empty where there are none."""
    if len(examples) != rows:
        return f"{rows} texts are {len(examples)} examples of at most {max_length} tokens"
    cut = examples.truncated
    return f"{cut} of {rows} texts were cut at {max_length} tokens" if cut else ""


def token_positions(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., start + length - 1 for each pair, end to end: (total,) int64."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1])


def collate_padded(
    examples: Examples, indices: np.ndarray, pad_token_id: int, side: str = "right", multiple=1
) -> Batch:
    """The examples `indices` (B,), padded on their `side` to the longest, or to the next `multiple`
    of tokens: (B, T); `labelled` adds the rest.
    """
    starts, ends = examples.offsets[indices], examples.offsets[indices + 1]
    lengths = ends - starts
    longest = -(-lengths.max() // multiple) * multiple
    real = np.arange(longest) < lengths[:, None]  # (B, T), False where padding
    real = real[:, ::-1] if side == "left" else real
    flat = token_positions(starts, lengths)

    def padded(values: np.ndarray, filler: int) -> Tensor:
        filled = np.full(real.shape, filler, dtype=np.int64)
        filled[real] = values[flat]
        return torch.from_numpy(filled)

    batch = {"input_ids": padded(examples.input_ids, pad_token_id)}
    if examples.token_type_ids is not None:
        batch["token_type_ids"] = padded(examples.token_type_ids, 0)
    batch["attention_mask"] = torch.from_numpy(real.astype(np.int64))
    return batch | labelled(examples, indices, padded)


def labelled(
    examples: Examples, indices: np.ndarray, laid_out: Callable[[np.ndarray, int], Tensor]
) -> Batch:
    """labels (B, ...) in indices' order, or, of tokens, as the batch lays them out with a filler;
    of masked tokens, labels (M,) and masked (M,), their places; and example (B,), the indices.
    """
    batch = {"example": torch.from_numpy(indices)}
    if not examples.labels_tokens():
        return batch | {"labels": torch.from_numpy(examples.labels[indices])}
    labels = laid_out(examples.labels, NO_LABEL)
    if examples.logits_of == "masked tokens":
        masked = torch.nonzero(labels.reshape(-1) != NO_LABEL)[:, 0]
        return batch | {"labels": labels.reshape(-1)[masked], "masked": masked}
    return batch | {"labels": labels}


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` examples in an epoch, (count,) int64: torch's permutation from seed +
    epoch, as accelerate's `SeedableRandomSampler` draws it, and so HF Trainer.
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).numpy()


def epoch_batches(
    examples: Examples,
    order: np.ndarray,
    per_step: int,
    deal: Callable[[np.ndarray], list[np.ndarray]],
    collate: Collate,
    device: torch.device,
) -> Iterator[list[Batch]]:
    """The batches of each optimizer step of an epoch, or of what is left of it: `order` (n,) are
    indices into the examples, of which `deal` cuts each `per_step` into batches. The last step may
    have fewer; nothing is dropped.
    """
    for start in range(0, len(order), per_step):
        parts = deal(order[start : start + per_step])
        yield [to_device(collate(examples, part), device) for part in parts]


def batches_in_order(
    examples: Examples, batch_size: int, collate: Collate, device: torch.device, shown: str = ""
) -> Iterator[Batch]:
    """Every example once, in the file's order; on a terminal with a bar that says `shown`."""
    settings = {"unit": " examples", "leave": False, "disable": None if shown else True}
    with tqdm(total=len(examples), desc=shown, **settings) as bar:
        for start in range(0, len(examples), batch_size):
            indices = np.arange(start, min(start + batch_size, len(examples)))
            yield to_device(collate(examples, indices), device)
            bar.update(len(indices))


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}
