"Speed: batch size, attention, layers on several devices; none of it may change what is recorded."
import pytest
import torch
from lens import lens_models

from langneuron_mi.core.atomic import ArtifactError
from langneuron_mi.models.attention import attend
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.recording.record import record
from langneuron_mi.recording.passes import Batch, Reading, ahead
from langneuron_mi.recording.recorder import Recorder
from langneuron_mi.recording.speed import measure_speed
from langneuron_mi.testing.tiny import tiny_model

TEXTS = {"en": ["the quick brown fox", "jumps over", "the lazy dog again and again"] * 4,
         "de": ["der schnelle braune", "Fuchs springt weit"] * 5}


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
    assert torch.equal(auto.count_pos, fixed.count_pos) and torch.equal(auto.moments["sum"], fixed.moments["sum"])
    assert auto.meta["key"] == fixed.meta["key"]
    monkeypatch.setattr(Recorder, "measured_batch_size", lambda *a: pytest.fail("a recording that is there was measured again"))
    again = record(model, TEXTS, batch_size="auto", out=tmp_path, **args)
    assert again.meta["batch_size"] == size and torch.equal(again.count_pos, auto.count_pos)


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
    assert torch.equal(before.moments["sum"][:, 0], after.moments["sum"][:, 0])
    assert torch.equal(before.count_pos[:, 1], after.count_pos[:, 1])
    assert not torch.allclose(before.moments["sumsq"][:, 1], after.moments["sumsq"][:, 1])


def test_speed_next_batch_is_made_before_this_one_is_done():
    made = []
    def batches():
        for i in range(3):
            made.append(i)
            yield Batch(torch.tensor([[i]]), 1)
    seen = [(int(b.ids), len(made)) for b in ahead(batches(), torch.device("cpu"))]
    assert seen == [(0, 2), (1, 3), (2, 3)]
    assert list(ahead(iter([]), torch.device("cpu"))) == []


def test_speed_sums_stay_where_the_layer_is(monkeypatch):
    "A layer's sums are made on the device of its activations: here one that only looks like another."
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    asked, real = [], Reading.fresh
    def fresh(self, layer, part, n, device):
        asked.append((layer, device.type))
        return real(self, layer, part, n, device)
    monkeypatch.setattr(Reading, "fresh", fresh)
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


def test_speed_table():
    hf, tok = tiny_model("llama")
    table = measure_speed(load_model(hf, tokenizer=tok), TEXTS, lengths=(8, 16, 10**6), batch_sizes_=(1, 2), repeats=1)
    assert table[["length", "batch_size"]].values.tolist() == [[8, 1], [8, 2], [16, 1], [16, 2]]
    assert (table.tok_s > 0).all() and (table.mb > 0).all()
