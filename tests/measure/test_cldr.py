"CLDR's facts: every template, and independent truths from Babel."
import subprocess
import sys
import unicodedata
from collections import Counter

import pytest
from babel import Locale

from langneuron_mi.text.languages import join_continuation, language
from langneuron_mi.measure import cldr as room
from langneuron_mi.measure.cldr import cldr_facts, cldr_names, cldr_templates
from langneuron_mi.measure.facts import ProbeError, template_problem
from langneuron_mi.measure.probe_sources import load_probes

PAPER = "et ht id it qu sw ta th tr vi zh en fr pt ja ru mt is".split()
LANGS = PAPER + "de es ar fa hi bn ko uk pl nl ms".split()


@pytest.fixture(scope="module")
def cldr(): return load_probes()


@pytest.mark.parametrize("relation", ["official_language", "currency", "continent"])
def test_cldr_templates_are_usable_and_distinct(relation):
    templates = cldr_templates()[relation]
    assert set(templates) == set(LANGS)
    for t in templates.values():
        assert template_problem(t) == "" and t == t.strip() and unicodedata.normalize("NFC", t) == t
    twice = {t for t, k in Counter(templates.values()).items() if k > 1}
    assert twice <= {templates["id"]}, "only Indonesian and Malay may share a sentence"
    for by_lang in zip(*(cldr_templates()[r].values() for r in cldr_templates())): assert len(set(by_lang)) == 3


@pytest.mark.parametrize("lang", LANGS)
def test_cldr_templates_in_own_script(lang):
    script = {"Cyrl": "CYRILLIC", "Arab": "ARABIC", "Deva": "DEVANAGARI", "Beng": "BENGALI", "Taml": "TAMIL", "Thai": "THAI",
              "Hang": "HANGUL", "Hans": "CJK", "Jpan": ("HIRAGANA", "KATAKANA", "CJK"), "Latn": "LATIN"}[language(lang).script]
    for templates in cldr_templates().values():
        text = templates[lang].replace("[X]", "").replace("[Y]", "")
        assert all(unicodedata.name(c).startswith(script) for c in text if c.isalpha())


@pytest.mark.parametrize("lang", [l for l in LANGS if l != "ht"])
def test_cldr_names_are_babels(cldr, lang):
    locale = Locale.parse(lang)
    for f in cldr.facts:
        if lang not in f.labels: continue
        kind, code = cldr_facts()[f.relation, f.id.split("/")[1]]
        assert f.labels[lang] == (locale.territories[f.id.split("/")[1]], getattr(locale, kind)[code])


def test_cldr_known_facts(cldr):
    facts = {f.id: f.labels for f in cldr.facts}
    assert facts["official_language/DE"]["de"] == ("Deutschland", "Deutsch")
    assert facts["official_language/JP"]["th"] == ("ญี่ปุ่น", "ญี่ปุ่น")
    assert facts["currency/FR"]["ru"] == ("Франция", "евро")
    assert facts["continent/BR"]["zh"] == ("巴西", "南美洲")
    assert "official_language/CH" not in facts and "currency/PA" not in facts and "continent/HK" not in facts


def test_cldr_continents_hold_every_member_once():
    codes = [c for text in room._CONTINENTS.values() for c in text.split()]
    assert len(codes) == len(set(codes)) == 193
    assert all(c in Locale("en").territories for c in codes)


def test_cldr_coverage(cldr):
    c = cldr.coverage().pivot(index="lang", columns="relation", values="facts")
    assert set(cldr.langs) == set(cldr.bases) == set(LANGS) - {"ht"}
    assert c.loc["ht"].sum() == 0 and cldr.provenance["without_names"] == ["ht"]
    assert (c.drop(["ht", "mt"]) == c.max()).all().all()


def test_cldr_haitian_creole_is_not_french():
    assert Locale("ht").territories["DE"] == "Allemagne"
    assert not cldr_names("ht")["territories"] and not cldr_names("ht")["currencies"]
    assert cldr_names("nb")["territories"]["DE"] == "Tyskland"
    with pytest.raises(ProbeError, match="no names of its own in 'ht'"): load_probes("cldr", ["en", "ht"])


def test_cldr_leaves_babel_as_it_was():
    code = ("from langneuron_mi.measure.probe_sources import load_probes; load_probes(); from babel import Locale; "
            "assert Locale('zh_Hant').number_symbols and Locale('nb').territories['DE'] == 'Tyskland'; "
            "assert Locale('ht').currencies['EUR'] == 'euro'; from babel.numbers import format_decimal; "
            "assert format_decimal(1234.5, locale='ht'); import sys; assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cldr_target_without_template():
    p = load_probes("cldr", ["en", "el"])
    assert p.bases == ("en",) and p.items("en", "el").rows[0].object_target == "Πορτογαλικά"
    with pytest.raises(ProbeError, match="no template in el"): load_probes("cldr", "el")


@pytest.mark.parametrize("base", ["en", "zh", "ja", "th", "ar", "fr", "sw", "tr"])
def test_cldr_texts_join_like_the_language(cldr, base):
    for r in cldr.items(base, "de" if base != "de" else "en"):
        assert r.text_base == join_continuation(r.prompt, r.object_base, base)
        assert r.text_target == join_continuation(r.prompt, r.object_target, base)
        assert "[" not in r.prompt
