"""What every command does around its work: errors as one line, signals as a request to stop, and
standard streams that no file can speak through.
"""

import argparse
import contextlib
import errno
import gc
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from minilora import config_file
from minilora.errors import MiniloraError, first_line, harmless
from minilora.options import NO_TEXT

BAD_INPUT = 2
INTERRUPTED = 128  # plus the signal's number, as shells count
LONGEST_LINE = 2000
# What torch says, in a RuntimeError, where an argument asks for more memory than there can be.
NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|size calculation overflowed|out of memory"
)
# What a path can be that nobody can open: the user's words, not the disk.
NO_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
# Where transformers has the code of models.
MODELS = ("transformers.models.", "transformers.modeling_utils.")
# Which page of docs/ explains what is raised in which rooms, or functions of theirs: the first that
# fits, of the innermost. What others complain of says all there is.
PAGES = {
    "04_checkpoint.md": ("training.checkpoint.",),
    "06_keys.md": ("lora.peft_files.",),
    "08_merging.md": ("lora.merge.", "lora.combine.", "trained.merge."),
    "02_lora_config.md": ("lora.",),
    "commands.md": ("options.", "config_file."),
    "report.md": ("trained.report.",),
    "several_processes.md": ("training.distributed.", "training.resume.check_ranks"),
    "sweeps.md": ("sweep.", "sweeping."),
    "troubleshooting.md#the-directory": ("files.", "training.run_directory.new_output_dir"),
    "troubleshooting.md#the-model": ("bert.load.",),
    "troubleshooting.md#the-data": ("bert.", "fine_tuning.read_data"),
    "troubleshooting.md#a-run-does-not-begin": ("starting_model.",),
    "troubleshooting.md#a-resume-is-refused-or-warns": ("training.resume.",),
    "troubleshooting.md#the-loss-is-not-finite": ("training.loop.training_step",),
    "troubleshooting.md#another-base-another-way-to-save": ("trained.opened.load_base",),
}


