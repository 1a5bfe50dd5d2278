"""A page of the docs: its blocks, its words, and how its blocks are run, as a reader would."""

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
VARYING = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A fenced block. `printed` is the text block that follows it at once, if one does."""

    language: str
    code: str
    line: int  # of its first line of code in the page, from 1
    printed: str | None = None


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    blocks: list[Block] = []
    end = None
    for found in FENCE.finditer(text):
        language, code = found.groups()
        line = text.count("\n", 0, found.start()) + 2
        if language == "text" and end is not None and not text[end : found.start()].strip():
            before = blocks.pop()
            blocks.append(Block(before.language, before.code, before.line, code))
        else:
            blocks.append(Block(language, code, line))
        end = found.end() if language in ("python", "bash") else None
    return blocks


def prose_of(page: Path) -> str:
    """The page without its blocks."""
    return FENCE.sub("", page.read_text())


def run_page(page: Path) -> int:
    """Run the page's python in one namespace, its bash beside it, both in the current directory."""
    namespace: dict = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.language not in ("python", "bash"):
            continue
        place = f"{page.relative_to(ROOT)}:{block.line}"
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                # Empty lines before it, so that a traceback names the page's own lines.
                code = "\n" * (block.line - 1) + block.code
                exec(compile(code, str(page), "exec"), namespace)
            got = out.getvalue()
        else:
            got = run_bash(block.code, place)
        if block.printed is not None and not agrees(block.printed, got):
            print(f"{place} prints\n{got}\nand the page says\n{block.printed}", file=sys.stderr)
            return 1
    return 0


def run_bash(script: str, place: str) -> str:
    """Its stdout."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == 0, f"{place} ends with {done.returncode}:\n{done.stderr}"
    return done.stdout


def agrees(said: str, got: str) -> bool:
    """Whether a page's text is what was printed; "..." stands for anything, as in a doctest."""
    return doctest.OutputChecker().check_output(said.strip() + "\n", got.strip() + "\n", VARYING)


def numbers_of(page: Path) -> list[str]:
    """The numbers in digits of a page's prose, without those of links and pictures, sorted."""
    prose = re.sub(r"\]\([^)]*\)|\b(src|srcset)=\"[^\"]*\"", "", prose_of(page))
    return sorted(re.findall(r"\d+(?:[.,]\d+)*", prose))
