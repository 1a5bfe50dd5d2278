"""A run in its directory: begun or resumed, trained to its end or to a stop, saved on the way.

What is done about a disk that refuses stands here, too: a row or a checkpoint that cannot be
written is no reason to lose a run that can go on. Not here: what the run is made of (fine_tuning),
the loop (loop), a checkpoint (checkpoint), where a resume begins (resume).
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from minilora import files
from minilora.errors import MiniloraError
from minilora.training import distributed
from minilora.training.checkpoint import restore, save_checkpoint, sorted_checkpoints
from minilora.training.evaluation import Batch
from minilora.training.loop import Callbacks, Training, fit, is_finished, log
from minilora.training.metrics_file import METRICS_NAME, MetricsFile
from minilora.training.optim import follow_schedule
from minilora.training.progress import TrainingBar, say
from minilora.training.record import RUN_NAME, RunRecord
from minilora.training.resume import ResumePlan
from minilora.training.rng import seed_all
from minilora.training.tensorboard import Curves

# What a user can do about a disk that refuses.
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable"),
    errno.EIO: "see to the disk",
}


def fit_in_directory(
    training: Training,
    record: RunRecord,
    batches: Callable[[int, int], Iterator[list[Batch]]],
    evaluate: Callable[[], dict[str, float]] | None,
    plan: ResumePlan,
    should_stop: Callable[[], bool],
) -> dict[str, float]:
    """Train from where the plan says, holding the lock of its directory; the functions are those of
    `Callbacks`. Returns train_runtime (seconds of the loop in this process), train_loss,
    train_samples_per_second and train_steps_per_second.
    """
    config, output_dir = record.arguments, plan.output_dir
    # Again, as Trainer does: how much was drawn so far depends on the model.
    seed_all(config.seed if config.hf_parity else config.seed + distributed.rank())
    before = plan.record if plan.stored is None else plan.stored.record
    is_extended = before is not None and record.extended != before.extended
    for warning in plan.warnings:
        say(f"warning: {warning}")
    if plan.stored is not None:
        step = restore(plan.stored, training).global_step
        say(f"resuming {plan.stored.path} at step {step}")
        distributed.by_first(plan.bring)
        if is_extended:
            follow_schedule(training.scheduler)
            say(f"extended from step {step} to {training.timetable.max_steps}")
    if not is_finished(training.state, training.timetable):  # whose run.json has its result
        distributed.by_first(lambda: record.write(output_dir))
    for path, reason in plan.set_aside:
        aside = distributed.by_first(partial(files.set_aside, path, reason))
        say(f"warning: {path.name} is {reason} and now named {aside.name}")
    state = training.state
    begin, show = plan.stored and plan.stored.metrics(), Curves(output_dir, record).append
    metrics = MetricsFile(output_dir / METRICS_NAME, state, begin, show)
    saver = Saver(training, record, metrics)
    counts = (training.timetable.max_steps, state.global_step)
    with contextlib.closing(TrainingBar(*counts, config.disable_tqdm)) as bar:
        save = bar.doing("saving")(saver.save)
        callbacks = Callbacks(batches, evaluate, metrics.append, save, should_stop, bar.advance)
        # The packaged sentences show what training adds.
        at_start = config.eval_on_start or (config.train_file or config.dataset_name) is None
        if evaluate is not None and at_start and state.global_step == 0:
            log(training, callbacks, evaluate())
        fit(training, config, callbacks)
    distributed.by_first(metrics.sync)
    if saver.failure is not None:  # the run ends without its last checkpoint
        raise saver.failure
    losses = state.loss_total + state.loss_sum  # of the whole run, resumes included
    return {**bar.speed(), "train_loss": losses / max(1, state.global_step)}


class Saver:
    """Writes the checkpoints of a run, and deletes what is over `save_total_limit`.

    When one cannot be written (the disk is full, for one) and an older one is there, it warns, lets
    the run go on and tries again at the next save; the last save of a run has no next one, and
    fails.
    """

    def __init__(self, training: Training, record: RunRecord, metrics: MetricsFile) -> None:
        self.training, self.record, self.metrics = training, record, metrics
        self.output_dir = metrics.path.parent
        self.failure: OSError | None = None  # of the last save
        self.has_remarked = False

    def save(self) -> None:
        step, limit = self.training.state.global_step, self.record.arguments.save_total_limit
        self.failure = None
        distributed.reached(f"the checkpoint of step {step}")
        try:
            distributed.by_first(self.metrics.sync)
            save_checkpoint(self.output_dir, self.training, self.record)
        except OSError as error:
            ends = is_finished(self.training.state, self.training.timetable)
            if ends or not sorted_checkpoints(self.output_dir):
                raise
            self.failure = error
            is_there = isinstance(error, files.NotConfirmed)
            what = f"checkpoint-{step} is" if is_there else f"no checkpoint at step {step}:"
            say(f"warning: {what} {error.strerror}; training goes on")
            return
        groups = len(self.training.optimizer.param_groups)
        if groups > 2 and not self.has_remarked:
            cannot = "HF Trainer's has 2: it cannot resume from it, minilora can"
            say(f"optimizer.pt has {groups} groups, {cannot}")
            self.has_remarked = True
        try:
            best = self.training.state.best_step
            distributed.by_first(lambda: rotate_checkpoints(self.output_dir, limit, best))
        except OSError as error:
            say(f"warning: an old checkpoint cannot be deleted: {error.strerror}")


def rotate_checkpoints(output_dir: Path, limit: int | None, best_step: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, never the newest and never the best."""
    checkpoints = [path for path in sorted_checkpoints(output_dir) if not path.is_symlink()]
    excess = 0 if limit is None else max(0, len(checkpoints) - limit)
    oldest_first = [p for p in checkpoints[:0:-1] if p.name != f"checkpoint-{best_step}"]
    for path in oldest_first[:excess]:
        files.remove_directory(path)


def new_output_dir(path: Path) -> None:
    """Create the directory of a new run; what a killed start left in it counts as nothing."""
    if path.exists() and not path.is_dir():
        raise MiniloraError(f"output_dir {str(path)!r} is a file: give a new or empty directory")
    entries = path.iterdir() if path.is_dir() else []
    held = sorted(entry.name for entry in entries if not files.is_leftover(entry.name))
    if held:
        advice = f"give a new one, or continue its run with --resume_from_checkpoint {path}"
        holds = f"is not empty (it holds {held[0]})"
        raise MiniloraError(f"output_dir {str(path)!r} {holds}: {advice}")
    files.make_directory(path)


@contextlib.contextmanager
def holding(output_dir: Path, is_new: bool) -> Iterator[None]:
    """Inside, a run's directory is this process's alone, and holds nothing half-written."""
    with advice_on_disk_errors(output_dir):
        if is_new:
            new_output_dir(output_dir)
        with files.exclusive(output_dir):
            files.sweep_leftovers(output_dir)
            yield


@contextlib.contextmanager
def advice_on_disk_errors(output_dir: Path) -> Iterator[None]:
    """Let an `OSError` that comes out say what to do about it, and how the run goes on."""
    try:
        yield
    except OSError as error:
        begun = os.path.isfile(output_dir / RUN_NAME)
        go_on = f"--resume_from_checkpoint {output_dir}" if begun else "start the run again"
        remedy = REMEDIES.get(error.errno or 0, "see to it")
        advice = f"{error.strerror}; no older checkpoint is lost: {remedy}, then {go_on}"
        raise OSError(error.errno, advice, error.filename or str(output_dir)) from error
