"""The tables of results/: every method, several seeds, from one results file.

    python tools/tables.py run --budget_minutes 60 --jobs 2    train, evaluate, add a line to results/results.jsonl; goes on where
                                                               it stopped. Needs data/tiny, out/sft and out/rm of runs/tiny.sh.
    python tools/tables.py show                                results/tables.md and figures, from results.jsonl alone
    python tools/tables.py list                                what is done and what is to do, with the commands

Each run is a numbered script as a subprocess with its default settings but for the flags that `list` shows. A seed decides the
order of prompts, the samples and the filter; the SFT policy and the reward model are the same for all seeds (so intervals hold
the variance of reinforcement learning, not that of the stages before). Methods of a seed see the same prompts in the same order
(`single` and PLUM, which take more and fewer prompts an iteration, others), so differences are paired by seed. The test
problems are those of 05_eval.py; validation problems choose `best`.
"""

import argparse
import concurrent.futures
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import scipy.stats

ROOT = Path(__file__).resolve().parent.parent
RESULTS, WORK = Path("results"), Path("out/tables")  # in the folder where data/ and out/ are
NAMES = {"none": "PPO-M", "bw": "BW", "br": "BR", "bon": "BoN"}  # in figures and sweeps
FILTERS = ["none", "random2", "bw", "br", "bon", "single", "top", "top_random", "top_bottom", "pow_1", "pow_2", "pow_3"]
MEASURING = ["auto", "learned"]
CRITIC_FREE = {"rloo": ("none", "rloo"), "rloo_random2": ("random2", "rloo"), "rloo_bw": ("bw", "rloo"),
               "grpo": ("none", "grpo"), "grpo_random2": ("random2", "grpo"), "grpo_bw": ("bw", "grpo")}
BASELINES = ["raft", "bond", "dpo", "ipo", "kto", "iterative_dpo"]
PLUM = {"plum_dpo": ["--loss", "dpo"], "plum_kto": ["--loss", "kto"], "plum_online_dpo": ["--loss", "dpo", "--online"]}
STARTS = {"sft": "out/sft", "plum_sft": "out/plum/sft"}  # what training starts from; PLUM's has learned to write tests, too
EQUAL_PASSES = 1920  # responses that the policy trains on: PPO-M's in 10 iterations, BR's, BW's and random2's in 22
RMS = {"pairs_50": ["--max_pairs", "50", "--epochs", "20"], "pairs_300": ["--max_pairs", "300", "--epochs", "8"],
       "pairs_1000": ["--max_pairs", "1000", "--epochs", "4"], "noise_0.2": ["--label_noise", "0.2"],
       "noise_0.4": ["--label_noise", "0.4"], "pairs_all": []}  # all: about 5,000, as in runs/tiny.sh, but on one thread, with other digits
KL_SWEEP = {"kl_1.0": "1", "main": "0.3", "kl_0.1": "0.1", "kl_0.03": "0.03"}  # group: coefficient
PROFILES = [("clean", "hash"), ("moderate", "hash"), ("high", "hash"), ("low", "hash"), ("everywhere", "hash"),
            ("middle_ranks", "hash"),
            ("moderate", "length"), ("high", "length"), ("everywhere", "length")]
# arXiv 2409.06957v5: Table 1, R2 of none, BoN, BR, BW; Table 2, pass@1 on HumanEval / MBPP / LeetCode; Table 3, HumanEval and R2
PAPER_1 = {"sft": (0.886, 0.454, 0.922, 0.952), "middle": (0.907, 0.389, 0.935, 0.956), "final": (0.876, 0.431, 0.916, 0.946)}
PAPER_2 = {"sft": "74.2 / 70.8 / 15.2", "raft": "76.9 / 71.3 / 17.8", "bond": "80.8 / 75.2 / 30.0", "dpo": "78.4 / 73.7 / 23.0",
           "ipo": "78.2 / 72.9 / 23.2", "kto": "77.9 / 72.5 / 22.4", "iterative_dpo": "78.1 / 74.8 / 23.8",
           "single": "78.1 / 73.8 / 25.2", "none": "80.2 / 75.0 / 29.8", "bon": "75.8 / 71.7 / 16.8", "br": "82.9 / 75.9 / 33.0",
           "bw": "82.4 / 76.2 / 30.4"}
PAPER_3 = {"single": (78.1, 0.782), "none": (80.8, 0.886), "bon": (75.8, 0.454), "br": (82.9, 0.841), "bw": (82.4, 0.952),
           "top": (80.5, 0.621), "top_random": (81.9, 0.889), "top_bottom": (81.7, 0.927), "pow_1": (81.0, 0.926),
           "pow_2": (81.3, 0.939), "pow_3": (81.9, 0.946)}
