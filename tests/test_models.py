"""Logprobs, values, scores, sampling and training steps of 04 on small random models."""

import copy
import random

import pytest
import torch
from conftest import tiny_config

CPU = torch.device("cpu")
FLOAT32 = torch.autocast("cpu", torch.bfloat16, enabled=False)
BF16 = torch.autocast("cpu", torch.bfloat16)


class Tokens:
    """What `generate` and `load_model` ask of a tokenizer."""

    pad_token_id, eos_token_id = 0, 1

    def __len__(self):
        return 50


def draw_rows(count=5, seed=0):
    """Prompts and responses of different lengths; every response ends in EOS."""
    rng = random.Random(seed)

    def draw(length):
        return [rng.randrange(2, 50) for _ in range(length)]

    prompts = [draw(rng.randrange(2, 9)) for _ in range(count)]
    return prompts, [draw(rng.randrange(1, 7)) + [1] for _ in range(count)]


def inputs_of(batch):
    return batch["input_ids"], batch["attention_mask"]


def load_policy(ppo, folder):
    return ppo.load_model(ppo.AutoModelForCausalLM, folder, Tokens())


def load_rm(ppo, folder):
    model = ppo.load_model(
        ppo.AutoModelForSequenceClassification, folder, Tokens(), num_labels=1
    ).eval()
    model.config.reward_mean, model.config.reward_std = 2.0, 0.5
    return model


def config(ppo, **options):
    return ppo.Config(
        **{"minibatch_size": 8, "micro_batch_size": 8, "score_batch_size": 3} | options
    )


def sample(ppo, policy, prompts, repeats, temperature=1.0, **options):
    cfg = ppo.Config(**{"max_new_tokens": 12, "generate_batch_size": 64} | options)
    return ppo.generate(policy, Tokens(), prompts, repeats, temperature, cfg)


@pytest.mark.parametrize("temperature, size", [(0.0, 8), (1.0, 8), (1.0, 1)])
def test_the_bar_of_the_sampler_moves_with_each_token_and_ends_full(
    ppo, llama_folder, monkeypatch, temperature, size
):
    """Rows that leave a batch early, those that stay to its end, and batches that end early."""
    bars, make = [], ppo.sandbox.progress_bar
    monkeypatch.setattr(
        ppo.sandbox, "progress_bar", lambda *args: bars.append(make(*args)) or bars[-1]
    )
    torch.manual_seed(0)
    cfg = ppo.Config(max_new_tokens=12, generate_batch_size=size)
    prompts = [[2 + k, 5, 6] for k in range(6)]
    policy = load_policy(ppo, llama_folder)
    responses, _ = ppo.generate(policy, Tokens(), prompts, 5, temperature, cfg, "sampling")
    assert size > 1 or min(map(len, responses)) < 12 == max(map(len, responses))
    (bar,) = bars
    assert bar.n == bar.total == 30 * 12


def test_a_long_prompt_does_not_pad_the_short_ones(ppo, llama_folder, monkeypatch):
    widths, generate_batch = [], ppo.generate_batch

    def recorded(model, tokenizer, prompts, *rest):
        widths.append([len(ids) for ids in prompts])
        return generate_batch(model, tokenizer, prompts, *rest)

    monkeypatch.setattr(ppo, "generate_batch", recorded)
    policy = load_policy(ppo, llama_folder)
    prompts = [[2, 5, 6], [7] * 400, [3, 5, 6], [8] * 50]
    together, _ = sample(ppo, policy, prompts, 2, 0.0)
    assert widths == [[400] * 2, [50] * 2 + [3] * 4]
    for k, prompt in enumerate(prompts):
        assert together[2 * k] == sample(ppo, policy, [prompt], 1, 0.0)[0][0]


# ------------------------------------------------------------------- padding changes nothing


