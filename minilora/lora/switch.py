"""Which adapters are in force: set, delete, disable for a while."""

import contextlib
from collections.abc import Iterator

from torch import nn

from minilora.errors import MiniloraError
from minilora.lora.inject import adapters_of, plain_values, remove_adapter, set_active
from minilora.lora.merge import check_not_merged


def set_adapter(model: nn.Module, adapter_name: str | list[str]) -> None:
    """Put one adapter, or several at once, in force; their parameters become trainable, all others
    frozen.

    Several updates add up. At most one of them may carry `modules_to_save`, because a head cannot
    be two heads.

    Raises:
        MiniloraError: no such adapter, two heads, or an adapter is merged into the weights.
    """
    adapters = adapters_of(model)
    names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
    _check_known(names, adapters.configs)
    check_not_merged(model, "switch adapters")
    with_heads = [name for name in names if adapters.configs[name].modules_to_save]
    if len(with_heads) > 1:
        raise MiniloraError(
            f"adapters {with_heads} each bring their own modules_to_save: only one can be active"
        )
    set_active(model, names)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out. If it was active, the first one left becomes active; with none left, the
    model is plain.

    Raises:
        MiniloraError: no such adapter, or it is merged into the weights.
    """
    adapters = adapters_of(model)
    _check_known((adapter_name,), adapters.configs)
    check_not_merged(model, "delete an adapter")
    remove_adapter(model, adapter_name)
    if adapters.configs:
        remaining = tuple(name for name in adapters.active if name != adapter_name)
        set_active(model, remaining or (next(iter(adapters.configs)),))


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, the model is bitwise the plain one, head, biases and pissa's weights included.

    Afterwards it is exactly as found: what was active is active and what was frozen is frozen, also
    if the body raises. (PEFT's makes frozen adapters trainable on the way out, peft#3447, and
    leaves a merged model unmerged.)

    Raises:
        MiniloraError: an adapter is merged into the weights.
    """
    adapters = adapters_of(model)
    check_not_merged(model, "disable adapters")
    active = adapters.active
    requires_grad = [(p, p.requires_grad) for p in model.parameters()]
    set_active(model, ())
    try:
        with plain_values(model):
            yield
    finally:
        set_active(model, active)
        for parameter, was_trainable in requires_grad:
            parameter.requires_grad_(was_trainable)


def _check_known(names: tuple[str, ...], known: dict) -> None:
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise MiniloraError(
            f"no adapter named {unknown or 'nothing'}; this model has {', '.join(known)}"
        )