NOTE_2 = (f"6,000 samples; `auto` and `learned` 8,500, since they measure R², on 100 validation problems whose true tests no other method "
          f"sees in training. *best*: the checkpoint with the best validation pass@1; *last*: iteration 25; *sampled*: 4 responses a "
          f"problem at temperature 1; *responses trained on*: by the policy, which waits for the critic for two iterations; *after "
          f"{EQUAL_PASSES:,}*: the first saved iteration (every fifth) by which the policy has trained on so many, 10 for PPO-M (1,920), 25 "
          f"for BW, BR and `random2` (2,208); empty where it never does.\n\n")
SHORT = ["--iterations", "15"]  # sweeps: enough to see a difference, three fifths of the time


def ppo(strategy, *flags):
    return ["04_pf_ppo.py", "--strategy", strategy, *flags]


def plan():
    """All runs in order of importance: {"group", "method", "seed", "command", "needs"}; `needs` is a run that must be done."""
    runs = []

    def add(group, method, seed, command, needs=None):
        runs.append({"group": group, "method": method, "seed": seed, "command": command, "needs": needs})

    def main_group(methods, seeds):
        for seed in seeds:
            for method, command in methods.items():
                add("main", method, seed, command)

    add("main", "sft", 0, None)
    main_group({name: ppo(name) for name in FILTERS[:5]}, range(5))
    for seed in range(5):
        add("r2", "none", seed, ["03_r2_analysis.py"], ("main", "none", seed))
    add("rm_anew", "rm", 0, ["02_reward_model.py", "--policy", "out/tables/main/none/0/train/last"], ("main", "none", 0))
    for seed in range(5):
        add("rm_anew", "r2", seed, ["03_r2_analysis.py", "--reward_model", "out/tables/rm_anew/rm/0"], ("rm_anew", "rm", 0))
    main_group({name: ppo(name) for name in FILTERS[5:] + MEASURING}, range(5))
    main_group({name: ["06_baselines.py", "--method", name] for name in BASELINES}, range(5))
    main_group({name: ppo(s, "--advantage", a) for name, (s, a) in CRITIC_FREE.items()}, range(5))
    main_group({name: ["07_plum.py", *flags] for name, flags in PLUM.items()}, range(5))
    add("main", "plum_sft", 0, None, ("main", "plum_dpo", 0))
    for seed in range(5):  # three of the sweeps, five of the controlled experiment
        for profile, noise in PROFILES if seed < 3 else PROFILES[:7]:
            for name in ("none", "random2", "br", "bw", "bon"):
                command = ["tools/controlled.py", "ppo", "--profile", profile, "--noise", noise, "--", "--strategy", name, *SHORT]
                add(f"profile_{profile}_{noise}", name, seed, command)
            if seed == 0:
                add(f"profile_{profile}_{noise}", "r2", 0, ["tools/controlled.py", "r2", "--profile", profile, "--noise", noise,
                                                          "--"])
        if seed > 2:
            continue
        for kl_coef in ("0.03", "0.1", "1.0"):
            for name in ("none", "random2", "br", "bw"):
                add(f"kl_{kl_coef}", name, seed, ppo(name, "--kl_coef", kl_coef))
        for rm, flags in RMS.items():
            if seed == 0:
                add(f"rm_{rm}", "rm", 0, ["02_reward_model.py", *flags])
                add(f"rm_{rm}", "r2", 0, ["03_r2_analysis.py", "--reward_model", f"out/tables/rm_{rm}/rm/0"], (f"rm_{rm}", "rm", 0))
            for name in ("none", "random2", "br", "bw"):
                add(f"rm_{rm}", name, seed, ppo(name, "--reward_model", f"out/tables/rm_{rm}/rm/0", *SHORT), (f"rm_{rm}", "rm", 0))
    return runs


def key(record):
    return record["group"], record["method"], record["seed"]


def read_results():
    path = RESULTS / "results.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


# --------------------------------------------------------------------------------------------------------------- running


