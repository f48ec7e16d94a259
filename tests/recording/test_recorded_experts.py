"Recordings of mixtures of experts and of other families, against a plain model whose experts and gates are done by hand."
import functools
import itertools

import pytest
import torch
from plain_models import MIXTURES, PARTS, ByHand, Dense, layers_of, truth_of, widths

from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.recording.groups import LEVELS
from langneuron_mi.recording.record import record
from langneuron_mi.recording.stats import ActivationStats
from langneuron_mi.testing.tiny import tiny_model

TEXTS = {"en": ["the quick brown fox", "jumps", "over the lazy dog, and again", "a b c", "no", "what follows is short"],
         "de": ["der schnelle braune Fuchs", "springt", "weit über den faulen Hund", "und", "zurück"]}
LONG = {lang: [" ".join(lines)] for lang, lines in TEXTS.items()} # one text a language: packed windows can be cut by hand
LENGTH = 16 # of a packed window; texts are read whole
IMPLEMENTATIONS = {a: ["eager", "batched_mm", "grouped_mm"] if a in MIXTURES and a != "llama4" else ["eager"] for a in PARTS}


@functools.cache
def loaded(arch, dtype=torch.float32):
    hf, tok = tiny_model(arch)
    return load_model(hf.to(dtype), tokenizer=tok)


@functools.cache
def by_hand(arch, dtype=torch.float32, implementation="eager"):
    hf, tok = tiny_model(arch)
    hf.set_attn_implementation(view(loaded(arch, dtype)).attention) # the bridge's own attention needs it
    hf.config._experts_implementation = implementation
    return ByHand(hf.to(dtype), arch, implementation), tok


def windows(tok, lang, layout):
    "Token ids of a language, a window a row, by hand."
    ids = lambda text: tok(text, add_special_tokens=False).input_ids
    if layout == "texts": return [[1] + ids(text) for text in TEXTS[lang]]
    stream = ids(LONG[lang][0] + "\n")
    return [[1] + stream[i:i + LENGTH - 1] for i in range(0, len(stream), LENGTH - 1)]


@functools.cache
def truth(arch, lang, layout, dtype=torch.float32, implementation="eager", batch_size=1):
    "What the neurons do in each language; windows of equal length in batches."
    hand, tok = by_hand(arch, dtype, implementation)
    rows = [torch.tensor(w) for w in windows(tok, lang, layout)]
    batches = [torch.stack(list(g)[i:i + batch_size]) for _, g in itertools.groupby(rows, len) for g in [list(g)]
               for i in range(0, len(g), batch_size)]
    return truth_of(hand, batches)


def recorded(arch, layout="texts", dtype=torch.float32, implementation="eager", **kwargs):
    model = loaded(arch, dtype)
    view(model).hf.config._experts_implementation = implementation
    texts, length = (TEXTS, 64) if layout == "texts" else (LONG, LENGTH)
    return record(model, texts, layout=layout, length=length, progress=False, **kwargs)


def check_padded(arch, layer, x):
    "Nothing stands behind a layer's own neurons."
    width = widths(arch)[layer]
    assert (x[..., width:] == 0).all() or (x[..., width:] == -torch.inf).all()
    return x[..., :width]


def close(got, want, rtol=1e-5):
    torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=rtol*max(1., float(want.abs().max())))


