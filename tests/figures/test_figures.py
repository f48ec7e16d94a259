"Figures: what they hold for every table, escaping, self-containedness, and life without a renderer."
import json
import logging
import math
import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pages import Page

from langneuron_mi.figures import effect_figures, look
from langneuron_mi.core.atomic import ArtifactError
from langneuron_mi.figures.effect_figures import dot_interval, ratio_matrices, ratio_matrix
from langneuron_mi.figures.look import figure_html, lang_name, save_figures
from langneuron_mi.figures.set_figures import neurons_per_layer, overlap_heatmap
from langneuron_mi.figures.token_heat import token_heat

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
    ticks = effect_figures._ratio_ticks(limit)
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
    assert (
        fig.layout.xaxis.title.text == "layer"
        and fig.layout.yaxis.ticktext[0].startswith("English")
        and "12" in fig.layout.yaxis.ticktext[0]
    )
    assert "layer 3" in fig.data[0].text[0][3] and "<b>7</b>" in fig.data[0].text[0][3]
    neurons_per_layer(df[:0])


# --- intervals ---

def test_figures_dot_interval():
    df = pd.DataFrame(
        dict(
            lang=["en", "de", "en", "de"], m=["a", "a", "b", "b"], r=[2.0, INF, 1.0, 3.0], lo=[1.5, NAN, NAN, 2.5], hi=[3.0, NAN, NAN, 3.5]
        )
    )
    fig = dot_interval(df, "r", "lo", "hi", "lang", colour="m", x_title="ratio")
    a, b = fig.data
    assert a.error_x.array[0] == 1 and a.error_x.arrayminus[0] == .5 and b.error_x.array[0] == 0
    assert a.marker.symbol[1] == "triangle-right" and np.isfinite(a.x).all() and "∞" in a.hovertext[1]
    assert fig.layout.xaxis.type == "log" and fig.layout.shapes[0].x0 == 1 and list(fig.layout.yaxis.ticktext) == ["English", "German"]
    assert a.y[0] != b.y[0] and abs(a.y[0] - b.y[0]) < 1
    plain = dot_interval(df[:1], "r", "lo", "hi", "lang", reference=None, log=False)
    assert plain.layout.xaxis.type is None and not plain.layout.shapes and plain.layout.showlegend is False


@pytest.mark.parametrize(
    "f", [neurons_per_layer, overlap_heatmap, ratio_matrix, ratio_matrices, lambda d: dot_interval(d, "x", "low", "high", "y")]
)
def test_figures_missing_columns_are_named(f):
    with pytest.raises(ValueError, match="the table lacks .*has \\['other'(, 'method'|, '_one')?\\]"): f(pd.DataFrame(dict(other=[1])))


# --- tokens and texts ---

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
    monkeypatch.setattr(look, "_render", no_chrome)
    with caplog.at_level(logging.INFO): assert save_figures({"a": go.Figure()}, tmp_path) == []
    assert "Kaleido requires" in caplog.text and "more" not in caplog.text and list(tmp_path.iterdir()) == []


def fake_render(figs, width, folder):
    for path in figs: (look.Path(folder)/path.name).write_bytes(b"picture")


def test_figures_save_writes_every_format(tmp_path, monkeypatch):
    monkeypatch.setattr(look, "_render", fake_render)
    files = save_figures({"a": go.Figure(), "b": go.Figure()}, tmp_path/"figures")
    assert sorted(p.name for p in files) == ["a.png", "a.svg", "b.png", "b.svg"] and all(p.read_bytes() == b"picture" for p in files)
    assert save_figures({}, tmp_path) == []


def test_figures_save_full_disk_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(look, "_render", fake_render)
    (tmp_path/"file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"): save_figures({"a": go.Figure()}, tmp_path/"file"/"figures")


def test_figures_save_with_what_this_machine_has(tmp_path):
    files = save_figures({"a": ratio_matrices(ratio_table())}, tmp_path, formats=["svg"])
    assert [p for p in tmp_path.iterdir()] == files and all(b"<svg" in p.read_bytes()[:500] for p in files)
