"LAPE against an independent slow implementation in exact arithmetic, and its edge cases one by one."
import math, subprocess, sys, warnings
from decimal import Decimal, getcontext
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from langneuron_mi.find.identification import entropy, lape
from langneuron_mi.find.rates import firing_rates
from langneuron_mi.find.controls import random_neurons
from langneuron_mi.find.language_neurons import LanguageNeurons
from langneuron_mi.find.neurons import NeuronSet

getcontext().prec = 40
fast = settings(max_examples=400, deadline=None, derandomize=True)


def stats(counts, tokens, **kw):
    c = torch.as_tensor(counts, dtype=torch.int64)
    langs = tuple(f"l{k}" for k in range(len(c)))
    return SimpleNamespace(langs=langs, n_tokens=dict(zip(langs, tokens)), count_pos=c, site="gate", **kw)


def slow_lape(counts, tokens, top, filter, bar):
    "methods.md section 2, with loops, fractions and 40 decimal digits."
    K, L, I = len(counts), len(counts[0]), len(counts[0][0])
    p = [[[Fraction(counts[k][l][i], tokens[k]) for i in range(I)] for l in range(L)] for k in range(K)]
    ranked = sorted(p[k][l][i] for k in range(K) for l in range(L) for i in range(I))
    def kth(share):
        r = round(len(ranked) * share)
        return ranked[r - 1] if r > 0 else Fraction(0)
    T, least, scored = kth(filter), kth(bar), []
    for l in range(L):
        for i in range(I):
            rates = [p[k][l][i] for k in range(K)]
            if not any(r > T for r in rates): continue
            e = Decimal(0)
            for r in rates:
                if r:
                    q = r / sum(rates)
                    q = Decimal(q.numerator) / Decimal(q.denominator)
                    e -= q * q.ln()
            scored.append((round(e, 12), l, i))
    taken = [(l, i) for _, l, i in sorted(scored)[:round(L * I * top)]]
    return [sorted((l, i) for l, i in taken if p[k][l][i] > least) for k in range(K)], sorted((l, i) for _, l, i in scored), T, least


