"""Adapters folded into the weights: for a while, for good, or several at once, weighted.

While merged, the `base_layer` of an adapted module holds a new Parameter for each one that an
adapter changes (W; with lora_bias b, too), and no update is computed. The original Parameters are
kept aside and put back by unmerging, so that W is restored bitwise in every dtype, which
subtracting B A would not do. Adapters and the heads' copies stay as they are.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.errors import MiniloraError
from minilora.lora.adapters import (
    adapter_layers,
    adapters_of,
    check_known,
    check_not_merged,
    remove_adapter,
    replace_module,
    restore_plain_model,
)
from minilora.lora.embedding import LoRAEmbedding, TiedOutput, TrainableTokens
from minilora.lora.heads import ModulesToSave
from minilora.lora.layer import LoRALinear
from minilora.lora.peft_files import load_adapter

# What has a weight of its own to merge into; a tied output layer reads its embedding's.
Mergeable = LoRALinear | LoRAEmbedding | TrainableTokens


def merge_adapter(
    model: nn.Module, adapter_names: list[str] | None = None, safe_merge: bool = True
) -> None:
    """Fold scaling * B A into W for the active adapters, or the named ones, in place.

    A merged model has no gradient for A and B: training needs `unmerge_adapter` first. `safe_merge`
    refuses a weight that is not finite. A refused merge changes nothing.
    """
    adapters = adapters_of(model)
    check_not_merged(model, "merge")
    names = adapters.active
    if adapter_names is not None:
        check_known(adapters.configs, adapter_names)
        names = tuple(adapter_names)
    changes: list[tuple[nn.Module, str, Tensor]] = []
    for module_name, layer in _mergeable_layers(model):
        for key, _, tensor in _changed(layer, module_name, names):
            if safe_merge and not torch.isfinite(tensor).all():
                raise MiniloraError(
                    f"merging {', '.join(names)} into {module_name} gives NaN or infinity: an "
                    "adapter is broken; nothing was changed (safe_merge=False merges anyway)"
                )
            changes.append((layer.base_layer, key, tensor))
    adapters.unmerged = [(base, key, getattr(base, key)) for base, key, _ in changes]
    for base, key, tensor in changes:
        setattr(base, key, nn.Parameter(tensor, requires_grad=False))
    for _, layer in _mergeable_layers(model):
        layer.active_adapters = ()


def unmerge_adapter(model: nn.Module) -> None:
    """Put the original weights back, bitwise."""
    adapters = adapters_of(model)
    if adapters.unmerged is None:
        raise MiniloraError("nothing is merged: call merge_adapter first")
    for base, key, parameter in adapters.unmerged:
        setattr(base, key, parameter)
    adapters.unmerged = None
    for _, layer in _mergeable_layers(model):
        layer.active_adapters = adapters.active


def merge_and_unload(
    model: nn.Module, adapter_names: list[str] | None = None, safe_merge: bool = True
) -> nn.Module:
    """The plain model with the active (or named) adapters folded in and the trained head in place.

    Works in place and returns `model`: its own class and keys; parameters are as trainable as
    before the first `add_adapter`. `model.save_pretrained` then writes an ordinary model directory.
    A merged model is unloaded as it is.
    """
    adapters = adapters_of(model)
    if adapters.unmerged is None:
        merge_adapter(model, adapter_names, safe_merge)
    names = adapters.active if adapter_names is None else tuple(adapter_names)
    for name, layer in list(adapter_layers(model)):
        if isinstance(layer, TiedOutput):
            layer.base_layer.weight = layer.weight  # the merged one
        kept = layer.module_for(names) if isinstance(layer, ModulesToSave) else layer.base_layer
        replace_module(model, name, kept)
    adapters.originals = []  # the trained biases are part of the result
    restore_plain_model(model)
    _record_untied(model)
    return model


def unload(model: nn.Module) -> nn.Module:
    """The plain model as it was before the first `add_adapter`, bitwise, with its original head.

    Works in place and returns `model`. (PEFT's `unload` keeps the trained head and biases.) A merge
    is undone.
    """
    adapters = adapters_of(model)
    if adapters.unmerged is not None:
        unmerge_adapter(model)
    for adapter_name in list(adapters.configs):
        remove_adapter(model, adapter_name)
    return model


def combine_adapters(model: nn.Module, paths: list[Path], weights: list[float]) -> nn.Module:
    """Fold the weighted adapters in directories `paths` into a plain model; it is plain again.

        W' = W + sum_i w_i scaling_i B_i A_i            any ranks; embeddings likewise
        b' = b + sum_i w_i (b_i - b)                    trained biases
        H' = sum_i w_i H_i / sum_i w_i                  heads and other modules_to_save

    An update is a difference and is scaled by its weight; a head is none, so heads are averaged.
    What is no plain sum (DoRA's weight, rows trained in full, the weights pissa and olora reduce)
    takes part as the difference it makes to W when merged alone. Sums are taken in float64 and
    rounded once. Works in place; after an error the model is as it was.

    PEFT's `add_weighted_adapter` refuses adapters with heads and is too large by sqrt(r) with
    rslora.
    """
    if hasattr(model, "minilora_adapters"):
        raise MiniloraError("combine_adapters takes a plain model: unload its adapters first")
    if len(weights) != len(paths) or not all(map(math.isfinite, weights)) or not sum(weights):
        raise MiniloraError(
            f"weights are {weights} for {len(paths)} adapters: "
            "give a number for each, not summing to 0"
        )
    plain = dict(model.named_parameters(remove_duplicate=False))
    sums: dict[str, Tensor] = {}
    for path, weight in zip(paths, weights, strict=True):
        load_adapter(model, path)
        try:
            for name, difference, is_head in _differences(model, plain):
                share = weight / sum(weights) if is_head else weight
                sums[name] = sums.get(name, 0) + share * difference
        finally:
            unload(model)
    combined = {name: plain[name].detach().double() + total for name, total in sums.items()}
    broken = [name for name, tensor in combined.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise MiniloraError(f"combining gives NaN or infinity in {broken[0]}: an adapter is broken")
    for name, tensor in combined.items():
        parent, _, key = name.rpartition(".")
        new = nn.Parameter(tensor.to(plain[name].dtype), requires_grad=plain[name].requires_grad)
        setattr(model.get_submodule(parent), key, new)
    _record_untied(model)
    return model


def _mergeable_layers(model: nn.Module) -> Iterator[tuple[str, Mergeable]]:
    for name, layer in adapter_layers(model):
        if isinstance(layer, Mergeable):
            yield name, layer


@torch.no_grad()
def _changed(
    layer: Mergeable, module_name: str, names: Iterable[str], dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, before, after) of the base layer's parameters that adapters `names` change."""
    parameters = layer.base_layer.named_parameters(recurse=False)
    before = {key: parameter.to(dtype or parameter.dtype) for key, parameter in parameters}
    weight, bias = before["weight"], before.get("bias")
    for name in names:
        if name in layer.adapters:
            try:
                weight, bias = layer.adapters[name].merged(weight, bias)
            except MiniloraError as error:
                raise MiniloraError(f"{module_name}: {error}") from None
    for key, after in (("weight", weight), ("bias", bias)):
        if after is not None and after is not before[key]:
            yield key, before[key], after


@torch.no_grad()
def _differences(
    model: nn.Module, plain: dict[str, nn.Parameter]
) -> Iterator[tuple[str, Tensor, bool]]:
    """(plain parameter's name, what the only adapter adds to it, in float64; whether a head's)."""
    for name, layer in adapter_layers(model):
        if isinstance(layer, TiedOutput):
            raise MiniloraError(
                f"{name} shares its weight with embeddings of which an adapter trains rows: such "
                "adapters are merged one at a time"
            )
        for key, trained in layer.adapters["default"].named_parameters():
            if isinstance(layer, ModulesToSave):
                yield f"{name}.{key}", trained.double() - plain[f"{name}.{key}"].double(), True
        if isinstance(layer, Mergeable):
            for key, before, after in _changed(layer, name, ["default"], torch.float64):
                yield f"{name}.{key}", after - before, False
    # Trained biases, and weights that pissa and olora reduced: they differ from the plain model's.
    originals = {id(parameter): value for parameter, value in adapters_of(model).originals}
    for name, parameter in plain.items():
        if id(parameter) in originals:
            yield name, parameter.double() - originals[id(parameter)].double(), False


def _record_untied(model: nn.Module) -> None:
    # A masked language model's decoder shares the embeddings' weight. Adapting one of them parts
    # them, and unless the config says so, transformers ties them again when it saves or loads
    # (PEFT's merged model is then silently wrong).
    config = getattr(model, "config", None)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is None or not getattr(config, "tie_word_embeddings", False):
        return
    if output.weight is not model.get_input_embeddings().weight:  # pyright: ignore[reportCallIssue]
        config.tie_word_embeddings = False  # pyright: ignore[reportOptionalMemberAccess]
