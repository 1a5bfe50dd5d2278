"""Relative positions: what two families add to the scores of attention.

The arithmetic of transformers 5.23 `MPNetEncoder.compute_position_bias` and of DeBERTa's
`DisentangledSelfAttention.disentangled_attention_bias`, for the distances that the row has.

b sequences of a bucket, T tokens of the longest, Tq of them queries; H heads, d = D / H; R relative
positions of the row.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

from minilora.bert.packing import Bias

# A layer's share is made of it by `layer_bias`: MPNet's bias (H, T, T), the same in all layers;
# DeBERTa's embeddings (R, D), and which of them lies between two tokens (T, T).
Relative = tuple[Tensor, ...]


def relative_positions(encoder: Any, longest: int, device: torch.device) -> Relative:
    """What all layers share, for sequences of up to `longest` tokens; () where there is nothing."""
    if hasattr(encoder, "relative_attention_bias"):
        return (encoder.compute_position_bias(torch.empty(1, longest, device=device))[0],)
    if not getattr(encoder, "relative_attention", False):
        return ()
    embeddings = encoder.get_rel_embedding()
    tokens = torch.empty(longest, 0)
    distances = build_relative_position(
        tokens, tokens, encoder.position_buckets, encoder.max_relative_positions
    )[0]
    span = len(embeddings) // 2
    place = (distances + span).clamp(0, 2 * span - 1)
    # Of 512, a row of sentences needs those of some 80 distances.
    first, last = int(place.min()), int(place.max())
    return embeddings[first : last + 1], (place - first).to(device)


def layer_bias(own: Any, relative: Relative) -> Bias | None:
    """What an attention module `own` adds to its scores."""
    if len(relative) == 1:
        return partial(_of_mpnet, relative[0])
    if not relative:
        return None
    embeddings, place = own.pos_dropout(relative[0]), relative[1]
    shared, heads = own.share_att_key, own.num_attention_heads
    key = own.key_proj if shared else getattr(own, "pos_key_proj", None)
    query = own.query_proj if shared else getattr(own, "pos_query_proj", None)
    used = zip((key, query), ("c2p", "p2c"), strict=True)
    projected = [
        project(embeddings).unflatten(-1, (heads, -1)).permute(1, 2, 0)  # (H, d, R)
        if kind in own.pos_att_type
        else None
        for project, kind in used
    ]
    return partial(_of_deberta, projected, place, scale_of(own))


def scale_of(own: Any) -> float | None:
    """DeBERTa's scale: a score is the sum of up to three products. Others have attention's own."""
    if not hasattr(own, "pos_att_type"):
        return None
    products = 1 + ("c2p" in own.pos_att_type) + ("p2c" in own.pos_att_type)
    return (own.attention_head_size * products) ** -0.5


def _of_mpnet(bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    count = len(k) // len(bias)
    return bias[:, : q.shape[1], : k.shape[1]].repeat(count, 1, 1)  # (b * H, Tq, T)


def _of_deberta(
    projected: list[Tensor | None], place: Tensor, scale: float, q: Tensor, k: Tensor
) -> Tensor:
    # content to position, and position to content: (b * H, Tq, T)
    key, query = projected
    place, total = place[: q.shape[1], : k.shape[1]], torch.zeros(())
    for x, positions, index in ((q, key, place), (k, query, place.T)):
        if positions is not None:
            products = (x.unflatten(0, (-1, len(positions))) @ positions.to(x.dtype)).flatten(0, 1)
            products = products.gather(-1, index.expand(len(x), -1, -1))
            total = total + (products if x is q else products.transpose(1, 2))
    return total * scale
