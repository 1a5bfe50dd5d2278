"""Labelled data read into rows. Every complaint names file and line.

    csv          comma-separated, RFC 4180 quoting
    tsv          tab-separated, no quoting: a quotation mark is a quotation mark
    json, jsonl  an array of objects; one object per line; parquet, a table of them (`tables`)

csv and tsv may lack a header; their columns are then called "0", "1", ... The first line is a
header if it contains the columns asked for by name, or, when none is asked for, if its label field
(the last) is no label seen below it. Where no labels are expected, a usual name of a text column
makes it one, too, and nothing else does in a file of a single column, where each line is a text, a
blank one, too. Blank lines of other files are left out.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from minilora.bert.lines import (
    Lines,
    bad,
    csv_lines,
    lines_of,
    not_empty,
    parse_json,
    read_text,
    tsv_lines,
)
from minilora.bert.tables import OBJECTS, Records, Source, Table, read_parquet
from minilora.errors import MiniloraError

# Where data sets keep their columns (GLUE, the Hub's), tried in order when none is given. The kind
# is optional; it splits the accuracy in the summary: "negation", "irony", ...
USUAL_NAMES = {
    "text": ["text", "sentence", "sentence1", "premise", "question1", "question", "review",
             "content", "tweet"],
    "pair": ["text_pair", "sentence2", "hypothesis", "question2", "passage"],
    "label": ["label", "labels", "class", "target", "score", "sentiment"],
    "kind": ["kind"],
}  # fmt: skip
FLAGS = {"text": "--text_column", "pair": "--text_pair_column", "label": "--label_column"}


NOTHING: Mapping[str, Any] = MappingProxyType({})  # which all rows may share, for none can write


class Row(NamedTuple):
    """One example as the file has it, and where. There may be millions: a dataclass that is frozen
    takes three times as long to make.
    """

    text: str
    pair: str | None
    label: Any  # a str, or what the task's own reader makes of it; None if it was not asked for
    kind: str | None
    line: int  # from 1; in a json array, the number of the object
    fields: Mapping[str, Any] = NOTHING  # what else a task keeps of a row, as JSON


@dataclass(frozen=True)
class Columns:
    """The columns that are asked for; None stands for the usual one."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None
    labels: tuple[str, ...] = ()  # a column of 0 and 1 for each, instead of a label


USUAL = Columns()


def one_label(path: Source, line: int, value: Any) -> str:
    """The label of a row that has one."""
    label = text_of(path, line, "label", value).strip()
    if label.lower() in ("", "nan"):
        raise bad(path, line, f"the label is {label!r}; every example needs one")
    return label


def read_rows(
    path: Source,
    columns: Columns = USUAL,
    labelled: bool = True,
    label_of: Callable[[Source, int, Any], Any] = one_label,
) -> Iterator[Row]:
    """The rows of a file, in its order, each label as `label_of` makes it of file, line and value,
    with `columns.labels` of each one's. If not `labelled`, no label is looked for, and a headerless
    file has its text first and its second text, if any, next.

    The file is gone through more than once; of csv, tsv and jsonl memory holds a line at a time.
    """
    suffix = check_suffix(path, (".csv", ".tsv", *OBJECTS))
    if isinstance(path, Table) or suffix in OBJECTS:
        records = read_objects(path)
        names = list(dict.fromkeys(name for _, record in records() for name in record))
    else:
        records, names, columns = _by_column(path, columns, labelled)
    _, first = next(not_empty(path, records(), "example"))
    found = _find_columns(path, first, names, columns, labelled)
    for line, record in records():
        value: Any = {name: record.get(name) for name in columns.labels}
        value = value or record.get(found.get("label", ""))
        row = row_of(path, line, record, found)
        yield row._replace(label=label_of(path, line, value)) if labelled else row


def read_texts(path: Source, arguments: Any, labelled: bool) -> Iterator[Row]:
    """The same, with the columns named in a run's arguments."""
    label = arguments.label_column if labelled else None
    columns = Columns(arguments.text_column, arguments.text_pair_column, label)
    return read_rows(path, columns, labelled)


def check_suffix(path: Source, allowed: tuple[str, ...]) -> str:
    """The suffix of a file, which must be one of those."""
    suffix = path.suffix.lower()
    if suffix not in allowed:
        raise MiniloraError(f"{path} has the suffix {suffix!r}; allowed are {', '.join(allowed)}")
    return suffix


def _filled_lines(path: Path, labelled: bool) -> Lines:
    # Without blank lines, all as wide as the first.
    read = csv_lines if path.suffix.lower() == ".csv" else tsv_lines
    first = next((fields for _, fields in read(path) if _is_filled(fields)), [])
    # One text a line: whoever reads the predictions counts lines.
    is_single = not labelled and len(first) == 1
    for line, fields in read(path):
        if is_single or _is_filled(fields):
            fields = fields or [""]
            if len(fields) != len(first):
                raise bad(path, line, f"{len(fields)} fields where the first line has {len(first)}")
            yield line, fields


def _is_filled(fields: list[str]) -> bool:
    return len(fields) > 1 or bool("".join(fields).strip())


def _by_column(path: Path, asked: Columns, labelled: bool) -> tuple[Records, list[str], Columns]:
    # The records, their columns, and those asked for, by number where there is no header.
    first, names = next(_filled_lines(path, labelled), (0, []))
    labels = (fields[-1] for _, fields in islice(_filled_lines(path, labelled), 1, None))
    if not names:
        return partial(iter, ()), names, asked
    has_header = _is_header(names, labels, asked, labelled)
    if has_header:
        if twice := sorted({name for name in names if name and names.count(name) > 1}):
            raise bad(path, first, f"there are two columns {twice[0]!r}")
    else:
        asked = _by_number(path, len(names), asked, labelled)
        names = [str(number) for number in range(len(names))]

    def records() -> Iterator[tuple[int, dict[str, Any]]]:
        for line, fields in islice(_filled_lines(path, labelled), int(has_header), None):
            yield line, dict(zip(names, fields, strict=True))

    return records, names, asked


