"""What a report says, as plain data: gathered on one side, drawn on the other.

A section whose data is missing is a sentence that says how to get it. Shapes: L linears, N tasks, E experts, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Matrix = list[list[float]]
"""Rows of numbers."""


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        task: Name of the task.
        metric: What was measured.
        rows: Rows scored.
        before: Without the adapter, if that was measured.
        after: With it, if that was measured.
        errors: Standard errors of the two; `None` where they do not follow from what is known.
        bound: Whether the errors are upper bounds.
        change_error: Standard error of the change, paired on rows; `None` if it is not known.
    """

    task: str
    metric: str
    rows: int
    before: float | None
    after: float | None
    errors: tuple[float | None, float | None] = (None, None)
    bound: bool = False
    change_error: float | None = None


@dataclass(frozen=True)
class Curve:
    """What a training logged of one metric.

    Attributes:
        title: Its name.
        routing: Whether it is about routing.
        series: By `train` or `held-out`, pairs of step and value.
    """

    title: str
    routing: bool
    series: dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Loads:
    """What share of the selections falls on each expert.

    Attributes:
        modules: Names of the linears, L of them.
        experts: Experts of each, `[L]`.
        end: Load at the end, `[L, E]`.
        origin: What the end was measured on, in words.
        steps: Steps of the training that are known; may be empty.
        over_time: Load at each step, `[steps, L, E]`; empty for a linear that did not run.
    """

    modules: list[str]
    experts: list[int]
    end: Matrix
    origin: str
    steps: list[int] = field(default_factory=list)
    over_time: list[list[list[float]]] = field(default_factory=list)


@dataclass(frozen=True)
class Histogram:
    """Shares of values in bins of equal width from 0 to `end`."""

    shares: list[float]
    end: float
    mean: float


@dataclass(frozen=True)
class Usage:
    """How many experts decisions use, and how high learned thresholds are.

    Attributes:
        tokens: Tokens looked at.
        experts: Share of decisions that use 0, 1, … experts.
        mean: Experts that a decision uses.
        by_module: The same of each linear.
        thresholds: Of linears that learn one, in bins up to the highest they can reach; `None` if none does.
    """

    tokens: int
    experts: list[float]
    mean: float
    by_module: dict[str, float]
    thresholds: Histogram | None = None


@dataclass(frozen=True)
class Affinity:
    """What experts each task uses.

    Attributes:
        tasks: Names of the tasks, N of them.
        tokens: Tokens of each.
        modules: Names of the linears.
        weights: Shares of mixing weight, `[L, N, E]`.
        bits: What the expert tells about the task, `[L]`.
    """

    tasks: list[str]
    tokens: list[int]
    modules: list[str]
    weights: list[Matrix]
    bits: list[float]


@dataclass(frozen=True)
class Cosines:
    """How alike experts are: cosines of what they add.

    Attributes:
        modules: Names of the linears.
        labels: Names of the experts of each.
        matrices: `[L, E, E]`.
        mean: Over the linears that have most experts, `[E, E]`.
        pairs: Linear, two experts and their cosine, of those that are nearly the same; most alike first.
        empty: Linear and expert, of those that add nothing.
    """

    modules: list[str]
    labels: list[list[str]]
    matrices: list[Matrix]
    mean: Matrix
    pairs: list[tuple[str, str, str, float]]
    empty: list[tuple[str, str]]


@dataclass(frozen=True)
class TokenRouting:
    """How one text is routed.

    Attributes:
        origin: What the text is, in words.
        pieces: Its tokens, T of them.
        groups: What is averaged over: all linears, then layer by layer.
        weights: Shares of mixing weight, `[groups, T, E]`.
        left_out: Tokens behind those shown.
    """

    origin: str
    pieces: list[str]
    groups: list[str]
    weights: list[Matrix]
    left_out: int = 0


@dataclass(frozen=True)
class Account:
    """Parameters and memory.

    Attributes:
        parameters: Numbers by kind.
        bytes: Bytes by what they are for.
        base: Parameters of the base model, if it was loaded.
        serving: Facts about servers by name; empty if it cannot be served.
        refused: Why it cannot be served, else empty.
    """

    parameters: dict[str, int]
    bytes: dict[str, int]
    base: int | None
    serving: dict[str, str]
    refused: str = ""


@dataclass(frozen=True)
class Report:
    """Everything a page says.

    Attributes:
        title: Name of the adapter.
        about: Facts by name.
        formula: The method in one line.
        scores: Of tasks, before and after.
        curves: What was logged.
        loads: Load of experts.
        usage: Experts per token and thresholds.
        affinity: Tasks and experts.
        cosines: Likeness of experts.
        tokens: Routing of a text.
        account: Parameters and memory.
        run_file: The run file's text, and whether it is there.
        config: The adapter's config, as JSON.
        versions: By package.
        notes: What could not be read, in sentences.
    """

    title: str
    about: dict[str, str]
    formula: str
    scores: list[Score] | str
    curves: list[Curve] | str
    loads: Loads | str
    usage: Usage | str
    affinity: Affinity | str
    cosines: Cosines | str
    tokens: TokenRouting | str
    account: Account
    run_file: tuple[str, bool]
    config: str
    versions: dict[str, str]
    notes: list[str] = field(default_factory=list)
