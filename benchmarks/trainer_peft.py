"""The peer: HF Trainer + PEFT on the same files, as its documentation shows it, nothing tuned.

    python benchmarks/trainer_peft.py --train F --validation F --model M [hyper-parameters]

Prints one JSON object: eval_accuracy, eval_loss, train_runtime.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)


class Rows(torch.utils.data.Dataset):
    """`text<TAB>label` lines, tokenised once."""

    def __init__(self, path: str, tokenizer, skip_header: bool) -> None:
        lines = Path(path).read_text(encoding="utf-8").strip("\n").split("\n")[skip_header:]
        fields = [line.split("\t") for line in lines]
        names = sorted({row[1] for row in fields})
        self.labels = [names.index(row[1]) for row in fields]
        self.encoded = tokenizer([row[0] for row in fields], truncation=True)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {k: v[index] for k, v in self.encoded.items()} | {"label": self.labels[index]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--header", action="store_true", help="the files' first line is a header")
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--epochs", type=float, required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--r", type=int, required=True)
    parser.add_argument("--lora_alpha", type=int, required=True)
    parser.add_argument("--lora_dropout", type=float, required=True)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output_dir", default="/tmp/trainer-peft")
    asked = parser.parse_args()

    set_seed(asked.seed)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    model = AutoModelForSequenceClassification.from_pretrained(asked.model, num_labels=2)
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=asked.r,
        lora_alpha=asked.lora_alpha,
        lora_dropout=asked.lora_dropout,
    )
    trainer = Trainer(
        get_peft_model(model, config),
        TrainingArguments(
            output_dir=asked.output_dir,
            learning_rate=asked.learning_rate,
            num_train_epochs=asked.epochs,
            per_device_train_batch_size=asked.batch_size,
            per_device_eval_batch_size=asked.batch_size,
            seed=asked.seed,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Rows(asked.train, tokenizer, asked.header),
        eval_dataset=Rows(asked.validation, tokenizer, asked.header),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {
            "accuracy": float(np.mean(p.predictions.argmax(-1) == p.label_ids))
        },
    )
    trained = trainer.train()
    scores = trainer.evaluate()
    wanted = ("eval_accuracy", "eval_loss")
    print(
        json.dumps(
            {k: scores[k] for k in wanted} | {"train_runtime": trained.metrics["train_runtime"]}
        )
    )


if __name__ == "__main__":
    main()
