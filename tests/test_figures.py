"Figures: what they hold for every table, escaping, self-containedness, and life without a renderer."
import html.parser
import json
import logging
import math
import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from langneuron_mi import figures
from langneuron_mi.artifacts import ArtifactError
from langneuron_mi.figures import (dot_interval, factor_curves, figure_html, lang_name, layer_curve, lss_matrices, lss_matrix, neurons_per_layer,
                                   overlap_heatmap, ratio_matrices, ratio_matrix, samples_html, save_figures, token_heat)

INF, NAN = math.inf, math.nan


def ratio_table(langs="en de ar".split(), methods=("lape", "random"), ratio=lambda m, a, b: 4. if (m, a) == ("lape", b) else 1.):
    return pd.DataFrame([dict(method=m, neurons_of=a, text_lang=b, ratio=(r := ratio(m, a, b)), low=r * .9, high=r * 1.1, n_tokens=500)
                         for m in methods for a in langs for b in langs])


# --- matrices ---

def test_figures_ratio_matrix_is_log_centred_and_outlined():
    fig = ratio_matrix(ratio_table(methods=["lape"]))
    z = fig.data[0].z
    assert np.allclose(np.diag(z), math.log(4)) and np.allclose(z - np.diag(np.diag(z)), 0)
    assert fig.layout.coloraxis.cmax == -fig.layout.coloraxis.cmin == pytest.approx(math.log(4))
    assert "4.00" in fig.data[0].text[0][0] and "3.60–4.40" in fig.data[0].text[0][0]
    assert "text in Arabic" in fig.data[0].hovertext[0][2] and "500 tokens" in fig.data[0].hovertext[0][2]
    assert {(s.x0 + s.x1, s.y0 + s.y1) for s in fig.layout.shapes} == {(0, 0), (2, 2), (4, 4)}
    assert list(fig.layout.xaxis.ticktext) == ["English", "German", "Arabic"]
    assert (fig.layout.xaxis.title.text, fig.layout.yaxis.title.text) == ("text in", "neurons of")
    assert set(fig.layout.coloraxis.colorbar.ticktext) == {"0.5", "1", "2"}


def test_figures_ratio_matrices_share_one_scale():
    fig = ratio_matrices(ratio_table())
    assert [t.coloraxis for t in fig.data] == ["coloraxis"] * 2 and [a.text for a in fig.layout.annotations] == ["lape", "random"]
    assert fig.layout.coloraxis.cmax == pytest.approx(math.log(4)) and not np.any(fig.data[1].z)
    assert ratio_matrices(ratio_table(), limit=10).layout.coloraxis.cmax == pytest.approx(math.log(10))
    narrow, wide = (fig.layout.meta[k] for k in ("narrow", "wide"))
    assert narrow["relayout"].keys() == wide["relayout"].keys() and narrow["restyle"].keys() == wide["restyle"].keys()
    lo, hi = narrow["relayout"]["yaxis2.domain"], narrow["relayout"]["yaxis.domain"]
    assert 0 <= lo[0] < lo[1] < hi[0] < hi[1] == 1


def test_figures_ratio_matrix_keeps_infinite_missing_and_unsure_cells():
    df = ratio_table(methods=["lape"])
    df.loc[0, ["ratio", "low", "high"]] = [INF, NAN, NAN]
    df.loc[4, ["low", "high"]] = NAN
    df.loc[8, "ratio"] = 0
    df = df.drop(index=1)
    fig = ratio_matrix(df)
    z, text = fig.data[0].z, fig.data[0].text
    assert text[0][0] == "∞" and z[0][0] == fig.layout.coloraxis.cmax
    assert text[0][1] == "–" and math.isnan(z[0][1])
    assert text[1][1] == "4.00" and "no interval" in fig.data[0].hovertext[1][1]
    assert z[2][2] == fig.layout.coloraxis.cmin
    json.loads(fig.to_json())


@given(st.floats(1.01, 1e250))
@settings(max_examples=100, deadline=None)
def test_figures_ratio_ticks_are_few_symmetric_and_hold_one(limit):
    ticks = figures._ratio_ticks(limit)
    assert 1 in ticks and len(ticks) <= 11 and ticks == sorted(ticks)
    assert np.allclose(ticks, [1 / t for t in reversed(ticks)]) and ticks[-1] <= limit * 1.001


