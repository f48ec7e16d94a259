"Identification methods beside LAPE: against scikit-learn, against loops, against the planted model."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from sklearn.metrics import average_precision_score

from langneuron_mi.recording.stats import ActivationStats
from langneuron_mi.recording.groups import LEVELS
from langneuron_mi.find.controls import random_neurons
from langneuron_mi.find.identification import lambda_score, lape
from langneuron_mi.find.methods import activation_probability, average_precision, average_precisions, language_activated, plnd
from langneuron_mi.models.loading import load_model
from langneuron_mi.find.language_neurons import LanguageNeurons, set_overlap
from langneuron_mi.recording.record import record
from langneuron_mi.testing.planted import planted_model
from langneuron_mi.testing.tiny import tiny_model


TEXTS = {"en": ["the cat sat on the mat", "a dog", "birds fly south in winter because it is cold", "quiet now", "one more line"]*4,
         "de": ["die Katze saß auf der Matte", "ein Hund", "Vögel fliegen im Winter nach Süden", "still jetzt", "noch eine Zeile"]*4,
         "fr": ["le chat était sur le tapis", "un chien", "les oiseaux volent vers le sud", "silence maintenant", "encore une ligne"]*4}


@pytest.fixture(scope="module", params=["llama", "gemma3", "bloom"])
def tiny_stats(request):
    hf, tok = tiny_model(request.param)
    return record(load_model(hf, tokenizer=tok), TEXTS, groups="all", texts=8, length=32, progress=False)


@pytest.fixture(scope="module")
def planted_stats():
    p = planted_model()
    return p, record(load_model(p.hf, tokenizer=p.tokenizer), p.texts(60, seed=0), groups="all", texts=50, progress=False)


def stats_of(counts, tokens, langs=None):
    c = torch.as_tensor(counts)
    return ActivationStats.from_counts(c, list(tokens), langs or [f"x-{k}" for k in range(len(c))])


# average precision

@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(2, 30))
def test_average_precision_equals_sklearn_with_ties(seed, K, n):
    g = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(K), g.integers(0, K, n)])
    size = len(labels)
    scores = np.stack([g.integers(0, 4, size).astype(float), g.normal(size=size), np.zeros(size), g.normal(size=size).round(1)], 1)
    got = average_precisions(torch.from_numpy(scores), torch.from_numpy(labels), K)
    want = [[average_precision_score(labels == k, scores[:, i]) for i in range(scores.shape[1])] for k in range(K)]
    assert np.abs(got.numpy() - want).max() < 1e-12


def test_average_precision_sets_equal_sklearn_on_a_tiny_model(tiny_stats):
    s = tiny_stats
    labels = np.repeat(np.arange(3), 8)
    def precision(k, l, i):
        return average_precision_score(labels == k, torch.cat([s.text_means[o][l][:, i] for o in s.langs]).double().numpy())
    ap = np.array([[[precision(k, l, i) for i in range(s.d_mlp)] for l in range(s.n_layers)] for k in range(3)])
    found = average_precision(s, n=5, lowest=3)
    assert np.abs(found.score.numpy() - ap).max() < 1e-12
    for k, lang in enumerate(s.langs):
        flat = ap[k].ravel().round(12)
        want = set(np.argsort(-flat, kind="stable")[:5]) | set(np.argsort(flat, kind="stable")[:3])
        assert {l*s.d_mlp + i for l, i in found[lang]} == want
    over = average_precision(s, threshold=.6)
    mask = ap > .6
    for k, lang in enumerate(s.langs): assert set(over[lang]) == {tuple(map(int, p)) for p in np.argwhere(mask[k] & (mask.sum(0) == 1))}
    both = average_precision(s, threshold=.6, exclusive=False)
    assert all(set(both[l]) >= set(over[l]) for l in s.langs)


def test_average_precision_refuses():
    counts = stats_of(torch.zeros(2, 1, 3, dtype=torch.int64), [4, 4])
    with pytest.raises(ValueError, match="needs the group 'text_means'"): average_precision(counts)
    one = ActivationStats.from_text_means({"en": torch.rand(1, 4, 3)})
    with pytest.raises(ValueError, match="two or more"): average_precision(one)
    two = ActivationStats.from_text_means({"en": torch.rand(1, 4, 3), "de": torch.rand(1, 4, 3)})
    with pytest.raises(ValueError, match="n \\+ lowest"): average_precision(two)
    with pytest.raises(ValueError, match="threshold is"): average_precision(two, threshold=2)
    bad = ActivationStats.from_text_means({"en": torch.rand(1, 4, 3), "de": torch.full((1, 4, 3), float("nan"))})
    with pytest.raises(ValueError, match="'de' are not finite in layer 0"): average_precision(bad, n=1, lowest=0)


