"What a category does to the answer: equal to plain hooks that scale the output matrix's input."
import math
from contextlib import contextmanager

import pandas as pd
import pytest
import torch
from lens import lens_models
from plain import ANSWERS, PROMPTS, brute, llama, mlps, reader

from langneuron_mi.change.interventions import ablate
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.share.answers import answer_tokens
from langneuron_mi.share.categories import CATEGORIES, category_sets
from langneuron_mi.share.effect import CategoryEffect, category_effect
from langneuron_mi.testing.planted import planted_model


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
    first = bool(logp[len(before) - 1].argmax() == ids[len(before)])
    return sum(logp[t - 1, ids[t]].item() for t in range(len(before), len(ids))), first


@pytest.mark.parametrize("op, factor", [("ablate", 0.), (("amplify", 2.5), 2.5)], ids=str)
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3", "bloom", "gpt2"])
def test_effect_equals_plain_hooks(arch, op, factor):
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
                        assert row.logprob_before == pytest.approx(before, abs=2e-3)
                        assert row.logprob_after == pytest.approx(after, abs=2e-3)
                        assert (row.top1_correct_before, row.top1_correct_after) == (right, still)
        assert torch.equal(v.logits(torch.tensor([[5, 6, 7]])), clean) and v.active == []


def test_effect_controls_are_seeded_and_can_be_drawn_from_active_neurons():
    def run(**kw): return category_effect(llama(), PROMPTS, ANSWERS, progress=False, **kw)
    first, again, other, active = run(), run(), run(seed=1), run(among="active")
    assert torch.equal(first.after, again.after)
    assert torch.equal(first.after[..., 0], other.after[..., 0])
    assert not torch.equal(first.after[..., 1:], other.after[..., 1:])
    sets = category_sets(llama(), {l: p[0] for l, p in PROMPTS.items()})
    drawn = sets["specific"].random_like([0, 0, 2, 0], among=(sets["all-shared"] | sets["partial-shared"] | sets["specific"]))
    with ablate(drawn).on(llama()):
        context, answer = answer_tokens(llama(), PROMPTS["en"][0], ANSWERS["en"][0], "en")
        logp = view(llama()).logits(torch.tensor([context + answer]))[0].double().log_softmax(-1)
    want = sum(logp[len(context) - 1 + k, t].item() for k, t in enumerate(answer))
    assert active.after[0, 0, 2, 1].item() == pytest.approx(want, abs=1e-3)


def test_effect_summary_is_paired_over_inputs(tmp_path):
    e = category_effect(llama(), PROMPTS, ANSWERS, progress=False)
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


def test_effect_planted_specific_neurons_carry_the_answer(planted):
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
def test_effect_errors_are_one_clear_line(bad, words):
    with pytest.raises(ValueError, match=words) as e:
        category_effect(llama(), **dict(prompts=PROMPTS, answers=ANSWERS, progress=False) | bad)
    assert "\n" not in str(e.value)


def test_effect_goes_on_from_finished_inputs(tmp_path):
    "A finished input is read, one that is not is computed, and other settings are other inputs."
    p, a = ({l: x[:3] for l, x in d.items()} for d in (PROMPTS, ANSWERS))
    def run(**kw): return category_effect(llama(), p, a, progress=False, **kw)
    def files(): return sorted(tmp_path.glob("category_effect_input-*"))
    want, first = run(), run(out=tmp_path)
    assert len(files()) == 3
    files()[1].unlink()
    again = run(out=tmp_path)
    for f in ("n_neurons", "before", "after", "top1_before", "top1_after"):
        assert torch.equal(getattr(first, f), getattr(want, f)) and torch.equal(getattr(again, f), getattr(want, f))
    for kw in (dict(seed=1), dict(op=("amplify", 2.)), dict(theta=.1), dict(token="any"), dict(among="active"), dict(batch_size=2)):
        before = len(files())
        run(out=tmp_path, **kw)
        assert len(files()) == before + 3, kw


def test_effect_plot(planted):
    model = load_model(planted.hf, tokenizer=planted.tokenizer)
    texts = planted.texts(3, seed=2)
    golds = {l: [planted.successor(t.split()[-1]) for t in ts] for l, ts in texts.items()}
    effect = category_effect(model, texts, golds, controls=1, progress=False)
    assert [t.name for t in effect.plot().data] == list(effect.categories)
    assert list(effect.plot(["all"]).layout.yaxis.ticktext) == ["all languages"]
