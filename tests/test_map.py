"The house: floors that lean only on those above them, lazily or not; README's map; names at the door."
import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import langneuron_mi

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("house", ROOT/"tools/map.py")
house = importlib.util.module_from_spec(spec)
spec.loader.exec_module(house)
NOTEBOOKS = sorted(p.relative_to(ROOT/"nbs").as_posix() for p in (ROOT/"nbs").rglob("[0-9]*_*.ipynb")
                   if p.parent.name not in ("tutorials", "how_to", "explanations", ".ipynb_checkpoints"))


def test_map_no_floor_leans_on_one_below_it():
    graph = house.edges()
    assert house.upward(graph) == []
    assert "models.view" in graph["recording.recorder"] and "core.engine" in graph["recording.record"]


def test_map_no_rooms_stand_in_a_circle():
    assert house.circles(house.edges()) == [] == house.circles(house.benchmarks())
    assert "common" in house.benchmarks()["peers"]


def test_map_sees_every_kind_of_import():
    known = {"a.x", "b.y", "b.z", "a.w"}
    text = ("from ..b.y import f\ndef g():\n    from langneuron_mi.b import z\n    import importlib\n"
            "    return importlib.import_module('langneuron_mi.a.w')\n")
    assert house.imports("a.x", text, known) == {"b.y", "b.z", "a.w"}
    assert house.upward({"text.a": {"models.b"}, "models.b": {"text.a"}}) == [("text.a", "models.b")]
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]


def test_map_is_on_readme_and_lists_every_room():
    assert house.DRAWING in (ROOT/"README.md").read_text(encoding="utf-8")
    assert (ROOT/house.DRAWING).read_text(encoding="utf-8") == house.drawing(house.edges()), "run python tools/map.py --write"
    page = json.loads((ROOT/"nbs/explanations/the_house.ipynb").read_text(encoding="utf-8"))
    text = "\n".join("".join(c["source"]) for c in page["cells"])
    assert house.listed() in text, "run python tools/map.py --write"
    assert sorted(re.findall(r"\]\(\.\./([a-z_/]*\d+_\w+\.ipynb)\) \|", text)) == NOTEBOOKS


def test_map_numbers_are_unique_in_a_folder():
    twice = {k: n for k, n in Counter((p.rpartition("/")[0], p.rpartition("/")[2].split("_")[0]) for p in NOTEBOOKS).items() if n > 1}
    assert not twice


def test_map_no_name_of_the_door_is_a_module_beside_it():
    beside = {p.stem for p in (ROOT/"langneuron_mi").iterdir()} - {"__init__", "__pycache__", "_modidx"}
    assert not beside & set(langneuron_mi.__all__)


def test_map_only_the_door_imports_by_name():
    for path in (ROOT / "langneuron_mi").rglob("*.py"):
        if path == ROOT / "langneuron_mi/__init__.py" or path.name == "_modidx.py":
            continue
        names = {
            getattr(n.func, "attr", getattr(n.func, "id", ""))
            for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(n, ast.Call)
        }
        assert not names & {"import_module", "locals"}, path


def test_map_links_stay_inside_the_tree():
    rows = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    links = [r.split("\t")[1] for r in rows if r.startswith("120000")]
    assert all((ROOT/f).resolve().is_relative_to(ROOT) for f in links)


def test_map_functions_come_through_the_door_in_any_order():
    code = "import langneuron_mi.share.sharing, langneuron_mi.text.languages\nfrom langneuron_mi import sharing, languages\n"
    code += "assert callable(sharing) and len(languages())"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_map_tests_that_pages_name_exist():
    there = {n for p in (ROOT/"tests").rglob("test_*.py") for n in re.findall(r"^def (test_\w+)", p.read_text(encoding="utf-8"), re.M)}
    pages = {p: p.read_text(encoding="utf-8") for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    named = {n for text in pages.values() for n in re.findall(r"`(test_\w+)`", text)}
    files = {n for text in pages.values() for n in re.findall(r"`(tests/[\w/]+\.py)`", text)}
    assert len(named) > 20 and not named - there
    assert len(files) > 5 and all((ROOT/n).exists() for n in files)


def test_map_rooms_are_of_a_size_to_live_in():
    modules = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in (ROOT/"langneuron_mi").rglob("*.py") if p.name != "_modidx.py"}
    assert len(modules) > 80 and {p.name: n for p, n in modules.items() if n > 350} == {}
    for path in [ROOT/"nbs"/name for name in NOTEBOOKS]:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        export = [s for s in code if re.search(r"^#\|\s*export", s, re.M)]
        exported = [[l for l in s.splitlines() if l.strip() and not l.startswith("#|")] for s in export]
        assert len(cells) <= 60 and max(map(len, exported), default=0) <= 35, path
        assert max(len(l) for s in code for l in s.splitlines()) <= 140, path
    for path in (ROOT/"tests").rglob("*.py"):
        assert max(map(len, path.read_text(encoding="utf-8").splitlines()), default=0) <= 140, path


def test_map_functions_take_eight_things():
    def long(node): return [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
    found = {
        f"{p.name}: {n.name}": len(long(n))
        for p in (ROOT/"langneuron_mi").rglob("*.py")
        for n in ast.walk(ast.parse(p.read_text(encoding="utf-8")))
        if isinstance(n, ast.FunctionDef) and len(long(n)) > 8
    }
    assert found == {}
