"""Train every combination of several values of train's flags, and name the best run.

python -m minilora.sweep --train_file F --validation_file F --r 4 8 --seeds 3 --output_dir OUT
    --trials 10                 ten combinations of the grid, drawn at random
    --max_steps 600 --halving 3     after each third of the steps, the best third goes on
python -m minilora.sweep --resume_from_checkpoint OUT    nothing else needed, whatever ended it

Where a flag takes a list, several are given in quotes: --target_modules "query" "query value".
"""

import argparse
import dataclasses
import math
import random
import shlex
import sys
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora import command
from minilora.errors import MiniloraError
from minilora.files import json_text
from minilora.lora.config import LoraConfig
from minilora.train import parse_arguments as parse_train
from minilora.training.config import TrainConfig

if TYPE_CHECKING:
    from minilora.sweeping import Sweep

# Of train's flags, those that a sweep has of its own, and those that are for a resume.
NOT_SWEPT = ("output_dir", "resume_from_checkpoint", "extend", "allow_inexact_resume")
# What has to be the same for runs to be compared.
COMPARED = (
    "task",
    "train_file",
    "dataset_name",
    "validation_file",
    "validation_split",
    "metric_for_best_model",
    "greater_is_better",
    "eval_strategy",
)
MOST = 10_000  # runs: more would take long to check, and longer to train
Combination = tuple[dict[str, Any], dict[str, Any], dict[str, str]]  # as of `sweeping.Run`


def main() -> int:
    asked = parse_arguments(sys.argv[1:])
    combinations = [] if asked.resume_from_checkpoint else grid(asked)
    with command.stop_signals() as received:
        with command.without_collection():  # the slow imports: torch and transformers
            from minilora import sweeping
            from minilora.trained.report import write_report
        output_dir = Path(asked.resume_from_checkpoint or asked.output_dir)
        if asked.resume_from_checkpoint:
            sweep = sweeping.Sweep.read(output_dir)
        else:
            sweep = sweeping.begin(output_dir, combinations, asked.halving)
        is_done = sweeping.run_sweep(sweep, output_dir, asked.jobs, lambda: bool(received))
    scored = [output_dir / run.name for run, _, score in sweep.table() if score is not None]
    if is_done and scored:
        write_report(scored, output_dir / "report.html")
    print_summary(sweep, output_dir, is_done)
    if received:
        return command.INTERRUPTED + received[0]
    return 0 if scored else 1


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = command.Parser("sweep", usage=__doc__)
    add = parser.add_argument
    add("--output_dir", metavar="OUT", help="a new directory")
    add("--resume_from_checkpoint", metavar="OUT", help="a sweep to go on with")
    add("--seeds", type=int, default=1, metavar="N", help="runs of each; their mean counts")
    add("--trials", type=int, metavar="N", help="combinations, drawn from the grid at random")
    add("--halving", type=int, metavar="N", help="after each Nth of the steps the best Nth go on")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time, sharing the cores")
    for field in swept_fields():
        names = [f"--{name}" for name in (field.name, field.metadata.get("alias")) if name]
        add(*names, nargs="*", metavar="VALUE", help="as of train")
    asked = parser.parse_args(arguments)
    if (asked.output_dir is None) == (asked.resume_from_checkpoint is None):
        parser.error(
            "give --output_dir for a new sweep, or --resume_from_checkpoint for an old one"
        )
    if asked.resume_from_checkpoint:
        kept = ("resume_from_checkpoint", "jobs", "config")
        changed = [n for n, value in vars(asked).items() if value != parser.get_default(n)]
        if changed := [f"--{name}" for name in changed if name not in kept]:
            parser.error(f"a sweep goes on as it began: leave out {', '.join(changed)}")
    for name, least in (("seeds", 1), ("trials", 1), ("halving", 2), ("jobs", 1)):
        value = getattr(asked, name)
        if value is not None and value < least:
            parser.error(f"--{name} is {value}; it must be {least} or more")
    return asked


def swept_fields() -> list[dataclasses.Field]:
    fields = [*dataclasses.fields(TrainConfig), *dataclasses.fields(LoraConfig)]
    return [f for f in fields if f.metadata.get("help") and f.name not in NOT_SWEPT]


