"""Labelled text files read into rows: csv, tsv, json, jsonl. Every complaint names file and line.

    csv          comma-separated, RFC 4180 quoting
    tsv          tab-separated, no quoting: a quotation mark is a quotation mark
    json         an array of objects
    jsonl        one object per line

csv and tsv may lack a header. The first line is one if it contains the columns asked for by name,
or, when none is asked for, if its label field (the last) is no label seen below it. Where no labels
are expected, a usual name of a text column makes it one, too, and nothing else does in a file of a
single column.
"""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.errors import MiniloraError

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")

# Names under which data sets commonly keep their columns (GLUE, the Hub's text-classification
# sets), tried in order when no column is given.
TEXT_NAMES = (
    "text",
    "sentence",
    "sentence1",
    "premise",
    "question1",
    "question",
    "review",
    "content",
    "tweet",
)
PAIR_NAMES = ("text_pair", "sentence2", "hypothesis", "question2", "passage")
LABEL_NAMES = ("label", "labels", "class", "target", "score", "sentiment")
# An optional column that splits the accuracy in the summary: "negation", "irony", ...
KIND_NAME = "kind"


@dataclass(frozen=True)
class Row:
    """One example as the file has it, and where."""

    text: str
    pair: str | None
    label: str | None
    kind: str | None
    line: int
    """Counted from 1; in a json array, the number of the object."""


@dataclass(frozen=True)
class Columns:
    """Where in a record the parts of an example are: a name, or a number from 0 without header."""

    text: str | int
    pair: str | int | None
    label: str | int | None
    kind: str | int | None


def read_rows(
    path: Path,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    labelled: bool = True,
) -> list[Row]:
    """All examples of a file, in its order.

    Args:
        labelled: whether each row has a label. If not, none is looked for, and a headerless file has
            its text first and its second text, if any, next.

    Raises:
        MiniloraError: the file or a row cannot be used; names file and line, what was found, what
            is allowed.
    """
    text = _decoded(path)
    asked = [
        column for column in (text_column, text_pair_column, label_column) if column is not None
    ]
    if path.suffix.lower() in (".json", ".jsonl"):
        records = _json_records(path, text)
        names: list[str] | None = list(
            dict.fromkeys(name for _, record in records for name in record)
        )
    else:
        fields = _delimited(path, text)
        names = _header(fields, asked, labelled)
        records = [
            (line, _as_record(path, line, names, row)) for line, row in fields[1 if names else 0 :]
        ]
    if not records:
        raise MiniloraError(f"{path} is empty: it holds no example")
    columns = _find_columns(
        path, records[0][1], names, text_column, text_pair_column, label_column, labelled
    )
    return [_row(path, line, record, columns) for line, record in records]


def _decoded(path: Path) -> str:
    if path.suffix.lower() not in SUFFIXES:
        raise MiniloraError(
            f"{path} has the suffix {path.suffix!r}; allowed are {', '.join(SUFFIXES)}"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MiniloraError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")  # Excel writes a byte order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MiniloraError(
            f"{path}, line {line}: not UTF-8; convert the file, for example with iconv"
        ) from None


def _delimited(path: Path, text: str) -> list[tuple[int, list[str]]]:
    # Not str.splitlines, which also splits at characters that occur inside sentences (U+2028,
    # U+0085).
    if path.suffix.lower() == ".tsv":
        lines = enumerate(text.split("\n"), start=1)
        return [(number, line.rstrip("\r").split("\t")) for number, line in lines if line.strip()]
    csv.field_size_limit(
        max(csv.field_size_limit(), len(text))
    )  # the default refuses texts over 131,072 characters
    rows, first = [], 1
    reader = csv.reader(iter([line + "\n" for line in text.split("\n")]), strict=True)
    try:
        for row in reader:
            if row:
                rows.append((first, row))
            first = reader.line_num + 1
    except csv.Error as error:
        raise MiniloraError(f"{path}, line {first}: not valid csv: {error}") from None
    return rows


def _header(
    rows: list[tuple[int, list[str]]], asked: list[str], labelled: bool
) -> list[str] | None:
    if not rows:
        return None
    first = rows[0][1]
    names = [column for column in asked if not column.isdecimal()]
    if names:
        return first if all(name in first for name in names) else None
    if asked:
        return None  # columns given by number: there is no header
    named_as_usual = bool({name.lower() for name in first} & set(TEXT_NAMES))
    if not labelled and (named_as_usual or len(first) == 1):
        # A single column of texts: only a usual name tells a header from a text.
        return first if named_as_usual else None
    labels_below = {row[-1] for _, row in rows[1:]}
    if first[-1] in labels_below or (_is_number(first[-1]) and all(map(_is_number, labels_below))):
        return None
    return first


