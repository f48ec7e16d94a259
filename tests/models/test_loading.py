"Loading: from whatever you have, with errors that say what to do."
import pytest
import torch
import transformers

from langneuron_mi.models import loading
from langneuron_mi.models.hooked import ModelError
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.recording.record import record
from langneuron_mi.testing.tiny import tiny_model

TEXTS = {"en": ["the quick brown fox", "jumps over", "the lazy dog again and again"] * 4,
         "de": ["der schnelle braune", "Fuchs springt weit"] * 5}


def test_loading_options_that_would_be_ignored_are_refused():
    hf, tok = tiny_model("llama")
    with pytest.raises(ModelError, match="dtype cannot be used"):
        load_model(hf, tokenizer=tok, dtype=torch.bfloat16)
    with pytest.raises(ModelError, match="own tokenizer"):
        load_model(load_model(hf, tokenizer=tok), tokenizer=tok)


def test_loading_errors_say_what_to_do(tmp_path, monkeypatch):
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


def test_loading_from_a_folder(tmp_path):
    hf, tok = tiny_model("qwen2")
    hf.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    want = hf(ids).logits
    v = view(load_model(str(tmp_path)))
    torch.testing.assert_close(v.logits(ids), want, atol=1e-5, rtol=1e-5)
    assert v.fingerprint == view(load_model(hf, tokenizer=tok)).fingerprint


def test_loading_a_loaded_model_keeps_its_name_when_it_is_loaded_again(tmp_path, monkeypatch):
    hf, tok = tiny_model("llama")
    hf.save_pretrained(tmp_path), tok.save_pretrained(tmp_path)
    monkeypatch.setitem(loading._bundled, "toy", dict(id="toy-dequantised"))
    monkeypatch.setattr(loading, "bundled_folder", lambda name: tmp_path)
    model = load_model("toy")
    assert view(model).model_id == view(load_model(model)).model_id == "toy-dequantised"


def test_loading_device_map(tmp_path):
    hf, tok = tiny_model("llama")
    hf.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), device_map={"": "cpu"})
    assert view(model).dtype == torch.float32 and view(model).fingerprint == view(load_model(str(tmp_path))).fingerprint
    here = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"]
    parts = dict.fromkeys(here, "cpu") | {"model.layers.1": "disk"}
    partly = load_model(str(tmp_path), device_map=parts, offload_folder=str(tmp_path / "off"))
    got, want = (record(m, TEXTS, length=16, groups="all", texts=3, progress=False) for m in (partly, model))
    assert got.model == want.model and torch.equal(got.count_pos, want.count_pos)
    torch.testing.assert_close(got.impact["en"], want.impact["en"])  # on the plain model attention is sdpa
    with pytest.raises(ModelError, match="device_map"): load_model(hf, tokenizer=tok, device_map="auto")


SEQ2SEQ = dict(pad_token_id=0, eos_token_id=2, num_heads=4, d_model=32, d_ff=64, d_kv=8, num_layers=2)
OTHERS = {
    "MambaConfig": (dict(hidden_size=32, num_hidden_layers=2), "no MLP in any layer"),
    "SwitchTransformersConfig": (SEQ2SEQ | dict(num_experts=4, decoder_start_token_id=0), "several parts of one kind.*not supported"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_loading_families_that_cannot_be_read_say_so(name):
    fields, said = OTHERS[name]
    tok = tiny_model("llama")[1]
    config = getattr(transformers, name)(vocab_size=len(tok), **fields)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with pytest.raises(ModelError, match=said): load_model(auto.from_config(config).eval(), tokenizer=tok)


def test_loading_families_t5_starts_with_its_pad_where_the_config_says_nothing():
    tok = tiny_model("llama")[1]
    hf = transformers.AutoModelForSeq2SeqLM.from_config(transformers.T5Config(vocab_size=len(tok), **SEQ2SEQ)).eval()
    v, ids = view(load_model(hf, tokenizer=tok)), torch.tensor([[5, 6, 7]])
    want = hf(input_ids=ids, decoder_input_ids=torch.tensor([[0, 5, 6, 7]])).logits[:, 1:]
    torch.testing.assert_close(v.logits(ids), want)


def test_loading_families_without_generation_say_so():
    tok = tiny_model("llama")[1]
    config = transformers.BertConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    v = view(load_model(transformers.AutoModelForMaskedLM.from_config(config).eval(), tokenizer=tok))
    with pytest.raises(ModelError, match="writes no text: it is a BertForMaskedLM"): v.generate(["abc"], 2)
