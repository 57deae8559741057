"""pf_verl.py in the real verl: its ReplayBuffer, TransferQueue, trainer methods and config."""

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl")

import asyncio  # noqa: E402

import ray  # noqa: E402
import to_verl  # noqa: E402
import transfer_queue as tq  # noqa: E402
import verl.trainer.config  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from verl import DataProto  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.trainer.ppo.reward import load_reward_manager  # noqa: E402
from verl.trainer.ppo.utils import create_rl_dataset  # noqa: E402
from verl.trainer.ppo.v1.trainer_base import PPOTrainer  # noqa: E402
from verl.utils.config import validate_config  # noqa: E402
from verl.utils.tensordict_utils import list_of_dict_to_tensordict  # noqa: E402

SCALE = Path(__file__).resolve().parent.parent
PROMPTS, RESPONSES = 4, 5


def verl_config(*changes):
    """verl's own config with the overrides that the README gives, and changes to these."""
    readme = (SCALE / "README.md").read_text()
    command = re.search(r"python -m verl\.trainer\.main_ppo ((?:.*\\\n)+.*)", readme).group(1)
    command = command.replace("$PWD", str(SCALE.parent))
    overrides = [word for word in command.split() if word != "\\"]
    assert any("FilteredReplayBuffer" in word for word in overrides)
    names = {change.split("=")[0] for change in changes}
    overrides = [word for word in overrides if word.split("=")[0] not in names]
    folder = str(Path(verl.trainer.config.__file__).parent)
    with initialize_config_dir(folder, version_base=None):
        return compose("ppo_trainer", overrides=[*overrides, *changes])


def make_buffer(*changes):
    """The replay buffer as verl's trainer makes it from the config."""
    trainer = SimpleNamespace(
        config=verl_config(*changes), trainer_mode="sync", _add_prompts_to_generate=None
    )
    trainer.trainer_mode = trainer.config.trainer.v1.trainer_mode
    buffer = PPOTrainer._build_replay_buffer(trainer)
    buffer.poll_interval = 0.01
    return buffer


