"""The cells of the matrix: every family's bases, every task's files, and a run of the one on the
other.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
)

from minilora.training.config import TASKS
from tests.bert.tasks.test_multi_label_classification import write_topics
from tests.bert.tasks.test_question_answering import question, squad
from tests.conftest import WORDS, write_sentences

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 66, "pad_token_id": 0, "embedding_size": 16,
    "initializer_range": 0.2,  # what a text tells matters
}  # fmt: skip
OF_DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
FAMILIES = {
    "bert": {}, "roberta": {}, "xlm-roberta": {}, "camembert": {}, "electra": {},
    "distilbert": OF_DISTILBERT, "albert": {}, "mpnet": {}, "deberta-v2": {},
    "modernbert": {"reference_compile": False},
}  # fmt: skip
KINDS = {
    "bare": (AutoModel, {}),
    "masked": (AutoModelForMaskedLM, {}),
    "pretraining": (AutoModelForPreTraining, {}),
    "three labels": (AutoModelForSequenceClassification, {"num_labels": 3}),
}
CLASSES = "sequence_classification"
# (kind, task): every task on a bare base, and what else a base may hold for the tasks it is for.
CELLS = [
    *(("bare", task) for task in TASKS),
    *((kind, CLASSES) for kind in KINDS if kind != "bare"),
    ("masked", "masked_lm"),
]
# Blocks, and windows, of fewer tokens than the texts have.
OF_TASKS: dict[str, dict[str, Any]] = {
    "masked_lm": {"max_length": 16},
    "question_answering": {"max_length": 32, "doc_stride": 8},
}


def base_of(family: str, kind: str, tokenizer, directory: Path) -> Path:
    """A random model of the family, saved as the kind says, beside the tokenizer."""
    auto_class, labels = KINDS[kind]
    changes = {**SMALL, **FAMILIES[family], "vocab_size": len(tokenizer), **labels}
    torch.manual_seed(7)
    auto_class.from_config(AutoConfig.for_model(family, **changes)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_lines(path: Path, count: int, seed: int, valued: bool) -> Path:
    """Texts of 3 to 12 words; `valued`, each with a number that its words tell."""
    draw, lines = random.Random(seed), ["text\tlabel"] if valued else []
    for _ in range(count):
        words = draw.choices(WORDS, k=draw.randint(3, 12))
        value = f"\t{sum(map(WORDS.index, words)) / 100}" if valued else ""
        lines.append(" ".join(words) + value)
    path.write_text("\n".join(lines) + "\n")
    return path


def write_words(path: Path, count: int, seed: int) -> Path:
    """Sentences each word of which has a tag that begins something."""
    draw, tags = random.Random(seed), ["B-early", "B-late", "B-last"]
    sentences = [draw.choices(WORDS, k=draw.randint(2, 12)) for _ in range(count)]
    tagged = [[f"{word}\t{tags[WORDS.index(word) // 10]}" for word in each] for each in sentences]
    path.write_text("\n\n".join(map("\n".join, tagged)) + "\n")
    return path


def write_questions(path: Path, count: int, seed: int) -> Path:
    draw = random.Random(seed)
    return squad(path, [question(draw, number, 40) for number in range(count)])


WRITERS = {
    "sequence_classification": (write_sentences, "tsv"),
    "regression": (lambda *given: write_lines(*given, valued=True), "tsv"),
    "multi_label_classification": (write_topics, "jsonl"),
    "token_classification": (write_words, "conll"),
    "question_answering": (write_questions, "json"),
    "masked_lm": (lambda *given: write_lines(*given, valued=False), "txt"),
}


def files_of(task: str, directory: Path) -> dict[str, str]:
    """The arguments that name the task's train_file, of some 24 examples, and validation_file."""
    write, suffix = WRITERS[task]
    return {
        f"{split}_file": str(write(directory / f"{task}-{split}.{suffix}", count, seed))
        for split, count, seed in (("train", 24, 1), ("validation", 12, 2))
    }


def arguments(task: str, base: Path, files: dict[str, str], output_dir: Path, **changes) -> dict:
    """A run of five steps, past the end of an epoch, with checkpoints at 2, 4 and 5."""
    return {
        "task": task, "model_name_or_path": str(base), **files, "output_dir": str(output_dir),
        **OF_TASKS.get(task, {}), "max_steps": 5, "per_device_train_batch_size": 8,
        "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2,
        "eval_strategy": "steps", "eval_steps": 5, "device": "cpu", **changes,
    }  # fmt: skip


def without_dropout(base: Path, directory: Path) -> Path:
    """The same base, no activation of which is dropped."""
    directory.mkdir()
    for file in base.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    rates = {name: 0.0 for name in config if "drop" in name and config[name]}
    (directory / "config.json").write_text(json.dumps({**config, **rates}))
    return directory
