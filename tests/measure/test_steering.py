"Steering: edits against plain PyTorch hooks, and the experiment against counting by hand."
import numpy as np
import pytest
import torch
from lens import lens_models
from plain_edits import CACHE, SET, VALUES, plain_edit

from langneuron_mi.change.interventions import Current, ablate, amplify, set_to, steer
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.measure.continuations import log_probs, tokenize
from langneuron_mi.measure.facts import Fact
from langneuron_mi.measure.factors import factor
from langneuron_mi.measure.probes import Probes
from langneuron_mi.measure.steering import layer_sweep, lss
from langneuron_mi.measure.steering_result import Steering
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.recording.record import record
from langneuron_mi.testing.tiny import tiny_model


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
    once = amplify(NeuronSet(SET, (2, 64)), by=1.)
    for i in (once, set_to(NeuronSet([], (2, 64)), 9.), once.where("last")):
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
    with ablate(NeuronSet(SET, (2, 64))).where("last").on(model):
        v.hf.generate(torch.tensor([[1, 50, 60]]), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert v.prompt is None and v.offset == 0 and v.prefill is None and not hf._forward_pre_hooks
    with pytest.raises(ValueError, match="no positions"): ablate(NeuronSet(SET, (2, 64))).where("first")
    with pytest.raises(ValueError, match="quantile is a share"): Current("quantile", 10)
    with pytest.raises(ValueError, match="no test-time value"): Current("mean")


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
                    def first(name): return lp[p.tokenizer(name, add_special_tokens=False).input_ids[0]]
                    return float(first(item.object_target) - first(item.object_base))
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
    assert (s.items.target_after == s.items.target_before).all() and (s.items.base_after == s.items.base_before).all()
    assert (s.to_df().lss == 0).all()


def test_lss_factor_one_shifts_nothing_in_a_wider_model():
    "With several targets and answers of different length, a batch of other shape would round differently; a move of 1e-6 is not a move."
    hf, tok = tiny_model("llama", hidden_size=512, intermediate_size=64, num_attention_heads=8, head_dim=64)
    model = load_model(hf, tokenizer=tok)
    langs = ("en", "de", "fr", "es")
    def names(i): return {l: (f"{'thing '*(i % 4)}{i}", f"{l} {'word '*(j + i % 3)}{i}") for j, l in enumerate(langs)}
    probes = Probes(tuple(Fact(f"f{i}", "is", names(i)) for i in range(8)), {"is": {l: "[X] is [Y]" for l in langs}}, langs, "toy")
    own = {l: NeuronSet([(0, 3 + k), (1, 9 + k)], (2, 64)) for k, l in enumerate(langs)}
    s = lss(model, own, probes, ["x1"], controls=0, batch_size=3, progress=False)
    assert (s.items.target_after == s.items.target_before).all() and (s.items.base_after == s.items.base_before).all()


def test_lss_off_switches_the_base_off_first(study):
    p, model, probes, stats, own, held = study
    s = lss(model, own, probes, ["p_median", "off+p_median"], stats=stats, controls=0, bases=["en"], targets=["de"], progress=False)
    asked = [tokenize(model, [i.prompt], [[i.text_base, i.text_target]]) for i in probes.items("en", "de", 100, 0)]
    with (ablate(own["en"]) + factor("p_median", stats)(own["de"], "de")).on(model): by_hand = [log_probs(model, a)[0] for a in asked]
    got, other = (s.items[s.items.factor == f][["base_after", "target_after"]].to_numpy() for f in ("off+p_median", "p_median"))
    assert np.allclose(got, by_hand, atol=1e-4) and not np.allclose(got, other)


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
    counts = record(model, p.texts(9, seed=0), groups=("counts",), progress=False)
    with pytest.raises(ValueError, match="needs the group 'text_means'"): lss(model, own, probes, "p_max", stats=counts)
    with pytest.raises(ValueError, match="pass stats="): lss(model, own, probes, "p_max")
    with pytest.raises(ValueError, match="no factor 'p_mx'; allowed are p_max"): lss(model, own, probes, "p_mx", stats=stats)
    with pytest.raises(ValueError, match="names no factor"): lss(model, own, probes, [])
    empty = {"de": own["de"] - own["de"], "en": own["en"]}
    with pytest.raises(ValueError, match="owns no neurons"): lss(model, empty, probes, "x3", targets=["de"])
    with pytest.warns(UserWarning, match="own no neurons: de"): lss(model, empty, probes, "x3", progress=False)
    few = Probes(probes.facts, {"successor": {"en": "[X] [Y]"}}, p.langs, "toy")
    with pytest.raises(ValueError, match="cannot be asked in de"): lss(model, own, few, "x3", bases=["de"])
    two = Probes(probes.facts, probes.templates, ("en", "de"), "toy")
    with pytest.raises(ValueError, match="have no names in fr"): lss(model, own, two, "x3", targets=["fr"])
    with ablate(own["de"]).on(model), pytest.raises(ValueError, match="an intervention is on"): lss(model, own, probes, "x3")


def test_layer_sweep_uses_the_neurons_of_its_layers(study):
    p, model, probes, stats, own, held = study
    df = layer_sweep(model, own, probes, "p_median", layers=[0, range(0, 2)], stats=stats, controls=0, progress=False)
    assert df.layer.tolist() == ["0", "0–1"]
    assert df.n_neurons.tolist() == [sum(l == 0 for s in own.values() for l, _ in s), sum(map(len, own.values()))]
    assert df.value.tolist()[1] == 1.
    with pytest.raises(ValueError, match="layers are 0 to 1"): own["de"].in_layers([5])
    with pytest.raises(ValueError, match="of one factor"): layer_sweep(model, own, probes, ["x1", "x2"], stats=stats)
    two = layer_sweep(model, own, probes, "p_median", layers=[[0, 1]], stats=stats, controls=2, progress=False)
    assert two.kind.tolist() == ["own neurons", "random neurons"] and two.layer.tolist() == ["0–1"]*2
