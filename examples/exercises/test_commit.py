"""Exercise 5: the system calls you make are listened to, and the process killed before each."""

import errno
import itertools
import os
from pathlib import Path

import pytest
from answers.ex5_commit import commit, latest, rotate
from processes import killed_before, listen

FILES = {"weights": b"w" * 100_000, "config.json": b"{}"}


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def names_in(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def fsyncs(monkeypatch, path: Path) -> tuple[dict[int, int], dict[int, int]]:
    """inode -> size of what `commit(path, FILES)` fsyncs, in order, before `path` is; and after."""
    seen: tuple[dict[int, int], dict[int, int]] = ({}, {})

    def before(name, first, *rest):
        if name == "fsync":
            found = os.fstat(first if isinstance(first, int) else first.fileno())
            seen[path.exists()].pop(found.st_ino, None)
            seen[path.exists()][found.st_ino] = found.st_size

    with monkeypatch.context() as patch:
        listen(patch, before)
        commit(path, FILES)
    return seen


def test_the_directory_holds_its_files_and_nothing_else_is_left(tmp_path):
    commit(tmp_path / "checkpoint-1", FILES)
    assert contents(tmp_path / "checkpoint-1") == FILES
    assert names_in(tmp_path) == ["checkpoint-1"], f"something is left: {names_in(tmp_path)}"


def test_the_data_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint-1"
    synced, _ = fsyncs(monkeypatch, path)
    for file in path.iterdir():
        size = synced.get(file.stat().st_ino)
        assert size is not None, (
            f"{file.name} was not fsynced before its directory had the name {path.name}. After a "
            "power loss the name may be on the disk, and the data not: empty files"
        )
        assert size == file.stat().st_size, (
            f"{file.name} had {size} of {file.stat().st_size} bytes when it was fsynced: the rest "
            "was in python's buffer. flush() before, and write nothing after"
        )
    assert path.stat().st_ino == list(synced)[-1], (
        "the directory was not fsynced after its files and before the rename: its list is data too"
    )


def test_the_name_is_on_the_disk_when_commit_returns(tmp_path, monkeypatch):
    _, synced = fsyncs(monkeypatch, tmp_path / "checkpoint-1")
    assert tmp_path.stat().st_ino in synced, (
        "the parent was not fsynced after the rename: a power loss may undo it, and a caller who "
        "then deletes the checkpoint before has neither"
    )


def test_killed_anywhere_it_is_complete_or_absent(tmp_path):
    commit(tmp_path / "checkpoint-9", FILES)
    path, call = tmp_path / "checkpoint-10", 0
    while killed_before(call, commit, path, FILES):
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
    calls = itertools.count()

    def before(name, *_):
        if name == "fsync" and next(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    listen(monkeypatch, before)
    with pytest.raises(OSError, match="No space left"):
        commit(tmp_path / "checkpoint-1", FILES)
    assert names_in(tmp_path) == [], f"fsync number {failing + 1} failed: {names_in(tmp_path)} left"


def test_what_bears_the_name_already_is_left_alone(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(FileExistsError):
        commit(tmp_path / "checkpoint-1", FILES)
    assert contents(tmp_path / "checkpoint-1") == {}


def run_with(directory: Path, *steps: int) -> Path:
    for path in (directory / f"checkpoint-{step}" for step in steps):
        path.mkdir(parents=True)
        (path / "weights").touch()
        (path / "config.json").touch()
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
    for keep in (2, 5):
        rotate(tmp_path, keep)
        expected = ["checkpoint-10", "checkpoint-11", "metrics.jsonl"]
        assert names_in(tmp_path) == expected, f"keep={keep} leaves {names_in(tmp_path)}"


def test_rotation_killed_anywhere_leaves_no_half_checkpoint(tmp_path):
    for call in itertools.count():
        run = run_with(tmp_path / str(call), 1, 2)
        was_killed = killed_before(call, rotate, run, 1)
        for path in run.glob("checkpoint-*"):
            assert len(contents(path)) == 2, (
                f"killed before call {call}, {path.name} has lost a file and kept its name: "
                "rename it out of sight before deleting it"
            )
        if not was_killed:
            break
    assert call > 0 and names_in(run) == ["checkpoint-2"]
