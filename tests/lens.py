"Tiny models through every TransformerLens class that the installed version has."
import torch

from langneuron_mi.models.loading import load_model
from langneuron_mi.testing.tiny import tiny_model


def has_hooked_transformer() -> bool:
    try: from transformer_lens import HookedTransformer  # noqa: F401  (4.x raises ImportError here, which `hasattr` lets through)
    except ImportError: return False
    return True


def hooked_transformer(hf, tok):
    "A HookedTransformer with the weights of a tiny Llama, made without the hub."
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights
    c = hf.config
    cfg = HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_ctx=128,
        d_head=c.hidden_size // c.num_attention_heads,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads if c.num_key_value_heads != c.num_attention_heads else None,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        act_fn="silu",
        normalization_type="RMS",
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=c.hidden_size // c.num_attention_heads,
        rotary_adjacent_pairs=False,
        final_rms=True,
        eps=c.rms_norm_eps,
        original_architecture="LlamaForCausalLM",
        dtype=torch.float32,
        device="cpu",
        model_name="tiny-llama",
        rotary_base=int(_rope_theta(c)),
    )
    model = HookedTransformer(cfg, tokenizer=None)
    model.load_and_process_state_dict(
        convert_llama_weights(hf, cfg), fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    model.tokenizer = tok
    return model.eval()


def _rope_theta(c):
    return getattr(c, "rope_theta", None) or (getattr(c, "rope_parameters", None) or {}).get("rope_theta", 10000)


def lens_models(arch: str):
    "(name, hf model, tokenizer, hooked model) for each class that can hold this architecture."
    hf, tok = tiny_model(arch)
    reference, _ = tiny_model(arch)  # a second copy: wrapping changes the first in place
    rows = [("bridge", reference, tok, load_model(hf, tokenizer=tok))]
    if arch == "llama" and has_hooked_transformer():
        rows.append(("hooked", reference, tok, load_model(hooked_transformer(tiny_model(arch)[0], tok))))
    return rows
