"""PEFT as the oracle: the same seed gives the same model, gradients and files, bit for bit.

Each case is a `LoraConfig` asked of both libraries on the same tiny BERT. The comparison is
`torch.equal`, in float32 and bfloat16 alike: the operations and their order are the same.
"""

import copy
import warnings

import peft
import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    set_seed,
)

import minilora
from tests.conftest import tiny_config

IDS = torch.arange(1, 33).reshape(4, 8) % 30
MASK = torch.ones_like(IDS)
MASK[1, 5:] = 0

CASES = {
    "default": {},
    "dropout": {"lora_dropout": 0.1},
    "r and alpha": {"r": 4, "lora_alpha": 3},
    "rslora": {"use_rslora": True},
    "all attention": {"target_modules": ["query", "key", "value", "attention.output.dense"]},
    "exact name": {"target_modules": ["bert.encoder.layer.1.attention.self.query"]},
    "regular expression": {"target_modules": r".*layer\.1.*(query|key)"},
    "all-linear": {"target_modules": "all-linear"},
    "excluded": {
        "target_modules": ["query", "dense"],
        "exclude_modules": ["attention.output.dense"],
    },
    "one layer": {"target_modules": ["query"], "layers_to_transform": [1]},
    "one layer of a pattern": {
        "target_modules": ["query"],
        "layers_to_transform": 0,
        "layers_pattern": "layer",
    },
    "patterns": {"rank_pattern": {"query": 4, r".*\.1\..*value": 2}, "alpha_pattern": {"value": 3}},
    "modules_to_save": {"modules_to_save": ["pooler"]},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "no init": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "olora": {"init_lora_weights": "olora"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "dora": {"use_dora": True},
    "dora with dropout": {"use_dora": True, "lora_dropout": 0.1},
    "dora, rslora, dropout and patterns": {
        "use_dora": True,
        "use_rslora": True,
        "lora_dropout": 0.1,
        "rank_pattern": {"query": 4},
    },
    "lora_bias, all-linear and dropout": {
        "lora_bias": True,
        "target_modules": "all-linear",
        "lora_dropout": 0.1,
    },
    "bias all, pooler and gaussian": {
        "bias": "all",
        "modules_to_save": ["pooler"],
        "init_lora_weights": "gaussian",
    },
    "pissa, dora and one layer": {
        "init_lora_weights": "pissa",
        "use_dora": True,
        "target_modules": ["query", "key"],
        "layers_to_transform": [0],
    },
    "trainable tokens": {"trainable_token_indices": [1, 5, 30]},
    "trainable tokens by name": {"trainable_token_indices": {"token_type_embeddings": [1]}},
    "embedding": {"target_modules": ["word_embeddings", "query"]},
    "embedding dora": {"target_modules": ["word_embeddings", "query"], "use_dora": True},
}
DTYPES = [torch.float32, torch.bfloat16]


def build(model_class=BertForSequenceClassification, dtype=torch.float32):
    set_seed(0)
    labels = 2 if model_class is BertForQuestionAnswering else 3  # a start and an end
    return model_class(tiny_config(num_labels=labels)).to(dtype)


def adapted(
    settings, model_class=BertForSequenceClassification, dtype=torch.float32, task_type="SEQ_CLS"
):
    """(PEFT's model, ours), adapted with the same seed, and the generator's state after each."""
    theirs, ours = build(model_class, dtype), build(model_class, dtype)
    set_seed(1)
    # A copy: PEFT appends to the very list it is given.
    config = peft.LoraConfig(task_type=task_type, **copy.deepcopy(settings))
    theirs = peft.get_peft_model(theirs, config)
    after_theirs = torch.get_rng_state()
    set_seed(1)
    minilora.add_adapter(ours, minilora.LoraConfig(task_type=task_type, **settings))
    assert torch.equal(torch.get_rng_state(), after_theirs), "the generators differ"
    return theirs, ours


def perturb(*models):
    """Move every trainable tensor off its initial value, equally in each model, so that B is not
    zero.
    """
    for model in models:
        draw = torch.Generator().manual_seed(3)
        for _, parameter in minilora.trainable_parameters(model):
            change = torch.randn(parameter.shape, generator=draw) * 0.05
            parameter.data += change.to(parameter.dtype)


def first_output(model):
    return model(input_ids=IDS, attention_mask=MASK)[0]


@pytest.fixture(autouse=True)
def quiet_peft():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_initial_tensors_order_and_dtypes_are_pefts(settings, dtype):
    theirs, ours = adapted(settings, dtype=dtype)
    expected = [p for p in theirs.parameters() if p.requires_grad]
    found = [p for _, p in minilora.trainable_parameters(ours)]
    assert [(p.shape, p.dtype) for p in found] == [(p.shape, p.dtype) for p in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_training_logits_and_every_gradient_are_pefts(settings, dtype):
    models = adapted(settings, dtype=dtype)
    perturb(*models)
    logits, gradients = [], []
    for model in models:
        model.train()
        set_seed(5)
        output = model(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 1, 2, 0]))
        output.loss.backward()
        logits.append(output.logits)
        gradients.append([p.grad for _, p in minilora.trainable_parameters(model)])
    assert torch.equal(*logits)
    for theirs, ours in zip(*gradients, strict=True):
        assert torch.equal(theirs, ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_files_hold_the_same_and_load_both_ways(settings, dtype, tmp_path):
    theirs, ours = adapted(settings, dtype=dtype)
    perturb(theirs, ours)
    theirs.save_pretrained(tmp_path / "theirs")
    minilora.save_adapter(ours, tmp_path / "ours")
    expected = safetensors.torch.load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    found = safetensors.torch.load_file(tmp_path / "ours" / "adapter_model.safetensors")
    # What PEFT writes by mistake: each bias of a head's two copies, beside the head itself.
    junk = (".original_module.", ".modules_to_save.")
    expected = {k: t for k, t in expected.items() if not any(part in k for part in junk)}
    assert {k: t.dtype for k, t in found.items()} == {k: t.dtype for k, t in expected.items()}
    assert all(torch.equal(found[key], expected[key]) for key in expected)

    if "niter" in str(settings.get("init_lora_weights")):
        return  # the SVD's random draw is another at each loading: no round trip is exact
    logits = first_output(theirs.eval())
    reloaded = build(dtype=dtype)
    minilora.load_adapter(reloaded, tmp_path / "theirs")
    assert torch.equal(first_output(reloaded.eval()), logits)
    by_peft = peft.PeftModel.from_pretrained(build(dtype=dtype), tmp_path / "ours")
    assert torch.equal(first_output(by_peft.eval()), logits)


HEADS = {
    "token classification": (BertForTokenClassification, "TOKEN_CLS"),
    "question answering": (BertForQuestionAnswering, "QUESTION_ANS"),
    "masked language model": (BertForMaskedLM, None),
    "no head": (BertModel, "FEATURE_EXTRACTION"),
    "no task type": (BertForSequenceClassification, None),
}


def assert_agrees_with_peft(settings, model_class, task_type, dtype, directory):
    """Training-mode outputs, gradients, keys and dtypes on disk, and logits after loading each
    other's files.
    """
    theirs, ours = adapted(settings, model_class, dtype, task_type)
    perturb(theirs, ours)
    outputs, gradients = [], []
    for model in (theirs, ours):
        model.train()
        set_seed(5)
        outputs.append(first_output(model))
        outputs[-1].float().square().sum().backward()
        gradients.append([p.grad for _, p in minilora.trainable_parameters(model)])
    assert torch.equal(*outputs)
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))

    theirs.save_pretrained(directory / "theirs")
    minilora.save_adapter(ours, directory / "ours")
    expected = safetensors.torch.load_file(directory / "theirs" / "adapter_model.safetensors")
    found = safetensors.torch.load_file(directory / "ours" / "adapter_model.safetensors")
    junk = (".original_module.", ".modules_to_save.")
    expected = {k: t for k, t in expected.items() if not any(part in k for part in junk)}
    assert {k: t.dtype for k, t in found.items()} == {k: t.dtype for k, t in expected.items()}
    if "niter" in str(settings.get("init_lora_weights")):
        return
    logits = first_output(theirs.eval())
    by_peft = peft.PeftModel.from_pretrained(build(model_class, dtype), directory / "ours")
    assert torch.equal(first_output(by_peft.eval()), logits)
    by_us = build(model_class, dtype)
    minilora.load_adapter(by_us, directory / "theirs")
    assert torch.equal(first_output(by_us.eval()), logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("model_class", "task_type"), HEADS.values(), ids=HEADS)
