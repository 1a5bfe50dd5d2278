"""How examples become a batch, and a batch logits: padded, or packed into one row."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from minilora.bert.data import Collate, collate_padded
from minilora.bert.packed_bert import Linear, can_walk, packed_logits
from minilora.bert.packed_relatives import RELATIVES, packed_relative_logits, route_attention
from minilora.bert.packing import collate_packed


@dataclass(frozen=True)
class Batching:
    """Two functions that belong together."""

    collate: Collate
    forward: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    """(model, batch) to logits (B, C)."""


def padded_batching(pad_token_id: int) -> Batching:
    """Rectangular batches, and the model's own forward: what everything else must agree with."""
    return Batching(partial(collate_padded, pad_token_id=pad_token_id), padded_logits)


def packed_batching(
    model: PreTrainedModel, pad_token_id: int, linear: Linear, multiple: int
) -> Batching | None:
    """Padding-free batches, or None for a family that nothing here knows how to pack.

    Args:
        linear: how the linear layers of BERT are applied; its relatives' are called as they are.
        multiple: see `collate_packed`.
    """
    packed = partial(collate_packed, pad_token_id=pad_token_id, multiple=multiple)
    if can_walk(model):
        return Batching(packed, partial(packed_logits, linear=linear))
    if model.config.model_type in RELATIVES:
        route_attention(model)
        return Batching(packed, partial(packed_relative_logits, pad_token_id=pad_token_id))
    return None


def padded_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits (B, C); the labels stay here, so that the loss is ours to see."""
    return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
