"""Adapters folded into the weights: for a while, for good, or several at once, weighted.

While merged, the `base_layer` of an adapted module holds a new Parameter for each one that an
adapter changes (W; with lora_bias b, too), and no update is computed. The original Parameters are
kept aside and put back by unmerging, so that W is restored bitwise in every dtype, which
subtracting B A would not do. Adapters and the heads' copies stay as they are; a merged adapter's
head is the one in use.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import MiniloraError
from minilora.lora import adapters
from minilora.lora.embedding import TiedOutput
from minilora.lora.heads import ModulesToSave
from minilora.lora.peft_files import load_adapter
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
    changes = list(_changes(model, names))
    broken = [name for name, _, _, after in changes if not torch.isfinite(after).all()]
    if safe_merge and broken:
        problem = f"merging {', '.join(names)} into {broken[0]} gives NaN or infinity"
        raise MiniloraError(f"{problem}; nothing was changed (safe_merge=False merges anyway)")
    record.state, record.merged = "merged", names
    for name, key, _, after in changes:
        place = f"{name}.base_layer.{key}"
        record.unmerged[place] = model.get_parameter(place)
        _set_parameter(model, place, nn.Parameter(after, requires_grad=False))
    _compute_updates_of(model, (), names)


def unmerge_adapter(model: nn.Module) -> None:
    """Put the original weights back, bitwise."""
    model, record = unwrapped(model), adapters.adapters_of(model)
    if record.state != "merged":
        raise MiniloraError("nothing is merged: call merge_adapter first")
    for place, parameter in record.unmerged.items():
        # The model may have moved since.
        parameter.data = parameter.data.to(model.get_parameter(place))
        _set_parameter(model, place, parameter)
    record.state, record.merged, record.unmerged = "", (), {}
    _compute_updates_of(model, record.active, record.active)


def merge_and_unload(
    model: nn.Module, adapter_names: list[str] | None = None, safe_merge: bool = True
) -> nn.Module:
    """The same model, plain, with the active (or named) adapters folded in and the trained head.

    `model.save_pretrained` then writes an ordinary directory. Parameters are as trainable as before
    the first `add_adapter`. A merged model is unloaded as it is.
    """
    model, record = unwrapped(model), adapters.adapters_of(model, "unload adapters", even="merged")
    if record.state != "merged":
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
    record.originals, record.state = [], ""
    unload(model)
    _record_untied(model)
    return model


def unload(model: nn.Module) -> nn.Module:
    """The same model, plain as before the first `add_adapter`, bitwise, with its original head.

    (PEFT's `unload` keeps the trained head and biases.) A merge is undone.
    """
    model, record = unwrapped(model), adapters.adapters_of(model, "unload adapters", even="merged")
    if record.state == "merged":
        unmerge_adapter(model)
    for adapter_name in list(record.configs):
        adapters.delete_adapter(model, adapter_name)
    return model


def combine_adapters(model: nn.Module, paths: list[Path], weights: list[float]) -> nn.Module:
    """Fold the weighted adapters in directories `paths` into a plain model; it is plain again.

        W' = W + sum_i w_i scaling_i B_i A_i            any ranks; embeddings likewise
        b' = b + sum_i w_i (b_i - b)                    trained biases
        H' = sum_i w_i H_i / sum_i w_i                  heads and other modules_to_save

    What is no plain sum (DoRA's weight, rows trained in full, the weights pissa and olora reduce)
    takes part as the difference it makes to W when merged alone. Sums are taken in float64 and
    rounded once. Works in place; after an error the model is as it was.

    PEFT's `add_weighted_adapter` refuses heads and is too large by sqrt(r) with rslora.
    """
    model = unwrapped(model)
    if hasattr(model, "minilora_adapters"):
        raise MiniloraError("combine_adapters takes a plain model: unload its adapters first")
    if len(weights) != len(paths) or not all(map(math.isfinite, weights)) or not sum(weights):
        problem = f"weights are {weights} for {len(paths)} adapters"
        raise MiniloraError(f"{problem}: give a number for each, not summing to 0")
    plain = dict(model.named_parameters(remove_duplicate=False))
    sums: dict[str, Tensor] = {}
    for path, weight in zip(paths, weights, strict=True):
        load_adapter(model, path, is_trainable=True)  # which leaves the mode alone
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
        value, trainable = tensor.to(plain[name].dtype), plain[name].requires_grad
        _set_parameter(model, name, nn.Parameter(value, requires_grad=trainable))
    _record_untied(model)
    return model


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, key = name.rpartition(".")
    setattr(model.get_submodule(module), key, parameter)


def _compute_updates_of(model: nn.Module, names: tuple[str, ...], heads: tuple[str, ...]) -> None:
    for _, layer in adapters.adapter_layers(model):
        layer.active_adapters = heads if isinstance(layer, ModulesToSave) else names


@torch.no_grad()
def _changes(
    model: nn.Module, names: Iterable[str], dtype: torch.dtype | None = None
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """(layer's name, key, before, after) of the parameters that adapters `names` change."""
    for name, layer in adapters.adapter_layers(model):
        # A tied output layer reads its embedding's weight.
        if isinstance(layer, ModulesToSave | TiedOutput):
            continue
        parameters = layer.base_layer.named_parameters(recurse=False)
        before = {key: parameter.to(dtype or parameter.dtype) for key, parameter in parameters}
        weight, bias = before["weight"], before.get("bias")
        for adapter in [layer.adapters[key] for key in names if key in layer.adapters]:
            try:
                weight, bias = adapter.merged(weight, bias, before["weight"])
            except MiniloraError as error:
                raise MiniloraError(f"{name}: {error}") from None
        for key, after in (("weight", weight), ("bias", bias)):
            if after is not None and after is not before[key]:
                yield name, key, before[key], after


@torch.no_grad()
def _differences(
    model: nn.Module, plain: dict[str, nn.Parameter]
) -> Iterator[tuple[str, Tensor, bool]]:
    """(plain parameter's name, what the only adapter adds to it, in float64; whether a head's)."""
    for name, layer in adapters.adapter_layers(model):
        if isinstance(layer, TiedOutput):
            problem = "shares its weight with embeddings of which an adapter trains rows"
            raise MiniloraError(f"{name} {problem}: such adapters are merged one at a time")
        if isinstance(layer, ModulesToSave):
            head = layer.adapters["default"].named_parameters(remove_duplicate=False)
            for key, trained in head:
                yield f"{name}.{key}", trained.double() - plain[f"{name}.{key}"].double(), True
    for name, key, before, after in _changes(model, ["default"], torch.float64):
        yield f"{name}.{key}", after - before, False
    # Trained biases, and weights that pissa and olora reduced: they differ from the plain model's.
    originals = {id(parameter): value for parameter, value in adapters.adapters_of(model).originals}
    for name, parameter in plain.items():
        if id(parameter) in originals:
            yield name, parameter.double() - originals[id(parameter)].double(), False


def _record_untied(model: Any) -> None:
    # A masked language model's decoder shares the embeddings' weight. Adapting one of them parts
    # them, and unless the config says so, transformers ties them again when it saves or loads
    # (PEFT's merged model is then silently wrong).
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None and getattr(model.config, "tie_word_embeddings", False):
        is_tied = output.weight is model.get_input_embeddings().weight
        model.config.tie_word_embeddings = is_tied
        if not is_tied and getattr(output, "bias", None) is not None:
            # Tied to the head's own, and so left out of the file, from which nothing would tie it.
            output.bias = nn.Parameter(output.bias.detach().clone(), output.bias.requires_grad)
