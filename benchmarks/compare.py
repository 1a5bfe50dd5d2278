"""minilora beside PEFT and HF Trainer: the same data, model and hyper-parameters, fresh processes in turn.

    python benchmarks/compare.py --train train.tsv --validation dev.tsv          some 20 minutes
    python benchmarks/compare.py --train train.tsv --validation dev.tsv --quick  under 3, one repeat, fewer rows

Both files are headerless `text<TAB>label` lines, of which SST-2's were used for the tables in README.md.
Each row starts every contestant once, then again, `--repeats` times over, so that a machine whose speed
drifts drifts for all; it prints medians, their spread, and ratios. Rows where minilora loses are printed
like the others. The last line is JSON.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
QUERY_VALUE = ["query", "value"]
ALL_ATTENTION = ["query", "key", "value", "attention.output.dense"]


def measured(name: str, settings: dict) -> dict:
    """One process of `measured.py`."""
    command = [sys.executable, str(HERE / "measured.py"), name, json.dumps(settings)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{name} {settings} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def in_turn(contestants: dict, repeats: int) -> dict[str, list[dict]]:
    """Every contestant's results: {label: (name, settings)} to {label: one result per repeat}."""
    found: dict[str, list[dict]] = {label: [] for label in contestants}
    for _ in range(repeats):
        for label, (name, settings) in contestants.items():
            found[label].append(measured(name, settings))
    return found


def median(results: list[dict], key: str) -> float:
    return statistics.median(result[key] for result in results)


def show(title: str, found: dict[str, list[dict]], key: str, unit: str, scale: float) -> dict:
    """Print one row of the table, the first contestant being minilora; return its numbers."""
    print(f"\n{title}")
    row: dict = {}
    (ours, first), *_ = found.items()
    more_is_better = key == "per_second"
    for label, results in found.items():
        values = [result[key] * scale for result in results]
        middle, mine = statistics.median(values), median(first, key) * scale
        ratio = mine / middle if more_is_better else middle / mine
        spread = f"{min(values):.4g} to {max(values):.4g}"
        against = "" if label == ours else f"   minilora is {ratio:.2f} x as fast"
        if key == "peak_mb":
            against = "" if label == ours else f"   minilora needs {mine / middle:.2f} of it"
        print(f"  {label:34} {middle:9.4g} {unit}  ({spread}){against}", flush=True)
        row[label] = {"median": middle, "all": values, "ratio": ratio}
    return row


def training_rows(asked: argparse.Namespace, work: Path, steps: dict[str, int]) -> dict:
    """Seconds per optimizer step, and peak memory."""
    mini, base = asked.model, bert_base_shape(asked.model, work)
    long_text = concatenated(asked.train, work / "long.tsv", 40, 380)
    fixed = concatenated(asked.train, work / "fixed.tsv", 150, 200)
    common = {
        "model": mini, "train": asked.train, "batch": 32, "accumulation": 1, "dtype": "float32",
        "max_length": 512, "targets": QUERY_VALUE,
    }  # fmt: skip
    sentences = {**common, "steps": steps["sentences"]}
    half = {**sentences, "dtype": "bfloat16"}
    ragged = {**common, "train": long_text, "batch": 8, "steps": steps["long"]}
    wide = {**sentences, "targets": ALL_ATTENTION}
    accumulated = {**sentences, "batch": 8, "accumulation": 4, "steps": steps["accumulated"]}
    large = {
        **common, "model": base, "train": fixed, "batch": 16, "max_length": 128, "steps": steps["base"],
    }  # fmt: skip
    large_half = {**large, "dtype": "bfloat16"}

    def against_trainer(settings):
        return {
            "minilora": ("minilora", settings),
            "Trainer + PEFT": ("trainer", settings),
            "Trainer + PEFT, grouped by length": ("trainer", {**settings, "grouped": True}),
            "matrix products alone": ("floor", {**settings, "steps": settings["steps"] + 6}),
        }

    def against_loop(settings):
        return {
            "minilora": ("minilora", settings),
            "PEFT in a bare loop": ("peft_loop", settings),
            "matrix products alone": ("floor", settings),
        }

    rows = {
        "SST-2, MiniLM, batch 32, float32": against_trainer(sentences),
        "SST-2, MiniLM, batch 32, bfloat16": against_trainer(half),
    }
    if not asked.quick:
        rows |= {
            "BERT-base shape, 16 x 128 tokens, float32": against_loop(large),
            "BERT-base shape, 16 x 128 tokens, bfloat16": against_loop(large_half),
            "BERT-base shape, 16 x 128 tokens, float32, beside Trainer": {
                "minilora": ("minilora", large),
                "Trainer + PEFT": ("trainer", large),
            },
            "long ragged text (40 to 512 tokens), MiniLM, batch 8": against_trainer(ragged),
            "SST-2, LoRA on all attention projections": against_trainer(wide),
            "SST-2, 4 accumulated batches of 8": against_trainer(accumulated),
            "SST-2, --hf_parity": {
                "minilora --hf_parity": ("minilora", {**sentences, "hf_parity": True}),
                "Trainer + PEFT": ("trainer", sentences),
            },
        }
    table = {}
    for title, contestants in rows.items():
        if asked.only not in title:
            continue
        found = in_turn(contestants, asked.repeats)
        table[title] = show(title, found, "seconds_per_step", "ms/step", 1000)
        if title.startswith("BERT-base"):
            found.pop("matrix products alone", None)
            table[f"{title}: peak memory"] = show("  peak memory", found, "peak_mb", "MB", 1)
    return table


