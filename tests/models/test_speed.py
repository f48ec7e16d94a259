"Speed: attention, batch size, layers on several devices; none of it may change what is recorded."
import pytest
import torch
from lens import lens_models

from langneuron_mi.core.artifacts import ArtifactError
from langneuron_mi.models.view import ModelError, load_model, view
from langneuron_mi.recording.recorder import Recorder, _ahead, _Batch
from langneuron_mi.recording.record import record
from langneuron_mi.models.attention import attend, batch_sizes, fastest, free_bytes, measure_speed, window_bytes
from langneuron_mi.testing.tiny import tiny_model

ARCHS = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "bloom", "gpt2"]
TEXTS = {"en": ["the quick brown fox", "jumps over", "the lazy dog again and again"] * 4, "de": ["der schnelle braune", "Fuchs springt weit"] * 5}


@pytest.mark.parametrize("layout", ["packed", "texts"])
@pytest.mark.parametrize("arch", ARCHS)
def test_speed_attention_changes_no_count(arch, layout):
    hf, tok = tiny_model(arch)
    model = load_model(hf, tokenizer=tok)
    args = dict(length=24, layout=layout, groups="all", texts=3, progress=False)
    eager = record(model, TEXTS, **args)
    try: attend(model, "sdpa")
    except ModelError as e:
        assert "does not run with attention='sdpa'" in str(e) and arch in ("bloom", "gpt2"), e
        assert torch.equal(record(model, TEXTS, **args).moments["sum"], eager.moments["sum"]), "the switch was undone"
        return
    sdpa = record(model, TEXTS, **args)
    assert torch.equal(eager.count_pos, sdpa.count_pos) and sdpa.meta["attention"] == "sdpa"
    torch.testing.assert_close(eager.moments["sum"], sdpa.moments["sum"], rtol=1e-4, atol=1e-4)
    attend(model, "eager")
    again = record(model, TEXTS, **args)
    assert torch.equal(again.moments["sum"], eager.moments["sum"]) and "attention" not in again.meta


def test_speed_attention_logits_generation_and_hooks():
    (hf, tok), (plain, _) = tiny_model("llama"), tiny_model("llama")
    v = view(load_model(hf, tokenizer=tok))
    want = v.generate(["abc de", "f"], 6)
    attend(v, "sdpa")
    assert v.generate(["abc de", "f"], 6) == want
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(v.logits(ids), plain(ids).logits, rtol=1e-4, atol=1e-4)
    seen = []
    attn = v.model.blocks[0].attn
    for p in (attn.hook_in, attn.hook_out, attn.q.hook_out): p.add_hook(lambda act, hook: seen.append(hook.name))
    v.body(ids)
    assert len(seen) == 3
    attend(v, "eager")
    attn.hook_pattern.add_hook(lambda act, hook: None)
    with pytest.raises(ModelError, match="hook_pattern"): attend(v, "sdpa")
    assert v.attention == "eager"


def test_speed_attention_that_does_not_exist_is_undone():
    hf, tok = tiny_model("llama")
    v = view(load_model(hf, tokenizer=tok))
    with pytest.raises(ModelError, match="no_such"): attend(v, "no_such")
    assert v.attention == "eager" and hf.config._attn_implementation == "eager"
    v.body(torch.tensor([[5, 6]]))


def test_speed_attention_through_load_model(tmp_path):
    hf, tok = tiny_model("qwen2")
    hf.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    assert view(load_model(str(tmp_path), attention="sdpa")).describe()["attention"] == "sdpa"


def test_speed_attention_of_another_recording_is_not_continued(tmp_path):
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    record(model, TEXTS, length=16, out=tmp_path, progress=False)
    attend(model, "sdpa")
    with pytest.raises(ArtifactError, match="attention"): record(model, TEXTS, length=16, out=tmp_path, progress=False)


def test_speed_batch_size_auto_changes_no_count(tmp_path, monkeypatch):
    hf, tok = tiny_model("gemma3")
    model = load_model(hf, tokenizer=tok)
    args = dict(length=16, shard_size=4, progress=False)
    auto = record(model, TEXTS, batch_size="auto", out=tmp_path, **args)
    size = auto.meta["batch_size"]
    assert size in (1, 2, 4)
    fixed = record(model, TEXTS, batch_size=size, **args)
    assert torch.equal(auto.count_pos, fixed.count_pos) and torch.equal(auto.moments["sum"], fixed.moments["sum"]) and auto.meta["key"] == fixed.meta["key"]
    monkeypatch.setattr(Recorder, "measured_batch_size", lambda *a: pytest.fail("a recording that is there was measured again"))
    again = record(model, TEXTS, batch_size="auto", out=tmp_path, **args)
    assert again.meta["batch_size"] == size and torch.equal(again.count_pos, auto.count_pos)


