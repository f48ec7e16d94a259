"Sharing: equal to keeping every activation of every prompt, read with plain PyTorch hooks on the Hugging Face model."
import math
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lens import lens_models
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from langneuron_mi.core.files import ArtifactError
from langneuron_mi.change.interventions import ablate
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.recording.record import record
from langneuron_mi.share.sharing import (CATEGORIES, CategoryEffect, Sharing, answer_tokens, categories, category_effect, category_sets, input_categories, sharing)
from langneuron_mi.testing.planted import planted_model
from langneuron_mi.testing.tiny import tiny_model

ARCHS = ["llama", "mistral", "qwen2", "gemma2", "gemma3", "bloom", "gpt2"]
PROMPTS = {"en": ["abc de", "f", "ghij klm nop", "q r s", "tuv"], "de": ["zyx", "wv uts rq", "p", "onm l k", "ji"], "zh": ["中", "文字", "我们x", "y你好", "zz"]}
ANSWERS = {"en": ["b", "cd", "e", "f g", "h"], "de": ["x", "yz", "w", "vu", "t"], "zh": ["文", "a", "好", "b", "天"]}


def mlps(hf):
    return [layer.mlp for layer in (hf.base_model.h if hasattr(hf.base_model, "h") else hf.base_model.layers)]


def reader(mlp):
    return next(getattr(mlp, n) for n in ("down_proj", "dense_4h_to_h", "c_proj") if hasattr(mlp, n))


@torch.no_grad()
def activations(hf, tok, prompt, site):
    "[layer, pos, neuron] of one prompt, alone, BOS left out."
    got, handles = {}, []
    for l, mlp in enumerate(mlps(hf)):
        if site == "gate" and hasattr(mlp, "gate_proj"):
            handles.append(mlp.gate_proj.register_forward_hook(lambda m, i, o, l=l, mlp=mlp: got.__setitem__(l, mlp.act_fn(o[0]))))
        else:
            handles.append(reader(mlp).register_forward_pre_hook(lambda m, i, l=l: got.__setitem__(l, i[0][0])))
    ids = tok(prompt).input_ids
    hf(torch.tensor([ids]))
    for h in handles: h.remove()
    return torch.stack([got[l].reshape(len(ids), -1) for l in range(len(got))])[:, int(ids[0] == tok.bos_token_id):]


def brute(hf, tok, prompts, theta, token, site):
    "[input, layer, neuron] category index, [input, layer, neuron] language (-1 unless specific)."
    found, whose = [], []
    for texts in zip(*prompts.values()):
        acts = [activations(hf, tok, t, site) for t in texts]
        on = torch.stack([(a[:, -1] > theta) if token == "last" else (a > theta).any(1) for a in acts])
        c = on.sum(0).tolist()
        cat = [[0 if n == len(texts) else 1 if n > 1 else 2 if n == 1 else 3 for n in row] for row in c]
        found.append(torch.tensor(cat))
        whose.append(torch.where(found[-1] == 2, on.int().argmax(0), -1))
    return torch.stack(found), torch.stack(whose)


@pytest.mark.parametrize("site", ["gate", "post"])
@pytest.mark.parametrize("token", ["last", "any"])
@pytest.mark.parametrize("arch", ARCHS)
def test_sharing_equals_brute_force(arch, token, site):
    thetas = [.1, 0., .5]
    for name, hf, tok, model in lens_models(arch):
        s = sharing(model, PROMPTS, theta=thetas, token=token, site=site, batch_size=2, progress=False)
        for t, theta in enumerate(thetas):
            cat, whose = brute(hf, tok, PROMPTS, theta, token, site)
            for c in range(4):
                assert torch.equal(s.category_counts[t, c], (cat == c).sum(0)), (name, theta, CATEGORIES[c])
                assert torch.equal(s.per_input[t, :, :, c].long(), (cat == c).sum(-1))
                assert torch.equal(s.neurons(CATEGORIES[c], .6, theta).mask(), (cat == c).double().mean(0) >= .6)
            assert torch.equal(s.repetition(theta), torch.stack([(cat == c).double().mean(0) for c in range(4)]).amax(0))
            if t == 0:
                assert all(torch.equal(s.specific_counts[k], (whose == k).sum(0)) for k in range(3))
        cat, _ = brute(hf, tok, PROMPTS, 0, token, site)
        one = {lang: p[2] for lang, p in PROMPTS.items()}
        assert torch.equal(input_categories(model, one, token=token, site=site).long(), cat[2])
        assert {c: set(n) for c, n in category_sets(model, one, token=token, site=site).items()} == {
            c: set(NeuronSet.from_mask(cat[2] == k, site)) for k, c in enumerate(CATEGORIES)}


