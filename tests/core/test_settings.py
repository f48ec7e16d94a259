"Settings: the same fields in Python, TOML and a shell."
import inspect
from dataclasses import dataclass, fields

import pytest
from fastcore.docments import docments
from hypothesis import given
from hypothesis import strategies as st

from langneuron_mi.core.settings import annotations, from_mapping, parse, takes


@dataclass(frozen=True)
class Reading:
    "How text is read."
    length: int = 256 # positions of a window
    langs: tuple[str, ...] | None = None # a part of the languages


@dataclass(frozen=True)
class Run:
    "Where results go."
    out: str | None = None # folder


@takes(reading=Reading, run=Run)
def read(text, # what to read
         n: int = 1, # times
         *, reading: Reading, run: Run):
    "Read a text."
    return text, n, reading, run


def test_fields_and_whole_settings_are_the_same_call():
    assert read("a", length=3, out="x") == read("a", reading=Reading(3), run=Run("x")) == ("a", 1, Reading(3), Run("x"))
    assert read("a", 2, langs=("de",), reading=Reading(3)) == ("a", 2, Reading(3, ("de",)), Run())


def test_signature_and_comments_show_every_field():
    assert list(inspect.signature(read).parameters) == ["text", "n", "length", "langs", "out", "reading", "run"]
    said = {k: v for k, v in docments(read, returns=False).items() if v}
    assert said == dict(text="what to read", n="times", length="positions of a window", langs="a part of the languages", out="folder")


@pytest.mark.parametrize("call, words", [
    (lambda: read("a", lenght=3), "did you mean 'length'"), (lambda: read(), "read needs text"),
    (lambda: read("a", reading=Run()), "reading= is a Reading, got a Run"),
    (lambda: read("a", zzz=1), "read has no 'zzz'; it has langs, length, n, out")])
def test_wrong_names_say_what_there_is(call, words):
    with pytest.raises(TypeError, match=words): call()


def test_one_name_in_two_settings_is_refused_when_the_function_is_written():
    with pytest.raises(TypeError, match="'length' is in two places"): takes(a=Reading)(lambda length, a: None)


def test_toml_lists_become_tuples_and_unknown_keys_are_named():
    assert from_mapping(Reading, dict(langs=["de", "en"])) == Reading(langs=("de", "en"))
    with pytest.raises(ValueError, match="my.toml has no 'lang'; did you mean 'langs'"): from_mapping(Reading, dict(lang=1), "my.toml")


@given(st.one_of(st.none(), st.integers()))
def test_words_of_a_shell_are_the_values_again(x): assert parse(str(x), int | None) == x


@given(st.lists(st.from_regex(r"[a-z]{2,3}", fullmatch=True), min_size=1))
def test_lists_of_words(langs): assert parse(",".join(langs), annotations(Reading)["langs"]) == (tuple(langs) if langs != ["all"] else None)


@pytest.mark.parametrize("word, kind, value", [("auto", int | str, "auto"), ("8", int | str, 8), (".5", float | int, .5),
                                               ("true", bool, True), ("all", tuple[str, ...] | str | None, None)])
def test_a_word_is_the_narrowest_type_that_fits(word, kind, value): assert parse(word, kind) == value


def test_a_word_that_fits_nothing_says_what_would():
    with pytest.raises(ValueError, match="--length is 'x'; give int"): parse("x", int, "--length")


def test_settings_no_number_of_controls_is_negative():
    from langneuron_mi.measure.steering import Steered
    from langneuron_mi.measure.task_matrix import Edits
    from langneuron_mi.measure.translation_matrix import Sets
    from langneuron_mi.tuning.test_time import Trial
    for cls in (Steered, Edits, Sets, Trial):
        assert cls(controls=0).controls == 0
        with pytest.raises(ValueError, match="controls must be 0 or more, got -1"): cls(controls=-1)


@dataclass(frozen=True, kw_only=True)
class Asking:
    "How a model is asked."
    chat: bool = False # in a template


@dataclass(frozen=True)
class Writing(Asking):
    "How texts are written."
    length: int = 9 # of a text


@takes(run=Run, writing=Writing)
def write(*, run: Run, writing: Writing): return writing


@takes(writing=Writing)
def write_alone(*, writing: Writing): return writing


def test_chat_and_other_fields_that_settings_extend_keep_their_comments():
    assert write(chat=True, length=3) == Writing(3, chat=True)
    for f in (write, write_alone): assert docments(f)["chat"] == "in a template" and docments(f)["length"] == "of a text"
    assert docments(write)["out"] == "folder" and docments(read)["out"] == "folder"
    assert not {"__delwrap__"} & (vars(Writing).keys() | vars(Asking).keys() | vars(Run).keys())  # chains are a function's own
