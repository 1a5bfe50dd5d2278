"""Exercise 5: the commit. A directory that is complete or does not exist.

    run/
      checkpoint-9/      whoever sees the name sees all the files, whole
      checkpoint-10/
      .tmp-...           what a killed process left; nobody looks at it

Build, in this order:

1. `commit`: make a directory beside the final one, under a name that starts with a dot. Write each
   file into it, flush and fsync it. fsync the directory, for its entries are data too. Rename it.
   fsync the parent, which is where the new name stands.
2. If anything raises on the way (a full disk), remove what was made, and raise on.
3. `latest`: the complete checkpoint with the highest step, as a number.
4. `rotate`: delete all but the newest. A directory is deleted file by file: rename it first to a
   name that starts with a dot, so that no half of it bears the name of a checkpoint.

Use os.fsync, os.rename or os.replace (or pathlib's methods, which call them): the tests listen to
them, and kill the process before each in turn.

Run: python -m pytest examples/exercises/test_commit.py
"""

from pathlib import Path


def commit(path: Path, files: dict[str, bytes]) -> None:
    """Create the directory `path` with these files, by name: all of it, or nothing, even if the
    process is killed or the power fails. What an earlier, killed commit left is no obstacle.

    Raises:
        FileExistsError: there is something called `path`; it is left as it is.
    """
    raise NotImplementedError


def latest(run: Path) -> Path | None:
    """The directory `run/checkpoint-<step>` with the highest step, or None."""
    raise NotImplementedError


def rotate(run: Path, keep: int) -> None:
    """Delete all of `run`'s checkpoints but the `keep` newest, and leave everything else."""
    raise NotImplementedError
