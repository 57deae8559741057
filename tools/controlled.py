"""Stages 3 and 4 with a reward whose reliability is set by hand: is it *because* moderate rewards are unreliable that
filtering helps? The paper observes the two together; here the profile is the only thing that changes.

The reward of a response starts from the truth, f = share of its tests passed, plus a little noise that is fixed by its text,
so that a continuum of rewards arises. u in [0, 1] is its place among the SFT policy's responses (0 the worst). A profile then
takes the reward's meaning away from half of all responses, by replacing u with a number that knows nothing of the tests:

    clean        u stays
    moderate     of u in [0.25, 0.75]: a place in [0.25, 0.75] by v      the paper's picture of a reward model
    high         of u in [0.50, 1.00]: a place in [0.50, 1.00] by v      an RM that cannot tell the best from the good
    low          of u in [0.00, 0.50]: a place in [0.00, 0.50] by v
    everywhere   every second response, wherever it stands: v

v is a number in [0, 1] from a hash of the text (`--noise hash`: nobody can learn it) or the place of the response's length
among the SFT responses to all prompts (`--noise length`: a policy can, and gains reward by writing longer programs). The reward
is the u-quantile of the standard normal distribution. What remains of the reward model is the critic's first weights.

Reads   out/rm/samples.jsonl (responses of the SFT policy with their verdicts), and what the stage reads
Run     python tools/controlled.py r2 --profile moderate -- --out out/controlled/r2_moderate
        python tools/controlled.py ppo --profile moderate --noise length -- --strategy bw --out out/controlled/bw
        What stands after -- are the stage's own flags.
"""

import argparse
import bisect
import hashlib
import importlib.util
import sys
from pathlib import Path
from statistics import NormalDist

import torch

ROOT = Path(__file__).resolve().parent.parent
REGIONS = {"clean": (0.0, 0.0), "moderate": (0.25, 0.75), "high": (0.5, 1.0), "low": (0.0, 0.5), "everywhere": (0.0, 1.0)}
STAGES = {"r2": "03_r2_analysis.py", "ppo": "04_pf_ppo.py"}


def load_script(name):
    """A numbered script as a module; dataclasses look for it in sys.modules."""
    sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location("script_" + name.removesuffix(".py"), ROOT / name)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hash_number(text, salt):
    """A number in [0, 1) that looks random and is always the same for a text."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{text}".encode()).digest()[:8], "big") / 2**64


def base_reward(share_passed, text):
    """The truth and a little noise: f + 0.2 e, e standard normal by a hash of the text. Ties in f would leave no continuum."""
    return share_passed + 0.2 * NormalDist().inv_cdf(min(max(hash_number(text, "base"), 1e-9), 1 - 1e-9))


def place(ordered, value):
    """Share of the sorted list `ordered` that lies below `value`, in [0, 1]; of equals, half."""
    return (bisect.bisect_left(ordered, value) + bisect.bisect_right(ordered, value)) / (2 * len(ordered))


def disturb(u, v, text, profile):
    """The place of a response after the profile took its meaning: in the profile's region it is decided by v alone."""
    low, high = REGIONS[profile]
    if profile == "everywhere" and hash_number(text, "which") < 0.5:
        return u
    return low + (high - low) * v if low <= u < high or u == high == 1 else u


class ProfileReward:
    """Stands in for `score_responses` of a stage: same arguments, but the reward follows a profile.

    Args:
        stage: the module; problems: those that it samples responses to; samples: verdicts of the SFT policy's responses.
        mean, std: the statistics that the stage normalises by; what it gets back are standard normal rewards.
    """

    def __init__(self, stage, tokenizer, problems, samples, profile, noise, timeout, mean, std):
        self.stage, self.tokenizer, self.timeout = stage, tokenizer, timeout
        self.profile, self.noise, self.mean, self.std = profile, noise, mean, std
        self.problems = {tuple(stage.encode_prompt(tokenizer, problem["prompt"])): problem for problem in problems}
        self.lengths = sorted({len(ids) for ids in self.problems})
        self.base = sorted(base_reward(s["passed_tests"] / s["total_tests"], s["prompt"] + s["response"]) for s in samples)
        self.sizes = sorted(len(s["response"]) for s in samples)

    def __call__(self, reward_model, sequences, pad_id, batch_size):
        problems, responses = [], []
        for ids in sequences:
            cut = next(n for n in self.lengths if tuple(ids[:n]) in self.problems)
            problems.append(self.problems[tuple(ids[:cut])])
            responses.append(self.stage.decode_response(self.tokenizer, ids[cut:]))
        results = self.stage.run_tests(problems, responses, 1, self.timeout)
        return torch.tensor([self.reward(problem["prompt"] + text, text, result.passed_tests / result.total_tests)
                             for problem, text, result in zip(problems, responses, results)]) * self.std + self.mean

    def reward(self, key, response, share_passed):
        u = place(self.base, base_reward(share_passed, key))
        v = hash_number(key, "noise") if self.noise == "hash" else place(self.sizes, len(response))
        u = disturb(u, v, key, self.profile)
        return NormalDist().inv_cdf(min(max(u, 1e-3), 1 - 1e-3))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--profile", choices=REGIONS, default="moderate")
    parser.add_argument("--noise", choices=("hash", "length"), default="hash")
    parser.add_argument("--samples", default="out/rm/samples.jsonl", help="responses of the SFT policy with their verdicts")
    args, rest = parser.parse_known_args()
    stage = load_script(STAGES[args.stage])
    sys.argv = [STAGES[args.stage], *[flag for flag in rest if flag != "--"]]
    cfg = stage.parse_config(stage.Config, stage.__doc__)
    samples = stage.read_jsonl(args.samples, {"prompt": str, "response": str, "passed_tests": int, "total_tests": int})
    problems = stage.read_jsonl(cfg.data, stage.PROBLEM_FIELDS)
    if args.stage == "ppo":
        problems += stage.read_jsonl(cfg.validation, stage.PROBLEM_FIELDS)
    policy = cfg.policy if args.stage == "ppo" else cfg.policies[0]
    config = stage.AutoConfig.from_pretrained(cfg.reward_model)
    stage.score_responses = ProfileReward(stage, stage.load_tokenizer(policy), problems, samples[:5000], args.profile,
                                          args.noise, cfg.timeout, config.reward_mean, config.reward_std)
    stage.main(cfg)


if __name__ == "__main__":
    main()
