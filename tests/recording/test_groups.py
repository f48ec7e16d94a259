"Every group against brute force on Hugging Face's own forward pass: one text at a time, nothing packed, nothing streamed."
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from lens import lens_models

from langneuron_mi.recording.stats import ActivationStats
from langneuron_mi.recording.text_files import text_file
from langneuron_mi.core.atomic import ArtifactError
from langneuron_mi.text.sources import load_corpus
from langneuron_mi.recording.groups import LEVELS, N_BINS, Layer, Seen, _edges, bins, groups, quantiles
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.recording.passes import RecordingError
from langneuron_mi.recording.recorder import Recorder, shards
from langneuron_mi.recording.record import record
from langneuron_mi.testing.tiny import tiny_model
from langneuron_mi.text.windows import pack

TEXTS = {"en": ["the cat sat on the mat", "a dog", "birds fly south in winter because it is cold", "quiet now"]*3,
         "de": ["die Katze saß auf der Matte", "ein Hund", "Vögel fliegen im Winter nach Süden", "still jetzt"]*3}
ARCHS = ["llama", "gemma3", "gpt2", "bloom"]


def truth(hf, tok, texts, arch):
    "[layer][text] -> (activation [token, neuron], post, W_out), by plain hooks on the Hugging Face model, one text with a BOS at a time."
    got, handles = {}, []
    layers = hf.model.layers if hasattr(hf, "model") else hf.transformer.h
    def keep(kind, l, x): got.setdefault((kind, l), []).append(x.reshape(-1, x.shape[-1])[1:].detach())
    for l, layer in enumerate(layers):
        if arch in ("llama", "gemma3"): handles.append(layer.mlp.act_fn.register_forward_hook(lambda m, i, o, l=l: keep("act", l, o)))
        down = {"gpt2": "c_proj", "bloom": "dense_4h_to_h"}.get(arch, "down_proj")
        handles.append(getattr(layer.mlp, down).register_forward_pre_hook(lambda m, i, l=l: keep("post", l, i[0])))
        w = getattr(layer.mlp, down).weight if arch == "gpt2" else getattr(layer.mlp, down).weight.T
        got["w", l] = w.detach()
    with torch.no_grad():
        for t in texts: hf(torch.tensor([[1] + tok(t, add_special_tokens=False).input_ids]))
    for h in handles: h.remove()
    for l in range(len(layers)): got.setdefault(("act", l), got["post", l])
    return got, len(layers)


@pytest.mark.parametrize("arch", ARCHS)
def test_groups_equal_brute_force_on_the_texts_alone(arch):
    for name, hf, tok, model in lens_models(arch):
        stats = record(model, TEXTS, groups="all", layout="texts", texts=5, length=64, batch_size=3, shard_size=2, progress=False)
        w = pack(load_corpus(TEXTS), tok, length=64, seed=0, bos_token_id=1, layout="texts")
        for lang in TEXTS:
            stream, ends = w.streams[lang], np.append(w.starts[lang], w.n_tokens(lang))
            order = [tok.decode(stream[a:b]) for a, b in zip(ends, ends[1:])]
            assert sorted(order) == sorted(TEXTS[lang])
            got, n_layers = truth(hf, tok, order, arch)
            k = stats.langs.index(lang)
            for l in range(n_layers):
                a = torch.cat(got["act", l])
                assert len(a) == stats.n_tokens[lang]
                near = (a.abs() < 1e-6).any(0)  # a sign that the last bit decides
                assert torch.equal((a > 0).sum(0)[~near], stats.count_pos[k, l][~near])
                torch.testing.assert_close(stats.moments["sum"][k, l], a.double().sum(0), rtol=1e-4, atol=1e-3)
                torch.testing.assert_close(stats.quantiles["abs"][k, l], a.double().abs().sum(0), rtol=1e-4, atol=1e-3)
                means = torch.stack([x.mean(0) for x in got["act", l][:5]])
                torch.testing.assert_close(stats.text_means[lang][l], means, rtol=1e-4, atol=1e-4)
                impact = torch.stack([(x.abs().mean(0))*got["w", l].norm(dim=1) for x in got["post", l][:5]])
                torch.testing.assert_close(stats.impact[lang][l], impact, rtol=1e-4, atol=1e-4)
                exact = torch.quantile(a.double(), torch.tensor(LEVELS, dtype=torch.float64), dim=0, interpolation="nearest")
                value = stats.quantiles["quantile"][k, :, l].double()
                assert ((value - exact).abs() <= .125*exact.abs() + 1/64 + .3*(exact.abs() < .1)).float().mean() > .97, name


