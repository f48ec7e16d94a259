"""Train a small mixture of experts on the Bible in six languages: 4 layers of 8 experts, two for every token, on one CPU core.

python experiments/train_mixture.py [--out FOLDER]

The folder (by default models/bible-mixture in the cache of langneuron_mi) then holds model and tokenizer, for `load_model(FOLDER)`.
Trained is on the first part of `load_corpus("bible", LANGS).split(0.1, seed=0)` and the loss is read on the second, so that text which
is held out there was never seen by the model. The tutorial nbs/tutorials/06_experts.ipynb uses it."""
import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from langneuron_mi.models.bundled import cache_home
from langneuron_mi.text.corpus import Corpus
from langneuron_mi.text.sources import load_corpus

LANGS = ("en", "de", "fr", "ru", "zh", "ar")
SPECIALS = ("<pad>", "<bos>", "<eos>")


@dataclass(frozen=True)
class Plan:
    "Everything that decides the model, beside the text."
    seed: int = 0
    steps: int = 700
    batch: int = 18 # windows, as many of every language
    length: int = 96 # tokens of a window, BOS included
    lr: float = 3e-3
    warmup: int = 40 # steps
    balance: float = .02 # coefficient of the load-balancing loss
    vocab: int = 3000
    d_model: int = 128
    layers: int = 4
    experts: int = 8
    width: int = 128 # neurons of an expert


def make_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    "Byte-level BPE of these texts; BOS goes in front."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=list(SPECIALS), initial_alphabet=alphabet,
                                                       show_progress=False))
    tok.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    pad, bos, eos = SPECIALS
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token=pad, bos_token=bos, eos_token=eos)


def windows(tok: PreTrainedTokenizerFast, texts: list[str], length: int) -> Tensor: # ids [window, pos]
    "Texts one after the other, cut into windows that begin with BOS."
    rows = tok(texts, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([i for row in rows for i in row])
    ids = ids[:len(ids)//(length - 1)*(length - 1)].view(-1, length - 1)
    return torch.cat([torch.full((len(ids), 1), tok.bos_token_id), ids], 1)


def make_model(plan: Plan, vocab: int) -> Qwen3MoeForCausalLM:
    "The untrained mixture."
    cfg = Qwen3MoeConfig(
        vocab_size=vocab, hidden_size=plan.d_model, num_hidden_layers=plan.layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=plan.d_model//4, num_experts=plan.experts, num_experts_per_tok=2, norm_topk_prob=True, moe_intermediate_size=plan.width,
        intermediate_size=2*plan.width, max_position_embeddings=256, tie_word_embeddings=True, output_router_logits=True,
        router_aux_loss_coef=plan.balance, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(plan.seed)
    return Qwen3MoeForCausalLM(cfg).float()


def rate(plan: Plan, step: int) -> float:
    "Learning rate: up in a line, down in a cosine to a tenth."
    if step < plan.warmup: return plan.lr*(step + 1)/plan.warmup
    done = (step - plan.warmup)/max(plan.steps - plan.warmup, 1)
    return plan.lr*(.1 + .45*(1 + math.cos(math.pi*done)))


@torch.inference_mode()
def losses(model: Qwen3MoeForCausalLM, held_out: dict[str, Tensor], n: int) -> dict[str, float]: # nats per token
    "Loss on the first `n` windows of every language, without the balancing term."
    model.eval()
    def loss(ids):
        return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    found = {lang: loss(w[:n]) for lang, w in held_out.items()}
    model.train()
    return found


def train(model: Qwen3MoeForCausalLM, text: dict[str, Tensor], held_out: dict[str, Tensor], plan: Plan) -> list[dict]:
    "AdamW over windows of all languages alike; the losses on the way."
    gen = torch.Generator().manual_seed(plan.seed)
    opt = torch.optim.AdamW(model.parameters(), lr=plan.lr, betas=(.9, .95), weight_decay=.05)
    order = {lang: torch.randperm(len(w), generator=gen) for lang, w in text.items()}
    each, start, log = plan.batch//len(text), time.time(), []
    model.train()
    for step in range(plan.steps):
        at = [torch.arange(step*each, (step + 1)*each) % len(w) for w in text.values()]
        ids = torch.cat([w[order[lang][i]] for (lang, w), i in zip(text.items(), at)])
        for group in opt.param_groups: group["lr"] = rate(plan, step)
        out = model(ids, labels=ids)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        opt.zero_grad()
        if step % 100 == 99 or step == plan.steps - 1:
            now = losses(model, held_out, 24 if step < plan.steps - 1 else 100)
            log.append(dict(step=step + 1, minutes=(time.time() - start)/60, balance=out.aux_loss.item(), **now))
            print(f"step {step + 1:4d}  {log[-1]['minutes']:4.1f} min  balance {log[-1]['balance']:.2f}  "
                  + "  ".join(f"{lang} {x:.2f}" for lang, x in now.items()), flush=True)
    return log


def finished(out: Path, plan: Plan) -> bool:
    "Is a model of this plan there?"
    facts = out/"training.json" # written last
    return facts.exists() and json.loads(facts.read_text())["plan"] == asdict(plan)


def texts_of(corpus: Corpus) -> dict[str, list[str]]: return {lang: corpus.texts(lang) for lang in corpus.langs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=cache_home()/"models"/"bible-mixture", help="folder for model and tokenizer")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="steps of training")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plan = Plan(steps=args.steps)
    if finished(args.out, plan): return print(f"{args.out} holds this model already; remove the folder to train it again")
    first, second = map(texts_of, load_corpus("bible", list(LANGS)).split(.1, seed=0))
    tok = make_tokenizer([t for texts in first.values() for t in texts[::4]], plan.vocab)
    text = {lang: windows(tok, texts, plan.length) for lang, texts in first.items()}
    held_out = {lang: windows(tok, texts, plan.length) for lang, texts in second.items()}
    model = make_model(plan, len(tok))
    print(f"{sum(p.numel() for p in model.parameters())/1e6:.2f} M parameters; tokens to learn from: "
          + ", ".join(f"{lang} {w.numel():,}" for lang, w in text.items()), flush=True)
    log = train(model, text, held_out, plan)
    model.config.output_router_logits = False # training's alone
    model.eval().save_pretrained(args.out)
    tok.save_pretrained(args.out)
    (args.out/"training.json").write_text(json.dumps(dict(plan=asdict(plan), langs=LANGS, log=log), indent=1))
    print(f"{log[-1]['minutes']:.1f} minutes; model and tokenizer in {args.out}")


if __name__ == "__main__": main()
