"""`LoraConfig`: PEFT's fields, PEFT's names, PEFT's defaults (peft 0.21, `tuners/lora/config.py`).

Every field that PEFT's `adapter_config.json` may hold is either honoured (a field below) or refused
by name when it is not at its default (`NOT_SUPPORTED`). Dropped are only the fields of `OBSOLETE`
and, with a warning, fields that we have never heard of and that are unset.
"""

# ruff: noqa: RUF009 (each call of option() makes a new field)
import dataclasses
import re
import warnings
from dataclasses import dataclass
from typing import Any

from minilora.errors import MiniloraError
from minilora.options import canonical, check, differences, option

PEFT_VERSION = "0.21.2"  # whose file layout we write

# PEFT's other fields, at the defaults that mean "not used". Anything else is refused by name.
NOT_SUPPORTED: dict[str, Any] = dict.fromkeys((
    "alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "kasa_config",
    "layer_replication", "lora_ga_config", "megatron_config", "monteclora_config",
    "target_parameters", "use_bdlora", "velora_config",
)) | {
    "ensure_weight_tying": False, "loftq_config": {}, "megatron_core": "megatron.core",
    "qalora_group_size": 16, "use_qalora": False,
}  # fmt: skip

# Written by PEFT 0.1 and 0.2, with no effect on nn.Linear targets (peft#1337); `runtime_config` is
# never meant to be saved and PEFT ignores it, too.
OBSOLETE = ("enable_lora", "merge_weights", "runtime_config")


