"""Folding adapters into the weights, and back.

What changes when an adapter is merged: `base_layer.weight` of every adapted module becomes W +
scaling B A (and `base_layer.bias`, with `lora_bias`), as a new Parameter; the original Parameter is
kept aside. Nothing else changes: A, B, the head's copies and the list of active adapters stay, and
the forward pass skips the update. Unmerging puts the original Parameter back, so it restores W
bitwise in every dtype, which subtracting B A would not.
"""

import torch
from torch import Tensor, nn

from minilora.errors import MiniloraError
from minilora.lora.embedding import TiedOutput
from minilora.lora.inject import (
    AdapterLayer,
    adapter_layers,
    adapters_of,
    replace_module,
    restore_plain_model,
)
from minilora.lora.modules_to_save import ModulesToSave


def merge_adapter(
    model: nn.Module, adapter_names: list[str] | None = None, safe_merge: bool = True
) -> None:
    """Fold scaling * B A into W for the active adapters, or the named ones, in place.

    A merged model has no gradient for A and B: training needs `unmerge_adapter` first. Every layer
    is computed before any is changed, so that a refused merge changes nothing.

    Args:
        safe_merge: refuse a merged weight that is not finite.

    Raises:
        MiniloraError: merged already, an unknown adapter, a result that is not finite, or a bias
            with nowhere to go.
    """
    adapters = adapters_of(model)
    check_not_merged(model, "merge")
    names = list(adapters.active) if adapter_names is None else adapter_names
    unknown = [name for name in names if name not in adapters.configs]
    if unknown:
        raise MiniloraError(
            f"no adapter named {unknown}; this model has {', '.join(adapters.configs)}"
        )
    merged = [
        (layer, _merged(layer, module_name, names, safe_merge))
        for module_name, layer in _linear_layers(model)
    ]
    for layer, (weight, bias) in merged:
        base = layer.base_layer
        layer.unmerged = dict(base.named_parameters(recurse=False))
        base.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            base.bias = nn.Parameter(bias, requires_grad=False)
        if isinstance(layer, TiedOutput):
            base.weight = layer.tokens.base_layer.weight  # one weight, as before


def unmerge_adapter(model: nn.Module) -> None:
    """Put the unmerged weights back, bitwise.

    Raises:
        MiniloraError: nothing is merged.
    """
    adapters_of(model)
    if not is_merged(model):
        raise MiniloraError("nothing is merged: call merge_adapter first")
    for _, layer in _linear_layers(model):
        for name, parameter in (layer.unmerged or {}).items():
            setattr(layer.base_layer, name, parameter)
        layer.unmerged = None


def merge_and_unload(
    model: nn.Module, adapter_names: list[str] | None = None, safe_merge: bool = True
) -> nn.Module:
    """The plain Hugging Face model with the active (or named) adapters folded in and the trained
    head in place.

    Works in place and returns `model`: its own class and keys; parameters are as trainable as
    before the first `add_adapter`. `model.save_pretrained` then writes an ordinary model directory.
    A merged model is unloaded as it is.

    Raises:
        MiniloraError: as `merge_adapter`.
    """
    adapters = adapters_of(model)
    if not is_merged(model):
        merge_adapter(model, adapter_names, safe_merge)
    trainable = {
        id(parameter): requires_grad for parameter, requires_grad in adapters.base_requires_grad
    }
    active = adapters.active if adapter_names is None else tuple(adapter_names)
    for name, module in list(adapter_layers(model)):
        if isinstance(module, ModulesToSave):
            kept = module.module_for(active)
            for copy, original in zip(
                kept.parameters(), module.original_module.parameters(), strict=True
            ):
                copy.requires_grad_(trainable[id(original)])
        else:
            kept = module.base_layer
            for parameter_name, original in (module.unmerged or {}).items():
                getattr(kept, parameter_name).requires_grad_(trainable[id(original)])
        replace_module(model, name, kept)
    adapters.originals = []  # the trained biases are part of the result
    restore_plain_model(model)
    record_untied(model)
    return model


def unload(model: nn.Module) -> nn.Module:
    """The plain model as it was before the first `add_adapter`, bitwise, with its original head.

    Works in place and returns `model`. (PEFT's `unload` keeps the trained head and biases.) A merge
    is undone.
    """
    adapters_of(model)
    if is_merged(model):
        unmerge_adapter(model)
    for name, module in list(adapter_layers(model)):
        replace_module(
            model,
            name,
            module.original_module if isinstance(module, ModulesToSave) else module.base_layer,
        )
    restore_plain_model(model)
    return model


def is_merged(model: nn.Module) -> bool:
    """Whether `merge_adapter` has been called and not undone."""
    return any(layer.unmerged is not None for _, layer in _linear_layers(model))


def check_not_merged(model: nn.Module, action: str) -> None:
    """Refuse `action` while adapters are merged.

    Raises:
        MiniloraError: they are.
    """
    if is_merged(model):
        raise MiniloraError(
            f"cannot {action} while adapters are merged: call unmerge_adapter first"
        )


def record_untied(model: nn.Module) -> None:
    """Write into the model's config that merging has parted its tied embeddings, if it has."""
    # A masked language model's decoder shares the embeddings' weight. Adapting one of them parts
    # them, and unless the config says so, transformers ties them again when it saves or loads
    # (PEFT's merged model is then silently wrong).
    config = getattr(model, "config", None)
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if get_output is not None else None
    if config is None or output is None or not getattr(config, "tie_word_embeddings", False):
        return
    if output.weight is not model.get_input_embeddings().weight:  # pyright: ignore[reportCallIssue]
        config.tie_word_embeddings = False


def _linear_layers(model: nn.Module) -> list[tuple[str, AdapterLayer]]:
    return [
        (name, layer)
        for name, layer in adapter_layers(model)
        if not isinstance(layer, ModulesToSave)
    ]


@torch.no_grad()
def _merged(
    layer: AdapterLayer, module_name: str, names: list[str], safe: bool
) -> tuple[Tensor, Tensor | None]:
    base = layer.base_layer
    weight, bias = base.weight, getattr(base, "bias", None)
    for name in names:
        if not layer.has_adapter(name):
            continue
        try:
            weight, bias = layer.merged_parameters(name, weight, bias)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise MiniloraError(f"{module_name}: {error}") from None
        finite = torch.isfinite(weight).all() and (bias is None or torch.isfinite(bias).all())
        if safe and not finite:
            raise MiniloraError(
                f"merging adapter {name!r} into {module_name} gives NaN or infinity: the adapter is broken; "
                "nothing was changed (safe_merge=False merges anyway)"
            )
    return weight.clone(), None if bias is None else bias.clone()