def test_sharing_without_bos_counts_every_token():
    hf, tok = tiny_model("llama", bos=False)
    model = load_model(tiny_model("llama", bos=False)[0], tokenizer=tok)
    for token in ("last", "any"):
        cat, _ = brute(hf, tok, PROMPTS, 0, token, "gate")
        s = sharing(model, PROMPTS, token=token, progress=False)
        assert torch.equal(s.category_counts[0], torch.stack([(cat == c).sum(0) for c in range(4)]))


def test_sharing_bos_is_never_counted():
    "A model whose neurons all fire at BOS and nowhere else shares nothing."
    hf, tok = tiny_model("llama")
    with torch.no_grad():
        hf.model.embed_tokens.weight.copy_(torch.where(torch.arange(len(tok))[:, None] == tok.bos_token_id, 1., -1.))
        for layer in hf.model.layers:
            layer.mlp.gate_proj.weight.fill_(.1)
            for w in (layer.mlp.down_proj.weight, layer.self_attn.o_proj.weight): w.zero_()
            layer.post_attention_layernorm.weight.fill_(1)
    model = load_model(hf, tokenizer=tok)
    for token in ("last", "any"):
        assert sharing(model, PROMPTS, token=token, progress=False).share("non-activated").tolist() == [1., 1.]


@pytest.mark.parametrize("kw", [{}, dict(langs=("en", "de", "fr", "it"), n_words=4, n_layers=3, seed=2), dict(act="gelu_pytorch_tanh", seed=3)], ids=str)
@pytest.mark.parametrize("token", ["last", "any"])
def test_sharing_planted_neurons_get_their_planted_category(kw, token):
    p = planted_model(**kw)
    model = load_model(p.hf, tokenizer=p.tokenizer)
    s = sharing(model, p.texts(30, seed=4), theta=[0., 1.], token=token, progress=False)
    for theta in s.theta:
        for category, neurons in [("all-shared", p.shared), ("non-activated", p.silent), *(("specific", n) for n in p.neurons.values()), *(("partial-shared", n) for n in p.partial.values())]:
            assert set(neurons) <= set(s.neurons(category, 1., theta))
    for lang in p.langs:
        assert set(p.neurons[lang]) <= set(s.specific_neurons(lang, 1.))
        for other in set(p.langs) - {lang}: assert not set(p.neurons[other]) & set(s.specific_neurons(lang, .01))


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=2, max_size=5))
def test_sharing_categories_partition_the_neurons(rows):
    active = torch.tensor(rows).reshape(len(rows), 2, 3)
    cat = categories(active)
    for l in range(2):
        for i in range(3):
            n = sum(bool(active[k, l, i]) for k in range(len(rows)))
            assert CATEGORIES[cat[l, i]] == ("all-shared" if n == len(rows) else "non-activated" if n == 0 else "specific" if n == 1 else "partial-shared")
    flipped = categories(active.flip(0))
    assert torch.equal(cat, flipped), "the order of languages does not matter"


words = st.text("abcdefg ", min_size=1, max_size=9).filter(str.strip)


