"""One batch whose rows use different adapters.

Every adapted layer computes its base layer once for the whole batch; then each adapter adds its
update to its own rows. A head, of which each adapter has its own, is computed per adapter.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.errors import MiniloraError
from minilora.lora.adapters import adapter_layers, adapters_of, check_known, check_not_merged
from minilora.lora.embedding import LoRAEmbedding, TiedOutput
from minilora.lora.heads import ModulesToSave
from minilora.lora.layer import LoRALinear
from minilora.lora.targets import AdapterLayer

BASE = "__base__"  # PEFT's name for a row without an adapter


@contextlib.contextmanager
def adapter_names(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Inside, row i of every batch goes through adapter `names[i]`; "__base__" is the plain model.

    Which adapters are active does not matter, unless all are disabled. A row's output is that of a
    batch with its adapter alone, up to float rounding. Gradients reach each adapter that is
    trainable. Afterwards the model is as it was, also if the body raises.

    Not a keyword argument, as PEFT has it: models swallow an unknown one without a word.
    """
    adapters = adapters_of(model)
    check_known([*adapters.configs, BASE], names)
    check_not_merged(model, "mix adapters")
    if adapters.originals:
        raise MiniloraError(
            "an adapter of this model changes its base weights (bias, pissa or olora): rows of one "
            "batch cannot have different ones; use set_adapter"
        )
    places = torch.arange(len(names))
    rows = {name: places[[other == name for other in names]] for name in names}
    with contextlib.ExitStack() as stack:
        _replace_forward(stack, model, partial(_checked_forward, model, model.forward, len(names)))
        for _, layer in adapter_layers(model):
            forward = _mixed_head if isinstance(layer, ModulesToSave) else _mixed_layer
            _replace_forward(stack, layer, partial(forward, layer, rows))
        yield


def _replace_forward(stack: contextlib.ExitStack, module: nn.Module, forward: Callable) -> None:
    if "forward" in vars(module):  # inside another such block
        stack.callback(setattr, module, "forward", module.forward)
    else:
        stack.callback(delattr, module, "forward")
    module.forward = forward


def _checked_forward(model: nn.Module, forward: Callable, count: int, *args: Any, **kwargs: Any):
    check_not_merged(model, "mix adapters")
    inputs = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
    batch = next((x for x in inputs if isinstance(x, Tensor)), None)
    if batch is None or len(batch) != count:
        found = "no batch of tensors" if batch is None else f"a batch of {len(batch)} rows"
        raise MiniloraError(f"adapter_names has {count} names and the model was given {found}")
    return forward(*args, **kwargs)


def _mixed_layer(layer: AdapterLayer, rows: dict[str, Tensor], x: Tensor) -> Tensor:
    result = layer.base_layer(x)
    dtype, count = result.dtype, sum(map(len, rows.values()))
    if len(x) == 1 != count:  # one row for all, as position ids are
        x, result = (t.expand(count, *t.shape[1:]) for t in (x, result))
    for name, indices in rows.items():
        if name in layer.adapters and layer.active_adapters:  # none is active while disabled
            indices = indices.to(x.device)
            updated = _updated(layer, name, x[indices], result[indices])
            result = result.to(updated.dtype).index_copy(0, indices, updated)
    return result.to(dtype)


def _updated(layer: AdapterLayer, name: str, x: Tensor, result: Tensor) -> Tensor:
    if isinstance(layer, LoRALinear | LoRAEmbedding):
        return layer.update(layer.adapters[name], x, result)  # pyright: ignore[reportArgumentType]
    weight, _ = layer.adapters[name].merged(layer.weight, None)
    if isinstance(layer, TiedOutput):
        return F.linear(x, weight, layer.bias)
    return F.embedding(x, weight, padding_idx=layer.base_layer.padding_idx)


def _mixed_head(head: ModulesToSave, rows: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if not head.active_adapters:
        return head.base_layer(*args, **kwargs)
    order = torch.cat(list(rows.values()))

    def own(indices: Tensor, value: Any) -> Any:
        is_batch = isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(order)
        return value[indices.to(value.device)] if is_batch else value

    outputs = []
    for name, indices in rows.items():
        named = {key: own(indices, value) for key, value in kwargs.items()}
        outputs.append(head.module_for((name,))(*[own(indices, x) for x in args], **named))
    if not all(isinstance(output, Tensor) for output in outputs):
        kind = type(head.base_layer).__name__
        raise MiniloraError(f"a {kind} returns no tensor: it cannot be mixed by rows")
    return torch.cat(outputs)[torch.argsort(order).to(outputs[0].device)]
