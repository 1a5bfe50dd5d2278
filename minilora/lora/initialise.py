"""A fresh adapter, drawn as PEFT draws it: same seed, same bits, same generator afterwards.

Source: peft 0.21 `tuners/lora/layer.py`, `LoraLayer.update_layer` and the `*_init` methods.
"""

import math

import torch
from torch import Tensor, nn

from minilora.errors import MiniloraError
from minilora.lora.config import LoraConfig
from minilora.lora.dora import Magnitude, weight_norm
from minilora.lora.embedding import EmbeddingLora
from minilora.lora.layer import Lora
from minilora.lora.targets import pattern_value


@torch.no_grad()
def new_lora(base: nn.Module, name: str, config: LoraConfig) -> Lora | EmbeddingLora:
    """An adapter for the module `base`, called `name`.

    Only pissa and olora change the base weight, by what the fresh update already adds; the caller
    keeps the original.
    """
    r = int(pattern_value(config.rank_pattern, name, config.r))
    lora_alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    # rsLoRA: arXiv:2312.03732
    scaling = lora_alpha / math.sqrt(r) if config.use_rslora else lora_alpha / r
    if isinstance(base, nn.Linear):
        lora = Lora(base, r, scaling, config.lora_dropout, config.lora_bias)
        _initialise_linear(lora, base, config.init_lora_weights)
    else:
        assert isinstance(base, nn.Embedding)
        if config.lora_bias:
            raise MiniloraError(f"lora_bias=True is for linear layers; {name!r} is an embedding")
        lora = EmbeddingLora(base, r, scaling)
        _initialise_embedding(lora, config.init_lora_weights)
    # PEFT's order: to the base layer's device and dtype, then DoRA's magnitude, then up to float32.
    # Over a bfloat16 base the fresh values have thus been rounded to bfloat16 once.
    lora.to(base.weight.device, base.weight.dtype)
    # The magnitude starts at the norm of W + s B A, so that the layer starts as it is without it.
    if config.use_dora and isinstance(lora, Lora):
        lora.lora_magnitude_vector = Magnitude(weight_norm(base.weight, lora.delta_weight()))
    if config.use_dora and isinstance(lora, EmbeddingLora):
        norm = weight_norm(base.weight.T, lora.delta_weight().T)
        lora.lora_magnitude_vector = nn.Parameter(norm)
    return lora.float() if base.weight.dtype in (torch.float16, torch.bfloat16) else lora


def _initialise_embedding(lora: EmbeddingLora, init: bool | str) -> None:
    if init not in (True, False, "gaussian"):
        raise MiniloraError(
            f"init_lora_weights={init!r} is for linear layers; "
            "an embedding takes true, false or gaussian"
        )
    if init is not False:
        nn.init.zeros_(lora.lora_embedding_A)
        nn.init.normal_(lora.lora_embedding_B)


def _initialise_linear(lora: Lora, base: nn.Linear, init: bool | str) -> None:
    A, B = lora.lora_A.weight, lora.lora_B.weight
    if init is False:
        return  # torch's default draw for both: the adapter is not a no-op, which only tests want
    if init == "orthogonal":
        A.data, B.data = _orthogonal(len(A), base.in_features, base.out_features)
    elif init is True or init == "gaussian":
        if init is True:
            # a = sqrt(5) is nn.Linear's own default, U(-1/sqrt(in), 1/sqrt(in)), as in
            # microsoft/LoRA (the paper says Gaussian). PEFT draws A a second time, too.
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        else:
            nn.init.normal_(A, std=1 / len(A))
        for parameter in lora.lora_B.parameters():
            nn.init.zeros_(parameter)
    else:
        weight = base.weight.to(torch.float32)
        if init == "olora":
            A.data, B.data = _olora(weight, len(A))
        else:
            A.data, B.data = _pissa(weight, len(A), lora.scaling, init)
        # In this association, (s B) A, as in PEFT: (B A) s would round differently.
        base.weight.data = (weight - lora.scaling * B @ A).to(base.weight.dtype)


def _orthogonal(r: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    # A and B from the odd and even rows of one orthogonal matrix: B A = 0, though neither is zero.
    if r % 2 != 0:
        raise MiniloraError(f"init_lora_weights='orthogonal' needs an even r, not {r}")
    Q, _ = torch.linalg.qr(torch.randn(r, r))
    A = torch.randn(in_features, r // 2).mm(Q[0::2]).T / 10.0
    B = torch.randn(r // 2, out_features).T.mm(Q[1::2]) / 10.0
    return A.contiguous(), B.contiguous()


def _olora(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    # arXiv:2406.01775: B, A from the QR decomposition of W, and W reduced by their product.
    Q, R = torch.linalg.qr(weight)
    return R[:r].contiguous(), Q[:, :r].contiguous()


def _pissa(weight: Tensor, r: int, scaling: float, init: str) -> tuple[Tensor, Tensor]:
    # arXiv:2404.02948: the r principal components of W go into B A, the residual stays in the base.
    if init == "pissa":
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        U, S, Vh = U[:, :r], S[:r], Vh[:r]
    else:
        niter = int(init.removeprefix("pissa_niter_"))
        U, S, V = torch.svd_lowrank(weight, r, niter=niter)  # draws from the global generator
        Vh = V.t()
    root = torch.diag(torch.sqrt(S / scaling))
    return root @ Vh, U @ root