def check_sums(stats, arch, truths, site="gate", rtol=1e-5):
    "Moments and routing of every neuron are those of the truth."
    for (k, lang), l in itertools.product(enumerate(stats.langs), range(len(PARTS[arch]))):
        a, weight = truths[lang].at(site)[l], truths[lang].weight[l]
        asked = ~a.isnan()
        moments = {name: check_padded(arch, l, stats.moments[name][k, l]) for name in ("sum", "sumsq", "max")}
        close(moments["sum"], a.nansum(0), rtol), close(moments["sumsq"], a.square().nansum(0), rtol)
        close(moments["max"][asked.any(0)], a.nan_to_num(-torch.inf).amax(0)[asked.any(0)], rtol)
        assert torch.equal(stats.given(lang, l)[:a.shape[1]], asked.sum(0)) and not stats.given(lang, l)[a.shape[1]:].any()
        mean = a.nansum(0)/asked.sum(0).clamp_min(1)
        close(stats.value(lang, "mean").values[l, :a.shape[1]], mean, rtol)
        close(stats.value(lang, "rate").values[l, :a.shape[1]], (a > 0).sum(0)/len(a), rtol)
        if weight is None: assert arch not in MIXTURES or not stats.routing["routed"][k, l].any()
        else:
            assert torch.equal(stats.routing["routed"][k, l], (~weight.isnan()).sum(0))
            close(stats.routing["router_weight"][k, l], weight.nansum(0), rtol)
        assert stats.n_tokens[lang] == len(a)


def check_counts(stats, arch, truths, site="gate", rounding=0., few=.05):
    "Counts are exact; with `rounding`, but for activations so near to 0 that it decides, and few neurons have any."
    for (k, lang), l in itertools.product(enumerate(stats.langs), range(len(PARTS[arch]))):
        on, near = truths[lang].at(site)[l] > 0, truths[lang].near(site, l, rounding)
        got = check_padded(arch, l, stats.count_pos[k, l])
        assert ((on & ~near).sum(0) <= got).all() and (got <= (on | near).sum(0)).all() and near.any(0).double().mean() <= few


def truths_of(arch, layout, *args): return {lang: truth(arch, lang, layout, *args) for lang in TEXTS}
def through_bridge(arch): return type(loaded(arch)).__name__ == "TransformerBridge"
CASES = [(a, i) for a in PARTS for i in IMPLEMENTATIONS[a]]
BFLOAT = [(a, i, layout) for a in PARTS for i, layout in zip(IMPLEMENTATIONS[a][::2], ("texts", "packed"))]


@pytest.mark.parametrize("arch, implementation", CASES)
def test_families_by_hand_compute_what_the_model_computes(arch, implementation):
    ids = torch.arange(2*9).view(2, 9) + 5
    fed = dict(decoder_input_ids=torch.cat([torch.zeros(2, 1, dtype=int), ids], 1)) if arch == "mt5" else {}
    for dtype in (torch.float32, torch.bfloat16):
        hand, hf = by_hand(arch, dtype, implementation)[0], tiny_model(arch)[0].to(dtype)
        hf.set_attn_implementation(hand.hf.config._attn_implementation)
        hf.config._experts_implementation = implementation
        assert all(m.config is hf.config for m in hf.modules() if hasattr(m, "has_gate")) # so that this is what they run
        with torch.no_grad(): want = hf(input_ids=ids, use_cache=False, **fed).logits[:, -9:]
        assert torch.equal(hand.run(ids), want)


@pytest.mark.parametrize("arch, implementation", CASES)
def test_families_packed_recording_equals_brute_force(arch, implementation):
    batch_size = 1 if implementation == "batched_mm" else 4
    truths = truths_of(arch, "packed", torch.float32, implementation, batch_size)
    stats = recorded(arch, "packed", implementation=implementation, batch_size=batch_size)
    assert list(stats.layout.widths) == widths(arch) and [len(p) for p in stats.layout.layers] == [len(p) for p in PARTS[arch]]
    check_counts(stats, arch, truths, rounding=1e-5 if through_bridge(arch) else 0.)
    check_sums(stats, arch, truths)


@pytest.mark.parametrize("arch, implementation", CASES)
def test_families_texts_with_right_pads_equal_every_text_alone(arch, implementation):
    truths = truths_of(arch, "texts")
    stats = recorded(arch, "texts", implementation=implementation, batch_size=4)
    check_counts(stats, arch, truths, rounding=1e-5)
    check_sums(stats, arch, truths)


