"""The tables of results/: every method, several seeds, one results file.

A *pipeline* is everything of one seed: data, SFT policy, reward model, R2 and PPO runs. Intervals
over whole pipelines hold the variance of all stages. Intervals over seeds of pipeline 0 hold that
of reinforcement learning alone. Methods of a seed see the same prompts in the same order (PPO-S and
PLUM, which take more and fewer prompts, do not), so differences are paired by seed.

    python tools/tables.py list       all runs in order of worth, with their commands
    python tools/tables.py run        adds to results/results.jsonl, goes on where it stopped
    python tools/tables.py show       results/tables.md and its figures, from results.jsonl alone

A run is one or more numbered scripts as subprocesses, with their defaults but for the flags that
`list` shows. Models and logs are in out/tables, data in data/tables.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sandbox  # noqa: E402

RESULTS = Path("results/results.jsonl")  # all paths start in the working folder
SEEDS = range(5)
SWEEPS = 5  # the pipeline of the controlled experiment and of the sweeps
FILTERS = ["none", "random2", "br", "bw", "bon"]
OTHER_FILTERS = ["single", "top", "top_random", "top_bottom", "pow_1", "pow_2", "pow_3"]
BASELINES = ["raft", "bond", "dpo", "ipo", "kto", "iterative_dpo"]
CRITIC_FREE = ["grpo_none", "grpo_random2", "grpo_bw"]
PLUM = ["plum_dpo", "plum_kto", "plum_online_dpo"]
# Where the reward errs: as the paper has it (at random, or by a rule that can be learned), or not
PROFILES = ["moderate", "moderate_length", "high", "everywhere"]
KL_COEFS = ["0.1", "0.03"]  # beside the default of 0.3; with less the policy runs away
RMS = {
    "pairs_50": ["--max_pairs", "50", "--epochs", "20"],
    "noise_0.2": ["--label_noise", "0.2"],
}
# Iterations whose rollouts show R2 along training. In the first three only the critic has learned.
ALONG = {"SFT": (1, 2, 3), "middle": (7, 8, 9), "final": (13, 14, 15)}

# Where filters are compared, {table: [(setting, group of runs, prefix of the methods)]}.
SETTINGS = {
    "reward and advantage": [
        ("RM, gae", "main", ""),
        ("RM, grpo", "main", "grpo_"),
        ("tests, gae", "tests", ""),
        ("tests, grpo", "tests", "grpo_"),
    ],
    "errors of the reward": [(f"errors: {p}", f"profile_{p}", "") for p in PROFILES],
    "KL coefficient": [("KL 0.3", "main", "")] + [(f"KL {c}", f"kl_{c}", "") for c in KL_COEFS],
    "reward model": [("RM: all pairs", "main", "")] + [(f"RM: {r}", f"rm_{r}", "") for r in RMS],
}

# arXiv 2409.06957v5. Table 1: R2 of none, bon, br, bw. The others, by method: pass@1 in Table 2
# (HumanEval / MBPP / LeetCode); HumanEval and R2 in Table 3.
PAPER_1 = {
    "SFT": (0.886, 0.454, 0.922, 0.952),
    "middle": (0.907, 0.389, 0.935, 0.956),
    "final": (0.876, 0.431, 0.916, 0.946),
}
PAPER = {
    "sft": ("74.2 / 70.8 / 15.2", None, None),
    "none": ("80.2 / 75.0 / 29.8", 80.8, 0.886),
    "bon": ("75.8 / 71.7 / 16.8", 75.8, 0.454),
    "br": ("82.9 / 75.9 / 33.0", 82.9, 0.841),
    "bw": ("82.4 / 76.2 / 30.4", 82.4, 0.952),
    "single": ("78.1 / 73.8 / 25.2", 78.1, 0.782),
    "top": ("", 80.5, 0.621),
    "top_random": ("", 81.9, 0.889),
    "top_bottom": ("", 81.7, 0.927),
    "pow_1": ("", 81.0, 0.926),
    "pow_2": ("", 81.3, 0.939),
    "pow_3": ("", 81.9, 0.946),
    "raft": ("76.9 / 71.3 / 17.8", None, None),
    "bond": ("80.8 / 75.2 / 30.0", None, None),
    "dpo": ("78.4 / 73.7 / 23.0", None, None),
    "ipo": ("78.2 / 72.9 / 23.2", None, None),
    "kto": ("77.9 / 72.5 / 22.4", None, None),
    "iterative_dpo": ("78.1 / 74.8 / 23.8", None, None),
}


@dataclass
class Config:
    action: tyro.conf.Positional[Literal["list", "run", "show"]]  # what to do
    budget_minutes: float = 60  # run: start nothing after so many minutes
    jobs: int = 2  # run: runs at a time, with one thread each
    only: str = ""  # list and run: runs whose name contains this, such as main/0/bw


# -------------------------------------------------------------------------------------- the runs


def plan():
    """All runs in order of worth, each as `make_run` describes it."""
    runs = []
    for s in SEEDS:  # whole pipelines
        runs += [data_run(s), sft_run(s), rm_run("main", s)]
        runs += [training("main", method, s, pipeline=s) for method in FILTERS]
    runs += [training("main", method, seed) for seed in SEEDS[1:] for method in FILTERS]
    tested = ["none", "random2", "bw", *CRITIC_FREE]
    runs += [training("tests", m, seed, "--reward", "tests") for seed in SEEDS[:3] for m in tested]

    sft = "main/0/sft/0"  # learns to write tests, too
    command = ["01_sft.py", "--model", f"out/tables/{sft}", "--data", "{data}/plum.jsonl"]
    command += ["--out", "{out}", "--epochs", "2", "--lr", "1e-3", "--threads", "1", "--resume"]
    evaluation = [*EVALUATION, "--policies", "{out}"]
    runs.append(make_run("main", "plum_sft", 0, 0, sft, command, evaluation))
    others = [*OTHER_FILTERS, *BASELINES, *CRITIC_FREE, *PLUM]
    runs += [training("main", method, seed) for seed in SEEDS for method in others]

    # What the reward and its errors do: on a pipeline of its own, for which no other is needed.
    runs += [data_run(SWEEPS), sft_run(SWEEPS), rm_run("main", SWEEPS)]
    runs += [profile_run(profile) for profile in PROFILES]
    runs += [rm_run(f"rm_{rm}", SWEEPS, *flags) for rm, flags in RMS.items()]
    groups = {f"profile_{p}": ["--profile", p] for p in PROFILES} | {"main": []}
    groups |= {f"kl_{c}": ["--kl_coef", c] for c in KL_COEFS} | {f"rm_{r}": [] for r in RMS}
    for seed in SEEDS[:3]:
        for m in FILTERS[1:4]:
            for group, flags in groups.items():
                rm = f"{group if group[:3] == 'rm_' else 'main'}/{SWEEPS}/rm/{SWEEPS}"
                runs.append(training(group, m, seed, *flags, pipeline=SWEEPS, rm=rm))
    return runs


def make_run(group, method, pipeline, seed, needs, *commands):
    """A run: what it is, the name of a run that it needs (or None), and its commands.

    `{out}` in a command is the run's folder, `{data}` its pipeline's data.
    """
    name = f"{group}/{pipeline}/{method}/{seed}"
    places = {"out": f"out/tables/{name}", "data": f"data/tables/{pipeline}"}
    commands = [[word.format(**places) for word in (*c, "--seed", str(seed))] for c in commands]
    run = {"name": name, "group": group, "method": method, "pipeline": pipeline, "seed": seed}
    return run | {"needs": needs, "commands": commands}


ONE_CORE = ("--threads", "1", "--workers", "1")
EVALUATION = ("05_eval.py", "--problems", "{data}/test.jsonl", "--samples", "4", "--ks", "1", "4")
EVALUATION += ("--out", "{out}/eval", *ONE_CORE)
R2 = ("03_r2_analysis.py", "--out", "{out}/r2")


def data_run(s):
    return make_run("main", "data", s, s, None, ["00_data.py", "--out", "{data}"])


def sft_run(s):
    command = ["01_sft.py", "--data", "{data}/sft.jsonl", "--out", "{out}", "--threads", "1"]
    evaluation = [*EVALUATION, "--policies", "{out}"]
    return make_run("main", "sft", s, s, f"main/{s}/data/{s}", [*command, "--resume"], evaluation)


def rm_run(group, pipeline, *flags):
    """A reward model, and R2 of the SFT policy."""
    sft = f"main/{pipeline}/sft/{pipeline}"
    command = ["02_reward_model.py", *flags, "--policy", f"out/tables/{sft}", "--resume"]
    command += ["--data", "{data}/rm.jsonl", "--validation", "{data}/validation.jsonl"]
    command += ["--out", "{out}", *ONE_CORE]
    r2 = [*R2, "--samples", "{out}/validation_samples.jsonl"]
    return make_run(group, "rm", pipeline, pipeline, sft, command, r2)


def profile_run(profile):
    """R2 of the SFT policy with a reward of known reliability."""
    needs = f"main/{SWEEPS}/rm/{SWEEPS}"
    rm = f"out/tables/{needs}"
    command = ["tools/controlled.py", "--profile", profile, "--samples", f"{rm}/samples.jsonl"]
    command += ["--rescore", f"{rm}/validation_samples.jsonl", "--out", "{out}/samples.jsonl"]
    r2 = [*R2, "--samples", "{out}/samples.jsonl"]
    return make_run(f"profile_{profile}", "r2", SWEEPS, SWEEPS, needs, command, r2)


def training(group, method, seed, *flags, pipeline=0, rm=None):
    """A training run, the evaluation of its last policy and, for a filter, R2 of its rollouts."""
    policy = f"main/{pipeline}/sft/{pipeline}"
    rm = needs = rm or f"main/{pipeline}/rm/{pipeline}"
    if method in PLUM:
        online = ["--online"] if "online" in method else []
        command = ["07_plum.py", "--loss", method.split("_")[-1], *online]
        policy = needs = "main/0/plum_sft/0"
    elif method in BASELINES:
        command = ["06_baselines.py", "--method", method, "--reward_model", f"out/tables/{rm}"]
    else:
        advantage, strategy = ("grpo", method[5:]) if method in CRITIC_FREE else ("gae", method)
        command = ["04_pf_ppo.py"]
        if "--profile" in flags:
            command = ["tools/controlled.py", "--samples", f"out/tables/{rm}/samples.jsonl"]
        command += ["--strategy", strategy, "--advantage", advantage, "--resume"]
        command += ["--reward_model", f"out/tables/{rm}"]
    command += [*flags, "--policy", f"out/tables/{policy}"]
    command += ["--data", "{data}/ppo.jsonl", "--validation", "{data}/validation.jsonl"]
    command += ["--out", "{out}", "--eval_every", "15", *ONE_CORE]  # the last policy is evaluated
    commands = [command, [*EVALUATION, "--policies", "{out}/last"]]
    if group == "main" and method in FILTERS:
        files = [f"{{out}}/rollouts/{i:04d}.jsonl" for part in ALONG.values() for i in part]
        commands.append([*R2, "--resamples", "1", "--samples", *files])
    return make_run(group, method, pipeline, seed, needs, *commands)


# --------------------------------------------------------------------------------------- running


def read_results():
    return sandbox.read_jsonl(RESULTS, {}) if RESULTS.is_file() else []


def call(command, log):
    """A script of this project as a subprocess; its output goes to `log`."""
    out = Path(command[command.index("--out") + 1])
    # What an interrupted script left and cannot resume.
    if out.is_dir() and not any((out / f).is_file() for f in ("stage_config.json", "state.pt")):
        shutil.rmtree(out)
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    with open(log, "a", encoding="utf-8") as file:
        command = [sys.executable, str(ROOT / command[0]), *command[1:]]
        code = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
    if code:
        raise RuntimeError(f"exit code {code}; see {log}")


def carry_out(run):
    """Call the commands of a run -> its record."""
    out = Path(f"out/tables/{run['name']}")
    out.parent.mkdir(parents=True, exist_ok=True)
    for command in run["commands"]:
        call(command, f"{out}.log")
    record = {name: run[name] for name in ("name", "group", "method", "pipeline", "seed")}
    record |= summary(out)
    shutil.rmtree(out / "best", ignore_errors=True)  # tens of MB per run that nothing reads
    return record


def summary(out):
    """What the scripts of a run wrote -> the fields of its record."""
    record = {}
    if (out / "eval").is_dir():
        row = json.loads((out / "eval/results.json").read_text(encoding="utf-8"))[0]
        record["test"] = {"greedy": row["greedy pass@1"]["mean"], "sampled": row["pass@1"]["mean"]}
    if (out / "r2").is_dir():  # one entry per policy: SFT, or the iterations of ALONG
        report = json.loads((out / "r2/r2.json").read_text(encoding="utf-8"))
        record["r2"] = [
            {
                "pair_accuracy": policy["pair_accuracy"]["value"],
                "pooled": {s: row["r2"]["value"] for s, row in policy["strategies"].items()},
                "within": {s: row["r2_within"]["value"] for s, row in policy["strategies"].items()},
                "pass_rate": {s: row["pass_rate"] for s, row in policy["strategies"].items()},
            }
            for policy in report["policies"]
        ]
    if (out / "rollouts").is_dir():
        lines = sandbox.read_jsonl(out / "metrics.jsonl", {"iteration": int})
        record["cost"] = {
            "samples": sum(line["seen"] + line.get("test_responses", 0) for line in lines[1:]),
            "rm_passes": sum(line["seen"] for line in lines if line.get("rm_score") is not None),
            "policy_rows": sum(line["kept"] for line in lines if "policy_loss" in line),
            "critic_rows": sum(line["kept"] for line in lines if "critic_loss" in line),
        }
        names = ("score", "pass_rate", "kl_per_response", "validation_pass_at_1")
        record["curves"] = {name: [line.get(name) for line in lines] for name in names}
    return record


def to_do(recorded, only=""):
    """The runs that are not recorded, in order, and those that they need and whose files are gone.

    The files are not in the repository, so in a fresh clone recorded runs are made again for them.
    """
    runs = {run["name"]: run for run in plan()}
    wanted = {name for name in runs if name not in recorded and only in name}
    for name in list(wanted):
        while name := runs[name]["needs"]:
            command = runs[name]["commands"][0]
            if not Path(command[command.index("--out") + 1]).exists():
                wanted.add(name)
    return [run for name, run in runs.items() if name in wanted]


def compare(record, recorded):
    """Refuse a run that was made again and came out otherwise: on another processor it may.

    Runs that start from its models could not be compared with the recorded ones.
    """
    parts = ("test", "r2")
    if recorded and [record.get(p) for p in parts] != [recorded.get(p) for p in parts]:
        raise RuntimeError(
            f"it differs from its record in {RESULTS}; delete all records of its pipeline"
        )


def run_all(cfg):
    """What is to do, `--jobs` runs at a time, until the budget is spent.

    A run that fails is named, and what needs it waits for the next call.
    """
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    recorded = {record["name"]: record for record in read_results()}
    waiting = to_do(recorded, cfg.only)
    done = recorded.keys() - {run["name"] for run in waiting}
    RESULTS.parent.mkdir(exist_ok=True)
    lock, started, running, failed = threading.Lock(), time.time(), set(), []

    def worker():
        while time.time() - started < 60 * cfg.budget_minutes:
            with lock:
                ready = [run for run in waiting if run["needs"] is None or run["needs"] in done]
                if not ready and not running:
                    return
                for run in ready[:1]:
                    waiting.remove(run)
                    running.add(run["name"])
            if not ready:  # what the others run now may be what the rest needs
                time.sleep(1)
                continue
            try:
                record = carry_out(run) | {"commit": commit}
                compare(record, recorded.get(run["name"]))
                if run["name"] not in recorded:
                    with lock, open(RESULTS, "ab", buffering=0) as file:
                        file.write(f"{json.dumps(record)}\n".encode())  # at once: no torn line
                done.add(run["name"])
                minutes, test = (time.time() - started) / 60, record.get("test", "")
                print(f"{minutes:5.1f} min  {run['name']} {test} {len(waiting)} to go", flush=True)
            except Exception as error:  # a fault of one run is not the others'
                failed.append(run["name"])
                print(f"tables.py: error: {run['name']}: {error}", file=sys.stderr, flush=True)
            finally:
                running.remove(run["name"])

    with ThreadPoolExecutor(cfg.jobs) as pool:
        workers = [pool.submit(worker) for _ in range(cfg.jobs)]
        try:
            for future in workers:
                future.result()
        finally:
            waiting.clear()  # after Ctrl-C, which ends the scripts, too, nothing starts
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


# ------------------------------------------------------------------------------------ statistics

# Student's t, 1 to 9 degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values):
    """Mean and half width of the 95% interval (Student's t), nan where there are too few values."""
    n = len(values)
    half = T_975[n - 2] * np.std(values, ddof=1) / n**0.5 if n > 1 else np.nan
    return (float(np.mean(values)) if n else np.nan), float(half)


def cell(values, scale=100, digits=1, sign=""):
    mean, half = interval(values)
    text = "" if np.isnan(mean) else f"{scale * mean:{sign}.{digits}f}"
    return text if np.isnan(half) else f"{text} ± {scale * half:.{digits}f}"


def spearman(x, y):
    """Rank correlation; ties share their mean rank. nan where one is nan or all are equal."""
    ranks = []
    for values in (np.asarray(x, float), np.asarray(y, float)):
        below = (values[:, None] > values).sum(1)
        ranks.append(below + ((values[:, None] == values).sum(1) - 1) / 2)
    if min(map(np.ptp, ranks)) == 0 or np.isnan([*x, *y]).any():
        return np.nan
    return float(np.corrcoef(ranks)[0, 1])


def select(records, group, method):
    """{seed: record} of a method, of records of whole pipelines or of pipeline 0 alone."""
    key = group, method
    return {r["seed"]: r for r in records if (r["group"], r["method"]) == key}


def shared(records, group, prefix, kind, methods=FILTERS):
    """{method: array of pass@1} of those that have run, over the seeds that all of them have.

    Means over other seeds would be unfair. The records' methods have a prefix: grpo_bw is bw.
    pass@1 is that of the last iteration on the test problems; kind: greedy or sampled.
    """
    runs = {m: select(records, group, prefix + m) for m in methods}
    runs = {m: of_seed for m, of_seed in runs.items() if of_seed}
    seeds = sorted(set.intersection(*map(set, runs.values()))) if runs else []
    return {m: np.array([of_seed[s]["test"][kind] for s in seeds]) for m, of_seed in runs.items()}


def difference(scores, method, other):
    """Of two methods, paired by seed; empty where one of them has not run."""
    there = method != other and {method, other} <= scores.keys()
    return scores[method] - scores[other] if there else []


# ---------------------------------------------------------------------------------------- tables

KINDS = ("greedy", "sampled")
VIEWS = ("pooled", "within")
PAIRS = (("br", "random2"), ("bw", "random2"), ("bw", "none"))
CORRELATED = [f"Spearman, {view} R² and {kind}" for kind in KINDS for view in VIEWS]


def markdown(head, rows):
    """A table, without the columns that are empty in all rows."""
    columns = [column for column in zip(head, *rows) if any(map(str, column[1:]))]
    head, *rows = zip(*columns)
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def comparison(settings):
    """Filters in each setting, their differences paired by seed.

    Args: settings: list of (label, records, group, prefix).
    """
    head = ["setting", "pass@1", "seeds", *FILTERS, *(f"{a} − {b}" for a, b in PAIRS)]
    rows = []
    for label, *setting in settings:
        for kind in KINDS:
            scores = shared(*setting, kind)
            if scores:
                cells = [cell(scores.get(m, [])) for m in FILTERS]
                cells += [cell(difference(scores, *pair), sign="+") for pair in PAIRS]
                rows.append([label, kind, len(next(iter(scores.values()))), *cells])
    return markdown(head, rows)


def rollout_table(settings):
    """What the last three iterations' rollouts are like, mean over seeds."""
    names = ("score", "pass_rate", "kl_per_response")
    rows = []
    for label, records, group, prefix in settings:
        cells = []
        for m in FILTERS:
            runs = select(records, group, prefix + m).values()
            curves = [run["curves"] for run in runs if "curves" in run]
            means = [np.mean([c[name][-3:] for c in curves]) for name in names if curves]
            cells.append(" / ".join(f"{mean:.2f}" for mean in means))
        rows.append([label, *cells])
    return markdown(["score / pass rate / KL at the end", *FILTERS], rows)


def predictions(settings, methods=FILTERS):
    """(label, pair accuracy, R2 of the SFT policy {view: {filter}}, mean pass@1 {kind: {filter}})
    of each setting, for the filters that have run.
    """
    for label, records, group, prefix in settings:
        scores = {kind: shared(records, group, prefix, kind, methods) for kind in KINDS}
        means = {kind: {m: v.mean() for m, v in of.items()} for kind, of in scores.items()}
        measured = [r["r2"][0] for m in ("rm", "r2") for r in select(records, group, m).values()]
        if measured and means["greedy"]:
            r2 = {v: {m: number(measured[0][v][m]) for m in means["greedy"]} for v in VIEWS}
            yield label, measured[0]["pair_accuracy"], r2, means


def correlations(r2, means, methods):
    """Did R2 rank what training gave? For greedy and sampled pass@1, pooled R2 and R2 within."""
    pairs = [(r2[view], means[kind]) for kind in KINDS for view in VIEWS]
    return [spearman([a[m] for m in methods], [b[m] for m in methods]) for a, b in pairs]


def prediction_table(settings):
    """R2 of each filter before training, and whether it ranked what training gave."""
    head = ["setting", "pairs in order", *(f"R² {m}, pooled / within" for m in FILTERS)]
    rows, columns, without, measured = [], [], [], []
    for label, accuracy, r2, means in predictions(settings):
        pairs = {m: f"{x:.2f} / {r2['within'][m]:.2f}" for m, x in r2["pooled"].items()}
        rows.append([label, f"{accuracy:.3f}", *(pairs.get(m, "") for m in FILTERS)])
        if len(pairs) == len(FILTERS):  # ranks of three say nothing
            measured.append(r2)
            columns.append(correlations(r2, means, FILTERS))
            without.append(correlations(r2, means, [m for m in FILTERS if m != "bon"]))
            rows[-1] += [f"{x:+.2f}" for x in columns[-1]]
    if not measured:
        return markdown(head, rows)
    cells = []
    for m in FILTERS:
        values = [[r2[view][m] for r2 in measured] for view in VIEWS]
        cells.append(" / ".join(cell(of_view, 1, 2) for of_view in values))
    rows.append(["mean", "", *cells, *(cell(column, 1, 2, "+") for column in zip(*columns))])
    overall = [cell(column, 1, 2, "+") for column in zip(*without)]
    rows.append(["mean without bon", *[""] * 6, *overall])
    return markdown([*head, *CORRELATED], rows)


def number(value):
    """R2 is null in JSON where it is not defined."""
    return np.nan if value is None else value


def table_1(records):
    """R2 along training: what each filter would be worth on the rollouts of a run."""
    filters = ("none", "bon", "br", "bw")
    head = ["trained with", "policy", *(f"R² {m}, {view}" for view in VIEWS for m in filters)]
    head += ["pairs in order", "pass rate", "of the best", "of best and worst"]
    rows = []
    for method in FILTERS:
        runs = list(select(records, "main", method).values())
        for k, policy in enumerate(ALONG if runs else ()):
            if policy == "SFT" and method != "none":  # the same responses as above
                continue
            columns = []  # (runs,) each, the mean over the iterations of ALONG
            parts = [run["r2"][3 * k : 3 * k + 3] for run in runs]
            for view, m in [(view, m) for view in VIEWS for m in filters]:
                columns.append([np.nanmean([number(p[view][m]) for p in part]) for part in parts])
            columns.append([np.mean([p["pair_accuracy"] for p in part]) for part in parts])
            for m in ("none", "bon", "bw"):
                columns.append([np.mean([p["pass_rate"][m] for p in part]) for part in parts])
            rows.append([f"`{method}`", policy, *(cell(column, 1, 3) for column in columns)])
    for policy, values in PAPER_1.items():
        rows.append(["paper's PPO-M", policy, *(f"{value:.3f}" for value in values), *[""] * 8])
    return markdown(head, rows)


def method_table(records):
    """All methods, after the last iteration, and what they cost."""
    costs = ("samples", "rm_passes", "policy_rows", "critic_rows")
    pairs = [(kind, other) for kind in KINDS for other in ("random2", "none")]
    head = ["method", "seeds", *KINDS, *(f"{kind} − `{other}`" for kind, other in pairs)]
    head += ["samples", "RM passes", "policy trained on", "critic trained on"]
    rows = []
    for method in dict.fromkeys(run["method"] for run in plan() if run["group"] == "main"):
        runs = [r for r in select(records, "main", method).values() if "test" in r]
        if runs:
            cells = [cell([run["test"][kind] for run in runs]) for kind in KINDS]
            for kind, other in pairs:
                scores = shared(records, "main", "", kind, [method, other])
                cells.append(cell(difference(scores, method, other), sign="+"))
            of_runs = [run.get("cost", dict.fromkeys(costs, 0)) for run in runs]
            cells += [f"{np.mean([cost[name] for cost in of_runs]):,.0f}" for name in costs]
            rows.append([f"`{method}`", len(runs), *cells, PAPER.get(method, [""])[0]])
    return markdown([*head, "paper: HumanEval / MBPP / LeetCode"], rows)


def table_3(records):
    """R2 of the SFT policy and the result of training, by filter."""
    methods = [s for s in (*FILTERS, *OTHER_FILTERS) if s != "single"]  # which filters nothing
    scores = {kind: shared(records, "main", "", kind, methods) for kind in KINDS}
    rows, ranked = [], []
    for _, _, r2, means in predictions([("", records, "main", "")], methods):
        for m in r2["pooled"]:
            cells = [f"{r2[view][m]:.3f}" for view in VIEWS] + [cell(scores[k][m]) for k in KINDS]
            rows.append([f"`{m}`", *cells, *(PAPER[m][1:] if m in PAPER else ["", ""])])
        for label, left_out in (("all filters", ()), ("without bon and top", ("bon", "top"))):
            some = [m for m in r2["pooled"] if m not in left_out]
            paper = spearman(*zip(*(PAPER[m][1:] for m in some if m in PAPER)))
            ranked.append([label, *(f"{x:+.2f}" for x in (*correlations(r2, means, some), paper))])
    head = ["filter", "R² pooled", "R² within", *KINDS, "paper's HumanEval", "paper's R²"]
    ranks = markdown(["", *CORRELATED, "paper's Table 3"], ranked)
    return f"{markdown(head, rows)}\n{ranks}"


# --------------------------------------------------------------------------------------- figures


def plot_predictions(tables, path):
    """Does R2 predict which filter wins? pass@1 less its mean in the setting, against R2."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for axis, view in zip(figure.subplots(1, 2, sharey=True), VIEWS):
        for marker, (name, settings) in zip("o^s", tables.items()):
            for _, _, r2, means in predictions(settings):
                mean = np.mean(list(means["greedy"].values()))
                for method, score in means["greedy"].items():
                    style = {"color": f"C{FILTERS.index(method)}", "marker": marker, "alpha": 0.7}
                    axis.scatter(r2[view][method], 100 * (score - mean), **style)
            axis.scatter([], [], color="gray", marker=marker, label=name)
        for k, method in enumerate(FILTERS):
            axis.scatter([], [], color=f"C{k}", label=method)
        axis.set(xlabel=f"R² of the filter on the SFT policy, {view}")
        axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.axes[0].set_ylabel("greedy pass@1 less the mean of the setting, points")
    figure.savefig(path, dpi=110)


def plot_filters(settings, path):
    """Does filtering beat as many responses at random? Differences to random2, by setting."""
    settings = [s for s in settings if shared(*s[1:], "greedy")]
    settings = [s for k, s in enumerate(settings) if s[1:] not in [t[1:] for t in settings[:k]]]
    figure = Figure(figsize=(12, 1.5 + 0.5 * len(settings)), layout="constrained")
    for axis, kind in zip(figure.subplots(1, 2, sharey=True), KINDS):
        for k, method in enumerate(("br", "bw")):
            style = {"fmt": "o", "color": f"C{FILTERS.index(method)}"}
            for place, (_, *setting) in enumerate(settings):
                points = 100 * np.asarray(difference(shared(*setting, kind), method, "random2"))
                mean, half = interval(points)
                y = place + 0.3 * k - 0.15
                axis.errorbar(mean, y, xerr=np.nan_to_num(half), **style)
                axis.plot(points, [y] * len(points), ".", color=style["color"], alpha=0.5)
            axis.errorbar([], [], xerr=[], label=f"{method} − random2", **style)
        axis.axvline(0, color="gray", linewidth=1)
        axis.set(xlabel=f"{kind} pass@1, points; 95% interval and seeds")
        axis.grid(alpha=0.3, axis="x")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.axes[0].set_yticks(range(len(settings)), [label for label, *_ in settings])
    figure.axes[0].set_ylim(len(settings) - 0.5, -0.5)
    figure.savefig(path, dpi=110)


def show(records):
    """Write tables.md and the two figures beside results.jsonl."""
    everywhere = ("sft", "rm", *FILTERS)  # the others have run on pipeline 0 alone
    whole = [r for r in records if r["pipeline"] == r["seed"] and r["method"] in everywhere]
    whole = [r for r in whole if r["seed"] in SEEDS]
    first = [r for r in records if r["pipeline"] == 0]
    sweeps = [r for r in records if r["pipeline"] == SWEEPS]
    pipelines = [(f"pipeline {s}", [r for r in whole if r["seed"] == s], "main", "") for s in SEEDS]
    settings = {}
    for table, rows in SETTINGS.items():
        of_table = first if table == "reward and advantage" else sweeps
        rows = [(label, of_table, group, prefix) for label, group, prefix in rows]
        rows = [row for row in rows if shared(*row[1:], "greedy")]
        if len(rows) > 1:  # something has run beside the default
            settings[table] = rows
    predicted = {"whole pipelines": pipelines}  # the settings with an R2 of their own
    predicted |= {t: settings[t] for t in ("errors of the reward", "reward model") if t in settings}

    parts = {"Whole pipelines": f"{method_table(whole)}\n{prediction_table(pipelines)}"}
    for name, rows in settings.items():
        parts[f"By {name}"] = f"{comparison(rows)}\n{rollout_table(rows)}"
        if name in predicted:
            parts[f"By {name}"] += f"\n{prediction_table(rows)}"
    parts["Table 1: R² along training, whole pipelines, three iterations each"] = table_1(whole)
    parts["Table 2: all methods, seeds of pipeline 0"] = method_table(first)
    parts["Table 3: R² and the result of training, seeds of pipeline 0"] = table_3(first)
    text = "# Tables\n\nWritten by `python tools/tables.py show` from results.jsonl. pass@1 in "
    text += "percent on the test problems after the last iteration; ± is half of a 95% interval "
    text += "over seeds (Student's t); differences are paired by seed.\n"
    text += "".join(f"\n## {title}\n\n{part}" for title, part in parts.items())
    RESULTS.with_name("tables.md").write_text(text, encoding="utf-8")
    plot_predictions(predicted, RESULTS.with_name("prediction.png"))
    everything = sum(settings.values(), [("whole pipelines", whole, "main", "")])
    plot_filters(everything, RESULTS.with_name("filters.png"))
    print(text)


def main(cfg):
    records = read_results()
    if cfg.jobs < 1:
        sandbox.fail(f"--jobs {cfg.jobs}: it must be above 0")
    if cfg.action == "run":
        run_all(cfg)
    elif cfg.action == "list":
        done = {record["name"] for record in records}
        for run in plan():
            if cfg.only in run["name"]:
                print("done " if run["name"] in done else "to do", run["name"])
                print(*("      " + " ".join(command) for command in run["commands"]), sep="\n")
    elif records:
        show(records)
    else:
        sandbox.fail(f"{RESULTS} has no results; python tools/tables.py run makes them")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
