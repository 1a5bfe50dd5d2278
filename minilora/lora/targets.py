"""Which modules a `LoraConfig` means: PEFT's matching rules (peft 0.21
`tuners_utils.check_target_module_exists`).

A module's name is its path in `model.named_modules()`, for example
`bert.encoder.layer.0.attention.self.query`.
"""

import re
import warnings
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from minilora.errors import MiniloraError
from minilora.lora.config import LoraConfig
from minilora.lora.embedding import LoRAEmbedding, TiedOutput, TrainableTokens
from minilora.lora.layer import LoRALinear

# config.model_type -> modules adapted when target_modules is None: the attention's query and value,
# as in section 4.2 of the paper. Where PEFT has an entry (its
# `TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING`), this is it.
DEFAULT_TARGETS = {
    "albert": ["query", "value"],
    "bert": ["query", "value"],
    "camembert": ["query", "value"],
    "deberta": ["in_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
    "distilbert": ["q_lin", "v_lin"],
    "electra": ["query", "value"],
    "layoutlm": ["query", "value"],
    "mpnet": ["attn.q", "attn.v"],
    "roberta": ["query", "value"],
    "xlm-roberta": ["query", "value"],
}

# task_type -> names under which a head trained from scratch may hang. "score" is other families'
# name for it; PEFT lists both and so do we, since the list ends up in the file.
TASK_HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}

# How many distinct names an error shows before it cuts the list.
SHOWN_NAMES = 30


def resolve_config(model: nn.Module, config: LoraConfig) -> tuple[list[str], list[str]]:
    """`target_modules` and `modules_to_save` as lists of names, with the defaults for this model
    filled in.

    A regular expression has no list of names and is left to `target_names`.

    Returns:
        (target_modules, modules_to_save); target_modules is empty when it is a regular expression.

    Raises:
        MiniloraError: target_modules is None and the model's family has no default.
    """
    modules_to_save = list(config.modules_to_save or [])
    for head in TASK_HEADS.get(config.task_type or "", []):
        if head not in modules_to_save:
            modules_to_save.append(head)
    if is_all_linear(config.target_modules):
        return all_linear(model, modules_to_save), modules_to_save
    if isinstance(config.target_modules, str):
        return [], modules_to_save
    if config.target_modules is not None:
        return config.target_modules, modules_to_save
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in DEFAULT_TARGETS:
        raise MiniloraError(
            f"target_modules is not set and model type {family!r} has no default "
            f"(known: {', '.join(DEFAULT_TARGETS)}): name the modules; this model has {available_modules(model)}"
        )
    return DEFAULT_TARGETS[family], modules_to_save


def is_all_linear(target_modules: list[str] | str | None) -> bool:
    """Whether target_modules is PEFT's shorthand for every linear layer."""
    return isinstance(target_modules, str) and target_modules.lower() == "all-linear"