@settings(max_examples=15)
@given(st.lists(st.tuples(words, words, words), min_size=1, max_size=5), st.integers(1, 4), st.sampled_from(["last", "any"]))
def test_sharing_counts_add_up_and_do_not_depend_on_the_batches(items, size, token):
    model = _llama()
    prompts = dict(zip(("en", "de", "fr"), map(list, zip(*items))))
    s = sharing(model, prompts, theta=[0., .2], token=token, batch_size=size, progress=False)
    whole = sharing(model, prompts, theta=[0., .2], token=token, batch_size=99, progress=False)
    for name in ("category_counts", "specific_counts", "per_input"): assert torch.equal(getattr(s, name), getattr(whole, name))
    assert (s.category_counts.sum(1) == len(items)).all()
    assert (s.per_input.sum(-1) == 64).all()
    assert torch.equal(s.per_input.sum(1).long(), s.category_counts.sum(-1).transpose(1, 2))
    assert torch.equal(s.specific_counts.sum(0), s.category_counts[0, 2])


_cache = {}


def _llama():
    if not _cache:
        hf, tok = tiny_model("llama")
        _cache["model"] = load_model(hf, tokenizer=tok)
    return _cache["model"]


def test_sharing_memory_does_not_grow_with_the_inputs():
    "Counters have one size; what is kept for each input is four numbers per layer and theta."
    def size(n): return {f.name: getattr(s, f.name).numel() for s in [sharing(_llama(), {l: p*n for l, p in PROMPTS.items()}, theta=[0., .1], progress=False)]
                         for f in fields(s) if isinstance(getattr(s, f.name), torch.Tensor)}
    small, large = size(1), size(4)
    assert {k: large[k] - small[k] for k in small} == dict(category_counts=0, specific_counts=0, per_input=15*2*2*4)


def test_sharing_by_task_is_the_mean_over_the_tasks_inputs():
    tasks = ["x", "y", "x", "y", "y"]
    s = sharing(_llama(), PROMPTS, theta=[0., .1], task=tasks, progress=False)
    df = s.to_df().set_index(["task", "theta", "layer", "category"])
    for task in "xy":
        keep = [i for i, t in enumerate(tasks) if t == task]
        alone = sharing(_llama(), {l: [p[i] for i in keep] for l, p in PROMPTS.items()}, theta=[0., .1], progress=False)
        for t, theta in enumerate(s.theta):
            for l in range(2):
                for c, name in enumerate(CATEGORIES):
                    values = [alone.per_input[t, i, l, c].item()/64 for i in range(len(keep))]
                    row = df.loc[(task, theta, l, name)]
                    assert (row.share, row["min"], row["max"], row.n) == (pytest.approx(sum(values)/len(values)), min(values), max(values), len(keep))


def test_sharing_languages_may_be_named_in_any_way():
    s = sharing(_llama(), {"English": ["a"], "deu_Latn": ["b"], "jp": ["c"]}, progress=False)
    assert s.langs == ("en", "de", "ja")
    assert len(s.specific_neurons("Japanese", 1.)) == int((s.specific_counts[2] == 1).sum())
    with pytest.raises(ValueError, match="2 different languages"): sharing(_llama(), {"ja": ["a"], "jp": ["b"]})


def test_sharing_saved_and_loaded_is_the_same(tmp_path):
    s = sharing(_llama(), PROMPTS, theta=[0., .1], task="t", progress=False)
    again = Sharing.load(s.save(tmp_path/"s.safetensors"))
    for f in fields(s):
        a, b = getattr(s, f.name), getattr(again, f.name)
        assert (torch.equal(a, b) and a.dtype == b.dtype) if isinstance(a, torch.Tensor) else a == b, f.name
    assert again.neurons("all-shared") == s.neurons("all-shared")
    assert again.save(tmp_path/"t.safetensors").read_bytes() == (tmp_path/"s.safetensors").read_bytes()
    stats = record(_llama(), {"en": ["abc"]}, progress=False).save(tmp_path/"stats.safetensors")
    with pytest.raises(ArtifactError, match="holds 'activation_stats'"): Sharing.load(stats)
    assert s.neurons("all-shared").model == view(_llama()).fingerprint


