"The run-time type checker of the test suite."
from beartype import BeartypeConf, beartype

conf = BeartypeConf(is_pep484_tower=True)  # an int is a float, as in PEP 484


def typechecker(fn):
    "beartype, but for the `cls` of class methods added by fastcore's `patch`: its annotation names the class, not its type."
    if "cls" in getattr(fn, "__annotations__", {}): fn.__annotations__ = {k: v for k, v in fn.__annotations__.items() if k != "cls"}
    return beartype(conf=conf)(fn)
