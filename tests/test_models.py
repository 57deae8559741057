"""Logprobs, values, scores, generation and training steps on small random models of three architectures."""

import random

import pytest
import torch

DEVICE = torch.device("cpu")


class Tokens:
    """Just the ids that `generate` asks a tokenizer for."""

    pad_token_id, eos_token_id = 0, 1


def rows(count=5, seed=0):
    """Prompts and responses of different lengths; every response ends in EOS."""
    rng = random.Random(seed)
    draw = lambda n: [rng.randrange(2, 50) for _ in range(n)]  # noqa: E731
    return [draw(rng.randrange(2, 9)) for _ in range(count)], [draw(rng.randrange(1, 7)) + [1] for _ in range(count)]


def logprobs_of(ppo, model, batch, temperature=1.0):
    return ppo.response_logprobs(model, *ppo.model_inputs(batch), batch["response_ids"].shape[1], temperature)


def test_a_row_alone_has_the_same_logprobs_as_in_a_padded_batch(ppo, model_folder):
    policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE)
    prompts, responses = rows()
    batch = ppo.make_batch(prompts, responses, pad_id=0)
    together = logprobs_of(ppo, policy, batch, 0.7)
    for i in range(len(prompts)):
        alone = logprobs_of(ppo, policy, ppo.make_batch(prompts[i:i + 1], responses[i:i + 1], 0), 0.7)[0]
        assert torch.allclose(together[i, :len(responses[i])], alone, atol=1e-4)


def test_logprobs_against_a_plain_computation(ppo, model_folder):
    policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE)
    prompt, response = [5, 6, 7], [8, 9, 1]
    logits = policy(torch.tensor([prompt + response])).logits[0] / 0.5  # the temperature divides the logits
    expected = [torch.log_softmax(logits[len(prompt) - 1 + t], -1)[token] for t, token in enumerate(response)]
    ours = logprobs_of(ppo, policy, ppo.make_batch([prompt], [response], 0), 0.5)[0]
    assert torch.allclose(ours, torch.stack(expected), atol=1e-4)


def test_a_row_alone_has_the_same_values_and_scores_as_in_a_padded_batch(ppo, model_folder):
    reward_model = ppo.load_model(ppo.AutoModelForSequenceClassification, model_folder, DEVICE, num_labels=1)
    reward_model.config.reward_mean, reward_model.config.reward_std = 2.0, 0.5
    reward_model.save_pretrained(model_folder.parent / "rm")
    cfg = ppo.Config(reward_model=str(model_folder.parent / "rm"))
    critic = ppo.load_critic(cfg, reward_model, DEVICE)
    prompts, responses = rows()
    sequences = [p + r for p, r in zip(prompts, responses)]
    scores = ppo.score_responses(reward_model, sequences, 0, batch_size=3)
    batch = ppo.make_batch(prompts, responses, 0)
    values = ppo.response_values(critic, *ppo.model_inputs(batch), batch["response_ids"].shape[1])
    for i, sequence in enumerate(sequences):
        assert torch.allclose(scores[i], reward_model(torch.tensor([sequence])).logits[0, 0], atol=1e-4)
        alone = ppo.make_batch(prompts[i:i + 1], responses[i:i + 1], 0)
        alone = ppo.response_values(critic, *ppo.model_inputs(alone), len(responses[i]))[0]
        assert torch.allclose(values[i, :len(responses[i])], alone, atol=1e-4)
        # The critic starts as the RM: its value after the last token would be the normalised reward; the value before the
        # last token is the normalised reward of the sequence without it.
        before = reward_model(torch.tensor([sequence[:-1]])).logits[0, 0]
        assert torch.allclose(values[i, len(responses[i]) - 1], (before - 2.0) / 0.5, atol=1e-3)


def test_extra_padding_changes_nothing(ppo, model_folder):
    policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE)
    prompts, responses = rows()
    batch = ppo.make_batch(prompts, responses, 0)
    wide = {"prompt_ids": torch.nn.functional.pad(batch["prompt_ids"], (3, 0)),
            "prompt_mask": torch.nn.functional.pad(batch["prompt_mask"], (3, 0)),
            "response_ids": torch.nn.functional.pad(batch["response_ids"], (0, 2)),
            "response_mask": torch.nn.functional.pad(batch["response_mask"], (0, 2))}
    mask = batch["response_mask"]
    narrow = logprobs_of(ppo, policy, batch) * mask
    assert torch.allclose(narrow, (logprobs_of(ppo, policy, wide) * wide["response_mask"])[:, :mask.shape[1]], atol=1e-4)
    # take_rows cuts such columns off again
    trimmed = ppo.take_rows(wide, torch.arange(len(prompts)), DEVICE)
    assert all(torch.equal(trimmed[name], batch[name]) for name in batch)


