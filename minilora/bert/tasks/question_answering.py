"""Where in a passage the answer to a question stands, or that it has none.

A passage longer than the model takes is read in windows that overlap, each an example of its own;
the question is never cut. A window that lacks the answer has its start and end at the first token,
[CLS], as BERT's authors did it for SQuAD 2. Files are SQuAD's json, or objects as the Hub has them;
a row's text is the question, its pair the passage, its label each right answer's start and words.

A span is a score and where in the passage it starts and ends, in characters; (score, 0, 0) is no
answer. B windows of a batch; T tokens, P of them of the passage.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForQuestionAnswering

from minilora.bert.examples import Arrays, Batch, Examples, Logits, Tokenizer, by_example
from minilora.bert.lines import bad, not_empty, parse_json, read_text
from minilora.bert.metrics import answer_scores, softmax
from minilora.bert.rows import (
    OBJECTS,
    Records,
    Row,
    check_suffix,
    read_objects,
    row_of,
)
from minilora.bert.tables import Source
from minilora.bert.tasks import Arguments, Predictions, set_labels
from minilora.bert.texts import arrays_of, token_spans, whole_encodings, windows
from minilora.errors import MiniloraError

Span = tuple[float, int, int]

# As in transformers' run_qa.py: tokens of an answer at most, and answers kept of a passage.
MAX_ANSWER_LENGTH, N_BEST = 30, 20

# What the head's two outputs are of, where each training question has an answer, and where not.
ANSWER = ["start", "end"]
ANSWER_OR_NONE = ["start or none", "end or none"]


class QuestionAnswering:
    """Cross entropies of logits (..., 2), of starts and of ends, over the tokens of a window."""

    name = "question_answering"
    auto_class = AutoModelForQuestionAnswering
    peft_task_type = "QUESTION_ANS"
    foreign_outputs = range(2, 3)
    pipeline_tag = "question-answering"
    logits_of = "tokens"
    trainer_averages = True

    def __init__(self, arguments: Arguments, labels: list[str] | None) -> None:
        self.labels = labels or ANSWER
        self.doc_stride = arguments.doc_stride
        self.hf_parity = arguments.hf_parity

    @staticmethod
    def read_rows(path: Source, arguments: Arguments, labelled: bool) -> Iterator[Row]:
        """Questions, numbered by line, or in a .json file from 1."""
        is_squad = check_suffix(path, OBJECTS) == ".json" and read_text(path).lstrip()[:1] == "{"
        records = _of_squad(path) if is_squad else read_objects(path)
        for record in not_empty(path, records(), "question"):
            yield _row(path, *record, arguments, labelled)

    @staticmethod
    def find_labels(rows: Iterable[Row], path: str) -> list[str]:
        has_answer = {bool(row.label) for row in rows}
        if True not in has_answer:
            raise MiniloraError(f"{path} has no question with an answer: nothing to find")
        return ANSWER_OR_NONE if False in has_answer else ANSWER

    def configure(self, config: Any) -> None:
        set_labels(config, self.labels)

    def encode(self, rows: list[Row], tokenizer: Tokenizer, max_length: int, place: str) -> Arrays:
        """labels (N, 2), tokens of a window; `spans` (total tokens, 2), where in the passage a
        token starts and ends, in characters, and (-1, -1) of one that is not of it.
        """
        found = []  # a window's ids, token types, spans, labels, row
        for index, encoding in enumerate(whole_encodings(rows, tokenizer, max_length)):
            spans = token_spans(encoding, rows[index].pair or "", 1)
            is_passage = spans[:, 0] >= 0
            room = max_length - (~is_passage).sum()
            if room < 1:
                left = f"{max_length - room} tokens with the special ones, and max_length is"
                problem = f"the question has {left} {max_length}: none are left for the passage"
                raise bad(place, rows[index].line, problem)
            ids, types = np.array(encoding.ids), np.array(encoding.type_ids)
            answer = _places(rows[index], spans)
            for at in windows(is_passage, max_length, min(self.doc_stride, room // 2)):
                is_whole = len(answer) and np.isin(answer[[0, -1]], at).all()
                places = np.searchsorted(at, answer[[0, -1]]) if is_whole else (0, 0)
                found.append((ids[at], types[at], spans[at], places, index))
        ids, types, spans, labels, owners = zip(*found, strict=True)
        # PEFT 0.21's PeftModelForQuestionAnswering takes token_type_ids and leaves them out.
        takes_types = "token_type_ids" in tokenizer.model_input_names and not self.hf_parity
        arrays = arrays_of(ids, types if takes_types else None, owners)
        return arrays | {"labels": np.array(labels), "spans": np.concatenate(spans)}

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The mean of both, as `BertForQuestionAnswering.forward` computes it. There an answer may
        lie in the padding, too, and so it may with `hf_parity`, but not otherwise.
        """
        if "place" in batch:  # packed: (N, 2) -> (B, T, 2)
            lengths = batch["lengths"].tolist()
            apart = list(logits[: sum(lengths)].split(lengths))
            logits = pad_sequence(apart, batch_first=True, padding_value=-torch.inf)[batch["place"]]
        elif not self.hf_parity:
            logits = logits.masked_fill(batch["attention_mask"][..., None] == 0, -torch.inf)
        start, end = (each.contiguous() for each in logits.unbind(dim=-1))  # (B, T) each
        labels = batch["labels"]
        if "place" not in batch:  # places of tokens, which padding on the left moves
            labels = labels + batch["attention_mask"].argmax(dim=1, keepdim=True)
        return (F.cross_entropy(start, labels[:, 0]) + F.cross_entropy(end, labels[:, 1])) / 2

    training_loss = loss

    def loss_weight(self, batch: Batch) -> int:
        return len(batch["labels"])

    def scorer(self, rows: Sequence[Row], examples: Examples) -> "AnswerScorer":
        return AnswerScorer(self, rows, examples)

    def predictions(self, rows: list[Row], examples: Examples, logits: Logits) -> Predictions:
        """The best answer to each question, and all that were kept, with their shares of what their
        scores' exponentials are together.
        """
        spans, found = examples.apart("spans"), []
        best = [best_spans(*window) for window in zip(logits, spans, strict=True)]
        for row, kept in zip(rows, self.answers(rows, examples, best), strict=True):
            answers, shares = [], softmax(np.array([score for score, *_ in kept])).tolist()
            for (_, start, end), share in zip(kept, shares, strict=True):
                words = (row.pair or "")[start:end]
                answers.append({"answer": words, "score": share, "start": start, "end": end})
            found.append({**row.fields, **answers[0], "answers": answers})
        return found

    def answers(
        self, rows: Sequence[Row], examples: Examples, best: list[list[Span]]
    ) -> Iterator[list[Span]]:
        """The answers to each row's question, best first, from the `best_spans` of each window.

        Only where training had questions without one is none among them: the best if it scores
        above all spans in every window, as in run_qa.py.
        """
        edges = np.searchsorted(examples.row, np.arange(len(rows) + 1))
        for first, end in pairwise(edges.tolist()):
            spans = sorted(span for window in best[first:end] for span in window[1:])
            # Two windows may have the same words.
            kept = sorted({span[1:]: span for span in spans}.values(), reverse=True)[:N_BEST]
            if self.labels == ANSWER_OR_NONE or not kept:
                kept.append(min(window[0] for window in best[first:end]))
            yield sorted(kept, key=lambda span: span[0], reverse=True)


