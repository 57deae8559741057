"""R2 of 03_r2_analysis.py and the estimates of 05_eval.py."""

import itertools
import math

import numpy as np
import pytest
import torch


def test_r_squared_by_hand(r2):
    # Groups of two by reward: (0.5, 0), (2.5, 1), (4.5, 0.5). Slope .125, intercept .1875: fitted .25 .5 .75.
    # Residuals -.25 .5 -.25: sum of squares .375; about the mean .5: .25 + .25 + 0 = .5. R2 = 1 - .375/.5 = .25
    rm_scores = [3, 0, 5, 1, 4, 2]
    actual = [1, 0, 1, 0, 0, 1]
    assert r2.r_squared(rm_scores, actual, 3) == pytest.approx(0.25)


def test_r_squared_of_a_perfect_line_and_of_order_alone(r2):
    scores = np.linspace(-1, 1, 40)
    assert r2.r_squared(scores, (scores + 1) / 2, 8) == pytest.approx(1.0)
    assert r2.r_squared(scores, (scores + 1) / 2, 8) == pytest.approx(r2.r_squared(scores[::-1], (scores[::-1] + 1) / 2, 8))
    assert r2.r_squared(scores, scores**2, 8) == pytest.approx(0.0, abs=1e-6)


def test_r_squared_against_scipy(r2):
    from scipy import stats

    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    y = (x + rng.normal(size=200) > 0).astype(float)
    gx, gy = r2.group_means(x, y, 10)
    assert r2.r_squared(x, y, 10) == pytest.approx(stats.linregress(gx, gy).rvalue ** 2)


def test_r_squared_is_nan_where_there_is_no_line(r2):
    assert math.isnan(r2.r_squared([1, 1, 1, 1], [0, 1, 0, 1], 2))
    assert math.isnan(r2.r_squared([1, 2, 3, 4], [1, 1, 1, 1], 2))
    assert math.isnan(r2.r_squared([0.1] * 25, [0, 1, 0, 0, 1] * 5, 10))  # of which groups of two and of three have other means


def test_a_recommendation_where_some_r2_are_undefined(r2, capsys):
    rows = {name: {"r2": {"mean": mean, "std": 0.1}} for name, mean in
            {"none": 0.9, "random2": math.nan, "bon": 0.2, "br": math.nan, "bw": 0.95}.items()}
    choice, lines = r2.recommendation(rows, "out/sft")
    assert choice == "bw" and "R2 0.950; no filter has 0.900, two at random nan" in lines[0] and "no reason to filter" in lines[1]
    rows["bw"]["r2"]["std"] = 0.01
    assert len(r2.recommendation(rows, "out/sft")[1]) == 1
    rows["none"]["r2"]["mean"] = math.nan  # nothing to be above
    assert len(r2.recommendation(rows, "out/sft")[1]) == 2
    for name in ("bon", "bw"):
        rows[name]["r2"]["mean"] = math.nan
    with pytest.raises(SystemExit):
        r2.recommendation(rows, "out/sft")
    assert "every R2 is undefined" in capsys.readouterr().err


def test_within_prompts_sees_what_pooling_hides(r2):
    """Rewards that tell easy prompts from hard ones but nothing within a prompt: pooled R2 high, within prompts not."""
    torch.manual_seed(0)
    ease = torch.linspace(0, 1, 400)[:, None]
    actual = (torch.rand(400, 10) < ease).float()
    rm_scores = ease * 4 + 0.3 * torch.randn(400, 10)
    result = r2.analyse(rm_scores, actual, "none", torch.Generator().manual_seed(0), r2.Config())
    assert result["r2"] > 0.95 and result["r2_within"] < 0.6


def test_pair_accuracy_by_hand(r2):
    rm_scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 5.0]])
    actual = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])  # pairs: right, right; a tie, wrong. Not 3 against 5: other prompts
    assert r2.pair_accuracy(rm_scores, actual) == pytest.approx(2.5 / 4)
    assert math.isnan(r2.pair_accuracy(rm_scores, torch.ones(2, 3)))


def test_pow_draws_follow_the_weights(r2):
    scores = torch.tensor([[1.0, 0.0, -1.0, 0.1]]).repeat(3000, 1)  # weights of pow_1: 1, 0, 1, .1 of the stretched range
    rows, columns = r2.draw_responses(scores, "pow_1", torch.Generator().manual_seed(0), 0.5, -0.5)
    counts = columns.bincount(minlength=4)
    assert len(rows) == 6000 and counts[0] > 2700 and counts[2] > 2700 and counts[1] < 20 and 0 < counts[3] < 600


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_against_enumeration(evaluation, n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert evaluation.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_needs_k_samples(evaluation):
    with pytest.raises(ValueError, match="pass@3"):
        evaluation.pass_at_k(2, 1, 3)


def test_bootstrap_interval_covers_and_narrows(evaluation):
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = evaluation.bootstrap_interval(rng.random(100) < 0.3, rng, resamples=500)
        hits += low <= 0.3 <= high
    assert 178 <= hits  # 95% of 200, less 4 standard deviations
    assert evaluation.bootstrap_interval([1.0] * 20, rng) == (1.0, 1.0)
