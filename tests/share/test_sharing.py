"Sharing: equal to keeping every activation of every prompt."
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lens import lens_models
from plain import ARCHS, PROMPTS, brute, llama, words

from langneuron_mi.core.atomic import ArtifactError
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.recording.record import record
from langneuron_mi.share.categories import CATEGORIES, categories
from langneuron_mi.share.sharing import Sharing, sharing
from langneuron_mi.testing.planted import planted_model
from langneuron_mi.testing.tiny import tiny_model


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


PLANTED = [{}, dict(langs=("en", "de", "fr", "it"), n_words=4, n_layers=3, seed=2), dict(act="gelu_pytorch_tanh", seed=3)]


@pytest.mark.parametrize("kw", PLANTED, ids=str)
@pytest.mark.parametrize("token", ["last", "any"])
def test_sharing_planted_neurons_get_their_planted_category(kw, token):
    p = planted_model(**kw)
    model = load_model(p.hf, tokenizer=p.tokenizer)
    s = sharing(model, p.texts(30, seed=4), theta=[0., 1.], token=token, progress=False)
    for theta in s.theta:
        def planted_in(category, neurons): assert set(neurons) <= set(s.neurons(category, 1., theta))
        planted_in("all-shared", p.shared)
        planted_in("non-activated", p.silent)
        for n in p.neurons.values(): planted_in("specific", n)
        for n in p.partial.values(): planted_in("partial-shared", n)
    for lang in p.langs:
        assert set(p.neurons[lang]) <= set(s.specific_neurons(lang, 1.))
        for other in set(p.langs) - {lang}: assert not set(p.neurons[other]) & set(s.specific_neurons(lang, .01))


@settings(max_examples=15)
@given(st.lists(st.tuples(words, words, words), min_size=1, max_size=5), st.integers(1, 4), st.sampled_from(["last", "any"]))
def test_sharing_counts_add_up_and_do_not_depend_on_the_batches(items, size, token):
    model = llama()
    prompts = dict(zip(("en", "de", "fr"), map(list, zip(*items))))
    s = sharing(model, prompts, theta=[0., .2], token=token, batch_size=size, progress=False)
    whole = sharing(model, prompts, theta=[0., .2], token=token, batch_size=99, progress=False)
    for name in ("category_counts", "specific_counts", "per_input"): assert torch.equal(getattr(s, name), getattr(whole, name))
    assert (s.category_counts.sum(1) == len(items)).all()
    assert (s.per_input.sum(-1) == 64).all()
    assert torch.equal(s.per_input.sum(1).long(), s.category_counts.sum(-1).transpose(1, 2))
    assert torch.equal(s.specific_counts.sum(0), s.category_counts[0, 2])


def test_sharing_memory_does_not_grow_with_the_inputs():
    "Counters have one size; what is kept for each input is four numbers per layer and theta."
    def size(n):
        s = sharing(llama(), {l: p*n for l, p in PROMPTS.items()}, theta=[0., .1], progress=False)
        return {f.name: getattr(s, f.name).numel() for f in fields(s) if isinstance(getattr(s, f.name), torch.Tensor)}
    small, large = size(1), size(4)
    assert {k: large[k] - small[k] for k in small} == dict(category_counts=0, specific_counts=0, per_input=15*2*2*4)


def test_sharing_by_task_is_the_mean_over_the_tasks_inputs():
    tasks = ["x", "y", "x", "y", "y"]
    s = sharing(llama(), PROMPTS, theta=[0., .1], task=tasks, progress=False)
    df = s.to_df().set_index(["task", "theta", "layer", "category"])
    for task in "xy":
        keep = [i for i, t in enumerate(tasks) if t == task]
        alone = sharing(llama(), {l: [p[i] for i in keep] for l, p in PROMPTS.items()}, theta=[0., .1], progress=False)
        for t, theta in enumerate(s.theta):
            for l in range(2):
                for c, name in enumerate(CATEGORIES):
                    values = [alone.per_input[t, i, l, c].item()/64 for i in range(len(keep))]
                    row = df.loc[(task, theta, l, name)]
                    assert row.share == pytest.approx(sum(values)/len(values))
                    assert (row["min"], row["max"], row.n) == (min(values), max(values), len(keep))


