"""Families whose own forward takes a packed row: attention comes to it from outside.

Their layers get it from transformers' `AttentionInterface` (5.23), and hand it every keyword that
the model was called with: so the row's layout reaches it, and again when a layer is recomputed.

B sequences; N tokens of the row; D hidden; H heads, d = D / H; T of a bucket's longest sequence.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling

from minilora.bert.examples import Batch
from minilora.bert.packing import Layout, attention

IMPLEMENTATION = "minilora_packed"
# config.model_type -> the dropout in an attention module that probabilities see; ModernBERT's
# module has but a number for it, which is its output's, too.
DROPOUT = {"albert": "attention_dropout", "distilbert": "dropout", "modernbert": "out_drop"}


class Hidden(BaseModelOutputWithPooling):
    """What an encoder gives; None for all else that a head may look for, as Longformer's does."""

    def __getattr__(self, name: str) -> None: ...


def attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """What the interface asks for: (1, H, N, d) three times -> (1, N, H, d), and no probabilities.

    Without a layout the batch is no row of ours, and torch's own attention sees it.
    """
    layout: Layout | None = options.pop("layout", None)
    if layout is None:
        return sdpa_attention_forward(module, q, k, v, attention_mask, **options)  # pyright: ignore
    rows = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (1, N, H, d)
    qkv = rows[0].flatten(2)[0], rows[1].flatten(2)[0], rows[2].flatten(2)[0]
    dropout = getattr(module, DROPOUT[module.config.model_type])  # pyright: ignore
    window = options.get("sliding_window")
    bias = partial(within, window) if window else None
    found = attention(qkv, layout, dropout, options["scaling"], bias)
    return found.view(rows[0].shape), None


def within(window: int, q: Tensor, k: Tensor) -> Tensor | None:
    """What keeps tokens from attending to others `window` or more away, (1, T, T), as
    `create_bidirectional_sliding_window_mask` does for a window less one; None if no two are.
    """
    if k.shape[1] <= window:
        return None
    places = torch.arange(k.shape[1], device=k.device)
    far = (places[:, None] - places).abs() >= window
    # Not -inf: a place of padding far from its sequence would have nothing to attend to, and nan.
    return k.new_zeros(far.shape).masked_fill_(far, torch.finfo(k.dtype).min)[None]


def prepare(model: Any) -> None:
    """Make `attend` the model's attention, for good: layers may be recomputed after the forward."""
    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation(IMPLEMENTATION)


def own_forward(model: Any, batch: Batch, layout: Layout, of_sequences: bool) -> Tensor:
    """The last hidden states of the row (N, D), or, `of_sequences`, what a head for these reads:
    first tokens (B, D), or, if ModernBERT's config says so, means.
    """
    names = ("input_ids", "token_type_ids", "position_ids")
    row = {name: batch[name][None] for name in names if name in batch}
    # A mask of four dimensions is taken as it is; without one, (N, N) might be made.
    mask = torch.zeros(1, 1, 1, 1, device=batch["input_ids"].device)
    x = model.base_model(**row, attention_mask=mask, layout=layout)[0][0]
    if not of_sequences:
        return x
    if getattr(model.config, "classifier_pooling", "cls") == "cls":
        return x[layout.first]
    sizes = batch["lengths"].tolist()
    return torch.stack([part.mean(dim=0) for part in x[: sum(sizes)].split(sizes)])


def can_run(model: Any) -> bool:
    """Whether all attention goes by the one config that `prepare` changes: a block that is trained
    in full is a copy, and so is its config. Where transformers cannot, as for ModernBERT before
    5.7, it only logs, and a row's tokens would attend across its sequences.
    """
    configs = [module.config for module in model.base_model.modules() if hasattr(module, "config")]
    known = model.config.model_type in DROPOUT and model._can_set_attn_implementation()
    return known and all(one is model.config for one in configs)
