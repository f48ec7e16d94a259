"Intervals of a result."
import pandas as pd
import pytest

from langneuron_mi.measure.steering_result import ITEM_COLUMNS, Steering


def summary(rows): # of the first factor and kind
    no_cost = pd.DataFrame(columns=["factor", "kind", "target", "ratio"])
    return Steering(pd.DataFrame(rows, columns=ITEM_COLUMNS), pd.DataFrame(), no_cost).summary().iloc[0]


def test_steering_result_summary_interval_holds_its_value():
    def row(t, i): return "f", "own", "en", t, f"{i}", "r", 0., 0., 0., 1. if t == "de" or i == 0 else -1.
    rows = [row(t, i) for t, n in (("de", 2), ("fr", 40)) for i in range(n)]
    s = summary(rows)
    assert s.low <= s.lss <= s.high


def test_steering_result_summary_is_not_certain_of_facts_that_all_moved():
    "Resampling ten facts that all moved finds no spread; the exact interval of 10 out of 10 does."
    from scipy.stats import binomtest
    rows = [("f", "own", "en", t, f"{i}", "r", 0., 0., 0., 1.) for t in ("de", "fr") for i in range(10)]
    s = summary(rows)
    assert (s.lss, s.high) == (1, 1) and s.low == pytest.approx(binomtest(10, 10).proportion_ci(.95).low) and .6 < s.low < .75
