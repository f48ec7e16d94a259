"Damaged files, bad arguments, and the hub replaced."
import gzip
import json

import pytest

from langneuron_mi.measure import probe_sources as room
from langneuron_mi.measure.facts import Fact, ProbeError
from langneuron_mi.measure.probe_sources import load_probes

LABELS = {"en": ["France", "Paris"], "de": ["Frankreich", "Paris"], "ja": ["フランス", "パリ"]}


@pytest.fixture(scope="module")
def cldr(): return load_probes()


def write(folder, lines, patterns={"P36": {"en": ["The capital of [X] is [Y]"]}}, name="facts.jsonl"):
    text = "\n".join(l if isinstance(l, str) else json.dumps(l, ensure_ascii=False) for l in lines)
    (folder/name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    if patterns is not None: (folder/"patterns.json").write_text(json.dumps(patterns, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["facts.jsonl", "facts.jsonl.gz"])
@pytest.mark.parametrize("whole", [True, False])
def test_probe_sources_file_round_trip(tmp_path, cldr, name, whole):
    small = cldr.select(["en", "zh", "ar", "mt"], n=40)
    patterns = {r: {l: [t] for l, t in by.items()} for r, by in small.templates.items()}
    lines = [dict(id=f.id, relation=f.relation, labels=f.labels) for f in small.facts]
    write(tmp_path, lines, {"patterns": patterns} if whole else patterns, name)
    back = load_probes(tmp_path if whole else tmp_path/name)
    assert back.facts == small.facts and back.templates == small.templates and back.fingerprint == small.select(back.langs).fingerprint


def test_probe_sources_file_codes_and_order(tmp_path):
    labels = {"zh-hans": ["法国", "x"], "zh": ["法国", "巴黎"], "jp": ["フランス", " パリ "], "la": ["Gallia", "Lutetia"], "de": ["", "Paris"]}
    patterns = {"P36": {"zh-hans": ["[Y]，[X]", "[X]是[Y]", "[X]：[Y]"], "la": ["[X] [Y]"]}}
    p = load_probes(write(tmp_path, [dict(relation="P36", lineid=7, labels=labels)], patterns))
    assert p.facts == (Fact("P36/7", "P36", {"zh": ("法国", "巴黎"), "ja": ("フランス", "パリ")}),)
    assert p.templates == {"P36": {"zh": "[X]是[Y]"}}
    told = p.provenance
    assert told["unknown_languages"] == {"la": 1} and told["blank_labels"] == 1
    assert told["templates_skipped"] == {"object before subject": 1}


def test_probe_sources_file_only_object_first_templates(tmp_path):
    patterns = {"P36": {"en": ["[X] is [Y]"], "de": ["[Y] ist [X]"]}, "P1": {"en": ["[X] [Y]"]}}
    p = load_probes(write(tmp_path, [dict(relation="P36", labels=LABELS)], patterns))
    assert p.bases == ("en",) and p.provenance["no_template"] == {"P36": ["de"]}
    with pytest.raises(ProbeError, match="no template in 'de'; there is en"): p.items("de", "en")


@pytest.mark.parametrize("lines, message", [
    (['{"relation": "P36"'], "line 1: no valid JSON"),
    ([json.dumps(dict(relation="P36", labels=LABELS)), "", "x"], "line 3: no valid JSON"),
    (["[]"], "line 1: no fact"), ([dict(labels=LABELS)], "line 1: no fact"),
    ([dict(relation="P36", labels={"en": ["France", None]})], "line 1: no fact"),
    ([dict(relation="P36", lineid=1, labels=LABELS)]*2, "two facts with the id 'P36/1'"),
    ([], "no probe in"), ([dict(relation="P1", labels=LABELS)], "no probe in"),
    ([dict(relation="P36", labels={"la": ["Gallia", "Lutetia"]})], "no probe in")])
def test_probe_sources_file_damaged(tmp_path, lines, message):
    with pytest.raises(ProbeError, match=message) as e: load_probes(write(tmp_path, lines))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("patterns, message", [
    ({"P36": {"en": ["[X] is [Z]"]}}, r"P36, en: .*marker \[Z\]"), ({"P36": {"en": ["[X] is here"]}}, r"0 times \[Y\]"),
    ({"P36": {"en": ["[X] [X] [Y]"]}}, r"2 times \[X\]"), ({"P36": {"en": 3}}, "no templates"), ({"P36": ["[X] [Y]"]}, "no templates"),
    ([], "no templates"), ({}, "no templates"), (None, r"no \*patterns\*.json"),
    ({"P36": {"de": ["[Y] [X]"]}}, "no probe in")])
def test_probe_sources_file_bad_templates(tmp_path, patterns, message):
    with pytest.raises(ProbeError, match=message) as e: load_probes(write(tmp_path, [dict(relation="P36", labels=LABELS)], patterns))
    assert "\n" not in str(e.value)


def test_probe_sources_file_unreadable(tmp_path):
    with pytest.raises(ProbeError, match=r"no \*.jsonl"): load_probes(tmp_path)
    write(tmp_path, [dict(relation="P36", labels=LABELS)]*2000, name="f.jsonl.gz")
    (tmp_path/"f.jsonl.gz").write_bytes((tmp_path/"f.jsonl.gz").read_bytes()[:-20])
    with pytest.raises(ProbeError, match="cannot be read"): load_probes(tmp_path)
    (tmp_path/"f.jsonl.gz").unlink()
    (tmp_path/"f.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ProbeError, match="cannot be read"): load_probes(tmp_path)


@pytest.mark.parametrize("args, message", [
    (dict(langs=["en", "ger"]), "did you mean 'de'"), (dict(langs=[]), "langs is empty"),
    (dict(langs="en", relations="capital"), "no relation 'capital'; there is official_language"),
    (dict(n=0), "n=0"), (dict(source="nowhere/at/all"), "no probes 'nowhere/at/all'"),
    (dict(langs=["en", "x-home"]), "no names of its own in 'x-home'")])
def test_probe_sources_bad_arguments(args, message):
    with pytest.raises(ProbeError, match=message) as e: load_probes(**args)
    assert "\n" not in str(e.value)


WIDE = [dict(predicate_id="P36", sub_en="France", obj_en="Paris", sub_ja="フランス", obj_ja="パリ", sub_th="ฝรั่งเศส", obj_th=None),
        dict(predicate_id="P36", sub_en="Egypt", obj_en="Cairo", sub_ja="エジプト", obj_ja="カイロ", sub_th="อียิปต์", obj_th="ไคโร")]
TEMPLATES = {"en": "[X] has the capital [Y].", "ja": "[X]の首都は[Y]です。", "th": "เมืองหลวงของ[X]คือ[Y]"}


@pytest.fixture
def hub(monkeypatch):
    "The hub's rows, given by the test; what was asked for is kept."
    asked = {}
    def serve(rows):
        def fake(repo, langs, revision):
            asked.update(repo=repo, langs=tuple(langs), revision=revision)
            return {l: rows[l] for l in asked["langs"] if l in rows}, "c"*40
        monkeypatch.setattr(room, "_hub_rows", fake)
        return asked
    return serve


@pytest.mark.parametrize("with_relation", [True, False])
def test_probe_sources_mlama_wide_rows(hub, with_relation):
    drop = set() if with_relation else {"predicate_id"}
    def table(lang, template):
        return [{k: v for k, v in r.items() if k not in drop} | dict(template=template) for r in (WIDE if lang != "th" else WIDE[::-1])]
    rows = {l: table(l, t) for l, t in TEMPLATES.items()}
    asked = hub(rows)
    p = load_probes("mlama", revision="v1")
    assert asked == dict(repo="inayarhmns/MLAMA-dod-185", langs=room.MLAMA_LANGS, revision="v1") and p.provenance["revision"] == "c"*40
    assert len(p) == 2 and p.langs == ("en", "ja", "th") and list(p.templates.values()) == [TEMPLATES]
    assert [r.text_target for r in p.items("ja", "en")] == ["フランスの首都はParis", "エジプトの首都はCairo"]
    m = p.items("th", "en")
    assert (len(m), m.n_missing) == (1, 1) and m.rows[0].text_base == "เมืองหลวงของอียิปต์คือไคโร"
    assert len({f.id for f in p.facts}) == 2 and load_probes("mlama", ["en", "ja"]).langs == ("en", "ja")


def test_probe_sources_mlama_long_rows(hub):
    def row(lang, i, s, o, t):
        return dict(uuid="u", lineid=i, obj_uri="Q", obj_label=o, sub_uri="Q", sub_label=s, template=t, language=lang, predicate_id="P36")
    asked = hub({"en": [row("en", 0, "France", "Paris", "[X] [Y]"), row("en", 1, "Egypt", "Cairo", "[X] [Y]")],
                 "de": [row("de", 1, "Ägypten", "Kairo", "[Y] von [X]")]})
    p = load_probes("mlama:cis-lmu/m_lama", ["en", "de"])
    assert asked["repo"] == "cis-lmu/m_lama" and p.bases == ("en",)
    assert [r.fact for r in p.items("en", "de")] == ["P36/1"] and p.items("en", "de").n_missing == 1


def test_probe_sources_mlama_errors(hub):
    hub({"en": [dict(question="?")]})
    with pytest.raises(ProbeError, match="no columns of mLAMA"): load_probes("mlama")


@pytest.mark.parametrize("revision", [None, "a"*40])
def test_probe_sources_mlama_offline_says_so(revision):
    with pytest.raises(ProbeError, match="cannot be read from the hub") as e: load_probes("mlama", "en", revision=revision)
    assert "\n" not in str(e.value)
