"""merge: an ordinary model directory, complete or not there, that needs no minilora."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from minilora import (
    TrainConfig,
    combine_adapters,
    fine_tune,
    open_run,
    predict_texts,
    write_merged_model,
)

TEXTS = ["it was good", "so dull and bad", ""]


def train(tiny_model, train_file, output_dir, **changes):
    config = TrainConfig(
        model_name_or_path=str(tiny_model), train_file=str(train_file), max_steps=3,
        output_dir=str(output_dir), learning_rate=2e-2, device="cpu", **changes,
    )  # fmt: skip
    fine_tune(config)
    return output_dir


def logits_of(directory):
    model = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32
    ).eval()
    batch = AutoTokenizer.from_pretrained(directory)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits


def logits_of_run(path):
    run = open_run(path)
    with torch.no_grad():
        return run.model(**run.tokenizer(TEXTS, padding=True, return_tensors="pt")).logits


def test_plain_transformers_loads_it_where_minilora_is_not(finished_run, tmp_path, command):
    result = command("merge", finished_run, "--output_dir", tmp_path / "merged")
    assert result.code == 0 and result.summary()["output_dir"] == str(tmp_path / "merged")
    code = f"""
import json, sys
sys.modules["minilora"] = sys.modules["peft"] = None  # importing either is an error
from transformers import pipeline
classify = pipeline("text-classification", {str(tmp_path / "merged")!r}, device="cpu")
print(json.dumps(classify({TEXTS!r})))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    theirs = json.loads(process.stdout.splitlines()[-1])
    for found, expected in zip(theirs, predict_texts(open_run(finished_run), TEXTS), strict=True):
        assert found["label"] == expected["label"] in ("negative", "positive")
        assert found["score"] == pytest.approx(expected["score"], rel=1e-5)


def test_its_logits_are_those_of_the_adapter(finished_run, tmp_path):
    directory = write_merged_model([finished_run / "checkpoint-3"], tmp_path / "merged")
    expected = logits_of_run(finished_run / "checkpoint-3")
    torch.testing.assert_close(logits_of(directory), expected, rtol=1e-5, atol=1e-6)


def test_files_have_the_permissions_of_the_umask(finished_run, tmp_path):
    before = os.umask(0o027)
    try:
        directory = write_merged_model([finished_run], tmp_path / "merged")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
    assert set(modes.values()) == {0o640} and "model.safetensors" in modes


def test_large_weights_are_sharded(finished_run, tmp_path, command):
    flags = ["--output_dir", tmp_path / "merged", "--max_shard_size", "20KB"]
    assert command("merge", finished_run, *flags).code == 0
    names = [path.name for path in (tmp_path / "merged").iterdir()]
    assert "model.safetensors.index.json" in names and "model-00001-of-00006.safetensors" in names
    whole = write_merged_model([finished_run], tmp_path / "whole")
    assert torch.equal(logits_of(tmp_path / "merged"), logits_of(whole))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_is_written_and_recorded(dtype, finished_run, tmp_path, command):
    flags = ["--output_dir", tmp_path / "merged", "--dtype", dtype]
    assert command("merge", finished_run, *flags).code == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    whole = load_file(write_merged_model([finished_run], tmp_path / "whole") / "model.safetensors")
    assert all(torch.equal(tensors[name], whole[name].to(getattr(torch, dtype))) for name in whole)


def test_regression_stays_a_regression(tiny_model, tmp_path):
    path = tmp_path / "values.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{'good ' * i}bad\t{i / 10}\n" for i in range(10)))
    out = train(tiny_model, path, tmp_path / "out", task="regression")
    directory = write_merged_model([out], tmp_path / "merged")
    assert json.loads((directory / "config.json").read_text())["problem_type"] == "regression"
    torch.testing.assert_close(logits_of(directory), logits_of_run(out), rtol=1e-5, atol=1e-6)


def test_several_are_merged_with_weights(finished_run, tiny_model, sentences, tmp_path, command):
    other = train(tiny_model, sentences[0], tmp_path / "other")
    flags = ["--adapter", finished_run, other, "--weights", ".7", ".3"]
    assert command("merge", *flags, "--output_dir", tmp_path / "merged").code == 0
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    expected = combine_adapters(model, [finished_run, other], [0.7, 0.3]).state_dict()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_adapter_and_what_it_became_are_merged(finished_run, sentences, tmp_path):
    """The base is the same, although a resume of the second needs the first."""
    more = train(finished_run, sentences[0], tmp_path / "more")
    merged = write_merged_model([finished_run, more], tmp_path / "merged", weights=[0.5, 0.5])
    first, second = (logits_of_run(path) for path in (finished_run, more))
    assert not torch.equal(first, second) and merged.is_dir()


def test_adapters_that_do_not_fit_each_other_are_refused(
    finished_run, tiny_model, sentences, tmp_path, command
):
    relabelled = tmp_path / "other.tsv"
    relabelled.write_text(sentences[0].read_text().replace("positive", "glad"))
    other = train(tiny_model, relabelled, tmp_path / "other")
    flags = ["--adapter", finished_run, other, "--output_dir", tmp_path / "merged"]
    result = command("merge", *flags, "--weights", "1", "1")
    assert result.code == 2 and "predicts other labels than" in result.err
    result = command("merge", *flags)
    assert result.code == 2 and "2 adapters need --weights" in result.err
    on_merged = write_merged_model([finished_run], tmp_path / "base")
    third = train(on_merged, sentences[0], tmp_path / "third")
    flags = ["--adapter", finished_run, third, "--output_dir", tmp_path / "merged"]
    result = command("merge", *flags, "--weights", "1", "1")
    assert result.code == 2 and "is an adapter for another base model than" in result.err
    assert {path.name for path in tmp_path.iterdir()} == {"other.tsv", "other", "base", "third"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output_dir", "there"], "there exists: give a new name"),
        (["--output_dir", "new", "--max_shard_size", "plenty"], "max_shard_size 'plenty'"),
        (["--output_dir", "new", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--output_dir", "new", "--adapter", "a"], "give one run, or several"),
        (["--output_dir", "new", "--weights", "nan"], "give a number for each"),
        (["--output_dir", "new", "--model_name_or_path", "./gone"], "there is no such directory"),
        ([], "required: --output_dir"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    flags, message, finished_run, tmp_path, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    result = command("merge", finished_run, *flags)
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code == 2 and len(errors) == 1 and message in errors[0], result.err
    assert "Traceback" not in result.err and not result.out
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_merge_that_is_killed_leaves_all_or_nothing(number, finished_run, tmp_path):
    """Stopped soon after it began to write; a SIGTERM leaves no half-written directory either."""
    command = [sys.executable, "-m", "minilora.merge", finished_run, "--output_dir", tmp_path / "m"]
    seen = set()
    for delay in (0, 0.02, 0.1, 0.3):
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while not list(tmp_path.iterdir()) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(number)
        process.communicate(timeout=60)
        whole = (tmp_path / "m").exists()
        seen.add(whole)
        if whole:
            with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as file:
                assert len(file.keys()) == 41
            AutoTokenizer.from_pretrained(tmp_path / "m")
        elif number == signal.SIGTERM:
            assert process.returncode == 143 and not list(tmp_path.iterdir())
    assert False in seen
