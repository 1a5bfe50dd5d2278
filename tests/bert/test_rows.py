"""Files into rows: every format, with and without header, and one clear line for every bad one."""

import json

import pytest

from minilora import MiniloraError
from minilora.bert import rows as reading
from minilora.bert.rows import Columns


def read_rows(*arguments, **named):
    return list(reading.read_rows(*arguments, **named))


def write(tmp_path, name, text, encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


def triples(rows):
    return [(row.text, row.pair, row.label) for row in rows]


GOOD = [("it is good", None, "1"), ('a "bad", dull film', None, "0"), ("fine", None, "1")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'sentence,label\nit is good,1\n"a ""bad"", dull film",0\nfine,1\n'),
        ("a.csv", 'it is good,1\n"a ""bad"", dull film",0\nfine,1\n'),
        (
            "a.csv",
            '\ufeffsentence,label\r\nit is good,1\r\n"a ""bad"", dull film",0\r\n\r\nfine,1\r\n',
        ),
        ("a.tsv", 'sentence\tlabel\nit is good\t1\na "bad", dull film\t0\nfine\t1\n'),
        ("a.tsv", 'it is good\t1\na "bad", dull film\t0\nfine\t1'),
        ("a.tsv", 'label\tid\ttext\n1\t7\tit is good\n0\t8\ta "bad", dull film\n1\t9\tfine\n'),
        ("a.json", json.dumps([{"text": t, "label": int(y)} for t, _, y in GOOD])),
        ("a.jsonl", "\n".join(json.dumps({"label": y, "review": t}) for t, _, y in GOOD)),
        ("a.JSONL", "\n\n".join(json.dumps({"label": y, "text": t}) for t, _, y in GOOD) + "\n\n"),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name, text):
    assert triples(read_rows(write(tmp_path, name, text))) == GOOD


def test_pairs_are_found_by_name_and_by_position(tmp_path):
    expected = [("a", "b", "x"), ("c", "d", "y"), ("e", "f", "x")]
    named = "premise\thypothesis\tlabel\na\tb\tx\nc\td\ty\ne\tf\tx\n"
    assert triples(read_rows(write(tmp_path, "a.tsv", named))) == expected
    bare = "a\tb\tx\nc\td\ty\ne\tf\tx\n"
    assert triples(read_rows(write(tmp_path, "b.tsv", bare))) == expected


def test_columns_can_be_given_by_name_and_by_number(tmp_path):
    path = write(tmp_path, "a.csv", "mood,body,about\ngood,hello,you\nbad,bye,me\n")
    rows = read_rows(path, Columns(text="body", pair="about", label="mood"))
    assert triples(rows) == [("hello", "you", "good"), ("bye", "me", "bad")]
    path = write(tmp_path, "b.tsv", "good\thello\nbad\tbye\n")
    rows = read_rows(path, Columns(text="1", label="0"))
    assert triples(rows) == [("hello", None, "good"), ("bye", None, "bad")]


def test_a_line_separator_inside_a_sentence_does_not_split_it(tmp_path):
    path = write(tmp_path, "a.tsv", "one\u2028two\u0085three\t1\nfour\t0\nfive\t1\n")
    assert [row.text for row in read_rows(path)] == ["one\u2028two\u0085three", "four", "five"]


def test_numbers_below_a_number_are_labels_and_no_header(tmp_path):
    path = write(tmp_path, "a.tsv", "one\t3.5\ntwo\t4.25\nthree\t1\n")
    assert [row.label for row in read_rows(path)] == ["3.5", "4.25", "1"]


def test_a_csv_field_may_span_lines_and_be_long(tmp_path):
    long = "word " * 50_000
    path = write(tmp_path, "a.csv", f'text,label\n"two\nlines",1\n{long},0\nlast,1\n')
    rows = read_rows(path)
    assert [row.line for row in rows] == [2, 4, 5]
    assert rows[0].text == "two\nlines" and rows[1].text == long


def test_an_empty_text_is_an_example(tmp_path):
    assert read_rows(write(tmp_path, "a.tsv", "text\tlabel\n\t1\nx\t0\n"))[0].text == ""


