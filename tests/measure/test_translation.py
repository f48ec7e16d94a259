"Translation against Hugging Face's own generation and the sacrebleu command."
import importlib.util
import json
import re
import subprocess
import sys

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from lens import lens_models
from sacrebleu.metrics import BLEU, CHRF

import langneuron_mi.measure.translation as translation
from langneuron_mi.text.corpus import CorpusError
from langneuron_mi.text.sources import load_corpus
from langneuron_mi.change.interventions import ablate, amplify
from langneuron_mi.models.hooked import ModelError
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.find.language_neurons import LanguageNeurons
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.testing.tiny import tiny_model
from langneuron_mi.measure.pairs import FLORES, load_pairs
from langneuron_mi.measure.translation_scores import Translations, bleu_tokenizer, is_copy
from langneuron_mi.measure.translation import build_prompts, translate
from langneuron_mi.measure.translation_matrix import TranslationTable, translation_table
from langneuron_mi.text.sketches import add_to_sketch

EN = ["The house is old.", "I see a white dog in the garden of my father.", "She reads.", "We drink water.",
      "The sun is hot today, and the sea is calm.", "He has two brothers.",
      "The door is open.", "They sing a song.", "My father works here.", "The river is deep.", "You have a good heart.",
      "The night was cold."]
DE = ["Das Haus ist alt.", "Ich sehe einen weißen Hund im Garten meines Vaters.", "Sie liest.", "Wir trinken Wasser.",
      "Die Sonne ist heute heiß, und das Meer ist ruhig.", "Er hat zwei Brüder.",
      "Die Tür ist offen.", "Sie singen ein Lied.", "Mein Vater arbeitet hier.", "Der Fluss ist tief.", "Du hast ein gutes Herz.",
      "Die Nacht war kalt."]
ZH = ["房子很旧。", "我在父亲的花园里看见一只白狗。", "她在读书。", "我们喝水。", "今天太阳很热,海很平静。", "他有两个兄弟。", "门开着。", "他们唱一首歌。", "我父亲在这里工作。", "河很深。", "你有一颗善良的心。", "夜里很冷。"]
TEXTS = dict(en=EN, de=DE, zh=ZH)


def long_model(arch="llama", newlines=False, **config):
    "A tiny model with room for prompts; on request one that likes to write newlines."
    hf, tok = tiny_model(arch, **{"max_position_embeddings" if arch != "gpt2" else "n_positions": 1024} | config)
    if newlines:
        with torch.no_grad(): hf.lm_head.weight[tok("\n", add_special_tokens=False).input_ids[0]] *= 3
    return hf, tok


@pytest.fixture(scope="module")
def model():
    hf, tok = long_model()
    return load_model(hf, tokenizer=tok)


@pytest.fixture(scope="module")
def pairs(): return load_pairs(TEXTS, "en", ["de", "zh"], examples=2)


def some(model, seed=0, n=12): return NeuronSet([(l, i) for l in (0, 1) for i in range(n)], view(model).shape).random_like(seed)


def alone(hf, tok, prompt, n):
    "Hugging Face's greedy continuation of one prompt, its first line, white space made single."
    ids = torch.tensor([[1] + tok(prompt, add_special_tokens=False).input_ids])
    with torch.no_grad(): out = hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n, pad_token_id=0)
    return " ".join(tok.decode(out[0, ids.shape[1]:], skip_special_tokens=True).split("\n")[0].split())


# what is translated

@pytest.mark.parametrize(("arch", "newlines"), [("llama", False), ("llama", True), ("gemma3", False), ("gpt2", False)])
def test_translation_equals_hugging_face_prompt_by_prompt(arch, newlines, pairs):
    hf, tok = long_model(arch, newlines)
    reference, _ = long_model(arch, newlines)
    model, prompts = load_model(hf, tokenizer=tok), build_prompts(pairs["de"], "named", 1)
    want = [alone(reference, tok, p, 12) for p in prompts]
    for batch_size in (1, 3, 16):
        assert translate(model, pairs["de"], shots=1, max_new_tokens=12, batch_size=batch_size, progress=False).hypotheses == want


