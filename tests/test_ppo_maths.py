"""Losses, rewards and advantages of 04_pf_ppo.py: by hand, by property, against a plain loop."""

import math

import pytest
import torch


def close(a, b, tolerance=1e-5):
    return torch.allclose(
        torch.as_tensor(a, dtype=torch.float32),
        torch.as_tensor(b, dtype=torch.float32),
        atol=tolerance,
    )


def test_masked_mean_ignores_padding(ppo):
    x, mask = (
        torch.tensor([[1.0, 2.0, 99.0], [3.0, 99.0, 99.0]]),
        torch.tensor([[1, 1, 0], [1, 0, 0]]),
    )
    assert (
        ppo.masked_mean(x, mask).item() == 2.0
    )  # (1 + 2 + 3) / 3: one count over the batch, not a mean of row means
    assert ppo.masked_mean(x, mask * 0).item() == 0.0


def test_whiten_by_hand(ppo):
    x, mask = (
        torch.tensor([[1.0, 3.0, 50.0], [5.0, 7.0, 50.0]]),
        torch.tensor([[1, 1, 0], [1, 1, 0]]),
    )
    # mean 4, deviations -3 -1 1 3, variance (9 + 1 + 1 + 9) / 4 = 5
    expected = torch.tensor([[-3.0, -1.0, 0.0], [1.0, 3.0, 0.0]]) / math.sqrt(5)
    assert close(ppo.whiten(x, mask), expected)
    assert close(ppo.whiten(x, mask, shift_mean=False), (expected + 4) * mask)


def test_whiten_leaves_its_argument_alone(ppo):
    x = torch.tensor([[1.0, 2.0]])
    ppo.whiten(x, torch.ones(1, 2))
    assert x.tolist() == [[1.0, 2.0]]


def test_token_rewards_by_hand(ppo):
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -1.0, 0.0]])
    ref_logprobs = torch.tensor([[-1.5, -2.0, -2.0], [-1.0, -3.0, -9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    rewards = ppo.token_rewards(
        torch.tensor([10.0, 20.0]), logprobs, ref_logprobs, mask, kl_coef=0.1
    )
    # log-ratios .5 0 -1 and .5 2 (padding): times -0.1, plus the score on the last token. A swapped
    # sign would give +.05.
    assert close(rewards, [[-0.05, 0.0, 10.1], [-0.05, 19.8, 0.0]])


def test_score_of_a_truncated_response_stands_on_its_own_last_token(ppo):
    # All four tokens are response and none is EOS: the score is on the fourth, nothing is appended.
    rewards = ppo.token_rewards(
        torch.tensor([3.0]), torch.zeros(1, 4), torch.zeros(1, 4), torch.ones(1, 4), 1.0
    )
    assert rewards.tolist() == [[0.0, 0.0, 0.0, 3.0]]


def test_gae_by_hand(ppo):
    rewards = torch.tensor([[1.0, 0.0, 2.0], [1.0, -1.0, 0.0]])
    values = torch.tensor([[0.5, 0.5, 0.5], [0.2, 0.4, 9.0]])  # the 9 is on padding
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    advantages, returns = ppo.gae(rewards, values, mask, gamma=0.9, lam=0.5)
    # Row 1, backwards: delta_2 = 2 - .5 = 1.5; delta_1 = .9*.5 - .5 = -.05, A_1 = -.05 + .45*1.5 =
    # .625;
    #                   delta_0 = 1 + .45 - .5 = .95, A_0 = .95 + .45*.625 = 1.23125
    # Row 2: delta_1 = -1 - .4 = -1.4; delta_0 = 1 + .9*.4 - .2 = 1.16, A_0 = 1.16 - .45*1.4 = .53
    expected = torch.tensor([[1.23125, 0.625, 1.5], [0.53, -1.4, 0.0]])
    assert close(advantages, expected)
    assert close(returns, (expected + values) * mask)


def test_gae_with_lambda_one_is_reward_to_go_minus_value(ppo):
    torch.manual_seed(0)
    rewards, values = torch.randn(4, 7), torch.randn(4, 7)
    mask = (torch.arange(7)[None] < torch.tensor([7, 5, 1, 3])[:, None]).long()
    rewards = rewards * mask
    advantages, _ = ppo.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    assert close(advantages, (to_go - values) * mask)


def test_gae_against_a_plain_loop_and_extra_padding(ppo):
    torch.manual_seed(1)
    lengths = [6, 2, 4]
    rewards, values = torch.randn(3, 6), torch.randn(3, 6)
    mask = (torch.arange(6)[None] < torch.tensor(lengths)[:, None]).long()
    advantages, returns = ppo.gae(rewards, values, mask, 0.97, 0.9)
    for row, length in enumerate(lengths):
        for t in range(length):
            deltas = [
                rewards[row, k]
                + (0.97 * values[row, k + 1] if k + 1 < length else 0)
                - values[row, k]
                for k in range(t, length)
            ]
            assert close(
                advantages[row, t], sum((0.97 * 0.9) ** i * d for i, d in enumerate(deltas))
            )

    def pad(x):
        return torch.cat([x, torch.full((3, 2), 7.0)], 1)

    padded, _ = ppo.gae(
        pad(rewards), pad(values), torch.cat([mask, torch.zeros(3, 2)], 1), 0.97, 0.9
    )
    assert close(padded[:, :6], advantages) and not padded[:, 6:].any()


def test_policy_loss_by_hand(ppo):
    ratios = torch.tensor([[1.0, 1.5, 0.5], [1.5, 0.5, 1.0]])
    old = torch.full((2, 3), -1.0)
    advantages = torch.tensor([[2.0, 1.0, 1.0], [-1.0, -1.0, 5.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    loss, statistics = ppo.policy_loss(old + ratios.log(), old, advantages, mask, clip=0.2)
    # max(-A r, -A clip(r)): -2; max(-1.5, -1.2) = -1.2; max(-.5, -.8) = -.5; max(1.5, 1.2) = 1.5;
    # max(.5, .8) = .8
    assert close(loss, (-2 - 1.2 - 0.5 + 1.5 + 0.8) / 5)
    assert statistics["clip_fraction"] == pytest.approx(4 / 5)
    assert statistics["ratio"] == pytest.approx((1 + 1.5 + 0.5 + 1.5 + 0.5) / 5)


def test_policy_gradient_at_ratio_one_is_minus_the_advantage(ppo):
    logprobs = torch.tensor([[-1.0, -2.0, -0.5]], requires_grad=True)
    advantages, mask = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[1, 1, 0]])
    loss, statistics = ppo.policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2)
    loss.backward()
    assert close(logprobs.grad, [[-0.5, 1.0, 0.0]])  # -A / 2 tokens, and nothing from padding
    assert statistics == {"ratio": pytest.approx(1.0), "clip_fraction": 0.0}


def test_value_loss_by_hand(ppo):
    values, old = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    returns, mask = torch.tensor([[2.0, 3.0, 50.0]]), torch.tensor([[1, 1, 0]])
    loss, statistics = ppo.value_loss(values, old, returns, mask, clip=0.2)
    # token 0: (1 - 2)^2 = 1; token 1: (2 - 3)^2 = 1, held at 1.2: 1.8^2 = 3.24 is larger. Half of
    # (1 + 3.24) / 2.
    assert close(loss, 0.5 * (1 + 3.24) / 2)
    assert statistics["clip_fraction"] == 0.5


def test_explained_variance(ppo):
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 77.0]]), torch.tensor([[1, 1, 1, 0]])
    assert ppo.explained_variance(returns, returns, mask).item() == 1.0
    assert ppo.explained_variance(torch.full((1, 4), 5.0), returns, mask).item() == pytest.approx(
        0.0
    )


