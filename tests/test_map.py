"README's map: every room once, and no room that leans on one below it."
import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = re.findall(r"^\| \[(\w+)\]\(nbs/(\d+_\w+)\.ipynb\)", (ROOT/"README.md").read_text(encoding="utf-8"), re.M)


def leans_on(module: str) -> set[str]:
    "Rooms that a module imports when it is imported; what a function imports when it is called (a figure, an engine) is left out."
    tree = ast.parse((ROOT/"langneuron_mi"/f"{module}.py").read_text(encoding="utf-8"))
    names = [n.module if n.level == 0 else f"langneuron_mi.{n.module}" for n in tree.body if isinstance(n, ast.ImportFrom) and n.module]
    return {n.split(".")[1] for n in names if n.startswith("langneuron_mi.")}


def test_map_has_every_room_once():
    assert sorted(file for _, file in ROOMS) == sorted(f.stem for f in (ROOT/"nbs").glob("[0-9]*.ipynb"))
    assert [file.split("_", 1)[1] for _, file in ROOMS] == [name for name, _ in ROOMS]


def test_map_rooms_import_only_from_rooms_above():
    above, below = set(), {}
    for name, _ in ROOMS:
        if wrong := leans_on(name) - above: below[name] = wrong
        above.add(name)
    assert not below and leans_on("recording") > {"models", "windows"}