def test_translation_under_an_intervention_equals_a_plain_hook(pairs):
    for name, hf, tok, model in lens_models("llama"):
        short = load_pairs(dict(en=["a b", "c", "d e f g"], de=["x", "y", "z"]), "en", "de", examples=0)
        neurons = some(model)
        got = translate(model, short, ablate(neurons), "{source} =", max_new_tokens=10, progress=False).hypotheses
        handles = []
        for l, layer in enumerate(hf.model.layers):
            cols = neurons.neurons_in(l)
            handles.append(layer.mlp.down_proj.register_forward_pre_hook(lambda m, args, cols=cols: (args[0].index_fill(-1, cols, 0.),)))
        want = [alone(hf, tok, f"{s} =", 10) for s in short.texts["en"]]
        plain = translate(model, short, prompt="{source} =", max_new_tokens=10, progress=False).hypotheses
        for h in handles: h.remove()
        assert got == want, name
        assert plain != got and plain == [alone(hf, tok, f"{s} =", 10) for s in short.texts["en"]], name


def test_translation_stops_at_a_newline(pairs):
    hf, tok = long_model(newlines=True)
    model, passes = load_model(hf, tokenizer=tok), []
    handle = hf.model.layers[0].register_forward_hook(lambda m, a, o: passes.append(1))
    runs = [translate(model, load_pairs(dict(en=[s], de=["x"]), "en", "de", examples=0), max_new_tokens=40, progress=False) for s in EN]
    handle.remove()
    assert not any("\n" in h for r in runs for h in r.hypotheses)
    ended = [not r.df.cut[0] for r in runs]
    assert any(ended) and len(passes) < 40*len(runs)  # a line that ends is not gone on with


def test_translation_marks_what_the_limit_cut(model, pairs):
    t = translate(model, pairs["de"], max_new_tokens=6, progress=False)
    raw = view(model).generate(build_prompts(pairs["de"]), 6)
    assert t.df.cut.tolist() == ["\n" not in r for r in raw] and t.df.cut.any()


# what is kept

class Counting:
    "Counts the prompts that reach the model; stops like a killed process after so many batches."
    def __init__(self, monkeypatch, die_after=None):
        self.prompts, self.calls, real = [], 0, translation._continue
        def counted(v, prompts, n):
            if self.calls == die_after: raise KeyboardInterrupt
            self.calls += 1
            self.prompts += prompts
            return real(v, prompts, n)
        monkeypatch.setattr(translation, "_continue", counted)


def test_translation_resumes_after_a_kill(model, pairs, tmp_path, monkeypatch):
    whole = translate(model, pairs["de"], max_new_tokens=8, batch_size=3, progress=False)
    with monkeypatch.context() as m:
        Counting(m, die_after=2)
        with pytest.raises(KeyboardInterrupt): translate(model, pairs["de"], max_new_tokens=8, batch_size=3, out=tmp_path, progress=False)
    assert not view(model).active
    count = Counting(monkeypatch)
    again = translate(model, pairs["de"], max_new_tokens=8, batch_size=3, out=tmp_path, progress=False)
    assert len(count.prompts) == len(pairs) - 6
    pd.testing.assert_frame_equal(again.df, whole.df)
    translate(model, pairs["de"], max_new_tokens=8, out=tmp_path, progress=False)
    assert len(count.prompts) == len(pairs) - 6 and len(list(tmp_path.iterdir())) == 1


