"Items, rows and scores for fine-tuning: labels, pads, parallel splits, and SQuAD's measures against the official script."
import collections
import json
import re
import string

import pytest
import torch
from hypothesis import given, settings, strategies as st

from langneuron_mi.text.sources import load_corpus
from langneuron_mi.models.loading import load_model
from langneuron_mi.tuning.data import (NLI, PRESETS, QA, accuracy_items, answer_f1, answer_items, class_logits, exact_match, last_real,
                                       load_nli, load_squad, nli_rows, preset, prompt_rows, qa_prompted, split_parallel,
                                       translate_prompt, translations)
from langneuron_mi.tuning.rows import pad_rows


# the official evaluate-v1.1.py of SQuAD, its functions as published; an independent truth for ours
def _official_normalize(s):
    def remove_articles(text): return re.sub(r'\b(a|an|the)\b', ' ', text)
    def white_space_fix(text): return ' '.join(text.split())
    def remove_punc(text):
        exclude = set(string.punctuation)
        return ''.join(ch for ch in text if ch not in exclude)
    return white_space_fix(remove_articles(remove_punc(s.lower())))


def _official_f1(prediction, ground_truth):
    prediction_tokens, ground_truth_tokens = _official_normalize(prediction).split(), _official_normalize(ground_truth).split()
    num_same = sum((collections.Counter(prediction_tokens) & collections.Counter(ground_truth_tokens)).values())
    if num_same == 0: return 0
    precision, recall = num_same/len(prediction_tokens), num_same/len(ground_truth_tokens)
    return 2*precision*recall/(precision + recall)


WORD = st.sampled_from(["the", "The", "a", "cat", "cats,", "an", "Ann", "...", "Đội", "黑豹队", "136 次", "l'eau", "“308”", "-", " "])
WORDS = st.lists(WORD, max_size=6).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_finetune_data_squad_scores_equal_the_official_script(answer, gold):
    assert exact_match(answer, gold) == max(float(_official_normalize(answer) == _official_normalize(g)) for g in gold)
    assert answer_f1(answer, gold) == pytest.approx(max(_official_f1(answer, g) for g in gold))


def test_finetune_data_squad_scores_by_hand():
    assert exact_match("The Black-Cat.", ["blackcat"]) == 1 and exact_match("cats", ["cat"]) == 0
    assert answer_f1("in the year 1999", ["1999", "year of 1999"]) == pytest.approx(2/3)
    assert answer_f1("", [""]) == 0 and exact_match("the", [""]) == 1  # as the official script has it


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma3", "qwen2", "gpt2"])
def test_finetune_data_head_reads_the_last_real_token(arch, side, tiny):
    hf, tok = tiny(arch)
    rows = [dict(input_ids=tok(t).input_ids) for t in ("a cat", "a much longer sentence", "x")]
    rows[0]["input_ids"].append(tok.pad_token_id)  # the text may end with the very token that pads
    head = torch.randn(3, hf.config.hidden_size, generator=torch.Generator().manual_seed(0))
    batch = pad_rows(rows, tok.pad_token_id, side)
    sizes, width = [len(r["input_ids"]) for r in rows], batch["input_ids"].shape[1]
    assert last_real(batch["attention_mask"]).tolist() == ([width - 1]*3 if side == "left" else [n - 1 for n in sizes])
    got = class_logits(hf.base_model, head, **batch)
    for row, logits in zip(rows, got):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad(): want = hf.base_model(ids).last_hidden_state[0, -1] @ head.T
        assert torch.allclose(logits, want, atol=2e-4, rtol=1e-4)


