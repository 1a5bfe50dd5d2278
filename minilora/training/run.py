"""A run in its directory: begun or resumed, trained to its end or to a stop, saved on the way.

Not here: what the run is made of (fine_tuning), the loop (loop), the files (run_directory,
checkpoint), where a resume begins (resume).
"""

from collections.abc import Callable, Iterator
from contextlib import closing

from minilora.training.evaluation import Batch
from minilora.training.loop import Callbacks, Training, fit, log
from minilora.training.progress import TrainingBar
from minilora.training.record import RunRecord
from minilora.training.resume import ResumePlan, carry_out
from minilora.training.rng import seed_all
from minilora.training.run_directory import METRICS_NAME, RUN_NAME, MetricsFile, Saver, write_run


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
    seed_all(config.seed)  # again, as Trainer does: how much was drawn so far depends on the model
    if not (output_dir / RUN_NAME).is_file():
        write_run(output_dir, record)
    carry_out(plan, training)
    state = training.state
    metrics_file = MetricsFile(output_dir / METRICS_NAME, state.log_history)
    saver = Saver(output_dir, training, record)
    with closing(TrainingBar(training.timetable.max_steps, state.global_step)) as bar:
        callbacks = Callbacks(
            batches, evaluate, metrics_file.append, saver.save, should_stop, bar.advance
        )
        # The packaged sentences show what training adds.
        at_start = config.eval_on_start or config.train_file is None
        if evaluate is not None and at_start and state.global_step == 0:
            log(training, callbacks, evaluate())
        fit(training, config, callbacks)
    metrics_file.write_all()
    if saver.failure is not None:  # the run ends without its last checkpoint
        raise saver.failure
    losses = state.loss_total + state.loss_sum  # of the whole run, resumes included
    return {**bar.speed(), "train_loss": losses / max(1, state.global_step)}
