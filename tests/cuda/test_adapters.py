"""Adapters on a model that is on a GPU, or moves there: PEFT's bits, and our own promises."""

import copy

import peft
import pytest
import torch
from transformers import set_seed

import minilora
from minilora import LoraConfig, adapter_names, disable_adapter, set_adapter
from tests.conftest import tiny_classifier
from tests.cuda import needs_cuda
from tests.lora.test_mixed_batch import BATCH, EMBEDDINGS, NAMES, PLAIN, draw_values

pytestmark = needs_cuda

# The plain model dropped nothing, so that two calls can be compared.
OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CASES = {
    "default": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "no init": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "olora": {"init_lora_weights": "olora"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "dora": {"use_dora": True},
    "lora_bias, all-linear": {"lora_bias": True, "target_modules": "all-linear"},
    "bias all, pooler": {"bias": "all", "modules_to_save": ["pooler"]},
    "embeddings": {"target_modules": [*EMBEDDINGS, "query"]},
    "embeddings, dora": {"target_modules": ["word_embeddings", "query"], "use_dora": True},
    "trainable tokens": {"trainable_token_indices": [7, 11]},
}
by_case = pytest.mark.parametrize("settings", CASES.values(), ids=CASES)


def on_gpu(batch=BATCH):
    return {name: tensor.to("cuda") for name, tensor in batch.items()}


def logits(model):
    with torch.no_grad():
        return model(**on_gpu()).logits


def adapted(settings, device="cuda"):
    """A model in eval mode, whose adapter's values are away from their start."""
    model = tiny_classifier(**OFF).to(device)
    set_seed(1)
    minilora.add_adapter(model, LoraConfig(task_type="SEQ_CLS", **settings))
    for _, parameter in minilora.trainable_parameters(model):
        parameter.data += 0.05
    return model.eval()


def snapshot(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@by_case
def test_initial_tensors_logits_and_gradients_are_pefts(settings, dtype):
    theirs, ours = tiny_classifier().to("cuda", dtype), tiny_classifier().to("cuda", dtype)
    set_seed(1)
    config = peft.LoraConfig(task_type="SEQ_CLS", lora_dropout=0.1, **copy.deepcopy(settings))
    theirs = peft.get_peft_model(theirs, config)
    after_theirs = torch.get_rng_state(), torch.cuda.get_rng_state()
    set_seed(1)
    config = LoraConfig(task_type="SEQ_CLS", lora_dropout=0.1, **settings)
    minilora.add_adapter(ours, config)
    after_ours = torch.get_rng_state(), torch.cuda.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(after_theirs, after_ours, strict=True))
    expected = [p for p in theirs.parameters() if p.requires_grad]
    found = [p for _, p in minilora.trainable_parameters(ours)]
    assert len(expected) == len(found) and all(map(torch.equal, expected, found))

    labels = torch.tensor([0, 1, 1, 0], device="cuda")
    results = []
    for model, parameters in ((theirs, expected), (ours, found)):
        set_seed(2)
        output = model.train()(**on_gpu(), labels=labels)
        output.loss.backward()
        results.append([output.logits, *(p.grad for p in parameters)])
    for theirs_tensor, ours_tensor in zip(*results, strict=True):
        assert theirs_tensor is ours_tensor is None or torch.equal(theirs_tensor, ours_tensor)


@by_case
def test_merging_disabling_and_unloading_give_back_every_bit(settings):
    plain = tiny_classifier(**OFF).to("cuda").eval()
    expected, weights = logits(plain), snapshot(plain)
    model = adapted(settings)
    before, updated = snapshot(model), logits(model)
    assert not torch.equal(updated, expected)
    with disable_adapter(model):
        assert torch.equal(logits(model), expected)
    minilora.merge_adapter(model)
    torch.testing.assert_close(logits(model), updated, rtol=1e-4, atol=1e-5)
    minilora.unmerge_adapter(model)
    after = snapshot(model)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(logits(model), updated)
    minilora.unload(model)
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)


@by_case
def test_a_model_that_moves_to_the_gpu_is_one_that_began_there(settings):
    """Moved with its adapter, and even while it is merged."""
    model = adapted(settings, "cpu")
    plain = tiny_classifier(**OFF).to("cuda").eval()
    here = copy.deepcopy(model).to("cuda")
    updated = logits(here)
    with disable_adapter(here):
        assert torch.equal(logits(here), logits(plain))
    assert torch.equal(logits(here), updated)
    minilora.merge_adapter(model)
    model.to("cuda")
    torch.testing.assert_close(logits(model), updated, rtol=1e-4, atol=1e-5)
    minilora.unmerge_adapter(model)
    assert torch.equal(logits(model), updated)
    minilora.unload(model)
    assert torch.equal(logits(model), logits(plain))


@by_case
def test_a_saved_adapter_loads_into_a_model_on_the_gpu(settings, tmp_path):
    if settings.get("init_lora_weights") == "pissa_niter_4":
        pytest.skip("its SVD is drawn anew at each loading")
    model = adapted(settings)
    minilora.save_adapter(model, tmp_path)
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    loaded = tiny_classifier(**OFF).to("cuda")
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    minilora.load_adapter(loaded, tmp_path)
    after = torch.get_rng_state(), torch.cuda.get_rng_state()
    assert all(map(torch.equal, before, after)), "loading drew from the caller's generators"
    assert torch.equal(logits(loaded), logits(model))
    theirs = peft.PeftModel.from_pretrained(tiny_classifier(**OFF).to("cuda"), tmp_path)
    assert torch.equal(logits(theirs), logits(model))


@pytest.mark.parametrize(
    "other",
    [PLAIN, {**PLAIN, "use_dora": True}, {**PLAIN, "target_modules": EMBEDDINGS}],
    ids=["plain", "dora", "embeddings"],
)
def test_rows_of_a_mixed_batch_are_those_of_their_adapters_alone(other):
    model = tiny_classifier(**OFF)
    for name, settings in zip("ab", (PLAIN, other), strict=True):
        minilora.add_adapter(model, LoraConfig(**settings), name)
    draw_values(model)
    model.to("cuda").eval()
    expected = {}
    for name in "ab":
        set_adapter(model, name)
        expected[name] = logits(model)
    with disable_adapter(model):
        expected["__base__"] = logits(model)
    with adapter_names(model, NAMES):
        mixed = logits(model)
    alone = torch.stack([expected[name][row] for row, name in enumerate(NAMES)])
    torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=1e-5)
