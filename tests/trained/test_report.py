"""report: runs side by side in one page, which needs no network and trusts no file."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minilora import MiniloraError, write_report
from minilora.files import json_text
from minilora.training import record
from tests.browser import Browser, needs_chromium, open_browser
from tests.conftest import read_rows

HOSTILE = "<img src=x onerror=\"document.title='it ran'\"></script><!--data-->&amp;'"


class Page(HTMLParser):
    """What a browser makes of a page: its elements, the cells of its tables, its data."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text()
        self.elements: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.is_cell = False
        self.feed(self.text)
        self.data = json.loads(re.findall('<script type="application/json">(.*?)<', self.text)[0])

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

        self.is_cell = tag in ("td", "th")

    def handle_endtag(self, tag):
        self.is_cell = False

    def handle_data(self, data):
        if self.is_cell:
            self.tables[-1][-1][-1] += data

    def table(self, first: str) -> dict[str, list[str]]:
        """The rows of the table whose first cell this is, by their own first cell."""
        found = next(table for table in self.tables if table[0][0] == first)
        return {name: cells for name, *cells in found}


def copy_of(finished_run: Path, path: Path, log: list[dict] | None = None, **changes) -> Path:
    """A run with another log, and other arguments, or whatever run.json calls by these names."""
    shutil.copytree(finished_run, path)
    run = json.loads((path / "run.json").read_text())
    for name, value in changes.items():
        (run["arguments"] if name in run["arguments"] else run)[name] = value
    (path / "run.json").write_text(json.dumps(run))
    if log is not None:
        (path / "metrics.jsonl").write_text("".join(json_text(row) + "\n" for row in log))
    return path


def page_of(*runs: Path) -> Page:
    output = runs[0].parent / "report.html"
    write_report(runs, output)
    return Page(output)


def test_the_curves_are_the_rows_of_the_log(finished_run, tmp_path):
    page = page_of(copy_of(finished_run, tmp_path / "a"))
    rows = read_rows(finished_run)
    names = re.findall("<figcaption><b>(.*?)</b>", page.text)
    assert names[0] == "loss" and set(names[-2:]) == {"learning_rate", "grad_norm"}
    assert set(names) == {name for row in rows for name in row} - {"step", "epoch"}
    for name, [points] in zip(names, page.data["curves"], strict=True):
        assert points == [[row["step"], row[name]] for row in rows if name in row]
    assert page.data["range"] == [1, 6]


def test_each_curve_is_told_in_numbers(finished_run, tmp_path):
    log = [
        {"step": step, "loss": loss} for step, loss in ((1, 0.5), (2, 0.25), (3, 0.75), (4, 0.5))
    ]
    page = page_of(copy_of(finished_run, tmp_path / "a", log))
    told = page.table("value (step)")["a"]
    assert told == ["0.5 (1)", "0.25 (2)", "0.75 (3)", "0.5 (4)"]


def test_the_best_is_the_highest_or_of_errors_the_lowest(finished_run, tmp_path):
    results = [
        {"eval_loss": 0.5, "eval_f1": 0.5, "test_mse": 2.0, "eval_runtime": 1.0, "eval_same": 1.0},
        {
            "eval_loss": 0.4,
            "eval_f1": 0.4,
            "test_mse": 3.0,
            "eval_threshold": 0.1,
            "eval_same": 1.0,
        },
    ]
    runs = [
        copy_of(finished_run, tmp_path / f"run-{i}", result=result)
        for i, result in enumerate(results)
    ]
    assert page_of(*runs).table("metric") == {
        "metric": ["run-0", "run-1"],
        "eval_loss": ["0.5", "0.4\xa0★"],
        "eval_f1": ["0.5\xa0★", "0.4"],
        "test_mse": ["2\xa0★", "3"],
        "eval_same": ["1", "1"],
        "eval_threshold": ["-", "0.1"],
    }


def test_a_run_without_a_result_shows_its_last_evaluation_and_that_it_is_unfinished(
    finished_run, tmp_path
):
    run = copy_of(finished_run, tmp_path / "a", result=None)
    page, last = page_of(run), read_rows(finished_run)[-1]
    assert page.table("metric")["eval_loss"] == [f"{last['eval_loss']:.4g}"]
    assert "<small>step 6; unfinished</small>" in page.text


def by_class(*names: str) -> dict:
    """What the result of a run has by class: three of the first, one taken for the second."""
    scores = [
        {"precision": 1.0, "recall": 2 / 3, "f1": 0.8, "support": 3},
        {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 1},
    ]
    per_class = dict(zip(names, scores, strict=True))
    return {"eval_per_class": per_class, "eval_confusion_matrix": [[2, 1], [0, 1]]}


def test_a_runs_classes_are_told_and_which_was_taken_for_which(finished_run, tmp_path):
    run = copy_of(finished_run, tmp_path / "a", result=by_class("x", HOSTILE))
    page = page_of(run)
    assert page.table("class") == {
        "class": ["precision", "recall", "f1", "support"],
        "x": ["1.0000", "0.6667", "0.8000", "3"],
        HOSTILE: ["0.5000", "1.0000", "0.6667", "1"],
    }
    told = {"true \\ predicted": ["x", HOSTILE], "x": ["2", "1"], HOSTILE: ["0", "1"]}
    assert page.table("true \\ predicted") == told
    assert "<summary>a, by class</summary>" in page.text and "img" not in page.elements


@pytest.mark.parametrize(
    ("result", "is_shown"),
    [
        (None, False),
        ({"eval_per_class": [1], "eval_confusion_matrix": [[1]]}, False),
        ({"eval_per_class": {"a": {"f1": "<b>"}}}, False),
        ({"eval_per_class": {"a": {"f1": 1.0}}, "eval_confusion_matrix": [["<b>"]]}, True),
        ({"eval_per_class": {"a": {"f1": 1.0}, "b": {}}, "eval_confusion_matrix": [[1, 2]]}, True),
    ],
)
def test_tables_that_are_none_do_no_harm(result, is_shown, finished_run, tmp_path):
    page = page_of(copy_of(finished_run, tmp_path / "a", result=result))
    assert ("a, by class" in page.text) == is_shown
    assert "<b>" not in page.text.partition("Final metrics")[2]


def test_training_records_by_class_what_evaluate_prints(finished_run, sentences, command):
    result = json.loads((finished_run / "run.json").read_text())["result"]
    flags = ("--file", sentences[1], "--confusion_matrix", "--device", "cpu")
    found = command("evaluate", finished_run, *flags).summary()
    assert result["eval_per_class"] == found["per_class"]
    assert result["eval_confusion_matrix"] == found["confusion_matrix"]
    assert list(found["per_class"]) == found["labels"]
    assert all(type(v) in (int, float) for row in read_rows(finished_run) for v in row.values())


def test_only_arguments_that_differ_are_compared(finished_run, tmp_path):
    lora = json.loads((finished_run / "run.json").read_text())["lora"] | {"r": 2}
    other = copy_of(finished_run, tmp_path / "b", learning_rate=0.5, lora=lora)
    page = page_of(copy_of(finished_run, tmp_path / "a"), other)
    differing = page.table("argument")
    assert differing["learning_rate"] == ["0.02", "0.5"] and differing["r"] == ["4", "2"]
    assert differing.keys() == {"argument", "learning_rate", "r"}
    assert ["seed", "42", "42"] in page.tables[-1]


def test_runs_of_one_name_are_told_apart(finished_run, tmp_path):
    runs = [copy_of(finished_run, tmp_path / where / "out") for where in ("a", "b")]
    labels = write_report([*runs, runs[0]], tmp_path / "report.html")
    assert labels == [f"out ({k}: {run})" for k, run in enumerate([*runs, runs[0]], start=1)]


def test_where_a_run_was_resumed_extended_or_became_inexact_is_marked(finished_run, tmp_path):
    run = copy_of(finished_run, tmp_path / "a", extended=[3], resumed=[2, 3])
    manifest = json.loads((run / "checkpoint-6" / "minilora.json").read_text())
    del manifest["sha256"]
    manifest["state"]["inexact_from"] = 4
    manifest["sha256"] = record._checksum(manifest)
    (run / "checkpoint-6" / "minilora.json").write_text(json.dumps(manifest))
    page = page_of(copy_of(finished_run, tmp_path / "b"), run)
    assert page.data["marked"] == [[], [3, 2, 3, 4]]
    resumed = "resumed at step 2; resumed at step 3"
    assert f"step 6; extended at step 3; {resumed}; inexact from step 4" in page.text


def test_checkpoints_are_shown_beside_runs_trainers_too(finished_run, trainers, tmp_path):
    run = copy_of(finished_run, tmp_path / "a")
    page = page_of(run, finished_run / "checkpoint-3", trainers)
    assert page.data["labels"] == ["a", "checkpoint-3", "checkpoint-2"]
    names = re.findall("<figcaption><b>(.*?)</b>", page.text)
    logged = dict(zip(names, page.data["curves"], strict=True))
    assert [len(points) for points in logged["loss"]] == [6, 3, 2]
    assert page.table("argument")["seed"] == ["42", "42", "7"]


def test_what_files_say_shows_and_does_nothing(finished_run, tmp_path):
    name = HOSTILE.replace("/", "\N{FRACTION SLASH}")
    log = [*read_rows(finished_run), {"step": 7, f"eval_{HOSTILE}": 1, "eval_x": None}]
    arguments = {"text_column": HOSTILE, "label_column": "\x1b[31m\u202e"}
    run = copy_of(finished_run, tmp_path / name, log, **arguments)
    plain = page_of(copy_of(finished_run, tmp_path / "plain", log[:-1]))
    page = page_of(run, finished_run)
    assert set(page.elements) == set(plain.elements) and "img" not in page.elements
    assert page.elements.count("script") == 2 and page.data["labels"][0] == name
    assert page.table("argument")["text_column"] == [HOSTILE, "null"]
    assert page.table("argument")["label_column"] == ["\\x1b[31m\\u202e", "null"]
    assert page.text.count(f"eval_{HOSTILE}") == 0 and "eval_&lt;img src=x" in page.text


def test_the_page_runs_its_own_script_alone_and_asks_no_network(finished_run, tmp_path):
    page = page_of(copy_of(finished_run, tmp_path / "a"))
    script = re.findall("<script>(.*?)</script>", page.text, re.S)[0].encode()
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert f'"Content-Security-Policy"\n content="{policy}"' in page.text
    assert not re.search(r"https?:|\b(src|href)=|url\(|@import", page.text)


def test_the_same_runs_give_the_same_bytes_and_an_older_page_is_replaced(finished_run, tmp_path):
    output = tmp_path / "report.html"
    write_report([finished_run], output)
    first = output.read_bytes()
    write_report([finished_run, finished_run], output)
    assert output.read_bytes() != first
    write_report([finished_run], output)
    assert output.read_bytes() == first and list(tmp_path.iterdir()) == [output]


