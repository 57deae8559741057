"""Stages 3 and 4 with a reward whose reliability is set by hand.

Does filtering help *because* moderate rewards are unreliable? The paper observes the two together.
Here nothing else changes. The reward is made from the true tests. It orders responses rightly,
those that pass above those that fail, except for a share of disturbed responses. A hash of the text
chooses these. Their reward says nothing: it is a number v in [0, 1). The profile says where they
stand among the others:

    clean            nothing is disturbed
    moderate         71% are, and stand in the middle: the best rewards all pass, the worst all fail
    moderate_length  the same, but v is the place of the response's length: an error by a rule
    high             29% are, and stand above all others: a high reward means nothing
    low              29% are, and stand below all others
    everywhere       50% are, spread over all others

With these shares each profile but `clean` orders three of four pairs (one that passes, one that
fails) rightly: as reward models they are equally accurate and differ in where they err. (Longer
prompts have longer responses, so over pairs of several prompts moderate_length is a little worse.)

The reward is the quantile of the standard normal distribution at the response's place among those
of the SFT policy, so rewards are distributed alike in all profiles. What remains of the reward
model is the critic's first weights, the same in all of them.

Reads out/rm/samples.jsonl (responses of the SFT policy with their verdicts) and what stage 4 reads.

Run: python tools/controlled.py --profile high --strategy bw --out out/controlled_bw

or, for stage 3: python tools/controlled.py --profile high --rescore out/rm/validation_samples.jsonl
--out out/high.jsonl, then python 03_r2_analysis.py --samples out/high.jsonl --out out/r2_high
"""

import bisect
import hashlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sandbox  # noqa: E402


def load_script(name):
    """A numbered script as a module; dataclasses look for it in sys.modules."""
    module_name = "script_" + name.removesuffix(".py")
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, ROOT / name)
        sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module_name])
    return sys.modules[module_name]


ppo = load_script("04_pf_ppo.py")
Profile = Literal["clean", "moderate", "moderate_length", "high", "low", "everywhere"]
SHARES = {"clean": 0.0, "moderate": 0.707, "high": 0.293, "low": 0.293, "everywhere": 0.5}
FLOORS = {"low": -1, "moderate": 1, "high": 3}  # of the disturbed; failing: 0 to 1, passing: 2 to 3
SAMPLE_FIELDS = {"prompt": str, "response": str, "passed_tests": int, "total_tests": int}


@dataclass
class Config(ppo.Config):
    profile: Profile = "moderate"  # where the reward errs
    samples: str = "out/rm/samples.jsonl"  # responses of the SFT policy: the scale of the reward
    rescore: str = ""  # samples to write to --out with this reward, for stage 3; empty: train


class ProfileReward:
    """The reward of a response, in standard deviations over the responses of the SFT policy."""

    def __init__(self, samples, profile):
        self.profile, _, self.rule = profile.partition("_")
        known = [
            (s["prompt"], s["response"], s["passed_tests"] / s["total_tests"]) for s in samples
        ]
        self.base = sorted(base_reward(*sample) for sample in known)
        self.sizes = sorted(len(response) for _, response, _ in known)
        self.undisturbed_levels = sorted(self.undisturbed(*sample) for sample in known)
        self.levels = sorted(self.level(*sample) for sample in known)

    def __call__(self, prompt, response, share_passed):
        u = place(self.levels, self.level(prompt, response, share_passed))
        return NormalDist().inv_cdf(min(max(u, 1e-3), 1 - 1e-3))

    def undisturbed(self, prompt, response, share_passed):
        """The level of a response whose reward is right: 0 to 1 where it fails, else 2 to 3."""
        floor = 2 if share_passed == 1 else 0
        return floor + place(self.base, base_reward(prompt, response, share_passed))

    def level(self, prompt, response, share_passed):
        """A number that orders all responses as the profile does."""
        if hash_number(prompt, response, "which") >= SHARES[self.profile]:
            return self.undisturbed(prompt, response, share_passed)
        if self.rule == "length":
            v = place(self.sizes, len(response))
        else:
            v = hash_number(prompt, response, "noise")
        if self.profile == "everywhere":
            return self.undisturbed_levels[int(v * len(self.undisturbed_levels))]
        return FLOORS[self.profile] + v


def hash_number(prompt, response, salt):
    """A number in [0, 1) that looks random and is always the same for a text."""
    digest = hashlib.sha256(f"{salt}/{prompt}{response}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def base_reward(prompt, response, share_passed):
    """The share of tests passed and a little noise: with ties alone there would be no continuum."""
    noise = min(max(hash_number(prompt, response, "base"), 1e-9), 1 - 1e-9)
    return share_passed + 0.2 * NormalDist().inv_cdf(noise)


def place(ordered, value):
    """Share of the sorted list that lies below `value`, in [0, 1]; of equals, half."""
    below, up_to = bisect.bisect_left(ordered, value), bisect.bisect_right(ordered, value)
    return (below + up_to) / (2 * len(ordered))


def main(cfg):
    reward = ProfileReward(sandbox.read_jsonl(cfg.samples, SAMPLE_FIELDS), cfg.profile)
    if cfg.rescore:
        samples = sandbox.read_jsonl(cfg.rescore, SAMPLE_FIELDS)
        for sample in samples:
            share_passed = sample["passed_tests"] / sample["total_tests"]
            sample["rm_score"] = reward(sample["prompt"], sample["response"], share_passed)
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        sandbox.write_jsonl(cfg.out, samples)
        return
    tokenizer = sandbox.load_tokenizer(cfg.policy)
    problems = sandbox.read_problems(cfg.data)
    problem_of = {tuple(sandbox.encode_prompt(tokenizer, p["prompt"])): p for p in problems}
    lengths = sorted({len(ids) for ids in problem_of})

    def score_responses(reward_model, sequences, batch_size, progress=None):
        """Stands in for 04's: same arguments, a reward in the unit of the reward model."""
        ends = [next(n for n in lengths if tuple(ids[:n]) in problem_of) for ids in sequences]
        asked = [problem_of[tuple(ids[:n])] for ids, n in zip(sequences, ends)]
        texts = [sandbox.decode_response(tokenizer, ids[n:]) for ids, n in zip(sequences, ends)]
        results = sandbox.run_tests(asked, texts, timeout=cfg.timeout, workers=cfg.workers)
        rewards = torch.tensor(
            [
                reward(problem["prompt"], text, result.passed_tests / result.total_tests)
                for problem, text, result in zip(asked, texts, results)
            ]
        )
        config = reward_model.config
        return rewards * config.reward_std + config.reward_mean

    ppo.score_responses = score_responses
    ppo.main(cfg)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
