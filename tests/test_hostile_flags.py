"""Every flag of every command, given every value of a table that no flag was made for.

The flags are those that the commands' own parsers have, so that a new one is tried without being
named here. Whatever comes in, the command ends with exit code 0, or with 2 and one line.
"""

import argparse
import importlib
import json
import os
import shutil
import time
import zlib
from pathlib import Path

import pytest

from minilora.command import Parser
from tests.conftest import Finished
from tests.forked import run_forked

COMMANDS = ("train", "evaluate", "predict", "merge", "inspect", "report")

# Values as an argument can hold them: no NUL can be passed to a program, a lone surrogate stands
# for a byte that is not UTF-8.
NUMBERS = [
    "inf", "-inf", "nan", "-1", "-0.5", "0", "1e400", "1e-320", "0.999999", "4", "2147483648",
    "4294967296", str(2**63 - 1), str(2**63), str(10**30), "9" * 5000, "٣", "²", "0x10",
]  # fmt: skip
TEXTS = [
    "", " ", "a\0b", "\udce9", "x\udcff.tsv", "\x1b[31mred\x1b[0m", "a\nb", "x" * 5000, "-", "--",
    "true", "ü",
]  # fmt: skip
DEVICES = [
    "mps",
    "cuda",
    "cuda:99",
    "cpu:7",
    "meta",
    "xla",
    "hpu",
    "vulkan",
    "privateuseone",
    "gpu",
]
PATTERNS = [
    "(", "*", "[a", "(?i)query", "(?P<x>", "a{99999999999}", "(a+)+$", "all-linear", "classifier",
    "embeddings", "bert",
]  # fmt: skip
OBJECTS = [
    "{}", "[]", "null", '{"(": 2}', '{"(?i)query": 2}', '{"query": 0}', '{"query": -1}',
    '{"query": NaN}', '{"query": 1e999}', '{"query": true}', '{"query": 1e99}',
    '{"query": 1000000000000}', '{"query": 99999999999999999999}', '{"": 3}', '{"\\ud800": 2}',
    '{"query": 2, "query": 3}', "[" * 100_000, '{"a": {"b": 2}}',
]  # fmt: skip
PLACES = [
    "directory", "empty-directory", "fifo", "fifo.tsv", "fifo.jsonl", "missing", "missing/deep",
    "file", "file/below", "link-to-itself", "zeros.tsv", "full", "/", ".", "~", "/dev/null",
    "/dev/zero", "https://example.org/a", "a/b", "a/b/c", "n" * 300,
]  # fmt: skip

# Compiles by itself, and not within the expression that is matched (lora/targets).

# These may rightly ask for more steps than anybody waits for: told to stop, the run then does.
ENDLESS = ("max_steps", "num_train_epochs")


class Caught(Exception):
    """Brings a parser out of its command."""


