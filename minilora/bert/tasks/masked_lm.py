"""Words told from those around them: pretraining continued, on texts without labels.

Texts are put end to end and cut in blocks of max_length, so that nothing is truncated and blocks
are full; with `line_by_line` each is an example. transformers' `run_mlm.py` has both, and the same
default, but drops what fills no block at the end of each 1,000 texts.

M masked tokens of a batch; V words of the tokenizer.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForMaskedLM

from minilora.bert.cache import mapped
from minilora.bert.examples import NO_LABEL, Arrays, Batch, Examples, Logits, Tokenizer
from minilora.bert.lines import lines_of, not_empty
from minilora.bert.rows import Columns, Row, read_rows
from minilora.bert.tables import Source
from minilora.bert.tasks import Arguments, Predictions
from minilora.bert.texts import UNCUT, tokenized
from minilora.errors import MiniloraError

PIECE = 2**18  # tokens for which masks are drawn at a time
EVALUATION = 2**64 - 1  # in the place of an epoch's number
CANDIDATES = 5  # for each mask


class MaskedLm:
    """Cross entropy of logits (M, V): the mean of `BertForMaskedLM.forward`, M of 0 included."""

    name = "masked_lm"
    labels = None
    auto_class = AutoModelForMaskedLM
    peft_task_type = None
    foreign_outputs = range(1)  # a head that the base has is not trained
    pipeline_tag = "fill-mask"
    logits_of = "masked tokens"

    def __init__(self, arguments: Arguments, labels: list[str] | None) -> None:
        self.line_by_line = arguments.line_by_line
        self.probability = arguments.mlm_probability
        self.seed = arguments.seed

    @staticmethod
    def read_rows(path: Source, arguments: Arguments, labelled: bool) -> Iterator[Row]:
        """The lines of a .txt file, or a column of the others. Where masks are to be drawn, rows
        have the label True, and blank texts are left out.
        """
        if path.suffix.lower() == ".txt":
            texts = ((line.rstrip("\r"), number) for number, line in lines_of(path))
        else:
            found = read_rows(path, Columns(arguments.text_column), labelled=False)
            texts = ((row.text, row.line) for row in found)
        texts = ((text, line) for text, line in texts if text.strip() or not labelled)
        rows = (Row(text, None, labelled or None, None, line) for text, line in texts)
        return not_empty(path, rows, "text")

    @staticmethod
    def find_labels(rows: Iterable[Row], path: str) -> None: ...

    def configure(self, config: Any) -> None: ...

    def encode(self, rows: list[Row], tokenizer: Tokenizer, max_length: int, place: str) -> Arrays:
        """Labels are the tokens that `vary` may mask, by an example's `mask_id` and `words`, V; or,
        of a text to be filled, its masks, written as `mask` says.
        """
        mask_id, mask = tokenizer.mask_token_id, str(tokenizer.mask_token)
        if not isinstance(mask_id, int):
            raise MiniloraError(f"the tokenizer {tokenizer.name_or_path!r} has no mask token")
        draws = rows[0].label is not None
        limit = UNCUT if draws and not self.line_by_line else max_length
        _, arrays = tokenized(rows, tokenizer, limit)
        ids = arrays["input_ids"]
        if draws:
            may = ~np.isin(ids, tokenizer.all_special_ids)
            arrays |= _blocks(arrays["lengths"], max_length) if limit == UNCUT else {}
            each = np.ones(len(arrays["row"]), dtype=np.int32)
            arrays["mask_id"], arrays["words"] = each * mask_id, each * len(tokenizer)
        else:
            may = ids == mask_id
            owner = np.repeat(arrays["row"], arrays["lengths"])[may]
            for row, kept in zip(rows, np.bincount(owner, minlength=len(rows)), strict=True):
                if not kept or kept != row.text.count(mask):
                    needs = f"each text needs a {mask}, and none beyond max_length, {max_length}"
                    raise MiniloraError(f"{place}, line {row.line}: {needs}")
            arrays["mask"] = np.full(len(rows), mask)
        arrays["labels"] = np.where(may, ids, np.int32(NO_LABEL))
        return arrays

    def vary(self, examples: Examples, epoch: int | None) -> Examples:
        """Each token that may be is chosen with `probability`, a short text's perhaps none; of 10
        chosen ones 8 become the mask and 1 any word, as in arXiv:1810.04805, A.1, and transformers'
        DataCollatorForLanguageModeling.

        One number of 64 bits for each token, of a generator that counts, says it all: the upper
        half whether, the lower half what. Unlike other draws, numpy keeps these for good.
        """
        key = np.array([self.seed, EVALUATION if epoch is None else epoch], dtype=np.uint64)
        mask_id, words = (int(examples.extra[name][0]) for name in ("mask_id", "words"))

        def pieces() -> Iterator[Arrays]:
            numbers = np.random.Philox(key=key)
            for start in range(0, len(examples.input_ids), PIECE):
                ids = examples.input_ids[start : start + PIECE].copy()
                labels = examples.labels[start : start + PIECE]
                drawn = numbers.random_raw(len(ids))
                chosen = (drawn >> 32 < self.probability * 2**32) & (labels != NO_LABEL)
                word, tenth = np.divmod((drawn[chosen] % 2**32).astype(np.int64), 10)
                new = np.select([tenth < 8, tenth == 8], [mask_id, word % words], ids[chosen])
                ids[chosen] = new
                yield {"input_ids": ids, "labels": np.where(chosen, labels, np.int32(NO_LABEL))}

        arrays = mapped(None, pieces)
        if epoch is None and (arrays["labels"] == NO_LABEL).all():
            raise MiniloraError("evaluation: of so little text no token was masked; give more")
        return dataclasses.replace(examples, **arrays)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        raised = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(raised, batch["labels"], reduction="sum")
        return total / max(1, len(logits))

    training_loss = loss

    def loss_weight(self, batch: Batch) -> int:
        return len(batch["labels"])

    def scorer(self, rows: Sequence[Row], examples: Examples) -> "WordScorer":
        return WordScorer()

    def condense(self, logits: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
        """The likeliest words of each mask, {"token", "score"}: logits (M, V) -> (M,) lists."""
        likeliest = torch.from_numpy(logits).double().softmax(dim=-1).topk(CANDIDATES)
        found = np.empty(len(logits), dtype=object)
        for mask, (scores, ids) in enumerate(zip(*map(Tensor.tolist, likeliest), strict=True)):
            tokens = [str(tokenizer.decode([index])).strip() for index in ids]
            pairs = zip(tokens, scores, strict=True)
            found[mask] = [{"token": token, "score": score} for token, score in pairs]
        return found

    def predictions(self, rows: list[Row], examples: Examples, logits: Logits) -> Predictions:
        found, mask = [], str(examples.extra["mask"][0])
        for row, masks in zip(rows, logits, strict=True):
            text, *rest = row.text.split(mask)
            end, fills = len(text), []
            for candidates, after in zip(masks, rest, strict=True):
                place = {"start": end, "end": end + len(mask)}
                fills.append({**candidates[0], **place, "candidates": candidates})
                text += candidates[0]["token"] + after
                end += len(mask) + len(after)
            found.append({"fills": fills, "text": text})
        return found


class WordScorer:
    """accuracy and perplexity, e to the mean loss, of the masked tokens."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)  # of losses, right words, words

    def add(self, logits: Tensor, batch: Batch) -> None:
        right = logits.argmax(dim=-1) == batch["labels"]
        loss = F.cross_entropy(logits, batch["labels"], reduction="sum")
        self.sums += torch.stack([loss, right.sum(), torch.tensor(len(right))])

    def metrics(self) -> dict[str, float]:
        loss, right, words = self.sums
        return {"accuracy": (right / words).item(), "perplexity": (loss / words).exp().item()}


def _blocks(lengths: np.ndarray, size: int) -> Arrays:
    # Texts of these lengths, end to end, cut anew; a block is of the row in which it begins.
    ends = np.cumsum(lengths)
    starts = np.arange(0, ends[-1], size)
    row, cut = np.searchsorted(ends, starts, side="right"), np.zeros(len(starts), dtype=bool)
    return {"lengths": np.diff(starts, append=ends[-1]), "row": row, "truncated": cut}
