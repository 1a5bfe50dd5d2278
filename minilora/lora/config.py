"""`LoraConfig`: PEFT's fields, PEFT's names, PEFT's defaults (peft 0.21, `tuners/lora/config.py`).

Every field that PEFT's `adapter_config.json` may hold is either honoured (a field below) or refused
by name when it is not at its default (`NOT_SUPPORTED`). No field is ignored. Imports nothing but
the standard library, so that a command can build its flags without torch.
"""

import dataclasses
import re
import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

from minilora.errors import MiniloraError

PEFT_VERSION = "0.21.2"  # whose file layout we write


@dataclass
class LoraConfig:
    """What to adapt and how. Never mutated: what injection resolves goes into a copy.

    Raises:
        MiniloraError: a value is out of range or two fields contradict each other.
    """

    r: int = field(default=8, metadata={"help": "rank of the update B A"})
    lora_alpha: int | float = field(
        default=8, metadata={"help": "the update is scaled by lora_alpha / r"}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "dropout on the input of A, in training"}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "module names (exact, or the end after a dot), one regular expression, or all-linear; "
            "by default the attention's query and value"
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "modules to leave alone, matched like target_modules"}
    )
    bias: str = field(
        default="none",
        metadata={"help": "which biases train too", "choices": ("none", "lora_only", "all")},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "modules trained in full beside LoRA; the task's head is always one"},
    )
    init_lora_weights: bool | str = field(
        default=True,
        metadata={
            "help": "true (A Kaiming-uniform, B zero), false, gaussian, orthogonal, pissa, pissa_niter_N or olora"
        },
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "scale by lora_alpha / sqrt(r), arXiv:2312.03732"}
    )
    use_dora: bool = field(
        default=False, metadata={"help": "train magnitude and direction apart, arXiv:2402.09353"}
    )
    lora_bias: bool = field(default=False, metadata={"help": "give B a bias"})
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "JSON object: a module name or regular expression to its own r"},
    )
    alpha_pattern: dict[str, int | float] = field(
        default_factory=dict, metadata={"help": "the same for lora_alpha"}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "adapt only these layers, counted from 0"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "name of the list of layers, where it is not the first"}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={"help": "train these rows of the word embeddings, and no others"},
    )
    fan_in_fan_out: bool = False
    inference_mode: bool = False

    # Bookkeeping: read, preserved, never acted upon by the layers.
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    auto_mapping: dict[str, str] | None = None
    peft_type: str = "LORA"
    peft_version: str | None = None

    def __post_init__(self) -> None:
        _check_values(self)
        _check_combinations(self)


TASK_TYPES = (
    "SEQ_CLS",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
    "CAUSAL_LM",
    "SEQ_2_SEQ_LM",
)

# PEFT's other fields, at the defaults that mean "not used". Anything else is refused by name.
NOT_SUPPORTED: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "target_parameters": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}

# Written by PEFT 0.1 and 0.2, with no effect on nn.Linear targets (peft#1337); `runtime_config` is
# never meant to be saved and PEFT ignores it, too.
OBSOLETE = ("enable_lora", "merge_weights", "runtime_config")

BOOKKEEPING = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_type",
    "peft_version",
    "inference_mode",
)


