"NeuronSet and LanguageNeurons against plain Python sets, files, and the mistakes of published code."
import copy, math, pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from langneuron_mi.core.artifacts import save_artifact
from langneuron_mi.core.atomic import ArtifactError
from langneuron_mi.find.language_neurons import LanguageNeurons
from langneuron_mi.find.neurons import NeuronSet

SHAPE = 3, 7
cells = st.sets(st.tuples(st.integers(0, SHAPE[0] - 1), st.integers(0, SHAPE[1] - 1)))
fast = settings(max_examples=150, deadline=None, derandomize=True)


def make(s): return NeuronSet(s, SHAPE)


@fast
@given(cells, cells)
def test_neuronset_algebra_equals_python_sets(a, b):
    x, y = make(a), make(b)
    for ours, truth in ((x | y, a | b), (x & y, a & b), (x - y, a - b), (x ^ y, a ^ b)):
        assert list(ours) == sorted(truth) and len(ours) == len(truth) and ours == make(truth)
        assert hash(ours) == hash(make(truth)) and ours.fingerprint == make(truth).fingerprint
        assert ours.index.dtype == torch.int64
    assert (x <= y) == (a <= b) and (x == y) == (a == b)
    j = x.jaccard(y)
    assert math.isnan(j) if not a | b else j == len(a & b) / len(a | b)


@fast
@given(cells)
def test_neuronset_views_agree(a):
    x = make(a)
    assert all(((l, i) in x) == ((l, i) in a) for l in range(-1, SHAPE[0] + 1) for i in range(-1, SHAPE[1] + 1))
    assert x.per_layer().tolist() == [sum(l == k for l, _ in a) for k in range(SHAPE[0])]
    assert [x.neurons_in(k).tolist() for k in range(SHAPE[0])] == [sorted(i for l, i in a if l == k) for k in range(SHAPE[0])]
    assert NeuronSet.from_mask(x.mask()) == x == NeuronSet(x.pairs, SHAPE) == NeuronSet(x.pairs.numpy(), SHAPE) == make(x)
    assert sorted(x.layers([0, 2])) == sorted(p for p in a if p[0] != 1)
    assert list(zip(x.to_df().layer, x.to_df().neuron)) == sorted(a)
    assert copy.deepcopy(x) == x == pickle.loads(pickle.dumps(x))


@fast
@given(cells, cells, st.integers(0, 9))
def test_neuronset_random_like_keeps_layers_and_pool(a, pool, seed):
    x, among = make(a), make(a | pool)
    r = x.random_like(seed, among=among)
    assert r.per_layer().tolist() == x.per_layer().tolist() and r <= among
    assert r == x.random_like(seed, among=among)
    free = x.random_like(seed, exclude=make(pool - a)) if all(
        sum(l == k for l, _ in a) <= SHAPE[1] - sum(l == k for l, _ in pool - a) for k in range(SHAPE[0])) else None
    if free is not None: assert not len(free & make(pool - a)) and free.per_layer().tolist() == x.per_layer().tolist()


def test_neuronset_random_like_is_uniform_and_layerwise_independent():
    x = NeuronSet([(1, 0), (1, 1), (2, 3)], (3, 5))
    hits = sum(x.random_like(s).mask()[1].double() for s in range(2000)) / 2000
    assert (hits - .4).abs().max() < .05
    assert NeuronSet([(1, 0), (1, 1)], (3, 5)).random_like(3) == x.random_like(3).layers([1])


@pytest.mark.parametrize("pairs, error, says", [
    ([(3, 0)], ValueError, r"\(3, 0\) is outside this model: layers are 0 to 2, neurons 0 to 6"),
    ([(0, -1)], ValueError, "outside this model"),
    ([(0, 1, 2)], TypeError, r"\[n, 2\]"),
    ([(0.5, 1)], TypeError, "whole numbers"),
    ([("0", "1")], TypeError, "whole numbers"),
    (torch.zeros(3, 6, dtype=torch.bool), ValueError, r"shape \(3, 7\); got \(3, 6\)"),
])
def test_neuronset_bad_input(pairs, error, says):
    with pytest.raises(error, match=says): NeuronSet(pairs, SHAPE)


def test_neuronset_bad_site_and_shape():
    with pytest.raises(ValueError, match="no site 'gates'"): NeuronSet([], SHAPE, "gates")
    with pytest.raises(ValueError, match="at least 1"): NeuronSet([], (0, 4))
    with pytest.raises(ValueError, match="no layer 3"): make([]).neurons_in(3)
    with pytest.raises(AttributeError): make([]).site = "post"