def test_group_advantages_by_hand(ppo):
    scores = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    # rloo, row 1: 1 - (2 + 6)/2 = -3; 2 - 3.5 = -1.5; 6 - 1.5 = 4.5
    assert close(ppo.group_advantages(scores, "rloo"), [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]])
    # grpo, row 1: centred -2 -1 3, standard deviation sqrt((4 + 1 + 9) / 2) = sqrt(7)
    expected = torch.tensor([[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]]) / math.sqrt(7)
    assert close(ppo.group_advantages(scores, "grpo"), expected)
    with pytest.raises(ValueError):
        ppo.group_advantages(scores, "gae")


def test_adaptive_kl_moves_towards_its_target(ppo):
    # KL twice the target: the error 1 is held at 0.2, so 100 responses of a horizon of 1000 raise
    # it by 2%.
    assert ppo.adapt_kl_coef(0.5, kl=2.0, target=1.0, responses=100, horizon=1000) == pytest.approx(
        0.51
    )
    assert ppo.adapt_kl_coef(0.5, kl=0.9, target=1.0, responses=100, horizon=1000) == pytest.approx(
        0.495
    )


def test_whitening_before_the_filter_leaves_bon_all_positive(ppo):
    # Two prompts of three responses, one token each, rewards as advantages: the trap of the other
    # order, and ours.
    scores = torch.tensor([[3.0, 0.0, -1.0], [2.0, -1.0, -3.0]])
    rows, columns = ppo.select_responses(scores, "bon", torch.Generator())
    kept = rows * 3 + columns
    advantages, mask = scores.view(-1, 1), torch.ones(6, 1)
    assert (ppo.whiten(advantages, mask)[kept] > 0).all()
    ours = ppo.whiten(advantages[kept], mask[kept])
    assert (ours > 0).any() and (ours < 0).any()


def test_prompts_are_the_same_for_every_strategy_and_cover_the_set(ppo):
    seen = [
        i for iteration in range(1, 6) for i in ppo.prompts_of_iteration(10, 4, iteration, seed=3)
    ]
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:]) == list(range(10))
    # PPO-S takes 5n prompts an iteration, from the same endless sequence.
    assert ppo.prompts_of_iteration(10, 20, 1, seed=3) == seen