@pytest.fixture(scope="module")
def queue():
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    tq.init(
        verl_config(
            "transfer_queue.enable=True",
            "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        ).transfer_queue
    )
    yield
    tq.close()
    ray.shutdown()


def fill(partition, seed, without=()):
    """Put sampled and scored responses of four prompts into the queue -> {key: fields}."""
    random.seed(seed)
    torch.manual_seed(seed)
    rows = {}
    for prompt in range(PROMPTS):
        for session in range(RESPONSES):
            length = random.randint(2, 6)
            scores = torch.zeros(length)
            scores[-1] = torch.randn(())
            rows[f"uid{prompt}-{seed}_{session}_0"] = {
                "uid": f"uid{prompt}-{seed}",
                "prompts": torch.randint(2, 9, (3,)),
                "responses": torch.randint(2, 9, (length,)),
                "response_mask": torch.ones(length, dtype=torch.long),
                "rm_scores": scores,
                "old_log_probs": -torch.rand(length),
                "ref_log_prob": -torch.rand(length),
                "values": torch.randn(length),
                "rollout_log_probs": -torch.rand(length),
            }
    for key in without:
        del rows[key]
    keys = random.sample(list(rows), len(rows))  # responses finish in any order
    tq.kv_batch_put(
        keys=keys,
        partition_id=partition,
        fields=list_of_dict_to_tensordict([rows[key] for key in keys]),
        tags=[{"status": "success", "seq_len": 3 + len(rows[key]["values"])} for key in keys],
    )
    uids = sorted({row["uid"] for row in rows.values()})
    tag = {"is_prompt": True, "status": "finished", "global_steps": 1}
    tq.kv_batch_put(keys=uids, partition_id=partition, tags=[tag] * len(uids))
    return rows


def clear(partition):
    keys = list((tq.kv_list(partition) or {}).get(partition, {}))
    if keys:
        tq.kv_clear(partition_id=partition, keys=keys)


def score(row):
    return row["rm_scores"].sum().item()


def by_prompt(rows):
    """The keys of each prompt in order of session."""
    uids = sorted({row["uid"] for row in rows.values()})
    return [sorted(key for key in rows if rows[key]["uid"] == uid) for uid in uids]


@pytest.mark.parametrize("strategy", ["bw", "br", "bon", "random2", "none"])
def test_kept_and_cleared(ppo, queue, strategy):
    clear("train")
    rows = fill("train", seed=1)
    buffer = make_buffer(f"+trainer.v1.sampler.sampler_kwargs.strategy={strategy}")
    batch, metrics = buffer.sample(global_steps=7, partition_id="train", batch_size=PROMPTS)
    expected, generator = [], torch.Generator().manual_seed(7)
    prompts = {}
    for key in sorted(rows):
        prompts.setdefault(rows[key]["uid"], []).append(key)
    for keys in prompts.values():
        ranked = sorted(keys, key=lambda key: -score(rows[key]))
        scores = torch.tensor([[score(rows[key]) for key in keys]])
        _, columns = ppo.select_responses(scores, strategy, generator)
        kept = [keys[i] for i in columns]
        if strategy == "bw":
            assert sorted(kept) == sorted([ranked[0], ranked[-1]])
        if strategy in ("bon", "br"):
            assert ranked[0] in kept and len(kept) == {"bon": 1, "br": 2}[strategy]
        expected += kept
    assert sorted(batch.keys) == sorted(expected)
    assert sorted(tq.kv_list("train")["train"]) == sorted(expected)  # the others are gone
    assert [tag["seq_len"] for tag in batch.tags] == [
        3 + len(rows[key]["values"]) for key in batch.keys
    ]
    assert len(batch) == batch.size == metrics["filter/kept"] == len(expected)
    assert metrics["filter/seen"] == len(rows)
    mean = sum(map(score, rows.values())) / len(rows)
    assert metrics["filter/score_seen"] == pytest.approx(mean, abs=1e-5)


def test_a_prompt_whose_response_failed(queue):
    clear("train")
    rows = fill("train", seed=2, without=["uid0-2_1_0", "uid0-2_4_0"])
    batch, _ = make_buffer().sample(global_steps=1, partition_id="train", batch_size=PROMPTS)
    ends = []
    for keys in by_prompt(rows):
        ranked = sorted(keys, key=lambda key: score(rows[key]))
        ends += [ranked[0], ranked[-1]]
    assert sorted(batch.keys) == sorted(ends)


def test_advantages_are_those_of_stage_4(ppo, queue):
    """GAE of the kept rows with the KL penalty in the reward, whitened over the kept rows."""
    clear("train")
    rows = fill("train", seed=3)
    buffer = make_buffer()
    batch, _ = buffer.sample(global_steps=1, partition_id="train", batch_size=PROMPTS)
    config = verl_config()
    trainer = SimpleNamespace(
        config=config,
        kl_ctrl_in_reward=core_algos.get_kl_controller(config.algorithm.kl_ctrl),
    )
    PPOTrainer._compute_advantage(trainer, batch, {})
    data = tq.kv_batch_get(
        keys=batch.keys, partition_id="train", select_fields=["advantages", "returns"]
    )
    width = max(len(rows[key]["values"]) for key in batch.keys)

    def padded(name):
        parts = [torch.as_tensor(rows[key][name]).float() for key in batch.keys]
        return torch.stack([torch.nn.functional.pad(x, (0, width - len(x))) for x in parts])

    mask = padded("response_mask")
    rewards = ppo.token_rewards(
        padded("rm_scores").sum(1), padded("old_log_probs"), padded("ref_log_prob"), mask,
        config.algorithm.kl_ctrl.kl_coef,
    )  # fmt: skip
    assert config.algorithm.kl_ctrl.kl_coef > 0
    advantages, returns = ppo.gae(
        rewards, padded("values"), mask, config.algorithm.gamma, config.algorithm.lam
    )
    whitened = ppo.whiten(advantages, mask)
    # verl divides the variance by the number of tokens less one.
    whitened *= ((mask.sum() - 1) / mask.sum()).sqrt()
    for i, (a, r) in enumerate(zip(data["advantages"], data["returns"])):
        torch.testing.assert_close(a, whitened[i, : len(a)], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(r, returns[i, : len(r)], atol=2e-6, rtol=1e-5)


def test_validation_counts_every_response(queue):
    clear("val")
    rows = fill("val", seed=4)
    batch, metrics = make_buffer().sample(global_steps=1, partition_id="val", batch_size=PROMPTS)
    assert sorted(batch.keys) == sorted(rows) and "filter/kept" not in metrics


def test_refused_before_training():
    for strategy in ("top", "top_random", "top_bottom", "pow_2", "best"):
        with pytest.raises(ValueError, match=f"'{strategy}'"):
            make_buffer(f"+trainer.v1.sampler.sampler_kwargs.strategy={strategy}")
    with pytest.raises(ValueError, match="'colocate_async'"):
        make_buffer("trainer.v1.trainer_mode=colocate_async")


def test_verl_accepts_the_config(rm_folder):
    folders = [f"{role}.model.path={rm_folder}" for role in ("actor_rollout_ref", "critic")]
    validate_config(verl_config(*folders), use_reference_policy=True, use_critic=True)


def test_the_minibatches_of_the_readme_need_no_padding():
    """verl multiplies ppo_mini_batch_size by n and pads a batch that is no multiple of that."""
    config = verl_config()
    kept = config.data.train_batch_size * 2  # bw, br and random2 keep two
    for critic_warmup in (0, 9):
        config.trainer.critic_warmup = critic_warmup
        trainer = SimpleNamespace(config=config, use_critic=True, global_steps=1)
        assert kept % PPOTrainer._get_required_batch_multiple(trainer, dp_size=8) == 0


@pytest.fixture(scope="module")
def rm_folder(tmp_path_factory):
    """A tiny random reward model and its tokenizer."""
    folder = tmp_path_factory.mktemp("rm")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *"abcdefg"])}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")),
        eos_token="<eos>", pad_token="<pad>",
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    rm = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=9,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=1,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
            reward_mean=0.5,
            reward_std=2.0,
        )  # fmt: skip
    )
    rm.score.weight.data.mul_(50)
    rm.save_pretrained(folder)
    return folder