def config_from_dict(values: dict[str, Any], place: str = "adapter config") -> LoraConfig:
    """A `LoraConfig` from the object in an `adapter_config.json`, whichever PEFT wrote it.

    Args:
        values: the parsed JSON object. Absent fields take their defaults.
        place: named in errors, usually the file's path.

    Raises:
        MiniloraError: a field that is not supported is not at its default, or has the wrong type.
    """
    if values.get("peft_type") != "LORA":
        raise MiniloraError(
            f"{place}: peft_type is {values.get('peft_type')!r}; minilora reads 'LORA' only"
        )
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    for name, value in values.items():
        if name in known or name in OBSOLETE:
            continue
        if name in NOT_SUPPORTED:
            # bool() as well, because older versions wrote null where newer ones write {} or false.
            if bool(value) and value != NOT_SUPPORTED[name]:
                raise MiniloraError(
                    f"{place}: {name}={value!r} is a PEFT feature that minilora does not support"
                )
        elif value:
            raise MiniloraError(
                f"{place}: field {name!r}={value!r} is unknown to minilora (which knows PEFT {PEFT_VERSION}); "
                "only an unset field can be dropped"
            )
        else:
            warnings.warn(f"{place}: unknown field {name!r} is unset and was dropped", stacklevel=2)
    given = {name: value for name, value in values.items() if name in known}
    for name in ("rank_pattern", "alpha_pattern"):
        given[name] = given.get(name) or {}
    try:
        return LoraConfig(**given)
    except MiniloraError as error:
        raise MiniloraError(f"{place}: {error}") from None


def config_to_dict(config: LoraConfig) -> dict[str, Any]:
    """The object PEFT would write as `adapter_config.json`: every PEFT field, lists sorted,
    `inference_mode` true.

    PEFT keeps `target_modules` as a set, so its file changes with PYTHONHASHSEED; ours is the same
    bytes every time.
    """
    values = {**NOT_SUPPORTED, **dataclasses.asdict(config)}
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(values[name], list):
            values[name] = sorted(set(values[name]))
    values["inference_mode"] = (
        True  # PEFT's convention: a file on disk is for inference until asked otherwise
    )
    values["peft_version"] = config.peft_version or PEFT_VERSION
    return values


def differing_fields(left: LoraConfig, right: LoraConfig) -> dict[str, tuple[Any, Any]]:
    """Fields, bookkeeping aside, in which two configs ask for different adapters: name -> (left,
    right).
    """
    a, b = config_to_dict(left), config_to_dict(right)
    return {
        name: (a[name], b[name]) for name in a if name not in BOOKKEEPING and a[name] != b[name]
    }


def _check_values(config: LoraConfig) -> None:
    _require_type(config, "r", int)
    if config.r <= 0:
        raise MiniloraError(f"r is {config.r}; it must be 1 or more")
    for name in ("lora_alpha", "lora_dropout"):
        _require_type(config, name, int, float)
        if not _is_finite(getattr(config, name)):
            raise MiniloraError(f"{name} is {getattr(config, name)}; it must be a finite number")
    if not 0.0 <= config.lora_dropout < 1.0:
        raise MiniloraError(f"lora_dropout is {config.lora_dropout}; it must be in [0, 1)")
    if config.bias not in ("none", "lora_only", "all"):
        raise MiniloraError(f"bias is {config.bias!r}; it must be 'none', 'lora_only' or 'all'")
    if config.task_type is not None and config.task_type not in TASK_TYPES:
        raise MiniloraError(
            f"task_type is {config.task_type!r}; it must be one of {', '.join(TASK_TYPES)}"
        )
    if config.fan_in_fan_out:
        raise MiniloraError(
            "fan_in_fan_out=True is for GPT-2's Conv1D; BERT's layers are nn.Linear: leave it False"
        )
    init = config.init_lora_weights
    named = ("gaussian", "orthogonal", "pissa", "olora")
    if not (
        isinstance(init, bool) or init in named or re.fullmatch(r"pissa_niter_\d{1,3}", str(init))
    ):
        raise MiniloraError(
            f"init_lora_weights is {init!r}; it must be true, false, {', '.join(named)} or pissa_niter_N"
        )
    for name in ("use_rslora", "use_dora", "lora_bias", "inference_mode"):
        _require_type(config, name, bool)
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        _normalise_names(config, name)
    _check_layers(config)
    _check_patterns(config)
    _check_bookkeeping(config)
    indices = config.trainable_token_indices
    lists = list(indices.values()) if isinstance(indices, dict) else [indices or [0]]
    if not all(_is_index_list(one) for one in lists):
        raise MiniloraError(
            f"trainable_token_indices is {indices!r}; it must be a list of distinct token ids, or an "
            "object from an embedding's name to one"
        )
    _check_expressions(config)


