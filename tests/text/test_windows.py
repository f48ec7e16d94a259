"Packing: every real token once, exactly as many as asked, for any texts, lengths and tokenizers."
import os, subprocess, sys, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from langneuron_mi.text import windows as W
from langneuron_mi.text.corpus import CorpusError, text_hash
from langneuron_mi.text.sources import load_corpus
from langneuron_mi.text.sketches import add_to_sketch, shares_text
from langneuron_mi.text.windows import pack, tokenizer_fingerprint

WORDS = [f"w{i}" for i in range(50)]


def word_tokenizer(words=WORDS, template=True):
    t = Tokenizer(models.WordLevel({"<unk>": 0, "<bos>": 1, "\n": 2} | {w: i for i, w in enumerate(words, 3)}, "<unk>"))
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")])
    if template: t.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=t, unk_token="<unk>", bos_token="<bos>", pad_token="<unk>")


TOK = word_tokenizer()
TEXTS = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=7).map(" ".join), min_size=1, max_size=40)
naive = lambda texts: [[TOK.get_vocab()[w] for w in t.split()] + [2] for t in texts]


def unpack(w, lang): return [r for b in w.batches(lang, 0, w.n_windows(lang)) for r in b]


@settings(deadline=None, max_examples=80)
@given(TEXTS, st.integers(2, 9), st.booleans(), st.integers(0, 3), st.data())
def test_windows_hold_every_real_token_once(texts, length, bos, seed, data):
    c = load_corpus({"de": texts})
    total = sum(map(len, naive(texts)))
    asked = data.draw(st.none() | st.integers(1, total))
    w = pack(c, TOK, tokens=asked, length=length, seed=seed, bos_token_id=1 if bos else None)
    rows, n = unpack(w, "de"), asked or total
    assert w.n_tokens("de") == n and len(rows) == w.n_windows("de")
    assert all(r.numel() == length for r in rows[:-1]) and 1 + bos <= rows[-1].numel() <= length
    assert all(r.dtype == torch.int64 for r in rows)
    if bos: assert all(r[0] == 1 and not (r[1:] == 1).any() for r in rows)
    stream = torch.cat([r[bos:] for r in rows]).tolist()
    order = np.random.default_rng([seed, text_hash("de")]).permutation(len(texts))
    assert stream == [i for k in order for i in naive(texts)[k]][:n]
    lens = np.cumsum([0] + [len(naive(texts)[k]) for k in order])[:-1]
    assert w.offsets("de").tolist() == [s for s in lens.tolist() if s < n] and w.offsets("de").dtype == np.int64
    used = [texts[k] for k, s in zip(order, lens) if s < n]
    assert w.seen("de").tolist() == sorted({text_hash(t) for t in used}) and w.streams["de"].dtype == np.int32


def test_windows_batches_of_any_range():
    w = pack(load_corpus({"de": [" ".join(WORDS)]*3}), TOK, length=8, bos_token_id=1)
    rows = unpack(w, "de")
    n = len(rows)
    for i in range(n):
        for j in range(i + 1, n + 1):
            got = [r for b in w.batches("de", i, j) for r in b]
            assert len(got) == j - i and all(torch.equal(a, b) for a, b in zip(got, rows[i:j]))
    for bad in [(0, 0), (-1, 1), (0, n + 1), (3, 2)]:
        with pytest.raises(IndexError, match=f"there are {n}"): w.batch("de", *bad)
    with pytest.raises(IndexError, match="take it alone"): w.batch("de", n - 2, n)


def test_windows_aligned_texts_keep_one_order():
    texts = [f"{w} {w}" for w in WORDS]
    c = load_corpus({"de": texts, "en": [f"{t} w0" for t in texts]}, aligned=True)
    w = pack(c, TOK, length=4)
    first = {l: w.streams[l][w.offsets(l)].tolist() for l in c.langs}
    assert first["de"] == first["en"] != sorted(first["de"])
    assert pack(c, TOK, length=4, seed=1).streams["de"].tolist() != w.streams["de"].tolist()
    alone = pack(c, TOK, length=4, langs=["en"])
    assert alone.langs == ("en",) and np.array_equal(alone.streams["en"], w.streams["en"])


def test_windows_of_streams_come_in_order(tmp_path):
    (tmp_path/"de.txt").write_text("\n".join(WORDS))
    w = pack(load_corpus(tmp_path), TOK, tokens=9)
    assert w.streams["de"].tolist() == [3, 2, 4, 2, 5, 2, 6, 2, 7]


def test_windows_take_no_more_of_a_stream_than_needed(tmp_path, monkeypatch):
    (tmp_path/"de.txt").write_text("\n".join(["w1 w2"]*50_000))
    calls = []
    monkeypatch.setattr(W, "add_to_sketch", lambda s, texts: calls.append(len(texts)) or add_to_sketch(s, texts))
    pack(load_corpus(tmp_path), TOK, tokens=100)
    assert sum(calls) == 34


