"""Files and directories that are complete or do not exist, under real refusals of the system."""

import contextlib
import errno
import multiprocessing
import os
import resource

import pytest
from transformers import AutoTokenizer

from minilora import MiniloraError
from minilora.files import (
    NotConfirmed,
    commit_directory,
    disk_errors,
    exclusive,
    is_held,
    is_leftover,
    make_directory,
    new_directory,
    new_lines,
    remove_directory,
    scratch_directory,
    set_aside,
    sweep_leftovers,
    write_file,
)


@contextlib.contextmanager
def largest_file(size: int):
    """The kernel refuses to write any file beyond `size` bytes, as a full disk would (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_replaced_or_left_as_it_was(tmp_path):
    path = tmp_path / "file"
    write_file(path, b"old")
    with largest_file(1000), pytest.raises(OSError, match="File too large"):
        write_file(path, b"new" * 1000)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]
    write_file(path, b"new")
    assert path.read_bytes() == b"new" and names(tmp_path) == ["file"]


def test_a_directory_that_cannot_be_written_whole_does_not_exist(tmp_path):
    with largest_file(1000), pytest.raises(OSError, match="File too large"):
        commit_directory(tmp_path / "checkpoint-2", {"small": b"1", "large": b"2" * 5000})
    assert names(tmp_path) == []


def test_a_failed_replacement_leaves_the_old_directory(tmp_path):
    commit_directory(tmp_path / "checkpoint-2", {"a": b"old"})
    with largest_file(1000), pytest.raises(OSError, match="File too large"):
        commit_directory(tmp_path / "checkpoint-2", {"a": b"2" * 5000})
    assert names(tmp_path) == ["checkpoint-2"]
    assert (tmp_path / "checkpoint-2" / "a").read_bytes() == b"old"


def test_a_directory_with_the_same_files_is_never_out_of_sight(tmp_path, monkeypatch):
    commit_directory(tmp_path / "end", {"a": b"1", "b": b"2"})
    monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("it was moved"))
    commit_directory(tmp_path / "end", {"a": b"1", "b": b"2"})
    monkeypatch.undo()
    assert names(tmp_path) == ["end"]


def test_a_directory_can_be_replaced(tmp_path):
    commit_directory(tmp_path / "checkpoint-2", {"a": b"old", "b": b"gone"})
    commit_directory(tmp_path / "checkpoint-2", {"a": b"new"})
    assert names(tmp_path) == ["checkpoint-2"] and names(tmp_path / "checkpoint-2") == ["a"]


def renaming_fails_for_good(monkeypatch, way_out):
    """The new directory cannot take its name; moving the old one away worked."""
    rename = os.rename

    def refuse(source, target):
        if os.path.basename(target) == "checkpoint-2" and ".tmp-" in str(source):
            way_out()
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)


def disk_error():
    raise OSError(errno.EIO, "Input/output error")


def test_a_directory_that_cannot_take_its_name_leaves_the_old_one(tmp_path, monkeypatch):
    commit_directory(tmp_path / "checkpoint-2", {"a": b"old"})
    renaming_fails_for_good(monkeypatch, disk_error)
    with pytest.raises(OSError, match="Input/output error"):
        commit_directory(tmp_path / "checkpoint-2", {"a": b"new"})
    assert names(tmp_path) == ["checkpoint-2"]
    assert (tmp_path / "checkpoint-2" / "a").read_bytes() == b"old"


def test_a_crash_in_the_midst_of_a_replacement_leaves_both_whole(tmp_path, monkeypatch):
    """Neither bears the name then; both are leftovers."""
    commit_directory(tmp_path / "checkpoint-2", {"a": b"old"})
    child = os.fork()
    if child == 0:
        renaming_fails_for_good(monkeypatch, lambda: os._exit(7))
        commit_directory(tmp_path / "checkpoint-2", {"a": b"new"})
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert all(map(is_leftover, names(tmp_path)))
    assert {(path / "a").read_bytes() for path in tmp_path.iterdir()} == {b"old", b"new"}
    sweep_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_what_the_disk_does_not_confirm_is_there_and_said_so(tmp_path, monkeypatch):
    """The last fsync, that of the parent, fails: everything has its name already."""
    sync = os.fsync

    def refuse(descriptor):
        if os.path.samestat(os.fstat(descriptor), tmp_path.stat()):
            disk_error()
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(NotConfirmed, match="not confirmed by the disk"):
        write_file(tmp_path / "file", b"data")
    with pytest.raises(NotConfirmed, match="not confirmed by the disk"):
        commit_directory(tmp_path / "checkpoint-2", {"a": b"1"})
    assert names(tmp_path) == ["checkpoint-2", "file"]


def test_a_new_directory_is_there_when_its_block_ends_well_and_never_replaces(tmp_path):
    with new_directory(tmp_path / "deep" / "new") as directory:
        (directory / "usual").touch()
        (directory / "closed").touch(mode=0o600)
        assert not (tmp_path / "deep" / "new").exists()
    modes = {path.stat().st_mode for path in (tmp_path / "deep" / "new").iterdir()}
    assert len(modes) == 1  # what the umask gives
    with pytest.raises(MiniloraError, match="exists"), new_directory(tmp_path / "deep" / "new"):
        pass
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "other"):
        raise ZeroDivisionError
    assert names(tmp_path) == ["deep"] and names(tmp_path / "deep") == ["new"]


def test_lines_are_there_as_they_are_written_and_an_empty_file_is_not_left(tmp_path):
    with pytest.raises(ZeroDivisionError), new_lines(tmp_path / "rows") as write:
        write("one")
        assert (tmp_path / "rows").read_text() == "one\n"
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), new_lines(tmp_path / "none"):
        raise ZeroDivisionError
    assert names(tmp_path) == ["rows"]
    for path in (tmp_path / "rows", tmp_path / "nowhere" / "rows"):
        with pytest.raises(MiniloraError), new_lines(path):
            pass


def test_a_directory_is_made_with_its_parents(tmp_path):
    make_directory(tmp_path / "a" / "b" / "c")
    make_directory(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        make_directory(tmp_path / "file" / "a")


def test_a_scratch_directory_is_a_leftover_while_it_is_there_and_gone_afterwards(tmp_path):
    with scratch_directory(tmp_path / "end") as directory:
        (directory / "file").write_text("")
        assert is_leftover(directory.name) and directory.parent == tmp_path
    assert names(tmp_path) == []


def test_a_lock_is_not_taken_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".minilora.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="Too many levels of symbolic links"), exclusive(tmp_path):
        pass


def test_nothing_is_written_through_a_link_that_lies_in_wait(tmp_path, monkeypatch):
    """The temporary name is drawn at random; even if it were guessed, O_EXCL refuses it."""
    import uuid

    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=0))
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".tmp-file-00000000").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "file", b"data")
    assert victim.read_text() == "precious"


def test_leftovers_are_swept_and_nothing_else(tmp_path):
    kept = [".tmp-mine", "checkpoint-1", ".invalid-checkpoint-2-0123abcd", ".hidden", "run.json"]
    gone = [".tmp-checkpoint-2-0123abcd", ".trash-checkpoint-1-89abcdef"]
    for name in kept + gone:
        (tmp_path / name).mkdir()
    (tmp_path / ".tmp-run.json-01234567").write_text("half")
    sweep_leftovers(tmp_path)
    assert names(tmp_path) == sorted(kept)
    assert is_leftover(".minilora.lock") and not is_leftover("run.json")


def test_a_directory_that_somebody_is_filling_is_not_swept(tmp_path):
    with new_directory(tmp_path / "merged") as directory:
        (directory / "model").write_text("half")
        sweep_leftovers(tmp_path)
        assert (directory / "model").exists()
    assert names(tmp_path / "merged") == ["model"]


def test_what_is_removed_or_set_aside_is_out_of_sight(tmp_path):
    for name in ("checkpoint-1", "checkpoint-2"):
        commit_directory(tmp_path / name, {"a": b"1"})
    remove_directory(tmp_path / "checkpoint-1")
    aside = set_aside(tmp_path / "checkpoint-2", "invalid")
    assert names(tmp_path) == [aside.name] and aside.name.startswith(".invalid-checkpoint-2-")


def hold(directory, held, release):
    with exclusive(directory):
        held.set()
        release.wait(30)


def test_a_directory_has_one_holder_and_a_dead_one_is_not_in_the_way(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, held, release))
    process.start()
    assert held.wait(60)
    with pytest.raises(MiniloraError, match="in use by another run"), exclusive(tmp_path):
        pass
    assert is_held(tmp_path)
    process.kill()  # it cannot clean up; the kernel drops its lock
    process.join()
    assert (tmp_path / ".minilora.lock").exists() and not is_held(tmp_path)
    with exclusive(tmp_path):
        pass


def test_files_get_the_permissions_the_umask_gives(tmp_path):
    before = os.umask(0o077)
    try:
        write_file(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_a_tokenizer_that_cannot_be_written_is_an_os_error(tiny_model, tmp_path):
    """Its library, in Rust, raises no such thing itself."""
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        with disk_errors(tmp_path):
            AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
