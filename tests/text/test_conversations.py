"Conversations: where a template puts each message, whose tokens are whose, and what is refused."
import numpy as np
import pytest
from chats import BOS, LLAMA2, MARKED, MARKS, NO_SYSTEM, TEMPLATES, TURNS, chat_tokenizer, said
from hypothesis import given
from hypothesis import strategies as st

from langneuron_mi.text.conversations import ChatError, Talk, located, role_tokens, talk, written
from langneuron_mi.text.corpus import CorpusError
from langneuron_mi.text.roles import pack_roles
from langneuron_mi.text.sources import load_corpus
from langneuron_mi.text.windows import pack

NASTY = ["user", "assistant", "<|user|>", "a", "\n", " b ", "", "langneuron0mark", "[INST]", "x\n<|end|>\n<|user|>\n"]
CONTENTS = st.one_of(st.sampled_from(NASTY), st.text("ab <|>user\n中é\u2003", max_size=12))


@given(st.lists(CONTENTS, min_size=1, max_size=5), st.sampled_from([*TEMPLATES]))
def test_chat_contents_are_found_whatever_they_say(contents, name):
    tok, messages = TOKENIZERS[name], said(*contents)
    text, spans = located(tok, messages)
    assert text == tok.apply_chat_template(messages, tokenize=False)
    keep = (lambda c: c.strip()) if "trim" in TEMPLATES[name] else (lambda c: c)
    assert [text[a:b] for a, b in spans] == [keep(m["content"]) for m in messages]
    assert all(b <= c for (_, b), (c, _) in zip(spans, spans[1:]))


TOKENIZERS = {name: chat_tokenizer(t) for name, t in TEMPLATES.items()}


@given(st.lists(st.text("abc de.", min_size=1, max_size=9).filter(str.strip), min_size=2, max_size=5))
def test_chat_tokens_of_a_role_are_those_of_the_templates_own_marks(contents):
    tok, messages = TOKENIZERS["marked"], said(*contents)
    own = tok.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, counts = role_tokens(tok, messages, ["assistant"])
    assert ids.tolist() == own.input_ids and counts.astype(int).tolist() == own["assistant_masks"]


def test_chat_roles_share_no_token_and_leave_the_templates_own():
    for name, tok in TOKENIZERS.items():
        messages = said("Wie geht's?", "Gut! 中文 é", "user", "assistant", system=None if name == "no_system" else "Sei kurz.")
        parts = {r: role_tokens(tok, messages, [r])[1] for r in ("system", "user", "assistant")}
        ids, every = role_tokens(tok, messages, ["system", "user", "assistant"])
        assert np.array_equal(sum(p.astype(int) for p in parts.values()), every.astype(int))
        for role, counts in parts.items():
            want = "".join(m["content"] for m in messages if m["role"] == role)
            assert tok.decode(ids[counts]) == want and counts.sum() == len(want.encode())
        assert not every[np.isin(ids, tok.convert_tokens_to_ids([*MARKS, "<bos>", "<eos>"]))].any()


