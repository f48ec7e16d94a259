"The plain model inside a hooked one, and its classification head."
import pytest
import torch

from adapters import ARCHS, loaded
from langneuron_mi.models.view import view
from langneuron_mi.testing.tiny import tiny_model
from langneuron_mi.tuning.plain import classifier, plain_model


def test_tuning_plain_model_shares_or_copies_the_weights():
    model = loaded("llama")
    own = dict(tiny_model("llama")[0].named_parameters())
    shared, copied = plain_model(model), plain_model(model, share=False)
    where = {p.data_ptr() for p in view(model).hf.parameters()}
    assert all(p.data_ptr() in where for p in shared.parameters()) and not any(p.data_ptr() in where for p in copied.parameters())
    assert all(torch.equal(p, own[n]) for n, p in shared.named_parameters()) and not any(p.requires_grad for p in shared.parameters())


@pytest.mark.parametrize("arch", ARCHS)
def test_tuning_classifier_of_every_architecture_has_the_body_and_a_new_head(arch):
    model = loaded(arch)
    head, again, other = (classifier(model, 4, pad_token_id=0, seed=s) for s in (0, 0, 1))
    ids = torch.tensor([[1, 7, 8, 9], [1, 7, 8, 0]])
    got = head(ids, attention_mask=(ids > 0).long()).logits
    assert got.shape == (2, 4) and torch.equal(got, again(ids, attention_mask=(ids > 0).long()).logits)
    assert not torch.allclose(got, other(ids, attention_mask=(ids > 0).long()).logits)
    hidden = tiny_model(arch)[0].base_model(ids[1:, :3]).last_hidden_state[0, -1]
    torch.testing.assert_close(got[1], head.score.weight @ hidden, atol=1e-4, rtol=1e-4)


def test_tuning_classification_reads_the_last_real_token():
    head = classifier(loaded("llama"), 3, pad_token_id=0)
    alone = head(torch.tensor([[1, 7, 8]])).logits
    for padded in ([0, 0, 1, 7, 8], [1, 7, 8, 0, 0]):
        ids = torch.tensor([padded])
        torch.testing.assert_close(head(ids, attention_mask=(ids > 0).long()).logits, alone, atol=1e-5, rtol=1e-5)
