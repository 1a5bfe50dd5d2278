"""Commands whose standard streams, disk or files are not what a command is used to."""

import json
import os
import resource
import subprocess
import sys

import pytest

from minilora.files import json_text
from tests.forked import run_forked


def train_flags(tiny_model, sentences, output_dir) -> list[object]:
    return [
        "--model_name_or_path", tiny_model, "--train_file", sentences[0], "--validation_file",
        sentences[1], "--max_steps", 2, "--device", "cpu", "--output_dir", output_dir,
    ]  # fmt: skip


def error_lines(text: str) -> list[str]:
    assert "Traceback" not in text
    return [line for line in text.splitlines() if line.startswith("error:")]


def without_reader(number: int) -> None:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, number)


def closed(number: int) -> None:
    """As the shell's `>&-` does it, and python then starts."""
    os.close(number)
    setattr(sys, ("stdin", "stdout", "stderr")[number], None)


def test_nobody_who_reads_what_training_says_is_no_reason_to_end_it(
    tiny_model, sentences, tmp_path
):
    flags = train_flags(tiny_model, sentences, tmp_path / "out")
    ended = run_forked("train", *flags, prepare=lambda: without_reader(2))
    assert ended.code == 0 and ended.summary()["global_step"] == 2
    assert (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("number", [1, 2])
def test_a_stream_that_is_closed_is_no_file_of_the_run(number, tiny_model, sentences, tmp_path):
    """The next file to be opened would otherwise be given its number, and what is said."""
    flags = train_flags(tiny_model, sentences, tmp_path / "out")
    assert run_forked("train", *flags, prepare=lambda: closed(number)).code == 0
    rows = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert all(isinstance(json.loads(row), dict) for row in rows)


def test_whoever_reads_predictions_may_have_seen_enough(finished_run, sentences):
    flags = [finished_run, "--file", sentences[1]]
    ended = run_forked("predict", *flags, prepare=lambda: without_reader(1))
    assert ended.code == 128 + 13 and not error_lines(ended.err)


def test_a_closed_standard_input_is_refused(finished_run):
    ended = run_forked("predict", finished_run, "-", prepare=lambda: closed(0))
    assert ended.code == 2 and "standard input is closed" in error_lines(ended.err)[0]


def test_a_disk_that_is_full_ends_a_merge_with_one_line(finished_run, tmp_path):
    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    ended = run_forked("merge", finished_run, "--output_dir", tmp_path / "merged", prepare=fill)
    assert ended.code == 1 and "too large" in error_lines(ended.err)[0]
    assert not list(tmp_path.iterdir())


def test_a_full_standard_output_is_one_line(finished_run):
    def fill() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    ended = run_forked("inspect", finished_run, prepare=fill)
    assert ended.code == 1 and "No space left" in error_lines(ended.err)[0]


ESCAPE = "\x1b]0;owned\x07\u202e"


def test_no_file_speaks_to_the_terminal(tiny_model, tmp_path):
    """In a label, a kind, a column, a file's name: it is shown, and does nothing."""
    path = tmp_path / f"data{ESCAPE}.jsonl"
    labels = [f"good{ESCAPE}", "bad"]
    rows = [{"text": "a " * 70, "label": labels[i % 2], "kind": ESCAPE} for i in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    flags = train_flags(tiny_model, (path, path), out)
    trained = run_forked("train", *flags)
    scored = run_forked("evaluate", out, "--file", path, "--confusion_matrix")
    path.write_text(json.dumps({f"column{ESCAPE}": 1}))
    refused = run_forked("evaluate", out, "--file", path)
    assert (trained.code, scored.code, refused.code) == (0, 0, 2)
    assert "\\x1b]0;owned\\x07" in trained.err and "\\x1b]0;owned\\x07" in scored.out
    for ended in (trained, scored, refused):
        assert not {"\x07", "\u202e"} & {*ended.out, *ended.err} and "\x1b]" not in ended.err
    card = (out / "README.md").read_text()
    assert "\x1b" not in card


@pytest.mark.slow
def test_a_terminal_that_knows_ascii_alone_changes_nothing(tiny_model, tmp_path):
    file, out = tmp_path / "texts.tsv", tmp_path / "out"
    file.write_text("text\tlabel\n" + "gut\tschön\nübel\thäßlich\n" * 9, "utf-8")
    ascii_alone = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    for words in (
        ["train", *train_flags(tiny_model, (file, file), out)],
        ["evaluate", out, "--file", file, "--confusion_matrix"],
        ["predict", out, "--text", "gut"],
        ["inspect", out],
        ["report", out, "--output", tmp_path / "report.html"],
        ["merge", out, "--output_dir", tmp_path / "merged"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", f"minilora.{words[0]}", *map(str, words[1:])],
            env=os.environ | ascii_alone,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "schön" in page and "★ the best" in page


def test_json_has_no_number_that_is_none():
    values = {"a": float("nan"), "b": [float("inf"), (-float("inf"), 1.5)], "c": "NaN"}
    assert json.loads(json_text(values)) == {"a": None, "b": [None, [None, 1.5]], "c": "NaN"}
