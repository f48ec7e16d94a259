"Figures of sharing and of the comparison: shares stack to one, languages are averaged, no effect is squeezed."
import json
import math

import numpy as np
import pandas as pd
import pytest

from langneuron_mi.figures.sharing_figures import category_contribution_figure, category_shares, selectivity

INF, NAN = math.inf, math.nan


CATS = ("all-shared", "partial-shared", "specific", "non-activated")


def share_table(tasks=("",), layers=3, shares=(.1, .2, .3, .4)):
    return pd.DataFrame([dict(task=t, layer=l, category=c, share=s) for t in tasks for l in range(layers) for c, s in zip(CATS, shares)])


def test_sharing_figures_category_shares_stack_to_one_by_task():
    fig = category_shares(share_table(("facts", "xnli")))
    assert [t.name for t in fig.data] == [*CATS, *CATS] and fig.layout.barmode == "stack"
    for bars in (fig.data[:4], fig.data[4:]):
        assert np.allclose(sum(np.asarray(b.y, dtype=float) for b in bars), 1) and all(list(b.x) == [0, 1, 2] for b in bars)
    assert [t.showlegend for t in fig.data] == [True]*4 + [False]*4
    narrow, wide = (fig.layout.meta[k] for k in ("narrow", "wide"))
    assert narrow["relayout"].keys() == wide["relayout"].keys()


def test_sharing_figures_category_shares_without_tasks_and_layers_out_of_order():
    df = share_table(layers=4).drop(columns="task").sample(frac=1, random_state=0)
    fig = category_shares(df)
    assert len(fig.data) == 4 and list(fig.data[0].x) == [0, 1, 2, 3]
    assert "to" not in fig.data[0].hovertext[0]
    assert "5.0% to 20.0%" in category_shares(df.assign(min=.05, max=.2)).data[0].hovertext[0]


def test_sharing_figures_category_contribution_averages_languages():
    df = pd.concat(
        [share_table().assign(lang=l, neurons=lambda d: d.share, top=t, sum=lambda d: d.share) for l, t in (("en", 0.2), ("de", 0.4))]
    )
    assert np.allclose(category_contribution_figure(df).data[4].y, 0.3)
    assert np.allclose(category_contribution_figure(df, "de").data[4].y, 0.4)
    with pytest.raises(ValueError, match="no language 'fr' in this table; it has en, de"):
        category_contribution_figure(df, "fr")


def effect_rows(**own_over_others):
    nothing = dict.fromkeys([f"{g}{e}" for g in ("own", "others") for e in ("", "_low", "_high")], NAN)
    return pd.DataFrame(
        [
            nothing
            | dict(intervention=i, measure=m, selectivity=s, own=s, own_low=s, own_high=s, others=1.0, others_low=1.0, others_high=1.0)
            for i, ms in own_over_others.items()
            for m, s in ms.items()
        ]
    )


def test_sharing_figures_selectivity_sorts_and_keeps_what_has_no_own_language():
    df = effect_rows(
        a={"perplexity ratio": 1.0}, b={"perplexity ratio": NAN, "LSS": NAN}, c={"perplexity ratio": 5.0, "LSS": 2.0}, d={"LSS": 3.0}
    )
    fig = selectivity(df)
    assert list(fig.layout.yaxis.ticktext) == ["c", "d", "a", "b"]
    own, others = fig.data[:2]
    assert len(own.x) == 2 and len(others.x) == 3  # b has others' effect only
    assert fig.layout.xaxis.type == "log" and fig.layout.xaxis2.type is None
    assert {s.x0 for s in fig.layout.shapes} == {1., .5}


@pytest.mark.parametrize("bad", [INF, 1e6, 0.])
def test_sharing_figures_selectivity_survives_extreme_ratios(bad):
    df = effect_rows(a={"perplexity ratio": 2.}).assign(own=bad, own_high=bad)
    json.loads(selectivity(df).to_json())


@pytest.mark.parametrize("f", [category_shares, category_contribution_figure, selectivity])
def test_sharing_figures_missing_columns_are_named(f):
    with pytest.raises(ValueError, match="the table lacks .*has \\['other'(, '_one')?\\]"): f(pd.DataFrame(dict(other=[1])))
