"""Score what `train` wrote on a labelled file, under the metrics of training.

    python -m minilora.evaluate OUT --file F [--confusion_matrix]

On training's own validation file the numbers are bitwise those that training printed.
"""

import argparse
import sys
from typing import Any

from minilora import command
from minilora.files import json_text


def main() -> None:
    asked = parse_arguments(sys.argv[1:])
    with command.without_collection():  # the slow imports: torch and transformers
        from minilora.trained.opened import check_ranks, open_run
        from minilora.trained.score import evaluate_file
        from minilora.training import distributed
        from minilora.training.progress import say

    with distributed.joined():
        run = open_run(asked.path, asked.model_name_or_path, asked.device)
        check_ranks(run, vars(asked))
        columns = (asked.text_column, asked.text_pair_column, asked.label_column)
        scores = evaluate_file(run, asked.file, *columns)
    summary = {**scores.metrics, "file": asked.file, "adapter": str(run.adapter)}
    if asked.confusion_matrix and scores.confusion is not None:
        labels, counts = run.task.labels or [], scores.confusion.tolist()
        rows = [[label, *row] for label, row in zip(labels, counts, strict=True)]
        print_table([["true \\ predicted", *labels], *rows])
        summary |= {"confusion_matrix": counts, "labels": labels}
    elif asked.confusion_matrix:
        say(f"warning: no confusion matrix: {run.task.name} gives no text one class of several")
    if scores.by_class:
        rows = [[label, *row.values()] for label, row in scores.by_class.items()]
        print_table([["class", *next(iter(scores.by_class.values()))], *rows])
        summary |= {"per_class": scores.by_class}
    print(json_text(summary))


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = command.Parser("evaluate", usage=__doc__)
    command.add_run_arguments(parser, "text_column", "text_pair_column", "label_column")
    add = parser.add_argument
    add("--file", required=True, help="labelled, in a format of training's")
    add("--confusion_matrix", action="store_true", help="print which class was taken for which")
    return parser.parse_args(arguments)


def print_table(rows: list[list[Any]]) -> None:
    """The rows in columns as wide as their widest cell; the first row holds the names."""
    table = [[f"{v:.4f}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    command.run_command(main)
