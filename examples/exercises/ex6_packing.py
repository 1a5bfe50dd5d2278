"""Exercise 6: packing. Three sentences as one row, without padding, and the same logits.

    padded    2 7 9 3 0 0        packed    2 7 9 3 2 5 3 2 8 8 6 9 3
              2 5 3 0 0 0        position  0 1 2 3 0 1 2 0 1 2 3 4 5
              2 8 8 6 9 3        segment   0 0 0 0 1 1 1 2 2 2 2 2 2

All layers but attention treat tokens one by one, and do not see what lies beside them. Three things
see the place: the position embeddings, attention, and the head, which reads each first token.

Build, in this order:

1. `pack`: the row, and for each token its segment and its position in its own sentence.
2. `may_see`: which token may attend to which.
3. `attend`: attention with its own hands, over segments.
4. `packed_logits`: a BERT's logits for each sentence from one row. Its encoder, `model.bert`, takes
   (1, N) tensors and, as attention_mask, a (1, 1, N, N) of booleans; of what it returns,
   last_hidden_state is (1, N, D). `model.bert.pooler` looks at place 0 of each sequence that it is
   given, (B, T, D) -> (B, D); `model.classifier` makes logits of it.

N tokens of the row; B sentences; D hidden; H heads; d = D / H.

Run: python -m pytest examples/exercises/test_packing.py
"""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Row:
    input_ids: Tensor  # (N,) int64
    position_ids: Tensor  # (N,) int64: place in its own sentence
    segments: Tensor  # (N,) int64: of which sentence
    first: Tensor  # (B,) int64: where in the row each sentence's first token is


def pack(sentences: list[list[int]]) -> Row:
    """The sentences end to end, in their order."""
    raise NotImplementedError


def may_see(segments: Tensor) -> Tensor:
    """(N, N) bool: whether token i (row) attends to token j (column)."""
    raise NotImplementedError


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V within each segment: (H, N, d) three times -> (H, N, d)."""
    raise NotImplementedError


def packed_logits(model: nn.Module, sentences: list[list[int]]) -> Tensor:
    """The logits of a BertForSequenceClassification, (B, C), from one row without padding."""
    raise NotImplementedError
