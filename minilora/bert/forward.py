"""From a batch to logits: `Padded`, the model's own forward, and `Packed`, without the padding.

Both hold the model and are modules themselves: what is compiled, and what is distributed. Which
head the model has decides what comes out: C classes for each sequence, in the batch's order; for
each token, in the row's order; or, of V words, for each masked place of it.

`Packed` gets the last hidden states of a row from a walk through the encoder's modules, or from the
encoder's own forward. `Padded` runs the whole model, and both leave the head to its class.

Not here: how tokens lie in the row and attend to each other (`packing`), the walk (`walk`), the
encoders that need none (`interface`), what an adapter adds to a linear layer: layers are called as
they are.

B sequences of up to T tokens; N tokens of the row, M masked; D hidden; C classes, V words.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from minilora.bert import interface, walk
from minilora.bert.dataset import collate_padded
from minilora.bert.packing import Layout, collate_packed, layout_of
from minilora.bert.tasks import Batch, Examples

# The ends of the classes whose heads read each sequence's first token, and each token.
OF_SEQUENCES = "ForSequenceClassification"
OF_TOKENS = ("ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")


class Padded(nn.Module):
    """Rectangular batches: what everything else must agree with."""

    def __init__(self, model: PreTrainedModel, pad_token_id: int) -> None:
        super().__init__()
        self.model = model
        self.pad_token_id = pad_token_id

    def collate(self, examples: Examples, indices: np.ndarray) -> Batch:
        return collate_padded(examples, indices, self.pad_token_id)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, C) or (B, T, C), or (M, V) of `masked` (M,), indices into B * T; the labels
        stay here, so that the loss is ours to see.
        """
        names = ("input_ids", "token_type_ids", "attention_mask")
        inputs = {name: batch[name] for name in names if name in batch}
        if "masked" not in batch:
            return logits_of(self.model(**inputs))
        hidden = self.model.base_model(**inputs)[0]  # (B, T, D)
        return headed(self.model, hidden.flatten(0, 1)[batch["masked"]][None])[0]


class Packed(nn.Module):
    """Padding-free batches, for models that `can_pack`."""

    def __init__(self, model: PreTrainedModel, pad_token_id: int, multiple: int = 1) -> None:
        super().__init__()
        self.model = model
        self.pad_token_id = pad_token_id
        self.multiple = multiple
        self.is_walked = walk.can_walk(model)
        if not self.is_walked:
            interface.prepare(model)

    def collate(self, examples: Examples, indices: np.ndarray) -> Batch:
        return collate_packed(examples, indices, self.pad_token_id, self.multiple)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, C), in the order of the batch's labels; or (N, C), in the row's order, filler
        and all; or (M, V) of `masked` (M,), indices into the row.
        """
        layout: Layout = layout_of(batch["lengths"])  # pyright: ignore
        of_sequences = type(self.model).__name__.endswith(OF_SEQUENCES)
        if self.is_walked:
            x = walk.walked(self.model, batch, layout, first_only=of_sequences)
        else:
            x = interface.own_forward(self.model, batch, layout)  # (N, D)
            x = pooled(self.model, x, batch["lengths"], layout) if of_sequences else x
        if of_sequences:
            return headed(self.model, x[:, None])[batch["place"]]
        return headed(self.model, (x[batch["masked"]] if "masked" in batch else x)[None])[0]


def can_pack(model: PreTrainedModel) -> bool:
    """Whether the model is an encoder that is known how to pack, with a head that is."""
    known = type(model).__name__.endswith((OF_SEQUENCES, *OF_TOKENS))
    is_decoder = getattr(model.config, "is_decoder", False)
    return known and not is_decoder and (walk.can_walk(model) or interface.can_run(model))


def pooled(model: Any, x: Tensor, lengths: Tensor, layout: Layout) -> Tensor:
    """Of the row (N, D), what a head for sequences reads (B, D): first tokens, or, if ModernBERT's
    config says so, means.
    """
    if getattr(model.config, "classifier_pooling", "cls") == "cls":
        return x[layout.first]
    parts = x.split([*lengths.tolist(), len(x) - int(lengths.sum())])
    return torch.stack([part.mean(dim=0) for part in parts[:-1]])


def headed(model: Any, hidden: Tensor) -> Tensor:
    """What the model's own head makes of hidden states (b, t, D): logits (b, C) or (b, t, C).

    Its class is called, with an encoder that has no more to do than to give them.
    """
    encoder, summary = model.base_model, None
    if getattr(encoder, "pooler", None) is not None:
        first = hidden[:, 0] if model.config.model_type == "albert" else hidden
        activation = getattr(encoder, "pooler_activation", lambda x: x)  # ALBERT's
        summary = activation(encoder.pooler(first))
    output = BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=summary)  # pyright: ignore
    encoder.forward = lambda *_, **__: output
    try:
        return logits_of(model())
    finally:
        del encoder.forward


def logits_of(output: Any) -> Tensor:
    """Logits as one tensor; those of answers are (B, T, 2): of their starts and their ends."""
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    return output.logits
