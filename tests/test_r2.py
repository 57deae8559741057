"""R2 of the filters, 03_r2_analysis.py: the measure, its intervals, the verdict, its input."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch


def make_samples(prompts, n, slope, seed=0, ease=1.0, spread=0.0):
    """Rewards and actual scores, (P, N): passes depend on the prompt's ease and on slope * reward.

    spread: how far the rewards of the prompts lie apart, along their ease.
    """
    rng = np.random.default_rng(seed)
    easy = rng.normal(size=(prompts, 1))
    quality = rng.normal(size=(prompts, n))
    passes = rng.random((prompts, n)) < 1 / (1 + np.exp(-ease * easy - slope * quality))
    return quality + spread * easy, passes.astype(float)


def write_samples(path, rm_scores, actual_scores, **extra):
    with open(path, "w") as file:
        for task, rows in enumerate(zip(rm_scores.tolist(), actual_scores.tolist())):
            for rm_score, actual_score in zip(*rows):
                record = {"task_id": f"t/{task}", "rm_score": rm_score}
                file.write(json.dumps(record | {"actual_score": actual_score, **extra}) + "\n")


def run(r2, folder, *paths, out="out", **settings):
    """main() on sample files -> r2.json."""
    settings = {"resamples": 200, "draws": 3} | settings
    r2.main(r2.Config(samples=[str(path) for path in paths], out=str(folder / out), **settings))
    text = (folder / out / "r2.json").read_text()
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


# ---- R2


def test_r_squared_by_hand_and_signed(r2):
    # Groups of two by reward: (0.5, 0), (2.5, 1), (4.5, 0.5). Slope .125, intercept .1875: fitted
    # .25 .5 .75. Residuals -.25 .5 -.25: squares .375; about the mean .5: .25 + .25 + 0 = .5.
    # R2 = 1 - .375 / .5 = .25
    rm_scores, actual = np.array([3, 0, 5, 1, 4, 2]), np.array([1, 0, 1, 0, 0, 1])
    assert r2.r_squared(rm_scores, actual, 3) == pytest.approx(0.25)
    assert r2.r_squared(list(-rm_scores), list(actual), 3) == pytest.approx(-0.25)
    assert r2.r_squared(rm_scores, 1 - actual, 3) == pytest.approx(-0.25)


def test_r_squared_of_perfect_lines_and_of_a_parabola(r2):
    scores = np.linspace(-1, 1, 40)
    assert r2.r_squared(scores, (scores + 1) / 2, 8) == pytest.approx(1)
    assert r2.r_squared(scores, (1 - scores) / 2, 8) == pytest.approx(-1)
    assert r2.r_squared(scores, scores**2, 8) == pytest.approx(0, abs=1e-6)
    mixed = np.random.default_rng(0).permutation(scores)  # the order of the samples is no matter
    assert r2.r_squared(mixed, mixed**3, 7) == pytest.approx(r2.r_squared(scores, scores**3, 7))


@pytest.mark.parametrize("count, bins", [(200, 10), (47, 10), (13, 5), (6, 10)])
def test_r_squared_against_a_fitted_line(r2, count, bins):
    rng = np.random.default_rng(count)
    x = rng.normal(size=count)
    y = (x + rng.normal(size=count) > 0).astype(float)
    groups = np.array_split(np.argsort(x), min(bins, count))
    gx, gy = (np.array([values[group].mean() for group in groups]) for values in (x, y))
    assert np.allclose(r2.group_means(x, y, bins), (gx, gy))
    slope, intercept = np.polyfit(gx, gy, 1)
    expected = 1 - ((gy - slope * gx - intercept) ** 2).sum() / ((gy - gy.mean()) ** 2).sum()
    assert r2.r_squared(x, y, bins) == pytest.approx(np.sign(slope) * expected)


def test_r_squared_is_nan_where_there_is_no_line(r2):
    assert math.isnan(r2.r_squared([1, 1, 1, 1], [0, 1, 0, 1], 2))
    assert math.isnan(r2.r_squared([1, 2, 3, 4], [1, 1, 1, 1], 2))
    assert math.isnan(r2.r_squared([3], [1], 10))
    # Groups of two and of three equal rewards: their means differ by rounding.
    assert math.isnan(r2.r_squared([0.1] * 25, [0, 1, 0, 0, 1] * 5, 10))


def test_pairs_by_hand(r2):
    rm_scores = np.array([[3.0, 1.0, 2.0], [0.0, 0.0, 5.0], [1.0, 2.0, 3.0]])
    actual = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    # Prompt 0: right, right. Prompt 1: a tie, wrong. Prompt 2: no pair. No pair joins two prompts.
    ordered, pairs = r2.ordered_pairs(rm_scores, actual)
    assert ordered.tolist() == [2, 0.5, 0] and pairs.tolist() == [2, 2, 0]


# ---- draws and the bootstrap


def test_each_strategy_keeps_what_its_filter_selects(r2):
    scores = np.random.default_rng(0).normal(size=(50, 6))
    for strategy in r2.STRATEGIES:
        keep = r2.draw_responses(scores, strategy, torch.Generator().manual_seed(0), 0.5, -0.5)
        assert keep.shape == scores.shape and keep.dtype == bool
        if strategy.startswith("pow_"):
            assert (keep.sum(1) == 2).all()
        else:
            generator = torch.Generator().manual_seed(0)
            rows, columns = r2.select_responses(torch.tensor(scores), strategy, generator)
            assert np.argwhere(keep).tolist() == torch.stack([rows, columns], 1).tolist()


def test_pow_draws_follow_the_weights(r2):
    scores = np.tile([1.0, 0.0, -1.0, 0.1], (3000, 1))  # weights of pow_1 are as 1 : 0 : 1 : 0.1
    counts = r2.draw_responses(scores, "pow_1", torch.Generator().manual_seed(0), 0, 0).sum(0)
    assert counts[0] > 2700 and counts[2] > 2700 and counts[1] < 20 and 0 < counts[3] < 600


def test_bootstrap_is_r_squared_of_repeated_prompts(r2):
    scores, actual = make_samples(12, 4, 1)
    rng = np.random.default_rng(1)
    prompts = rng.integers(12, size=(5, 12))
    times = np.array([np.bincount(row, minlength=12) for row in prompts])
    keep = rng.random(scores.shape) < 0.6
    resampled = r2.bootstrap_r2(scores, actual, (t[:, None] * keep for t in times), 4)
    for row, value in zip(prompts, resampled):
        kept = keep[row]
        assert value == pytest.approx(r2.r_squared(scores[row][kept], actual[row][kept], 4))
    nothing_passes = r2.bootstrap_r2(scores, 0 * actual, (t[:, None] * keep for t in times), 4)
    assert nothing_passes.tolist() == [0] * 5  # no line explains nothing


def test_intervals_cover_the_mean_of_the_measurement(r2):
    def measure(seed):
        return make_samples(60, 5, 0.8, seed)

    expected = np.mean([r2.r_squared(*map(np.ravel, measure(1000 + s)), 10) for s in range(400)])
    hits = 0
    for seed in range(100):
        scores, actual = measure(seed)
        times = np.random.default_rng(seed).multinomial(60, np.full(60, 1 / 60), 200)
        counts = (np.repeat(t[:, None], 5, 1) for t in times)
        resampled = r2.bootstrap_r2(scores, actual, counts, 10)
        value = r2.r_squared(scores.ravel(), actual.ravel(), 10)
        estimate = r2.estimate(value, resampled)
        hits += estimate["low"] <= expected <= estimate["high"]
        assert estimate["low"] <= value <= estimate["high"]
    assert hits >= 86  # 95 of 100, less 4 standard deviations


def test_intervals_narrow_with_more_prompts_and_repeat_with_the_seed(r2):
    cfg = r2.Config(resamples=200, draws=2)
    few, many = (r2.judge(*make_samples(prompts, 5, 1), cfg) for prompts in (40, 400))

    def width(judged, key):
        return judged[key]["high"] - judged[key]["low"]

    assert width(many, "pair_accuracy") < 0.6 * width(few, "pair_accuracy")
    for strategy in ("none", "bw", "random2"):
        assert width(many["strategies"][strategy], "r2") < width(few["strategies"][strategy], "r2")
    assert few == r2.judge(*make_samples(40, 5, 1), cfg)


# ---- what is said of a policy


def test_share_between_prompts_and_pair_accuracy_by_hand(r2):
    # Prompt means 1, 5: variance 4. All: 0 2 4 6, variance 5. Pairs: prompt 0 right, 1 wrong.
    scores, actual = np.array([[0.0, 2.0], [4.0, 6.0]]), np.array([[0.0, 1.0], [1.0, 0.0]])
    judged = r2.judge(scores, actual, r2.Config(bins=2, resamples=50, draws=2))
    assert judged["between_share"] == pytest.approx(0.8)
    # A resample is both prompts, or one of them twice.
    assert judged["pair_accuracy"] == {"value": 0.5, "low": 0.0, "high": 1.0}


def test_pooled_r2_can_hide_and_can_feign_r2_within_prompts(r2):
    cfg = r2.Config(resamples=200, draws=2)
    # Rewards tell easy prompts from hard ones, and nothing within a prompt.
    feigned = r2.judge(*make_samples(300, 10, 0, ease=2, spread=4), cfg)["strategies"]["none"]
    assert feigned["r2"]["value"] > 0.9 and feigned["r2_within"]["low"] < 0.1
    # Rewards rank a prompt's responses well, but differ more between prompts, the wrong way.
    judged = r2.judge(*make_samples(300, 10, 1.5, ease=1, spread=-4), cfg)
    hidden = judged["strategies"]["none"]
    assert hidden["r2"]["high"] < 0.1 and hidden["r2_within"]["value"] > 0.8
    sentence = r2.recommendation(judged | {"policy": "out/sft"})[1]
    leader = r2.best_rising(judged["strategies"], "r2_within")
    assert judged["between_share"] > 0.9 and "variance lies between prompts" in sentence
    assert f"within prompts, where {leader} leads at" in sentence


def rows_of(**strategies):
    keys = ("value", "low", "high")
    r2 = {name: dict(zip(keys, values)) for name, values in strategies.items()}
    return {n: {"r2": r, "r2_within": r, "clearly_above_none": False} for n, r in r2.items()}


def test_verdict_by_hand(r2):
    policy = {"policy": "out/sft", "between_share": 0.2}
    # br falls clearly, top is highest but not clearly above 0, bw has no line in one of its draws.
    rows = rows_of(none=(0.5, 0.3, 0.7), br=(-0.9, -0.95, -0.8), top=(0.8, -0.1, 0.9))
    rows |= rows_of(bw=(math.nan, math.nan, math.nan), bon=(0.6, 0.1, 0.7))
    recommended, sentence = r2.recommendation(policy | {"strategies": rows})
    assert recommended == "bon" and "--strategy bon at 0.600 [0.10, 0.70]" in sentence
    assert "not clearly above none at 0.500" in sentence and "between" not in sentence
    rows["bon"]["clearly_above_none"] = True
    assert ", clearly above none" in r2.recommendation(policy | {"strategies": rows})[1]
    del rows["bon"]
    recommended, sentence = r2.recommendation(policy | {"strategies": rows, "between_share": 0.6})
    assert recommended == "none" and "60% of the reward's variance" in sentence
    del rows["none"]
    recommended, sentence = r2.recommendation(policy | {"strategies": rows})
    assert recommended is None and "does not carry a filter" in sentence


@pytest.mark.parametrize("slope", [-1.5, -0.4])
def test_a_line_that_does_not_rise_is_never_recommended(r2, tmp_path, slope):
    write_samples(tmp_path / "s.jsonl", *make_samples(100, 6, slope, seed=2))
    result = run(r2, tmp_path, tmp_path / "s.jsonl")
    assert result["recommended"] is None and "does not carry a filter" in result["verdict"]
    if slope == -1.5:
        rows = result["policies"][0]["strategies"]
        assert rows["none"]["r2"]["value"] < -0.8 and rows["bw"]["r2"]["high"] < 0


# ---- files


def test_a_whole_run(r2, tmp_path, capsys):
    write_samples(tmp_path / "s.jsonl", *make_samples(100, 6, 1.5), policy="out/sft")
    result = run(r2, tmp_path, tmp_path / "s.jsonl")
    printed = capsys.readouterr().out
    (policy,) = result["policies"]
    rows = policy["strategies"]
    assert (
        policy["policy"] == "out/sft"
        and policy["prompts"] == 100
        and list(rows) == list(r2.STRATEGIES)
    )
    rising = [name for name in rows if rows[name]["r2"]["low"] > 0]
    assert result["recommended"] == max(rising, key=lambda name: rows[name]["r2"]["value"])
    assert f"--strategy {result['recommended']} " in printed and result["verdict"] in printed
    assert (tmp_path / "out" / "table.txt").read_text() in printed
    assert rows["bw"]["kept_per_prompt"] == 2 and rows["none"]["kept_per_prompt"] == 6
    assert policy["pair_accuracy"]["value"] > 0.75
    for name in ("reliability.png", "r2.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")

    # Again: finished. With other settings: refused. Nothing is written in either case.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    run(r2, tmp_path, tmp_path / "s.jsonl")
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit:
        run(r2, tmp_path, tmp_path / "s.jsonl", bins=5)
    assert exit.value.code == 2 and "bins was 10, now 5" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_rollouts_give_r2_along_training(r2, tmp_path, capsys):
    # The records of stage 4, and of an RM that is right at first and wrong later.
    for iteration, slope in ((1, 2), (2, -2)):
        extra = {"policy": f"out/ppo_bw/{iteration:04d}", "iteration": iteration, "kept": True}
        extra |= {
            "prompt": "p",
            "response": "r",
            "score": 0.1,
            "status": "passed",
            "truncated": False,
        }
        path = tmp_path / f"{iteration:04d}.jsonl"
        write_samples(path, *make_samples(80, 5, slope, seed=iteration), **extra)
    result = run(r2, tmp_path, tmp_path / "0001.jsonl", tmp_path / "0002.jsonl")
    first, second = (policy["strategies"]["none"]["r2"] for policy in result["policies"])
    assert first["low"] > 0.5 and second["high"] < -0.5  # task ids are the same, groups are not
    printed = capsys.readouterr().out
    assert printed.count("out/ppo_bw/0002") == 1 and result["verdict"].startswith("out/ppo_bw/0001")
    assert len(result["policies"][0]["groups"]["r2"][0]) == 10


def test_a_group_is_one_file_policy_iteration_and_task(r2, tmp_path):
    lines = []
    for policy in ("a", "b"):
        for iteration in (1, 2):
            for task in range(3):
                for k in range(2):
                    record = {"task_id": task, "rm_score": k + task, "actual_score": k == 1}
                    lines.append(record | {"policy": policy, "iteration": iteration})
    order = np.random.default_rng(0).permutation(len(lines))  # in any order of lines
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(lines[i]) + "\n" for i in order))
    groups = r2.read_samples(str(tmp_path / "s.jsonl"), r2.Config())
    names = sorted(name["policy"] for name, _, _ in groups)
    assert names == [f"{policy}, iteration {i}" for policy in "ab" for i in (1, 2)]
    assert all(scores.shape == actual.shape == (3, 2) for _, scores, actual in groups)
    assert all((actual.sum(1) == 1).all() for _, _, actual in groups)


def test_a_prompt_that_an_iteration_samples_twice_is_two_groups(r2, tmp_path, capsys):
    order = ["a", "b", "a"]  # the last of one pass, and the first of the next one is "a" again
    scores = [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    records = [
        {"task_id": task, "rm_score": score, "actual_score": score % 2, "iteration": 3}
        for task, row in zip(order, scores)
        for score in row
    ]
    path = str(tmp_path / "s.jsonl")
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    ((_, found, actual),) = r2.read_samples(path, r2.Config())
    assert found.shape == (3, 2) and (actual == [0, 1]).all()
    assert np.allclose(np.diff(found), np.diff(scores) / np.std(scores))
    # In other files this is a mistake: two samplings, or a log that is cut off.
    plain = [{name: r[name] for name in r if name != "iteration"} for r in records]
    refused(r2, tmp_path, capsys, plain, "has 4 responses to a and 2 to another")


def test_rewards_are_normalised_over_the_file_and_truncated_ones_lose_the_penalty(r2, tmp_path):
    # Rewards 10 14: mean 12, standard deviation 2, so -1 1; the truncated 14 falls by 1.5 to -0.5.
    record = {"task_id": "t", "actual_score": 0}
    lines = [record | {"rm_score": 10}, record | {"rm_score": 14, "truncated": True}]
    lines += [line | {"task_id": "u", "actual_score": 1, "truncated": None} for line in lines]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cfg = r2.Config(truncation_penalty=1.5)
    ((_, scores, actual),) = r2.read_samples(str(tmp_path / "s.jsonl"), cfg)
    assert scores.tolist() == [[-1, -0.5], [-1, 1]] and actual.tolist() == [[0, 0], [1, 1]]


GOOD = [{"task_id": t, "rm_score": float(k), "actual_score": k % 2} for t in "ab" for k in range(3)]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rm_score": None}, "field 'rm_score'"),
        ({"actual_score": "yes"}, "field 'actual_score'"),
        ({"truncated": "no"}, "field 'truncated'"),
        ({"rm_score": math.nan}, "line 1: field 'rm_score' is no finite number"),
        ({"rm_score": 10**400}, "line 1: field 'rm_score' is no finite number"),
        ({"actual_score": math.inf}, "line 1: field 'actual_score' is no finite number"),
        ({"task_id": "c"}, "has 3 responses to c and 2 to another"),
        ({"policy": "other"}, "at least 2"),
    ],
)
def test_unusable_records_are_refused_by_name(r2, tmp_path, capsys, change, words):
    records = [GOOD[0] | change, *GOOD[1:]]
    if "task_id" in change:
        records += [GOOD[0] | change] * 2
    refused(r2, tmp_path, capsys, records, words)


def test_constant_or_absent_scores_and_lone_responses_are_refused(r2, tmp_path, capsys):
    for name in ("rm_score", "actual_score"):
        absent = [{k: v for k, v in record.items() if k != name} for record in GOOD]
        refused(r2, tmp_path, capsys, absent, f"line 1: field '{name}' is missing")
        refused(r2, tmp_path, capsys, [r | {name: 0.1} for r in GOOD], f"{name} is the same")
    refused(r2, tmp_path, capsys, GOOD[:4], "own.jsonl has 3 responses to a and 1 to another")
    alone = [record | {"task_id": str(i)} for i, record in enumerate(GOOD)]
    refused(r2, tmp_path, capsys, alone, "at least 2")
    refused(r2, tmp_path, capsys, GOOD, "--bins at least 2", bins=1)
    refused(r2, tmp_path, capsys, GOOD, "at least 1", draws=0)


def refused(r2, folder, capsys, records, words, **settings):
    (folder / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(SystemExit) as exit:
        run(r2, folder, folder / "own.jsonl", **settings)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and words in error and error.count("\n") == 1, error
    assert settings or "own.jsonl" in error
    assert not (folder / "out").exists()


def test_no_model_is_loaded(r2):
    source = Path(r2.__file__).read_text()
    assert "transformers" not in source and "from_pretrained" not in source


def test_the_file_in_the_readme_is_one(r2, tmp_path):
    readme = (Path(r2.__file__).parent / "README.md").read_text(encoding="utf-8")
    (tmp_path / "my.jsonl").write_text(readme.partition("```json\n")[2].partition("```")[0])
    assert run(r2, tmp_path, tmp_path / "my.jsonl")["policies"]