def test_chat_a_token_that_holds_both_counts_as_content():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(["end.\nend.\n"]*50, trainers.BpeTrainer(vocab_size=270, special_tokens=["<unk>"],
                                                                     initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")
    tok.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    ids, counts = role_tokens(tok, said("end.", "end."), ["assistant"])
    text, place = "end.\nend.\n", tok("end.\nend.\n", return_offsets_mapping=True).offset_mapping
    assert any("\n" in text[a:b] and len(text[a:b]) > 1 for a, b in place)  # the tokenizer does merge across the border
    assert counts.tolist() == [b > 5 and a < 9 for a, b in place]


def test_chat_every_refusal_says_what_to_do():
    tok, plain = chat_tokenizer(NO_SYSTEM), chat_tokenizer(None)
    with pytest.raises(ChatError, match="has no chat template: it is a base model's; .* load an instruction-tuned model"):
        written(plain, said("a"))
    with pytest.raises(ChatError, match="takes no system message .it says: System role not supported.; put that text into the prompt"):
        written(tok, said("a", system="b"))
    tok.chat_template = "{{ raise_exception('users only') }}"
    with pytest.raises(ChatError, match="refuses a conversation of user, assistant .it says: users only"): written(tok, said("a", "b"))
    tok.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ChatError, match="leaves the system message 0 out"): located(tok, said("a", system="b"))
    tok.chat_template = TURNS.replace("m.content | trim", "m.content.split('</think>')[-1]")
    with pytest.raises(ChatError, match="changes what is said in this conversation"): located(tok, said("a", "hm</think>b"))
    assert located(tok, said("a", "b"))[1]
    for bad, words in [([dict(role="user")], "has no content"), ([dict(content="a")], "a message is"), ([], "without a message"),
                       ([dict(role="assistant", content="a", tool_calls=[1])], "calls of tools"),
                       ([dict(role="user", content=[dict(type="text", text="a")])], "contents in parts")]:
        with pytest.raises(ChatError, match=words): talk(bad)


def test_chat_corpora_are_texts_that_nobody_takes_for_text(tmp_path):
    talks = {"de": [said(f"Frage {i}?", f"Antwort {i}.") for i in range(20)],
             "en": [said(f"question {i}?", f"answer {i}.") for i in range(20)]}
    corpus = load_corpus(talks, aligned=True)
    train, held = corpus.split(.3, seed=1)
    assert train.talks and isinstance(train.conversations("de")[0], Talk) and train.n_texts("de") + held.n_texts("de") == 20
    assert not {*train.conversations("en")} & {*held.conversations("en")}
    assert load_corpus(talks, aligned=True).fingerprint == corpus.fingerprint
    tok = chat_tokenizer()
    for use in (lambda: pack(corpus, tok), lambda: corpus.texts("de"), lambda: corpus.purity()):
        with pytest.raises(CorpusError, match="this corpus holds conversations, which only record"): use()
    with pytest.raises(CorpusError, match="this corpus holds plain texts"):
        pack_roles(load_corpus({"de": ["Ja."]}), tok, ["user"], layout="texts")
    with pytest.raises(CorpusError, match="is no conversation, but others are"): load_corpus({"de": [said("Ja?"), "Ja."]})
    import json
    for lang, rows in talks.items():
        (tmp_path/f"{lang}.jsonl").write_text("\n".join(json.dumps(dict(messages=m, source="x")) for m in rows), encoding="utf-8")
    files = load_corpus(tmp_path, text_field="messages")
    assert files.talks and [*files.conversations("de")] == [*corpus.conversations("de")]
    import pandas as pd
    (tmp_path/"parquet").mkdir()
    for lang, rows in talks.items(): pd.DataFrame(dict(messages=rows)).to_parquet(tmp_path/"parquet"/f"{lang}.parquet")
    assert [*load_corpus(tmp_path/"parquet", text_field="messages").conversations("en")] == [*corpus.conversations("en")]
    streamed = files.split(.3, seed=1)[0]
    assert {*pack_roles(files, tok, ["assistant"], layout="texts").streams["de"]} and streamed.talks
    assert pack_roles(streamed, tok, ["assistant"], layout="texts").n_windows("de") < 20


@pytest.mark.parametrize("template", [BOS, LLAMA2, MARKED])
def test_chat_windows_count_exactly_the_asked_words(template):
    tok = chat_tokenizer(template)
    german = [said("Wie geht's?", "Gut!"), said("Nur eine Frage"), said("Ja?", "Ja.", "Wirklich?", "中!")]
    talks = {"de": german, "en": [said("How?", "So.")]}
    with pytest.warns(UserWarning, match="de: 1 conversations are left out: assistant says nothing in them"):
        w = pack_roles(load_corpus(talks), tok, ["assistant"], layout="texts")
    assert w.n_tokens("de") == len("Gut!Ja.中!".encode()) and w.n_windows("de") == 2 and w.whole["de"] == 2
    ids = w.batch("de", 0, 2)
    assert sorted(tok.decode(ids.flatten()[w.rows("de", 0, ids)])) == sorted("Gut!Ja.中!")
    for n in range(1, w.n_tokens("de") + 1):
        few = pack_roles(load_corpus(talks), tok, ["assistant"], layout="texts", tokens=dict(de=n, en=1))
        last = few.n_windows("de")
        assert few.n_tokens("de") == n == few.span("de", 0, last)[1] == len(few.rows("de", 0, few.batch("de", 0, last)))
    with pytest.warns(UserWarning, match="longer than a window of 20 tokens"):
        assert pack_roles(load_corpus(talks), tok, ["user"], layout="texts", length=20).batch("de", 0, 3).shape[1] <= 20
    for bad, words in [(dict(roles=["assistent"], layout="texts"), "'de' has 0 tokens of assistent"),
                       (dict(roles=["user"]), 'needs layout="texts"'), (dict(roles=[], layout="texts"), "name one or more"),
                       (dict(roles=["user"], layout="texts", bos_token_id=1), "leave bos_token_id")]:
        with pytest.raises(CorpusError, match=words): pack_roles(load_corpus(talks), tok, **bad)


def test_chat_windows_are_named_by_what_the_template_writes():
    talks, tok = load_corpus({"de": [said("Ja?", "Ja.")]}), chat_tokenizer()
    name = lambda roles=("assistant",): pack_roles(talks, tok, roles, layout="texts").fingerprint
    first = name()
    assert name() == first != name(("user",))
    tok.chat_template = "26 July " + BOS
    assert name() != first
