"""The fields of configs: their types, their bounds, their flags, what differs between two."""

# ruff: noqa: RUF009 (each call of option() makes a new field)

import dataclasses
import math
import re

import pytest

from minilora import LoraConfig, MiniloraError, TrainConfig
from minilora.command import Parser
from minilora.options import (
    add_flags,
    changed,
    check,
    differences,
    given_flags,
    has_type,
    option,
)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, int, True),
        (1, float, True),
        (1.0, int, False),
        (True, int, False),
        (True, float, False),
        (True, bool, True),
        (2**63, int, False),
        (-(2**63) + 1, float, True),
        (math.nan, float, False),
        (math.inf, float | None, False),
        (None, float | None, True),
        (None, float, False),
        ("a", str | list[str], True),
        (["a", "b"], str | list[str], True),
        (["a", 1], list[str], False),
        (("a",), list[str], False),
        ({"a": 1}, dict[str, int], True),
        ({"a": True}, dict[str, int], False),
        ({1: 1}, dict[str, int], False),
        ({"a": [1, math.nan]}, dict[str, list[float]], False),
    ],
)
def test_a_value_has_the_type_of_its_hint_or_not(value, hint, expected):
    assert has_type(value, hint) is expected


@dataclasses.dataclass
class Config:
    many: int = option(3, "how many", group="numbers", least=1)
    share: float = option(0.5, "which share", least=0, below=1)
    limit: float | None = option(None, "how much at most", least=0)
    way: str = option("up", "which way", group="words", choices=("up", "down"))
    names: list[str] | None = option(None, "which ones", is_set=True)
    sizes: dict[str, int] = option({}, "how large")
    hidden: int = option(1, None)

    def __post_init__(self):
        check(self, lambda c: [(c.many > 9 and c.share, "many and share do not fit")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"many": 0}, "many is 0; it must be 1 or more"),
        ({"many": 1.5}, "many is 1.5; it must be of type int"),
        ({"many": None}, "many is None; it must be of type int"),
        ({"share": 1}, "share is 1; it must be in [0, 1)"),
        ({"share": -0.1}, "share is -0.1; it must be in [0, 1)"),
        ({"share": math.nan}, "share is nan; it must be a finite number"),
        ({"limit": -1.0}, "limit is -1.0; it must be 0 or more"),
        ({"limit": math.inf}, "limit is inf; it must be a finite number"),
        ({"way": "left"}, "way is 'left'; it must be one of up, down"),
        ({"way": {}}, "way is {}; it must be of type str"),
        ({"names": "a"}, "names is 'a'; it must be of type list[str] | None"),
        ({"sizes": {"a": 0.5}}, "sizes is {'a': 0.5}; it must be of type dict[str, int]"),
        ({"many": 10}, "many and share do not fit"),
    ],
)
def test_a_bad_field_is_refused_with_what_is_allowed(settings, message):
    with pytest.raises(MiniloraError) as refused:
        Config(**settings)
    assert message in str(refused.value)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(MiniloraError) as refused:
        Config(many=10, limit=-1, way="left")
    assert len(str(refused.value).split("; it must")) == 3
    assert "many and share do not fit" in str(refused.value)


def test_a_default_that_can_change_is_nobody_elses():
    Config().sizes["a"] = 1
    assert Config().sizes == {}


def test_lists_that_mean_sets_differ_only_in_what_they_hold():
    config = Config(names=["b", "a"], many=4)
    assert differences(config, {"names": ["a", "b", "a"], "many": 4}) == []
    assert differences(config, {"names": ["a"], "many": 5}) == [
        "many: 4 -> 5",
        "names: ['b', 'a'] -> ['a']",
    ]


def test_what_was_changed_is_what_is_not_at_its_default():
    assert changed(Config()) == {} and changed(Config(many=4, sizes={"a": 1})) == {
        "many": 4,
        "sizes": {"a": 1},
    }


def parsed(*flags):
    parser = Parser("command", usage=None)
    add_flags(parser, TrainConfig)
    add_flags(parser, LoraConfig, defaults={"lora_alpha": 16})
    namespace = parser.parse_args([*flags])
    return given_flags(TrainConfig, namespace), given_flags(LoraConfig, namespace)


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        ("--r 4", "r", 4),
        ("--lora_alpha 16", "lora_alpha", 16),
        ("--lora_alpha 1.5", "lora_alpha", 1.5),
        ("--use_dora", "use_dora", True),
        ("--use-dora no", "use_dora", False),
        ("--init_lora_weights False", "init_lora_weights", False),
        ("--init_lora_weights pissa", "init_lora_weights", "pissa"),
        ("--target_modules query", "target_modules", ["query"]),
        ("--target_modules layer.0.query value", "target_modules", ["layer.0.query", "value"]),
        ("--target_modules all-linear", "target_modules", "all-linear"),
        ("--target_modules .*query", "target_modules", ".*query"),
        ("--modules_to_save pooler", "modules_to_save", ["pooler"]),
        ("--layers_to_transform 0 2", "layers_to_transform", [0, 2]),
        ('--rank_pattern {"query":2}', "rank_pattern", {"query": 2}),
    ],
)
def test_a_flag_gives_a_value_of_its_field(flags, name, value):
    train, lora = parsed(*flags.split())
    assert (train, lora) == ({}, {name: value}) and type(lora[name]) is type(value)
    LoraConfig(**lora)


@pytest.mark.parametrize(
    "flags",
    ["--r x", "--r 1.5", "--use_dora maybe", "--rank_pattern [1]", "--bias some", "--hidden 1"],
)
def test_a_flag_that_is_none_is_refused_in_one_line(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        parsed(*flags.split())
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")


def test_every_field_with_a_help_text_has_a_flag_and_no_other(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    shown = capsys.readouterr().out
    for config in (TrainConfig, LoraConfig):
        for field in dataclasses.fields(config):
            has_help = field.metadata.get("help") is not None
            # Behind a flag with another name Python 3.13 has a comma.
            assert (re.search(f" --{field.name}[ ,]", shown) is not None) == has_help, field.name
    assert "(default: 16)" in shown and "LoRA:" in shown and "evaluation:" in shown
