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
    "learning_rate=2e-4": ({}, {"learning_rate": 2e-4}),
    "learning_rate=2e-4, r=32": ({"r": 32}, {"learning_rate": 2e-4}),
    "all-linear": ({"target_modules": "all-linear"}, {}),
    "lora_alpha=64": ({"lora_alpha": 64}, {}),
    "lora_dropout=0": ({"lora_dropout": 0.0}, {}),
    "use_dora": ({"use_dora": True}, {}),
    "pissa": ({"init_lora_weights": "pissa"}, {}),
    "r=32, use_rslora": ({"r": 32, "use_rslora": True}, {}),
    "loraplus_lr_ratio=4": ({}, {"loraplus_lr_ratio": 4}),
    "learning_rate=5e-5": ({}, {"learning_rate": 5e-5}),
    "learning_rate=3e-3": ({}, {"learning_rate": 3e-3}),
    "r=4": ({"r": 4}, {}),
    "lora_alpha=8": ({"lora_alpha": 8}, {}),
    "lora_alpha=32": ({"lora_alpha": 32}, {}),
    "lora_dropout=0.3": ({"lora_dropout": 0.3}, {}),
    "all attention": ({"target_modules": ATTENTION}, {}),
}


def short_sentences(path: str, count: int, words: int) -> str:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return "\n".join([x for x in lines if len(x.split("\t")[0].split()) <= words][:count]) + "\n"


def results_so_far() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": [], "costs": []}


def measure(train_file: str, asked: argparse.Namespace, setting: str, seed: int) -> dict:
    """One run: its accuracy after the last step, what it trained and wrote, what its steps cost."""
    import safetensors.torch

    from minilora.fine_tuning import run_fine_tuning

    lora, arguments = SETTINGS[setting]
    clock = []

    def should_stop() -> bool:  # asked before each step
        clock.append(time.process_time())
        return False

    with tempfile.TemporaryDirectory() as directory:
        # As a test file the sentences are scored once, after the last step.
        files = {"train_file": train_file, "output_dir": f"{directory}/out"}
        few = asked.cost_steps and {"max_steps": asked.cost_steps}
        files |= few or {"test_file": asked.validation}
        settings = {
            "num_train_epochs": asked.epochs,
            "seed": seed,
            "save_strategy": "no",
            "device": "cpu",
        }
        result = run_fine_tuning({**files, **settings, **arguments}, lora, should_stop)
        written = Path(directory, "out", "adapter_model.safetensors")
        tensors = safetensors.torch.load(written.read_bytes())
        milliseconds = [1000 * (after - before) for before, after in itertools.pairwise(clock)]
        return {
            "setting": setting, "seed": seed, "accuracy": result.metrics.get("test_accuracy"),
            "train_loss": result.metrics["train_loss"], "steps": result.global_step,
            "trained": sum(tensor.numel() for tensor in tensors.values()),
            "file_bytes": written.stat().st_size,
            "core_ms_per_step": statistics.median(milliseconds), "fastest_step_ms": min(milliseconds),
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
    """The markdown tables of docs/02_lora_config.md: accuracies, costs."""
    runs = finished(results)
    costs = {name: [run for run in results["costs"] if run["setting"] == name] for name in SETTINGS}
    # What trains as many numbers as the defaults costs what they cost.
    by_number = {of[0]["trained"]: name for name, of in reversed(costs.items()) if of}
    costs = {name: of for name, of in costs.items() if name in by_number.values()}
    default = statistics.mean(run["accuracy"] for run in runs[DEFAULT])
    seeds = ", ".join(str(seed) for seed in results["seeds"])
    lines = [f"| changed | seeds {seeds} | mean | difference, points |", "|---|---|---|---|"]
    for name, of_seeds in runs.items():
        accuracies = [run["accuracy"] for run in of_seeds]
        mean = statistics.mean(accuracies)
        each = ", ".join(f".{1000 * accuracy:03.0f}" for accuracy in accuracies)
        gap = "" if name == DEFAULT else f"{100 * (mean - default):+.1f}"
        lines.append(f"| {name} | {each} | .{1000 * mean:03.0f} | {gap} |")
    accuracy_table = "\n".join(lines)
    lines = ["| changed | trained numbers | file, bytes | a step |", "|---|---|---|---|"]
    fastest = {name: min(r["fastest_step_ms"] for r in of) for name, of in costs.items()}
    for name, (run, *more) in costs.items():
        # Once is no measurement, on a machine that others use.
        share = f"{fastest[name] / fastest[DEFAULT]:.1f}" if len(more) > 1 else ""
        lines.append(f"| {name} | {run['trained']:,} | {run['file_bytes']:,} | {share} |")
    return [accuracy_table, "\n".join(lines)]


def chance(results: dict) -> dict[str, float]:
    """In points: the error of one accuracy (of its sentences), the seeds' standard deviation, and the
    error of the difference between two settings' means that comes of the seeds.
    """
    runs = {n: [r["accuracy"] for r in of_seeds] for n, of_seeds in finished(results).items()}
    # Where something was learned: what stays near one half spreads in another way.
    variance = statistics.mean(
        statistics.variance(v) for v in runs.values() if statistics.mean(v) > 0.7
    )
    p = statistics.mean(runs[DEFAULT])
    return {
        "one_accuracy": 100 * math.sqrt(p * (1 - p) / results["validation_sentences"]),
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
    parser.add_argument("--cost_steps", type=int, help="so many steps only, for what they cost")
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
    end = time.monotonic() + 60 * asked.minutes
    FIGURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        train_file = f"{directory}/train.tsv"
        sentences = short_sentences(asked.train, asked.sentences, asked.words)
        Path(train_file).write_text(sentences, encoding="utf-8")
        kind = "costs" if asked.cost_steps else "runs"
        for setting, seed in itertools.product(asked.settings, asked.seeds):
            runs = results_so_far()["runs"]
            is_there = any((run["setting"], run["seed"]) == (setting, seed) for run in runs)
            if (is_there and kind == "runs") or time.monotonic() > end:
                continue
            run = measure(train_file, asked, setting, seed)
            print(json.dumps(run), flush=True)
            found = results_so_far()  # once more: another process may have added to it
            found[kind].append(run)
            found |= setup if kind == "runs" else {}
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
