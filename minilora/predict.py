"""Predict with what `train` wrote: one JSON object for each text.

    python -m minilora.predict OUT --text "..." [--text_pair "..."]
    python -m minilora.predict OUT --file F --output P.jsonl
    python -m minilora.predict OUT - < one-text-per-line

Rows go to --output, or to stdout; the last line of stdout is the summary, one JSON object, too.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from minilora.command import (
    Parser,
    add_column_arguments,
    add_run_arguments,
    boolean,
    positive,
    run_command,
    without_collection,
)

if TYPE_CHECKING:
    from minilora.bert.tables import Row
    from minilora.trained.run import Record


def main() -> int:
    """Parse, predict, print. Returns the exit code."""
    asked = parse_arguments(sys.argv[1:])
    with without_collection():  # the slow imports: torch and transformers
        from minilora.durable import new_lines
        from minilora.lora.merge import merge_adapter
        from minilora.trained.prediction import predict_windows
        from minilora.trained.run import open_run
        from minilora.training.progress import say

    with new_lines(Path(asked.output) if asked.output else None) as write:
        run = open_run(asked.path, asked.model_name_or_path, asked.device)
        rows = rows_to_predict(asked, run.record)
        if asked.merge if asked.merge is not None else run.record.config.dtype == "float32":
            merge_adapter(run.model)
        count, truncated, start = 0, 0, time.perf_counter()
        for window in predict_windows(run, rows, asked.per_device_eval_batch_size):
            for row in window.rows:
                write(json.dumps(row))
            count, truncated = count + len(window.rows), truncated + window.truncated
        seconds = time.perf_counter() - start
    if truncated:
        say(f"{truncated} of {count} texts were cut at {run.max_length} tokens")
    summary = {"predictions": count, "truncated": truncated, "predict_runtime": seconds}
    summary["predict_samples_per_second"] = count / seconds
    print(json.dumps({**summary, "output": asked.output, "adapter": str(run.record.adapter)}))
    return 0


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The flags of this command, exactly one source of texts among them."""
    parser = Parser(
        prog="python -m minilora.predict",
        usage="%(prog)s OUT (--text TEXT | --file F | -) [flags]",
        description="Predict the labels of texts with what train wrote.",
        allow_abbrev=False,
    )
    add_run_arguments(parser)
    parser.add_argument(
        "stdin",
        metavar="-",
        nargs="?",
        choices=["-"],
        help="read standard input, one text per line",
    )
    parser.add_argument("--text", help="the text itself")
    parser.add_argument("--text_pair", metavar="TEXT", help="the second text of a pair")
    parser.add_argument("--file", help="csv, tsv, json or jsonl; labels are not looked at")
    add_column_arguments(parser, "text_column", "text_pair_column")
    parser.add_argument(
        "--output", metavar="P.jsonl", help="a new file for the predictions; by default stdout"
    )
    parser.add_argument(
        "--merge",
        type=boolean,
        metavar="BOOL",
        help="fold the adapter into the weights first, which is faster; by default in float32, "
        "for half precision would round the sum",
    )
    parser.add_argument(
        "--per_device_eval_batch_size",
        type=positive,
        metavar="N",
        help="texts in a batch; by default as in training",
    )
    asked = parser.parse_intermixed_args(arguments)
    if sum(source is not None for source in (asked.stdin, asked.text, asked.file)) != 1:
        parser.error("give one source of texts: --text TEXT, --file F, or - for standard input")
    if asked.text_pair is not None and asked.text is None:
        parser.error("--text_pair is the second text of --text")
    return asked


def rows_to_predict(asked: argparse.Namespace, record: "Record") -> "Iterable[Row]":
    """The texts to predict, from wherever they come; a stream is read as it is needed."""
    from minilora.trained.prediction import rows_of_lines, rows_of_texts, unlabelled_rows

    if asked.text is not None:
        return rows_of_texts(
            [asked.text if asked.text_pair is None else (asked.text, asked.text_pair)]
        )
    if asked.file is not None:
        return unlabelled_rows(record, Path(asked.file), asked.text_column, asked.text_pair_column)
    return rows_of_lines(sys.stdin.buffer)


if __name__ == "__main__":
    run_command(main)
