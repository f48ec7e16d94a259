"Steering against Hugging Face: log-probabilities by its own loss, edits by plain PyTorch hooks on its modules."
import numpy as np
import pytest
import torch
from lens import lens_models

from langneuron_mi.text.sources import load_corpus
from langneuron_mi.change.generation import counts_as, generate_texts, identify, text_quality
from langneuron_mi.change.interventions import Current, Intervention, ablate, add, amplify, set_to, steer
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.find.language_neurons import LanguageNeurons
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.measure.probes import Fact, Probes
from langneuron_mi.recording.record import record
from langneuron_mi.measure.steering import Steering, factor, layer_sweep, log_probs, lss, tokenize
from langneuron_mi.testing.planted import planted_model
from langneuron_mi.testing.tiny import tiny_model

PAIRS = [("The capital of Germany is", ["The capital of Germany is Berlin", "The capital of Germany is Берлин", "The capital of Germany is柏林市中心"]),
         ("首都は", ["首都は東京", "首都はTokyo City"]), ("เมืองหลวงคือ", ["เมืองหลวงคือกรุงเทพ", "เมืองหลวงคือBangkok"]), ("a", ["ab", "a long answer of many words"])]


def hf_log_prob(hf, tok, prompt, text):
    "Minus Hugging Face's own loss, summed over the tokens of the text that the prompt does not have (byte tokens: nothing merges)."
    p, t = [1] + tok(prompt, add_special_tokens=False).input_ids, [1] + tok(text, add_special_tokens=False).input_ids
    cut = next((i for i, (a, b) in enumerate(zip(p, t)) if a != b), len(p))
    labels = torch.tensor([[-100]*cut + t[cut:]])
    with torch.no_grad(): return -float(hf(torch.tensor([t]), labels=labels).loss)*(len(t) - cut)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gemma2", "gpt2", "bloom"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_steering_log_probs_equal_hugging_face_loss(arch, batch_size):
    for name, hf, tok, model in lens_models(arch):
        rows = tokenize(model, [p for p, _ in PAIRS], [t for _, t in PAIRS])
        got = log_probs(model, rows, batch_size=batch_size)
        for (p, texts), scores in zip(PAIRS, got):
            for t, s in zip(texts, scores): assert s == pytest.approx(hf_log_prob(hf, tok, p, t), abs=1e-4, rel=1e-5), (name, p, t)


def test_steering_tokens_merge_at_the_boundary():
    "A tokenizer that merges the prompt's end with the answer's start: the merged token is scored, and counted."
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    hf, byte = tiny_model("llama")
    chars = {c: i for i, c in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefgh", "ab"])}
    tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=chars, merges=[("a", "b")], unk_token="<unk>")), bos_token="<bos>", pad_token="<pad>", unk_token="<unk>")
    model = load_model(hf, tokenizer=tok)
    [row] = tokenize(model, ["ca"], [["cab", "cad"]])
    assert row.merged and row.rest == [[chars["ab"]], [chars["a"], chars["d"]]]
    scores = log_probs(model, [row])[0]
    bos = [] if view(model).bos_token_id is None else [1]
    def direct(ids, cut):
        with torch.no_grad(): lp = tiny_model("llama")[0](torch.tensor([bos + ids])).logits.log_softmax(-1)[0]
        return sum(float(lp[len(bos) + i - 1, ids[i]]) for i in range(cut, len(ids)))
    c, a, d, ab = (chars[x] for x in ("c", "a", "d", "ab"))
    assert scores[0] == pytest.approx(direct([c, ab], 1), abs=1e-4)        # c | ab
    assert scores[1] == pytest.approx(direct([c, a, d], 1), abs=1e-4)      # c | a d: both from where the first of them leaves the prompt


# operators, values and positions against plain hooks

def plain_edit(hf, neurons, fn, positions, prompt):
    "The same edit by PyTorch hooks on Hugging Face's modules; `fn(a, layer_a) -> new a`; `prompt` positions are the prompt's."
    handles, past = [], {}
    for l, layer in enumerate(hf.model.layers):
        cols = [n for ll, n in neurons if ll == l]
        if not cols: continue
        def hook(m, args, out, l=l, cols=cols):
            n, seen = out.shape[1], past.get(l, 0) if CACHE["on"] else 0
            past[l] = seen + n
            at = seen + torch.arange(n)
            keep = dict(all=at >= 0, prompt=at < prompt, generated=at >= prompt, last=at >= prompt - 1)[positions]
            new = out.clone()
            edited = fn(out[..., cols], out)
            new[..., cols] = torch.where(keep[None, :, None], edited, out[..., cols])
            return new
        handles.append(layer.mlp.act_fn.register_forward_hook(hook))
    return handles


