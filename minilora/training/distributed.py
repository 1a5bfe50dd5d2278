"""Several processes that train one model together: the room that knows there are ranks.

torchrun starts them and tells each its rank by the environment; torch.distributed's collectives
carry what they share. A process alone is rank 0 of 1 and sends nothing. Every rank reads the same
files and knows the same order of examples; of each step it takes its share. Rank 0 writes.

All ranks call these in the same order: `check_agreement`, `summed`, `gathered`, `by_first`,
`in_turns`, and the backward pass of what `replicated` returns. A rank that fails elsewhere leaves
its error where the others, which then wait for it in vain, find it (`joined`). Not here: that all
but rank 0 are silent (`command`, which cannot wait for torch).
"""

import contextlib
import datetime
import errno
import os
import re
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from minilora.errors import MiniloraError
from minilora.training.config import TrainConfig

TOLD_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What torch says where another process is gone, or does not answer.
LOST = re.compile(r"gloo|nccl|connection|timed out", re.IGNORECASE)
MAY_DIFFER = ("cpu_capability", "num_threads")
BUCKET_MB = 1024  # all gradients in one: they are few

T = TypeVar("T")


def is_launched() -> bool:
    """Whether torchrun, or what does as it does, started this process beside others."""
    return all(name in os.environ for name in TOLD_BY_TORCHRUN)


def rank() -> int:
    """Which of the processes this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def restarts() -> int:
    """How often torchrun has started all processes anew, because one was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) if is_launched() else 0


def own_device(device: torch.device) -> torch.device:
    """`device`, or of several GPUs the one that is this process's."""
    if device.type != "cuda" or device.index is not None or not is_launched():
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextlib.contextmanager
def joined(timeout: int = TrainConfig.ddp_timeout) -> Iterator[None]:
    """Inside, the processes that torchrun started can share. They wait for each other for `timeout`
    seconds; then an `OSError` names the rank that does not answer, and where it stood. What a rank
    raises by itself, all raise.
    """
    if not is_launched() or dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    patience = datetime.timedelta(seconds=timeout)
    try:
        store, own, world = next(rendezvous("env://", timeout=patience))
        store = _of_this_start(store, own, world, timeout)
        dist.init_process_group(backend, None, patience, world, own, store)
    except (RuntimeError, ValueError) as error:  # a port in use, a rank that nobody started
        raise MiniloraError(f"the processes cannot join: {str(error).splitlines()[0]}") from None
    try:
        yield
    except (Exception, SystemExit) as error:
        raise _reason(error, dist.distributed_c10d._get_default_store()) from error
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _of_this_start(store: Any, own: int, world: int, timeout: int) -> Any:
    """The part of torchrun's store that nothing from before a restart is in: its name is what all
    ranks drew. They have met when each has seen the draws of all.
    """
    draws, seen = ([f"{name} {one}" for one in range(world)] for name in ("draw", "seen"))
    deadline = time.monotonic() + timeout
    store.set(draws[own], uuid.uuid4().hex)
    while True:
        name = " ".join(_read(store, key) for key in draws)
        store.set(seen[own], name)
        absent = [one for one in range(world) if _read(store, seen[one]) != name]
        if not absent:
            return dist.distributed_c10d.PrefixStore(name, store)
        if time.monotonic() > deadline:
            raise MiniloraError(f"rank {absent[0]} has not come within {timeout} s")
        time.sleep(0.05)


