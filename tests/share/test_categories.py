"Categories of one input, and what is refused before the model runs."
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lens import lens_models
from plain import ANSWERS, ARCHS, PROMPTS, brute, llama

from langneuron_mi.change.interventions import ablate
from langneuron_mi.find.neurons import NeuronSet
from langneuron_mi.share.categories import CATEGORIES, categories, category_sets, input_categories
from langneuron_mi.share.effect import category_effect
from langneuron_mi.share.sharing import sharing


@pytest.mark.parametrize("site", ["gate", "post"])
@pytest.mark.parametrize("token", ["last", "any"])
@pytest.mark.parametrize("arch", ARCHS)
def test_categories_of_one_input_equal_brute_force(arch, token, site):
    for name, hf, tok, model in lens_models(arch):
        one = {lang: p[2] for lang, p in PROMPTS.items()}
        cat, _ = brute(hf, tok, {lang: [p] for lang, p in one.items()}, 0, token, site)
        assert torch.equal(input_categories(model, one, token=token, site=site).long(), cat[0])
        assert {c: set(n) for c, n in category_sets(model, one, token=token, site=site).items()} == {
            c: set(NeuronSet.from_mask(cat[0] == k, site)) for k, c in enumerate(CATEGORIES)}


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=2, max_size=5))
def test_categories_partition_the_neurons(rows):
    active = torch.tensor(rows).reshape(len(rows), 2, 3)
    cat = categories(active)
    for l in range(2):
        for i in range(3):
            n = sum(bool(active[k, l, i]) for k in range(len(rows)))
            want = {0: "non-activated", 1: "specific", len(rows): "all-shared"}
            assert CATEGORIES[cat[l, i]] == want.get(n, "partial-shared")
    flipped = categories(active.flip(0))
    assert torch.equal(cat, flipped), "the order of languages does not matter"


def test_categories_sharing_and_effect_refuse_a_model_under_an_intervention():
    with ablate(NeuronSet([(0, 1)], shape=(2, 64))).on(llama()):
        for measure in (lambda: sharing(llama(), PROMPTS), lambda: input_categories(llama(), {"en": "a", "de": "b"}),
                        lambda: category_effect(llama(), PROMPTS, ANSWERS)):
            with pytest.raises(ValueError, match="an intervention is on"): measure()
