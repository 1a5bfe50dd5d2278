"""Follow a run's metrics.jsonl into any tracker, while it trains or afterwards.

python examples/follow_metrics.py OUT       prints each row

In a script of your own, with your tracker's function in the place of print:

    follow("out", lambda values, step: wandb.log(values, step=step))

A resumed run cuts off the rows behind its checkpoint and writes them again, with the same numbers:
they are told once. It ends when the run has ended.
"""

import json
import sys
import time
from pathlib import Path


def follow(output_dir, tell, seconds=2.0):
    """Call `tell` with the values and step of each row, looking for new ones every `seconds`."""
    metrics, run, told = Path(output_dir, "metrics.jsonl"), Path(output_dir, "run.json"), set()
    is_over = False
    while not is_over:
        is_over = run.is_file() and "result" in json.loads(run.read_bytes())
        lines = metrics.read_bytes().splitlines(keepends=True) if metrics.is_file() else []
        for row in [json.loads(line) for line in lines if line.endswith(b"\n")]:
            if (row["step"], *row) not in told:  # a step may have a loss and an evaluation
                told.add((row["step"], *row))
                tell({name: row[name] for name in row if name != "step"}, row["step"])
        time.sleep(0 if is_over else seconds)


if __name__ == "__main__":
    follow(sys.argv[1], lambda values, step: print(step, values, flush=True))
