"Interventions on the neurons and routers of mixtures and other families, against the same change written into the model by hand."
import functools

import pytest
import torch
from plain_models import MIXTURES, PARTS, ByHand, Change, Mixture, truth_of, widths

from langneuron_mi.change.interventions import ablate, add, amplify, set_to
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.recording.record import record
from langneuron_mi.testing.tiny import tiny_model

IMPLEMENTATIONS = {a: ["eager", "batched_mm", "grouped_mm"] if a in MIXTURES and a != "llama4" else ["eager"] for a in PARTS}
CASES = [(a, i) for a in PARTS for i in IMPLEMENTATIONS[a]]
PROMPTS = ["the quick", "a", "über den Zaun, weit"]
TEXTS = {"en": ["the quick brown fox", "jumps"], "de": ["der Fuchs", "springt weit"]}
SIZES = {"deepseek_v3": dict(num_local_experts=8, n_routed_experts=8, n_group=2, topk_group=1)} # 4 experts in each of 2 groups


@functools.cache
def loaded(arch, dtype=torch.float32):
    "A model of the package, and the same by hand."
    hf, tok = (tiny_model(arch)[0] for _ in range(2)), tiny_model(arch)[1]
    theirs, plain = (x.to(dtype) for x in hf)
    v = view(load_model(theirs, tokenizer=tok))
    plain.set_attn_implementation(v.attention)
    return v, ByHand(plain, arch), tok


def some(arch, number, n=5):
    "Neurons of every part of every layer, other ones for every number."
    g, out = torch.Generator().manual_seed(number), {}
    for l, parts in enumerate(PARTS[arch]):
        start, mine = 0, []
        for p in parts:
            mine.append(start + torch.randperm(p.size, generator=g)[:n*(3 if isinstance(p, Mixture) else 1)])
            start += p.size
        out[l] = torch.cat(mine).sort().values
    return out


def pairs(neurons): return [(l, int(i)) for l, which in neurons.items() for i in which]


def edits(arch, v, site="gate", values=None):
    "One of each kind on neurons of all parts at once, and the same by hand."
    sets = [some(arch, k) for k in range(4)]
    a, b, c, d = (NeuronSet(pairs(s), v.layout, site) for s in sets)
    value = 1.5 if values is None else values[0]
    did = ablate(a) + set_to(b, value) + amplify(c, by=-2.5) + add(d, 0.7)

    def full(s, x):
        return {l: (which, torch.full((len(which),), x) if isinstance(x, float) else x[l][which]) for l, which in s.items()}

    by_hand = [
        ("times", sets[0], 0.0),
        ("set", sets[1], 1.5 if values is None else values[1]),
        ("times", sets[2], -2.5),
        ("plus", sets[3], 0.7),
    ]
    return did, [Change(op, full(s, x), site) for op, s, x in by_hand]


def rows_of(v, prompts=PROMPTS): return [ids[m.bool()] for ids, m in zip(*v.encode(prompts))]


def changed(hand, changes, prompt):
    "Logits of a prompt, alone and changed by hand."
    hand.changes[:] = changes
    try: return hand.run(prompt[None])[0]
    finally: hand.changes[:] = []


def check_logits(v, hand, did, changes, tol=1e-5):
    "A padded batch under the intervention equals every prompt alone in the model changed by hand, and is not what it was."
    ids, mask = v.encode(PROMPTS)
    with did.on(v.model), torch.no_grad(): got = v.logits(ids, mask)
    far = 0.
    for row, m, prompt in zip(got, mask.bool(), rows_of(v)):
        want = changed(hand, changes, prompt)
        torch.testing.assert_close(row[m].float(), want.float(), rtol=tol, atol=tol*float(want.abs().max()))
        far = max(far, float((changed(hand, [], prompt) - want).abs().max()/want.abs().max()))
    assert far > 30*tol


def check_texts(v, hand, tok, did, changes_of, use_cache=True, n=4):
    "Texts under the intervention are those of a greedy loop over the model changed by hand."
    with did.on(v.model): got = v.generate(PROMPTS, n, use_cache=use_cache)
    want = []
    for prompt in rows_of(v):
        hand.changes[:] = changes_of(len(prompt))
        want.append(tok.decode(hand.greedy(prompt, n), skip_special_tokens=True))
    hand.changes[:] = []
    assert got == want