def actions_of(command: str) -> list[argparse.Action]:
    """The flags and positional arguments of a command, as its parser has them."""

    def bring(parser, *_, **__):
        raise Caught(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_known_args", bring)
        with pytest.raises(Caught) as caught:
            importlib.import_module(f"minilora.{command}").parse_arguments([])
    return [action for action in caught.value.args[0]._actions if action.dest != "help"]


def values_for(action: argparse.Action) -> list[str]:
    """What an action is given: numbers, texts and a few places, and what is hostile to its kind."""
    values = [*NUMBERS, *TEXTS, "directory", "fifo", "missing/deep"]
    if action.dest == "device":
        values += DEVICES
    if action.metavar == "JSON":
        values += OBJECTS
    if action.nargs == "+" or action.metavar == "JSON":
        values += PATTERNS
    if action.type is None and not action.choices:
        values += PLACES
    not_hostile = {"true"} if action.dest == "torch_compile" else set()  # and takes minutes
    return [value for value in dict.fromkeys(values) if value not in not_hostile]


CASES = [
    (command, action.dest, action.option_strings[:1], value)
    for command in COMMANDS
    for action in actions_of(command)
    for value in values_for(action)
]


def words(command: str, flag: str, given: list[str], value: str, run: Path) -> list[object]:
    """A command line that would end well, but for one value."""
    data = run.parent
    flags: dict[str, list[object]] = {
        "train": [
            "--model_name_or_path", data / "model", "--train_file", data / "train.tsv",
            "--validation_file", data / "validation.tsv", "--max_steps", 1, "--device", "cpu",
            "--output_dir", "out",
        ],
        "evaluate": [run, "--file", data / "validation.tsv"],
        "predict": [run, *(["--text", "good"] if flag not in ("file", "stdin") else [])],
        "merge": [run, "--output_dir", "merged"],
        "inspect": [run],
        "report": [run],
    }  # fmt: skip
    base = flags[command]
    if flag in ("path", "adapter", "diff", "runs"):
        base = base[1:]
    if (command, flag) == ("merge", "weights"):
        base = ["--adapter", run, run, *base[1:], *given, value, value]
    elif flag == "diff":
        base = [*base, *given, value, run]
    elif flag == "resume_from_checkpoint":
        base = [*given, value]
    else:
        base = [*base, *given, value]
    return base


@pytest.fixture(scope="module")
def run(tmp_path_factory, finished_run, tiny_model, sentences) -> Path:
    """A finished run, beside it the files it was made of."""
    directory = tmp_path_factory.mktemp("hostile")
    shutil.copytree(tiny_model, directory / "model")
    for name, file in zip(("train.tsv", "validation.tsv"), sentences, strict=True):
        shutil.copy(file, directory / name)
    shutil.copytree(finished_run, directory / "run")
    return directory / "run"


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    """A working directory with what a path can be instead of a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "something").write_text("x")
    (tmp_path / "empty-directory").mkdir()
    for name in ("fifo", "fifo.tsv", "fifo.jsonl"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "file").write_text("text\tlabel\nx\ta\n")
    (tmp_path / "link-to-itself").symlink_to("link-to-itself")
    (tmp_path / "zeros.tsv").symlink_to("/dev/zero")
    (tmp_path / "full").symlink_to("/dev/full")
    return tmp_path


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def wrong_with(ended: Finished, may_be_stopped: bool) -> str | None:
    """What is wrong with the end of a command; None if it ended as it should."""
    errors = [line for line in ended.err.splitlines() if line.startswith("error:")]
    if ended.code == 143 and may_be_stopped:
        return None
    if ended.code not in (0, 2):
        return f"exit code {ended.code}"
    if len(errors) != (ended.code == 2):
        return f"{len(errors)} error lines"
    if "Traceback" in ended.err:
        return "a traceback"
    if "\x1b" in ended.err.replace("\x1b[A", ""):  # a progress bar's own
        return "an escape sequence"
    if ended.code == 0:
        try:
            json.loads(ended.out.splitlines()[-1], parse_constant=refuse_constant)
        except (ValueError, IndexError) as error:
            return f"no JSON: {error}"
    return None


def tried(cases, run: Path, place: Path) -> list[str]:
    """What is wrong, for each of the cases with which something is."""
    found = []
    for command, flag, given, value in cases:
        before = set(os.listdir(place))
        endless = flag in ENDLESS
        flags = words(command, flag, given, value, run)
        stop_after = 1.5 if endless else None
        ended = run_forked(command, *flags, stop_after=stop_after)
        wrong = wrong_with(ended, endless)
        if wrong:
            last = " ".join(ended.err.splitlines()[-1:])[:200]
            found.append(f"{command} {flag} {value[:60]!r}: {wrong}: {last!r}")
        for name in set(os.listdir(place)) - before:
            path = place / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found


def number_of(case) -> int:
    # A fixed choice, which changes with no order.
    command, flag, _, value = case
    return zlib.crc32(f"{command} {flag} {value!r}".encode("utf-8", "surrogatepass"))


def test_a_sample_of_hostile_values_is_answered_in_one_line(run, places):
    """One or so of each flag's."""
    found = tried((case for case in CASES if number_of(case) % 40 == 0), run, places)
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_quarter_of_the_hostile_values_is_answered_in_one_line(command, run, places):
    cases = [case for case in CASES if case[0] == command and number_of(case) % 4 == 1]
    found = tried(cases, run, places)
    assert not found, "\n".join(found)


@pytest.mark.exhaustive
@pytest.mark.parametrize("command", COMMANDS)
def test_every_hostile_value_of_every_flag_is_answered_in_one_line(command, run, places):
    found = tried((case for case in CASES if case[0] == command), run, places)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("main", "wrong"),
    [
        (lambda: 1 // 0, "exit code 99"),
        (lambda: 1, "exit code 1"),
        (lambda: 2, "0 error lines"),
        (lambda: print('{"a": NaN}') or 0, "no JSON: NaN is no JSON"),
        (lambda: time.sleep(9) or 0, "exit code -9"),
    ],
)
def test_a_command_that_ends_otherwise_would_be_seen(main, wrong):
    """Negative control."""
    assert wrong_with(run_forked(main, seconds=0.5), may_be_stopped=False) == wrong


def test_the_flags_are_the_parsers_own():
    flags = {(command, flag) for command, flag, _, _ in CASES}
    assert {("train", "rank_pattern"), ("predict", "stdin"), ("inspect", "diff")} <= flags
    assert len(flags) > 90
