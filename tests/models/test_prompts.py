"Prompts, against Hugging Face's own generation."
import pytest
import torch

from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.testing.tiny import tiny_model

ARCHS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "bloom", "gpt2"]


@pytest.mark.parametrize("arch", ARCHS)
def test_prompts_generation_equals_hugging_face(arch):
    hf, tok = tiny_model(arch)
    prompts = ["abc de", "f", "ghij klm nop"]
    def alone(row):
        out = hf.generate(torch.tensor([row]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        return tok.decode(out[0, len(row):], skip_special_tokens=True)
    want = [alone(tok(p).input_ids) for p in prompts]
    v = view(load_model(hf, tokenizer=tok))
    for use_cache in (True, False):
        assert v.generate(prompts, 6, use_cache=use_cache) == want


def test_prompts_bos_is_what_the_tokenizer_adds():
    for bos in (True, False):
        hf, tok = tiny_model("llama", bos=bos)
        v = view(load_model(hf, tokenizer=tok))
        assert v.bos_token_id == (tok.bos_token_id if bos else None)