@pytest.mark.parametrize("arch, implementation, layout", BFLOAT)
def test_families_bfloat16_recording_equals_brute_force(arch, implementation, layout):
    truths = truths_of(arch, layout, torch.bfloat16, implementation)
    stats = recorded(arch, layout, torch.bfloat16, implementation, batch_size=1)
    if through_bridge(arch): check_counts(stats, arch, truths, rounding=.05, few=1.) # it rounds otherwise
    else:
        check_counts(stats, arch, truths)
        check_sums(stats, arch, truths)


@pytest.mark.parametrize("arch", ["qwen2_moe", "gpt_oss", "deepseek_v3", "llama4", "gemma4_moe", "granite_hybrid", "mt5"])
def test_families_post_site_equals_brute_force(arch):
    truths = truths_of(arch, "texts")
    stats = recorded(arch, "texts", batch_size=1, site="post")
    check_counts(stats, arch, truths, "post")
    check_sums(stats, arch, truths, "post")


@pytest.mark.parametrize("arch", ["qwen2_moe", "gpt_oss", "deepseek_v3", "llama4", "gemma4_moe", "mt5"])
def test_families_quantiles_and_text_statistics_equal_brute_force(arch):
    stats = recorded(arch, "texts", batch_size=4, groups="all", texts=3)
    hand, tok = by_hand(arch)
    order = {lang: texts_in_order(lang)[:3] for lang in TEXTS}
    for k, lang in enumerate(stats.langs):
        each = [truth_of(hand, [torch.tensor([[1] + tok(t, add_special_tokens=False).input_ids])]) for t in order[lang]]
        for l, whole in enumerate(truth(arch, lang, "texts").a):
            n = widths(arch)[l]
            close(stats.quantiles["abs"][k, l, :n], whole.abs().nansum(0))
            close(stats.text_means[lang][l, :, :n], torch.stack([t.a[l].nansum(0)/len(t.a[l]) for t in each]))
            norm = torch.cat([written(hand, l, p) for p in PARTS[arch][l]]).norm(dim=1).double()
            close(stats.impact[lang][l, :, :n], torch.stack([t.post[l].abs().nansum(0)/len(t.post[l]) for t in each])*norm)
            assert not stats.text_means[lang][l, :, n:].any() and not stats.impact[lang][l, :, n:].any()
            for level, q in enumerate(LEVELS): # within the bin that holds the quantile: an eighth of an octave, 1/64 around 0
                got, above = stats.quantiles["quantile"][k, level, l, :n], stats.quantiles["above"][k, level, l, :n]
                rows = whole.sort(0).values # nan comes last
                asked = (~whole.isnan()).sum(0)
                want = rows.gather(0, ((q*asked).ceil().long() - 1).clamp_min(0)[None])[0]
                assert (got - want)[asked > 0].abs().le(.13*want[asked > 0].abs() + 1/32).all() and not got[asked == 0].any()
                assert (above <= (1 - q)*asked + 1e-9).all() and (above >= (whole > want + .14*want.abs() + 1/32).sum(0)).all()
            assert not stats.quantiles["above"][k, :, l, n:].any() and not stats.quantiles["quantile"][k, :, l, n:].any()


def texts_in_order(lang):
    "The order in which texts are read, which the first texts are taken of."
    from langneuron_mi.text.sources import load_corpus
    from langneuron_mi.text.windows import _in_order
    return list(_in_order(load_corpus(TEXTS), lang, 0))


def written(hand, layer, p): # [neuron, d_model]
    "What each neuron of a part writes."
    at = layers_of(hand.hf, hand.arch)[layer].get_submodule(p.path)
    if isinstance(p, Dense): return at.get_submodule(p.names[2]).weight.detach().T
    w = at.down_proj.detach()
    return (w if hand.arch in ("gpt_oss", "llama4") else w.transpose(1, 2)).flatten(0, 1)


