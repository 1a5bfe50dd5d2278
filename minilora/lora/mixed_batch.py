"""One batch whose rows use different adapters.

Every adapted layer computes its base layer once for the whole batch; then each adapter adds its
update to its own rows, or puts its own head's output there.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import MiniloraError
from minilora.lora.adapters import adapter_layers, adapters_of
from minilora.lora.layer import Wrapper
from minilora.lora.targets import check_known, unwrapped

BASE = "__base__"  # PEFT's name for a row without an adapter


@contextlib.contextmanager
def adapter_names(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Inside, row i of every batch goes through adapter `names[i]`; "__base__" is the plain model.

    Which adapters are active does not matter, unless all are disabled. A row's output is that of a
    batch with its adapter alone, up to float rounding. Gradients reach each adapter that is
    trainable. (Not PEFT's keyword argument: models swallow an unknown one without a word.)
    """
    model, adapters = unwrapped(model), adapters_of(model, "mix adapters", even="disabled")
    check_known([*adapters.configs, BASE], names)
    if adapters.originals:
        problem = "an adapter changes the base weights (bias, pissa or olora): use set_adapter"
        raise MiniloraError(f"{problem}; rows of one batch cannot have different ones")
    places = torch.arange(len(names))
    rows = {name: places[[other == name for other in names]] for name in names}
    # Inside another such block a layer has a forward of its own already.
    outer = {layer: vars(layer).get("forward") for _, layer in adapter_layers(model)}
    handle = model.register_forward_pre_hook(partial(_check_batch, len(names)), with_kwargs=True)
    for layer in outer:
        layer.forward = partial(_mixed, layer, rows)
    try:
        yield
    finally:
        handle.remove()
        for layer, forward in outer.items():
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _check_batch(count: int, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    adapters_of(model, "mix adapters", even="disabled")
    inputs = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
    batch = next((x for x in inputs if isinstance(x, Tensor)), None)
    if batch is None or len(batch) != count:
        found = "no batch of tensors" if batch is None else f"a batch of {len(batch)} rows"
        raise MiniloraError(f"adapter_names has {count} names and the model was given {found}")


def _mixed(layer: Wrapper, rows: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """The base layer's output, and in each adapter's rows what they are with that adapter."""
    base = layer.base_layer(*args, **kwargs)
    if not layer.active_adapters:  # disabled
        return base
    if not isinstance(base, Tensor):
        kind = type(layer.base_layer).__name__
        raise MiniloraError(f"a {kind} returns no tensor: it cannot be mixed by rows")
    count, batch = sum(map(len, rows.values())), len(base)

    def own(indices: Tensor, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != batch:
            return value
        # One row may be for all, as position ids are.
        return value.expand(count, *value.shape[1:])[indices.to(value.device)]

    result = base.expand(count, *base.shape[1:])
    for name, indices in rows.items():
        if adapters := layer.called([name]):
            inputs = [own(indices, value) for value in (base, *args)]
            named = {key: own(indices, value) for key, value in kwargs.items()}
            updated = layer.output(adapters, *inputs, **named)
            result = result.to(updated.dtype).index_copy(0, indices.to(base.device), updated)
    return result