@st.composite
def problems(draw):
    K, L, I = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    tokens = draw(st.lists(st.sampled_from([1, 2, 4, 6, 12, 97]), min_size=K, max_size=K))
    # a coarse grid of rates makes ties the rule, within a language and between languages with other denominators
    def row(n): return st.lists(st.one_of(st.sampled_from([0, 0, n // 2, n]), st.integers(0, n)), min_size=I, max_size=I)
    counts = [[draw(row(n)) for _ in range(L)] for n in tokens]
    if draw(st.booleans()): counts[draw(st.integers(0, K - 1))] = [[0] * I for _ in range(L)]  # a language that owns nothing
    if draw(st.booleans()):                                                                 # a silent neuron
        l, i = draw(st.integers(0, L - 1)), draw(st.integers(0, I - 1))
        for k in range(K): counts[k][l][i] = 0
    share = st.sampled_from([0., .01, .25, .5, .75, .95, 1.])
    return counts, tokens, draw(st.sampled_from([.01, .2, .5, 1.])), draw(share), draw(share)


@fast
@given(problems())
def test_lape_equals_slow_implementation(problem):
    counts, tokens, top, filter, bar = problem
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = lape(stats(counts, tokens), top=top, filter=filter, bar=bar)
    own, eligible, T, least = slow_lape(*problem)
    assert [list(found[f"l{k}"]) for k in range(len(tokens))] == own
    assert list(NeuronSet.from_mask(~found.score.isnan())) == eligible
    assert found.parameters == dict(top=top, filter=filter, bar=bar, threshold=float(T), bar_rate=float(least))
    assert found.langs == tuple(f"l{k}" for k in range(len(tokens))) and found.metric == "entropy"


def test_lape_default_parameters_on_a_larger_case():
    g = np.random.default_rng(0)
    tokens = [300, 500, 1000, 40, 77]
    counts = np.stack([g.binomial(n, g.beta(.3, 3, (4, 150))) for n in tokens])
    counts[3] = 0
    found, truth = lape(stats(counts, tokens)), slow_lape(counts.tolist(), tokens, .01, .95, .95)
    assert [list(v) for v in found.values()] == truth[0] and len(found["l3"]) == 0 and sum(map(len, found.values()))


def test_lape_ties_go_by_layer_then_neuron():
    counts = np.zeros((3, 2, 4), int)
    for j, (l, i) in enumerate([(1, 3), (0, 2), (1, 0), (0, 3)]): counts[j % 3, l, i] = 10 - j  # entropy 0 four times
    found = lape(stats(counts, [10] * 3), top=.25, filter=.5, bar=.5)  # two of eight
    assert sorted(p for v in found.values() for p in v) == [(0, 2), (0, 3)]


def test_lape_permuted_rates_tie():
    "The same rates in another order have the same entropy, whatever the last bit of the sum says."
    rows = [[1, 3, 7], [7, 1, 3], [3, 7, 1], [1, 7, 3], [7, 3, 1], [3, 1, 7]]
    found = lape(stats(np.array(rows).T[:, None], [11] * 3), top=.5, filter=0, bar=0)
    assert list(found["l0"]) == [(0, 0), (0, 1), (0, 2)]


def test_lape_never_takes_a_silent_neuron():
    counts = np.zeros((2, 1, 10), int)
    counts[0, 0, 4] = 3
    found = lape(stats(counts, [5, 5]), top=1., filter=0, bar=0)
    assert {k: list(v) for k, v in found.items()} == {"l0": [(0, 4)], "l1": []}
    empty = lape(stats(np.zeros((2, 1, 10), int), [5, 5]), top=1., filter=0, bar=0)
    assert empty.sizes().tolist() == [0, 0]


def test_lape_fewer_eligible_than_asked():
    g = np.random.default_rng(1)
    found = lape(stats(g.integers(0, 100, (2, 2, 20)), [100, 100]), top=1.)
    assert 0 < int((~found.score.isnan()).sum()) <= round(80 * .05) and len(found["l0"] | found["l1"]) <= 4


def test_lape_everything_equal_gives_nothing():
    "Strict: no rate exceeds the percentile when all are the same."
    assert lape(stats(np.full((3, 2, 5), 4), [8] * 3), top=1.).sizes().tolist() == [0, 0, 0]


def test_lape_k1_warns_and_orders_by_position():
    with pytest.warns(UserWarning, match="no contrast"): found = lape(stats([[[5, 9, 0, 8, 7]]], [10]), top=.4, filter=.2, bar=.2)
    assert list(found["l0"]) == [(0, 0), (0, 1)] and found.score.nan_to_num().max() == 0


def test_lape_k2_entropy_range():
    found = lape(stats([[[8, 4, 0]], [[0, 4, 8]]], [8, 8]), top=.67, filter=.5, bar=.5)
    assert {k: list(v) for k, v in found.items()} == {"l0": [(0, 0)], "l1": [(0, 2)]}
    assert found.score[0].tolist() == pytest.approx([0, math.nan, 0], nan_ok=True)  # .5 does not exceed .5
    assert lape(stats([[[8, 4, 0]], [[0, 4, 8]]], [8, 8]), filter=.2).score[0].tolist() == pytest.approx([0, math.log(2), 0])


def test_lape_bincount_misalignment_by_name():
    "methods.md 9.1: the second and the last language own nothing; nobody else's neurons move."
    counts = np.zeros((4, 1, 40), int)
    counts[0, 0, 3], counts[2, 0, 7] = 90, 80
    found = lape(stats(counts, [100] * 4), top=.1)
    assert {k: list(v) for k, v in found.items()} == {"l0": [(0, 3)], "l1": [], "l2": [(0, 7)], "l3": []}


def test_lape_carries_model_provenance_and_seen(tmp_path):
    s = stats([[[5, 0]], [[0, 5]]], [9, 9], meta=dict(model="f00d", corpus="c0ffee"), seen={"l0": np.array([7], np.uint64)})
    found = lape(s, top=1., filter=.5, bar=.5)
    assert found.model == "f00d" == found["l0"].model and found.provenance["corpus"] == "c0ffee"
    assert found.provenance["n_tokens"] == {"l0": 9, "l1": 9} and found.seen["l0"].tolist() == [7]
    again = LanguageNeurons.load(found.save(tmp_path / "n.safetensors"))
    assert again == found and again.parameters == found.parameters
    assert random_neurons(again, among="eligible") == random_neurons(s, found, among="eligible")


@pytest.mark.parametrize("change, error, says", [
    (dict(count_pos=torch.tensor([[[11]], [[1]]])), ValueError, "'l0' has 11 firings on 10 tokens at layer 0, neuron 0"),
    (dict(count_pos=torch.tensor([[[1]], [[-1]]])), ValueError, "negative count for 'l1'"),
    (dict(count_pos=torch.tensor([[[1.]], [[float("nan")]]])), ValueError, "'l1' hold NaN at layer 0, neuron 0"),
    (dict(count_pos=torch.rand(2, 1, 1)), TypeError, "whole numbers"),
    (dict(count_pos=torch.ones(2, 1, dtype=torch.int64)), ValueError, "count_pos is"),
    (dict(count_pos=torch.ones(3, 1, 1, dtype=torch.int64)), ValueError, "for 2 languages"),
    (dict(n_tokens={"l0": 10, "l1": 0}), ValueError, "'l1' has n_tokens 0"),
    (dict(n_tokens={"l0": 10, "l1": float("nan")}), ValueError, "'l1' has n_tokens nan"),
    (dict(n_tokens={"l0": 10}), ValueError, "no entry for 'l1'"),
])
def test_lape_refuses_impossible_counts(change, error, says):
    s = stats([[[5]], [[1]]], [10, 10])
    vars(s).update(change)
    with pytest.raises(error, match=says): lape(s)
    with pytest.raises(error, match=says): firing_rates(s)


@pytest.mark.parametrize("kw", [dict(top=0), dict(top=1.5), dict(top=float("nan")), dict(filter=95), dict(filter=-.1), dict(bar=1.01)])
def test_lape_refuses_bad_shares(kw):
    with pytest.raises(ValueError, match="is a share"): lape(stats([[[5]], [[1]]], [10, 10]), **kw)


def test_entropy_limits():
    assert entropy(torch.tensor([[.3, .2, 0.], [0., .2, 0.], [0., .2, 0.]]).double()).tolist() == pytest.approx([0, math.log(3), 0])
    assert entropy(torch.full((4, 2, 3), .1).double()).shape == (2, 3)


def test_random_neurons_sizes_pool_and_seeds():
    g = np.random.default_rng(2)
    s = stats(np.stack([g.binomial(200, g.beta(.3, 2, (3, 200))) for _ in range(3)]), [200] * 3)
    found = lape(s, top=.05)
    eligible = NeuronSet.from_mask(~found.score.isnan())
    for among in ("all", "eligible"):
        r = random_neurons(s, found, seed=4, among=among)
        assert r == random_neurons(found, seed=4, among=among) and r != random_neurons(found, seed=5, among=among)
        assert r.method == "random" and r.parameters == dict(seed=4, like="lape", among=among) and r.langs == found.langs
        for lang in found: assert r[lang].per_layer().tolist() == found[lang].per_layer().tolist()
        if among == "eligible": assert all(v <= eligible for v in r.values())
    with pytest.raises(ValueError, match="'all', 'eligible' or 'part'"): random_neurons(found, among="active")
    with pytest.raises(TypeError, match="like="): random_neurons(s)
    other = stats(s.count_pos[:, :, :9], [200] * 3)
    with pytest.raises(ValueError, match="shape differs"): random_neurons(other, found)
    with pytest.raises(ValueError, match="no activity filter"): random_neurons(LanguageNeurons({"a": found["l0"]}), among="eligible")


BIG = """
import resource, numpy as np, torch
from types import SimpleNamespace
from langneuron_mi.find.identification import lape
torch.set_num_threads(1)
def peak():  # ru_maxrss survives exec and would show the test runner's own peak; VmHWM does not
    try: return next(int(o.split()[1]) for o in open("/proc/self/status") if o.startswith("VmHWM")) * 1024
    except FileNotFoundError: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
K, L, I = 8, 16, 28672
c = torch.zeros(K, L, I, dtype=torch.int64)
g = np.random.default_rng(0)
for k in range(K):
    for l in range(L): c[k, l] = torch.from_numpy(g.integers(0, 1000, I))
langs = tuple("abcdefgh")
before = peak()
found = lape(SimpleNamespace(langs=langs, n_tokens=dict.fromkeys(langs, 1000), count_pos=c, site="gate"))
assert sum(map(len, found.values()))
print((peak() - before) / (c.numel() * 8))
"""


def test_lape_memory_adds_less_than_its_input():
    out = subprocess.run([sys.executable, "-c", BIG], capture_output=True, text=True, check=True).stdout
    assert float(out) < 1


def test_lape_says_which_language_has_no_neuron():
    counts = np.zeros((3, 2, 50), np.int64)
    counts[0, :, :5], counts[1, :, 5:10], counts[2] = 90, 90, 1  # the third language fires a little everywhere, and owns nothing
    n = dict(en=100, de=100, tr=100)
    stats = SimpleNamespace(langs=list(n), n_tokens=n, count_pos=torch.from_numpy(counts), site="gate")
    with pytest.warns(UserWarning, match="no neuron was found for tr"): found = lape(stats, top=.2, filter=.8, bar=.8)
    assert len(found["en"]) and len(found["de"]) and not len(found["tr"])
