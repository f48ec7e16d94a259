"Texts under interventions: the table, and the language of a text."
import pytest

from langneuron_mi.change.generation import counts_as, generate_texts, identify, text_quality
from langneuron_mi.change.interventions import ablate
from langneuron_mi.measure.factors import factor


def test_generation_table_and_summary(study, tmp_path):
    p, model, probes, stats, own, held = study
    prompts = {l: [w.rsplit(" ", 1)[0] for w in p.texts(3, seed=5)[l]] for l in ("en", "fr")}
    up = factor("p_median", stats)
    rows = {("p_median", "de"): up(own["de"], "de"), ("p_median", "random 0", "de"): up(own["de"].random_like(1), "de")}
    g = generate_texts(model, prompts, rows, max_new_tokens=4, out=tmp_path/"g.json", progress=False)
    assert len(g.df) == 3*6 and set(g.df.kind) == {"none", "own", "random 0"}
    assert all(w.startswith("de") for t in g.df.query("kind == 'own'").text for w in t.split())
    plain = g.df.query("kind == 'none'")
    assert all(t.split()[0].startswith(b) for t, b in zip(plain.text, plain.base))
    again = generate_texts(model, prompts, rows, max_new_tokens=4, out=tmp_path/"g.json", progress=False)
    assert again.df.drop(columns=["identified_lid176"]).equals(g.df.drop(columns=["identified_lid176"]))
    assert {"in_target", "distinct_2", "repetition", "units", "n"} <= set(g.summary())
    with pytest.raises(ValueError, match="does not know ceb"):
        generate_texts(model, prompts, {("x1", "ceb"): ablate(own["de"])}, progress=False)
    with pytest.raises(ValueError, match="one continuation"): generate_texts(model, prompts, rows, num_return_sequences=2, progress=False)
    how = dict(max_new_tokens=4, do_sample=True, seeds=(0, 1), progress=False)
    sampled = [generate_texts(model, prompts, rows, **how).df.text.tolist() for _ in range(2)]
    assert sampled[0] == sampled[1] and len(sampled[0]) == 2*3*6


def test_generation_language_and_quality():
    assert identify("Selamat pagi, apa kabar semuanya hari ini?", same={}) in ("id", "ms") and identify("", same={}) == ""
    assert identify("これは日本語の文章です。") == "ja" == identify("これは日本語の文章です。", by="lid176")
    with pytest.raises(ValueError, match="no identifier"): identify("x", by="cld3")
    assert counts_as("zh-Hant") == "zh" and counts_as("nb") == "no" and counts_as("ms", {}) == "ms"
    q = text_quality("ja " * 20)
    assert q["repetition"] > .9 and q["distinct_2"] < .1
    assert text_quality("one two three four five six seven")["repetition"] == 0
    assert text_quality("東京は日本の首都です", "ja")["units"] == 10 and text_quality("", "en")["units"] == 0
