"""Exercise 5: the system calls you make are listened to, and the process killed before each."""

import errno
import os
from pathlib import Path

import pytest
from answers.ex5_commit import commit, latest, rotate
from processes import in_a_process, kill_this_process

FILES = {"weights": b"w" * 100_000, "config.json": b"{}"}
CALLS = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")


def listen(monkeypatch, before) -> None:
    """`before(name, argument)` is called before each of these functions of `os` is."""
    for name in CALLS:
        own = getattr(os, name)

        def call(first, *rest, own=own, name=name, **keywords):
            before(name, first, *rest)
            return own(first, *rest, **keywords)

        monkeypatch.setattr(os, name, call)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def calls_of(monkeypatch, path: Path) -> list[tuple]:
    """What `commit(path, FILES)` does, in order: ("fsync", inode, size) and ("rename", to)."""
    seen = []

    def before(name, first, *rest):
        if name == "fsync":
            descriptor = first if isinstance(first, int) else first.fileno()
            found = os.fstat(descriptor)
            seen.append(("fsync", found.st_ino, found.st_size))
        elif name in ("rename", "replace"):
            seen.append(("rename", Path(rest[0])))

    with monkeypatch.context() as patch:
        listen(patch, before)
        commit(path, FILES)
    return seen


def test_the_directory_holds_its_files_and_nothing_else_is_left(tmp_path):
    commit(tmp_path / "checkpoint-1", FILES)
    assert contents(tmp_path / "checkpoint-1") == FILES
    left = sorted(entry.name for entry in tmp_path.iterdir())
    assert left == ["checkpoint-1"], f"beside it there is something left: {left}"


def test_the_data_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint-1"
    seen = calls_of(monkeypatch, path)
    renames = [number for number, call in enumerate(seen) if call == ("rename", path)]
    assert len(renames) == 1, f"no rename to {path.name}: files written in place are seen half done"
    synced = {call[1]: call[2] for call in seen[: renames[0]] if call[0] == "fsync"}
    for file in path.iterdir():
        found = file.stat()
        assert found.st_ino in synced, (
            f"{file.name} was not fsynced before the rename. After a power loss the name may be on "
            "the disk, and the data not: a complete directory of empty files"
        )
        assert synced[found.st_ino] == found.st_size, (
            f"{file.name} had {synced[found.st_ino]} of {found.st_size} bytes when it was fsynced: "
            "the rest was in python's buffer. flush() before, and write nothing after"
        )
    assert path.stat().st_ino in synced, (
        "the directory itself was not fsynced before the rename: which files it has is its data"
    )


def test_the_name_is_on_the_disk_when_commit_returns(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint-1"
    seen = calls_of(monkeypatch, path)
    assert ("rename", path) in seen, f"nothing was renamed to {path.name}"
    after = [call[1] for call in seen[seen.index(("rename", path)) :] if call[0] == "fsync"]
    assert tmp_path.stat().st_ino in after, (
        "the parent was not fsynced after the rename: a power loss may undo it, and a caller who "
        "then deletes the checkpoint before has neither"
    )


def killed_before(call: int, work) -> bool:
    """Whether `work()`, in a process of its own, was killed before its system call number `call`
    (0, 1, ...), or had fewer.
    """

    def in_there(tell) -> None:
        left = call

        def before(*_):
            nonlocal left
            left -= 1
            if left < 0:
                kill_this_process()

        with pytest.MonkeyPatch.context() as patch:
            listen(patch, before)
            work()

    ended = in_a_process(in_there)
    assert not ended.error, ended.error
    return ended.killed


def test_killed_anywhere_it_is_complete_or_absent(tmp_path):
    commit(tmp_path / "checkpoint-9", FILES)
    path, call = tmp_path / "checkpoint-10", 0
    while killed_before(call, lambda: commit(path, FILES)):
        if path.exists():
            assert contents(path) == FILES, f"killed before call {call}: half of it has the name"
        newest = path if path.exists() else tmp_path / "checkpoint-9"
        assert latest(tmp_path) == newest, f"killed before call {call}: latest is not {newest.name}"
        if path.exists():
            os.rename(path, tmp_path / f"kept-{call}")
        call += 1
    assert call >= 5, f"only {call} of mkdir, fsync, rename were called: something is missing"
    assert contents(path) == FILES, "what killed commits left was an obstacle to the next"


@pytest.mark.parametrize("failing", range(3))
def test_a_failure_on_the_way_leaves_nothing(failing, tmp_path, monkeypatch):
    left = failing

    def before(name, *_):
        nonlocal left
        left -= name == "fsync"
        if left < 0 and name == "fsync":
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        listen(patch, before)
        commit(tmp_path / "checkpoint-1", FILES)
    left_there = [entry.name for entry in tmp_path.iterdir()]
    assert left_there == [], f"fsync number {failing + 1} failed, and {left_there} is left behind"


def test_what_bears_the_name_already_is_left_alone(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(FileExistsError):
        commit(tmp_path / "checkpoint-1", FILES)
    assert contents(tmp_path / "checkpoint-1") == {}


def run_with(directory: Path, *steps: int) -> Path:
    for step in steps:
        (directory / f"checkpoint-{step}").mkdir()
        (directory / f"checkpoint-{step}" / "weights").write_bytes(b"w")
        (directory / f"checkpoint-{step}" / "config.json").write_bytes(b"{}")
    return directory


def test_the_latest_is_by_number_and_of_complete_ones(tmp_path):
    assert latest(tmp_path) is None
    run_with(tmp_path, 9, 10)
    for name in (".tmp-checkpoint-11-ab", "checkpoint-12.tmp", "checkpoint-best"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-13").write_text("a file")
    found = latest(tmp_path)
    assert found == tmp_path / "checkpoint-10", (
        f"{found and found.name} instead of checkpoint-10: as a text, '9' is after '10'; and what "
        "is not called checkpoint-<number>, or is a file, is no checkpoint"
    )


def test_rotation_keeps_the_newest(tmp_path):
    run_with(tmp_path, 2, 9, 10, 11)
    (tmp_path / "metrics.jsonl").touch()
    rotate(tmp_path, keep=2)
    left = sorted(entry.name for entry in tmp_path.iterdir())
    assert left == ["checkpoint-10", "checkpoint-11", "metrics.jsonl"], f"left are {left}"
    rotate(tmp_path, keep=5)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == left, "there were fewer than 5"


def test_rotation_killed_anywhere_leaves_no_half_checkpoint(tmp_path):
    call = 0
    run = tmp_path / str(call)
    run.mkdir()
    run_with(run, 1, 2)
    while killed_before(call, lambda: rotate(run, keep=1)):
        for path in run.glob("checkpoint-*"):
            assert len(contents(path)) == 2, (
                f"killed before call {call}, {path.name} has lost a file and kept its name: "
                "rename it out of sight before deleting it"
            )
        call += 1
        run = tmp_path / str(call)
        run.mkdir()
        run_with(run, 1, 2)
    assert call > 0 and not (run / "checkpoint-1").exists()
