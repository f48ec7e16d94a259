"Tiny models of every architecture run, read any script, and are a function of their seed."
import pytest
import torch

from langneuron_mi.testing.tiny import ARCHS, tiny_model


@pytest.mark.parametrize("arch", ARCHS)
def test_tiny_model_runs_generates_and_is_not_degenerate(arch):
    hf, tok = tiny_model(arch)
    text = "Grüß Gott, 世界"
    ids = tok(text, return_tensors="pt", return_token_type_ids=False)
    assert tok.decode(ids["input_ids"][0], skip_special_tokens=True) == text
    more = dict(decoder_input_ids=ids["input_ids"]) if hf.config.is_encoder_decoder else {}
    with torch.no_grad(): logits = hf(**ids, **more).logits
    assert torch.isfinite(logits).all() and logits.std(-1).min() > .1
    one, many = (hf.generate(**ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(one, many)
    torch.rand(1) # the state of torch's own generator must not matter
    again = tiny_model(arch)[0].state_dict()
    assert all(torch.equal(v, again[k]) for k, v in hf.state_dict().items())


def test_tiny_model_takes_config_fields_and_can_do_without_bos():
    hf, tok = tiny_model("llama", num_hidden_layers=3, bos=False)
    assert hf.config.num_hidden_layers == 3 and tok("a")["input_ids"] != [tok.bos_token_id] and len(tok("a")["input_ids"]) == 1
