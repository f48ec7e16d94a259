"""Draw the floors of the package from its imports, lazy ones included; exit 1 where a floor leans on one below it, or rooms stand in a circle.

`python tools/map.py` prints the floors; `--mermaid` prints the drawing of README."""
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "langneuron_mi"
FLOORS = ("core", "text", "figures", "models", "recording", "find", "change", "measure", "share", "tuning", "show", "studies", "scale", "cli", "testing")


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


def main() -> int:
    graph = edges()
    bad, round_ = upward(graph), circles(graph)
    if "--mermaid" in sys.argv: print(mermaid(graph) if not bad else "")
    else:
        for f in FLOORS: print(f"{f:10} {', '.join(r.split('.', 1)[-1] for r in graph if floor(r) == f)}")
    for a, b in bad: print(f"up: {a} leans on {b}", file=sys.stderr)
    for group in round_: print(f"circle: {', '.join(group)}", file=sys.stderr)
    return int(bool(bad or round_))


if __name__ == "__main__": sys.exit(main())