@pytest.mark.parametrize("n", [1, 5, 12, 30])
def test_figures_ratio_matrices_any_size(n):
    langs = [f"toy_{i}" for i in range(n)]
    fig = ratio_matrices(ratio_table(langs))
    assert list(fig.layout.xaxis.ticktext) == langs and len(fig.layout.shapes) == 2 * n
    assert all(len(cell) < 90 for row in fig.data[0].text for cell in row) and (n < 30 or fig.data[0].text[0][0] == "")


def test_figures_overlap_is_symmetric():
    df = pd.DataFrame(dict(lang_a=["en", "en", "de"], lang_b=["de", "ar", "ar"], jaccard=[.2, .1, 0.]))
    z = overlap_heatmap(df).data[0].z
    assert np.array_equal(z, [[1, .2, .1], [.2, 1, 0], [.1, 0, 1]])
    both = pd.concat([df, df.rename(columns=dict(lang_a="lang_b", lang_b="lang_a"))])
    assert np.array_equal(overlap_heatmap(both).data[0].z, z)
    assert (overlap_heatmap(df).data[0].zmin, overlap_heatmap(df).data[0].zmax) == (0, 1)


def test_figures_neurons_per_layer():
    df = pd.DataFrame(dict(lang=["en", "en", "de"], layer=[0, 3, 1], n=[5, 7, 2]))
    fig = neurons_per_layer(df)
    assert np.array_equal(fig.data[0].z, [[5, 0, 0, 7], [0, 2, 0, 0]])
    assert fig.layout.xaxis.title.text == "layer" and fig.layout.yaxis.ticktext[0].startswith("English") and "12" in fig.layout.yaxis.ticktext[0]
    assert "layer 3" in fig.data[0].text[0][3] and "<b>7</b>" in fig.data[0].text[0][3]
    neurons_per_layer(df[:0])


# --- intervals ---

def test_figures_dot_interval():
    df = pd.DataFrame(dict(lang=["en", "de", "en", "de"], m=["a", "a", "b", "b"], r=[2., INF, 1., 3.], lo=[1.5, NAN, NAN, 2.5], hi=[3., NAN, NAN, 3.5]))
    fig = dot_interval(df, "r", "lo", "hi", "lang", colour="m", x_title="ratio")
    a, b = fig.data
    assert a.error_x.array[0] == 1 and a.error_x.arrayminus[0] == .5 and b.error_x.array[0] == 0
    assert a.marker.symbol[1] == "triangle-right" and np.isfinite(a.x).all() and "∞" in a.hovertext[1]
    assert fig.layout.xaxis.type == "log" and fig.layout.shapes[0].x0 == 1 and list(fig.layout.yaxis.ticktext) == ["English", "German"]
    assert a.y[0] != b.y[0] and abs(a.y[0] - b.y[0]) < 1
    plain = dot_interval(df[:1], "r", "lo", "hi", "lang", reference=None, log=False)
    assert plain.layout.xaxis.type is None and not plain.layout.shapes and plain.layout.showlegend is False


@pytest.mark.parametrize("f", [neurons_per_layer, overlap_heatmap, ratio_matrix, ratio_matrices, lambda d: dot_interval(d, "x", "low", "high", "y"),
                               lss_matrix, lss_matrices, lambda d: lss_matrix(d, value="difference"), factor_curves, layer_curve, samples_html])
def test_figures_missing_columns_are_named(f):
    with pytest.raises(ValueError, match="the table lacks .*has \\['other'(, 'method'|, '_one')?\\]"): f(pd.DataFrame(dict(other=[1])))


# --- steering ---

def shift_table(langs="en de ar".split(), factors=("p_max",), shift=lambda f, a, b: .9 if b == "de" else .4, value="lss"):
    return pd.DataFrame([{"factor": f, "base": a, "target": b, value: (v := shift(f, a, b)), "low": v - .1, "high": v + .1, "n": 96}
                         for f in factors for a in langs for b in langs if a != b])


def test_figures_lss_matrix_puts_every_value_in_its_cell():
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
    assert (fig.layout.xaxis.title.text, fig.layout.yaxis.title.text) == ("steered to", "prompt in") and fig.layout.yaxis.autorange == "reversed"


