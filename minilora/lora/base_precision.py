"""The update in the base layer's own precision, and what trains in float32: LoRA over frozen weights of
any dtype, without PEFT's casts and with fewer passes over the output."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.lora.layer import LoRALinear
from minilora.lora.modules_to_save import ModulesToSave
from minilora.lora.targets import TASK_HEADS, is_named


def linear_in_base_precision(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, where a LoRA layer computes its update in x's dtype: W x + b + B (scaling A x).

    `LoRALinear.forward` does as PEFT does: it scales and adds (N, out_features) numbers in passes of
    their own, and over a bfloat16 base raises all of x to float32, and the result, and rounds that.
    Here the r numbers of each row are scaled, the sum is part of the product, and only A and B are
    converted; gradients reach the float32 A and B, and the optimizer never sees a rounded one. DoRA,
    and anything that is no LoRA layer, is called as it is.

    Shapes: x (N, in_features), result (N, out_features).
    """
    if not isinstance(module, LoRALinear) or module.unmerged is not None:
        return module(x)
    names = [name for name in module.active_adapters if module.has_adapter(name)]
    if any(name in module.lora_magnitude_vector for name in names):
        return module(x)
    result = module.base_layer(x)
    for name in names:
        lora_A, lora_B = module.factors(name)
        # (N, in) -> (N, r); scaled here, where there is least to scale
        after_A = F.linear(module.lora_dropout[name](x), lora_A.weight.to(x.dtype))
        after_A = after_A * module.scaling[name]
        result = torch.addmm(result, after_A, lora_B.weight.to(x.dtype).t())
        if lora_B.bias is not None:
            result = result + (lora_B.bias * module.scaling[name]).to(x.dtype)
    return result


def train_modules_in_float32(model: nn.Module) -> None:
    """Raise every module trained in full to float32, and convert what goes into it.

    A head's output stays float32; another module's goes on in the base's dtype. (PEFT leaves such
    modules in the base's dtype.)
    """
    heads = [name for names in TASK_HEADS.values() for name in names]
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSave):
            module.modules_to_save.float()
            module.register_forward_pre_hook(_arguments_to_float32)
            if not is_named(name, heads):
                module.register_forward_hook(_result_to_base_dtype)


def _arguments_to_float32(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(argument.float() for argument in arguments)


def _result_to_base_dtype(
    module: nn.Module, arguments: tuple[Tensor, ...], result: Tensor
) -> Tensor:
    assert isinstance(module, ModulesToSave)
    return result.to(next(module.original_module.parameters()).dtype)
