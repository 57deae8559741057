"""Stages 3 and 4 with a reward whose reliability is set by hand: is it *because* moderate rewards are unreliable that
filtering helps? The paper observes the two together; here nothing else changes.

A share of all responses, chosen by a hash of the text, is disturbed: its reward no longer says whether it passes its tests,
and is a number v in [0, 1) instead. The rest are in order: those that pass above those that fail, and in both the ones with
more tests passed above (with a little noise, so that a continuum arises). The profile says where among them the disturbed
ones stand:

    clean        nothing is disturbed
    moderate     71% are; they stand between the others: the best rewards all pass, the worst all fail (the paper's picture)
    high         29% are; they stand above all others: nobody can tell what a high reward is worth
    low          29% are; they stand below all others
    everywhere   50% are, spread over all others
    middle_ranks within one prompt, not over all: its best and its worst text are right, the rewards of those between
                 are dealt anew among them. BW and BoN then train on what they do with a clean reward

The shares are such that `moderate` to `everywhere` each put three of four pairs (one that passes, one that fails) in the right
order: as reward models they are equally accurate, and differ in where they err. Half of a pair's chance is lost where both are
disturbed (moderate), all of it where a failing one is lifted above a passing one (high), or a passing one is sunk (low). The best
of five responses is disturbed in 76% of the prompts under `moderate`, 73% under `high`, 2% under `low`, 56% under `everywhere`:
what is moderate among all responses is often the best of one prompt.

v is a number from a hash of the text (`--noise hash`: nobody can learn it) or the place of the response's length
among the SFT responses to a thousand prompts (`--noise length`: a policy can, and gains reward by writing longer programs; long prompts
have long responses, so over all pairs accuracy is 0.68 to 0.73 then, within a prompt 0.74 to 0.78). The reward
is the quantile of the standard normal distribution at the place of the response among those of the SFT policy: rewards are
distributed alike in all profiles. What remains of the reward model is the critic's first weights, in all of them the same.

Reads   out/rm/samples.jsonl (responses of the SFT policy with their verdicts), and what the stage reads
Run     python tools/controlled.py r2 --profile moderate -- --out out/controlled/r2_moderate
        python tools/controlled.py ppo --profile moderate --noise length -- --strategy bw --out out/controlled/bw
        What stands after -- are the stage's own flags.
"""

import argparse
import bisect
import dataclasses
import hashlib
import importlib.util
import sys
from pathlib import Path
from statistics import NormalDist

import torch

ROOT = Path(__file__).resolve().parent.parent
SHARES = {"clean": 0.0, "moderate": 0.707, "high": 0.293, "low": 0.293, "everywhere": 0.5, "middle_ranks": 0.0}  # of
# all responses that are disturbed, whatever their prompt
LEVELS = {"low": -1, "failed": 0, "moderate": 1, "passed": 2, "high": 3}
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


class ProfileReward:
    """Stands in for `score_responses` of a stage: same arguments, but the reward follows a profile.

    Args:
        stage: the module; problems: those that it samples responses to; samples: verdicts of the SFT policy's responses.
        mean, std: the statistics that the stage normalises by; what it gets back are standard normal rewards.
        per_prompt: N; so many sequences one after the other answer one prompt.
    """

    def __init__(self, stage, tokenizer, problems, samples, profile, noise, timeout, mean, std, per_prompt):
        self.stage, self.tokenizer, self.timeout = stage, tokenizer, timeout
        self.profile, self.noise, self.mean, self.std, self.per_prompt = profile, noise, mean, std, per_prompt
        self.problems = {tuple(stage.encode_prompt(tokenizer, problem["prompt"])): problem for problem in problems}
        self.lengths = sorted({len(ids) for ids in self.problems})
        known = [(s["prompt"] + s["response"], s["response"], s["passed_tests"] / s["total_tests"]) for s in samples]
        self.base = sorted(base_reward(share_passed, key) for key, _, share_passed in known)
        self.sizes = sorted(len(response) for _, response, _ in known)
        self.in_order = sorted(self.undisturbed(key, share_passed) for key, _, share_passed in known)
        self.levels = sorted(self.level(*each) for each in known)

    def __call__(self, reward_model, sequences, pad_id, batch_size):
        problems, responses = [], []
        for ids in sequences:
            cut = next(n for n in self.lengths if tuple(ids[:n]) in self.problems)
            problems.append(self.problems[tuple(ids[:cut])])
            responses.append(self.stage.decode_response(self.tokenizer, ids[cut:]))
        results = self.stage.run_tests(problems, responses, 1, self.timeout)
        keys = [problem["prompt"] + text for problem, text in zip(problems, responses)]
        rewards = [self.reward(key, text, result.passed_tests / result.total_tests)
                   for key, text, result in zip(keys, responses, results)]
        if self.profile == "middle_ranks":
            for first in range(0, len(rewards), self.per_prompt):
                rows = range(first, first + self.per_prompt)
                reward_of = {keys[k]: rewards[k] for k in rows}  # by text: the twin of the best is no middle one
                middle = sorted(reward_of, key=reward_of.get)[1:-1]
                dealt = [reward_of[text] for text in sorted(middle, key=lambda text: hash_number(f"{text}/{first}", "dealt"))]
                reward_of.update(zip(middle, dealt))
                for k in rows:
                    rewards[k] = reward_of[keys[k]]
        return torch.tensor(rewards) * self.std + self.mean

    def undisturbed(self, key, share_passed):
        """The level of a response whose reward is right: from 0 to 1 those that fail, from 2 to 3 those that pass."""
        return LEVELS["passed" if share_passed == 1 else "failed"] + place(self.base, base_reward(share_passed, key))

    def level(self, key, response, share_passed):
        """A number that orders responses as this profile does; `key` is the whole text, which decides what is random."""
        if hash_number(key, "which") >= SHARES[self.profile]:
            return self.undisturbed(key, share_passed)
        v = hash_number(key, "noise") if self.noise == "hash" else place(self.sizes, len(response))
        if self.profile == "everywhere":
            return self.in_order[min(int(v * len(self.in_order)), len(self.in_order) - 1)]
        return LEVELS[self.profile] + v

    def reward(self, key, response, share_passed):
        u = place(self.levels, self.level(key, response, share_passed))
        return NormalDist().inv_cdf(min(max(u, 1e-3), 1 - 1e-3))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--profile", choices=SHARES, default="moderate")
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
                                          args.noise, cfg.timeout, config.reward_mean, config.reward_std,
                                          stage.rollout_shape(cfg)[1] if args.stage == "ppo" else cfg.responses_per_prompt)
    # Profile and noise become settings of the run, so that another one is not taken for finished, or resumed.
    own = [(name, str, dataclasses.field(default=getattr(args, name))) for name in ("profile", "noise", "samples")]
    stage.main(dataclasses.make_dataclass("Config", own, bases=(stage.Config,))(**dataclasses.asdict(cfg)))


if __name__ == "__main__":
    main()