def test_finetune_data_position_minus_one_is_a_pad(tiny):
    "What the published code reads: its answer for one text depends on the other text of the batch."
    hf, tok = tiny("llama")
    head = torch.randn(3, hf.config.hidden_size, generator=torch.Generator().manual_seed(0))
    short, long, longer = (dict(input_ids=tok(t).input_ids) for t in ("a cat", "a longer one", "a text that is much longer"))
    def published(rows):
        with torch.no_grad(): return hf.base_model(**pad_rows(rows, tok.pad_token_id)).last_hidden_state[0, -1] @ head.T
    assert not torch.allclose(published([short, long]), published([short, longer]), atol=1e-2)
    a, b = (class_logits(hf.base_model, head, **pad_rows(rows, tok.pad_token_id))[0] for rows in ([short, long], [short, longer]))
    assert torch.allclose(a, b, atol=1e-4)


def test_finetune_data_a_row_of_pads_has_no_last_token():
    with pytest.raises(ValueError, match="without any real token"): last_real(torch.tensor([[1, 0], [0, 0]]))


def test_finetune_data_accuracy_against_a_loop(tiny):
    hf, tok = tiny("mistral")
    items = [NLI("a cat sleeps"[:i], "it rests", i % 3) for i in range(2, 10)]
    rows, head = nli_rows(items, tok), torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(): last = [hf.model(torch.tensor([r["input_ids"]])).last_hidden_state[0, -1] for r in rows]
    want = [float((x @ head.T).argmax() == r["labels"]) for x, r in zip(last, rows)]
    model = load_model(hf, tokenizer=tok)
    assert accuracy_items(model, head, rows, batch_size=3).tolist() == want and 0 < sum(want) < len(want)
    with pytest.raises(ValueError, match="labels up to 2, and the head knows 2 classes"): accuracy_items(model, head[:2], rows)