def test_windows_fingerprint_depends_on_everything():
    c = load_corpus({"de": WORDS, "en": WORDS[::-1]})
    base = dict(tokens=20, length=8, seed=0, bos_token_id=None)
    make = lambda tok=TOK, c=c, **kw: pack(c, tok, **(base | kw)).fingerprint
    others = [make(tokens=21), make(length=9), make(seed=1), make(bos_token_id=1), make(tokens={"de": 20, "en": 19}), make(langs=["de"]),
              make(layout="texts"), make(c=load_corpus({"de": WORDS, "en": WORDS[1:]})), make(word_tokenizer(WORDS[::-1])),
              make(c=load_corpus({"de": WORDS, "en": WORDS[::-1]}, sep=" "))]
    assert len({make(), *others}) == 1 + len(others)
    assert make() == make(tokens={"German": 20, "en": 20}) == make(word_tokenizer()) == pack(c, TOK, packing=W.Packing(20, 8)).fingerprint


def test_windows_same_in_every_process():
    code = ("import warnings; warnings.simplefilter('ignore'); import sys; sys.path.insert(0, 'tests/text'); import test_windows as t;"
            "w = t.pack(t.load_corpus({'de': t.WORDS}), t.TOK, tokens=30, length=7);"
            "print(w.fingerprint, w.streams['de'].tolist(), w.seen('de').tolist())")
    def run(seed):
        env, root = os.environ | {"PYTHONHASHSEED": seed}, Path(__file__).resolve().parents[2]
        return subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True).stdout
    runs = {run(seed) for seed in "12"}
    assert len(runs) == 1 and "[" in runs.pop()


def test_windows_spill_to_a_mapped_file(tmp_path, monkeypatch):
    monkeypatch.setattr(W, "SPILL", 300)
    c = load_corpus({"de": [" ".join(WORDS)]*80, "en": ["w1 w2"]})
    held, spilled = pack(c, TOK, length=8, bos_token_id=1), pack(c, TOK, length=8, bos_token_id=1, spill=tmp_path)
    assert isinstance(spilled.streams["de"], np.memmap) and not isinstance(spilled.streams["en"], np.memmap)
    assert np.array_equal(held.streams["de"], spilled.streams["de"]) and held.fingerprint == spilled.fingerprint
    assert [p.suffix for p in tmp_path.iterdir()] == [".int32"]
    assert all(torch.equal(a, b) for a, b in zip(unpack(held, "de"), unpack(spilled, "de")))


@pytest.mark.parametrize("kw,message", [
    (dict(tokens=10_000), "'de' has 100 tokens with this tokenizer, 10,000 are asked for; lower tokens="),
    (dict(tokens=0), "tokens=0: give 1 or more"), (dict(tokens={"de": 5}), "names no number for en"),
    (dict(tokens={"ger": 5}), "did you mean 'de'"), (dict(layout="rows"), "allowed are 'packed' and 'texts'"),
    (dict(length=1, bos_token_id=1), "room for a real token after the BOS"),
    (dict(length=0), "room for a real token"), (dict(langs=["fr"]), "no 'fr'; it has de, en")])
def test_windows_errors(kw, message):
    with pytest.raises(CorpusError, match=message): pack(load_corpus({"de": WORDS, "en": WORDS[::-1]}), TOK, **kw)


def test_windows_unknown_tokens_warn():
    with pytest.warns(UserWarning, match="^ar: 67% of the tokens"): pack(load_corpus({"ar": ["a b"]*3, "de": WORDS}), TOK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack(load_corpus({"de": WORDS + ["nope"]}), TOK)


def test_windows_tokenizer_fingerprint_ignores_padding():
    a, b = word_tokenizer(), word_tokenizer()
    a(["w1", "w2 w3"], padding="max_length", truncation=True, max_length=2)
    other = word_tokenizer(template=False)
    assert a.backend_tokenizer.padding and tokenizer_fingerprint(a) == tokenizer_fingerprint(b) != tokenizer_fingerprint(other)
    w = pack(load_corpus({"de": ["w1 w2 w3 w4"]}), a)
    assert w.n_tokens("de") == 5


def test_windows_slow_tokenizer_fingerprint():
    class Slow:
        def __init__(self, vocab): self.vocab = vocab
        def get_vocab(self): return self.vocab
    one, same, other = map(tokenizer_fingerprint, (Slow({"a": 0, "b": 1}), Slow({"b": 1, "a": 0}), Slow({"a": 1, "b": 0})))
    assert one == same != other


def test_windows_of_split_parts_share_nothing():
    texts = [f"{a} {b}" for a in WORDS for b in WORDS]
    train, held = load_corpus({"de": texts}).split(.2)
    a, b = pack(train, TOK), pack(held, TOK)
    assert shares_text(a.seen("de"), b.seen("de")) == 0 and len(a.seen("de")) + len(b.seen("de")) == 2500
