"""Curves, arguments and metrics of runs side by side, in one page that needs no network.

    python -m minilora.report RUN [RUN ...] [--output report.html]

RUN: what train wrote, finished or not; or a checkpoint, HF Trainer's too.
"""

import argparse
import sys

from minilora import command
from minilora.files import json_text


def main() -> None:
    asked = parse_arguments(sys.argv[1:])
    with command.without_collection():  # the slow import: torch
        from minilora.trained.report import write_report

    labels = write_report(asked.runs, asked.output)
    print(json_text({"output": asked.output, "runs": labels}))


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = command.Parser("report", usage=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run, or a checkpoint")
    help_text = "the page (default: report.html); an older one is replaced"
    parser.add_argument("--output", metavar="FILE", default="report.html", help=help_text)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    command.run_command(main)
