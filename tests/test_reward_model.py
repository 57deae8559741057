"""Pairs, edit distance and the Bradley-Terry loss of 02_reward_model.py; loss and batches of 01_sft.py."""

import math
import random

import numpy as np
import pytest
import torch


def test_pairwise_loss_by_hand(rm):
    # Differences 1 and -2: -log sigmoid(1) = .31326, -log sigmoid(-2) = 2.12693
    loss = rm.pairwise_loss(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 2.0]))
    assert loss.item() == pytest.approx((0.31326 + 2.12693) / 2, abs=1e-4)
    assert rm.pairwise_loss(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(math.log(2))


def test_pairwise_loss_pushes_the_chosen_up(rm):
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    rm.pairwise_loss(chosen, rejected).backward()
    assert chosen.grad.item() == -0.5 and rejected.grad.item() == 0.5


def levenshtein(a, b):
    """The textbook recursion, as a table."""
    table = [[i + j for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
    return table[-1][-1]


def test_edit_distance(rm):
    assert rm.edit_distance("kitten", "sitting") == 3
    assert rm.edit_distance("", "") == 0 and rm.edit_distance("", "abc") == rm.edit_distance("abc", "") == 3
    rng = random.Random(0)
    for _ in range(200):
        a, b = ("".join(rng.choices("abc\né", k=rng.randrange(12))) for _ in range(2))
        assert rm.edit_distance(a, b) == levenshtein(a, b)


def test_pick_pair_takes_the_largest_edit_distance(rm):
    responses = ["return 1", "return 12345", "return 2", "pass"]
    # passing 0 and 1, failing 2 and 3: distances 0-2: 1, 0-3: 7 or so, 1-2: 5, 1-3 the largest
    assert rm.pick_pair(responses, [True, True, False, False]) == (1, 3)
    assert rm.pick_pair(responses, [False, False, True, True]) == (3, 1)
    assert rm.pick_pair(responses, [True] * 4) is None and rm.pick_pair(responses, [False] * 4) is None


def test_all_pairs_counts_a_text_once(rm):
    assert rm.all_pairs(["a", "b", "a", "c"], [True, False, True, False]) == [(0, 1), (0, 3)]


def test_parts_that_are_tested_while_the_next_is_sampled_change_nothing(rm):
    """As on a GPU: every response with its own verdict, in order of prompt, whatever the size of the parts."""
    from test_models import DEVICE, Tokens
    from conftest import tiny_config

    torch.manual_seed(0)
    policy = rm.AutoModelForCausalLM.from_config(tiny_config("llama")).eval()

    class Digits(Tokens):  # its text is a program that passes some tests
        def __call__(self, text, add_special_tokens):
            return type("Encoding", (), {"input_ids": []})

        def decode(self, ids, **options):
            return f"x = {sum(ids)}\n"

    rng = random.Random(0)
    problems = [{"task_id": str(p), "tests": [f"assert x % 3 == {p % 3}"], "setup": "", "prefix": "", "entry_point": "x"}
                for p in range(11)]
    prompts = [[rng.randrange(2, 50) for _ in range(rng.randrange(2, 9))] for _ in problems]
    cfg = rm.Config(workers=1)
    drawn = {}
    for size in (4, 8, len(problems)):  # batches of two prompts
        generator = torch.Generator(DEVICE).manual_seed(3)
        sample = lambda some: rm.generate(policy, Tokens, some, 3, 6, 1.0, generator, 6)  # noqa: B023, E731
        drawn[size] = [(*row, result._replace(seconds=0.0)) for *row, result in
                       rm.sample_and_test(problems, prompts, Digits(), size, sample, cfg)]
    assert drawn[4] == drawn[8] == drawn[len(problems)]
    assert [problem["task_id"] for problem, _, _, _ in drawn[4]] == [str(p) for p in range(11) for _ in range(3)]
    for problem, ids, text, result in drawn[4]:
        ids = ids[:-1] if ids[-1] == 1 else ids
        assert text == f"x = {sum(ids)}\n" and result.passed == (sum(ids) % 3 == int(problem["task_id"]) % 3)
    assert len({result.passed for _, _, _, result in drawn[4]}) == 2


def test_interval_over_prompts_is_wider_than_over_pairs(rm):
    """Ten pairs of a prompt that all agree are one observation, not ten."""
    rng = np.random.default_rng(0)
    values = np.repeat(rng.random(40) < 0.7, 10).astype(float)
    low, high = rm.clustered_interval(values, np.repeat(np.arange(40), 10), np.random.default_rng(1))
    low_pairs, high_pairs = rm.clustered_interval(values, np.arange(400), np.random.default_rng(1))
    assert low < values.mean() < high and high - low > 2 * (high_pairs - low_pairs)


def test_flaw_kinds(rm):
    right = "    a = 1\n    b = 2\n    return b"
    assert rm.flaw_kind(right, "    a = 1\n    b = 3\n    return b") == "one wrong line"
    assert rm.flaw_kind(right, "    a = 1\n    return b") == "missing lines"
    assert rm.flaw_kind(right, right + "\n    pass") == "extra lines"
    assert rm.flaw_kind(right, "    a = 2\n    b = 3\n    return b") == "several"


def test_sft_loss_is_on_response_tokens_and_eos_only(sft):
    torch.manual_seed(0)
    examples = [([5, 6, 7], [8, 9, 1]), ([5], [6, 1])]
    input_ids, labels = sft.collate(examples, pad_id=0)
    assert input_ids.tolist() == [[5, 6, 7, 8, 9, 1], [5, 6, 1, 0, 0, 0]]
    assert labels.tolist() == [[-100, -100, -100, 8, 9, 1], [-100, 6, 1, -100, -100, -100]]
    logits = torch.randn(2, 6, 20)
    # Position t predicts token t + 1: 8, 9, 1 from positions 2, 3, 4 and 6, 1 from positions 0, 1.
    places = [(0, 2, 8), (0, 3, 9), (0, 4, 1), (1, 0, 6), (1, 1, 1)]
    expected = -sum(torch.log_softmax(logits[row, t], -1)[token] for row, t, token in places)
    assert sft.response_loss(logits, labels).item() == pytest.approx(expected.item(), abs=1e-4)


def test_batches_hold_every_example_once_and_group_lengths(sft):
    rng = random.Random(0)
    lengths = [rng.randrange(10, 100) for _ in range(500)]
    batches = sft.length_grouped_batches(lengths, 32, rng)
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) / len(batches)
    assert spread < 10  # random batches of 32 would spread over about 84


def test_scratch_tokenizer_gives_text_back_exactly(sft):
    texts = ["def f(xs):\n    return [x for x in xs if x % 2 == 0]\n", '"""Keep the even ones, then 3."""\n']
    tokenizer = sft.build_tokenizer(texts * 20, 300)
    for text in texts + ["never seen: \t Zürich \u2603 \U0001f600\n\n"]:
        ids = sft.encode_response(tokenizer, text)
        assert ids[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id
        assert tokenizer.decode(ids[:-1]) == text
