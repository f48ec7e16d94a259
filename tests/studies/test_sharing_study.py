"Sharing study: the whole way on a tiny BLOOM through the command line, nothing computed twice, every wrong input one line."
import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest

from langneuron_mi.cli import main
from langneuron_mi.models.loading import load_model
from langneuron_mi.share.sharing import sharing
from langneuron_mi.studies.sharing_study import SharingStudy, read_sharing
from langneuron_mi.studies.parallel_prompts import parallel_prompts
from langneuron_mi.testing.tiny import tiny_model

PROMPTS = {"en": ["ab cd", "e", "fgh"], "de": ["xy z", "wv", "u"], "zh": ["中", "文字", "我x"]}
ANSWERS = {"en": ["b", "c", "d"], "de": ["x", "y", "z"], "zh": ["文", "字", "好"]}


@pytest.fixture(scope="module")
def bloom(tmp_path_factory):
    "A folder with a tiny BLOOM, and prompts with and without answers."
    folder = tmp_path_factory.mktemp("bloom")
    hf, tok = tiny_model("bloom")
    hf.save_pretrained(folder / "model")
    tok.save_pretrained(folder / "model")
    (folder / "prompts.json").write_text(json.dumps(PROMPTS, ensure_ascii=False), encoding="utf-8")
    (folder / "both.json").write_text(json.dumps(dict(prompts=PROMPTS, answers=ANSWERS), ensure_ascii=False), encoding="utf-8")
    return folder


def test_sharing_study_from_json_writes_table_and_figure(bloom, tmp_path, capsys):
    assert main(["share", str(bloom / "prompts.json"), "--model", str(bloom / "model"), "--out", str(tmp_path), "--top-k", "20"]) == 0
    out = capsys.readouterr().out
    assert "3 items in 3 languages" in out and str(tmp_path / "report.html") in out
    t = pd.read_csv(tmp_path / "tables/categories.csv")
    assert np.allclose(t.groupby(["theta", "layer"]).share.sum(), 1) and set(t.theta) == {0., .1, .2, .5}
    model = load_model(str(bloom / "model"))
    want = sharing(model, PROMPTS, theta=[0., .1, .2, .5], progress=False).to_df()
    assert np.allclose(t.share, want.share)
    assert "all-shared" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "tables/effects.csv").exists()  # nothing to lose without answers


def test_sharing_study_preset_runs_on_tiny_bloom(bloom, tmp_path, capsys):
    preset = Path(__file__).parents[2] / "experiments/sharing.toml"
    rows = lambda lang, revision: [dict(premise=f"{lang} a", hypothesis=f"{lang} b", label=i % 3) for i in range(4)]
    with patch("langneuron_mi.studies.parallel_prompts._xnli_rows", rows):
        code = main(
            [
                "share",
                str(preset),
                "--model",
                str(bloom / "model"),
                "--out",
                str(tmp_path),
                "--items",
                "2",
                "--effects",
                "1",
                "--top-k",
                "20",
            ]
        )
    assert code == 0, capsys.readouterr().err
    t = pd.read_csv(tmp_path / "tables/categories.csv")
    assert set(t.task) == {"xnli", "facts"} and set(t.theta) == {0., .1, .2, .3, .4, .5} and set(t.n) == {2}
    effects = pd.read_csv(tmp_path / "tables/effects.csv")
    assert (
        set(effects.op) == {"ablate", "amplify by 1.5"} and set(effects.task) == {"xnli", "facts"} and np.isfinite(effects.difference).all()
    )
    assert set(pd.read_csv(tmp_path / "tables/contribution.csv").lang) == set("en de es fr ru th tr vi zh".split())


def test_sharing_study_preset_is_the_papers():
    studies = read_sharing(Path(__file__).parents[2] / "experiments/sharing.toml")
    assert [s.model.split("/")[-1] for s in studies] == ["bloomz-560m", "bloomz-1b1", "bloomz-1b7", "bloomz-3b", "bloomz-7b1"]
    assert len({s.out for s in studies}) == 5 and all(
        s.items == 1000 and s.top_k == 800 and s.token == "last" and s.theta[0] == 0 for s in studies
    )


def test_sharing_study_second_run_never_runs_the_model(bloom, tmp_path):
    study = SharingStudy(
        model=load_model(str(bloom / "model")),
        langs=(),
        prompts=str(bloom / "both.json"),
        top_k=20,
        effects=2,
        controls=1,
        out=str(tmp_path),
    )
    first = study.run(progress=False, report=False)
    def never(*args): raise AssertionError("the model was run again")
    handle = study.model.original_model.register_forward_pre_hook(never)
    layer = study.model.blocks[0].register_forward_pre_hook(never)
    try: again = study.run(progress=False, report=False)
    finally: handle.remove(); layer.remove()
    for name, table in first.tables().items(): pd.testing.assert_frame_equal(table, again.tables()[name])
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    SharingStudy(**{**study.__dict__, "controls": 2}).run(progress=False, report=False)
    new = [p.name for p in tmp_path.rglob("*") if p.is_file() and p not in kept]
    assert len(new) == 2 and all(n.startswith("effect-") for n in new)
    assert kept == {p: p.stat().st_mtime_ns for p in kept}


