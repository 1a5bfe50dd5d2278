"""Say what a directory is, whether it verifies, and what a resume would do with it.

    python -m minilora.inspect PATH [--tensors] [--json]
    python -m minilora.inspect --diff A B [--json]

PATH: a run, checkpoint (ours or HF Trainer's), adapter or model. Nothing is run, nothing changed.
"""

import argparse
import sys
from typing import Any

from minilora import command
from minilora.files import json_text

SHOWN = 20  # differences printed of each sort; --json has all of them
SUMMARY = ("path", "kind", "verified", "problems", "position", "trainable", "resume")


def main() -> None:
    asked = parse_arguments(sys.argv[1:])
    if asked.diff:
        from minilora.trained.compare import compare_directories  # the slow import: torch

        found = compare_directories(*asked.diff)
        lists = {name: found[name] for name in ("tensors", "arguments", "log")}
        summary = {name: len(entries) for name, entries in lists.items()}
        shown = {name: entries[:SHOWN] for name, entries in lists.items()}
        report = {**found, **shown, "different": summary}
    else:
        from minilora.trained.directory import inspect_directory

        found = inspect_directory(asked.path)
        tensors = found["tensors"] if asked.tensors else len(found["tensors"])
        report = {**found, "arguments": None, "tensors": tensors}
        summary = {name: found[name] for name in SUMMARY}
    if not asked.json:
        print(as_yaml(report))
    print(json_text(found if asked.json else summary))


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = command.Parser("inspect", usage=__doc__)
    add = parser.add_argument
    add("path", metavar="PATH", nargs="?", help="a run, checkpoint, adapter or model")
    add("--diff", nargs=2, metavar=("A", "B"), help="in what two directories differ")
    add("--tensors", action="store_true", help="list every tensor with shape and norm")
    add("--json", action="store_true", help="everything, as one JSON object only")
    asked = parser.parse_args(arguments)
    if (asked.path is None) == (asked.diff is None):
        parser.error("give one PATH, or two with --diff A B")
    return asked


def as_yaml(report: dict[str, Any]) -> str:
    """For a person: what is empty is left out, what no terminal should see is escaped."""
    import yaml  # which comes with transformers

    full = {name: value for name, value in report.items() if value not in (None, [], {})}
    if "config" in full:
        full["config"] = {name: value for name, value in full["config"].items() if value}
    return yaml.safe_dump(full, sort_keys=False, allow_unicode=True, default_flow_style=None)


if __name__ == "__main__":
    command.run_command(main)
