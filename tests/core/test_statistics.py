"Statistics: coverage, independent truths, degenerate inputs."
import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from langneuron_mi.core.statistics import (Estimate, bootstrap_mean, bootstrap_ratio, bootstrap_share, expanded_level, holm,
                                      mcnemar, paired_difference, permutation_pvalue)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


rng = np.random.default_rng


# --- coverage ---

@pytest.mark.parametrize("n, draw, truth", [
    (8, lambda r, n: r.normal(size=n), 0), (20, lambda r, n: r.normal(3, 2, n), 3), (12, lambda r, n: r.gamma(2, size=n), 2)])
def test_statistics_mean_covers(n, draw, truth):
    hits = [e.low <= truth <= e.high for s in range(300) for e in [bootstrap_mean(draw(rng(s), n), n_boot=500, seed=s)]]
    assert .90 <= np.mean(hits) <= .98


def test_statistics_ratio_covers():
    "Windows of unequal length; the true effect is .3 nats a token."
    def one(s):
        r = rng(s)
        n = r.integers(60, 128, 12)
        base = n * r.normal(3, .5, 12)
        return bootstrap_ratio(base + n * r.normal(.3, .2, 12), base, n, n_boot=500, seed=s)
    hits = [e.low <= math.exp(.3) <= e.high for e in map(one, range(300))]
    assert .90 <= np.mean(hits) <= .98


def test_statistics_share_covers():
    hits = [e.low <= .8 <= e.high for s in range(300) for e in [bootstrap_share(rng(s).random(30) < .8, n_boot=500, seed=s)]]
    assert .90 <= np.mean(hits) <= .985  # shares of 30 move in steps


# --- independent truths ---

def test_statistics_mean_interval_equals_all_resamples():
    "Four units have 256 equally likely resamples: the exact percentile interval is their quantile."
    x = np.array([1., 2., 4., 8.])
    means = [np.mean(c) for c in itertools.product(x, repeat=4)]
    tail = (1 - expanded_level(4)) / 2
    e = bootstrap_mean(x, n_boot=100_000)
    assert np.allclose([e.low, e.high], np.quantile(means, [tail, 1 - tail]), atol=.3) and e.value == 3.75


def test_statistics_expanded_level_is_the_t_interval_for_normal_data():
    "Hesterberg's aim: mean +- t s/sqrt(n), where the bootstrap spread is s sqrt(n-1)/n."
    for n in (5, 10, 40):
        z = stats.norm.ppf((1 + expanded_level(n)) / 2)
        assert math.isclose(z * math.sqrt((n - 1) / n), stats.t.ppf(.975, n - 1), rel_tol=1e-3)


def test_statistics_ratio_pools_tokens_and_pairs_windows():
    new, base, n = np.array([10., 30.]), np.array([5., 10.]), np.array([5, 100])
    assert math.isclose(bootstrap_ratio(new, base, n).value, math.exp(25 / 105))
    same = rng(0).normal(300, 80, 20)
    e = bootstrap_ratio(same + 12.8, same, np.full(20, 128))
    assert np.allclose([e.value, e.low, e.high], math.exp(.1))
    torch = pytest.importorskip("torch")
    assert bootstrap_ratio(torch.tensor(new), torch.tensor(base), torch.tensor(n)).value == bootstrap_ratio(new, base, n).value


def test_statistics_permutation_equals_all_sign_flips():
    a, b = rng(1).normal(size=(2, 7))
    d = a - b
    flips = np.array([np.mean(d * s) for s in itertools.product([1, -1], repeat=7)])
    assert math.isclose(permutation_pvalue(a, b), np.mean(abs(flips) >= abs(d.mean()) - 1e-12))
    assert math.isclose(permutation_pvalue(a, b, alternative="greater"), np.mean(flips >= d.mean() - 1e-12))
    assert permutation_pvalue(rng(2).normal(5, 1, 40), rng(3).normal(0, 1, 40)) == pytest.approx(2e-4)  # never 0
    x = rng(0).normal(size=30)
    assert permutation_pvalue(x, x) == 1
    for alternative, p in (("two-sided", 1), ("greater", .5), ("less", 1)):
        assert permutation_pvalue([2.], [1.], alternative=alternative) == p


