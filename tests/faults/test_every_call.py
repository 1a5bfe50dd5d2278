"""A run that dies, or is refused by the disk, at every one of its system calls.

strace makes the n-th call of a name fail, or kills the process as it makes it; the program has no
hook for it. Every call that names the output directory is taken, of a first run and of a resume.
After each: every checkpoint in sight verifies, HF Trainer would pick the same one, and the next
start, undisturbed, sweeps what was left and ends in the same bytes as a run that was left alone.

Slow: a saver without transformers (`saver.py`). Exhaustive: the whole command (`command.py`).
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers.trainer_utils import get_last_checkpoint

from minilora.files import LEFTOVER
from minilora.training.checkpoint import latest_checkpoint, read_checkpoint, sorted_checkpoints
from tests.conftest import read_rows
from tests.faults.strace import Call, Server, calls_on, needs_strace

pytestmark = needs_strace

LAST = "checkpoint-4"  # both runs take four steps


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("saver", marks=pytest.mark.slow),
        pytest.param("command", marks=pytest.mark.exhaustive),
    ],
)
def server(request, tiny_model, sentences):
    arguments = (tiny_model, *sentences) if request.param == "command" else ()
    server = Server(f"tests.faults.{request.param}", *arguments)
    yield server
    server.close()


def contents(output_dir: Path) -> dict[str, Any]:
    """What a finished run has come to, by file: the same, whatever happened on the way. How long
    things took is left out, what the directory is called, where the run was resumed, and
    `checkpoint-3`, which a disk may have refused.
    """
    found: dict[str, Any] = {}
    for file in [*output_dir.iterdir(), *(output_dir / LAST).iterdir()]:
        if file.is_file() and not file.name.startswith("."):
            found[str(file.relative_to(output_dir))] = file.read_bytes()
    found["metrics.jsonl"] = read_rows(output_dir)
    card = found["README.md"]
    if title := re.search(rb"^# (.+)", card, re.M):  # the name that it was written under
        found["README.md"] = card.replace(title[1], b"NAME")
    for name in ("run.json", f"{LAST}/trainer_state.json", f"{LAST}/minilora.json"):
        recorded = json.loads(found[name])
        for other in ("result", "log_history", "files", "sha256", "resumed"):
            recorded.pop(other, None)
        for timed in ("metrics_size", "metrics_sha256"):
            recorded.get("state", {}).pop(timed, None)
        found[name] = recorded
    return found


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory) -> dict[str, Any]:
    """What a run comes to that nothing disturbs; a second one comes to the same."""
    directory = tmp_path_factory.mktemp("whole")
    for name in ("whole-1", "whole-2"):
        assert server.run(directory / name) == 0
    assert contents(directory / "whole-1") == contents(directory / "whole-2")
    assert len(contents(directory / "whole-1")) >= 5 + 7
    return contents(directory / "whole-1")


def said(output_dir: Path) -> str:
    return Path(f"{output_dir}.stderr").read_text()


def assert_sound(output_dir: Path) -> None:
    """Every checkpoint in sight is whole, its part of the log too, and HF Trainer would take the
    one that we take.
    """
    if not output_dir.exists():
        return
    for checkpoint in sorted_checkpoints(output_dir):
        assert read_checkpoint(checkpoint).metrics() is not None
    ours = latest_checkpoint(output_dir)
    assert get_last_checkpoint(str(output_dir)) == (None if ours is None else str(ours))


def assert_recovers(server, output_dir: Path, whole: dict[str, Any]) -> None:
    assert_sound(output_dir)
    assert server.run(output_dir) == 0, said(output_dir)
    assert contents(output_dir) == whole
    assert not [p.name for p in output_dir.rglob("*") if LEFTOVER.fullmatch(p.name)]
    assert_sound(output_dir)


def assert_says_one_line(code: int, output_dir: Path) -> None:
    """Exit code 0 (it went on), 1 (the disk) or 2 (a file), with one line that says what to do."""
    errors = [line for line in said(output_dir).splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said(output_dir)
    assert code in (0, 1, 2) and len(errors) == (code != 0), said(output_dir)
    if code == 1:
        assert "no older checkpoint is lost" in errors[0] and ", then " in errors[0]


class Faults:
    """Runs of the saver in directories of their own, all beginning alike, each with one fault."""

    def __init__(self, server: Server, directory: Path, begun: Path | None) -> None:
        self.server, self.directory, self.begun = server, directory, begun
        log = directory / "log"
        assert server.run(self.fresh("observed"), log) == 0
        self.calls = calls_on(directory / "observed", log)

    def fresh(self, name: str) -> Path:
        output_dir = self.directory / name
        if self.begun is not None:
            shutil.copytree(self.begun, output_dir)
        return output_dir

    def run(self, call: Call, fault: str) -> tuple[int, Path]:
        output_dir = self.fresh(f"{call.name}-{call.number}")
        options = f"inject={call.name}:{fault}:when={call.number}"
        return self.server.run(output_dir, self.directory / "log", "-e", options), output_dir


@pytest.fixture(scope="module")
def begun(server, whole, tmp_path_factory) -> Path:
    """A run that was killed while it wrote its third checkpoint."""
    faults = Faults(server, tmp_path_factory.mktemp("begun"), None)
    third = [c for c in faults.calls if ".tmp-checkpoint-3" in c.line and c.name == "write"]
    code, output_dir = faults.run(third[3], "signal=SIGKILL")
    assert code == -9 and latest_checkpoint(output_dir) == output_dir / "checkpoint-2"
    assert any(LEFTOVER.fullmatch(path.name) for path in output_dir.iterdir())
    return output_dir


@pytest.fixture(params=["a first run", "a resume"])
def faults(request, server, tmp_path) -> Faults:
    begun = request.getfixturevalue("begun") if request.param == "a resume" else None
    return Faults(server, tmp_path, begun)


def test_strace_sees_the_calls_that_the_promise_is_about(server, tmp_path):
    """Negative control of the tests below: they prove nothing about calls that they do not see."""
    names = [call.name for call in Faults(server, tmp_path, None).calls]
    # 4 checkpoints of 7 files and a directory each, and the directory they lie in.
    assert names.count("fsync") >= 4 * (7 + 2)
    assert {"mkdir", "openat", "write", "rename", "unlinkat", "rmdir"} <= set(names)
    assert len(names) > 200


def test_a_kill_at_any_call_loses_nothing(faults, server, whole):
    for call in faults.calls:
        code, output_dir = faults.run(call, "signal=SIGKILL")
        assert code == -9, f"{call} was not reached"
        assert_recovers(server, output_dir, whole)


def test_a_kill_while_recovering_from_a_kill_loses_nothing(server, begun, tmp_path, whole):
    """Of every 20th call of a resume, every 11th call of the resume after it."""
    first = Faults(server, tmp_path, begun)
    for index, call in enumerate(first.calls[::20]):
        _, killed = first.run(call, "signal=SIGKILL")
        (tmp_path / f"again-{index}").mkdir()
        second = Faults(server, tmp_path / f"again-{index}", killed)
        for again in second.calls[index % 11 :: 11]:
            code, output_dir = second.run(again, "signal=SIGKILL")
            assert code == -9
            assert_recovers(server, output_dir, whole)


def assert_refusals_lose_nothing(faults, error, calls, server, whole) -> None:
    codes = set()
    for call in calls:
        code, output_dir = faults.run(call, f"error={error}")
        assert_says_one_line(code, output_dir)
        codes.add(code)
        if code == 0:
            assert contents(output_dir) == whole
        assert_recovers(server, output_dir, whole)
    assert codes >= {0, 1}, "a periodic save is tried again, a final one is an error"


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_refusal_of_any_call_loses_nothing_and_says_what_to_do(error, faults, server, whole):
    assert_refusals_lose_nothing(faults, error, faults.calls, server, whole)


@pytest.mark.parametrize("error", ["EACCES", "EROFS"])
def test_other_refusals_lose_nothing_and_say_what_to_do(error, faults, server, whole):
    """A sample: to the program they differ in their words alone."""
    assert_refusals_lose_nothing(faults, error, faults.calls[::6], server, whole)


@pytest.mark.parametrize("number", [2, 6, 10, 14])
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_disk_that_goes_on_refusing_loses_nothing(error, number, server, tmp_path, whole):
    """Every fsync from the n-th on."""
    options = f"inject=fsync:error={error}:when={number}+"
    code = server.run(tmp_path / "run", tmp_path / "log", "-e", options)
    assert code == 1
    assert_says_one_line(code, tmp_path / "run")
    assert_recovers(server, tmp_path / "run", whole)


@contextlib.contextmanager
def small_disk(directory: Path, size: int):
    """A file system of its own, of `size` bytes."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def test_a_disk_that_is_really_full_loses_nothing(server, tmp_path, whole):
    """From one that holds no checkpoint to one that holds all; then room is made."""
    assert server.run(tmp_path / "roomy") == 0
    # Pages of 4096 bytes, and three checkpoints at a time where two are kept.
    files = [file for file in (tmp_path / "roomy").rglob("*") if file.is_file()]
    needed = 2 * sum(file.stat().st_size + 4096 for file in files)
    codes = []
    for size in range(8_192, needed, needed // 24):
        output_dir = tmp_path / f"of-{size}"  # digits alone YAML would quote in the card
        with small_disk(output_dir, size):
            codes.append(server.run(output_dir))
            assert_says_one_line(codes[-1], output_dir)
            assert_sound(output_dir)
            subprocess.run(["mount", "-o", "remount,size=10M", str(output_dir)], check=True)
            assert_recovers(server, output_dir, whole)
    assert codes[0] == 1 and codes[-1] == 0


def test_a_read_only_disk_is_one_line(server, tmp_path, whole):
    output_dir = tmp_path / "run"
    with small_disk(output_dir, 10_000_000):
        subprocess.run(["mount", "-o", "remount,ro", str(output_dir)], check=True)
        assert server.run(output_dir) == 1
        assert "Read-only file system; no older checkpoint is lost: make it writable" in said(
            output_dir
        )
        assert_says_one_line(1, output_dir)
        subprocess.run(["mount", "-o", "remount,rw", str(output_dir)], check=True)
        assert_recovers(server, output_dir, whole)