def test_every_kind_of_head_agrees_with_peft(model_class, task_type, dtype, tmp_path):
    assert_agrees_with_peft({"lora_dropout": 0.1}, model_class, task_type, dtype, tmp_path)


def fits(settings, head):
    """Whether PEFT can apply the settings to this class, and names in them are in it."""
    has_pooler = head in ("no head", "no task type")
    return (
        (has_pooler or "pooler" not in str(settings))
        and (head != "no head" or "bert.encoder" not in str(settings))
        # Here PEFT adapts the head, and then fails to train it in full as well.
        and not (
            "all-linear" in str(settings) and head in ("token classification", "question answering")
        )
        # Tied to the output layer, whose bias PEFT drops: a test of its own, below.
        and not (
            head == "masked language model"
            and isinstance(settings.get("trainable_token_indices"), list)
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "head"), [(case, head) for case in CASES for head in HEADS if fits(CASES[case], head)]
)
def test_every_setting_agrees_with_peft_on_every_kind_of_head(case, head, dtype, tmp_path):
    assert_agrees_with_peft(CASES[case], *HEADS[head], dtype, tmp_path)


@pytest.mark.parametrize(
    ("model_class", "task_type", "head"),
    [
        (BertForTokenClassification, "TOKEN_CLS", "classifier"),
        (BertForQuestionAnswering, "QUESTION_ANS", "qa_outputs"),
    ],
)
def test_all_linear_leaves_the_head_alone_where_peft_fails(model_class, task_type, head):
    names = minilora.add_adapter(
        build(model_class), minilora.LoraConfig(target_modules="all-linear", task_type=task_type)
    )
    assert names and head not in names