# lambda score

def slow_lambda(counts, tokens, lam, top, bar, minus=None):
    "methods.md section 2, in loops."
    K, L, I = len(counts), len(counts[0]), len(counts[0][0])
    p = np.zeros((K, L, I))
    for k in range(K):
        for l in range(L):
            for i in range(I):
                c, n = counts[k][l][i], tokens[k]
                if minus is not None: c, n = max(c - minus[0][k][l][i], 0), max(n - minus[1][k], 1)
                p[k, l, i] = c/n
    H = sum(1/j for j in range(1, K + 1))
    ranked, scored = sorted(p.ravel()), []
    r = round(len(ranked)*bar)
    least = ranked[r - 1] if r else 0.
    for l in range(L):
        for i in range(I):
            q = p[:, l, i]
            e = 1. if q.sum() == 0 else -sum(x/q.sum()*math.log(x/q.sum()) for x in q if x > 0)/math.log(K)
            scored.append((round(e - q.max()*lam/(H/K), 12), l, i))
    taken = [(l, i) for _, l, i in sorted(scored)[:round(L*I*top)]]
    return [sorted((l, i) for l, i in taken if p[k, l, i] > least) for k in range(K)]


@given(st.integers(0, 10**6), st.sampled_from([0., .05, .109375, .2]), st.sampled_from([.05, .3, 1.]), st.sampled_from([.5, .95]),
       st.booleans())
def test_lambda_score_equals_loops(seed, lam, top, bar, with_prefix):
    g = np.random.default_rng(seed)
    tokens = [97, 300, 41]
    counts = np.stack([g.binomial(n, g.choice([0., .02, .3, .9], (2, 9))) for n in tokens])
    minus = None
    if with_prefix:
        few = [10, 300, 7]
        minus = (np.stack([g.integers(0, n + 1, (2, 9)) for n in few]), few)
    found = lambda_score(stats_of(counts, tokens), lam=lam, top=top, bar=bar, minus=None if minus is None else stats_of(*minus))
    assert [list(v) for v in found.values()] == slow_lambda(counts, tokens, lam, top, bar, minus)


def test_lambda_score_auto_is_the_largest_that_leaves_nothing_owned_by_all():
    g, hits = np.random.default_rng(0), 0
    for _ in range(12):
        p = (g.beta(.5, 2, 400)*g.beta(1, 1, (3, 400))*2).clip(0, 1)
        s = stats_of(np.rint(1000*p).astype(int)[:, None], [1000]*3)
        free = lambda lam: len(lambda_score(s, lam=lam, top=.1, bar=.6).all_language()) == 0
        if not free(0.):
            with pytest.raises(ValueError, match="even lam=0"): lambda_score(s, top=.1, bar=.6)
            continue
        found = lambda_score(s, top=.1, bar=.6)
        lam = found.parameters["lam"]
        assert len(found.all_language()) == 0 and found.parameters["auto"]
        assert lam == .2 or not free(lam + .2/256 + 1e-9)  # one step of the bisection further, some neuron is everybody's
        hits += lam < .2
    assert hits >= 3


def test_lambda_score_of_a_prefix_difference_counts_the_answers_only():
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    prefix = {l: [t.split()[0] for t in ts] for l, ts in TEXTS.items()}
    full, head = (record(model, t, layout="texts", progress=False) for t in (TEXTS, prefix))
    tail = {l: torch.zeros(2, 64, dtype=torch.int64) for l in TEXTS}
    n = dict.fromkeys(TEXTS, 0)
    for lang, texts in TEXTS.items():
        for t in texts:
            ids, k = [1] + tok(t, add_special_tokens=False).input_ids, 1 + len(tok(t.split()[0], add_special_tokens=False).input_ids)
            keep = []
            def fired(m, i, o): keep.append((o[0, k:] > 0).sum(0))
            hooks = [layer.mlp.act_fn.register_forward_hook(fired) for layer in tiny_layers(model)]
            with torch.no_grad(): tiny_hf(model)(torch.tensor([ids]))
            for h in hooks: h.remove()
            tail[lang] += torch.stack(keep)
            n[lang] += len(ids) - k
    want = lambda_score(ActivationStats.from_counts(torch.stack(list(tail.values())), n, list(TEXTS)), lam=.1, top=.1, bar=.8)
    got = lambda_score(full, minus=head, lam=.1, top=.1, bar=.8)
    assert {k: set(v) for k, v in got.items()} == {k: set(v) for k, v in want.items()}