# fmt: off
@dataclass
class LoraConfig:
    """What to adapt and how. Never mutated: what injection resolves goes into a copy."""

    r: int = option(8, "rank of the update B A", group="LoRA", least=1, alias="lora_r")
    lora_alpha: int | float = option(8, "the update is scaled by lora_alpha / r")
    lora_dropout: float = option(0.0, "dropout on A's input, in training", least=0, below=1)
    target_modules: list[str] | str | None = option(
        None, "module names (whole, or the end after a dot), a regular expression, or all-linear; "
        "by default the attention's query and value", is_set=True)
    exclude_modules: list[str] | str | None = option(None, "the same, to leave alone", is_set=True)
    bias: str = option("none", "which biases train too", choices=("none", "lora_only", "all"))
    modules_to_save: list[str] | None = option(
        None, "modules trained in full; the task's head is always one", is_set=True)
    init_lora_weights: bool | str = option(
        True, "true (Kaiming-uniform A), false, gaussian, orthogonal, pissa, pissa_niter_N, olora")
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(r), arXiv:2312.03732")
    use_dora: bool = option(False, "train magnitude and direction apart, arXiv:2402.09353")
    lora_bias: bool = option(False, "give B a bias")
    rank_pattern: dict[str, int] = option({}, "JSON: a module name or expression to its own r")
    alpha_pattern: dict[str, int | float] = option({}, "the same for lora_alpha")
    layers_to_transform: list[int] | int | None = option(
        None, "adapt only these layers, counted from 0", is_set=True)
    layers_pattern: list[str] | str | None = option(None, "the list of layers, if not the first")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = option(
        None, "train these rows of the word embeddings, and no others")
    # Without help and without a flag, these are BOOKKEEPING.
    fan_in_fan_out: bool = False
    inference_mode: bool = False
    task_type: str | None = option(None, None, choices=(
        "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "CAUSAL_LM", "SEQ_2_SEQ_LM"))
    base_model_name_or_path: str | None = None
    revision: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_type: str = "LORA"
    peft_version: str | None = None
    # fmt: on

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, set | tuple):  # PEFT accepts and keeps sets
                setattr(self, field.name, sorted(value, key=str))
        check(self, _relations)


# Read and preserved, never acted upon by the layers.
BOOKKEEPING = [f.name for f in dataclasses.fields(LoraConfig) if f.metadata.get("help") is None]


def config_from_dict(values: dict[str, Any], place: str = "adapter config") -> LoraConfig:
    """A `LoraConfig` from the object in `place`, an `adapter_config.json` of whichever PEFT."""
    if values.get("peft_type") != "LORA":
        raise MiniloraError(f"{place}: peft_type is {values.get('peft_type')!r}, not 'LORA'")
    init = values.get("init_lora_weights")
    if init == "eva":  # drawn from data; once drawn they are numbers like any
        values = {**values, "init_lora_weights": True, "eva_config": None}
    elif isinstance(init, str) and init.lower() == "olora":
        values = {**values, "init_lora_weights": "olora"}
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    # PEFT's older versions wrote null where newer ones write {} or false.
    given: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
    dropped = list[str]()
    for name, value in values.items():
        if name in known:
            given[name] = given.get(name) if value is None else value
        elif value and value != NOT_SUPPORTED.get(name) and name not in OBSOLETE:
            what = "not supported" if name in NOT_SUPPORTED else "unknown"
            allowed = f"is {what} by minilora, which knows PEFT {PEFT_VERSION}: it must be unset"
            raise MiniloraError(f"{place}: {name}={value!r} {allowed}")
        elif name not in (*NOT_SUPPORTED, *OBSOLETE):
            dropped.append(name)
    if dropped:
        warnings.warn(f"{place}: unknown, unset and dropped: {', '.join(dropped)}", stacklevel=2)
    try:
        return LoraConfig(**given)
    except MiniloraError as error:
        raise MiniloraError(f"{place}: {error}") from None


def config_to_dict(config: LoraConfig) -> dict[str, Any]:
    """The object that PEFT would write as `adapter_config.json`, with every field of PEFT's."""
    fields = dataclasses.fields(config)
    values = {field.name: canonical(field, getattr(config, field.name)) for field in fields}
    version = config.peft_version or PEFT_VERSION
    return {**NOT_SUPPORTED, **values, "inference_mode": True, "peft_version": version}


def differing_fields(old: LoraConfig, new: LoraConfig) -> list[str]:
    """ "NAME: OLD -> NEW" for each field, bookkeeping aside, in which two configs differ."""
    return differences(old, {n: value for n, value in vars(new).items() if n not in BOOKKEEPING})


def _relations(c: LoraConfig) -> list[tuple[Any, str]]:
    init, targets, indices = c.init_lora_weights, c.target_modules, c.trainable_token_indices
    is_pissa, alphas = str(init).startswith("pissa"), [c.lora_alpha, *c.alpha_pattern.values()]
    rows = list(indices.values()) if isinstance(indices, dict) else [indices or [0]]
    inits = r"gaussian|orthogonal|olora|pissa(_niter_[0-9]{1,3})?"
    checks = [
        (c.fan_in_fan_out,
         "fan_in_fan_out=True is for GPT-2's Conv1D; BERT's layers are nn.Linear: leave it False"),
        (isinstance(init, str) and not re.fullmatch(inits, init),
         f"init_lora_weights is {init!r}; it must be true, false, gaussian, orthogonal, olora, "
         "pissa or pissa_niter_N"),
        (any(r < 1 for r in c.rank_pattern.values()),
         f"rank_pattern is {c.rank_pattern!r}; every rank must be 1 or more"),
        (any(not ids or min(ids) < 0 or len(set(ids)) < len(ids) for ids in rows),
         f"trainable_token_indices is {indices!r}; it must be a list of distinct token ids, or an "
         "object from an embedding's name to one"),
        (is_pissa and min(alphas) <= 0,
         f"init_lora_weights={init!r} needs lora_alpha above 0, not {min(alphas)}"),
        (isinstance(targets, str) and c.layers_to_transform is not None,
         f"layers_to_transform needs target_modules as a list of names, not {targets!r}: say it in "
         "a regular expression"),
        (c.layers_pattern and c.layers_to_transform is None,
         "layers_pattern is set without layers_to_transform: say which layers"),
        (c.lora_bias and c.use_dora, "lora_bias=True cannot be combined with use_dora=True"),
        (c.lora_bias and not isinstance(init, bool),
         f"lora_bias=True needs init_lora_weights true or false, not {init!r}"),
    ]  # fmt: skip
    layers = [c.layers_pattern] if isinstance(c.layers_pattern, str) else c.layers_pattern or []
    given = [targets, c.exclude_modules, *layers]
    expressions = {value: value for value in given if isinstance(value, str)}
    # As `targets` puts them together.
    expressions |= {key: rf"(.*\.)?({key})$" for key in (*c.rank_pattern, *c.alpha_pattern)}
    for expression, whole in expressions.items():
        try:
            re.compile(whole)
        except (re.error, RecursionError, OverflowError) as error:
            checks.append((True, f"{expression!r} is no regular expression: {error}"))
    return checks
