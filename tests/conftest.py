"""What the tests share: tiny models and data made on the spot, no download, no network."""

import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Before transformers is imported anywhere: a test that reaches for the network fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models are fastest on one thread; set here so that the commands the tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
# The user's cache is not the tests' to fill.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()

import numpy as np
import pytest
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, set_seed

from minilora import TrainConfig
from minilora.bert.examples import Examples
from minilora.bert.tasks import build_task
from minilora.command import run_command

WORDS = [
    "the",
    "a",
    "film",
    "book",
    "was",
    "is",
    "good",
    "bad",
    "fine",
    "dull",
    "great",
    "awful",
    "plot",
    "story",
    "cast",
    "not",
    "never",
    "very",
    "quite",
    "loved",
    "hated",
    "long",
    "short",
    "and",
    "but",
    "so",
    "i",
    "it",
    "we",
    "they",
]
POSITIVE = {"good", "fine", "great", "loved"}
NEGATIVE = {"bad", "dull", "awful", "hated"}


def pytest_sessionfinish():
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def tiny_config(**changes) -> BertConfig:
    """A BERT of two layers and hidden size 32."""
    settings = {
        "vocab_size": len(WORDS) + 5,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    return BertConfig(**{**settings, **changes})


def tiny_classifier(seed: int = 0, **changes) -> BertForSequenceClassification:
    """A randomly drawn tiny classifier, the same for the same seed."""
    set_seed(seed)
    return BertForSequenceClassification(tiny_config(**changes))


def recompute(model, **options) -> None:
    """Its activations from now on, by the name that this transformers has for it."""
    old_name = model.gradient_checkpointing_enable  # until 5.23
    getattr(model, "activation_checkpointing_enable", old_name)({"use_reentrant": False, **options})


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A model directory as a user would have it: a headless tiny BERT and its tokenizer."""
    from transformers import BertModel

    directory = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = directory / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    BertTokenizerFast(vocab=str(vocabulary), model_max_length=64).save_pretrained(directory)
    set_seed(1)
    BertModel(tiny_config()).save_pretrained(directory)
    return directory


def write_sentences(path: Path, count: int, seed: int, header: bool = True) -> Path:
    """A tsv of random sentences of 3 to 12 words whose label is the majority of their sentiment
    words.
    """
    import random

    draw = random.Random(seed)
    rows = []
    while len(rows) < count:
        words = draw.choices(WORDS, k=draw.randint(3, 12))
        score = sum(word in POSITIVE for word in words) - sum(word in NEGATIVE for word in words)
        if score:
            rows.append((" ".join(words), "positive" if score > 0 else "negative"))
    lines = ["text\tlabel"] if header else []
    path.write_text("\n".join([*lines, *("\t".join(row) for row in rows)]) + "\n")
    return path


@pytest.fixture(scope="session")
def sentences(tmp_path_factory) -> tuple[Path, Path]:
    """(train, validation) files: 44 and 20 sentences."""
    directory = tmp_path_factory.mktemp("sentences")
    return (
        write_sentences(directory / "train.tsv", 44, seed=1),
        write_sentences(directory / "validation.tsv", 20, seed=2),
    )


def examples_of(count: int) -> Examples:
    """Examples of one token, each of a row of its own."""
    ids, each = np.ones(count, dtype=np.int32), np.arange(count)
    return Examples(ids, None, np.arange(count + 1), each, each, truncated=0)


def task_of(name: str, labels: list[str] | None = None, **arguments):
    """The task called `name`, of a run with these arguments."""
    return build_task(TrainConfig(task=name, **arguments), labels)


def read_rows(output_dir: Path, timing: bool = False) -> list[dict]:
    """The rows of metrics.jsonl, timing fields left out unless asked for."""
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    if timing:
        return rows
    ends = ("runtime", "samples_per_second", "steps_per_second")
    return [{k: v for k, v in row.items() if not k.endswith(ends)} for row in rows]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, tiny_model, sentences) -> Path:
    """The directory of a finished run: 6 steps, a checkpoint and an evaluation at 3 and 6."""
    from minilora import LoraConfig, TrainConfig, fine_tune

    output_dir = tmp_path_factory.mktemp("finished") / "out"
    config = TrainConfig(
        model_name_or_path=str(tiny_model),
        train_file=str(sentences[0]),
        validation_file=str(sentences[1]),
        output_dir=str(output_dir),
        max_steps=6,
        learning_rate=2e-2,
        logging_steps=1,
        device="cpu",
    )
    fine_tune(config, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    return output_dir


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str

    def summary(self) -> dict:
        """The JSON object in the last line of stdout."""
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs `python -m minilora.<name> <flags>` in this process, which has torch imported."""

    def run(name: str, *flags) -> Finished:
        module = importlib.import_module(f"minilora.{name}")
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        handler = signal.getsignal(signal.SIGTERM)
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                run_command(module.main)
        finally:
            signal.signal(signal.SIGTERM, handler)
        out, err = capfd.readouterr()
        return Finished(ended.value.code, out, err)

    return run
