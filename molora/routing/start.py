"""Where routers start from: statistics of what they read, and rows, sharpness and even loads from it. Pure functions.

Hidden states of a language model share a large common direction, so that a random router ranks all tokens alike and
learns next to nothing; see `docs/routers.md` for what each step was measured to do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from molora.routing.routers.base import SHARPNESS

ITERATIONS = 25
"""Of clustering."""

RESTARTS = 3
"""Clusterings of rows tried, of which the tightest is taken."""

RIDGE = 1.0
"""What is added to the covariance of a discriminant, in mean variances: few rows tell little about directions."""

TOKENS_TO_BALANCE = 2048
"""Loads are evened out on so many tokens at most."""


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature, both `[in]`, of `[T, in]`.

    A feature that hardly varies gets a deviation of a thousandth of the median one, so that it does not decide; one
    that never does gets one.
    """
    mean, std = x.mean(dim=0), x.std(dim=0, unbiased=False)
    varies = std > 1e-6 * mean.abs()
    if not bool(varies.any()):
        return mean, torch.ones_like(std)
    return mean, torch.where(varies, std.clamp(min=1e-3 * float(std[varies].median())), 1.0)


def normalized(x: Tensor, mean: Tensor, std: Tensor | None) -> Tensor:
    """`(x - mean) / std`, `[T, in]`; only centred without `std`."""
    return x - mean if std is None else (x - mean) / std


