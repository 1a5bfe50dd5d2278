"""Train every combination of several values of any of train's flags, and name the best run.

python -m minilora.sweep --train_file F --validation_file F --learning_rate 1e-4 1e-3 --r 4 8 --output_dir OUT
python -m minilora.sweep ... --seeds 3 --trials 10      ten of the grid at random, each of three seeds
python -m minilora.sweep ... --max_steps 600 --halving 3    the best third goes on after each third of the steps
python -m minilora.sweep --resume_from_checkpoint OUT   nothing else needed, whatever ended it

A flag that takes a list has several values as several quoted lists: --target_modules "query" "query value".
"""

import argparse
import dataclasses
import itertools
import random
import sys
import typing
from pathlib import Path
from typing import Any

from minilora import command
from minilora.errors import MiniloraError
from minilora.files import json_text
from minilora.lora.config import LoraConfig
from minilora.train import parse_arguments as parse_train
from minilora.training.config import TrainConfig

# Of train's flags these are a sweep's own, or none of its business.
NOT_SWEPT = ("output_dir", "resume_from_checkpoint", "extend", "allow_inexact_resume")


def main() -> int:
    asked = parse_arguments(sys.argv[1:])
    runs = [] if asked.resume_from_checkpoint else grid(asked)
    with command.stop_signals() as received:
        with command.without_collection():  # the slow imports: torch and transformers
            from minilora.fine_tuning import read_data
            from minilora.sweeping import Run, Sweep, run_sweep
            from minilora.training.run_directory import holding

        output_dir = Path(asked.resume_from_checkpoint or asked.output_dir)
        if asked.resume_from_checkpoint:
            sweep = Sweep.read(output_dir)
        else:
            sweep = Sweep([Run(f"run-{n:03}", *run) for n, run in enumerate(runs)], asked.halving)
            read_data(sweep.config())  # a file that is wrong, before anything is written
            with holding(output_dir, is_new=True):
                sweep.write(output_dir)
        is_done = run_sweep(sweep, output_dir, asked.jobs, lambda: bool(received))
    print_summary(sweep, output_dir, is_done)
    return command.INTERRUPTED + received[0] if received else 0


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = command.Parser("sweep", usage=__doc__)
    add = parser.add_argument
    add("--output_dir", metavar="OUT", help="a new directory")
    add("--resume_from_checkpoint", metavar="OUT", help="go on with a sweep; needs no other flag")
    add(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="runs of each combination; their mean counts",
    )
    add("--trials", type=int, metavar="N", help="so many combinations, drawn at random")
    add("--halving", type=int, metavar="N", help="after each Nth of the steps the best Nth go on")
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs at a time, each with a share of the cores",
    )
    for field in swept_fields():
        add(f"--{field.name}", nargs="*", metavar="VALUE", help="as of train")
    asked = parser.parse_args(arguments)
    if (asked.output_dir is None) == (asked.resume_from_checkpoint is None):
        parser.error(
            "give --output_dir for a new sweep, or --resume_from_checkpoint for one that is there"
        )
    for name, least in (("seeds", 1), ("trials", 1), ("halving", 2), ("jobs", 1)):
        if (value := getattr(asked, name)) is not None and value < least:
            parser.error(f"--{name} is {value}; it must be {least} or more")
    return asked


def swept_fields() -> list[dataclasses.Field]:
    fields = [*dataclasses.fields(TrainConfig), *dataclasses.fields(LoraConfig)]
    return [f for f in fields if f.metadata.get("help") and f.name not in NOT_SWEPT]