@pytest.mark.parametrize(
    "settings", [{}, {"bias": "all"}, {"use_dora": True}, {"init_lora_weights": "pissa"}]
)
def test_the_config_file_is_pefts_but_for_the_order_of_lists(settings, tmp_path):
    import json

    theirs, ours = adapted(settings)
    theirs.save_pretrained(tmp_path / "theirs")
    minilora.save_adapter(ours, tmp_path / "ours")
    expected = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    found = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    for config in (expected, found):
        config["target_modules"] = sorted(config["target_modules"])
        config["base_model_name_or_path"] = config["base_model_name_or_path"] or None
    assert found == expected


def test_the_parity_check_can_fail():
    """Negative control: another seed, or one changed value, is noticed."""
    theirs, ours = adapted({})
    perturb(theirs, ours)
    next(iter(dict(minilora.trainable_parameters(ours)).values())).data[0, 0] += 1e-3
    assert not torch.equal(first_output(ours.eval()), first_output(theirs.eval()))


def test_a_masked_language_model_with_adapted_embeddings_merges_right(tmp_path):
    """Decoder and embeddings share a weight; PEFT's merged model is wrong by whole units."""
    for targets in (["word_embeddings"], ["decoder"], ["word_embeddings", "decoder"]):
        model = build(BertForMaskedLM)
        minilora.add_adapter(
            model, minilora.LoraConfig(target_modules=targets, init_lora_weights=False)
        )
        perturb(model)
        expected = first_output(model.eval())
        minilora.merge_adapter(model)
        torch.testing.assert_close(first_output(model), expected, rtol=1e-5, atol=1e-5)
        minilora.unmerge_adapter(model)
        minilora.merge_and_unload(model).save_pretrained(tmp_path / targets[0])
        again = BertForMaskedLM.from_pretrained(tmp_path / targets[0]).eval()
        torch.testing.assert_close(first_output(again), expected, rtol=1e-5, atol=1e-5)


