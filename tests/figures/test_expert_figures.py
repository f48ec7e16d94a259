"Figures of routing: cells are the numbers of the tables, in their order."
import numpy as np
import pandas as pd
import pytest

from langneuron_mi.figures.expert_figures import divergence_heatmap, routing_heatmap

LANGS = ["zh", "en"] # not in alphabetical order


def routing(counts=(3, 2)):
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        [dict(lang=lang, layer=l, expert=e, share=rng.random()) for l, n in enumerate(counts) for lang in LANGS for e in range(n)]
    )


@pytest.mark.parametrize("counts", [(3, 3), (3, 2), (20,)], ids=str)
def test_experts_routing_heatmap_shows_every_share_in_percent(counts):
    df = routing(counts)
    fig = routing_heatmap(df)
    assert len(fig.data) == len(counts) and fig.layout.yaxis.ticktext == ("Chinese", "English")
    for layer, panel in enumerate(fig.data):
        want = [df[(df.layer == layer) & (df.lang == lang)].share.mul(100).tolist() for lang in LANGS]
        np.testing.assert_allclose(panel.z, want)
        assert panel.x == tuple(map(str, range(counts[layer])))
        assert (panel.texttemplate is None) == (counts[layer] > 16)
    assert [a.text for a in fig.layout.annotations] == [f"layer {l}" for l in range(len(counts))]
    assert fig.layout[f"xaxis{len(counts) if len(counts) > 1 else ''}"].title.text == "expert"
    assert f"<b>{df.share[0]*100:.1f} %</b>" in fig.data[0].hovertext[0][0]


def test_experts_routing_heatmap_of_a_part_of_the_layers():
    assert [a.text for a in routing_heatmap(routing((3, 2, 3)).query("layer != 1")).layout.annotations] == ["layer 0", "layer 2"]


def test_experts_divergence_heatmap_sorts_pairs_and_leaves_gaps():
    df = pd.DataFrame([(0, "en", "de", .1), (2, "en", "de", .2), (0, "en", "zh", .9)], columns=["layer", "lang_a", "lang_b", "bits"])
    fig = divergence_heatmap(df)
    assert fig.layout.yaxis.ticktext == ("English – Chinese", "English – German") and fig.data[0].x == ("0", "2")
    np.testing.assert_allclose(fig.data[0].z, [[.9, np.nan], [.1, .2]])
    assert (fig.data[0].zmin, fig.data[0].zmax) == (0, 1)


def test_experts_figures_say_what_a_table_lacks():
    with pytest.raises(ValueError, match="lacks .'bits'."): divergence_heatmap(pd.DataFrame(columns=["layer", "lang_a", "lang_b"]))
    with pytest.raises(ValueError, match="two values for lang, expert"): routing_heatmap(pd.concat([routing(), routing()]))
    with pytest.raises(ValueError, match="without experts"): routing_heatmap(routing()[:0])
