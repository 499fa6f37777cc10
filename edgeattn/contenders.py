"""The backends that a validation compares: loaded one after the other, a failure kept as its verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from edgeattn import conditions
from edgeattn.accuracy import Comparison
from edgeattn.backends import BACKENDS
from edgeattn.bundle import Bundle
from edgeattn.errors import AccuracyError, EdgeAttnError, IncompatibleError, MissingError, UnsupportedError, UsageError
from edgeattn.reference import Feeds, Original, Results
from edgeattn.session import Session, load

ORIGINAL = "torch"
# The backends of a bundle by default: what was exported, not the original it came from.
EXPORTED = tuple(name for name in BACKENDS if name != ORIGINAL)


@dataclass
class Contender:
    """A backend under test: what runs it, what was compared, and why it stopped if it did.

    `role` is "candidate", "precision" (PyTorch at the bundle's precision, whose error makes the band) or "reference".
    """

    name: str
    precision: str
    role: str = "candidate"
    run: Callable[[Feeds], Results] | None = None
    outputs: list[Comparison] = field(default_factory=list)
    failure: EdgeAttnError | None = None
    skipped: str = ""
    load_s: float | None = None
    memory_mib: float | None = None

    def fail(self, error: EdgeAttnError) -> None:
        """Stop this contender; its verdict is a failure with the exit code of `error`."""
        self.failure = error
        self.run = None


def reference(bundle: Bundle) -> tuple[Original | None, str]:
    """Return the PyTorch original, or None and the reason why recorded outputs have to do."""
    try:
        return Original.load(bundle), ""
    except MissingError as error:
        return None, error.message
    except IncompatibleError as error:
        if error.code != "EA0906":  # a copy without the original; anything else is damage
            raise
        return None, error.message


def candidates(bundle: Bundle, names: Sequence[str], threads: int, feeds: Feeds) -> list[Contender]:
    """Load the named backends, or every exported one that is usable here. Raises EA0101 for an unknown name.

    A named backend that cannot run is a failure; one that was not named is skipped when it is missing here or does not
    support the graph, and a failure for any other reason.
    """
    found = [_load(bundle, name, threads, feeds) for name in dict.fromkeys(names or EXPORTED)]
    if not names:
        for contender in found:
            if isinstance(contender.failure, (MissingError, UnsupportedError)):
                contender.skipped, contender.failure = contender.failure.message, None
    return found


def as_callable(session: Session) -> Callable[[Feeds], Results]:
    """Return a session as a function from inputs by name to outputs by name."""
    names = [spec.name for spec in session.outputs]

    def run(feeds: Feeds) -> Results:
        found = session(dict(feeds))
        return dict(zip(names, found if len(names) > 1 else (found,), strict=True))

    return run


def attempt(contender: Contender, feeds: Feeds, sample: str) -> Results | None:
    """Run a contender once; what it raises becomes its failure. Raises EA013x for inputs that do not fit the bundle."""
    if contender.run is None:
        return None
    try:
        return contender.run(feeds)
    except UsageError:
        raise
    except Exception as error:
        # A backend may raise anything while it runs; whatever it is, there are no outputs to call right.
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        contender.fail(AccuracyError("EA0702", f"{contender.name}: fails to run {sample}: {why[:200]}"))
        return None


def _load(bundle: Bundle, name: str, threads: int, feeds: Feeds) -> Contender:
    contender = Contender(name, bundle.precision if name != ORIGINAL else "fp32")
    before, reset = conditions.resident_mib(), conditions.reset_peak()
    start = time.perf_counter()
    try:
        contender.run = as_callable(load(bundle, name, threads=threads))
    except UsageError:
        raise  # an unknown backend: nothing to measure at all
    except EdgeAttnError as error:
        contender.fail(error)
        return contender
    contender.load_s = time.perf_counter() - start
    attempt(contender, feeds, "the first sample")
    peak = conditions.peak_mib()
    contender.memory_mib = peak - before if reset and peak is not None and before is not None else None
    return contender

