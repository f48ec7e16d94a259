"Layouts of any kind, as hypothesis draws them, and statistics of random models that have them."
import numpy as np
import torch
from hypothesis import strategies as st

from langneuron_mi.core.layout import Layout, Parts
from langneuron_mi.recording.groups import LEVELS
from langneuron_mi.recording.stats import ActivationStats

dense, shared = (st.builds(Parts, st.just(k), st.integers(1, 6)) for k in ("mlp", "shared"))
experts = st.builds(Parts, st.just("experts"), st.integers(1, 4), st.integers(1, 5))


@st.composite
def layouts(draw, largest=5):
    "Layers of no, one or several parts; sometimes an encoder before a decoder."
    layers = draw(st.lists(st.tuples(dense | st.none(), experts | st.none(), shared | st.none()), min_size=1, max_size=largest))
    layers = tuple(tuple(p for p in parts if p is not None) for parts in layers)
    cut = draw(st.integers(1, len(layers) - 1)) if len(layers) > 1 and draw(st.booleans()) else None
    return Layout(layers, () if cut is None else (("encoder", cut), ("decoder", len(layers) - cut)))


def neurons(layout):
    "Every neuron of a layout: (layer, number in the layer, part, number in the part), written out."
    out = []
    for l, parts in enumerate(layout.layers):
        names = [f"expert {k}" if p.kind == "experts" else p.kind for p in parts for k in range(p.count) for _ in range(p.width)]
        index = [i for p in parts for _ in range(p.count) for i in range(p.width)]
        out += [(l, n, name, i) for n, (name, i) in enumerate(zip(names, index, strict=True))]
    return out


LANGS, TOKENS = ("en", "de", "fr"), (50, 60, 40)


def random_stats(layout, seed=0, groups=True, texts=4):
    """Statistics of a random model, and the same without pads: every tensor [..., neuron] of the neurons that exist.
    What stands at the pads is as large as can be, for whoever reads it."""
    g = np.random.default_rng(seed)
    all_, K = neurons(layout), len(LANGS)
    l, n = np.array([o[:2] for o in all_]).T
    n_experts = max([p.count for parts in layout.layers for p in parts if p.kind == "experts"], default=0)
    routed = np.zeros((K, layout.n_layers, max(n_experts, 1)), dtype=np.int64)
    for layer, parts in enumerate(layout.layers):
        count = next((p.count for p in parts if p.kind == "experts"), 0)
        routed[:, layer, :count] = g.integers(0, 30, (K, count)) * (g.random((K, count)) > 0.2)
    given = np.array(
        [[routed[k, a, int(name.split()[1])] if name[:6] == "expert" else TOKENS[k] for a, _, name, _ in all_] for k in range(K)]
    )
    plain = dict(
        given=given,
        count=g.binomial(given, g.random((1, len(all_))) * (g.random((K, len(all_))) > 0.3)),
        sum=g.normal(size=given.shape) * given,
        above=g.binomial(given, 0.1 * g.random((K, len(all_)))),
        abs=g.random(given.shape) * given,
        text_means=g.normal(size=(K, texts, len(all_))).round(1),
        impact=g.random((K, texts, len(all_))).round(2),
    )

    def spread(x, pads, dtype):  # [..., neuron] to [..., layer, neuron]
        out = torch.full((*x.shape[:-1], *layout.shape), pads, dtype=dtype)
        out[..., l, n] = torch.from_numpy(x).to(dtype)
        return out
    count = spread(plain["count"], 0, torch.int64)
    count[:, ~layout.real] = torch.tensor(TOKENS)[:, None]
    above = spread(np.repeat(plain["above"][:, None], len(LEVELS), 1), 40, torch.int64)
    per_text = {
        k: {lang: spread(plain[k][i], 9.0, torch.float32).transpose(0, 1) for i, lang in enumerate(LANGS)} for k in ("text_means", "impact")
    }
    quantile = spread(np.repeat(plain["abs"][:, None], len(LEVELS), 1), 9.0, torch.float32)
    more = dict(
        moments=dict(
            sum=spread(plain["sum"], 999.0, torch.float64),
            sumsq=spread(plain["sum"] ** 2, 999.0, torch.float64),
            max=spread(plain["sum"], 999.0, torch.float64),
        ),
        quantiles=dict(quantile=quantile, above=above, abs=spread(plain["abs"], 999.0, torch.float64)),
        **per_text,
    )
    routing = dict(routed=torch.from_numpy(routed), router_weight=torch.from_numpy(routed * 0.5)) if n_experts else None
    meta = {} if layout.dense else dict(parts=layout.to_json())
    stats = ActivationStats(LANGS, dict(zip(LANGS, TOKENS)), count, meta=meta, routing=routing, **(more if groups else {}))
    return stats, plain, all_
