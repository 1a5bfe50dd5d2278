"""Print what a report of a fault should name: versions, processor, threads, GPU.

python -m minilora.env
"""

import argparse
import os
import platform
import sys

from minilora import command
from minilora.files import json_text


def main() -> None:
    parse_arguments(sys.argv[1:])
    with command.without_collection():  # the slow import: torch
        from minilora.training.record import environment

    found = environment() | {"platform": platform.platform(), "cores": os.cpu_count()}
    for name, value in found.items():
        print(f"{name:<16}{'-' if value is None else value}")
    print(json_text(found))


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    return command.Parser("env", usage=__doc__).parse_args(arguments)


if __name__ == "__main__":
    command.run_command(main)
