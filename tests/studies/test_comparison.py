"Comparison: every effect from an independent truth, nothing computed twice, and only what depends on a changed field computed again."
import logging
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from langneuron_mi.studies.comparison_result import MEASURES, selectivities
from langneuron_mi.studies.comparison import Experiment, read_experiment, shared_sets
from langneuron_mi.text.sources import load_corpus
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.measure.facts import Fact
from langneuron_mi.measure.probes import Probes
from langneuron_mi.studies.comparison_report import write_report
from langneuron_mi.testing.planted import planted_model
from langneuron_mi.testing.tiny import tiny_model

LANGS = ("en", "de", "fr")
PPL, ANSWER, LSS = MEASURES


def toy_probes(p, langs=LANGS):
    facts = [Fact(f"after {m}", "successor", {l: (f"{l}{m}", f"{l}{p.order[m]}") for l in langs}) for m in range(p.n_words)]
    return Probes(tuple(facts), {"successor": {l: "[X] [Y]" for l in langs}}, tuple(langs), "toy")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "An experiment on the planted model that has run, and what it found."
    p = planted_model()
    e = Experiment(
        model=load_model(p.hf, tokenizer=p.tokenizer),
        langs=LANGS,
        corpus=load_corpus(p.texts(300, seed=0), list(LANGS)),
        tokens=500,
        held_out_tokens=84,
        held_out=0.3,
        probes=toy_probes(p),
        prompts=p.texts(1, seed=5)["en"],
        new_tokens=2,
        out=str(tmp_path_factory.mktemp("toy")),
    )
    return p, e, e.run(progress=False, report=False)


def files(e):
    "What is kept, by time of writing; config.json is always written, to know early that the folder can be."
    return {p: p.stat().st_mtime_ns for p in Path(e.out).rglob("*") if p.is_file() and p.name != "config.json"}


def effects(result): return result.comparison.set_index(["intervention", "lang", "measure"]).effect


def test_comparison_has_all_that_is_to_be_compared(toy):
    _, e, r = toy
    t = r.comparison
    assert list(t.columns) == ["intervention", "lang", "measure", "effect", "low", "high", "n", "size"]
    for measure in (PPL, ANSWER):
        assert {f"{a} {r}{l}" for a in ("ablate", "mean", "x3") for r in ("", "random ") for l in LANGS} <= set(
            t[t.measure == measure].intervention
        )
        assert {
            f"{a} {r}{s}"
            for r in ("", "random ")
            for a, s in (("ablate", "all-shared"), ("x1.5", "all-shared"), ("ablate", "most-shared"), ("x3", "most-shared"))
        } <= set(t[t.measure == measure].intervention)
    assert {"mean de", "mean random de", "x3 fr"} <= set(t[t.measure == LSS].intervention)
    assert not t.duplicated(["intervention", "lang", "measure"]).any()
    assert ((t.low <= t.effect + 1e-9) & (t.effect <= t.high + 1e-9)).all()
    assert set(t[t.intervention.isin(["ablate de", "ablate random de"])]["size"]) == {len(r.neurons["de"])}
    assert set(t[t.intervention.str.endswith("all-shared")]["size"]) == {len(r.shared["all-shared"])}
    assert len(r.shared["most-shared"]) == len(r.neurons["de"]) and set(r.shared["most-shared"]) <= set(r.shared["all-shared"])


def test_comparison_perplexity_is_the_perplexity_table(toy):
    _, e, r = toy
    ppl = r.tables()["perplexity"].set_index(["method", "neurons_of", "text_lang"]).ratio
    t = effects(r)
    assert t["ablate de", "fr", PPL] == ppl["lape", "de", "fr"] and t["mean random en", "de", PPL] == ppl["random_mean", "en", "de"]
    assert t["x1.5 all-shared", "de", PPL] == ppl["up", "all-shared", "de"]


