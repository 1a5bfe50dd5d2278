"""From a batch to logits: `Padded`, the model's own forward, and `Packed`, without the padding.

Both hold the model and are modules themselves: what is compiled, and what is distributed.

`Packed` walks through the encoders that are built like BERT, calling the model's own modules on the
tokens that are there and no others; the arithmetic is that of transformers 5.23 `BertModel.forward`
and its relatives'. In the last layer only each sequence's first token goes on after the keys and
values are made, for the heads look at nothing else: that saves a seventh of a six-layer model.

Not here: how tokens lie in the row and attend to each other (`packing`), what an adapter adds to a
linear layer: layers are called as they are.

B sequences; N tokens of the row; D hidden; C classes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilora.bert.dataset import collate_padded
from minilora.bert.packing import Layout, attention, collate_packed, layout_of
from minilora.bert.tasks import Batch, Examples

# The encoders built like BERT, by config.model_type; those of fairseq number positions from the
# padding id on.
FAIRSEQ = ("camembert", "roberta", "xlm-roberta")
FAMILIES = ("bert", "electra", *FAIRSEQ)
BLOCKS = ("attention", "attention.self", "attention.output", "intermediate", "output")


class Padded(nn.Module):
    """Rectangular batches: what everything else must agree with."""

    def __init__(self, model: PreTrainedModel, pad_token_id: int) -> None:
        super().__init__()
        self.model = model
        self.pad_token_id = pad_token_id

    def collate(self, examples: Examples, indices: np.ndarray) -> Batch:
        return collate_padded(examples, indices, self.pad_token_id)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, C); the labels stay here, so that the loss is ours to see."""
        names = ("input_ids", "token_type_ids", "attention_mask")
        return self.model(**{name: batch[name] for name in names if name in batch}).logits


class Packed(nn.Module):
    """Padding-free batches, for models that `can_pack`."""

    def __init__(self, model: PreTrainedModel, pad_token_id: int, multiple: int = 1) -> None:
        super().__init__()
        self.model = model
        self.pad_token_id = pad_token_id
        self.multiple = multiple

    def collate(self, examples: Examples, indices: np.ndarray) -> Batch:
        return collate_packed(examples, indices, self.pad_token_id, self.multiple)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, C), in the order of the batch's labels."""
        encoder: Any = self.model.base_model
        layout: Layout = layout_of(batch["lengths"])  # pyright: ignore
        x = embedded(self.model, batch)
        *layers, last = encoder.encoder.layer
        for layer in layers:
            if layer.gradient_checkpointing and layer.training:
                x = layer._gradient_checkpointing_func(encoder_layer, layer, x, layout)
            else:
                x = encoder_layer(layer, x, layout)
        first = encoder_layer(last, x, layout, first_only=True)
        return classified(self.model, first)[batch["place"]]


def can_pack(model: PreTrainedModel) -> bool:
    """Whether the model is a classifier built like BERT, of the very parts that are called here: an
    adapter may have wrapped a whole block, to train it in full."""
    config, own = model.config, type(model).__module__
    if config.model_type not in FAMILIES or getattr(config, "is_decoder", False):
        return False
    modules = dict(model.base_model.named_modules())
    layers = [f"encoder.layer.{number}" for number in range(config.num_hidden_layers)]
    blocks = [*layers, *(f"{layer}.{block}" for layer in layers for block in BLOCKS)]
    of_the_family = all(type(modules.get(block)).__module__ == own for block in blocks)
    return of_the_family and type(model).__name__.endswith("ForSequenceClassification")


def embedded(model: Any, batch: Batch) -> Tensor:
    """The embeddings of the row: (N, D)."""
    encoder, types, positions = model.base_model, batch.get("token_type_ids"), batch["position_ids"]
    if model.config.model_type in FAIRSEQ:
        # `RobertaEmbeddings.create_position_ids_from_input_ids`: a padding token, even inside a
        # text, has the padding's own position and is not counted.
        counted = batch["input_ids"] != model.config.pad_token_id
        count = counted.cumsum(0)
        starts = torch.arange(len(count), device=count.device) - positions
        positions = (count - (count - counted.long())[starts]) * counted + model.config.pad_token_id
    x = encoder.embeddings(
        input_ids=batch["input_ids"][None],
        token_type_ids=None if types is None else types[None],
        position_ids=positions[None],
    )[0]
    return encoder.embeddings_project(x) if hasattr(encoder, "embeddings_project") else x


def encoder_layer(layer: Any, x: Tensor, layout: Layout, first_only: bool = False) -> Tensor:
    """One layer: (N, D) -> (N, D), or, `first_only`, -> (B, D)."""
    rows = x[layout.first] if first_only else x
    own = layer.attention.self
    q, k, v = own.query(rows), own.key(x), own.value(x)
    context = attention(q, k, v, layout, own.num_attention_heads, own.dropout)
    rows = layer.attention.output(context, rows)  # LayerNorm(rows + dropout(W context + b))
    return layer.output(layer.intermediate(rows), rows)  # (N, D) -> (N, 4 D) -> (N, D)


def classified(model: Any, first: Tensor) -> Tensor:
    """The head's logits (B, C) of the first tokens (B, D); heads take the first of (B, 1, D)."""
    x, pooler = first[:, None], getattr(model.base_model, "pooler", None)
    return model.classifier(x if pooler is None else model.dropout(pooler(x)))