def token_prototypes(z: Tensor, answer: Tensor, experts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows towards which tokens gather, each about as many of them.

    Args:
        z: Normalised features `[T, in]`.
        answer: Boolean `[T]`, whether it predicts an answer's token.
        experts: E.
        seed: Of the first centres.

    Returns:
        Rows `[E, in]` and offsets `[E]`.
    """
    _, centres = kmeans(z, half_for_answers(answer), experts, seed, restarts=1)
    return centres * (SHARPNESS / z.shape[1] ** 0.5), torch.zeros_like(centres[:, 0])


def text_discriminants(
    z: Tensor, row: Tensor, answer: Tensor, counts: Tensor, experts: int, seed: int, rest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows that tell from one token which kind of text it is in, found without labels.

    Texts are clustered by what their tokens are on average, prompt and answer counting the same, into clusters of
    about the same size. The linear discriminant then finds the directions in a token that tell its text's cluster,
    `W = (Σ + ridge)⁻¹ (m_e - m)`, with Σ the covariance of tokens within clusters.

    Args:
        z: Normalised features `[T, in]`.
        row: The text each is of, `[T]`.
        answer: Boolean `[T]`, whether it predicts an answer's token.
        counts: Boolean `[T]`: the tokens that say something about their text. A text's first one does not.
        experts: E.
        seed: Of the first centres.
        rest: `[in]`, the mean of what the clusters are told from, if that is not the mean of the data: zero for what
            the features were normalised by.

    Returns:
        Rows `[E, in]` and offsets `[E]`: logits of the posterior, priors equal.
    """
    if bool(counts.any()):
        z, row, answer = z[counts], row[counts], answer[counts]
    weight = half_for_answers(answer)
    texts = text_means(z, row, answer)
    kind, _ = kmeans(texts - texts.mean(dim=0), None, experts, seed, restarts=RESTARTS)
    member = F.one_hot(kind[row.unique(return_inverse=True)[1]], experts).to(z) * weight.unsqueeze(-1)
    mass = member.sum(dim=0).clamp(min=1e-9).unsqueeze(-1)
    means, mean = member.T @ z / mass, weight @ z if rest is None else rest
    within = (z * weight.unsqueeze(-1)).T @ z - (means * mass).T @ means
    within.diagonal().add_(RIDGE * within.diagonal().mean().clamp(min=1e-9))
    factor, failed = torch.linalg.cholesky_ex(within)
    if failed:  # rounding has made it indefinite
        factor = torch.linalg.cholesky(within + within.diagonal().mean() * torch.eye(len(within)).to(within))
    rows = torch.cholesky_solve((means - mean).T, factor).T
    return rows, -0.5 * (rows * (means + mean)).sum(dim=-1)


def text_means(z: Tensor, row: Tensor, answer: Tensor) -> Tensor:
    """What each text's tokens are on average, `[B, in]`: the mean of its prompt's mean and its answer's.

    Args:
        z: `[T, in]`.
        row: The text each is of, `[T]`.
        answer: Boolean `[T]`.
    """
    known, index = row.unique(return_inverse=True)
    parts = [torch.zeros(len(known), 2, device=z.device), torch.zeros(len(known), 2, z.shape[1], device=z.device)]
    counts = parts[0].index_put_((index, answer.long()), torch.ones_like(answer, dtype=z.dtype), accumulate=True)
    sums = parts[1].index_put_((index, answer.long()), z.to(parts[1]), accumulate=True)
    there = (counts > 0).float()
    return (sums / counts.clamp(min=1).unsqueeze(-1)).sum(dim=1) / there.sum(dim=1, keepdim=True)


def kmeans(points: Tensor, weight: Tensor | None, clusters: int, seed: int, restarts: int) -> tuple[Tensor, Tensor]:
    """Spherical k-means with clusters of about the same size.

    Args:
        points: `[N, in]`; only their directions count.
        weight: How much each counts, `[N]`; `None` for all alike.
        clusters: Number of clusters.
        seed: Of the first centres, which are drawn far from each other (k-means++).
        restarts: Tries, of which the tightest is taken.

    Returns:
        The cluster of each point `[N]`, and unit centres `[clusters, in]`.
    """
    units = F.normalize(points, dim=-1)
    weight = torch.full_like(units[:, 0], 1 / len(units)) if weight is None else weight
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(restarts):
        centres = _far_points(units, weight, clusters, generator)
        kind = weight.new_zeros(len(units), dtype=torch.long)
        for _ in range(ITERATIONS):
            kind = even_assignment(units @ centres.T, weight)
            member = F.one_hot(kind, clusters).to(units) * weight.unsqueeze(-1)
            filled = (member.sum(dim=0) > 0).unsqueeze(-1)
            centres = torch.where(filled, F.normalize(member.T @ units, dim=-1), centres)
        tightness = float((units * centres[kind]).sum(dim=-1) @ weight)
        found.append((tightness, kind, centres))
    _, kind, centres = max(found, key=lambda one: one[0])
    return kind, centres


def _far_points(units: Tensor, weight: Tensor, number: int, generator: torch.Generator) -> Tensor:
    chosen: list[int] = []
    distance = torch.ones_like(weight)
    for _ in range(number):
        odds = (distance * weight).clamp(min=1e-12).cpu()
        chosen.append(int(torch.multinomial(odds, 1, generator=generator)))
        distance = distance.minimum((1 - units @ units[chosen[-1]]).clamp(min=0))
    return units[chosen]


def even_assignment(similarity: Tensor, weight: Tensor, rounds: int = 8) -> Tensor:
    """Assign points so that each centre gets about the same weight, `[N]` (Sinkhorn, as in SwAV, arXiv 2006.09882).

    Args:
        similarity: Of points and centres, `[N, E]`.
        weight: How much each point counts, `[N]`.
        rounds: Of evening out.
    """
    sharpness = 5 / similarity.std().clamp(min=1e-6)
    mass = (sharpness * (similarity - similarity.max(dim=-1, keepdim=True).values)).exp()
    for _ in range(rounds):
        mass = mass / (weight @ mass).clamp(min=1e-30)
        mass = mass / mass.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    return mass.argmax(dim=-1)


def half_for_answers(answer: Tensor, share: float = 0.5) -> Tensor:
    """Weights `[T]` that sum to one, of which `share` goes to answers, however short they are."""
    answers = answer.float()
    if bool(answer.all()) or not bool(answer.any()):
        return torch.full_like(answers, 1 / len(answers))
    return share * answers / answers.sum() + (1 - share) * (1 - answers) / (1 - answers).sum()


def sharpness(logits: Tensor, weight: Tensor, confidence: float) -> float:
    """The factor of logits that makes the mean largest probability of their softmax what is wanted.

    Args:
        logits: `[T, E]`.
        weight: How much each token counts, `[T]`, summing to one.
        confidence: Wanted, above 1/E and below 1.
    """
    low, high = 1e-4, 1e6
    for _ in range(40):
        middle = (low * high) ** 0.5
        largest = torch.softmax(middle * logits, dim=-1).max(dim=-1).values @ weight
        low, high = (low, middle) if largest > confidence else (middle, high)
    return (low * high) ** 0.5


def winning_offset(new: Tensor, old: Tensor, weight: Tensor, share: float) -> float:
    """What is added to the logits of new experts so that they have a share of the probability, on average.

    Args:
        new: Logits `[T, N]` of the new experts.
        old: Logits `[T, E]` of the others.
        weight: How much each token counts, `[T]`, summing to one.
        share: Wanted, below 1.
    """
    lead = new.logsumexp(dim=-1) - old.logsumexp(dim=-1)
    low, high = -1e3, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if torch.sigmoid(lead + middle) @ weight > share else (middle, high)
    return (low + high) / 2


def evening_offsets(logits: Tensor, weight: Tensor, k: int, seed: int, steps: int = 150) -> Tensor:
    """Offsets `[E]`, mean zero, under which the `k` best experts of all tokens are about equally many.

    Args:
        logits: `[T, E]`.
        weight: How much each token counts, `[T]`.
        k: Experts a token takes.
        seed: Of the tokens that are looked at, if there are many.
        steps: Of descent, which get shorter.
    """
    if len(logits) > TOKENS_TO_BALANCE:
        order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))[:TOKENS_TO_BALANCE]
        logits, weight = logits[order.to(logits.device)], weight[order.to(weight.device)]
    weight = (weight / weight.sum()).unsqueeze(-1).expand(-1, k).flatten()
    experts, rate = logits.shape[1], 0.15 * float(logits.std())
    offsets = best = torch.zeros_like(logits[0])
    least = float("inf")
    for step in range(steps):
        chosen = (logits + offsets).topk(k, dim=-1).indices.flatten()
        excess = torch.zeros_like(offsets).index_add_(0, chosen, weight) * (experts / k) - 1
        uneven = float(excess.abs().max())
        if uneven < least:
            least, best = uneven, offsets
        if uneven < 0.02:
            break
        offsets = offsets - rate * (1 - step / steps) * excess.clamp(-1, 1)
        offsets = offsets - offsets.mean()
    return best
