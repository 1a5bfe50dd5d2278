"""Relative positions: what MPNet and DeBERTa add to the scores of attention.

The arithmetic of transformers 5.23 `MPNetEncoder.compute_position_bias` and of DeBERTa's
`DisentangledSelfAttention.disentangled_attention_bias`, for the distances that there are in a row.

b sequences of a bucket, T tokens of the longest, Tq of them queries; H heads, d = D / H; R relative
positions of the row.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

from minilora.bert.packing import Bias

# What all layers share: nothing; MPNet's bias (H, T, T); or DeBERTa's embeddings (R, D), and which
# of them lies between two tokens (T, T).
Relative = tuple[Tensor, ...]


def relative_positions(encoder: Any, longest: int, device: torch.device) -> Relative:
    """For sequences of up to `longest` tokens."""
    if hasattr(encoder, "relative_attention_bias"):
        return (encoder.compute_position_bias(torch.empty(1, longest, device=device))[0],)
    if not getattr(encoder, "relative_attention", False):
        return ()
    embeddings, tokens = encoder.get_rel_embedding(), torch.empty(longest, 0)
    buckets = encoder.position_buckets, encoder.max_relative_positions
    place = build_relative_position(tokens, tokens, *buckets)[0] + len(embeddings) // 2
    place = place.clamp(0, len(embeddings) - 1)
    first, last = int(place.min()), int(place.max())  # sentences need a fifth of them
    return embeddings[first : last + 1], (place - first).to(device)


def scale_and_bias(own: Any, relative: Relative) -> tuple[float, Bias | None]:
    """Of an attention module's scores; DeBERTa's are sums of up to three products."""
    kinds = [kind for kind in ("c2p", "p2c") if kind in getattr(own, "pos_att_type", ())]
    scale = (own.attention_head_size * (1 + len(kinds))) ** -0.5
    if len(relative) == 1:
        return scale, partial(_of_mpnet, relative[0])
    if not relative or not kinds:
        return scale, None
    embeddings, prefix = own.pos_dropout(relative[0]), "" if own.share_att_key else "pos_"
    projections = {"c2p": f"{prefix}key_proj", "p2c": f"{prefix}query_proj"}
    projected = [getattr(own, projections[kind])(embeddings) for kind in kinds]
    positions = [x.unflatten(-1, (own.num_attention_heads, -1)).permute(1, 2, 0) for x in projected]
    return scale, partial(_of_deberta, dict(zip(kinds, positions, strict=True)), relative[1], scale)


def _of_mpnet(bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return bias[:, : q.shape[1], : k.shape[1]].repeat(len(k) // len(bias), 1, 1)


def _of_deberta(
    positions: dict[str, Tensor], place: Tensor, scale: float, q: Tensor, k: Tensor
) -> Tensor:
    # Contents and positions, (b * H, T, d) and (H, d, R), to (b * H, Tq, T).
    place, found = place[: q.shape[1], : k.shape[1]], []
    for kind, p in positions.items():
        x, index = (q, place) if kind == "c2p" else (k, place.T)
        products = (x.unflatten(0, (-1, len(p))) @ p.to(x.dtype)).flatten(0, 1)
        products = products.gather(-1, index.expand(len(x), -1, -1))
        found.append(products if kind == "c2p" else products.transpose(1, 2))
    return sum(found[1:], found[0]) * scale