def _check_patterns(config: LoraConfig) -> None:
    for name in ("rank_pattern", "alpha_pattern"):
        _require_type(config, name, dict)
    if any(
        isinstance(r, bool) or not isinstance(r, int) or r <= 0
        for r in config.rank_pattern.values()
    ):
        raise MiniloraError(
            f"rank_pattern is {config.rank_pattern!r}; every rank must be 1 or more"
        )
    if not all(map(_is_finite, config.alpha_pattern.values())):
        raise MiniloraError(
            f"alpha_pattern is {config.alpha_pattern!r}; every alpha must be a finite number"
        )


def _check_layers(config: LoraConfig) -> None:
    layers = config.layers_to_transform
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(type(number) is int for number in numbers):
        raise MiniloraError(
            f"layers_to_transform is {layers!r}; it must be a layer's number or a list of them"
        )


def _check_bookkeeping(config: LoraConfig) -> None:
    for name in ("base_model_name_or_path", "revision", "peft_version"):
        if not isinstance(getattr(config, name), str | None):
            raise MiniloraError(f"{name} is {getattr(config, name)!r}; it must be a text or null")
    if not isinstance(config.auto_mapping, dict | None):
        raise MiniloraError(
            f"auto_mapping is {config.auto_mapping!r}; it must be an object or null"
        )


def _check_expressions(config: LoraConfig) -> None:
    patterns = config.layers_pattern
    expressions = [
        *([config.target_modules] if isinstance(config.target_modules, str) else []),
        *([config.exclude_modules] if isinstance(config.exclude_modules, str) else []),
        *([patterns] if isinstance(patterns, str) else patterns or []),
        *config.rank_pattern,
        *config.alpha_pattern,
    ]
    for expression in expressions:
        try:
            re.compile(expression)
        except (re.error, RecursionError, OverflowError) as error:
            raise MiniloraError(f"{expression!r} is no regular expression: {error}") from None


def _check_combinations(config: LoraConfig) -> None:
    if isinstance(config.target_modules, str) and config.target_modules.lower() != "all-linear":
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name) is not None:
                raise MiniloraError(
                    f"{name} needs target_modules as a list of names, not the regular expression "
                    f"{config.target_modules!r}: say it in the expression"
                )
    if config.layers_pattern and config.layers_to_transform is None:
        raise MiniloraError("layers_pattern is set without layers_to_transform: say which layers")
    if config.lora_bias and config.use_dora:
        raise MiniloraError("lora_bias=True cannot be combined with use_dora=True")
    if config.lora_bias and not isinstance(config.init_lora_weights, bool):
        raise MiniloraError(
            f"lora_bias=True needs init_lora_weights true or false, not {config.init_lora_weights!r}"
        )


def _require_type(config: LoraConfig, name: str, *types: type) -> None:
    value = getattr(config, name)
    # bool is an int to Python, but r=True is nobody's intention.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        allowed = " or ".join(t.__name__ for t in types)
        raise MiniloraError(f"{name} is {value!r}; it must be of type {allowed}")


def _is_finite(value: Any) -> bool:
    # An integer too large for a float is not finite either.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_index_list(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) > 0
    return (
        is_list and all(type(i) is int and i >= 0 for i in value) and len(set(value)) == len(value)
    )


def _normalise_names(config: LoraConfig, name: str) -> None:
    value = getattr(config, name)
    if isinstance(value, (set, tuple)):  # PEFT accepts and keeps sets
        value = sorted(value)
        setattr(config, name, value)
    is_names = isinstance(value, list) and all(isinstance(item, str) for item in value)
    allows_string = name != "modules_to_save"
    if not (value is None or is_names or (allows_string and isinstance(value, str))):
        raise MiniloraError(f"{name} is {value!r}; it must be a list of module names")