def check_padding(ppo, folder):
    policy, reward_model = load_policy(ppo, folder), load_rm(ppo, folder)
    prompts, responses = draw_rows()
    batch = ppo.make_batch(prompts, responses)
    cfg = config(ppo, temperature=0.7)
    logprobs = ppo.forward_rows(ppo.logprobs_of, policy, batch, cfg, FLOAT32)
    values = ppo.forward_rows(ppo.values_of, reward_model, batch, cfg, FLOAT32)
    sequences = [p + r for p, r in zip(prompts, responses)]
    scores = ppo.score_responses(reward_model, sequences, batch_size=3)
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        sequence = torch.tensor([sequences[i]])
        with torch.no_grad():
            logits = policy(sequence).logits[0, len(prompt) - 1 : -1] / 0.7
            rm_scores = [reward_model(sequence[:, :end]).logits[0, 0] for end in (-1, None)]
        alone = torch.log_softmax(logits, -1)[range(len(response)), response]
        assert torch.allclose(logprobs[i, : len(response)], alone, atol=1e-4)
        assert not logprobs[i, len(response) :].any()
        assert torch.allclose(scores[i], rm_scores[1], atol=1e-4)
        # The critic is the RM read at every token: before the last token its value is the
        # normalised reward of the sequence without that token.
        expected = (rm_scores[0] - 2.0) / 0.5
        assert torch.allclose(values[i, len(response) - 1], expected, atol=1e-3)


def check_greedy(ppo, folder):
    policy = load_policy(ppo, folder).eval()
    prompts, _ = draw_rows(7)
    ours, _ = sample(ppo, policy, prompts, 1, 0.0, generate_batch_size=4)
    for prompt, ids in zip(prompts, ours):
        theirs = policy.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert ids == theirs[: theirs.index(1) + 1] if 1 in theirs else ids == theirs


def test_a_row_in_a_padded_batch_is_as_if_alone(ppo, model_folder):
    check_padding(ppo, model_folder)


def test_greedy_sampling_is_that_of_transformers(ppo, model_folder):
    check_greedy(ppo, model_folder)


def test_a_cache_with_room_holds_what_the_growing_one_holds(ppo):
    """Past its room of 64 tokens, and with rows that leave it."""
    roomy, growing = ppo.RoomyLayer(), ppo.DynamicLayer()
    torch.manual_seed(0)
    rows = 6
    for step in range(150):
        width = 7 if step == 0 else 1  # the prompt, then token by token
        keys, values = torch.randn(2, rows, 2, width, 4)
        for ours, theirs in zip(roomy.update(keys, values), growing.update(keys, values)):
            assert torch.equal(ours, theirs)
        if step in (20, 100):
            keep = torch.arange(0, rows, 2)
            rows = len(keep)
            for layer in (roomy, growing):
                layer.batch_select_indices(keep)
    assert roomy.get_seq_length() == 156


