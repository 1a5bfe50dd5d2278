"""A tag for each token of a text: names of people, places, and so on.

A token here is a word of the file; its sub-tokens are the model's. The first sub-token carries the
tag. A word that has none, because its text was cut, or because the tokenizer leaves nothing of it,
is tagged O, in the metrics, too.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForTokenClassification

from minilora.bert.examples import NO_LABEL, Arrays, Batch, Examples, Logits, Tokenizer, by_example
from minilora.bert.lines import bad, lines_of, not_empty
from minilora.bert.metrics import entity_spans, precision_recall_f1, scores_by_class, softmax
from minilora.bert.rows import (
    OBJECTS,
    Row,
    check_suffix,
    read_objects,
    read_texts,
    text_of,
)
from minilora.bert.tables import Records, Source
from minilora.bert.tasks import (
    Arguments,
    Predictions,
    set_labels,
    smoothed_cross_entropy,
    unknown_label,
)
from minilora.bert.texts import check_fast, token_spans, tokenized
from minilora.errors import MiniloraError

COLUMNS = (".conll", ".txt", ".iob", ".bio")  # a token a line, a blank line between sentences
UNFINISHED = re.compile(r"|[BIES]-")
# What BERT's basic tokenizer takes for Chinese, each character a word.
CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"
WORDS = re.compile(f"[{CHINESE}]|[^{CHINESE}]+")


class TokenClassification:
    """Cross entropy of logits (..., C): the operations of `BertForTokenClassification.forward`."""

    name = "token_classification"
    auto_class = AutoModelForTokenClassification
    peft_task_type = "TOKEN_CLS"
    foreign_outputs = range(1, 2**31)
    pipeline_tag = "token-classification"
    logits_of = "tokens"

    def __init__(self, arguments: Arguments, labels: list[str] | None) -> None:
        assert labels is not None
        self.labels = labels
        self.label_smoothing = arguments.label_smoothing_factor
        self.label_all_tokens = arguments.label_all_tokens

    @staticmethod
    def read_rows(path: Source, arguments: Arguments, labelled: bool) -> Iterator[Row]:
        """Columns, of which the first is the token and the last the tag, or objects with tokens and
        tags, or ner_tags; to be predicted, also texts.
        """
        suffix = check_suffix(path, COLUMNS + OBJECTS) if labelled else path.suffix.lower()
        if suffix in COLUMNS:
            return not_empty(path, _sentences(path, labelled), "sentence")
        records = read_objects(path) if suffix in OBJECTS else partial(iter, ())
        name = arguments.text_column or "tokens"
        if labelled or any(isinstance(record.get(name), list) for _, record in records()):
            return not_empty(path, _objects(path, records, arguments, labelled), "sentence")
        return read_texts(path, arguments, labelled)

    @staticmethod
    def find_labels(rows: Iterable[Row], path: str) -> list[str]:
        labels = sorted({tag for row in rows for tag in row.label})
        if len(labels) < 2:
            raise MiniloraError(f"{path} has a single tag, {labels[0]!r}: nothing to tell apart")
        return labels

    def configure(self, config: Any) -> None:
        set_labels(config, self.labels)

    def encode(self, rows: list[Row], tokenizer: Tokenizer, max_length: int, place: str) -> Arrays:
        """`word` (total tokens,): of which word a sub-token is the first, else -1."""
        check_fast(tokenizer)
        encoded, arrays = tokenized(rows, tokenizer, max_length)
        words, labels = [], []
        for row, encoding in zip(rows, encoded.encodings, strict=True):
            owner = _owners(row, token_spans(encoding, row.text, 0))
            # Between two sub-tokens of a word there is no other.
            is_first = (owner >= 0) & (owner != np.concatenate([[-1], owner[:-1]]))
            words.append(np.where(is_first, owner, -1))
            labels.append(np.full(len(owner), NO_LABEL))
            if row.label is not None:
                first, rest = self._ids(row, place)
                labels[-1][owner >= 0] = np.where(is_first, first[owner], rest[owner])[owner >= 0]
        return arrays | {"labels": np.concatenate(labels), "word": np.concatenate(words)}

    def _ids(self, row: Row, place: str) -> np.ndarray:
        """Of each word's first sub-token, and of its others, which begin no entity: (2, words)."""
        ids, found = {label: index for index, label in enumerate(self.labels)}, []
        for token, tag in zip(row.fields["tokens"], row.label, strict=True):
            if tag not in ids:
                what = f"token {len(found) + 1}, {token!r}, has the tag {tag!r}, which"
                raise unknown_label(place, _line(place, row.line, len(found)), what, self.labels)
            inside = ids.get(re.sub("^B-", "I-", tag), ids[tag])
            found.append((ids[tag], inside if self.label_all_tokens else NO_LABEL))
        return np.array(found).T

    def training_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        if self.label_smoothing == 0 or self.loss_weight(batch) == 0:
            return self.loss(logits, batch)
        return smoothed_cross_entropy(logits, batch["labels"], self.label_smoothing)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        if self.loss_weight(batch) == 0:
            return logits.sum() * 0  # a mean over no token would be NaN
        return F.cross_entropy(logits.view(-1, len(self.labels)), batch["labels"].view(-1))

    def loss_weight(self, batch: Batch) -> int:
        return int((batch["labels"] != NO_LABEL).sum())

    def scorer(self, rows: Sequence[Row], examples: Examples) -> "EntityScorer":
        return EntityScorer(self, rows, examples)

    def tags(self, row: Row, word: np.ndarray, logits: np.ndarray) -> tuple[list[str], list[float]]:
        """The tag of each word of a row and its probability, from logits (T, C) and word (T,)."""
        words = len(_spans(row))
        tags, scores = ["O"] * words, [1.0] * words
        probabilities = softmax(logits[word >= 0])
        best = probabilities.argmax(axis=-1)
        for place, label, values in zip(word[word >= 0], best, probabilities, strict=True):
            tags[place], scores[place] = self.labels[label], float(values[label])
        return tags, scores

    def predictions(self, rows: list[Row], examples: Examples, logits: Logits) -> Predictions:
        """Entities with their places in the text, which of tokens is these joined by spaces."""
        found = []
        for row, values, word in zip(rows, logits, examples.apart("word"), strict=True):
            tags, scores = self.tags(row, word, values)
            spans, entities = _spans(row), []
            for kind, first, last in sorted(entity_spans(tags), key=lambda entity: entity[1]):
                label = kind if tags[first][1:2] == "-" else tags[first]
                start, end = int(spans[first, 0]), int(spans[last, 1])
                mean = float(np.mean(scores[first : last + 1]))
                entity = {"label": label, "score": mean, "start": start, "end": end}
                entities.append({**entity, "text": row.text[start:end]})
            own = {"tokens": row.fields["tokens"], "tags": tags} if row.fields else {}
            found.append({"entities": entities, **own})
        return found


