"""A command in several forks of this process that train together, as torchrun would start them."""

import contextlib
import faulthandler
import importlib
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from torch.distributed import TCPStore

import minilora.fine_tuning  # noqa: F401  (imported here, not in every fork)
from tests import forked
from tests.conftest import Finished


@contextlib.contextmanager
def store_elsewhere() -> Iterator[int]:
    """The port of a store. Its thread must not run here: what it locks, forks would find locked."""
    mine, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(theirs, str(store.port).encode())
        signal.pause()
    try:
        yield int(os.read(mine, 10))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(mine)
        os.close(theirs)


def run_ranks(
    world_size: int,
    command: str | Callable[[], int],
    *flags: object,
    seconds: float = 60,
    prepare: Callable[[int], object] = lambda rank: None,
    own_flags: Callable[[int], tuple[object, ...]] = lambda rank: (),
) -> list[Finished]:
    """How each rank's `python -m minilora.<command> <flags> <own flags>` ended. `prepare` is called
    in each before it. Or how a function ended. Their store is in a process apart, as torchrun is.
    """
    main = importlib.import_module(f"minilora.{command}").main if isinstance(command, str) else None
    with (
        tempfile.TemporaryDirectory() as directory,
        warnings.catch_warnings(),
        store_elsewhere() as port,
    ):
        warnings.simplefilter("ignore")  # python 3.12 on forks of a process with threads
        places = [
            (Path(directory, f"out{r}"), Path(directory, f"err{r}")) for r in range(world_size)
        ]
        children = []
        for rank, (out, err) in enumerate(places):
            child = os.fork()
            if child == 0:
                told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
                told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                told |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RUN_ID": "test"}
                os.environ |= {name: str(value) for name, value in told.items()}
                forked.redirect(os.devnull, out, err)
                faulthandler.dump_traceback_later(seconds * 0.9)  # says where it hangs
                sys.argv = [str(command), *map(str, (*flags, *own_flags(rank)))]
                of_rank = partial(prepare, rank)
                forked.end(main or command, of_rank)  # pyright: ignore[reportArgumentType]
            children.append(child)
        codes = [forked.wait(child, seconds, None) for child in children]
        read = [[place.read_text(errors="replace") for place in both] for both in places]
        return [Finished(code, *texts) for code, texts in zip(codes, read, strict=True)]