def grid(asked: argparse.Namespace) -> list[tuple[dict[str, Any], dict[str, Any], dict[str, str]]]:
    """Every combination: the arguments of its run and of its adapter, and the flags that vary. All
    are checked, so that a bad one is refused before anything trains.
    """
    axes = {
        f.name: values(f, words)
        for f in swept_fields()
        if (words := getattr(asked, f.name)) is not None
    }
    combinations = list(itertools.product(*axes.values()))
    if asked.trials is not None and asked.trials < len(combinations):
        kept = random.Random(0).sample(range(len(combinations)), asked.trials)  # the same each time
        combinations = [combinations[n] for n in sorted(kept)]
    found = []
    for words in combinations:
        named = dict(zip(axes, words, strict=True))
        flags = [word for name, value in named.items() for word in spelt(name, value)]
        train, lora = parse_train(flags)
        apart = {name: " ".join(value) for name, value in named.items() if len(axes[name]) > 1}
        first = TrainConfig(**train).seed
        for seed in range(first, first + asked.seeds):
            of_seed = {"seed": str(seed)} if asked.seeds > 1 else {}
            quiet = {"disable_tqdm": True} if asked.jobs > 1 else {}
            found.append((train | {"seed": seed} | quiet, lora, apart | of_seed))
            TrainConfig(**train), LoraConfig(**lora)
    check(asked, axes, TrainConfig(**found[0][0]))
    return found


def values(field: dataclasses.Field, words: list[str]) -> list[list[str]]:
    """The words of each value that a flag was given."""
    if list not in kinds(field) or any(" " in word for word in words):
        return [word.split() if list in kinds(field) else [word] for word in words] or [[]]
    return [words]


def kinds(field: dataclasses.Field) -> set[Any]:
    hints = typing.get_type_hints(TrainConfig) | typing.get_type_hints(LoraConfig)
    hint = hints[field.name]
    return {typing.get_origin(kind) or kind for kind in (hint, *typing.get_args(hint))}


def spelt(name: str, words: list[str]) -> list[str]:
    """The words of train's flag: a single one behind "=", for it may begin with a dash."""
    return [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words]


def check(asked: argparse.Namespace, axes: dict[str, Any], config: TrainConfig) -> None:
    """Refuse what no sweep can do with its grid."""
    if asked.seeds > 1 and len(axes.get("seed", [])) > 1:
        raise MiniloraError("--seeds and several values of --seed are both given: leave one out")
    compared = (
        "validation_file",
        "validation_split",
        "train_file",
        "task",
        "metric_for_best_model",
    )
    if several := [name for name in compared if len(axes.get(name, [])) > 1]:
        raise MiniloraError(f"--{several[0]} has several values: such runs cannot be compared")
    is_packaged = config.train_file is None and config.validation_split == 0
    if config.eval_strategy == "no" or not (
        is_packaged or config.validation_file or config.validation_split
    ):
        raise MiniloraError(
            "a sweep compares evaluations: give --validation_file, and no eval_strategy no"
        )
    if asked.halving is None:
        return
    if config.max_steps < asked.halving or len(axes.get("max_steps", [])) > 1:
        raise MiniloraError(
            f"--halving {asked.halving} needs one --max_steps, of as many steps or more"
        )
    if config.validation_split:
        raise MiniloraError("--halving needs a --validation_file, not a validation_split")


def print_summary(sweep: Any, output_dir: Path, is_done: bool) -> None:
    """A table of the runs, the best first, and one JSON object."""
    metric, last = sweep.metric(), len(sweep.scores) - 1
    print(f"{'run':<9}{'rung':>4}  {metric:<16}settings")
    best = None
    for rung in range(last, -1, -1):
        runs, scores = sweep.left(rung), sweep.scores[rung]
        beyond = {run.name for run in sweep.left(rung + 1)} if rung < last else set()
        for candidate in sweep.ranked([run for run in runs if run.name in scores], scores):
            for run in runs:
                if run.candidate() == candidate and run.name in scores and run.name not in beyond:
                    best = best or run
                    score = scores[run.name]
                    told = "failed" if score is None else f"{score:.4f}"
                    settings = ", ".join(f"{flag} {words}" for flag, words in run.axes.items())
                    print(f"{run.name:<9}{rung + 1:>4}  {told:<16}{settings}")
    if not is_done:
        print(
            f"not finished; go on: python -m minilora.sweep --resume_from_checkpoint {output_dir}"
        )
    place = str(output_dir / best.name) if best else None
    summary = {"finished": is_done, "runs": len(sweep.runs), "metric": metric, "best": place}
    print(json_text({**summary, "output_dir": str(output_dir)}))


if __name__ == "__main__":
    command.run_command(main)
