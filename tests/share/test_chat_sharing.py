"Chat: sharing categories, contributions and effects, from every activation of the template's own ids in Hugging Face's model."
import pytest
import torch
from chats import BOS, LLAMA2, chat_models, template_ids

from langneuron_mi.change.interventions import ablate
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.models.view import view
from langneuron_mi.share.categories import category_sets, input_categories
from langneuron_mi.share.contributions import category_contribution
from langneuron_mi.share.effect import category_effect
from langneuron_mi.share.sharing import Sharing, sharing
from langneuron_mi.text.conversations import ChatError

PROMPTS = {"en": ["abc de", "f", "ghij klm nop"], "de": ["zyx", "wv uts rq", "p"], "zh": ["中", "文字", "我们x"]}
ANSWERS = {"en": ["b", "cd", "e"], "de": ["x", "yz", "w"], "zh": ["文", "a", "好"]}
SYSTEM = "Sei kurz."


@torch.no_grad()
def activations(hf, ids):
    "[layer, pos, neuron] of one row: what the activation function gives."
    got, handles = {}, []
    for l, layer in enumerate(hf.model.layers):
        handles.append(layer.mlp.act_fn.register_forward_hook(lambda m, i, o, l=l: got.__setitem__(l, o[0])))
    hf(torch.tensor([ids]))
    for h in handles: h.remove()
    return torch.stack([got[l] for l in range(len(got))])


def brute(c, token, theta=0.):
    "[input, layer, neuron] category; the words of the user stand where the system message's marks and his own end."
    found = []
    for texts in zip(*PROMPTS.values()):
        on = []
        for t in texts:
            ids, n = template_ids(c.tok, t, SYSTEM), len(c.tok(t, add_special_tokens=False).input_ids)
            start = next(i for i in range(len(ids) - n, -1, -1) if ids[i:i + n] == c.tok(t, add_special_tokens=False).input_ids)
            a = activations(c.hf, ids)
            on.append(a[:, -1] > theta if token == "last" else (a[:, start:start + n] > theta).any(1))
        count = torch.stack(on).sum(0)
        found.append(torch.where(count == 0, 3, torch.where(count == len(texts), 0, torch.where(count > 1, 1, 2))))
    return torch.stack(found)


@pytest.mark.parametrize("token", ["last", "any"])
@pytest.mark.parametrize("template", [BOS, LLAMA2])
def test_chat_sharing_looks_at_the_start_of_the_answer_or_at_the_prompts_own_words(template, token, tmp_path):
    for c in chat_models(template):
        asked = dict(token=token, theta=[0., .2], progress=False, batch_size=2, out=tmp_path/c.kind)
        s = sharing(c.model, PROMPTS, chat=True, system=SYSTEM, **asked)
        for k, theta in enumerate((0., .2)):
            want = brute(c, token, theta)
            for category in range(4):
                assert torch.equal(s.category_counts[k, category], (want == category).sum(0)), c.kind
                assert torch.equal(s.per_input[k, :, :, category].long(), (want == category).sum(-1))
        one = {l: p[0] for l, p in PROMPTS.items()}
        assert torch.equal(input_categories(c.model, one, token=token, chat=True, system=SYSTEM).long(), brute(c, token)[0])
        assert sum(map(len, category_sets(c.model, one, chat=True, system=SYSTEM).values())) == 128
        plain = sharing(c.model, PROMPTS, **asked)
        again = sharing(c.model, PROMPTS, chat=True, system=SYSTEM, **asked)
        assert torch.equal(again.per_input, s.per_input) and not torch.equal(plain.per_input, s.per_input)
        assert s.provenance["chat"]["system"] == SYSTEM and "chat" not in plain.provenance
        s.save(tmp_path/"s.safetensors")
        assert Sharing.load(tmp_path/"s.safetensors").provenance["chat"] == s.provenance["chat"]


def test_chat_effects_score_the_answer_behind_the_template():
    for c in chat_models(BOS):
        e = category_effect(c.model, PROMPTS, ANSWERS, chat=True, system=SYSTEM, categories=["all-shared"], controls=1, progress=False)
        for i in range(3):
            shared = NeuronSet.from_mask(brute(c, "last")[i] == 0, "gate")
            assert e.n_neurons[i, 0] == len(shared)
            for k, lang in enumerate(PROMPTS):
                before, after = template_ids(c.tok, PROMPTS[lang][i], SYSTEM), c.tok(ANSWERS[lang][i], add_special_tokens=False).input_ids
                def log_prob(logits):
                    p = logits[0].float().log_softmax(-1)
                    return float(sum(p[len(before) - 1 + j, t] for j, t in enumerate(after)))
                row = torch.tensor([before + after])
                with torch.no_grad(): assert e.before[i, k] == pytest.approx(log_prob(c.hf(row).logits), abs=1e-3), c.kind
                with torch.no_grad(), ablate(shared).on(c.model): edited = log_prob(view(c.model).logits(row))
                assert e.after[i, k, 0, 0] == pytest.approx(edited, abs=1e-3)
        assert e.provenance["chat"]["system"] == SYSTEM


def test_chat_contributions_are_read_where_the_answer_starts():
    for c in chat_models(BOS):
        df = category_contribution(c.model, PROMPTS, top_k=10, chat=True, system=SYSTEM, progress=False)
        norms = torch.stack([layer.mlp.down_proj.weight.detach().norm(dim=0) for layer in c.hf.model.layers])
        found = brute(c, "last")
        for lang, prompts in PROMPTS.items():
            share = 0
            for i, p in enumerate(prompts):
                post, handles = {}, []
                for l, layer in enumerate(c.hf.model.layers):
                    handles.append(layer.mlp.down_proj.register_forward_pre_hook(lambda m, a, l=l: post.__setitem__(l, a[0][0, -1])))
                with torch.no_grad(): c.hf(torch.tensor([template_ids(c.tok, p, SYSTEM)]))
                for h in handles: h.remove()
                size = torch.stack([post[0], post[1]]).abs().double()*norms
                share = share + (size*(found[i] == 0)).sum(-1)/size.sum(-1)/len(prompts)
            got = df[(df.lang == lang) & (df.category == "all-shared")].sort_values("layer")["sum"].to_numpy()
            assert got == pytest.approx(share.numpy(), abs=1e-4), c.kind


def test_chat_prompts_are_checked_as_they_are_put():
    c = chat_models(BOS)[0]
    with pytest.raises(ValueError, match="prompt 1 of de is empty"): sharing(c.model, {"en": ["a", "b"], "de": ["c", " "]}, chat=True)
    room = view(c.model).n_ctx - len(template_ids(c.tok, ""))
    sharing(c.model, {"en": ["a"*room], "de": ["c"]}, chat=True, progress=False)
    with pytest.raises(ValueError, match=f"has {view(c.model).n_ctx + 1} tokens"):
        sharing(c.model, {"en": ["a"*(room + 1)], "de": ["c"]}, chat=True)
    with pytest.raises(ValueError, match="give chat=True as well"): sharing(c.model, PROMPTS, system="a")
    view(c.model).tokenizer.chat_template = None
    for measure in (sharing, category_contribution):
        with pytest.raises(ChatError, match="has no chat template"): measure(c.model, PROMPTS, chat=True)
