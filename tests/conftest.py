"""What the tests share: tiny models and data made on the spot, no download, no network."""

import json
import os
import shutil
import tempfile
from pathlib import Path

# Before transformers is imported anywhere: a test that reaches for the network fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models are fastest on one thread; set here so that the commands the tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
# The user's cache is not the tests' to fill.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()

import pytest
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, set_seed

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


def read_rows(output_dir: Path, timing: bool = False) -> list[dict]:
    """The rows of metrics.jsonl, timing fields left out unless asked for."""
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    if timing:
        return rows
    ends = ("runtime", "samples_per_second", "steps_per_second")
    return [{k: v for k, v in row.items() if not k.endswith(ends)} for row in rows]
