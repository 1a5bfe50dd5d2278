"""What every command does around its work: flags from dataclasses, errors as one line, signals as a
request to stop.

Imports nothing but the standard library, so that `--help` answers at once.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import signal
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from minilora.errors import MiniloraError

BAD_INPUT = 2
INTERRUPTED = 128  # plus the signal's number, as shells count
LONGEST_LINE = 2000


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, `error: ...`, with exit code 2, and to which
    `--learning-rate` and `--learning_rate` are the same flag.
    """

    def parse_known_args(self, args: list[str], namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().parse_known_args([_with_underscores(word) for word in args], namespace)

    def error(self, message: str) -> typing.NoReturn:
        # A newline inside a value must not break the one line.
        sys.stderr.write(f"error: {' '.join(message.split())} (see --help)\n")
        raise SystemExit(BAD_INPUT)


def add_fields(
    parser: argparse.ArgumentParser,
    config: type,
    group: str | None = None,
    defaults: dict[str, Any] | None = None,
) -> None:
    """One flag for each field of dataclass `config` that has a help text, under its own name.

    Lists are separated by spaces; a boolean flag alone means true. A flag that is not given leaves no trace in the namespace, so
    that a resume can tell what was asked.
    """
    hints = typing.get_type_hints(config)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        help_text = field.metadata.get("help")
        if help_text is None:
            continue
        title = group or field.metadata["group"]
        section = groups.setdefault(
            title, parser.add_argument_group(title) if title not in groups else None
        )
        default = (defaults or {}).get(field.name, field.default)
        shown = "" if default in (None, False, dataclasses.MISSING) else f" (default: {default})"
        section.add_argument(
            f"--{field.name}",
            default=argparse.SUPPRESS,
            help=(help_text + shown).replace("%", "%%"),
            **_value_options(field.name, hints[field.name], field.metadata.get("choices")),
        )


def parsed_fields(config: type, namespace: argparse.Namespace) -> dict[str, Any]:
    """The fields of `config` that were given on the command line."""
    names = [field.name for field in dataclasses.fields(config)]
    return {name: getattr(namespace, name) for name in names if hasattr(namespace, name)}


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command after training takes: the run, and what may have moved since."""
    parser.add_argument(
        "path", metavar="OUT", help="what train wrote, a checkpoint in it, or a PEFT adapter"
    )
    add_base_argument(parser)
    parser.add_argument("--device", help="cpu, cuda, ...; by default as in training")


def add_base_argument(parser: argparse.ArgumentParser) -> None:
    """The base model, where it is no longer at its recorded place."""
    parser.add_argument(
        "--model_name_or_path",
        metavar="PATH",
        help="the base model, if it has moved; checked by its fingerprint",
    )


def add_column_arguments(parser: argparse.ArgumentParser, *names: str) -> None:
    """The columns of a file, where they are not called as in training."""
    for name in names:
        parser.add_argument(f"--{name}", metavar="COLUMN", help="by default as in training")


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Pause Python's garbage collector around the imports of torch and transformers, and exempt what
    they leave behind: its passes over ever more objects are a sixth of the time they take.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def run_command(main: Callable[[], int]) -> typing.NoReturn:
    """Call `main` and end the process with its exit code; a user's error becomes one line and code
    2.

    SIGTERM ends `main` as SIGINT does, by an exception: what cleans up after itself still does. (A
    script's background job starts with SIGINT ignored, and python would leave it at that.)
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        code = main()
    except MiniloraError as error:
        _complain(str(error))
        code = BAD_INPUT
    except OSError as error:
        # The disk, not the user's arguments: full, read-only, gone.
        place = f"{error.filename}: " if error.filename else ""
        _complain(f"{place}{error.strerror or error}")
        code = 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = INTERRUPTED + signal.SIGINT
    raise SystemExit(code)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Inside, the first SIGINT or SIGTERM is put into the list that is yielded, for the loop to
    see.

    A second one, of either kind, ends the process at once, as if there were no handler; checkpoints
    are safe against that. Outside the main thread (a notebook's or a server's) signals are left alone.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def remember(number: int, frame: types.FrameType | None) -> None:
        if received:
            # Not reset in advance: python complains of a signal that comes in just before that.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(number)
        # Not through sys.stderr, which the signal may have interrupted in the midst of a write, and
        # which may be closed.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; once more to stop at once\n")

    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, remember) for number in handled}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_on_signal(number: int, frame: types.FrameType | None) -> typing.NoReturn:
    raise SystemExit(INTERRUPTED + number)


def _complain(message: str) -> None:
    # One line, of a length that can be read, whatever a damaged file holds.
    line = " ".join(message.split())
    shown = line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..."
    sys.stderr.write(f"error: {shown}\n")


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def _value_options(name: str, hint: Any, choices: tuple[str, ...] | None) -> dict[str, Any]:
    """argparse's options for a field's type: int, float, str, bool, lists of them, unions, JSON
    objects.
    """
    if choices is not None:
        return {"choices": choices}
    kinds = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
    kinds.discard(type(None))
    origins = {typing.get_origin(kind) for kind in kinds}
    if list in origins:
        integers = any(typing.get_args(kind) == (int,) for kind in kinds)
        # A single word stays a string where the field takes one: a regular expression, or
        # all-linear.
        return {
            "nargs": "+",
            "type": int if integers else str,
            "action": _ListOrString if str in kinds else "store",
            "metavar": "N" if integers else "NAME",
        }
    if dict in origins:
        return {"type": _json_object, "metavar": "JSON"}
    if kinds == {bool, str}:
        return {"type": _bool_or_string, "metavar": "VALUE"}
    if bool in kinds:
        return {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    if kinds == {int, float} or kinds == {float}:
        return {"type": _number if int in kinds else float, "metavar": "X"}
    return (
        {"type": int, "metavar": "N"}
        if kinds == {int}
        else {"type": str, "metavar": name.rpartition("_")[2].upper()}
    )


class _ListOrString(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        assert isinstance(values, list)
        is_pattern = len(values) == 1 and (
            values[0] == "all-linear" or not values[0].replace(".", "_").isidentifier()
        )
        setattr(namespace, self.dest, values[0] if is_pattern else values)


def boolean(text: str) -> bool:
    """A flag's value that is true or false."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return words[text.lower()]


def positive(text: str) -> int:
    """A flag's value that is a whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def _bool_or_string(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object such as {{"query": 4}}')
    return value
