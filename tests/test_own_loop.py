"""examples/own_loop.py, the loop that is shown in docs/03_training_loop.md, killed and not."""

import io
import json
import os
import random
import re
import runpy
import signal
import threading
import time
import tokenize
from functools import partial
from pathlib import Path

import pytest

from tests.forked import run_forked
from tests.pages import ROOT, blocks_of

EXAMPLE = ROOT / "examples" / "own_loop.py"
SHOWN = [ROOT / "docs" / "03_training_loop.md", ROOT / "docs" / "zh" / "03_training_loop.md"]
STEPS = 200
BLANK = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


def run() -> int:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    return 0


def kill_after(checkpoint: Path) -> None:
    """Begin to wait for it; this process is killed a moment after it is there."""

    def wait():
        while not checkpoint.exists():
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.03))
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def contents(output_dir: Path) -> dict[str, bytes]:
    """Of every file of the last checkpoint, and of the final adapter."""
    files = [*(output_dir / f"checkpoint-{STEPS}").iterdir(), *output_dir.glob("adapter*")]
    assert len(files) == 9
    return {str(file.relative_to(output_dir)): file.read_bytes() for file in files}


def test_killed_and_started_again_it_ends_in_the_same_bytes(tmp_path, tiny_model, sentences):
    flags = ["--model_name_or_path", tiny_model, "--max_steps", STEPS]
    flags += ["--train_file", sentences[0], "--validation_file", sentences[1], "--output_dir"]
    done = run_forked(run, *flags, tmp_path / "whole", seconds=100)
    assert done.code == 0 and "begins after step 0 of" in done.out, done.err
    step = random.randrange(20, STEPS, 20)
    doom = partial(kill_after, tmp_path / "killed" / f"checkpoint-{step}")
    done = run_forked(run, *flags, tmp_path / "killed", seconds=100, prepare=doom)
    assert done.code == -signal.SIGKILL
    done = run_forked(run, *flags, tmp_path / "killed", seconds=100)
    assert done.code == 0, done.err
    assert int(re.findall(r"begins after step (\d+) of 200", done.out)[0]) >= step
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    progress = json.loads(contents(tmp_path / "whole")[f"checkpoint-{STEPS}/trainer_state.json"])
    assert [row["step"] for row in progress["log_history"]] == list(range(1, STEPS + 1))


def test_it_is_sixty_lines():
    """Without blank lines, comments and docstrings."""
    code, is_new = set(), True
    for token in tokenize.generate_tokens(io.StringIO(EXAMPLE.read_text()).readline):
        if token.type in BLANK:
            is_new = True
        elif not (is_new and token.type == tokenize.STRING):
            code |= set(range(token.start[0], token.end[0] + 1))
            is_new = False
    assert len(code - {max(code)}) <= 60  # the end of the file is a token of its own


@pytest.mark.parametrize("page", SHOWN, ids=str)
def test_the_page_shows_the_whole_file(page):
    """In parts, with what they do between them."""
    shown = "".join(block.code for block in blocks_of(page) if block.language == "py")
    assert shown.replace("\n", "") == EXAMPLE.read_text().replace("\n", "")