def placed(arch, where, prompt):
    "Which positions of a prompt of so many tokens, by layer; an encoder has the prompt, a decoder its start token."
    def at(layer, position):
        if arch == "mt5" and layer < 2: return torch.full_like(position, where == "prompt", dtype=torch.bool)
        n = 1 if arch == "mt5" else prompt
        return dict(prompt=position < n, generated=position >= n, last=position >= n - 1)[where]
    return at


@pytest.mark.parametrize("arch, implementation", CASES)
def test_families_edits_equal_hand_written_ones(arch, implementation):
    v, hand, _ = loaded(arch)
    v.hf.config._experts_implementation = implementation
    check_logits(v, hand, *edits(arch, v))


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss", "deepseek_v3", "llama4", "gemma4_moe", "granite_hybrid", "opt", "mt5", "phi3"])
def test_families_edits_at_the_post_site_equal_hand_written_ones(arch):
    v, hand, _ = loaded(arch)
    check_logits(v, hand, *edits(arch, v, "post"))


@pytest.mark.parametrize("arch", ["qwen2_moe", "gpt_oss", "deepseek_v3", "llama4", "gemma4_moe", "mt5"])
def test_families_set_to_a_recorded_mean_equals_the_mean_by_hand(arch):
    v, hand, tok = loaded(arch)
    stats = record(v.model, TEXTS, layout="texts", progress=False)
    truth = truth_of(hand, [torch.tensor([[1] + tok(t, add_special_tokens=False).input_ids]) for t in TEXTS["de"]])
    means = [a.nansum(0)/(~a.isnan()).sum(0).clamp_min(1) for a in truth.a]
    check_logits(v, hand, *edits(arch, v, values=(stats.value("de", "mean"), means)))


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss", "deepseek_v3", "llama4", "gemma4_moe", "qwen3_5", "mt5"])
def test_families_edits_in_bfloat16_equal_hand_written_ones(arch):
    v, hand, _ = loaded(arch, torch.bfloat16)
    v.hf.config._experts_implementation = "eager"
    did, changes = edits(arch, v)
    a, b, c = (NeuronSet(pairs(some(arch, k)), v.layout) for k in range(3))
    exact = ablate(a) + set_to(b, 1.) + amplify(c, by=-2.) # what no rounding touches: the same bits
    of_exact = [Change(o.op, {l: (w, torch.full_like(x, value)) for l, (w, x) in o.at.items()}) for o, value in zip(changes, (0., 1., -2.))]
    for prompt in rows_of(v): # no pads, which round otherwise
        with exact.on(v.model), torch.no_grad(): assert torch.equal(v.logits(prompt[None])[0], changed(hand, of_exact, prompt))
        with did.on(v.model), torch.no_grad(): got = v.logits(prompt[None])[0].float()
        want = changed(hand, changes, prompt).float()
        off = (got - want).abs().amax(-1)/want.abs().max()
        assert off.median() < 2e-2 and off.max() < .2 # rounding may have changed the choice of an expert


@pytest.mark.parametrize("arch", PARTS)
def test_families_generation_equals_a_hand_written_loop(arch):
    v, hand, tok = loaded(arch)
    did, changes = edits(arch, v)
    for use_cache in (True, False): check_texts(v, hand, tok, did, lambda n: changes, use_cache)


@pytest.mark.parametrize("where", ["prompt", "generated", "last"])
@pytest.mark.parametrize("arch", ["qwen2_moe", "deepseek_v3", "llama4", "gemma4_moe", "opt", "xglm", "lfm2", "qwen3_5", "mt5"])
def test_families_positions_equal_hand_written_ones(arch, where):
    v, hand, tok = loaded(arch)
    did, changes = edits(arch, v)
    def placed_changes(n): return [Change(c.op, c.at, c.site, placed(arch, where, n)) for c in changes]
    check_texts(v, hand, tok, did.where(where), placed_changes)
    ids, mask = v.encode(PROMPTS) # all of it is prompt
    with did.where(where).on(v.model), torch.no_grad(): got = v.logits(ids, mask)
    for row, m, prompt in zip(got, mask.bool(), rows_of(v)):
        last = len(prompt) - (arch != "mt5") # behind the start token of a decoder
        at = lambda layer, p: dict(prompt=p >= 0, generated=p < 0, last=p >= last if arch != "mt5" or layer >= 2 else p < 0)[where]
        want = changed(hand, [Change(c.op, c.at, c.site, at) for c in changes], prompt)
        torch.testing.assert_close(row[m], want, rtol=1e-5, atol=1e-5*float(want.abs().max()))
        with did.where(where).on(v.model), torch.no_grad(): alone = v.logits(prompt[None])[0]
        torch.testing.assert_close(alone, want, rtol=1e-5, atol=1e-5*float(want.abs().max()))