TOKENS = {"trainable_token_indices": [3, 7, 11]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_trained_tokens_of_a_masked_language_model_agree_with_peft(dtype, tmp_path):
    """The output layer shares the embeddings' weight and reads the trained rows, too. PEFT leaves
    its bias out, so the biases are zero here, as BERT's are at the start.
    """
    theirs, ours = adapted(TOKENS, BertForMaskedLM, dtype, None)
    perturb(theirs, ours)
    logits, gradients = [], []
    for model in (theirs, ours):
        model.train()
        set_seed(5)
        logits.append(first_output(model))
        logits[-1].float().square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    # x W' + 0 is rounded like x W' in all but the kernel's blocking.
    torch.testing.assert_close(*logits)
    assert len(gradients[0]) == len(gradients[1])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    theirs.save_pretrained(tmp_path / "theirs")
    minilora.save_adapter(ours, tmp_path / "ours")
    expected = safetensors.torch.load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    found = safetensors.torch.load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    by_us = build(BertForMaskedLM, dtype)
    minilora.load_adapter(by_us, tmp_path / "theirs")
    assert torch.equal(first_output(by_us.eval()), first_output(ours.eval()))


def test_trained_tokens_of_a_masked_language_model_are_replaced_rows(tmp_path):
    """Oracle: the plain model with these rows assigned, its bias not zero. Gradients, merging,
    unmerging, unloading, disabling, and what transformers loads after a merge.
    """
    plain, model = build(BertForMaskedLM), build(BertForMaskedLM)
    for one in (plain, model):
        one.cls.predictions.bias.data = torch.linspace(-1, 1, one.config.vocab_size)
    before = first_output(plain.eval()).detach()
    minilora.add_adapter(model, minilora.LoraConfig(**TOKENS))
    assert torch.equal(model.get_output_embeddings().weight, plain.get_output_embeddings().weight)
    rows = minilora.trainable_parameters(model)[0][1]  # the embeddings come first
    rows.data += torch.linspace(-1, 1, rows.numel()).reshape(rows.shape)
    with minilora.disable_adapter(model):
        assert torch.equal(first_output(model.eval()), before)
    weight = plain.bert.embeddings.word_embeddings.weight
    weight.data[[3, 7, 11]] = rows.detach()

    expected = first_output(plain)
    assert torch.equal(first_output(model), expected)
    expected.square().sum().backward()
    first_output(model).square().sum().backward()
    torch.testing.assert_close(rows.grad, weight.grad[[3, 7, 11]])

    minilora.merge_adapter(model)
    assert torch.equal(first_output(model), expected)
    minilora.unmerge_adapter(model)
    assert torch.equal(first_output(model), expected)
    minilora.save_adapter(model, tmp_path / "adapter")
    minilora.merge_and_unload(model).save_pretrained(tmp_path / "merged")
    assert model.config.tie_word_embeddings and type(model.cls.predictions.decoder) is nn.Linear
    again = BertForMaskedLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(first_output(again), expected)

    weight.data = build(BertForMaskedLM).bert.embeddings.word_embeddings.weight.data
    minilora.load_adapter(plain, tmp_path / "adapter")
    assert torch.equal(first_output(plain), expected)
    minilora.unload(plain)
    assert torch.equal(first_output(plain), before)


def test_an_output_layer_cannot_be_adapted_and_share_trained_rows():
    config = minilora.LoraConfig(target_modules=["decoder"], **TOKENS)
    model = build(BertForMaskedLM)
    with pytest.raises(minilora.MiniloraError, match="leave it out of target_modules"):
        minilora.add_adapter(model, config)
    assert type(model.cls.predictions.decoder) is nn.Linear


@pytest.mark.parametrize(
    ("indices", "message"),
    [([99], "99 is outside 'bert.embeddings.word_embeddings'"), ({"nothing": [1]}, "no embedding")],
)
def test_tokens_that_are_not_there_are_refused(indices, message):
    config = minilora.LoraConfig(trainable_token_indices=indices)
    with pytest.raises(minilora.MiniloraError, match=message):
        minilora.add_adapter(build(), config)