def _read(store: Any, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _reason(error: BaseException, store: Any) -> BaseException:
    """What ends this rank: its own error, which it leaves for the others, or what another raised,
    or which of them is silent. Only a process that ends lets others notice: none may wait here.
    """
    is_lost = isinstance(error, RuntimeError) and LOST.search(str(error)) is not None
    try:
        if isinstance(error, Exception) and not is_lost:
            store.compare_set("error", "", f"{type(error).__name__} {error}")
            return error
        if is_lost:
            store.set(f"waits {rank()}", "")
            time.sleep(1)  # the others have met the same by then
        if found := _read(store, "error"):
            kind, _, told = found.partition(" ")
            return MiniloraError(told) if kind == "MiniloraError" else OSError(errno.EIO, told)
        return _silent(error, store) if is_lost else error
    except RuntimeError:  # the store is gone, with rank 0 or with torchrun
        return OSError(errno.ETIMEDOUT, f"rank 0 has ended: {error}") if is_lost else error


def _silent(error: BaseException, store: Any) -> OSError:
    """Which ranks do not answer. Where rank 0 is one, the first of the others says so."""
    ranks = range(int(os.environ["WORLD_SIZE"]))
    silent = [one for one in ranks if not store.check([f"waits {one}"])]
    places = [f"rank {one} (at {_read(store, f'at {one}') or 'the start'})" for one in ranks]
    stood = [places[one] for one in silent] or ["a rank"]
    reason = f"does not answer {places[rank()]}"
    told = re.sub(r"^\[\S+\] |\. This is .*", "", str(error).splitlines()[0])
    message = f"{', '.join(stood)} {reason}: {told}"
    if 0 in silent and rank() == min(set(ranks) - set(silent)):
        os.write(2, f"\nerror: {message}\n".encode())
    return OSError(errno.ETIMEDOUT, message)


def reached(place: str) -> None:
    """Note where this rank stands, for others to tell if it does not answer any more."""
    if dist.is_initialized():
        dist.distributed_c10d._get_default_store().set(f"at {rank()}", place)


def gathered(value: T) -> list[T]:
    """Every rank's value, in their order."""
    found = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(found, value)
    return found


def summed(number: float) -> float:
    """The sum of every rank's number, in float64."""
    if not dist.is_initialized():
        return number
    total = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def by_first(do: Callable[[], T]) -> T:
    """What `do` returns, or raises, on rank 0, which alone does it; it is done on return."""
    if not dist.is_initialized():
        return do()
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found[0] = do()
        except Exception as error:  # whatever it is: the others wait for it
            found[1] = error
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


@contextlib.contextmanager
def held_by_first(
    holding: contextlib.AbstractContextManager[None], directory: Path
) -> Iterator[None]:
    """Rank 0 is inside `holding`, and every rank sees the directory that it holds."""
    with contextlib.ExitStack() as held:
        by_first(lambda: held.enter_context(holding))
        if world_size() > 1:
            _check_shared(directory)
        yield


def _check_shared(directory: Path) -> None:
    token = directory / f".tmp-shared-{by_first(lambda: uuid.uuid4().hex[:8])}"
    by_first(token.touch)
    blind = [one for one, sees in enumerate(gathered(token.exists())) if not sees]
    by_first(token.unlink)
    if blind:
        problem = f"rank {blind[0]} does not see what rank 0 writes to {directory}"
        raise MiniloraError(f"{problem}: give an output_dir that all hosts share")


def check_agreement(values: dict[str, Any]) -> None:
    """Refuse ranks that are about to do different things: `values` by name."""
    first, *others = gathered(values)
    for other, theirs in enumerate(others, start=1):
        for name, value in first.items():
            if theirs.get(name) != value and name not in MAY_DIFFER:
                found = f"rank {other} has {theirs.get(name)!r} as {name}, rank 0 {value!r}"
                raise MiniloraError(f"{found}: start all with the same")


def in_turns(compute: Callable[[T], Any], items: Iterable[T]) -> Iterator[Any]:
    """compute(item) of every item, in order: each is computed by one rank, and all know it."""
    size, waiting = world_size(), []
    for item in items:
        waiting.append(item)
        if len(waiting) == size:
            yield from gathered(compute(waiting[rank()]))
            waiting = []
    own = compute(waiting[rank()]) if rank() < len(waiting) else None
    yield from gathered(own)[: len(waiting)]


def own_batches(of_step: np.ndarray, lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """This rank's batches of a step's examples (n,), whose `lengths` (n,) are in tokens: as many
    tokens as every other's, in the step's order; none where there are fewer examples than ranks.
    """
    size = world_size()
    turn = np.arange(len(of_step)) % (2 * size)  # 0, 1, 1, 0, 0, 1, ...: the longest first
    owner = np.minimum(turn, 2 * size - 1 - turn)
    mine = of_step[np.sort(np.argsort(-lengths, kind="stable")[owner == rank()])]
    return np.split(mine, range(batch_size, len(mine), batch_size)) if len(mine) else []


def trainers_order(order: np.ndarray, batch_size: int) -> np.ndarray:
    """An epoch's order as accelerate has it: where ranks would lack examples for a batch, those of
    its beginning come once more.
    """
    all_at_once = batch_size * world_size()
    if world_size() == 1:
        return order
    return np.resize(order, -(-len(order) // all_at_once) * all_at_once)


def trainers_batches(of_step: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """`own_batches` as accelerate deals them out: batch by batch."""
    return np.split(of_step, range(batch_size, len(of_step), batch_size))[rank() :: world_size()]


class _Replica(nn.Module):
    """A forward in whose backward pass every parameter that trains has a part, be it zero: of a
    module that nothing reads, and on a rank that has no batch (None).
    """

    def __init__(self, forward: nn.Module) -> None:
        super().__init__()
        self.inner = forward

    def forward(self, batch: dict[str, Tensor] | None) -> Tensor:
        nothing = sum(p.sum() for p in self.inner.parameters() if p.requires_grad) * 0.0
        assert isinstance(nothing, Tensor)
        if batch is None:
            return nothing
        logits = self.inner(batch)
        return logits + nothing.to(logits.dtype)


def replicated(forward: nn.Module) -> nn.Module:
    """`forward`, whose gradients are the mean of every rank's after the last backward pass."""
    if world_size() == 1:
        return forward
    with warnings.catch_warnings():  # of the argument's new name, which older versions lack
        warnings.simplefilter("ignore", FutureWarning)
        whole = DistributedDataParallel(
            _Replica(forward), broadcast_buffers=False, bucket_cap_mb=BUCKET_MB
        )
    # torch lays out the gradients anew after the first backward pass, and with them the order of
    # sums. A resumed run is to find the layout that the whole run had, so this one is the first.
    whole(None).backward()
    whole.zero_grad()
    return whole


def without_sums(forward: nn.Module, is_last: bool) -> contextlib.AbstractContextManager[None]:
    """Inside, gradients are kept for the step's last batch to sum."""
    if is_last or not isinstance(forward, DistributedDataParallel):
        return contextlib.nullcontext()
    return forward.no_sync()
