"""Adapters into a model, some of them in force, and out again.

The model keeps its class and its `forward`; everything happens in place. A wrapper takes the place
of each adapted module and holds it as `base_layer`, its adapters by name as `adapters`. What
concerns the model as a whole is in `model.minilora_adapters`.
"""

import contextlib
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from minilora.errors import MiniloraError
from minilora.lora import targets
from minilora.lora.config import LoraConfig
from minilora.lora.embedding import LoRAEmbedding, TiedOutput, TokenRows, TrainableTokens
from minilora.lora.heads import ModulesToSave
from minilora.lora.initialise import new_lora
from minilora.lora.layer import LoRALinear, Wrapper


@dataclass
class Adapters:
    """What a model carries as `model.minilora_adapters` while it has any adapter."""

    # By name, resolved for this model, in the order in which they came.
    configs: dict[str, LoraConfig] = field(default_factory=dict)
    # Names in force; none while disabled.
    active: tuple[str, ...] = ()
    # Whether each parameter of the plain model was trainable before we froze it.
    base_requires_grad: dict[str, bool] = field(default_factory=dict)
    # Base parameters that an adapter changes in place (biases it trains, weights pissa and olora
    # reduce, resized embeddings it brings), each with its value in the plain model.
    originals: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    # While merged: which adapters are folded in, and what was replaced, by name.
    merged: tuple[str, ...] = ()
    unmerged: dict[str, nn.Parameter] = field(default_factory=dict)


def add_adapter(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
) -> list[str]:
    """Freeze the base model, wrap every target, and return the names of the adapted modules.

    With the same seed, A, B and torch's generator afterwards are bitwise those of
    `peft.get_peft_model`. The first adapter becomes the active one; a further one waits, frozen,
    for `set_adapter`. `config` is not changed. New modules take over the train/eval mode of what
    they wrap (PEFT's always start in train mode, peft#3753). After an error the model is as it was.
    Over a float16 or bfloat16 base the adapter is float32, unless `autocast_adapter_dtype=False`.
    """
    model = targets.unwrapped(model)
    is_first = not hasattr(model, "minilora_adapters")
    adapters = Adapters() if is_first else adapters_of(model, "add an adapter")
    _check_addable(adapters, config, adapter_name)
    config = targets.resolve_config(model, config)
    adapted = targets.target_modules(model, config)
    tokens = targets.trainable_tokens(model, config)
    linear = {name for name, base in adapted.items() if isinstance(base, nn.Linear)}
    kinds = [(name, LoRALinear if name in linear else LoRAEmbedding) for name in adapted]
    kinds += [(name, ModulesToSave) for name in targets.saved_names(model, config)]
    kinds += [(name, TrainableTokens) for name in tokens]
    targets.check_free(model, kinds)

    if is_first:
        _freeze(model, adapters)
    adapters.configs[adapter_name] = config
    adapters.active = adapters.active or (adapter_name,)
    changed: list[Any] = [base.weight for base in adapted.values() if targets.reduces_base(config)]
    if config.bias != "none":
        changed += [p for name, p in model.named_parameters() if f".{name}".endswith(".bias")]
    adapters.originals |= {p: p.detach().clone() for p in changed}
    try:
        for name, kind in kinds:
            module = model.get_submodule(name)
            wrapper = module if isinstance(module, kind) else kind(module)
            adapter = _new_adapter(wrapper, name, config, tokens, autocast_adapter_dtype)
            wrapper.adapters[adapter_name] = adapter
            model.set_submodule(name, wrapper.train(wrapper.base_layer.training))
        for name in tokens:
            _attach_tied_output(model, name)
    except BaseException:
        delete_adapter(model, adapter_name)
        raise
    set_active(model, adapters.active)
    return list(adapted)


def adapters_of(model: nn.Module, action: str | None = None, even: str = "") -> Adapters:
    """The model's adapters; an `action` needs them neither merged nor disabled, or `even` so."""
    adapters = getattr(targets.unwrapped(model), "minilora_adapters", None)
    if not isinstance(adapters, Adapters):
        raise MiniloraError("this model has no adapter: call add_adapter or load_adapter first")
    ways_out = {"merged": "call unmerge_adapter", "disabled": "leave disable_adapter's block"}
    state = "merged" if adapters.merged else "disabled" if not adapters.active else None
    if action is not None and state not in (None, even):
        raise MiniloraError(f"cannot {action} while adapters are {state}: {ways_out[state]}")
    return adapters


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, Wrapper]]:
    """Every wrapper with its name, in `named_modules` order."""
    named = targets.unwrapped(model).named_modules()
    return ((name, m) for name, m in named if isinstance(m, Wrapper))


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of all that trains, in PEFT's order: optimizer states know no names."""
    named = targets.unwrapped(model).named_parameters()
    return [(name, p) for name, p in named if p.requires_grad]


def trained_biases(model: nn.Module, bias: str) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of the base model's biases that a `LoraConfig.bias` trains."""
    kinds = {"none": (), "lora_only": LoRALinear, "all": (LoRALinear, TiedOutput)}[bias]
    adapted = {
        f"{name}.base_layer.bias" for name, m in adapter_layers(model) if isinstance(m, kinds)
    }
    # What is outside of all wrappers has its old name. A head's biases have not: they are trained
    # with it anyway. A masked language model's output bias has two names, and PEFT writes both.
    plain = adapters_of(model).base_requires_grad if bias == "all" else {}
    return [
        (name, p)
        for name, p in targets.unwrapped(model).named_parameters(remove_duplicate=False)
        if name in adapted or (name in plain and f".{name}".endswith(".bias"))
    ]


