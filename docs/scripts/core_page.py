"""Write docs/core.html: the core, its docstrings and comments on the left, the code on the right.

python docs/scripts/core_page.py
"""

import ast
import inspect
import io
import keyword
import re
import tokenize
from html import escape
from itertools import pairwise
from pathlib import Path
from string import Template

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "core.html"
LISTED = re.compile(r"^\d+\. `([\w/]+\.py)`: (.+)", re.M)  # README's list of the core
TOOLS = re.compile(r"# (fmt|ruff|noqa|pyright)\b")  # comments for tools stay in the code


class Source:
    """A file of the core: what begins a row, what is prose, how each line's code looks."""

    def __init__(self, name: str, phrase: str) -> None:
        self.name, self.phrase, self.stem = name, phrase, Path(name).stem
        self.text = (ROOT / "minilora" / name).read_text(encoding="utf-8")
        self.lines, tree = self.text.splitlines(), ast.parse(self.text)
        self.begins: dict[int, str] = {}  # first line of a definition -> its name, Class.method
        self.docstrings: dict[int, ast.Constant] = {}  # by their first line
        self.note(tree, "")
        self.homes = dict.fromkeys(self.begins.values(), self.stem)  # a name -> its file's stem
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        for node in imports:
            stem = str(node.module).rpartition(".")[2]
            self.homes |= {alias.name: stem for alias in node.names}
        self.begins[1 + (imports[-1].end_lineno or 0)] = ""  # what is behind them

    def note(self, owner: ast.Module | ast.ClassDef | ast.FunctionDef, name: str) -> None:
        match owner.body[0]:
            case ast.Expr(ast.Constant(str())) as first:
                self.docstrings[first.lineno] = first.value
        for node in owner.body if not isinstance(owner, ast.FunctionDef) else []:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                first_line = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                self.begins[first_line] = own = f"{name}.{node.name}".strip(".")
                self.note(node, own)

    def rows(self):
        """[name or "", paragraphs of prose, first line, lines of code], in order."""
        found, skipped, in_comment = [("", [], 1, [])], 0, False
        for number, line in enumerate(self.lines, 1):
            text = line.strip()
            is_comment = number > skipped and text.startswith("#") and not TOOLS.match(text)
            if number in self.begins:
                own = found.pop()[1] if in_comment else []  # a comment right above it
                found.append((self.begins[number], own, number, []))
            elif is_comment and not in_comment:
                found.append(("", [], number, []))
            if number in self.docstrings:
                skipped = self.docstrings[number].end_lineno or number
                found[-1][1].append(inspect.cleandoc(str(self.docstrings[number].value)))
            elif is_comment:
                found[-1][1][:] = ["\n".join([*found[-1][1], text[1:].removeprefix(" ")])]
            elif number > skipped + (not line):  # nor an empty line behind a docstring
                found[-1][3].append(number)
            in_comment = is_comment
        return [row for row in found if row[1] or any(self.lines[n - 1].strip() for n in row[3])]

    def coloured(self, anchors: set[str]) -> list[str]:
        """Each line as HTML, names of the core's functions linked."""
        found, places = [""] * len(self.lines), [0] * len(self.lines)
        for start, end, before, after in self.spans(anchors):
            for row in range(start[0] - 1, end[0]):
                line = self.lines[row]
                left = start[1] if row == start[0] - 1 else 0
                right = end[1] if row == end[0] - 1 else len(line)
                found[row] += escape(line[places[row] : left], quote=False)
                found[row] += before + escape(line[left:right], quote=False) + after
                places[row] = right
        ends = zip(found, self.lines, places, strict=True)
        return [html + escape(line[place:], quote=False) for html, line, place in ends]

    def spans(self, anchors: set[str]):
        """(start, end, tag before, tag after) of each token that is more than plain."""
        tokens = list(tokenize.generate_tokens(io.StringIO(self.text).readline))
        depth, opened, last = 0, (0, 0), [tokenize.TokenInfo(0, "", (0, 0), (0, 0), "")] * 2
        for token, following in pairwise(tokens):
            kind, text = tokenize.tok_name[token.type], token.string
            opened = opened if depth else token.start  # an f-string is one STRING before 3.12
            depth += {"FSTRING_START": 1, "FSTRING_END": -1}.get(kind, 0)
            if kind in ("STRING", "FSTRING_END") and not depth:
                yield opened, token.end, "<em>", "</em>"
            elif kind == "COMMENT":
                yield token.start, token.end, "<i>", "</i>"
            elif kind == "NAME" and not depth:
                owner = last[0].string if last[1].string == "." else None
                anchor = f"{owner or self.homes.get(text)}.{text}"
                if keyword.iskeyword(text):
                    yield token.start, token.end, "<b>", "</b>"
                elif last[1].string in ("def", "class"):
                    yield token.start, token.end, "<dfn>", "</dfn>"
                elif anchor in anchors and following.string not in ("=", ":"):
                    yield token.start, token.end, f'<a href="#{anchor}">', "</a>"
            last = [last[1], token]


def prose(paragraphs: list[str]) -> str:
    """What is indented is kept as it stands; `code` is code."""
    html = []
    for paragraph in "\n\n".join(paragraphs).split("\n\n"):
        is_kept = any(line.startswith(" ") for line in paragraph.splitlines())
        text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(paragraph, quote=False))
        html.append(f"<pre>{text}</pre>" if is_kept else f"<p>{text}</p>")
    return "".join(html) if paragraphs else ""


def article(source: Source, anchors: set[str]) -> str:
    """A file: its heading, then a row for each definition and each comment."""
    lines, html = source.coloured(anchors), []
    for name, paragraphs, first, numbers in source.rows():
        place, tag = f"{source.stem}.{name}", "h4" if "." in name else "h3"
        head = f'<{tag}><a href="#{place}">{name}</a></{tag}>' if name else ""
        code = "\n".join(lines[number - 1] for number in numbers).strip("\n")
        block = f"<pre>{code}</pre>" if code else ""
        if first == 1:
            block = f"<details><summary>imports</summary>{block}</details>"
        begin = f'<section id="{place}">' if name else f"<section{' class=first' * (first == 1)}>"
        html.append(f"{begin}<div>{head}{prose(paragraphs)}</div>{block}</section>")
    header = f"<h2>{source.name}</h2><p>{source.phrase}; {len(source.lines)} lines</p>"
    header = f'<header>{header}<a href="#contents">contents</a></header>\n'
    return f'<article id="{source.stem}">{header}' + "\n".join(html) + "</article>"


def page() -> str:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = LISTED.findall(readme.split("## The core", 1)[1].split("\n## ", 1)[0])
    sources = [Source(name, phrase) for name, phrase in listed]
    anchors = {f"{source.stem}.{name}" for source in sources for name in source.begins.values()}
    contents = []
    for source in sources:
        names = [name for name in source.begins.values() if name and "." not in name]
        links = ", ".join(f'<a href="#{source.stem}.{name}">{name}</a>' for name in names)
        link = f'<a href="#{source.stem}">{source.name}</a>'
        contents.append(f"<li>{link}: {source.phrase}<br><small>{links}</small></li>")
    articles = "\n".join(article(source, anchors) for source in sources)
    counts = {"files": len(sources), "lines": sum(len(source.lines) for source in sources)}
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return template.substitute(counts, contents="\n".join(contents), articles=articles)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
