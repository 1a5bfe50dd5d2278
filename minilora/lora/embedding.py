"""LoRA for embeddings: a low-rank update of all rows, or some rows trained in full."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from minilora.lora.layer import Magnitude, Wrapper


class EmbeddingLora(nn.Module):
    """One adapter of one embedding: A (r, num_embeddings), B (embedding_dim, r)."""

    def __init__(self, base_layer: nn.Embedding, r: int, scaling: float) -> None:
        super().__init__()
        self.scaling = scaling
        # Parameters, no layers, in PEFT's order: A, B, magnitude.
        self.lora_embedding_A = nn.Parameter(torch.randn(r, base_layer.num_embeddings))
        self.lora_embedding_B = nn.Parameter(torch.randn(base_layer.embedding_dim, r))
        self.lora_magnitude_vector: Magnitude | None = None  # (embedding_dim,), with use_dora

    def delta_weight(self) -> Tensor:
        """scaling * (B A)^T, the change to E: (num_embeddings, embedding_dim)."""
        return (self.lora_embedding_B @ self.lora_embedding_A).T * self.scaling


class LoRAEmbedding(Wrapper):
    """A frozen embedding with its adapters: y = E[ids] + scaling * A^T[ids] B^T for each.

    Shapes: ids (...), y (..., embedding_dim). A starts at zero and B normal, the other way round
    than in a linear layer. As in PEFT, `lora_dropout` has no effect: ids cannot be dropped.
    Source: peft 0.21 `lora.Embedding`, after microsoft/LoRA `loralib.Embedding`.
    """

    def update(self, lora: EmbeddingLora, ids: Tensor, base: Tensor, result: Tensor) -> Tensor:
        """`result` plus what `lora` adds to `base`, the base layer's output for ids."""
        A, B, magnitude = lora.lora_embedding_A, lora.lora_embedding_B, lora.lora_magnitude_vector
        after_A = F.embedding(ids, A.T, padding_idx=self.base_layer.padding_idx)  # (..., r)
        added = after_A @ B.T  # (..., embedding_dim)
        if magnitude is None:
            return result + added * lora.scaling
        scale = magnitude.scale(self.base_layer.weight, lora.scaling * (A.T @ B.T))
        return (result - base) + (scale * base + scale * added * lora.scaling)


class TokenRows(nn.Module):
    """One adapter's own rows of an embedding, trained in full: (n, embedding_dim)."""

    token_indices: Tensor

    def __init__(self, base_layer: nn.Embedding, indices: list[int]) -> None:
        super().__init__()
        rows = base_layer.weight.detach()[indices]
        self.trainable_tokens_delta = nn.Parameter(rows)  # PEFT's name; no differences
        places = torch.tensor(indices, device=rows.device)
        self.register_buffer("token_indices", places, persistent=False)


class TrainableTokens(Wrapper):
    """A frozen embedding of which, for each active adapter, some rows are trained in full.

    Shapes: ids (...), output (..., embedding_dim). Source: peft 0.21 `TrainableTokensLayer`.
    """

    def output(self, adapters: list[TokenRows], base: Any, x: Tensor) -> Tensor:
        weight = self.weight
        for rows in adapters:
            weight = self.merged(rows, weight, weight)
        return functional_call(self.base_layer, {"weight": weight}, x)

    def merged(self, adapter: TokenRows, weight: Tensor, base: Tensor) -> Tensor:
        """`weight` with the adapter's rows in place of its own, in its dtype."""
        rows = adapter.trainable_tokens_delta.to(weight.dtype)
        return weight.index_copy(0, adapter.token_indices, rows)


class TiedOutput(TrainableTokens):
    """A masked language model's output layer, which shares its weight with `TrainableTokens`.

    (..., embedding_dim) -> (..., num_embeddings), with the same rows; on disk it has no tensors.
    """

    def __init__(self, base_layer: nn.Linear, tokens: TrainableTokens) -> None:
        super().__init__(base_layer)
        # In a tuple, so that the embedding's parameters are not registered a second time.
        self._tokens = (tokens,)
        del self.adapters  # they are the embedding's

    def shown(self) -> nn.Module:
        return self._tokens[0]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias
