"""Labelled text files read into rows: csv, tsv, json, jsonl. Every complaint names file and line.

    csv          comma-separated, RFC 4180 quoting
    tsv          tab-separated, no quoting: a quotation mark is a quotation mark
    json         an array of objects
    jsonl        one object per line

csv and tsv may lack a header; their columns are then called "0", "1", ... The first line is a
header if it contains the columns asked for by name, or, when none is asked for, if its label field
(the last) is no label seen below it. Where no labels are expected, a usual name of a text column
makes it one, too, and nothing else does in a file of a single column.
"""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.errors import MiniloraError
from minilora.reading import read_bytes

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")

# Names under which data sets commonly keep their columns (GLUE, the Hub's text-classification
# sets), tried in order when no column is given. The kind is optional; it splits the accuracy in the
# summary: "negation", "irony", ...
USUAL_NAMES = {
    "text": ["text", "sentence", "sentence1", "premise", "question1", "question", "review",
             "content", "tweet"],
    "pair": ["text_pair", "sentence2", "hypothesis", "question2", "passage"],
    "label": ["label", "labels", "class", "target", "score", "sentiment"],
    "kind": ["kind"],
}  # fmt: skip
Usual = dict[str, list[str]]
FLAGS = {"text": "text_column", "pair": "text_pair_column", "label": "label_column"}


@dataclass(frozen=True)
class Row:
    """One example as the file has it, and where."""

    text: str
    pair: str | None
    label: str | None
    """None where labels were not asked for."""
    kind: str | None
    line: int
    """Counted from 1; in a json array, the number of the object."""


@dataclass(frozen=True)
class Columns:
    """The columns that are asked for; None stands for the usual one."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None


USUAL = Columns()
Records = list[tuple[int, dict[str, Any]]]  # (line, value by column)


def read_rows(path: Path, columns: Columns = USUAL, labelled: bool = True) -> list[Row]:
    """All rows of a file, in its order.

    Args:
        labelled: whether each row has a label. If not, none is looked for, and a headerless file
            has its text first and its second text, if any, next.
    """
    text = _decoded(path)
    if path.suffix.lower() in (".json", ".jsonl"):
        records, usual = _objects(path, text), USUAL_NAMES
    else:
        records, usual = _lines(path, text, columns, labelled)
    if not records:
        raise MiniloraError(f"{path} is empty: it holds no example")
    usual = dict(usual)
    if columns.text is not None:
        # One text, if no pair is named, too: a "passage" beside a "review" is not asked for.
        usual["pair"] = []
    if not labelled:
        del usual["label"]
    found = _find_columns(path, records, columns, usual)
    return [_row(path, line, record, found) for line, record in records]


def _bad(path: Path, line: int, what: str) -> MiniloraError:
    return MiniloraError(f"{path}, line {line}: {what}")


def _decoded(path: Path) -> str:
    if path.suffix.lower() not in SUFFIXES:
        allowed = ", ".join(SUFFIXES)
        raise MiniloraError(f"{path} has the suffix {path.suffix!r}; allowed are {allowed}")
    data = read_bytes(path)
    try:
        return data.decode("utf-8-sig")  # Excel writes a byte order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = "not UTF-8; convert the file, for example with iconv"
        raise _bad(path, line, what) from None


def _lines(path: Path, text: str, asked: Columns, labelled: bool) -> tuple[Records, Usual]:
    rows = _tsv_lines(text) if path.suffix.lower() == ".tsv" else _csv_lines(path, text)
    if not rows:
        return [], USUAL_NAMES
    names, usual = rows[0][1], USUAL_NAMES
    for line, fields in rows:
        if len(fields) != len(names):
            what = f"{len(fields)} fields where the first line has {len(names)}"
            raise _bad(path, line, what)
    if _is_header(names, [fields[-1] for _, fields in rows[1:]], asked, labelled):
        rows = rows[1:]
    else:
        usual = _usual_places(path, len(names), asked, labelled)
        names = [str(number) for number in range(len(names))]
    return [(line, dict(zip(names, fields, strict=True))) for line, fields in rows], usual


def _tsv_lines(text: str) -> list[tuple[int, list[str]]]:
    # Not str.splitlines, which also splits at characters that occur inside sentences (U+2028,
    # U+0085).
    lines = enumerate(text.split("\n"), start=1)
    return [(number, line.rstrip("\r").split("\t")) for number, line in lines if line.strip()]


def _csv_lines(path: Path, text: str) -> list[tuple[int, list[str]]]:
    # The default refuses texts over 131,072 characters.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(iter([line + "\n" for line in text.split("\n")]), strict=True)
    rows, start = [], 1
    try:
        for fields in reader:
            if fields:
                rows.append((start, fields))
            start = reader.line_num + 1
    except csv.Error as error:
        raise _bad(path, start, f"not valid csv: {error}") from None
    return rows


def _is_header(first: list[str], last_below: list[str], asked: Columns, labelled: bool) -> bool:
    if asked != USUAL:
        given = {column for column in (asked.text, asked.pair, asked.label) if column is not None}
        named = {column for column in given if not column.isdecimal()}
        return bool(named) and named <= set(first)
    named_as_usual = any(name.lower() in USUAL_NAMES["text"] for name in first)
    if not labelled and (named_as_usual or len(first) == 1):
        # A single column of texts: only a usual name tells a header from a text.
        return named_as_usual
    are_numbers = all(map(is_number, [first[-1], *last_below]))
    return first[-1] not in last_below and not are_numbers


def is_number(value: str) -> bool:
    """Whether a field holds a finite number."""
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _usual_places(path: Path, width: int, asked: Columns, labelled: bool) -> Usual:
    texts = width - 1 if labelled else min(width, 2)
    if asked == USUAL and not 1 <= texts <= 2:
        raise MiniloraError(
            f"{path} has no header and {width} fields where a text or two and a label are "
            f"expected: say which is which with --{', --'.join(FLAGS.values())} (numbers from 0)"
        )
    pair = ["1"] if asked == USUAL and texts == 2 else []
    return {"text": ["0"], "pair": pair, "label": [str(width - 1)]}


def _objects(path: Path, text: str) -> Records:
    if path.suffix.lower() == ".json":
        array = _parsed(path, 1, text)
        if not isinstance(array, list):
            found = type(array).__name__
            raise MiniloraError(f"{path} holds a JSON {found}: it must be an array of objects")
        records = list(enumerate(array, start=1))
    else:
        lines = enumerate(text.split("\n"), start=1)
        records = [(number, _parsed(path, number, line)) for number, line in lines if line.strip()]
    for line, record in records:
        if not isinstance(record, dict):
            found = type(record).__name__
            raise _bad(path, line, f"a JSON {found} where an object is expected")
    return records


def _parsed(path: Path, line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad(path, line, f"not valid JSON: {error}") from None


def _find_columns(path: Path, records: Records, asked: Columns, usual: Usual) -> dict[str, str]:
    names = list(dict.fromkeys(name for _, record in records for name in record))
    lower = {name.lower(): name for name in reversed(names)}
    found = {}
    for role, candidates in usual.items():
        given, flag = getattr(asked, role, None), FLAGS.get(role)
        if given is not None and given not in names:
            raise MiniloraError(
                f"{path} has no column {given!r} (--{flag}); its columns are {', '.join(names)}"
            )
        column = given or next((lower[name] for name in candidates if name in lower), None)
        if column is not None:
            found[role] = column
        elif role in ("text", "label"):
            raise MiniloraError(
                f"{path} has none of the usual columns ({', '.join(candidates)}); its columns are "
                f"{', '.join(names)}: say which with --{flag}"
            )
    return found


def _row(path: Path, line: int, record: dict[str, Any], columns: dict[str, str]) -> Row:
    values: dict[str, str | None] = dict.fromkeys(USUAL_NAMES)
    for role, column in columns.items():
        if column not in record:
            has = f"the line has the fields {', '.join(record)}"
            raise _bad(path, line, f"no {role} (column {column!r}); {has}")
        value = record[column]
        if value is None or isinstance(value, dict | list):
            raise _bad(path, line, f"the {role} is {value!r}; it must be text or a number")
        values[role] = str(value).lower() if isinstance(value, bool) else str(value)
    text, label = values["text"], values["label"]
    assert text is not None
    if label is not None and label.strip().lower() in ("", "nan"):
        raise _bad(path, line, f"the label is {label!r}; every example needs one")
    return Row(text, values["pair"], label and label.strip(), values["kind"], line)
