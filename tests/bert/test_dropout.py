"""Fast dropout: its rate, its stream, its independence of everything else."""

import contextlib
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from transformers import set_seed

from minilora.bert.dropout import FastDropout, MaskStream, made_again, use_fast_dropout
from tests.conftest import tiny_classifier


@pytest.mark.parametrize("p", [0.1, 0.5, 0.001])
def test_the_rate_is_exact_to_a_ten_thousandth(p):
    """40 million draws, so that chance (4 sigma) is below the tolerance, too."""
    kept = MaskStream(1).keep(torch.Size((40, 1_000_000)), p).to(torch.float32).mean().item()
    assert abs((1 - kept) - p) < 1e-4 + 4 * (p * (1 - p) / 4e7) ** 0.5
    assert abs(round(p * 65536) / 65536 - p) < 1e-5


def test_what_is_kept_is_scaled_and_gradients_see_the_same_mask():
    dropout = FastDropout(0.25, MaskStream(2))
    x = torch.ones(1000, requires_grad=True)
    y = dropout(x)
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert dropout.eval()(x) is x and FastDropout(0.0, MaskStream(2))(x) is x


def test_masks_are_a_function_of_the_seed_alone():
    shape = torch.Size((77, 13))
    one, other = MaskStream(5), MaskStream(5)
    set_seed(0)
    first = one.keep(shape, 0.5)
    set_seed(1)
    torch.rand(3)
    assert torch.equal(other.keep(shape, 0.5), first)
    assert not torch.equal(MaskStream(6).keep(shape, 0.5), first)
    before = torch.get_rng_state()
    one.keep(shape, 0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_masks_do_not_depend_on_the_number_of_threads():
    code = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[1]))\n"
        "from minilora.bert.dropout import MaskStream\n"
        "mask = MaskStream(1).keep(torch.Size((1000, 1000)), 0.1)\n"
        "print((mask * torch.arange(1000)).sum().item(), mask.sum().item())"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code, threads], capture_output=True, check=True
        ).stdout
        for threads in ("1", "2")
    ]
    assert printed[0] == printed[1] != b""


def test_a_restored_stream_goes_on_with_the_same_masks(tmp_path):
    """Through a file that loads with plain weights_only=True."""
    stream, shape = MaskStream(9), torch.Size((5, 3))
    stream.keep(shape, 0.1)
    torch.save(stream.get_state(), tmp_path / "state")
    expected = [stream.keep(shape, 0.1) for _ in range(3)]
    other = MaskStream(0)
    other.set_state(torch.load(tmp_path / "state", weights_only=True))
    assert all(torch.equal(other.keep(shape, 0.1), mask) for mask in expected)


def test_every_dropout_of_a_model_is_replaced_in_its_mode():
    model = tiny_classifier().train()
    count = sum(isinstance(module, nn.Dropout) for module in model.modules())
    model.bert.eval()
    use_fast_dropout(model, MaskStream(0))
    fast = [module for module in model.modules() if isinstance(module, FastDropout)]
    assert len(fast) == count > 0
    assert not any(isinstance(module, nn.Dropout) for module in model.modules())
    assert model.dropout.training and not model.bert.embeddings.dropout.training


def test_what_dropout_gave_is_not_kept_but_made_again_with_the_same_bits():
    """Attention's dropped probabilities, a fifth of what a layer keeps at 128 tokens."""

    def through(how):
        torch.manual_seed(0)
        scores, values = (torch.randn(2, 5, 5, requires_grad=True) for _ in range(2))
        with how():
            dropped = FastDropout(0.5, MaskStream(4))(torch.softmax(scores, dim=-1))
            result = torch.bmm(dropped, values)
        alive = weakref.ref(dropped)
        del dropped
        is_kept = alive() is not None
        result.square().sum().backward()
        return is_kept, scores.grad, values.grad

    kept, made = through(contextlib.nullcontext), through(made_again)
    assert kept[0] and not made[0]
    for ours, theirs in zip(made[1:], kept[1:], strict=True):
        assert ours.count_nonzero() and torch.equal(ours, theirs)
