"""The maths of the nearest plain LoRA, against what it must be by definition: fp64, without any model."""

import pytest
import torch

from molora.plain.fit import Moments, mean_square, ridge_fit, squared_error, truncate, truncate_unweighted


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(x: torch.Tensor, h: torch.Tensor) -> Moments:
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    return Moments(x.T @ x, h.T @ x, h.T @ h, None, len(x))


def inputs(tokens: int = 200, size: int = 9, seed: int = 1) -> torch.Tensor:
    """With a common direction and unequal scales, as hidden states have."""
    return draw(tokens, size, seed=seed) * torch.linspace(0.1, 3, size, dtype=torch.float64) + 2.0


def gated(x: torch.Tensor, rank: int = 6, seed: int = 2) -> torch.Tensor:
    return torch.relu(x @ draw(x.shape[1], rank, seed=seed)) * (x[:, :1] > 2)


def test_without_ridge_the_fit_is_least_squares() -> None:
    x = inputs()
    h = gated(x)
    expected = torch.linalg.lstsq(x, h).solution.T
    torch.testing.assert_close(ridge_fit(moments_of(x, h), 0.0)[:, :-1], expected, rtol=1e-6, atol=1e-8)
    assert not ridge_fit(moments_of(x, h), 0.0)[:, -1].any()


def test_with_a_bias_the_fit_is_least_squares_with_an_intercept() -> None:
    x = inputs()
    h = gated(x)
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1).double()], dim=1), h).solution.T
    torch.testing.assert_close(ridge_fit(moments_of(x, h), 0.0, bias=True), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_map_is_found_exactly(bias: bool) -> None:
    x, a = inputs(), draw(4, 9, seed=3)
    fitted = ridge_fit(moments_of(x, x @ a.T), 0.0, bias=bias)
    torch.testing.assert_close(fitted[:, :-1], a, rtol=1e-7, atol=1e-8)


def test_the_ridge_leads_from_the_fit_to_the_prior() -> None:
    x = inputs()
    h, prior = gated(x), draw(6, 9, seed=4)
    moments = moments_of(x, h)
    torch.testing.assert_close(ridge_fit(moments, 1e9, prior)[:, :-1], prior, rtol=1e-6, atol=1e-6)
    distances = [float((ridge_fit(moments, ridge, prior)[:, :-1] - prior).norm()) for ridge in (0, 1e-2, 1, 1e2)]
    assert distances == sorted(distances, reverse=True)


def test_fewer_tokens_than_inputs_give_a_finite_fit() -> None:
    x = inputs(tokens=4)
    assert torch.isfinite(ridge_fit(moments_of(x, gated(x)), 0.0)).all()


def test_errors_from_moments_are_those_of_the_outputs() -> None:
    x = inputs()
    h, b, down, up = gated(x), draw(7, 6, seed=5), draw(3, 10, seed=6), draw(7, 3, seed=7)
    moments = moments_of(x, h)
    ones = torch.ones(len(x), 1, dtype=x.dtype)
    answer = torch.cat([x, ones], dim=1) @ down.T @ up.T
    expected = (h @ b.T - answer).square().sum(dim=1).mean()
    assert squared_error(moments, down, up, b) == pytest.approx(float(expected), rel=1e-9)
    assert mean_square(moments, b) == pytest.approx(float((h @ b.T).square().sum(dim=1).mean()), rel=1e-9)


def test_no_lora_of_the_rank_is_nearer_than_the_truncated_one() -> None:
    x = inputs()
    down, up = torch.cat([draw(6, 9, seed=8), torch.zeros(6, 1).double()], dim=1), draw(7, 6, seed=9)
    moments = moments_of(x, x @ down[:, :-1].T)
    wide = torch.cat([x, torch.ones(len(x), 1).double()], dim=1)
    answers = wide @ down.T @ up.T
    # Reduced-rank regression: the best rank-k map projects the answers on their first k principal directions.
    singular = torch.linalg.svdvals(answers)
    for rank in (1, 2, 4):
        cut = truncate(down, up, moments.xx, rank)
        assert cut.down.shape == (rank, 10)
        assert cut.up.shape == (7, rank)
        error = (answers - wide @ cut.down.T @ cut.up.T).square().sum()
        torch.testing.assert_close(error, singular[rank:].square().sum(), rtol=1e-6, atol=1e-9)
        kept = 1 - float(error / answers.square().sum())
        assert float(cut.energy[rank - 1]) == pytest.approx(kept, rel=1e-6)


def test_truncating_for_the_inputs_beats_truncating_the_weights() -> None:
    x = inputs()
    down, up = draw(6, 9, seed=8), draw(7, 6, seed=9)
    moments = moments_of(x, x @ down.T)
    padded = torch.nn.functional.pad(down, (0, 1))
    cut = truncate(padded, up, moments.xx, 2)
    plain_down, plain_up = truncate_unweighted(down, up, 2)
    whitened = squared_error(moments, cut.down, cut.up, up)
    assert whitened < 0.9 * squared_error(moments, torch.nn.functional.pad(plain_down, (0, 1)), plain_up, up)


@pytest.mark.parametrize("rank", [1, 3, 6, 10])
def test_truncating_without_data_is_the_svd_of_the_product(rank: int) -> None:
    down, up = draw(6, 9, seed=8), draw(7, 6, seed=9)
    left, singular, right = torch.linalg.svd(up @ down, full_matrices=False)
    expected = left[:, :rank] * singular[:rank] @ right[:rank]
    cut_down, cut_up = truncate_unweighted(down, up, rank)
    torch.testing.assert_close(cut_up @ cut_down, expected, rtol=1e-8, atol=1e-9)
    assert len(cut_down) == min(rank, 6)


def test_an_adapter_that_does_nothing_is_truncated_to_nothing() -> None:
    x = inputs()
    moments = moments_of(x, torch.zeros(len(x), 6, dtype=x.dtype))
    cut = truncate(torch.zeros(6, 10, dtype=x.dtype), draw(7, 6), moments.xx, 2)
    assert torch.isfinite(cut.down).all()
    assert not (cut.up @ cut.down).any()
    assert mean_square(moments, draw(7, 6)) == 0


def test_an_input_that_is_always_zero_does_no_harm() -> None:
    x = inputs()
    x[:, 3] = 0
    moments = moments_of(x, gated(x))
    cut = truncate(ridge_fit(moments, 1e-4), draw(7, 6), moments.xx, 2)
    assert torch.isfinite(cut.down).all()
    assert torch.isfinite(cut.up).all()


def test_moments_of_two_parts_add_up_to_those_of_both() -> None:
    x = inputs()
    h = gated(x)
    both, sums = moments_of(x, h), moments_of(x[:70], h[:70]) + moments_of(x[70:], h[70:])
    for name in ("xx", "hx", "hh", "count"):
        torch.testing.assert_close(torch.as_tensor(getattr(sums, name)), torch.as_tensor(getattr(both, name)))