def test_labels_are_optional_where_none_are_needed(tmp_path):
    rows = read_rows(write(tmp_path, "a.jsonl", '{"text": "hello"}'), labelled=False)
    assert triples(rows) == [("hello", None, None)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "x", r"suffix '\.txt'; allowed are \.csv, \.tsv, \.json, \.jsonl"),
        ("a.tsv", "", "a.tsv is empty"),
        ("a.tsv", "text\tlabel\n", "a.tsv is empty|label"),
        ("a.csv", "text,label\n", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.tsv", "body\tlabel\nhello\t1\n", "none of the usual columns .* body, label: say which"),
        (
            "a.tsv",
            "text\tlabel\nhello\t1\nbye\n",
            r"a\.tsv, line 3: 1 fields where the first line has 2",
        ),
        ("a.csv", "text,label\nhello,1\nbye,1,0\n", r"a\.csv, line 3: 3 fields"),
        (
            "a.tsv",
            "hello\t1\nbye\nend\t1\n",
            r"a\.tsv, line 2: 1 fields where the first line has 2",
        ),
        ("a.tsv", "text\tlabel\nhello\tnan\n", r"a\.tsv, line 2: the label is 'nan'"),
        ("a.tsv", "text\tlabel\nhello\t\nbye\t1\n", r"a\.tsv, line 2: the label is ''"),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": "b", "label": NaN}',
            "line 2: the label is 'nan'",
        ),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}', "line 2: no label .* it has text"),
        ("a.jsonl", '{"text": null, "label": 1}', "line 1: the text is None"),
        ("a.jsonl", '{"text": ["x"], "label": 1}', "line 1: the text is"),
        ("a.jsonl", '{"text": "a", "label": 1}\nnonsense', "line 2: not valid JSON"),
        ("a.jsonl", '"text"', "line 1: a JSON str where an object is expected"),
        ("a.json", '{"text": "a"}', "holds a JSON dict, not an array"),
        ("a.csv", 'text,label\n"open,1\n', r"a\.csv, line 2: not valid csv"),
        ("a.tsv", "a\tb\tc\td\t1\nx\ty\tz\tw\t1\n", "no header and 5 fields"),
    ],
)
def test_a_bad_file_is_one_line_with_its_place(tmp_path, name, text, message):
    with pytest.raises(MiniloraError, match=message) as caught:
        read_rows(write(tmp_path, name, text))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_utf_8_is_refused_with_its_line(tmp_path):
    path = write(tmp_path, "a.tsv", "text\tlabel\nfine\t1\ncaf\u00e9\t1\n", "latin-1")
    with pytest.raises(MiniloraError, match="line 3: not UTF-8"):
        read_rows(path)


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
    with pytest.raises(MiniloraError, match="cannot be read: No such file"):
        read_rows(tmp_path / "a.tsv")
    (tmp_path / "b.tsv").mkdir()
    with pytest.raises(MiniloraError, match="b.tsv is not a file"):
        read_rows(tmp_path / "b.tsv")


def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "a", "label": 1}')
    with pytest.raises(MiniloraError, match=r"no column 'body' \(--text_column\).*text, label"):
        read_rows(path, Columns(text="body"))
    path = write(tmp_path, "a.tsv", "a\t1\nb\t0\n")
    with pytest.raises(
        MiniloraError, match=r"no column 'body' \(--text_column\).* 0 \(a\), 1 \(1\)"
    ):
        read_rows(path, Columns(text="body"))


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("text\nso good\nbad\n", ["so good", "bad"]),
        ("so good\nbad\n", ["so good", "bad"]),
        ("so good\t1\nbad\t0\nfine\t1\n", ["so good", "bad", "fine"]),
        ("id\tsentence\n1\tso good\n2\tbad\n", ["so good", "bad"]),
    ],
)
def test_a_file_without_labels_has_a_header_where_a_text_column_is_named(content, texts, tmp_path):
    rows = read_rows(write(tmp_path, "a.tsv", content), labelled=False)
    assert [row.text for row in rows] == texts and not any(row.label for row in rows)


