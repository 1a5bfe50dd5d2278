"""What r, lora_alpha, targets and learning rate do to accuracy: short SST-2 sentences, MiniLM, several seeds.

    python benchmarks/lora_settings.py --train ../shared/data/sst2/train.tsv --validation ../shared/data/sst2/dev.tsv
    python benchmarks/lora_settings.py --tables      (the tables of docs/02_lora_config.md, without measuring)

Each run is the command's, but for what its row says. A run that stands in docs/figures/lora_settings.json already
is not repeated; `--minutes 5` stops after the run in which they are over. The sentences are the first 1,500 of at
most 12 words, so that a run takes half a minute of one core.
"""

import argparse
import itertools
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
RESULTS = FIGURES / "lora_settings.json"
DEFAULT = "the command's defaults"
ATTENTION = ["query", "key", "value", "attention.output.dense"]
# name -> (fields of LoraConfig, arguments of the run) that differ from the command's.
SETTINGS: dict[str, tuple[dict, dict]] = {
    DEFAULT: ({}, {}),
    "r=1": ({"r": 1}, {}),
    "r=32": ({"r": 32}, {}),
    "lora_alpha=64": ({"lora_alpha": 64}, {}),
    "all-linear": ({"target_modules": "all-linear"}, {}),
    "learning_rate=2e-4": ({}, {"learning_rate": 2e-4}),
    "learning_rate=2e-4, r=32": ({"r": 32}, {"learning_rate": 2e-4}),
    "r=32, use_rslora": ({"r": 32, "use_rslora": True}, {}),
    "pissa": ({"init_lora_weights": "pissa"}, {}),
    "lora_dropout=0": ({"lora_dropout": 0.0}, {}),
    "learning_rate=5e-5": ({}, {"learning_rate": 5e-5}),
    "use_dora": ({"use_dora": True}, {}),
    "loraplus_lr_ratio=4": ({}, {"loraplus_lr_ratio": 4}),
    "learning_rate=3e-3": ({}, {"learning_rate": 3e-3}),
    "lora_alpha=8": ({"lora_alpha": 8}, {}),
    "lora_dropout=0.3": ({"lora_dropout": 0.3}, {}),
    "r=4": ({"r": 4}, {}),
    "all attention": ({"target_modules": ATTENTION}, {}),
    "lora_alpha=32": ({"lora_alpha": 32}, {}),
}


def short_sentences(path: str, count: int, words: int) -> str:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return "\n".join([x for x in lines if len(x.split("\t")[0].split()) <= words][:count]) + "\n"


def measure(train_file: str, asked: argparse.Namespace, setting: str, seed: int) -> dict:
    """One run: its accuracy after the last step, what it trained, what it wrote, what a step cost."""
    import safetensors.torch

    from minilora.fine_tuning import run_fine_tuning

    lora, arguments = SETTINGS[setting]
    clock = []

    def should_stop() -> bool:  # asked before each step
        clock.append(time.process_time())
        return False

    with tempfile.TemporaryDirectory() as directory:
        # As a test file the sentences are scored once, after the last step.
        files = {
            "train_file": train_file,
            "test_file": asked.validation,
            "output_dir": f"{directory}/out",
        }
        settings = {
            "num_train_epochs": asked.epochs,
            "seed": seed,
            "save_strategy": "no",
            "device": "cpu",
        }
        result = run_fine_tuning({**files, **settings, **arguments}, lora, should_stop)
        written = Path(directory, "out", "adapter_model.safetensors")
        tensors = safetensors.torch.load(written.read_bytes())
        steps = [after - before for before, after in itertools.pairwise(clock)]
        return {
            "setting": setting, "seed": seed, "accuracy": result.metrics["test_accuracy"],
            "train_loss": result.metrics["train_loss"], "steps": result.global_step,
            "trained": sum(tensor.numel() for tensor in tensors.values()),
            "file_bytes": written.stat().st_size, "core_ms_per_step": 1000 * statistics.median(steps),
        }  # fmt: skip


def finished(results: dict) -> dict[str, list[dict]]:
    """Setting -> its runs, in the order of the seeds, where every seed has been measured."""
    found = {
        name: sorted(
            (run for run in results["runs"] if run["setting"] == name), key=lambda r: r["seed"]
        )
        for name in SETTINGS
    }
    return {name: runs for name, runs in found.items() if len(runs) == len(results["seeds"])}