def tiny_hf(model):
    from langneuron_mi.models.view import view
    return view(model).hf


def tiny_layers(model):
    return [getattr(l, "original_component", l) for l in tiny_hf(model).model.layers]


def test_lambda_score_refuses():
    s = stats_of(torch.ones(2, 1, 3, dtype=torch.int64), [4, 4], ["en", "de"])
    french = stats_of(torch.ones(2, 1, 3, dtype=torch.int64), [4, 4], ["en", "fr"])
    with pytest.raises(ValueError, match="langs differs"): lambda_score(s, minus=french)
    with pytest.raises(ValueError, match="number or 'auto'"): lambda_score(s, lam="best")
    with pytest.raises(ValueError, match="two or more"): lambda_score(s.select(["en"]))
    turned = lambda_score(s, lam=0, minus=stats_of(torch.tensor([[[0, 1, 1]], [[1, 0, 0]]]), [2, 2], ["de", "en"]), top=1., bar=0)
    assert list(turned["de"]) == [(0, 0)] and list(turned["en"]) == [(0, 1), (0, 2)]


# the others, by brute force on tiny models

def test_plnd_equals_brute_force(tiny_stats):
    s = tiny_stats
    for k in (3, None):
        use = k or round(.14*s.d_mlp)
        always = {}
        for lang in s.langs:
            def first(l, t): return sorted(range(s.d_mlp), key=lambda i: (-float(s.impact[lang][l][t, i]), i))[:use]
            sets = [{(l, i) for l in range(s.n_layers) for i in first(l, t)} for t in range(8)]
            always[lang] = set.intersection(*sets)
        own = {l: v - set().union(*(always[o] for o in s.langs if o != l)) for l, v in always.items()}
        assert {l: set(v) for l, v in plnd(s, k=k).items()} == own
        assert {l: set(v) for l, v in plnd(s, k=k, exclusive=False).items()} == always
    with pytest.raises(ValueError, match="k is a number"): plnd(s, k=10**6)


def test_language_activated_equals_brute_force(tiny_stats):
    s = tiny_stats
    def always(lang, l, i): return all(float(s.text_means[lang][l][t, i]) > 0 for t in range(8))
    want = {lang: {(l, i) for l in range(s.n_layers) for i in range(s.d_mlp) if always(lang, l, i)} for lang in s.langs}
    assert {l: set(v) for l, v in language_activated(s).items()} == want and any(want.values())


@pytest.mark.parametrize("by", ["p75", "p90", "p95", "rate", "mean", "mean_abs"])
def test_activation_probability_equals_brute_force(by):
    "The threshold is the upper edge of the bin that holds the percentile; the share beyond it is counted on all activations kept."
    from langneuron_mi.recording.groups import _edges, bins
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    s = record(model, TEXTS, groups="all", texts=4, layout="texts", progress=False)
    found = activation_probability(s, by=by, top=.05)
    for k, lang in enumerate(s.langs):
        kept, hooks = [[] for _ in range(2)], []
        for l, layer in enumerate(tiny_layers(model)):
            hooks.append(layer.mlp.act_fn.register_forward_hook(lambda m, i, o, l=l: kept[l].append(o[0, 1:])))
        with torch.no_grad():
            for t in TEXTS[lang]: tiny_hf(model)(torch.tensor([[1] + tok(t, add_special_tokens=False).input_ids]))
        for h in hooks: h.remove()
        a = torch.stack([torch.cat(x) for x in kept], 1).double()  # token layer neuron
        if by.startswith("p"):
            q = float(by[1:])/100
            exact = a.sort(0).values[math.ceil(q*len(a) - 1e-9) - 1]
            rank = (a >= _edges()[bins(exact).long() + 1]).double().mean(0)
            assert float(rank.max()) <= 1 - q + 1e-9
        else: rank = dict(rate=(a > 0).double(), mean=a, mean_abs=a.abs())[by].mean(0)
        m = round(rank.numel()*.05)
        assert (found.score[k] - rank).abs().max() < (1e-9 if by.startswith("p") or by == "rate" else 1e-5)
        lowest_in = float(torch.stack([rank[p] for p in found[lang]]).min())
        highest_out = float(rank[~found[lang].mask()].max())
        assert len(found[lang]) == m and lowest_in >= highest_out - 1e-5
    with pytest.raises(ValueError, match="by is one of"): activation_probability(s, by="p80")