def test_sharing_languages_may_be_named_in_any_way():
    s = sharing(llama(), {"English": ["a"], "deu_Latn": ["b"], "jp": ["c"]}, progress=False)
    assert s.langs == ("en", "de", "ja")
    assert len(s.specific_neurons("Japanese", 1.)) == int((s.specific_counts[2] == 1).sum())
    with pytest.raises(ValueError, match="2 different languages"): sharing(llama(), {"ja": ["a"], "jp": ["b"]})


def test_sharing_saved_and_loaded_is_the_same(tmp_path):
    s = sharing(llama(), PROMPTS, theta=[0., .1], task="t", progress=False)
    again = Sharing.load(s.save(tmp_path/"s.safetensors"))
    for f in fields(s):
        a, b = getattr(s, f.name), getattr(again, f.name)
        assert (torch.equal(a, b) and a.dtype == b.dtype) if isinstance(a, torch.Tensor) else a == b, f.name
    assert again.neurons("all-shared") == s.neurons("all-shared")
    assert again.save(tmp_path/"t.safetensors").read_bytes() == (tmp_path/"s.safetensors").read_bytes()
    stats = record(llama(), {"en": ["abc"]}, progress=False).save(tmp_path/"stats.safetensors")
    with pytest.raises(ArtifactError, match="holds 'activation_stats'"): Sharing.load(stats)
    assert s.neurons("all-shared").model == view(llama()).fingerprint


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
        sharing(llama(), **dict(prompts=PROMPTS, progress=False) | bad)
    assert "\n" not in str(e.value)


def test_sharing_errors_of_results():
    s = sharing(llama(), PROMPTS, progress=False)
    for bad, words in [(lambda: s.share("shared"), "no category 'shared'; allowed are all-shared"),
                       (lambda: s.neurons("specific", 0.), "no share of the inputs"),
                       (lambda: s.neurons("specific", theta=.3), "theta 0.3 was not measured; measured are 0"),
                       (lambda: s.specific_neurons("fr"), "it has en, de, zh")]:
        with pytest.raises(ValueError, match=words): bad()
    with pytest.raises(TypeError, match="a list for every language"): sharing(llama(), {"en": "abc", "de": "def"})
    with pytest.raises(ValueError, match="1 language"): categories(torch.ones(1, 2, 3, dtype=torch.bool))


def test_sharing_activations_that_are_no_numbers_are_refused():
    hf, tok = tiny_model("llama")
    with torch.no_grad(): hf.model.embed_tokens.weight[tok("z", add_special_tokens=False).input_ids[0]] = float("nan")
    model = load_model(hf, tokenizer=tok)
    with pytest.raises(ValueError, match="layer 0 .*NaN or infinite on de prompts"):
        sharing(model, {"en": ["ab"], "de": ["az"]}, progress=False)
    assert not any(view(model).point(l, k).fwd_hooks for l in range(2) for k in ("pre", "post"))


def test_sharing_most_is_a_seeded_choice_among_the_most_frequent(planted):
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


def test_sharing_goes_on_from_finished_batches(tmp_path):
    want = sharing(llama(), PROMPTS, batch_size=2, progress=False)
    first = sharing(llama(), PROMPTS, batch_size=2, out=tmp_path, progress=False)
    files = sorted(tmp_path.glob("sharing_part-*"))
    assert len(files) == 3
    files[0].unlink()
    again = sharing(llama(), PROMPTS, batch_size=2, out=tmp_path, progress=False)
    for name in ("category_counts", "specific_counts", "per_input"):
        assert torch.equal(getattr(want, name), getattr(first, name)) and torch.equal(getattr(want, name), getattr(again, name))
    swapped = {lang: PROMPTS[lang] for lang in ("zh", "de", "en")}
    turned = sharing(llama(), swapped, batch_size=2, out=tmp_path, progress=False)  # another order of languages is other work
    assert torch.equal(turned.specific_counts, want.specific_counts.flip(0))


def test_sharing_plot(planted):
    model = load_model(planted.hf, tokenizer=planted.tokenizer)
    fig = sharing(model, planted.texts(3, seed=2), theta=[0., 4.], progress=False).plot(4.)
    assert len(fig.data) == 4 and np.allclose(sum(np.asarray(b.y, dtype=float) for b in fig.data), 1)
