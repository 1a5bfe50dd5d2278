"""The pages that scripts write are what the scripts would write now, from the code as it is."""

import importlib.util
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minilora.training.config import TrainConfig
from tests.test_architecture import COMMANDS, core

SCRIPTS = Path(__file__).parent.parent / "docs" / "scripts"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["commands", "core_page"])
def test_a_generated_page_is_current(name):
    module = script(name)
    written = module.PAGE.read_text(encoding="utf-8")
    assert written == module.page(), f"write it anew: python docs/scripts/{name}.py"


def test_every_flag_of_every_command_has_its_row():
    module = script("commands")
    assert set(module.COMMANDS) == set(COMMANDS)
    page = module.page()
    for command in COMMANDS:
        own = page.split(f"\n## {command}\n", 1)[1].split("\n## ", 1)[0]
        listed = set(re.findall(r"^\| .*?`(--\w+)`", own, re.M))
        actions = [a for a in module.parser_of(command)._actions if a.help != module.AS_OF_TRAIN]
        flags = {flag for action in actions for flag in action.option_strings}
        aliases = {"-h", "--help", "--lora_r"}
        assert listed == flags - aliases and "--config" in listed


def test_a_default_that_changes_is_noticed(monkeypatch):
    """The control of the first test."""
    module = script("commands")
    field = TrainConfig.__dataclass_fields__["learning_rate"]
    monkeypatch.setattr(field, "default", 0.5)
    assert module.page() != module.PAGE.read_text(encoding="utf-8")


class Text(HTMLParser):
    """The texts of a page's code, the places it has and those its links lead to."""

    def __init__(self):
        super().__init__()
        self.code, self.places, self.links, self.sources = [""], [], [], []
        self.inside, self.open = False, []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.places += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if tag == "a" else []
        self.sources += [given[name] for name in ("src", "onclick", "style") if name in given]
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.inside = self.inside or (tag == "pre" and "div" not in self.open)

    def handle_endtag(self, tag):
        if tag in self.open:  # html leaves some open
            assert self.open.pop() == tag
        if tag == "pre" and self.inside:
            self.inside = False
            self.code.append("")

    def handle_data(self, data):
        self.code[-1] += data if self.inside else ""


def test_the_core_page_holds_every_line_of_the_core_and_needs_nothing_else():
    page = script("core_page").PAGE.read_text(encoding="utf-8")
    text = Text()
    text.feed(page)
    assert len(set(text.places)) == len(text.places) > 100
    assert {link.removeprefix("#") for link in text.links} <= set(text.places)
    assert not text.sources and not re.search(r"<(script|link|img|iframe)|url\(|@import", page)
    shown = {line.strip() for block in text.code for line in block.splitlines()}
    words = " ".join(unescape(re.sub(r"<[^>]+>", "", page)).split())
    for path in core():
        for line in path.read_text().splitlines():
            prose = " ".join(line.strip().strip('"# ').replace("`", "").split())
            assert line.strip() in shown or prose in words, f"{path.name}: {line}"


def test_what_stands_in_the_code_is_escaped(tmp_path, monkeypatch):
    module = script("core_page")
    (tmp_path / "minilora").mkdir()
    text = '"""<b>\n\n    1 < 2 & `3 > 2`\n\nEnd.\n"""\n\nfrom os import path\n\n'
    text += 'X = "<script>" < f"{1:>3}<"  # <i>\n'
    (tmp_path / "minilora" / "a.py").write_text(text)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    html = module.article(module.Source("a.py", "the phrase"), set())
    assert "<p>&lt;b&gt;</p><pre>    1 &lt; 2 &amp; <code>3 &gt; 2</code></pre>" in html
    code = 'X = <em>"&lt;script&gt;"</em> &lt; <em>f"{1:&gt;3}&lt;"</em>  <i># &lt;i&gt;</i>'
    assert f"<pre>{code}</pre>" in html
