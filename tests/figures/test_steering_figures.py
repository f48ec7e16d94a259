"Figures of steering: every value in its place, honest scales, escaped texts."
import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pages import Page

from langneuron_mi.figures import curve_figures
from langneuron_mi.figures.curve_figures import factor_curves, layer_curve
from langneuron_mi.figures.shift_figures import lss_matrices, lss_matrix
from langneuron_mi.figures.generated_texts import samples_html

INF, NAN = math.inf, math.nan


def shift_table(langs="en de ar".split(), factors=("p_max",), shift=lambda f, a, b: .9 if b == "de" else .4, value="lss"):
    return pd.DataFrame([{"factor": f, "base": a, "target": b, value: (v := shift(f, a, b)), "low": v - .1, "high": v + .1, "n": 96}
                         for f in factors for a in langs for b in langs if a != b])


def test_steering_figures_lss_matrix_puts_every_value_in_its_cell():
    fig = lss_matrix(shift_table().sample(frac=1, random_state=1))
    rows, cols = list(fig.layout.yaxis.ticktext), list(fig.layout.xaxis.ticktext)
    assert sorted(rows) == sorted(cols) == ["Arabic", "English", "German"] and rows == cols
    heat = fig.data[0]
    for i, a in enumerate(rows):
        for j, b in enumerate(cols):
            if a == b: assert np.isnan(heat.z[i][j]) and heat.text[i][j] == ""; continue
            v = .9 if b == "German" else .4
            assert heat.z[i][j] == v and f"{v:.2f}<br>" in heat.text[i][j] and f"{v - .1:.2f}–{v + .1:.2f}" in heat.text[i][j]
            assert f"prompt in {a}, steered to {b}<br>" in heat.hovertext[i][j] and "96 facts" in heat.hovertext[i][j]
    assert (fig.layout.xaxis.title.text, fig.layout.yaxis.title.text) == (
        "steered to",
        "prompt in",
    ) and fig.layout.yaxis.autorange == "reversed"


def test_steering_figures_lss_matrix_colours_are_centred_at_no_effect():
    bar = (axis := lss_matrix(shift_table()).layout.coloraxis).colorbar
    assert (axis.cmin, axis.cmax, bar.title.text) == (0, 1, "share of facts shifted (0.5 = no effect)") and .5 in bar.tickvals
    gains = shift_table(shift=lambda f, a, b: -.34 if b == "de" else .1, value="difference")
    fig = lss_matrix(gains, value="difference")
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (
        -0.4,
        0.4,
    ) and fig.layout.coloraxis.colorbar.title.text == "difference to random neurons"
    assert "−0.34" in fig.data[0].text[0][1] and "+0.10" in fig.data[0].text[0][2] and "−0.44 to −0.24" in fig.data[0].text[0][1]
    assert lss_matrix(gains.assign(difference=.001), value="difference").layout.coloraxis.cmax == .2
    with pytest.raises(ValueError, match="no value 'shift'; .*'lss', 'difference'"): lss_matrix(gains, value="shift")


def test_steering_figures_lss_matrix_keeps_missing_unsure_and_own_cells():
    df = shift_table()
    df.loc[0, ["low", "high", "n"]] = NAN  # en to de
    df.loc[1, ["lss", "low", "high"]] = NAN  # en to ar
    own = pd.DataFrame([dict(base="en", target="en", lss=1., low=1., high=1., n=9, factor="p_max")])
    fig = lss_matrix(pd.concat([df.drop(index=2), own]))
    heat, cols = fig.data[0], list(fig.layout.xaxis.ticktext)
    en, de, ar = map(cols.index, ("English", "German", "Arabic"))
    assert heat.text[en][de] == "0.90" and "no interval" in heat.hovertext[en][de] and "facts" not in heat.hovertext[en][de]
    assert heat.text[en][ar] == heat.text[de][en] == "–" and np.isnan(heat.z[en][ar]) and np.isnan(heat.z[de][en])
    assert np.isnan(heat.z[en][en]) and heat.text[en][en] == ""
    json.loads(fig.to_json())
    lss_matrix(df[:0])


def test_steering_figures_lss_matrices_panels_by_factor_or_kind():
    df = shift_table(factors=["p_max", 3.0], shift=lambda f, a, b: .9 if f == "p_max" else .2)
    fig = lss_matrices(df)
    assert [a.text for a in fig.layout.annotations] == ["p_max", "factor 3"] and [t.coloraxis for t in fig.data] == ["coloraxis"] * 2
    assert [np.nanmin(t.z) for t in fig.data] == [np.nanmax(t.z) for t in fig.data] == [.9, .2]
    kinds = lss_matrices(pd.concat([df[:6].assign(kind=k) for k in ("own", "random")]))
    assert [a.text for a in kinds.layout.annotations] == ["own", "random"]
    with pytest.raises(ValueError, match="two values for base, target"):
        lss_matrices(pd.concat([df.assign(kind=k) for k in ("own", "random")]))
    narrow, wide = (fig.layout.meta[k] for k in ("narrow", "wide"))
    assert narrow["relayout"].keys() == wide["relayout"].keys() and narrow["relayout"]["yaxis2.title.text"] == "prompt in"
    assert narrow["relayout"]["yaxis2.domain"][1] < narrow["relayout"]["yaxis.domain"][0]