def test_a_file_without_labels_and_without_a_text_column_is_refused(tmp_path):
    with pytest.raises(MiniloraError, match="none of the usual columns .*columns are id, number"):
        read_rows(write(tmp_path, "a.tsv", "id\tnumber\n1\t2\n"), labelled=False)


def test_labels_that_are_not_asked_for_may_be_missing(tmp_path):
    rows = read_rows(write(tmp_path, "a.csv", "text,label\ngood,\nbad,1\n"), labelled=False)
    assert [row.text for row in rows] == ["good", "bad"]


def test_a_label_in_the_first_column_leaves_the_text_to_another(tmp_path):
    path = write(tmp_path, "a.tsv", "good\thello\nbad\tbye\n")
    assert triples(read_rows(path, Columns(label="0"))) == [
        ("hello", None, "good"),
        ("bye", None, "bad"),
    ]
    path = write(tmp_path, "b.tsv", "label\tsentence\nlabel\thello\n")
    assert triples(read_rows(path, Columns(label="sentence", text="label"))) == [
        ("label", None, "hello")
    ]


@pytest.mark.parametrize("columns", [Columns(text="0", label="0"), Columns(pair="0", text="0")])
def test_two_roles_of_one_column_are_refused(columns, tmp_path):
    path = write(tmp_path, "a.tsv", "good\thello\nbad\tbye\n")
    with pytest.raises(MiniloraError, match=r"a\.tsv: .*give each a column of its own"):
        read_rows(path, columns)


def test_a_question_and_a_sentence_are_a_pair(tmp_path):
    """GLUE's QNLI."""
    path = write(tmp_path, "a.tsv", "index\tquestion\tsentence\tlabel\n0\twho?\tme\tyes\n")
    assert triples(read_rows(path)) == [("who?", "me", "yes")]
    assert triples(read_rows(path, Columns(text="sentence"))) == [("me", None, "yes")]
    path = write(tmp_path, "b.tsv", "question\tlabel\nwho?\tyes\n")
    assert triples(read_rows(path)) == [("who?", None, "yes")]


def test_a_kind_may_be_missing(tmp_path):
    rows = [{"text": "a", "label": 1, "kind": None}, {"text": "b", "label": 0}]
    rows.append({"text": "c", "label": 0, "kind": "irony"})
    path = write(tmp_path, "a.json", json.dumps(rows))
    assert [row.kind for row in read_rows(path)] == [None, None, "irony"]


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
@pytest.mark.parametrize("head", ["", "text\n"])
def test_each_line_of_a_single_column_is_a_text(name, head, tmp_path):
    """Whoever reads the predictions counts lines."""
    path = write(tmp_path, name, f"{head}so good\n\nbad\r\n\r\n")
    texts = [row.text for row in read_rows(path, labelled=False)]
    assert texts == ["so good", "", "bad", ""]


def test_an_empty_text_beside_another_field_is_no_blank_line(tmp_path):
    path = write(tmp_path, "a.csv", "text,id\ngood,1\n,\n\nbad,3\n")
    assert [row.text for row in read_rows(path, labelled=False)] == ["good", "", "bad"]


def test_pairs_without_a_header_are_told_how_to_be_named(tmp_path):
    path = write(tmp_path, "a.tsv", "who?\tme\nwhat?\tthat\n")
    with pytest.raises(MiniloraError, match="--text_column .without a header, numbers from 0"):
        read_rows(path, labelled=False)
    rows = read_rows(path, Columns(text="0", pair="1"), labelled=False)
    assert triples(rows) == [("who?", "me", None), ("what?", "that", None)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "text\ttext\tlabel\na\tb\t1\n", "line 1: there are two columns 'text'"),
        ("a.csv", "text,label,label\na,1,0\n", "line 1: there are two columns 'label'"),
        ("a.jsonl", '{"text": "a", "text": "b", "label": 1}', "line 1: .*a name occurs twice"),
        ("a.jsonl", '{"text": "a \\ud800", "label": 1}', "line 1: the text holds half of"),
        ("a.json", '[{"text": "a", "label": "\\udfff"}]', "line 1: the label holds half of"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(name, text, message, tmp_path):
    with pytest.raises(MiniloraError, match=message):
        read_rows(write(tmp_path, name, text))