def test_figures_lss_matrix_colours_are_centred_at_no_effect():
    bar = (axis := lss_matrix(shift_table()).layout.coloraxis).colorbar
    assert (axis.cmin, axis.cmax, bar.title.text) == (0, 1, "share of facts shifted (0.5 = no effect)") and .5 in bar.tickvals
    gains = shift_table(shift=lambda f, a, b: -.34 if b == "de" else .1, value="difference")
    fig = lss_matrix(gains, value="difference")
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (-.4, .4) and fig.layout.coloraxis.colorbar.title.text == "difference to random neurons"
    assert "−0.34" in fig.data[0].text[0][1] and "+0.10" in fig.data[0].text[0][2] and "−0.44 to −0.24" in fig.data[0].text[0][1]
    assert lss_matrix(gains.assign(difference=.001), value="difference").layout.coloraxis.cmax == .2
    with pytest.raises(ValueError, match="no value 'shift'; .*'lss', 'difference'"): lss_matrix(gains, value="shift")


def test_figures_lss_matrix_keeps_missing_unsure_and_own_cells():
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


def test_figures_lss_matrices_panels_by_factor_or_kind():
    df = shift_table(factors=["p_max", 3.0], shift=lambda f, a, b: .9 if f == "p_max" else .2)
    fig = lss_matrices(df)
    assert [a.text for a in fig.layout.annotations] == ["p_max", "factor 3"] and [t.coloraxis for t in fig.data] == ["coloraxis"] * 2
    assert [np.nanmin(t.z) for t in fig.data] == [np.nanmax(t.z) for t in fig.data] == [.9, .2]
    kinds = lss_matrices(pd.concat([df[:6].assign(kind=k) for k in ("own", "random")]))
    assert [a.text for a in kinds.layout.annotations] == ["own", "random"]
    with pytest.raises(ValueError, match="two values for base, target"): lss_matrices(pd.concat([df.assign(kind=k) for k in ("own", "random")]))
    narrow, wide = (fig.layout.meta[k] for k in ("narrow", "wide"))
    assert narrow["relayout"].keys() == wide["relayout"].keys() and narrow["relayout"]["yaxis2.title.text"] == "prompt in"
    assert narrow["relayout"]["yaxis2.domain"][1] < narrow["relayout"]["yaxis.domain"][0]


@pytest.mark.parametrize("langs, factors, across", [(3, 4, 4), (10, 4, 2), (18, 2, 2), (18, 3, 2), (40, 2, 1), (2, 1, 1)])
def test_figures_lss_matrices_any_size(langs, factors, across):
    fig = lss_matrices(shift_table([f"toy_{i}" for i in range(langs)], [f"f{i}" for i in range(factors)]))
    axes = [fig.layout[f"yaxis{i + 1 if i else ''}"] for i in range(factors)]
    assert len(fig.data) == factors and sum(a.domain == axes[0].domain for a in axes) == across
    assert [t.xaxis or "x" for t in fig.data] == ["x", *(f"x{i + 1}" for i in range(1, factors))]
    assert all(0 <= a.domain[0] < a.domain[1] <= 1 for a in axes) and all(len(c) < 90 for t in fig.data for row in t.text for c in row)


def curve_table():
    values = {("LSS", "own"): [.7, .9], ("LSS", "random"): [.5, .6], ("perplexity ratio", "own"): [2., INF], ("perplexity ratio", "random"): [1., 1.5],
              ("share of texts", "own"): [.1, .4], ("share of texts", "random"): [0., NAN]}
    return pd.DataFrame([dict(measure=m, kind=k, factor=f, value=v, low=v - .05, high=v + .05) for (m, k), vs in values.items() for f, v in zip(("p_max", 3), vs)])


def test_figures_factor_curves():
    fig = factor_curves(curve_table())
    assert [a.text for a in fig.layout.annotations] == ["LSS", "perplexity ratio", "share of texts"] and len(fig.data) == 6
    assert [t.name for t in fig.data if t.showlegend] == ["own", "random"] and list(fig.layout.xaxis3.ticktext) == ["p_max", "3"]
    assert [fig.layout[a].type for a in ("yaxis", "yaxis2", "yaxis3")] == [None, "log", None]
    assert [(s.yref, s.y0) for s in fig.layout.shapes] == [("y", .5), ("y2", 1)]
    own, random = fig.data[:2]
    assert list(own.y) == [.7, .9] and list(random.y) == [.5, .6] and np.allclose(own.error_y.array, .05) and np.allclose(own.error_y.arrayminus, .05)
    assert own.x[0] < 0 < random.x[0] < own.x[1] < 1 < random.x[1] and "3, own<br>LSS <b>0.90</b> [0.85, 0.95]" == own.hovertext[1]