def test_reward_manager_scores_token_ids(ppo, rm_folder):
    rm = AutoModelForSequenceClassification.from_pretrained(rm_folder)
    manager = load_reward_manager(
        verl_config(f"reward.reward_model.model_path={rm_folder}"),
        AutoTokenizer.from_pretrained(rm_folder),
    )
    scores = []
    for prompt, response in (([2, 3, 4], [5, 6, 1]), ([2, 3, 4], [5, 6]), ([7], [8, 3, 4, 1])):
        fields = {
            "prompts": torch.tensor([[0] * (4 - len(prompt)) + prompt]),  # padded left, and right
            "responses": torch.tensor([response + [0] * (5 - len(response))]),
        }
        fields["attention_mask"] = (torch.cat(list(fields.values()), 1) != 0).long()
        data = DataProto(batch=TensorDict(fields, batch_size=1))
        result = asyncio.run(manager.run_single(data))["reward_score"]
        expected = ppo.normalised(ppo.score_responses(rm, [prompt + response], 8), rm).item()
        assert result == pytest.approx(expected - (response[-1] != 1), abs=1e-4)
        scores.append(result)
    assert abs(scores[0] - (scores[1] + 1)) > 1e-3  # the EOS counts


def test_problems_and_critic(ppo, rm_folder, tmp_path, monkeypatch):
    """verl reads the problems that to_verl.py writes; the critic's values are stage 4's."""
    monkeypatch.chdir(tmp_path)
    problem = {"task_id": "t/0", "prompt": "a b", "tests": ["assert f(1) == 1"]}
    Path("problems.jsonl").write_text(json.dumps(problem) + "\n")
    files = {"data": "problems.jsonl", "validation": "problems.jsonl"}
    to_verl.main(to_verl.Config(reward_model=str(rm_folder), **files))
    tokenizer = AutoTokenizer.from_pretrained(rm_folder)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    config = verl_config("+data.cache_dir=cache")
    assert config.data.train_files == "out/verl/ppo.jsonl"
    dataset = create_rl_dataset(config.data.train_files, config.data, tokenizer, None)
    assert dataset[0]["raw_prompt"] == [{"role": "user", "content": "a b"}]

    rm = AutoModelForSequenceClassification.from_pretrained(rm_folder)
    critic = AutoModelForTokenClassification.from_pretrained(config.critic.model.path)
    ids = torch.tensor([[2, 3, 4, 5, 6, 1]])
    values = ppo.normalised(ppo.token_scores(rm, ids, torch.ones_like(ids)), rm)
    torch.testing.assert_close(critic(ids).logits[..., 0], values, atol=1e-5, rtol=1e-5)
