"The seam to TransformerLens, against Hugging Face's own forward pass."
import pytest
import torch

from langneuron_mi.models.loading import load_model
from langneuron_mi.models.logits import read_tokens
from langneuron_mi.models.view import view
from langneuron_mi.testing.tiny import tiny_model

ARCHS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "bloom", "gpt2"]


@pytest.mark.parametrize("arch", ARCHS)
def test_logits_logits_equal_hugging_face(arch):
    hf, tok = tiny_model(arch)
    ids = torch.randint(5, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    want = hf(ids).logits.detach().clone()
    v = view(load_model(hf, tokenizer=tok))
    torch.testing.assert_close(v.logits(ids), want, atol=1e-4, rtol=1e-4)


def test_logits_body_runs_without_the_unembedding():
    hf, tok = tiny_model("llama")
    v = view(load_model(hf, tokenizer=tok))
    calls = []
    handle = v.hf.lm_head.register_forward_hook(lambda *a: calls.append(1))
    fired = []
    with v.hooks([(1, "post", lambda x: fired.append(x.shape))]):
        v.body(torch.tensor([[4, 5, 6]]))
    handle.remove()
    assert fired and not calls


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "bloom"])
def test_logits_last_logits_are_those_of_all_positions(arch):
    hf, tok = tiny_model(arch)
    v = view(load_model(hf, tokenizer=tok))
    ids, mask = torch.randint(3, 50, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    mask[0, :4] = 0
    whole, last = v.logits(ids, mask), v.logits(ids, mask, keep=2)
    assert last.shape[1] == 2 and torch.allclose(whole[:, -2:], last, atol=1e-6)


@pytest.mark.parametrize("arch", ["gemma2", "llama", "gpt2", "bloom"])  # llama with a bias, gemma2 with capped logits
def test_logits_log_probs_by_parts_of_the_vocabulary(arch):
    "Equal to a softmax over Hugging Face's own logits, however the vocabulary is cut; a hook on the unembedding is obeyed."
    hf, tok = tiny_model(arch)
    if arch == "llama":
        bias = torch.randn(hf.lm_head.out_features, generator=torch.Generator().manual_seed(1))
        hf.lm_head.bias = torch.nn.Parameter(bias)
    ids = torch.tensor([[1, 50, 60, 70, 80], [1, 20, 33, 44, 50]])
    with torch.no_grad(): want = hf(ids).logits.flatten(0, 1).double().log_softmax(-1)
    v = view(load_model(hf, tokenizer=tok))
    assert v.has_head
    rows, tokens = torch.arange(10).repeat_interleave(5), torch.randint(0, want.shape[1], (50,), generator=torch.Generator().manual_seed(0))
    tokens[::5] = want.argmax(-1)
    hidden = v.hidden(ids).flatten(0, 1).detach()
    for size in (7, 64, 10**6):
        blocks = list(v.logit_blocks(hidden, size))
        assert len(blocks) == -(-want.shape[1]//size)
        got, likeliest = read_tokens(blocks, rows, tokens)
        assert torch.allclose(got, want[rows, tokens], atol=1e-5) and torch.equal(likeliest, want.argmax(-1)[rows] == tokens)
    module = v.hf.get_output_embeddings()
    handle = module.register_forward_hook(lambda m, args, out: out*0)
    assert [x.count_nonzero() for _, x in v.logit_blocks(hidden)] == [0]
    handle.remove()
