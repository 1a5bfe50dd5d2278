"""LoRALinear against the paper's equation, computed here from plain tensors."""

import math

import pytest
import torch
from torch import nn

import minilora
from minilora import LoraConfig
from minilora.lora.adapters import set_fused
from minilora.lora.layer import LoRALinear
from tests.conftest import tiny_classifier


def layer_of(dtype=torch.float32, **settings) -> LoRALinear:
    """A layer from 6 to 5 features whose adapter "default" (r 4) is drawn at random."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).to(dtype)
    settings = {"r": 4, "lora_alpha": 16, "init_lora_weights": False, **settings}
    minilora.add_adapter(model, LoraConfig(target_modules=["0"], **settings))
    return model[0]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_output_is_the_papers_equation(use_rslora):
    layer = layer_of(torch.float64, use_rslora=use_rslora)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    A, B = layer.adapters["default"].lora_A.weight, layer.adapters["default"].lora_B.weight
    W, b = layer.base_layer.weight, layer.base_layer.bias
    scaling = 16 / (math.sqrt(4) if use_rslora else 4)
    torch.testing.assert_close(layer(x), x @ W.T + b + scaling * (x @ A.T @ B.T))


def test_dropout_acts_on_the_input_of_A_only():
    """With dropout the base output stays, and the update's mean over many draws is the update."""
    layer = layer_of(lora_dropout=0.5).train()
    x = torch.randn(1, 6)
    base = layer.base_layer(x)
    updates = torch.stack([layer(x) - base for _ in range(4000)])
    assert len({tuple(u.flatten().tolist()) for u in updates}) > 1
    layer.eval()
    torch.testing.assert_close(updates.mean(0), layer(x) - base, rtol=0.0, atol=0.25)


def test_no_dropout_is_no_module():
    assert not [module for module in layer_of().modules() if isinstance(module, nn.Dropout)]


# How far the fused order may be from PEFT's: rounding in the base's dtype.
TOLERANCES = {
    torch.float64: {"rtol": 1e-13, "atol": 1e-13},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.5}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_fused_order_agrees_with_pefts(dtype, settings, shape):
    """Outputs, and gradients of x, A and B: float32 over a bfloat16 base, too."""
    layer = layer_of(dtype, **settings).train()
    found = []
    for fused in (False, True):
        layer.fused = fused
        torch.manual_seed(1)  # x, and the masks of dropout
        x = torch.randn(shape).to(dtype).requires_grad_()
        output = layer(x)
        lora = layer.adapters["default"]
        trained = [lora.lora_A.weight, lora.lora_B.weight]
        gradients = torch.autograd.grad(output.square().sum(), [x, *trained])
        found.append([output, *gradients])
        assert output.dtype == x.dtype == dtype and output.shape == (*shape[:-1], 5)
        assert all(g.dtype == torch.promote_types(dtype, torch.float32) for g in gradients[1:])
    for exact, fused in zip(*found, strict=True):
        # relative to the largest: a gradient is a sum of many rounded numbers
        scale = max(1.0, exact.detach().abs().max().item()) if exact.numel() else 1.0
        torch.testing.assert_close(fused / scale, exact / scale, **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_several_fused_updates_add_up_beside_one_of_dora(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).to(dtype)
    for name, settings in (("a", {}), ("b", {"use_dora": True}), ("c", {"r": 2})):
        config = LoraConfig(target_modules=["0"], init_lora_weights=False, **settings)
        minilora.add_adapter(model, config, name)
    minilora.set_adapter(model, ["a", "b", "c"])
    x = torch.randn(3, 6).to(dtype)
    expected = model(x)
    set_fused(model, True)
    assert model(x).dtype == dtype
    torch.testing.assert_close(model(x), expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_dora_goes_pefts_way_fused_or_not(dtype):
    layer, x = layer_of(dtype, use_dora=True), torch.randn(2, 3, 6).to(dtype)
    expected = layer(x)
    layer.fused = True
    assert torch.equal(layer(x), expected)


def test_fusing_is_the_callers_choice_and_reaches_every_layer():
    model = tiny_classifier()
    names = minilora.add_adapter(model, LoraConfig(target_modules="all-linear"))
    layers = [model.get_submodule(name) for name in names]
    assert not any(layer.fused for layer in layers)
    set_fused(model, True)
    assert all(layer.fused for layer in layers)
    set_fused(model, False)
    assert not any(layer.fused for layer in layers)


@pytest.mark.parametrize("hf_parity", [False, True])
def test_training_runs_what_is_taught(hf_parity, tiny_model, sentences, tmp_path, monkeypatch):
    """`LoRALinear` computes every update of a run: fused by default, in PEFT's order if asked."""
    calls, update = [], LoRALinear.update

    def counted(layer, *args):
        calls.append((id(layer), layer.fused))
        return update(layer, *args)

    monkeypatch.setattr(LoRALinear, "update", counted)
    config = minilora.TrainConfig(
        model_name_or_path=str(tiny_model),
        train_file=str(sentences[0]),
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        device="cpu",
        hf_parity=hf_parity,
    )
    minilora.fine_tune(config, LoraConfig())
    assert {fused for _, fused in calls} == {not hf_parity}
    assert len({layer for layer, _ in calls}) == 4  # query and value of two layers
    assert len(calls) == 2 * 4


def test_a_fresh_adapter_changes_nothing():
    model, ids = tiny_classifier().eval(), torch.arange(8).reshape(2, 4)
    before = model(input_ids=ids).logits
    minilora.add_adapter(model, LoraConfig())
    assert torch.equal(model(input_ids=ids).logits, before)


def test_only_the_adapter_and_the_head_get_gradients_and_change():
    model = tiny_classifier()
    minilora.add_adapter(model, LoraConfig(task_type="SEQ_CLS"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # A's gradient is zero while B is
        optimizer.zero_grad()
        model(input_ids=torch.arange(8).reshape(2, 4), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        is_trained = ".adapters." in name
        assert (parameter.grad is not None) is is_trained, name
        assert torch.equal(parameter, before[name]) is not is_trained, name


def test_bert_base_has_the_papers_number_of_parameters():
    """24 projections of 768 x 768 at r = 8: 24 * 8 * (768 + 768) = 294,912."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig())
    minilora.add_adapter(model, LoraConfig(r=8))
    assert sum(p.numel() for _, p in minilora.trainable_parameters(model)) == 294_912
