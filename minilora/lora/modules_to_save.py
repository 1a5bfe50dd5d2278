"""Modules trained in full beside LoRA, usually the task's head."""

from torch import Tensor, nn


class ModulesToSave(nn.Module):
    """A module trained in full beside LoRA, usually the task's head: the original, and a copy for
    each adapter.

    `forward` is the active adapter's copy; with no active copy, the original. The two children are
    called as in PEFT's `ModulesToSaveWrapper`; on disk the copy takes the original's place and
    name.
    """

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.active_adapters: tuple[str, ...] = ()

    def active_module(self) -> nn.Module:
        """The module whose forward is in force."""
        return self.module_for(self.active_adapters)

    def module_for(self, names: tuple[str, ...]) -> nn.Module:
        """The copy of the last of the adapters `names` that has one; with none, the original."""
        copies = [name for name in names if name in self.modules_to_save]
        return self.modules_to_save[copies[-1]] if copies else self.original_module

    def forward(self, *args, **kwargs):
        return self.active_module()(*args, **kwargs)

    def adapter_parameters(self, name: str) -> dict[str, Tensor]:
        """The trainable tensors of adapter `name` under the original module's names."""
        if name not in self.modules_to_save:
            return {}
        return dict(self.modules_to_save[name].named_parameters())

    def remove_adapter(self, name: str) -> None:
        """Forget adapter `name`; a wrapper without it is left as it is."""
        if name in self.modules_to_save:
            del self.modules_to_save[name]

    @property
    def weight(self) -> Tensor:
        return self.active_module().weight  # pyright: ignore[reportReturnType]