def test_neuronset_refuses_to_mix():
    a = NeuronSet([(0, 0)], SHAPE, model="m1")
    for b, what in ((NeuronSet([(0, 0)], (3, 8)), "shape"), (NeuronSet([], SHAPE, "post"), "site"), (a.assume("m2"), "model")):
        for op in (lambda: a | b, lambda: a & b, lambda: a - b, lambda: a ^ b, lambda: a.jaccard(b), lambda: a <= b,
                   lambda: a.random_like(0, among=b), lambda: LanguageNeurons({"x": a, "y": b})):
            with pytest.raises(ValueError, match=f"{what} differs"): op()
        assert a != b
    assert (a | make([(1, 1)])).model == (make([(1, 1)]) | a).model == "m1"
    with pytest.raises(TypeError): a | {(0, 0)}


def language_neurons(**kw):
    sets = {"en": make([(0, 1), (2, 6)]), "th": make([]), "de": make([(0, 1), (1, 3)]), "is": make([])}
    return LanguageNeurons(sets, method="lape", parameters=dict(top=.01, threshold=.25), metric="entropy",
                           score=torch.arange(21.).double().view(SHAPE).where(torch.arange(21).view(SHAPE) > 1, float("nan")),
                           provenance=dict(corpus="abc", model_id="tiny"), seen={"en": np.array([3, 2**64 - 1], np.uint64),
                                                                                "th": np.array([], np.uint64)}, **kw)


def test_language_neurons_bincount_misalignment():
    "methods.md 9.1: a language that owns nothing must not shift the next ones."
    sets = {"en": make([(0, 0)]), "th": make([]), "de": make([(1, 1)]), "is": make([])}
    x = LanguageNeurons(sets)
    naive = torch.bincount(torch.tensor([0, 2]))  # owners 0 and 2, as published code counts them
    assert len(naive) == 3 < len(x)               # the last language is lost there, and kept here
    assert x.langs == ("en", "th", "de", "is") and x.sizes().to_dict() == {"en": 1, "th": 0, "de": 1, "is": 0}
    for y in (x.specific(), x.related(), x.random_like(1), x.assume("m")): assert y.langs == x.langs
    assert list(x["de"]) == [(1, 1)]
    assert x.specific().sizes().to_dict() == x.sizes().to_dict()


def test_language_neurons_save_load(tmp_path):
    x = language_neurons()
    p = x.save(tmp_path / "a.safetensors")
    y = LanguageNeurons.load(p)
    assert y.langs == x.langs and dict(y) == dict(x) and y.fingerprint == x.fingerprint
    assert (y.method, y.metric, y.parameters, y.provenance) == (x.method, x.metric, x.parameters, x.provenance)
    torch.testing.assert_close(y.score, x.score, rtol=0, atol=0, equal_nan=True)
    assert list(y.seen) == ["en", "th"] and all(np.array_equal(y.seen[k], x.seen[k]) and y.seen[k].dtype == np.uint64 for k in x.seen)
    assert y.save(tmp_path / "b.safetensors").read_bytes() == p.read_bytes()


def test_language_neurons_load_refuses_damage(tmp_path):
    p = language_neurons().save(tmp_path / "a.safetensors")
    raw = bytearray(p.read_bytes())
    raw[-1] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(raw)
    (tmp_path / "short.safetensors").write_bytes(raw[:-9])
    for name in ("bad", "short", "missing"):
        with pytest.raises(ArtifactError): LanguageNeurons.load(tmp_path / f"{name}.safetensors")
    save_artifact(tmp_path / "other.safetensors", "activation_stats", {"x": torch.ones(1)}, {})
    with pytest.raises(ArtifactError): LanguageNeurons.load(tmp_path / "other.safetensors")


def test_language_neurons_mapping_and_errors():
    x = language_neurons()
    assert "ja" not in x and x.get("ja") is None
    with pytest.raises(KeyError) as e: x["ja"]
    assert str(e.value) == "no neurons for language 'ja'; this set has en, th, de, is"
    with pytest.raises(KeyError) as e: x["dee"]
    assert str(e.value) == "no neurons for language 'dee'; did you mean 'de'? this set has en, th, de, is"
    with pytest.raises(ValueError, match="at least one language"): LanguageNeurons({})
    with pytest.raises(TypeError, match="maps language codes"): LanguageNeurons({"en": [(0, 1)]})
    with pytest.raises(ValueError, match="score has the shape"): LanguageNeurons({"en": make([])}, score=torch.ones(2, 2))
    with pytest.raises(KeyError, match="ja"): LanguageNeurons({"en": make([])}, seen={"ja": np.zeros(1, np.uint64)})


