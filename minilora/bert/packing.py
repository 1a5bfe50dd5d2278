"""Padding-free batches: the tokens of all sequences end to end in one row, and attention over it.

Half of a padded batch of ordinary sentences is padding, and every layer but attention treats tokens
one by one: these see the row. Attention takes the sequences in a few buckets of similar length,
each padded for itself, so that what it wastes is small. Within the row, sequences lie in ascending
order of length; `place` puts what comes out back in the batch's own order.

Not here: the layers that see the row (`forward`), the arrays a batch is cut from (`dataset`).

B sequences of a batch, b of a bucket; N tokens of the row, n of a bucket, T of a bucket's longest
sequence; D hidden, H heads, d = D / H.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.bert.dataset import labelled, token_positions
from minilora.bert.examples import Batch, Examples

# More buckets waste less padding and cost more calls; 4 was fastest of 1, 2, 4 and 8 on sentences
# in random order. Where one bucket would be padding by less than a tenth, as after sorting, it is
# one. A GPU waits for kernels to be launched and not for padding: there it is always one.
BUCKETS = {"cpu": 4, "cuda": 1}
NEGLIGIBLE_PADDING = 0.1

# From a bucket's queries (b * H, Tq, d) and keys (b * H, T, d) to what is added to their scores,
# (b * H, Tq, T) or less to be broadcast: relative positions, a window.
Bias = Callable[[Tensor, Tensor], Tensor | None]


@dataclass(frozen=True)
class Bucket:
    """Neighbouring sequences of the row that are attended together."""

    count: int  # b
    length: int  # T
    tokens: int  # n
    padding: Tensor | None  # (b * H, 1, T): -inf at padding, else 0; None where nothing is padded


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a packed row lie, and how attention takes them apart."""

    buckets: list[Bucket]
    heads: int  # H
    first: Tensor  # (B,) int64: the row index of each sequence's first token
    # A row is N * H pieces (d,), each what a token has for one head. These say which pieces the
    # buckets take, (b, H, T) of one after the other's, and where each comes back from. Padding
    # repeats the sequence's last token: it has no probability, and so no gradient.
    to_heads: Tensor  # (sum of b * H * T,) int64
    from_heads: Tensor  # (n * H,) int64, n of all buckets


