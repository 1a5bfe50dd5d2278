"""Every base that people have, with every task: what its files lack is drawn once, trained, saved,
found again.

Each family, saved bare, as a masked language model, with its pretraining heads, or with a head for
another number of labels: a run of each task on it, its resume, and what a fresh process makes of
it, one for all runs on a family.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from minilora import MiniloraError, evaluate_file, open_run
from minilora.bert import forward as forward_room
from minilora.bert.forward import Packed
from minilora.bert.packing import attention
from minilora.fine_tuning import run_fine_tuning
from minilora.trained.compare import compare_directories
from minilora.training.config import TASKS
from tests.cells import CELLS, CLASSES, FAMILIES, arguments, base_of, files_of, without_dropout
from tests.conftest import read_rows
from tests.training.test_resume import stop_at


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Of each task, the arguments that name its files."""
    directory = tmp_path_factory.mktemp("files")
    return {task: files_of(task, directory) for task in TASKS}


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def train(values, **lora):
    return run_fine_tuning(values, lora, lambda: False)


def trained(task, base, files, directory):
    """The line of a run for `tests.afterwards`, after it and its resume."""
    whole, resumed = directory / "whole", directory / "resumed"
    result = train(arguments(task, base, files, whole))
    stop_at(2, arguments(task, base, files, resumed), resumed)
    train({"resume_from_checkpoint": str(resumed)})
    difference = compare_directories(whole, resumed)
    assert difference["tensors"] == difference["log"] == []
    assert read_rows(whole) == read_rows(resumed) and len(read_rows(whole)) == 6
    scratch = {"out": str(whole), "scratch": str(directory / "scratch")}
    return {"task": task, "base": str(base), **files, "metrics": result.metrics, **scratch}


def check_packed(task, base, files, directory):
    """Runs without any dropout, whose masks batches of another shape would draw otherwise."""
    still, logs = without_dropout(base, directory / "still"), []
    for batching in ("packed", "padded"):
        values = arguments(
            task, still, files, directory / batching, batching=batching, save_strategy="no"
        )
        rows = train(values, lora_dropout=0.0).log_history
        names = ("loss", "grad_norm", "eval_loss")
        logs.append([row[name] for row in rows for name in names if name in row])
    assert len(logs[0]) == 11 and isinstance(open_run(directory / "packed").forward, Packed)
    np.testing.assert_allclose(*logs, rtol=1e-3, err_msg=f"packed and padded: {task}")


def afterwards(lines):
    """What `tests.afterwards` answers, in a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.run(
        [sys.executable, "-m", "tests.afterwards"], input="\n".join(map(json.dumps, lines)),
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return [json.loads(answer) for answer in process.stdout.splitlines()]


def check_cells(cells, tokenizer, files, tmp_path, spoilt=()):
    """Lines of `spoilt` runs, made of the first cell's, are added; returns their answers."""
    lines = []
    for number, (family, kind, task) in enumerate(cells):
        directory = tmp_path / str(number)
        base = base_of(family, kind, tokenizer, directory / "base")
        lines.append(trained(task, base, files[task], directory))
        if kind == "bare":
            check_packed(task, base, files[task], directory)
    lines += [spoil(lines[0]) for spoil in spoilt]
    answers = afterwards(lines)
    assert len(answers) == len(lines)
    for cell, answer in zip(cells, answers, strict=False):
        assert answer is None, f"{cell}: {answer}"
    return answers[len(cells) :]


def spoil(line):
    """A copy of a run, one value of whose adapter is another."""
    out = shutil.copytree(line["out"], line["out"] + "-spoilt")
    tensors = load_file(out + "/adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] += 1e-2
    save_file(tensors, out + "/adapter_model.safetensors", {"format": "pt"})
    return {**line, "out": out, "scratch": line["scratch"] + "-spoilt"}


def test_every_task_on_a_distilbert_and_classes_on_a_masked_language_model(
    tokenizer, files, tmp_path
):
    """A row of the matrix; and an adapter that is not the one that was trained is seen."""
    cells = [*(("distilbert", "bare", task) for task in TASKS), ("bert", "masked", CLASSES)]
    (answer,) = check_cells(cells, tokenizer, files, tmp_path, [spoil])
    assert "AssertionError: eval_" in answer
    first = tmp_path / "0"
    assert len(compare_directories(first / "whole", first / "whole-spoilt")["tensors"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_task_on_every_kind_of_base_of_every_family(family, tokenizer, files, tmp_path):
    cells = [(family, *cell) for cell in CELLS]
    if family == "modernbert":
        cells.remove((family, "pretraining", CLASSES))  # transformers has no such class of it
    check_cells(cells, tokenizer, files, tmp_path)


@pytest.mark.parametrize(
    "task",
    [pytest.param(task, marks=[pytest.mark.slow] * (task != "masked_lm")) for task in TASKS],
)
def test_keys_of_the_tokens_before_would_be_seen(task, tokenizer, files, tmp_path, monkeypatch):
    """The control of packed runs."""

    def shifted(qkv, *others):
        query, key, value = qkv
        return attention((query, key.roll(1, dims=0), value), *others)

    monkeypatch.setattr(forward_room, "attention", shifted)
    base = base_of("bert", "bare", tokenizer, tmp_path / "base")
    with pytest.raises(AssertionError, match="packed and padded"):
        check_packed(task, base, files[task], tmp_path)


def test_an_adapter_without_what_its_base_lacks_is_refused(tokenizer, files, tmp_path):
    """PEFT leaves the pooler of a masked language model as it was drawn, and saves it nowhere."""
    base = base_of("bert", "masked", tokenizer, tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "a")
    refusal = r"neither the adapter nor its base model holds bert\.pooler"
    with pytest.raises(MiniloraError, match=refusal):
        open_run(tmp_path / "a")
    for how in ("continue", "merge"):
        values = arguments(CLASSES, tmp_path / "a", files[CLASSES], tmp_path / how, on_adapter=how)
        with pytest.raises(MiniloraError, match=refusal):
            train(values)


@pytest.mark.parametrize("how", ["continue", "merge"])
def test_a_run_on_such_an_adapter_goes_on_from_what_it_holds(how, tokenizer, files, tmp_path):
    base = base_of("bert", "masked", tokenizer, tmp_path / "base")
    first, second = tmp_path / "first", tmp_path / "second"
    train(arguments(CLASSES, base, files[CLASSES], first))
    result = train(arguments(CLASSES, first, files[CLASSES], second, on_adapter=how))
    scores = evaluate_file(open_run(second), files[CLASSES]["validation_file"])
    assert scores.metrics["eval_loss"] == result.metrics["eval_loss"]
