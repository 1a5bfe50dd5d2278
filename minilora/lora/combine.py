"""Several adapters folded into one model, each with a weight.

    W' = W + sum_i w_i scaling_i B_i A_i            any ranks; embeddings likewise
    b' = b + sum_i w_i (b_i - b)                    trained biases
    H' = sum_i w_i H_i / sum_i w_i                  heads and other modules_to_save

An update is a difference and is scaled by its weight; a head is none, so heads are averaged. What
is no plain sum (DoRA's weight, rows trained in full, the weights pissa and olora reduce) takes part
as the difference it makes to W when merged alone. Sums are taken in float64 and rounded once.

PEFT's `add_weighted_adapter` refuses adapters with heads and is too large by sqrt(r) with rslora.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.errors import MiniloraError
from minilora.lora.adapter_files import load_adapter
from minilora.lora.embedding import LoRAEmbedding, TiedOutput
from minilora.lora.inject import AdapterLayer, adapter_layers, adapters_of
from minilora.lora.layer import LoRALinear
from minilora.lora.merge import record_untied, unload
from minilora.lora.modules_to_save import ModulesToSave

NAME = "combined"


def combine_adapters(model: nn.Module, paths: list[Path], weights: list[float]) -> nn.Module:
    """Fold the weighted adapters into a plain model, in place, and return it, plain again.

    Args:
        paths: adapter directories, as for `load_adapter`.
        weights: one for each; they need not sum to 1.

    Raises:
        MiniloraError: an adapter does not fit the model, the weights do not fit the adapters or sum
            to 0, or the result is not finite. The model is as it was.
    """
    if len(weights) != len(paths) or not all(map(math.isfinite, weights)) or not sum(weights):
        raise MiniloraError(
            f"weights are {weights} for {len(paths)} adapters: give a number for each, not summing to 0"
        )
    plain = dict(model.named_parameters())
    sums: dict[str, Tensor] = {}
    heads: list[dict[str, Tensor]] = []
    for path, weight in zip(paths, weights, strict=True):
        load_adapter(model, path, NAME)
        try:
            heads.append(_heads(model))
            for name, difference in _differences(model, plain):
                sums[name] = sums.get(name, 0) + weight * difference
        finally:
            unload(model)
    combined = {name: plain[name].detach().double() + total for name, total in sums.items()}
    for name in {name: None for head in heads for name in head}:
        each = [head.get(name, plain[name].detach().double()) for head in heads]
        terms = [weight * head for weight, head in zip(weights, each, strict=True)]
        combined[name] = torch.stack(terms).sum(dim=0) / sum(weights)
    broken = [name for name, tensor in combined.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise MiniloraError(f"combining gives NaN or infinity in {broken[0]}: an adapter is broken")
    for name, tensor in combined.items():
        parent, _, child = name.rpartition(".")
        new = nn.Parameter(tensor.to(plain[name].dtype), requires_grad=plain[name].requires_grad)
        setattr(model.get_submodule(parent), child, new)
    record_untied(model)
    return model


def _heads(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": trained.detach().double()
        for name, module in adapter_layers(model)
        if isinstance(module, ModulesToSave)
        for part, trained in module.adapter_parameters(NAME).items()
    }


@torch.no_grad()
def _differences(model: nn.Module, plain: dict[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """(plain parameter's name, what the adapter adds to it, in float64), heads aside."""
    for name, layer in adapter_layers(model):
        if isinstance(layer, ModulesToSave):
            continue
        if isinstance(layer, TiedOutput):
            raise MiniloraError(
                f"{name} shares its weight with embeddings of which an adapter trains rows: such "
                "adapters are merged one at a time"
            )
        yield f"{name}.weight", _weight_difference(layer)
        if isinstance(layer, LoRALinear) and layer.lora_B[NAME].bias is not None:
            _, lora_B = layer.factors(NAME)
            if layer.base_layer.bias is None:
                raise MiniloraError(f"{name}: lora_bias=True has no bias to be merged into")
            yield f"{name}.bias", lora_B.bias.double() * layer.scaling[NAME]
    # Trained biases, and weights that pissa and olora reduced: they differ from the plain model's.
    names = {id(parameter): name for name, parameter in plain.items()}
    for parameter, value in adapters_of(model).originals:
        yield names[id(parameter)], parameter.double() - value.double()


def _weight_difference(layer: AdapterLayer) -> Tensor:
    is_sum = isinstance(layer, (LoRALinear, LoRAEmbedding))
    if is_sum and NAME not in layer.lora_magnitude_vector:
        return layer.delta_weight(NAME).double()
    weight = layer.base_layer.weight
    merged, _ = layer.merged_parameters(NAME, weight, None)
    return merged.double() - weight.double()