def test_greedy_generation_is_that_of_transformers(ppo, model_folder):
    policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE).eval()
    prompts, _ = rows(7)
    ours = ppo.generate(policy, Tokens, prompts, 1, 12, 0.0, None, batch_size=4)
    for prompt, group in zip(prompts, ours):
        theirs = policy.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                 max_new_tokens=12, do_sample=False, eos_token_id=1, pad_token_id=0)[0, len(prompt):].tolist()
        assert group == [ppo.cut_at_eos(theirs, 1)]


def test_sampled_logprobs_agree_with_the_training_forward_pass(ppo, model_folder):
    """The sampler draws from softmax(logits / temperature): frequencies of the first token against response_logprobs."""
    policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE).eval()
    prompts = [[4, 5, 6], [7, 8, 9, 10, 11]]
    count = 6000
    groups = ppo.generate(policy, Tokens, prompts, count, 1, 2.0, torch.Generator().manual_seed(0), batch_size=2 * count)
    for prompt, group in zip(prompts, groups):
        batch = ppo.make_batch([prompt] * 50, [[token] for token in range(50)], 0)
        chances = logprobs_of(ppo, policy, batch, 2.0)[:, 0].exp()
        frequencies = torch.tensor([r[0] for r in group]).bincount(minlength=50) / count
        deviations = (frequencies - chances).abs() / (chances * (1 - chances) / count).sqrt().clamp(min=1e-3)
        assert deviations.max() < 5


def test_generation_ends_at_eos_and_never_makes_one_up(ppo, model_folder):
    policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE).eval()
    prompts, _ = rows(6)
    groups = ppo.generate(policy, Tokens, prompts, 20, 15, 1.5, torch.Generator().manual_seed(0), batch_size=60)
    responses = [r for group in groups for r in group]
    ended = [r for r in responses if r[-1] == 1]
    cut = [r for r in responses if r[-1] != 1]
    assert ended and cut  # both kinds occur, or this test shows nothing
    assert all(1 not in r[:-1] for r in ended) and all(len(r) == 15 and 1 not in r for r in cut)


def test_generation_repeats_with_the_seed_and_sharing_a_batch_changes_no_greedy_row(ppo, model_folder):
    policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE).eval()
    prompts, _ = rows(6)
    draw = lambda seed: ppo.generate(policy, Tokens, prompts, 3, 8, 1.0, torch.Generator().manual_seed(seed), 64)  # noqa: E731
    assert draw(1) == draw(1) != draw(2)
    greedy = lambda size: ppo.generate(policy, Tokens, prompts, 1, 8, 0.0, None, size)  # noqa: E731
    assert greedy(1) == greedy(6)


def shapes_of(model):
    """A list that fills with (rows, columns) of the token ids of every forward pass."""
    shapes = []
    model.register_forward_pre_hook(lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    return shapes


def test_a_prompt_is_computed_once_beside_others_of_its_length_and_finished_rows_leave(ppo, model_folder):
    """What makes `generate` fast, counted in tokens that pass through the model."""
    policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE).eval()
    shapes = shapes_of(policy)
    policy.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits + likely_eos)
    likely_eos = 4 * torch.nn.functional.one_hot(torch.tensor(Tokens.eos_token_id), 50)
    prompts = [[5] * length for length in (3, 20, 4, 21, 5, 19)]  # in this order a batch of two would be as long as the longer
    groups = ppo.generate(policy, Tokens, prompts, 10, 15, 1.5, torch.Generator().manual_seed(0), batch_size=20)
    assert [shape for shape in shapes if shape[1] > 1] == [(2, 4), (2, 19), (2, 21)]  # two prompts for twenty responses
    decoded, needed = sum(rows for rows, columns in shapes if columns == 1), sum(len(ids) - 1 for group in groups for ids in group)
    assert needed <= decoded <= needed / 0.8 + 3  # up to a fifth of the rows of a batch may have finished


def test_a_batch_smaller_than_the_responses_of_a_prompt_is_heeded(ppo, model_folder):
    policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE).eval()
    shapes, (prompts, _) = shapes_of(policy), rows(3)
    uniform = torch.rand(3, 7, 8, generator=torch.Generator().manual_seed(0))  # a random number for each token
    together = ppo.generate(policy, Tokens, prompts, 7, 8, 1.0, uniform, batch_size=64)
    assert max(shapes)[0] == 21
    shapes.clear()
    assert ppo.generate(policy, Tokens, prompts, 7, 8, 1.0, uniform, batch_size=3) == together
    assert max(shapes)[0] == 3
    sampled = ppo.generate(policy, Tokens, prompts, 7, 8, 1.0, torch.Generator().manual_seed(0), batch_size=3)
    assert [len(group) for group in sampled] == [7, 7, 7] and len(set(map(str, sampled[0]))) > 1


