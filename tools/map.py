"""Draw the floors of the package from its imports, lazy ones included.

Exit 1 where a floor leans on one below it, or rooms stand in a circle.

`python tools/map.py` prints the floors; `--write` brings the drawing (nbs/images/floors.svg) and the list of rooms
(nbs/explanations/the_house.ipynb) up to date."""
import ast
import json
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "langneuron_mi"
ABOUT = dict(
    core="files that can be trusted, intervals, settings, the engine",
    text="languages, texts, windows of tokens",
    figures="plotly figures of tables; they know no model",
    models="Hugging Face decoders; the one floor that knows TransformerLens",
    recording="statistics of every neuron in every language",
    find="neuron sets, the methods that find them, random controls",
    change="ablate, amplify, set, add; what the model then writes",
    measure="perplexity, facts, steering, tasks, translation",
    share="what languages share, and what answers come from",
    tuning="LoRA on chosen neurons; values at test time",
    show="pages and cards of neurons",
    studies="a study: a TOML file in, a folder out",
    scale="the same work on a Ray cluster",
    cli="the same, typed",
    testing="models whose answers are known")
FLOORS = tuple(ABOUT)
DRAWING, PAGE_OF_ROOMS = "nbs/images/floors.svg", "nbs/explanations/the_house.ipynb"