class Parser(argparse.ArgumentParser):
    """A parser that complains in one line, and to which `--learning-rate` is `--learning_rate`."""

    def __init__(self, command: str, usage: str | None) -> None:
        super().__init__(f"python -m minilora.{command}", usage=usage, allow_abbrev=False)
        help_text = "flags, in JSON or YAML, or a run.json; those given here win"
        self.add_argument("--config", metavar="FILE", help=help_text)
        self.words: list[str] = []

    def parse_known_args(self, args: list[str], namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        for word in filter(NO_TEXT.search, args):
            self.error(f"{word!r} is not UTF-8: give another name")
        # Up to a "=": the dashes of a value stay.
        spelt = [re.sub("(?<=^--)[^=]+", lambda flag: flag[0].replace("-", "_"), w) for w in args]
        self.words = spelt
        scout = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        scout.add_argument("--config", nargs="?")
        if path := scout.parse_known_args(spelt)[0].config:
            config_file.set_defaults(self, Path(path))
        return super().parse_known_args(spelt, namespace)

    def error(self, message: str) -> NoReturn:
        # Whatever else is wrong, such as a flag that is required: it may be the one misspelt.
        known = {"--", *self._option_string_actions}
        flags = [word.partition("=")[0] for word in self.words]
        if unknown := [flag for flag in flags if flag.startswith("--") and flag not in known]:
            told = "" if unknown[0] in re.split("[ =]", message) else f"; {unknown[0]} is no flag"
            message += told + config_file.nearest(unknown[0], known)
        raise SystemExit(_complain(f"{message} (see --help)"))


def add_run_arguments(parser: argparse.ArgumentParser, *columns: str) -> None:
    """What evaluate and predict take: a run, what may have moved since, and a file's columns."""
    parser.add_argument("path", metavar="OUT", help="what train wrote, a checkpoint, or an adapter")
    add_base_argument(parser)
    parser.add_argument("--device", help="cpu, cuda, ...; by default as in training")
    for name in columns:
        parser.add_argument(f"--{name}", metavar="COLUMN", help="by default as in training")


def add_base_argument(parser: argparse.ArgumentParser) -> None:
    """The base model, where it is no longer at its recorded place."""
    help_text = "the base model, if it has moved; checked by its fingerprint"
    parser.add_argument("--model_name_or_path", metavar="PATH", help=help_text)


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Pause Python's garbage collector, whose passes over ever more objects are a sixth of the time
    of importing torch and transformers; what they leave is exempted for good.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and end the process with its exit code, 0 if it returns none.

    SIGTERM ends `main` as SIGINT does, by an exception: what cleans up after itself still does. (A
    script's background job starts with SIGINT ignored, and python would leave it at that.)
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(INTERRUPTED + number))
    # A file that is opened must not become a standard stream that was closed.
    while (filler := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(filler)
    speaks = is_first()
    out: Any = SafeStream(sys.stdout if speaks else None, is_needed=True)
    err: Any = SafeStream(sys.stderr if speaks else None, is_needed=False)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main() or 0
            sys.stdout.flush()
        except MiniloraError as error:
            code = _complain(str(error), page_of(error))
        except BrokenPipeError:  # whoever read the output has seen enough
            _to_nowhere(1)
            code = INTERRUPTED + signal.SIGPIPE
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            told = _complain(f"{place}{error.strerror or error}")
            code = told if error.errno in NO_NAMES else 1  # the disk: full, read-only, gone
        except Exception as error:
            family = _family_that_raised(error)
            if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
                advice = "give a lower rank, batch size or max_length"
                code = _complain(f"not enough memory: {advice}", "troubleshooting.md#out-of-memory")
            elif family:
                said = f"{type(error).__name__}: {first_line(error)}"
                problem = f"{family} of transformers cannot take what it is given ({said})"
                advice = "give a base whose config.json and tokenizer belong together"
                code = _complain(f"{problem}: {advice}", "troubleshooting.md#the-model")
            else:
                raise
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            code = INTERRUPTED + signal.SIGINT
        raise SystemExit(code)


def is_first() -> bool:
    """Of several processes that torchrun started, the first alone speaks and writes."""
    return os.environ.get("RANK", "0") == "0" or "MASTER_ADDR" not in os.environ


class SafeStream:
    """A standard stream on which what was read from a file shows, and does nothing."""

    def __init__(self, stream: Any, is_needed: bool) -> None:
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115
        self.is_needed = is_needed  # or its reader may go away

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        if text.strip("\n\x1b[A"):  # or it is tqdm that moves from bar to bar
            text = harmless(text)
        encoding = self.stream.encoding or "utf-8"
        self._try(self.stream.write, text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, do: Callable[..., object], *given: str) -> None:
        try:
            do(*given)
        except OSError:
            if self.is_needed:
                raise
            _to_nowhere(self.stream.fileno())


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Inside, the first SIGINT or SIGTERM is put into the list that is yielded, and no more.

    A second one, of either kind, ends the process at once; checkpoints are safe against that. Not
    under torchrun, which passes on what its whole group got, and kills who does not end.
    Outside the main thread (a notebook's or a server's) signals are left alone.
    """
    received: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()

    def remember(number: int, frame: FrameType | None) -> None:
        if received and "TORCHELASTIC_RUN_ID" not in os.environ:
            # Not reset in advance: python complains of a signal that comes in just before that.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(number)
        # Not through sys.stderr, which may be closed, or interrupted in the midst of a write.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; once more to stop at once\n" * is_first())

    handled = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    before = {number: signal.signal(number, remember) for number in handled}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def page_of(error: MiniloraError) -> str:
    """The page of docs/ that explains it, or an empty string."""
    page = ""
    for place in _places(error):
        place = place.removeprefix("minilora.")
        page = next((name for name, rooms in PAGES.items() if place.startswith(rooms)), page)
    return page


def _family_that_raised(error: Exception) -> str:
    # What of transformers' code for a model did, or called, and not one of our layers in it.
    own = [place for place in _places(error) if place.startswith(("minilora.", *MODELS))]
    return own[-1].split(".")[2] if own and own[-1].startswith(MODELS) else ""


def _places(error: BaseException) -> Iterator[str]:
    for frame, _ in traceback.walk_tb(error.__traceback__):
        # By its spec: of a command that was started, `__name__` is "__main__".
        room = getattr(frame.f_globals.get("__spec__"), "name", "")
        yield f"{room}.{frame.f_code.co_qualname}"


def _to_nowhere(descriptor: int) -> None:
    # What python still has to flush at its end would fail once more.
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), descriptor)


def _complain(message: str, page: str = "") -> int:
    # One line, of a length that can be read, whatever a damaged file holds.
    see = f" (see docs/{page})" if page else ""
    sys.stderr.write(f"error: {' '.join(message.split())[:LONGEST_LINE]}{see}\n")
    if not is_first() and "torch" not in sys.modules:
        time.sleep(3)  # rank 0 meets the same; torchrun ends it as soon as another has ended
    return BAD_INPUT
