"Attribution: equal to the definitions computed from the Hugging Face model's raw weights and its own autograd."
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lens import has_hooked_transformer, hooked_transformer, lens_models

from langneuron_mi.share.categories import CATEGORIES, input_categories
from langneuron_mi.share.contributions import category_contribution, category_share
from langneuron_mi.share.attribution import contribution, effective_score, gradient_x_activation, integrated_gradients, w_out, w_u
from langneuron_mi.change.interventions import ablate
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.testing.planted import planted_model
from langneuron_mi.testing.tiny import tiny_model

ARCHS = ["llama", "mistral", "qwen2", "gemma2", "gemma3", "bloom", "gpt2"]
PROMPTS, ANSWERS = ["abc de", "f", "ghij klm nop"], ["xy", "z", "b"]
PARALLEL = {"en": ["abc de", "f", "gh i"], "de": ["zyx", "w vu", "tt"], "zh": ["文字", "x好", "zz"]}


def mlps(hf):
    return [layer.mlp for layer in (hf.base_model.h if hasattr(hf.base_model, "h") else hf.base_model.layers)]


def reader(mlp):
    return next(getattr(mlp, n) for n in ("down_proj", "dense_4h_to_h", "c_proj") if hasattr(mlp, n))


def rows_out(mlp):
    "[neuron, d_model]; GPT-2 keeps its matrices the other way round."
    w = reader(mlp).weight.detach()
    return w if type(reader(mlp)).__name__ == "Conv1D" else w.T


def run(hf, ids, edit=None):
    "Logits [pos, vocab] of one prompt, and each output matrix's input [layer][pos, neuron], in the graph; `edit(layer, x)` may replace it."
    got, handles = {}, []
    for l, mlp in enumerate(mlps(hf)):
        def keep(mod, args, l=l):
            x = args[0] if edit is None else edit(l, args[0])
            got[l] = x
            return (x, *args[1:])
        handles.append(reader(mlp).register_forward_pre_hook(keep))
    try: logits = hf(torch.tensor([ids])).logits[0]
    finally:
        for h in handles: h.remove()
    return logits, [got[l] for l in range(len(got))]


def close(a, b, tol=1e-5):
    "Equal relative to the largest value."
    assert a.shape == b.shape
    assert (a.double() - b.double()).abs().max() <= tol*b.abs().max(), float((a - b).abs().max()/b.abs().max())


@pytest.mark.parametrize("arch", ARCHS)
def test_attribution_contribution_and_effective_score_equal_raw_weights(arch):
    for name, hf, tok, model in lens_models(arch):
        n_layers = len(mlps(hf))
        assert all(torch.equal(w_out(model, l), rows_out(m)) for l, m in enumerate(mlps(hf)))
        unembed, norm = hf.get_output_embeddings().weight.detach(), final_norm(hf)
        c, e, n = [], [], []
        for prompt, answer in zip(PROMPTS, ANSWERS):
            ids = tok(prompt).input_ids
            w = tok(prompt + " " + answer).input_ids[len(ids)]
            kept = []
            handle = norm.register_forward_pre_hook(lambda mod, args: kept.append(args[0][0, -1].detach()))
            _, posts = run(hf, ids)
            handle.remove()
            writes = [p[0, -1].detach()[:, None]*rows_out(m) for p, m in zip(posts, mlps(hf))]
            c.append(torch.stack([x.norm(dim=1) for x in writes]))
            e.append(torch.stack([x @ unembed[w] for x in writes]))
            n.append(torch.stack([frozen(norm, arch, kept[-1], x) @ unembed[w] for x in writes]))
        for size in (1, 3):
            close(contribution(model, PROMPTS, batch_size=size), torch.stack(c))
            close(effective_score(model, PROMPTS, ANSWERS, lang="en", batch_size=size), torch.stack(e))
            close(effective_score(model, PROMPTS, ANSWERS, lang="en", final_norm=True, batch_size=size), torch.stack(n), 1e-4)
        close(contribution(model, PROMPTS, mean=True, batch_size=2), torch.stack(c).mean(0))
        assert contribution(model, PROMPTS[0]).shape == (1, n_layers, view(model).d_mlp)
        assert torch.equal(w_u(model, torch.tensor([5, 9])), unembed[[5, 9]])


def final_norm(hf):
    return next(getattr(hf.base_model, n) for n in ("norm", "ln_f") if hasattr(hf.base_model, n))


def frozen(norm, arch, x, d):
    "The final norm of a write `d`, by its textbook formula, at the scale that it has for `x`."
    if arch in ("gpt2", "bloom"): return norm.weight.detach()*(d - d.mean(-1, keepdim=True))/(x.var(correction=0) + norm.eps).sqrt()
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    return (norm.weight.detach() + (1 if arch.startswith("gemma") else 0))*d/(x.square().mean() + eps).sqrt()