def rooms(root: Path = ROOT) -> dict[str, Path]:
    "Every module by its dotted name inside the package."
    files = sorted(p for p in (root/PACKAGE).rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
    return {".".join(p.relative_to(root/PACKAGE).with_suffix("").parts): p for p in files}


def _absolute(node: ast.ImportFrom, room: str) -> str:
    "The module that a `from` import names, from the package's root."
    if not node.level: return node.module or ""
    parts = [PACKAGE, *room.split(".")[:-1]]
    base = parts[:len(parts) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def imports(room: str, text: str, known: set[str]) -> set[str]:
    "Rooms that a module leans on: at its top, inside functions, and by a string that names a module."
    named = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            module = _absolute(node, room)
            named |= {module} | {f"{module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            named |= {a.name for a in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(rf"{PACKAGE}(\.\w+)+", node.value):
            named.add(node.value)
    inside = {n.removeprefix(f"{PACKAGE}.") for n in named if n.startswith(f"{PACKAGE}.")}
    return (inside & known) - {room}


def edges(root: Path = ROOT) -> dict[str, set[str]]:
    "What every room leans on."
    known = rooms(root)
    return {room: imports(room, path.read_text(encoding="utf-8"), set(known)) for room, path in known.items()}


def benchmarks(root: Path = ROOT) -> dict[str, set[str]]:
    "What every file of benchmarks/ leans on, among them."
    files = {p.stem: p for p in sorted((root/"benchmarks").glob("*.py"))}
    def named(path: Path) -> set[str]:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        froms = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}
        return (froms | {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}) & set(files)
    return {name: named(path) for name, path in files.items()}


def floor(room: str) -> str: return room.split(".")[0]


def upward(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    "(room, room it leans on) where the second one stands on a lower floor of the house."
    return sorted((a, b) for a, below in graph.items() for b in below if FLOORS.index(floor(b)) > FLOORS.index(floor(a)))


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    "Groups of rooms that lean on each other, in a circle."
    def reach(a: str) -> set[str]:
        seen, todo = set(), [a]
        while todo:
            for b in graph[todo.pop()] - seen:
                seen.add(b)
                todo.append(b)
        return seen
    reached = {a: reach(a) for a in graph}
    groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}
    return sorted(sorted(g) for g in groups)


def arrows(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    "(floor, floor that uses it) where no floor between them uses it already."
    uses = {f: {floor(b) for a, below in graph.items() if floor(a) == f for b in below} - {f} for f in FLOORS}
    def through(f: str) -> set[str]: return set().union(*(uses[g] | through(g) for g in uses[f]), set())
    return [(g, f) for f in FLOORS for g in sorted(uses[f], key=FLOORS.index) if not any(g in uses[h] | through(h) for h in uses[f] - {g})]


def rows(pairs: list[tuple[str, str]]) -> list[list[str]]:
    "Floors in rows: each as low as those that use it allow."
    users = {f: [b for a, b in pairs if a == f] for f in FLOORS}
    def height(f: str) -> int: return 1 + max(map(height, users[f]), default=-1)
    of = {f: height(f) for f in FLOORS if f != "testing"}
    found = [[f for f in of if of[f] == h] for h in range(max(of.values()), -1, -1)]
    found[0].append("testing")  # imports nothing of the package
    return found


WIDE, HIGH, GAP, DOWN, PAGE = 228, 58, 24, 88, 780


def drawing(graph: dict[str, set[str]]) -> str:
    "The floors as an SVG; an arrow leads to the floor that uses another."
    pairs, at, boxes, lines = arrows(graph), {}, [], []
    lay = rows(pairs)
    for y, row in enumerate(lay):
        left = (PAGE - len(row)*WIDE - (len(row) - 1)*GAP)/2
        for x, f in enumerate(row): at[f] = left + x*(WIDE + GAP), 12 + y*DOWN
    for f, (x, y) in at.items():
        said = [f'<tspan x="{x + WIDE/2:g}" dy="15">{t}</tspan>' for t in textwrap.wrap(ABOUT[f], 38)]
        boxes += [f'<rect x="{x:g}" y="{y:g}" width="{WIDE}" height="{HIGH}" rx="6"/>',
                  f'<text x="{x + WIDE/2:g}" y="{y + 19:g}" class="name">{f}</text>', f'<text y="{y + 20:g}">{"".join(said)}</text>']
    for a, b in pairs:
        (x, y), (u, v) = at[a], at[b]
        if v - y <= DOWN: lines.append(f'<path d="M{x + WIDE/2:g} {y + HIGH:g}L{u + WIDE/2:g} {v - 4:g}"/>')
        else:  # around the floors between them
            side = PAGE - 14 if u + WIDE / 2 >= PAGE / 2 else 14
            start = x + WIDE if side > PAGE / 2 else x
            lines.append(f'<path d="M{start:g} {y + HIGH / 2:g}H{side}V{v - 14:g}L{u + WIDE / 2:g} {v - 4:g}"/>')
    size = f'viewBox="0 0 {PAGE} {len(lay) * DOWN}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="floors of langneuron_mi">',
            "<style>rect{fill:#f5f8fc;stroke:#5b7fa6} text{font:11px sans-serif;text-anchor:middle;fill:#444}"
            " .name{font:bold 14px sans-serif;fill:#111}"
            " path{fill:none;stroke:#5b7fa6;stroke-width:1.4;marker-end:url(#a)}</style>",
            '<defs><marker id="a" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0L8 4L0 8z" style="fill:#5b7fa6;stroke:none;marker-end:none"/></marker></defs>',
            f'<rect width="{PAGE}" height="{len(lay) * DOWN}" style="fill:#fff;stroke:none"/>',
            *boxes,
            *lines,
            "</svg>",
            "",
        ]
    )


def listed(root: Path = ROOT) -> str:
    "Every room under its floor, with the line that its notebook begins with."
    out = [MARK]
    for f, about in ABOUT.items():
        rows = sorted((root/"nbs"/f).glob("[0-9]*.ipynb")) or [root/"nbs/90_cli.ipynb"]
        out += ["", f"### {f}", "", f"{about[0].upper()}{about[1:]}.", "", "| room | what it holds |", "|---|---|"]
        for path in rows:
            head = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
            line = re.search(r"^> (.*)$", head, re.M)[1].replace("|", "\\|")
            out.append(f"| [{path.stem.split('_', 1)[1]}](../{path.relative_to(root/'nbs').as_posix()}) | {line} |")
    return "\n".join(out)


MARK = "<!-- made by `python tools/map.py --write` -->"


def write(root: Path = ROOT) -> list[str]: # files that changed
    "Bring the drawing and the list of rooms up to date."
    page = root/PAGE_OF_ROOMS
    nb = json.loads(page.read_text(encoding="utf-8"))
    cell = next(c for c in nb["cells"] if "".join(c["source"]).startswith(MARK))
    cell["source"] = listed(root).splitlines(keepends=True)
    new = {DRAWING: drawing(edges(root)), PAGE_OF_ROOMS: json.dumps(nb, indent=1, ensure_ascii=False) + "\n"}
    changed = [name for name, text in new.items() if not (root/name).exists() or (root/name).read_text(encoding="utf-8") != text]
    for name in changed: (root/name).write_text(new[name], encoding="utf-8")
    return changed


def main() -> int:
    graph = edges()
    bad, round_ = upward(graph), circles(graph) + circles(benchmarks())
    for f in FLOORS: print(f"{f:10} {', '.join(r.split('.', 1)[-1] for r in graph if floor(r) == f)}")
    if "--write" in sys.argv: print("written:", ", ".join(write()) or "nothing had changed")
    for a, b in bad: print(f"up: {a} leans on {b}", file=sys.stderr)
    for group in round_: print(f"circle: {', '.join(group)}", file=sys.stderr)
    return int(bool(bad or round_))


if __name__ == "__main__": sys.exit(main())
