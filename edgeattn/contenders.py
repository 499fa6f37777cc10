"""The backends that a validation compares: loaded one after the other, a failure kept as its verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from edgeattn import conditions
from edgeattn.accuracy import Comparison
from edgeattn.backends import BACKENDS
from edgeattn.bundle import Bundle
from edgeattn.errors import (
    AccuracyError,
    EdgeAttnError,
    IncompatibleError,
    MissingError,
    UnsupportedError,
    UsageError,
)
from edgeattn.reference import Feeds, Original, Results
from edgeattn.session import Session, load

ORIGINAL = "torch"
Run = Callable[[Feeds], Results]


@dataclass
class Contender:
    """A backend under test: what runs it, what was compared, and why it stopped if it did.

    `role` is "candidate", "precision" (PyTorch at the bundle's precision, whose error makes the band) or "reference".
    `memory_mib` is by how much loading it and running it once raised the memory peak of the process.
    """

    name: str
    precision: str
    role: str = "candidate"
    run: Run | None = None
    outputs: list[Comparison] = field(default_factory=list)
    failure: EdgeAttnError | None = None
    skipped: str = ""
    load_s: float | None = None
    memory_mib: float | None = None

    def fail(self, error: EdgeAttnError) -> None:
        """Stop this contender; its verdict is a failure with the exit code of `error`."""
        self.failure = error
        self.run = None

    def start(self, build: Callable[[], Run], feeds: Feeds) -> None:
        """Load the backend and run it once, measuring both; an error of ours becomes its failure."""
        before, reset = conditions.resident_mib(), conditions.reset_peak()
        begun = time.perf_counter()
        try:
            self.run = build()
        except UsageError:
            raise  # an unknown backend: nothing to measure at all
        except EdgeAttnError as error:
            self.fail(error)
            return
        self.load_s = time.perf_counter() - begun
        self.attempt(feeds, "the first sample")
        peak = conditions.peak_mib()
        if reset and before is not None and peak is not None:
            self.memory_mib = max(0.0, peak - before)

    def attempt(self, feeds: Feeds, sample: str) -> Results | None:
        """Run once; what is raised becomes the failure. Raises EA013x for inputs that do not fit the bundle."""
        if self.run is None:
            return None
        try:
            return self.run(feeds)
        except UsageError:
            raise
        except Exception as error:
            # A backend may raise anything while it runs; whatever it is, there are no outputs to call right.
            why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            self.fail(AccuracyError("EA0710", f"{self.name}: fails to run {sample}: {why[:200]}"))
            return None


def original(bundle: Bundle, feeds: Feeds) -> tuple[Original | None, Contender]:
    """Return the PyTorch original and its entry; without torch or `reference/` None and a skipped entry."""
    contender = Contender(ORIGINAL, "fp32", "reference")
    found: list[Original] = []

    def build() -> Run:
        found.append(Original.load(bundle))
        return found[0]

    contender.start(build, feeds)
    failure = contender.failure
    if failure is None:
        return found[0], contender
    # A copy without the original is no fault; a damaged one is.
    if not isinstance(failure, MissingError) and not (
        isinstance(failure, IncompatibleError) and failure.code == "EA0906"
    ):
        raise failure
    contender.skipped, contender.failure = failure.message, None
    return None, contender


def candidates(bundle: Bundle, names: Sequence[str], threads: int, feeds: Feeds) -> list[Contender]:
    """Load the named backends, or every exported one that is usable here. Raises EA0101 for an unknown name.

    A named backend that cannot run is a failure; one that was not named is skipped when it is missing here or does not
    support the graph, and a failure for any other reason.
    """
    chosen = list(dict.fromkeys(names)) or [name for name in BACKENDS if name != ORIGINAL]
    found = [Contender(name, bundle.precision if name != ORIGINAL else "fp32") for name in chosen]
    for contender in found:
        _start(contender, bundle, threads, feeds)
        if not names and isinstance(contender.failure, (MissingError, UnsupportedError)):
            contender.skipped, contender.failure = contender.failure.message, None
    return found


def _start(contender: Contender, bundle: Bundle, threads: int, feeds: Feeds) -> None:
    contender.start(lambda: _callable(load(bundle, contender.name, threads=threads)), feeds)


def _callable(session: Session) -> Run:
    """Return a session as a function from inputs by name to outputs by name."""
    names = [spec.name for spec in session.outputs]

    def run(feeds: Feeds) -> Results:
        found = session(dict(feeds))
        return dict(zip(names, found if len(names) > 1 else (found,), strict=True))

    return run
