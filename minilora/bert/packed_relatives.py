"""BERT's relatives over a packed row: their own forward, with attention routed through `packing`.

RoBERTa and those built like it take explicit positions, hand unknown arguments on to their attention
function, and classify the first token's state. So the row goes through as a batch of one, and only
attention, which must not look across sequences, is ours (transformers' `AttentionInterface`).
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from minilora.bert.packing import Layout, attention, layout_of

NAME = "minilora_packed"

# config.model_type -> position of a sequence's first token, relative to the padding id. RoBERTa and
# its kin number positions from pad_token_id + 1 (fairseq's convention); ELECTRA from 0, as BERT.
RELATIVES = {"camembert": 1, "electra": None, "roberta": 1, "xlm-roberta": 1}


def route_attention(model: PreTrainedModel) -> None:
    """Make the model's layers call `packed_attention`, for packed batches only from now on."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, no_mask)
    model.set_attn_implementation(NAME)


def packed_relative_logits(model: nn.Module, batch: dict[str, Tensor], pad_token_id: int) -> Tensor:
    """Logits (B, C) of a packed batch (`packing.collate_packed`), in the batch's order."""
    assert isinstance(model, PreTrainedModel)
    layout = layout_of(batch["lengths"])
    inputs = {name: batch[name][None] for name in ("input_ids", "token_type_ids") if name in batch}
    offset = RELATIVES[model.config.model_type]
    start = 0 if offset is None else pad_token_id + offset
    hidden = model.base_model(
        **inputs, position_ids=batch["position_ids"][None] + start, layout=layout
    ).last_hidden_state[0]  # (1, N) -> (N, D)
    first = hidden[layout.first][:, None]  # the head takes the first of (B, 1, D)
    return model.classifier(first)[batch["place"]]  # pyright: ignore[reportCallIssue]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    layout: Layout,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """`packing.attention` under the signature of transformers' attention functions: (1, H, N, d)
    three times -> (1, N, H, d). What else transformers passes (scaling, dropout) it computes itself
    from the shapes and the module.
    """
    heads = query.shape[1]
    q, k, v = (x[0].transpose(0, 1).flatten(1) for x in (query, key, value))  # (N, D) each
    result = attention(q, k, v, layout, heads, module.dropout)  # pyright: ignore[reportArgumentType]
    return result.unflatten(1, (heads, -1))[None], None


def no_mask(*arguments: Any, **options: Any) -> None:
    """No mask over the row: sequences are kept apart by `layout`."""
