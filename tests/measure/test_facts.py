"Joining a prompt and its answer as each language writes them."
import pytest

from langneuron_mi.measure.facts import fill


@pytest.mark.parametrize("lang, template, want", [
    ("en", "The capital of [X] is [Y].", "The capital of A is B"), ("fr", "[X] : l’[Y]", "A : l’B"),
    ("fr", "[X] («\u00a0[Y]\u00a0»)", "A («\u00a0B"), ("es", "¿[X]? ¡[Y]!", "¿A? ¡B"),
    ("tr", "[X]'in başkenti '[Y]'dir", "A'in başkenti 'B"),
    ("ar", "عاصمة [X] هي ([Y])", "عاصمة A هي (B"), ("ko", "[X]의 수도는 [Y]입니다", "A의 수도는 B"), ("zh", "[X]的首都是[Y]。", "A的首都是B"),
    ("zh", "[X] 的首都是 [Y]", "A 的首都是B"), ("ja", "[X]の首都は「[Y]」です", "Aの首都は「B"), ("th", "เมืองหลวงของ[X]คือ [Y]", "เมืองหลวงของAคือB"),
    ("my", "[X] [Y]", "AB"), ("lo", "[X]: [Y]", "A:B"), ("km", "[X] [Y]", "AB")])
def test_facts_join_as_the_template_writes(lang, template, want):
    prompt, gap = fill(template, "A", lang)
    assert prompt + gap + "B" == want and prompt == prompt.rstrip()
