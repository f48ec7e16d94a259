"What the page of the probes cannot host: every template, independent truths from Babel, damaged files, the hub replaced."
import gzip
import json
import subprocess
import sys
import unicodedata
from collections import Counter

import pytest
from babel import Locale
from hypothesis import given
from hypothesis import strategies as st

from langneuron_mi.measure import probes as module
from langneuron_mi.text.languages import join_continuation, language
from langneuron_mi.measure.probes import (Fact, ProbeError, ProbeItems, Probes, cldr_facts, cldr_names, cldr_templates, fill, load_probes, same_text,
                                  template_problem)

PAPER = "et ht id it qu sw ta th tr vi zh en fr pt ja ru mt is".split()
LANGS = PAPER + "de es ar fa hi bn ko uk pl nl ms".split()
LABELS = {"en": ["France", "Paris"], "de": ["Frankreich", "Paris"], "ja": ["フランス", "パリ"]}


@pytest.fixture(scope="module")
def cldr(): return load_probes()


def write(folder, lines, patterns={"P36": {"en": ["The capital of [X] is [Y]"]}}, name="facts.jsonl"):
    text = "\n".join(l if isinstance(l, str) else json.dumps(l, ensure_ascii=False) for l in lines)
    (folder/name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    if patterns is not None: (folder/"patterns.json").write_text(json.dumps(patterns, ensure_ascii=False), encoding="utf-8")
    return folder


# CLDR

@pytest.mark.parametrize("relation", ["official_language", "currency", "continent"])
def test_probes_cldr_templates_are_usable_and_distinct(relation):
    templates = cldr_templates()[relation]
    assert set(templates) == set(LANGS)
    for t in templates.values():
        assert template_problem(t) == "" and t == t.strip() and unicodedata.normalize("NFC", t) == t
    twice = {t for t, k in Counter(templates.values()).items() if k > 1}
    assert twice <= {templates["id"]}, "only Indonesian and Malay may share a sentence"
    for by_lang in zip(*(cldr_templates()[r].values() for r in cldr_templates())): assert len(set(by_lang)) == 3


@pytest.mark.parametrize("lang", LANGS)
def test_probes_cldr_templates_in_own_script(lang):
    script = {"Cyrl": "CYRILLIC", "Arab": "ARABIC", "Deva": "DEVANAGARI", "Beng": "BENGALI", "Taml": "TAMIL", "Thai": "THAI", "Hang": "HANGUL",
              "Hans": "CJK", "Jpan": ("HIRAGANA", "KATAKANA", "CJK"), "Latn": "LATIN"}[language(lang).script]
    for templates in cldr_templates().values():
        text = templates[lang].replace("[X]", "").replace("[Y]", "")
        assert all(unicodedata.name(c).startswith(script) for c in text if c.isalpha())


@pytest.mark.parametrize("lang", [l for l in LANGS if l != "ht"])
def test_probes_cldr_names_are_babels(cldr, lang):
    locale = Locale.parse(lang)
    for f in cldr.facts:
        if lang not in f.labels: continue
        kind, code = cldr_facts()[f.relation, f.id.split("/")[1]]
        assert f.labels[lang] == (locale.territories[f.id.split("/")[1]], getattr(locale, kind)[code])


def test_probes_cldr_known_facts(cldr):
    facts = {f.id: f.labels for f in cldr.facts}
    assert facts["official_language/DE"]["de"] == ("Deutschland", "Deutsch")
    assert facts["official_language/JP"]["th"] == ("ญี่ปุ่น", "ญี่ปุ่น")
    assert facts["currency/FR"]["ru"] == ("Франция", "евро")
    assert facts["continent/BR"]["zh"] == ("巴西", "南美洲")
    assert "official_language/CH" not in facts and "currency/PA" not in facts and "continent/HK" not in facts


def test_probes_continents_hold_every_member_once():
    codes = [c for text in module._CONTINENTS.values() for c in text.split()]
    assert len(codes) == len(set(codes)) == 193
    assert all(c in Locale("en").territories for c in codes)


def test_probes_cldr_coverage(cldr):
    c = cldr.coverage().pivot(index="lang", columns="relation", values="facts")
    assert set(cldr.langs) == set(cldr.bases) == set(LANGS) - {"ht"}
    assert c.loc["ht"].sum() == 0 and cldr.provenance["without_names"] == ["ht"]
    assert (c.drop(["ht", "mt"]) == c.max()).all().all()


def test_probes_cldr_haitian_creole_is_not_french():
    assert Locale("ht").territories["DE"] == "Allemagne"
    assert not cldr_names("ht")["territories"] and not cldr_names("ht")["currencies"]
    assert cldr_names("nb")["territories"]["DE"] == "Tyskland"
    with pytest.raises(ProbeError, match="no names of its own in 'ht'"): load_probes("cldr", ["en", "ht"])


def test_probes_cldr_leaves_babel_as_it_was():
    code = ("from langneuron_mi.measure.probes import load_probes; load_probes(); from babel import Locale; "
            "assert Locale('zh_Hant').number_symbols and Locale('nb').territories['DE'] == 'Tyskland' and Locale('ht').currencies['EUR'] == 'euro'; "
            "from babel.numbers import format_decimal; assert format_decimal(1234.5, locale='ht'); import sys; assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_probes_cldr_target_without_template():
    p = load_probes("cldr", ["en", "el"])
    assert p.bases == ("en",) and p.items("en", "el").rows[0].object_target == "Πορτογαλικά"
    with pytest.raises(ProbeError, match="no template in el"): load_probes("cldr", "el")


# joins

@pytest.mark.parametrize("lang, template, want", [
    ("en", "The capital of [X] is [Y].", "The capital of A is B"), ("fr", "[X] : l’[Y]", "A : l’B"), ("fr", "[X] («\u00a0[Y]\u00a0»)", "A («\u00a0B"),
    ("es", "¿[X]? ¡[Y]!", "¿A? ¡B"), ("tr", "[X]'in başkenti '[Y]'dir", "A'in başkenti 'B"), ("ar", "عاصمة [X] هي ([Y])", "عاصمة A هي (B"),
    ("ko", "[X]의 수도는 [Y]입니다", "A의 수도는 B"), ("zh", "[X]的首都是[Y]。", "A的首都是B"), ("zh", "[X] 的首都是 [Y]", "A 的首都是B"),
    ("ja", "[X]の首都は「[Y]」です", "Aの首都は「B"), ("th", "เมืองหลวงของ[X]คือ [Y]", "เมืองหลวงของAคือB"), ("my", "[X] [Y]", "AB"), ("lo", "[X]: [Y]", "A:B"), ("km", "[X] [Y]", "AB")])
def test_probes_join_as_the_template_writes(lang, template, want):
    prompt, gap = fill(template, "A", lang)
    assert prompt + gap + "B" == want and prompt == prompt.rstrip()


@given(lang=st.sampled_from(["en", "ar", "zh", "ja", "th", "fr", "x-home"]), before=st.text(alphabet="ab '«(¿\u00a0\u3000\n", max_size=6),
       between=st.text(alphabet="ab '«(¿\u00a0\u3000\n", max_size=6), subject=st.text(min_size=1, alphabet="xyz [Y]"), one=st.text(min_size=1), two=st.text(min_size=1))
def test_probes_prompt_is_prefix_of_both_texts(lang, before, between, subject, one, two):
    fact = Fact("a", "r", {lang: (subject, one), "de": ("", two)})
    item = module._item(fact, f"{before}[X]{between}[Y] end", lang, "de")
    assert item.text_base.startswith(item.prompt) and item.text_target.startswith(item.prompt)
    gap = item.text_base[len(item.prompt):len(item.text_base) - len(one)]
    assert item.text_target == item.prompt + gap + two and not gap.strip()
    assert item.prompt + gap == before + subject + between or (not language(lang).spaces and gap == "" and item.prompt == (before + subject + between).rstrip())


@pytest.mark.parametrize("base", ["en", "zh", "ja", "th", "ar", "fr", "sw", "tr"])
def test_probes_cldr_texts_join_like_the_language(cldr, base):
    for r in cldr.items(base, "de" if base != "de" else "en"):
        assert r.text_base == join_continuation(r.prompt, r.object_base, base) and r.text_target == join_continuation(r.prompt, r.object_target, base)
        assert "[" not in r.prompt


# items

def test_probes_items_account_for_every_fact(cldr):
    p = Probes(cldr.facts, cldr.templates | {"currency": {"de": "[X]: [Y]"}}, cldr.langs, "some")
    for base, target in [("en", "de"), ("mt", "is"), ("id", "ms"), ("qu", "es")]:
        for q in (cldr, p):
            m = q.items(base, target)
            assert len(m) == m.n_usable and len(m) + m.n_equal + m.n_missing + m.n_no_template == len(q)
            assert all(not same_text(r.object_base, r.object_target) for r in m) and all((r.base, r.target) == (base, target) for r in m)


def test_probes_equal_objects_excluded_and_counted():
    objects = [("Café", "Cafe\u0301"), ("EURO", "euro "), ("Straße", "STRASSE"), ("Rome", "Rom")]
    facts = tuple(Fact(str(i), "r", {"en": ("x", a), "de": ("x", b)}) for i, (a, b) in enumerate(objects)) + (Fact("m", "r", {"en": ("x", "y")}),)
    m = Probes(facts, {"r": {"en": "[X] [Y]"}}, ("en", "de"), "mine").items("en", "de")
    assert ([r.fact for r in m.rows], m.n_equal, m.n_missing) == (["3"], 3, 1)
    assert list(m.to_df().columns)[:5] == ["fact", "relation", "base", "target", "prompt"] and "3 with equal objects" in m._repr_markdown_()


def test_probes_items_empty_pair_keeps_its_counts():
    p = Probes((Fact("a", "r", {"en": ("x", "Paris"), "de": ("x", "Paris")}),), {"r": {"en": "[X] [Y]"}}, ("en", "de"), "mine")
    m = p.items("en", "de")
    assert isinstance(m, ProbeItems) and m.rows == [] and m.n_equal == 1 and list(m.to_df().columns)[0] == "fact"


@given(n=st.integers(1, 60), more=st.integers(0, 60), seed=st.integers(0, 5))
def test_probes_draws_are_nested_and_reproducible(cldr, n, more, seed):
    few, many = cldr.select(n=n, seed=seed), cldr.select(n=n + more, seed=seed)
    assert [f.id for f in few.facts] == [f.id for f in cldr.select(n=n, seed=seed).facts] and len(few) == n
    assert {f.id for f in few.facts} <= {f.id for f in many.facts}
    some, all_ = ({r.fact for r in cldr.items("en", "ja", n=k, seed=seed)} for k in (n, n + more))
    assert len(some) == n and some <= all_
    assert some == {r.fact for r in cldr.items("fr", "th", n=n, seed=seed)}, "no fact is missing or equal: the same facts in both directions"


def test_probes_select_prefers_facts_named_everywhere(cldr):
    p = cldr.select(["mt", "en"], n=300)
    assert all(set(f.labels) == {"mt", "en"} for f in p.facts) and p.langs == ("mt", "en") and set(p.templates["currency"]) == {"mt", "en"}
    assert {f.relation for f in cldr.select(relations="currency").facts} == {"currency"}


def test_probes_fingerprint_follows_content(cldr):
    again = Probes(cldr.facts, cldr.templates, cldr.langs, "other name")
    changed = Probes(cldr.facts, cldr.templates | {"currency": cldr.templates["currency"] | {"en": "[X]: [Y]"}}, cldr.langs, "cldr")
    assert again.fingerprint == cldr.fingerprint != changed.fingerprint
    assert cldr.fingerprint in cldr._repr_markdown_() and cldr.fingerprint in repr(cldr)


# files

@pytest.mark.parametrize("name", ["facts.jsonl", "facts.jsonl.gz"])
@pytest.mark.parametrize("whole", [True, False])
def test_probes_file_round_trip(tmp_path, cldr, name, whole):
    small = cldr.select(["en", "zh", "ar", "mt"], n=40)
    patterns = {r: {l: [t] for l, t in by.items()} for r, by in small.templates.items()}
    write(tmp_path, [dict(id=f.id, relation=f.relation, labels=f.labels) for f in small.facts], {"patterns": patterns} if whole else patterns, name)
    back = load_probes(tmp_path if whole else tmp_path/name)
    assert back.facts == small.facts and back.templates == small.templates and back.fingerprint == small.select(back.langs).fingerprint


def test_probes_file_codes_and_order(tmp_path):
    labels = {"zh-hans": ["法国", "x"], "zh": ["法国", "巴黎"], "jp": ["フランス", " パリ "], "la": ["Gallia", "Lutetia"], "de": ["", "Paris"]}
    p = load_probes(write(tmp_path, [dict(relation="P36", lineid=7, labels=labels)], {"P36": {"zh-hans": ["[Y]，[X]", "[X]是[Y]", "[X]：[Y]"], "la": ["[X] [Y]"]}}))
    assert p.facts == (Fact("P36/7", "P36", {"zh": ("法国", "巴黎"), "ja": ("フランス", "パリ")}),) and p.templates == {"P36": {"zh": "[X]是[Y]"}}
    told = p.provenance
    assert told["unknown_languages"] == {"la": 1} and told["blank_labels"] == 1 and told["templates_skipped"] == {"object before subject": 1}


def test_probes_file_only_object_first_templates(tmp_path):
    p = load_probes(write(tmp_path, [dict(relation="P36", labels=LABELS)], {"P36": {"en": ["[X] is [Y]"], "de": ["[Y] ist [X]"]}, "P1": {"en": ["[X] [Y]"]}}))
    assert p.bases == ("en",) and p.provenance["no_template"] == {"P36": ["de"]}
    with pytest.raises(ProbeError, match="no template in 'de'; there is en"): p.items("de", "en")


@pytest.mark.parametrize("lines, message", [
    (['{"relation": "P36"'], "line 1: no valid JSON"), ([json.dumps(dict(relation="P36", labels=LABELS)), "", "x"], "line 3: no valid JSON"),
    (["[]"], "line 1: no fact"), ([dict(labels=LABELS)], "line 1: no fact"), ([dict(relation="P36", labels={"en": ["France", None]})], "line 1: no fact"),
    ([dict(relation="P36", lineid=1, labels=LABELS)]*2, "two facts with the id 'P36/1'"), ([], "no probe in"), ([dict(relation="P1", labels=LABELS)], "no probe in"),
    ([dict(relation="P36", labels={"la": ["Gallia", "Lutetia"]})], "no probe in")])
def test_probes_file_damaged(tmp_path, lines, message):
    with pytest.raises(ProbeError, match=message) as e: load_probes(write(tmp_path, lines))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("patterns, message", [
    ({"P36": {"en": ["[X] is [Z]"]}}, r"P36, en: .*marker \[Z\]"), ({"P36": {"en": ["[X] is here"]}}, r"0 times \[Y\]"), ({"P36": {"en": ["[X] [X] [Y]"]}}, r"2 times \[X\]"),
    ({"P36": {"en": 3}}, "no templates"), ({"P36": ["[X] [Y]"]}, "no templates"), ([], "no templates"), ({}, "no templates"), (None, r"no \*patterns\*.json"),
    ({"P36": {"de": ["[Y] [X]"]}}, "no probe in")])
def test_probes_file_bad_templates(tmp_path, patterns, message):
    with pytest.raises(ProbeError, match=message) as e: load_probes(write(tmp_path, [dict(relation="P36", labels=LABELS)], patterns))
    assert "\n" not in str(e.value)


def test_probes_file_unreadable(tmp_path):
    with pytest.raises(ProbeError, match=r"no \*.jsonl"): load_probes(tmp_path)
    write(tmp_path, [dict(relation="P36", labels=LABELS)]*2000, name="f.jsonl.gz")
    (tmp_path/"f.jsonl.gz").write_bytes((tmp_path/"f.jsonl.gz").read_bytes()[:-20])
    with pytest.raises(ProbeError, match="cannot be read"): load_probes(tmp_path)
    (tmp_path/"f.jsonl.gz").unlink()
    (tmp_path/"f.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ProbeError, match="cannot be read"): load_probes(tmp_path)


# arguments

@pytest.mark.parametrize("args, message", [
    (dict(langs=["en", "ger"]), "did you mean 'de'"), (dict(langs=[]), "langs is empty"), (dict(langs="en", relations="capital"), "no relation 'capital'; there is official_language"),
    (dict(n=0), "n=0"), (dict(source="nowhere/at/all"), "no probes 'nowhere/at/all'"), (dict(langs=["en", "x-home"]), "no names of its own in 'x-home'")])
def test_probes_bad_arguments(args, message):
    with pytest.raises(ProbeError, match=message) as e: load_probes(**args)
    assert "\n" not in str(e.value)


def test_probes_bad_directions(cldr):
    for base, target, message in [("en", "en", "undefined"), ("en", "eng_Latn", "undefined"), ("ht", "en", "no facts in 'ht'"), ("en", "ht", "no facts in 'ht'")]:
        with pytest.raises(ProbeError, match=message): cldr.items(base, target)
    with pytest.raises(ProbeError, match="cldr has no facts in 'ht'; there is en, de"): cldr.select("ht")
    with pytest.raises(ProbeError, match="n=-1"): cldr.items("en", "de", n=-1)


# mLAMA

WIDE = [dict(predicate_id="P36", sub_en="France", obj_en="Paris", sub_ja="フランス", obj_ja="パリ", sub_th="ฝรั่งเศส", obj_th=None),
        dict(predicate_id="P36", sub_en="Egypt", obj_en="Cairo", sub_ja="エジプト", obj_ja="カイロ", sub_th="อียิปต์", obj_th="ไคโร")]
TEMPLATES = {"en": "[X] has the capital [Y].", "ja": "[X]の首都は[Y]です。", "th": "เมืองหลวงของ[X]คือ[Y]"}


@pytest.fixture
def hub(monkeypatch):
    "The hub's rows, given by the test; what was asked for is kept."
    asked = {}
    def serve(rows):
        def fake(repo, langs, revision): asked.update(repo=repo, langs=tuple(langs), revision=revision); return {l: rows[l] for l in asked["langs"] if l in rows}, "c"*40
        monkeypatch.setattr(module, "_hub_rows", fake)
        return asked
    return serve


@pytest.mark.parametrize("with_relation", [True, False])
def test_probes_mlama_wide_rows(hub, with_relation):
    drop = set() if with_relation else {"predicate_id"}
    rows = {l: [{k: v for k, v in r.items() if k not in drop} | dict(template=t) for r in (WIDE if l != "th" else WIDE[::-1])] for l, t in TEMPLATES.items()}
    asked = hub(rows)
    p = load_probes("mlama", revision="v1")
    assert asked == dict(repo="inayarhmns/MLAMA-dod-185", langs=module.MLAMA_LANGS, revision="v1") and p.provenance["revision"] == "c"*40
    assert len(p) == 2 and p.langs == ("en", "ja", "th") and list(p.templates.values()) == [TEMPLATES]
    assert [r.text_target for r in p.items("ja", "en")] == ["フランスの首都はParis", "エジプトの首都はCairo"]
    m = p.items("th", "en")
    assert (len(m), m.n_missing) == (1, 1) and m.rows[0].text_base == "เมืองหลวงของอียิปต์คือไคโร"
    assert len({f.id for f in p.facts}) == 2 and load_probes("mlama", ["en", "ja"]).langs == ("en", "ja")


def test_probes_mlama_long_rows(hub):
    row = lambda lang, i, s, o, t: dict(uuid="u", lineid=i, obj_uri="Q", obj_label=o, sub_uri="Q", sub_label=s, template=t, language=lang, predicate_id="P36")
    asked = hub({"en": [row("en", 0, "France", "Paris", "[X] [Y]"), row("en", 1, "Egypt", "Cairo", "[X] [Y]")], "de": [row("de", 1, "Ägypten", "Kairo", "[Y] von [X]")]})
    p = load_probes("mlama:cis-lmu/m_lama", ["en", "de"])
    assert asked["repo"] == "cis-lmu/m_lama" and p.bases == ("en",)
    assert [r.fact for r in p.items("en", "de")] == ["P36/1"] and p.items("en", "de").n_missing == 1


def test_probes_mlama_errors(hub):
    hub({"en": [dict(question="?")]})
    with pytest.raises(ProbeError, match="no columns of mLAMA"): load_probes("mlama")


@pytest.mark.parametrize("revision", [None, "a"*40])
def test_probes_mlama_offline_says_so(revision):
    with pytest.raises(ProbeError, match="cannot be read from the hub") as e: load_probes("mlama", "en", revision=revision)
    assert "\n" not in str(e.value)
