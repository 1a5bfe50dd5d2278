"""Several adapters in one: folded into a plain model, or as a new adapter beside them.

    W' = W + sum_i w_i scaling_i B_i A_i            any ranks; embeddings likewise
    H' = sum_i w_i H_i / sum_i w_i                  heads and other modules_to_save

Sums are taken in float64 and rounded once.
"""

import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import MiniloraError
from minilora.lora.adapters import adapter_layers, adapters_of, add_adapter
from minilora.lora.config import LoraConfig
from minilora.lora.heads import ModulesToSave
from minilora.lora.merge import merge_and_unload, record_untied, set_parameter
from minilora.lora.peft_files import load_adapter
from minilora.lora.targets import check_known, unwrapped

COMBINATION_TYPES = ("svd", "cat", "linear")  # PEFT's others prune what they add up


@torch.no_grad()
def combine_adapters(model: nn.Module, paths: list[Path], weights: list[float]) -> nn.Module:
    """Fold the weighted adapters in directories `paths` into a plain model, in place.

    Each takes part as the difference it makes to the model when merged alone: also what is no plain
    sum (DoRA's weight, rows and biases trained in full, the weights pissa and olora reduce). After
    an error the model is as it was.
    """
    model = unwrapped(model)
    if hasattr(model, "minilora_adapters"):
        raise MiniloraError("combine_adapters takes a plain model: unload its adapters first")
    _check_weights(weights, len(paths))
    plain = dict(model.named_parameters(remove_duplicate=False))
    sums: dict[str, Tensor] = {}
    for path, weight in zip(paths, weights, strict=True):
        alone = copy.deepcopy(model)
        load_adapter(alone, path)
        layers = dict(adapter_layers(alone))
        for layer in layers.values():
            layer.base_layer.double()
        heads = tuple(f"{name}." for name, m in layers.items() if isinstance(m, ModulesToSave))
        merge_and_unload(alone, safe_merge=False)
        for name, parameter in alone.named_parameters(remove_duplicate=False):
            difference = parameter.double() - plain[name].double()
            if difference.any():
                factor = _share(weight, weights) if name.startswith(heads) else weight
                sums[name] = sums.get(name, 0) + factor * difference
    combined = {name: plain[name].double() + total for name, total in sums.items()}
    _check_finite(combined.items())
    made: dict[str, nn.Parameter] = {}
    for name, tensor in combined.items():
        old, value = plain[name], tensor.to(plain[name].dtype)
        # What was tied stays tied, unless an adapter has parted it.
        twins = [p for other, p in made.items() if plain[other] is old and torch.equal(p, value)]
        made[name] = twins[0] if twins else nn.Parameter(value, old.requires_grad)
        set_parameter(model, name, made[name])
    record_untied(model)
    return model