def collate_packed(
    examples: Examples, indices: np.ndarray, pad_token_id: int, multiple: int
) -> Batch:
    """The examples `indices` (B,) as one row of N tokens.

    input_ids, position_ids and, if the model takes them, token_type_ids are (N,); lengths (B,), in
    the row's order; place (B,): where in that order each example is; `labelled` adds the rest. N is
    filled up to a `multiple`.
    """
    lengths = examples.offsets[indices + 1] - examples.offsets[indices]
    order = np.argsort(lengths, kind="stable")
    lengths = lengths[order]
    flat = token_positions(examples.offsets[indices[order]], lengths)
    size = -(-len(flat) // multiple) * multiple

    def filled(values: np.ndarray, filler: int) -> Tensor:
        rest = np.full(size - len(flat), filler)
        return torch.from_numpy(np.concatenate([values[flat], rest], dtype=np.int64))

    batch = {"input_ids": filled(examples.input_ids, pad_token_id)}
    if examples.token_type_ids is not None:
        batch["token_type_ids"] = filled(examples.token_type_ids, 0)
    positions = token_positions(np.zeros_like(lengths), lengths)
    batch["position_ids"] = F.pad(torch.from_numpy(positions), (0, size - len(flat)))
    batch["lengths"] = torch.from_numpy(lengths)
    batch["place"] = torch.from_numpy(np.argsort(order))
    return batch | labelled(examples, indices, filled)


@torch.compiler.disable  # numpy, on the host
def layout_of(lengths: Tensor, heads: int) -> Layout:
    """The layout of a row whose sequences have these lengths (B,), ascending."""
    device, on_host = lengths.device, lengths.cpu().numpy()
    starts = np.cumsum(on_host) - on_host
    padding = 1 - on_host.sum() / (on_host[-1] * len(on_host))
    count = 1 if padding < NEGLIGIBLE_PADDING else min(BUCKETS[device.type], len(on_host))
    edges = np.linspace(0, len(on_host), count + 1).round().astype(int)
    parts = np.split(np.arange(len(on_host)), edges[1:-1])
    buckets = [_bucket(on_host[part], heads, device) for part in parts]
    to_heads = np.concatenate([_places(starts[part], on_host[part], heads) for part in parts])
    from_heads = np.empty(on_host.sum() * heads, dtype=np.int64)
    # The last token's own place comes before its repetitions: backwards, it is written last.
    from_heads[to_heads[::-1]] = np.arange(len(to_heads))[::-1]
    first, *moves = (torch.from_numpy(x).to(device) for x in (starts, to_heads, from_heads))
    return Layout(buckets, heads, first, *moves)


def _bucket(lengths: np.ndarray, heads: int, device: torch.device) -> Bucket:
    count, longest, tokens = len(lengths), int(lengths[-1]), int(lengths.sum())
    if lengths[0] == longest:
        return Bucket(count, longest, tokens, None)
    padded = torch.from_numpy(np.arange(longest) >= lengths[:, None])  # (b, T)
    padding = torch.zeros(padded.shape).masked_fill_(padded, -torch.inf)
    padding = padding.repeat_interleave(heads, dim=0)[:, None]
    return Bucket(count, longest, tokens, padding.to(device))


def _places(starts: np.ndarray, lengths: np.ndarray, heads: int) -> np.ndarray:
    # The bucket's part of `to_heads`, (b * H * T,).
    token = starts[:, None] + np.minimum(np.arange(lengths[-1]), lengths[:, None] - 1)  # (b, T)
    return (token[:, None] * heads + np.arange(heads)[:, None]).ravel()


def attention(
    qkv: tuple[Tensor, Tensor, Tensor],
    layout: Layout,
    dropout: nn.Module,
    scale: float,
    bias: Bias | None = None,
) -> Tensor:
    """softmax(scale Q K^T + bias) V within each sequence, `dropout` on the probabilities, as
    transformers' eager attention computes it: (N, D) three times -> (N, D).

    Queries (B, D) are of the first tokens alone, and so is the result. Scores and probabilities are
    float32 whatever the row's dtype: oneDNN's bfloat16 products of such small matrices are slower.
    """
    (size, width), dtype = qkv[0].shape, qkv[0].dtype
    q_parts, k_parts, v_parts = (_to_heads(row, layout) for row in qkv)
    del qkv  # what is freed at once makes room for the scores
    found = []
    for bucket, q, k, v in zip(layout.buckets, q_parts, k_parts, v_parts, strict=True):
        added = None if bias is None else bias(q, k)
        if bucket.padding is not None:
            added = bucket.padding if added is None else added + bucket.padding
        if added is None:
            scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)  # (b * H, Tq, T)
        else:
            scores = torch.baddbmm(added.to(q.dtype), q, k.transpose(1, 2), alpha=scale)
        scores = torch.softmax(scores, dim=-1)  # by the same name, which frees them
        found.append(torch.bmm(dropout(scores), v).flatten(0, 1))  # (b * H * Tq, d)
    pieces = torch.cat(found)
    if size > len(layout.first):
        pieces = pieces.index_select(0, layout.from_heads)
    rows = pieces.view(-1, width).to(dtype)
    filler = size - len(rows)  # attends to nothing
    return F.pad(rows, (0, 0, 0, filler)) if filler else rows


def _to_heads(row: Tensor, layout: Layout) -> list[Tensor]:
    # (N, D) -> (b * H, T, d) of each bucket, or (B, D) -> (b * H, 1, d), float32 or more. One
    # selection and one split: slices' backward passes would each fill and add a row of zeros.
    row = row.to(torch.promote_types(row.dtype, torch.float32))
    pieces = row.reshape(len(row) * layout.heads, -1)
    is_whole = len(row) > len(layout.first)
    if is_whole:
        pieces = pieces.index_select(0, layout.to_heads)
    sizes = [b.count * layout.heads * (b.length if is_whole else 1) for b in layout.buckets]
    shapes = [(b.count * layout.heads, -1, pieces.shape[1]) for b in layout.buckets]
    return [part.view(shape) for part, shape in zip(pieces.split(sizes), shapes, strict=True)]
