"""minilora beside peft and HF Trainer + PEFT: one table, rows where minilora loses like the others.

    python benchmarks/compare.py --quick                        the packaged sentences and model; two minutes
    python benchmarks/compare.py --train train.tsv --validation dev.tsv --ner_train train.conll     the full one
    python benchmarks/compare.py --table benchmarks/results/NAME.json --plot                   measures nothing

The first two files are headerless `text<TAB>label` lines, the third a CoNLL file. Every row is measured in turn:
one contestant after the other, then all of them again in the opposite order, so that a machine whose speed drifts
drifts for all. The table goes to stdout and, with machine and versions, as JSON to `--output`.
"""

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import measured
from table import Row, as_json, origin, plot, tables, versions

HERE = Path(__file__).resolve().parent
QUERY_VALUE = ["query", "value"]
TRAINER, GROUPED = "Trainer + PEFT", "Trainer + PEFT, grouped by length"
PADDED, SORTED = "PEFT, padded", "PEFT, sorted by length, padded"
# Repeats of a row, and of one that starts fresh processes; optimizer steps of a block (measured.WARM_UP of them are
# not timed), the same of the large model, and its batch; texts to predict; saves; passes of the library alone.
FULL = {
    "repeats": 3, "fresh_repeats": 2, "steps": 14, "large_steps": 5, "large_batch": 16, "texts": 1000,
    "saves": 15, "passes": 20,
}  # fmt: skip
QUICK = {
    "repeats": 1, "fresh_repeats": 1, "steps": 4, "large_steps": 4, "large_batch": 4, "texts": 96,
    "saves": 5, "passes": 0,
}  # fmt: skip
LEAST_STEPS = measured.WARM_UP + 2  # so that there is one to time
# Of a CPU's many flags, those on which the speed of matrix products depends.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


class Bench:
    """What the rows share: what was asked, the files, and the processes that take turns: minilora's, which
    never imports peft, and the peers', which never import minilora. A third has both.
    """

    def __init__(self, asked: argparse.Namespace, work: Path) -> None:
        self.asked, self.work = asked, work
        self.sides = {name: new_process() for name in ("minilora", "peer", "both")}
        self.small = Path(asked.model).name if asked.model_is_given else "MiniLM"
        self.large = Path(asked.base_model).name if asked.base_model else "BERT-base's shape"
        self.settings = {
            "model": asked.model, "train": asked.train, "steps": asked.steps, "batch": 32, "accumulation": 1,
            "dtype": "float32", "max_length": min(512, positions(asked.model)), "targets": QUERY_VALUE,
        }  # fmt: skip

    def run(self, name: str, settings: dict, side: str = "") -> dict:
        """What a function of measured.py finds in its side's process, or without a side in a fresh one."""
        process = self.sides.get(side) or new_process()
        found = process.submit(measured.measure, name, settings).result()
        if not side:
            process.shutdown()
        return found

    def compare(self, contestants: dict, fresh: bool = False) -> dict[str, list[dict]]:
        """Of contestants that take turns {label: results}, given {label: (function of measured.py, settings)}."""
        calls = {}
        for label, (name, settings) in contestants.items():
            side = "minilora" if name.startswith("minilora") else "peer"
            calls[label] = partial(self.run, name, settings, "" if fresh else side)
        return in_turn(calls, self.asked.fresh_repeats if fresh else self.asked.repeats)


def in_turn(calls: dict[str, Callable[[], dict]], repeats: int) -> dict[str, list[dict]]:
    """The results of each call, one per repeat; every second time in the opposite order."""
    found: dict[str, list[dict]] = {label: [] for label in calls}
    for repeat in range(repeats):
        for label in list(calls) if repeat % 2 == 0 else reversed(calls):
            found[label].append(calls[label]())
    return found


def new_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"))


def row(name: str, unit: str, found: dict[str, list[dict]], key: str, scale: float = 1) -> Row:
    """A row of what was found, the first contestant being minilora."""
    values = {
        label: [result[key] * scale for result in results] for label, results in found.items()
    }
    (_, ours), *peers = values.items()
    return Row(name, unit, "more" if key == "per_second" else "less", ours, dict(peers))


# The rows, in the order of the table.


def training(bench: Bench, name: str, settings: dict) -> Row:
    """Milliseconds of an optimizer step against Trainer, by default and grouped by length."""
    settings = {**bench.settings, **settings}
    contestants = {
        "minilora": ("minilora", settings),
        TRAINER: ("trainer", settings),
        GROUPED: ("trainer", {**settings, "grouped": True}),
    }
    return row(name, "ms a step", bench.compare(contestants), "seconds_per_step", 1000)


