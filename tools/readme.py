"Write README.md from nbs/index.ipynb, as `nbdev_readme` does, without Quarto."
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
HIDE = re.compile(r"^#\|\s*(hide|include:\s*false|exporti?|default_exp)\b", re.M)


def _output(out) -> str:
    "One stored output as Markdown: Markdown first, then plain text."
    if out.output_type == "stream": text = out.text
    elif out.output_type == "error": raise ValueError("nbs/index.ipynb holds an error output; run it again")
    elif "text/markdown" in out.data: return out.data["text/markdown"].strip()
    else: text = out.data.get("text/plain", "")
    return f"```\n{text.rstrip()}\n```" if text.strip() else ""


def _cell(cell) -> str:
    "One cell as Markdown; empty when it is hidden."
    if cell.cell_type == "raw" or HIDE.search(cell.source): return ""
    if cell.cell_type == "markdown":
        return re.sub(r"\]\((?!https?:|#|mailto:|\.\./)([^)\s]+)\)", r"](nbs/\1)", cell.source).replace("](../", "](").strip()
    source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
    show = [] if "#| echo: false" in cell.source or not source else [f"```python\n{source}\n```"]
    return "\n\n".join([*show, *filter(None, map(_output, cell.outputs))])


def write_readme() -> None:
    "Write README.md if its text has changed."
    nb = nbformat.read(ROOT/"nbs/index.ipynb", as_version=4)
    text = "<!-- made from nbs/index.ipynb by `make check`; edit that -->\n\n" + "\n\n".join(filter(None, map(_cell, nb.cells))) + "\n"
    path = ROOT/"README.md"
    if not path.exists() or path.read_text(encoding="utf-8") != text: path.write_text(text, encoding="utf-8")


if __name__ == "__main__": write_readme()
