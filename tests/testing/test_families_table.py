"Every architecture, tried: what the page promises is what a run gives, on every TransformerLens."
import json
from pathlib import Path

import pytest

from langneuron_mi.testing.families import STEPS, families_text, model_families
from langneuron_mi.testing.tiny import ARCHS

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "llama4", "gemma4_moe", "granite_moe", "phi_moe",
            "nemotron_h"]
PAGE = Path(__file__).parents[2]/"nbs/explanations/which_models.ipynb"


@pytest.fixture(scope="module")
def table(): return model_families()


def test_families_all_do_what_a_study_needs(table):
    assert list(table.index) == list(ARCHS)
    for step in ("load", "record", "find", "ablate", "write", "perplexity"):
        assert (table[step] == "yes").all(), table[step][table[step] != "yes"].to_dict()
    assert (table.experts[MIXTURES] == "yes").all() and (table.experts.drop(MIXTURES) == "").all()
    assert (table.share.drop("mt5") == "yes").all() and "encoder-decoder" in table.share["mt5"]


def test_families_say_in_words_what_is_not_defined(table):
    dense = [a for a in table.index if a not in MIXTURES + ["mt5"]]
    assert (table.attribute[dense] == "yes").all() and (table.tune[dense] == "yes").all()
    assert table.attribute[MIXTURES].str.contains("one dense MLP in every layer").all()
    assert table.tune[MIXTURES].str.contains("one dense MLP of one width in every layer").all()


def test_families_page_is_the_output_of_a_run(table):
    cells = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
    said = "".join(x for c in cells if c["cell_type"] == "code" for o in c["outputs"] for x in o["data"]["text/markdown"])
    named = lambda text: {
        l.split(" | ")[0].strip("| "): [x.startswith("no") for x in l.split(" | ")[3:]] for l in text.splitlines()[2:] if l[:1] == "|"
    }
    assert named(said) == named(families_text(table)) and len(named(said)) == len(table)


def test_families_table_of_some():
    some = model_families(["llama"])
    assert list(some.index) == ["llama"] and set(STEPS) < set(some.columns) and "✓" in families_text(some)
