"""Training on a GPU: it learns in every mode, and packed batches agree with padded ones."""

import copy
import statistics
from itertools import pairwise

import numpy as np
import pytest
import torch

from minilora import LoraConfig, TrainConfig, fine_tune
from minilora.bert.forward import Packed, Padded
from minilora.fine_tuning import run_fine_tuning
from minilora.lora.heads import train_heads_in_float32
from minilora.training.loop import training_step
from tests.bert.test_forward import LENGTHS, PAD, adapted, classifier, examples_of
from tests.conftest import read_rows
from tests.cuda import needs_cuda
from tests.training.test_resume import arguments

pytestmark = needs_cuda
DTYPES = ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_falls(dtype, batching, tmp_path, tiny_model, sentences):
    values = arguments(
        tiny_model, sentences, device="cuda", dtype=dtype, batching=batching, save_strategy="no"
    )
    values |= {"num_train_epochs": 20, "learning_rate": 1e-2, "output_dir": str(tmp_path / "run")}
    fine_tune(TrainConfig(**values), LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    losses = [row["loss"] for row in read_rows(tmp_path / "run") if "loss" in row]
    assert statistics.mean(losses[-6:]) < 0.5 * statistics.mean(losses[:6])


def gradients(forward, device):
    """Logits and every gradient of one batch, as float32 on the CPU; its loss is scaled, so that no
    float16 is too small.
    """
    examples = examples_of(LENGTHS["ragged"])
    batch = forward.collate(examples, np.random.default_rng(1).permutation(len(examples)))
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    forward.to(device).zero_grad()
    logits = forward(batch).float()
    (2**10 * torch.nn.functional.cross_entropy(logits, batch["labels"])).backward()
    trained = [p.grad for p in forward.parameters() if p.requires_grad]
    return [x.detach().float().cpu() for x in (logits, *trained)]


def assert_close(found, expected, share):
    """Each tensor within a `share` of its norm; a key's bias alone would have no norm."""
    assert len(found) == len(expected) > 1
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= share * theirs.norm()


@pytest.mark.parametrize("kind", [Packed, Padded], ids=lambda kind: kind.__name__)
def test_logits_and_gradients_are_the_cpus(kind):
    model = adapted(classifier())
    expected = gradients(kind(copy.deepcopy(model), PAD), "cpu")
    assert_close(gradients(kind(model, PAD), "cuda"), expected, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packed_agrees_with_padded(dtype):
    exact = adapted(classifier())
    expected = gradients(Padded(copy.deepcopy(exact), PAD), "cuda")
    model = copy.deepcopy(exact).to(dtype)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = exact.get_parameter(name).data.clone()
    if dtype != torch.float32:
        train_heads_in_float32(model)
    share = 1e-4 if dtype == torch.float32 else 0.1
    padded = gradients(Padded(copy.deepcopy(model), PAD), "cuda")
    packed = gradients(Packed(model, PAD), "cuda")
    assert_close(packed, expected, share)
    assert_close(packed, padded, share)


def test_an_overflow_of_float16_skips_the_step_and_the_schedule(
    tmp_path, monkeypatch, tiny_model, sentences
):
    """A loss scale that is far too large is halved until no gradient overflows."""
    scales, rates = [], []

    def watched(training, config, batches):
        training.scaler.scale(torch.ones((), device="cuda"))  # it knows its scale from then on
        scales.append(training.scaler.get_scale())
        rates.append(training.scheduler.get_last_lr()[0])
        return training_step(training, config, batches)

    monkeypatch.setattr("minilora.training.loop.training_step", watched)
    start_scaling_at(2.0**24, monkeypatch)
    values = arguments(tiny_model, sentences, device="cuda", dtype="float16", max_steps=12)
    run_fine_tuning({**values, "output_dir": str(tmp_path / "run")}, {}, lambda: False)
    skipped = [after < before for before, after in pairwise(scales)]
    moved = [after != before for before, after in pairwise(rates)]
    assert any(skipped) and not all(skipped)
    assert moved == [not skip for skip in skipped]


def start_scaling_at(scale, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, init_scale=scale, **k))


@pytest.mark.parametrize(
    ("dtype", "accumulation"), [("float32", 1), ("bfloat16", 1), ("float16", 1), ("float32", 2)]
)
def test_a_compiled_forward_gives_the_losses_of_the_plain_one(
    dtype, accumulation, tmp_path, tiny_model, sentences
):
    """With nothing dropped, to rounding, over so many steps that graphs are replayed."""
    losses = {}
    for compiled in (False, True):
        values = arguments(
            without_dropout(tiny_model, tmp_path), sentences, device="cuda", dtype=dtype,
            batching="padded", dropout="torch", torch_compile=compiled, max_steps=20,
            gradient_accumulation_steps=accumulation, eval_strategy="steps", eval_steps=7,
            learning_rate=3e-4,
        )  # fmt: skip
        values |= {"output_dir": str(tmp_path / str(compiled))}
        run_fine_tuning(values, {"lora_dropout": 0.0}, never)
        rows = read_rows(tmp_path / str(compiled))
        losses[compiled] = [row.get("loss", row.get("eval_loss")) for row in rows]
    assert None not in losses[True] and len(set(losses[True])) > 10
    assert losses[True] == pytest.approx(losses[False], rel=1e-3 if dtype == "float32" else 2e-2)


def never() -> bool:
    return False


def without_dropout(model_dir, tmp_path):
    """The same model, which drops nothing."""
    from transformers import AutoModel, AutoTokenizer

    copied = tmp_path / "without-dropout"
    model = AutoModel.from_pretrained(model_dir)
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    model.save_pretrained(copied)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(copied)
    return copied