def test_the_command_writes_the_page_and_says_so(finished_run, tmp_path, command):
    done = command("report", finished_run, "--output", tmp_path / "page.html")
    assert done.code == 0, done.err
    assert done.summary() == {"output": str(tmp_path / "page.html"), "runs": ["out"]}
    assert "eval_accuracy" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("runs", "output", "message"),
    [
        (["nowhere"], "page.html", "nowhere is not there"),
        (["."], "page.html", "none of the known kinds"),
        (["model"], "page.html", "is of the kind 'model', which has no log"),
        (["run", "model"], "page.html", "is of the kind 'model'"),
        (["empty"], "page.html", "empty: no row has been logged yet"),
        (["run"], ".", "exists and is no report"),
        (["run"], "notes.txt", "notes.txt exists and is no report: give a new name"),
        (["run"], "/dev/null", "exists and is no report"),
        (["run"], "missing/page.html", "there is no such directory"),
        ([], "page.html", "required: RUN"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    runs, output, message, finished_run, tiny_model, tmp_path, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(tiny_model)
    Path("run").symlink_to(finished_run)
    Path("notes.txt").write_text("mine")
    copy_of(finished_run, Path("empty"), log=[])
    before = sorted(tmp_path.iterdir())
    done = command("report", *runs, "--output", output)
    assert done.code == 2 and done.err.count("error: ") == 1 and message in done.err, done.err
    assert sorted(tmp_path.iterdir()) == before and Path("notes.txt").read_text() == "mine"


def test_a_run_that_has_logged_nothing_stands_beside_one_that_has(finished_run, tmp_path):
    empty = copy_of(finished_run, tmp_path / "empty", log=[], result=None)
    page = page_of(empty, finished_run)
    assert "empty <small>step 0; unfinished</small>" in page.text
    with pytest.raises(MiniloraError, match="no row has been logged yet"):
        write_report([empty], tmp_path / "other.html")


# What the script makes of it, in a browser.


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture
def page(finished_run, tmp_path) -> Path:
    """Three runs, one with a hostile name; one is far above the others in its loss."""

    def log(loss: float) -> list[dict]:
        rows = [{"step": step, "loss": loss / step, "grad_norm": loss} for step in range(1, 41)]
        return [*rows, {"step": 40, "eval_loss": loss, "eval_accuracy": 1 / loss}]

    names = {HOSTILE.replace("/", "\N{FRACTION SLASH}"): 1, "second " + "long" * 30: 2, "third": 50}
    runs = [
        copy_of(finished_run, tmp_path / name, log(loss), learning_rate=loss / 100, extended=[30])
        for name, loss in names.items()
    ]
    run = json.loads((runs[1] / "run.json").read_text())
    run["result"] = by_class("long " * 30, HOSTILE)
    (runs[1] / "run.json").write_text(json.dumps(run))
    write_report(runs, tmp_path / "report.html")
    return tmp_path / "report.html"


def box(browser: Browser, selector: str) -> dict:
    script = "return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()"
    return browser.run(script, selector)


def at(place: dict, across: float) -> tuple[float, float]:
    return place["left"] + across * place["width"], place["top"] + place["height"] / 2


def text(browser: Browser, selector: str) -> str:
    return browser.run("return document.querySelector(arguments[0]).textContent", selector)


LINES = """
    return [...document.querySelectorAll('figure:first-child .line')].map(p => p.getAttribute('d'))
"""
TICKS = """
    return [...document.querySelectorAll('figure:first-child .{} i')].map(i => +i.textContent)
"""


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_the_page_is_drawn_without_a_complaint_and_fits_its_window(browser, page, width, scheme):
    browser.open(page, width, 800, scheme)
    lines = browser.run(LINES)
    assert len(lines) == 3 and all(line.count("L") == 39 for line in lines)
    browser.run("for (const details of document.querySelectorAll('details')) details.open = true")
    fits = "const e = document.documentElement; return e.scrollWidth <= e.clientWidth"
    assert browser.run(fits)
    assert browser.complaints() == [] and browser.run("return document.title") != "it ran"
    colours = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    ink, paper = (sum(map(int, re.findall(r"\d+", c)[:3])) for c in browser.run(colours))
    assert (ink < 200 and paper > 700) if scheme == "light" else (ink > 600 and paper < 100)
    browser.run("document.querySelector('h1').style.width = '3000px'")  # negative control
    assert not browser.run(fits)


@pytest.mark.slow
@needs_chromium
def test_a_run_is_hidden_and_shown_and_the_axis_follows(browser, page):
    browser.open(page, 1200, 800)
    pressed = "return document.querySelectorAll('.bar > button')[2].getAttribute('aria-pressed')"
    whole, high = browser.run(LINES), max(browser.run(TICKS.format("y")))
    browser.run("document.querySelectorAll('.bar > button')[2].focus()")
    browser.press(" ")
    hidden = browser.run(LINES)
    assert browser.run(pressed) == "false" and hidden[2] == "" and all(hidden[:2])
    assert max(browser.run(TICKS.format("y"))) < high / 10
    browser.press(" ")
    assert browser.run(pressed) == "true" and browser.run(LINES) == whole


@pytest.mark.slow
@needs_chromium
def test_steps_are_chosen_by_dragging_by_typing_and_given_up(browser, page):
    browser.open(page, 1200, 800)
    inputs = "return [...document.querySelectorAll('.range input')].map(i => +i.value)"
    whole = browser.run(LINES)
    assert browser.run(inputs) == [1, 40]
    plot = box(browser, "figure:first-child .plot")
    browser.drag(at(plot, 0.25), at(plot, 0.75))
    low, high = browser.run(inputs)
    assert 9 <= low <= 12 and 29 <= high <= 32
    assert all(low <= tick <= high for tick in browser.run(TICKS.format("x")))
    browser.run("document.querySelector('.range input').select()")
    browser.press(*"20", "\ue007")
    assert browser.run(inputs) == [20, high]
    browser.run("document.querySelector('.range button').focus()")
    browser.press(" ")
    assert browser.run(inputs) == [1, 40] and browser.run(LINES) == whole
    assert browser.complaints() == []


@pytest.mark.slow
@needs_chromium
def test_the_values_at_a_step_are_shown_to_the_mouse_and_told_to_the_keyboard(browser, page):
    browser.open(page, 1200, 800)
    tip = "figure:first-child .tip"
    visible = f"return getComputedStyle(document.querySelector('{tip}')).visibility"
    assert browser.run(visible) == "hidden"
    browser.move(at(box(browser, "figure:first-child .plot"), 0.5))
    assert browser.run(visible) == "visible"
    step = int(re.findall(r"^step (\d+)", text(browser, tip))[0])
    assert 19 <= step <= 22 and f"third: {50 / step:.4g}" in text(browser, tip)
    slider = "document.querySelector('figure:first-child input')"
    browser.run(f"{slider}.focus()")
    browser.press("\ue014")
    told = browser.run(f"return {slider}.getAttribute('aria-valuetext')")
    assert told.startswith(f"step {step + 1}; ") and f"third: {50 / (step + 1):.4g}" in told


@pytest.mark.slow
@needs_chromium
def test_curves_without_a_range_have_axes_too(browser, finished_run, tmp_path):
    """Flat ones, ones that differ in the last bit, one point, numbers at the ends of their type."""
    steps, values = (1, 2, 2**53), {"a": 1.0, "b": 0.0, "c": 5e-324, "d": -9e299, "e": 2**62}
    log = [{"step": step, **{f"eval_{k}": v for k, v in values.items()}} for step in steps]
    log += [{"step": 2**53, "eval_a": 1.0 + 2**-52, "eval_d": 9e299, "eval_point": 3}]
    page = page_of(copy_of(finished_run, tmp_path / "a", log))
    browser.open(tmp_path / "report.html", 1200, 800)
    ticks = browser.run("return [...document.querySelectorAll('.y')].map(y => y.children.length)")
    assert len(ticks) == len(page.data["curves"]) == 6 and all(2 <= count <= 9 for count in ticks)
    assert "NaN" not in browser.run("return document.body.innerHTML.replace(/<script.*/s, '')")
    assert browser.complaints() == []


@pytest.mark.slow
@needs_chromium
def test_without_its_script_the_page_still_tells_everything_in_tables(browser, page):
    page.write_text(page.read_text().replace("sha256-", "sha256-A"))
    browser.open(page, 360, 800)
    assert any("Content Security Policy" in told for told in browser.complaints())
    assert not browser.run("return document.querySelector('.plot')")
    assert "(40)" in browser.run("return document.querySelector('details table').innerText")


@pytest.mark.slow
@needs_chromium
def test_the_classes_of_a_run_open_and_show_which_was_taken_for_which(browser, page):
    browser.open(page, 1200, 800)
    classes = """
        return [...document.querySelectorAll('summary')]
            .filter(e => e.textContent.endsWith(', by class')).map(e => e.parentElement.innerText)
    """
    assert [told.split()[-2:] for told in browser.run(classes)] == [["by", "class"]] * 3
    browser.run("for (const details of document.querySelectorAll('details')) details.open = true")
    second = browser.run(classes)[1]
    assert "true \\ predicted" in second and f"{HOSTILE}\t0\t1" in second
    assert browser.complaints() == [] and browser.run("return document.title") != "it ran"
