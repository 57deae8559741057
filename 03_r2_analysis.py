"""Stage 3, R2 analysis: which filter makes the reward model most reliable? No model is loaded.

The input is samples: N responses of a policy to each prompt, each with its reward and its actual
score (1 where the tests passed). A filter keeps some responses of each prompt. The kept responses
are sorted by reward and split into groups of equal size. R2 is that of a straight line through the
groups' mean reward and mean actual score (paper, section 3 and Table 1). The paper trains with the
filter of the highest R2.

R2 here carries the sign of the slope: at -0.9 a higher reward reliably means fewer passes. Pooled
R2, the paper's, mixes differences between prompts with differences within a prompt. Only the latter
train the policy. So R2 within prompts, of rewards and scores less their prompt mean, is given, too.

Reads   JSONL files of any reward model's samples, the same number for each prompt:
        {"task_id": "tiny/17", "rm_score": 1.3, "actual_score": 1.0}
        Optional: policy and iteration (each is judged apart), truncated (true or false).
        Stage 2 writes the default file. Rollouts of stage 4 show R2 along training.

Writes  out/r2/r2.json, table.txt
        out/r2/reliability.png   mean actual score of each reward group (the paper's Figure 1)
        out/r2/r2.png            R2 of each filter

Run     python 03_r2_analysis.py
        python 03_r2_analysis.py --samples out/ppo_bw/rollouts/*.jsonl --out out/r2_rollouts

Simplified against the paper (HumanEval, 10 responses per prompt, sampled 10 times): responses are
sampled once and the intervals come from a bootstrap over prompts. The prompts are validation
problems, since test problems must not choose a filter.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure

import sandbox

SAMPLES = "out/rm/validation_samples.jsonl"
POWERS = ("pow_1", "pow_2", "pow_3")
STRATEGIES = ("none", "random2", "bon", "br", "bw", "top", "top_random", "top_bottom", *POWERS)


@dataclass
class Config:
    samples: list[str] = field(default_factory=lambda: [SAMPLES])  # files; the first policy decides
    out: str = "out/r2"  # folder for the table and the figures
    bins: int = 10  # groups of equal size; not given in the paper
    draws: int = 10  # times that a random filter draws; paper: 10 samplings
    resamples: int = 1000  # bootstrap resamples of the prompts, for the 95% intervals
    top: float = 0.5  # top*: rewards above are kept, in standard deviations; not given in the paper
    bottom: float = -0.5  # top_bottom: rewards below are kept too, in standard deviations
    truncation_penalty: float = 1.0  # taken off truncated responses, in standard deviations; as 04
    seed: int = 0  # random seed of the draws and the bootstrap


# ----------------------------------------------------------------------------------------------- R2


def group_means(rm_scores, actual_scores, bins):
    """Sort by reward, split into groups of equal size -> mean reward and mean actual score of each.

    At most one group per response. If the groups cannot be equal, the first ones hold one more.
    """
    order = np.argsort(rm_scores, kind="stable")
    bins = min(bins, len(order))
    sizes = len(order) // bins + (np.arange(bins) < len(order) % bins)
    starts = np.cumsum(sizes) - sizes
    columns = np.array([rm_scores, actual_scores], float)[:, order]
    return np.add.reduceat(columns, starts, axis=1) / sizes


def r_squared(rm_scores, actual_scores, bins):
    """Signed R2 of the least-squares line through the group means (paper, section 3).

    R2 of a line is the squared correlation r^2 of the group means. Returns r |r|, a float: negative
    where the line falls, nan where the group means are all equal in reward or in actual score.
    """
    x, y = group_means(rm_scores, actual_scores, bins)
    if np.ptp(x) < 1e-9 or np.ptp(y) < 1e-9:  # not 0: means of equal numbers differ by rounding
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) * abs(x @ y) / ((x @ x) * (y @ y)))


def ordered_pairs(rm_scores, actual_scores):
    """Pairs of one prompt whose rewards order them as their actual scores do, out of all pairs.

    Args: rm_scores, actual_scores: (P, N).
    Returns: ordered pairs (a tie of rewards counts half), pairs with different actual scores; (P,).
    """
    better = actual_scores[:, :, None] > actual_scores[:, None, :]  # (P, N, N)
    ordered = 0.5 + 0.5 * np.sign(rm_scores[:, :, None] - rm_scores[:, None, :])
    return (better * ordered).sum((1, 2)), better.sum((1, 2))


def draw_responses(scores, strategy, generator, top, bottom):
    """What a strategy keeps of (P, N) rewards, as a mask.

    Drawn, not all responses weighted by the filter: R2 of fewer responses is lower, and `random2`
    is the control for that. With weights it would equal `none`.
    pow_k weights all responses in training. Here it draws two per prompt by these weights.
    """
    scores = torch.tensor(scores)
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    if strategy in POWERS:
        weights = filter_weights(scores, strategy) + 1e-6  # at least two must be possible
        return keep.scatter(1, torch.multinomial(weights, 2, generator=generator), True).numpy()
    keep[select_responses(scores, strategy, generator, top, bottom)] = True
    return keep.numpy()


def bootstrap_r2(rm_scores, actual_scores, counts, bins):
    """R2 of each resample, nan as 0; counts: how often it holds each of the (P, N) responses."""
    order = np.argsort(rm_scores, axis=None, kind="stable")  # once, since sorted input sorts fast
    x, y = rm_scores.flat[order], actual_scores.flat[order]
    repeats = (count.flat[order] for count in counts)
    return np.nan_to_num([r_squared(np.repeat(x, n), np.repeat(y, n), bins) for n in repeats])


def estimate(value, resampled):
    """A value and its 95% percentile interval, from bootstrap resamples.

    A resample repeats prompts, so its group means are noisier and its R2 is lower. Where the value
    lies outside the interval, the interval is widened up to it.
    """
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    low, high = np.minimum(low, value), np.maximum(high, value)  # nan where the value is
    return {"value": float(value), "low": float(low), "high": float(high)}


# ------------------------------------------------------------------------------------- the filter
#
# The same code as in 04_pf_ppo.py, where a table says what each strategy keeps.


def filter_weights(rm_scores, strategy, top=0.5, bottom=-0.5):
    """Weight of each response under a filter (paper, section 3: weights over ranks).

    Args:
        rm_scores: (..., N) normalised rewards. The last dimension holds the responses to one
            prompt, never a batch: a filter over the batch would keep two rows in all.
        top, bottom: thresholds of the `top*` strategies, in standard deviations of the reward.
    Returns: (..., N) weights that sum to 1. Ties are ranked in order of appearance.
    """
    scores = torch.as_tensor(rm_scores, dtype=torch.float32)
    n = scores.shape[-1]
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)  # 0 is the best
    best, worst = (rank == 0).float(), (rank == n - 1).float()
    if strategy in ("none", "single", "random2"):
        weights = torch.ones_like(scores)
    elif strategy == "bon":
        weights = best
    elif strategy == "br":
        weights = (n - 1) * best + (1 - best) if n > 1 else best
    elif strategy == "bw":
        weights = best + worst
    elif strategy == "top":
        weights = (scores > top).float()
    elif strategy == "top_random":
        weights = 0.5 + 0.5 * (scores > top).float()
    elif strategy == "top_bottom":
        weights = ((scores > top) | (scores < bottom)).float()
    elif strategy.startswith("pow_"):
        # Rewards have no natural zero: unstretched, a prompt with only good responses would be
        # weighted like one end of the scale.
        low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
        stretched = (2 * (scores - low) / (high - low).clamp(min=1e-9) - 1).abs()
        weights = torch.where(high > low, stretched ** int(strategy[-1]), torch.ones_like(scores))
    else:
        raise ValueError(f"unknown strategy {strategy!r}")
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, best)
    return weights / weights.sum(-1, keepdim=True)


def select_responses(rm_scores, strategy, generator, top=0.5, bottom=-0.5):
    """Which responses PPO trains on: the filter's draw within each prompt, no row twice.

    Args: rm_scores: (n, N) normalised rewards; generator: CPU torch.Generator of the draws.
    Returns: (rows, columns), two int64 tensors in order of prompt, then of response.
    """
    scores = torch.as_tensor(rm_scores, dtype=torch.float32)
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    noise = torch.rand(scores.shape, generator=generator)  # drawn by all: one stream per seed
    if strategy in ("br", "random2"):
        if strategy == "br":
            noise = noise.masked_fill(rank == 0, 2.0)  # the best first, then the largest noise
        keep = noise.argsort(-1, descending=True).argsort(-1) < 2
    elif strategy == "top_random":
        keep = (scores > top) | (noise < 0.5)
        keep |= ~keep.any(-1, keepdim=True) & (rank == 0)
    elif strategy.startswith("pow_"):
        keep = torch.ones_like(scores, dtype=torch.bool)
    else:
        keep = filter_weights(scores, strategy, top, bottom) > 0
    return keep.nonzero(as_tuple=True)


# --------------------------------------------------------------------------------------------- main


def main(cfg):
    sandbox.check_numbers(cfg)
    out = Path(cfg.out)
    if sandbox.finished(cfg, out):
        print((out / "table.txt").read_text(encoding="utf-8"))
        return
    if not cfg.samples or cfg.bins < 2 or cfg.draws < 1 or cfg.resamples < 1:
        sandbox.fail("--samples, --draws and --resamples need at least 1, --bins at least 2")

    # ---- read: rewards in standard deviations and actual scores, (P, N) for each policy
    samples = [group for path in cfg.samples for group in read_samples(path, cfg)]

    # ---- judge: R2 of each strategy, pair accuracy, share of the variance between prompts
    policies = []
    with sandbox.progress_bar(len(samples), "R2 of each policy") as bar:
        for names, scores, actual_scores in samples:
            policies.append(names | judge(scores, actual_scores, cfg))
            bar.update()

    # ---- report: the first policy in full, R2 of all policies, the verdict on the first
    recommended, sentence = recommendation(policies[0])
    text = "\n".join([*table_of(policies), sentence])
    print(text)

    # ---- save
    out.mkdir(parents=True, exist_ok=True)
    report = {"recommended": recommended, "verdict": sentence, "policies": policies}
    report = json.loads(json.dumps(report), parse_constant=lambda _: None)  # nan is not JSON
    (out / "r2.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    plot(policies, out)
    sandbox.save_config(cfg, out)
    print(f"saved {out}")


# ----------------------------------------------------------------------------------- read and judge


def read_samples(path, cfg):
    """The policies of a sample file -> list of (names, scores (P, N), actual_scores (P, N)).

    Rewards are normalised over the file, and truncated responses get the penalty: what the filter
    of stage 4 ranks by. It keeps the unit of the SFT policy's samples, so that on its later
    rollouts the thresholds of `top*` are not quite those of training.
    """
    number, text = (int, float), (str, type(None))
    fields = {"task_id": (str, int), "rm_score": number, "actual_score": (*number, bool)}
    fields |= {"policy": text, "iteration": (int, type(None)), "truncated": (bool, type(None))}

    def check(record, place):
        for name in ("rm_score", "actual_score"):
            if not -1e30 < record[name] < 1e30:  # nan, too
                sandbox.fail(f"{place}: field '{name}' is no finite number")

    records = sandbox.read_jsonl(path, fields, check=check)
    scores, actual_scores = np.array([[r["rm_score"], r["actual_score"]] for r in records], float).T
    for name, values in (("rm_score", scores), ("actual_score", actual_scores)):
        if not np.ptp(values) > 0:
            sandbox.fail(f"{path}: {name} is the same in all samples")
    scores = (scores - scores.mean()) / scores.std()
    scores -= cfg.truncation_penalty * np.array([bool(r["truncated"]) for r in records])

    groups = {}  # (policy, iteration) -> task_id -> [(score, actual score), ...]
    for record, *pair in zip(records, scores, actual_scores):
        prompts = groups.setdefault((record["policy"] or path, record["iteration"]), {})
        prompts.setdefault(record["task_id"], []).append(pair)
    policies = []
    for (policy, iteration), prompts in groups.items():
        n = min(map(len, prompts.values()))
        for task_id, pairs in prompts.items():
            # An iteration of stage 4 in which two passes over the prompts meet can hold one twice.
            if n < 2 or (len(pairs) > n and (iteration is None or len(pairs) % n)):
                sandbox.fail(
                    f"{path}: {policy} has {len(pairs)} responses to {task_id} and {n} to another; "
                    "a filter needs the same number for each prompt, at least 2"
                )
        blocks = [np.reshape(pairs, (-1, n, 2)) for pairs in prompts.values()]
        name = policy if iteration is None else f"{policy}, iteration {iteration}"
        policies.append(
            ({"file": path, "policy": name}, *np.moveaxis(np.concatenate(blocks), 2, 0))
        )
    return policies


def judge(scores, actual_scores, cfg):
    """What r2.json says of the samples of one policy, (P, N) scores and actual_scores.

    The intervals are for the same measurement on as many new prompts. With more prompts R2 would be
    higher, since the group means would be less noisy.
    """
    prompts, n = scores.shape
    generator = torch.Generator().manual_seed(cfg.seed)
    rng = np.random.default_rng(cfg.seed)
    times = rng.multinomial(prompts, np.full(prompts, 1 / prompts), cfg.resamples)  # (resamples, P)

    # Centred over all N responses, not over those kept: BoN keeps one, which would be its own mean.
    centred = [values - values.mean(1, keepdims=True) for values in (scores, actual_scores)]
    views = {"r2": (scores, actual_scores), "r2_within": centred}
    rows, resampled = {}, {}
    groups = {
        key: group_means(x.ravel(), y.ravel(), cfg.bins).tolist() for key, (x, y) in views.items()
    }
    for strategy in STRATEGIES:
        draws = [
            draw_responses(scores, strategy, generator, cfg.top, cfg.bottom)
            for _ in range(cfg.draws)
        ]
        rows[strategy] = {
            "kept_per_prompt": float(np.sum(draws) / cfg.draws / prompts),
            "pass_rate": float(np.mean([actual_scores[keep].mean() for keep in draws])),
        }
        for key, (x, y) in views.items():
            counts = (t[:, None] * draws[i % cfg.draws] for i, t in enumerate(times))
            resampled[strategy, key] = bootstrap_r2(x, y, counts, cfg.bins)
            value = np.mean([r_squared(x[keep], y[keep], cfg.bins) for keep in draws])
            rows[strategy][key] = estimate(value, resampled[strategy, key])
        above = resampled[strategy, "r2"] - resampled["none", "r2"]
        rows[strategy]["clearly_above_none"] = bool(np.quantile(above, 0.025) > 0)

    ordered, pairs = ordered_pairs(scores, actual_scores)
    with np.errstate(invalid="ignore"):  # without a pair the accuracy is nan
        accuracy = estimate(ordered.sum() / pairs.sum(), times @ ordered / (times @ pairs))
    return {
        "prompts": prompts,
        "responses_per_prompt": n,
        "pair_accuracy": accuracy,
        "between_share": float(scores.mean(1).var() / scores.var()),
        "groups": groups,
        "strategies": rows,
    }


# ---------------------------------------------------------------------------- verdict and figures


def best_rising(rows, key):
    """The strategy with the highest signed R2 of those whose line clearly rises, or None."""
    rising = [name for name in rows if rows[name][key]["low"] > 0]
    return max(rising, key=lambda name: rows[name][key]["value"], default=None)


def recommendation(policy):
    """The recommended strategy or None, and the sentence that says why."""
    rows, share = policy["strategies"], policy["between_share"]
    best, within = best_rising(rows, "r2"), best_rising(rows, "r2_within")
    if best is None:
        text = "no line clearly rises, so this reward model does not carry a filter"
    else:
        text = f"R2 recommends --strategy {best} at {interval(rows[best]['r2'])}"
        clearly = "clearly" if rows[best]["clearly_above_none"] else "not clearly"
        if best != "none":
            text += f", {clearly} above none at {interval(rows['none']['r2'])}"
    if share > 0.5:
        leader = within and f"{within} leads at {interval(rows[within]['r2_within'])}"
        text += f"; but {share:.0%} of the reward's variance lies between prompts, so go by R2"
        text += f" within prompts, where {leader or 'no line clearly rises'}"
    return best, f"{policy['policy']}: {text}."


def interval(r2):
    return f"{r2['value']:.3f} [{r2['low']:.2f}, {r2['high']:.2f}]"


def table_of(policies):
    """Lines: the first policy in full; then, if there are more, pooled R2 of all, as in Table 1."""
    first = policies[0]
    size = f"{first['prompts']} prompts, {first['responses_per_prompt']} responses each"
    yield f"{first['policy']}: {size}"
    yield f"pairs of a prompt in the right order: {interval(first['pair_accuracy'])}"
    yield f"share of the reward's variance between prompts: {first['between_share']:.2f}"
    yield f"{'strategy':<12}{'kept':>6}{'pass rate':>11}{'R2 pooled':>24}{'R2 within prompts':>24}"
    for name, row in first["strategies"].items():
        yield (
            f"{name:<12}{row['kept_per_prompt']:>6.1f}{row['pass_rate']:>11.3f}"
            f"{interval(row['r2']):>24}{interval(row['r2_within']):>24}"
        )
    yield ""
    if len(policies) > 1:
        yield "".join(f"{name:>11}" for name in STRATEGIES) + "  R2 pooled"
        for policy in policies:
            values = (row["r2"]["value"] for row in policy["strategies"].values())
            yield "".join(f"{value:>11.3f}" for value in values) + f"  {policy['policy']}"
        yield ""


def plot(policies, out):
    """Actual score by reward group, and R2 by strategy; the first policy has the darkest colour."""
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(policies)))
    offsets = np.linspace(-0.4, 0.4, len(policies) + 2)[1:-1]
    reliability, r2 = (Figure(figsize=(12, 4.2), layout="constrained") for _ in range(2))
    names = {"r2": "pooled over prompts", "r2_within": "within prompts"}
    panels = zip(reliability.subplots(1, 2), r2.subplots(1, 2, sharey=True), names.items())
    for curve, bars, (key, name) in panels:
        for policy, colour, offset in zip(policies, colours, offsets):
            style = {"color": colour, "label": policy["policy"]}
            curve.plot(*policy["groups"][key], ".-", **style)
            values = [tuple(row[key].values()) for row in policy["strategies"].values()]
            value, low, high = np.transpose(values)
            bars.plot(np.arange(len(value)) + offset, value, "o", **style)
            bars.vlines(np.arange(len(value)) + offset, low, high, color=colour)
        curve.set(title=name, xlabel="mean reward, in standard deviations", ylabel="actual score")
        bars.set(title=name, ylabel="signed R², 95% interval")
        bars.set_xticks(range(len(STRATEGIES)), STRATEGIES, rotation=40, ha="right")
        for axis in (curve, bars):
            axis.grid(alpha=0.3)
            if 1 < len(policies) <= 8:
                axis.legend(fontsize="small")
    reliability.savefig(out / "reliability.png", dpi=120)
    r2.savefig(out / "r2.png", dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
