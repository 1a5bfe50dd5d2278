"""A run in its directory: begun or resumed, trained to its end or to a stop, saved on the way.

Not here: what the run is made of (fine_tuning), the loop (loop), the files (run_directory,
checkpoint), where a resume begins (resume).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.training.evaluation import Batch
from minilora.training.loop import Callbacks, Training, fit, log, mean_loss
from minilora.training.progress import TrainingBar
from minilora.training.record import RunRecord
from minilora.training.resume import ResumePlan, carry_out
from minilora.training.rng import seed_all
from minilora.training.run_directory import METRICS_NAME, MetricsFile, Saver, write_run


@dataclass(frozen=True)
class Run:
    """Everything that a run is made of, ready for its first step."""

    record: RunRecord  # its arguments, as resolved, and its inputs
    training: Training
    task: Any  # what the losses are (bert/tasks)
    batches: Callable[[int, int], Iterator[list[Batch]]]  # as in `Callbacks`
    evaluate: Callable[[], dict[str, float]] | None


def fit_in_directory(
    run: Run, output_dir: Path, plan: ResumePlan | None, should_stop: Callable[[], bool]
) -> dict[str, float]:
    """Train, holding `output_dir`'s lock, from where the plan says, or from step 0.

    Returns train_runtime (seconds of the loop in this process), train_samples_per_second,
    train_steps_per_second and train_loss.
    """
    config, training = run.record.arguments, run.training
    seed_all(config.seed)  # again, as Trainer does: how much was drawn so far depends on the model
    if plan is None or plan.stored is None or plan.record is None:
        write_run(output_dir, run.record)
    if plan is not None:
        carry_out(plan, training)
    state = training.state
    metrics_file = MetricsFile(output_dir / METRICS_NAME, state.log_history)
    saver = Saver(output_dir, training, run.record)
    with TrainingBar(training.timetable.max_steps, state.global_step) as bar:
        callbacks = Callbacks(
            batches=run.batches,
            evaluate=run.evaluate,
            log=metrics_file.append,
            save=saver.save,
            should_stop=should_stop,
            progress=bar.advance,
        )
        # The packaged sentences show what training adds.
        at_start = config.eval_on_start or config.train_file is None
        if run.evaluate is not None and at_start and state.global_step == 0:
            log(training, callbacks, run.evaluate())
        fit(training, run.task, config, callbacks)
    metrics_file.write_all()
    saver.raise_failure()
    return {**bar.speed(), "train_loss": mean_loss(state)}