def test_statistics_mcnemar_exact():
    a, b = np.array([1] * 9 + [0] * 2 + [1] * 5, bool), np.array([0] * 9 + [1] * 2 + [1] * 5, bool)
    assert math.isclose(mcnemar(a, b), 2 * sum(math.comb(11, k) for k in range(3)) / 2**11)
    assert mcnemar(a, a) == 1 and mcnemar(a, b) == mcnemar(b, a)


@given(st.lists(st.floats(0, 1), max_size=12), st.data())
@settings(max_examples=200, deadline=None)
def test_statistics_holm_properties(p, data):
    out, m = holm(p), len(p)
    order = sorted(range(m), key=p.__getitem__)
    running = 0
    for k, i in enumerate(order):  # the definition, step by step
        running = max(running, min(1, (m - k) * p[i]))
        assert math.isclose(out[i], running, abs_tol=1e-15)
    perm = data.draw(st.permutations(range(m)))
    assert np.allclose(holm([p[i] for i in perm]), out[perm] if m else [])
    with_nan = holm([*p, math.nan])
    assert np.allclose(with_nan[:-1], out) and math.isnan(with_nan[-1])


# --- properties and degenerate inputs ---

finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=2, max_size=10))
@settings(max_examples=60, deadline=None)
def test_statistics_bootstrap_properties(x):
    e, eps = bootstrap_mean(x, n_boot=200), 1e-9 * (1 + max(map(abs, x)))
    assert min(x) - eps <= e.low <= e.high <= max(x) + eps and e.n == len(x)
    assert e == bootstrap_mean(x, n_boot=200) and type(e.value) is type(e.low) is float
    wide = bootstrap_mean(x, n_boot=200, level=.99)
    assert wide.low <= e.low + eps and e.high <= wide.high + eps


def same(e, value, low, high): return np.array_equal([e.value, e.low, e.high], [value, low, high], equal_nan=True)


def test_statistics_degenerate_inputs():
    nan, inf = math.nan, math.inf
    assert same(bootstrap_mean([]), nan, nan, nan) and bootstrap_mean([]).n == 0
    assert same(bootstrap_mean([2]), 2, nan, nan)
    assert same(bootstrap_mean([2, 2]), 2, 2, 2)
    assert same(bootstrap_mean([1, nan]), nan, nan, nan) and same(bootstrap_mean([1, inf]), inf, nan, nan)
    assert same(bootstrap_ratio([inf, 1], [1, 1], [1, 1]), inf, nan, nan) and same(bootstrap_ratio([1, 1], [inf, 1], [1, 1]), 0, nan, nan)
    assert same(bootstrap_ratio([inf, 1], [inf, 1], [1, 1]), nan, nan, nan) and same(bootstrap_ratio([2.], [2.], [4]), 1, nan, nan)
    assert same(bootstrap_ratio([1e6, 1e6], [1, 1], [1, 1]), inf, inf, inf)
    assert same(bootstrap_ratio([], [], []), nan, nan, nan)
    assert bootstrap_share([False] * 10).low == 0 < bootstrap_share([False] * 10).high < .35
    assert 0 <= bootstrap_share([True]).low < .1 and same(bootstrap_share([]), nan, nan, nan)
    assert same(paired_difference([inf, 1], [inf, 1]), nan, nan, nan)
    assert math.isnan(permutation_pvalue([], [])) and math.isnan(permutation_pvalue([nan, 1], [1, 2]))
    assert holm([]).shape == (0,)


@pytest.mark.parametrize("call", [
    lambda: bootstrap_ratio([1, 2], [1, 2], [1]), lambda: bootstrap_ratio([1, 2], [1, 2], [1, 0]), lambda: bootstrap_mean([[1, 2]]),
    lambda: bootstrap_mean([1, 2], level=95.), lambda: bootstrap_mean([1, 2], n_boot=0), lambda: bootstrap_share([.5, 1]),
    lambda: mcnemar([True], [])])
def test_statistics_bad_input(call):
    with pytest.raises(ValueError): call()


def test_statistics_estimate_text():
    assert str(Estimate(1.5, 1., 12.34, 8)) == "1.50 [1.00, 12.3] (n = 8)"
    assert str(Estimate(0., -.25, 123.4, 3, .9)) == "0 [-0.250, 123] (n = 3, 90 %)"
    assert str(Estimate(12345., 1e-5, math.inf, 3)) == "12,345 [1e-05, inf] (n = 3)"
    assert not Estimate(2., math.nan, math.nan, 1).excludes(1)
    with pytest.raises(AttributeError): Estimate(1., 1., 1., 1).value = 2