def training_rows(bench: Bench) -> Iterable[Row]:
    from minilora.starting_model import emulates_bfloat16

    small = f"training, {bench.small}"
    tags = {"train": bench.asked.ner_train, "task": "token_classification"}
    for name, of_task in ((small, {}), (f"{small}, tags of tokens", tags)):
        for dtype in ("float32", "bfloat16"):
            lacks = None
            if of_task and bench.asked.ner_train is None:
                lacks = "no --ner_train"
            elif dtype == "bfloat16" and emulates_bfloat16():  # twenty times as slow, both
                lacks = "this CPU emulates bfloat16"
            if lacks:
                note = f"not measured: {lacks}"
                yield Row(f"{name}, {dtype}", "ms a step", "less", note=note)
            else:
                yield training(bench, f"{name}, {dtype}", {**of_task, "dtype": dtype})


def same_length_rows(bench: Bench) -> Iterable[Row]:
    """Where there is no padding to leave out; of the large model the peak of memory, too."""
    length = min(32, bench.settings["max_length"])
    small = {**bench.settings, "train": texts_of(bench, "short.tsv", length), "max_length": length}
    contestants = {"minilora": ("minilora", small), TRAINER: ("trainer", small)}
    found = bench.compare(contestants)
    name = f"training, {bench.small}, all texts of {length} tokens"
    yield row(name, "ms a step", found, "seconds_per_step", 1000)

    base = bench.asked.base_model or bert_shape(bench.asked.model, bench.work / "bert-base-shape")
    length = min(128, positions(base))
    large = {
        **bench.settings, "model": base, "train": texts_of(bench, "long.tsv", length), "max_length": length,
        "batch": bench.asked.large_batch, "steps": bench.asked.large_steps,
    }  # fmt: skip
    contestants = {"minilora": ("minilora", large), TRAINER: ("trainer", large)}
    found = bench.compare(contestants, fresh=True)
    name = f"training, {bench.large}, {large['batch']} texts of {length} tokens"
    yield row(name, "ms a step", found, "seconds_per_step", 1000)
    yield row("the same: peak memory", "MB", found, "peak_mb")
    if bench.asked.quick:
        return
    again = {**large, "gradient_checkpointing": True}
    theirs = {**again, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    contestants = {"minilora": ("minilora", again), TRAINER: ("trainer", theirs)}
    found = bench.compare(contestants, fresh=True)
    yield row("the same with gradient checkpointing: peak memory", "MB", found, "peak_mb")


def parity_row(bench: Bench) -> Iterable[Row]:
    ours = ("minilora", {**bench.settings, "hf_parity": True})
    found = bench.compare({"minilora": ours, TRAINER: ("trainer", bench.settings)})
    name = f"training, {bench.small}, --hf_parity"
    yield row(name, "ms a step", found, "seconds_per_step", 1000)


def library_row(bench: Bench) -> Iterable[Row]:
    if bench.asked.passes == 0:
        return
    names = ("model", "train", "batch", "max_length", "targets")
    settings = {name: bench.settings[name] for name in names} | {"steps": bench.asked.passes}
    name = f"add_adapter in one's own loop, {bench.small}"
    yield taken_in_turn(bench, "library", settings, name)


def inference_rows(bench: Bench) -> Iterable[Row]:
    """With the adapter of `prepare`."""
    texts = bench.work / "texts.txt"
    lines = Path(bench.asked.validation).read_text(encoding="utf-8").splitlines()
    lines = [line.split("\t")[0] for line in lines[: bench.asked.texts]]
    texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for merged in (True, False):
        ours = {"adapter": f"{bench.work}/ours", "texts": str(texts), "batch": 32, "merged": merged}
        theirs = {**ours, "model": bench.asked.model}
        contestants = {
            "minilora": ("minilora_inference", ours),
            PADDED: ("peft_inference", theirs),
            SORTED: ("peft_inference", {**theirs, "grouped": True}),
        }
        name = f"inference, {bench.small}, adapter {'merged' if merged else 'not merged'}"
        yield row(name, "texts a second", bench.compare(contestants), "per_second")


def save_row(bench: Bench) -> Iterable[Row]:
    settings = {"directory": str(bench.work), "saves": bench.asked.saves}
    yield taken_in_turn(bench, "saves", settings, "save of a checkpoint, MiniLM")


def taken_in_turn(bench: Bench, function: str, settings: dict, name: str) -> Row:
    """Of both in one process, which takes them in turn: {label: seconds}, minilora first."""
    found = bench.run(function, settings, "both")
    found.pop("peak_mb")
    (_, ours), *peers = ((label, [1000 * each for each in of]) for label, of in found.items())
    return Row(name, "ms", "less", ours, dict(peers))


def start_rows(bench: Bench) -> Iterable[Row]:
    """From the command to the end of the first step: of a new run, and of one that is resumed."""
    ours, theirs = (bench.work / side / "checkpoint-2" for side in ("ours", "theirs"))
    calls = {"minilora": lambda: our_start(bench), TRAINER: lambda: their_start(bench)}
    found = in_turn(calls, bench.asked.fresh_repeats)
    yield row("start: command to end of first step", "s", found, "seconds")
    calls = {
        "minilora": lambda: our_start(bench, ours),
        TRAINER: lambda: their_start(bench, theirs),
    }
    found = in_turn(calls, bench.asked.fresh_repeats)
    yield row("resume: command to end of first step", "s", found, "seconds")


ROWS = {
    "training": training_rows, "same_length": same_length_rows, "parity": parity_row, "library": library_row,
    "inference": inference_rows, "save": save_row, "start": start_rows,
}  # fmt: skip


def prepare(bench: Bench) -> None:
    """Three steps of both, a checkpoint after two; the files that this reads are then in the system's cache."""
    flags = ("--save_strategy", "steps", "--save_steps", "2")
    our_command(bench, bench.work / "ours", 3, *flags)
    kept = {"output_dir": f"{bench.work}/theirs", "save_strategy": "steps", "save_steps": 2}
    bench.run("trainer", {**bench.settings, "steps": 3, **kept}, "peer")


def our_command(bench: Bench, output_dir: Path, steps: int, *flags: str) -> None:
    """`python -m minilora.train` on the training file."""
    arguments = [
        "--model_name_or_path", bench.asked.model, "--train_file", bench.asked.train, "--device", "cpu",
        "--output_dir", str(output_dir), "--per_device_train_batch_size", "32", "--logging_steps", "1",
        "--max_steps", str(steps), *flags,
    ]  # fmt: skip
    command([sys.executable, "-m", "minilora.train", *arguments])


def our_start(bench: Bench, resumed: Path | None = None) -> dict:
    """Seconds until the first step's row is written, which is the last thing that comes to that file."""
    with tempfile.TemporaryDirectory(dir=bench.work) as directory:
        output_dir, start = Path(directory, "out"), time.time()
        if resumed is None:
            our_command(bench, output_dir, 1, "--save_strategy", "no")
        else:
            flags = ["--resume_from_checkpoint", str(resumed), "--output_dir", str(output_dir)]
            command([sys.executable, "-m", "minilora.train", *flags])
        return {"seconds": (output_dir / "metrics.jsonl").stat().st_mtime - start}


def their_start(bench: Bench, resumed: Path | None = None) -> dict:
    settings = {**bench.settings, "steps": 1}
    if resumed is not None:
        settings |= {"steps": 3, "resume_from_checkpoint": str(resumed)}
    start = time.time()
    printed = command([sys.executable, str(HERE / "measured.py"), "trainer", json.dumps(settings)])
    return {"seconds": json.loads(printed.splitlines()[-1])["first_step_at"] - start}


def command(words: list[str]) -> str:
    """What a command prints."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


# Texts and models.


def positions(model: str) -> int:
    """The longest text that a model takes, in tokens."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).max_position_embeddings


def bert_shape(like: str, directory: Path, **sizes: int) -> str:
    """In a new directory, a BERT with random weights, by default of BERT-base's sizes, and the tokenizer of `like`."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel, logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(like)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def texts_of(bench: Bench, name: str, words: int) -> str:
    """A file of 512 texts of `words` words, so of as many tokens and more, joined from the training lines."""
    draw, joined, label = random.Random(0), [], ""
    lines = [line.split("\t") for line in Path(bench.asked.train).read_text("utf-8").splitlines()]
    texts = []
    while len(texts) < 512:
        text, label = draw.choice(lines)
        joined += text.split()
        if len(joined) >= words:
            texts.append(f"{' '.join(joined[:words])}\t{label}")
            joined = []
    (bench.work / name).write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(bench.work / name)


def packaged_texts(split: str, work: Path) -> str:
    """The packaged sentences without their header."""
    from minilora.bert.splits import SENTENCES

    lines = (SENTENCES / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[1:]
    texts = ["\t".join(line.split("\t")[:2]) for line in lines]
    (work / f"{split}.tsv").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(work / f"{split}.tsv")


# What a result needs to say of where it comes from.


def cpu() -> dict:
    """The processor's name, the flags that matter, cores."""
    info, known = Path("/proc/cpuinfo"), {}
    for line in info.read_text().splitlines() if info.exists() else []:
        key, _, value = line.partition(":")
        known.setdefault(key.strip(), value.strip())
    flags = set(known.get("flags", "").split())
    name = known.get("model name") or platform.processor() or platform.machine()
    cores = os.cpu_count()
    threads = int(os.environ.get("OMP_NUM_THREADS") or cores)
    return {
        "cpu": name,
        "flags": [f for f in FLAGS if f in flags],
        "cores": cores,
        "threads": threads,
    }


def commit() -> str:
    """The source's, with a + where it was changed since; unknown outside of a git checkout."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"]
    done = subprocess.run(git, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def results(asked: argparse.Namespace, work: Path) -> dict:
    """Everything measured, as it is written to JSON."""
    machine, start = {**cpu(), "load_before": os.getloadavg()[0]}, time.time()
    bench, rows = Bench(asked, work), []
    prepare(bench)
    for name in asked.rows:
        for new in ROWS[name](bench):
            rows.append(new)
            print(f"{time.time() - start:4.0f} s  {new.name}", file=sys.stderr, flush=True)
    machine["load_after"] = os.getloadavg()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine,
        "versions": versions(),
        "texts": asked.texts_are,
        "quick": asked.quick,
        "seconds": round(time.time() - start),
        "rows": [as_json(row) for row in rows],
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", help="by default the packaged sentences")
    parser.add_argument("--validation", help="texts for inference; by default packaged, too")
    parser.add_argument("--ner_train", help="CoNLL; without it, tags of tokens are not measured")
    parser.add_argument("--model", help="a directory; by default the packaged MiniLM")
    parser.add_argument("--base_model", help="a directory; by default random weights of BERT-base")
    parser.add_argument("--quick", action="store_true", help="fewer steps and repeats")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="only these")
    for name, value in FULL.items():
        parser.add_argument(f"--{name}", type=int, help=f"by default {value}, quick {QUICK[name]}")
    parser.add_argument(
        "--output", type=Path, default=HERE / "results", help="directory of the JSON"
    )
    parser.add_argument("--plot", action="store_true", help="draw docs/figures/speed-*.svg, too")
    parser.add_argument("--table", type=Path, help="print an earlier JSON's, and measure nothing")
    asked = parser.parse_args()
    if min(asked.steps or FULL["steps"], asked.large_steps or FULL["large_steps"]) < LEAST_STEPS:
        parser.error(f"--steps and --large_steps must be at least {LEAST_STEPS}")
    return asked


def with_defaults(asked: argparse.Namespace, work: Path) -> argparse.Namespace:
    """Everything that was not given, filled in."""
    for name, value in (QUICK if asked.quick else FULL).items():
        if getattr(asked, name) is None:
            setattr(asked, name, value)
    asked.model_is_given = asked.model is not None
    if not asked.model_is_given:
        from minilora.bert.load import packaged_model

        asked.model = str(packaged_model())
    own = asked.train and "/".join(Path(asked.train).resolve().parts[-2:])
    asked.texts_are = own or "the packaged sentences"
    asked.train = asked.train or packaged_texts("train", work)
    asked.validation = asked.validation or packaged_texts("validation", work)
    for name in ("train", "validation", "ner_train"):
        if getattr(asked, name) is not None:
            setattr(asked, name, str(Path(getattr(asked, name)).resolve()))
    return asked


def main() -> None:
    asked = parse_arguments()
    if asked.table is not None:
        found = json.loads(asked.table.read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory() as work:
            found = results(with_defaults(asked, Path(work)), Path(work))
        kind = "quick" if found["quick"] else "full"
        place = asked.output / f"{found['date']}-{found['commit'].rstrip('+')}-{kind}.json"
        asked.output.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"written: {place}", file=sys.stderr)
    print(f"{origin(found)}\n")
    print(*tables(found), sep="\n\n")
    if asked.plot:
        plot(found)


if __name__ == "__main__":
    main()