EDGES = st.sampled_from([0., -0., 1/64, -1/64, 256., 1e30, -1e30, 1e-40])


@given(st.lists(st.one_of(st.floats(-400, 400, width=32), EDGES), min_size=1, max_size=60))
def test_groups_histogram_bins_hold_their_values(xs):
    a, edges = torch.tensor(xs, dtype=torch.float32), _edges()
    at = bins(a).long()
    assert int(at.min()) >= 0 and int(at.max()) < N_BINS
    assert bool(((a.double() >= edges[at]) & (a.double() <= edges[at + 1])).all())
    assert bool((bins(a.sort().values).diff() >= 0).all())


@given(st.integers(0, 10**6), st.integers(1, 200))
def test_groups_quantile_is_in_the_bin_of_the_exact_one_and_counts_are_exact(seed, n):
    a = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))*torch.tensor([.1, 1., 50.])
    state = groups["quantiles"].init(Layer(3))
    for part in a.split(17): groups["quantiles"].update(state, Seen(part))
    assert state["hist"].sum(1).tolist() == [n]*3
    value, above = quantiles(state["hist"])
    edges, ranked = _edges(), a.sort(0).values
    for i, q in enumerate(LEVELS):
        exact = ranked[max(int(np.ceil(q*n - 1e-9)), 1) - 1]  # the smallest value with at least a share q at or below it
        upper = edges[bins(exact).long() + 1]
        at_edge = (value[i] - upper).abs() < 1e-6 + 1e-6*exact.abs()
        assert torch.equal(bins(value[i].clamp(-1e30, 1e30)), bins(exact)) or bool(at_edge.any())
        assert torch.equal(above[i], (a.double() >= upper).sum(0))


@pytest.mark.parametrize("layout", ["packed", "texts"])
def test_groups_do_not_depend_on_batches_and_shards(layout):
    model = load_model(*[tiny_model("llama")[0]], tokenizer=tiny_model("llama")[1])
    how = dict(groups="all", layout=layout, texts=7, length=16, progress=False)
    one, other = (record(model, TEXTS, batch_size=b, shard_size=s, **how) for b, s in ((8, 16), (2, 3)))
    assert torch.equal(one.count_pos, other.count_pos) and torch.equal(one.quantiles["above"], other.quantiles["above"])
    for g in ("text_means", "impact"):
        for lang in TEXTS: torch.testing.assert_close(getattr(one, g)[lang], getattr(other, g)[lang], rtol=1e-5, atol=1e-5)


def test_groups_layout_texts_counts_each_real_token_once():
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    stats = record(model, TEXTS, layout="texts", length=64, progress=False)
    assert stats.n_tokens == {l: sum(len(tok(t, add_special_tokens=False).input_ids) for t in TEXTS[l]) for l in TEXTS}
    cut = record(model, TEXTS, layout="texts", length=6, progress=False)
    assert cut.n_tokens == {l: sum(min(5, len(tok(t, add_special_tokens=False).input_ids)) for t in TEXTS[l]) for l in TEXTS}


