"Attention: another implementation may not change what is recorded."
import pytest
import torch

from langneuron_mi.models.attention import attend
from langneuron_mi.models.hooked import ModelError
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.recording.record import record
from langneuron_mi.testing.tiny import tiny_model

ARCHS = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "bloom", "gpt2"]
TEXTS = {"en": ["the quick brown fox", "jumps over", "the lazy dog again and again"] * 4,
         "de": ["der schnelle braune", "Fuchs springt weit"] * 5}


@pytest.mark.parametrize("layout", ["packed", "texts"])
@pytest.mark.parametrize("arch", ARCHS)
def test_attention_changes_no_count(arch, layout):
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


def test_attention_logits_generation_and_hooks():
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


def test_attention_that_does_not_exist_is_undone():
    hf, tok = tiny_model("llama")
    v = view(load_model(hf, tokenizer=tok))
    with pytest.raises(ModelError, match="no_such"): attend(v, "no_such")
    assert v.attention == "eager" and hf.config._attn_implementation == "eager"
    v.body(torch.tensor([[5, 6]]))


def test_attention_through_load_model(tmp_path):
    hf, tok = tiny_model("qwen2")
    hf.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    assert view(load_model(str(tmp_path), attention="sdpa")).describe()["attention"] == "sdpa"
