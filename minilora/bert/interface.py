"""Families whose own forward takes a packed row: attention comes to it from outside.

Their layers get their attention from transformers' `AttentionInterface`, and hand it every keyword
they were called with: so the row's layout reaches it, and a recomputed layer gets the same again.

N tokens of the row; D hidden; H heads, d = D / H; T of a bucket's longest sequence.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from minilora.bert.packing import Layout, attention
from minilora.bert.tasks import Batch

IMPLEMENTATION = "minilora_packed"
# By config.model_type, the dropout of an attention module that its probabilities see. ModernBERT
# has but a number for it, which is that of its output's, too.
DROPOUT = {"albert": "attention_dropout", "distilbert": "dropout", "modernbert": "out_drop"}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What the interface asks for: (1, H, N, d) three times -> (1, N, H, d), and no probabilities.

    Without a layout the batch is no row of ours, and torch's own attention sees it.
    """
    layout: Layout | None = options.pop("layout", None)
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # pyright: ignore
    rows = [x.transpose(1, 2).flatten(2)[0] for x in (query, key, value)]
    config: Any = module.config
    window = options.get("sliding_window")
    found = attention(
        (rows[0], rows[1], rows[2]),
        layout,
        query.shape[1],
        getattr(module, DROPOUT[config.model_type]),
        options["scaling"],
        window and partial(within, window),
    )
    return found.unflatten(1, (query.shape[1], -1))[None], None


def within(window: int, q: Tensor, k: Tensor) -> Tensor | None:
    """What keeps tokens from attending to others `window` or more away: (1, T, T); None if no two
    are, as in `create_bidirectional_sliding_window_mask`, whose own window is one less.
    """
    places = torch.arange(k.shape[1], device=k.device)
    if len(places) <= window:
        return None
    far = (places[:, None] - places).abs() >= window
    # Not -inf: a place of padding far from its sequence would have nothing to attend to, and nan.
    return k.new_zeros(far.shape).masked_fill_(far, torch.finfo(k.dtype).min)[None]


def prepare(model: Any) -> None:
    """Make the model's attention `attend`, for good: layers may be recomputed after the forward."""
    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation(IMPLEMENTATION)


def own_forward(model: Any, batch: Batch, layout: Layout) -> Tensor:
    """The last hidden states of the row: (N, D)."""
    names = ("input_ids", "token_type_ids", "position_ids")
    row = {name: batch[name][None] for name in names if name in batch}
    # One of four dimensions is taken as it is; a mask (N, N) would be made otherwise.
    mask = torch.zeros(1, 1, 1, 1, device=batch["input_ids"].device)
    return model.base_model(**row, attention_mask=mask, layout=layout).last_hidden_state[0]


def can_run(model: Any) -> bool:
    """Whether all attention is the model's own, by the one config that `prepare` changes: a block
    that is trained in full is a copy with a copy of it.
    """
    configs = [module.config for module in model.base_model.modules() if hasattr(module, "config")]
    return model.config.model_type in DROPOUT and all(one is model.config for one in configs)
