"""BERT's forward pass over a packed row: the model's own modules, called one after the other.

The arithmetic is that of transformers 5.23 `BertForSequenceClassification.forward`, on the tokens that
are there and no others. In the last layer only each sequence's first token goes on after the keys and
values are made, for the pooler looks at nothing else: that saves a seventh of a six-layer model.

B sequences; N tokens of the row; D hidden; C classes.
"""

from collections.abc import Callable

from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertModel, PreTrainedModel
from transformers.models.bert import modeling_bert as hf

from minilora.bert.packing import Layout, attention, layout_of

Linear = Callable[[nn.Module, Tensor], Tensor]
"""How a linear module, adapted or not, is applied to rows: (module, x) to its output."""


def can_walk(model: PreTrainedModel) -> bool:
    """Whether the model is a BERT whose layers have the parts that are called here (an adapter may
    have wrapped a whole block, to train it in full)."""
    return isinstance(model, BertForSequenceClassification) and all(
        isinstance(part, kind)
        for layer in model.bert.encoder.layer
        for part, kind in (
            (layer, hf.BertLayer),
            (getattr(layer, "attention", None), hf.BertAttention),
            (getattr(layer, "intermediate", None), hf.BertIntermediate),
            (getattr(layer, "output", None), hf.BertOutput),
        )
    )


def packed_logits(model: nn.Module, batch: dict[str, Tensor], linear: Linear) -> Tensor:
    """Logits (B, C) of a packed batch (`packing.collate_packed`), in the batch's order."""
    assert isinstance(model, BertForSequenceClassification)
    layout = layout_of(batch["lengths"])
    hidden = first_hidden_states(model.bert, batch, layout, linear)  # (B, D)
    assert model.bert.pooler is not None
    pooled = model.bert.pooler(hidden[:, None])  # it takes the first of (B, 1, D)
    return model.classifier(model.dropout(pooled))[batch["place"]]  # (B, D) -> (B, C)


def first_hidden_states(
    bert: BertModel, batch: dict[str, Tensor], layout: Layout, linear: Linear
) -> Tensor:
    """The last layer's output at each sequence's first token, (B, D), in the row's order."""
    x = embedded(bert, batch)
    *layers, last = bert.encoder.layer
    for layer in layers:
        assert isinstance(layer, hf.BertLayer)
        if layer.gradient_checkpointing and layer.training:
            recomputed = layer._gradient_checkpointing_func
            x = recomputed(encoder_layer, layer, x, layout, linear)  # pyright: ignore[reportCallIssue]
        else:
            x = encoder_layer(layer, x, layout, linear)
    assert isinstance(last, hf.BertLayer)
    return encoder_layer(last, x, layout, linear, first_only=True)


def embedded(bert: BertModel, batch: dict[str, Tensor]) -> Tensor:
    """The embeddings' output: (N,) -> (N, D)."""
    types = batch.get("token_type_ids")
    return bert.embeddings(
        input_ids=batch["input_ids"][None],
        token_type_ids=None if types is None else types[None],
        position_ids=batch["position_ids"][None],
    )[0]


def encoder_layer(
    layer: hf.BertLayer, x: Tensor, layout: Layout, linear: Linear, first_only: bool = False
) -> Tensor:
    """One layer: (N, D) -> (N, D), or, `first_only`, -> (B, D)."""
    rows = x[layout.first] if first_only else x
    projections = layer.attention.self
    context = attention(
        linear(projections.query, rows),
        linear(projections.key, x),
        linear(projections.value, x),
        layout,
        projections.num_attention_heads,
        projections.dropout,
        first_only,
    )
    rows = dense_drop_add_norm(layer.attention.output, context, rows, linear)
    inner = layer.intermediate
    expanded = inner.intermediate_act_fn(linear(inner.dense, rows))  # (N, D) -> (N, 4 D)
    return dense_drop_add_norm(layer.output, expanded, rows, linear)


def dense_drop_add_norm(
    module: hf.BertSelfOutput | hf.BertOutput, x: Tensor, residual: Tensor, linear: Linear
) -> Tensor:
    """What ends both halves of a layer: LayerNorm(residual + dropout(W x + b))."""
    return module.LayerNorm(module.dropout(linear(module.dense, x)) + residual)