class EntityScorer:
    """precision, recall, f1 of entities, and accuracy of tags: seqeval's, in its default mode."""

    def __init__(self, task: TokenClassification, rows: Sequence[Row], examples: Examples) -> None:
        self.task, self.rows, self.examples = task, rows, examples
        self.words = examples.apart("word")
        self.correct_tags, self.count = 0, 0
        # Entities by name: those found that are right, those found, those that are there.
        self.correct, self.predicted, self.actual = Counter(), Counter(), Counter()

    def add(self, logits: Tensor, batch: Batch) -> None:
        apart = by_example(logits.numpy(), batch)
        for example, values in zip(batch["example"].tolist(), apart, strict=True):
            row = self.rows[int(self.examples.row[example])]
            tags, _ = self.task.tags(row, self.words[example], values)
            self.correct_tags += sum(map(str.__eq__, tags, row.label))
            self.count += len(tags)
            found, there = entity_spans(tags), entity_spans(row.label)
            self.correct.update(kind for kind, *_ in found & there)
            self.predicted.update(kind for kind, *_ in found)
            self.actual.update(kind for kind, *_ in there)

    def metrics(self) -> dict[str, float]:
        counts = (self.correct.total(), self.predicted.total(), self.actual.total())
        return precision_recall_f1(*counts) | {"accuracy": self.correct_tags / self.count}

    def by_class(self) -> dict[str, dict[str, float]]:
        names = sorted(self.predicted | self.actual)
        counts = (self.correct, self.predicted, self.actual)
        return scores_by_class(names, *([count[name] for name in names] for count in counts))