def test_attribution_effective_score_through_the_norm_is_the_same_when_the_norm_is_folded():
    if not has_hooked_transformer(): return  # TransformerLens 4 has no class that folds a given state
    hf, tok = tiny_model("llama")
    plain, folded = (hooked_transformer(tiny_model("llama")[0], tok) for _ in range(2))
    folded.load_and_process_state_dict(plain.state_dict(), fold_ln=True, center_writing_weights=False, center_unembed=False,
                                      fold_value_biases=False)
    a, b = (effective_score(load_model(m), PROMPTS, ANSWERS, lang="en", final_norm=True) for m in (plain, folded))
    close(a, b, 1e-4)


def test_attribution_effective_scores_and_the_rest_sum_to_the_logit():
    "Through the norm, all neurons together add what switching the MLPs' writes off at frozen scale takes away."
    hf, tok = tiny_model("llama")
    model = load_model(tiny_model("llama")[0], tokenizer=tok)
    ids = tok(PROMPTS[0]).input_ids
    w = tok(PROMPTS[0] + " " + ANSWERS[0]).input_ids[len(ids)]
    attn = []
    handles = [l.self_attn.register_forward_hook(lambda m, i, o: attn.append(o[0][0, -1])) for l in hf.model.layers]
    handles.append(hf.model.norm.register_forward_pre_hook(lambda m, i: attn.append(i[0][0, -1])))
    with torch.no_grad(): logits = hf(torch.tensor([ids])).logits[0, -1]
    for h in handles: h.remove()
    rest = hf.model.embed_tokens.weight[ids[-1]] + attn[0] + attn[1]
    rest = frozen(hf.model.norm, "llama", attn[2], rest.detach()) @ hf.lm_head.weight[w].detach()
    score = effective_score(model, PROMPTS[0], ANSWERS[0], lang="en", final_norm=True).sum()
    assert (score + rest).item() == pytest.approx(logits[w].item(), abs=1e-3)


@pytest.mark.parametrize("token", ["last", "all"])
@pytest.mark.parametrize("arch", ARCHS)
def test_attribution_gradient_x_activation_equals_autograd(arch, token):
    for name, hf, tok, model in lens_models(arch):
        want = []
        for prompt, answer in zip(PROMPTS, ANSWERS):
            ids = tok(prompt).input_ids
            logits, posts = run(hf, ids)
            logp = logits[-1].log_softmax(-1)[tok(prompt + " " + answer).input_ids[len(ids)]]
            grads = torch.autograd.grad(logp, posts)
            want.append(torch.stack([(g*p)[0, -1] if token == "last" else (g*p)[0].sum(0) for g, p in zip(grads, posts)]).detach())
        for size in (1, 3):
            with torch.no_grad():  # the caller's setting does not matter
                close(gradient_x_activation(model, PROMPTS, ANSWERS, lang="en", token=token, batch_size=size), torch.stack(want), 1e-4)
        assert all(p.grad is None for p in view(model).model.parameters())
        for p in view(model).model.parameters(): p.requires_grad_(False)
        close(gradient_x_activation(model, PROMPTS, ANSWERS, lang="en", token=token), torch.stack(want), 1e-4)


@pytest.mark.parametrize("token", ["last", "all"])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_attribution_integrated_gradients_sum_to_the_difference(arch, token):
    for name, hf, tok, model in lens_models(arch):
        for layer in range(2):
            want, difference = [], []
            for prompt, answer in zip(PROMPTS[:2], ANSWERS):
                ids = tok(prompt).input_ids
                w = tok(prompt + " " + answer).input_ids[len(ids)]
                _, posts = run(hf, ids)
                x = posts[layer].detach()
                def at(alpha):
                    scaled = x.clone()
                    scaled[:, -1 if token == "last" else slice(None)] *= alpha
                    scaled.requires_grad_()
                    return run(hf, ids, lambda l, now: scaled if l == layer else now)[0][-1].log_softmax(-1)[w], scaled
                grad = 0
                for k in range(120):  # midpoint rule over t, at alpha = t**3: a norm behind the MLP makes the path steep near 0
                    t = (k + .5)/120
                    logp, scaled = at(t**3)
                    grad = grad + torch.autograd.grad(logp, scaled)[0]*3*t**2/120
                want.append((grad*x)[0, -1] if token == "last" else (grad*x)[0].sum(0))
                difference.append(at(1.)[0].item() - at(0.)[0].item())
            ig = integrated_gradients(model, PROMPTS[:2], ANSWERS[:2], lang="en", layer=layer, steps=64, token=token)
            torch.testing.assert_close(ig.difference, torch.tensor(difference, dtype=torch.float64), atol=1e-4, rtol=1e-4)
            assert torch.equal(ig.scores.sum(1) - ig.difference, ig.error) and ig.error.abs().max() < 1e-3
            torch.testing.assert_close(ig.scores, torch.stack(want).double(), atol=.02, rtol=.02)


