"""One batch whose rows use different adapters.

Every wrapped module computes its base layer once for the whole batch; then each adapter adds its
update to its own rows. A head, of which each adapter has its own, is computed per adapter.

Models swallow an unknown keyword argument without a word, so the names are not one: they hold
inside a `with` block, for every forward in it.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.errors import MiniloraError
from minilora.lora.embedding import LoRAEmbedding, TiedOutput
from minilora.lora.inject import AdapterLayer, adapter_layers, adapters_of
from minilora.lora.layer import LoRALinear
from minilora.lora.merge import check_not_merged
from minilora.lora.modules_to_save import ModulesToSave

BASE = "__base__"  # PEFT's name for a row without an adapter


@contextlib.contextmanager
def adapter_names(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Inside, row i of every batch goes through adapter `names[i]`, its head included; through the
    plain model for "__base__". Which adapters are active does not matter, unless all are disabled.

    A row's output is that of a batch with its adapter alone, up to float rounding. Gradients reach
    each adapter that is trainable. Afterwards the model is as it was, also if the body raises.

    Raises:
        MiniloraError: an unknown name, merged weights, or an adapter that changes the base weights
            in place (trained biases, pissa, olora), which cannot differ by row. At each forward: a
            batch of another length than `names`.
    """
    adapters = adapters_of(model)
    unknown = sorted(set(names) - set(adapters.configs) - {BASE})
    if unknown or not names:
        raise MiniloraError(
            f"no adapter named {unknown or 'nothing'}; this model has {', '.join(adapters.configs)}, and {BASE}"
        )
    check_not_merged(model, "mix adapters")
    if adapters.originals:
        raise MiniloraError(
            "an adapter of this model changes its base weights (bias, pissa or olora): rows of one "
            "batch cannot have different ones; use set_adapter"
        )
    rows_of = {name: [i for i, other in enumerate(names) if other == name] for name in set(names)}
    rows = {name: torch.tensor(indices) for name, indices in sorted(rows_of.items())}
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            _replaced_forward(model, partial(_checked_forward, model, model.forward, len(names)))
        )
        for _, module in adapter_layers(model):
            forward = _mixed_head if isinstance(module, ModulesToSave) else _mixed_layer
            stack.enter_context(_replaced_forward(module, partial(forward, module, rows)))
        yield


def _checked_forward(
    model: nn.Module, forward: Callable[..., Any], count: int, *args: Any, **kwargs: Any
) -> Any:
    check_not_merged(model, "mix adapters")
    named = [kwargs.get(name) for name in ("input_ids", "inputs_embeds")]
    batch = next((x for x in [*named, *args] if isinstance(x, Tensor)), None)
    if batch is None or len(batch) != count:
        found = "no batch of tensors" if batch is None else f"a batch of {len(batch)} rows"
        raise MiniloraError(f"adapter_names has {count} names and the model was given {found}")
    return forward(*args, **kwargs)


def _mixed_layer(layer: AdapterLayer, rows: dict[str, Tensor], x: Tensor) -> Tensor:
    result = layer.base_layer(x)
    if not layer.active_adapters:
        return result  # disabled
    dtype, count = result.dtype, sum(map(len, rows.values()))
    if len(x) == 1 != count:  # one row for all, as position ids are
        x, result = (t.expand(count, *t.shape[1:]) for t in (x, result))
    for name, indices in rows.items():
        if layer.has_adapter(name):
            indices = indices.to(x.device)
            updated = _updated(layer, name, x[indices], result[indices])
            result = result.to(updated.dtype).index_copy(0, indices, updated)
    return result.to(dtype)


def _updated(layer: AdapterLayer, name: str, x: Tensor, result: Tensor) -> Tensor:
    if isinstance(layer, LoRALinear):
        lora_A, _ = layer.factors(name)
        return layer.update(name, x.to(lora_A.weight.dtype), result)
    if isinstance(layer, LoRAEmbedding):
        return layer.update(name, x, result)
    if isinstance(layer, TiedOutput):
        weight, bias = layer.merged_parameters(name, layer.base_layer.weight, layer.bias)
        return F.linear(x, weight, bias)
    weight, _ = layer.merged_parameters(name, layer.base_layer.weight)
    return F.embedding(x, weight, padding_idx=layer.base_layer.padding_idx)


def _mixed_head(head: ModulesToSave, rows: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if not head.active_adapters:
        return head.original_module(*args, **kwargs)
    count = sum(map(len, rows.values()))

    def of(indices: Tensor, value: Any) -> Any:
        is_batch = isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
        return value[indices.to(value.device)] if is_batch else value

    parts = []
    for name, indices in rows.items():
        module = head.module_for((name,))
        named = {key: of(indices, value) for key, value in kwargs.items()}
        parts.append(module(*[of(indices, value) for value in args], **named))
    if not all(isinstance(part, Tensor) for part in parts):
        raise MiniloraError(
            f"a {type(head.original_module).__name__} does not return a tensor: it cannot be mixed by rows"
        )
    back = torch.argsort(torch.cat(list(rows.values())))
    return torch.cat(parts)[back.to(parts[0].device)]


@contextlib.contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
