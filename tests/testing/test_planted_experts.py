"The planted mixture keeps what it promises; the first half is checked with plain PyTorch only."
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from langneuron_mi.change.interventions import ablate, add, set_to
from langneuron_mi.find.controls import random_neurons
from langneuron_mi.find.experts import experts_of, routing_divergence, routing_table
from langneuron_mi.find.identification import lape
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.find.rates import rates_of
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.recording.record import record
from langneuron_mi.testing.planted import OFF, ON, SPECIALS, planted_model

SIZES = [dict(experts=4), dict(experts=5, langs=("en", "de"), n_words=4, n_layers=3, seed=1),
         dict(experts=6, langs=("en", "de", "fr", "zh"), n_words=3, seed=2, act="gelu_pytorch_tanh")]


@pytest.fixture(scope="module", params=SIZES, ids=str)
def p(request): return planted_model(**request.param)


@pytest.fixture(scope="module")
def found(p):
    model, texts = load_model(p.hf, tokenizer=p.tokenizer), p.texts(50)
    return model, record(model, texts, progress=False)


@torch.no_grad()
def logits(p, texts): return torch.cat([p.hf(torch.tensor([p.tokenizer(t)["input_ids"]])).logits[0] for t in texts])


@torch.no_grad()
def seen(p, texts):
    "Router's choice and weights, and which neurons' gates are above 0, by layer; BOS left out."
    kept = [[] for _ in p.hf.model.layers]
    def keep(i):
        def hook(gate, args, out):
            x, (_, weights, index), w = args[0].reshape(-1, args[0].shape[-1]), out, p.hf.model.layers[i].mlp.experts.gate_up_proj
            gates = torch.einsum("td,ewd->tew", x, w[:, :w.shape[1]//2]) > 0
            chosen = F.one_hot(index, len(w)).sum(1).bool()
            kept[i].append((chosen[1:], weights[1:], (gates & chosen[:, :, None]).flatten(1)[1:]))
        return hook
    handles = [l.mlp.gate.register_forward_hook(keep(i)) for i, l in enumerate(p.hf.model.layers)]
    try: logits(p, texts)
    finally:
        for h in handles: h.remove()
    return [[torch.cat(x) for x in zip(*k)] for k in kept]


def perplexity(p, texts):
    ids = [torch.tensor(p.tokenizer(t)["input_ids"]) for t in texts]
    with torch.no_grad(): nll = torch.cat([F.cross_entropy(p.hf(x[None]).logits[0, :-1], x[1:], reduction="none") for x in ids])
    return nll.double().mean().exp().item()


def test_planted_experts_roles_cover_every_neuron_and_expert_once(p):
    c = p.hf.config
    every = [at for r in [*p.neurons.values(), p.shared, *p.partial.values(), p.silent, p.noise] for at in r]
    assert len(every) == len(set(every)) == c.num_hidden_layers*c.num_local_experts*c.intermediate_size
    experts = [at for r in [*p.experts.values(), p.shared_experts, p.idle_experts] for at in r]
    assert sorted(experts) == [(l, e) for l in range(c.num_hidden_layers) for e in range(c.num_local_experts)]
    home = lambda ns: {(l, n//c.intermediate_size) for l, n in ns}
    assert all(home(p.neurons[lang]) <= set(p.experts[lang]) for lang in p.langs)
    assert all(home(ns) <= set(p.shared_experts) for ns in [p.shared, p.noise, *p.partial.values()])


def test_planted_experts_are_given_their_languages_tokens_with_half_the_weight(p):
    for lang, texts in p.texts(20).items():
        for layer, (chosen, weights, _) in enumerate(seen(p, texts)):
            assert set(chosen.nonzero()[:, 1].tolist()) == {p.experts[lang][layer][1], p.shared_experts[layer][1]}
            assert torch.all(weights == .5)


def test_planted_experts_neurons_fire_as_their_roles_say(p):
    for lang, texts in p.texts(60).items():
        rate = torch.stack([fired.double().mean(0) for _, _, fired in seen(p, texts)])
        def rates(ats): return {rate[at].item() for at in ats}
        for own, ats in p.neurons.items(): assert rates(ats) == {float(own == lang)}
        for some, ats in p.partial.items(): assert rates(ats) == {float(lang in some)}
        assert rates(p.shared) == {1.} and rates(p.silent) == {0.}
        assert 0 < min(rates(p.noise)) and max(rates(p.noise)) < .9


def test_planted_experts_perplexity_equals_its_closed_form_and_ablation_spares_the_others_bit_for_bit(p):
    texts = {lang: ts[:8] for lang, ts in p.texts(8).items()}
    before = {lang: logits(p, ts) for lang, ts in texts.items()}
    for lang in p.langs:
        assert perplexity(p, texts[lang]) == pytest.approx(p.expected_perplexity(texts[lang]), rel=.01)
        with p.ablated(p.neurons[lang]):
            assert perplexity(p, texts[lang]) == pytest.approx(p.expected_perplexity(texts[lang], [lang]), rel=.01)
            assert all(torch.equal(logits(p, texts[x]), before[x]) for x in p.langs if x != lang)
    assert all(torch.equal(logits(p, ts), before[x]) for x, ts in texts.items()), "weights were not put back"


def test_planted_experts_expect_the_successor(p):
    words = [f"{lang}{i}" for lang in p.langs for i in range(p.n_words)]
    best = logits(p, [" ".join(words)])[1:].argmax(-1)
    assert p.tokenizer.convert_ids_to_tokens(best) == [p.successor(w) for w in words]


def test_planted_experts_lape_finds_exactly_the_planted_neurons_on_joint_rates_and_given_routing(p, found):
    _, stats = found
    assert {lang: list(ns) for lang, ns in lape(stats).items()} == p.neurons
    assert {lang: list(ns) for lang, ns in lape(stats, given="routing").items()} == p.neurons


def test_planted_experts_lape_finds_exactly_the_planted_experts(p, found):
    units, own = experts_of(found[1]), sum(map(len, p.experts.values()))
    experts = lape(units, top=own/units.layout.size, filter=0, bar=.5)
    assert {lang: list(es) for lang, es in experts.items()} == p.experts
    assert all(torch.all(experts.score[at] > .6) for at in p.shared_experts)
    assert all(experts.score[at].isnan() for at in p.idle_experts)


def test_planted_experts_routing_tables_say_what_was_planted(p, found):
    table = routing_table(found[1]).set_index(["lang", "layer", "expert"])
    for lang in p.langs:
        for at in [(l, e) for l in range(found[1].n_layers) for e in range(p.hf.config.num_local_experts)]:
            mine = at in p.experts[lang] or at in p.shared_experts
            assert (table.share[(lang, *at)], table.weight[(lang, *at)]) == ((.5, .5) if mine else (0, 0))
    assert routing_divergence(found[1]).bits.tolist() == pytest.approx([.5]*len(routing_divergence(found[1])))


def test_planted_experts_ablate_destroys_one_language_by_neurons_and_by_experts_alike(p, found):
    model, stats = found
    texts = {lang: ts[:6] for lang, ts in p.texts(6, seed=1).items()}
    before = {lang: perplexity(p, ts) for lang, ts in texts.items()}
    layout = view(model).layout
    for lang in p.langs:
        neurons = NeuronSet(p.neurons[lang], layout)
        for off in (neurons, NeuronSet(p.experts[lang], layout.experts, site="router")):
            with ablate(off).on(model): after = {x: perplexity(p, ts) for x, ts in texts.items()}
            assert after.pop(lang) == pytest.approx(p.expected_perplexity(texts[lang], [lang]), rel=.01)
            assert after == {x: before[x] for x in p.langs if x != lang}, "the other languages change"
    assert {lang: perplexity(p, ts) for lang, ts in texts.items()} == before


def test_planted_experts_random_neurons_of_equal_size_do_nothing_of_the_kind(p, found):
    model, stats = found
    texts, neurons = p.texts(6, seed=1), lape(stats)
    for seed in range(2):
        control = random_neurons(stats, like=neurons, seed=seed)
        for lang in p.langs:
            with ablate(control[lang] - neurons[lang]).on(model): after = perplexity(p, texts[lang])
            assert after < 1.3*p.expected_perplexity(texts[lang]) < .5*p.expected_perplexity(texts[lang], [lang])


def test_planted_experts_control_in_the_same_experts_does_nothing_either(p, found):
    model, stats = found
    texts, neurons = p.texts(6, seed=1), lape(stats)
    control = random_neurons(stats, like=neurons, seed=0, among="part")
    for lang in p.langs:
        part = neurons.to_df().query("lang == @lang").groupby(["layer", "part"]).size()
        assert control.to_df().query("lang == @lang").groupby(["layer", "part"]).size().equals(part)
        untouched = perplexity(p, texts[lang])
        with ablate(control[lang] - neurons[lang]).on(model): assert perplexity(p, texts[lang]) == untouched


def test_planted_experts_reached_by_few_tokens_have_no_rate_given_routing(p, found):
    stats = found[1]
    few = {lang: 29 if lang == p.langs[0] else 30 for lang in p.langs}
    routed = torch.stack([torch.where(r > 0, few[lang], 0) for lang, r in zip(p.langs, stats.routing["routed"])])
    counts = torch.stack([c.clamp(max=few[lang]) for lang, c in zip(p.langs, stats.count_pos)])
    thin = replace(stats, count_pos=counts, routing=stats.routing | dict(routed=routed))
    rates = rates_of(thin, given="routing")
    for layer in range(stats.n_layers):
        top = rates.of(layer).max(1)
        assert top[0] == 0 and (top[1:] > 0).all()
    assert (rates_of(thin).of(0).max(1) > 0).all()


def test_planted_experts_of_another_language_do_nothing_until_tokens_are_sent_there(p, found):
    model, _ = found
    a, b = p.langs[:2]
    words, layout = " ".join(f"{b}{i}" for i in range(p.n_words)), view(model).layout
    held = set_to(NeuronSet(p.neurons[a], layout), ON)
    before = logits(p, [words])
    with held.on(model): assert torch.equal(logits(p, [words]), before)
    sent = add(NeuronSet(p.experts[a], layout.experts, site="router"), ON - OFF + 50)
    with (sent + held).on(model): best = logits(p, [words])[1:].argmax(-1)
    assert p.tokenizer.convert_ids_to_tokens(best) == [p.successor(w, a) for w in words.split()]


def test_planted_experts_refuse_sizes_that_cannot_hold_them():
    with pytest.raises(ValueError, match="give 4 or more"): planted_model(experts=3)
    with pytest.raises(ValueError, match="multiple of 4"): planted_model(experts=4, d_mlp=301)
    with pytest.raises(ValueError, match="raise d_mlp or n_layers"): planted_model(experts=4, d_mlp=4)
    with pytest.raises(ValueError, match="raise d_mlp or n_layers"): planted_model(experts=12, n_layers=1, d_mlp=8)


def test_planted_experts_are_a_function_of_the_seed_and_leave_the_dense_model_as_it_was():
    a, b, c = (planted_model(experts=4, n_words=3, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.hf.state_dict().values(), b.hf.state_dict().values()))
    assert (a.neurons, a.experts) == (b.neurons, b.experts) and a.experts != c.experts
    dense = planted_model(n_words=3)
    assert type(dense.hf).__name__ == "LlamaForCausalLM" and dense.experts == {} and dense.shared_experts == dense.idle_experts == []
    assert dense.neurons["en"] == [(0, 327), (0, 479), (0, 545), (1, 10)] # as before there were experts
    assert repr(a) == "Planted(en, de, fr: 2 layers x 4 experts of 152 neurons, 4 of them each language's own)"
    assert len(a.tokenizer) == len(SPECIALS) + 9
