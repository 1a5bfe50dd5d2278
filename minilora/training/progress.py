"""What a person who watches a run sees."""

import contextlib
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

from minilora.training import distributed
from minilora.training.evaluation import Batch

EVERY = 30.0  # seconds between two lines, where no bar is shown


def say(line: str) -> None:
    """A line for the person who watches; stdout is for the result."""
    tqdm.write(line, file=sys.stderr)


class TrainingBar:
    """How far training is and how fast, on stderr: a bar, or without a terminal a line every so
    often; and the speed of the loop under Trainer's names.
    """

    def __init__(self, max_steps: int, done: int, disable: bool) -> None:
        self.is_bar = sys.stderr.isatty() and not disable
        self.bar = tqdm(
            total=max_steps, initial=done, desc="training", unit="step", disable=not self.is_bar
        )
        self.close = self.bar.close
        self.max_steps, self.done = max_steps, done
        self.start = self.told = time.perf_counter()
        self.examples = self.tokens = self.steps = 0

    def advance(self, batches: list[Batch], loss: float, learning_rate: float) -> None:
        """One step, of these batches and, of several processes, the others'."""
        real = [batch.get("lengths", batch.get("attention_mask")) for batch in batches]
        own = sum(int(part.sum()) for part in real if part is not None)
        self.tokens += int(distributed.summed(own))
        self.examples += int(distributed.summed(sum(len(batch["example"]) for batch in batches)))
        self.steps += 1
        now = time.perf_counter()
        seconds, step = now - self.start, self.done + self.steps
        rates = f"{self.examples / seconds:.0f} examples/s, {self.tokens / seconds:.0f} tokens/s"
        shown = f"loss {loss:.4f}, lr {learning_rate:.2e}, {rates}"
        if self.is_bar:
            self.bar.set_postfix_str(shown, refresh=False)
            self.bar.update()
        elif now - self.told > EVERY or step == self.max_steps:
            left = tqdm.format_interval((self.max_steps - step) * seconds / self.steps)
            say(f"step {step} of {self.max_steps}: {shown}, {left} left")
            self.told = now

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Inside, the bar says so instead of "training"."""
        self.bar.set_description(what)
        yield
        self.bar.set_description("training")

    def speed(self) -> dict[str, float]:
        """Of the loop in this process so far, with its evaluation and saving; times in seconds."""
        seconds = time.perf_counter() - self.start
        return {
            "train_runtime": seconds,
            "train_samples_per_second": self.examples / seconds,
            "train_steps_per_second": self.steps / seconds,
        }
