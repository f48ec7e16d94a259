"The planted model keeps what it promises, checked with plain PyTorch hooks only."
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from langneuron_mi.testing.planted import planted_model
from langneuron_mi.testing.tiny import SPECIALS


def gates(p, texts):
    "Gate values and output logits over the concatenated texts, BOS left out: [layer, token, neuron], [token, vocab]."
    seen = [[] for _ in p.hf.model.layers]
    def keep(i): return lambda module, args, out: seen[i].append(out[0, 1:])
    handles = [l.mlp.gate_proj.register_forward_hook(keep(i)) for i, l in enumerate(p.hf.model.layers)]
    try:
        with torch.no_grad(): logits = [p.hf(torch.tensor([p.tokenizer(t)["input_ids"]])).logits[0, 1:] for t in texts]
    finally:
        for h in handles: h.remove()
    return torch.stack([torch.cat(s) for s in seen]), torch.cat(logits)


def slow_lape(counts, n, top=.01, filter=.95, bar=.95):
    "LAPE by loops, from methods.md section 2: counts[lang][layer][neuron], n[lang]."
    K, L, I = len(counts), len(counts[0]), len(counts[0][0])
    p = {(l, i): [counts[k][l][i]/n[k] for k in range(K)] for l in range(L) for i in range(I)}
    values = sorted(x for ps in p.values() for x in ps)
    t_filter, t_bar = (values[round(len(values)*q) - 1] for q in (filter, bar))
    entropy = {at: -sum(x/sum(ps)*math.log(x/sum(ps)) for x in ps if x) for at, ps in p.items() if max(ps) > t_filter}
    taken = sorted(entropy, key=lambda at: (entropy[at], at))[:round(L*I*top)]
    return [sorted(at for at in taken if p[at][k] > t_bar) for k in range(K)]


@pytest.mark.parametrize("kw", [
    {}, dict(langs=("en", "de"), n_words=3, seed=1), dict(langs=("a", "b", "c", "ab"), n_words=4, n_layers=3, seed=2),
    dict(act="gelu_pytorch_tanh", seed=3), dict(act="relu", n_layers=1)], ids=str)
def test_planted_lape_by_loops_finds_exactly_the_planted_neurons(kw):
    p = planted_model(**kw)
    texts = p.texts(60)
    fired = [gates(p, texts[lang])[0] > 0 for lang in p.langs]
    found = slow_lape([f.sum(1).tolist() for f in fired], [f.shape[1] for f in fired])
    assert dict(zip(p.langs, found)) == p.neurons


def test_planted_roles_cover_every_neuron_once_and_fire_as_named():
    p = planted_model(("en", "de", "fr"))
    roles = [*p.neurons.values(), p.shared, *p.partial.values(), p.silent, p.noise]
    every = [at for r in roles for at in r]
    assert len(every) == len(set(every)) == 2*p.hf.config.intermediate_size
    texts = p.texts(100)
    rate = {lang: (gates(p, texts[lang])[0] > 0).double().mean(1) for lang in p.langs}
    def rates(lang, ats): return {rate[lang][at].item() for at in ats}
    for lang in p.langs:
        for other in p.langs: assert rates(other, p.neurons[lang]) == {float(lang == other)}
        assert rates(lang, p.shared) == {1.} and rates(lang, p.silent) == {0.}
        for pair, ats in p.partial.items(): assert rates(lang, ats) == {float(lang in pair)}
        assert 0 < min(rates(lang, p.noise)) and max(rates(lang, p.noise)) < .8


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_planted_ablation_destroys_one_language_and_leaves_the_others_bit_identical(act):
    p = planted_model(act=act, n_words=5, d_mlp=400)
    texts = {lang: ts[:10] for lang, ts in p.texts(10).items()}
    before = {lang: gates(p, ts)[1] for lang, ts in texts.items()}
    words = slice(len(SPECIALS), None)
    for lang in p.langs:
        with p.ablated(p.neurons[lang]): after = {x: gates(p, ts)[1] for x, ts in texts.items()}
        for x in p.langs:
            if x == lang: assert torch.all(after[x][:, words] == after[x][:, words][:, :1])
            else: assert torch.equal(after[x], before[x])
    assert all(torch.equal(gates(p, ts)[1], before[x]) for x, ts in texts.items()), "a hook was left behind"


def test_planted_perplexity_equals_its_closed_form_with_and_without_ablation():
    p = planted_model(("en", "de"), n_words=6, seed=5)
    def measure(ts):
        ids = [torch.tensor(p.tokenizer(t)["input_ids"]) for t in ts]
        with torch.no_grad(): nll = torch.cat([F.cross_entropy(p.hf(x[None]).logits[0, :-1], x[1:], reduction="none") for x in ids])
        return nll.double().mean().exp().item()
    ts = p.texts(15, seed=3)["de"]
    assert measure(ts) == pytest.approx(p.expected_perplexity(ts), rel=.01)
    with p.ablated(p.neurons["de"]): assert measure(ts) == pytest.approx(p.expected_perplexity(ts, ["de"]), rel=.01)
    assert p.expected_perplexity(ts, ["de"]) > 5*p.expected_perplexity(ts)


CODES = st.lists(st.sampled_from(["en", "de", "fr", "zh", "ja", "e"]), min_size=2, max_size=4, unique=True)

@given(seed=st.integers(0, 2**16), n_words=st.integers(2, 6), langs=CODES)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
def test_planted_model_expects_the_successor_whatever_its_size(seed, n_words, langs):
    p = planted_model(langs, n_words=n_words, seed=seed, d_mlp=40*len(langs)*(n_words + 1), n_layers=1)
    words = [f"{lang}{i}" for lang in langs for i in range(n_words)]
    with torch.no_grad(): best = p.hf(torch.tensor([[i for lang in langs for i in p.tokens_of(lang)]])).logits[0].argmax(-1)
    assert p.tokenizer.convert_ids_to_tokens(best) == [p.successor(w) for w in words]
    assert sorted(p.order) == list(range(n_words))


def test_planted_model_is_a_function_of_its_seed_and_leaves_the_global_one_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    a, b, c = planted_model(d_mlp=300), planted_model(d_mlp=300), planted_model(d_mlp=300, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.hf.state_dict().values(), b.hf.state_dict().values()))
    assert a.neurons == b.neurons != c.neurons
    assert a.texts(5, seed=1) != a.texts(5, seed=2)


@pytest.mark.parametrize("kw", [
    {}, dict(langs=("en", "de", "fr", "zh"), n_words=5, n_layers=3, seed=4), dict(act="gelu_pytorch_tanh", seed=6)], ids=str)
def test_planted_lape_of_this_package_with_its_defaults_finds_exactly_the_planted_neurons(kw):
    from langneuron_mi.find.identification import lape
    from langneuron_mi.recording.stats import ActivationStats
    p = planted_model(**kw)
    fired = [gates(p, ts)[0] > 0 for ts in p.texts(60).values()]
    stats = ActivationStats.from_counts(torch.stack([f.sum(1) for f in fired]), [f.shape[1] for f in fired], list(p.langs))
    found = lape(stats)
    assert {lang: sorted(map(tuple, found[lang].to_df()[["layer", "neuron"]].to_numpy().tolist())) for lang in p.langs} == p.neurons
