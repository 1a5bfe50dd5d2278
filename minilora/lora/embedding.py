"""The equation for embeddings: a low-rank update of all rows, or some rows trained in full."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.lora import variants


class LoRAEmbedding(nn.Module):
    """A frozen embedding plus, for each active adapter, a low-rank update.

        y = E[ids] + scaling * A^T[ids] B^T

    Shapes: ids (...), E (num_embeddings, embedding_dim), A (r, num_embeddings), B (embedding_dim,
    r), y (..., embedding_dim). A starts at zero and B normal, the other way round than in a linear
    layer. As in PEFT, `lora_dropout` has no effect here: ids cannot be dropped.

    Source: peft 0.21 `lora.Embedding`, after microsoft/LoRA `loralib.Embedding`.
    """

    def __init__(self, base_layer: nn.Embedding) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        self.lora_magnitude_vector = nn.ParameterDict()  # DoRA only: m, (embedding_dim,)
        self.scaling: dict[str, float] = {}
        self.active_adapters: tuple[str, ...] = ()
        self.unmerged: dict[str, nn.Parameter] | None = None

    def create_adapter(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        use_rslora: bool,
    ) -> None:
        """Add the parameters of one adapter, drawing from torch's global generator as PEFT does: A,
        then B.
        """
        num_embeddings, embedding_dim = self.base_layer.weight.shape
        self.lora_embedding_A[adapter_name] = nn.Parameter(torch.randn(r, num_embeddings))
        self.lora_embedding_B[adapter_name] = nn.Parameter(torch.randn(embedding_dim, r))
        self.scaling[adapter_name] = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r

    def forward(self, ids: Tensor) -> Tensor:
        result = self.base_layer(ids)  # (...) -> (..., embedding_dim)
        if self.unmerged is not None:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.lora_embedding_A:
                result = self.update(name, ids, result)
        return result.to(dtype)

    def update(self, name: str, ids: Tensor, result: Tensor) -> Tensor:
        """`result` (the base layer's output for ids) plus what adapter `name` adds to it."""
        lora_A, lora_B = self.lora_embedding_A[name], self.lora_embedding_B[name]
        after_A = F.embedding(
            ids, lora_A.T, padding_idx=self.base_layer.padding_idx
        )  # (...) -> (..., r)
        if name in self.lora_magnitude_vector:
            return variants.dora_embedding(
                after_A,
                result,
                base_weight=self.base_layer.weight,
                lora_A=lora_A,
                lora_B=lora_B,
                magnitude=self.lora_magnitude_vector[name],
                scaling=self.scaling[name],
            )
        return (
            result + (after_A @ lora_B.T) * self.scaling[name]
        )  # (..., r) -> (..., embedding_dim)

    def delta_weight(self, name: str) -> Tensor:
        """scaling * (B A)^T, the change adapter `name` makes to E: (num_embeddings, embedding_dim)."""
        return (self.lora_embedding_B[name] @ self.lora_embedding_A[name]).T * self.scaling[name]

    def merged_parameters(
        self, name: str, weight: Tensor, bias: None = None
    ) -> tuple[Tensor, None]:
        """`weight` with adapter `name` folded in, in its own dtype (an embedding has no bias)."""
        delta = self.delta_weight(name)
        if name in self.lora_magnitude_vector:
            # The norm of an embedding runs over its columns, the transpose of a linear layer's
            # rows.
            merged = variants.dora_merged_weight(
                weight.T, delta.T, self.lora_magnitude_vector[name]
            ).T
        else:
            merged = weight + delta.to(weight.dtype)
        return merged.to(weight.dtype).contiguous(), bias

    def adapter_parameters(self, name: str) -> dict[str, Tensor]:
        """The trainable tensors of adapter `name` under PEFT's file names (no `.weight` here)."""
        if name not in self.lora_embedding_A:
            return {}
        found: dict[str, Tensor] = {
            "lora_embedding_A": self.lora_embedding_A[name],
            "lora_embedding_B": self.lora_embedding_B[name],
        }
        if name in self.lora_magnitude_vector:
            found["lora_magnitude_vector"] = self.lora_magnitude_vector[name]
        return found

    def convert_adapter(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        """Move adapter `name` to a device and dtype."""
        for per_adapter in (
            self.lora_embedding_A,
            self.lora_embedding_B,
            self.lora_magnitude_vector,
        ):
            if name in per_adapter:
                per_adapter[name] = nn.Parameter(per_adapter[name].detach().to(device, dtype))

    def has_adapter(self, name: str) -> bool:
        """Whether adapter `name` adapts this layer."""
        return name in self.lora_embedding_A

    def remove_adapter(self, name: str) -> None:
        """Forget adapter `name`; a layer without it is left as it is."""
        for per_adapter in (
            self.lora_embedding_A,
            self.lora_embedding_B,
            self.lora_magnitude_vector,
            self.scaling,
        ):
            if name in per_adapter:
                del per_adapter[name]

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight


class TrainableTokens(nn.Module):
    """A frozen embedding of which, for each active adapter, some rows are trained in full.

        y = E'[ids],    E' = E with the adapter's rows in place of its own

    Shapes: ids (...), E (num_embeddings, embedding_dim), rows (n, embedding_dim), y (...,
    embedding_dim). The rows start as E's own. Source: peft 0.21 `TrainableTokensLayer`.
    """

    def __init__(self, base_layer: nn.Embedding) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.trainable_tokens_delta = nn.ParameterDict()  # PEFT's name; the rows, not differences
        self.token_indices: dict[str, list[int]] = {}
        self.active_adapters: tuple[str, ...] = ()
        self.unmerged: dict[str, nn.Parameter] | None = None

    def create_adapter(self, adapter_name: str, indices: list[int]) -> None:
        """Add the rows of one adapter. Draws nothing."""
        rows = self.base_layer.weight.detach()[indices]
        # Trained in float32 over a bfloat16 embedding, as PEFT does.
        self.trainable_tokens_delta[adapter_name] = nn.Parameter(
            rows.to(torch.promote_types(rows.dtype, torch.float32))
        )
        self.token_indices[adapter_name] = indices

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.active_weight(), padding_idx=self.base_layer.padding_idx)

    def active_weight(self) -> Tensor:
        """E', (num_embeddings, embedding_dim); E itself where nothing is active, or all is merged."""
        weight: Tensor = self.base_layer.weight
        for name in self.active_adapters:
            if self.has_adapter(name) and self.unmerged is None:
                weight, _ = self.merged_parameters(name, weight)
        return weight

    def merged_parameters(
        self, name: str, weight: Tensor, bias: None = None
    ) -> tuple[Tensor, None]:
        """`weight` with adapter `name`'s rows in place, in its own dtype."""
        index = torch.tensor(self.token_indices[name], device=weight.device)
        return weight.index_copy(0, index, self.trainable_tokens_delta[name].to(weight)), bias

    def adapter_parameters(self, name: str) -> dict[str, Tensor]:
        """The trainable tensor of adapter `name` under PEFT's file name."""
        if not self.has_adapter(name):
            return {}
        return {"token_adapter.trainable_tokens_delta": self.trainable_tokens_delta[name]}

    def has_adapter(self, name: str) -> bool:
        """Whether adapter `name` adapts this layer."""
        return name in self.trainable_tokens_delta

    def remove_adapter(self, name: str) -> None:
        """Forget adapter `name`; a layer without it is left as it is."""
        if self.has_adapter(name):
            del self.trainable_tokens_delta[name], self.token_indices[name]

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight


class TiedOutput(nn.Module):
    """A masked language model's output layer, which shares its weight with an embedding some of whose
    rows are trained: it reads the same rows.

        y = E' x + b,    E' as in `TrainableTokens`

    Shapes: x (..., embedding_dim), b (num_embeddings,), y (..., num_embeddings). It has no tensors
    of its own, on disk neither. PEFT 0.21's tied `TrainableTokensLayer` leaves b out; here it stays.
    """

    def __init__(self, base_layer: nn.Linear, tokens: TrainableTokens) -> None:
        super().__init__()
        self.base_layer = base_layer
        # In a tuple, so that the embedding's parameters are not registered a second time.
        self._tokens = (tokens,)
        self.active_adapters: tuple[str, ...] = ()
        self.unmerged: dict[str, nn.Parameter] | None = None

    @property
    def tokens(self) -> TrainableTokens:
        """The embedding whose rows are read."""
        return self._tokens[0]

    def forward(self, x: Tensor) -> Tensor:
        # (..., embedding_dim) -> (..., num_embeddings)
        return F.linear(x, self.tokens.active_weight(), self.base_layer.bias)

    def merged_parameters(
        self, name: str, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`weight` with adapter `name`'s rows in place; the bias as it is."""
        return self.tokens.merged_parameters(name, weight)[0], bias

    def adapter_parameters(self, name: str) -> dict[str, Tensor]:
        """None: the rows belong to the embedding."""
        return {}

    def has_adapter(self, name: str) -> bool:
        """Whether adapter `name` trains rows of the embedding."""
        return self.tokens.has_adapter(name)

    def remove_adapter(self, name: str) -> None:
        """Nothing to forget: the rows belong to the embedding."""

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias
