"""The order of the fsyncs, proved on what strace recorded: wherever the power goes, every
checkpoint in sight is whole, its part of metrics.jsonl too, and the last one whose save had
returned is in sight.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.trainer_utils import get_last_checkpoint

from minilora.training.checkpoint import CHECKPOINT, latest_checkpoint
from tests.faults.power import Disk, File, Operation, operations
from tests.faults.strace import Server, needs_strace
from tests.faults.test_every_call import contents

pytestmark = [pytest.mark.slow, needs_strace]


@pytest.fixture(scope="module")
def server():
    server = Server("tests.faults.saver")
    yield server
    server.close()


@pytest.fixture(scope="module")
def recorded(server, tmp_path_factory) -> list[Operation]:
    """What a whole run did to its directory: four checkpoints, two rotations, one replacement."""
    directory = tmp_path_factory.mktemp("recorded")
    assert server.run(directory / "run", directory / "log", "-xx", "-s", "1000000") == 0
    found = operations(directory / "log", directory / "run")
    disk = Disk()
    for operation in found:
        disk.apply(operation)
    disk.leave(directory / "replayed", names_persist=True, half_written=False)
    replayed, real = contents(directory / "replayed"), contents(directory / "run")
    assert replayed == real, "the record is not the whole story"
    return found


def is_commit(operation: Operation) -> bool:
    return operation.kind in ("rename", "exchange") and bool(CHECKPOINT.fullmatch(operation.to))


def whole_checkpoints(recorded: list[Operation]) -> dict[str, dict[str, bytes | None]]:
    """The contents of each checkpoint as it was saved, every write safe."""
    disk, found = Disk(), {}
    for operation in recorded:
        if is_commit(operation):
            *_, found[operation.to] = disk.directory_states(disk._find(operation.path))
        disk.apply(operation)
    return found


def has_its_rows(disk: Disk, root: dict[str, int], manifest: bytes) -> bool:
    """Whether the part of metrics.jsonl that is safe begins with what the manifest says."""
    state, file = json.loads(manifest)["state"], disk.inodes[root["metrics.jsonl"]]
    assert isinstance(file, File) and state["metrics_size"] > 0
    rows = file.contents(file.safe)[: state["metrics_size"]]
    return hashlib.sha256(rows).hexdigest() == state["metrics_sha256"]


def losses(
    recorded: list[Operation], whole: dict[str, dict[str, bytes | None]]
) -> tuple[list[str], int]:
    """What goes wrong, at which operation, and how many states were looked at: every one that the
    power may leave, after every operation.
    """
    disk = Disk()
    saved = returned = None
    found, states = [], 0
    for index, operation in enumerate(recorded):
        if operation.kind != "sync" and saved is not None:
            returned = saved  # whoever called save is doing something else by now
        disk.apply(operation)
        saved = operation.to if is_commit(operation) else saved
        for root in disk.root_states():
            if returned is not None and returned not in root:
                found.append(f"{index}: {returned} was saved and is not there")
            for name in filter(CHECKPOINT.fullmatch, root):
                for left in disk.directory_states(root[name]):
                    states += 1
                    if left != whole[name]:
                        found.append(f"{index}: {name} may be broken")
                    elif not has_its_rows(disk, root, left["minilora.json"] or b""):
                        found.append(f"{index}: the rows of {name} may be lost")
    return found, states


def test_no_moment_of_a_power_loss_breaks_or_loses_a_checkpoint(recorded):
    found, states = losses(recorded, whole_checkpoints(recorded))
    assert not found
    assert states > len(recorded) > 150


WITHOUT: dict[str, Callable[[Operation], bool]] = {
    "any": lambda path: True,
    "that of files": lambda path: path.startswith(".tmp-checkpoint") and "/" in path,
    "that of a new checkpoint's directory": lambda path: (
        path.startswith(".tmp-checkpoint") and "/" not in path
    ),
    "that of the rows": lambda path: path == "metrics.jsonl",
    "that of the run's directory": lambda path: path == "",
}


@pytest.mark.parametrize("which", WITHOUT)
def test_without_one_kind_of_fsync_something_is_lost(which, recorded):
    """Negative control: the recorder finds a loss, so that each fsync has its reason."""
    careless = [o for o in recorded if not (o.kind == "sync" and WITHOUT[which](o.path))]
    assert len(careless) < len(recorded)
    assert losses(careless, whole_checkpoints(recorded))[0]


def test_renaming_before_writing_is_noticed(recorded):
    """Negative control: a checkpoint written in place, as HF Trainer does it."""
    names = {o.path: o.to for o in recorded if o.kind == "rename" and is_commit(o)}

    def in_place(path: str) -> str:
        first, slash, rest = path.partition("/")
        return names.get(first, first) + slash + rest

    changed = [
        Operation(o.kind, in_place(o.path), o.to, o.data)
        for o in recorded
        if o.path not in names or o.kind != "rename"
    ]
    whole = whole_checkpoints(recorded)
    disk, broken = Disk(), 0
    for operation in changed:
        if operation.kind == "exchange":
            break
        disk.apply(operation)
        for root in disk.root_states():
            for name in filter(CHECKPOINT.fullmatch, root):
                broken += any(left != whole[name] for left in disk.directory_states(root[name]))
    assert broken


@pytest.mark.parametrize("half_written", [False, True])
@pytest.mark.parametrize("names_persist", [False, True])
def test_what_is_left_on_the_disk_resumes_to_the_same_bytes(
    names_persist, half_written, recorded, server, tmp_path
):
    """The extremes of what may be left, put on a real disk, after every third operation."""
    assert server.run(tmp_path / "whole") == 0
    disk = Disk()
    for index, operation in enumerate(recorded):
        disk.apply(operation)
        if index % 3 == 0:
            output_dir = tmp_path / str(index)
            disk.leave(output_dir, names_persist, half_written)
            ours = latest_checkpoint(output_dir)
            assert get_last_checkpoint(str(output_dir)) == (str(ours) if ours else None)
            assert server.run(output_dir) == 0, Path(f"{output_dir}.stderr").read_text()
            assert contents(output_dir) == contents(tmp_path / "whole")
