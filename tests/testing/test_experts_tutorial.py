"The part of the tutorial on experts that needs no trained model runs, top to bottom; its assertions hold."
import json
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2]/"nbs/tutorials/06_experts.ipynb"


def test_experts_tutorial_runs_without_the_trained_mixture():
    cells = ["".join(c["source"]) for c in json.loads(PAGE.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    run, left = [c for c in cells if "#| eval: false" not in c], [c for c in cells if "#| eval: false" in c]
    names = {}
    for c in run: exec(compile(c, str(PAGE), "exec"), names)
    assert len(names["matrix"].rows) == 13 and names["planted"].experts == {lang: list(s) for lang, s in names["experts"].items()}
    for c in left: compile(c, str(PAGE), "exec")
    assert len(run) >= 7 and "perplexity_matrix" in "".join(left)


def test_experts_tutorial_names_the_command_that_trains_its_model():
    text = PAGE.read_text(encoding="utf-8")
    assert "python experiments/train_mixture.py" in text and (PAGE.parents[2]/"experiments/train_mixture.py").exists()
