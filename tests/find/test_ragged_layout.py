"Sets, files and methods on models whose layers differ, against lists of neurons that know no pads."
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from layouts import LANGS, TOKENS, layouts, neurons, random_stats
from sklearn.metrics import average_precision_score

from langneuron_mi.core.layout import uniform
from langneuron_mi.find.controls import random_neurons
from langneuron_mi.find.experts import experts_of, routing_divergence, routing_table
from langneuron_mi.find.identification import lambda_score, lape
from langneuron_mi.find.language_neurons import LanguageNeurons
from langneuron_mi.find.methods import activation_probability, average_precision, language_activated, plnd
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.recording.stats import ActivationStats

fast = settings(max_examples=25, deadline=None, derandomize=True)
few = settings(fast, max_examples=8)
seeds = st.integers(0, 10**6)
pytestmark = pytest.mark.filterwarnings("ignore:no neuron was found")


def some_of(layout, seed, share=.4):
    "Some of the neurons, as (layer, neuron)."
    return [o[:2] for o in neurons(layout) if np.random.default_rng([seed, *map(ord, o[2]), o[0], o[3]]).random() < share]


@fast
@given(layouts(), seeds)
def test_layout_sets_of_neurons_are_python_sets(layout, seed):
    a, b = some_of(layout, seed), some_of(layout, seed + 1)
    x, y = NeuronSet(a, layout), NeuronSet(b, layout)
    for ours, truth in ((x | y, {*a, *b}), (x & y, {*a} & {*b}), (x - y, {*a} - {*b}), (x ^ y, {*a} ^ {*b})):
        assert list(ours) == sorted(truth) and ours.layout == layout
    by_part = [(l, *layout.place(l, n)) for l, n in a]
    assert NeuronSet(by_part, layout) == x == NeuronSet(x.mask(), layout) == NeuronSet.from_mask(x.mask(), layout=layout)
    assert x.to_df()[["layer", "neuron"]].apply(tuple, axis=1).tolist() == a
    if not layout.dense: assert list(zip(x.to_df()["layer"], x.to_df()["part"], x.to_df()["index"])) == by_part
    assert x.per_layer().tolist() == [sum(l == k for l, _ in a) for k in range(layout.n_layers)]
    everything = NeuronSet([o[:2] for o in neurons(layout)], layout)
    assert len(everything) == layout.size and torch.equal(everything.mask(), layout.real) and x <= everything
    if layout.ragged:
        with pytest.raises(ValueError, match="where this model has no neuron"):
            NeuronSet(torch.ones(layout.shape, dtype=torch.bool), layout)
        pad = tuple((~layout.real).nonzero()[0].tolist())
        with pytest.raises(ValueError, match="outside this model"): NeuronSet([pad], layout)
        assert pad not in everything
    if not layout.dense:
        with pytest.raises(ValueError, match="layout differs"): x | NeuronSet([], layout.shape)
        assert x != NeuronSet(a, layout.shape) and x.fingerprint != NeuronSet(a, layout.shape).fingerprint


@fast
@given(layouts(), seeds)
def test_layout_random_sets_hold_no_pads(layout, seed):
    x = NeuronSet(some_of(layout, seed), layout)
    r = x.random_like(seed)
    assert r.per_layer().tolist() == x.per_layer().tolist() and not (r.mask() & ~layout.real).any()
    whole = NeuronSet([o[:2] for o in neurons(layout)], layout)
    assert whole.random_like(seed) == whole # only what exists can be drawn
    assert not len(whole.random_like(seed, exclude=None, among=whole) - whole)


@few
@given(layouts(), seeds)
def test_layout_files_keep_it(tmp_path_factory, layout, seed):
    folder = tmp_path_factory.mktemp("files")
    sets = {lang: NeuronSet(some_of(layout, seed + k), layout, model="abc") for k, lang in enumerate(LANGS)}
    score = torch.where(layout.real, torch.rand(layout.shape, dtype=torch.float64), torch.nan)
    found = LanguageNeurons(sets, method="lape", metric="entropy", score=score)
    again = LanguageNeurons.load(found.save(folder/"neurons.safetensors"))
    assert dict(again) == dict(found) and again.layout == layout and again.fingerprint == found.fingerprint
    assert torch.equal(again.score.nan_to_num(-1), score.nan_to_num(-1))
    assert len(again.to_df()) == sum(map(len, sets.values()))
    stats, _, all_ = random_stats(layout, seed)
    back = ActivationStats.load(stats.save(folder/"stats.safetensors"))
    a, b = stats._tensors(), back._tensors()
    assert back.layout == layout and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(back.text_means[lang], stats.text_means[lang]) for lang in LANGS)
    frame = back.to_df()
    assert len(frame) == 3*len(LANGS)*len(all_) and set(zip(frame.layer, frame.neuron)) == {o[:2] for o in all_}


# Methods, without pads

def kth(p, share):
    "The round(N * share)-th smallest of N rates; 0 where that is none."
    rank = round(p.size*share)
    return 0. if rank == 0 else np.sort(p, axis=None)[rank - 1]