def call(command, log):
    """A script of this project as a subprocess; its output goes to `log`. After a failure no other run starts."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with open(log, "a", encoding="utf-8") as file:
        code = subprocess.run([sys.executable, ROOT / command[0], *command[1:]], stdout=file, stderr=file,
                              env=environment).returncode
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {code}; see {log}")


def training_record(lines):
    """The lines of a run's metrics.jsonl -> what the figures show of its iterations, and what it cost."""
    steps = [line for line in lines if line["iteration"]]
    phases = [name for name in steps[0] if name.startswith("seconds_") and name not in ("seconds_validate", "seconds_measure")]
    critic = any("critic_loss" in line for line in steps)
    names = ("iteration", "rm_score", "pass_rate", "kl_per_response", "entropy", "length", "kept", "seen", "strategy", "validation_pass_at_1")
    return {
        "iterations": {name: [round(line[name], 4) if isinstance(line.get(name), float) else line.get(name) for line in lines]
                       for name in names if any(name in line for line in lines)},  # by column: a third of the size
        "cost": {"samples": sum(line["seen"] + line.get("r2_responses", 0) + line.get("test_responses", 0) for line in steps),
                 "rm_passes": sum(line["seen"] + line.get("r2_responses", 0) for line in steps if "rm_score" in line),
                 "policy_rows": sum(line["kept"] for line in steps if "policy_loss" in line),
                 "critic_rows": sum(line["kept"] for line in steps) if critic else 0,
                 "seconds": round(sum(line[name] for line in steps for name in phases), 1),
                 "seconds_train": round(sum(line.get("seconds_train", 0) + line.get("seconds_forward", 0) for line in steps), 1)}}


