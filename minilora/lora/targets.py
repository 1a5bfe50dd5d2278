"""Which modules a `LoraConfig` means, by their names in the model; what excludes what.

The rules are those of peft 0.21 `tuners_utils.check_target_module_exists`.
"""

import copy
import dataclasses
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from minilora.errors import MiniloraError
from minilora.lora.config import LoraConfig
from minilora.lora.embedding import LoRAEmbedding, TrainableTokens
from minilora.lora.heads import TASK_HEADS, ModulesToSave
from minilora.lora.layer import LoRALinear, Wrapper

# config.model_type -> modules adapted when target_modules is None: the attention's query and value,
# as in section 4.2 of the paper and in PEFT's table, where that has an entry. It has none for
# ModernBERT, whose query, key and value are one layer.
QUERY_AND_VALUE = ("albert", "bert", "camembert", "electra", "layoutlm", "roberta", "xlm-roberta")
DEFAULT_TARGETS = dict.fromkeys(QUERY_AND_VALUE, ("query", "value")) | {
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "modernbert": ("Wqkv",),
    "mpnet": ("attn.q", "attn.v"),
}


def resolve_config(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """A copy of `config` with what it leaves to the model filled in, as PEFT writes it."""
    targets, saved = config.target_modules, saved_modules(config)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        # All but the output embeddings and the head; what lies in a head is saved (`is_saved`).
        output = getattr(model, "get_output_embeddings", lambda: None)()
        others = [(name, m) for name, m in plain_modules(model) if m is not output]
        linear = [name for name, m in others if isinstance(m, nn.Linear | LoRALinear)]
        heads = TASK_HEADS.get(config.task_type or "", [])
        targets = [name for name in linear if name not in heads]
    elif targets is None:
        family = getattr(getattr(model, "config", None), "model_type", None)
        if family not in DEFAULT_TARGETS:
            problem = f"target_modules is not set and model type {family!r} has no default"
            known = f"(known: {', '.join(DEFAULT_TARGETS)})"
            raise MiniloraError(f"{problem} {known}: name the modules; {_this_model_has(model)}")
        targets = list[str](DEFAULT_TARGETS[family])
    if isinstance(targets, list) and len(targets) >= 20:
        names = [*(name for name, _ in plain_modules(model)), *_hidden_names(model)]
        targets = shortened(targets, [name for name in names if not is_named(name, targets)])
    # PEFT's hint for its AutoPeftModel, written only where task_type does not tell the class.
    kind = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    base = config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    return dataclasses.replace(
        copy.deepcopy(config),
        target_modules=targets,
        modules_to_save=saved or None,
        base_model_name_or_path=base,
        auto_mapping=config.auto_mapping or (kind if config.task_type is None else None),
    )


def shortened(targets: list[str], others: list[str]) -> list[str]:
    """Fewer and shorter ends of names that match the same, none of `others`. PEFT shortens 20 names
    or more, `all-linear`'s included, and so the file's `target_modules` are those.
    """

    def ends(name: str) -> list[str]:
        return [name.split(".", dots)[-1] for dots in reversed(range(name.count(".") + 1))]

    taken, found = {end for name in others for end in ends(name)}, []
    for name in sorted(targets, key=ends):
        if not is_named(name, found):
            found += next(([end] for end in ends(name) if end not in taken), [])
    return found if 0 < len(found) < len(targets) else targets


def target_modules(model: nn.Module, config: LoraConfig) -> dict[str, nn.Linear | nn.Embedding]:
    """Name -> the plain module, of what a resolved config adapts, in the order of PEFT's draws."""
    left_out, saved = config.exclude_modules or [], config.modules_to_save or []
    modules = dict(plain_modules(model))
    hidden = _hidden_names(model)
    matched: dict[str, nn.Linear | nn.Embedding] = {}
    for name in [*hidden, *modules]:
        if not is_target(name, config) or is_named(name, left_out) or is_saved(name, saved):
            continue
        if name in hidden:
            problem = f"matches {name!r} in {hidden[name]!r}, which another adapter trains whole"
            raise MiniloraError(f"target_modules {problem}: put it into exclude_modules")
        module = modules[name]
        base = module.base_layer if isinstance(module, LoRALinear | LoRAEmbedding) else module
        if not isinstance(base, nn.Linear | nn.Embedding):
            problem = f"matches {name!r}, a {type(module).__name__}"
            allowed = f"LoRA adapts nn.Linear and nn.Embedding; {_this_model_has(model)}"
            raise MiniloraError(f"target_modules {problem}: {allowed}")
        matched[name] = base
    if not matched:
        problem = f"target_modules={config.target_modules!r} matches nothing to adapt"
        raise MiniloraError(f"{problem}; {_this_model_has(model)}")
    if left_out and not any(is_named(name, left_out) for name in [*modules, *hidden]):
        warnings.warn(f"exclude_modules={left_out!r} excludes nothing in this model", stacklevel=3)
    _check_patterns(config, list(matched))
    for name, base in matched.items() if reduces_base(config) else ():
        for other, module in modules.items():
            if module is not base and getattr(module, "weight", None) is base.weight:
                problem = f"would reduce the weight of {name!r}, which is that of {other!r}, too"
                raise MiniloraError(f"init_lora_weights {problem}: leave it out of target_modules")
    return matched


def saved_names(model: nn.Module, config: LoraConfig) -> list[str]:
    """The modules that a resolved config trains in full."""
    asked = config.modules_to_save or []
    modules = {n: m for n, m in plain_modules(model) if n.endswith(tuple(asked))}
    found = list(modules)
    # Heads that task_type adds are candidates, of which a model has one; others must be there.
    named = [name for name in asked if name not in TASK_HEADS.get(config.task_type or "", [])]
    missing = [name for name in named if not any(other.endswith(name) for other in found)]
    if missing:
        raise MiniloraError(f"modules_to_save {missing} are not there; {_this_model_has(model)}")
    for name, module in modules.items():
        if type(module).forward is nn.Module.forward:
            problem = f"matches {name!r}, a {type(module).__name__}, which only holds others"
            raise MiniloraError(f"modules_to_save {problem}: name what is in it")
    # A module trained whole is trained with all that lies in it.
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def trainable_tokens(model: nn.Module, config: LoraConfig) -> dict[str, list[int]]:
    """Embedding name -> token ids; a list in trainable_token_indices means the input embeddings."""
    kinds = (nn.Embedding, LoRAEmbedding, TrainableTokens)
    embeddings = {name: m for name, m in plain_modules(model) if isinstance(m, kinds)}
    asked = config.trainable_token_indices or {}
    if isinstance(asked, list):
        inputs = getattr(model, "get_input_embeddings", lambda: None)()
        names = [name for name, module in embeddings.items() if module is inputs]
        asked = dict.fromkeys(names or ["of the input"], asked)
    found: dict[str, list[int]] = {}
    for key, indices in asked.items():
        names = [name for name in embeddings if is_named(name, [key])]
        if not names:
            raise MiniloraError(f"trainable_token_indices: this model has no embedding {key!r}")
        rows = min(len(embeddings[name].weight) for name in names)
        if max(indices) >= rows:
            problem = f"{max(indices)} is outside {names[0]!r}, which has {rows} rows"
            raise MiniloraError(f"trainable_token_indices: {problem}")
        if twice := [name for name in names if found.get(name, indices) != indices]:
            raise MiniloraError(f"trainable_token_indices: two keys name {twice[0]!r}: give one")
        found |= dict.fromkeys(names, indices)
    return found


def check_known(known: Iterable[str], names: Iterable[str]) -> None:
    """Refuse names of adapters that are not there, and no name at all."""
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        there = ", ".join(known)
        raise MiniloraError(f"no adapter named {unknown or 'nothing'}; this model has {there}")


def check_together(model: nn.Module, configs: dict[str, LoraConfig], names: Sequence[str]) -> None:
    """Refuse names of adapters that cannot be in force at once."""
    check_known(configs, names)
    if len(set(names)) < len(names):
        raise MiniloraError(f"adapters {list(names)} name one twice: name each once")
    heads = [name for name in names if configs[name].modules_to_save]
    if len(heads) > 1:
        raise MiniloraError(f"adapters {heads} each have modules_to_save: only one can be active")
    for place, layer in plain_modules(model):
        if isinstance(layer, TrainableTokens):
            rows = [row for own in layer.called(names) for row in own.token_indices.tolist()]
            if len(set(rows)) < len(rows):
                problem = f"train the same rows of {place!r}: only one can be active"
                raise MiniloraError(f"adapters {list(names)} {problem}")


def check_free(model: nn.Module, kinds: Sequence[tuple[str, type[Wrapper]]]) -> None:
    """Refuse to wrap a module that is wrapped in another way, or lies in or around such a one."""
    taken = [(name, type(m)) for name, m in plain_modules(model) if isinstance(m, Wrapper)]
    for name, kind in kinds:
        for other, its_kind in taken:
            nested = f"{name}.".startswith(f"{other}.") or other.startswith(f"{name}.")
            if nested and (name, kind) != (other, its_kind):
                problem = f"{other!r} is a {its_kind.__name__} already"
                raise MiniloraError(f"{problem}, so {name!r} cannot be a {kind.__name__}")
        taken.append((name, kind))


def is_target(name: str, config: LoraConfig) -> bool:
    """Whether target_modules, layers_to_transform and layers_pattern together select a module."""
    targets, layers = config.target_modules, config.layers_to_transform
    assert targets is not None
    if layers is None or layers == [] or name in targets:
        return is_named(name, targets)  # an exact name wins over layers_to_transform, as in PEFT
    index = layer_index(name, config.layers_pattern)
    return is_named(name, targets) and index in ([layers] if isinstance(layers, int) else layers)


def layer_index(name: str, layers_pattern: list[str] | str | None) -> int | None:
    """The number of the layer that a module lies in: 3 for `bert.encoder.layer.3.output.dense`."""
    lists = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or []
    patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in lists if name]
    for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:  # or else the first numbered segment
        if match := re.match(pattern, name):
            return int(match.group(1))
    return None


