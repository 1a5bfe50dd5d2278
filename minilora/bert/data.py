"""Examples as flat arrays of tokens, the order of an epoch, and batches.

The whole data set is three arrays, however many examples it has; a batch is a slice of them and a
pad. Nothing here draws from a global generator: the order of an epoch is a pure function of (seed,
epoch), so a resume jumps to its position without reading what it skips.

N examples; B batch; T tokens.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from minilora.bert.tables import Row
from minilora.errors import MiniloraError

# Texts per call of the tokenizer: enough to use all its threads, few enough to keep the bar moving.
TOKENIZE_CHUNK = 1000


@dataclass(frozen=True)
class Examples:
    """N tokenised examples, end to end."""

    input_ids: np.ndarray
    """(total tokens,) int32"""
    token_type_ids: np.ndarray | None
    """(total tokens,) int8, 0 in the first text and 1 in the second; None if the model takes none.
    """
    offsets: np.ndarray
    """(N + 1,) int64: example i is input_ids[offsets[i]:offsets[i + 1]]."""
    labels: np.ndarray
    """(N,) int64 class ids or float32 values."""
    truncated: int
    """How many examples were longer than max_length."""

    def __len__(self) -> int:
        return len(self.offsets) - 1


Collate = Callable[[Examples, np.ndarray], dict[str, Tensor]]
"""(examples, indices (B,)) to a batch, its labels (B,) in the order of indices."""


def tokenize(
    rows: list[Row],
    labels: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    description: str,
) -> Examples:
    """Tokenise `rows` once, with a progress bar, truncating the longer text of a pair first.

    Args:
        labels: (N,), beside rows.
        max_length: tokens of an example, special tokens included.
    """
    with_types = "token_type_ids" in tokenizer.model_input_names
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    lengths: list[int] = []
    chunks = range(0, len(rows), TOKENIZE_CHUNK)
    # A bar only where there is something to wait for (delay: seconds).
    for start in tqdm(chunks, desc=description, unit="k", leave=False, delay=1):
        chunk = rows[start : start + TOKENIZE_CHUNK]
        pairs = [row.pair for row in chunk] if chunk[0].pair is not None else None
        encoded = tokenizer(
            [row.text for row in chunk],
            pairs,  # pyright: ignore[reportArgumentType]
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=with_types,
        )
        lengths += map(len, encoded["input_ids"])  # pyright: ignore[reportArgumentType]
        ids.append(
            np.concatenate([np.asarray(one, dtype=np.int32) for one in encoded["input_ids"]])
        )
        if with_types:
            types.append(
                np.concatenate(
                    [np.asarray(one, dtype=np.int8) for one in encoded["token_type_ids"]]
                )
            )
    return Examples(
        input_ids=np.concatenate(ids),
        token_type_ids=np.concatenate(types) if with_types else None,
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        labels=labels,
        # An example that fills max_length exactly counts as truncated: telling the two apart would
        # mean tokenising twice, and this number is only for a warning.
        truncated=sum(length == max_length for length in lengths),
    )


def token_positions(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., start + length - 1 for each pair, end to end: (total,) int64."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1])


def collate_padded(examples: Examples, indices: np.ndarray, pad_token_id: int) -> dict[str, Tensor]:
    """The examples `indices` (B,) as a batch padded on the right to its longest: tensors (B, T),
    labels (B,).
    """
    starts, ends = examples.offsets[indices], examples.offsets[indices + 1]
    lengths = ends - starts
    real = np.arange(lengths.max()) < lengths[:, None]  # (B, T), False where padding
    flat = token_positions(starts, lengths)
    input_ids = np.full(real.shape, pad_token_id, dtype=np.int64)
    input_ids[real] = examples.input_ids[flat]
    batch = {"input_ids": torch.from_numpy(input_ids)}
    if examples.token_type_ids is not None:
        token_type_ids = np.zeros(real.shape, dtype=np.int64)
        token_type_ids[real] = examples.token_type_ids[flat]
        batch["token_type_ids"] = torch.from_numpy(token_type_ids)
    batch["attention_mask"] = torch.from_numpy(real.astype(np.int64))
    batch["labels"] = torch.from_numpy(examples.labels[indices])
    return batch


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` examples in epoch `epoch`: (count,) int64.

    That of accelerate's `SeedableRandomSampler`, and so of HF Trainer: torch's permutation from
    seed + epoch.
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(count, generator=generator).numpy()


def training_updates(
    examples: Examples,
    seed: int,
    batch_size: int,
    accumulation: int,
    collate: Collate,
    device: torch.device,
) -> Callable[[int, int], Iterator[list[dict[str, Tensor]]]]:
    """A function of (epoch, steps to skip) to the batches of each optimizer step of that epoch.

    The last step of an epoch may have fewer batches, and its last batch fewer examples; nothing is
    dropped.
    """

    def updates(epoch: int, skip: int) -> Iterator[list[dict[str, Tensor]]]:
        order = epoch_order(len(examples), seed, epoch)
        per_step = batch_size * accumulation
        for step_start in range(skip * per_step, len(order), per_step):
            step_end = min(step_start + per_step, len(order))
            yield [
                to_device(
                    collate(examples, order[start : min(start + batch_size, step_end)]), device
                )
                for start in range(step_start, step_end, batch_size)
            ]

    return updates


def batches_in_order(
    examples: Examples,
    batch_size: int,
    collate: Collate,
    device: torch.device,
    description: str,
) -> Iterator[dict[str, Tensor]]:
    """Every example once, in the file's order, with a progress bar."""
    with tqdm(total=len(examples), desc=description, unit=" examples", leave=False) as bar:
        for start in range(0, len(examples), batch_size):
            indices = np.arange(start, min(start + batch_size, len(examples)))
            yield to_device(collate(examples, indices), device)
            bar.update(len(indices))


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch with every tensor on `device`."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def split_rows(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out `share` of the rows at random: (train, validation), both in the file's order.

    Raises:
        MiniloraError: one of the two would be empty.
    """
    held_out = round(len(rows) * share)
    if not 0 < held_out < len(rows):
        raise MiniloraError(
            f"validation_split={share} of {len(rows)} examples leaves {held_out} for validation"
        )
    chosen = set(np.random.default_rng(seed).permutation(len(rows))[:held_out].tolist())
    train = [row for index, row in enumerate(rows) if index not in chosen]
    return train, [row for index, row in enumerate(rows) if index in chosen]


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
