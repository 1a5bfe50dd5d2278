"""What a large file costs a run: peak memory, and seconds until the first step.

    python benchmarks/rows.py --train train.tsv [--rows 1000000] [--beside 10000]

`train.tsv` has lines `text<TAB>label`; they are repeated with their words in another order, as often as it takes.
Each number is of a process of its own, on the packaged model: a run of one step whose cache is empty, the same again,
and the tokenizer alone, with the texts in memory, in pieces as large. The last line is JSON.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PIECE = 1000  # minilora's


def write_rows(source, path, count):
    """So many lines, each text with its words turned by as many places as it has come before."""
    lines = [line.split("\t") for line in Path(source).read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            turns, place = divmod(number, len(lines))
            text, label = lines[place][0].split(), lines[place][-1]
            text = text[turns % len(text) :] + text[: turns % len(text)]
            file.write(f"{' '.join(text)} {turns}\t{label}\n")


def train(path):
    """Seconds from the start of this process to the first step of a run."""
    from minilora.fine_tuning import run_fine_tuning

    asked_at = []

    def should_stop():  # asked before each step
        asked_at.append(time.time())
        return False

    with tempfile.TemporaryDirectory() as directory:
        out = {"output_dir": f"{directory}/out", "max_steps": 1, "save_strategy": "no"}
        run_fine_tuning({"train_file": path, **out}, {}, should_stop)
    return asked_at[0] - float(os.environ["STARTED"])


def tokenizer(path):
    """Seconds that the tokenizer takes for the texts."""
    from transformers import AutoTokenizer

    from minilora.bert.load import packaged_model

    lines = Path(path).read_text(encoding="utf-8").splitlines()
    texts = [line.split("\t")[0] for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(packaged_model())
    started = time.time()
    for start in range(0, len(texts), PIECE):
        tokenizer(texts[start : start + PIECE], truncation=True, max_length=512)
    return time.time() - started


def in_a_process(what, path, cache):
    """The seconds, those of all cores together, and the peak of memory in MB."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "STARTED": str(time.time())}
    command = [sys.executable, __file__, "--process", what, "--train", str(path)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(count, source):
    """All numbers for so many rows."""
    with tempfile.TemporaryDirectory() as directory:
        path, cache = Path(directory, "rows.tsv"), Path(directory, "cache")
        write_rows(source, path, count)
        found = {"rows": count, "megabytes": path.stat().st_size / 1e6}
        for name, what in (("first", "train"), ("cached", "train"), ("tokenizer", "tokenizer")):
            found[name] = in_a_process(what, path, cache)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True, help="lines of text<TAB>label")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--beside", type=int, default=10_000)
    parser.add_argument("--process", choices=("train", "tokenizer"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.process:
        seconds = {"train": train, "tokenizer": tokenizer}[asked.process](asked.train)
        used = resource.getrusage(resource.RUSAGE_SELF)
        found = {"seconds": seconds, "core_seconds": used.ru_utime + used.ru_stime}
        print(json.dumps({**found, "peak_mb": used.ru_maxrss / 1e3}))
        return
    few, many = (measured(count, asked.train) for count in (asked.beside, asked.rows))
    print(f"{'':24}{few['rows']:>14,}{many['rows']:>14,}")
    for name in ("first", "cached", "tokenizer"):
        for key in ("seconds", "core_seconds", "peak_mb"):
            print(f"{name + ', ' + key:24}{few[name][key]:14.1f}{many[name][key]:14.1f}")
    ratios = {f"peak_{n}": many[n]["peak_mb"] / few[n]["peak_mb"] for n in ("first", "cached")}
    for key in ("seconds", "core_seconds"):  # of the rows alone: a start has imports, too
        more = {name: many[name][key] - few[name][key] for name in ("first", "tokenizer")}
        ratios[f"first_to_tokenizer_{key}"] = more["first"] / more["tokenizer"]
    seconds_later = many["cached"]["seconds"] - few["cached"]["seconds"]
    print(json.dumps({"few": few, "many": many, **ratios, "cached_seconds_later": seconds_later}))


if __name__ == "__main__":
    main()
