"""The table of `compare.py`: its rows, and what they are as JSON, markdown and a plot."""

import dataclasses
import statistics
from dataclasses import dataclass, field
from importlib.metadata import version

SIZE = (8.5, 5.6)  # of the plot, in inches
PACKAGES = ("torch", "transformers", "peft", "accelerate")


@dataclass
class Row:
    """What was measured of minilora and of its peers: a value for each repeat."""

    name: str
    unit: str
    better: str  # "less" or "more"
    ours: list[float] = field(default_factory=list)
    peers: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""

    def ratio(self, peer: str) -> float:
        """How many times as good as the peer minilora is: below 1 it loses."""
        mine, other = statistics.median(self.ours), statistics.median(self.peers[peer])
        return other / mine if self.better == "less" else mine / other


def as_json(row: Row) -> dict:
    """Four digits are more than the noise leaves."""
    short = dataclasses.replace(
        row,
        ours=[rounded(value) for value in row.ours],
        peers={peer: [rounded(value) for value in values] for peer, values in row.peers.items()},
    )
    ratios = {peer: round(short.ratio(peer), 2) for peer in short.peers}
    return {**dataclasses.asdict(short), "ratios": ratios}


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def rows_of(results: dict) -> list[Row]:
    names = [of.name for of in dataclasses.fields(Row)]
    return [Row(**{name: row[name] for name in names}) for row in results["rows"]]


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def origin(results: dict) -> str:
    """Where a table comes from, in a paragraph."""
    machine, how = results["machine"], ", `--quick`" if results["quick"] else ""
    software = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return (
        f"{results['date']}, commit {results['commit']}. {machine['cpu']} ({', '.join(machine['flags'])}), "
        f"{machine['cores']} cores, {machine['threads']} in use, load {machine['load_before']:.1f} before and "
        f"{machine['load_after']:.1f} after; {software}; {results['texts']}; {results['seconds']} s{how}."
    )


def tables(results: dict) -> list[str]:
    """The one table, in markdown."""
    lines = ["| | minilora | beside | | ratio |", "|---|---|---|---|---|"]
    for row in rows_of(results):
        title = f"{row.name}, {row.unit}" + (f" ({row.note})" if row.note else "")
        if not row.ours:
            lines.append(f"| {title} | | | | |")
        for number, peer in enumerate(row.peers):
            ours = f"{title} | {spread(row.ours)}" if number == 0 else "|"
            lines.append(f"| {ours} | {peer} | {spread(row.peers[peer])} | {row.ratio(peer):.2f} |")
    return ["\n".join(lines)]


def spread(values: list[float]) -> str:
    """The median, and in brackets the least and the greatest of several."""
    ends = f" ({figure(min(values))} to {figure(max(values))})" if len(values) > 1 else ""
    return figure(statistics.median(values)) + ends


def figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def plot(results: dict) -> None:
    """docs/figures/speed-light.svg and speed-dark.svg: a dot for each ratio."""
    import figures

    rows = [row for row in rows_of(results) if row.ours]
    figures.save("speed", lambda axes: draw(axes, rows, figures.COLOURS), size=SIZE)


def draw(axes, rows: list[Row], colours: list[str]) -> None:
    kinds = ("as it comes", "grouped or sorted by length")
    for number, kind in enumerate(kinds):
        places = [place for place, row in enumerate(rows) if len(row.peers) > number]
        ratios = [rows[place].ratio(list(rows[place].peers)[number]) for place in places]
        axes.plot(ratios, places, "os"[number], color=colours[number], label=kind)
        for ratio, place in zip(ratios, places, strict=True):
            how = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
            axes.annotate(f"{ratio:.2f}", (ratio, place), (0, (6, -13)[number]), **how)
    axes.axvline(1, color=colours[-1], linestyle="--")
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.8)
    axes.set_xlabel("minilora is so many times as good; left of 1 it loses")
    title = "the peer: PEFT, or HF Trainer + PEFT"
    axes.figure.legend(loc="outside lower right", ncols=2, title=title)