def inference_row(asked: argparse.Namespace, work: Path) -> dict:
    """Sentences per second with an adapter that minilora trained."""
    title = "inference on the validation sentences, float32"
    if asked.only not in title:
        return {}
    adapter, texts = work / "adapter", work / "texts.txt"
    command(asked, adapter, "--max_steps", "20", "--save_strategy", "no")
    lines = Path(asked.validation).read_text(encoding="utf-8").splitlines()
    texts.write_text("\n".join(line.split("\t")[0] for line in lines) + "\n", encoding="utf-8")
    common = {
        "model": asked.model, "adapter": str(adapter), "texts": str(texts), "batch": 32, "dtype": "float32",
    }  # fmt: skip
    contestants = {
        "minilora": ("minilora_inference", common),
        "minilora, adapter not merged": ("minilora_inference", {**common, "merged": False}),
        "PEFT, padded": ("peft_inference", common),
        "PEFT, padded and sorted": ("peft_inference", {**common, "grouped": True}),
    }
    found = in_turn(contestants, asked.repeats)
    return {title: show(title, found, "per_second", "sentences/s", 1)}


def start_row(asked: argparse.Namespace, work: Path) -> dict:
    """Seconds from the command to the end of the first optimizer step, caches warm."""
    title = "from the command to the end of the first step"
    if asked.only not in title:
        return {}
    settings = {
        "model": asked.model, "train": asked.train, "batch": 32, "accumulation": 1, "dtype": "float32",
        "max_length": 512, "targets": QUERY_VALUE, "steps": 3,
    }  # fmt: skip
    command(asked, work / "warm", "--max_steps", "1", "--save_strategy", "no")
    found: dict[str, list[dict]] = {"minilora": [], "Trainer + PEFT": []}
    for repeat in range(asked.repeats):
        output_dir, start = work / f"start-{repeat}", time.time()
        command(
            asked, output_dir, "--max_steps", "1", "--logging_steps", "1", "--save_strategy", "no"
        )
        # The row of the first step is the last thing written to this file.
        seconds = (output_dir / "metrics.jsonl").stat().st_mtime - start
        found["minilora"].append({"seconds": seconds})
        start = time.time()
        seconds = measured("trainer", settings)["first_step_at"] - start
        found["Trainer + PEFT"].append({"seconds": seconds})
    return {title: show(title, found, "seconds", "s", 1)}


def command(asked: argparse.Namespace, output_dir: Path, *flags: str) -> None:
    """`python -m minilora.train` on the training file."""
    arguments = [
        "--model_name_or_path", asked.model, "--train_file", asked.train, "--output_dir", str(output_dir),
        "--per_device_train_batch_size", "32", "--device", "cpu", *flags,
    ]  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "minilora.train", *arguments], check=True, capture_output=True
    )


def bert_base_shape(like: str, work: Path) -> str:
    """A BERT-base with random weights, and the tokenizer of `like`."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(like)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer))).save_pretrained(work / "bert-base-shape")
    tokenizer.save_pretrained(work / "bert-base-shape")
    return str(work / "bert-base-shape")


def concatenated(source: str, path: Path, least: int, most: int) -> str:
    """The lines of `source` joined to texts of `least` to `most` words, evenly spread."""
    draw = random.Random(0)
    lines = [line.split("\t") for line in Path(source).read_text(encoding="utf-8").splitlines()]
    texts, words = [], []
    wanted = draw.randint(least, most)
    for text, label in lines:
        words += text.split()
        if len(words) >= wanted:
            texts.append(f"{' '.join(words)}\t{label}")
            words, wanted = [], draw.randint(least, most)
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--model", help="a directory; by default the packaged MiniLM")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="rows whose title holds this text")
    asked = parser.parse_args()
    if asked.quick:
        asked.repeats = 1
    if asked.model is None:
        from minilora.bert.load import packaged_model

        asked.model = str(packaged_model())
    asked.train, asked.validation = (
        str(Path(asked.train).resolve()),
        str(Path(asked.validation).resolve()),
    )
    steps = {"sentences": 9, "base": 4, "long": 5, "accumulated": 7}
    print(f"{os.cpu_count()} cores, {asked.repeats} repeats")
    start = time.time()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        table = training_rows(asked, work, steps) | inference_row(asked, work)
        if not asked.quick:
            table |= start_row(asked, work)
    print(f"\n{time.time() - start:.0f} s in all")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