@pytest.mark.parametrize("content, words", [
    ({"en": ["a", "b"], "de": ["a"]}, "not parallel"),
    ({"en": ["a"]}, "2 different languages"),
    ({"en": ["a"], "de": [" "]}, "prompt 0 of de is empty"),
    ({"en": ["a"], "de": ["b" * 3000]}, "the context of"),
    ({"en": ["a"], "xx": ["b"]}, "no language 'xx'"),
    ({"en": "a", "de": "b"}, "no parallel prompts"),
    ([1], "no parallel prompts"),
    ({}, "no parallel prompts"),
    ({"prompts": {"en": ["a"], "de": ["b"]}, "answers": {"en": ["c"]}}, "answers in en"),
    ({"prompts": {"en": ["a"], "de": ["b"]}, "answers": {"en": ["c"], "de": []}}, "1 prompts and 0 answers"),
])
def test_sharing_study_wrong_prompts_are_one_line(bloom, tmp_path, capsys, content, words):
    (tmp_path / "p.json").write_text(json.dumps(content))
    assert main(["share", str(tmp_path / "p.json"), "--model", str(bloom / "model"), "--out", str(tmp_path / "out"), "--top-k", "20"]) == 2
    err = [l for l in capsys.readouterr().err.strip().splitlines() if l.startswith("langneuron")]
    assert len(err) == 1 and words in err[0]


@pytest.mark.parametrize("argv, words", [
    (["/no/such.json"], "no file /no/such.json"),
    (["/no/such.toml"], "no study file"),
    (["/no/folder"], "/no/folder"),
    (["cldr", "--langs", "en"], "two or more different languages"),
    (["cldr", "--langs", "en,ger"], "no language 'ger'"),
    (["xnli", "--langs", "en,ja"], "XNLI has no ja"),
    (["xnli", "--langs", "en,de"], "cannot be read from the hub"),
])
def test_sharing_study_command_line_errors(capsys, argv, words):
    assert main(["share", *argv]) == 2
    err = [l for l in capsys.readouterr().err.strip().splitlines() if l.startswith("langneuron")]
    assert len(err) == 1 and words in err[0]


def test_sharing_study_toml_is_checked(tmp_path):
    (tmp_path / "s.toml").write_text('model = "x"\nthetas = [0]\n')
    with pytest.raises(ValueError, match="s.toml has no 'thetas'; did you mean 'theta'"): read_sharing(tmp_path / "s.toml")
    (tmp_path / "s.toml").write_text('models = ["a/x", "y"]\nitems = 0\nlangs = ["en", "German"]\nout = "o"\n')
    a, b = read_sharing(tmp_path / "s.toml")
    assert (a.items, a.langs, a.out, b.out) == (None, ("en", "de"), "o/x", "o/y")
    assert len(read_sharing(tmp_path / "s.toml", model="z")) == 1


def test_sharing_study_facts_can_be_asked_in_every_language():
    p = parallel_prompts("cldr", ["en", "ja", "sw"], n=5)
    assert len(p) == 5 and {len(x) for x in [*p.prompts.values(), *p.answers.values()]} == {5} and len(p.first(2)) == 2


def _edit_file(folder, lang, questions):
    item = lambda l, q: dict(src=f"{q} {l}?", alt=f"{q}-{l}", rephrase="", loc="")
    (folder / f"mzsre_test_en{lang}.json").write_text(json.dumps([{"en": item("en", q), lang: item(lang, q)} for q in questions]))


def test_sharing_study_editing_prompts_state_in_one_language_and_ask_in_the_other(tmp_path):
    _edit_file(tmp_path, "de", ["a", "b"]), _edit_file(tmp_path, "zh", ["a", "b"])
    there, back = parallel_prompts(f"mzsre-en-xx:{tmp_path}"), parallel_prompts(f"mzsre-xx-en:{tmp_path}", ["zh", "en"], n=1)
    assert set(there.prompts) == {"en", "de", "zh"} and len(there) == 2 and len(back) == 1
    assert there.prompts["zh"][1] == "New Fact: b en? b-en\nPrompt: b zh?" and there.answers["zh"] == ["a-zh", "b-zh"]
    assert back.prompts["zh"] == ["New Fact: a zh? a-zh\nPrompt: a en?"] and back.answers["zh"] == ["a-en"]


def test_sharing_study_editing_files_that_are_not_parallel_are_refused(tmp_path):
    _edit_file(tmp_path, "de", ["a", "b"]), _edit_file(tmp_path, "zh", ["b", "a"])
    with pytest.raises(ValueError, match="not parallel"): parallel_prompts(f"mzsre-en-xx:{tmp_path}")
    with pytest.raises(ValueError, match="no direction 'mzsre'"): parallel_prompts(f"mzsre:{tmp_path}")
    with pytest.raises(ValueError, match="no editing files"): parallel_prompts(f"mzsre-en-xx:{tmp_path / 'none'}")
    (tmp_path / "mzsre_test_enzh.json").write_text("[{}]")
    with pytest.raises(ValueError, match="is no editing file"): parallel_prompts(f"mzsre-en-xx:{tmp_path}")
    (tmp_path / "mzsre_test_enzh.json").unlink()
    with pytest.raises(ValueError, match="has no fr; it has en, de"): parallel_prompts(f"mzsre-en-xx:{tmp_path}", ["fr", "de"])
