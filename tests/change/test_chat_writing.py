"Chat: where an edit applies, against plain PyTorch hooks on the template's own ids; written texts, and what is kept of them."
import pytest
import torch
from chats import BOS, LLAMA2, NO_SYSTEM, TURNS, chat_models, template_ids

from langneuron_mi.change.generation import generate_texts
from langneuron_mi.change.interventions import set_to
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.models.chat import Asking
from langneuron_mi.models.view import view
from langneuron_mi.text.conversations import ChatError

SET = [(0, 3), (0, 10), (1, 7), (1, 40)]
PROMPTS = ["a", "another prompt, a good deal longer than the first", "drei Worte lang"]
POSITIONS = ["all", "prompt", "generated", "last"]


@torch.no_grad()
def brute_logits(hf, ids, positions, n):
    "Logits of one row, run whole; `n` of its tokens are the prompt's."
    handles, at = [], torch.arange(len(ids))
    keep = dict(all=at >= 0, prompt=at < n, generated=at >= n, last=at >= n - 1)[positions]
    for l, layer in enumerate(hf.model.layers):
        edited = torch.zeros(hf.config.intermediate_size, dtype=torch.bool)
        edited[[j for ll, j in SET if ll == l]] = True
        def edit(m, args, out, here=keep[:, None] & edited): return torch.where(here, 2., out)
        handles.append(layer.mlp.act_fn.register_forward_hook(edit))
    out = hf(torch.tensor([ids])).logits[0]
    for h in handles: h.remove()
    return out


def brute_text(hf, tok, ids, positions, steps):
    "Greedy decoding without a cache, each step the whole row anew."
    row = list(ids)
    for _ in range(steps):
        row.append(int(brute_logits(hf, row, positions, len(ids))[-1].argmax()))
        if row[-1] in (2, 263): break
    return tok.decode(row[len(ids):], skip_special_tokens=True)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("template,bos", [(BOS, True), (TURNS, False), (LLAMA2, True)])
def test_chat_positions_equal_a_brute_force_edit(template, bos, positions):
    for c in chat_models(template, bos):
        v, i = view(c.model), set_to(NeuronSet(SET, (2, 64)), 2.).where(positions)
        turns, rows = Asking(chat=True).put(v, PROMPTS), [template_ids(c.tok, p) for p in PROMPTS]
        want = [brute_text(c.hf, c.tok, r, positions, 6) for r in rows]
        for use_cache in (True, False):
            with i.on(c.model): got = v.generate(turns, 6, use_cache=use_cache)
            assert got == want, (c.kind, use_cache)
        with i.on(c.model): logits = v.logits(*v.encode(turns))
        for x, r in zip(logits, rows):
            torch.testing.assert_close(x[-len(r):].float(), brute_logits(c.hf, r, positions, len(r)), rtol=1e-4, atol=1e-4)


def test_chat_an_edit_of_generated_tokens_leaves_the_first_ones_logits():
    for c in chat_models(BOS):
        v, i = view(c.model), set_to(NeuronSet(SET, (2, 64)), 2.)
        batch = v.encode(Asking(chat=True).put(v, PROMPTS))
        plain = v.logits(*batch, keep=1)
        for positions in POSITIONS:
            with i.where(positions).on(c.model): edited = v.logits(*batch, keep=1)
            assert torch.equal(edited, plain) == (positions == "generated"), (c.kind, positions)


def test_chat_texts_are_kept_apart_from_plain_ones_and_say_how_they_were_asked(tmp_path):
    for c in chat_models(BOS):
        v, out = view(c.model), tmp_path/c.kind
        prompts, i = {"en": PROMPTS}, {("x", "de"): set_to(NeuronSet(SET, (2, 64)), 2.)}
        asked = dict(max_new_tokens=5, batch_size=2, progress=False)
        ways = [dict(), dict(chat=True), dict(chat=True, system="Sei kurz."), dict(chat=True, system="")]
        fresh = [generate_texts(c.model, prompts, i, **asked, **w).df.text.tolist() for w in ways]
        assert len({*map(tuple, fresh)}) == 4
        kept = [generate_texts(c.model, prompts, i, out=out, **asked, **w) for w in ways]
        n_files = len([*out.iterdir()])
        again = [generate_texts(c.model, prompts, i, out=out, **asked, **w) for w in ways[::-1]][::-1]
        assert fresh == [g.df.text.tolist() for g in kept] == [g.df.text.tolist() for g in again]
        assert n_files == 4*2 == len([*out.iterdir()])
        assert fresh[1][:3] == v.generate(Asking(chat=True).put(v, PROMPTS[:2]), 5) + v.generate(Asking(chat=True).put(v, PROMPTS[2:]), 5)
        assert kept[1].df.prompt.tolist()[:3] == PROMPTS  # the table holds what was asked, not what the template wrote
        assert "chat" not in kept[0].provenance and kept[2].provenance["chat"]["system"] == "Sei kurz."
        v.tokenizer.chat_template = BOS.replace("<|end|>", "<|end|>\n")
        other = generate_texts(c.model, prompts, i, out=out, chat=True, **asked)  # another template is other work
        assert other.df.text.tolist() != fresh[1]
        v.tokenizer.chat_template = BOS


def test_chat_wrong_settings_are_told_before_any_work():
    c = chat_models(NO_SYSTEM)[0]
    with pytest.raises(ValueError, match="give chat=True as well"): generate_texts(c.model, {"en": ["a"]}, {}, system="b")
    with pytest.raises(ChatError, match="takes no system message"): generate_texts(c.model, {"en": ["a"]}, {}, chat=True, system="b")
