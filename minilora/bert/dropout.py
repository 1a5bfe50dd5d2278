"""Dropout that costs little on a CPU, and the random stream it draws from.

torch's own dropout draws each element's mask in a serial loop, about 6 ns apiece: for a 768 x 768
layer that is as long as the matrix product. Here a 16-bit word decides an element, four words to a
draw of numpy's SFC64: 0.6 ns. The stream is apart from torch's generator, its draws do not depend
on the number of threads, and its state is part of a checkpoint.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class MaskStream:
    """A stream of dropout masks: numpy's SFC64 (Chris Doty-Humphrey's), seeded."""

    def __init__(self, seed: int, rank: int = 0) -> None:
        self.seed, self.rank = seed, rank  # of several processes each has its own
        self.restart(0)

    def restart(self, step: int) -> None:
        """Begin anew, as a function of the seed and a step: for a run that was begun elsewhere."""
        self.generator = np.random.SFC64(
            np.random.SeedSequence([self.seed, step, *[self.rank] * (self.rank > 0)])
        )

    def keep(self, shape: torch.Size, p: float) -> Tensor:
        """A mask of `shape`, uint8: 0 with probability p, else 1."""
        count = math.prod(shape)
        draws = self.generator.random_raw(-(-count // 4))
        words = torch.from_numpy(draws.view(np.int16)[:count]).view(shape)
        # Dropped are the lowest p * 2^16 words, so that p is exact to 2^-17; words are signed.
        lowest_kept = round(p * 2**16) - 2**15
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
        """torch's `context_fn`: what to draw masks in, and what to draw the same masks again in."""
        return contextlib.nullcontext(), self.replayed_from(self.get_state())


class FastDropout(nn.Module):
    """`nn.Dropout` with masks from a `MaskStream`: x * mask / (1 - p) in training.

    `in_place`, where x has no other reader: it is what a layer's own `dense` has just made.
    """

    def __init__(self, p: float, mask_stream: MaskStream, in_place: bool = False) -> None:
        super().__init__()
        self.p = p
        self.mask_stream = mask_stream
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        mask = self.mask_stream.keep(x.shape, self.p).to(x.device)
        if self.in_place:
            return x.mul_(mask).mul_(1 / (1 - self.p))
        result: Any = _dropped(x, mask, 1 / (1 - self.p))
        result.made_of = (x.detach(), mask, 1 / (1 - self.p))
        return result


def _dropped(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return (x * mask).mul_(scale)


def made_again() -> contextlib.AbstractContextManager:
    """Inside, an operation that saves what a `FastDropout` gave, for its own backward pass, saves
    what that was made of, which is saved anyway: attention's probabilities, the x that query and
    value share. The product is made a second time, with the same bits.
    """

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else _dropped(*kept)

    return saved_tensors_hooks(lambda saved: getattr(saved, "made_of", saved), unpack)


def use_fast_dropout(model: nn.Module, mask_stream: MaskStream) -> None:
    """Replace every `nn.Dropout`, adapters' included; padded attention's is in torch's kernel."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                # BERT's LayerNorm(dropout(dense(x)) + residual)
                in_place = name == "dropout" and {"dense", "LayerNorm"} <= {*module._modules}
                replacement = FastDropout(child.p, mask_stream, in_place)
                module.add_module(name, replacement.train(child.training))
