"""LoraConfig: every field of PEFT's is honoured or refused by name."""

import copy
import dataclasses
import json
import warnings

import peft
import pytest

import minilora
from minilora import LoraConfig, MiniloraError
from minilora.lora.config import (
    NOT_SUPPORTED,
    config_from_dict,
    config_to_dict,
    differing_fields,
)
from tests.conftest import tiny_classifier


def peft_fields() -> dict:
    return peft.LoraConfig().to_dict()


def test_every_field_of_peft_is_known_and_has_its_default():
    ours = {f.name: getattr(LoraConfig(), f.name) for f in dataclasses.fields(LoraConfig)}
    known = {**NOT_SUPPORTED, **ours}
    expected = peft_fields()
    expected.pop("runtime_config", None)
    assert known.keys() == expected.keys()
    different = {name for name in known if known[name] != expected[name]}
    assert different <= {"peft_version"}  # filled in when written


# A value for each refused field that PEFT would act upon.
@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_a_feature_that_is_not_supported_is_refused_by_name(name):
    used = {"megatron_core": "other.core", "qalora_group_size": 32}.get(name, True)
    with pytest.raises(MiniloraError, match=f"{name}="):
        config_from_dict({**peft_fields(), name: used})


@pytest.mark.parametrize("unset", [None, False, {}, []])
def test_newer_fields_are_dropped_with_one_warning_when_unset(unset):
    with pytest.warns(UserWarning, match="dropped: brand_new, newer") as told:
        config_from_dict({**peft_fields(), "brand_new": unset, "newer": None})
    assert len(told) == 1


def test_a_newer_field_is_refused_when_set():
    with pytest.raises(MiniloraError, match="brand_new=7"):
        config_from_dict({**peft_fields(), "brand_new": 7})


def test_a_config_of_peft_0_1_is_read():
    values = {
        "base_model_name_or_path": "bert-base-uncased", "bias": "none", "enable_lora": None,
        "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 16, "lora_dropout": 0.1,
        "merge_weights": False, "modules_to_save": ["classifier"], "peft_type": "LORA", "r": 4,
        "target_modules": ["query", "value"], "task_type": "SEQ_CLS",
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = config_from_dict(values)
    assert (config.r, config.lora_alpha, config.rank_pattern) == (4, 16, {})


def test_written_and_read_again_it_is_the_same():
    config = LoraConfig(
        r=4, target_modules=["value", "query"], rank_pattern={"query": 2}, use_dora=True
    )
    again = config_from_dict(config_to_dict(config))
    assert config_to_dict(again) == config_to_dict(config)


def test_bookkeeping_is_preserved():
    values = {
        **peft_fields(),
        "peft_version": "0.18.0",
        "revision": "main",
        "auto_mapping": {"a": "b"},
    }
    written = config_to_dict(config_from_dict(values))
    assert (written["peft_version"], written["revision"]) == ("0.18.0", "main")
    assert written["auto_mapping"] == {"a": "b"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r is 0; it must be 1 or more"),
        ({"r": 2.5}, "r is 2.5; it must be of type int"),
        ({"r": True}, "r is True"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"task_type": "NONSENSE"}, "task_type is 'NONSENSE'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"init_lora_weights": "pissa_niter_x"}, "init_lora_weights"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan; it must be a finite number"),
        ({"alpha_pattern": {"query": "x"}}, "alpha_pattern is"),
        (
            {"modules_to_save": "classifier"},
            "modules_to_save is 'classifier'; it must be of type list",
        ),
        ({"target_modules": [1]}, "target_modules is"),
        ({"target_modules": "("}, "'(' is no regular expression"),
        ({"rank_pattern": {"(": 1}}, "'(' is no regular expression"),
        ({"rank_pattern": {"query": 0}}, "every rank must be 1 or more"),
        ({"layers_pattern": "layer"}, "layers_pattern is set without layers_to_transform"),
        ({"target_modules": ".*q", "layers_to_transform": 1}, "needs target_modules as a list"),
        (
            {"target_modules": "all-linear", "layers_to_transform": 1},
            "needs target_modules as a list of names, not 'all-linear'",
        ),
        ({"init_lora_weights": "pissa", "lora_alpha": 0}, "needs lora_alpha above 0, not 0"),
        (
            {"init_lora_weights": "pissa_niter_4", "alpha_pattern": {"query": -1}},
            "needs lora_alpha above 0, not -1",
        ),
        ({"trainable_token_indices": [1, 1]}, "a list of distinct token ids"),
        ({"trainable_token_indices": {"word_embeddings": []}}, "a list of distinct token ids"),
        ({"lora_bias": True, "use_dora": True}, "cannot be combined with use_dora"),
        ({"lora_bias": True, "init_lora_weights": "pissa"}, "lora_bias=True needs"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_allowed(settings, message):
    with pytest.raises(MiniloraError) as refused:
        LoraConfig(**settings)
    assert message in str(refused.value)


def test_all_bad_values_are_said_at_once():
    with pytest.raises(MiniloraError, match="r is 0.*bias is 'some'.*use_dora"):
        LoraConfig(r=0, bias="some", lora_bias=True, use_dora=True)


SETS = ("target_modules", "exclude_modules", "modules_to_save")


@pytest.mark.parametrize("name", SETS)
def test_the_order_of_a_list_that_means_a_set_makes_no_difference(name):
    """PEFT keeps sets, and writes them in any order; it also accepts them."""
    one, other = LoraConfig(**{name: ["value", "query"]}), LoraConfig(**{name: {"query", "value"}})
    assert differing_fields(one, other) == [] and config_to_dict(one) == config_to_dict(other)
    fewer = LoraConfig(**{name: ["query"]})
    assert differing_fields(one, fewer) == [f"{name}: ['value', 'query'] -> ['query']"]


def test_layers_to_transform_mean_a_set_and_bookkeeping_is_no_difference():
    one = LoraConfig(layers_to_transform=[2, 0, 1], revision="main", task_type="SEQ_CLS")
    assert differing_fields(one, LoraConfig(layers_to_transform=[0, 1, 2])) == []
    changes = ["r: 8 -> 4", "layers_to_transform: [2, 0, 1] -> None"]
    assert differing_fields(one, LoraConfig(r=4)) == changes


def test_peft_s_task_type_is_taken_as_it_is():
    config = LoraConfig(task_type=peft.TaskType.SEQ_CLS)  # pyright: ignore[reportArgumentType]
    assert json.dumps(config_to_dict(config)["task_type"]) == '"SEQ_CLS"'


def test_a_config_passed_in_is_not_changed():
    config = LoraConfig(task_type="SEQ_CLS", modules_to_save=["pooler"])
    before = copy.deepcopy(config)
    minilora.add_adapter(tiny_classifier(), config)
    assert config == before


def test_modules_to_save_does_not_grow_from_save_to_save(tmp_path):
    """PEFT's does: classifier and score are appended at every round."""
    model = tiny_classifier()
    minilora.add_adapter(model, LoraConfig(task_type="SEQ_CLS"))
    minilora.save_adapter(model, tmp_path / "one")
    again = tiny_classifier()
    minilora.load_adapter(again, tmp_path / "one")
    minilora.save_adapter(again, tmp_path / "two")
    one, two = (tmp_path / name / "adapter_config.json" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