@pytest.mark.parametrize("arch", ["qwen2_moe", "mt5"])
def test_families_positions_hold_in_the_models_own_generate(arch):
    v, hand, tok = loaded(arch)
    did, changes = edits(arch, v)
    for where in ("prompt", "generated", "last"):
        for prompt in rows_of(v):
            hand.changes[:] = [Change(c.op, c.at, c.site, placed(arch, where, len(prompt))) for c in changes]
            want = hand.greedy(prompt, 4)
            hand.changes[:] = []
            with did.where(where).on(v.model): got = v.hf.generate(prompt[None], max_new_tokens=4, do_sample=False)[0]
            assert torch.equal(got[1 if arch == "mt5" else len(prompt):], want)


# Experts as wholes

def off_in(arch, l): return torch.tensor([(2*l + 1) % 4, (2*l + 2) % 4]) # two of four
def mixtures_in(arch): return [l for l, parts in enumerate(PARTS[arch]) if any(isinstance(p, Mixture) for p in parts)]


def experts_off(arch, v, which):
    "Some experts off in every layer that has any, and the same by hand."
    at = {l: which(arch, l) for l in mixtures_in(arch)}
    return ablate(NeuronSet(pairs(at), v.layout.experts, "router")), [
        Change("off", {l: (w, torch.zeros(len(w))) for l, w in at.items()}, "router")
    ]


def favoured(arch, v, value):
    "A number added to the logits of experts, and the same by hand."
    at = {l: torch.tensor([0, 3]) for l in mixtures_in(arch)}
    return (add(NeuronSet(pairs(at), v.layout.experts, "router"), value),
            [Change("plus", {l: (w, torch.full((len(w),), value)) for l, w in at.items()}, "router")])


@pytest.mark.parametrize("arch, implementation", [(a, i) for a, i in CASES if a in MIXTURES])
def test_experts_off_equal_a_router_that_has_none_of_them(arch, implementation):
    v, hand, _ = loaded(arch)
    v.hf.config._experts_implementation = implementation
    check_logits(v, hand, *experts_off(arch, v, lambda a, l: off_in(a, l)[:1]))
    check_logits(v, hand, *experts_off(arch, v, off_in))


@pytest.mark.parametrize("arch", MIXTURES)
def test_experts_favoured_equal_a_bias_on_their_logits(arch):
    v, hand, tok = loaded(arch)
    for value in (2., -1.5): check_logits(v, hand, *favoured(arch, v, value))
    (a, more), (b, other) = favoured(arch, v, 1.), edits(arch, v) # neurons and experts in one intervention
    check_logits(v, hand, a + b, more + other)


@pytest.mark.parametrize("arch", MIXTURES)
def test_experts_off_generate_as_by_hand(arch):
    v, hand, tok = loaded(arch)
    did, changes = experts_off(arch, v, off_in)
    check_texts(v, hand, tok, did, lambda n: changes)
    did, changes = favoured(arch, v, 3.)
    for where in ("prompt", "generated", "last"):
        check_texts(v, hand, tok, did.where(where), lambda n: [Change(c.op, c.at, c.site, placed(arch, where, n)) for c in changes])


@pytest.fixture(
    scope="module", params=[dict(n_group=1, topk_group=1), dict(n_group=2, topk_group=1), dict(n_group=2, topk_group=2)], ids=str
)
def corrected(request):
    "DeepSeek-V3 with eight experts in groups, and corrections that decide a lot."
    both = [tiny_model("deepseek_v3", num_local_experts=8, n_routed_experts=8, **request.param) for _ in range(2)]
    for hf, _ in both: hf.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.tensor([.5, -.4, .3, 0., -.2, .6, .1, -.1]))
    return view(load_model(both[0][0], tokenizer=both[0][1])), ByHand(both[1][0], "deepseek_v3", parts=WIDE), both[0][1]


WIDE = [PARTS["deepseek_v3"][0], [Mixture("mlp.experts", "mlp.gate", count=8), PARTS["deepseek_v3"][1][1]]]