def grid(asked: argparse.Namespace) -> list[Combination]:
    """Every combination: the arguments of its run and of its adapter, and the words of the flags
    that vary. All are checked: a bad one is refused before anything trains.
    """
    given = {f.name: getattr(asked, f.name) for f in swept_fields()}
    axes = {name: values(name, words) for name, words in given.items() if words is not None}
    total = math.prod(map(len, axes.values()))
    trials = min(asked.trials or total, total)
    if (runs := trials * asked.seeds) > MOST or total > sys.maxsize:
        told = f"{runs:,} runs of {total:,} combinations: at most {MOST:,} are made"
        raise MiniloraError(f"{told}: give fewer values, or --trials")
    # The same ones whenever the same is asked; a grid may be too large to be listed.
    drawn = range(total) if trials == total else random.Random(0).sample(range(total), trials)
    found: list[Combination] = []
    for number in drawn:
        words = {}
        for name in reversed(axes):  # the last one varies first
            number, place = divmod(number, len(axes[name]))
            words[name] = axes[name][place]
        train, lora = parse_train([word for n, value in words.items() for word in spelt(n, value)])
        LoraConfig(**lora)
        apart = {name: " ".join(words[name]) for name in axes if len(axes[name]) > 1}
        seed = TrainConfig(**train).seed
        if asked.jobs > 1:
            train["disable_tqdm"] = True
        for own in range(seed, seed + asked.seeds):
            of_seed = {"seed": str(own)} if asked.seeds > 1 else {}
            found.append(({**train, "seed": own}, lora, apart | of_seed))
    check(asked, axes, TrainConfig(**found[0][0]))
    return found


def values(name: str, words: list[str]) -> list[list[str]]:
    """The words of each value that a flag was given."""
    hints = typing.get_type_hints(TrainConfig) | typing.get_type_hints(LoraConfig)
    kinds = (hints[name], *typing.get_args(hints[name]))
    if not any(typing.get_origin(kind) is list for kind in kinds):
        return [[word] for word in words] or [[]]
    return [word.split() for word in words] if any(" " in word for word in words) else [words]


def spelt(name: str, words: list[str]) -> list[str]:
    """A flag of train's; one word behind "=", for it may begin with a dash."""
    return [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words]


def check(asked: argparse.Namespace, axes: dict[str, Any], config: TrainConfig) -> None:
    """Refuse what cannot be compared, or halved."""
    several = {name for name in axes if len(axes[name]) > 1}
    for name, found in axes.items():
        if twice := [words for words in found if found.count(words) > 1]:
            raise MiniloraError(f"--{name} has {' '.join(twice[0])!r} twice: once is enough")
    if asked.seeds > 1 and "seed" in several:
        raise MiniloraError("--seeds and several values of --seed are both given: leave one out")
    for name in several.intersection(COMPARED):
        raise MiniloraError(f"--{name} has several values: such runs cannot be compared")
    own = config.train_file or config.dataset_name
    has_data = config.validation_file or config.validation_split or config.dataset_name or not own
    if config.eval_strategy == "no" or not has_data:
        raise MiniloraError("a sweep compares evaluations: give --validation_file to evaluate on")
    if asked.halving and ("max_steps" in several or config.max_steps < asked.halving):
        raise MiniloraError(f"--halving {asked.halving} needs one --max_steps, at least as many")
    if asked.halving and own and not config.validation_file:
        raise MiniloraError("--halving needs a --validation_file, a file of its own")


def print_summary(sweep: "Sweep", output_dir: Path, is_done: bool) -> None:
    """A table of the runs, those that came furthest first, of them the best; and a JSON object."""
    metric, table = sweep.metric(), sweep.table()
    print(f"{'run':<9}{'rung':<6}{metric:<16}settings")
    for run, rung, score in table:
        told = "failed" if score is None else f"{score:.4f}"
        settings = ", ".join(f"{flag} {words}" for flag, words in run.axes.items())
        print(f"{run.name:<9}{rung + 1:<6}{told:<16}{settings}")
    if not is_done:
        go_on = f"--resume_from_checkpoint {shlex.quote(str(output_dir))}"
        print(f"stopped; nothing is lost: python -m minilora.sweep {go_on}")
    # The first has failed only where all have that came as far.
    best = str(output_dir / table[0][0].name) if table and table[0][2] is not None else None
    if is_done and best:
        print(f"side by side: {output_dir / 'report.html'}")
    told = {"finished": is_done, "runs": len(sweep.runs), "metric": metric, "best": best}
    print(json_text({**told, "output_dir": str(output_dir)}))


if __name__ == "__main__":
    command.run_command(main)
