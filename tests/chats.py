"Tiny models with chat templates, one for each way in which templates differ, through every TransformerLens class."
from dataclasses import dataclass

from lens import has_hooked_transformer, hooked_transformer
from tokenizers import AddedToken

from langneuron_mi.models.loading import load_model
from langneuron_mi.testing.tiny import tiny_model

MARKS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TURNS = """{% for m in messages %}<|{{ m.role }}|>
{{ m.content | trim }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
BOS = "{{ bos_token }}" + TURNS
NO_SYSTEM = "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
MARKED = """{% for m in messages %}<|{{ m.role }}|>
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
LLAMA2 = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
          "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
          "{% else %}<<SYS>>{{ m.content }}<</SYS>> {% endif %}{% endfor %}")
TEMPLATES = dict(turns=TURNS, bos=BOS, no_system=NO_SYSTEM, marked=MARKED, llama2=LLAMA2)


@dataclass
class Chat:
    kind: str  # "bridge" or "hooked"
    hf: object  # the same weights, on their own
    tok: object
    model: object


def chat_tokenizer(template=BOS, bos=True):
    return _with_marks(tiny_model("llama", bos=bos)[1], template)


def _with_marks(tok, template):
    tok.add_tokens([AddedToken(t, special=True, normalized=False) for t in MARKS], special_tokens=True)
    tok.chat_template = template
    return tok


def chat_models(template=BOS, bos=True, arch="llama"):
    "A tiny model with this template through each class; its tokenizer puts a BOS before every plain text, if told to."
    make = lambda: tiny_model(arch, bos=bos, vocab_size=264)
    tok = _with_marks(make()[1], template)
    rows = [Chat("bridge", make()[0], tok, load_model(make()[0], tokenizer=tok))]
    if arch == "llama" and has_hooked_transformer():
        rows.append(Chat("hooked", make()[0], tok, load_model(hooked_transformer(make()[0], tok))))
    return rows


def template_ids(tok, prompt, system=None):
    "What the tokenizer itself gives for a user's message and the start of an answer."
    before = [] if system is None else [dict(role="system", content=system)]
    return tok.apply_chat_template([*before, dict(role="user", content=prompt)], add_generation_prompt=True, tokenize=True,
                                   return_dict=False)


def said(*contents, system=None):
    "A conversation of user and assistant in turn."
    before = [] if system is None else [dict(role="system", content=system)]
    return before + [dict(role="assistant" if i % 2 else "user", content=c) for i, c in enumerate(contents)]