def test_attribution_integrated_gradients_table_and_few_steps():
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    few, many = (integrated_gradients(model, PROMPTS, ANSWERS, lang="en", layer=0, steps=n) for n in (2, 64))
    assert torch.equal(few.difference, many.difference)
    assert many.error.abs().max() < few.error.abs().max()/10, "too few steps show in the reported error"
    df = many.to_df()
    assert df.shape == (3*64, 4) and df.score[64 + 5] == many.scores[1, 5]
    one = integrated_gradients(model, PROMPTS, ANSWERS, lang="en", layer=0, steps=64, batch_size=1)
    torch.testing.assert_close(one.scores, many.scores, atol=1e-4, rtol=1e-3)


def test_attribution_leaves_nothing_behind():
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    v, ids = view(model), torch.tensor([[5, 6, 7]])
    clean, before = v.logits(ids), len(v.model.ln_final._forward_pre_hooks)
    for measure in (effective_score, gradient_x_activation): measure(model, PROMPTS, ANSWERS, lang="en")
    effective_score(model, PROMPTS, ANSWERS, lang="en", final_norm=True)
    integrated_gradients(model, PROMPTS, ANSWERS, lang="en", layer=1, steps=2)
    assert torch.equal(v.logits(ids), clean) and len(v.model.ln_final._forward_pre_hooks) == before
    assert not any(v.point(l, "post").fwd_hooks for l in range(2))


@given(st.integers(0, 10**6), st.integers(1, 11))
def test_attribution_category_share_equals_loops(seed, top_k):
    g = torch.Generator().manual_seed(seed)
    scores, cat = torch.randint(-5, 6, (2, 3, 12), generator=g).float(), torch.randint(0, 4, (2, 3, 12), generator=g).to(torch.int8)
    scores[0, 0, 0] = 1.
    df = category_share(scores, cat, top_k).set_index(["input", "layer", "category"])
    for n in range(2):
        for l in range(3):
            s = scores[n, l].abs().tolist()
            top = sorted(range(12), key=lambda i: (-s[i], i))[:top_k]
            for c, name in enumerate(CATEGORIES):
                mine, row = [i for i in range(12) if cat[n, l, i] == c], df.loc[(n, l, name)]
                assert row.neurons == pytest.approx(len(mine)/12) and row.top == pytest.approx(len(set(top) & set(mine))/top_k)
                if sum(s): assert row["sum"] == pytest.approx(sum(s[i] for i in mine)/sum(s))
    pd.testing.assert_frame_equal(category_share(scores[1], cat[1], top_k), category_share(scores[1:], cat[1:], top_k))


@pytest.mark.parametrize("token", ["last", "any"])
def test_attribution_category_contribution_equals_one_input_at_a_time(token):
    for _, hf, tok, model in lens_models("llama"):
        got = category_contribution(model, PARALLEL, top_k=9, token=token, batch_size=2, progress=False)
        got = got.set_index(["lang", "layer", "category"])
        found = [input_categories(model, {k: p[i] for k, p in PARALLEL.items()}, token=token) for i in range(3)]
        for lang, prompts in PARALLEL.items():
            parts = [category_share(contribution(model, prompts[i])[0], found[i], 9) for i in range(3)]
            want = pd.concat(parts).groupby(["layer", "category"])[["neurons", "top", "sum"]].mean()
            for at, row in want.iterrows():
                assert got.loc[(lang, *at), ["neurons", "top", "sum"]].tolist() == pytest.approx(row.tolist(), abs=1e-6)
        assert (got.n == 3).all()


def test_attribution_planted_specific_neurons_write_the_answer(planted):
    model = load_model(planted_model().hf, tokenizer=planted.tokenizer)
    for lang, texts in planted.texts(4, seed=2).items():
        answers = [planted.successor(t.split()[-1]) for t in texts]
        e = effective_score(model, texts, answers, lang=lang, final_norm=True)
        for other in planted.langs:
            part = sum(e[:, l, i] for l, i in planted.neurons[other])
            want = (planted.logits["meaning"] + planted.logits["lang"])*(other == lang)
            torch.testing.assert_close(part, torch.full_like(part, want), atol=.15, rtol=0)


@pytest.fixture(scope="module")
def model():
    hf, tok = tiny_model("llama")
    return load_model(hf, tokenizer=tok)


