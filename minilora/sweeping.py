"""A sweep: ordinary runs, each in a directory of its own, of which the worst are paused for good.

    OUT/sweep.json               what was asked, and the scores of each rung so far
    OUT/run-000, run-001, ...    what `train` writes

A rung ends where all runs that are left have taken a share of their steps; the best go on. As a
resume is exact, they end in the bits of runs that were never paused. Whatever kills a sweep, what
is here says where it goes on. Not here: flags (sweep), what a run is (fine_tuning).
"""

import dataclasses
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minilora import files, starting_model
from minilora.bert.splits import SENTENCES, Splits
from minilora.bert.tasks import build_task
from minilora.errors import MiniloraError
from minilora.fine_tuning import Pieces, read_data, run_fine_tuning, tokenize_all
from minilora.reading import check_like, read_json
from minilora.trained.opened import open_run
from minilora.trained.score import evaluate_file
from minilora.training.checkpoint import latest_checkpoint
from minilora.training.config import TrainConfig
from minilora.training.evaluation import check_computed
from minilora.training.progress import say
from minilora.training.record import PATHS, RUN_NAME, RunRecord
from minilora.training.run_directory import holding

SWEEP_NAME = "sweep.json"
PACKAGED = SENTENCES / "validation.tsv"
# What of a run's arguments may be wrong in a way that its model, or its labels, tell.
BEGINNING = (
    "model_name_or_path", "model_revision", "on_adapter", "class_weights", "max_length", "stride",
    "device", "dtype",
)  # fmt: skip
Scores = dict[str, float | None]  # the metric that ranks, by a run's name; None of one that failed


@dataclass(frozen=True)
class Run:
    """One combination of a grid."""

    name: str  # of its directory
    train: dict[str, Any]  # the given arguments, as `run_fine_tuning` takes them
    lora: dict[str, Any]
    axes: dict[str, str]  # what sets it apart: the words of each flag with several values

    def candidate(self) -> tuple[str, ...]:
        """What it shares with the runs of other seeds, beside which it is judged by their mean."""
        return tuple(f"{flag}={words}" for flag, words in self.axes.items() if flag != "seed")


@dataclass(frozen=True)
class Sweep:
    """What was asked, and what has come of it so far: all that sweep.json holds."""

    runs: list[Run]
    halving: int | None  # after each such share of the steps one in so many goes on; None: all do
    scores: list[Scores] = field(default_factory=list)  # of each rung

    def write(self, output_dir: Path) -> None:
        text = files.json_text(dataclasses.asdict(self), indent=2)
        files.write_file(output_dir / SWEEP_NAME, f"{text}\n".encode())

    @staticmethod
    def read(output_dir: Path) -> "Sweep":
        path = output_dir / SWEEP_NAME
        values = read_json(path)
        found = {"runs": list[Any], "halving": int | None, "scores": list[dict[str, float | None]]}
        check_like(found, values, path)
        if not values["runs"]:
            raise MiniloraError(f"{path} has no runs: begin the sweep anew")
        run = {"name": str, "train": dict, "lora": dict, "axes": dict}
        for place, runs in enumerate(values["runs"]):
            check_like(run, runs, path, f"runs.{place}")
        runs = [Run(**{name: found[name] for name in run}) for found in values["runs"]]
        return Sweep(runs, values["halving"], values["scores"])

    def config(self) -> TrainConfig:
        """The arguments of the first run; those that a sweep asks for are the same for all."""
        return TrainConfig(**self.runs[0].train)

    def metric(self) -> str:
        return self.config().best_metric() or "eval_loss"

    def pauses(self) -> list[int | None]:
        """The step at which each rung ends; None is the end of the run."""
        shares = range(1, self.halving or 1)
        return [math.ceil(self.config().max_steps * n / len([0, *shares])) for n in shares] + [None]

    def left(self, rung: int) -> list[Run]:
        """The runs that a rung has: of the rung before, the candidates with the best mean."""
        if rung == 0:
            return self.runs
        before = self.left(rung - 1)
        ranked = self.ranked(before, self.scores[rung - 1])
        kept = ranked[: math.ceil(len(ranked) / (self.halving or 1))]
        return [run for run in before if run.candidate() in kept]

    def ranked(self, runs: list[Run], scores: Scores) -> list[tuple[str, ...]]:
        """The candidates among these runs, the best mean first, one that failed last."""
        config = dataclasses.replace(self.config(), metric_for_best_model=self.metric())
        sign = -1 if config.best_is_greatest() else 1

        def worth(candidate: tuple[str, ...]) -> float:
            own = [scores[run.name] for run in runs if run.candidate() == candidate]
            found = [math.nan if score is None else score for score in own]
            mean = sign * sum(found) / len(found)
            return math.inf if math.isnan(mean) else mean

        # In the order of the grid where equal.
        return sorted(dict.fromkeys(run.candidate() for run in runs), key=worth)

    def table(self) -> list[tuple[Run, int, float | None]]:
        """Every run that has been scored with its last rung and score, the best first."""
        found: dict[str, tuple[Run, int, float | None]] = {}
        for rung, scores in reversed(list(enumerate(self.scores))):
            runs = [run for run in self.left(rung) if run.name in scores]
            ranked = self.ranked(runs, scores)
            for run in sorted(runs, key=lambda run: ranked.index(run.candidate())):
                found.setdefault(run.name, (run, rung, scores[run.name]))
        return list(found.values())