@pytest.mark.parametrize("bad, words", [
    (dict(prompts={"en": ["a", "b"], "de": ["c"]}), "not parallel .en 2, de 1.*same order"),
    (dict(prompts={"en": ["a"]}), "prompts in en: give 2 different languages"),
    (dict(prompts={}), "no language: give 2"),
    (dict(prompts={"en": [], "de": []}), "no prompts"),
    (dict(prompts={"en": ["a", "b"], "de": ["c", "\n"]}), "prompt 1 of de is empty"),
    (dict(prompts={"en": ["a"], "de": ["b"*256]}), "prompt 0 of de has 257 tokens, the context of .* is 256"),
    (dict(token="first"), "no token rule 'first'; allowed are 'last' and 'any'"),
    (dict(site="up"), "no site 'up'"),
    (dict(theta=-.1), "each 0 or above"),
    (dict(theta=[]), "give one threshold"),
    (dict(theta=[0., 0.]), "different"),
    (dict(theta=float("nan")), "each 0 or above"),
    (dict(task=["a", "b"]), "2 task labels for 5 inputs"),
], ids=str)
def test_sharing_errors_are_one_clear_line(bad, words):
    with pytest.raises(ValueError, match=words) as e:
        sharing(_llama(), **dict(prompts=PROMPTS, progress=False) | bad)
    assert "\n" not in str(e.value)


def test_sharing_errors_of_results():
    s = sharing(_llama(), PROMPTS, progress=False)
    for bad, words in [(lambda: s.share("shared"), "no category 'shared'; allowed are all-shared"), (lambda: s.neurons("specific", 0.), "no share of the inputs"),
                       (lambda: s.neurons("specific", theta=.3), "theta 0.3 was not measured; measured are 0"), (lambda: s.specific_neurons("fr"), "it has en, de, zh")]:
        with pytest.raises(ValueError, match=words): bad()
    with pytest.raises(TypeError, match="a list for every language"): sharing(_llama(), {"en": "abc", "de": "def"})
    with pytest.raises(ValueError, match="1 language"): categories(torch.ones(1, 2, 3, dtype=torch.bool))


def test_sharing_refuses_a_model_under_an_intervention():
    with ablate(NeuronSet([(0, 1)], shape=(2, 64))).on(_llama()):
        for measure in (lambda: sharing(_llama(), PROMPTS), lambda: input_categories(_llama(), {"en": "a", "de": "b"}), lambda: category_effect(_llama(), PROMPTS, ANSWERS)):
            with pytest.raises(ValueError, match="an intervention is on"): measure()


def test_sharing_activations_that_are_no_numbers_are_refused():
    hf, tok = tiny_model("llama")
    with torch.no_grad(): hf.model.embed_tokens.weight[tok("z", add_special_tokens=False).input_ids[0]] = float("nan")
    model = load_model(hf, tokenizer=tok)
    with pytest.raises(ValueError, match="layer 0 .*NaN or infinite on de prompts"): sharing(model, {"en": ["ab"], "de": ["az"]}, progress=False)
    assert not any(view(model).point(l, k).fwd_hooks for l in range(2) for k in ("pre", "post"))


# Category effects


@contextmanager
def scaled(hf, neurons, factor):
    "Multiply the output matrix's input at these neurons, with plain hooks."
    handles = []
    for l, mlp in enumerate(mlps(hf)):
        idx = [i for k, i in neurons if k == l]
        def edit(mod, args, idx=idx):
            x = args[0].clone()
            x[..., idx] *= factor
            return (x, *args[1:])
        handles.append(reader(mlp).register_forward_pre_hook(edit))
    try: yield
    finally:
        for h in handles: h.remove()


@torch.no_grad()
def gold(hf, tok, prompt, answer, lang):
    "log P(answer | prompt) of one text alone, token by token; and whether the first token is the greedy choice."
    text = prompt + ("" if lang == "zh" else " ") + answer
    before, ids = tok(prompt).input_ids, tok(text).input_ids
    logp = hf(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logp[t - 1, ids[t]].item() for t in range(len(before), len(ids))), bool(logp[len(before) - 1].argmax() == ids[len(before)])


