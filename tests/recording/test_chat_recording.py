"Chat: recordings of some roles, against brute force over the template's own ids in Hugging Face's model."
import numpy as np
import pytest
import torch
from chats import BOS, LLAMA2, MARKED, TURNS, chat_models, said

from langneuron_mi.core.atomic import ArtifactError
from langneuron_mi.recording.record import Recording, record
from langneuron_mi.recording.stats import ActivationStats
from langneuron_mi.text.corpus import CorpusError

TALKS = {"de": [said("Wie geht's?", "Gut!"), said("Ja?", "Ja.", "user", "assistant", "Na?"), said("Nur Fragen", "", "und nichts", "gesagt"),
                said("Eine sehr lange Frage, auf die wenig kommt", "So."), said("中文", "é ü 中")],
         "en": [said("How?", "Like this.", system="Be kind."), said("What?", "That."), said("Why?", "No reason at all, none.")]}


@torch.no_grad()
def brute(c, talks, roles):
    "(counts, sum, largest of the gate, tokens) of one language, and each conversation's mean: a row of ids, content by content."
    rows, means = [], []
    for messages in talks:
        ids, got, handles, own = c.tok.apply_chat_template(messages, tokenize=True, return_dict=False), {}, [], []
        at = 0
        for m in messages:  # byte tokens: a message's words stand as they are, behind the mark of its role
            words = c.tok(m["content"].strip(), add_special_tokens=False).input_ids
            head = c.tok(MARK(m["role"]), add_special_tokens=False).input_ids
            at = next(i for i in range(at, len(ids)) if ids[i:i + len(head)] == head) + len(head)
            assert ids[at:at + len(words)] == words
            if m["role"] in roles: own += range(at, at + len(words))
            at += len(words)
        for l, layer in enumerate(c.hf.model.layers):
            handles.append(layer.mlp.gate_proj.register_forward_hook(lambda mod, i, o, l=l: got.__setitem__(l, o[0])))
        c.hf(torch.tensor([ids]))
        for h in handles: h.remove()
        x = torch.stack([got[0], got[1]])[:, own]
        rows.append(x)
        if own: means.append(torch.nn.functional.silu(x).mean(1))
    x = torch.cat(rows, 1)
    a = torch.nn.functional.silu(x).double()
    return (x > 0).sum(1), a.sum(1), a.amax(1), x.shape[1], torch.stack(means)


def MARK(role): return f"<|{role}|>\n"