class AnswerScorer:
    """exact_match and f1; where some questions have no answer, under SQuAD's names of each kind's,
    too.
    """

    def __init__(self, task: QuestionAnswering, rows: Sequence[Row], examples: Examples) -> None:
        self.task, self.rows, self.examples = task, rows, examples
        self.spans = examples.apart("spans")
        self.best: list[list[Span]] = [[] for _ in self.spans]

    def add(self, logits: Tensor, batch: Batch) -> None:
        apart = by_example(logits.numpy(), batch)
        for example, values in zip(batch["example"].tolist(), apart, strict=True):
            self.best[example] = best_spans(values, self.spans[example])

    def metrics(self) -> dict[str, float]:
        answers, scores = self.task.answers(self.rows, self.examples, self.best), []
        for row, ((_, start, end), *_) in zip(self.rows, answers, strict=True):
            found = (row.pair or "")[start:end]
            scores.append(answer_scores(found, [text for _, text in row.label]))
        exact, f1 = np.array(scores).T
        metrics = {"exact_match": exact.mean().item(), "f1": f1.mean().item()}
        has_answer = np.array([bool(row.label) for row in self.rows])
        for kind, chosen in (("HasAns", has_answer), ("NoAns", ~has_answer)):
            if chosen.any() and not has_answer.all():
                metrics[f"{kind}_exact"] = exact[chosen].mean().item()
                metrics[f"{kind}_f1"] = f1[chosen].mean().item()
        return metrics


