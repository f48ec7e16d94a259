"Models: the seam to TransformerLens, against Hugging Face's own forward pass."
import pytest
import torch

from langneuron_mi.models import view as models
from langneuron_mi.models.view import ModelError, load_model, view
from langneuron_mi.testing.tiny import tiny_model

ARCHS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "bloom", "gpt2"]


@pytest.mark.parametrize("arch", ARCHS)
def test_models_logits_equal_hugging_face(arch):
    hf, tok = tiny_model(arch)
    ids = torch.randint(5, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    want = hf(ids).logits.detach().clone()
    v = view(load_model(hf, tokenizer=tok))
    torch.testing.assert_close(v.logits(ids), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_models_generation_equals_hugging_face(arch):
    hf, tok = tiny_model(arch)
    prompts = ["abc de", "f", "ghij klm nop"]
    v0 = [tok(p).input_ids for p in prompts]
    want = [tok.decode(hf.generate(torch.tensor([r]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(r):], skip_special_tokens=True) for r in v0]
    v = view(load_model(hf, tokenizer=tok))
    for use_cache in (True, False):
        assert v.generate(prompts, 6, use_cache=use_cache) == want


def test_models_body_runs_without_the_unembedding():
    hf, tok = tiny_model("llama")
    v = view(load_model(hf, tokenizer=tok))
    calls = []
    handle = v.hf.lm_head.register_forward_hook(lambda *a: calls.append(1))
    fired = []
    with v.hooks([(1, "post", lambda x: fired.append(x.shape))]):
        v.body(torch.tensor([[4, 5, 6]]))
    handle.remove()
    assert fired and not calls


def test_models_hooks_removed_after_error_and_others_kept():
    hf, tok = tiny_model("llama")
    v = view(load_model(hf, tokenizer=tok))
    mine = []
    point = v.point(0, "post")
    point.add_hook(lambda act, hook: mine.append(1))
    with pytest.raises(ZeroDivisionError):
        with v.hooks([(0, "post", lambda x: None), (1, "pre", lambda x: None)]):
            1 / 0
    assert len(point.fwd_hooks) == 1 and not v.point(1, "pre").fwd_hooks
    v.body(torch.tensor([[4, 5]]))
    assert mine == [1]


def test_models_fingerprint_same_in_bf16_other_after_an_edit():
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


def test_models_options_that_would_be_ignored_are_refused():
    hf, tok = tiny_model("llama")
    with pytest.raises(ModelError, match="dtype cannot be used"):
        load_model(hf, tokenizer=tok, dtype=torch.bfloat16)
    with pytest.raises(ModelError, match="own tokenizer"):
        load_model(load_model(hf, tokenizer=tok), tokenizer=tok)


def test_models_are_freed():
    import gc
    import weakref
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    ref = weakref.ref(model)
    del model, hf
    gc.collect()
    assert ref() is None


def test_models_bos_is_what_the_tokenizer_adds():
    for bos in (True, False):
        hf, tok = tiny_model("llama", bos=bos)
        v = view(load_model(hf, tokenizer=tok))
        assert v.bos_token_id == (tok.bos_token_id if bos else None)


def test_models_wrong_mlp_is_refused():
    hf, tok = tiny_model("llama")
    hf.model.layers[1].mlp.act_fn = torch.nn.Tanh()  # what the config says no longer holds ...
    v = view(load_model(hf, tokenizer=tok))  # ... but the model's own function is used, so this is fine
    assert isinstance(v.act_fn(1), torch.nn.Tanh)
    hf2, tok2 = tiny_model("llama")
    forward = hf2.model.layers[1].mlp.down_proj.forward
    hf2.model.layers[1].mlp.forward = lambda x: forward(torch.zeros(*x.shape[:-1], 64))  # never calls gate or up
    with pytest.raises(ModelError, match="layer 1|did not fire"):
        load_model(hf2, tokenizer=tok2)


def test_models_errors_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="did you mean 'gemma-3-270m'"):
        load_model("gemma-3-270")
    with pytest.raises(ModelError, match="tokenizer="):
        load_model(tiny_model("llama")[0])
    with pytest.raises(ModelError, match="config.json"):
        load_model(str(tmp_path))
    with pytest.raises(ModelError, match="not a TransformerLens model"):
        view(torch.nn.Linear(2, 2))
    import importlib.util
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n.startswith("gemma3") else real(n, *a))
    monkeypatch.setenv("LANGNEURON_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r'pip install "langneuron_mi\[demo\]"'):
        load_model("gemma-3-270m")


def test_models_from_a_folder(tmp_path):
    hf, tok = tiny_model("qwen2")
    hf.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    want = hf(ids).logits
    v = view(load_model(str(tmp_path)))
    torch.testing.assert_close(v.logits(ids), want, atol=1e-5, rtol=1e-5)
    assert v.fingerprint == view(load_model(hf, tokenizer=tok)).fingerprint


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "bloom"])
def test_models_last_logits_are_those_of_all_positions(arch):
    hf, tok = tiny_model(arch)
    v = view(load_model(hf, tokenizer=tok))
    ids, mask = torch.randint(3, 50, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    mask[0, :4] = 0
    whole, last = v.logits(ids, mask), v.logits(ids, mask, keep=2)
    assert last.shape[1] == 2 and torch.allclose(whole[:, -2:], last, atol=1e-6)


def test_models_a_loaded_model_keeps_its_name_when_it_is_loaded_again(tmp_path, monkeypatch):
    hf, tok = tiny_model("llama")
    hf.save_pretrained(tmp_path), tok.save_pretrained(tmp_path)
    monkeypatch.setitem(models._bundled, "toy", dict(id="toy-dequantised"))
    monkeypatch.setattr(models, "bundled_folder", lambda name: tmp_path)
    model = load_model("toy")
    assert view(model).model_id == view(load_model(model)).model_id == "toy-dequantised"


@pytest.mark.parametrize("arch", ["gemma2", "llama", "gpt2", "bloom"])  # llama with a bias, gemma2 with capped logits
def test_models_log_probs_by_parts_of_the_vocabulary(arch):
    "Equal to a softmax over Hugging Face's own logits, however the vocabulary is cut; a hook on the unembedding is obeyed."
    hf, tok = tiny_model(arch)
    if arch == "llama": hf.lm_head.bias = torch.nn.Parameter(torch.randn(hf.lm_head.out_features, generator=torch.Generator().manual_seed(1)))
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
        got, likeliest = models.read_tokens(blocks, rows, tokens)
        assert torch.allclose(got, want[rows, tokens], atol=1e-5) and torch.equal(likeliest, want.argmax(-1)[rows] == tokens)
    module = v.hf.get_output_embeddings()
    handle = module.register_forward_hook(lambda m, args, out: out*0)
    assert [x.count_nonzero() for _, x in v.logit_blocks(hidden)] == [0]
    handle.remove()
