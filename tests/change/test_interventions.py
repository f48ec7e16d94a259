"Interventions: equal to the same edit made by a plain PyTorch hook on the Hugging Face model."
from contextlib import contextmanager

import pytest
import torch
from lens import lens_models

from langneuron_mi.change.interventions import Intervention, ablate, add, amplify, set_to
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.recording.stats import SiteValue
from langneuron_mi.recording.record import record
from langneuron_mi.testing.tiny import tiny_model

ARCHS = ["llama", "mistral", "qwen2", "gemma2", "gemma3", "bloom", "gpt2"]


def mlps(hf):
    base = hf.base_model
    return [layer.mlp for layer in (base.h if hasattr(base, "h") else base.layers)]


@contextmanager
def plain_edit(hf, fn):
    "Edit `a`, the output of act_fn (the product's first factor), by fn(layer, a), with PyTorch hooks on the Hugging Face modules."
    handles, kept = [], {}
    for l, mlp in enumerate(mlps(hf)):
        if hasattr(mlp, "gate_proj"):
            def gate(mod, inp, out, l=l): kept["gate", l] = out
            def up(mod, inp, out, l=l): kept["up", l] = out
            def down(mod, inp, l=l, mlp=mlp): return (fn(l, mlp.act_fn(kept["gate", l]).clone()) * kept["up", l],)
            handles += [mlp.gate_proj.register_forward_hook(gate), mlp.up_proj.register_forward_hook(up)]
            handles += [mlp.down_proj.register_forward_pre_hook(down)]
        else:
            proj = mlp.dense_4h_to_h if hasattr(mlp, "dense_4h_to_h") else mlp.c_proj
            handles.append(proj.register_forward_pre_hook(lambda mod, inp, l=l: (fn(l, inp[0].clone()),)))
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def cases(shape):
    g = torch.Generator().manual_seed(0)
    pairs = [(l, int(i)) for l in range(shape[0]) for i in torch.randperm(shape[1], generator=g)[:9]]
    s = NeuronSet(pairs, shape=shape)
    t = NeuronSet([p for p in pairs if p[1] % 2] or pairs[:3], shape=shape)
    per = torch.linspace(-1, 2, len(s))
    table = torch.zeros(shape, dtype=torch.float64)
    table[s.mask()] = per.double()
    def on(op):
        def edit(l, a):
            idx = s.neurons_in(l)
            a[..., idx] = op(a[..., idx], table[l, idx].to(a.dtype))
            return a
        return edit
    def combined(l, a):
        i, j = s.neurons_in(l), t.neurons_in(l)
        a[..., i] = 0
        a[..., j] = a[..., j] + 0.7
        a[..., j] = a[..., j] * 3
        return a
    return {
        "ablate": (ablate(s), on(lambda a, v: a * 0)),
        "scale": (amplify(s, by=2.5), on(lambda a, v: a * 2.5)),
        "set number": (set_to(s, .4), on(lambda a, v: torch.full_like(a, .4))),
        "set per neuron": (amplify(s, to=SiteValue(table, "gate")), on(lambda a, v: v.expand_as(a).clone())),
        "add": (add(s, per, scale=.5), on(lambda a, v: a + v * .5)),
        "composition": (ablate(s) + add(t, .7) + amplify(t, by=3), combined),
    }


