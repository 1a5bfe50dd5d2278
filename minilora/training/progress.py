"""What a person who watches a run sees."""

import sys
import time

from tqdm import tqdm


def say(line: str) -> None:
    """A line for the person who watches; stdout is for the result."""
    tqdm.write(line, file=sys.stderr)


class TrainingBar:
    """A progress bar on stderr, and the speed of the loop under Trainer's names."""

    def __init__(self, max_steps: int, done: int) -> None:
        self.bar = tqdm(total=max_steps, initial=done, desc="training", unit="step")
        self.close = self.bar.close
        self.start = time.perf_counter()
        self.examples = self.steps = 0

    def advance(self, examples: int, loss: float, learning_rate: float) -> None:
        self.examples += examples
        self.steps += 1
        rate = self.examples / (time.perf_counter() - self.start)
        shown = f"loss {loss:.4f}, lr {learning_rate:.2e}, {rate:.0f} examples/s"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()

    def speed(self) -> dict[str, float]:
        """Of the loop in this process so far, with its evaluation and saving; times in seconds."""
        seconds = time.perf_counter() - self.start
        return {
            "train_runtime": seconds,
            "train_samples_per_second": self.examples / seconds,
            "train_steps_per_second": self.steps / seconds,
        }
