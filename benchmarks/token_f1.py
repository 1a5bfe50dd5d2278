"""Does minilora tag tokens as well as HF Trainer + PEFT? Same files, model and hyper-parameters, fresh processes, alternating.

    python benchmarks/token_f1.py --train train.conll --validation dev.conll       (--seeds 1 2 3, --epochs N)

CoNLL files: a word, a tab and its tag in each line, an empty line between sentences. The peer is written as
transformers' own example for tokens is: a word's label at its first sub-token. seqeval scores the tags of both.
Prints the entities' F1 for each seed and the means; the last line is JSON.
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from measured import first_tokens, sentences, tagged_rows
from seqeval.metrics import f1_score

from minilora.bert.load import locate
from minilora.training.config import LORA_DEFAULTS, TrainConfig

DEFAULTS = TrainConfig()
R = 8


def minilora(asked: argparse.Namespace, seed: int) -> list[list[str]]:
    """The tags of each validation sentence; trained and predicting by its commands."""
    with tempfile.TemporaryDirectory() as directory:
        run, predicted = Path(directory, "run"), Path(directory, "predicted.jsonl")
        train = [
            "minilora.train", "--task", "token_classification", "--train_file", asked.train,
            "--output_dir", run, "--save_strategy", "no", "--seed", seed, "--r", R,
            "--learning_rate", asked.learning_rate, "--num_train_epochs", asked.epochs,
            "--max_length", asked.max_length,
        ]  # fmt: skip
        predict = ["minilora.predict", run, "--file", asked.validation, "--output", predicted]
        for command in (train, predict):
            words = [sys.executable, "-m", *(str(part) for part in command)]
            subprocess.run(words, check=True, capture_output=True)
        rows = predicted.read_text(encoding="utf-8").splitlines()
        return [json.loads(row)["tags"] for row in rows]


def trainer_peft(asked: argparse.Namespace, seed: int) -> list[list[str]]:
    """The same of HF Trainer + PEFT, as their documentation shows it, nothing tuned."""
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForTokenClassification,
        AutoTokenizer,
        DataCollatorForTokenClassification,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    set_seed(seed)
    base = locate(None).location
    tokenizer = AutoTokenizer.from_pretrained(base)
    train, names = tagged_rows(asked.train, tokenizer, asked.max_length)

    model = AutoModelForTokenClassification.from_pretrained(base, num_labels=len(names))
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory, learning_rate=asked.learning_rate, num_train_epochs=asked.epochs,
            per_device_train_batch_size=DEFAULTS.per_device_train_batch_size, seed=seed,
            per_device_eval_batch_size=DEFAULTS.per_device_eval_batch_size,
            save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            get_peft_model(model, LoraConfig(task_type="TOKEN_CLS", r=R, **LORA_DEFAULTS)),
            arguments,
            train_dataset=train,
            data_collator=DataCollatorForTokenClassification(tokenizer),
        )
        trainer.train()
        words = sentences(asked.validation)[0]
        how = {"is_split_into_words": True, "truncation": True, "max_length": asked.max_length}
        rows = [tokenizer(sentence, **how) for sentence in words]
        best = trainer.predict([dict(row) for row in rows]).predictions.argmax(-1)
    predicted = [["O"] * len(sentence) for sentence in words]
    for sentence, row, found in zip(predicted, rows, best, strict=True):
        for word, place in first_tokens(row.word_ids()).items():
            sentence[word] = names[found[place]]
    return predicted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--learning_rate", type=float, default=DEFAULTS.learning_rate)
    parser.add_argument("--epochs", type=float, default=DEFAULTS.num_train_epochs)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    asked = parser.parse_args()
    _, tags = sentences(asked.validation)
    found: dict[str, list[float]] = {"minilora": [], "trainer_peft": []}
    for seed in asked.seeds:
        for contestant in (minilora, trainer_peft):
            name, start = contestant.__name__, time.time()
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                predicted = fresh.submit(contestant, asked, seed).result()
            found[name].append(float(f1_score(tags, predicted)))
            seconds = time.time() - start
            print(f"seed {seed}  {name:13} F1 {found[name][-1]:.4f}  {seconds:.0f} s", flush=True)
    means = {name: statistics.mean(values) for name, values in found.items()}
    print(f"minilora's mean is {means['minilora'] - means['trainer_peft']:+.4f} from its peer's")
    print(json.dumps({"f1": found, "mean": means}))


if __name__ == "__main__":
    main()