def is_named(name: str, names: list[str] | str) -> bool:
    """Whether a module is meant by `names`: its name, its end after a dot, or one expression."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return name in names or any(name.endswith(f".{end}") for end in names)


def saved_modules(config: LoraConfig) -> list[str]:
    """The names in modules_to_save, and those of the task's head."""
    heads = TASK_HEADS.get(config.task_type or "", [])
    return list(dict.fromkeys([*(config.modules_to_save or []), *heads]))


def is_saved(name: str, saved: list[str]) -> bool:
    """Whether a module, or one it lies in, ends with a name of `saved`, as PEFT has it, without a
    dot: "classifier" is DistilBERT's pre_classifier, too.
    """
    return any(f"{end}." in f"{name}." for end in saved)


def pattern_value(pattern: Mapping[str, float], name: str, default: float) -> float:
    """The first entry of rank_pattern or alpha_pattern that matches a module, else `default`."""
    return next((value for key, value in pattern.items() if _is_key(key, name)), default)


def reduces_base(config: LoraConfig) -> bool:
    """Whether adding an adapter of `config` changes the weights beneath it."""
    return str(config.init_lora_weights).startswith(("pissa", "olora"))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within torch.compile's wrapper, or that of distributed training."""
    distributed = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, distributed) or "_orig_mod" in model._modules:
        model = model.module if isinstance(model, distributed) else model._modules["_orig_mod"]  # pyright: ignore[reportAssignmentType]
    return model


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the user's model, a wrapped one as its wrapper; not the parts of a wrapper."""
    inside = None
    for name, module in unwrapped(model).named_modules():
        if name and not (inside and name.startswith(inside)):
            yield name, module
            inside = f"{name}." if isinstance(module, Wrapper) else None