def test_translation_store_is_never_shared_by_what_differs(pairs, tmp_path, monkeypatch):
    hf, tok = long_model()
    model = load_model(hf, tokenizer=tok)
    few, count, seen = load_pairs(TEXTS, "en", "de", n=3, examples=2), Counting(monkeypatch), []
    def run(**kwargs):
        before = len(count.prompts)
        got = translate(model, few, max_new_tokens=kwargs.pop("max_new_tokens", 6), out=tmp_path, progress=False, **kwargs)
        return len(count.prompts) - before, got.hypotheses
    first = run()
    assert first[0] == 3 and run() == (0, first[1])
    for kwargs in (dict(intervention=ablate(some(model))), dict(intervention=ablate(some(model, 1))),
                   dict(intervention=amplify(some(model), by=2)), dict(intervention=ablate(some(model)).where("generated")),
                   dict(prompt="unnamed"), dict(prompt="{source} auf Deutsch:"), dict(shots=1), dict(shots=2), dict(max_new_tokens=7)):
        assert run(**kwargs)[0] == 3, kwargs
        seen.append(run(**kwargs))
    assert all(n == 0 for n, _ in seen) and run() == (0, first[1])
    more = load_pairs(TEXTS, "en", "de", n=8, examples=2)
    before = len(count.prompts)
    translate(model, more, max_new_tokens=6, out=tmp_path, progress=False)
    assert len(count.prompts) - before == 5  # three of the eight were there
    with torch.no_grad(): hf.model.layers[0].mlp.up_proj.weight += .1
    assert run()[0] == 3  # other weights, other translations


def test_translation_gives_each_intervention_its_own_text(model, pairs, tmp_path):
    stored = [translate(model, pairs["de"], i, max_new_tokens=8, out=tmp_path, progress=False).hypotheses
              for i in (None, ablate(some(model)), amplify(some(model), by=5), None)]
    fresh = [translate(model, pairs["de"], i, max_new_tokens=8, progress=False).hypotheses
             for i in (None, ablate(some(model)), amplify(some(model), by=5), None)]
    assert stored == fresh and stored[0] == stored[3] and stored[0] != stored[1] != stored[2]


# scores

def results(hyps, tgt="de", refs=None, srcs=None):
    refs = refs or TEXTS[tgt][:len(hyps)]
    n = len(hyps)
    df = pd.DataFrame(dict(id=[str(i) for i in range(n)], source=srcs or EN[:n], reference=refs, hypothesis=hyps, cut=False))
    return Translations("en", tgt, df)


NASTY = dict(de=["Das Haus ist alt .", "", "Sie liest „viel“ — sehr & gern", "Wir trinken Wasser", "Die Sonne ist  heiß", "% 3,5 Brüder"],
             zh=["房子 很旧。", "我看见一只黑狗", "", "我们喝水 ABC 12。", "太阳", "他有 2 个兄弟."],
             ja=["家は古い。", "白い犬", "彼女は本を読む", "水", "", "二人の兄弟"], th=["บ้านเก่า", "ฉันเห็นหมา", "", "น้ำ", "ร้อน", "พี่น้องสองคน"])
REFS = dict(NASTY, de=DE[:6], zh=ZH[:6], ja=["この家は古い。", "白い犬を見る。", "彼女は本を読みます。", "水を飲む。", "太陽は暑い。", "二人の兄弟がいる。"],
            th=["บ้านหลังนี้เก่า", "ฉันเห็นหมาขาว", "เธออ่านหนังสือ", "เราดื่มน้ำ", "แดดร้อน", "เขามีพี่น้องสองคน"])