def best_spans(logits: np.ndarray, spans: np.ndarray) -> list[Span]:
    """No answer, and behind it the best answers of a window, of all that there can be, from logits
    (T, 2) and where in the passage its tokens are, (T, 2).
    """
    inside, logits = np.flatnonzero(spans[:, 0] >= 0), logits.astype(np.float64)
    start, end = logits[inside].T  # (P,) each
    end = np.append(end, np.full(MAX_ANSWER_LENGTH, -np.inf))
    ends = np.lib.stride_tricks.sliding_window_view(end, MAX_ANSWER_LENGTH)[: len(inside)]
    scores = start[:, None] + ends  # (P, 30): of each first token and the last, so much later
    best = np.argsort(-scores, axis=None, kind="stable")[:N_BEST]
    best = best[np.isfinite(scores.flat[best])]
    first, later = np.unravel_index(best, scores.shape)
    places = spans[inside[first], 0].tolist(), spans[inside[first + later], 1].tolist()
    none = (logits[0].sum().item(), 0, 0)
    return [none, *zip(scores.flat[best].tolist(), *places, strict=True)]


def _places(row: Row, spans: np.ndarray) -> np.ndarray:
    """Which tokens hold any of the row's first answer; a character's may be several, or none."""
    if not row.label:
        return np.zeros(0, dtype=np.int64)
    first, text = row.label[0]
    is_passage = spans[:, 0] >= 0
    return np.flatnonzero(is_passage & (spans[:, 0] < first + len(text)) & (spans[:, 1] > first))


def _of_squad(path: Source) -> Records:
    """The questions of SQuAD's json, numbered, each with its passage."""
    squad = parse_json(path, 1, read_text(path))
    try:
        paragraphs = [part for article in squad["data"] for part in article["paragraphs"]]
        questions = [{"context": part["context"]} | qa for part in paragraphs for qa in part["qas"]]
    except (KeyError, TypeError) as error:
        layout = "data, a list with paragraphs, a list with context and qas, a list"
        raise MiniloraError(f"{path} is not built as SQuAD is ({layout}): {error!r}") from None
    return partial(enumerate, questions, 1)


def _row(
    path: Source, line: int, record: dict[str, Any], arguments: Arguments, labelled: bool
) -> Row:
    question, passage = arguments.text_column or "question", arguments.text_pair_column or "context"
    row = row_of(path, line, record, {"text": question, "pair": passage})
    if not row.text.strip() or not (row.pair or "").strip():
        raise bad(path, line, f"the {question} or the {passage} is empty")
    label = _answers(path, row, record, arguments.label_column or "answers") if labelled else None
    fields = {"id": record["id"]} if "id" in record else {}
    return row._replace(label=label, fields=fields)


def _answers(path: Source, row: Row, record: dict[str, Any], column: str) -> list[tuple[int, str]]:
    """Where each right answer starts, and its words; nothing if the question has none."""
    match record.get(column, record):
        case {"text": list(texts), "answer_start": list(starts)} if len(texts) == len(starts):
            pairs = list(zip(starts, texts, strict=True))  # the Hub's
        case list(answers) if all(isinstance(answer, dict) for answer in answers):  # SQuAD's
            pairs = [(answer.get("answer_start"), answer.get("text")) for answer in answers]
        case {"answer": "" | None}:
            pairs = []
        case {"answer": text, "answer_start": start}:
            pairs = [(start, text)]
        case _:
            raise bad(path, row.line, f"{column!r} is no list of text and answer_start")
    of = f"of the question {record.get('id', row.text[:60])!r}"
    if pairs and record.get("is_impossible"):
        raise bad(path, row.line, f"is_impossible is true {of}, which has an answer")
    for start, text in pairs:
        is_there = type(start) is int and start >= 0 and isinstance(text, str) and text != ""
        if not is_there or not (row.pair or "").startswith(text, start):
            found = f"the answer {str(text)[:60]!r} {of}"
            raise bad(path, row.line, f"{found} is not at {start!r} in its passage")
    return pairs
