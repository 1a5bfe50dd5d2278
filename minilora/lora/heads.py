"""Modules trained in full beside LoRA, usually the task's head."""

from typing import Any

import torch
from torch import nn

from minilora.lora.layer import Wrapper

# task_type -> names under which a head trained from scratch may hang. "score" is other families'
# name for it; PEFT lists both and so do we, since the list ends up in the file.
TASK_HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}


class ModulesToSave(Wrapper):
    """A module and, for each adapter that trains it in full, a copy, which takes its place."""

    def shown(self) -> nn.Module:
        """The active adapter's copy; without one, the original."""
        return [self.base_layer, *self.called(self.active_adapters)][-1]

    def output(self, adapters: list[Any], base: Any, *args: Any, **kwargs: Any) -> Any:
        return [self.base_layer, *adapters][-1](*args, **kwargs)


def train_heads_in_float32(model: nn.Module) -> None:
    """Raise every module trained in full to float32, and what goes into it.

    In the base's dtype a step of AdamW is often too small to be added. A head's output stays
    float32; another module's goes on in the base's dtype.
    """
    heads = {name for names in TASK_HEADS.values() for name in names}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSave):
            module.adapters.float()
            module.register_forward_pre_hook(_to_float32)
            if name.rpartition(".")[2] not in heads:
                module.register_forward_hook(_to_base_dtype)


def _to_float32(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # An embedding's ids stay integers.
    return tuple(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)


def _to_base_dtype(module: Any, _: Any, result: Any) -> Any:
    return result.to(next(module.base_layer.parameters()).dtype)
