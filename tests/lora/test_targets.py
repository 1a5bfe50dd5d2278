"""Which modules a config means. The tables are those of PEFT's own tests
(`tests/test_tuners_utils.py`).
"""

import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM

import minilora
from minilora import LoraConfig, MiniloraError
from minilora.lora.targets import is_target, layer_index, pattern_value
from tests.conftest import tiny_classifier, tiny_config

# (module, target_modules, layers_to_transform, layers_pattern, matches), after PEFT's
# REGEX_TEST_CASES
MATCHES = [
    ("", [], None, None, False),
    ("", ["foo"], None, None, False),
    ("foo", [], None, None, False),
    ("foo", ["foo"], None, None, True),
    ("foo", ["bar"], None, None, False),
    ("foo", ["foo", "bar"], None, None, True),
    ("foo", "foo", None, None, True),
    ("foo", ".*oo", None, None, True),
    ("foo", "fo", None, None, False),
    ("foo", ".*bar.*", None, None, False),
    ("foobar", ".*oba.*", None, None, True),
    ("foo.bar.1.baz", ["baz"], [1], ["bar"], True),
    ("foo.bar.1.baz", ["baz"], [0], ["bar"], False),
    ("foo.bar.1.baz", ["baz"], [2], ["bar"], False),
    ("foo.bar.1.baz", ["foo"], [1], ["bar"], False),
    ("foo.bar.1.baz", ["baz"], [1], ["baz"], False),
    ("foo.bar.1.baz", ["baz"], [1], ["bar", "baz"], True),
    ("foo.bar.1.baz", ["baz", "foo"], [1], ["bar", "baz"], True),
    ("bar.1.baz", ["baz"], [1], ["bar"], True),
    ("foo.bar.001.baz", ["baz"], [1], ["bar"], True),
    ("foo.bar.1.spam.2.baz", ["baz"], [1], ["bar"], True),
    ("foo.bar.2.spam.1.baz", ["baz"], [1], ["bar"], False),
    ("blocks.1.weight", ["weight"], [1], ["blocks"], True),
    ("blocks.1.bias", ["weight"], [1], ["blocks"], False),
    ("mlp.blocks.1.weight", ["weight"], [1], ["blocks"], True),
    ("foo.bar.1.baz", ["baz"], 1, "bar", True),
    ("foo.bar.1.baz", ["baz"], [1], [], True),
    ("foo.bar.1.baz", ["baz"], [1], "", True),
    ("foo.whatever.1.baz", ["baz"], [1], None, True),
    ("foo.whatever.1.baz", ["baz"], [0], None, False),
    ("foo.experts.1.gate.2.baz", ["baz"], [1], None, True),
    ("transformer.h.1.attn.q", ["q"], [1], ["h"], True),
    ("encoder.query_layer", ["query"], None, None, False),
    ("encoder.myquery", ["query"], None, None, False),
    # An exact name wins over layers_to_transform.
    ("foo.bar.1.baz", ["foo.bar.1.baz"], [0], ["bar"], True),
]


@pytest.mark.parametrize(("name", "targets", "layers", "pattern", "expected"), MATCHES)
def test_matching_is_pefts(name, targets, layers, pattern, expected):
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists

    settings = {"target_modules": targets, "layers_to_transform": layers}
    if layers is not None:
        settings["layers_pattern"] = pattern
    assert is_target(name, LoraConfig(**settings)) is expected
    assert bool(check_target_module_exists(peft.LoraConfig(**settings), name)) is expected


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ({"foo": 4}, "foo", 4),
        ({"foo": 4}, "module.foo", 4),
        ({"foo": 4}, "module.bar_foo", 8),
        ({"foo": 4}, "foo.module", 8),
        ({"^foo": 4}, "foo", 4),
        ({"^foo": 4}, "module.foo", 8),
        ({".*foo": 4}, "module.bar_foo", 4),
        ({r"layer\.\d\.foo": 4}, "layer.3.foo", 4),
        ({"foo": 4, "module.foo": 2}, "module.foo", 4),
        ({"module.foo": 2, "foo": 4}, "module.foo", 2),
    ],
)
def test_patterns_match_as_in_peft(pattern, name, expected):
    from peft.utils.other import get_pattern_key

    assert pattern_value(pattern, name, 8) == expected
    assert pattern.get(get_pattern_key(pattern.keys(), name), 8) == expected


def test_the_layer_is_the_first_number_in_a_name():
    assert layer_index("bert.encoder.layer.3.attention.self.query", None) == 3
    assert layer_index("bert.embeddings.word_embeddings", None) is None


def test_the_default_is_query_and_value():
    names = minilora.add_adapter(tiny_classifier(), LoraConfig())
    assert names == [
        f"bert.encoder.layer.{layer}.attention.self.{part}"
        for layer in range(2)
        for part in ("query", "value")
    ]


def test_all_linear_takes_every_linear_layer_but_the_head():
    names = minilora.add_adapter(
        tiny_classifier(), LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
    )
    assert len(names) == 2 * 6 + 1 and "bert.pooler.dense" in names and "classifier" not in names


def test_matching_nothing_lists_what_there_is():
    with pytest.raises(
        MiniloraError, match=r"\['q_proj'\] matches nothing.*dense.*key, .*query.*value"
    ):
        minilora.add_adapter(tiny_classifier(), LoraConfig(target_modules=["q_proj"]))


