"""The filter: which responses of a prompt are kept, and how they are weighted."""

import pytest
import torch

STRATEGIES = [
    "none",
    "single",
    "bon",
    "br",
    "bw",
    "random2",
    "top",
    "top_random",
    "top_bottom",
    "pow_1",
    "pow_2",
    "pow_3",
]
SCORES = torch.tensor([0.1, 2.0, -1.0, 2.0, 0.4])  # five responses; the best two are tied


def kept(ppo, scores, strategy, seed=0):
    rows, columns = ppo.select_responses(scores, strategy, torch.Generator().manual_seed(seed))
    return [sorted(columns[rows == p].tolist()) for p in range(len(scores))]


@pytest.mark.parametrize(
    "strategy, expected",
    [
        ("none", [0.2] * 5),
        ("bon", [0, 1, 0, 0, 0]),  # of two tied best the first
        ("br", [1 / 8, 1 / 2, 1 / 8, 1 / 8, 1 / 8]),  # 1/2, and 1/(2(N-1)) for each other
        ("bw", [0, 1 / 2, 1 / 2, 0, 0]),
        ("top", [0, 1 / 2, 0, 1 / 2, 0]),  # above 0.5
        (
            "top_random",
            [1 / 7, 2 / 7, 1 / 7, 2 / 7, 1 / 7],
        ),  # 1 above, 1/2 for each other: 2 + 1.5 = 3.5
        ("top_bottom", [0, 1 / 3, 1 / 3, 1 / 3, 0]),  # above 0.5 or below -0.5
    ],
)
def test_weights_by_hand(ppo, strategy, expected):
    weights = ppo.filter_weights(SCORES, strategy)
    assert torch.allclose(weights, torch.tensor(expected, dtype=torch.float32), atol=1e-6)


def test_pow_weights_by_hand(ppo):
    # -1 .. 2 stretched to [-1, 1]: 2 (r + 1) / 3 - 1 = -.26667, 1, -1, 1, -.06667
    stretched = torch.tensor([0.8 / 3, 1, 1, 1, 0.2 / 3])
    for k in (1, 2, 3):
        expected = stretched**k / (stretched**k).sum()
        assert torch.allclose(ppo.filter_weights(SCORES, f"pow_{k}"), expected, atol=1e-5)


def test_pow_weights_do_not_depend_on_where_zero_is(ppo):
    # Rewards that were never centred would weigh a good prompt's responses nearly alike.
    assert torch.allclose(
        ppo.filter_weights(SCORES, "pow_2"), ppo.filter_weights(SCORES + 100, "pow_2"), atol=1e-4
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_sum_to_one_and_are_finite(ppo, strategy):
    for scores in (
        SCORES,
        torch.zeros(5),
        torch.full((4,), -9.0),
        torch.randn(3, 6),
        torch.tensor([1.0]),
    ):
        weights = ppo.filter_weights(scores, strategy)
        assert weights.shape == scores.shape and (weights >= 0).all()
        assert torch.allclose(weights.sum(-1), torch.ones(scores.shape[:-1]))


def test_unknown_strategy(ppo):
    with pytest.raises(ValueError, match="best"):
        ppo.filter_weights(SCORES, "best")


def test_kept_by_hand(ppo):
    scores = torch.stack([SCORES, torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])])
    assert kept(ppo, scores, "bon") == [[1], [0]]
    assert kept(ppo, scores, "bw") == [[1, 2], [0, 4]]
    assert kept(ppo, scores, "none") == [[0, 1, 2, 3, 4]] * 2
    assert kept(ppo, scores, "top") == [[1, 3], [0, 1, 2, 3, 4]]
    assert kept(ppo, scores, "top_bottom") == [[1, 2, 3], [0, 1, 2, 3, 4]]
    assert kept(ppo, scores, "pow_2") == [[0, 1, 2, 3, 4]] * 2


def test_filter_works_within_each_prompt_not_over_the_batch(ppo):
    # Prompt 0 has only high rewards, prompt 1 only low ones. A max/min filter over the batch would
    # keep two rows in all.
    scores = torch.stack([torch.arange(5.0) + 100, torch.arange(5.0) - 100])
    for strategy, size in (("bon", 1), ("br", 2), ("bw", 2), ("random2", 2), ("none", 5)):
        rows, _ = ppo.select_responses(scores, strategy, torch.Generator().manual_seed(0))
        assert rows.bincount(minlength=2).tolist() == [size, size], strategy


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_row_is_kept_twice_and_every_prompt_keeps_one(ppo, strategy):
    torch.manual_seed(0)
    for scores in (torch.randn(20, 5), torch.zeros(20, 5), torch.randn(20, 2)):
        rows, columns = ppo.select_responses(scores, strategy, torch.Generator().manual_seed(1))
        assert len(set(zip(rows.tolist(), columns.tolist()))) == len(rows)
        assert set(rows.tolist()) == set(range(20))


def test_br_keeps_the_best_and_each_other_one_equally_often(ppo):
    scores = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0]]).repeat(4000, 1)
    rows, columns = ppo.select_responses(scores, "br", torch.Generator().manual_seed(0))
    counts = columns.bincount(minlength=5)
    assert counts[1] == 4000 and counts.sum() == 8000
    assert all(
        abs(int(c) - 1000) < 130 for i, c in enumerate(counts) if i != 1
    )  # 1000 +- 4.7 standard deviations


def test_random2_keeps_each_response_equally_often(ppo):
    _, columns = ppo.select_responses(
        torch.randn(5000, 5), "random2", torch.Generator().manual_seed(0)
    )
    assert all(
        abs(int(c) - 2000) < 165 for c in columns.bincount(minlength=5)
    )  # 2000 +- 4.7 standard deviations


def test_top_random_keeps_the_others_half_of_the_time(ppo):
    scores = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]]).repeat(4000, 1)
    _, columns = ppo.select_responses(scores, "top_random", torch.Generator().manual_seed(0))
    counts = columns.bincount(minlength=5)
    assert counts[0] == 4000 and all(abs(int(c) - 2000) < 150 for c in counts[1:])


@pytest.mark.parametrize("strategy", ["none", "bon", "bw", "top", "top_bottom"])
def test_shuffling_responses_does_not_change_which_are_kept(ppo, strategy):
    torch.manual_seed(2)
    scores = torch.randn(30, 5)
    order = torch.rand(30, 5).argsort(1)
    plain = [set(scores[p, c].tolist()) for p, c in enumerate(kept(ppo, scores, strategy))]
    shuffled_scores = scores.gather(1, order)
    shuffled = [
        set(shuffled_scores[p, c].tolist())
        for p, c in enumerate(kept(ppo, shuffled_scores, strategy))
    ]
    assert plain == shuffled


def test_draws_repeat_with_the_seed(ppo):
    scores = torch.randn(50, 5)
    assert kept(ppo, scores, "br", 4) == kept(ppo, scores, "br", 4) != kept(ppo, scores, "br", 5)
