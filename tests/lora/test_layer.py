"""LoRALinear against the paper's equation, computed here from plain tensors."""

import math

import pytest
import torch
from torch import nn

import minilora
from minilora import LoraConfig
from minilora.lora.layer import LoRALinear
from tests.conftest import tiny_classifier


def layer_of(r=4, lora_alpha=16, lora_dropout=0.0, use_rslora=False) -> LoRALinear:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 5))
    layer.create_adapter("default", r, lora_alpha, lora_dropout, use_rslora, lora_bias=False)
    layer.active_adapters = ("default",)
    return layer


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_output_is_the_papers_equation(use_rslora):
    layer = layer_of(use_rslora=use_rslora)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    layer.double()
    A, B = layer.factors("default")
    W, b = layer.base_layer.weight, layer.base_layer.bias
    scaling = 16 / (math.sqrt(4) if use_rslora else 4)
    expected = x @ W.T + b + scaling * (x @ A.weight.T @ B.weight.T)
    torch.testing.assert_close(layer(x), expected)


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
    assert isinstance(layer_of().lora_dropout["default"], nn.Identity)


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
        adapted = ".lora_" in name or name.startswith("classifier.modules_to_save.")
        assert (parameter.grad is not None) is adapted, name
        assert torch.equal(parameter, before[name]) is not adapted, name


def test_bert_base_has_the_papers_number_of_parameters():
    """24 projections of 768 x 768 at r = 8: 24 * 8 * (768 + 768) = 294,912."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig())
    minilora.add_adapter(model, LoraConfig(r=8))
    assert sum(p.numel() for _, p in minilora.trainable_parameters(model)) == 294_912