def test_rows_of_a_length_pass_together(ppo, model_folder):
    """Micro-batches of short rows are short: padding is what length grouping saves."""
    policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE)
    lengths = [2, 30, 3, 29, 2, 30, 3, 29]
    batch = ppo.make_batch([[5]] * 8, [[6] * length for length in lengths], 0)
    batch["old_logprobs"], shapes = torch.zeros(8, 30), shapes_of(policy)
    logprobs = lambda mb: logprobs_of(ppo, policy, mb)  # noqa: E731
    ppo.forward_rows(logprobs, batch, torch.arange(8), 2, DEVICE)
    assert sorted(shapes) == [(2, 3), (2, 4), (2, 30), (2, 31)]
    shapes.clear()
    cfg = ppo.Config(minibatch_size=8, micro_batch_size=2)
    loss = lambda mb: (logprobs(mb).mean(), {})  # noqa: E731
    ppo.train_epoch(policy, torch.optim.SGD(policy.parameters()), loss, batch, torch.arange(8), cfg, torch.Generator(), DEVICE)
    assert sorted(shapes) == [(2, 3), (2, 4), (2, 30), (2, 31)]


def training_batch(ppo, policy):
    prompts, responses = rows(8, seed=3)
    batch = ppo.make_batch(prompts, responses, 0)
    torch.manual_seed(4)
    with torch.no_grad():
        batch["old_logprobs"] = logprobs_of(ppo, policy, batch)
    batch["advantages"] = torch.randn(batch["response_mask"].shape) * batch["response_mask"]
    return batch


@pytest.mark.parametrize("size", [8, 4, 3])
def test_micro_batches_give_the_same_step(ppo, model_folder, size):
    """1 x 8, 2 x 4 and 3 + 3 + 2 responses of unequal length: one token count for the whole step."""
    results = []
    for micro_batch_size in (8, size):
        policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE)
        batch = training_batch(ppo, policy)
        cfg = ppo.Config(minibatch_size=8, micro_batch_size=micro_batch_size, max_grad_norm=1e9)

        def loss_of(mb):
            return ppo.policy_loss(logprobs_of(ppo, policy, mb), mb["old_logprobs"], mb["advantages"], mb["response_mask"], 0.2)

        optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
        statistics = ppo.train_epoch(policy, optimizer, loss_of, batch, torch.arange(8), cfg,
                                     torch.Generator().manual_seed(0), DEVICE)
        results.append((statistics, [p.detach().clone() for p in policy.parameters()]))
    (one, weights), (other, other_weights) = results
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-5) and one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert one["ratio"] == pytest.approx(1.0, abs=1e-4) and one["clip_fraction"] == 0.0  # before the first update
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights, other_weights))


def test_the_loss_divides_by_tokens_not_by_rows(ppo, model_folder):
    """A long and a short response: the mean over tokens differs from the mean of row means, and must be the former."""
    policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE)
    batch = ppo.make_batch([[5], [6]], [[7, 8, 9, 10, 11, 1], [1]], 0)
    batch["old_logprobs"] = logprobs_of(ppo, policy, batch).detach()
    batch["advantages"] = torch.tensor([[1.0] * 6, [8.0] + [0.0] * 5])
    cfg = ppo.Config(minibatch_size=2, micro_batch_size=1)

    def loss_of(mb):
        return ppo.policy_loss(logprobs_of(ppo, policy, mb), mb["old_logprobs"], mb["advantages"], mb["response_mask"], 0.2)

    statistics = ppo.train_epoch(policy, torch.optim.SGD(policy.parameters(), lr=0.0), loss_of, batch, torch.arange(2), cfg,
                                 torch.Generator().manual_seed(0), DEVICE)
    assert statistics["loss"] == pytest.approx(-(6 * 1 + 8) / 7, abs=1e-5)


def test_a_step_raises_what_has_positive_advantage(ppo, model_folder):
    """Overfit one prompt on purpose: its good response becomes likely, its bad one unlikely; and the other way round."""
    for sign in (1.0, -1.0):
        policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE)
        batch = ppo.make_batch([[5, 6], [5, 6]], [[7, 8, 1], [9, 10, 1]], 0)
        before = logprobs_of(ppo, policy, batch).sum(1).detach()
        batch["advantages"] = sign * torch.tensor([[1.0] * 3, [-1.0] * 3])
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
        cfg = ppo.Config(minibatch_size=2, micro_batch_size=2)

        def loss_of(mb):
            return ppo.policy_loss(logprobs_of(ppo, policy, mb), mb["old_logprobs"], mb["advantages"], mb["response_mask"], 0.2)

        for step in range(5):
            batch["old_logprobs"] = logprobs_of(ppo, policy, batch).detach()
            ppo.train_epoch(policy, optimizer, loss_of, batch, torch.arange(2), cfg, torch.Generator().manual_seed(step), DEVICE)
        after = logprobs_of(ppo, policy, batch).sum(1).detach()
        assert sign * (after[0] - before[0]) > 0.1 and sign * (after[1] - before[1]) < -0.1