def _is_number(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _as_record(path: Path, line: int, names: list[str] | None, fields: list[str]) -> dict[Any, Any]:
    if names is None:
        return dict(enumerate(fields))
    if len(fields) != len(names):
        raise MiniloraError(
            f"{path}, line {line}: {len(fields)} fields where the header has {len(names)}"
        )
    return dict(zip(names, fields, strict=True))


def _json_records(path: Path, text: str) -> list[tuple[int, dict[Any, Any]]]:
    if path.suffix.lower() == ".json":
        document = _parsed(path, 1, text)
        if not isinstance(document, list):
            raise MiniloraError(
                f"{path} holds a JSON {type(document).__name__}: it must be an array of objects"
            )
        numbered = list(enumerate(document, start=1))
    else:
        lines = enumerate(text.split("\n"), start=1)
        numbered = [(number, _parsed(path, number, line)) for number, line in lines if line.strip()]
    for number, record in numbered:
        if not isinstance(record, dict):
            raise MiniloraError(
                f"{path}, line {number}: a JSON {type(record).__name__} where an object is expected"
            )
    return numbered


def _parsed(path: Path, line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MiniloraError(f"{path}, line {line}: not valid JSON: {error}") from None


def _find_columns(
    path: Path,
    first: dict[Any, Any],
    names: list[str] | None,
    text: str | None,
    pair: str | None,
    label: str | None,
    labelled: bool,
) -> Columns:
    if names is None:
        return _numbered_columns(path, len(first), text, pair, label, labelled)
    lower = {name.lower(): name for name in reversed(names)}

    def find(given: str | None, usual: tuple[str, ...], flag: str, required: bool) -> str | None:
        if given is not None:
            if given not in names:
                raise MiniloraError(
                    f"{path} has no column {given!r} (--{flag}); its columns are {', '.join(names)}"
                )
            return given
        found = next((lower[name] for name in usual if name in lower), None)
        if found is None and required:
            raise MiniloraError(
                f"{path} has none of the usual columns ({', '.join(usual)}); its columns are {', '.join(names)}: "
                f"say which with --{flag}"
            )
        return found

    found_text = find(text, TEXT_NAMES, "text_column", True)
    assert found_text is not None
    # With the text named and no pair named, there is one text: a "passage" beside a "review" is not
    # asked for.
    found_pair = find(pair, PAIR_NAMES if text is None else (), "text_pair_column", False)
    found_label = find(label, LABEL_NAMES, "label_column", True) if labelled else None
    return Columns(found_text, found_pair, found_label, KIND_NAME if KIND_NAME in names else None)


def _numbered_columns(
    path: Path, width: int, text: str | None, pair: str | None, label: str | None, labelled: bool
) -> Columns:
    given = {"text_column": text, "text_pair_column": pair, "label_column": label}
    for flag, column in given.items():
        if column is not None and not (column.isdecimal() and int(column) < width):
            raise MiniloraError(
                f"{path} has no header with {column!r} (--{flag}); its first line has {width} fields, numbered from 0"
            )
    if all(column is None for column in given.values()):
        parts = width - 1 if labelled else min(width, 2)
        if not 1 <= parts <= 2:
            raise MiniloraError(
                f"{path} has no header and {width} fields where a text or two and a label are "
                "expected: say which is which with --text_column, --text_pair_column, --label_column (numbers from 0)"
            )
        return Columns(0, 1 if parts == 2 else None, width - 1 if labelled else None, None)
    return Columns(
        int(text) if text is not None else 0,
        int(pair) if pair is not None else None,
        int(label) if label is not None else (width - 1 if labelled else None),
        None,
    )


def _row(path: Path, line: int, record: dict[Any, Any], columns: Columns) -> Row:
    def field(column: str | int | None, what: str) -> str | None:
        if column is None:
            return None
        if column not in record:
            found = (
                f"{len(record)} fields"
                if isinstance(column, int)
                else f"the fields {', '.join(map(str, record))}"
            )
            raise MiniloraError(
                f"{path}, line {line}: no {what} (column {column!r}); the line has {found}"
            )
        value = record[column]
        if value is None or isinstance(value, (dict, list)):
            raise MiniloraError(
                f"{path}, line {line}: the {what} is {value!r}; it must be text or a number"
            )
        return str(value).lower() if isinstance(value, bool) else str(value)

    text, pair = field(columns.text, "text"), field(columns.pair, "second text")
    label, kind = field(columns.label, "label"), field(columns.kind, "kind")
    assert text is not None
    if label is not None and label.strip().lower() in ("", "nan"):
        raise MiniloraError(f"{path}, line {line}: the label is {label!r}; every example needs one")
    return Row(text, pair, label.strip() if label is not None else None, kind, line)
