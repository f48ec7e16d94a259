"Perplexity: against Hugging Face's loss and hand-made sums."
import math

import numpy as np
import pytest
import torch
from lens import lens_models

from langneuron_mi.text.sources import load_corpus
from langneuron_mi.find.identification import lape
from langneuron_mi.find.controls import random_neurons
from langneuron_mi.change.interventions import ablate
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.measure.perplexity import PerplexityMatrix, perplexity_matrix, window_nll
from langneuron_mi.recording.record import record
from langneuron_mi.testing.planted import planted_model
from langneuron_mi.testing.tiny import tiny_model

TEXTS = {"en": ["the quick brown fox", "jumps over", "the lazy dog again and again"] * 4,
         "de": ["der schnelle braune", "Fuchs springt weit", "und noch ein Satz"] * 5}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2", "bloom"])
def test_perplexity_nll_equals_hugging_face_loss(arch):
    ids = torch.randint(5, 40, (3, 11), generator=torch.Generator().manual_seed(0))
    for _, hf, tok, model in lens_models(arch):
        want = [hf(r[None], labels=r[None]).loss.item() * 10 for r in ids]
        np.testing.assert_allclose(window_nll(model, ids).numpy(), want, rtol=1e-4)


def test_perplexity_is_exp_of_the_sum_over_tokens():
    "methods 9.6: neither a mean of window perplexities nor the mean NLL; BOS gives context and is not predicted."
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    m = perplexity_matrix(model, TEXTS, tokens=None, length=16, progress=False)
    for lang in TEXTS:
        total, n = 0., 0
        stream_n = sum(len(tok(t + "\n", add_special_tokens=False).input_ids) for t in TEXTS[lang])
        total, n = m.nll["none", "none", lang].sum(), m.n_tokens[lang].sum()
        assert n == stream_n
        assert math.isclose(m.perplexity(lang), math.exp(total / n))
        assert m.n_bytes[lang] == sum(len((t + "\n").encode()) for t in TEXTS[lang])
        assert math.isclose(m.bits_per_byte(lang), total / math.log(2) / m.n_bytes[lang])


def test_perplexity_without_bos_does_not_count_the_first_token():
    hf, tok = tiny_model("qwen2", bos=False)
    m = perplexity_matrix(load_model(hf, tokenizer=tok), TEXTS, tokens=None, length=16, progress=False)
    stream_n = sum(len(tok(t + "\n", add_special_tokens=False).input_ids) for t in TEXTS["en"])
    assert m.n_tokens["en"].sum() == stream_n - len(m.n_tokens["en"])


def test_perplexity_last_window_of_one_token_without_bos():
    hf, tok = tiny_model("qwen2", bos=False)
    m = perplexity_matrix(load_model(hf, tokenizer=tok), TEXTS, tokens=33, length=16, progress=False)
    assert m.n_tokens["en"].tolist() == [15, 15] and len(m.to_df()) == 2


def test_perplexity_bytes_do_not_depend_on_windows():
    hf, tok = tiny_model("llama")
    model, thai = load_model(hf, tokenizer=tok), {"th": ["ภาษาไทยเป็นภาษาที่มีวรรณยุกต์"] * 5}
    want = sum(len((t + "\n").encode()) for t in thai["th"])
    assert {perplexity_matrix(model, thai, tokens=None, length=n, progress=False).n_bytes["th"] for n in (7, 16, 31)} == {want}


def test_perplexity_names_never_collide():
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    a, b = (ablate(NeuronSet([(0, i)], shape=view(model).shape)) for i in (1, 2))
    with pytest.raises(ValueError, match="two interventions are named"):
        perplexity_matrix(model, TEXTS, [a, b], tokens=60, length=16, progress=False)
    with pytest.raises(ValueError, match="untouched model"):
        perplexity_matrix(model, TEXTS, {("none", "none"): a}, tokens=60, length=16, progress=False)


def test_perplexity_planted_effects_are_exactly_where_planted():
    p = planted_model()
    model = load_model(p.hf, tokenizer=p.tokenizer)
    train, held_out = load_corpus(p.texts(300, seed=0)).split(.3, seed=0)
    stats = record(model, train, progress=False)
    found = lape(stats)
    assert {l: sorted(s) for l, s in found.items()} == {l: sorted(map(tuple, n)) for l, n in p.neurons.items()}
    m = perplexity_matrix(model, held_out, [found, random_neurons(stats, like=found, seed=1)], tokens=150, progress=False)
    df = m.to_df().set_index(["method", "neurons_of", "text_lang"]).ratio
    for a in found:
        for b in found:
            assert (df["lape", a, b] > 3) == (a == b)
            assert abs(df["lape", a, b] - 1) < 1e-3 or a == b
            assert df["random", a, b] < 2


def test_perplexity_refuses_identification_text():
    p = planted_model()
    model = load_model(p.hf, tokenizer=p.tokenizer)
    corpus = load_corpus(p.texts(200, seed=0))
    train, held_out = corpus.split(.2, seed=0)
    found = lape(record(model, train, progress=False))
    with pytest.raises(ValueError, match="were used to find"):
        perplexity_matrix(model, corpus, found, tokens=None, progress=False)
    perplexity_matrix(model, held_out, found, tokens=20, progress=False)


def test_perplexity_rows_are_kept_by_content(tmp_path, monkeypatch):
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    a, b = (NeuronSet([(0, i)], shape=view(model).shape) for i in (1, 2))
    args = dict(tokens=60, length=16, out=tmp_path, progress=False)
    first = perplexity_matrix(model, TEXTS, {("x", "en"): ablate(a)}, **args)
    import langneuron_mi.measure.perplexity as room
    calls = []
    real = room.window_nll
    monkeypatch.setattr(room, "window_nll", lambda *x: calls.append(1) or real(*x))
    again = perplexity_matrix(model, TEXTS, {("x", "en"): ablate(a)}, **args)
    assert not calls and again.to_df().equals(first.to_df())
    other = perplexity_matrix(model, TEXTS, {("x", "en"): ablate(b)}, **args)
    assert calls and not np.array_equal(other.nll["x", "en", "en"], first.nll["x", "en", "en"])


def test_perplexity_save_and_load(tmp_path):
    hf, tok = tiny_model("llama")
    m = perplexity_matrix(load_model(hf, tokenizer=tok), TEXTS, tokens=60, length=16, progress=False)
    back = PerplexityMatrix.load(m.save(tmp_path / "m.safetensors"))
    assert back.to_df().equals(m.to_df())
