"Identity: the same weights are the same model, an edit makes another."
import torch

from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.testing.tiny import tiny_model


def test_identity_fingerprint_same_in_bf16_other_after_an_edit():
    (a, tok), (b, _) = tiny_model("llama"), tiny_model("llama")
    va, vb = view(load_model(a, tokenizer=tok)), view(load_model(b.to(torch.bfloat16), tokenizer=tok))
    assert va.fingerprint == vb.fingerprint
    before = va.fingerprint
    with torch.no_grad():
        next(va.hf.parameters())[3, 2] += 0.25
    assert va.fingerprint != before
    changed = va.fingerprint
    next(va.hf.parameters()).data.add_(0.25)  # PyTorch's version counter does not see this
    assert va.fingerprint != changed
    other = view(load_model(tiny_model("llama", seed=1)[0], tokenizer=tok))
    gelu = view(load_model(tiny_model("llama", hidden_act="gelu")[0], tokenizer=tok))
    eps = view(load_model(tiny_model("llama", rms_norm_eps=.5)[0], tokenizer=tok))
    assert len({before, other.fingerprint, gelu.fingerprint, eps.fingerprint}) == 4