def test_experts_off_with_corrections_equal_a_router_that_has_none_of_them(corrected):
    v, hand, tok = corrected
    correction = v.hf.model.layers[1].mlp.gate.e_score_correction_bias
    before, one = correction.clone(), torch.tensor([0, 5, 2])
    off = NeuronSet([(1, int(e)) for e in one], v.layout.experts, "router")
    changes = [Change("off", {1: (one, torch.zeros(3))}, "router")]
    check_logits(v, hand, ablate(off), changes)
    check_texts(v, hand, tok, ablate(off), lambda n: changes)
    assert torch.equal(correction, before)
    for value in (2., -2.): # the correction stays, behind the bias
        check_logits(v, hand, add(off, value), [Change("plus", {1: (one, torch.full((3,), value))}, "router")])
    assert torch.equal(correction, before)
    with pytest.raises(RuntimeError, match="in the middle"), ablate(off).on(v.model): raise RuntimeError("in the middle")
    assert torch.equal(correction, before)
    two = NeuronSet([(1, 5), (1, 7)], v.layout.experts, "router")
    with ablate(off).on(v.model):
        within = correction.clone()
        with ablate(two).on(v.model): pass
        assert torch.equal(correction, within)
    assert torch.equal(correction, before)
    with pytest.raises(ValueError, match="only be off for all tokens"), ablate(off).where("prompt").on(v.model): pass
    assert torch.equal(correction, before)


def test_experts_off_in_groups_leave_enough_where_a_token_may_choose(corrected):
    v, hand, _ = corrected # experts 0 to 3 and 4 to 7 are the groups, where there are two
    router = v.hf.model.layers[1].mlp.gate
    def off(*experts): return (ablate(NeuronSet([(1, e) for e in experts], v.layout.experts, "router")),
                               [Change("off", {1: (torch.tensor(experts), torch.zeros(len(experts)))}, "router")])
    check_logits(v, hand, *off(0, 1, 2, 3)), check_logits(v, hand, *off(4, 5, 6, 7)) # a whole group
    check_logits(v, hand, *off(0, 1, 4, 5))
    if router.topk_group < router.num_group:  # one group is chosen, and none has two
        with (
            pytest.raises(ValueError, match="leaves 1 experts in layer 1, and every token there goes to 2"),
            off(0, 1, 2, 4, 5, 6)[0].on(v.model),
        ):
            pass
    else:
        check_logits(v, hand, *off(0, 1, 2, 4, 5, 6))
    assert router.e_score_correction_bias.isfinite().all()


@pytest.mark.parametrize("arch", MIXTURES)
def test_experts_too_many_off_and_what_no_router_can_do_are_refused(arch):
    v, hand, _ = loaded(arch)
    l = mixtures_in(arch)[-1]
    k = 1 if arch == "llama4" else 2
    def chosen(*experts): return NeuronSet([(l, e) for e in experts], v.layout.experts, "router")
    want = v.logits(torch.arange(5, 12)[None])
    with ablate(chosen(*range(4 - k))).on(v.model): pass # the last that can be
    for did in (ablate(chosen(*range(5 - k))), ablate(chosen(*range(4 - k))) + ablate(chosen(4 - k))):
        with pytest.raises(ValueError, match=f"leaves {k - 1} experts in layer {l}, and every token there goes to {k}"), did.on(v.model):
            pass
    for did in (set_to(chosen(0), 1.0), amplify(chosen(0), by=2), amplify(chosen(0), to=0.5)):
        with pytest.raises(ValueError, match="switched off .ablate. or favoured by a number on its logit .add."), did.on(v.model):
            pass
    assert torch.equal(v.logits(torch.arange(5, 12)[None]), want)


def test_experts_off_at_different_positions_are_counted_apart():
    v, hand, tok = loaded("mixtral")
    a, b = (NeuronSet([(0, e)], v.layout.experts, "router") for e in (0, 1))
    c = NeuronSet([(0, 2)], v.layout.experts, "router")
    check_texts(
        v,
        hand,
        tok,
        (ablate(a) + ablate(b)).where("prompt") + ablate(c).where("generated"),
        lambda n: [
            Change("off", {0: (torch.tensor([0, 1]), torch.zeros(2))}, "router", placed("mixtral", "prompt", n)),
            Change("off", {0: (torch.tensor([2]), torch.zeros(1))}, "router", placed("mixtral", "generated", n)),
        ],
    )
    with (
        pytest.raises(ValueError, match="leaves 1 experts in layer 0"),
        ((ablate(a) + ablate(b)).where("prompt") + ablate(c).where("last")).on(v.model),
    ):
        pass
