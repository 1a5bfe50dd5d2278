"""From a batch to logits: `Padded`, the model's own forward, and `Packed`, without the padding.

Both hold the model and are modules themselves: what is compiled, and what is distributed. The
model's head says what comes out: C logits for each sequence, in the batch's order; C for each
token; or V, of words, for the M places that the batch has as `masked`, and for no others.

`Packed` walks through the encoders that are built like BERT, calling the model's own modules on the
tokens that are there and no others, as transformers 5.23 does in `BertModel.forward` and its
relatives'. In the last layer only the first tokens go on after the keys and values are made, where
the head reads nothing else: that saves a seventh of a six-layer model.

Not here: how tokens lie in the row and attend to each other (`packing`), relative positions
(`relative`), encoders whose own forward takes a row (`interface`), what an adapter adds to a linear
layer: layers are called as they are.

B sequences, padded to T tokens; N tokens of the row; D hidden.
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilora.bert import interface
from minilora.bert.dataset import collate_padded
from minilora.bert.dropout import made_again
from minilora.bert.examples import Batch, Examples
from minilora.bert.packing import Layout, attention, collate_packed, layout_of
from minilora.bert.relative import Relative, relative_positions, scale_and_bias

# The encoders built like BERT, by config.model_type: what attention and its projections are called
# in a layer's `attention`. Those of fairseq number positions from behind the padding id on.
FAIRSEQ = ("camembert", "mpnet", "roberta", "xlm-roberta")
Names = tuple[str, str, str, str]
WALKED: dict[str, Names] = {
    **dict.fromkeys(("bert", "electra", *FAIRSEQ), ("self", "query", "key", "value")),
    "deberta-v2": ("self", "query_proj", "key_proj", "value_proj"),
    "mpnet": ("attn", "q", "k", "v"),
}
OF_SEQUENCES = "ForSequenceClassification"
HEADS = (OF_SEQUENCES, "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")


class Padded(nn.Module):
    """Rectangular batches, padded on the tokenizer's side: what all else must agree with."""

    def __init__(
        self, model: PreTrainedModel, pad_token_id: int, side: str = "right", multiple: int = 1
    ) -> None:
        super().__init__()
        self.model = model
        self.padding = (pad_token_id, side, multiple)

    def collate(self, examples: Examples, indices: np.ndarray) -> Batch:
        return collate_padded(examples, indices, *self.padding)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, C) or (B, T, C), or (M, V) of places `masked` (M,) of the B * T; the labels
        stay here, so that the loss is ours to see.
        """
        names = ("input_ids", "token_type_ids", "attention_mask")
        inputs = {name: batch[name] for name in names if name in batch}
        with made_again():
            if "masked" not in batch:
                return logits_of(self.model(**inputs))
            x = self.model.base_model(**inputs)[0].flatten(0, 1)  # (B * T, D)
        return headed(self.model, x[batch["masked"]][None])[0]


class Packed(nn.Module):
    """Padding-free batches, for models that `can_pack`."""

    def __init__(self, model: PreTrainedModel, pad_token_id: int, multiple: int = 1) -> None:
        super().__init__()
        self.model = model
        self.pad_token_id = pad_token_id
        self.multiple = multiple
        self.of_sequences = type(model).__name__.endswith(OF_SEQUENCES)
        if model.config.model_type not in WALKED:
            interface.prepare(model)

    def collate(self, examples: Examples, indices: np.ndarray) -> Batch:
        return collate_packed(examples, indices, self.pad_token_id, self.multiple)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, C), in the order of the batch's labels; or (N, C), in the row's, of what fills
        it up, too; or (M, V) of places `masked` (M,) in the row.
        """
        heads = self.model.config.num_attention_heads
        layout: Layout = layout_of(batch["lengths"], heads)  # pyright: ignore
        with made_again():
            if self.model.config.model_type in WALKED:
                x = walked(self.model, batch, layout, first_only=self.of_sequences)
            else:
                x = interface.own_forward(self.model, batch, layout, self.of_sequences)
        if self.of_sequences:
            return headed(self.model, x[:, None])[batch["place"]]
        return headed(self.model, (x[batch["masked"]] if "masked" in batch else x)[None])[0]


def can_pack(model: PreTrainedModel) -> bool:
    """Whether the model's encoder and head are of those known here, and the encoder of the very
    parts that are called: an adapter may have wrapped a whole block, to train it in full.
    """
    config, own = model.config, type(model).__module__
    if not type(model).__name__.endswith(HEADS) or getattr(config, "is_decoder", False):
        return False
    if config.model_type not in WALKED:
        return interface.can_run(model)
    modules = dict(model.base_model.named_modules())
    blocks = ["attention", f"attention.{WALKED[config.model_type][0]}", "intermediate", "output"]
    blocks += [] if config.model_type == "mpnet" else ["attention.output"]
    layers = [f"encoder.layer.{number}" for number in range(config.num_hidden_layers)]
    names = [*layers, *(f"{layer}.{block}" for layer in layers for block in blocks)]
    of_the_family = all(type(modules.get(name)).__module__ == own for name in names)
    has_padding = config.pad_token_id is not None or config.model_type not in FAIRSEQ
    return of_the_family and has_padding and "encoder.conv" not in modules  # of DeBERTa's largest


def walked(model: Any, batch: Batch, layout: Layout, first_only: bool) -> Tensor:
    """The last hidden states of the row (N, D), or, `first_only`, of the first tokens (B, D)."""
    encoder, names = model.base_model.encoder, WALKED[model.config.model_type]
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
    layer: Any, names: Names, x: Tensor, layout: Layout, relative: Relative, first_only=False
) -> Tensor:
    """One layer: (N, D) -> (N, D), or, `first_only`, -> (B, D)."""
    rows = x[layout.first] if first_only else x
    own = getattr(layer.attention, names[0])
    query, key, value = (getattr(own, name) for name in names[1:])
    scale, bias = scale_and_bias(own, relative)
    context = attention((query(rows), key(x), value(x)), layout, own.dropout, scale, bias)
    if hasattr(own, "o"):  # MPNet's, whose attention has no `output`
        rows = layer.attention.LayerNorm(layer.attention.dropout(own.o(context)) + rows)
    else:
        rows = layer.attention.output(context, rows)  # LayerNorm(rows + dropout(W context + b))
    return layer.output(layer.intermediate(rows), rows)  # (N, D) -> (N, 4 D) -> (N, D)


@torch.compiler.disable()  # it cannot follow a forward that is exchanged
def headed(model: Any, hidden: Tensor) -> Tensor:
    """What the model's own head makes of hidden states (b, t, D): logits (b, C) or (b, t, C).

    The whole model runs, and its encoder has no more to do than to give them: copies of both, which
    share their parts, for another thread may be using the model.
    """
    encoder, whole, summary = copy.copy(model.base_model), copy.copy(model), None
    whole._modules = model._modules | {model.base_model_prefix: encoder}
    if getattr(encoder, "pooler", None) is not None:
        first = hidden[:, 0] if model.config.model_type == "albert" else hidden
        activation = getattr(encoder, "pooler_activation", lambda x: x)  # ALBERT's
        summary = activation(encoder.pooler(first))
    output = interface.Hidden(last_hidden_state=hidden, pooler_output=summary)  # pyright: ignore
    encoder.forward = lambda *_, **__: output
    return logits_of(whole())


def logits_of(output: Any) -> Tensor:
    """A model's logits; those of answers become (B, T, 2): of their starts and their ends."""
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    return output.logits
