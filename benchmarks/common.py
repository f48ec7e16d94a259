"What every benchmark uses: the text, the clock, the memory."
import resource
import time


def corpus():
    from langneuron_mi.text.sources import load_corpus
    return load_corpus("bible", ["en", "de", "fr", "ru", "zh", "ja", "ar", "tr"])


def peak_mb() -> float:
    "Peak resident memory of this process, in MB."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def best_of(fn, n: int = 5) -> float:
    "Seconds of the fastest of a few calls."
    fn()
    out = []
    for _ in range(n):
        t = time.perf_counter()
        fn()
        out.append(time.perf_counter() - t)
    return min(out)