@pytest.mark.filterwarnings("ignore:.*conversations are left out", "ignore:.*fewer than texts")
@pytest.mark.parametrize("roles", [("assistant",), ("user",), ("user", "assistant"), ("system", "assistant")])
@pytest.mark.parametrize(("template", "bos"), [(BOS, True), (TURNS, True), (TURNS, False), (MARKED, True)])
def test_chat_recording_of_roles_equals_brute_force(template, bos, roles):
    for c in chat_models(template, bos):
        s = record(c.model, TALKS, roles=roles, layout="texts", groups="all", batch_size=2, shard_size=3, length=128, progress=False)
        for k, lang in enumerate(s.langs):
            in_order = [m for m in TALKS[lang]]
            counts, total, largest, n, means = brute(c, in_order, roles)
            words = sum(len(m["content"].strip().encode()) for t in TALKS[lang] for m in t if m["role"] in roles)
            assert s.n_tokens[lang] == n == words, c.kind
            assert torch.equal(s.count_pos[k], counts)
            torch.testing.assert_close(s.value(lang, "mean").values.double(), total/n, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(s.value(lang, "max").values.double(), largest, rtol=1e-4, atol=1e-5)
            kept = s.text_means[lang].float()
            assert kept.shape[1] == len(means)  # a conversation in which these roles say nothing is no text
            order = lambda x: x[np.lexsort(x.flatten(1).round(decimals=3).numpy().T)]
            torch.testing.assert_close(order(kept.transpose(0, 1)), order(means), rtol=2e-2, atol=2e-2)


def test_chat_recording_does_not_depend_on_batches_or_shards():
    for c in chat_models(LLAMA2):
        want = record(c.model, TALKS | {"en": TALKS["en"][1:]}, roles=("assistant",), layout="texts", progress=False)
        for batch_size, shard_size in ((1, 1), (2, 3), (5, 2)):
            got = record(c.model, TALKS | {"en": TALKS["en"][1:]}, roles="assistant", layout="texts", batch_size=batch_size,
                         shard_size=shard_size, progress=False)
            assert got.n_tokens == want.n_tokens and (got.count_pos - want.count_pos).abs().max() <= 1  # a sign may turn at 0


def test_chat_recording_takes_exactly_the_tokens_asked_for():
    c = chat_models(BOS)[0]
    for n in (1, 3, 7, 20):
        s = record(c.model, TALKS, roles=("user", "assistant"), layout="texts", tokens=n, progress=False)
        assert s.n_tokens == {"de": n, "en": n} and int(s.count_pos.max()) <= n
    with pytest.raises(CorpusError, match="'de' has 34 tokens of assistant with this tokenizer, 1,000 are asked for"):
        record(c.model, TALKS, roles=("assistant",), layout="texts", tokens=1000, progress=False)


def test_chat_recording_goes_on_only_with_the_same_roles_and_template(tmp_path):
    c = chat_models(BOS)[0]
    asked = dict(layout="texts", out=tmp_path, progress=False)
    first = record(c.model, TALKS, roles=("assistant",), **asked)
    again = record(c.model, TALKS, roles=("assistant",), **asked)
    assert first.meta["roles"] == ["assistant"] and torch.equal(again.count_pos, first.count_pos)
    assert torch.equal(ActivationStats.load(tmp_path/"stats.safetensors").count_pos, first.count_pos)
    with pytest.raises(ArtifactError, match="roles: .'assistant'. there, .'user'. now"): record(c.model, TALKS, roles=("user",), **asked)
    c.model.tokenizer.chat_template = "26 July: " + BOS
    with pytest.raises(ArtifactError, match="windows"): record(c.model, TALKS, roles=("assistant",), **asked)


def test_chat_recording_says_what_is_not_supported():
    c = chat_models(BOS)[0]
    with pytest.raises(ValueError, match='needs layout="texts", got .packed.: each conversation is read alone'):
        Recording(roles=("assistant",))
    with pytest.raises(CorpusError, match="this corpus holds plain texts"):
        record(c.model, {"de": ["Ja."]}, roles=("assistant",), layout="texts", progress=False)
    for layout in ("packed", "texts"):
        with pytest.raises(CorpusError, match="this corpus holds conversations, which only record"):
            record(c.model, TALKS, layout=layout, progress=False)
    changed = BOS.replace("m.content | trim", "m.content.replace('?', '!')")
    c.model.tokenizer.chat_template = changed
    with pytest.raises(CorpusError, match="de: .* changes what is said"):
        record(c.model, TALKS, roles=("assistant",), layout="texts", progress=False)


def test_chat_recording_from_the_command_line(tmp_path, capsys):
    import json

    from langneuron_mi.cli import main
    c = chat_models(BOS)[0]
    c.hf.save_pretrained(tmp_path/"model")
    c.tok.save_pretrained(tmp_path/"model")
    (tmp_path/"talks").mkdir()
    for lang, rows in TALKS.items():
        many = [said(f"{m['content']} {i}?", f"{m['content']} {i}") for i in range(4) for t in rows for m in t[:1]]
        (tmp_path/"talks"/f"{lang}.jsonl").write_text("\n".join(json.dumps(dict(messages=m)) for m in many), encoding="utf-8")
    places = [str(tmp_path/"model"), str(tmp_path/"talks"), "de,en", str(tmp_path/"out")]
    words = ["record", *places, "--layout", "texts", "--roles", "assistant", "--tokens", "20"]
    assert main([*words, "--text_field", "messages", "--held_out", "0.3"]) == 0
    assert "40 tokens of de, en counted" in capsys.readouterr().out
    assert main(words) == 2 and "name the text's with text_field=" in capsys.readouterr().err
    s = ActivationStats.load(tmp_path/"out"/"stats.safetensors")
    assert s.n_tokens == dict(de=20, en=20) and s.meta["roles"] == ["assistant"]
