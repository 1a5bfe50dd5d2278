"""One batch whose rows use different adapters.

Every adapted layer computes its base layer once for the whole batch; then each adapter adds its
update to its own rows. A head, of which each adapter has its own, is computed per adapter.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from minilora.errors import MiniloraError
from minilora.lora.adapters import adapter_layers, adapters_of
from minilora.lora.embedding import LoRAEmbedding
from minilora.lora.heads import ModulesToSave
from minilora.lora.layer import LoRALinear, Wrapper
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
    layers = [layer for _, layer in adapter_layers(model)]
    outer = [vars(layer).get("forward") for layer in layers]  # inside another such block
    check = partial(_check_batch, len(names))
    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    for layer in layers:
        forward = _mixed_head if isinstance(layer, ModulesToSave) else _mixed_layer
        layer.forward = partial(forward, layer, rows)
    try:
        yield
    finally:
        handle.remove()
        for layer, forward in zip(layers, outer, strict=True):
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


def _mixed_layer(layer: Wrapper, rows: dict[str, Tensor], x: Tensor) -> Tensor:
    result = layer.base_layer(x)
    dtype, count = result.dtype, sum(map(len, rows.values()))
    if len(x) == 1 != count:  # one row for all, as position ids are
        x, result = (t.expand(count, *t.shape[1:]) for t in (x, result))
    for name, indices in rows.items():
        if name in layer.adapters and layer.active_adapters:  # none is active while disabled
            indices = indices.to(x.device)
            lora: Any = layer.adapters[name]
            if isinstance(layer, LoRALinear | LoRAEmbedding):
                base = result[indices]
                updated = layer.update(lora, x[indices], base, base)
            else:
                weight, _ = lora.merged(layer.weight, None, layer.weight)
                updated = functional_call(layer.base_layer, {"weight": weight}, x[indices])
            result = result.to(updated.dtype).index_copy(0, indices, updated)
    return result.to(dtype)


def _mixed_head(head: ModulesToSave, rows: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if not head.active_adapters:
        return head.base_layer(*args, **kwargs)
    order, outputs = torch.cat(list(rows.values())), []

    def own(indices: Tensor, value: Any) -> Any:
        is_batch = isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(order)
        return value[indices.to(value.device)] if is_batch else value

    for name, indices in rows.items():
        named = {key: own(indices, value) for key, value in kwargs.items()}
        outputs.append(head.module_for((name,))(*[own(indices, x) for x in args], **named))
    if not all(isinstance(output, Tensor) for output in outputs):
        kind = type(head.base_layer).__name__
        raise MiniloraError(f"a {kind} returns no tensor: it cannot be mixed by rows")
    return torch.cat(outputs)[torch.argsort(order).to(outputs[0].device)]
