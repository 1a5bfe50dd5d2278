"""The walk through encoders that are built like BERT, by the model's own modules.

The arithmetic is that of transformers 5.23 `BertModel.forward` and its relatives'. Where the head
reads nothing but each sequence's first token, only that goes on in the last layer after the keys
and values are made: that saves a seventh of a six-layer model.

B sequences; N tokens of the row; D hidden.
"""

from typing import Any

import torch
from torch import Tensor

from minilora.bert.packing import Layout, attention
from minilora.bert.relative import Relative, layer_bias, relative_positions, scale_of
from minilora.bert.tasks import Batch

# The encoders built like BERT, by config.model_type; those of fairseq number positions from behind
# the padding id.
FAIRSEQ = ("camembert", "mpnet", "roberta", "xlm-roberta")
FAMILIES = ("bert", "deberta-v2", "electra", *FAIRSEQ)
# The attention module of a layer's `attention`, and its projections.
ATTENTION = dict.fromkeys(FAMILIES, ("self", "query", "key", "value")) | {
    "deberta-v2": ("self", "query_proj", "key_proj", "value_proj"),
    "mpnet": ("attn", "q", "k", "v"),
}


def can_walk(model: Any) -> bool:
    """Whether the encoder is of the very parts that are called here: an adapter may have wrapped a
    whole block, to train it in full; DeBERTa's largest models have a convolution, too.
    """
    config, own = model.config, type(model).__module__
    if config.model_type not in FAMILIES or getattr(config, "conv_kernel_size", 0):
        return False
    modules = dict(model.base_model.named_modules())
    blocks = ["attention", f"attention.{ATTENTION[config.model_type][0]}", "intermediate", "output"]
    blocks += [] if config.model_type == "mpnet" else ["attention.output"]
    layers = [f"encoder.layer.{number}" for number in range(config.num_hidden_layers)]
    names = [*layers, *(f"{layer}.{block}" for layer in layers for block in blocks)]
    return all(type(modules.get(name)).__module__ == own for name in names)


def walked(model: Any, batch: Batch, layout: Layout, first_only: bool) -> Tensor:
    """The last hidden states of the row (N, D), or, `first_only`, of the first tokens (B, D)."""
    encoder, names = model.base_model.encoder, ATTENTION[model.config.model_type]
    x = embedded(model, batch)
    relative = relative_positions(encoder, layout.buckets[-1].length, x.device)
    *layers, last = encoder.layer
    for layer in layers:
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            x = layer._gradient_checkpointing_func(encoder_layer, layer, names, x, layout, relative)
        else:
            x = encoder_layer(layer, names, x, layout, relative)
    return encoder_layer(last, names, x, layout, relative, first_only)


def embedded(model: Any, batch: Batch) -> Tensor:
    """The embeddings of the row: (N, D)."""
    encoder, types, positions = model.base_model, batch.get("token_type_ids"), batch["position_ids"]
    family = model.config.model_type
    if family in FAIRSEQ:
        # `RobertaEmbeddings.create_position_ids_from_input_ids`: a padding token, even inside a
        # text, has the padding's own position and is not counted. MPNet's is always 1.
        padding = 1 if family == "mpnet" else model.config.pad_token_id
        counted = batch["input_ids"] != padding
        count = counted.cumsum(0)
        starts = torch.arange(len(count), device=count.device) - positions
        positions = (count - (count - counted.long())[starts]) * counted + padding
    x = encoder.embeddings(
        input_ids=batch["input_ids"][None],
        token_type_ids=None if types is None else types[None],
        position_ids=positions[None],
    )[0]
    return encoder.embeddings_project(x) if hasattr(encoder, "embeddings_project") else x


def encoder_layer(
    layer: Any,
    names: tuple[str, ...],
    x: Tensor,
    layout: Layout,
    relative: Relative,
    first_only: bool = False,
) -> Tensor:
    """One layer: (N, D) -> (N, D), or, `first_only`, -> (B, D)."""
    rows = x[layout.first] if first_only else x
    own = getattr(layer.attention, names[0])
    q, k, v = (getattr(own, names[i])(y) for i, y in ((1, rows), (2, x), (3, x)))
    heads, bias = own.num_attention_heads, layer_bias(own, relative)
    context = attention((q, k, v), layout, heads, own.dropout, scale_of(own), bias)
    if names == ATTENTION["mpnet"]:
        rows = layer.attention.LayerNorm(layer.attention.dropout(own.o(context)) + rows)
    else:
        rows = layer.attention.output(context, rows)  # LayerNorm(rows + dropout(W context + b))
    return layer.output(layer.intermediate(rows), rows)  # (N, D) -> (N, 4 D) -> (N, D)