def _sentences(path: Source, labelled: bool) -> Iterator[Row]:
    tokens, tags, start, width = [], [], 1, 0
    for line, text in chain(lines_of(path), [(0, "")]):
        text = text.removeprefix("\ufeff")  # of a file that was appended to another
        # Not str.split, which also splits inside tokens, at U+00A0 and U+2028.
        between = "\t" if "\t" in text else " +"
        fields = [field.strip(" ") for field in re.split(between, text.strip(" \r"))]
        if not text.strip() or fields[0] == "-DOCSTART-":
            if tokens:
                yield _row(path, start, tokens, tags if labelled else None)
            tokens, tags = [], []
        elif labelled and len(fields) < 2:
            raise bad(path, line, f"{text!r} is one field; a token and its tag are expected")
        elif not labelled and width not in (0, len(fields)):
            found = f"{len(fields)} fields where the first line has {width}"
            raise bad(path, line, f"{found}; texts that are no columns go into a csv or jsonl file")
        else:
            start, width = start if tokens else line, len(fields)
            tokens.append(fields[0])
            tags.append(fields[-1].strip())


def _objects(path: Source, records: Records, arguments: Arguments, labelled: bool) -> Iterator[Row]:
    are_hubs = any("ner_tags" in record and "tags" not in record for _, record in records())
    usual = "ner_tags" if are_hubs else "tags"
    names = [arguments.text_column or "tokens", arguments.label_column or usual]
    for line, record in records():
        lists: list[Any] = [record.get(name) for name in names]
        for name, value in list(zip(names, lists, strict=True))[: 1 + labelled]:
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise bad(path, line, f"{name!r} is {value!r}; it must be a list of strings")
        yield _row(path, line, lists[0], lists[1] if labelled else None)


def _row(path: Source, line: int, tokens: list[str], tags: list[str] | None) -> Row:
    tokens = [text_of(path, line, "token", token) for token in tokens]
    if not tokens:
        raise bad(path, line, "the sentence has no token")
    if "" in tokens:
        place = tokens.index("")
        raise bad(path, _line(path, line, place), f"token {place + 1} is empty")
    if tags is not None and len(tags) != len(tokens):
        raise bad(path, line, f"{len(tokens)} tokens and {len(tags)} tags; each token needs one")
    for place, tag in enumerate(tags or [], start=1):
        if UNFINISHED.fullmatch(tag):
            where = _line(path, line, place - 1)
            raise bad(path, where, f"the tag {tag!r} of token {place} is unfinished")
    return Row(" ".join(tokens), None, tags, None, line, {"tokens": tokens})


def _line(path: Source | str, line: int, token: int) -> int:
    """The line of a sentence's token: in columns, each has its own."""
    return line + token if str(path).lower().endswith(COLUMNS) else line


def _spans(row: Row) -> np.ndarray:
    """Where in the row's text its words are: start and end, (words, 2).

    Those of a text are parted as BERT's basic tokenizer parts them, whichever the model's is: at
    white space, and around each mark of punctuation and each Chinese character.
    """
    if row.fields:
        lengths = np.array([len(token) for token in row.fields["tokens"]])
        ends = np.cumsum(lengths + 1) - 1
        return np.stack([ends - lengths, ends], axis=-1)
    from tokenizers.pre_tokenizers import BertPreTokenizer  # comes with transformers

    spans = []
    for run, (start, _) in BertPreTokenizer().pre_tokenize_str(row.text):
        spans += [(start + word.start(), start + word.end()) for word in WORDS.finditer(run)]
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _owners(row: Row, spans: np.ndarray) -> np.ndarray:
    """Of which word each sub-token is, by where it starts (`spans` (T, 2)); -1 of none."""
    starts, ends = spans.T
    words = np.concatenate([[[-1, -1]], _spans(row)])
    owner = np.searchsorted(words[:, 0], starts, side="right") - 1
    return np.where((starts < ends) & (starts < words[owner, 1]), owner - 1, -1)