def tables(results: dict) -> list[str]:
    """The markdown tables of docs/02_lora_config.md."""
    runs = finished(results)
    default = statistics.mean(run["accuracy"] for run in runs[DEFAULT])
    seeds = ", ".join(str(seed) for seed in results["seeds"])
    lines = [
        f"| changed | trained | file, bytes | a step, ms of one core | accuracy, seeds {seeds} | mean | to the first row, points |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, of_seeds in runs.items():
        accuracies = [run["accuracy"] for run in of_seeds]
        mean, milliseconds = (
            statistics.mean(accuracies),
            [run["core_ms_per_step"] for run in of_seeds],
        )
        each = ", ".join(f".{1000 * accuracy:03.0f}" for accuracy in accuracies)
        gap = "" if name == DEFAULT else f"{100 * (mean - default):+.1f}"
        lines.append(
            f"| {name} | {of_seeds[0]['trained']:,} | {of_seeds[0]['file_bytes']:,} "
            f"| {statistics.median(milliseconds):.0f} | {each} | .{1000 * mean:03.0f} | {gap} |"
        )
    return ["\n".join(lines)]


def chance(results: dict) -> dict[str, float]:
    """In points: the error of one accuracy (of its sentences), the seeds' standard deviation, and the error of the
    difference between two settings' means that comes of both.
    """
    runs, sentences = finished(results), results["validation_sentences"]
    learned = {n: [r["accuracy"] for r in of] for n, of in runs.items()}
    learned = {n: values for n, values in learned.items() if statistics.mean(values) > 0.7}
    variance = statistics.mean(statistics.variance(values) for values in learned.values())
    p = statistics.mean(learned[DEFAULT])
    return {
        "one_accuracy": 100 * math.sqrt(p * (1 - p) / sentences),
        "seeds_deviation": 100 * math.sqrt(variance),
        "two_means": 100 * math.sqrt(2 * variance / len(results["seeds"])),
    }


def draw(results: dict) -> None:
    from figures import COLOURS, save

    runs = finished(results)
    default = [run["accuracy"] for run in runs[DEFAULT]]

    def dots(axes) -> None:
        axes.axvspan(min(default), max(default), alpha=0.15, color=COLOURS[0], linewidth=0)
        for row, of_seeds in enumerate(runs.values()):
            accuracies = [run["accuracy"] for run in of_seeds]
            axes.plot(accuracies, [row] * len(accuracies), "o", color=COLOURS[0], markersize=5)
            axes.plot(
                [statistics.mean(accuracies)],
                [row],
                "|",
                color=COLOURS[1],
                markersize=14,
                markeredgewidth=2,
            )
        axes.set_yticks(range(len(runs)), list(runs))
        axes.invert_yaxis()
        axes.set_xlabel("accuracy: a dot for each seed, a line for their mean")

    save("lora_settings", dots, size=(8, 1 + 0.28 * len(runs)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--train")
    parser.add_argument("--validation")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--sentences", type=int, default=1500)
    parser.add_argument("--words", type=int, default=12)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--machine", default=platform.processor() or platform.machine())
    parser.add_argument(
        "--tables", action="store_true", help="print the tables of what was measured"
    )
    parser.add_argument("--plot", action="store_true", help="draw what was measured")
    asked = parser.parse_args()
    if asked.tables or asked.plot:
        results = json.loads(RESULTS.read_text())
        if asked.plot:
            draw(results)
        print("\n\n".join(tables(results)))
        print(json.dumps(chance(results)), file=sys.stderr)
        return
    if not (asked.train and asked.validation):
        parser.error("--train and --validation are needed to measure")

    import torch

    torch.set_num_threads(asked.threads)
    setup = {
        "date": time.strftime("%Y-%m-%d"), "machine": asked.machine, "threads": asked.threads,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "seeds": asked.seeds, "epochs": asked.epochs, "train_sentences": asked.sentences,
        "words_at_most": asked.words, "model": "MiniLM-L6, packaged",
        "validation_sentences": len(Path(asked.validation).read_text(encoding="utf-8").splitlines()),
    }  # fmt: skip
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    end = time.monotonic() + 60 * asked.minutes
    FIGURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        train_file = f"{directory}/train.tsv"
        sentences = short_sentences(asked.train, asked.sentences, asked.words)
        Path(train_file).write_text(sentences, encoding="utf-8")
        for setting in asked.settings:
            for seed in asked.seeds:
                is_there = any((run["setting"], run["seed"]) == (setting, seed) for run in runs)
                if is_there or time.monotonic() > end:
                    continue
                runs.append(measure(train_file, asked, setting, seed))
                print(json.dumps(runs[-1]))
                RESULTS.write_text(json.dumps({**setup, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