@pytest.mark.parametrize("call, words", [
    (lambda m: contribution(m, []), "no prompts"),
    (lambda m: contribution(m, ["a", " "]), "1 of these texts is empty"),
    (lambda m: contribution(m, "a"*300), "has 301 tokens, the context of"),
    (lambda m: effective_score(m, ["a", "b"], ["c"], lang="en"), "2 prompts, 1 answers"),
    (lambda m: effective_score(m, "a", "c", lang=["en", "de"]), "2 languages do not match"),
    (lambda m: effective_score(m, "a", "", lang="en"), "the answer '' to 'a' has no tokens"),
    (lambda m: gradient_x_activation(m, "a", "b", lang="en", token="any"), "no token rule 'any'; allowed are 'last' and 'all'"),
    (lambda m: integrated_gradients(m, "a", "b", lang="en", layer=2), "no layer 2; this model's layers are 0 to 1"),
    (lambda m: integrated_gradients(m, "a", "b", lang="en", layer=0, steps=0), "steps=0"),
    (lambda m: category_contribution(m, PARALLEL, progress=False), "top_k=800: a layer has 64 neurons"),
    (lambda m: category_contribution(m, {"en": ["a"], "de": []}), "not parallel"),
])
def test_attribution_errors_are_one_clear_line(model, call, words):
    with pytest.raises(ValueError, match=words) as e: call(model)
    assert "\n" not in str(e.value)


def test_attribution_category_contribution_goes_on_from_finished_batches(model, tmp_path):
    want = category_contribution(model, PARALLEL, top_k=9, batch_size=2, progress=False)
    first = category_contribution(model, PARALLEL, top_k=9, batch_size=2, out=tmp_path, progress=False)
    files = sorted(tmp_path.glob("contribution_part-*"))
    assert len(files) == 2
    files[0].unlink()
    again = category_contribution(model, PARALLEL, top_k=9, batch_size=2, out=tmp_path, progress=False)
    pd.testing.assert_frame_equal(first, want, check_exact=True)
    pd.testing.assert_frame_equal(again, want, check_exact=True)


def test_attribution_refuses_a_model_under_an_intervention(model):
    with ablate(NeuronSet([(0, 1)], shape=(2, 64))).on(model):
        for call in (lambda: contribution(model, "a"), lambda: effective_score(model, "a", "b", lang="en"),
                     lambda: gradient_x_activation(model, "a", "b", lang="en"),
                     lambda: integrated_gradients(model, "a", "b", lang="en", layer=0), lambda: category_contribution(model, PARALLEL)):
            with pytest.raises(ValueError, match="an intervention is on"): call()


def test_attribution_accepts_bf16_and_returns_float32(model):
    hf, tok = tiny_model("llama")
    half = load_model(hf.to(torch.bfloat16), tokenizer=tok)
    for x in (contribution(half, PROMPTS), effective_score(half, PROMPTS, ANSWERS, lang="en", final_norm=True),
              gradient_x_activation(half, PROMPTS, ANSWERS, lang="en")):
        assert x.dtype == torch.float32 and torch.isfinite(x).all()
    close(contribution(half, PROMPTS), contribution(model, PROMPTS), .1)


def test_attribution_goes_on_from_finished_batches(tmp_path, monkeypatch):
    import langneuron_mi.share.attribution as room
    planted = planted_model()
    model = load_model(planted.hf, tokenizer=planted.tokenizer)
    texts = planted.texts(5, seed=1)["de"]
    answers = [planted.successor(t.split()[-1]) for t in texts]
    calls = dict(
        contribution=lambda **how: contribution(model, texts, batch_size=2, **how),
        effective_score=lambda **how: effective_score(model, texts, answers, lang="de", batch_size=2, **how),
        gradient_x_activation=lambda **how: gradient_x_activation(model, texts, answers, lang="de", batch_size=2, **how),
        integrated_gradients=lambda **how: (
            integrated_gradients(model, texts, answers, lang="de", layer=1, steps=4, batch_size=2, **how).scores
        ),
    )
    calm = {name: f(progress=False) for name, f in calls.items()}
    for f in calls.values(): f(out=tmp_path, progress=False)
    assert len(list(tmp_path.glob("attribution_part-*"))) == 4*3
    (tmp_path/sorted(p.name for p in tmp_path.glob("*"))[0]).unlink()
    seen, encode = [], room._last_posts
    monkeypatch.setattr(room, "_last_posts", lambda *a: seen.append(1) or encode(*a))
    assert all(torch.equal(f(out=tmp_path, progress=False), calm[name]) for name, f in calls.items())
    assert len(seen) <= 1
