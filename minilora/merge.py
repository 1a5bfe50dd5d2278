"""Merge what `train` wrote into its base model: an ordinary model directory.

python -m minilora.merge OUT --output_dir MERGED
python -m minilora.merge --adapter A B --weights .7 .3 --output_dir MERGED
"""

import argparse
import sys
from pathlib import Path

from minilora import command
from minilora.files import json_text
from minilora.training.config import DTYPES


def main() -> None:
    asked = parse_arguments(sys.argv[1:])
    with command.without_collection():  # the slow imports: torch and transformers
        from minilora.bert.tasks import task_class
        from minilora.trained.merge import write_merged_model
        from minilora.trained.opened import read_record

    paths = asked.adapter if asked.path is None else [asked.path]
    how = (asked.weights, asked.max_shard_size, asked.dtype, asked.model_name_or_path)
    write_merged_model(paths, asked.output_dir, *how)
    _, record = read_record(Path(paths[0]))
    tag = task_class(record.arguments.task).pipeline_tag
    print(f'use it: transformers.pipeline("{tag}", {asked.output_dir!r})')
    print(json_text({"output_dir": asked.output_dir, "merged": paths, "dtype": asked.dtype}))


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = command.Parser("merge", usage=__doc__)
    add = parser.add_argument
    add("path", metavar="OUT", nargs="?", help="what train wrote, a checkpoint, or a PEFT adapter")
    add("--output_dir", required=True, metavar="MERGED", help="a new directory")
    add("--adapter", nargs="+", metavar="OUT", help="several of them, instead of one")
    add("--weights", nargs="+", type=float, metavar="X", help="of each update; heads are averaged")
    add("--max_shard_size", default="5GB", metavar="SIZE", help="of one file (default: 5GB)")
    add("--dtype", default="float32", choices=DTYPES, help="of the weights (default: float32)")
    command.add_base_argument(parser)
    asked = parser.parse_args(arguments)
    if (asked.path is None) == (asked.adapter is None):
        parser.error("give one run, or several with --adapter A B --weights X Y")
    return asked


if __name__ == "__main__":
    command.run_command(main)
