"Build the site from _quarto.yml into _docs without Quarto: nbdev prepares the pages, smalldocs renders and checks them."
import re
import subprocess
import sys
from pathlib import Path
from shutil import copy2, rmtree

import nbformat
import yaml
from map import FLOORS

ROOT = Path(__file__).resolve().parent.parent

SECTIONS = {"tutorials": "Tutorials", "how_to": "How-to guides", "explanations": "Explanations"}


def prepare() -> Path:
    "Run nbdev's own preparation: `_proc` holds the pages with documented signatures and the stored outputs."
    import nbdev.doclinks
    from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
    from nbdev.serve import proc_nbs
    for d in ("_proc", "_docs"): rmtree(ROOT/d, ignore_errors=True)
    refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    nbdev_sidebar.__wrapped__()
    proc_nbs(force=True, n_workers=2)
    return ROOT/"_proc"


def output_name(nb: nbformat.NotebookNode) -> str | None:
    "The `output-file` which nbdev wrote into the front matter, without its suffix."
    m = next((re.search(r"^output-file:\s*(\S+)\.html", c.source, re.M) for c in nb.cells if c.cell_type == "raw"), None)
    return m and m.group(1)


def rename_pages(proc: Path) -> dict[str, str]:
    "Give each page the name of its `output-file`, as Quarto would, and mend the links between pages."
    pages = {f: nbformat.read(f, as_version=4) for f in sorted(proc.rglob("*.ipynb"))}
    names = {f.name: f"{output_name(nb) or f.stem}.ipynb" for f, nb in pages.items()}
    for f, nb in pages.items():
        for c in nb.cells:
            if c.cell_type == "raw": c.source = re.sub(r"^format:\s*commonmark\n|^output-file:.*\n", "", c.source, flags=re.M)
            if c.cell_type == "markdown": c.source = re.sub(r"(?<=[(/])([\w-]+\.ipynb)(?=[#)])", lambda m: names.get(m[1], m[1]), c.source)
        f.unlink()
        nbformat.write(nb, f.with_name(names[f.name]))
    return names


def _renamed(item, names: dict[str, str]):
    "A sidebar entry under its new page names."
    if isinstance(item, str): return str(Path(item).with_name(names.get(Path(item).name, Path(item).name)))
    if "contents" in item: return item | {"contents": [_renamed(i, names) for i in item["contents"]]}
    return item


def reference(folders: dict[str, list], pages: list) -> list[dict]:
    "The rooms under their floors, in the order of the house; pages outside the floors stand at the end."
    return [{"section": f, "contents": folders[f]} for f in FLOORS if folders.get(f)] + pages


def order_sidebar(proc: Path, names: dict[str, str]) -> None:
    "The four kinds of page as readable sections; the modules are the reference."
    path = proc/"sidebar.yml"
    contents = yaml.safe_load((ROOT/"nbs/sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    contents = [_renamed(i, names) for i in contents]
    folders = {i["section"]: i["contents"] for i in contents if isinstance(i, dict)}
    pages = [i for i in contents if isinstance(i, str)]
    home, modules = [p for p in pages if Path(p).stem == "index"], [p for p in pages if Path(p).stem != "index"]
    sections = [{"section": title, "contents": folders[d]} for d, title in SECTIONS.items() if folders.get(d)]
    out = [*home, *sections, {"section": "Reference", "contents": reference(folders, modules)}]
    path.write_text(yaml.safe_dump({"website": {"sidebar": {"contents": out}}}, sort_keys=False), encoding="utf-8")


def own_plotly(docs: Path) -> None:
    "Serve plotly.js from the site itself: figures show without a network, and no reader is reported to a CDN."
    from plotly.offline import get_plotlyjs
    (docs/"site_libs").mkdir(exist_ok=True)
    (docs/"site_libs"/"plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    for page in docs.rglob("*.html"):
        up = "../"*(len(page.relative_to(docs).parts) - 1)
        old = page.read_text(encoding="utf-8")
        new = re.sub(r'<script src="https://cdnjs[^"]*mathjax[^"]*"></script>', "", old)
        new = re.sub(r'src="https://cdn\.plot\.ly/[^"]*"(\s+(integrity|crossorigin)="[^"]*")*', f'src="{up}site_libs/plotly.min.js"', new)
        if new != old: page.write_text(new, encoding="utf-8")


def main() -> int:
    proc = prepare()
    names = rename_pages(proc)
    for f in ("nbdev.yml", "_quarto.yml"):
        text = (ROOT/"nbs"/f).read_text(encoding="utf-8")
        (proc/f).write_text(re.sub(r"output-dir: .*", "output-dir: ../_docs", text), encoding="utf-8")
    copy2(ROOT/"nbs/styles.css", proc)
    order_sidebar(proc, names)
    for command in ("render", "check"):
        quiet = ["--quiet"] if command == "render" else []
        code = subprocess.run([Path(sys.executable).with_name("smalldocs"), command, *quiet, proc]).returncode
        if code: return code
    own_plotly(ROOT/"_docs")
    print(f"{len(list((ROOT/'_docs').rglob('*.html')))} pages in _docs; open _docs/index.html, or: python -m http.server -d _docs")
    return 0


if __name__ == "__main__": sys.exit(main())