CACHE = dict(on=False)
SET = [(0, 3), (0, 10), (1, 7), (1, 40)]
VALUES = {"ablate": (lambda s: ablate(s), lambda a, full: a*0), "scale": (lambda s: amplify(s, by=3.), lambda a, full: a*3),
          "set": (lambda s: set_to(s, 1.5), lambda a, full: torch.full_like(a, 1.5)), "add": (lambda s: add(s, .5, scale=2.), lambda a, full: a + 1.),
          "set10p": (lambda s: set_to(s, Current("quantile", .1)), lambda a, full: full.quantile(.1, -1, keepdim=True).expand_as(a)),
          "setmax": (lambda s: set_to(s, Current("max")), lambda a, full: full.amax(-1, keepdim=True).expand_as(a)),
          "plusmax": (lambda s: add(s, Current("max")), lambda a, full: a + full.amax(-1, keepdim=True))}


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
@pytest.mark.parametrize("name", VALUES)
def test_steering_every_value_and_position_equals_a_plain_hook(name, positions):
    make, fn = VALUES[name]
    prompts = ["a short one", "another prompt, a good deal longer than the first", "three"]
    for kind, hf, tok, model in lens_models("llama"):
        v, s = view(model), NeuronSet(SET, (2, 64))
        intervention = make(s).where(positions)
        for use_cache in (True, False):
            with intervention.on(model): got = v.generate(prompts, 6, use_cache=use_cache)
            ids, mask = v.encode(prompts)
            want = []
            for row, m in zip(ids, mask):  # alone and without pads: batching must not matter
                row, CACHE["on"] = row[m.bool()][None], True
                handles = plain_edit(hf, SET, fn, positions, row.shape[1])
                out = hf.generate(row, max_new_tokens=6, do_sample=False, pad_token_id=0)
                for h in handles: h.remove()
                want.append(tok.decode(out[0, row.shape[1]:], skip_special_tokens=True))
            assert got == want, (kind, use_cache)
        # teacher-forced logits, padded on either side, every row
        CACHE["on"] = False
        full = [r[m.bool()].tolist() for r, m in zip(ids, mask)]
        width = max(map(len, full))
        for left in (True, False):
            pad = lambda r, x, own: [x]*(width - len(r)) + own if left else own + [x]*(width - len(r))
            batch, real = torch.tensor([pad(r, 0, r) for r in full]), torch.tensor([pad(r, 0, [1]*len(r)) for r in full])
            with intervention.on(model): logits = v.logits(batch, real)
            for i, r in enumerate(full):
                handles = plain_edit(hf, SET, fn, positions, len(r))
                with torch.no_grad(): alone = hf(torch.tensor([r])).logits[0]
                for h in handles: h.remove()
                torch.testing.assert_close(logits[i][real[i].bool()].float(), alone, rtol=1e-4, atol=1e-4)


def test_steering_log_probs_under_an_intervention_equal_plain_hooks():
    s = NeuronSet(SET, (2, 64))
    for positions in ("all", "prompt", "generated", "last"):
        for name in ("scale", "set", "setmax"):
            make, fn = VALUES[name]
            for kind, hf, tok, model in lens_models("llama"):
                rows = tokenize(model, [p for p, _ in PAIRS], [t for _, t in PAIRS])
                with make(s).where(positions).on(model): got = log_probs(model, rows)
                CACHE["on"] = False
                for (p, texts), scores, row in zip(PAIRS, got, rows):
                    for t, x in zip(texts, scores):
                        handles = plain_edit(hf, SET, fn, positions, len(row.prefix))
                        want = hf_log_prob(hf, tok, p, t)
                        for h in handles: h.remove()
                        assert x == pytest.approx(want, abs=2e-4, rel=1e-5), (kind, positions, name, t)


