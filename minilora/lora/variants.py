"""DoRA: the update split into a magnitude and a direction (arXiv:2402.09353, section 4).

    W' = m * (W + s B A) / ||W + s B A||        norms over rows, m (out_features,), starting at ||W + s B A||

As the paper's section 4.3 suggests, the norm counts as a constant in the backward pass. The
operations and their order are PEFT's (peft 0.21 `tuners/lora/dora.py`), so float32 results agree
bit for bit; that is why the product B A is computed by feeding an identity matrix through both
layers, which costs more than a matrix product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def weight_norm(weight: Tensor, delta: Tensor) -> Tensor:
    """Norm of each row of W + delta: (out_features, in_features) twice -> (out_features,)."""
    weight = weight + delta
    return torch.linalg.norm(weight, dim=1).to(weight.dtype)


def dora_linear(
    x: Tensor,
    result: Tensor,
    *,
    base_layer: nn.Linear,
    lora_A: nn.Module,
    lora_B: nn.Module,
    magnitude: Tensor,
    scaling: float,
    dropout: nn.Module,
) -> Tensor:
    """`result`, the base layer's output for x, turned into the DoRA layer's output.

    Shapes: x (..., in_features), magnitude (out_features,), result and output (..., out_features).
    """
    dropped = dropout.training and not isinstance(dropout, nn.Identity)
    x = dropout(x) if dropped else x
    identity = torch.eye(base_layer.in_features, device=x.device, dtype=x.dtype)
    lora_weight = lora_B(lora_A(identity)).T.to(x.dtype)  # (in, in) -> (in, out) -> (out, in)
    weight = base_layer.weight.to(x.dtype)
    norm = weight_norm(weight, scaling * lora_weight.detach()).detach()
    scale = (magnitude / norm).view(1, -1)
    lora_result = lora_B(lora_A(x))
    if dropped:
        # The base output in `result` saw x without dropout; the direction must see the same x as A.
        base_result = F.linear(x, weight)
    else:
        base_result = result if base_layer.bias is None else result - base_layer.bias
    return result + ((scale - 1) * base_result + scale * lora_result * scaling)


def dora_embedding(
    after_A: Tensor,
    result: Tensor,
    *,
    base_weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
) -> Tensor:
    """`result`, the base embedding's output, turned into the DoRA embedding's output.

    Shapes: after_A (..., r), lora_A (r, num_embeddings), lora_B (embedding_dim, r), magnitude
        (embedding_dim,).
    """
    lora_weight = (lora_A.T @ lora_B.T).T  # (embedding_dim, num_embeddings)
    norm = weight_norm(base_weight.T, scaling * lora_weight.detach()).detach()
    scale = magnitude / norm
    return scale * result + scale * (after_A @ lora_B.T) * scaling


def dora_merged_weight(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """m * (W + delta) / ||W + delta||, (out_features, in_features)."""
    scale = magnitude / weight_norm(weight, delta)
    return scale.view(-1, 1) * (weight + delta)
