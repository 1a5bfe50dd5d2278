"""Predict with what `train` wrote: one JSON object for each text.

    python -m minilora.predict OUT --text "..." [--text_pair "..."]
    python -m minilora.predict OUT --file F --output P.jsonl
    python -m minilora.predict OUT - < one-text-per-line

Rows go to --output, or to stdout; the last line of stdout is the summary, one JSON object, too.
"""

import argparse
import sys
import time
from pathlib import Path

from minilora import command
from minilora.errors import MiniloraError
from minilora.files import json_text, new_lines
from minilora.options import boolean


def main() -> None:
    asked = parse_arguments(sys.argv[1:])
    with command.without_collection():  # the slow imports: torch and transformers
        from minilora.lora.merge import merge_adapter
        from minilora.trained import predict
        from minilora.trained.opened import check_ranks, open_run
        from minilora.training import distributed
        from minilora.training.progress import say

    output = Path(asked.output) if asked.output and command.is_first() else None
    with distributed.joined(), new_lines(output) as write:
        run = open_run(asked.path, asked.model_name_or_path, asked.device)
        check_ranks(run, vars(asked))
        if asked.file is not None:
            columns = (asked.text_column, asked.text_pair_column)
            rows = predict.rows_of_file(run, asked.file, columns, labelled=False)
        elif asked.text is not None:
            rows = predict.rows_of_texts([(asked.text, asked.text_pair)])
        elif distributed.world_size() > 1:
            raise MiniloraError("several processes cannot share standard input: give --file F")
        elif sys.stdin is None:
            raise MiniloraError("standard input is closed: give --text TEXT or --file F")
        else:
            rows = predict.rows_of_texts(predict.texts_of_lines(sys.stdin.buffer))
        if asked.merge or (asked.merge is None and run.record.arguments.dtype == "float32"):
            merge_adapter(run.model)
        count, truncated, start = 0, 0, time.perf_counter()
        place = asked.file or ("standard input" if asked.text is None else "--text")
        how = (asked.per_device_eval_batch_size, place)
        for predictions, cut in predict.predict_windows(run, rows, *how):
            for prediction in predictions if command.is_first() else []:
                write(json_text(prediction))
            count, truncated = count + len(predictions), truncated + cut
        seconds = time.perf_counter() - start
    if truncated:
        say(f"{truncated} of {count} texts were cut at {run.max_length} tokens")
    summary = {"predictions": count, "truncated": truncated, "predict_runtime": seconds}
    print(json_text({**summary, "output": asked.output, "adapter": str(run.adapter)}))


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = command.Parser("predict", usage=__doc__)
    command.add_run_arguments(parser, "text_column", "text_pair_column")
    add = parser.add_argument
    add("stdin", metavar="-", nargs="?", choices=["-"], help="read stdin, one text per line")
    add("--text", help="the text itself")
    add("--text_pair", metavar="TEXT", help="the second text of a pair")
    add("--file", help="as in training, or texts; labels are not looked at")
    add("--output", metavar="P.jsonl", help="a new file for the predictions; by default stdout")
    # Half precision would round the sum.
    merge = "fold the adapter into the weights first, which is faster; by default in float32"
    add("--merge", type=boolean, metavar="BOOL", help=merge)
    add("--per_device_eval_batch_size", type=int, metavar="N", help="by default as in training")
    asked = parser.parse_intermixed_args(arguments)
    if sum(source is not None for source in (asked.stdin, asked.text, asked.file)) != 1:
        parser.error("give one source of texts: --text TEXT, --file F, or - for standard input")
    if asked.text_pair is not None and asked.text is None:
        parser.error("--text_pair is the second text of --text")
    size = asked.per_device_eval_batch_size
    if size is not None and size < 1:
        parser.error(f"--per_device_eval_batch_size: {size} is no whole number of 1 or more")
    return asked


if __name__ == "__main__":
    command.run_command(main)
