"""Activations that are not kept for the backward pass but computed again."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute_activations(model: nn.Module, contexts: Callable[[], Any] | None) -> None:
    """Keep only each layer's input, as `PreTrainedModel.gradient_checkpointing_enable` does
    (arXiv:1604.06174).

    Args:
        contexts: what torch's `checkpoint` calls `context_fn`: a context for the forward pass and one
            for the recomputation, for generators that torch does not know. torch's own it restores.
    """
    function = partial(checkpoint, use_reentrant=False, context_fn=contexts or noop_context_fn)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = function  # pyright: ignore[reportArgumentType]