def test_fields_of_a_row_travel_together(ppo):
    """Every field is marked with its row's number; whatever rows are taken, in whatever order, the marks stay together."""
    prompts = [[i + 2] * (i % 4 + 1) for i in range(12)]
    responses = [[i + 2] * (i % 5 + 1) for i in range(12)]
    batch = ppo.make_batch(prompts, responses, 0)
    marks = torch.arange(12.0)[:, None] * batch["response_mask"]
    batch.update(advantages=marks, returns=marks + 0.5 * batch["response_mask"])
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0], [7.0, 9.0, 8.0], [1.0, 0.0, 2.0]])
    kept_rows, columns = ppo.select_responses(scores, "bw", torch.Generator())
    kept = kept_rows * 3 + columns
    assert kept.tolist() == [0, 1, 3, 4, 6, 7, 10, 11]
    mb = ppo.take_rows(batch, kept[torch.tensor([5, 0, 7, 2])], DEVICE)
    for row, number in enumerate([7, 0, 11, 3]):
        length, width = number % 5 + 1, number % 4 + 1
        assert mb["response_mask"][row].tolist() == [1] * length + [0] * (mb["response_mask"].shape[1] - length)
        assert mb["prompt_ids"][row].tolist() == [0] * (mb["prompt_ids"].shape[1] - width) + [number + 2] * width
        assert mb["response_ids"][row, :length].tolist() == [number + 2] * length
        assert mb["advantages"][row, :length].tolist() == [number] * length
        assert mb["returns"][row, :length].tolist() == [number + 0.5] * length


def test_forward_rows_puts_results_where_they_belong(ppo):
    prompts, responses = rows(9)
    batch = ppo.make_batch(prompts, responses, 0)
    some = torch.tensor([7, 2, 4])
    result = ppo.forward_rows(lambda mb: mb["response_ids"].float(), batch, some, 2, DEVICE)
    assert torch.equal(result[some], batch["response_ids"][some].float() * batch["response_mask"][some])
    others = [i for i in range(9) if i not in some.tolist()]
    assert not result[others].any()


def test_a_policy_equal_to_its_reference_has_no_kl(ppo, model_folder):
    policy, reference = (ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE) for _ in range(2))
    batch = ppo.make_batch(*rows(), 0)
    assert torch.equal(logprobs_of(ppo, policy.train(), batch), logprobs_of(ppo, reference.eval(), batch))  # no dropout left


def test_master_weights_are_float32_so_that_a_step_at_the_papers_lr_is_saved(ppo, model_folder, tmp_path):
    """At lr 5e-7 an AdamW step moves each weight by about 5e-7: float32 keeps it, bf16 rounds nearly all of it away."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE)
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
        policy = policy.to(dtype)
        before = [p.detach().clone() for p in policy.parameters() if p.dim() == 2]
        policy(torch.tensor([[5, 6, 7]])).logits.sum().backward()
        torch.optim.AdamW(policy.parameters(), lr=5e-7, weight_decay=0.0).step()
        policy.save_pretrained(tmp_path / str(dtype))
        saved = ppo.AutoModelForCausalLM.from_pretrained(tmp_path / str(dtype), dtype=dtype)
        after = [p for p in saved.parameters() if p.dim() == 2]
        moved[dtype] = sum((a != b).sum().item() for a, b in zip(before, after)) / sum(a.numel() for a in after)
    assert moved[torch.float32] > 0.5 > 0.05 > moved[torch.bfloat16]


@pytest.mark.parametrize("kind, options", [
    ("qwen3", {"head_dim": 16}), ("gemma2", {"head_dim": 16, "sliding_window": 6}), ("mistral", {"sliding_window": 6}), ("phi3", {}),
    ("starcoder2", {}), ("gpt_neox", {}), ("stablelm", {}), ("bloom", {}), ("gpt_neo", {"attention_types": [[["global", "local"], 1]]})],
    ids=lambda value: value if isinstance(value, str) else "")
def test_other_architectures(ppo, kind, options, tmp_path):
    """Those that README names: padding, scores, values and greedy sampling as on the three that all tests are run on."""
    config = ppo.AutoConfig.for_model(
        kind, vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=1, pad_token_id=0, **options)
    torch.manual_seed(0)
    model = ppo.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    model.save_pretrained(tmp_path / "model")
    test_a_row_alone_has_the_same_logprobs_as_in_a_padded_batch(ppo, tmp_path / "model")
    test_a_row_alone_has_the_same_values_and_scores_as_in_a_padded_batch(ppo, tmp_path / "model")
    test_greedy_generation_is_that_of_transformers(ppo, tmp_path / "model")
