"The language table against an independent one (Babel's CLDR), and the properties that a lookup must have."
import pickle, subprocess, sys

import pytest
from babel import Locale
from babel.core import get_global
from hypothesis import given, strategies as st

from langneuron_mi.text.languages import Language, UnknownLanguage, join_continuation, language, languages

ALL = list(languages().values())
PAPERS = """en de fr es it pt ru pl uk ro nl sv da nb fi hu cs el tr ar he fa hi bn ur ta te kn ml mr gu pa ne si th lo km my vi id ms tl
jv su ceb sw ha yo ig zu xh am so ht qu et lv lt is mt bo ko ja zh ka hy az kk uz mn eu ca gl ga cy sq mk bg sr hr bs sk sl""".split()


@pytest.mark.parametrize("code", PAPERS)
def test_languages_of_the_papers_are_listed(code): assert languages()[code].code == code


def test_languages_names_agree_with_cldr():
    names = Locale("en").languages
    usual = {"zh-Hant", "bn", "ilo", "ny"}  # CLDR: Chinese, Bangla, Iloko, Nyanja
    differ = {l.code: (l.name, names[l.code]) for l in ALL if l.code not in usual and l.code in names
              and names[l.code].split(" (")[0].replace("ā", "a").lower() != l.name.lower()}
    assert not differ


def test_languages_scripts_agree_with_cldr():
    likely = get_global("likely_subtags")
    usual = {"zh-Hant": "Hant", "ko": "Hang"}
    known = [l for l in ALL if l.code in likely and l.code not in usual]
    differ = {l.code: (l.script, likely[l.code]) for l in known if likely[l.code].split("_")[1] != l.script}
    assert not differ


@pytest.mark.parametrize("l", ALL, ids=lambda l: l.code)
def test_language_understands_each_of_its_names(l):
    for x in (l, l.code, l.flores, l.name, l.code.upper(), l.flores.lower(), l.name.upper(), f" {l.code} "): assert language(x) == l


@pytest.mark.parametrize("x,code", [
    ("zh_cn", "zh"), ("zh-Hans-CN", "zh"), ("zh-Hant-TW", "zh-Hant"), ("zh_HK", "zh-Hant"), ("zh-SG", "zh"), ("pt-BR", "pt"),
    ("de-DE", "de"), ("de_AT", "de"), ("es-419", "es"), ("en-GB-oed12", "en"), ("iw", "he"), ("in", "id"),
    ("jp", "ja"), ("deu", "de"), ("ja-JP", "ja")])
def test_language_aliases(x, code): assert language(x).code == code


@pytest.mark.parametrize("x,near", [
    ("ger", "'de'"), ("gre", "'el'"), ("germn", "'de'"), ("Portugese", "'pt'"), ("sr-Latn", "'sr'"), ("deu_Cyrl", "'de'")])
def test_unknown_language_names_near_matches(x, near):
    with pytest.raises(UnknownLanguage, match=f"no language '{x}'; did you mean .*{near}.*{len(ALL)} languages are listed"): language(x)


@pytest.mark.parametrize("x", ["", " ", "-", "_", "12", "x-", "\n", "a-b-c-d"])
def test_language_refuses_nonsense(x):
    with pytest.raises(UnknownLanguage): language(x)


@given(st.text(max_size=12))
def test_language_never_fails_otherwise(x):
    try: assert isinstance(language(x), Language)
    except UnknownLanguage as e: assert repr(x) in str(e)


def test_unknown_language_survives_pickling():
    again = pickle.loads(pickle.dumps(UnknownLanguage("no; did you mean 'de'?")))
    assert str(again) == "no; did you mean 'de'?"


@given(st.sampled_from(ALL), st.text(max_size=8), st.text(max_size=8))
def test_join_continuation_keeps_the_text(l, a, b):
    assert "".join(join_continuation(a, b, l).split()) == "".join((a + b).split())


def test_languages_import_is_light():
    code = "import sys, langneuron_mi.text.languages; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("before", ["", "import langneuron_mi.text.languages", "import langneuron_mi.text.languages as room",
    "import langneuron_mi.text", "from langneuron_mi.text import languages", "from langneuron_mi.text.languages import language",
    "import langneuron_mi.text.windows", "from langneuron_mi import language", "from langneuron_mi import *"])
def test_languages_of_the_door_is_the_function_in_any_order_of_imports(before):
    "Where a room stood beside the door, an import of the room put the module in the function's place."
    after = "from langneuron_mi import languages\nimport langneuron_mi\nprint(languages()['de'].name, langneuron_mi.languages is languages)"
    code = f"{before}\n{after}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["German", "True"]