def command(line, folder): # the package's command, through its module: the same entry point
    args = line.split()
    assert args[0] == "sacrebleu"
    got = subprocess.run([sys.executable, "-m", "sacrebleu", *args[1:], "--quiet"], cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(got.stdout)


@pytest.mark.parametrize("tgt", ["de", "zh", "ja", "th"])
def test_translation_scores_equal_the_sacrebleu_command(tgt, tmp_path):
    t = results(NASTY[tgt], tgt, REFS[tgt])
    t.write(tmp_path)
    rows = {r["metric"]: r for r in json.loads((tmp_path/"scores.json").read_text(encoding="utf-8"))["scores"]}
    scores = t.scores(n_boot=50).set_index("metric")
    for name in ("chrF++", "BLEU"):
        said = command(rows[name]["command"], tmp_path)
        assert said["score"] == pytest.approx(scores.value[name], abs=5e-5)
        assert said["signature"] == scores.signature[name] == rows[name]["signature"]
        assert rows[name]["value"] == scores.value[name] > 0
        assert scores.low[name] <= scores.value[name] <= scores.high[name]
    assert scores.value["chrF++"] == CHRF(word_order=2).corpus_score(NASTY[tgt], [REFS[tgt]]).score
    assert f"tok:{bleu_tokenizer(tgt)[0]}|" in scores.signature["BLEU"]
    assert rows["spBLEU"]["value"] is None and "command" not in rows["spBLEU"]


def test_translation_files_hold_one_line_a_sentence(model, tmp_path):
    odd = dict(en=["a\nb", "c\u2028d", "e\r\nf", "g\x85h  i"], de=["1\n2", "3\u2029 4", "5\x0b6", " 7 "])
    t = translate(model, load_pairs(odd, "en", "de", examples=0), max_new_tokens=20, progress=False)
    t.write(tmp_path)
    for name in ("src", "ref", "hyp"): assert (tmp_path/f"{name}.txt").read_bytes().count(b"\n") == 4
    assert (tmp_path/"src.txt").read_text(encoding="utf-8").split("\n")[:4] == ["a b", "c d", "e f", "g h i"]
    said = command("sacrebleu ref.txt -i hyp.txt -m chrf --chrf-word-order 2 -w 6", tmp_path)
    assert said["score"] == pytest.approx(t.scores(n_boot=0).value[0], abs=5e-7)


def test_translation_bleu_tokenizers_say_what_they_are(monkeypatch):
    assert [bleu_tokenizer(l) for l in ("zh", "zho_Hant", "yue")] == [("zh", "")]*3
    assert [bleu_tokenizer(l) for l in ("fr", "ar")] == [("13a", "")]*2
    for lang in ("th", "km", "lo", "my", "bo"): assert bleu_tokenizer(lang)[0] == "char" and "without spaces" in bleu_tokenizer(lang)[1]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bleu_tokenizer("ja") == ("char", 'ja-mecab is not installed, so char: pip install "sacrebleu[ja]"')
    assert bleu_tokenizer("ko")[0] == "13a"
    assert results(NASTY["ja"], "ja", REFS["ja"]).scores(n_boot=0).set_index("metric").note["BLEU"].startswith("ja-mecab is not installed")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert bleu_tokenizer("ja") == ("ja-mecab", "") and bleu_tokenizer("ko") == ("ko-mecab", "")


def test_translation_spbleu_only_with_its_model(tmp_path, monkeypatch):
    import sentencepiece
    from sacrebleu.tokenizers import tokenizer_spm
    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path))
    t = results(DE[:5] + ["Sie haben Brüder."], refs=DE[:6])
    row = t.scores(n_boot=0).set_index("metric").loc["spBLEU"]
    assert np.isnan(row.value) and row.signature == "" and "tokenize='flores200'" in row.note
    assert "spBLEU" not in set(t.difference(results(DE[:6]), n_boot=10).metric)
    (tmp_path/"models").mkdir()
    (tmp_path/"text.txt").write_text("\n".join(EN + DE), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path/"text.txt"), model_prefix=str(tmp_path/"m"), vocab_size=60, minloglevel=3)
    (tmp_path/"m.model").rename(tmp_path/"models"/"flores200sacrebleuspm")
    row = t.scores(n_boot=0).set_index("metric").loc["spBLEU"]
    assert row.value == BLEU(tokenize="flores200").corpus_score(t.hypotheses, [t.references]).score > 0
    assert "tok:flores200" in row.signature and row.note == ""


def test_translation_tells_kinds_of_output_apart():
    srcs = ["The children are playing in the garden today.", "He has bought a new house near the old river.", "Berlin",
            "We all want to go home before the night comes.", "My mother cooks a very good soup.", "The weather is fine."]
    refs = ["Die Kinder spielen heute im Garten.", "Er hat ein neues Haus am alten Fluss gekauft.", "Berlin",
            "Wir wollen alle nach Hause, bevor die Nacht kommt.", "Meine Mutter kocht eine sehr gute Suppe.", "Das Wetter ist schön."]
    hyps = [refs[0], srcs[1].replace("house", "home"), "Berlin", "Nous voulons tous rentrer à la maison avant la nuit.", "",
            "the weather, is FINE"]
    d = results(hyps, refs=refs, srcs=srcs).to_df()
    assert d.in_target.tolist()[:2] == [True, False] and d.copied.tolist() == [False, True, False, False, False, True]
    assert d["empty"].tolist() == [False]*4 + [True, False]
    assert d.in_source.tolist()[1] and not d.in_target[3] and not d.untranslated[3] and d.untranslated[[1, 5]].all()
    assert not d.in_target[4] and not d.untranslated[4]
    s = results(hyps, refs=refs, srcs=srcs).scores(n_boot=100).set_index("metric").value
    assert s[["copied", "empty", "cut"]].tolist() == pytest.approx([2/6, 1/6, 0])
    assert is_copy("The House", "the house.") and not is_copy("the mouse eats", "the house") and not is_copy("", "")