@pytest.fixture(scope="module")
def halves():
    "Recordings of two halves of the texts, and the truth of each."
    first, last = {l: t[:3] for l, t in TEXTS.items()}, {l: t[3:] for l, t in TEXTS.items()}
    model = loaded("deepseek_v3")
    return [record(model, x, layout="texts", length=64, progress=False) for x in (first, last)], first, last


def test_experts_routing_survives_merging_and_select(halves):
    (a, b), *_ = halves
    truths = truths_of("deepseek_v3", "texts")
    check_sums(a + b, "deepseek_v3", truths), check_counts(a + b, "deepseek_v3", truths, rounding=1e-5)
    assert (a + b).layout == a.layout
    one = a.select(["de"]) + b.select(["en"])
    assert one.langs == ("de", "en") and torch.equal(one.routing["routed"][0], a.routing["routed"][1])
    for name in ("routed", "router_weight"):
        assert torch.equal(one.routing[name][1], b.routing[name][0])
        assert torch.equal(a.select(["de", "en"]).routing[name], a.routing[name].flip(0))
    again = one + a.select(["en"]) + b.select(["de"])
    check_sums(again.select(["en", "de"]), "deepseek_v3", truths)


def test_experts_routing_survives_saving(halves, tmp_path):
    (a, _), *_ = halves
    again = ActivationStats.load(a.save(tmp_path/"stats.safetensors"))
    assert again.layout == a.layout and all(torch.equal(again.routing[k], a.routing[k]) for k in a.routing)
    assert all(torch.equal(again.given(lang, l), a.given(lang, l)) for lang in a.langs for l in range(2))


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_experts_recording_that_was_interrupted_goes_on(stop, tmp_path, monkeypatch):
    model, options = loaded("qwen2_moe"), dict(layout="texts", length=64, batch_size=2, shard_size=2, checkpoint_every=0., progress=False)
    want = record(model, TEXTS, **options)
    from langneuron_mi.recording import recorder
    run, calls = recorder.Recorder.run, []
    def stopped(self, *args):
        calls.append(1)
        if len(calls) == stop: raise KeyboardInterrupt
        return run(self, *args)
    with monkeypatch.context() as m:
        m.setattr(recorder.Recorder, "run", stopped)
        with pytest.raises(KeyboardInterrupt, match="recording stopped"): record(model, TEXTS, out=tmp_path, **options)
    got = record(model, TEXTS, out=tmp_path, **options)
    a, b = got._tensors(), want._tensors()
    assert a.keys() == b.keys() >= {"routed", "router_weight"} and all(torch.equal(a[k], b[k]) for k in a)
    check_sums(got, "qwen2_moe", truths_of("qwen2_moe", "texts"))


def test_experts_without_a_gate_and_layers_without_neurons_are_counted_by_hand():
    hf, tok = tiny_model("nemotron_h")
    v, seen, want = view(load_model(hf, tokenizer=tok)), [], torch.zeros(4, 24, dtype=torch.int64)
    experts = v.points(3, "experts").module
    handle = experts.register_forward_pre_hook(lambda m, args: seen.append((args[0].clone(), args[1].clone())))
    texts = {"en": ["the quick brown fox jumps", "over the lazy dog"]*4}
    stats = record(v.model, texts, length=16, tokens=60, groups="counts", batch_size=3, progress=False)
    handle.remove()
    for x, index in seen:
        text = torch.arange(len(x)) % 16 != 0 # four whole windows, each behind its BOS
        for e in range(4): want[e] += (x[(index == e).any(1) & text] @ experts.up_proj[e].T > 0).sum(0)
    assert sum(len(x) for x, _ in seen) == 4*16 and stats.n_tokens == {"en": 60}
    assert stats.layout.widths == (0, 64, 0, 136) and not stats.count_pos[0, [0, 2]].any()
    assert torch.equal(stats.count_pos[0, 3, :96].view(4, 24), want) and want.any()