def test_figures_factor_curves_keep_infinite_and_missing_values():
    fig = factor_curves(curve_table())
    ratio, share = fig.data[2], fig.data[5]
    assert np.isfinite(ratio.y).all() and list(ratio.marker.symbol) == ["circle", "triangle-up"] and "∞" in ratio.hovertext[1] and ratio.error_y.array[1] == 0
    low, high = fig.layout.yaxis2.range
    assert low < 0 and math.log10(ratio.y[1]) < high and fig.layout.yaxis2.ticktext[-1] == "∞" and fig.layout.yaxis2.tickvals[-1] == ratio.y[1]
    assert np.isnan(share.y[1]) and "no interval" in share.hovertext[1] and fig.layout.yaxis3.range[0] < 0 < 1 < fig.layout.yaxis3.range[1]
    json.loads(fig.to_json())
    with pytest.raises(ValueError, match="two values for kind, factor"): factor_curves(pd.concat([curve_table()] * 2))
    factor_curves(curve_table()[:0]), factor_curves(curve_table().assign(value=NAN, low=NAN, high=NAN))


@given(st.lists(st.floats(1e-200, 1e200), min_size=1, max_size=5), st.booleans())
@example(values=[2**-24], inf=False)  # its lowest tick, 1e-8, lies just below the padded range
@settings(max_examples=100, deadline=None)
def test_figures_factor_curves_reach_every_ratio(values, inf):
    (low, high), edge, axis = figures._reach(np.array(values + [INF] * inf), "perplexity ratio")
    assert low < min(0, *map(math.log10, values)) and max(0, *map(math.log10, values)) < math.log10(edge)
    assert 2 <= len(axis["tickvals"]) - inf <= 6 and all(low <= math.log10(t) <= high for t in axis["tickvals"])


def layer_table(layers):
    return pd.DataFrame([dict(layer=l, kind=k, value=v, low=v - .1, high=v + .1) for k, v in (("own", .8), ("random", .5)) for l in layers])


def test_figures_layer_curve_numbers_get_bands():
    df = layer_table([4, 0, 1, 2, 3])
    df.loc[df.layer.eq(2) & df.kind.eq("own"), ["value", "low", "high"]] = NAN
    fig = layer_curve(df)
    band, own = fig.data[:2]
    assert list(own.x) == [0, 1, 2, 3, 4] and np.isnan(own.y[2]) and fig.layout.shapes[0].y0 == .5
    assert np.isnan(band.x).sum() == 2 and {*np.round(band.y[~np.isnan(band.y)], 6)} == {.7, .9} and np.nanmin(band.x) < 0 and 4 < np.nanmax(band.x)
    assert not any(1.3 < x < 2.7 for x in band.x) and "layer 4, random<br><b>0.50</b> [0.40, 0.60]" == fig.data[3].hovertext[4]
    assert [t.name for t in fig.data if t.name] == ["own", "random"]
    json.loads(fig.to_json())


def test_figures_layer_curve_labels_get_bars():
    fig = layer_curve(layer_table(["6–11", "0–5"]), reference=None)
    assert list(fig.layout.xaxis.ticktext) == ["6–11", "0–5"] and len(fig.data) == 2 and np.allclose(fig.data[0].error_y.array, .1) and not fig.layout.shapes
    assert fig.data[0].x[0] < fig.data[1].x[0] and fig.layout.yaxis.range[0] < 0
    layer_curve(layer_table([0])[:0])


# --- tokens and texts ---

class Page(html.parser.HTMLParser):
    "Text and tags of a page."
    def __init__(self, page): super().__init__(); self.tags, self.text = [], []; self.feed(page)
    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_data(self, data): self.text.append(data)


@given(st.lists(st.tuples(st.text(max_size=8), st.floats()), max_size=6), st.text(max_size=8))
@settings(max_examples=200, deadline=None)
def test_figures_token_heat_escapes_everything(pairs, title):
    page = Page(token_heat([t for t, _ in pairs], [v for _, v in pairs], title))
    assert {t for t, _ in page.tags} <= {"div", "b", "span", "br"} and len([1 for t, a in page.tags if "title" in a]) == len(pairs)
    assert not any(k.startswith("on") for _, a in page.tags for k in a)


def test_figures_token_heat_colours():
    page = token_heat(["<script>", "&", "a\nb", "z"], [2, -1, 0, NAN], '"><img src=x>')
    assert "<script" not in page and "<img" not in page and "↵<br>b" in page
    shades = re.findall(r'style="(background:rgba[^"]*|)" title', page)
    assert shades == ["background:rgba(202,0,32,0.60)", "background:rgba(5,113,176,0.30)", "", ""]
    assert page._repr_html_() == page and isinstance(page, str)
    with pytest.raises(ValueError, match="2 tokens need"): token_heat(["a", "b"], [1])