@pytest.mark.parametrize("langs, factors, across", [(3, 4, 4), (10, 4, 2), (18, 2, 2), (18, 3, 2), (40, 2, 1), (2, 1, 1)])
def test_steering_figures_lss_matrices_any_size(langs, factors, across):
    fig = lss_matrices(shift_table([f"toy_{i}" for i in range(langs)], [f"f{i}" for i in range(factors)]))
    axes = [fig.layout[f"yaxis{i + 1 if i else ''}"] for i in range(factors)]
    assert len(fig.data) == factors and sum(a.domain == axes[0].domain for a in axes) == across
    assert [t.xaxis or "x" for t in fig.data] == ["x", *(f"x{i + 1}" for i in range(1, factors))]
    assert all(0 <= a.domain[0] < a.domain[1] <= 1 for a in axes) and all(len(c) < 90 for t in fig.data for row in t.text for c in row)


def curve_table():
    values = {
        ("LSS", "own"): [0.7, 0.9],
        ("LSS", "random"): [0.5, 0.6],
        ("perplexity ratio", "own"): [2.0, INF],
        ("perplexity ratio", "random"): [1.0, 1.5],
        ("share of texts", "own"): [0.1, 0.4],
        ("share of texts", "random"): [0.0, NAN],
    }
    return pd.DataFrame(
        [
            dict(measure=m, kind=k, factor=f, value=v, low=v - 0.05, high=v + 0.05)
            for (m, k), vs in values.items()
            for f, v in zip(("p_max", 3), vs)
        ]
    )


def test_steering_figures_factor_curves():
    fig = factor_curves(curve_table())
    assert [a.text for a in fig.layout.annotations] == ["LSS", "perplexity ratio", "share of texts"] and len(fig.data) == 6
    assert [t.name for t in fig.data if t.showlegend] == ["own", "random"] and list(fig.layout.xaxis3.ticktext) == ["p_max", "3"]
    assert [fig.layout[a].type for a in ("yaxis", "yaxis2", "yaxis3")] == [None, "log", None]
    assert [(s.yref, s.y0) for s in fig.layout.shapes] == [("y", .5), ("y2", 1)]
    own, random = fig.data[:2]
    assert (
        list(own.y) == [0.7, 0.9]
        and list(random.y) == [0.5, 0.6]
        and np.allclose(own.error_y.array, 0.05)
        and np.allclose(own.error_y.arrayminus, 0.05)
    )
    assert own.x[0] < 0 < random.x[0] < own.x[1] < 1 < random.x[1] and "3, own<br>LSS <b>0.90</b> [0.85, 0.95]" == own.hovertext[1]


def test_steering_figures_factor_curves_keep_infinite_and_missing_values():
    fig = factor_curves(curve_table())
    ratio, share = fig.data[2], fig.data[5]
    assert (
        np.isfinite(ratio.y).all()
        and list(ratio.marker.symbol) == ["circle", "triangle-up"]
        and "∞" in ratio.hovertext[1]
        and ratio.error_y.array[1] == 0
    )
    low, high = fig.layout.yaxis2.range
    assert (
        low < 0 and math.log10(ratio.y[1]) < high and fig.layout.yaxis2.ticktext[-1] == "∞" and fig.layout.yaxis2.tickvals[-1] == ratio.y[1]
    )
    assert np.isnan(share.y[1]) and "no interval" in share.hovertext[1] and fig.layout.yaxis3.range[0] < 0 < 1 < fig.layout.yaxis3.range[1]
    json.loads(fig.to_json())
    with pytest.raises(ValueError, match="two values for kind, factor"): factor_curves(pd.concat([curve_table()] * 2))
    factor_curves(curve_table()[:0]), factor_curves(curve_table().assign(value=NAN, low=NAN, high=NAN))


@given(st.lists(st.floats(1e-200, 1e200), min_size=1, max_size=5), st.booleans())
@example(values=[2**-24], inf=False)  # its lowest tick, 1e-8, lies just below the padded range
@settings(max_examples=100, deadline=None)
def test_steering_figures_factor_curves_reach_every_ratio(values, inf):
    (low, high), edge, axis = curve_figures._reach(np.array(values + [INF] * inf), "perplexity ratio")
    assert low < min(0, *map(math.log10, values)) and max(0, *map(math.log10, values)) < math.log10(edge)
    assert 2 <= len(axis["tickvals"]) - inf <= 6 and all(low <= math.log10(t) <= high for t in axis["tickvals"])


def layer_table(layers):
    return pd.DataFrame([dict(layer=l, kind=k, value=v, low=v - .1, high=v + .1) for k, v in (("own", .8), ("random", .5)) for l in layers])


