"""Dropout that costs little on a CPU, and the random stream it draws from.

torch's own dropout draws each element's mask in a serial loop, about 6 ns apiece: for a 768 x 768
layer that is as long as the matrix product. Here a 16-bit word decides an element, four words to a
draw of numpy's SFC64: 0.6 ns. The stream is apart from torch's generator, its draws do not depend on
the number of threads, and its state is part of a checkpoint.
"""

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

# An element is dropped if its 16-bit word is among the lowest p * 2^16: p is exact to 2^-17.
WORD_BITS = 16
WORDS_PER_DRAW = 64 // WORD_BITS


class MaskStream:
    """A stream of dropout masks: numpy's SFC64 (Chris Doty-Humphrey's), seeded."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.restart(0)

    def restart(self, step: int) -> None:
        """Begin anew, as a function of the seed and a step: what a run continues with that was begun
        elsewhere."""
        self.generator = np.random.SFC64(np.random.SeedSequence([self.seed, step]))

    def keep(self, shape: torch.Size, p: float) -> Tensor:
        """A mask of `shape`, uint8: 0 with probability p, else 1."""
        count = math.prod(shape)
        draws = self.generator.random_raw(-(-count // WORDS_PER_DRAW))
        words = torch.from_numpy(draws.view(np.int16)[:count]).view(shape)
        lowest_kept = round(p * 2**WORD_BITS) - 2 ** (WORD_BITS - 1)  # words are signed
        # A byte per element is a quarter of what torch's own masks of floats hold until backward.
        return torch.ge(words, lowest_kept, out=torch.empty(shape, dtype=torch.uint8))

    def get_state(self) -> Tensor:
        """The generator's four words, (4,) int64; it buffers nothing besides."""
        return torch.from_numpy(self.generator.state["state"]["state"].view(np.int64).copy())

    def set_state(self, state: Tensor) -> None:
        """Go on from what `get_state` returned."""
        whole = self.generator.state
        whole["state"]["state"] = state.numpy().view(np.uint64)
        self.generator.state = whole

    @contextlib.contextmanager
    def replayed_from(self, state: Tensor) -> Iterator[None]:
        """Inside, the masks that followed `state` once before; afterwards, the stream goes on."""
        here = self.get_state()
        self.set_state(state)
        try:
            yield
        finally:
            self.set_state(here)

    def checkpoint_contexts(self) -> tuple[contextlib.AbstractContextManager, ...]:
        """What to draw a layer's masks in, and what to draw them again in when it is recomputed."""
        return contextlib.nullcontext(), self.replayed_from(self.get_state())


class FastDropout(nn.Module):
    """`nn.Dropout` with masks from a `MaskStream`: x * mask / (1 - p) in training."""

    def __init__(self, p: float, mask_stream: MaskStream) -> None:
        super().__init__()
        self.p = p
        self.mask_stream = mask_stream

    def forward(self, x: Tensor) -> Tensor:
        return dropped(x, self)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def dropped(x: Tensor, dropout: nn.Module) -> Tensor:
    """x after `dropout`, an `nn.Dropout` or a `FastDropout`, of which only p and the mode count."""
    assert isinstance(dropout, (FastDropout, nn.Dropout))
    if not dropout.training or dropout.p == 0:
        return x
    if isinstance(dropout, nn.Dropout):
        return nn.functional.dropout(x, dropout.p)
    mask = dropout.mask_stream.keep(x.shape, dropout.p).to(x.device)
    return (x * mask).mul_(1 / (1 - dropout.p))


def use_fast_dropout(model: nn.Module, mask_stream: MaskStream) -> None:
    """Replace every `nn.Dropout` of the model, adapters' included.

    transformers' padded attention drops its probabilities inside torch's kernel: those masks stay
    torch's.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                replacement = FastDropout(child.p, mask_stream)
                replacement.train(child.training)
                module.add_module(name, replacement)