def smallest(score, m):
    "The m smallest that are not nan, the first of those alike."
    order = sorted((round(x, 12), i) for i, x in enumerate(score) if not math.isnan(x))
    return [i for _, i in order[:m]]


def entropy(p):
    q = p/p.sum()
    return -sum(x*math.log(x) for x in q if x > 0)


def same(found, all_, chosen):
    "The neurons found of each language are those chosen by number."
    for lang, numbers in zip(LANGS, chosen, strict=True): assert list(found[lang]) == [all_[i][:2] for i in sorted(numbers)], lang


def same_score(found, all_, score):
    "The scores of neurons are these, and nan elsewhere."
    l, n = np.array([o[:2] for o in all_]).T
    got = found.score.numpy()
    np.testing.assert_allclose(got[..., l, n], score, rtol=1e-9, atol=1e-12)
    elsewhere = np.ones(found.shape, dtype=bool)
    elsewhere[l, n] = False
    assert np.isnan(got[..., elsewhere]).all()


def rates(plain, given):
    if given == "tokens": return plain["count"]/np.array(TOKENS)[:, None]
    return np.where(plain["given"] >= 30, plain["count"]/np.maximum(plain["given"], 1), 0) # fewer tokens make no rate


@fast
@given(layouts(), seeds, st.sampled_from(["tokens", "routing"]), st.sampled_from([.01, .1, .5, 1.]), st.sampled_from([0., .5, .9, .95]))
def test_layout_lape_knows_no_pads(layout, seed, by, top, share):
    assume(layout.size and (by == "tokens" or layout.has_experts))
    stats, plain, all_ = random_stats(layout, seed, groups=False)
    found = lape(stats, top=top, filter=share, bar=share, given=by)
    p = rates(plain, by)
    threshold = kth(p, share)
    score = [entropy(o) if o.max() > threshold else math.nan for o in p.T]
    taken = smallest(score, round(len(all_)*top))
    assert found.parameters["threshold"] == found.parameters["bar_rate"] == threshold
    same_score(found, all_, score)
    same(found, all_, [[i for i in taken if p[k, i] > threshold] for k in range(len(LANGS))])


@fast
@given(layouts(), seeds, st.sampled_from([.05, .3]), st.sampled_from([.5, .9]))
def test_layout_lambda_score_knows_no_pads(layout, seed, top, bar):
    assume(layout.size)
    stats, plain, all_ = random_stats(layout, seed, groups=False)
    p, K = rates(plain, "tokens"), len(LANGS)
    least, harmonic = kth(p, bar), sum(1/j for j in range(1, K + 1))
    even = np.array([entropy(o)/math.log(K) if o.sum() else 1. for o in p.T])
    def score(lam): return even - p.max(0)*lam*K/harmonic
    def taken(lam): return smallest(score(lam), round(len(all_)*top))
    found = lambda_score(stats, lam=.07, top=top, bar=bar)
    same_score(found, all_, score(.07))
    same(found, all_, [[i for i in taken(.07) if p[k, i] > least] for k in range(K)])
    def fits(lam): return not any((p[:, i] > least).all() for i in taken(lam))
    if not fits(0.):
        with pytest.raises(ValueError, match="even lam=0"): lambda_score(stats, top=top, bar=bar)
        return
    auto = lambda_score(stats, top=top, bar=bar)
    lam = auto.parameters["lam"]
    assert fits(lam) and (lam == .2 or not all(fits(x) for x in np.linspace(lam, min(lam + 1e-3, .2), 50)))
    same(auto, all_, [[i for i in taken(lam) if p[k, i] > least] for k in range(K)])


@fast
@given(layouts(), seeds, st.sampled_from(["rate", "p90", "mean", "mean_abs"]), st.sampled_from([.02, .2, .7]))
def test_layout_activation_probability_knows_no_pads(layout, seed, by, top):
    assume(layout.size)
    stats, plain, all_ = random_stats(layout, seed)
    tokens = np.array(TOKENS)[:, None]
    asked = plain["given"]
    score = dict(rate=plain["count"]/tokens, p90=plain["above"]/tokens, mean=plain["sum"]/np.maximum(asked, 1),
                 mean_abs=plain["abs"]/np.maximum(asked, 1))[by]
    found = activation_probability(stats, by=by, top=top)
    same_score(found, all_, score)
    same(found, all_, [smallest(-o, round(len(all_)*top)) for o in score])


@few
@given(layouts(), seeds, st.integers(1, 4), st.sampled_from([None, .3]), st.booleans())
def test_layout_average_precision_knows_no_pads(layout, seed, n, threshold, exclusive):
    assume(layout.size >= 2*n)
    stats, plain, all_ = random_stats(layout, seed)
    found = average_precision(stats, n=n, threshold=threshold, exclusive=exclusive)
    texts = plain["text_means"] # [lang, text, neuron]
    label = np.repeat(np.arange(len(LANGS)), texts.shape[1])
    score = np.array([[average_precision_score(label == k, x) for x in texts.reshape(len(label), -1).T] for k in range(len(LANGS))])
    same_score(found, all_, score)
    if threshold is None: return same(found, all_, [{*smallest(-o, n), *smallest(o, n)} for o in score])
    over = score > threshold
    same(found, all_, [[i for i in range(len(all_)) if over[k, i] and (not exclusive or over[:, i].sum() == 1)] for k in range(len(LANGS))])


