"Items of a direction, draws and selections."
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langneuron_mi.text.languages import language
from langneuron_mi.measure.facts import Fact, ProbeError
from langneuron_mi.measure.probe_sources import load_probes
from langneuron_mi.measure.probes import ProbeItems, Probes, probe_item, same_text


@pytest.fixture(scope="module")
def cldr(): return load_probes()


marks = st.text(alphabet="ab '«(¿\u00a0\u3000\n", max_size=6)


@given(lang=st.sampled_from(["en", "ar", "zh", "ja", "th", "fr", "x-home"]), before=marks, between=marks,
       subject=st.text(min_size=1, alphabet="xyz [Y]"), one=st.text(min_size=1), two=st.text(min_size=1))
def test_probes_prompt_is_prefix_of_both_texts(lang, before, between, subject, one, two):
    fact = Fact("a", "r", {lang: (subject, one), "de": ("", two)})
    item = probe_item(fact, f"{before}[X]{between}[Y] end", lang, "de")
    assert item.text_base.startswith(item.prompt) and item.text_target.startswith(item.prompt)
    gap = item.text_base[len(item.prompt):len(item.text_base) - len(one)]
    assert item.text_target == item.prompt + gap + two and not gap.strip()
    whole = before + subject + between
    assert item.prompt + gap == whole or (not language(lang).spaces and gap == "" and item.prompt == whole.rstrip())


def test_probes_items_account_for_every_fact(cldr):
    p = Probes(cldr.facts, cldr.templates | {"currency": {"de": "[X]: [Y]"}}, cldr.langs, "some")
    for base, target in [("en", "de"), ("mt", "is"), ("id", "ms"), ("qu", "es")]:
        for q in (cldr, p):
            m = q.items(base, target)
            assert len(m) == m.n_usable and len(m) + m.n_equal + m.n_missing + m.n_no_template == len(q)
            assert all(not same_text(r.object_base, r.object_target) for r in m) and all((r.base, r.target) == (base, target) for r in m)


def test_probes_equal_objects_excluded_and_counted():
    objects = [("Café", "Cafe\u0301"), ("EURO", "euro "), ("Straße", "STRASSE"), ("Rome", "Rom")]
    facts = [Fact(str(i), "r", {"en": ("x", a), "de": ("x", b)}) for i, (a, b) in enumerate(objects)]
    facts = (*facts, Fact("m", "r", {"en": ("x", "y")}))
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
    assert some == {r.fact for r in cldr.items("fr", "th", n=n, seed=seed)}, "none missing or equal: the same facts in both"


def test_probes_select_prefers_facts_named_everywhere(cldr):
    p = cldr.select(["mt", "en"], n=300)
    assert all(set(f.labels) == {"mt", "en"} for f in p.facts) and p.langs == ("mt", "en")
    assert set(p.templates["currency"]) == {"mt", "en"}
    assert {f.relation for f in cldr.select(relations="currency").facts} == {"currency"}


def test_probes_fingerprint_follows_content(cldr):
    again = Probes(cldr.facts, cldr.templates, cldr.langs, "other name")
    changed = Probes(cldr.facts, cldr.templates | {"currency": cldr.templates["currency"] | {"en": "[X]: [Y]"}}, cldr.langs, "cldr")
    assert again.fingerprint == cldr.fingerprint != changed.fingerprint
    assert cldr.fingerprint in cldr._repr_markdown_() and cldr.fingerprint in repr(cldr)


def test_probes_bad_directions(cldr):
    for base, target, message in [("en", "en", "undefined"), ("en", "eng_Latn", "undefined"),
                                  ("ht", "en", "no facts in 'ht'"), ("en", "ht", "no facts in 'ht'")]:
        with pytest.raises(ProbeError, match=message): cldr.items(base, target)
    with pytest.raises(ProbeError, match="cldr has no facts in 'ht'; there is en, de"): cldr.select("ht")
    with pytest.raises(ProbeError, match="n=-1"): cldr.items("en", "de", n=-1)