def test_steering_figures_layer_curve_numbers_get_bands():
    df = layer_table([4, 0, 1, 2, 3])
    df.loc[df.layer.eq(2) & df.kind.eq("own"), ["value", "low", "high"]] = NAN
    fig = layer_curve(df)
    band, own = fig.data[:2]
    assert list(own.x) == [0, 1, 2, 3, 4] and np.isnan(own.y[2]) and fig.layout.shapes[0].y0 == 0.5
    assert (
        np.isnan(band.x).sum() == 2
        and {*np.round(band.y[~np.isnan(band.y)], 6)} == {0.7, 0.9}
        and np.nanmin(band.x) < 0
        and 4 < np.nanmax(band.x)
    )
    assert not any(1.3 < x < 2.7 for x in band.x) and "layer 4, random<br><b>0.50</b> [0.40, 0.60]" == fig.data[3].hovertext[4]
    assert [t.name for t in fig.data if t.name] == ["own", "random"]
    json.loads(fig.to_json())


def test_steering_figures_layer_curve_labels_get_bars():
    fig = layer_curve(layer_table(["6–11", "0–5"]), reference=None)
    assert (
        list(fig.layout.xaxis.ticktext) == ["6–11", "0–5"]
        and len(fig.data) == 2
        and np.allclose(fig.data[0].error_y.array, 0.1)
        and not fig.layout.shapes
    )
    assert fig.data[0].x[0] < fig.data[1].x[0] and fig.layout.yaxis.range[0] < 0
    layer_curve(layer_table([0])[:0])


def sample_table(*rows):
    return pd.DataFrame(rows, columns=["prompt", "factor", "lang", "text", "identified"])


@given(st.lists(st.tuples(*[st.text(max_size=8)] * 4, st.none() | st.text(max_size=4)), max_size=5), st.text(max_size=8))
@settings(max_examples=100, deadline=None)
def test_steering_figures_samples_html_escapes_everything(rows, title):
    page = Page(samples_html(sample_table(*rows), title))
    assert {t for t, _ in page.tags} <= {"div", "b", "span", "table", "tbody", "tr", "th", "td"}
    assert {k for _, a in page.tags for k in a} <= {"style", "title", "dir", "scope", "data-quarto-disable-processing"}
    langs = {p: {r[2] for r in rows if r[0] == p and r[2]} for p in {r[0] for r in rows}}
    shown = sum(len(langs[r[0]]) or 1 if not r[2] else 1 for r in rows)  # a text without steering stands beside every language
    assert sum(d == ("dir", "auto") for _, a in page.tags for d in a.items()) == shown + sum(len(l) or 1 for l in langs.values())


def test_steering_figures_samples_html_marks_the_language():
    rows = [
        ("a", "none", "de", "x", "en"),
        ("a", "p_max", "de", "<script>alert(1)</script>", "deu_Latn"),
        ("b", "p_max", "ms", "y\nz" + "w" * 500, "id"),
        ("b", 3.0, "ms", "", NAN),
    ]
    page = samples_html(sample_table(*rows), "<i>")
    text = "".join(Page(page).text)
    assert "<script" not in page and "<i>" not in page and "<script>alert(1)</script>" in text
    assert "English ✗" in text and "German ✓" in text and "Indonesian ✓" in text and "no language ✗" in text and "(empty)" in text
    assert "y↵ zw" in text and "w" * 500 not in text and "…" in text and "steered to German" in text and "steered to Malay" in text
    assert "Indonesian ✗" in "".join(Page(samples_html(sample_table(*rows), alike=())).text)
    assert page.count("<td") == 2 * 3 and "–</td>" in page and page._repr_html_() == page


def test_steering_figures_samples_html_without_steering_and_by_kind():
    rows = [
        ("a", "none", "", "plain", "en"),
        ("a", "p_max", "de", "x", "de"),
        ("a", "p_max", "fr", "y", "de"),
        ("b", "none", None, "alone", "en"),
    ]
    text = "".join(Page(page := samples_html(sample_table(*rows))).text)
    assert (
        text.count("plain") == 2
        and text.count("alone") == 1
        and "English plain" in text
        and text.count("not steered") == 1
        and page.count("✓") == page.count("✗") == 1
    )
    kinds = samples_html(sample_table(*rows[:3]).assign(kind=["none", "own", "random"]))
    assert "<b>p_max, own</b>" in kinds and "<b>p_max, random</b>" in kinds and "<b>none</b>" in kinds and samples_html(sample_table()[:0])


@pytest.mark.parametrize(
    "f", [lss_matrix, lss_matrices, lambda d: lss_matrix(d, value="difference"), factor_curves, layer_curve, samples_html]
)
def test_steering_figures_missing_columns_are_named(f):
    with pytest.raises(ValueError, match="the table lacks .*has \\['other'(, '_one')?\\]"): f(pd.DataFrame(dict(other=[1])))
