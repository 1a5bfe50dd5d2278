"""What a field of a config is: default, help, bounds. From these come its flag and its check.

Imports nothing but the standard library, so that `--help` answers without torch.
"""

import contextlib
import dataclasses
import inspect
import json
import math
import re
import types
import typing
from argparse import SUPPRESS, Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack

from minilora.errors import MiniloraError

# A NUL; what python makes of a byte that is not UTF-8, and JSON may spell.
NO_TEXT = re.compile("[\0\ud800-\udfff]")
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class Traits(TypedDict, total=False):
    """What a field's metadata may say beside its help text."""

    group: str  # the heading in --help, of this field and of those that follow it
    choices: tuple[str, ...]
    alias: str  # another name of its flag
    least: float  # the lowest value
    below: float  # every value is lower
    is_free: bool  # a resume may change it (training/config.py)
    is_set: bool  # a list whose order means nothing
    tasks: tuple[str, ...]  # at its default with any other task


def option(default: Any, help: str | None, **traits: Unpack[Traits]) -> Any:
    """A field of a config dataclass. Without a help text it has no flag."""
    metadata = {"help": help, **traits}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def has_type(value: Any, hint: Any) -> bool:
    """Whether a value, from JSON for one, is of a field's type: `int`, `float | None`, `list[str]`.

    An integer is a float, too; a bool is no integer. Integers beyond 64 bits and floats that are
    not finite are no numbers; what no file can be called is no text.
    """
    inner = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(has_type(value, kind) for kind in inner)
    if typing.get_origin(hint) is list:
        return type(value) is list and all(has_type(item, inner[0]) for item in value)
    if typing.get_origin(hint) is dict:
        return type(value) is dict and all(
            has_type(key, inner[0]) and has_type(item, inner[1]) for key, item in value.items()
        )
    if type(value) is int:
        return hint in (int, float, Any) and abs(value) < 2**63
    if type(value) is float:
        return hint in (float, Any) and math.isfinite(value)
    if isinstance(value, str):  # of a subclass, too, such as PEFT's TaskType
        return hint is Any or (hint is str and not NO_TEXT.search(value))
    return hint is Any or type(value) is (types.NoneType if hint is None else hint)


def check(config: Any, relations: Callable[[Any], list[tuple[Any, str]]]) -> None:
    """Refuse a config with all that is wrong with its fields, at once.

    `relations` is asked only if each is of its type: pairs of whether a thing is wrong, and words.
    """
    found, hints = [], typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint, traits = getattr(config, field.name), hints[field.name], field.metadata
        least, below = traits.get("least", -math.inf), traits.get("below", math.inf)
        allowed = None
        if not has_type(value, hint):
            is_number = type(value) in (int, float) and has_type(type(value)(0), hint)
            kind = f"of type {inspect.formatannotation(hint)}"
            allowed = "a finite number of at most 64 bits" if is_number else kind
        elif "choices" in traits and value not in (*traits["choices"], None):
            allowed = f"one of {', '.join(traits['choices'])}"
        elif isinstance(value, int | float) and not least <= value < below:
            allowed = f"{least} or more" if below == math.inf else f"in [{least}, {below})"
        if allowed is not None:
            found.append(f"{field.name} is {value!r}; it must be {allowed}")
    if all(has_type(getattr(config, name), hint) for name, hint in hints.items()):
        found += [problem for is_wrong, problem in relations(config) if is_wrong]
    if found:
        raise MiniloraError("; ".join(found))


def canonical(field: dataclasses.Field, value: Any) -> Any:
    """A list whose order means nothing, sorted and without repeats; another value as it is."""
    is_set = field.metadata.get("is_set") and isinstance(value, list)
    return sorted(set(value)) if is_set else value


def changed(config: Any) -> dict[str, Any]:
    default = vars(type(config)())
    return {name: value for name, value in vars(config).items() if value != default[name]}


def differences(config: Any, values: dict[str, Any]) -> list[str]:
    """ "NAME: OLD -> NEW" for each of `values` that `config` does not have."""
    found = []
    for field in dataclasses.fields(config):
        old = getattr(config, field.name)
        new = values.get(field.name, old)
        if canonical(field, new) != canonical(field, old):
            found.append(f"{field.name}: {old} -> {new}")
    return found


class _ListOrString(Action):
    # A single word stays a string where it is no name: a regular expression, or all-linear.
    def __call__(self, parser, namespace, values, option_string=None):
        assert isinstance(values, list)
        is_pattern = len(values) == 1 and not values[0].replace(".", "_").isidentifier()
        setattr(namespace, self.dest, values[0] if is_pattern else values)


def boolean(text: str) -> bool:
    if text.lower() not in BOOLEANS:
        raise ArgumentTypeError(f"{text!r} is neither true nor false")
    return BOOLEANS[text.lower()]


def _number_or_word(text: str) -> float | str:
    return float(text) if re.match("[-+.0-9]", text) else text


def _number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`, which would otherwise keep the last of two values without a word."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a name occurs twice among {[name for name, _ in pairs]}"[:200])
    return dict(pairs)


def _json_object(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text, object_pairs_hook=unique_keys)
        if isinstance(value, dict):
            return value
    raise ArgumentTypeError(f'{text!r} is not a JSON object such as {{"query": 4}}')


# What argparse is told about a field's type; one that may be None has the flag of the other type.
_FLAGS: dict[Any, dict[str, Any]] = {
    str: {},
    bool: {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"},
    bool | str: {"type": lambda text: BOOLEANS.get(text.lower(), text), "metavar": "VALUE"},
    float | str: {"type": _number_or_word, "metavar": "VALUE"},
    int: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    int | float: {"type": _number, "metavar": "X"},
    list[str]: {"nargs": "+", "metavar": "NAME"},
    list[str] | str: {"nargs": "+", "metavar": "NAME", "action": _ListOrString},
    list[int] | int: {"nargs": "+", "metavar": "N", "type": int},
    list[int] | dict[str, list[int]]: {"nargs": "+", "metavar": "N", "type": int},
    dict[str, int]: {"type": _json_object, "metavar": "JSON"},
    dict[str, int | float]: {"type": _json_object, "metavar": "JSON"},
}


def add_flags(parser: ArgumentParser, config_type: type, defaults: Mapping[str, Any] = {}) -> None:
    """A flag for each field of a config that has a help text, which shows `defaults`, if given."""
    hints, section = typing.get_type_hints(config_type), parser
    for field in dataclasses.fields(config_type):
        traits = field.metadata
        if traits.get("help") is None:
            continue
        if "group" in traits:
            section = parser.add_argument_group(traits["group"])
        default = defaults.get(field.name, field.default)
        shown = "" if default in (None, False, dataclasses.MISSING) else f" (default: {default})"
        hint, word = hints[field.name], field.name.rpartition("_")[2].upper()
        row = next(row for kind, row in _FLAGS.items() if hint in (kind, kind | None))
        choices = traits.get("choices")
        settings = {"choices": choices} if choices else {"metavar": word, **row}
        # A flag that is not given leaves no trace, so that a resume can tell what was asked.
        settings |= {"default": SUPPRESS, "help": traits["help"] + shown}
        names = [name for name in (field.name, traits.get("alias")) if name]
        section.add_argument(*(f"--{name}" for name in names), **settings)


def given_flags(config_type: type, namespace: Namespace) -> dict[str, Any]:
    """The fields of a config that were given on the command line."""
    names = {field.name for field in dataclasses.fields(config_type)}
    return {name: value for name, value in vars(namespace).items() if name in names}
