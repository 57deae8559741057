"""Several runs of stage 4 side by side: one figure, one table, and programs before and after.

Reads   metrics.jsonl of each run; results.json and samples.jsonl of a call of stage 5 whose first
        policy is the one before training.
Writes  <out>.png, and <out>_programs.md: greedy answers of the first and the last policy to the
        first test problems, whatever they are, with their verdicts. Prints the table in Markdown.

Run     python tools/compare.py --runs out/ppo_none out/ppo_random2 out/ppo_bw --eval out/eval
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sandbox  # noqa: E402

PANELS = {  # field of metrics.jsonl: heading, axis
    "score": ("reward of the rollouts", "standard deviations of the RM"),
    "pass_rate": ("rollouts that pass their tests", "share"),
    "validation_pass_at_1": ("validation problems, greedy", "pass@1"),
    "kl_per_response": ("KL of the kept responses", "nats per response"),
}


@dataclass
class Config:
    runs: list[str] = field(default_factory=lambda: ["out/ppo_none", "out/ppo_bw"])  # of stage 4
    eval: str = "out/eval"  # folder of stage 5
    out: str = "out/compare"  # path of the outputs, without ending
    programs: int = 10  # test problems to show


def draw(runs, path):
    """One panel per quantity, one line per run."""
    figure = Figure(figsize=(4.2 * len(PANELS), 3.8), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for run in runs:
        metrics = sandbox.read_jsonl(Path(run) / "metrics.jsonl", {"iteration": int})
        label = Path(run).name.removeprefix("ppo_")
        for axis, name in zip(axes, PANELS):
            points = [(line["iteration"], line[name]) for line in metrics if name in line]
            axis.plot(*zip(*points), "o-", markersize=3, label=label)
    for axis, (heading, unit) in zip(axes, PANELS.values()):
        axis.set(title=heading, xlabel="iteration", ylabel=unit)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def percent(value, sign=""):
    return "{:{s}.1f} [{:{s}.1f}, {:{s}.1f}]".format(
        *(100 * value[end] for end in ("mean", "low", "high")), s=sign
    )


def table(results):
    """pass@1 in percent with 95% intervals, and the gain over the first policy."""
    lines = ["| problems | policy | greedy | gain | sampled | gain |", "|---|---|---|---|---|---|"]
    for row in results:
        cells = []
        for name in ("greedy pass@1", "pass@1"):
            cells.append(percent(row[name]) if name in row else "-")
            cells.append(percent(row["gain"][name], "+") if name in row["gain"] else "-")
        lines.append(f"| {row['benchmark']} | {row['policy']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def programs(samples, count):
    """Greedy answers of the first and the last policy to the first problems, in Markdown."""
    greedy = [sample for sample in samples if sample["greedy"]]
    before, after = greedy[0]["policy"], greedy[-1]["policy"]
    answers = {(s["policy"], s["task_id"]): s for s in greedy if s["policy"] in (before, after)}
    parts = [f"Greedy answers of `{before}` and `{after}`.\n"]
    for task_id in list(dict.fromkeys(s["task_id"] for s in greedy))[:count]:
        pair = [answers[policy, task_id] for policy in (before, after)]
        parts.append(f"## {task_id}\n\n```text\n{pair[0]['prompt'].rstrip()}\n```\n")
        for policy, sample in zip((before, after), pair):
            verdict = f"{sample['passed_tests']} of {sample['total_tests']} tests"
            verdict = "passes" if sample["actual_score"] == 1 else f"{sample['status']}, {verdict}"
            response = sample["response"].strip("\n")
            parts.append(f"`{policy}`: {verdict}\n\n```text\n{response}\n```\n")
        if pair[0]["response"] == pair[1]["response"]:
            parts[-1] = f"`{after}`: the same program\n"
    return "\n".join(parts)


def main(cfg):
    for run in cfg.runs:
        if not (Path(run) / "metrics.jsonl").is_file():
            sandbox.fail(f"--runs {run} has no metrics.jsonl; run 04_pf_ppo.py first")
    if not (Path(cfg.eval) / "results.json").is_file():
        sandbox.fail(f"--eval {cfg.eval} has no results.json; run 05_eval.py first")
    draw(cfg.runs, f"{cfg.out}.png")
    print(table(json.loads((Path(cfg.eval) / "results.json").read_text(encoding="utf-8"))))
    fields = {"task_id": str, "prompt": str, "response": str, "policy": str}
    samples = sandbox.read_jsonl(Path(cfg.eval) / "samples.jsonl", fields)
    Path(f"{cfg.out}_programs.md").write_text(programs(samples, cfg.programs), encoding="utf-8")
    print(f"wrote {cfg.out}.png and {cfg.out}_programs.md")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
