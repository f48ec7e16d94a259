"Neuron cards: every number from an independent look at the model, and nothing that a text says becomes markup."
import html.parser
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from langneuron_mi.show.cards import browse, neuron_card, neuron_cards, neuron_table
from langneuron_mi.find.identification import lape
from langneuron_mi.models.loading import load_model
from langneuron_mi.measure.facts import Fact
from langneuron_mi.measure.probes import Probes
from langneuron_mi.recording.record import record
from langneuron_mi.share.sharing import sharing
from langneuron_mi.testing.planted import planted_model
from langneuron_mi.testing.tiny import tiny_model

LANGS = ("en", "de", "fr")


@pytest.fixture(scope="module")
def known():
    p = planted_model()
    model = load_model(p.hf, tokenizer=p.tokenizer)
    stats = record(model, p.texts(40, seed=0), progress=False)
    facts = [Fact(f"after {m}", "successor", {l: (f"{l}{m}", f"{l}{p.order[m]}") for l in LANGS}) for m in range(p.n_words)]
    return p, model, stats, Probes(tuple(facts), {"successor": {l: "[X] [Y]" for l in LANGS}}, LANGS, "toy").parallel()


def test_card_of_every_planted_role(known):
    p, model, stats, _ = known
    shared = sharing(model, p.texts(10, seed=1), progress=False)
    partial = next(iter(p.partial.values()))[0]
    roles = {"specific": p.neurons["fr"][0], "all-shared": p.shared[0], "partial-shared": partial, "non-activated": p.silent[0]}
    cards = neuron_cards(model, roles.values(), stats, texts=p.texts(3, seed=2), shared=shared)
    for (role, pair), c in zip(roles.items(), cards):
        assert (c.layer, c.neuron) == pair and c.categories.set_index("category").inputs[role] == 10
        assert c.rates.rate.tolist() == [float(stats.value(l, "rate").values[pair]) for l in LANGS]
    fr, everyone, _, silent = cards
    assert "French 10" in fr.categories.langs.tolist() and set(fr.texts.lang) == {"fr"} and not len(silent.texts)
    assert set(everyone.texts.lang) <= {*LANGS} and len(everyone.texts) == 5


def test_card_effect_equals_plain_pytorch(known):
    p, model, stats, facts = known
    pair = p.neurons["de"][-1]
    card = neuron_card(model, pair, stats, facts=facts)
    def logp(text):
        ids = torch.tensor([p.tokenizer(text).input_ids])
        with torch.no_grad(): return float(p.hf(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]])
    for lang in LANGS:
        before = np.array([logp(t) for t in facts.texts[lang]])
        with p.ablated([pair]): after = np.array([logp(t) for t in facts.texts[lang]])
        assert card.effect.set_index("lang").effect[lang] == pytest.approx((after - before).mean(), abs=1e-5)
    assert set(card.effect.n) == {len(facts)}


def test_card_tokens_leave_bos_out_and_average(known):
    p, model, stats, _ = known
    card = neuron_card(model, p.noise[0], stats, texts={"en": ["en0 en1 en0", "en2"], "de": ["de0"], "fr": ["fr0"]}, top=50)
    assert "<bos>" not in set(card.tokens.token) and card.tokens.set_index("token").n["en0"] == 2
    assert card.tokens["mean"].is_monotonic_decreasing and all("<bos>" not in t for t in card.texts.tokens)


@pytest.mark.parametrize("arch", ["gemma3", "bloom", "gpt2"])
def test_card_on_other_architectures(arch):
    hf, tok = tiny_model(arch)
    model = load_model(hf, tokenizer=tok)
    texts = {"en": ["abc def", "ghi"], "ar": ["في البدء", "خلق"]}
    stats = record(model, texts, groups=("counts",), progress=False)
    card = neuron_card(model, (1, 5), stats, texts=texts, top=3)
    assert len(card.tokens) == 3 and all(math.isnan(m) for m in card.rates["mean"]) and "neuron 5" in card._repr_html_()


def test_card_long_text_is_cut_around_its_highest_token(known):
    p, model, stats, _ = known
    lang, pair = "de", p.neurons["de"][0]
    card = neuron_card(model, pair, stats, texts={"en": ["en1"], "de": [" ".join(["de1"]*200)], "fr": ["fr1"]})
    assert len(card.texts.tokens[0]) <= 49


def test_card_escapes_everything(known):
    p, model, stats, facts = known
    card = neuron_card(model, (0, 0), stats, texts=p.texts(1, seed=3), facts=facts)
    evil = '"><script>alert(1)</script>'
    card = replace(card, model_id=evil, owners=(evil,), tokens=pd.DataFrame([dict(token=evil, langs=evil, mean=1., n=1)]),
                   texts=pd.DataFrame([dict(lang=evil, tokens=[evil], values=np.array([1.]), max=1.)]),
                   rates=pd.DataFrame([dict(lang=evil, rate=.5, mean=1.)]),
                   categories=pd.DataFrame([dict(category=evil, inputs=1, langs=evil)]))
    tags = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)
    parser.feed(card._repr_html_() + browse([card]))
    assert "script" not in tags and {"div", "table", "details", "summary"} <= set(tags)


def test_card_table_to_browse(known):
    p, model, stats, _ = known
    found = lape(stats)
    t = neuron_table(found, stats, sharing(model, p.texts(5, seed=1), progress=False))
    assert {(l, i) for l, i in zip(t.layer, t.neuron)} == {n for s in found.values() for n in s} and t.entropy.is_monotonic_increasing
    rate = stats.value("de", "rate").values
    assert np.allclose(t.set_index(["layer", "neuron"]).rate_de, [float(rate[l, i]) for l, i in zip(t.layer, t.neuron)])
    assert set(t.category) == {"specific"} and set(t.repetition) == {1.}
    silent = neuron_table(found["de"] - found["de"], stats)
    assert len(silent) == 0
    assert "<details>" not in browse([])


def test_card_refuses_neurons_and_statistics_of_another_model(known):
    p, model, stats, _ = known
    with pytest.raises(ValueError, match="no neuron 99999 in layer 0"): neuron_card(model, (0, 99999), stats)
    other = replace(stats, meta=stats.meta | dict(model="other"))
    with pytest.raises(ValueError, match="belong to a model with fingerprint other"): neuron_card(model, (0, 0), other)
    s = sharing(model, p.texts(2, seed=1), site="post", progress=False)
    with pytest.raises(ValueError, match="site 'gate', the sharing categories of 'post'"): neuron_card(model, (0, 0), stats, shared=s)