@pytest.mark.parametrize("positions", ["prompt", "generated", "last"])
def test_steering_positions_hold_in_hugging_faces_own_generate(positions):
    hf, tok = tiny_model("gemma3")
    model = load_model(hf, tokenizer=tok)
    v, i = view(model), set_to(NeuronSet(SET, (2, 64)), 4.).where(positions)
    prompts = ["a short one", "another prompt, a good deal longer"]
    ids, mask = v.encode(prompts)
    with i.on(model): own = v.hf.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    with i.on(model): ours = v.generate(prompts, 6)
    assert v.tokenizer.batch_decode(own[:, ids.shape[1]:], skip_special_tokens=True) == ours
    if positions == "generated":
        with i.where("all").on(model): assert v.generate(prompts, 6) != ours


def test_steering_composition_deactivates_then_activates():
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    a, b = NeuronSet([(0, 1), (0, 2)], (2, 64)), NeuronSet([(0, 2), (1, 3)], (2, 64))
    ids = torch.tensor([[1, 50, 60]])
    with steer(a, b, to=2.).on(model): got = view(model).logits(ids)
    with (set_to(a - b, 0.) + set_to(b, 2.)).on(model): want = view(model).logits(ids)
    torch.testing.assert_close(got, want)


def test_steering_factor_one_and_the_empty_set_are_the_same_bits():
    hf, tok = tiny_model("gemma3")
    model = load_model(hf, tokenizer=tok)
    v, ids = view(model), torch.tensor([[1, 50, 60, 70]])
    plain, text = v.logits(ids), v.generate(["some text"], 5)
    for i in (amplify(NeuronSet(SET, (2, 64)), by=1.), set_to(NeuronSet([], (2, 64)), 9.), amplify(NeuronSet(SET, (2, 64)), by=1.).where("last")):
        with i.on(model): assert torch.equal(v.logits(ids), plain) and v.generate(["some text"], 5) == text