@pytest.mark.parametrize("lang", LANGS)
@pytest.mark.parametrize("off", ["de", "fr"])
def test_comparison_answers_equal_plain_pytorch_on_the_model(toy, lang, off):
    p, e, r = toy
    def logp(fact):
        word = f"{lang}{fact.split()[1]}"
        ids = torch.tensor([p.tokenizer(f"{word} {p.successor(word)}").input_ids])
        with torch.no_grad(): return float(p.hf(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]])
    asked = r.facts["probes"]["asked"]
    before = np.array([logp(f) for f in asked])
    with p.ablated(list(r.neurons[off])):
        after = np.array([logp(f) for f in asked])
    row = r.comparison[
        (r.comparison.intervention == f"ablate {off}") & (r.comparison.lang == lang) & (r.comparison.measure == ANSWER)
    ].iloc[0]
    assert row.effect == pytest.approx((after - before).mean(), abs=1e-4) and row.n == len(asked)


def test_comparison_finds_the_planted_answer(toy):
    _, e, r = toy
    s = selectivities(r.comparison).set_index(["intervention", "measure"])
    assert s.selectivity["ablate own", PPL] > 3 and s.selectivity["ablate random", PPL] == pytest.approx(1, abs=.1)
    assert s.own["ablate own", ANSWER] < -2 and s.others["ablate own", ANSWER] == pytest.approx(0, abs=.01)
    assert s.own["mean own", LSS] == 1 and math.isnan(s.selectivity["mean own", LSS])
    assert math.isnan(s.own["ablate all-shared", PPL]) and s["size"]["ablate all-shared", PPL] == len(r.shared["all-shared"])


def test_comparison_measures_on_other_facts_than_it_finds_with(toy):
    _, e, r = toy
    used = r.facts["probes"]
    assert used["asked"] and used["found_shared_with"] and not set(used["asked"]) & set(used["found_shared_with"])
    assert set(r.answers.fact) == set(used["asked"]) and set(r.steering.items.fact) <= set(used["asked"])


def test_comparison_controls_are_other_neurons_as_many_per_layer(toy):
    _, e, r = toy
    for l in LANGS:
        assert torch.equal(r.controls[l].per_layer(), r.neurons[l].per_layer()) and r.controls[l].fingerprint != r.neurons[l].fingerprint


def test_comparison_second_run_never_runs_the_model(toy):
    p, e, r = toy
    before = files(e)
    def never(*args): raise AssertionError("the model was run again")
    hooks = [m.register_forward_pre_hook(never) for m in (p.hf.model.layers[0], p.hf.lm_head)]
    try: again = e.run(progress=False, report=False)
    finally: [h.remove() for h in hooks]
    pd.testing.assert_frame_equal(again.comparison, r.comparison)
    pd.testing.assert_frame_equal(again.generations, r.generations)
    assert files(e) == before


@pytest.mark.parametrize("change, expected", [
    (dict(new_tokens=3), {"generations": 1 + 2*3}),
    (dict(boost=2.), {"rows": 2*3, "answers": 2}),  # a row is a cell for each language
    (dict(at_least=.9), {"rows": 4*3, "answers": 4}),  # all-shared and its control, off and up
    (dict(held_out_tokens=42), {"rows": 3 + 2*3*3 + 4*3*2 + 8*3}),  # none, ablations, amplifications in two languages, shared sets
    (dict(bases=("fr",)), {"steering": 2 + 2*2*2}),
    (dict(facts=2), {"answers": 1 + 6*3 + 8, "steering": 2 + 2*2*2}),
], ids=lambda x: next(iter(x), "nothing") if isinstance(x, dict) else None)
def test_comparison_changed_field_recomputes_only_what_depends_on_it(toy, change, expected):
    _, e, _ = toy
    before = files(e)
    replace(e, **change).run(progress=False, report=False)
    new = [p for p in files(e) if p not in before]
    assert {p: t for p, t in files(e).items() if p in before} == before
    for p in new: p.unlink()
    assert dict(Counter(p.parent.name for p in new)) == expected


