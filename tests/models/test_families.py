"Hook points on mixtures of experts and other families: they change nothing until somebody asks, and leave nothing behind."
import copy
from importlib.metadata import version

import pytest
import torch
from plain_models import MIXTURES, PARTS, widths

from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.testing.tiny import tiny_model

OLD = version("transformer-lens").startswith("3.9") # later ones wrap more

IMPLEMENTATIONS = {a: ["eager", "batched_mm", "grouped_mm"] if a in MIXTURES and a != "llama4" else ["eager"] for a in PARTS}
CASES = [(a, i) for a in PARTS for i in IMPLEMENTATIONS[a]]
IDS = torch.arange(2*9).view(2, 9) + 5


def plain(arch, dtype=torch.float32, implementation=None):
    hf, tok = tiny_model(arch)
    if implementation: hf.config._experts_implementation = implementation
    return hf.to(dtype), tok


@torch.no_grad()
def logits_of(hf, arch):
    "The logits of a model that is not the package's."
    fed = dict(decoder_input_ids=torch.cat([torch.zeros(2, 1, dtype=int), IDS], 1)) if arch == "mt5" else {}
    return hf(input_ids=IDS, use_cache=False, **fed).logits[:, -9:]


def state(hf):
    "Everything that a wrapper could leave behind in a model: its modules' own things, its settings, its weights' names."
    def own(m): return {k: {n: id(x) for n, x in v.items()} if isinstance(v, dict) else id(v) for k, v in m.__dict__.items()}
    return {n: own(m) for n, m in hf.named_modules()}, hf.config.to_dict(), hf.config._attn_implementation, list(hf.state_dict())


def points(model): return [(l, f"{p}.{k}") for l, p in view(model).parts for k in ("pre", "pre_linear", "post")
                           if view(model)._point(l, f"{p}.{k}") is not None]


@pytest.mark.parametrize("arch, implementation", CASES)
def test_families_hooks_that_change_nothing_change_no_bit(arch, implementation):
    for dtype in (torch.float32, torch.bfloat16):
        hf, tok = plain(arch, dtype, implementation)
        model = load_model(hf, tokenizer=tok)
        v, (ref, _) = view(model), plain(arch, dtype, implementation)
        ref.set_attn_implementation(v.attention)
        with torch.no_grad(): own = v.logits(IDS)
        if type(model).__name__ == "HookedHF": assert torch.equal(own, logits_of(ref, arch)) # no hook: the model's own bits
        before, fired = state(hf), []
        router = [(l, f"experts.{k}") for l, p in v.parts if p == "experts" for k in ("router_logits", "expert_indices", "expert_weights")]
        for answer in (lambda x: None, lambda x: x, lambda x: x.clone()):
            def hook(x): return fired.append(x.shape) or answer(x)
            with v.hooks([(*at, hook) for at in points(model) + router]), torch.no_grad(): assert torch.equal(v.logits(IDS), own)
        assert len(fired) == 3*len(points(model) + router)
        if type(model).__name__ == "HookedHF": assert state(hf) == before
        with torch.no_grad(): assert torch.equal(v.logits(IDS), own)
        for n in (4, 7, 17) if arch in MIXTURES else (): # other numbers of rows for an expert round otherwise
            ids = torch.arange(5, 5 + n)[None]
            with torch.no_grad(): own = v.logits(ids)
            with v.hooks([(*at, torch.clone) for at in points(model)]), torch.no_grad(): assert torch.equal(v.logits(ids), own)


@pytest.mark.parametrize("arch", PARTS)
def test_families_model_object_stays_a_model(arch, tmp_path):
    hf, tok = plain(arch)
    keys = list(hf.state_dict())
    model = load_model(hf, tokenizer=tok)
    if type(model).__name__ != "HookedHF": return # TransformerLens's own affair
    v, want = view(model), logits_of(plain(arch)[0], arch)
    assert list(hf.state_dict()) == keys and list(v.layout.widths) == widths(arch)
    twin, seen = copy.deepcopy(hf), []
    with v.hooks([(*at, seen.append) for at in points(model)]):
        assert torch.equal(logits_of(twin, arch), want) and not seen # a copy has hook points of its own, which nobody hooks
    with v.hooks([(*at, torch.zeros_like) for at in points(model)]):
        assert not torch.equal(logits_of(hf, arch), want) and torch.equal(logits_of(twin, arch), want)
    hf.save_pretrained(tmp_path)
    again = view(load_model(str(tmp_path), tokenizer=tok))
    assert again.fingerprint == v.fingerprint
    torch.testing.assert_close(again.logits(IDS), v.logits(IDS), rtol=1e-5, atol=1e-4)
    assert load_model(hf, tokenizer=tok) is model # its hook points stand once


@pytest.mark.parametrize("arch", ["qwen3_5", "granite_hybrid", "cohere", "cohere2"])
def test_families_a_bridge_that_fails_leaves_the_model_as_it_was(arch, monkeypatch):
    from langneuron_mi.models import loading
    monkeypatch.setattr(loading, "hooked_hf", lambda hf, tokenizer: hf) # what the plain model's own hook points would add
    hf, tok = plain(arch)
    weights, before = {k: x.clone() for k, x in hf.state_dict().items()}, state(hf)
    made = loading._hooked(hf, tok, "tiny")
    if made is not hf: # another TransformerLens may wrap it
        assert type(made).__name__ == "TransformerBridge" and arch in ("qwen3_5", "cohere", "cohere2") and not OLD
        return
    assert state(hf) == before
    assert all(torch.equal(x, weights[k]) for k, x in hf.state_dict().items())
    assert torch.equal(logits_of(hf, arch), logits_of(plain(arch)[0], arch))
    assert torch.equal(logits_of(copy.deepcopy(hf), arch), logits_of(hf, arch))


@pytest.mark.parametrize("arch", [a for a in PARTS if a not in MIXTURES])
def test_families_bridge_is_taken_only_where_it_computes_the_same(arch, caplog):
    hf, tok = plain(arch)
    with caplog.at_level("INFO", logger="langneuron_mi.models.loading"): model = load_model(hf, tokenizer=tok)
    got, want = view(model).logits(IDS).detach(), logits_of(plain(arch)[0], arch)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4*float(want.abs().max()))
    said = [r.getMessage() for r in caplog.records]
    assert bool(said) == (type(model).__name__ == "HookedHF") and all("without TransformerLens's bridge" in s for s in said)
    if arch == "cohere" and OLD: assert "logits differ" in said[0]
    if arch in ("opt", "xglm", "lfm2", "gemma4"): assert not said
