"""Write the tables of docs/commands.md: every flag of every command, from the parsers themselves.

python docs/scripts/commands.py
"""

import argparse
import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any
from unittest import mock

from minilora.command import Parser
from minilora.training.config import TASKS, TrainConfig

PAGE = Path(__file__).parents[1] / "commands.md"
COMMANDS = ("train", "evaluate", "predict", "merge", "inspect", "sweep", "env")
DEFAULT = re.compile(r"(.*?)(?: \(default: (.*)\))?")

AS_OF_TRAIN = "as of train"  # of sweep: all of train's flags, which one table lists

MARK = "<!-- From here on: python docs/scripts/commands.py -->\n"


class Built(Exception):
    """Raised with a parser in the moment at which it would begin to parse."""


def parser_of(command: str) -> argparse.ArgumentParser:
    def stop(parser: Parser, *_: object) -> None:
        raise Built(parser)

    module = importlib.import_module(f"minilora.{command}")
    with mock.patch.multiple(Parser, parse_args=stop, parse_intermixed_args=stop):
        try:
            module.parse_arguments([])
        except Built as built:
            return built.args[0]
    raise AssertionError(f"{command} has no parser")


def values_of(action: argparse.Action) -> str:
    """What may stand behind a flag: its choices, or a word for it, as often as it is taken."""
    if action.nargs == 0 or not action.option_strings:
        return ""
    if action.choices:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    word = action.metavar or action.dest.upper()
    if not isinstance(word, str):
        return f"`{' '.join(word)}`"
    return {"?": f"`[{word}]`", "+": f"`{word} ...`"}.get(str(action.nargs), f"`{word}`")


def of_tasks(tasks: tuple[str, ...]) -> str:
    """For which tasks a flag is, shortly."""
    others = [task for task in TASKS if task not in tasks]
    if not tasks or not others:
        return ""
    return f" (not for {others[0]})" if len(others) == 1 else f" (for {', '.join(tasks)})"


def row_of(action: argparse.Action, traits: Any) -> str:
    """One line of a table; `traits` is the metadata of the flag's field, None where it has none."""
    name = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.metavar}`"
    found = DEFAULT.fullmatch(action.help or "")
    assert found
    text, default = (part or "" for part in found.groups())
    needed = "required" if action.required and action.option_strings else ""
    cells = [name, values_of(action), f"`{default}`" if default else needed, text]
    if traits is not None:
        cells[-1] += of_tasks(traits.get("tasks", ()))
        cells.append("yes" if traits.get("is_free") else "")
    return f"| {' | '.join(cell.replace('<', '&lt;').replace('|', '/') for cell in cells)} |"


def section(command: str) -> str:
    """A command's purpose and usage, as its module says it, and a table for each group of flags."""
    parser = parser_of(command)
    purpose, _, usage = (parser.usage or "").strip().partition("\n\n")
    usage, _, more = usage.strip().partition("\n\n")
    lines = [f"## {command}", "", purpose, ""]
    for line in usage.splitlines():
        way, *remark = re.split(" {3,}", line.strip(), maxsplit=1)
        lines.append(f"- `{way}`" + "".join(f": {words}" for words in remark))
    lines += ["", more] if more else []
    is_train, groups = command == "train", dict[str, list[str]]()
    traits = {field.name: field.metadata for field in dataclasses.fields(TrainConfig)}
    for group in parser._action_groups:
        # The groups of argparse's own have other titles from version to version.
        is_own = group in (parser._positionals, parser._optionals)
        rows = groups.setdefault("" if is_own else f"### {command}: {group.title}", [])
        for action in group._group_actions:
            if action.dest != "help" and action.help != AS_OF_TRAIN:
                rows.append(row_of(action, traits.get(action.dest, {}) if is_train else None))
    for title, rows in groups.items():
        if rows:
            lines += ["", title] if title else []
            more = " on a resume |" if is_train else ""
            lines += ["", f"| flag | values | default | |{more}", "|---" * (4 + is_train) + "|"]
            lines += rows
    return "\n".join(lines)


def page() -> str:
    """The page as it should be: its head, which is written by hand, and the sections."""
    head, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    return head + mark + "\n" + "\n\n".join(map(section, COMMANDS)) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
