"""Adapters folded into the weights: for a while, or for good.

While merged, the `base_layer` of an adapted module holds a new Parameter for each one that an
adapter changes, and no update is computed; a merged adapter's head is in use. The original
Parameters are kept aside, so that unmerging restores W bitwise in every dtype, which subtracting
B A would not do. docs/08_merging.md lists the variables that change.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import MiniloraError
from minilora.lora import adapters
from minilora.lora.embedding import TiedOutput
from minilora.lora.heads import ModulesToSave
from minilora.lora.layer import Lora
from minilora.lora.targets import check_together, unwrapped


def merge_adapter(
    model: nn.Module, adapter_names: list[str] | None = None, safe_merge: bool = True
) -> None:
    """Fold scaling * B A into W for the active adapters, or the named ones, in place.

    A merged model has no gradient for A and B: training needs `unmerge_adapter` first. `safe_merge`
    refuses a weight that is not finite. A refused merge changes nothing.
    """
    model, record = unwrapped(model), adapters.adapters_of(model, "merge")
    names = record.active if adapter_names is None else tuple(adapter_names)
    check_together(model, record.configs, names)
    # Of float32 in an autocast block, too.
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        merged = _merged_parameters(model, names)
    broken = [place for place, after in merged.items() if not torch.isfinite(after).all()]
    if safe_merge and broken:
        layer = broken[0].rpartition(".base_layer.")[0]
        problem = f"merging {', '.join(names)} into {layer} gives NaN or infinity"
        raise MiniloraError(f"{problem}; nothing was changed (safe_merge=False merges anyway)")
    changed = {model.get_submodule(place.rpartition(".")[0]) for place in merged}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in changed and not name.endswith(".base_layer"):
            problem = f"would change {name!r}, too, which is an adapted module by another name"
            raise MiniloraError(f"merging {', '.join(names)} {problem}: give it a copy")
    record.merged = names
    for place, after in merged.items():
        record.unmerged[place] = model.get_parameter(place)
        set_parameter(model, place, nn.Parameter(after, requires_grad=False))
    _compute_updates_of(model, (), names)


def unmerge_adapter(model: nn.Module) -> None:
    """Put the original weights back, bitwise."""
    model, record = unwrapped(model), adapters.adapters_of(model)
    if not record.merged:
        raise MiniloraError("nothing is merged: call merge_adapter first")
    for place, parameter in record.unmerged.items():
        # The model may have moved since.
        parameter.data = parameter.data.to(model.get_parameter(place))
        set_parameter(model, place, parameter)
    record.merged, record.unmerged = (), {}
    _compute_updates_of(model, record.active, record.active)


def merge_and_unload(
    model: nn.Module, adapter_names: list[str] | None = None, safe_merge: bool = True
) -> nn.Module:
    """The same model, plain, with the active (or named) adapters folded in and the trained head.

    `model.save_pretrained` then writes an ordinary directory. Parameters are as trainable as before
    the first `add_adapter`. A merged model is unloaded as it is.
    """
    model, record = unwrapped(model), adapters.adapters_of(model, "unload adapters", even="merged")
    if not record.merged:
        merge_adapter(model, adapter_names, safe_merge)
    elif adapter_names is not None and set(adapter_names) != set(record.merged):
        problem = f"adapters {list(record.merged)} are merged, not {list(adapter_names)}"
        raise MiniloraError(f"{problem}: call unmerge_adapter first, or name those")
    for _, layer in adapters.adapter_layers(model):
        if isinstance(layer, ModulesToSave):
            layer.base_layer = layer.shown()
        if isinstance(layer, TiedOutput):
            layer.base_layer.weight = layer.weight  # the merged one
    # What the wrappers hold is the result, trained biases included.
    record.originals, record.merged = {}, ()
    unload(model)
    record_untied(model)
    return model


def unload(model: nn.Module) -> nn.Module:
    """The same model as before the first `add_adapter`, bitwise, its original head included. A
    merge is undone.
    """
    model, record = unwrapped(model), adapters.adapters_of(model, "unload adapters", even="merged")
    if record.merged:
        unmerge_adapter(model)
    for adapter_name in list(record.configs):
        adapters.delete_adapter(model, adapter_name)
    return model


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, key = name.rpartition(".")
    setattr(model.get_submodule(module), key, parameter)


def _compute_updates_of(model: nn.Module, names: tuple[str, ...], heads: tuple[str, ...]) -> None:
    for _, layer in adapters.adapter_layers(model):
        layer.active_adapters = heads if isinstance(layer, ModulesToSave) else names


@torch.no_grad()
def _merged_parameters(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Name -> value with adapters `names` folded in, of the base layers' parameters they change."""
    found: dict[str, Any] = {}
    for name, layer in adapters.adapter_layers(model):
        # A tied output layer reads its embedding's weight.
        if isinstance(layer, ModulesToSave | TiedOutput):
            continue
        base = layer.base_layer
        weight, bias = f"{name}.base_layer.weight", f"{name}.base_layer.bias"
        for adapter in layer.called(names):
            found[weight] = layer.merged(adapter, found.get(weight, base.weight), base.weight)
            if isinstance(adapter, Lora) and adapter.lora_B.bias is not None:
                if base.bias is None:
                    problem = "lora_bias=True has no bias in the base layer to merge into"
                    raise MiniloraError(f"{name}: {problem}")
                added = adapter.lora_B.bias * adapter.scaling
                found[bias] = (found.get(bias, base.bias) + added).to(base.bias.dtype)
    return found


def record_untied(model: Any) -> None:
    # A masked language model's decoder shares the embeddings' weight. Adapting one of them parts
    # them, and unless the config says so, transformers ties them again when it saves or loads.
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None and getattr(model.config, "tie_word_embeddings", False):
        is_tied = output.weight is model.get_input_embeddings().weight
        model.config.tie_word_embeddings = is_tied
        if not is_tied and getattr(output, "bias", None) is not None:
            # Tied to the head's own, and so left out of the file, from which nothing would tie it.
            output.bias = nn.Parameter(output.bias.detach().clone(), output.bias.requires_grad)