def test_methods_on_the_planted_model(planted_stats):
    "What each definition must find, and what it must not."
    p, s = planted_stats
    truth = {lang: set(v) for lang, v in p.neurons.items()}
    n = len(truth["de"])
    for method in (lape(s), lambda_score(s)): assert {k: set(v) for k, v in method.items()} == truth
    ap = average_precision(s, n=n, lowest=0)
    for k, lang in enumerate(s.langs):  # planted neurons are perfect detectors, and so is whatever ties with them
        assert all(float(ap.score[k][pair]) == 1. for pair in [*truth[lang], *ap[lang]])
    everyone = language_activated(s)
    for lang in s.langs:
        assert truth[lang] <= set(everyone[lang]) and set(p.shared) <= set(everyone[lang])  # one language at a time: shared neurons too
        used = set(plnd(s, k=60, exclusive=False)[lang])
        marker = [pair for pair in truth[lang] if pair in used]
        assert marker and not (set(p.silent) & used) and set(p.shared) <= used
        assert set(p.shared).isdisjoint(plnd(s, k=60)[lang])
        p90 = activation_probability(s, by="p90", top=n/s.n_layers/s.d_mlp)
        assert not truth[lang] <= set(p90[lang])  # all languages tie at 10 %: not what it measures
        rate = activation_probability(s, by="rate", top=(n + len(p.shared))/s.n_layers/s.d_mlp)
        # among the neurons that always fire, own or shared
        assert all(float(rate.score[s.langs.index(lang)][pair]) == 1. for pair in rate[lang])


def test_methods_scale_without_a_loop_over_neurons():
    "80 layers of 512 neurons in 18 languages in one go; the full width is in benchmarks/."
    g = torch.Generator().manual_seed(0)
    langs = [f"x-{k}" for k in range(18)]
    s = ActivationStats.from_counts(torch.randint(0, 400, (18, 80, 512), generator=g), [1000]*18, langs)
    assert sum(lambda_score(s, lam=.05).sizes()) > 0 and lambda_score(s, lam=.05).score.shape == (80, 512)
    t = ActivationStats.from_text_means({l: torch.randn(80, 3, 512, generator=g) for l in langs})
    assert average_precision(t, n=10).sizes().tolist() == [20]*18


def test_methods_best_and_overlap_and_random(tiny_stats):
    found = average_precision(tiny_stats, n=8, lowest=0)
    assert found.best(3).sizes().tolist() == [3]*3
    for lang in found:
        scores = found.score_of(lang)
        assert min(float(scores[p]) for p in found.best(3)[lang]) >= max(float(scores[p]) for p in (found[lang] - found.best(3)[lang]))
    controls = {f"random {i}": random_neurons(tiny_stats, like=found, seed=i) for i in range(3)}
    assert len({c["de"] for c in controls.values()}) == 3
    table = set_overlap({"ap": found, **controls})
    assert len(table) == 4*4*3 and (table[table.a == table.b].jaccard == 1).all()
    own = found.ownership()
    assert own.groupby("lang").n.sum().to_dict() == found.sizes().to_dict()


def test_methods_save_and_load_scores_of_every_language(tmp_path, tiny_stats):
    found = plnd(tiny_stats)
    again = LanguageNeurons.load(found.save(tmp_path/"n.safetensors"))
    assert torch.equal(again.score, found.score) and again.low_is_best is False and again == found
    assert again.to_df().value.tolist() == found.to_df().value.tolist()


def test_methods_levels_name_the_percentiles():
    assert {.75, .9, .95} <= set(LEVELS)
