"""Adapters into a model and out again. The model keeps its class and its forward; everything
happens in place.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minilora.errors import MiniloraError
from minilora.lora.config import LoraConfig
from minilora.lora.embedding import LoRAEmbedding, TiedOutput, TrainableTokens
from minilora.lora.initialise import initialise_embedding, initialise_linear, initialise_magnitude
from minilora.lora.layer import LoRALinear
from minilora.lora.modules_to_save import ModulesToSave
from minilora.lora.targets import (
    TASK_HEADS,
    available_modules,
    is_named,
    pattern_value,
    resolve_config,
    target_names,
    trainable_tokens,
)

AdapterLayer = LoRALinear | LoRAEmbedding | TrainableTokens | TiedOutput


@dataclass
class Adapters:
    """What a model carries as `model.minilora_adapters` while anything is injected."""

    configs: dict[str, LoraConfig] = field(default_factory=dict)
    """Adapter name to its resolved config, in the order of injection."""
    active: tuple[str, ...] = ()
    """Names in force in the forward pass; empty while disabled."""
    base_requires_grad: list[tuple[nn.Parameter, bool]] = field(default_factory=list)
    """Each parameter of the plain model, and whether it was trainable before we froze it."""
    originals: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    """Base parameters that an adapter changes in place (biases it trains, weights pissa and olora
    reduce), each with its value in the plain model."""


def add_adapter(model: nn.Module, config: LoraConfig, adapter_name: str = "default") -> list[str]:
    """Freeze the base model, wrap every target, and return the names of the adapted modules.

    With the same seed, A, B and torch's generator afterwards are bitwise those of
    `peft.get_peft_model`. The first adapter becomes the active one; a further one waits, frozen,
    for `set_adapter`. `config` is not changed. New modules take over the train/eval mode of what
    they wrap (PEFT's always start in train mode, peft#3753).

    Raises:
        MiniloraError: the name is taken or unusable, no module matches, or a setting does not fit
            the model. The model is as it was.
    """
    adapters = _adapters_or_new(model)
    _check_name(adapter_name, adapters)
    _check_bias(config, adapters)
    targets, modules_to_save = resolve_config(model, config)
    config = dataclasses.replace(
        copy.deepcopy(config),
        target_modules=targets or config.target_modules,
        modules_to_save=modules_to_save or None,
        base_model_name_or_path=config.base_model_name_or_path or _name_or_path(model),
        auto_mapping=config.auto_mapping or _auto_mapping(model, config),
    )
    names = target_names(model, config)
    saved_names = _modules_to_save_names(model, modules_to_save, config.task_type)

    tokens = trainable_tokens(model, config)

    first = not adapters.configs
    if first:
        adapters.base_requires_grad = [(p, p.requires_grad) for p in model.parameters()]
        model.requires_grad_(False)
    model.minilora_adapters = adapters  # pyright: ignore[reportArgumentType]
    adapters.configs[adapter_name] = config
    try:
        _keep_originals(model, config, names, adapters)
        for name in names:
            _wrap_target(model, name, config, adapter_name)
        for name in saved_names:
            _wrap_module_to_save(model, name, adapter_name)
        for name, indices in tokens.items():
            _wrap_tokens(model, name, indices, adapter_name)
    except BaseException:
        remove_adapter(model, adapter_name)
        raise
    set_active(model, (adapter_name,) if first else adapters.active)
    return names


def adapters_of(model: nn.Module) -> Adapters:
    """The record of what is injected into `model`.

    Raises:
        MiniloraError: nothing is.
    """
    adapters = getattr(model, "minilora_adapters", None)
    if not isinstance(adapters, Adapters):
        raise MiniloraError("this model has no adapter: call add_adapter or load_adapter first")
    return adapters


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer | ModulesToSave]]:
    """Every wrapped module with its name, in `named_modules` order."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer | ModulesToSave):
            yield name, module


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of everything trainable, in PEFT's order, so that optimizer states line up
    by index.
    """
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def trained_biases(model: nn.Module, bias: str) -> list[tuple[str, nn.Parameter]]:
    """The base model's biases that a `LoraConfig.bias` trains, under their names in the wrapped
    model.
    """
    if bias == "none":
        return []
    if bias == "lora_only":
        return [
            (f"{name}.base_layer.bias", module.base_layer.bias)
            for name, module in adapter_layers(model)
            if isinstance(module, LoRALinear) and module.base_layer.bias is not None
        ]
    # "all": every bias of the base model. Not those of adapters, nor of a head that is trained as a
    # whole anyway (PEFT writes the head's two copies into its file by mistake, as
    # `classifier.original_module.bias` and `classifier.modules_to_save.bias`).
    heads = tuple(
        f"{name}." for name, module in adapter_layers(model) if isinstance(module, ModulesToSave)
    )
    adapters = tuple(
        f"{name}.{part}." for name, module in adapter_layers(model) for part in ("lora_A", "lora_B")
    )
    # A masked language model's output bias has two names, and PEFT writes both.
    return [
        (name, p)
        for name, p in model.named_parameters(remove_duplicate=False)
        if (name == "bias" or name.endswith(".bias")) and not name.startswith(heads + adapters)
    ]


def set_active(model: nn.Module, names: tuple[str, ...]) -> None:
    """Put exactly the adapters `names` in force and make exactly their parameters trainable."""
    adapters = adapters_of(model)
    adapters.active = names
    for _, module in adapter_layers(model):
        module.active_adapters = names
        for name in adapters.configs:
            for parameter in module.adapter_parameters(name).values():
                parameter.requires_grad_(
                    name in names and not adapters.configs[name].inference_mode
                )
    for config_name, config in adapters.configs.items():
        for _, parameter in trained_biases(model, config.bias):
            parameter.requires_grad_(config_name in names and not config.inference_mode)


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take one adapter out; when it was the last, the plain model is back bit for bit,
    `requires_grad` included.
    """
    adapters = adapters_of(model)
    adapters.configs.pop(adapter_name, None)
    for name, module in list(adapter_layers(model)):
        module.remove_adapter(adapter_name)
        if not _is_used(module):
            original = (
                module.original_module if isinstance(module, ModulesToSave) else module.base_layer
            )
            replace_module(model, name, original)
    if not adapters.configs:
        restore_plain_model(model)


def restore_plain_model(model: nn.Module) -> None:
    """Give the base parameters their original values and trainability and forget the record of
    adapters.
    """
    adapters = adapters_of(model)
    for parameter, value in adapters.originals:
        parameter.data = value
    for parameter, requires_grad in adapters.base_requires_grad:
        parameter.requires_grad_(requires_grad)
    del model.minilora_adapters


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` points to."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@contextlib.contextmanager
def plain_values(model: nn.Module) -> Iterator[None]:
    """Inside, the base parameters hold the plain model's values; afterwards, the adapted ones
    again.
    """
    originals = adapters_of(model).originals
    adapted = [parameter.data for parameter, _ in originals]
    for parameter, value in originals:
        parameter.data = value
    try:
        yield
    finally:
        for (parameter, _), value in zip(originals, adapted, strict=True):
            parameter.data = value


def _adapters_or_new(model: nn.Module) -> Adapters:
    existing = getattr(model, "minilora_adapters", None)
    return existing if isinstance(existing, Adapters) else Adapters()


def _check_name(adapter_name: str, adapters: Adapters) -> None:
    if adapter_name in adapters.configs:
        raise MiniloraError(
            f"adapter {adapter_name!r} exists already: delete_adapter it first, or take another name"
        )
    # The name becomes a part of module paths; ModuleDict refuses its own methods' names ("keys",
    # "items", ...).
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
        raise MiniloraError(
            f"adapter name {adapter_name!r} cannot be a module's name: take letters, digits and _"
        )


def _check_bias(config: LoraConfig, adapters: Adapters) -> None:
    others = [name for name, other in adapters.configs.items() if other.bias != "none"]
    if config.bias != "none" and others:
        raise MiniloraError(
            f"bias={config.bias!r}: adapter {others[0]!r} trains the base model's biases already, and one adapter can"
        )


def _name_or_path(model: nn.Module) -> str | None:
    return getattr(model, "name_or_path", None) or None


def _auto_mapping(model: nn.Module, config: LoraConfig) -> dict[str, str] | None:
    # PEFT's hint for its AutoPeftModel, written only where task_type does not tell the class.
    if config.task_type is not None:
        return None
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}


def _modules_to_save_names(model: nn.Module, names: list[str], task_type: str | None) -> list[str]:
    inner = (
        "modules_to_save",
        "original_module",
        "base_layer",
    )  # the parts of a wrapper, not modules of the model
    found = [
        name
        for name, module in model.named_modules()
        if is_named(name, names)
        and not any(part in inner for part in name.split("."))
        and not isinstance(module, (LoRALinear, LoRAEmbedding))
    ]
    # The heads that task_type adds are candidates: a model has one of them. What the user named
    # must be there.
    missing = [
        m
        for m in names
        if m not in TASK_HEADS.get(task_type or "", []) and not any(is_named(n, [m]) for n in found)
    ]
    if missing:
        raise MiniloraError(
            f"modules_to_save {missing} are not in this model, which has {available_modules(model)}"
        )
    return found


def _keep_originals(
    model: nn.Module, config: LoraConfig, names: list[str], adapters: Adapters
) -> None:
    kept = {id(parameter) for parameter, _ in adapters.originals}
    changed: list[nn.Parameter] = []
    if str(config.init_lora_weights).startswith(("pissa", "olora")):
        changed += [model.get_submodule(name).weight for name in names]  # pyright: ignore[reportAssignmentType]
    if config.bias != "none":
        changed += [
            p for name, p in model.named_parameters() if name == "bias" or name.endswith(".bias")
        ]
    adapters.originals += [(p, p.detach().clone()) for p in changed if id(p) not in kept]


def _wrap_target(model: nn.Module, name: str, config: LoraConfig, adapter_name: str) -> None:
    module = model.get_submodule(name)
    r = int(pattern_value(config.rank_pattern, name, config.r))
    lora_alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    if isinstance(module, (nn.Linear, LoRALinear)):
        layer = module if isinstance(module, LoRALinear) else LoRALinear(module)
        layer.create_adapter(
            adapter_name, r, lora_alpha, config.lora_dropout, config.use_rslora, config.lora_bias
        )
        initialise_linear(layer, adapter_name, config.init_lora_weights)
    else:
        assert isinstance(module, (nn.Embedding, LoRAEmbedding))
        if config.lora_bias:
            raise MiniloraError(
                f"lora_bias=True is for linear layers, and target_modules matches the embedding {name!r}"
            )
        layer = module if isinstance(module, LoRAEmbedding) else LoRAEmbedding(module)
        layer.create_adapter(adapter_name, r, lora_alpha, config.use_rslora)
        initialise_embedding(layer, adapter_name, config.init_lora_weights)
    _match_base(layer, adapter_name, use_dora=config.use_dora)
    layer.train(layer.base_layer.training)
    if layer is not module:
        replace_module(model, name, layer)


def _match_base(layer: LoRALinear | LoRAEmbedding, adapter_name: str, use_dora: bool) -> None:
    # PEFT's order: to the base layer's device and dtype, then DoRA's magnitude, then up to float32.
    # Over a bfloat16 base the fresh values have thus been rounded to bfloat16 once.
    base = layer.base_layer.weight
    layer.convert_adapter(adapter_name, base.device, base.dtype)
    if use_dora:
        initialise_magnitude(layer, adapter_name)
    if base.dtype in (torch.float16, torch.bfloat16):
        layer.convert_adapter(adapter_name, base.device, torch.float32)


def _wrap_module_to_save(model: nn.Module, name: str, adapter_name: str) -> None:
    module = model.get_submodule(name)
    wrapper = module if isinstance(module, ModulesToSave) else ModulesToSave(module)
    wrapper.modules_to_save[adapter_name] = copy.deepcopy(wrapper.original_module)
    if wrapper is not module:
        wrapper.train(module.training)
        replace_module(model, name, wrapper)


def _wrap_tokens(model: nn.Module, name: str, indices: list[int], adapter_name: str) -> None:
    module = model.get_submodule(name)
    if not isinstance(module, (nn.Embedding, TrainableTokens)):
        raise MiniloraError(
            f"trainable_token_indices: {name!r} is a {type(module).__name__}, not a plain embedding"
        )
    layer = module if isinstance(module, TrainableTokens) else TrainableTokens(module)
    layer.create_adapter(adapter_name, indices)
    if layer is not module:
        replace_module(model, name, layer)
        _wrap_tied_output(model, layer)


def _wrap_tied_output(model: nn.Module, tokens: TrainableTokens) -> None:
    for name, module in list(model.named_modules()):
        if getattr(module, "weight", None) is not tokens.base_layer.weight:
            continue
        if isinstance(module, LoRALinear):
            raise MiniloraError(
                f"trainable_token_indices: the output layer {name!r} shares the embeddings' weight and "
                "target_modules adapts it, too: leave it out of target_modules"
            )
        if isinstance(module, nn.Linear) and not name.endswith(".base_layer"):
            replace_module(model, name, TiedOutput(module, tokens))


def _is_used(module: AdapterLayer | ModulesToSave) -> bool:
    if isinstance(module, ModulesToSave):
        return len(module.modules_to_save) > 0
    if isinstance(module, TiedOutput):
        module = module.tokens
    if isinstance(module, TrainableTokens):
        return len(module.token_indices) > 0
    return len(module.scaling) > 0
