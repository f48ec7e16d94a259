"Chat through the command line: langneuron steer and share put every prompt into the template, and never mix it with plain work."
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from chats import BOS, chat_tokenizer

from langneuron_mi.cli import main
from langneuron_mi.core.atomic import load_json
from langneuron_mi.models.loading import load_model
from langneuron_mi.share.effect import category_effect
from langneuron_mi.share.sharing import sharing
from langneuron_mi.studies.amplification import AmplificationStudy, read_study
from langneuron_mi.studies.sharing_study import SharingStudy
from langneuron_mi.testing.tiny import tiny_model

DATA = Path(__file__).parents[1]/"data"/"tasks"
TEXT = {"en": [f"the {w} cat sat on the mat" for w in "big small old new red blue green black white grey fat thin".split()],
        "fr": [f"le chat {w} était sur le tapis" for w in "grand petit vieux neuf rouge bleu vert noir blanc gris gros mince".split()]}
PROMPTS, ANSWERS = {"en": ["ab cd", "e", "fgh"], "fr": ["xy z", "wv", "u"]}, {"en": ["b", "c", "d"], "fr": ["x", "y", "z"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a tiny chat model, text, facts and prompts."
    folder = tmp_path_factory.mktemp("chat")
    tiny_model("llama", vocab_size=264)[0].save_pretrained(folder/"model")
    chat_tokenizer(BOS).save_pretrained(folder/"model")
    for name in ("text", "facts"): (folder/name).mkdir()
    for lang, lines in TEXT.items(): (folder/"text"/f"{lang}.txt").write_text("\n".join(lines), encoding="utf-8")
    rows = [dict(id=c, relation="capital", labels=dict(en=[c, a], fr=[c + "e", b]))
            for c, a, b in [("Ger", "Berlin", "Berline"), ("Fra", "Paris", "Pari"), ("Rus", "Moscow", "Moscou")]]
    (folder/"facts"/"facts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    patterns = dict(en=["The capital of [X] is [Y]"], fr=["La capitale de [X] est [Y]"])
    (folder/"facts"/"patterns.json").write_text(json.dumps(dict(patterns=dict(capital=patterns))), encoding="utf-8")
    (folder/"both.json").write_text(json.dumps(dict(prompts=PROMPTS, answers=ANSWERS)), encoding="utf-8")
    return folder


def test_chat_steering_study_from_a_file(place, tmp_path):
    out = tmp_path/"out"
    values = dict(model=str(place/"model"), langs=["en", "fr"], corpus=str(place/"text"), probes=str(place/"facts"), out=str(out),
                  held_out=.3, texts=4, held_out_tokens=20, factors=["=0"], tokens=150, new_tokens=4, length=64)
    tables = dict(method_options=dict(top=.2, filter=.5, bar=.5), prompts=dict(en=["Well"]),
                  tasks=dict(names=["xcopa_it"], data_dir=str(DATA), limit=2))
    toml = "\n".join(f"{k} = {json.dumps(x)}" for k, x in values.items())
    for name, table in tables.items(): toml += f"\n[{name}]\n" + "\n".join(f"{k} = {json.dumps(x)}" for k, x in table.items())
    (tmp_path/"study.toml").write_text(toml, encoding="utf-8")
    items, texts = {}, {}
    for name, words in dict(plain=[], chat=["--chat", "true", "--system", "Be kind."], again=[]).items():
        assert main(["steer", str(tmp_path/"study.toml"), *words]) == 0
        items[name] = pd.read_csv(out/"tables/items.csv")
        texts[name] = pd.read_csv(out/"tables/texts.csv", keep_default_na=False).text.tolist()
        study = load_json(out/"provenance.json")["study"]
        assert (study["chat"], study["system"]) == (name == "chat", "Be kind." if name == "chat" else None)
    assert np.abs(items["plain"].base_before - items["chat"].base_before).min() > .01 and texts["plain"] != texts["chat"]
    pd.testing.assert_frame_equal(items["plain"], items["again"])
    assert texts["plain"] == texts["again"]
    assert read_study(tmp_path/"study.toml", chat=True)[0].chat
    kept = [load_json(p) for p in (out/"answers").rglob("items-*.json")]  # the plain model's and three interventions', of both ways
    assert len(kept) == 2*len({*(out/"answers").iterdir()})


def test_chat_sharing_study_from_the_command_line(place, tmp_path):
    words = ["share", str(place/"both.json"), "--model", str(place/"model"), "--out", str(tmp_path), "--top-k", "20", "--effects", "2"]
    model, tables = load_model(str(place/"model")), {}
    for name, more in dict(plain=[], chat=["--chat", "true", "--system", "Be kind."], again=[]).items():
        assert main([*words, *more]) == 0
        tables[name] = {t: pd.read_csv(tmp_path/"tables"/f"{t}.csv") for t in ("categories", "contribution", "effects")}
        how = dict(chat=True, system="Be kind.") if more else {}
        want = sharing(model, PROMPTS, theta=[0., .1, .2, .5], progress=False, **how).to_df()
        assert np.allclose(tables[name]["categories"].share, want.share)
        few, answers = ({l: p[:2] for l, p in x.items()} for x in (PROMPTS, ANSWERS))
        e = category_effect(model, few, answers, among="active", progress=False, **how).summary()
        got = tables[name]["effects"].query("op == 'ablate'")
        assert np.allclose(got.own, e.own, atol=1e-6)
    for t in tables["plain"]:
        assert tables["plain"][t].equals(tables["again"][t]) and not tables["plain"][t].equals(tables["chat"][t])


def test_chat_options_are_told_and_refused_in_one_line(place, tmp_path, capsys):
    for command in ("steer", "share", "eval"):
        with pytest.raises(SystemExit): main([command, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert "--chat CHAT" in said and "into the tokenizer's own chat template" in said and "--system SYSTEM" in said
    share = ["share", str(place/"both.json"), "--model", str(place/"model"), "--out", str(tmp_path)]
    assert main([*share, "--system", "a"]) == 2
    assert "give chat=True as well" in capsys.readouterr().err
    assert main(["share", str(place/"both.json"), "--chat", "true", "--model", str(_plain(tmp_path)), "--out", str(tmp_path)]) == 2
    assert "has no chat template" in capsys.readouterr().err
    for study in (AmplificationStudy, SharingStudy):
        with pytest.raises(ValueError, match="give chat=True as well"): study(system="a")


def _plain(folder):
    "A model whose tokenizer has no template."
    hf, tok = tiny_model("llama")
    hf.save_pretrained(folder/"plain")
    tok.save_pretrained(folder/"plain")
    return folder/"plain"