def sample_table(*rows):
    return pd.DataFrame(rows, columns=["prompt", "factor", "lang", "text", "identified"])


@given(st.lists(st.tuples(*[st.text(max_size=8)] * 4, st.none() | st.text(max_size=4)), max_size=5), st.text(max_size=8))
@settings(max_examples=100, deadline=None)
def test_figures_samples_html_escapes_everything(rows, title):
    page = Page(samples_html(sample_table(*rows), title))
    assert {t for t, _ in page.tags} <= {"div", "b", "span", "table", "tbody", "tr", "th", "td"}
    assert {k for _, a in page.tags for k in a} <= {"style", "title", "dir", "scope", "data-quarto-disable-processing"}
    langs = {p: {r[2] for r in rows if r[0] == p and r[2]} for p in {r[0] for r in rows}}
    shown = sum(len(langs[r[0]]) or 1 if not r[2] else 1 for r in rows)  # a text without steering stands beside every language
    assert sum(d == ("dir", "auto") for _, a in page.tags for d in a.items()) == shown + sum(len(l) or 1 for l in langs.values())


def test_figures_samples_html_marks_the_language():
    rows = [("a", "none", "de", "x", "en"), ("a", "p_max", "de", "<script>alert(1)</script>", "deu_Latn"), ("b", "p_max", "ms", "y\nz" + "w" * 500, "id"), ("b", 3.0, "ms", "", NAN)]
    page = samples_html(sample_table(*rows), "<i>")
    text = "".join(Page(page).text)
    assert "<script" not in page and "<i>" not in page and "<script>alert(1)</script>" in text
    assert "English ✗" in text and "German ✓" in text and "Indonesian ✓" in text and "no language ✗" in text and "(empty)" in text
    assert "y↵ zw" in text and "w" * 500 not in text and "…" in text and "steered to German" in text and "steered to Malay" in text
    assert "Indonesian ✗" in "".join(Page(samples_html(sample_table(*rows), alike=())).text)
    assert page.count("<td") == 2 * 3 and "–</td>" in page and page._repr_html_() == page


def test_figures_samples_html_without_steering_and_by_kind():
    rows = [("a", "none", "", "plain", "en"), ("a", "p_max", "de", "x", "de"), ("a", "p_max", "fr", "y", "de"), ("b", "none", None, "alone", "en")]
    text = "".join(Page(page := samples_html(sample_table(*rows))).text)
    assert text.count("plain") == 2 and text.count("alone") == 1 and "English plain" in text and text.count("not steered") == 1 and page.count("✓") == page.count("✗") == 1
    kinds = samples_html(sample_table(*rows[:3]).assign(kind=["none", "own", "random"]))
    assert "<b>p_max, own</b>" in kinds and "<b>p_max, random</b>" in kinds and "<b>none</b>" in kinds and samples_html(sample_table()[:0])


def test_figures_lang_name():
    assert [lang_name(c) for c in ("de", "arb_Arab", "toy", "all")] == ["German", "Arabic", "toy", "all"]


# --- pages and pictures ---

def test_figures_html_is_self_contained_and_repeatable():
    figs = {"a": go.Figure(go.Scatter(y=[1, 2])), "b": ratio_matrices(ratio_table(), title="</script><script>alert(1)</script>")}
    one, two = figure_html(figs)
    assert len(one) > 1e6 > len(two) and 'id="figure-1"' in one and 'id="figure-2"' in two
    assert "src=" not in two and "</script><script>alert" not in two and "cdn" not in two
    assert figure_html(list(figs.values())) == [one, two]
    assert len(figure_html(figs, plotlyjs=False, prefix="x")[0]) < 1e5 and 'id="x-1"' in figure_html(figs, plotlyjs=False, prefix="x")[0]


def test_figures_save_without_a_renderer_goes_on(tmp_path, monkeypatch, caplog):
    def no_chrome(*args): raise RuntimeError("\nKaleido requires Google Chrome to be installed.\nmore")
    monkeypatch.setattr(figures, "_render", no_chrome)
    with caplog.at_level(logging.INFO): assert save_figures({"a": go.Figure()}, tmp_path) == []
    assert "Kaleido requires" in caplog.text and "more" not in caplog.text and list(tmp_path.iterdir()) == []


