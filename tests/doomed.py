"""`train` as ever, but slow, and killed: `torchrun -m tests.doomed FLAGS`.

$DOOM is a JSON file, of each start [rank, where, delay]: that rank is killed "from the start" on,
"in step" (the first of that start), "in evaluation" or "in save", so many seconds later. Each kill
is a line of the file of that name and ".log".
"""

import json
import os
import signal
import threading
import time
from pathlib import Path

from minilora import command, train

DOOM, LAST_FILE = os.environ.get("DOOM", ""), "minilora.json"
SECONDS_OF_A_STEP = 0.02


def main() -> int:
    from minilora import files, fine_tuning
    from minilora.training import loop

    start, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    dooms = json.loads(Path(DOOM).read_text()) if DOOM else []
    who, where, delay = dooms[start] if start < len(dooms) else (None, "", 0)

    def reached(place: str) -> None:
        if who == rank and place == where:
            if delay:
                threading.Timer(delay, kill, [f"{start} {place}"]).start()
            else:
                kill(f"{start} {place}")

    step, evaluate, write = loop.training_step, fine_tuning.evaluate_model, files._write_new

    def slow_step(*given):
        reached("in step")
        time.sleep(SECONDS_OF_A_STEP)
        return step(*given)

    def evaluated(model, task, parity, batches, scorer, prefix):
        def all_but_one():
            for number, batch in enumerate(batches):
                if number == 2:  # of three at least
                    reached("in evaluation")
                yield batch

        return evaluate(model, task, parity, all_but_one(), scorer, prefix)

    def written(path, data):
        if path.name == LAST_FILE:
            reached("in save")
        write(path, data)

    loop.training_step, fine_tuning.evaluate_model, files._write_new = slow_step, evaluated, written
    reached("from the start")
    return train.main()


def kill(what: str) -> None:
    log = os.open(f"{DOOM}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, f"{what}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    command.run_command(main)