def add_weighted_adapter(
    model: nn.Module,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
) -> list[str]:
    """Add the weighted sum of adapters that the model has; return the adapted modules' names.

        svd      B', A' = U S, V^T of sum_i w_i s_i B_i A_i, cut at `svd_rank` (by default the
                 highest r): the nearest of that rank
        cat      A' = [w_1 s_1 A_1; w_2 s_2 A_2; ...], B' = [B_1, B_2, ...]: exact; r' = sum_i r_i
        linear   A' = sum_i +-sqrt|w_i s_i| A_i, B' = sum_i sqrt|w_i s_i| B_i: rough; of equal r

    s_i are the adapters' scalings; the new one's is 1. It waits, frozen, for `set_adapter`. One
    adapter alone is scaled, exactly. DoRA, lora_bias, trained rows and biases are no plain sums and
    are refused. After an error the model is as it was.

    Source: peft 0.21 `LoraModel.add_weighted_adapter`.
    """
    model = unwrapped(model)
    configs = adapters_of(model, "add an adapter").configs
    check_known(configs, adapters)
    _check_weights(weights, len(adapters))
    if combination_type not in COMBINATION_TYPES:
        allowed = f"it must be one of {', '.join(COMBINATION_TYPES)}"
        raise MiniloraError(f"combination_type is {combination_type!r}; {allowed}")
    if svd_rank is not None and (svd_rank < 1 or combination_type != "svd"):
        raise MiniloraError(f"svd_rank is {svd_rank}; it must be 1 or more, and is only for svd")
    kind = "linear" if len(adapters) == 1 and svd_rank is None else combination_type
    found = _weighted_sums(model, adapters, weights, kind)
    _check_finite((name, tensor) for name, tensors in found.items() for tensor in tensors)

    ranks = [max([configs[name].r, *configs[name].rank_pattern.values()]) for name in adapters]
    r = sum(ranks) if kind == "cat" else svd_rank or max(ranks)
    heads = [name for name in found if isinstance(model.get_submodule(name), ModulesToSave)]
    targets, first = [name for name in found if name not in heads], configs[adapters[0]]
    config = LoraConfig(
        r, r, first.lora_dropout, targets, modules_to_save=heads, task_type=first.task_type
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        names = add_adapter(model, config, adapter_name)
        for name, tensors in found.items():
            own = model.get_submodule(f"{name}.adapters.{adapter_name}")
            for parameter, value in zip(own.parameters(), tensors, strict=True):
                # svd has more ranks than asked for; a layer of fewer adapters or lower r has fewer.
                common = tuple(map(slice, map(min, parameter.shape, value.shape)))
                parameter.zero_()[common] = value[common].to(parameter)
    return names


@torch.no_grad()
def _weighted_sums(
    model: nn.Module, adapters: list[str], weights: list[float], kind: str
) -> dict[str, list[Tensor]]:
    """Layer's name -> A and B of the sum there, or a head's tensors; float64."""
    found = {}
    for name, layer in adapter_layers(model):
        pairs = zip(adapters, weights, strict=True)
        terms = [(layer.adapters[own], weight) for own, weight in pairs if own in layer.adapters]
        if terms and isinstance(layer, ModulesToSave):
            shares = [(own, _share(weight, weights)) for own, weight in terms]
            # An adapter that lacks this head has the plain one.
            shares.append((layer.base_layer, 1 - sum(share for _, share in shares)))
            scaled = [[share * p.double() for p in own.parameters()] for own, share in shares]
            found[name] = [torch.stack(parts).sum(0) for parts in zip(*scaled, strict=True)]
        elif terms:
            found[name] = _summed_updates(name, terms, kind)
    return found


def _summed_updates(name: str, terms: list[tuple[Any, float]], kind: str) -> list[Tensor]:
    # A (r, in_features) and B (out_features, r), an embedding's likewise.
    if any(len(list(lora.parameters())) != 2 for lora, _ in terms):
        problem = "has DoRA, lora_bias or trained rows, which are no plain sums"
        raise MiniloraError(f"{name} {problem}: fold the adapters' files in by combine_adapters")
    A, B = zip(*([p.double() for p in lora.parameters()] for lora, _ in terms), strict=True)
    scales = A[0].new_tensor([weight * lora.scaling for lora, weight in terms])
    if kind == "linear":
        if len(ranks := {len(a) for a in A}) > 1:
            raise MiniloraError(f"linear needs one r; {name} has {sorted(ranks)}: take cat or svd")
        roots = scales.abs().sqrt()
        pairs = ((roots.copysign(scales), A), (roots, B))
        return [torch.tensordot(factors, torch.stack(terms), 1) for factors, terms in pairs]
    A_cat = torch.cat([scale * a for scale, a in zip(scales, A, strict=True)])
    B_cat = torch.cat(B, dim=1)
    if kind == "cat":
        return [A_cat, B_cat]
    U, S, Vh = torch.linalg.svd(B_cat @ A_cat, full_matrices=False)
    return [Vh, U * S]


def _check_weights(weights: list[float], count: int) -> None:
    if len(weights) != count or not all(map(math.isfinite, weights)):
        problem = f"weights are {weights} for {count} adapters"
        raise MiniloraError(f"{problem}: give a number for each, and finite ones")


def _share(weight: float, weights: list[float]) -> float:
    if not sum(weights):
        raise MiniloraError(f"weights are {weights}: heads are averaged, so they cannot sum to 0")
    return weight / sum(weights)


def _check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    broken = [name for name, tensor in tensors if not torch.isfinite(tensor).all()]
    if broken:
        raise MiniloraError(f"combining gives NaN or infinity in {broken[0]}: an adapter is broken")
