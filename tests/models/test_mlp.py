"MLPs: what is read is what the model computes."
import pytest
import torch

from langneuron_mi.models.hooked import ModelError
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.testing.tiny import tiny_model


def test_mlp_wrong_mlp_is_refused():
    hf, tok = tiny_model("llama")
    hf.model.layers[1].mlp.act_fn = torch.nn.Tanh()  # what the config says no longer holds ...
    v = view(load_model(hf, tokenizer=tok))  # ... but the model's own function is used, so this is fine
    assert isinstance(v.act_fn(1), torch.nn.Tanh)
    hf2, tok2 = tiny_model("llama")
    forward = hf2.model.layers[1].mlp.down_proj.forward
    hf2.model.layers[1].mlp.forward = lambda x: forward(torch.zeros(*x.shape[:-1], 64))  # never calls gate or up
    with pytest.raises(ModelError, match="layer 1|did not fire"):
        load_model(hf2, tokenizer=tok2)
