"""An error that a command prints ends with the page that explains it, where one does."""

import ast
import functools
import os
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from minilora.command import PAGES
from tests.forked import run_forked
from tests.pages import FENCE
from tests.test_architecture import PACKAGE, ROOMS, functions_of

DOCS = PACKAGE.parent / "docs"
# What these complain of says all there is, or is a file's that the room explains which reads it.
WITHOUT_A_PAGE = {
    "__main__", "fine_tuning", "predict", "reading", "trained.directory", "trained.opened",
    "trained.predict", "training.config", "training.evaluation", "training.optim",
    "training.record", "training.rng", "training.tensorboard", "training.trainer_files",
}  # fmt: skip


@functools.cache
def raisers() -> set[str]:
    """Every function of every room that makes a MiniloraError, as `room.function`."""
    found = set()
    for path in ROOMS:
        room = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for function in functions_of(path):
            calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
            if any(isinstance(call, ast.Name) and call.id == "MiniloraError" for call in calls):
                found.add(f"{room}.{function.name}")
    return found


def explanation(page: str) -> str:
    """The text of a page, or of its section with that anchor."""
    name, _, anchor = page.partition("#")
    text = (DOCS / name).read_text()
    if not anchor:
        return text
    heads = list(re.finditer(r"^(#+) (.*)$", FENCE.sub(lambda m: " " * len(m[0]), text), re.M))
    for at, head in enumerate(heads):
        if re.sub(r"[^\w -]", "", head[2].lower()).replace(" ", "-") == anchor:
            after = [other.start() for other in heads[at + 1 :] if len(other[1]) <= len(head[1])]
            return text[head.start() : min(after, default=len(text))]
    raise AssertionError(f"{name} has no heading #{anchor}")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_its_heading_and_its_rooms_exist(page):
    assert explanation(page)
    for room in PAGES[page]:
        names = room.rstrip(".").split(".")
        file = PACKAGE.joinpath(*names)
        a_function = file.parent.with_suffix(".py")
        assert (
            file.with_suffix(".py").is_file()
            or file.is_dir()
            or names[-1] in [function.name for function in functions_of(a_function)]
        )


def test_every_room_that_raises_has_a_page_or_is_known_to_have_none():
    prefixes = tuple(room for rooms in PAGES.values() for room in rooms)
    without = {own.rpartition(".")[0] for own in raisers() if not own.startswith(prefixes)}
    assert without == WITHOUT_A_PAGE


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model, sentences, finished_run) -> Path:
    """A run, what it was made of, another base, and a copy with damaged files."""
    directory = tmp_path_factory.mktemp("wrong")
    for name, source in (("run", finished_run), ("model", tiny_model), ("other", tiny_model)):
        shutil.copytree(source, directory / name)
    for name, file in zip(("train.tsv", "dev.tsv"), sentences, strict=True):
        shutil.copy(file, directory / name)
    base = directory / "other/model.safetensors"
    save_file({key: tensor * 2 for key, tensor in load_file(base).items()}, base, {"format": "pt"})
    shutil.copytree(finished_run, directory / "damaged")
    (directory / "damaged/checkpoint-6/optimizer.pt").write_bytes(b"?")
    weights = directory / "damaged/adapter_model.safetensors"
    save_file(dict(list(load_file(weights).items())[1:]), weights)
    return directory


def alone_of_two():
    os.environ.update(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29577")


NEW = (
    "--model_name_or_path model --train_file train.tsv --device cpu --max_steps 2 --output_dir new"
)
EXAMPLES = {
    "04_checkpoint.md": (
        "is not what was written",
        "train --resume_from_checkpoint damaged/checkpoint-6",
    ),
    "06_keys.md": ("the adapter lacks tensor", "evaluate damaged --file dev.tsv"),
    "08_merging.md": ("weights", "merge --adapter run run --output_dir merged"),
    "02_lora_config.md": ("target_modules", f"train {NEW} --target_modules no_such"),
    "commands.md": ("it must be", f"train {NEW} --r 0"),
    "report.md": ("report", "report run --output dev.tsv"),
    "several_processes.md": ("processes", f"train {NEW} --ddp_timeout 1"),
    "sweeps.md": ("compare", f"sweep {NEW}"),
    "troubleshooting.md#the-directory": ("is not empty", f"train {NEW} --output_dir run"),
    "troubleshooting.md#the-model": (
        "there is no such directory",
        f"train {NEW} --model_name_or_path ./bass",
    ),
    "troubleshooting.md#the-data": ("has no column", f"train {NEW} --text_column body"),
    "troubleshooting.md#a-run-does-not-begin": ("needs a GPU", f"train {NEW} --dtype float16"),
    "troubleshooting.md#a-resume-is-refused-or-warns": (
        "a resumed run cannot change",
        "train --resume_from_checkpoint run --learning_rate 1",
    ),
    "troubleshooting.md#the-loss-is-not-finite": (
        "the loss is nan",
        f"train {NEW} --learning_rate 1e30",
    ),
    "troubleshooting.md#another-base-another-way-to-save": (
        "is an adapter for another base model",
        "evaluate run --model_name_or_path other --file dev.tsv",
    ),
}


@pytest.mark.parametrize("page", PAGES)
def test_a_command_names_the_page_that_has_the_words_of_its_error(page, place, monkeypatch):
    monkeypatch.chdir(place)
    words, line = EXAMPLES[page]
    command, *flags = line.split()
    prepare = alone_of_two if page == "several_processes.md" else lambda: None
    done = run_forked(command, *flags, prepare=prepare)
    error = done.err.splitlines()[-1]
    assert done.code == 2 and error.startswith("error: ") and words in error
    assert error.endswith(f" (see docs/{page})")
    assert words in explanation(page)


def test_an_error_that_says_all_there_is_names_no_page(place, monkeypatch):
    monkeypatch.chdir(place)
    done = run_forked("inspect", "nowhere")
    assert done.code == 2 and "(see " not in done.err