@pytest.mark.parametrize("op, factor", [("ablate", 0.), (("amplify", 2.5), 2.5)], ids=str)
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3", "bloom", "gpt2"])
def test_sharing_category_effect_equals_plain_hooks(arch, op, factor):
    for name, hf, tok, model in lens_models(arch):
        v = view(model)
        clean = v.logits(torch.tensor([[5, 6, 7]])).detach().clone()
        p, a = ({l: x[:2] for l, x in d.items()} for d in (PROMPTS, ANSWERS))
        e = category_effect(model, p, a, categories=CATEGORIES, op=op, controls=1, seed=7, batch_size=2, progress=False)
        cat, _ = brute(hf, tok, p, 0, "last", "gate")
        df = e.to_df().set_index(["input", "lang", "category", "set"])
        for i in range(2):
            for c, category in enumerate(CATEGORIES):
                own = NeuronSet.from_mask(cat[i] == c)
                for kind, s in [("own", own), ("random", own.random_like([7, i, c, 0]))]:
                    assert torch.equal(s.per_layer(), own.per_layer())
                    for lang in p:
                        row = df.loc[(i, lang, category, kind)]
                        before, right = gold(hf, tok, p[lang][i], a[lang][i], lang)
                        with scaled(hf, s, factor): after, still = gold(hf, tok, p[lang][i], a[lang][i], lang)
                        assert row.n_neurons == len(own)
                        assert row.logprob_before == pytest.approx(before, abs=2e-3) and row.logprob_after == pytest.approx(after, abs=2e-3)
                        assert (row.top1_correct_before, row.top1_correct_after) == (right, still)
        assert torch.equal(v.logits(torch.tensor([[5, 6, 7]])), clean) and v.active == []


def test_sharing_category_effect_controls_are_seeded_and_can_be_drawn_from_active_neurons():
    def run(**kw): return category_effect(_llama(), PROMPTS, ANSWERS, progress=False, **kw)
    first, again, other, active = run(), run(), run(seed=1), run(among="active")
    assert torch.equal(first.after, again.after)
    assert torch.equal(first.after[..., 0], other.after[..., 0]) and not torch.equal(first.after[..., 1:], other.after[..., 1:])
    sets = category_sets(_llama(), {l: p[0] for l, p in PROMPTS.items()})
    drawn = sets["specific"].random_like([0, 0, 2, 0], among=(sets["all-shared"] | sets["partial-shared"] | sets["specific"]))
    with ablate(drawn).on(_llama()):
        context, answer = answer_tokens(_llama(), PROMPTS["en"][0], ANSWERS["en"][0], "en")
        logp = view(_llama()).logits(torch.tensor([context + answer]))[0].double().log_softmax(-1)
    want = sum(logp[len(context) - 1 + k, t].item() for k, t in enumerate(answer))
    assert active.after[0, 0, 2, 1].item() == pytest.approx(want, abs=1e-3)


def test_sharing_category_effect_summary_is_paired_over_inputs(tmp_path):
    e = category_effect(_llama(), PROMPTS, ANSWERS, progress=False)
    s = e.summary().set_index(["category", "lang"])
    df = e.to_df().assign(change=lambda d: d.logprob_after - d.logprob_before)
    for (category, lang), row in s.iterrows():
        part = df[(df.category == category) & ((df.lang == lang) | (lang == "all"))]
        own, random = (part[part.set == k].groupby("input").change.mean() for k in ("own", "random"))
        assert row.difference == pytest.approx((own - random).mean()) and row.own == pytest.approx(own.mean()) and row.n == 5
        assert row.low <= row.difference <= row.high
        assert row.accuracy_own == pytest.approx(part[part.set == "own"].top1_correct_after.mean())
        assert row.accuracy_random == pytest.approx(part[part.set == "random"].top1_correct_after.mean())
    again = CategoryEffect.load(e.save(tmp_path/"e.safetensors"))
    pd.testing.assert_frame_equal(again.to_df(), e.to_df())


def test_sharing_category_effect_planted_specific_neurons_carry_the_answer(planted):
    model = load_model(planted_model().hf, tokenizer=planted.tokenizer)
    texts = planted.texts(4, seed=9)
    answers = {l: [planted.successor(t.split()[-1]) for t in ts] for l, ts in texts.items()}
    e = category_effect(model, texts, answers, controls=1, progress=False)
    change = (e.after[..., 0] - e.before[..., None]).mean((0, 1))
    assert change[0].abs() < .01 and change[1].abs() < .01 and change[2] < -2
    chance = -math.log(3*planted.n_words)  # every word alike, but for the noise
    assert abs(e.after[:, :, 2, 0].mean() - chance) < .1


