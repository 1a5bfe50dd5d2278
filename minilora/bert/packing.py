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
    # Where something is padded:
    index: Tensor | None  # (n,) int64: each token's place among the b * T padded ones
    padding: Tensor | None  # (b, 1, T): -inf at padding, else 0


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a packed row lie."""

    buckets: list[Bucket]
    first: Tensor  # (B,) int64: the row index of each sequence's first token


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
def layout_of(lengths: Tensor) -> Layout:
    """The layout of a row whose sequences have these lengths (B,), ascending."""
    on_host = lengths.cpu().numpy()
    starts = np.cumsum(on_host) - on_host
    padding = 1 - on_host.sum() / (on_host[-1] * len(on_host))
    count = 1 if padding < NEGLIGIBLE_PADDING else min(BUCKETS[lengths.device.type], len(on_host))
    edges = np.linspace(0, len(on_host), count + 1).round().astype(int)
    buckets = [_bucket(part, lengths.device) for part in np.split(on_host, edges[1:-1])]
    return Layout(buckets, torch.from_numpy(starts).to(lengths.device))


def _bucket(lengths: np.ndarray, device: torch.device) -> Bucket:
    count, longest, tokens = len(lengths), int(lengths[-1]), int(lengths.sum())
    if lengths[0] == longest:
        return Bucket(count, longest, tokens, None, None)
    real = np.arange(longest) < lengths[:, None]  # (b, T)
    index = torch.from_numpy(np.flatnonzero(real)).to(device)
    padding = torch.zeros(real.shape).masked_fill_(torch.from_numpy(~real), -torch.inf)
    return Bucket(count, longest, tokens, index, padding[:, None].to(device))


def attention(
    qkv: tuple[Tensor, Tensor, Tensor],
    layout: Layout,
    heads: int,
    dropout: nn.Module,
    scale: float,
    bias: Bias | None = None,
) -> Tensor:
    """softmax(scale Q K^T + bias) V within each sequence, `dropout` on the probabilities, as
    transformers' eager attention computes it: (N, D) three times -> (N, D).

    Queries (B, D) are of the first tokens alone, and so is the result. Scores and probabilities are
    float32 whatever the row's dtype: oneDNN's bfloat16 products of such small matrices are slower.
    """
    query, key, value = qkv
    buckets = queries = layout.buckets
    if len(query) < len(key):
        queries = [Bucket(bucket.count, 1, bucket.count, None, None) for bucket in buckets]
    q_parts = _to_heads(query, queries, heads)
    k_parts, v_parts = _to_heads(key, buckets, heads), _to_heads(value, buckets, heads)
    dtype, size, found = query.dtype, len(query), []
    del qkv, query, key, value  # what is freed at once makes room for the scores
    for of_query, bucket, q, k, v in zip(queries, buckets, q_parts, k_parts, v_parts, strict=True):
        added = None if bias is None else bias(q, k)
        if bucket.padding is not None:
            padding = bucket.padding.repeat_interleave(heads, dim=0)  # (b, 1, T) -> (b * H, 1, T)
            added = padding if added is None else added + padding
        if added is None:
            scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)  # (b * H, Tq, T)
        else:
            scores = torch.baddbmm(added.to(q.dtype), q, k.transpose(1, 2), alpha=scale)
        scores = torch.softmax(scores, dim=-1)  # by the same name, which frees them
        found.append(_from_heads(torch.bmm(dropout(scores), v), of_query, heads))
    result = torch.cat(found).to(dtype)
    return F.pad(result, (0, 0, 0, size - len(result)))  # the filler attends to nothing


def _to_heads(row: Tensor, buckets: list[Bucket], heads: int) -> list[Tensor]:
    # (N, D) -> (b * H, T, d) of each bucket, float32 or more. One split, not a slice for each
    # bucket: the slices' backward passes would each fill and add a row of zeros.
    sizes = [bucket.tokens for bucket in buckets]
    dtype, found = torch.promote_types(row.dtype, torch.float32), []
    for bucket, x in zip(buckets, row.split([*sizes, len(row) - sum(sizes)]), strict=False):
        if bucket.index is not None:  # (n, D) -> (b * T, D)
            padded = x.new_zeros(bucket.count * bucket.length, x.shape[1])
            x = padded.index_copy_(0, bucket.index, x)
        x = x.view(bucket.count, bucket.length, heads, -1).transpose(1, 2).to(dtype)
        found.append(x.reshape(bucket.count * heads, bucket.length, -1))
    return found


def _from_heads(x: Tensor, bucket: Bucket, heads: int) -> Tensor:
    # (b * H, T, d) -> (b * T, D) -> (n, D)
    joined = x.view(bucket.count, heads, bucket.length, -1).transpose(1, 2)
    rows = joined.reshape(bucket.count * bucket.length, -1)
    return rows if bucket.index is None else rows.index_select(0, bucket.index)
