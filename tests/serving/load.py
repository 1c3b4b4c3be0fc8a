"""Many requests at once, while adapters come and go: `python load.py WORK`.

200 concurrent requests to the base model, a plain LoRA and mixtures; meanwhile copies of the adapters are loaded over
HTTP, asked and unloaded. No answer may be wrong. Then: what was unloaded is gone, and loading 20 more times leaves the
memory of the process with the model where it was.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from checks import Answer, Reference, Report, compare, read_reference
from server import Refused, Server

REQUESTS, FIRST = 200, 4
SLOTS, KEPT = 4, 6
"""Adapters in one batch, and in memory: fewer than are served, so that both are used over and over."""

AT_START = ("lora", "recommended", "adamole")
CALLERS, PAUSE = 4, 2.0
"""Threads that load, ask and unload, and seconds between loads that nobody asks for."""

FURTHER_LOADS = 20
BOUND = 150 * 2**20
"""Bytes that they may cost. Packed, the widest adapter takes about 45 MB, so 20 that are kept would cost 900 MB."""


class Load:
    """The work on one server.

    Args:
        server: It runs.
        reference: What it should answer.
        report: For what came out.
    """

    def __init__(self, server: Server, reference: Reference, report: Report) -> None:
        self.server, self.reference, self.report = server, reference, report
        self.copies, self.lock = self._endless_copies(), threading.Lock()

    def ask(self, name: str, prompt: int, of: str | None = None) -> tuple[str, Answer, Answer]:
        """Ask a model: which adapter it is, what it says, and what it should.

        Args:
            name: As the server calls it.
            prompt: Number of the prompt.
            of: The adapter that it is, if its name is another.
        """
        which = of or ("base" if name == self.server.base else name)
        answer = self.server.ask(name, self.reference.prompts[prompt], FIRST)
        return which, answer, self.reference.runs[which][prompt]

    def every(self) -> list[tuple[str, int]]:
        """Every adapter with every prompt."""
        names = [self.server.base, *self.reference.adapters]
        return [(name, prompt) for prompt in range(len(self.reference.prompts)) for name in names]

    def check(self, what: str, asked: list[tuple[str, Answer, Answer]]) -> None:
        """One line for each adapter that was asked."""
        groups: dict[str, list[tuple[Answer, Answer]]] = defaultdict(list)
        for name, answer, right in asked:
            groups[name].append((answer, right))
        for name, pairs in groups.items():
            agreement = compare([answer for answer, _ in pairs], [right for _, right in pairs], FIRST)
            self.report.line(agreement.is_exact, f"{what}, {name}: {agreement}")

    def at_once(self) -> None:
        """All requests at once, and adapters that come and go."""
        done = threading.Event()
        asked = list(itertools.islice(itertools.cycle(self.every()), REQUESTS))
        began = time.monotonic()
        with ThreadPoolExecutor(REQUESTS + CALLERS + 1) as pool:
            callers = [pool.submit(self._come_and_go, done) for _ in range(CALLERS)]
            silent = pool.submit(self._pass_by, done)
            try:
                found = list(pool.map(lambda one: self.ask(*one), asked))
            finally:
                done.set()
            loaded = [one for caller in callers for one in caller.result()]
        seconds = time.monotonic() - began
        self.report.line(len(found) == REQUESTS, f"{len(found)} concurrent requests in {seconds:.0f} s")
        self.check("200 at once", found)
        passed = silent.result()
        self.report.line(
            len(loaded) >= CALLERS and passed >= CALLERS,
            f"in between {len(loaded)} copies were loaded, asked and unloaded, and {passed} loaded and unloaded",
        )
        self.check("loaded in between", [one[:3] for one in loaded])
        refused = sum(one[3] for one in loaded)
        self.report.line(refused == len(loaded), f"{refused} of {len(loaded)} were refused after they were unloaded")

    def _come_and_go(self, done: threading.Event) -> list[tuple[str, Answer, Answer, bool]]:
        found = []
        while not done.is_set():
            found.append(self.one_more())
        return found

    def _pass_by(self, done: threading.Event) -> int:
        """Load copies that nobody asks: each pushes another adapter out of its slot, in use or not."""
        passed = 0
        while not done.wait(PAUSE):
            copy, name = self._copy()
            self.server.load(copy, self.reference.adapters[name])
            self.server.unload(copy)
            passed += 1
        return passed

    def _copy(self) -> tuple[str, str]:
        with self.lock:
            return next(self.copies)

    def one_more(self) -> tuple[str, Answer, Answer, bool]:
        """Load a copy of an adapter, ask it, unload it, and ask again, which the server must refuse."""
        copy, name = self._copy()
        self.server.load(copy, self.reference.adapters[name])
        which, answer, right = self.ask(copy, 0, of=name)
        self.server.unload(copy)
        try:
            self.ask(copy, 0, of=name)
        except Refused as error:
            return which, answer, right, error.code == 404
        return which, answer, right, False

    def _endless_copies(self) -> Iterator[tuple[str, str]]:
        for number in itertools.count():
            for name in self.reference.adapters:
                yield f"{name}-{number}", name

    def leak(self) -> None:
        """Load and unload until every place has been used, then 20 times more."""
        for _ in range(KEPT + SLOTS):
            self.one_more()
        before = self.server.worker_memory()
        found = [self.one_more()[:3] for _ in range(FURTHER_LOADS)]
        grown = self.server.worker_memory() - before
        self.check(f"{FURTHER_LOADS} further loads", found)
        self.report.line(
            grown <= BOUND,
            f"{FURTHER_LOADS} further loads cost the worker {grown / 2**20:.0f} MiB beside {before / 2**20:.0f} MiB "
            f"(at most {BOUND / 2**20:.0f})",
        )


def main(work: Path) -> int:
    report = Report("load")
    reference = read_reference(work / "small")
    at_start = {name: reference.adapters[name] for name in AT_START}
    options = ["--max-loras", str(SLOTS), "--max-cpu-loras", str(KEPT), "--max-lora-rank", "64"]
    began = time.monotonic()
    with Server(reference.base, at_start, work / "load.log", options) as server:
        report.line(True, f"`molora serve` is up after {time.monotonic() - began:.0f} s")
        load = Load(server, reference, report)
        for name in reference.adapters.keys() - at_start.keys():
            server.load(name, reference.adapters[name])
        load.at_once()
        load.leak()
        served = set(server.models()) - {server.base, reference.base}
        report.line(
            served == set(reference.adapters), f"what was unloaded is gone; there are {', '.join(sorted(served))}"
        )
        load.check("at the end", [load.ask(*one) for one in load.every()])
    report.line(server.process.returncode in (0, 130, -2), f"the server ended with code {server.process.returncode}")
    return report.end()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute()))