def _hidden_names(model: nn.Module) -> dict[str, str]:
    """The modules that lie in one trained in full, each with the name of that one."""
    return {
        f"{place}.{name}": place
        for place, module in plain_modules(model)
        if isinstance(module, ModulesToSave)
        for name, _ in module.base_layer.named_modules()
        if name
    }


def _this_model_has(model: nn.Module) -> str:
    kinds = (nn.Linear, nn.Embedding)
    names = {name.rpartition(".")[2] for name, m in plain_modules(model) if isinstance(m, kinds)}
    return f"this model has {', '.join(sorted(names)[:30])}{', ...' if len(names) > 30 else ''}"


def _is_key(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _check_patterns(config: LoraConfig, names: list[str]) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        keys = getattr(config, field)
        unused = [key for key in keys if not any(_is_key(key, name) for name in names)]
        if unused:
            warnings.warn(f"{field} keys {unused} match no adapted module", stacklevel=4)
        stored = dict(sorted(keys.items()))  # as PEFT writes them
        for name in names:
            value, other = (pattern_value(pattern, name, 0) for pattern in (keys, stored))
            if value != other:
                problem = (
                    f"gives {name!r} {value}; with its keys sorted, as files have them, {other}"
                )
                raise MiniloraError(f"{field} {problem}: let one key match it")