def test_comparison_goes_on_after_an_interruption(toy, tmp_path, monkeypatch):
    _, e, r = toy
    mine = replace(e, out=str(tmp_path))
    calls = []
    def stop(self, *args, **kw):
        calls.append(1)
        if len(calls) > 2: raise KeyboardInterrupt
        return real(self, *args, **kw)
    real = type(view(e.model)).generate
    monkeypatch.setattr(type(view(e.model)), "generate", stop)
    with pytest.raises(KeyboardInterrupt): mine.run(progress=False, report=False)
    kept = files(mine)
    assert sum("generations" in str(p) for p in kept) == 2
    monkeypatch.setattr(type(view(e.model)), "generate", real)
    pd.testing.assert_frame_equal(mine.run(progress=False, report=False).comparison, r.comparison)
    assert {p: t for p, t in files(mine).items() if p in kept} == kept


def test_comparison_p_median_needs_text_means(toy, tmp_path):
    _, e, _ = toy
    r = replace(e, groups=("counts", "moments", "text_means"), texts=10, out=str(tmp_path), prompts=()).run(progress=False, report=False)
    assert {"p_median de", "p_median random de"} <= set(r.comparison.intervention) and "p_median" in set(r.steering.items.factor)
    t = effects(r)
    assert t["p_median de", "en", LSS] == 1
    assert not len(r.generations)
    only = replace(e, groups=("counts",), out=str(tmp_path), prompts=()).run(progress=False, report=False)
    assert not only.comparison.intervention.str.startswith("mean").any() and "x3 de" in set(only.comparison.intervention)
    write_report(only)


def test_comparison_without_facts_is_still_a_comparison(toy, tmp_path):
    _, e, _ = toy
    r = replace(e, facts=0, shared_facts=0, out=str(tmp_path)).run(progress=False)
    assert set(r.comparison.measure) == {PPL} and r.sharing is None and r.steering is None and not r.shared
    csv = pd.read_csv(tmp_path / "tables/comparison.csv")
    assert list(csv.columns) == ["intervention", "lang", "measure", "effect", "low", "high", "n", "size"] and len(csv) == len(r.comparison)


def test_comparison_language_without_facts_is_measured_by_text_alone(toy, tmp_path, caplog):
    p, e, _ = toy
    with caplog.at_level(logging.WARNING):
        r = replace(e, probes=toy_probes(p, ("en", "de")), out=str(tmp_path), prompts=()).run(progress=False, report=False)
    assert "no facts in fr" in caplog.text
    t = r.comparison
    assert (
        set(t[t.measure == PPL].lang) == {*LANGS} and set(t[t.measure == ANSWER].lang) == {"en", "de"} and r.sharing.langs == ("en", "de")
    )
    alone = replace(e, probes=toy_probes(p, ("en",)), out=str(tmp_path), prompts=()).run(progress=False, report=False)
    assert set(alone.comparison.measure) == {PPL}


def test_comparison_report_and_command_line_write_the_table(toy, tmp_path, capsys):
    from langneuron_mi.cli import main
    p, e, r = toy
    html = write_report(r, tmp_path / "r").read_text(encoding="utf-8")
    assert "neurons most often shared by all languages" in html and "The comparison in numbers" in html and len(r.sentences()) == 5
    p = planted_model()  # one that TransformerLens has not wrapped
    p.hf.save_pretrained(tmp_path / "model")
    p.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text").mkdir()
    for lang, lines in p.texts(200, seed=0).items():
        (tmp_path / "text" / f"{lang}.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "e.toml").write_text(
        f'model = "{tmp_path}/model"\ncorpus = "{tmp_path}/text"\nlangs = ["en", "de", "fr"]\ntokens = 400\nheld_out_tokens = 60\n'
        'new_tokens = 2\nfacts = 3\nshared_facts = 3\n'
        f'bases = ["de"]\ngroups = ["counts", "moments"]\nboost = 2\nout = "{tmp_path}/exp"\n'
    )
    assert main(["compare", str(tmp_path / "e.toml")]) == 0
    t = pd.read_csv(tmp_path / "exp/tables/comparison.csv")
    assert set(t.measure) == {*MEASURES} and set(t[t.measure == LSS].lang) == {"de"}
    assert (tmp_path / "exp/figures/comparison.png").exists() or not list((tmp_path / "exp/figures").glob("*"))
    assert main(["report", str(tmp_path / "exp")]) == 0


