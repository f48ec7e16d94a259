"The tokens of an answer."
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain import llama, words
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.share.answers import answer_tokens
from langneuron_mi.testing.tiny import tiny_model


@given(words, words, st.sampled_from(["en", "zh"]))
def test_answers_are_the_tokens_of_the_whole_text(prompt, answer, lang):
    context, rest = answer_tokens(llama(), prompt, answer, lang)
    tok = view(llama()).tokenizer
    text = prompt.rstrip() + ("" if lang == "zh" else " ") + answer.lstrip()
    assert context + rest == tok(text).input_ids
    assert tok.decode(rest).lstrip() == answer.lstrip()


def test_answers_where_the_tokenizer_merges_across_the_border():
    hf, _ = tiny_model("llama")
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<pad>", "<bos>", "a", "b", "c", "bc"])}, merges=[("b", "c")]))
    model = load_model(hf, tokenizer=PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", pad_token="<pad>"))
    assert answer_tokens(model, "ab", "c", "zh") == ([2], [5])
    assert answer_tokens(model, "aa", "c", "zh") == ([2, 2], [4])
    with pytest.raises(ValueError, match="nothing comes before the answer"): answer_tokens(model, "b", "c", "zh")
