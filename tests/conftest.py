"Shared by all tests: offline, one thread per worker, every annotation of the package checked at run time."
import importlib.metadata
import importlib.util
import os

os.environ |= dict(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

install_import_hook("langneuron_mi", "typecheck.typechecker")
torch.set_num_threads(1)
settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
settings.load_profile("tests")


def _transformer_lens() -> tuple[str, str]:
    "Version and folder of the TransformerLens that `import transformer_lens` takes."
    return importlib.metadata.version("transformer-lens"), os.path.dirname(importlib.util.find_spec("transformer_lens").origin)


def pytest_configure(config):
    want, (have, where) = os.environ.get("EXPECT_TL"), _transformer_lens()
    if want and have != want: raise pytest.UsageError(f"TransformerLens {want} was to be tested, but {have} from {where} would be")


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line("TransformerLens {} from {}, torch {}".format(*_transformer_lens(), torch.__version__))


@pytest.fixture(scope="session")
def planted():
    "The planted model in English, German and French. Do not change it; `planted_model()` makes another."
    from langneuron_mi.testing.planted import planted_model
    return planted_model()


@pytest.fixture(scope="session")
def tiny():
    "`tiny(arch, **config)` makes a fresh random model and its tokenizer."
    from langneuron_mi.testing.tiny import tiny_model
    return tiny_model


PLAIN = ("test_recorded_experts.py", "test_changed_experts.py", "test_planted_experts.py", "test_ragged_layout.py", "test_quantised.py",
         "test_quantised_tuning.py", "test_chat_writing.py", "test_chat_measures.py", "test_chat_recording.py", "test_chat_sharing.py",
         "test_chat_studies.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Slow: tests that start a Ray cluster, but for the two that compare bits; and tests of plain Hugging Face models.

    TransformerLens gives these only its HookPoint; tests/testing/test_families_table.py runs every architecture on both versions."""
    for item in items:
        if item.path.name in PLAIN: item.add_marker(pytest.mark.slow)
        if item.path.name == "test_scaling.py" and "cluster" in item.fixturenames and "same_bits" not in item.name:
            item.add_marker(pytest.mark.slow)