def test_matching_a_module_that_is_neither_linear_nor_embedding_names_it():
    with pytest.raises(MiniloraError, match=r"a BertSelfAttention: LoRA adapts nn\.Linear"):
        minilora.add_adapter(tiny_classifier(), LoraConfig(target_modules=["self"]))


def test_an_unknown_family_needs_targets():
    model = tiny_classifier()
    model.config.model_type = "unheard-of"
    with pytest.raises(MiniloraError, match="'unheard-of' has no default"):
        minilora.add_adapter(model, LoraConfig())


def test_a_named_module_to_save_must_exist():
    with pytest.raises(MiniloraError, match=r"modules_to_save \['poler'\]"):
        minilora.add_adapter(tiny_classifier(), LoraConfig(modules_to_save=["poler"]))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_keys_whose_order_matters_are_refused_for_pefts_files_have_them_sorted(field, tmp_path):
    import peft

    theirs = peft.LoraConfig(**{field: {"query": 4, ".*": 2}})
    theirs.save_pretrained(tmp_path)
    assert list(getattr(peft.LoraConfig.from_pretrained(tmp_path), field)) == [".*", "query"]
    model = tiny_classifier()
    with pytest.raises(MiniloraError, match=rf"{field} gives '.*query' 4; .*sorted.*, 2: let one"):
        minilora.add_adapter(model, LoraConfig(**{field: {"query": 4, ".*": 2}}))
    assert not hasattr(model, "minilora_adapters")
    for keys in ({".*": 2, "query": 4}, {"value": 4, "query": 2}, {"query": 4, ".*": 4}):
        minilora.add_adapter(model, LoraConfig(**{field: keys}))
        minilora.unload(model)


def test_two_keys_of_one_embedding_are_refused_for_files_have_them_sorted():
    keys = {"word_embeddings": [1], "bert.embeddings.word_embeddings": [2]}
    with pytest.raises(MiniloraError, match=r"two keys name 'bert\..*word_embeddings': give one"):
        minilora.add_adapter(tiny_classifier(), LoraConfig(trainable_token_indices=keys))
    keys["word_embeddings"] = [2]
    minilora.add_adapter(tiny_classifier(), LoraConfig(trainable_token_indices=keys))


def test_what_only_holds_modules_cannot_be_trained_whole_as_in_peft():
    import peft

    settings = {"target_modules": ["bert.pooler.dense"], "modules_to_save": ["layer"]}
    with pytest.raises(TypeError, match="ModuleList"):
        peft.get_peft_model(tiny_classifier(), peft.LoraConfig(**settings))
    with pytest.raises(MiniloraError, match=r"'bert\.encoder\.layer', a ModuleList, which only"):
        minilora.add_adapter(tiny_classifier(), LoraConfig(**settings))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_weight_that_two_modules_share_is_not_reduced(init):
    """It would be beneath the embeddings, too, and the model no longer start as the plain one."""
    config = LoraConfig(r=2, target_modules=["decoder", "query"], init_lora_weights=init)
    with pytest.raises(MiniloraError, match=r"'cls.*decoder', which is that of .*word_embeddings'"):
        minilora.add_adapter(BertForMaskedLM(tiny_config()), config)
    model = BertForMaskedLM(tiny_config(tie_word_embeddings=False)).eval()
    ids = torch.arange(8).reshape(2, 4)
    before = model(ids).logits
    minilora.add_adapter(model, config)
    torch.testing.assert_close(model(ids).logits, before)


def test_layers_to_transform_count_among_twenty_names_or_more_as_in_peft():
    """Whole names would win over them; shortened as PEFT shortens them, they are none."""
    import peft

    model = tiny_classifier(num_hidden_layers=5)
    modules = model.bert.encoder.named_modules(prefix="bert.encoder")
    linear = [name for name, module in modules if isinstance(module, nn.Linear)]
    settings = {"target_modules": linear, "layers_to_transform": [1], "task_type": "SEQ_CLS"}
    theirs = peft.get_peft_model(
        tiny_classifier(num_hidden_layers=5), peft.LoraConfig(**settings, layers_pattern="layer")
    )
    names = minilora.add_adapter(model, LoraConfig(**settings, layers_pattern="layer"))
    assert len(linear) >= 20 and len(names) == 6
    assert set(names) == {n.removeprefix("base_model.model.") for n in theirs.targeted_module_names}


def test_settings_without_effect_are_said_aloud():
    with pytest.warns(UserWarning, match="excludes nothing"):
        minilora.add_adapter(tiny_classifier(), LoraConfig(exclude_modules=["nothing"]))
    with pytest.warns(UserWarning, match=r"rank_pattern keys \['nothing'\]"):
        minilora.add_adapter(tiny_classifier(), LoraConfig(rank_pattern={"nothing": 2}))


@pytest.mark.parametrize(
    "family", ["distilbert", "roberta", "electra", "albert", "mpnet", "modernbert"]
)
def test_the_defaults_fit_the_relatives(family):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {
        "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64,
        "embedding_size": 32, "pad_token_id": 0,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **sizes)
    model = AutoModelForSequenceClassification.from_config(config)
    names = minilora.add_adapter(model, LoraConfig(task_type="SEQ_CLS"))
    # ALBERT shares one layer among all; ModernBERT's three projections are one.
    assert len(names) == (2 if family in ("albert", "modernbert") else 4)