def all_linear(model: nn.Module, modules_to_save: list[str]) -> list[str]:
    """Names of every nn.Linear but the head: the output embeddings, and what is in
    `modules_to_save`.

    PEFT adds the head of token classification and question answering to modules_to_save only after
    matching, and then fails on them; here they are left out from the start.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    output_embeddings = get_head() if get_head is not None else None
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, LoRALinear))
        and module is not output_embeddings
        and not _inside_adapter(model, name)
        and not _is_saved(name, modules_to_save)
    ]


def target_names(model: nn.Module, config: LoraConfig) -> list[str]:
    """The modules to adapt, in `named_modules` order (which is the order of PEFT's random draws).

    Args:
        config: with target_modules and modules_to_save resolved.

    Raises:
        MiniloraError: nothing matches (lists what the model has), or a match is neither linear nor
            embedding.
    """
    matched: list[str] = []
    excluded: list[str] = []
    for name, module in model.named_modules():
        if not name or _inside_adapter(model, name):
            continue
        if is_excluded(name, config.exclude_modules) or _is_saved(
            name, config.modules_to_save or []
        ):
            excluded.append(name)
        elif is_target(name, config):
            if not isinstance(module, (nn.Linear, nn.Embedding, LoRALinear, LoRAEmbedding)):
                raise MiniloraError(
                    f"target_modules matches {name!r}, a {type(module).__name__}: "
                    f"LoRA adapts nn.Linear and nn.Embedding; this model has {available_modules(model)}"
                )
            matched.append(name)
    if not matched:
        raise MiniloraError(
            f"target_modules={config.target_modules!r} matches nothing to adapt"
            f"{_narrowed_by(config)}; this model has {available_modules(model)}"
        )
    _warn_unused(config, matched, excluded)
    return matched


def trainable_tokens(model: nn.Module, config: LoraConfig) -> dict[str, list[int]]:
    """Embedding name to token ids, as trainable_token_indices asks; a bare list means the input
    embeddings.

    Raises:
        MiniloraError: no such embedding, or an id outside it.
    """
    asked = config.trainable_token_indices
    if asked is None:
        return {}
    get_input = getattr(model, "get_input_embeddings", None)
    inputs = get_input() if get_input is not None else None
    found: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        if isinstance(asked, list):
            indices = asked if module is inputs else None
        else:
            indices = next((ids for key, ids in asked.items() if is_named(name, [key])), None)
        if indices is None or _inside_adapter(model, name):
            continue
        rows = getattr(module, "weight", torch.empty(0)).shape[0]
        if max(indices) >= rows:
            raise MiniloraError(
                f"trainable_token_indices: {max(indices)} is outside {name!r}, which has {rows} rows"
            )
        found[name] = indices
    missing = (
        []
        if isinstance(asked, list)
        else [k for k in asked if not any(is_named(n, [k]) for n in found)]
    )
    if missing or not found:
        raise MiniloraError(f"trainable_token_indices: this model has no embedding {missing or ''}")
    return found


def is_target(name: str, config: LoraConfig) -> bool:
    """Whether target_modules, layers_to_transform and layers_pattern together select module `name`."""
    targets = config.target_modules
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    assert targets is not None
    if name in targets:
        return True  # an exact name wins over layers_to_transform, as in PEFT
    if not any(name.endswith(f".{target}") for target in targets):
        return False
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    index = layer_index(name, config.layers_pattern)
    return index is not None and index in ([layers] if isinstance(layers, int) else layers)


def layer_index(name: str, layers_pattern: list[str] | str | None) -> int | None:
    """The number of the layer that module `name` lies in: 3 for
    `bert.encoder.layer.3.attention.self.query`.
    """
    if not layers_pattern:
        patterns = [r".*?\.[^.]*\.(\d+)\."]  # the first numbered segment
    else:
        names = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in names]
    for pattern in patterns:
        if match := re.match(pattern, name):
            return int(match.group(1))
    return None


def is_excluded(name: str, exclude_modules: list[str] | str | None) -> bool:
    """Whether exclude_modules names module `name` (exactly, by its end after a dot, or by
    expression).
    """
    if not exclude_modules:
        return False
    if isinstance(exclude_modules, str):
        return re.fullmatch(exclude_modules, name) is not None
    return is_named(name, exclude_modules)


def is_named(name: str, names: list[str]) -> bool:
    """Whether `name` is in `names`, or ends in one of them after a dot."""
    return name in names or any(name.endswith(f".{n}") for n in names)


def pattern_value(pattern: Mapping[str, float], name: str, default: float) -> float:
    """The first entry of rank_pattern or alpha_pattern that matches module `name`, else `default`."""
    for key, value in pattern.items():
        if _pattern_matches(key, name):
            return value
    return default


def available_modules(model: nn.Module) -> str:
    """The last parts of the names of what could be adapted: "dense, key, query, value"."""
    names = Counter(
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding)) and not _inside_adapter(model, name)
    )
    shown = sorted(names)[:SHOWN_NAMES]
    return ", ".join(shown) + (", ..." if len(names) > SHOWN_NAMES else "")


def _pattern_matches(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _is_saved(name: str, modules_to_save: list[str]) -> bool:
    # The module itself, and everything inside it.
    return any(re.match(rf"(^|.*\.){re.escape(m)}($|\..*)", name) for m in modules_to_save)


def _inside_adapter(model: nn.Module, name: str) -> bool:
    # The parts of an adapter that is already there are not modules of the user's model.
    wrappers = (LoRALinear, LoRAEmbedding, TrainableTokens, TiedOutput)
    parent = name.rpartition(".")[0]
    while parent:
        if isinstance(model.get_submodule(parent), wrappers):
            return True
        parent = parent.rpartition(".")[0]
    return False


def _narrowed_by(config: LoraConfig) -> str:
    fields = ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    given = [f"{name}={getattr(config, name)!r}" for name in fields if getattr(config, name)]
    return f" (with {', '.join(given)})" if given else ""


def _warn_unused(config: LoraConfig, matched: list[str], excluded: list[str]) -> None:
    if config.exclude_modules and not any(
        is_excluded(name, config.exclude_modules) for name in excluded
    ):
        warnings.warn(
            f"exclude_modules={config.exclude_modules!r} excludes nothing in this model",
            stacklevel=3,
        )
    for field in ("rank_pattern", "alpha_pattern"):
        unused = [
            key
            for key in getattr(config, field)
            if not any(_pattern_matches(key, n) for n in matched)
        ]
        if unused:
            warnings.warn(f"{field} keys {unused} match no adapted module", stacklevel=3)
