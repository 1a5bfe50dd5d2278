"""docs/02_lora_config.md and its twin name every field of PEFT's LoraConfig, with the defaults."""

import ast
import dataclasses
import re

import peft
import pytest

from minilora import LoraConfig, TrainConfig
from minilora.lora.config import NOT_SUPPORTED
from minilora.starting_model import new_lora_config
from tests.pages import ROOT

PAGES = [ROOT / "docs" / folder / "02_lora_config.md" for folder in ("", "zh")]
PEFTS = peft.LoraConfig()
OURS = [field.name for field in dataclasses.fields(LoraConfig)]


def rows_of(page) -> dict[str, list[str]]:
    """Field -> the other cells of its row, from every table whose second column is PEFT's."""
    rows: list[list[str]] = []
    for table in re.findall(
        r"^\|[^|]*\| PEFT \|.*\n\|[-|]+\n((?:\|.*\n)+)", page.read_text(), re.M
    ):
        rows += [[cell.strip() for cell in line.split(" | ")] for line in table.splitlines()]
    names = [row[0].strip("| `") for row in rows]
    assert len(set(names)) == len(names)
    return {
        name: [cell.strip("`") for cell in row[1:]] for name, row in zip(names, rows, strict=True)
    }


@pytest.mark.parametrize("page", PAGES, ids=["en", "zh"])
def test_the_page_names_every_field_of_pefts_and_no_other_with_both_defaults(page):
    rows, commands = rows_of(page), new_lora_config(TrainConfig(), {})
    assert rows.keys() == {field.name for field in dataclasses.fields(PEFTS)}
    assert rows.keys() - {*OURS} == {*NOT_SUPPORTED, "runtime_config"}
    for name, (of_peft, of_command, *_) in rows.items():
        value = getattr(PEFTS, name)
        assert of_peft == repr(value) or ast.literal_eval(of_peft) == value, name
        if name in OURS:
            assert ast.literal_eval(of_command) == getattr(commands, name), name
