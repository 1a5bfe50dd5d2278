"""Modules trained in full beside LoRA, usually the task's head."""

from typing import Any

from torch import Tensor, nn

# task_type -> names under which a head trained from scratch may hang. "score" is other families'
# name for it; PEFT lists both and so do we, since the list ends up in the file.
TASK_HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}


class ModulesToSave(nn.Module):
    """A module and, for each adapter that trains it in full, a copy, which takes its place."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters: dict[str, nn.Module] = nn.ModuleDict()  # pyright: ignore[reportAttributeAccessIssue]
        self.active_adapters: tuple[str, ...] = ()

    def module_for(self, names: tuple[str, ...]) -> nn.Module:
        """The copy of the last of the adapters `names` that has one; with none, the original."""
        copies = [self.adapters[name] for name in names if name in self.adapters]
        return [self.base_layer, *copies][-1]

    def forward(self, *args, **kwargs):
        return self.module_for(self.active_adapters)(*args, **kwargs)

    @property
    def weight(self) -> Tensor:
        return self.module_for(self.active_adapters).weight  # pyright: ignore[reportReturnType]


def train_heads_in_float32(model: nn.Module) -> None:
    """Raise every module trained in full to float32, and what goes into it.

    A head's output stays float32; another module's goes on in the base's dtype. (PEFT leaves such
    modules in the base's dtype, in which a step of AdamW is often too small to be added.)
    """
    heads = {name for names in TASK_HEADS.values() for name in names}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSave):
            for trained in module.adapters.values():
                trained.float()
            module.register_forward_pre_hook(_arguments_to_float32)
            if name.rpartition(".")[2] not in heads:
                module.register_forward_hook(_result_to_base_dtype)


def _arguments_to_float32(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(argument.float() for argument in arguments)


def _result_to_base_dtype(module: Any, arguments: tuple[Tensor, ...], result: Tensor) -> Tensor:
    return result.to(next(module.base_layer.parameters()).dtype)