def test_translation_difference_equals_sacrebleu_paired_bootstrap(tmp_path):
    old, new = results([d.replace("ist", "war").replace("hat", "hatte") for d in DE]), results([d[:-6] for d in DE])
    got = new.difference(old, n_boot=1000).set_index("metric")
    for name, t in dict(old=old, new=new).items(): (t.write(tmp_path/name)/"hyp.txt").rename(tmp_path/f"{name}.txt")
    (tmp_path/"old"/"ref.txt").rename(tmp_path/"ref.txt")
    for name, how in {"chrF++": ["-m", "chrf", "--chrf-word-order", "2"], "BLEU": ["-m", "bleu"]}.items():
        out = subprocess.run([sys.executable, "-m", "sacrebleu", "ref.txt", "-i", "old.txt", "new.txt", *how, "--paired-bs", "-w", "4",
                              "-f", "text", "--no-color", "--quiet"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        base, other = (float(x) for x in re.findall(r"\w+\.txt │ ([\d.]+) ", out))
        p = re.search(r"\(p = ([\d.]+)\)", out)[1]
        assert got.p[name] == pytest.approx(float(p), abs=5e-5)
        assert got.value[name] == pytest.approx(other - base, abs=2e-4)
        assert got.low[name] <= got.value[name] <= got.high[name]
    same = old.difference(old).set_index("metric")
    assert (same.value == 0).all() and (same.low == 0).all() and (same.high == 0).all() and (same.p == 1).all()
    with pytest.raises(ValueError, match="not of the same sentences"): old.difference(results(DE[:5]))


def test_translation_interval_covers_as_a_bootstrap_does():
    rng = np.random.default_rng(0)
    hyps = [d if rng.random() < .5 else d[::-1] for d in DE*8]
    t = results(hyps, refs=DE*8, srcs=EN*8)
    row = t.scores(n_boot=300).iloc[0]
    metric = CHRF(word_order=2)
    draws = []
    for i in range(300):
        at = np.random.default_rng(i).integers(len(hyps), size=len(hyps))
        draws.append(metric.corpus_score([hyps[j] for j in at], [[(DE*8)[j] for j in at]]).score)
    assert [row.low, row.high] == pytest.approx(np.quantile(draws, [.025, .975]), abs=1.5)


def test_translation_results_are_kept_and_shown(tmp_path):
    t = results(NASTY["de"], refs=REFS["de"])
    again = Translations.load(t.save(tmp_path/"t.safetensors"))
    pd.testing.assert_frame_equal(again.df, t.df)
    for x in (again, t): assert (x.hypotheses, x.references, x.sources) == (NASTY["de"], REFS["de"], EN[:6])
    assert sum(len(trace.x) for trace in t.plot().data) == 6
    text = t._repr_markdown_()
    assert "chrF++" in text and "English → German, 6 sentences" in text and "spBLEU needs" in text and r"nrefs:1\|case" in text


# sentences

def test_translation_pairs_of_every_source(tmp_path):
    folder, release = tmp_path/"folder", tmp_path/"flores200_dataset"
    for d in (folder, release/"dev", release/"devtest"): d.mkdir(parents=True)
    for lang, name in dict(en="eng_Latn", de="deu_Latn", zh="zho_Hans").items():
        (folder/f"{lang}.txt").write_text("\n".join(TEXTS[lang]) + "\n", encoding="utf-8")
        (release/"devtest"/f"{name}.devtest").write_text("\n".join(TEXTS[lang][:9]), encoding="utf-8")
        (release/"dev"/f"{name}.dev").write_text("\n".join(TEXTS[lang][9:]), encoding="utf-8")
    files = [str(folder/f"{l}.txt") for l in ("en", "de", "zh")]
    ways = [load_pairs(s, "eng", ["German", "zho_Hans"], examples=2)
            for s in (TEXTS, folder, str(folder), tuple(files), dict(zip(("en", "de", "zh"), files)), load_corpus(TEXTS, aligned=True))]
    for p in ways:
        assert p.texts == ways[0].texts and p.examples == ways[0].examples and p.ids == ways[0].ids and p.fingerprint == ways[0].fingerprint
    assert all(EN.index(e) == ZH.index(z) == int(i) for i, e, z in zip(ways[0].ids, ways[0].texts["en"], ways[0].texts["zh"]))
    assert not set(ways[0].texts["en"]) & set(ways[0].examples["en"]) and len(ways[0]) == 10
    flores = load_pairs(release, "en", ["de", "zh"], examples=2)
    assert flores.texts["de"] == tuple(DE[:9]) and set(flores.examples["de"]) < set(DE[9:]) and len(flores.examples["de"]) == 2
    assert [DE.index(d) for d in flores.examples["de"]] == [EN.index(e) for e in flores.examples["en"]]
    few, more = (load_pairs(TEXTS, "en", "de", n=n, examples=1, seed=3) for n in (3, 7))
    assert set(few.ids) < set(more.ids) and few.examples == more.examples and few.tgt == "de"
    assert set(load_pairs(TEXTS, "en", "de", n=3, examples=1, seed=4).ids) != set(few.ids)
    assert more["de"].fingerprint == more.fingerprint and list(more.to_df()) == ["en", "de"]


def hub(rows):
    "A stand-in for the hub: rows by (configuration, split)."
    def load_dataset(repo, config, split, revision, **_):
        assert repo == FLORES and revision == "0"*40
        if (config, split) not in rows: raise ValueError(f"BuilderConfig {config!r} not found")
        return [dict(id=i, text=t, iso_639_3=config[:3]) for i, t in rows[config, split].items()]
    return load_dataset


def test_translation_flores_is_paired_by_id(monkeypatch):
    rows = {("eng_Latn", "devtest"): {1: "one", 2: "two", 3: "three"}, ("cmn_Hans", "devtest"): {3: "三", 1: "一", 2: "二"},
            ("eng_Latn", "dev"): {7: "seven", 8: "eight"}, ("cmn_Hans", "dev"): {8: "八", 7: "七"},
            ("fil_Latn", "devtest"): {1: "isa", 3: "tatlo"}, ("fil_Latn", "dev"): {7: "pito"}}
    monkeypatch.setattr(datasets, "load_dataset", hub(rows))
    p = load_pairs("flores", "en", ["zh"], examples=2, revision="0"*40)
    assert p.texts == dict(en=("one", "two", "three"), zh=("一", "二", "三")) and p.ids == ("1", "2", "3")
    assert dict(zip(p.examples["en"], p.examples["zh"])) == dict(seven="七", eight="八")
    assert p.provenance["source"] == FLORES and p.provenance["revision"] == "0"*40
    assert p.provenance["names"] == dict(en="eng_Latn", zh="cmn_Hans")
    three = load_pairs(FLORES, "en", ["zh", "tl"], examples=1, revision="0"*40)
    assert three.texts == dict(en=("one", "three"), zh=("一", "三"), tl=("isa", "tatlo"))
    assert load_pairs("flores", "en", "de", name_map={"German": "fil_Latn"}, revision="0"*40, examples=1).texts["de"] == ("isa", "tatlo")


def test_translation_gated_flores_says_how_to_get_in(monkeypatch):
    helps = r"gated: accept its terms on https://huggingface.co/datasets/openlanguagedata/flores_plus, then set HF_TOKEN.*or pass a folder"
    with pytest.raises(CorpusError, match=helps): load_pairs("flores", "en", "de")  # no hub
    said = "Dataset 'openlanguagedata/flores_plus' is a gated dataset on the Hub. You must be authenticated to access it."
    def gated(*a, **k): raise datasets.exceptions.DatasetNotFoundError(said)
    monkeypatch.setattr(datasets, "load_dataset", gated)
    with pytest.raises(CorpusError, match=r"You must be authenticated.*" + helps): load_pairs(f"hub:{FLORES}", "en", "de", revision="0"*40)


def test_translation_pairs_refuse_what_cannot_be_paired(tmp_path):
    write = lambda name, lines: ((tmp_path/name).write_bytes("\n".join(lines).encode()), str(tmp_path/name))[1]
    en, de, blank = write("en.txt", EN), write("de.txt", DE[:-1]), write("fr.txt", ["", " "])
    (tmp_path/"latin1.txt").write_bytes("schön\n".encode("latin1"))
    for source, tgts, says in [((en, de), "de", r"en.txt has 12, .*de.txt has 11"), ({"en": en, "fr": blank}, "fr", "fr.txt is empty"),
                               ((en, str(tmp_path/"no.txt")), "de", "no.txt: cannot be read"),
                               ((en, str(tmp_path/"latin1.txt")), "de", "not UTF-8"), ((en,), "de", "1 files for 2 languages"),
                               (dict(en=EN, de=DE[:3]), "de", "as many texts in every language"),
                               (TEXTS, "ger", "did you mean 'de'"), (TEXTS, "germn", "did you mean 'de'"),
                               (TEXTS, "fr", "no 'fr'; it has en, de, zh"), (TEXTS, "en", "no target language beside 'en'"),
                               (load_corpus(TEXTS), "de", "not aligned"), ("florres", "de", "no corpus 'florres'"),
                               (dict(en=["a"], de=["b"]), "de", "there are too few")]:
        with pytest.raises(CorpusError, match=says): load_pairs(source, "en", tgts)
    with pytest.raises(KeyError, match="no target 'fr'; they have de, zh"): load_pairs(TEXTS, "en", ["de", "zh"])["fr"]


def test_translation_prompts(pairs):
    first, example = pairs.texts["en"][0], (pairs.examples["en"][0], pairs.examples["de"][0])
    assert build_prompts(pairs["de"])[0] == f"Translate from English to German.\n\nEnglish: {first}\nGerman:"
    assert build_prompts(pairs["de"], "unnamed", 1)[0] == (
        f"Translate from English into the target language.\n\nEnglish: {example[0]}\nTarget language: {example[1]}\n\n"
        f"English: {first}\nTarget language:")
    assert "German" not in build_prompts(pairs["de"], "unnamed", 2)[0]
    assert build_prompts(pairs["de"], "{source} => ", 1)[0] == f"{example[0]} => {example[1]}\n\n{first} => "
    braces = load_pairs(dict(en=["a {b} {source}", "c"], de=["x", "y"]), "en", "de", examples=1)
    assert build_prompts(braces, "{{{source}}}")[0] in ("{a {b} {source}}", "{c}")
    for prompt, says in (("nmed", "no prompt 'nmed'; give 'named' or 'unnamed'"), ("{source} {x}", "has the fields"),
                         ("{source", "is no template")):
        with pytest.raises(ValueError, match=says): build_prompts(pairs["de"], prompt)
    with pytest.raises(ValueError, match="have 2 examples; load them with examples=3"): build_prompts(pairs["de"], shots=3)


def test_translation_refuses_before_it_runs(model, pairs, monkeypatch):
    count = Counting(monkeypatch)
    hf, tok = tiny_model("llama")
    short = load_model(hf, tokenizer=tok)
    says = r"the prompt of sentence '\d+' has \d+ tokens, and 200 more are to come, but the context of .* is 256; give fewer shots"
    with pytest.raises(ValueError, match=says):
        translate(short, pairs["de"], shots=1, max_new_tokens=200, progress=False)
    with pytest.raises(ValueError, match="choose one, as in pairs\\['de'\\]"): translate(model, pairs, progress=False)
    with ablate(some(model)).on(model), pytest.raises(ModelError, match="needs the untouched model"):
        translate(model, pairs["de"], progress=False)
    other = NeuronSet([(0, 0)], (3, 5))
    with pytest.raises(ValueError, match="belong to a model of 3 layers"): translate(model, pairs["de"], ablate(other), progress=False)
    assert not count.prompts


# several languages

def test_translation_table_of_own_other_and_random_sets(model, pairs, tmp_path):
    sets = {l: some(model, i, n) for i, (l, n) in enumerate(dict(de=5, zh=9, en=3).items())}
    used = {}
    def double(neurons, lang):
        used.setdefault(lang, []).append(neurons)
        return amplify(neurons, by=2.)
    with pytest.warns(UserWarning, match="nothing is known of the text"):
        table = translation_table(model, pairs, sets, double, controls=2, seed=5, max_new_tokens=6, progress=False, out=tmp_path/"kept")
    kinds = [("none", ""), ("own", "de"), ("other", "zh"), ("random 5", "de"), ("random 6", "de")]
    assert [k[1:] for k in table.runs if k[0] == "de"] == kinds
    own = sets["de"]
    a, b = [s for s in used["de"] if s is not own]
    assert own.per_layer().tolist() == a.per_layer().tolist() == b.per_layer().tolist()
    assert a.fingerprint != b.fingerprint != own.fingerprint
    alone = {t: translate(model, pairs[t], amplify(sets["de"], by=2.), max_new_tokens=6, progress=False).hypotheses for t in ("de", "zh")}
    assert table["de", "own"].hypotheses == alone["de"] and table["zh", "other"].hypotheses == alone["zh"]
    df = table.to_df(n_boot=20)
    one = df[(df.tgt == "de") & (df.kind == "own") & (df.metric == "chrF++")].iloc[0]
    d = table["de", "own"].difference(table["de", "none"], n_boot=20).iloc[0]
    assert (one.change, one.change_low, one.p, one.n_neurons) == (d.value, d.low, d.p, 10)
    assert df[df.kind == "none"].change.isna().all() and df[df.metric.isin(["chrF++", "BLEU"])].signature.str.startswith("nrefs").all()
    assert len(table.summary(20)) == 10 and len(table.plot(n_boot=20).data) == 3
    again = TranslationTable.load(table.save(tmp_path/"table.safetensors"))
    assert list(again.runs) == list(table.runs) and again["zh", "own"].hypotheses == table["zh", "own"].hypotheses
    pd.testing.assert_frame_equal(again.to_df(n_boot=0), table.to_df(n_boot=0))
    with pytest.raises(KeyError, match="names 2 translations|names 0 translations"): table["de", "random"]
    with pytest.raises(ValueError, match="no metric 'bleu'"): table.plot("bleu", n_boot=0)


def test_translation_table_chooses_sets(model, pairs):
    sets = {l: some(model, i) for i, l in enumerate(("de", "zh", "en"))}
    from langneuron_mi.measure.translation_matrix import _conditions
    assert _conditions(sets, ("de", "zh"), "all", 0, 0)["de"] == [("none", ""), ("own", "de"), ("other", "zh"), ("other", "en")]
    assert _conditions(sets, ("de",), "next", 1, 0)["de"][2:] == [("other", "zh"), ("random 0", "de")]
    assert _conditions(sets, ("de",), None, 0, 0)["de"] == [("none", ""), ("own", "de")]
    assert _conditions(sets, ("de",), ["English"], 0, 0)["de"][2:] == [("other", "en")]
    for given, tgts, others, says in ((sets, ("fr",), "next", "no neurons for the target 'fr'; there are sets for de, zh, en"),
                                      (sets, ("de",), ["it"], "no neurons for 'it'"),
                                      (sets | {"de": sets["de"] - sets["de"]}, ("de",), "next", "no neurons for the target 'de'")):
        with pytest.raises(ValueError, match=says): _conditions(given, tgts, others, 0, 0)


def test_translation_table_refuses_sentences_that_found_the_neurons(model, pairs):
    sketch = add_to_sketch(np.empty(0, np.uint64), [pairs.texts["de"][0], "anderes"])
    found = LanguageNeurons({l: some(model, i) for i, l in enumerate(("de", "zh"))}, "lape", seen={"de": sketch})
    with pytest.raises(ValueError, match="de: at least 1 of these sentences were used to find the neurons"):
        translation_table(model, pairs, found, "x2", progress=False)
