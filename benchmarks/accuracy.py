"""Does minilora learn as well as HF Trainer + PEFT? Same files, model and hyper-parameters, fresh processes, alternating.

    python benchmarks/accuracy.py --train ../shared/data/sst2/train.tsv --validation ../shared/data/sst2/dev.tsv

Prints both accuracies for each seed and their means; the last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from minilora.bert.load import locate
from minilora.training.config import LORA_DEFAULTS, TrainConfig

DEFAULTS = TrainConfig()
R = 8


def last_json(command: list) -> dict:
    result = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])


def minilora_scores(asked: argparse.Namespace, seed: int) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        return last_json(
            [
                sys.executable, "-m", "minilora.train", "--train_file", asked.train,
                "--validation_file", asked.validation, "--output_dir", f"{directory}/out",
                "--num_train_epochs", asked.epochs, "--seed", seed, "--r", R,
            ]
        )  # fmt: skip


def trainer_scores(asked: argparse.Namespace, seed: int) -> dict:
    peer = Path(__file__).with_name("trainer_peft.py")
    with tempfile.TemporaryDirectory() as directory:
        return last_json(
            [
                sys.executable, peer, "--train", asked.train, "--validation", asked.validation,
                "--model", locate(None).location, "--learning_rate", DEFAULTS.learning_rate,
                "--epochs", asked.epochs, "--batch_size", DEFAULTS.per_device_train_batch_size,
                "--r", R, "--lora_alpha", LORA_DEFAULTS["lora_alpha"], "--lora_dropout",
                LORA_DEFAULTS["lora_dropout"], "--seed", seed, "--output_dir", directory,
            ]
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--epochs", type=float, default=DEFAULTS.num_train_epochs)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    asked = parser.parse_args()
    found: dict[str, list[float]] = {"minilora": [], "trainer_peft": []}
    for seed in asked.seeds:
        for name, scores in (("minilora", minilora_scores), ("trainer_peft", trainer_scores)):
            values = scores(asked, seed)
            found[name].append(values["eval_accuracy"])
            print(
                f"seed {seed}  {name:13} accuracy {values['eval_accuracy']:.4f}  {values['train_runtime']:.0f} s"
            )
    means = {name: statistics.mean(values) for name, values in found.items()}
    print(json.dumps({"accuracy": found, "mean": means}))


if __name__ == "__main__":
    main()
