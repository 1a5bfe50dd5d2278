"""`--config FILE`: a command's flags, by name, in JSON or YAML; or a run.json, to repeat its run.

Imports neither torch nor transformers: what is wrong in the file is answered at once.
"""

import argparse
import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minilora.errors import MiniloraError
from minilora.lora.config import BOOKKEEPING, LoraConfig
from minilora.options import boolean, unique_keys
from minilora.training.config import TrainConfig

MAX_BYTES = 4_000_000  # as of any JSON that is read
# Of a run.json: where the run lay is not where its repetition will, nor is that a resume.
NOT_REPEATED = {"output_dir", "resume_from_checkpoint", "extend", "allow_inexact_resume"}
NOT_REPEATED |= {*BOOKKEEPING}


def set_defaults(parser: argparse.ArgumentParser, path: Path) -> None:
    """Make the file's values the parser's defaults, so that a flag that is given wins.

    A null is as if it were not there. Raises MiniloraError for a name that is no flag, and for a
    value that its flag would not take.
    """
    flags, taken = {name[2:]: flag for name, flag in parser._option_string_actions.items()}, set()
    for name, value in read_values(path, flags).items():
        key = name.replace("-", "_")
        if key not in flags or key in ("", "config", "help"):
            raise MiniloraError(f"{path}: {name!r} is no flag{nearest(key, flags)}")
        flag = flags[key]
        if flag.dest in taken:
            raise MiniloraError(f"{path}: {name!r} is there under another spelling, too")
        taken.add(flag.dest)
        if value is not None:
            try:
                parser.set_defaults(**{flag.dest: converted(flag, value)})
            except (ValueError, argparse.ArgumentTypeError) as error:
                raise MiniloraError(f"{path}: {name} is {value!r}: {error}") from None
            flag.required = False


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?`, where something known is spelt nearly so."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def converted(action: argparse.Action, value: Any) -> Any:
    """The value as the flag's own words would give it."""
    convert = action.type if callable(action.type) else str
    if action.default == argparse.SUPPRESS:  # a field of a config, which checks its values itself
        is_column = type(value) is int and action.metavar == "COLUMN"  # by its number
        return convert(value) if isinstance(value, str) else str(value) if is_column else value
    takes_several = action.nargs not in (None, 0, "?")
    items = value if takes_several and isinstance(value, list) else [value]
    if any(isinstance(item, list) for item in items):
        raise ValueError("it must be one value")
    items = [json.dumps(item) if isinstance(item, dict) else item for item in items]
    convert = boolean if action.nargs == 0 else convert
    found = [convert(str(item)) for item in items]
    if wrong := [item for item in found if action.choices and item not in action.choices]:
        raise ValueError(f"{wrong[0]!r} is none of {', '.join(map(str, action.choices or ()))}")
    is_short = action.nargs == "+" and not found
    if is_short or (isinstance(action.nargs, int) and takes_several and len(found) != action.nargs):
        raise ValueError(f"it must be a list of {'one or more' if is_short else action.nargs}")
    return found if takes_several else found[0]


def read_values(path: Path, flags: Iterable[str]) -> dict[str, Any]:
    """The flags that the file gives; of a run.json, those that its run was given or resolved, and
    of train's only what this command takes, too.
    """
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise ValueError("it is no file of at most 4 MB")
        text = path.read_text("utf-8")
        if path.suffix == ".json":
            values = json.loads(text, object_pairs_hook=unique_keys)
        else:
            values = read_yaml(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise MiniloraError(f"--config {path} cannot be read: {reason}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise MiniloraError(f"--config {path} holds no names with values: write NAME: VALUE")
    match values:
        case {"arguments": dict(arguments), "lora": dict(lora)}:
            recorded = {**arguments, **lora}
            passed = NOT_REPEATED | (vars(TrainConfig()) | vars(LoraConfig())).keys() - flags
            values = {name: recorded[name] for name in recorded if name not in passed}
    return values


def read_yaml(text: str) -> Any:
    import yaml  # which comes with transformers

    class Loader(yaml.SafeLoader):
        """Refuses a name that occurs twice, of which YAML would keep the last."""

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        unique_keys([(str(key.value), None) for key, _ in node.value])
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(error) from None