def _is_header(first: list[str], labels: Iterator[str], asked: Columns, labelled: bool) -> bool:
    if asked != USUAL:
        given = (asked.text, asked.pair, asked.label, *asked.labels)
        named = {column for column in given if column is not None and not column.isdecimal()}
        return bool(named) and named <= set(first)
    named_as_usual = any(name.lower() in USUAL_NAMES["text"] for name in first)
    if not labelled and (named_as_usual or len(first) == 1):
        return named_as_usual
    are_numbers = is_number(first[-1])
    for label in labels:
        if label == first[-1]:
            return False
        are_numbers = are_numbers and is_number(label)
    return not are_numbers


def is_number(value: str) -> bool:
    """Whether a field holds a finite number."""
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _by_number(path: Path, width: int, asked: Columns, labelled: bool) -> Columns:
    texts = width - 1 if labelled else min(width, 2)
    if asked == USUAL and not 1 <= texts <= 2:
        raise MiniloraError(
            f"{path} has no header and {width} fields where a text or two and a label are "
            f"expected: say which is which with {', '.join(FLAGS.values())} (numbers from 0)"
        )
    is_last = asked.label is None and labelled and not asked.labels
    label = str(width - 1) if is_last else asked.label
    pair = "1" if asked == USUAL and texts == 2 else asked.pair
    taken = (label, pair, *asked.labels)
    left = [str(number) for number in range(width) if str(number) not in taken]
    text = (left or ["0"])[0] if asked.text is None else asked.text
    return Columns(text, pair, label, asked.labels)


def read_objects(path: Source) -> Records:
    """The objects of an array or a table, numbered, or else of each line that is not blank: what
    goes through them, from the start each time it is called.
    """
    if path.suffix.lower() == ".parquet":
        return partial(iter, path.records if isinstance(path, Table) else read_parquet(path))
    if path.suffix.lower() == ".jsonl":
        return partial(_json_lines, path)
    array = parse_json(path, 1, read_text(path))
    if not isinstance(array, list):
        raise MiniloraError(f"{path} holds a JSON {type(array).__name__}, not an array")
    return partial(iter, [(n, _an_object(path, n, value)) for n, value in enumerate(array, 1)])


def _json_lines(path: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in lines_of(path):
        if line.strip():
            yield number, _an_object(path, number, parse_json(path, number, line))


def _an_object(path: Source, line: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad(path, line, f"a JSON {type(value).__name__} where an object is expected")
    return value


def _find_columns(
    path: Source, first: dict[str, Any], names: list[str], asked: Columns, labelled: bool
) -> dict[str, str]:
    lower = {name.lower(): name for name in reversed(names)}
    listed = ", ".join(f"{n} ({str(first.get(n))[:20]})" if n.isdecimal() else n for n in names)
    found, taken = {}, {asked.text, asked.pair, asked.label, *asked.labels}
    if lacking := [repr(name) for name in asked.labels if name not in names]:
        raise MiniloraError(f"{path} has no column {lacking[0]} (--label_columns); it has {listed}")
    # GLUE's QNLI: each alone is a usual name of a text.
    is_question_pair = "text" not in lower and {"question", "sentence"} <= lower.keys()
    if is_question_pair and asked.text is None and asked.pair is None:
        asked = replace(asked, text=lower["question"], pair=lower["sentence"])
    for role, usual in USUAL_NAMES.items():
        if role == "label" and (asked.labels or not labelled):
            continue
        given, flag = getattr(asked, role, None), FLAGS.get(role)
        if given is not None and given not in names:
            raise MiniloraError(f"{path} has no column {given!r} ({flag}); it has {listed}")
        if role == "pair" and asked.text is not None:
            usual = []  # with the text named, a "passage" beside a "review" is not asked for
        free = (lower[name] for name in usual if lower.get(name) not in (None, *taken))
        column = next(free, None) if given is None else given
        if column is not None:
            found[role] = column
        elif role in ("text", "label"):
            raise MiniloraError(
                f"{path} has none of the usual columns ({', '.join(usual)}); its columns are "
                f"{listed}: say which with {flag} (without a header, numbers from 0)"
            )
    roles = [role for role in FLAGS if role in found]
    if len({found[role] for role in roles}) < len(roles):
        given = ", ".join(f"{role} {found[role]!r}" for role in roles)
        raise MiniloraError(f"{path}: {given}: give each a column of its own")
    return found


def row_of(path: Source, line: int, record: dict[str, Any], columns: dict[str, str]) -> Row:
    """A row of what a record has in the columns: of its "text", "pair", "label" and "kind"."""
    values = {}
    for role, column in columns.items():
        if role == "kind" and record.get(column) is None:
            continue  # it is optional
        if column not in record:
            raise bad(path, line, f"no {role} (column {column!r}); it has {', '.join(record)}")
        if role != "label":
            values[role] = text_of(path, line, role, record[column])
    return Row(values["text"], values.get("pair"), None, values.get("kind"), line)


def text_of(path: Source, line: int, role: str, value: Any) -> str:
    """A value of a file as text: a number's, too."""
    if value is None or isinstance(value, dict | list):
        raise bad(path, line, f"the {role} is {value!r}; it must be text or a number")
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise bad(path, line, f"the {role} holds half of a surrogate pair: no character")
    return text
