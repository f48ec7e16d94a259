"Log-probabilities against Hugging Face's own loss, plain and under edits."
import pytest
import torch
from lens import lens_models
from plain_edits import CACHE, PAIRS, SET, VALUES, hf_log_prob, plain_edit

from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.measure.continuations import log_probs, tokenize
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.testing.tiny import tiny_model


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gemma2", "gpt2", "bloom"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_continuations_log_probs_equal_hugging_face_loss(arch, batch_size):
    for name, hf, tok, model in lens_models(arch):
        rows = tokenize(model, [p for p, _ in PAIRS], [t for _, t in PAIRS])
        got = log_probs(model, rows, batch_size=batch_size)
        for (p, texts), scores in zip(PAIRS, got):
            for t, s in zip(texts, scores): assert s == pytest.approx(hf_log_prob(hf, tok, p, t), abs=1e-4, rel=1e-5), (name, p, t)


def test_continuations_tokens_merge_at_the_boundary():
    "A tokenizer that merges the prompt's end with the answer's start: the merged token is scored, and counted."
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    hf, byte = tiny_model("llama")
    chars = {c: i for i, c in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefgh", "ab"])}
    bpe = Tokenizer(models.BPE(vocab=chars, merges=[("a", "b")], unk_token="<unk>"))
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", pad_token="<pad>", unk_token="<unk>")
    model = load_model(hf, tokenizer=tok)
    [row] = tokenize(model, ["ca"], [["cab", "cad"]])
    assert row.merged and row.rest == [[chars["ab"]], [chars["a"], chars["d"]]]
    scores = log_probs(model, [row])[0]
    bos = [] if view(model).bos_token_id is None else [1]
    def direct(ids, cut):
        with torch.no_grad(): lp = tiny_model("llama")[0](torch.tensor([bos + ids])).logits.log_softmax(-1)[0]
        return sum(float(lp[len(bos) + i - 1, ids[i]]) for i in range(cut, len(ids)))
    c, a, d, ab = (chars[x] for x in ("c", "a", "d", "ab"))
    assert scores[0] == pytest.approx(direct([c, ab], 1), abs=1e-4)        # c | ab
    assert scores[1] == pytest.approx(direct([c, a, d], 1), abs=1e-4)      # c | a d: both from where the first of them leaves the prompt


def test_continuations_log_probs_under_an_intervention_equal_plain_hooks():
    s = NeuronSet(SET, (2, 64))
    for positions in ("all", "prompt", "generated", "last"):
        for name in ("scale", "set", "setmax"):
            make, fn = VALUES[name]
            for kind, hf, tok, model in lens_models("llama"):
                rows = tokenize(model, [p for p, _ in PAIRS], [t for _, t in PAIRS])
                with make(s).where(positions).on(model): got = log_probs(model, rows)
                CACHE["on"] = False
                for (p, texts), scores, row in zip(PAIRS, got, rows):
                    for t, x in zip(texts, scores):
                        handles = plain_edit(hf, SET, fn, positions, len(row.prefix))
                        want = hf_log_prob(hf, tok, p, t)
                        for h in handles: h.remove()
                        assert x == pytest.approx(want, abs=2e-4, rel=1e-5), (kind, positions, name, t)