@fast
@given(st.lists(cells, min_size=1, max_size=4))
def test_language_neurons_owners_partition(parts):
    x = LanguageNeurons({f"l{k}": make(s) for k, s in enumerate(parts)})
    count = {p: sum(p in s for s in parts) for s in parts for p in s}
    assert {(l, i): n for l, row in enumerate(x.owners().tolist()) for i, n in enumerate(row) if n} == count
    for k, s in enumerate(parts):
        specific, related, every = x.specific()[f"l{k}"], x.related()[f"l{k}"], x.all_language()
        assert set(specific) == {p for p in s if count[p] == 1}
        assert (specific | related | (every & make(s))) == make(s)
        assert len(specific) + len(related) + len(every & make(s)) == len(s)
    df = x.overlap()
    assert len(df) == len(parts)**2
    assert df.n_shared.tolist() == [len(a & b) for a in parts for b in parts]


def test_language_neurons_to_df():
    df = language_neurons().to_df()
    assert list(df.columns) == ["model", "lang", "layer", "neuron", "metric", "value", "method"]
    assert df.lang.tolist() == ["en", "en", "de", "de"] and df.neuron.tolist() == [1, 6, 1, 3]
    assert df.value.iloc[[1, 3]].tolist() == [20., 10.] and np.isnan(df.value[0]) and set(df.model) == {"tiny"}
    assert len(LanguageNeurons({"en": make([])}).to_df()) == 0


def test_language_neurons_random_like_streams():
    x = language_neurons()
    r = x.random_like(5)
    assert r.method == "random" and r.parameters["like"] == "lape" and r.score is None and r.provenance == x.provenance
    assert LanguageNeurons({"de": x["de"]}).random_like(5)["de"] == r["de"] != x.random_like(6)["de"]


@settings(fast, max_examples=25)
@given(st.lists(cells, min_size=1, max_size=3))
def test_rucaibox_round_trip(tmp_path_factory, parts):
    x = LanguageNeurons({f"l{k}": make(s) for k, s in enumerate(parts)})
    p = x.to_rucaibox(tmp_path_factory.mktemp("r") / "n.pth")
    raw = torch.load(p, weights_only=True)
    assert [[t.tolist() for t in o] for o in raw] == [[sorted(i for l, i in s if l == k) for k in range(SHAPE[0])] for s in parts]
    assert all(t.dtype == torch.int64 for o in raw for t in o)
    assert LanguageNeurons.from_rucaibox(p, list(x), SHAPE) == x


class Evil:
    def __reduce__(self): return (print, ("code ran",))


def test_rucaibox_refusals(tmp_path, capsys):
    long = lambda *v: torch.tensor(v, dtype=torch.long)
    good = [[long(1), long(), long(6)], [long(), long(), long()]]
    # an empty list becomes float32 in the published code's torch.tensor([]), which must be read too
    torch.save([[torch.tensor([]), *good[0][1:]], good[1]], tmp_path / "f.pth")
    assert list(LanguageNeurons.from_rucaibox(tmp_path / "f.pth", ["en", "zh"], SHAPE)["en"]) == [(2, 6)]
    cases = [(good, ["en"], SHAPE, "holds 2 languages, and 1 names"), (good, ["en", "en"], SHAPE, "one name for each"),
             (good, ["en", "zh"], (4, 7), "has 3 layers, the model 4"), (good, ["en", "zh"], (3, 6), r"'en': neuron \(2, 6\) is outside"),
             ({"en": 1}, ["en"], SHAPE, "not a RUCAIBox"), ([[torch.rand(2)] * 3], ["en"], SHAPE, "not a RUCAIBox"),
             ([[Evil()]], ["en"], SHAPE, "a pickle can run code")]
    for data, langs, shape, says in cases:
        torch.save(data, tmp_path / "x.pth")
        with pytest.raises(ArtifactError, match=says): LanguageNeurons.from_rucaibox(tmp_path / "x.pth", langs, shape)
    (tmp_path / "p.pth").write_bytes(pickle.dumps({"a": Evil()}))
    (tmp_path / "t.pth").write_bytes((tmp_path / "f.pth").read_bytes()[:200])
    for name in ("p", "t"):
        with pytest.raises(ArtifactError, match="not opened"):
            LanguageNeurons.from_rucaibox(tmp_path / f"{name}.pth", ["en"], SHAPE)
    assert "code ran" not in capsys.readouterr().out


def test_language_neurons_figures():
    x = language_neurons()
    assert x.per_layer().groupby("lang", sort=False).n.sum().to_dict() == x.sizes().to_dict() and len(x.per_layer()) == 4 * SHAPE[0]
    assert x.plot().data and x.plot_overlap().data