def test_finetune_data_nli_errors(tmp_path, tiny):
    (tmp_path/"test.en.jsonl").write_text(json.dumps(dict(premise="a", hypothesis="b", label=3)), encoding="utf-8")
    with pytest.raises(ValueError, match="item 0: the label 3 is none of 0 to 2"): load_nli(tmp_path, ["en"])
    (tmp_path/"test.en.jsonl").write_text(json.dumps(dict(premise="a", label=1)), encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: no field 'hypothesis'; it has premise, label"): load_nli(tmp_path, ["en"])
    with pytest.raises(ValueError, match="no file"): load_nli(tmp_path, ["ur"])
    with pytest.raises(LookupError, match="no language 'xxq'"): load_nli(tmp_path, ["xxq"])
    with pytest.raises(ValueError, match="share=0"): load_nli(tmp_path, ["en"], share=0)
    with pytest.raises(ValueError, match="shorter than 3 tokens"): nli_rows([NLI("abc", "def", 0)], tiny("llama")[1], length=3)


def test_finetune_data_nli_share_takes_the_first(tmp_path):
    lines = [json.dumps(dict(premise=f"p{i}", hypothesis="h", label=i % 3)) for i in range(8)]
    (tmp_path/"train.vi.jsonl").write_text("\n".join(lines), encoding="utf-8")
    got = load_nli(tmp_path, ["vi"], split="train", share=.25)
    assert [i.premise for i in got["vi"]] == ["p0", "p1"]
    assert len(load_nli(tmp_path, ["vi"], split="train", n=5)["vi"]) == 5


def _squad_file(path, ids):
    qas = [dict(id=i, question=f"Q {i}?", answers=[dict(text="cat", answer_start=0)]) for i in ids]
    paragraphs = [dict(context="cat sat", qas=qas[:3]), dict(context="dog ran", qas=qas[3:])]
    path.write_text(json.dumps(dict(data=[dict(paragraphs=paragraphs)])), encoding="utf-8")


def test_finetune_data_squad_split_is_parallel(tmp_path):
    for l in ("en", "zh"): _squad_file(tmp_path/f"xquad.{l}.json", list("abcdefghij"))
    items = load_squad(tmp_path, ["en", "zh"])
    train, test = split_parallel(items)
    assert [q.id for q in train["en"]] == [q.id for q in train["zh"]] == list("abcdefgh") and [q.id for q in test["zh"]] == ["i", "j"]
    assert items["en"][3].context == "dog ran"
    _squad_file(tmp_path/"xquad.vi.json", list("bacdefghij"))
    with pytest.raises(ValueError, match="questions of en and vi are not the same"): load_squad(tmp_path, ["en", "vi"])
    with pytest.raises(ValueError, match=r"no \*.hi.json; it has xquad.en.json"): load_squad(tmp_path, ["hi"])
    (tmp_path/"xquad.hi.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="not in SQuAD's format"): load_squad(tmp_path, ["hi"])
    with pytest.raises(ValueError, match="leaves one part empty"): split_parallel(items, 1.)
    with pytest.raises(ValueError, match="not parallel"): split_parallel({"en": [1], "vi": [1, 2]})


def test_finetune_data_only_the_answer_is_learned(tiny):
    _, tok = tiny("llama")
    items = qa_prompted([QA("q", "Who?", "The cat sat.", ("The cat", "cat"))])
    row = prompt_rows(items, tok)[0]
    learned = [t for t in row["labels"] if t != -100]
    assert tok.decode(learned[:-1]) == " The cat" and learned[-1] == tok.eos_token_id
    assert row["input_ids"][-len(learned):] == learned
    assert tok.decode(row["input_ids"], skip_special_tokens=True) == items[0].prompt + " The cat"
    with pytest.raises(ValueError, match="fits into 4 tokens"): prompt_rows(items, tok, length=4)


def test_finetune_data_answers_are_cut_at_the_line(tiny, monkeypatch):
    hf, tok = tiny("llama")
    model = load_model(hf, tokenizer=tok)
    from langneuron_mi.models.hooked import ModelView
    def says(self, prompts, n, **kw): return [" the Cat.\nQ: more" if "slept" in p else "\n" for p in prompts]
    monkeypatch.setattr(ModelView, "generate", says)
    got = answer_items(model, [QA("1", "Who?", "The cat slept.", ("cat",)), QA("2", "Who?", "x", ("dog",))])
    assert got["em"].tolist() == [1, 0] and got["f1"].tolist() == [1, 0]


def test_finetune_data_translations_are_aligned():
    texts = {l: [f"{l} text {i}" for i in range(12)] for l in ("en", "de", "sw")}
    corpus = load_corpus(texts, aligned=True)
    got = translations(corpus, seed=1)
    assert len(got) == 12 and len({t.prompt.splitlines()[1].split()[-1] for t in got}) == 12
    for t in got:
        head, source, arrow = t.prompt.splitlines()
        assert source.split()[-1] == t.answer.split()[-1] and source[:2] != t.answer.strip()[:2] and arrow == "→"
    assert {(t.prompt.splitlines()[1][:2], t.answer.strip()[:2]) for t in got} == {(a, b) for a in texts for b in texts if a != b}
    assert translations(corpus, seed=1) == got and translations(corpus, seed=2) != got
    assert translate_prompt("Katze", "de", "en").startswith("Übersetze (Deutsch → Englisch):")
    with pytest.raises(ValueError, match="needs aligned texts"): translations(load_corpus(texts))
    with pytest.raises(ValueError, match="give two languages"): translations(corpus, ["en"])
    with pytest.raises(ValueError, match="20 items are asked for, and 12"): translations(corpus, n=20)


def test_finetune_data_presets_are_the_papers():
    assert (PRESETS["xnli"]["rank"], PRESETS["xnli"]["alpha"], PRESETS["xnli"]["lr"], PRESETS["xnli"]["train_share"]) == (8, 16, 1e-5, .25)
    assert (PRESETS["xquad"]["rank"], PRESETS["xquad"]["alpha"], PRESETS["xquad"]["lr"], PRESETS["xquad"]["epochs"]) == (64, 128, 5e-5, 10)
    changed = preset("xnli")
    changed["rank"] = 1
    assert preset("xnli")["rank"] == 8
    with pytest.raises(ValueError, match="no preset 'nli'; there are xnli, xquad"): preset("nli")