def train_and_test(run, out):
    """One training run and the test problems' verdict on its best, last and equal-passes checkpoints (of a sweep: its last)
    -> record."""
    record = {"group": run["group"], "method": run["method"], "seed": run["seed"]}
    checkpoints = {"best": STARTS.get(run["method"])}
    if run["command"]:
        call([*run["command"], "--seed", str(run["seed"]), "--out", str(out / "train"), "--threads", "1", "--workers", "1",
              "--save_every", "5", "--resume"], out / "log.txt")
        lines = [json.loads(line) for line in (out / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        validated = [line for line in lines if "validation_pass_at_1" in line]
        trained = np.cumsum([line.get("kept", 0) if "policy_loss" in line else 0 for line in lines])
        equal = next((line["iteration"] for line, rows in zip(lines, trained)
                      if rows >= EQUAL_PASSES and line["iteration"] % 5 == 0), lines[-1]["iteration"])
        at = {"best": max(validated, key=lambda line: line["validation_pass_at_1"])["iteration"],
              "last": lines[-1]["iteration"], "equal": equal}
        folders = {"best": out / "train" / "best", "last": out / "train" / "last", "equal": out / "train" / f"iteration_{equal}"}
        wanted = ("best", "last", "equal") if run["group"] == "main" else ("last",)  # sweeps compare what training ends with
        checkpoints = {name: folders[name] for name in wanted if name == "last" or at[name] != at["last"]}
        record |= training_record(lines) | {"checkpoints": at}
    call(["05_eval.py", "--policies", *map(str, checkpoints.values()), "--samples", "4", "--ks", "1", "--threads", "1",
          "--workers", "1", "--out", str(out / "eval")], out / "log.txt")
    rows = json.loads((out / "eval" / "results.json").read_text(encoding="utf-8"))
    record["test"] = {name: {"greedy": row["greedy pass@1"]["mean"], "sampled": row["pass@1"]["mean"]}
                      for name, row in zip(checkpoints, rows)}
    if run["command"]:  # a checkpoint that is the last one has the last one's result
        record["test"] = {name: record["test"].get(name, record["test"]["last"]) for name in wanted}
    if run["group"] != "main" or run["method"] != "none":  # those of PPO-M are read again for Table 1
        for path in (out / "train").glob("iteration_*"):
            shutil.rmtree(path)
    return record


def one(run):
    """Carry out a run of any kind -> its record for results.jsonl."""
    out = WORK / run["group"] / run["method"] / str(run["seed"])
    record = {"group": run["group"], "method": run["method"], "seed": run["seed"]}
    if run["method"] == "rm":
        out.parent.mkdir(parents=True, exist_ok=True)
        call([*run["command"], "--out", str(out), "--threads", "1", "--workers", "1", "--resume"], out.parent / "log.txt")
        accuracy = json.loads((out / "accuracy.json").read_text(encoding="utf-8"))
        return record | {"accuracy": accuracy}
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "eval", ignore_errors=True)  # of a run that was interrupted
    if "r2" not in (run["group"], run["method"]):
        return train_and_test(run, out)
    policies = []
    if run["group"] in ("r2", "rm_anew"):  # Table 1: SFT, middle, final policy
        trained = WORK / "main" / "none" / str(run["seed"]) / "train"
        policies = ["--policies", "out/sft", str(trained / "iteration_10"), str(trained / "last")]
    call([*run["command"], *policies, "--seed", str(run["seed"]), "--out", str(out / "r2"), "--threads", "1", "--workers", "1"],
         out / "log.txt")
    saved = json.loads((out / "r2" / "r2.json").read_text(encoding="utf-8"))
    return record | {"r2": dict(zip(("sft", "middle", "final"), saved["table"].values())),
                     "pair_accuracy": dict(zip(("sft", "middle", "final"), saved["pair_accuracy"].values()))}


def run_all(args):
    """Runs that are not in results.jsonl yet, `--jobs` at a time, until the budget is spent."""
    RESULTS.mkdir(exist_ok=True)
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    done, lock, started, failed = {key(record) for record in read_results()}, threading.Lock(), time.time(), []
    waiting = [run for run in plan() if key(run) not in done and (not args.only or run["group"] in args.only)
               and (not args.methods or run["method"] in args.methods)]

    def worker():
        while time.time() - started < args.budget_minutes * 60 and not failed:
            with lock:
                ready = next((run for run in waiting if run["needs"] is None or run["needs"] in done), None)
                if ready is None:
                    return
                waiting.remove(ready)
            begun = time.time()
            try:
                record = one(ready) | {"minutes": round((time.time() - begun) / 60, 2), "commit": commit}  # "": no repository
            except Exception as error:  # said now: the others may need long to come to their end
                print(f"tables.py: error: {ready['group']} {ready['method']} seed {ready['seed']}: {error}", file=sys.stderr, flush=True)
                failed.append(error)
                return
            with lock:
                with open(RESULTS / "results.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                done.add(key(ready))
                tested = record.get("test", {}).get("last", {}).get("greedy")
                print(f"{(time.time() - started) / 60:5.1f} min  {ready['group']} {ready['method']} seed {ready['seed']}"
                      + (f"  test pass@1 {tested:.3f}" if tested else "") + f"  ({len(waiting)} to go)", flush=True)

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for future in [pool.submit(worker) for _ in range(args.jobs)]:
            future.result()
    if failed:
        raise SystemExit(1)


# ---------------------------------------------------------------------------------------------------------------- tables


def interval(values):
    """Mean and half width of the 95% interval (Student's t over seeds); nan with fewer than two values."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()) if len(values) else math.nan, math.nan
    return float(values.mean()), float(scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))


def cell(values, percent=True, sign=False):
    mean, half = interval(values)
    if math.isnan(mean):
        return ""
    scale, digits = (100, 1) if percent else (1, 3)
    text = f"{mean * scale:+.{digits}f}" if sign else f"{mean * scale:.{digits}f}"
    return text + ("" if math.isnan(half) else f" ± {half * scale:.{digits}f}")


def markdown(head, rows):
    return "\n".join(["| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]]) + "\n"


def by_seed(records, group, method, value):
    """{seed: value(record)} of the runs of a method."""
    return {r["seed"]: value(r) for r in records if r["group"] == group and r["method"] == method}


def test(checkpoint, kind):
    return lambda record: record["test"][checkpoint][kind]


def paired(records, group, method, other, value):
    a, b = by_seed(records, group, method, value), by_seed(records, group, other, value)
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def methods_of(records, group):
    """Methods with a test result in a group, in the order of the plan."""
    there = {r["method"] for r in records if r["group"] == group and "cost" in r}
    return [m for m in dict.fromkeys(run["method"] for run in plan() if run["group"] == group) if m in there]


def table_1(records):
    if not any(r["group"] == "r2" for r in records):
        return "Not run yet.\n"
    rows = []
    for policy, group in (("sft", "r2"), ("middle", "r2"), ("final", "r2"), ("final", "rm_anew")):
        measured = [r for r in records if r["group"] == group and "r2" in r]
        label = policy + ", RM trained anew" * (group == "rm_anew")
        pairs = cell([r["pair_accuracy"][policy] for r in measured], percent=False)
        for name, what in (("r2", "pooled R²"), ("r2_within", "R² within prompts"), ("pass_rate", "pass rate")) if measured else ():
            values = [cell([r["r2"][policy][s][name]["mean"] for r in measured], percent=False) for s in ("none", "random2", "bon", "br", "bw")]
            rows.append([label, what, *values, pairs if name == "r2" else ""])
        if group == "r2":
            rows.append([label, "paper's R²", *(f"{x:.3f}" if x else "" for x in (PAPER_1[policy][0], None, *PAPER_1[policy][1:])), ""])
    anew = [r["accuracy"]["all pairs"] for r in records if r["group"] == "rm_anew" and r["method"] == "rm"]
    head = ["policy of PPO-M", "of what is kept", "none", "random2", "BoN", "BR", "BW", "pairs of a prompt in the right order"]
    return markdown(head, rows) + "".join(
        f"\nA reward model trained anew, on responses of the final policy of seed 0 (and from its weights), puts {a['accuracy']:.3f} of the "
        f"{a['pairs']} held-out pairs in the right order ({a['low']:.3f} to {a['high']:.3f}).\n" for a in anew)


def table_2(records):
    rows = [[f"`{start}`", "", f"{100 * greedy:.1f}", *[""] * 8, PAPER_2.get(start, "")] for start in STARTS
            for greedy in by_seed(records, "main", start, test("best", "greedy")).values()]
    for method in methods_of(records, "main"):
        values = [list(by_seed(records, "main", method, test(*what)).values()) for what in
                  (("best", "greedy"), ("last", "greedy"), ("last", "sampled"))]
        trained = by_seed(records, "main", method, lambda r: r["cost"]["policy_rows"])
        equal = [score for seed, score in by_seed(records, "main", method, test("equal", "greedy")).items()
                 if trained[seed] >= EQUAL_PASSES]
        rows.append([f"`{method}`", len(trained), *map(cell, values[:3]), f"{np.mean(list(trained.values())):,.0f}", cell(equal),
                     *(cell(paired(records, "main", method, other, test("last", kind)), sign=True) if method != other else ""
                       for kind in ("greedy", "sampled") for other in ("random2", "none")), PAPER_2.get(method, "")])
    return markdown(["method", "seeds", "greedy, best", "greedy, last", "sampled, last", "responses trained on",
                     f"greedy, after {EQUAL_PASSES:,}", "greedy, last − `random2`", "greedy, last − PPO-M", "sampled, last − `random2`",
                     "sampled, last − PPO-M", "paper: HumanEval / MBPP / LeetCode"], rows)


def correlation(strategies, measured, name, scores, seeds):
    """Spearman's rank correlation of an R2 and pass@1 over strategies, both means over seeds, and its bootstrap interval."""
    rng, draws = np.random.default_rng(0), []
    for resample in range(2001 if len(strategies) > 2 and seeds else 0):  # the first one takes everything as it is
        pick = rng.choice(seeds, len(seeds)) if resample else seeds  # one draw for all strategies: they share its prompts
        x = [np.mean([measured[seed][s][name]["mean"] for seed in pick]) for s in strategies]
        y = [np.mean([scores[s][seed] for seed in pick]) for s in strategies]
        draws.append(scipy.stats.spearmanr(x, y).statistic)
    if not draws:
        return ""
    low, high = np.percentile(draws[1:], [2.5, 97.5])
    return f"{draws[0]:+.2f}" + (f" ({low:+.2f} to {high:+.2f})" if len(seeds) > 2 else "")


def table_3(records):
    """Each strategy's R2 on the SFT policy beside its final pass@1, and the rank correlations with bootstrap intervals."""
    r2 = [r["r2"]["sft"] for r in records if r["group"] == "r2"]
    strategies = [m for m in methods_of(records, "main") if r2 and m in r2[0]]
    if len(strategies) < 4:
        return "Too few strategies are done.\n"
    scores = {kind: {s: by_seed(records, "main", s, test("last", kind)) for s in strategies} for kind in ("greedy", "sampled")}
    rows = [[f"`{s}`", *(f"{np.mean([t[s][k]['mean'] for t in r2]):.3f}" for k in ("r2", "r2_within")),
             *(cell(list(scores[kind][s].values())) for kind in scores), *(PAPER_3[s][::-1] if s in PAPER_3 else ("", ""))]
            for s in strategies]
    text = markdown(["strategy", "R², pooled", "R², within prompts", "greedy, last", "sampled, last", "paper: R²", "paper: HumanEval"],
                    rows) + "\n"
    measured = {r["seed"]: r["r2"]["sft"] for r in records if r["group"] == "r2"}
    seeds = sorted(set(measured).intersection(*scores["greedy"].values()))  # a mean over other seeds would be another comparison
    contrast = [s for s in strategies if s not in ("bon", "top")]  # those two keep high rewards only
    correlations = [[f"{len(some)}, {which}", kind, *(correlation(some, measured, name, scores[kind], seeds) for name in ("r2", "r2_within"))]
                    for some, which in ((strategies, "all"), (contrast, "without BoN and `top`, which keep high rewards only"))
                    for kind in scores]
    text += (f"Rank correlation (Spearman) of R² and pass@1 of the last iteration, seeds {', '.join(map(str, seeds))}, which all strategies have"
             + (" (95% interval over seeds)" if len(seeds) > 2 else "") + ":\n\n"
             + markdown(["strategies", "pass@1", "pooled R²", "R² within prompts"], correlations) + "\n")
    paper = [scipy.stats.spearmanr(*zip(*[row for s, row in PAPER_3.items() if s not in left_out])).statistic
             for left_out in ((), ("bon", "top"))]
    text += ("(The paper's tables differ from each other: R² of BR is .922 in its Table 1 and .841 in its Table 3; PPO-M has 80.2 in Table 2 "
             "and 80.8 in Table 3.)\n\n")
    return text + (f"In the paper's Table 3, of pooled R² and HumanEval over {len(PAPER_3)} strategies, one number each: {paper[0]:+.2f}, "
                   f"without BoN and `top` {paper[1]:+.2f}.\n")


def table_6(records):
    rows = []
    for method in methods_of(records, "main"):
        costs = [r["cost"] for r in records if r["group"] == "main" and r["method"] == method]
        rows.append([f"`{method}`", *(f"{np.mean([c.get(name, c['samples']) for c in costs]):,.0f}" for name in
                                      ("samples", "rm_passes", "policy_rows", "critic_rows", "seconds", "seconds_train"))])
    return markdown(["method", "samples", "RM passes", "policy trained on", "critic trained on", "seconds", "of these training"],
                    rows)


def settings(prefix):
    """{group: name} of the groups of a sweep."""
    return {run["group"]: run["group"].removeprefix(prefix) for run in plan() if run["group"].startswith(prefix)}


def filled(head, rows):
    """A table without the columns that are empty in every row."""
    kept = [k for k in range(len(head)) if any(row[k] != "" for row in rows)]
    return markdown([head[k] for k in kept], [[row[k] for k in kept] for row in rows])


def sweep_table(records, groups, label, methods, mean=True):
    """One row a setting of `groups` {group: name}, one column a filter: last greedy and sampled pass@1, and differences paired by seed.
    Only seeds that all filters of a row have, since a mean over others would be unfair. The last row is the mean of the others."""
    rows, scores = {"greedy": [], "sampled": []}, {"greedy": [], "sampled": []}
    columns = [*(NAMES.get(m, m) for m in methods), "BR − random2", "BW − random2", "BW − PPO-M"]

    def row(name, of_method, before):
        """of_method: {method: {seed: score}}."""
        seeds = sorted(set.intersection(*map(set, of_method.values())))
        values = {m: np.array([of_method[m][seed] for seed in seeds]) if m in of_method else np.array([]) for m in methods}
        pairs = (("br", "random2"), ("bw", "random2"), ("bw", "none"))
        return [name, len(seeds), *before, *map(cell, values.values()),
                *(cell(values[m] - values[other], sign=True) if m in of_method and other in of_method else "" for m, other in pairs)]

    for group, name in groups.items():
        done = [m for m in methods if m in methods_of(records, group)]
        if not done:
            continue
        extra = [r for r in records if r["group"] == group and r["method"] == "rm"]
        accuracy = f"{extra[0]['accuracy']['all pairs']['accuracy']:.3f}" if extra else ""
        r2 = [r["r2"]["sft"] for r in records if r["group"] == group and r["method"] == "r2"]
        measured = [f"{r2[0][m]['r2']['mean']:.2f} / {r2[0][m]['r2_within']['mean']:.2f}" if r2 else "" for m in methods]
        for kind in rows:
            scores[kind].append({m: by_seed(records, group, m, test("last", kind)) for m in done})
            rows[kind].append(row(name, scores[kind][-1], [accuracy, *measured] if kind == "greedy" else []))
    if not rows["greedy"]:
        return "Not run yet.\n"
    for kind, of_kind in scores.items():
        seeds = set.intersection(*(set(of_method) for of_group in of_kind for of_method in of_group.values()))
        if mean and seeds and len({tuple(of_group) for of_group in of_kind}) == 1:
            means = {m: {seed: np.mean([of_group[m][seed] for of_group in of_kind]) for seed in seeds} for m in of_kind[0]}
            rows[kind].append(row("mean", means, [""] * (1 + len(methods)) if kind == "greedy" else []))
    text = filled([label, "seeds", "RM accuracy", *(f"R² {name}" for name in columns[:len(methods)]), *columns], rows["greedy"])
    if "R²" in text:
        text = "R² of the SFT policy's responses, pooled / within prompts (seed 0); then greedy pass@1 of the last iteration:\n\n" + text
    return text + "\nSampled pass@1 of the same policies:\n\n" + filled([label, "seeds", *columns], rows["sampled"])


def prediction(records, prefix, label, methods):
    """Within each setting: does the R2 of the filters rank their final scores? Rank correlations, and their mean over settings."""
    rows = []
    for group, name in settings(prefix).items():
        r2 = [r["r2"]["sft"] for r in records if r["group"] == group and r["method"] == "r2"]
        scores = {kind: [by_seed(records, group, m, test("last", kind)) for m in methods] for kind in ("greedy", "sampled")}
        seeds = set.intersection(*map(set, scores["greedy"]))
        if r2 and seeds:
            rows.append([name, *(
                scipy.stats.spearmanr([r2[0][m][form]["mean"] for m in methods],
                                      [np.mean([of_method[seed] for seed in seeds]) for of_method in scores[kind]]).statistic
                for kind in scores for form in ("r2", "r2_within"))])
    if not rows:
        return ""
    rows.append(["mean", *np.mean([row[1:] for row in rows], 0)])
    return (f"\nRank correlation (Spearman) of R² on the SFT policy and final pass@1, over the {len(methods)} filters of a row:\n\n"
            + markdown([label, *(f"{kind}: {name}" for kind in ("greedy", "sampled") for name in ("pooled R²", "R² within prompts"))],
                       [[row[0], *(f"{x:+.2f}" for x in row[1:])] for row in rows]))


def plot_training(records, path, methods=FILTERS[:5]):  # in the colours of the figure of the profiles
    """Figure 2: reward and true pass rate of the rollouts over training, mean over seeds with their range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2))
    panels = (("rm_score", "reward (0: SFT policy, 1: its standard deviation)"), ("pass_rate", "share of the sampled responses that pass"),
              ("kl_per_response", "estimated KL from SFT, nats a response"))
    for axis, (name, label) in zip(axes, panels):
        for method in methods:
            runs = [[x for x in r["iterations"][name] if x is not None] for r in records
                    if r["group"] == "main" and r["method"] == method]
            if runs:
                steps = range(1, len(runs[0]) + 1)
                line, = axis.plot(steps, np.mean(runs, 0), linewidth=2, label=f"{NAMES.get(method, method)}, {len(runs)} seeds")
                axis.plot(steps, np.transpose(runs), color=line.get_color(), linewidth=0.4, alpha=0.4)
        axis.set(xlabel="iteration", ylabel=label)
        axis.grid(alpha=0.3)
    axes[2].legend(loc="upper left")
    figure.suptitle("Training (thick: mean over seeds, thin: a seed). All methods see the same prompts, hence the common zigzag; "
                    "in iterations 1 and 2 only the critic learns.")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_frontier(records, path):
    """True pass rate against KL from the reference, one line a filter through the points of the KL sweep; none of one point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    done = [group for group in KL_SWEEP if any(r["group"] == group and r["method"] in FILTERS for r in records)]
    if len(done) < 2:
        return
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharex=True)
    for axis, kind in zip(axes, ("greedy", "sampled")):
        for k, method in enumerate(FILTERS[:4]):  # colours as in the other figures
            runs = {group: by_seed(records, group, method, lambda r: (
                np.mean(r["iterations"]["kl_per_response"][-5:]), r["test"]["last"][kind])) for group in done}
            seeds = set.intersection(*(set(of_group) for of_group in runs.values()))  # a mean over others would be unfair
            for seed in seeds:
                axis.plot(*zip(*(of_group[seed] for of_group in runs.values())), ".", color=f"C{k}", alpha=0.4)
            if seeds:
                means = [np.mean([of_group[seed] for seed in seeds], 0) for of_group in runs.values()]
                axis.plot(*zip(*means), "o-", color=f"C{k}", label=NAMES.get(method, method))  # in order of the coefficient
        for value in by_seed(records, "main", "sft", test("best", kind)).values():
            axis.axhline(value, color="gray", linestyle="--", label="SFT")
        axis.set(xlabel="KL from the SFT policy, last five iterations, nats a response", ylabel=f"{kind} pass@1, test, last iteration",
                 xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"Points along a line: KL coefficient {', '.join(KL_SWEEP[group] for group in done)}. Small dots: seeds.")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_profiles(records, path):
    """The controlled experiment: pass@1 of each filter (a point a seed, a bar at the mean) under each profile."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = [group for group in (f"profile_{profile}_{noise}" for profile, noise in PROFILES) if methods_of(records, group)]
    if not groups:
        return
    figure, axes = plt.subplots(2, 1, figsize=(1.9 * len(groups) + 2, 8), sharex=True)
    for axis, kind in zip(axes, ("greedy", "sampled")):
        for k, method in enumerate(FILTERS[:5]):
            for at, group in enumerate(groups):
                values = list(by_seed(records, group, method, test("last", kind)).values())
                if values:
                    x = at + (k - 2) * 0.16
                    axis.plot([x] * len(values), values, ".", color=f"C{k}", alpha=0.6)
                    axis.plot([x - 0.06, x + 0.06], [np.mean(values)] * 2, color=f"C{k}", linewidth=3)
            axis.plot([], [], color=f"C{k}", linewidth=3, label=NAMES.get(method, method))
        for value in by_seed(records, "main", "sft", test("best", kind)).values():
            axis.axhline(value, color="gray", linestyle="--", label="SFT")
        axis.set(ylabel=f"{kind} pass@1, test, after 15 iterations")
        axis.grid(alpha=0.3, axis="y")
    names = {"clean": "nowhere", "moderate": "moderate*", "high": "high*", "low": "low*", "everywhere": "everywhere*",
             "middle_ranks": "middle ranks\nof a prompt"}
    axis.set_xticks(range(len(groups)), [names[p] if n == "hash" else f"{names[p].rstrip('*')}\nby {n}" for p, n in PROFILES
                                         if f"profile_{p}_{n}" in groups])
    axis.set(xlabel="which rewards are wrong (*: pairs in the right order equally often, 0.75)")
    axes[0].set(title="Dots: seeds; bars: their mean")
    axes[0].legend(ncols=6, loc="upper center", bbox_to_anchor=(0.5, 1.22), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(records):
    """Tables and figures from results.jsonl alone."""
    parts = ["# Tables\n", "Written by `python tools/tables.py show` from results.jsonl. pass@1 in percent on the 500 test problems of "
             "the tiny set; ± is the half width of a 95% interval over seeds (Student's t). What they mean: README.md here.\n"]
    for title, text in (
            ("Table 1: R² of the filters (of ten responses) for SFT, middle (iteration 10) and final policy of PPO-M", table_1(records)),
            ("Table 2: all methods at equal numbers of generated samples", NOTE_2 + table_2(records)),
            ("Table 3: does R² on the SFT policy predict the result of training?", table_3(records)),
            ("Table 4: the reward's reliability set by hand (15 iterations)", sweep_table(records, settings("profile_"), "profile", FILTERS[:5])
             + prediction(records, "profile_", "profile", FILTERS[:5])),
            ("Table 5: KL coefficient", sweep_table(records, KL_SWEEP, "coefficient", FILTERS[:4], mean=False)),
            ("Table 6: what a run costs (seconds depend on what ran beside it, up to fourfold: compare the counts)", table_6(records)),
            ("Table 7: quality of the reward model (15 iterations)", sweep_table(records, settings("rm_"), "reward model", FILTERS[:4])
             + prediction(records, "rm_", "reward model", FILTERS[:4]))):
        parts += [f"## {title}\n", text]
    (RESULTS / "tables.md").write_text("\n".join(parts), encoding="utf-8")
    plot_training(records, RESULTS / "training.png")
    plot_frontier(records, RESULTS / "frontier.png")
    plot_profiles(records, RESULTS / "profiles.png")
    print("\n".join(parts))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "show", "list"))
    parser.add_argument("--budget_minutes", type=float, default=60, help="run: start nothing after so many minutes")
    parser.add_argument("--jobs", type=int, default=2, help="run: training runs at a time, one thread each")
    parser.add_argument("--only", nargs="+", help="run: these groups only")
    parser.add_argument("--methods", nargs="+", help="run: these methods only")
    args = parser.parse_args()
    records = read_results()
    if args.action == "run":
        run_all(args)
    elif args.action == "list":
        done = {key(record) for record in records}
        for run in plan():
            print("done " if key(run) in done else "     ", *key(run), " ".join(run["command"] or ["05_eval.py"]))
    elif not records:
        print("tables.py: error: results/results.jsonl is empty; `python tools/tables.py run` first", file=sys.stderr)
        raise SystemExit(2)
    else:
        show(records)


if __name__ == "__main__":
    main()
