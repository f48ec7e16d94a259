"The study of one file, on tiny models of the paper's architectures, from the command line to the report."
import json
from pathlib import Path

import pandas as pd
import pytest

from langneuron_mi.studies.amplification import AmplificationStudy, read_study
from langneuron_mi.cli import main
from langneuron_mi.testing.tiny import tiny_model

TEXT = {"en": [f"the {w} cat sat on the mat" for w in "big small old new red blue green black white grey fat thin".split()],
        "fr": [f"le chat {w} était sur le tapis" for w in "grand petit vieux neuf rouge bleu vert noir blanc gris gros mince".split()],
        "vi": [f"con mèo {w} ngồi trên chiếu" for w in "to nhỏ già mới đỏ xanh lục đen trắng xám béo gầy".split()]}


@pytest.fixture
def place(tmp_path):
    for lang, lines in TEXT.items():
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{lang}.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "facts").mkdir()
    rows = [
        dict(id=f"f{i}", relation="capital", labels=dict(en=[c, a], fr=[c + "e", b], vi=[c + "i", d]))
        for i, (c, a, b, d) in enumerate(
            [("Ger", "Berlin", "Berline", "Bá Linh"), ("Fra", "Paris", "Pari", "Ba Lê"), ("Rus", "Moscow", "Moscou", "Mát")]
        )
    ]
    (tmp_path / "facts" / "facts.jsonl").write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    (tmp_path / "facts" / "patterns.json").write_text(
        json.dumps(
            dict(
                patterns=dict(
                    capital=dict(en=["The capital of [X] is [Y]"], fr=["La capitale de [X] est [Y]"], vi=["Thủ đô của [X] là [Y]"])
                )
            )
        ),
        encoding="utf-8",
    )
    for arch in ("qwen2", "gemma2"):
        hf, tok = tiny_model(arch)
        hf.save_pretrained(tmp_path/arch)
        tok.save_pretrained(tmp_path/arch)
    return tmp_path


def test_amplification_preset_plumbing_on_tiny_models(place, capsys):
    "The paper's own file, with the models, text and facts replaced by tiny ones."
    preset = open("experiments/amplification.toml", encoding="utf-8").read()
    head, _, _ = preset.partition("[corpus_options]")
    for key, value in dict(
        models=json.dumps([str(place / "qwen2"), str(place / "gemma2")]),
        langs='["en", "fr", "vi"]',
        targets='["fr", "vi"]',
        corpus=json.dumps(str(place / "text")),
        probes=json.dumps(str(place / "facts")),
        out=json.dumps(str(place / "out")),
        held_out="0.3",
        held_out_tokens="20",
        texts="4",
        controls="1",
        new_tokens="3",
        tokens="120",
    ).items():
        lines = [l for l in head.splitlines() if not l.startswith((f"{key} =", '          "SeaLLMs'))]
        head = "\n".join(lines) + f"\n{key} = {value}"
    data = Path(__file__).parents[1] / "data" / "tasks"
    tasks = f'[tasks]\nnames = ["xwinograd_en", "xnli_vi"]\nfactors = ["x2", "=0"]\ndata_dir = "{data}"\nlimit = 2\n'
    (place / "study.toml").write_text(
        head + '\n[method_options]\ntop = 0.2\nfilter = 0.5\nbar = 0.5\n[prompts]\nen = ["The most"]\n' + tasks, encoding="utf-8"
    )
    assert main(["steer", str(place / "study.toml")]) == 0
    said = capsys.readouterr().out
    assert said.count("report: ") == 2 and "Random neurons" in said
    for arch in ("qwen2", "gemma2"):
        out = place / "out" / arch
        assert (out / "report.html").stat().st_size > 100_000
        summary = pd.read_csv(out / "tables" / "summary.csv")
        assert set(summary.factor) == {"p_max", "p_median", "=0", "set10p", "setmax", "plusmax", "x2", "x10"} and set(summary.kind) == {
            "own",
            "random 0",
        }
        assert set(pd.read_csv(out / "tables" / "lss.csv").columns) >= {"base", "target", "lss", "low", "high", "n"}
        tasks = pd.read_csv(out / "tables" / "tasks_set_0.csv")
        assert len(tasks) == 12 and set(tasks.kind) == {"own", "random 0"} and "Tasks under x2: Accuracy changed by" in said
    before = (place / "out" / "qwen2" / "tables" / "lss.csv").read_bytes()
    assert (
        main(
            [
                "steer",
                str(place / "study.toml"),
                "--model",
                str(place / "qwen2"),
                "--out",
                str(place / "out" / "qwen2"),
                "--factors",
                "p_max",
            ]
        )
        == 0
    )
    again = pd.read_csv(place / "out" / "qwen2" / "tables" / "lss.csv")
    assert again.equals(pd.read_csv(__import__("io").BytesIO(before)).query("factor == 'p_max'").reset_index(drop=True))
    assert json.loads((place/"out"/"qwen2"/"provenance.json").read_text())["work"]["forward_tokens"] == 0  # all of it was kept


def test_amplification_file_errors(tmp_path):
    (tmp_path/"a.toml").write_text('modell = "x"', encoding="utf-8")
    with pytest.raises(ValueError, match="a.toml has no 'modell'; did you mean 'model'"): read_study(tmp_path/"a.toml")
    with pytest.raises(ValueError, match="no study file"): read_study(tmp_path/"none.toml")
    with pytest.raises(ValueError, match="no method"): AmplificationStudy(method="magic")
    with pytest.raises(ValueError, match="at least two languages"): AmplificationStudy(langs=("en",))
    assert main(["steer", str(tmp_path/"none.toml")]) == 2


def test_amplification_bad_studies_fail_at_once():
    for bad, why in [
        (dict(factors=("foo",)), "no factor 'foo'"),
        (dict(positions="first"), "no positions"),
        (dict(targets=("ko",)), "not among langs"),
        (dict(method_options={"topp": 1}), "no option topp"),
        (dict(controls=-2), "controls must be"),
        (dict(texts=0), "texts must be"),
        (dict(held_out=2.0), "held_out is a share"),
    ]:
        with pytest.raises(ValueError, match=why):
            AmplificationStudy(**bad)


def test_amplification_preset_asks_the_probes_for_its_targets_only(monkeypatch):
    "Its facts name 15 languages, its neurons are of 18."
    from langneuron_mi.measure.probe_sources import MLAMA_LANGS
    study = read_study("experiments/amplification.toml")[0]
    assert set(study.targets) <= set(MLAMA_LANGS) and not set(study.langs) <= set(MLAMA_LANGS)


def test_amplification_preset_is_readable():
    studies = read_study("experiments/amplification.toml")
    assert len(studies) == 6 and len(studies[0].langs) == 18 and studies[0].facts is None and studies[0].tokens is None
    assert set(studies[0].corpus_options["name_map"]) == set(studies[0].langs)