CASES = ["ablate", "scale", "set number", "set per neuron", "add", "composition"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", ARCHS)
def test_interventions_logits_equal_a_plain_hook(arch, case):
    ids = torch.randint(5, 40, (4, 7), generator=torch.Generator().manual_seed(1))
    for name, hf, tok, model in lens_models(arch):
        v = view(model)
        intervention, edit = cases(v.shape)[case]
        clean = v.logits(ids).detach().clone()
        with plain_edit(hf, edit):
            want = hf(ids).logits.detach()
        with intervention.on(model):
            got = v.logits(ids).detach()
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        assert all((got[r] - clean[r]).abs().max() > 1e-3 for r in range(4)), "every row is edited (methods 9.4)"
        assert torch.equal(v.logits(ids), clean), "nothing is left behind"


@pytest.mark.parametrize("case", ["ablate", "set number", "composition"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3", "bloom", "gpt2"])
def test_interventions_generation_equals_a_plain_hook(arch, case):
    "Greedy generation: with and without KV cache, single and batched, left- and right-padded."
    prompts = ["abc de", "f", "ghij klm nop"]
    for name, hf, tok, model in lens_models(arch):
        v = view(model)
        intervention, edit = cases(v.shape)[case]
        rows = [tok(p).input_ids for p in prompts]
        with plain_edit(hf, edit):
            alone = [hf.generate(torch.tensor([r]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(r):] for r in rows]
            want = [tok.decode(ids, skip_special_tokens=True) for ids in alone]
        with intervention.on(model):
            for use_cache in (True, False):
                assert v.generate(prompts, 6, use_cache=use_cache) == want, (name, use_cache)
                assert [v.generate([p], 6, use_cache=use_cache)[0] for p in prompts] == want, (name, use_cache)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_interventions_padding_side_does_not_matter(arch, side):
    for name, hf, tok, model in lens_models(arch):
        v = view(model)
        intervention, _ = cases(v.shape)["composition"]
        row, pads = [1, 8, 9, 10, 11], [0, 0, 0]
        ids = torch.tensor([pads + row if side == "left" else row + pads])
        mask = torch.tensor([[0] * 3 + [1] * 5 if side == "left" else [1] * 5 + [0] * 3])
        where = slice(3, None) if side == "left" else slice(0, 5)
        with intervention.on(model):
            alone = v.logits(torch.tensor([row]))[0]
            padded = v.logits(ids, attention_mask=mask)[0, where]
        torch.testing.assert_close(padded, alone, atol=1e-4, rtol=1e-4)


def test_interventions_without_effect_leave_the_same_bits():
    hf, tok = tiny_model("gemma2")
    model = load_model(hf, tokenizer=tok)
    v, ids = view(model), torch.tensor([[5, 6, 7, 8]])
    clean = v.logits(ids)
    s = NeuronSet([(0, 1), (1, 2)], shape=v.shape)
    for i in (amplify(s, by=1.), add(s, 0.), ablate(NeuronSet([], shape=v.shape)), Intervention()):
        assert i.fwd_hooks(model) == []
        with i.on(model):
            assert torch.equal(v.logits(ids), clean)


def test_interventions_fwd_hooks_mix_with_transformer_lens():
    for _, hf, tok, model in lens_models("llama"):
        v, ids = view(model), torch.tensor([[5, 6, 7, 8]])
        s = NeuronSet([(0, 1), (1, 2)], shape=v.shape)
        i = set_to(s, 1.5)
        with i.on(model):
            want = v.logits(ids)
        seen = []
        mine = [("blocks.1.mlp.hook_post", lambda act, hook: seen.append(act.shape))]
        got = model.run_with_hooks(ids, fwd_hooks=i.fwd_hooks(model) + mine)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert seen


def test_interventions_hooks_gone_after_an_error():
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    v, ids = view(model), torch.tensor([[5, 6, 7]])
    clean = v.logits(ids)
    with pytest.raises(RuntimeError, match="mine"):
        with ablate(NeuronSet([(0, 1)], shape=v.shape)).on(model):
            raise RuntimeError("mine")
    assert torch.equal(v.logits(ids), clean)


def test_interventions_nested_contexts_apply_both():
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    v, ids = view(model), torch.tensor([[5, 6, 7]])
    a, b = NeuronSet([(0, 1)], shape=v.shape), NeuronSet([(0, 2), (1, 4)], shape=v.shape)
    with (set_to(a, 1.) + amplify(b, by=3)).on(model):
        want = v.logits(ids)
    with set_to(a, 1.).on(model), amplify(b, by=3).on(model):
        torch.testing.assert_close(v.logits(ids), want)


def test_interventions_refuse_what_does_not_belong():
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    v = view(model)
    s = NeuronSet([(0, 1)], shape=v.shape, model=v.fingerprint)
    other = load_model(tiny_model("llama", seed=3)[0], tokenizer=tok)
    with pytest.raises(ValueError, match="fingerprint"):
        ablate(s).on(other).__enter__()
    with ablate(s.assume(view(other).fingerprint)).on(other):
        pass
    texts = {"en": ["a b c d"], "de": ["e f g h"]}
    with pytest.raises(ValueError, match="site 'post'"):
        amplify(s, to=record(model, texts, site="post", progress=False).value("de", "mean"))
    with pytest.raises(ValueError, match="belongs to model"):
        amplify(s, to=record(other, texts, progress=False).value("de", "mean"))
    for bad in (lambda: amplify(s), lambda: amplify(s, by=2, to=1), lambda: set_to(s, float("nan")), lambda: add(s, [1., 2.])):
        with pytest.raises(ValueError):
            bad()


def test_interventions_that_are_on_are_never_measured_as_the_untouched_model():
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    s = NeuronSet([(0, 1), (1, 2)], shape=view(model).shape)
    texts = {"en": ["a b c d e f"] * 9}
    from langneuron_mi.measure.perplexity import perplexity_matrix
    with ablate(s).on(model):
        for measure in (lambda: record(model, texts, progress=False),
                        lambda: perplexity_matrix(model, texts, tokens=20, length=16, progress=False)):
            with pytest.raises(ValueError, match="an intervention is on .ablate 2"):
                measure()
    record(model, texts, progress=False)


def test_interventions_given_the_wrong_thing_say_what_is_wanted():
    hf, tok = tiny_model("llama")
    stats = record(load_model(hf, tokenizer=tok), {"en": ["a b c d"], "de": ["e f g h"]}, progress=False)
    s = NeuronSet([(0, 1)], shape=(2, 64))
    for bad, words in [(lambda: ablate({"de": s}), "one language's neurons"), (lambda: amplify([(0, 1)], by=2), "NeuronSet"),
                       (lambda: amplify(s, to="mean"), "stats.value"),
                       (lambda: ablate(s).__enter__(), "on.model")]:
        with pytest.raises(TypeError, match=words):
            bad()
    with pytest.raises(ValueError, match="not an activation"):
        amplify(s, to=stats.value("de", "rate"))


def test_interventions_of_two_sites_are_refused():
    a, b = (NeuronSet([(0, 1)], shape=(2, 64), site=s) for s in ("gate", "post"))
    with pytest.raises(ValueError, match="gate and post"):
        set_to(a, 1.) + set_to(b, 1.)


def test_interventions_in_bf16_edit_at_the_models_dtype():
    hf, tok = tiny_model("llama")
    model = load_model(hf.to(torch.bfloat16), tokenizer=tok)
    v = view(model)
    s = NeuronSet([(0, 1), (1, 2)], shape=v.shape)
    kept = []
    with set_to(s, .5).on(model), v.hooks([(0, "post", lambda x: kept.append(x))]):
        v.logits(torch.tensor([[5, 6]]))
    assert kept[0].dtype == torch.bfloat16