def begin(output_dir: Path, combinations: list[Any], halving: int | None) -> Sweep:
    """A new sweep of these runs (train, lora, axes) in a new directory."""
    runs = [Run(f"run-{number:03}", *parts) for number, parts in enumerate(combinations)]
    for run in runs:  # it may go on from another directory
        given = {name: Path(run.train[name]) for name in PATHS if run.train.get(name)}
        run.train.update({n: str(path.resolve()) for n, path in given.items() if path.exists()})
    sweep = Sweep(runs, halving)
    # What is wrong with a file, or with a combination, is said before anything is written.
    try_out(runs, read_data(sweep.config()))
    with holding(output_dir, is_new=True):
        sweep.write(output_dir)
    return sweep


def try_out(runs: list[Run], splits: Splits) -> None:
    """Raise what one of the runs would because of its model, adapter or tokens, or of a metric that
    is not computed. Of those that begin alike, such as with other learning rates, one is tried.
    """
    tried = []
    for run in runs:
        beginning = [run.lora, *map(run.train.get, BEGINNING)]
        if beginning in tried:
            continue
        tried.append(beginning)
        config = TrainConfig(**run.train)
        lora = starting_model.new_lora_config(config, run.lora)
        device = starting_model.chosen_device(config.device)
        config = starting_model.resolve_modes(config, device)
        task = build_task(config, splits.labels)
        start = starting_model.load_starting_model(config, task)
        examples = tokenize_all(config, splits, task, start)
        starting_model.attach_adapter(start, config, lora)
        if len(tried) == 1 and config.metric_for_best_model:
            forward = starting_model.choose_forward(config, start.model, start.tokenizer, device)
            pieces = Pieces(config, splits, examples, task, start, forward, world_size=1)
            check_computed(config.best_metric() or "", pieces.evaluate("validation", "eval"))


def run_sweep(sweep: Sweep, output_dir: Path, jobs: int, should_stop: Callable[[], bool]) -> bool:
    """Run what is left of a sweep in its directory; returns whether it came to its end."""
    with files.exclusive(output_dir):
        sweep.write(output_dir)
        for rung, pause in enumerate(sweep.pauses()):
            if rung == len(sweep.scores):
                sweep.scores.append({})
            scores, runs = sweep.scores[rung], sweep.left(rung)
            tasks = [
                (run, output_dir, pause, sweep.metric()) for run in runs if run.name not in scores
            ]
            end = "their end" if pause is None else f"step {pause}"
            say(f"rung {rung + 1} of {len(sweep.pauses())}: {len(runs)} runs to {end}")
            for name, score in each(tasks, jobs, should_stop):
                scores[name] = score
                sweep.write(output_dir)
            if len(scores) < len(runs):
                return False
    return True


def each(
    tasks: list[tuple[Run, Path, int | None, str]], jobs: int, should_stop: Callable[[], bool]
) -> Iterator[tuple[str, float | None]]:
    """Carry out the tasks, here or by as many processes, until `should_stop`: (name, score)."""
    if jobs == 1:
        for task in tasks:
            found = advance(task, should_stop)
            if should_stop():
                return
            yield task[0].name, found
        return
    # Spawned: a fork of a process that has used torch's threads may hang.
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawned, prepare_worker, (jobs,)) as pool:
        # What a Ctrl-C means, the sweep decides: its processes never get it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        left = {pool.submit(advance, task): task[0].name for task in tasks}
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        workers = multiprocessing.active_children()
        try:
            while left and not should_stop():
                ready, _ = wait(left, timeout=0.1, return_when=FIRST_COMPLETED)
                yield from ((left.pop(future), future.result()) for future in ready)
        except BrokenProcessPool:
            if not should_stop():  # by a signal to all of them
                told = f"a process was killed: too little memory for --jobs {jobs}?"
                raise OSError(f"{told} --resume_from_checkpoint goes on") from None
        finally:
            for worker in workers if left else []:
                worker.terminate()


def prepare_worker(jobs: int) -> None:
    """A share of the cores, unless OMP_NUM_THREADS says how many. Whatever ends the sweep ends its
    processes, which hold runs that are to be resumed.
    """
    sweep: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: [sweep.join(), os._exit(1)], daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own, between processes, would be said to be leaked
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // jobs))


def advance(
    task: tuple[Run, Path, int | None, str], should_stop: Callable[[], bool] = lambda: False
) -> float | None:
    """Begin a run or go on with it, up to a step or to its end, and say what it is worth there."""
    run, output_dir, pause, metric = task
    place = output_dir / run.name
    newest = latest_checkpoint(place)
    steps = count(int(newest.name.partition("-")[2]) if newest else 0)
    given, lora = {**run.train, "output_dir": str(place)}, run.lora
    if (place / RUN_NAME).is_file():
        given, lora = {"resume_from_checkpoint": str(place)}, {}
    try:
        run_fine_tuning(given, lora, lambda: should_stop() or next(steps) == pause)
        if should_stop():
            return None
        result = RunRecord.read(place).result
        if result is not None:  # at its end, or where it stopped early
            return result.get(metric)
        # Beside the run, of which nothing changes by it.
        paused, file = open_run(place / f"checkpoint-{pause}"), run.train.get("validation_file")
        score = evaluate_file(paused, file or PACKAGED).metrics.get(metric, math.nan)
        return score if math.isfinite(score) else None  # as a finished run's file has it
    except MiniloraError as error:
        say(f"warning: {run.name} failed: {error}")
        return None