def test_comparison_on_a_plain_mlp_with_real_facts(tmp_path):
    hf, tok = tiny_model("bloom")
    text = {"en": [f"the {w} house is {w}" for w in "abcdefghijklmnop"], "de": [f"das {w} Haus ist {w}" for w in "abcdefghijklmnop"]}
    e = Experiment(
        model=load_model(hf, tokenizer=tok),
        langs=("en", "de"),
        corpus=load_corpus(text),
        tokens=150,
        held_out_tokens=40,
        held_out=0.4,
        facts=3,
        shared_facts=3,
        at_least=0.3,
        top=0.1,
        prompts=("the",),
        new_tokens=2,
        out=str(tmp_path),
    )
    r = e.run(progress=False)
    assert set(r.comparison.measure) == {*MEASURES} and np.isfinite(r.comparison.effect).all()
    assert "ablate all-shared" in set(r.comparison.intervention)


@pytest.mark.parametrize("fields, words", [
    (dict(langs=["de"]), "two languages"),
    (dict(langs=["de", "de"]), "a language twice"),
    (dict(bases=["it"]), "bases names it"),
    (dict(facts=-1), "facts is a number of facts"),
    (dict(at_least=0), "at_least is a share"),
    (dict(boost=0), "boost must be positive"),
    (dict(groups=["count"]), "count"),
])
def test_comparison_refuses_what_cannot_be_meant(fields, words):
    with pytest.raises(ValueError, match=words): Experiment(**fields)


def test_comparison_file_knows_the_new_fields(tmp_path):
    (tmp_path / "e.toml").write_text(
        'langs = ["en", "de"]\nbases = ["German"]\ngroups = ["counts", "text_means"]\nfacts = 5\nprompts = []\n'
    )
    e = read_experiment(tmp_path / "e.toml")
    assert (e.bases, e.groups, e.facts, e.prompts) == (("de",), ("counts", "text_means"), 5, ())


@given(own=st.floats(.2, 50), others=st.floats(.2, 50), k=st.integers(2, 6))
def test_comparison_selectivity_of_constant_effects(own, others, k):
    langs = ["en", "de", "fr", "ru", "zh", "ja"][:k]
    df = pd.DataFrame(
        [
            dict(intervention=f"ablate {a}", lang=b, measure=m, effect=own if a == b else others, size=10)
            for m in (PPL, ANSWER)
            for a in langs
            for b in langs
        ]
    )
    s = selectivities(df).set_index("measure")
    assert s.selectivity[PPL] == pytest.approx(own/others) and s.selectivity[ANSWER] == pytest.approx(math.exp(own - others))
    assert s.own[PPL] == pytest.approx(own) and s.others_low[PPL] == pytest.approx(others) and set(s.langs) == {k}


def test_comparison_selectivity_of_nothing_and_of_infinite_effects():
    empty = pd.DataFrame(columns=["intervention", "lang", "measure", "effect", "size"])
    assert len(selectivities(empty)) == 0
    df = pd.DataFrame(
        [
            dict(intervention=f"ablate {a}", lang=b, measure=PPL, effect=math.inf if a == b else 1.0, size=10)
            for a in ("en", "de")
            for b in ("en", "de")
        ]
    )
    s = selectivities(df).iloc[0]
    assert s.own == math.inf and math.isnan(s.own_low) and s.others == 1


def test_comparison_shared_sets_of_nothing(toy):
    _, e, r = toy
    assert shared_sets(None, r.neurons) == {}
    assert set(shared_sets(r.sharing, r.neurons, .5)) == {"all-shared", "most-shared"}


def test_comparison_preset_is_the_demo():
    assert read_experiment("experiments/comparison.toml") == replace(Experiment(), out="runs/demo")