@pytest.mark.parametrize("bad, words", [
    (dict(answers={"en": ["a"]*5, "de": ["a"]*5}), "prompts are in en, de, zh, answers in en, de"),
    (dict(answers=ANSWERS | {"de": ["a"]}), "de has 5 prompts and 1 answers"),
    (dict(answers=ANSWERS | {"de": ["a", " ", "b", "c", "d"]}), "the answer ' ' to .* has no tokens"),
    (dict(answers=ANSWERS | {"de": ["a", "b"*250, "b", "c", "d"]}), "prompt and answer .de. have .* the context of"),
    (dict(op="zero"), "no operation 'zero'; allowed are"),
    (dict(categories=["shared"]), "no category 'shared'"),
    (dict(controls=0), "controls=1 or more"),
    (dict(among="some"), "'all' or 'active'"),
    (dict(among="active", categories=CATEGORIES), "non-activated neurons cannot"),
], ids=str)
def test_sharing_category_effect_errors_are_one_clear_line(bad, words):
    with pytest.raises(ValueError, match=words) as e:
        category_effect(_llama(), **dict(prompts=PROMPTS, answers=ANSWERS, progress=False) | bad)
    assert "\n" not in str(e.value)


@given(words, words, st.sampled_from(["en", "zh"]))
def test_sharing_answer_tokens_are_the_tokens_of_the_whole_text(prompt, answer, lang):
    context, rest = answer_tokens(_llama(), prompt, answer, lang)
    tok = view(_llama()).tokenizer
    text = prompt.rstrip() + ("" if lang == "zh" else " ") + answer.lstrip()
    assert context + rest == tok(text).input_ids
    assert tok.decode(rest).lstrip() == answer.lstrip()


def test_sharing_answer_tokens_where_the_tokenizer_merges_across_the_border():
    hf, _ = tiny_model("llama")
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<pad>", "<bos>", "a", "b", "c", "bc"])}, merges=[("b", "c")]))
    model = load_model(hf, tokenizer=PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", pad_token="<pad>"))
    assert answer_tokens(model, "ab", "c", "zh") == ([2], [5])
    assert answer_tokens(model, "aa", "c", "zh") == ([2, 2], [4])
    with pytest.raises(ValueError, match="nothing comes before the answer"): answer_tokens(model, "b", "c", "zh")


def test_sharing_most_is_a_seeded_choice_among_the_most_frequent(planted):
    from langneuron_mi.models.loading import load_model
    model = load_model(planted.hf, tokenizer=planted.tokenizer)
    s = sharing(model, planted.texts(12, seed=2), progress=False)
    a, b, c = s.most("all-shared", 12), s.most("all-shared", 12), s.most("all-shared", 12, seed=1)
    assert len(a) == 12 and a.fingerprint == b.fingerprint != c.fingerprint and set(a) | set(c) <= set(planted.shared)
    counts = s.category_counts[0, 0]
    everyone = s.most("all-shared", counts.numel())
    assert len(everyone) == int((counts > 0).sum())  # never one that was not there
    n = len(planted.shared) + 3
    more = s.most("all-shared", n)
    assert set(planted.shared) <= set(more) and len(more) == min(n, len(everyone))
    with pytest.raises(ValueError, match="n=0"): s.most("all-shared", 0)


def test_sharing_and_category_effect_plot(planted):
    from langneuron_mi.models.loading import load_model
    model = load_model(planted.hf, tokenizer=planted.tokenizer)
    texts = planted.texts(3, seed=2)
    fig = sharing(model, texts, theta=[0., 4.], progress=False).plot(4.)
    assert len(fig.data) == 4 and np.allclose(sum(np.asarray(b.y, dtype=float) for b in fig.data), 1)
    golds = {l: [planted.successor(t.split()[-1]) for t in ts] for l, ts in texts.items()}
    effect = category_effect(model, texts, golds, controls=1, progress=False)
    assert [t.name for t in effect.plot().data] == list(effect.categories)
    assert list(effect.plot(["all"]).layout.yaxis.ticktext) == ["all languages"]