@fast
@given(layouts(), seeds, st.sampled_from([None, 1, 3]), st.booleans())
def test_layout_plnd_knows_no_pads(layout, seed, k, exclusive):
    assume(layout.size and (k is None or k <= layout.width))
    stats, plain, all_ = random_stats(layout, seed)
    found = plnd(stats, k=k, exclusive=exclusive)
    impact = plain["impact"] # [lang, text, neuron]
    score = np.zeros((len(LANGS), len(all_)))
    for layer in range(layout.n_layers):
        mine = [i for i, o in enumerate(all_) if o[0] == layer]
        keep = round(.14*len(mine)) if k is None else k
        for lang in range(len(LANGS)):
            for text in impact[lang]:
                for i in sorted(mine, key=lambda i: (-np.float32(text[i]), i))[:keep]: score[lang, i] += 1/len(impact[lang])
    same_score(found, all_, score)
    full = score > 1 - 1e-9
    same(found, all_, [[i for i in range(len(all_)) if full[j, i] and (not exclusive or full[:, i].sum() == 1)] for j in range(len(LANGS))])


@fast
@given(layouts(), seeds)
def test_layout_language_activated_knows_no_pads(layout, seed):
    assume(layout.size)
    stats, plain, all_ = random_stats(layout, seed, texts=1)
    found = language_activated(stats)
    positive = plain["text_means"] > 0
    same_score(found, all_, positive.mean(1))
    same(found, all_, [np.flatnonzero(o.all(0)).tolist() for o in positive])


@fast
@given(layouts(), seeds, st.sampled_from(["tokens", "routing"]))
def test_layout_random_controls_hold_no_pads(layout, seed, by):
    assume(layout.size and (by == "tokens" or layout.has_experts))
    stats, plain, all_ = random_stats(layout, seed, groups=False)
    found = lape(stats, top=.3, filter=.5, bar=.5, given=by)
    p = rates(plain, by)
    eligible = {o[:2] for o, q in zip(all_, p.T) if q.max() > kth(p, .5)}
    for source in (stats, found):
        control = random_neurons(source, found, seed=seed, among="eligible")
        assert all(set(control[lang]) <= eligible for lang in LANGS)
        control = random_neurons(source, found, seed=seed)
        assert all(set(control[lang]) <= {o[:2] for o in all_} for lang in LANGS)
        assert all(control[lang].per_layer().tolist() == found[lang].per_layer().tolist() for lang in LANGS)


@fast
@given(layouts(), seeds, st.sampled_from([.2, .5]))
def test_layout_experts_as_units_know_no_pads(layout, seed, top):
    assume(layout.has_experts)
    stats, _, _ = random_stats(layout, seed, groups=False)
    routed = stats.routing["routed"].numpy()
    units = [(l, e) for l, parts in enumerate(layout.layers) for p in parts if p.kind == "experts" for e in range(p.count)]
    p = np.array([[routed[k, l, e]/TOKENS[k] for l, e in units] for k in range(len(LANGS))])
    found, threshold = lape(experts_of(stats), top=top, filter=.5, bar=.5), kth(p, .5)
    score = [entropy(o) if o.max() > threshold else math.nan for o in p.T]
    taken = smallest(score, round(len(units)*top))
    assert found.site == "router" and found.layout == layout.experts
    same(found, units, [[i for i in taken if p[k, i] > threshold] for k in range(len(LANGS))])
    table = routing_table(stats)
    assert list(zip(table.layer, table.expert)) == units*len(LANGS)
    np.testing.assert_allclose(table.rate, p.flatten())
    for k, lang in enumerate(LANGS):
        for l in {l for l, _ in units}:
            mine = table[(table.lang == lang) & (table.layer == l)]
            assert list(mine.tokens) == [routed[k, a, e] for a, e in units if a == l]
            assert abs(mine["share"].sum() - (mine.tokens.sum() > 0)) < 1e-9
    if all(routed[k, l].sum() for k in range(len(LANGS)) for l, _ in units):
        for row in routing_divergence(stats).itertuples():
            a, b = (routed[LANGS.index(x), row.layer]/routed[LANGS.index(x), row.layer].sum() for x in (row.lang_a, row.lang_b))
            def bits(x, m): return sum(u*math.log2(u/v) for u, v in zip(x, m) if u > 0)
            assert abs(row.bits - (bits(a, (a + b)/2) + bits(b, (a + b)/2))/2) < 1e-9


def test_layout_rates_given_routing_need_routing():
    stats, _, _ = random_stats(uniform(2, 5), groups=False)
    with pytest.raises(ValueError, match="given='routing' is for mixtures"): lape(stats, given="routing")
