"""What a power loss may leave of a directory: a model of a journalling file system, fed with the
system calls that strace recorded.

A write is safe once its file has been fsynced; until then any part of it may be missing. What
happened to the names in a directory is safe once that directory has been fsynced; until then it may
be missing from some point on. Within a directory the order is kept, between two directories, or a
directory and a file, there is none. (ext4 promises more; POSIX, not even this much.)
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = 0


@dataclass(frozen=True)
class Operation:
    """One system call that changed the disk, or made a change safe."""

    kind: str
    """create, mkdir, write, rename, exchange, remove or sync."""
    path: str
    """Relative to the recorded directory; "" is the directory itself."""
    to: str = ""
    """The new name, of rename and exchange."""
    data: bytes = b""


@dataclass
class File:
    writes: list[bytes] = field(default_factory=list)
    safe: int = 0
    """How many of the writes are."""

    def contents(self, count: int) -> bytes:
        return b"".join(self.writes[:count])


@dataclass
class Directory:
    changes: list[tuple[str, str, int]] = field(default_factory=list)
    """(what, name, inode): "set" a name, or "drop" it, or "move", whose name is "old\\0new"."""
    safe: int = 0

    def entries(self, count: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for what, name, inode in self.changes[:count]:
            if what == "set":
                found[name] = inode
            elif what == "drop":
                del found[name]
            else:
                one, other = name.split("\0")
                found[one], found[other] = found.get(other, -1), found[one]
                if what == "move":
                    del found[one]
        return found


class Disk:
    """Inodes, and which changes of each are safe."""

    def __init__(self) -> None:
        self.inodes: list[File | Directory] = [Directory()]

    def apply(self, operation: Operation) -> None:
        if operation.kind == "sync":
            inode = self.inodes[self._find(operation.path)]
            inode.safe = len(inode.writes if isinstance(inode, File) else inode.changes)
        elif operation.kind == "write":
            file = self.inodes[self._find(operation.path)]
            assert isinstance(file, File)
            file.writes.append(operation.data)
        else:
            parent, _, name = operation.path.rpartition("/")
            directory = self.directory(self._find(parent))
            if operation.kind in ("create", "mkdir"):
                if name in directory.entries(len(directory.changes)):
                    return  # opened, not created
                self.inodes.append(File() if operation.kind == "create" else Directory())
                directory.changes.append(("set", name, len(self.inodes) - 1))
            elif operation.kind == "remove":
                directory.changes.append(("drop", name, -1))
            else:
                to_parent, _, to = operation.to.rpartition("/")
                assert to_parent == parent, "a rename from one directory to another"
                what = "move" if operation.kind == "rename" else "swap"
                directory.changes.append((what, f"{name}\0{to}", -1))

    def directory(self, inode: int) -> Directory:
        found = self.inodes[inode]
        assert isinstance(found, Directory)
        return found

    def _find(self, path: str) -> int:
        inode = ROOT
        for name in path.split("/") if path else []:
            directory = self.directory(inode)
            inode = directory.entries(len(directory.changes))[name]
        return inode

    def root_states(self) -> Iterator[dict[str, int]]:
        """What the recorded directory may hold after a power loss now, by name."""
        root = self.directory(ROOT)
        for count in range(root.safe, len(root.changes) + 1):
            yield root.entries(count)

    def directory_states(self, inode: int) -> Iterator[dict[str, bytes | None]]:
        """What a directory inside it may hold: contents by name, None where a part of a file may
        be missing.
        """
        directory = self.directory(inode)
        for count in range(directory.safe, len(directory.changes) + 1):
            yield {name: self._certain(entry) for name, entry in directory.entries(count).items()}

    def _certain(self, inode: int) -> bytes | None:
        file = self.inodes[inode]
        assert isinstance(file, File)
        return file.contents(file.safe) if file.safe == len(file.writes) else None

    def leave(self, place: Path, names_persist: bool, half_written: bool) -> None:
        """Write to `place` what is left when either no unsafe change of names persists, or every
        one, and of the unsafe writes nothing, or one half.
        """
        self._leave(ROOT, place, names_persist, half_written)

    def _leave(self, inode: int, place: Path, names_persist: bool, half_written: bool) -> None:
        found = self.inodes[inode]
        if isinstance(found, File):
            unsafe = b"".join(found.writes[found.safe :])
            kept = unsafe[: len(unsafe) // 2] if half_written else b""
            place.write_bytes(found.contents(found.safe) + kept)
            return
        place.mkdir()
        count = len(found.changes) if names_persist else found.safe
        for name, entry in found.entries(count).items():
            self._leave(entry, place / name, names_persist, half_written)


def operations(log: Path, root: Path) -> list[Operation]:
    """The operations on `root` in a log of `strace -y -xx -s <more than any write>`."""
    found = []
    for line in log.read_text().splitlines():
        match = re.match(r"(?:\d+ +)?(\w+)\((.*)\) += +(-?\d+)", line)
        if match is None or int(match.group(3)) < 0:
            continue
        name, arguments = match.group(1), match.group(2)
        operation = _operation(name, arguments, f"{root}")
        if operation is not None:
            found.append(operation)
    return found


def _operation(call: str, arguments: str, root: str) -> Operation | None:
    quoted = [_decoded(text) for text in re.findall(r'"((?:\\x[0-9a-f]{2})*)"', arguments)]
    opened = re.match(r"\d+<([^>]*)>", arguments)
    descriptor = _decoded(opened.group(1)).decode() if opened else ""

    def inside(path: str) -> str | None:
        if path == root:
            return ""
        return path.removeprefix(f"{root}/") if path.startswith(f"{root}/") else None

    if call in ("write", "fsync"):
        path = inside(descriptor)
        data = quoted[0] if call == "write" else b""
        kind = "write" if call == "write" else "sync"
        return None if path is None else Operation(kind, path, data=data)
    paths = [text.decode() for text in quoted]
    if call == "unlinkat" and not paths[0].startswith("/"):
        paths[0] = f"{descriptor}/{paths[0]}"
    path = inside(paths[0]) if paths else None
    if not path or (call == "openat" and "O_CREAT" not in arguments):
        return None
    kinds = {"openat": "create", "mkdir": "mkdir", "rmdir": "remove", "unlink": "remove"}
    kinds |= {"unlinkat": "remove", "rename": "rename"}
    if call == "renameat2":
        assert "RENAME_EXCHANGE" in arguments
        return Operation("exchange", path, inside(paths[1]) or "")
    if call == "rename":
        return Operation("rename", path, inside(paths[1]) or "")
    return Operation(kinds[call], path) if call in kinds else None


def _decoded(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", "")) if text.startswith("\\x") else text.encode()
