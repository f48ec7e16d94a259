"Chat: ids against the tokenizer's own apply_chat_template, answers that start where the template says, generation against Hugging Face."
import pytest
import torch
from chats import BOS, LLAMA2, MARKS, NO_SYSTEM, TEMPLATES, TURNS, chat_models, chat_tokenizer, template_ids

from langneuron_mi.models.chat import Asking, Turn, turn
from langneuron_mi.models.view import view
from langneuron_mi.text.conversations import ChatError

PROMPTS = ["Wie geht's?", "a", "a prompt a good deal longer than the others", "中文 "]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_ids_are_the_templates_own_and_hold_one_bos_at_most(name, bos):
    for c in chat_models(TEMPLATES[name], bos):
        v, written = view(c.model), "bos_token" in TEMPLATES[name]
        for system in (None, "Sei kurz.") if name != "no_system" else (None,):
            turns = Asking(chat=True, system=system).put(v, PROMPTS)
            ids, mask = v.encode(turns)
            for row, m, p in zip(ids, mask, PROMPTS):
                want = template_ids(c.tok, p, system)
                assert row[m.bool()].tolist() == want and want.count(1) == int(written), (c.kind, name)
        twice = v.encode([t.text for t in turns])[0]  # a written template, fed as a plain text: the fault that a Turn is there to prevent
        assert (twice == 1).sum(1).tolist() == [written + bos]*len(PROMPTS)


def test_chat_own_words_and_answers_start_where_the_template_says():
    for name, template in TEMPLATES.items():
        v = view(chat_models(template)[0].model)
        for p in PROMPTS:
            t = turn(v.tokenizer, p)
            ids, own = v.prompt_ids(t), v.own_tokens(t)
            kept = p.strip() if "trim" in template else p
            assert v.tokenizer.decode([i for i, o in zip(ids, own) if o]) == kept == t.text[t.start:t.stop]
            before, answer = v.answer_ids(t, " ja ")
            whole = v.tokenizer.apply_chat_template([dict(role="user", content=p), dict(role="assistant", content="ja")],
                                                    tokenize=True, return_dict=False)
            assert before == ids and whole[:len(before + answer)] == before + answer  # as the template itself writes an answer
            assert v.tokenizer.decode(answer) == (" ja" if name == "llama2" else "ja")
    assert turn(chat_tokenizer(LLAMA2), "a").gap == " " and turn(chat_tokenizer(BOS), "a") [3:] == ("", "<|end|>\n")


def test_chat_a_tokenizer_that_merges_over_the_border_does_not_move_it():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=262, special_tokens=["<unk>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator([":ja", ":ja :ja"]*50, trainer)
    v = view(chat_models(TURNS, arch="qwen2")[0].model)
    v.tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")
    v.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}:{% endfor %}"
    t = turn(v.tokenizer, "Na")
    assert len(v._ids("Na:ja")) < len(v._ids("Na:")) + len(v._ids("ja"))  # merged, were both tokenised at once
    assert v.answer_ids(t, "ja") == (v.prompt_ids(t), v._ids("ja"))


def test_chat_settings_and_templates_that_do_not_fit_are_refused():
    v = view(chat_models(NO_SYSTEM)[0].model)
    with pytest.raises(ValueError, match="system='Sei kurz.' is a message of a conversation; give chat=True"): Asking(system="Sei kurz.")
    with pytest.raises(ChatError, match="takes no system message .* put that text into the prompt"):
        Asking(chat=True, system="Sei kurz.").put(v, ["Ja?"])
    v.tokenizer.chat_template = None
    with pytest.raises(ChatError, match="has no chat template"): Asking(chat=True).put(v, ["Ja?"])
    assert Asking().put(v, ["Ja?"]) == ["Ja?"] and Asking().trace(v) == () and Asking().facts(v) == {}
    v.tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ChatError, match="leaves the system message 0 out"): Asking(chat=True, system="Sei kurz.").put(v, ["Ja?"])


def test_chat_work_is_named_by_template_system_and_what_is_written():
    v = view(chat_models(BOS)[0].model)
    names = [Asking(chat=True).trace(v), Asking(chat=True, system="a").trace(v), Asking(chat=True, system="b").trace(v)]
    facts = Asking(chat=True).facts(v)
    v.tokenizer.chat_template = "26 July: " + BOS
    names.append(Asking(chat=True).trace(v))
    assert len({*names}) == 4 and all(isinstance(t, Turn) for n in names for t in n)
    assert facts != Asking(chat=True).facts(v) and facts["chat"]["system"] is None


@pytest.mark.parametrize("bos", [True, False])
def test_chat_generation_equals_hugging_faces(bos):
    for c in chat_models(BOS, bos):
        v = view(c.model)
        want = []
        for p in PROMPTS:
            row = torch.tensor([template_ids(c.tok, p)])
            out = c.hf.generate(row, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=[2, 263])
            want.append(c.tok.decode(out[0, row.shape[1]:], skip_special_tokens=True))
        for use_cache in (True, False): assert v.generate(Asking(chat=True).put(v, PROMPTS), 6, use_cache=use_cache) == want, c.kind
        assert v.generate(PROMPTS, 6) != want


def test_chat_answers_end_where_the_template_ends_a_turn():
    for c in chat_models(BOS):
        v, end = view(c.model), MARKS.index("<|end|>") + 260
        seen = []
        def always_end(module, args, out):
            seen.append(out.shape[1])
            return out.index_fill(-1, torch.tensor([end]), 1e4)
        head = c.model.unembed if c.kind == "hooked" else v.hf.get_output_embeddings()
        handle = head.register_forward_hook(always_end)
        assert v.end_ids(Asking(chat=True).put(v, ["a"])) == v.ends_of_turn() == [end]
        assert v.generate(Asking(chat=True).put(v, ["a"]), 5) == [""] and len(seen) == 1, c.kind
        seen.clear()
        v.generate(["a"], 5)  # a plain prompt is no turn: nothing of it ends
        assert len(seen) == 5
        handle.remove()