def test_speed_fastest_and_memory():
    assert fastest({1: 1., 2: 1.9, 4: 3., 8: 3.05}.get, [1, 2, 4, 8]) == 4
    assert fastest({1: 5., 2: 1.}.get, [1, 2]) == 1
    assert fastest({1: 1., 2: 9.}.get, [1, 2], seconds=0.) == 1, "no time for the second"
    def crowded(size):
        if size > 2: raise torch.OutOfMemoryError("full")
        return float(size)
    assert fastest(crowded, [1, 2, 4, 8]) == 2
    hf, tok = tiny_model("llama")
    v = view(load_model(hf, tokenizer=tok))
    one = window_bytes(v, 64)
    assert batch_sizes(v, 64, 16, memory=0) == [1] and batch_sizes(v, 64, 16, memory=5 * one) == [1, 2, 4] and batch_sizes(v, 64, 3, memory=99 * one) == [1, 2]
    assert window_bytes(v, 128) > 2 * one, "the table of positions grows with the square"
    attend(v, "sdpa")
    assert window_bytes(v, 128) < 2 * one + 1 and free_bytes(torch.device("cpu")) > 2**20


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_speed_activation_is_read_where_the_model_computes_it(arch):
    "The value is the same as computing it again, and the module's hooks are gone afterwards."
    for name, hf, tok, model in lens_models(arch):
        v = view(model)
        have = [v.act_module(l) is not None for l in range(v.n_layers)]
        assert have == [v.gated and name == "bridge"] * v.n_layers
        args = dict(length=12, batch_size=3, groups="all", texts=3, progress=False)
        read = record(model, TEXTS, **args)
        assert not any(m._forward_hooks for l in range(v.n_layers) if (m := v.act_module(l)) is not None)
        v._acts = {}  # now it is computed again
        again = record(model, TEXTS, **args)
        assert torch.equal(read.count_pos, again.count_pos)
        torch.testing.assert_close(read.moments["sum"], again.moments["sum"], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(read.quantiles["quantile"], again.quantiles["quantile"], rtol=1e-6, atol=1e-7)


def test_speed_another_activation_after_loading_is_seen():
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    before = record(model, TEXTS, length=12, progress=False)
    hf.model.layers[1].mlp.act_fn = torch.nn.Tanh()
    v = view(model)
    assert v.act_module(0) is not None and v.act_module(1) is None
    after = record(model, TEXTS, length=12, progress=False)
    assert torch.equal(before.moments["sum"][:, 0], after.moments["sum"][:, 0]) and torch.equal(before.count_pos[:, 1], after.count_pos[:, 1])
    assert not torch.allclose(before.moments["sumsq"][:, 1], after.moments["sumsq"][:, 1])


def test_speed_next_batch_is_made_before_this_one_is_done():
    made = []
    def batches():
        for i in range(3):
            made.append(i)
            yield _Batch(torch.tensor([[i]]), 1)
    seen = [(int(b.ids), len(made)) for b in _ahead(batches(), torch.device("cpu"))]
    assert seen == [(0, 2), (1, 3), (2, 3)]
    assert list(_ahead(iter([]), torch.device("cpu"))) == []


def test_speed_sums_stay_where_the_layer_is(monkeypatch):
    "A layer's sums are made on the device of its activations: here one that only looks like another."
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    asked, real = [], Recorder._fresh
    monkeypatch.setattr(Recorder, "_fresh", lambda self, layer, n, device: asked.append((layer, device.type)) or real(self, layer, n, device))
    record(model, TEXTS, length=16, shard_size=100, progress=False)
    assert asked == [(l, "cpu") for _ in TEXTS for l in range(2)], "once per layer and shard, at its first activation"


def test_speed_weights_kept_away_give_the_same_bits():
    from accelerate import cpu_offload
    (hf, tok), (away, _) = tiny_model("llama"), tiny_model("llama")
    args = dict(length=16, groups="all", texts=3, progress=False)
    want = record(load_model(hf, tokenizer=tok), TEXTS, **args)
    cpu_offload(away.model.layers[1], execution_device="cpu")
    got = record(load_model(away, tokenizer=tok), TEXTS, **args)
    assert any(p.device.type == "meta" for p in away.parameters())
    assert got.model == want.model and torch.equal(got.count_pos, want.count_pos) and torch.equal(got.moments["sum"], want.moments["sum"])
    assert all(torch.equal(got.impact[l], want.impact[l]) for l in TEXTS)


def test_speed_device_map(tmp_path):
    hf, tok = tiny_model("llama")
    hf.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), device_map={"": "cpu"})
    assert view(model).dtype == torch.float32 and view(model).fingerprint == view(load_model(str(tmp_path))).fingerprint
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    try: partly = load_model(str(tmp_path), device_map=parts, offload_folder=str(tmp_path / "off"))
    except ModelError as e: assert "disk" in str(e)  # TransformerLens 3.9 refuses what 4.3 runs
    else:
        got, want = (record(m, TEXTS, length=16, groups="all", texts=3, progress=False) for m in (partly, model))
        assert got.model == want.model and torch.equal(got.count_pos, want.count_pos) and torch.equal(got.impact["en"], want.impact["en"])
    with pytest.raises(ModelError, match="device_map"): load_model(hf, tokenizer=tok, device_map="auto")


def test_speed_table():
    hf, tok = tiny_model("llama")
    table = measure_speed(load_model(hf, tokenizer=tok), TEXTS, lengths=(8, 16, 10**6), batch_sizes_=(1, 2), repeats=1)
    assert table[["length", "batch_size"]].values.tolist() == [[8, 1], [8, 2], [16, 1], [16, 2]] and (table.tok_s > 0).all() and (table.mb > 0).all()