def fake_render(figs, width, folder):
    for path in figs: (figures.Path(folder)/path.name).write_bytes(b"picture")


def test_figures_save_writes_every_format(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "_render", fake_render)
    files = save_figures({"a": go.Figure(), "b": go.Figure()}, tmp_path/"figures")
    assert sorted(p.name for p in files) == ["a.png", "a.svg", "b.png", "b.svg"] and all(p.read_bytes() == b"picture" for p in files)
    assert save_figures({}, tmp_path) == []


def test_figures_save_full_disk_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "_render", fake_render)
    (tmp_path/"file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"): save_figures({"a": go.Figure()}, tmp_path/"file"/"figures")


def test_figures_save_with_what_this_machine_has(tmp_path):
    files = save_figures({"a": ratio_matrices(ratio_table())}, tmp_path, formats=["svg"])
    assert [p for p in tmp_path.iterdir()] == files and all(b"<svg" in p.read_bytes()[:500] for p in files)


# --- sharing ---

CATS = ("all-shared", "partial-shared", "specific", "non-activated")


def share_table(tasks=("",), layers=3, shares=(.1, .2, .3, .4)):
    return pd.DataFrame([dict(task=t, layer=l, category=c, share=s) for t in tasks for l in range(layers) for c, s in zip(CATS, shares)])


def test_figures_category_shares_stack_to_one_by_task():
    fig = figures.category_shares(share_table(("facts", "xnli")))
    assert [t.name for t in fig.data] == [*CATS, *CATS] and fig.layout.barmode == "stack"
    for bars in (fig.data[:4], fig.data[4:]):
        assert np.allclose(sum(np.asarray(b.y, dtype=float) for b in bars), 1) and all(list(b.x) == [0, 1, 2] for b in bars)
    assert [t.showlegend for t in fig.data] == [True]*4 + [False]*4
    narrow, wide = (fig.layout.meta[k] for k in ("narrow", "wide"))
    assert narrow["relayout"].keys() == wide["relayout"].keys()


def test_figures_category_shares_without_tasks_and_layers_out_of_order():
    df = share_table(layers=4).drop(columns="task").sample(frac=1, random_state=0)
    fig = figures.category_shares(df)
    assert len(fig.data) == 4 and list(fig.data[0].x) == [0, 1, 2, 3]
    assert "to" not in fig.data[0].hovertext[0]
    assert "5.0% to 20.0%" in figures.category_shares(df.assign(min=.05, max=.2)).data[0].hovertext[0]


def test_figures_category_contribution_averages_languages():
    df = pd.concat([share_table().assign(lang=l, neurons=lambda d: d.share, top=t, sum=lambda d: d.share) for l, t in (("en", .2), ("de", .4))])
    assert np.allclose(figures.category_contribution_figure(df).data[4].y, .3)
    assert np.allclose(figures.category_contribution_figure(df, "de").data[4].y, .4)
    with pytest.raises(ValueError, match="no language 'fr' in this table; it has en, de"): figures.category_contribution_figure(df, "fr")


def effect_rows(**own_over_others):
    nothing = dict.fromkeys([f"{g}{e}" for g in ("own", "others") for e in ("", "_low", "_high")], NAN)
    return pd.DataFrame([nothing | dict(intervention=i, measure=m, selectivity=s, own=s, own_low=s, own_high=s, others=1., others_low=1., others_high=1.)
                         for i, ms in own_over_others.items() for m, s in ms.items()])


def test_figures_selectivity_sorts_and_keeps_what_has_no_own_language():
    df = effect_rows(a={"perplexity ratio": 1.}, b={"perplexity ratio": NAN, "LSS": NAN}, c={"perplexity ratio": 5., "LSS": 2.}, d={"LSS": 3.})
    fig = figures.selectivity(df)
    assert list(fig.layout.yaxis.ticktext) == ["c", "d", "a", "b"]
    own, others = fig.data[:2]
    assert len(own.x) == 2 and len(others.x) == 3  # b has others' effect only
    assert fig.layout.xaxis.type == "log" and fig.layout.xaxis2.type is None
    assert {s.x0 for s in fig.layout.shapes} == {1., .5}


@pytest.mark.parametrize("bad", [INF, 1e6, 0.])
def test_figures_selectivity_survives_extreme_ratios(bad):
    df = effect_rows(a={"perplexity ratio": 2.}).assign(own=bad, own_high=bad)
    json.loads(figures.selectivity(df).to_json())