def set_active(model: nn.Module, names: tuple[str, ...]) -> None:
    """Put exactly the adapters `names` in force and make exactly their parameters trainable."""
    adapters = adapters_of(model)
    adapters.active = names
    trained = {name for name in names if not adapters.configs[name].inference_mode}
    for _, layer in adapter_layers(model):
        layer.active_adapters = names
        for name, adapter in layer.adapters.items():
            adapter.requires_grad_(name in trained)
    for name, config in adapters.configs.items():
        for _, parameter in trained_biases(model, config.bias):
            parameter.requires_grad_(name in trained)


def set_adapter(model: nn.Module, adapter_name: str | list[str]) -> None:
    """Put one adapter, or several at once, in force; they become trainable, all others frozen.

    Several updates add up. Only one of them may have `modules_to_save`: a head is not two heads;
    nor may two of them train the same token's row.
    """
    adapters = adapters_of(model, "switch adapters")
    names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
    targets.check_together(model, adapters.configs, names)
    set_active(model, names)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out; if it alone was active, the first one left becomes so. Without any, the
    plain model is back, bit for bit.
    """
    model, adapters = targets.unwrapped(model), adapters_of(model, "delete an adapter")
    targets.check_known(adapters.configs, [adapter_name])
    del adapters.configs[adapter_name]
    for name, layer in list(adapter_layers(model)):
        if adapter_name in layer.adapters:
            del layer.adapters[adapter_name]
        if not layer.adapters:
            model.set_submodule(name, layer.base_layer)
    if not adapters.configs:
        for parameter, value in adapters.originals.items():
            parameter.data = value.to(parameter)  # the model may have moved since
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(adapters.base_requires_grad.get(name, parameter.requires_grad))
        del model.minilora_adapters
        vars(model).pop("save_pretrained", None)
    elif adapter_name in adapters.active:
        remaining = tuple(name for name in adapters.active if name != adapter_name)
        set_active(model, remaining or (next(iter(adapters.configs)),))


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, the model is bitwise the plain one, head, biases and pissa's weights included.

    Afterwards it is exactly as found, what was frozen is frozen, also if the body raises.
    """
    adapters = adapters_of(model, "disable adapters", even="disabled")
    active, found = adapters.active, [(p, p.data, p.requires_grad) for p in model.parameters()]
    set_active(model, ())
    for parameter, value in adapters.originals.items():
        parameter.data = value.to(parameter)
    try:
        yield
    finally:
        set_active(model, active)
        for parameter, value, was_trainable in found:
            parameter.data = value.to(parameter)
            parameter.requires_grad_(was_trainable)


def refuse_to_save(*_: Any, **__: Any) -> None:
    """`save_pretrained` of a model with adapters: what it wrote would load with random weights."""
    problem = "save_pretrained cannot write a model that has adapters"
    raise MiniloraError(f"{problem}: call save_adapter, or merge_and_unload first")


def set_fused(model: nn.Module, fused: bool) -> None:
    """Whether linear layers compute their updates in minilora's order or in PEFT's."""
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.fused = fused


def _check_addable(adapters: Adapters, config: LoraConfig, adapter_name: str) -> None:
    if adapter_name in adapters.configs:
        raise MiniloraError(f"adapter {adapter_name!r} exists: delete it, or take another name")
    # It becomes a part of modules' names and a directory's; ModuleDict refuses its own methods'
    # ("keys", ...), and "__base__" is a mixed batch's row without an adapter.
    is_name = isinstance(adapter_name, str) and re.fullmatch(r"(?!__)[\w-]+", adapter_name)
    if not is_name or hasattr(nn.ModuleDict(), adapter_name):
        problem = "cannot be a module's name: take letters, digits, - and _"
        raise MiniloraError(f"adapter name {adapter_name!r} {problem}")
    changes_base = config.bias != "none" or targets.reduces_base(config)
    if adapters.configs and (changes_base or adapters.originals):
        name = adapter_name if changes_base else next(iter(adapters.configs))
        problem = "changes the base (bias, pissa, olora, embeddings): it must be alone on its model"
        raise MiniloraError(f"adapter {name!r} {problem}")


def _freeze(model: Any, adapters: Adapters) -> None:
    parameters = model.named_parameters(remove_duplicate=False)
    adapters.base_requires_grad = {name: p.requires_grad for name, p in parameters}
    model.requires_grad_(False)
    model.minilora_adapters = adapters
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = refuse_to_save


def _new_adapter(
    wrapper: Wrapper, name: str, config: LoraConfig, tokens: dict[str, list[int]], autocast: bool
) -> nn.Module:
    base = wrapper.base_layer
    if isinstance(wrapper, ModulesToSave):
        return copy.deepcopy(base)
    adapter = TokenRows(base, tokens[name]) if name in tokens else new_lora(base, name, config)
    return adapter.float() if autocast and base.weight.itemsize < 4 else adapter


def _attach_tied_output(model: nn.Module, name: str) -> None:
    tokens: Any = model.get_submodule(name)
    for output_name, output in list(targets.plain_modules(model)):
        is_tied = getattr(output, "weight", None) is tokens.weight
        if is_tied and isinstance(output, LoRALinear):
            problem = "shares its weight with the embeddings: leave it out of target_modules"
            raise MiniloraError(f"trainable_token_indices: output layer {output_name!r} {problem}")
        if is_tied and isinstance(output, nn.Linear):
            model.set_submodule(output_name, TiedOutput(output, tokens))