def test_steering_errors_leave_no_state_behind():
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    v = view(model)
    with pytest.raises(RuntimeError):
        with v.at(3): raise RuntimeError
    assert v.prompt is None and v.offset == 0
    v.generate(["abc"], 2)
    assert v.prompt is None and v.offset == 0 and v.prefill is None and not hf._forward_pre_hooks
    with ablate(NeuronSet(SET, (2, 64))).where("last").on(model): v.hf.generate(torch.tensor([[1, 50, 60]]), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert v.prompt is None and v.offset == 0 and v.prefill is None and not hf._forward_pre_hooks
    with pytest.raises(ValueError, match="no positions"): ablate(NeuronSet(SET, (2, 64))).where("first")
    with pytest.raises(ValueError, match="quantile is a share"): Current("quantile", 10)
    with pytest.raises(ValueError, match="no test-time value"): Current("mean")


# the experiment

@pytest.fixture(scope="module")
def study():
    p = planted_model()
    model = load_model(p.hf, tokenizer=p.tokenizer)
    facts = [Fact(f"after {m}", "successor", {l: (f"{l}{m}", f"{l}{p.order[m]}") for l in p.langs}) for m in range(p.n_words)]
    probes = Probes(tuple(facts), {"successor": {l: "[X] [Y]" for l in p.langs}}, p.langs, "toy")
    train, held = load_corpus(p.texts(80, seed=0)).split(.3, seed=0)
    stats = record(model, train, groups="all", texts=40, progress=False)
    own = LanguageNeurons({l: NeuronSet(p.neurons[l], (2, stats.d_mlp)) for l in p.langs}, seen=stats.seen)
    return p, model, probes, stats, own, held


def test_lss_equals_counting_by_hand(study):
    p, model, probes, stats, own, held = study
    s = lss(model, own, probes, ["p_median", "+mean", "setmax"], stats=stats, controls=1, n=None, progress=False)
    v = view(model)
    for f in ("p_median", "+mean", "setmax"):
        for base, target in (("en", "de"), ("fr", "en")):
            moved, shifts = [], []
            for item in probes.items(base, target):
                def d():
                    ids = v.encode([item.prompt])[0]
                    lp = v.logits(ids).log_softmax(-1)[0, -1]
                    return float(lp[p.tokenizer(item.object_target, add_special_tokens=False).input_ids[0]] - lp[p.tokenizer(item.object_base, add_special_tokens=False).input_ids[0]])
                before = d()
                with factor(f, stats)(own[target], target).on(model): after = d()
                moved.append(after > before)
                shifts.append(after - before)
            row = s.to_df().query("factor == @f and kind == 'own' and base == @base and target == @target").iloc[0]
            assert row.lss == np.mean(moved) and row["shift"] == pytest.approx(np.mean(shifts), abs=1e-3) and row.n == len(moved)
            assert row["shift"] == pytest.approx(row.target_change - row.base_change, abs=1e-9)
    assert (s.to_df().query("kind == 'own' and factor == 'p_median'").lss == 1).all()
    assert set(s.items.kind) == {"own", "random 0"} and not (s.items.base == s.items.target).any()


def test_lss_factor_one_shifts_nothing(study):
    p, model, probes, stats, own, held = study
    s = lss(model, own, probes, ["x1"], stats=stats, progress=False)
    assert (s.items.target_after == s.items.target_before).all() and (s.items.base_after == s.items.base_before).all() and (s.to_df().lss == 0).all()


def test_lss_factor_one_shifts_nothing_in_a_wider_model():
    "With several targets and answers of different length, a batch of other shape would round differently; a move of 1e-6 is not a move."
    hf, tok = tiny_model("llama", hidden_size=512, intermediate_size=64, num_attention_heads=8, head_dim=64)
    model = load_model(hf, tokenizer=tok)
    langs = ("en", "de", "fr", "es")
    facts = [Fact(f"f{i}", "is", {l: (f"{'thing '*(i % 4)}{i}", f"{l} {'word '*(j + i % 3)}{i}") for j, l in enumerate(langs)}) for i in range(8)]
    own = {l: NeuronSet([(0, 3 + k), (1, 9 + k)], (2, 64)) for k, l in enumerate(langs)}
    s = lss(model, own, Probes(tuple(facts), {"is": {l: "[X] is [Y]" for l in langs}}, langs, "toy"), ["x1"], controls=0, batch_size=3, progress=False)
    assert (s.items.target_after == s.items.target_before).all() and (s.items.base_after == s.items.base_before).all()


def test_lss_off_switches_the_base_off_first(study):
    p, model, probes, stats, own, held = study
    s = lss(model, own, probes, ["p_median", "off+p_median"], stats=stats, controls=0, bases=["en"], targets=["de"], progress=False)
    by_hand = [log_probs(model, tokenize(model, [i.prompt], [[i.text_base, i.text_target]])) for i in probes.items("en", "de")]
    with (ablate(own["en"]) + factor("p_median", stats)(own["de"], "de")).on(model):
        by_hand = [log_probs(model, tokenize(model, [i.prompt], [[i.text_base, i.text_target]]))[0] for i in probes.items("en", "de", 100, 0)]
    got = s.items[s.items.factor == "off+p_median"][["base_after", "target_after"]].to_numpy()
    assert np.allclose(got, by_hand, atol=1e-4) and not np.allclose(got, s.items[s.items.factor == "p_median"][["base_after", "target_after"]])


def test_lss_summary_interval_holds_its_value():
    import pandas as pd
    rows = [("f", "own", "en", t, f"{i}", "r", 0., 0., 0., 1. if t == "de" or i == 0 else -1.) for t, n in (("de", 2), ("fr", 40)) for i in range(n)]
    s = Steering(pd.DataFrame(rows, columns=["factor", "kind", "base", "target", "fact", "relation", "base_before", "target_before", "base_after", "target_after"]), pd.DataFrame(), pd.DataFrame(columns=["factor", "kind", "target", "ratio"])).summary().iloc[0]
    assert s.low <= s.lss <= s.high


def test_lss_summary_is_not_certain_of_facts_that_all_moved():
    "Resampling ten facts that all moved finds no spread; the exact interval of 10 out of 10 does."
    import pandas as pd
    from scipy.stats import binomtest
    rows = [("f", "own", "en", t, f"{i}", "r", 0., 0., 0., 1.) for t in ("de", "fr") for i in range(10)]
    s = Steering(pd.DataFrame(rows, columns=["factor", "kind", "base", "target", "fact", "relation", "base_before", "target_before", "base_after", "target_after"]), pd.DataFrame(), pd.DataFrame(columns=["factor", "kind", "target", "ratio"])).summary().iloc[0]
    assert (s.lss, s.high) == (1, 1) and s.low == pytest.approx(binomtest(10, 10).proportion_ci(.95).low) and .6 < s.low < .75


def test_lss_cost_pick_save(study, tmp_path):
    p, model, probes, stats, own, held = study
    s = lss(model, own, probes, ["p_median", "=0", "x1"], stats=stats, text=held, text_tokens=100, controls=1, progress=False)
    assert len(s.cost) == 3*2*3 and (s.cost.query("factor == 'x1'").ratio == 1).all()
    assert (s.cost.query("factor == '=0' and kind == 'own'").ratio > 2).all()  # their own language is lost
    assert s.pick(bound=2.) == "p_median"
    with pytest.raises(ValueError, match="no factor costs less"): s.pick(bound=.5)
    assert s.pick(rule=lambda d: d.loc[d["shift"].idxmin(), "factor"]) == "=0"
    with pytest.raises(ValueError, match="the rule named 'p_mx'"): s.pick(rule=lambda d: "p_mx")
    again = Steering.load(s.save(tmp_path/"s.safetensors"))
    assert again.items.equals(s.items) and again.to_df().equals(s.to_df()) and again.cost.equals(s.cost) and again.work == s.work
    with pytest.raises(ValueError, match="needs perplexities"): lss(model, own, probes, "x1", progress=False).pick()
    diff = s.against_random()
    assert (diff.query("factor == 'p_median'").low > 0).all()
    with pytest.raises(ValueError, match="no random controls"): lss(model, own, probes, "x1", controls=0, progress=False).against_random()


def test_lss_killed_and_restarted_gives_the_same_table(study, tmp_path, monkeypatch):
    from langneuron_mi.measure import steering
    p, model, probes, stats, own, held = study
    clean = lss(model, own, probes, ["p_median", "x3"], stats=stats, out=tmp_path/"a", progress=False)
    real, calls = steering.log_probs, []
    def stop(*a, **k):
        calls.append(1)
        if len(calls) == 9: raise KeyboardInterrupt
        return real(*a, **k)
    monkeypatch.setattr(steering, "log_probs", stop)
    with pytest.raises(KeyboardInterrupt): lss(model, own, probes, ["p_median", "x3"], stats=stats, out=tmp_path/"b", progress=False)
    calls.append(1)  # past 9
    s = lss(model, own, probes, ["p_median", "x3"], stats=stats, out=tmp_path/"b", progress=False)
    assert s.items.equals(clean.items) and s.work["from_cache"] > 0
    before = len(calls)
    again = lss(model, own, probes, ["p_median", "x3", "x1"], stats=stats, out=tmp_path/"b", progress=False)
    assert again.items[again.items.factor != "x1"].reset_index(drop=True).equals(clean.items) and len(calls) > before


def test_lss_equal_objects_are_left_out_and_counted(study):
    p, model, probes, stats, own, held = study
    facts = list(probes.facts)
    facts[0] = Fact("same", "successor", {l: (f"{l}0", "en1") for l in p.langs})
    s = lss(model, own, Probes(tuple(facts), probes.templates, p.langs, "toy"), "x3", stats=stats, controls=0, progress=False)
    assert (s.counts.n_equal == 1).all() and (s.counts.n == len(facts) - 1).all() and "same" not in set(s.items.fact)


def test_lss_refuses(study):
    p, model, probes, stats, own, held = study
    with pytest.raises(ValueError, match="no neurons for the target 'ja'"): lss(model, own, probes, stats=stats, targets=["ja"])
    with pytest.raises(ValueError, match="needs the group 'text_means'"): lss(model, own, probes, "p_max", stats=record(model, p.texts(9, seed=0), groups=("counts",), progress=False))
    with pytest.raises(ValueError, match="pass stats="): lss(model, own, probes, "p_max")
    with pytest.raises(ValueError, match="no factor 'p_mx'; allowed are p_max"): lss(model, own, probes, "p_mx", stats=stats)
    with pytest.raises(ValueError, match="names no factor"): lss(model, own, probes, [])
    empty = {"de": own["de"] - own["de"], "en": own["en"]}
    with pytest.raises(ValueError, match="owns no neurons"): lss(model, empty, probes, "x3", targets=["de"])
    with pytest.warns(UserWarning, match="own no neurons: de"): lss(model, empty, probes, "x3", progress=False)
    few = Probes(probes.facts, {"successor": {"en": "[X] [Y]"}}, p.langs, "toy")
    with pytest.raises(ValueError, match="cannot be asked in de"): lss(model, own, few, "x3", bases=["de"])
    with pytest.raises(ValueError, match="have no names in fr"): lss(model, own, Probes(probes.facts, probes.templates, ("en", "de"), "toy"), "x3", targets=["fr"])
    with ablate(own["de"]).on(model), pytest.raises(ValueError, match="an intervention is on"): lss(model, own, probes, "x3")


def test_layer_sweep_uses_the_neurons_of_its_layers(study):
    p, model, probes, stats, own, held = study
    df = layer_sweep(model, own, probes, "p_median", layers=[0, range(0, 2)], stats=stats, controls=0, progress=False)
    assert df.layer.tolist() == ["0", "0–1"] and df.n_neurons.tolist() == [sum(l == 0 for s in own.values() for l, _ in s), sum(map(len, own.values()))]
    assert df.value.tolist()[1] == 1.
    with pytest.raises(ValueError, match="layers are 0 to 1"): own["de"].in_layers([5])
    with pytest.raises(ValueError, match="of one factor"): layer_sweep(model, own, probes, ["x1", "x2"], stats=stats)
    two = layer_sweep(model, own, probes, "p_median", layers=[[0, 1]], stats=stats, controls=2, progress=False)
    assert two.kind.tolist() == ["own neurons", "random neurons"] and two.layer.tolist() == ["0–1"]*2


def test_steering_factors_by_name(study):
    p, model, probes, stats, own, held = study
    n = own["de"]
    for name, kind in dict(p_max="p_max", p_median="p_median", p_90="p_90", mean="mean", p90="p90", median="median").items():
        assert torch.equal(factor(name, stats)(n, "de").edits[0].value, stats.value("de", kind).values[n.mask()].double())
    others = torch.stack([stats.value(l, "mean").values for l in ("en", "fr")]).mean(0)
    assert torch.equal(factor("+diff", stats)(n, "de").edits[0].value, (stats.value("de", "mean").values - others)[n.mask()])
    assert torch.equal(factor("+2mean", stats)(n, "de").edits[0].value, 2*stats.value("de", "mean").values[n.mask()])
    assert factor("set10p")(n, "de").edits[0].current == Current("quantile", .1)
    assert factor("=-1.5")(n, "de").edits[0].value.unique().tolist() == [-1.5]


# generated text

def test_generation_table_and_summary(study, tmp_path):
    p, model, probes, stats, own, held = study
    prompts = {l: [w.rsplit(" ", 1)[0] for w in p.texts(3, seed=5)[l]] for l in ("en", "fr")}
    rows = {("p_median", "de"): factor("p_median", stats)(own["de"], "de"), ("p_median", "random 0", "de"): factor("p_median", stats)(own["de"].random_like(1), "de")}
    g = generate_texts(model, prompts, rows, max_new_tokens=4, out=tmp_path/"g.json", progress=False)
    assert len(g.df) == 3*6 and set(g.df.kind) == {"none", "own", "random 0"}
    assert all(w.startswith("de") for t in g.df.query("kind == 'own'").text for w in t.split())
    plain = g.df.query("kind == 'none'")
    assert all(t.split()[0].startswith(b) for t, b in zip(plain.text, plain.base))
    again = generate_texts(model, prompts, rows, max_new_tokens=4, out=tmp_path/"g.json", progress=False)
    assert again.df.drop(columns=["identified_lid176"]).equals(g.df.drop(columns=["identified_lid176"]))
    assert {"in_target", "distinct_2", "repetition", "units", "n"} <= set(g.summary())
    with pytest.raises(ValueError, match="does not know ceb"): generate_texts(model, prompts, {("x1", "ceb"): ablate(own["de"])}, progress=False)
    with pytest.raises(ValueError, match="one continuation"): generate_texts(model, prompts, rows, num_return_sequences=2, progress=False)
    sampled = [generate_texts(model, prompts, rows, max_new_tokens=4, do_sample=True, seeds=(0, 1), progress=False).df.text.tolist() for _ in range(2)]
    assert sampled[0] == sampled[1] and len(sampled[0]) == 2*3*6


def test_generation_language_and_quality():
    assert identify("Selamat pagi, apa kabar semuanya hari ini?", same={}) in ("id", "ms") and identify("", same={}) == ""
    assert identify("これは日本語の文章です。") == "ja" == identify("これは日本語の文章です。", by="lid176")
    with pytest.raises(ValueError, match="no identifier"): identify("x", by="cld3")
    assert counts_as("zh-Hant") == "zh" and counts_as("nb") == "no" and counts_as("ms", {}) == "ms"
    q = text_quality("ja " * 20)
    assert q["repetition"] > .9 and q["distinct_2"] < .1
    assert text_quality("one two three four five six seven")["repetition"] == 0
    assert text_quality("東京は日本の首都です", "ja")["units"] == 10 and text_quality("", "en")["units"] == 0