def test_groups_resume_to_the_same_bytes(tmp_path, monkeypatch):
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    kw = dict(groups="all", texts=6, length=16, shard_size=2, progress=False, checkpoint_every=0)
    record(model, TEXTS, out=tmp_path/"a", **kw)
    real, calls = Recorder.run, []
    def stop(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt
        return real(self, *args, **kwargs)
    monkeypatch.setattr(Recorder, "run", stop)
    with pytest.raises(KeyboardInterrupt): record(model, TEXTS, out=tmp_path/"b", **kw)
    monkeypatch.setattr(Recorder, "run", real)
    stats = record(model, TEXTS, out=tmp_path/"b", **kw)
    names = sorted(p.name for p in (tmp_path/"a").iterdir())
    assert names == sorted(p.name for p in (tmp_path/"b").iterdir())
    assert any("texts-de" in n for n in names)
    for n in names:
        if n.endswith(".safetensors"): assert (tmp_path/"a"/n).read_bytes() == (tmp_path/"b"/n).read_bytes()
    again = ActivationStats.load(tmp_path/"b"/"stats.safetensors")
    assert all(torch.equal(again.text_means[l], stats.text_means[l]) for l in TEXTS)


def test_groups_text_file_of_another_recording_is_refused(tmp_path):
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    for i in (4, 5): record(model, TEXTS, groups=("counts", "text_means"), texts=i, length=16, out=tmp_path/str(i), progress=False)
    a, b = (text_file(tmp_path/str(i)/"stats.safetensors", "de") for i in (4, 5))
    a.write_bytes(b.read_bytes())
    with pytest.raises(ArtifactError, match="another recording"): ActivationStats.load(tmp_path/"4"/"stats.safetensors")


def test_groups_need_whole_texts():
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    with pytest.raises(RecordingError, match="no whole text"):
        record(model, TEXTS, groups=("counts", "text_means"), tokens=1, progress=False)
    with pytest.warns(UserWarning, match="fewer than texts=100"): record(model, TEXTS, groups=("counts", "impact"), progress=False)
    with pytest.raises(ValueError, match="no group"): record(model, TEXTS, groups=("counts", "means"), progress=False)
    with pytest.raises(ValueError, match="must hold 'counts'"): record(model, TEXTS, groups=("moments",), progress=False)


def test_groups_addition():
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    part = lambda *langs: record(model, {l: TEXTS[l] for l in langs}, groups="all", texts=4, length=16, progress=False)
    both, en, de = part("en", "de"), part("en"), part("de")
    added = en + de
    assert torch.equal(added.quantiles["quantile"], both.quantiles["quantile"])
    assert torch.equal(added.text_means["de"], both.text_means["de"])
    with pytest.raises(ValueError, match="quantiles of one language"): en + en
    picked = both.select(["de"])
    assert picked.langs == ("de",) and torch.equal(picked.count_pos, de.count_pos) and list(picked.impact) == ["de"]


def test_groups_values_over_texts_and_tokens():
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    stats = record(model, TEXTS, groups="all", texts=6, length=16, progress=False)
    t = stats.text_means["de"].double()
    assert torch.equal(stats.value("de", "p_max").values, t.amax(1))
    assert torch.equal(stats.value("de", "p_median").values, t.quantile(.5, 1))
    torch.testing.assert_close(stats.value("de", "p_75").values, torch.from_numpy(np.percentile(t.numpy(), 75, axis=1)))
    assert stats.value("de", "p90").settable and not stats.value("de", "mean_abs").settable
    diff = stats.value("de", "mean") - stats.value("en", "mean")
    assert "−" in diff.name and torch.equal(diff.values, stats.value("de", "mean").values - stats.value("en", "mean").values)
    with pytest.raises(ValueError, match="no statistic"): stats.value("de", "p_101")
    counts = record(model, TEXTS, groups=("counts",), length=16, progress=False)
    for kind in ("mean", "p90", "p_max"):
        with pytest.raises(ValueError, match="needs the group"): counts.value("de", kind)


def test_groups_memory_of_a_hook_does_not_grow_with_text():
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    r = Recorder(view(model), "all", texts=3)
    def size(n):
        windows = pack(load_corpus({"en": TEXTS["en"]*n}), tok, length=16, seed=0, bos_token_id=1)
        return sum(t.numel() for t in r.run(windows, shards(windows, 10**6)[0])[0].values())
    assert size(2) == size(20)
