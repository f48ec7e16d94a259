"""Draw the floors of the package from its imports, lazy ones included; exit 1 where a floor leans on one below it, or rooms stand in a circle.

`python tools/map.py` prints the floors; `--write` brings the drawing of README and the list of rooms (nbs/explanations/the_house.ipynb) up to date."""
import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "langneuron_mi"
ABOUT = dict(core="files that can be trusted, intervals, settings, the engine", text="languages, texts, windows of tokens", figures="plotly figures of tables; they know no model",
             models="any Hugging Face decoder; the one floor that knows TransformerLens", recording="statistics of every neuron in every language",
             find="neuron sets, the methods that find them, random controls", change="ablate, amplify, set, add; what the model then writes",
             measure="perplexity, facts, steering, tasks, translation", share="what languages share, and what answers come from",
             tuning="LoRA on chosen neurons; values at test time", show="pages and cards of neurons", studies="a study: a TOML file in, a folder out",
             scale="the same work on a Ray cluster", cli="the same, typed", testing="models whose answers are known")
FLOORS = tuple(ABOUT)
PAGES = {"nbs/index.ipynb": lambda: mermaid(edges()), "nbs/explanations/the_house.ipynb": lambda: listed()}


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
        elif isinstance(node, ast.Import): named |= {a.name for a in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(rf"{PACKAGE}(\.\w+)+", node.value): named.add(node.value)
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


def mermaid(graph: dict[str, set[str]]) -> str:
    "The floors as a drawing; an arrow where a floor uses one above it that no floor between them uses already."
    uses = {f: {floor(b) for a, below in graph.items() if floor(a) == f for b in below} - {f} for f in FLOORS}
    def through(f: str) -> set[str]: return set().union(*(uses[g] | through(g) for g in uses[f]), set())
    arrows = [(g, f) for f in FLOORS for g in sorted(uses[f], key=FLOORS.index) if not any(g in uses[h] | through(h) for h in uses[f] - {g})]
    return "\n".join(["```mermaid", "flowchart TD", *(f"  {a} --> {b}" for a, b in arrows), "```"])


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


def write(root: Path = ROOT) -> list[str]: # pages that changed
    "Bring the cell of each page up to date that the imports and the notebooks decide."
    changed = []
    for name, make in PAGES.items():
        text = (root/name).read_text(encoding="utf-8")
        nb = json.loads(text)
        cell = next(c for c in nb["cells"] if "".join(c["source"]).startswith((MARK, "```mermaid")))
        cell["source"] = make().splitlines(keepends=True)
        new = json.dumps(nb, indent=1, ensure_ascii=False) + "\n"
        if new != text:
            (root/name).write_text(new, encoding="utf-8")
            changed.append(name)
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
