"""Modules trained in full, over a base in half precision."""

import pytest
import torch

import minilora
from minilora import LoraConfig
from minilora.lora.heads import train_heads_in_float32
from tests.conftest import tiny_classifier


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_train_and_answer_in_float32_and_other_modules_go_on_in_the_bases_dtype(dtype):
    model = tiny_classifier().to(dtype)
    minilora.add_adapter(model, LoraConfig(task_type="SEQ_CLS", modules_to_save=["pooler"]))
    train_heads_in_float32(model)
    trained = minilora.trainable_parameters(model)
    assert {parameter.dtype for _, parameter in trained} == {torch.float32}
    output = model(input_ids=torch.arange(8).reshape(2, 4), output_hidden_states=True)
    assert output.logits.dtype == torch.float32
    assert model.bert(input_ids=torch.arange(8).reshape(2, 4)).pooler_output.dtype == dtype
    output.logits.sum().backward()
    assert all(parameter.grad is not None for _, parameter in trained)
