"""The first values of A and B, drawn as PEFT draws them: same seed, same bits, same generator
afterwards.

Each function takes a layer whose `create_adapter` has just run and gives adapter `name` its values.
Only pissa and olora also change the base weight, by what the fresh update already adds; the caller
keeps the original.

Source: peft 0.21 `tuners/lora/layer.py`, `LoraLayer.update_layer` and the `*_init` methods.
"""

import math

import torch
from torch import nn

from minilora.errors import MiniloraError
from minilora.lora.embedding import LoRAEmbedding
from minilora.lora.layer import LoRALinear
from minilora.lora.variants import weight_norm


def initialise_linear(layer: LoRALinear, name: str, init: bool | str) -> None:
    """Give A and B of adapter `name` their first values.

    Args:
        init: `LoraConfig.init_lora_weights`.

    Raises:
        MiniloraError: orthogonal with an odd r.
    """
    if init is True:
        _kaiming(layer, name)
    elif init == "gaussian":
        _gaussian(layer, name)
    elif init == "orthogonal":
        _orthogonal(layer, name)
    elif init == "olora":
        _olora(layer, name)
    elif isinstance(init, str):
        _pissa(
            layer, name, niter=int(init.removeprefix("pissa_niter_")) if init != "pissa" else None
        )
    # False: torch's default draw for both, so that the adapter is not a no-op. Only tests want
    # this.


def initialise_embedding(layer: LoRAEmbedding, name: str, init: bool | str) -> None:
    """Give A (zeros) and B (standard normal) of adapter `name` their first values.

    Raises:
        MiniloraError: an initialisation that needs a linear layer.
    """
    if init is False:
        return
    if init not in (True, "gaussian"):
        raise MiniloraError(
            f"init_lora_weights={init!r} is for linear layers; an embedding takes true, false or gaussian"
        )
    with torch.no_grad():
        nn.init.zeros_(layer.lora_embedding_A[name])
        nn.init.normal_(layer.lora_embedding_B[name])


def initialise_magnitude(layer: LoRALinear | LoRAEmbedding, name: str) -> None:
    """Add DoRA's magnitude, starting at the norm of W + s B A: (out_features,) or (embedding_dim,)."""
    with torch.no_grad():
        if isinstance(layer, LoRALinear):
            A, B = layer.factors(name)
            norm = weight_norm(layer.base_layer.weight, layer.scaling[name] * (B.weight @ A.weight))
        else:
            product = layer.lora_embedding_B[name] @ layer.lora_embedding_A[name]
            norm = weight_norm(layer.base_layer.weight.T, layer.scaling[name] * product)
    layer.lora_magnitude_vector[name] = nn.Parameter(norm)


def _kaiming(layer: LoRALinear, name: str) -> None:
    # a = sqrt(5) is nn.Linear's own default, U(-1/sqrt(in), 1/sqrt(in)), as in microsoft/LoRA. It
    # is A's second draw (`create_adapter` made the first): PEFT draws twice, too.
    A, B = layer.factors(name)
    nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
    _zero(B)


def _gaussian(layer: LoRALinear, name: str) -> None:
    A, B = layer.factors(name)
    nn.init.normal_(A.weight, std=1 / A.out_features)
    _zero(B)


def _zero(B: nn.Linear) -> None:
    for parameter in B.parameters():
        nn.init.zeros_(parameter)


@torch.no_grad()
def _orthogonal(layer: LoRALinear, name: str) -> None:
    # A and B from the odd and even rows of one orthogonal matrix: B A = 0, though neither is zero.
    A, B = layer.factors(name)
    r = A.out_features
    if r % 2 != 0:
        raise MiniloraError(f"init_lora_weights='orthogonal' needs an even r, not {r}")
    Q, _ = torch.linalg.qr(torch.randn(r, r))
    A_values = torch.randn(A.in_features, r // 2).mm(Q[0::2]).T / 10.0  # (r, in)
    B_values = torch.randn(r // 2, B.out_features).T.mm(Q[1::2]) / 10.0  # (out, r)
    A.weight = nn.Parameter(A_values.contiguous())
    B.weight = nn.Parameter(B_values.contiguous())


@torch.no_grad()
def _olora(layer: LoRALinear, name: str) -> None:
    # arXiv:2406.01775: B, A from the QR decomposition of W, and W reduced by their product.
    A, B = layer.factors(name)
    r = A.out_features
    weight = layer.base_layer.weight.to(torch.float32)
    Q, R = torch.linalg.qr(weight)
    A.weight.data = R[:r].contiguous()
    B.weight.data = Q[:, :r].contiguous()
    _reduce_base(layer, name, weight)


@torch.no_grad()
def _pissa(layer: LoRALinear, name: str, niter: int | None) -> None:
    # arXiv:2404.02948: the r principal components of W go into B A, the residual stays in the base.
    A, B = layer.factors(name)
    r = A.out_features
    weight = layer.base_layer.weight.to(torch.float32)
    if niter is None:
        V, S, Uh = torch.linalg.svd(weight, full_matrices=False)
        V, S, Uh = V[:, :r], S[:r], Uh[:r]
    else:
        V, S, U = torch.svd_lowrank(weight, r, niter=niter)  # draws from the global generator
        Uh = U.t()
    root = torch.diag(torch.sqrt(S / layer.scaling[name]))
    A.weight.data = root @ Uh  # (r, in)
    B.weight.data = V @ root  # (out, r)
    _reduce_base(layer, name, weight)


def _reduce_base(layer: LoRALinear, name: str, weight: torch.Tensor) -> None:
    # In this association, (s B) A, as in PEFT: (B A) s would round differently.
    A, B = layer.factors(name)
    base = layer.base_layer.weight
    base.data = (weight - layer.scaling[name] * B.weight @ A.weight).to(base.dtype)
