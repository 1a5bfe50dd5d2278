"""A fresh adapter, drawn as PEFT draws it: same seed, same bits, same generator afterwards.

Source: peft 0.21 `tuners/lora/layer.py`, `LoraLayer.update_layer` and the `*_init` methods.
"""

import math

import torch
from torch import Tensor, nn

from minilora.errors import MiniloraError
from minilora.lora.config import LoraConfig
from minilora.lora.embedding import EmbeddingLora
from minilora.lora.layer import Lora, Magnitude
from minilora.lora.targets import pattern_value


@torch.no_grad()
def new_lora(base: nn.Linear | nn.Embedding, name: str, config: LoraConfig) -> Lora | EmbeddingLora:
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
        if config.lora_bias or config.init_lora_weights not in (True, False, "gaussian"):
            problem = "takes no lora_bias, and init_lora_weights true, false or gaussian"
            raise MiniloraError(f"{name!r} is an embedding, which {problem}")
        lora = EmbeddingLora(base, r, scaling)
        if config.init_lora_weights is not False:
            nn.init.zeros_(lora.lora_embedding_A)
            nn.init.normal_(lora.lora_embedding_B)
    # PEFT's order: to the base layer's device and dtype, then DoRA's magnitude. Over a bfloat16
    # base the fresh values have thus been rounded to bfloat16 once.
    lora.to(base.weight.device, base.weight.dtype)
    if config.use_dora:
        whole = base.weight + lora.delta_weight()
        lora.lora_magnitude_vector = Magnitude(whole, dim=1 if isinstance(lora, Lora) else 0)
    return lora


def _initialise_linear(lora: Lora, base: nn.Linear, init: bool | str) -> None:
    A, B = lora.lora_A.weight, lora.lora_B.weight
    r = len(A)
    if init is False:
        return  # torch's default draw for both: the adapter is not a no-op, which only tests want
    for parameter in lora.lora_B.parameters():
        nn.init.zeros_(parameter)
    if init is True:
        # a = sqrt(5) is nn.Linear's own default, U(-1/sqrt(in), 1/sqrt(in)), as in
        # microsoft/LoRA (the paper says Gaussian). PEFT draws A a second time, too.
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    elif init == "gaussian":
        nn.init.normal_(A, std=1 / r)
    elif init == "orthogonal":
        # From the odd and even rows of one orthogonal matrix: B A = 0, though neither is zero.
        if r % 2 != 0:
            raise MiniloraError(f"init_lora_weights='orthogonal' needs an even r, not {r}")
        Q, _ = torch.linalg.qr(torch.randn(r, r))
        A.data = (torch.randn(base.in_features, r // 2).mm(Q[0::2]).T / 10.0).contiguous()
        B.data = torch.randn(r // 2, base.out_features).T.mm(Q[1::2]) / 10.0
    elif r > (rank := min(base.weight.shape)):
        raise MiniloraError(f"init_lora_weights={init!r} splits a matrix of rank {rank}: r is {r}")
    else:
        weight = base.weight.to(torch.float32)
        A.data, B.data = _principal_part(weight, r, lora.scaling, init)
        # W is reduced by their product: (s B) A, as in PEFT, since (B A) s would round differently.
        base.weight.data = (weight - lora.scaling * B @ A).to(base.weight.dtype)


def _principal_part(weight: Tensor, r: int, scaling: float, init: str) -> tuple[Tensor, Tensor]:
    if init == "olora":  # arXiv:2406.01775: A, B from the QR decomposition of W
        Q, R = torch.linalg.qr(weight)
        return R[:r].contiguous(), Q[:, :r].contiguous()
    # arXiv:2404.02948: the r principal components of W go into B A, the residual stays in the base.
    if init == "pissa":
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        niter = int(init.removeprefix("pissa_niter_"))
        U, S, V = torch.svd_lowrank(weight, r, niter=niter)  # draws from the global generator
        Vh = V.t()
    root = torch.diag(torch.sqrt(S[:r] / scaling))
    return root @ Vh[:r], U[:, :r] @ root