@pytest.mark.parametrize(
    "kind, options",
    [
        ("qwen3", {"head_dim": 16}),
        ("gemma2", {"head_dim": 16, "sliding_window": 6}),
        ("mistral", {"sliding_window": 6}),
        ("phi3", {}),
        ("starcoder2", {}),
        ("gpt_neox", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_architectures(ppo, kind, options, tmp_path):
    """Gemma 2 and Mistral look back over a sliding window, shorter here than prompt + response."""
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, intermediate_size=64, max_position_embeddings=64)
    ids = dict(bos_token_id=None, eos_token_id=1, pad_token_id=0)
    torch.manual_seed(0)
    model_config = ppo.AutoConfig.for_model(kind, **sizes, **ids, **options)
    model = ppo.AutoModelForCausalLM.from_config(model_config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    model.save_pretrained(tmp_path / "model")
    check_padding(ppo, tmp_path / "model")
    check_greedy(ppo, tmp_path / "model")


def test_take_rows_cuts_columns_of_padding_and_keeps_the_fields_of_a_row_together(ppo):
    """Every field carries its row's number; whatever rows are taken, the numbers stay together."""
    prompts = [[i + 2] * (i % 4 + 1) for i in range(12)]
    responses = [[i + 2] * (i % 5 + 1) for i in range(12)]
    batch = ppo.make_batch(prompts, responses)
    numbers = torch.arange(12.0)[:, None] * batch["response_mask"]
    batch |= {"advantages": numbers, "returns": numbers + 0.5 * batch["response_mask"]}
    mb = ppo.take_rows(batch, torch.tensor([5, 0, 10, 2]), CPU)
    assert mb["input_ids"].shape == mb["attention_mask"].shape == (4, 6)
    for row, number in enumerate([5, 0, 10, 2]):
        length, width = number % 5 + 1, number % 4 + 1
        assert mb["response_mask"][row].tolist() == [1] * length + [0] * (3 - length)
        places = [0] * (3 - width) + [1] * (width + length) + [0] * (3 - length)
        assert mb["attention_mask"][row].tolist() == places
        assert mb["input_ids"][row].tolist() == [(number + 2) * place for place in places]
        assert mb["advantages"][row, :length].tolist() == [number] * length
        assert mb["returns"][row, :length].tolist() == [number + 0.5] * length


def test_equal_sequences_have_equal_scores(ppo, llama_folder):
    """Scored in two batches of other widths they would differ by rounding, and be ranked by it."""
    prompts, responses = draw_rows(4)
    sequences = [p + r for p, r in zip(prompts, responses)] * 3
    with BF16:
        scores = ppo.score_responses(load_rm(ppo, llama_folder), sequences, batch_size=5)
    assert torch.equal(scores[:4], scores[4:8]) and torch.equal(scores[:4], scores[8:])
    assert len(set(scores.tolist())) == 4


def test_rewards_and_values_are_float32_under_autocast(ppo, llama_folder):
    """In bf16 all rewards near 3 would be multiples of 1/64, and a filter would rank by ties."""
    reward_model = load_rm(ppo, llama_folder)
    inputs = inputs_of(ppo.make_batch(*draw_rows(40)))
    with torch.no_grad(), BF16:
        scores = ppo.token_scores(reward_model, *inputs)
    assert scores.dtype == torch.float32
    share = (scores != scores.bfloat16().float()).float().mean()
    assert share > 0.5, share  # with a bf16 head 0


# --------------------------------------------------------------------------------- the sampler


def test_the_sampler_draws_from_the_distribution_that_is_trained(ppo, model_folder):
    """Frequencies of the first token against response_logprobs, and the sampler's own logprobs."""
    policy = load_policy(ppo, model_folder).eval()
    prompts, count = [[4, 5, 6], [7, 8, 9, 10, 11]], 6000
    torch.manual_seed(0)
    responses, logprobs = sample(
        ppo, policy, prompts, count, 2.0, max_new_tokens=1, generate_batch_size=2 * count
    )
    for i, prompt in enumerate(prompts):
        batch = ppo.make_batch([prompt] * 50, [[token] for token in range(50)])
        with torch.no_grad():
            exact = ppo.response_logprobs(policy, *inputs_of(batch), 1, 2.0)[:, 0]
        drawn = torch.tensor([ids[0] for ids in responses[i * count : (i + 1) * count]])
        frequencies, chances = drawn.bincount(minlength=50) / count, exact.exp()
        spread = (chances * (1 - chances) / count).sqrt().clamp(min=1e-3)
        assert ((frequencies - chances).abs() / spread).max() < 5
        own = torch.tensor([row[0] for row in logprobs[i * count : (i + 1) * count]])
        assert torch.allclose(own, exact[drawn], atol=1e-4)


def test_a_response_ends_at_eos_and_none_is_made_up(ppo, llama_folder):
    policy = load_policy(ppo, llama_folder).eval()
    torch.manual_seed(0)
    responses, logprobs = sample(ppo, policy, draw_rows(6)[0], 20, 1.5, max_new_tokens=15)
    ended = [ids for ids in responses if ids[-1] == 1]
    truncated = [ids for ids in responses if ids[-1] != 1]
    assert ended and truncated  # both kinds occur, or this test shows nothing
    assert all(1 not in ids[:-1] for ids in ended) and all(len(ids) == 15 for ids in truncated)
    assert [len(row) for row in logprobs] == [len(ids) for ids in responses]


def test_sampling_repeats_with_the_seed_and_a_batch_changes_no_greedy_row(ppo, llama_folder):
    policy = load_policy(ppo, llama_folder).eval()
    prompts, _ = draw_rows(6)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(sample(ppo, policy, prompts, 3)[0])
    assert drawn[0] == drawn[1] != drawn[2]
    one, six = (sample(ppo, policy, prompts, 1, 0.0, generate_batch_size=k)[0] for k in (1, 6))
    assert one == six


def shapes_of(model):
    """A list that fills with the shape of the token ids of every forward pass."""
    shapes = []

    def note(module, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return shapes


def test_a_prompt_is_computed_once_and_finished_rows_leave(ppo, llama_folder):
    """What makes `generate` fast, counted in tokens that pass through the model."""
    policy = load_policy(ppo, llama_folder).eval()
    shapes = shapes_of(policy)
    likely_eos = 4 * torch.nn.functional.one_hot(torch.tensor(1), 50)
    policy.get_output_embeddings().register_forward_hook(lambda m, a, logits: logits + likely_eos)
    prompts = [[5] * length for length in (3, 20, 4, 21, 5, 19)]
    torch.manual_seed(0)
    responses, _ = sample(ppo, policy, prompts, 10, 1.5, max_new_tokens=15, generate_batch_size=20)
    # Two prompts of similar length for twenty responses.
    assert [shape for shape in shapes if shape[1] > 1] == [(2, 21), (2, 19), (2, 4)]
    decoded = sum(rows for rows, columns in shapes if columns == 1)
    needed = sum(len(ids) - 1 for ids in responses)
    assert needed <= decoded <= needed / 0.8 + 3  # up to a fifth of a batch may have finished


def test_a_batch_smaller_than_the_responses_of_a_prompt_is_heeded(ppo, llama_folder):
    policy = load_policy(ppo, llama_folder).eval()
    shapes, (prompts, _) = shapes_of(policy), draw_rows(3)
    responses, _ = sample(ppo, policy, prompts, 7, generate_batch_size=3)
    assert len(responses) == 21 and max(shapes)[0] == 3
    assert len(set(map(str, responses[:7]))) > 3


# ---------------------------------------------------------------------------------- training


def training_batch(ppo, policy, count=8):
    batch = ppo.make_batch(*draw_rows(count, seed=3))
    batch["old_logprobs"] = ppo.forward_rows(ppo.logprobs_of, policy, batch, config(ppo), FLOAT32)
    torch.manual_seed(4)
    batch["advantages"] = torch.randn(batch["response_mask"].shape) * batch["response_mask"]
    return batch


def train(ppo, policy, batch, cfg, optimizer=None, amp=FLOAT32):
    optimizer = optimizer or torch.optim.SGD(policy.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    return ppo.train_epoch(policy, optimizer, ppo.actor_loss, batch, cfg, generator, amp)


@pytest.mark.parametrize("size", [4, 3])
def test_micro_batches_give_the_same_step(ppo, llama_folder, size):
    """1 x 8, 2 x 4 and 3 + 3 + 2 responses of unequal length: one token count for the step."""
    results = []
    for micro_batch_size in (8, size):
        policy = load_policy(ppo, llama_folder)
        cfg = config(ppo, micro_batch_size=micro_batch_size, max_grad_norm=1e9)
        statistics = train(ppo, policy, training_batch(ppo, policy), cfg)
        results.append((statistics, [p.detach().clone() for p in policy.parameters()]))
    (one, weights), (other, other_weights) = results
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert one["ratio"] == pytest.approx(1.0, abs=1e-4) and one["clip_fraction"] == 0.0
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights, other_weights))


def test_gradient_checkpointing_gives_the_same_step(ppo, llama_folder):
    results = []
    for checkpointing in (False, True):
        policy = load_policy(ppo, llama_folder).train()
        if checkpointing:
            policy.activation_checkpointing_enable()
        train(ppo, policy, training_batch(ppo, policy), config(ppo))
        results.append([p.detach().clone() for p in policy.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results))


def test_the_loss_divides_by_tokens_not_by_rows(ppo, llama_folder):
    """Six tokens of advantage 1 and one of 8: the mean over tokens is 2, that of rows 4.5."""
    policy = load_policy(ppo, llama_folder)
    batch = ppo.make_batch([[5], [6]], [[7, 8, 9, 10, 11, 1], [1]])
    batch["old_logprobs"] = ppo.forward_rows(ppo.logprobs_of, policy, batch, config(ppo), FLOAT32)
    batch["advantages"] = torch.tensor([[1.0] * 6, [8.0] + [0.0] * 5])
    statistics = train(ppo, policy, batch, config(ppo, micro_batch_size=1))
    assert statistics["loss"] == pytest.approx(-(6 * 1 + 8) / 7, abs=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_step_raises_what_has_positive_advantage(ppo, llama_folder, sign):
    policy = load_policy(ppo, llama_folder)
    batch = ppo.make_batch([[5, 6], [5, 6]], [[7, 8, 1], [9, 10, 1]])
    batch["advantages"] = sign * torch.tensor([[1.0] * 3, [-1.0] * 3])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    totals = []
    for _ in range(6):
        batch["old_logprobs"] = ppo.forward_rows(
            ppo.logprobs_of, policy, batch, config(ppo), FLOAT32
        )
        totals.append(batch["old_logprobs"].sum(1))
        train(ppo, policy, batch, config(ppo), optimizer)
    change = sign * (totals[-1] - totals[0])
    assert change[0] > 0.1 and change[1] < -0.1


def test_a_loss_that_is_not_finite_stops_before_the_step(ppo, llama_folder):
    policy = load_policy(ppo, llama_folder)
    before = copy.deepcopy(policy.state_dict())
    batch = training_batch(ppo, policy)
    batch["advantages"][0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="non-finite"):
        train(ppo, policy, batch, config(ppo))
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())


def test_no_dropout_is_left(ppo, tmp_path):
    """Otherwise the first ratio would not be 1; every architecture has names of its own."""
    torch.manual_seed(0)
    model_config = tiny_config("gpt2")
    assert model_config.resid_pdrop > 0
    ppo.AutoModelForCausalLM.from_config(model_config).save_pretrained(tmp_path)
    policy, inputs = load_policy(ppo, tmp_path), inputs_of(ppo.make_batch(*draw_rows()))
    train_mode = ppo.response_logprobs(policy.train(), *inputs, 4, 1.0)
    assert torch.equal(train_mode, ppo.response_logprobs(policy.eval(), *inputs, 4, 1.0))


def test_bf16_is_autocast_over_float32_weights_which_move_at_the_papers_lr(ppo, llama_folder):
    """An AdamW step at 5e-7 moves float32 weights; bf16 weights round nearly all of it away."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        policy = load_policy(ppo, llama_folder)
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
        batch = training_batch(ppo, policy)
        policy = policy.to(dtype)
        before = [p.detach().clone() for p in policy.parameters() if p.dim() == 2]
        optimizer = torch.optim.AdamW(policy.parameters(), 5e-7)
        train(ppo, policy, batch, config(ppo), optimizer, BF16)
        after = [p for p in policy.parameters() if p.dim() == 2]
        changed = sum((a != b).sum().item() for a, b in zip(before, after))
        moved[dtype] = changed / sum(a.numel() for a in after)
    assert moved[torch.float32] > 0.5 > 0.05 > moved[torch.bfloat16]


def test_the_first_step_check_sees_wrong_positions_that_ratio_and_kl_do_not(
    ppo, tmp_path, monkeypatch, capsys
):
    torch.manual_seed(0)
    ppo.AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path)
    policy = load_policy(ppo, tmp_path).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    prompts, cfg = draw_rows(6)[0], config(ppo)
    responses, sampled = sample(ppo, policy, prompts, 1)
    right = ppo.response_logprobs

    def wrong(model, input_ids, attention_mask, length, temperature):
        positions = torch.zeros_like(input_ids)
        logits = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions)
        logprobs = torch.log_softmax(logits.logits[:, -length - 1 : -1], -1)
        return logprobs.gather(-1, input_ids[:, -length:, None])[..., 0]

    for function in (right, wrong):
        monkeypatch.setattr(ppo, "response_logprobs", function)
        batch = ppo.make_batch(prompts, responses)
        old, ref = ppo.policy_and_reference(policy, policy, batch, cfg, FLOAT32)
        batch["old_logprobs"], kl = old, old - ref
        assert not kl.any()
        if function is right:
            ppo.check_first_step(policy, batch, kl, sampled, cfg, FLOAT32)
    with pytest.raises(SystemExit) as stop:
        ppo.check_first_step(policy, batch, kl, sampled, cfg, FLOAT32)
    assert stop.value.code == 2 and "sampler" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- LoRA


@pytest.fixture
def lora(ppo, llama_folder):
    """Policy and critic with adapters that have been trained for a step, and a batch."""
    pytest.importorskip("peft")
    torch.manual_seed(0)
    policy = ppo.add_adapters(load_policy(ppo, llama_folder), 4, "CAUSAL_LM")
    critic = ppo.add_adapters(load_rm(ppo, llama_folder), 4, "SEQ_CLS")
    return policy, critic, ppo.make_batch(*draw_rows(8, seed=3)), config(ppo)


def test_lora_starts_as_the_reference_and_is_merged_when_saved(ppo, lora, llama_folder, tmp_path):
    policy, _, batch, cfg = lora
    logprobs, ref_logprobs = ppo.policy_and_reference(policy, policy, batch, cfg, FLOAT32)
    assert torch.equal(logprobs, ref_logprobs)  # B is 0 at first
    batch |= {"old_logprobs": logprobs, "advantages": torch.ones(logprobs.shape)}
    train(ppo, policy, batch, cfg, torch.optim.AdamW(policy.parameters(), 1e-2))
    after, ref_after = ppo.policy_and_reference(policy, policy, batch, cfg, FLOAT32)
    assert torch.equal(ref_after, ref_logprobs) and not torch.allclose(after, logprobs, atol=1e-2)

    class Saver:
        def save_pretrained(self, folder):
            pass

    ppo.save_model(policy, Saver(), tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merged = load_policy(ppo, tmp_path / "merged")
    saved = ppo.forward_rows(ppo.logprobs_of, merged, batch, cfg, FLOAT32)
    assert torch.allclose(saved, after, atol=1e-3)
    still, _ = ppo.policy_and_reference(policy, policy, batch, cfg, FLOAT32)
    assert torch.equal(still, after)  # saving has not touched the policy


def test_the_lora_critic_learns_and_leaves_the_reward_model_alone(ppo, lora):
    _, critic, batch, cfg = lora
    trained = {name for name, p in critic.named_parameters() if p.requires_grad}
    assert any("lora_" in name for name in trained)
    assert any("score.modules_to_save" in name for name in trained)
    sequences = [[5, 6, 7, 1], [8, 9, 1]]

    def rewards():
        with ppo.without_adapters(critic):
            return ppo.score_responses(critic, sequences, 2)

    before, values = rewards(), ppo.forward_rows(ppo.values_of, critic, batch, cfg, FLOAT32)
    batch |= {"old_values": values, "returns": values + 1.0}
    optimizer = torch.optim.AdamW(critic.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    loss = [
        ppo.train_epoch(critic, optimizer, ppo.critic_loss, batch, cfg, generator, FLOAT32)["loss"]
        for _ in range(5)
    ]
    assert loss[-1] < loss[0]
    assert torch.equal(before, rewards())
    assert not torch.allclose(before, ppo.score_responses(critic, sequences, 2), atol=1e-2)
