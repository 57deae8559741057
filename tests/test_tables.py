"""tools/tables.py: runs are commands that their scripts take, and tables say what records say."""

import contextlib
import json
import shutil
import sys

import numpy as np
import pytest
import tyro
from conftest import PPO_FLAGS, ROOT, load_script

sys.path.insert(0, str(ROOT / "tools"))
import tables  # noqa: E402


def record(method, seed, greedy, group="main", pipeline=0):
    test = {"greedy": greedy, "sampled": 1 - greedy}
    cost = {"samples": 6000, "rm_passes": 6000, "policy_rows": 2400, "critic_rows": 2400}
    run = {"name": f"{group}/{pipeline}/{method}/{seed}", "group": group, "method": method}
    return run | {"pipeline": pipeline, "seed": seed, "test": test, "cost": cost}


def measured(values, group="main", method="rm", pipeline=0):
    """Pooled R2 as given, within prompts the same less 1; 3 x 3 policies along training."""
    r2 = {"pair_accuracy": 0.8, "pooled": values, "within": {m: x - 1 for m, x in values.items()}}
    r2["pass_rate"] = dict.fromkeys(values, 0.4)
    run = {"name": f"{group}/{pipeline}/{method}/{pipeline}", "group": group, "method": method}
    return run | {"pipeline": pipeline, "seed": pipeline, "r2": [r2] * 9}


def cells(text, first):
    """The cells of the rows that start with `first`."""
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    return [line[1:] for line in lines if line and line[0] == first]


def test_intervals_by_hand():
    # 80 and 84: mean 82, standard error 2, times t(0.975, 1 degree of freedom) = 12.706
    assert tables.interval([80, 84]) == pytest.approx((82, 25.412), abs=1e-3)
    # 1..5: standard deviation sqrt(2.5), standard error sqrt(0.5), times t(0.975, 4) = 2.776
    assert tables.interval([1, 2, 3, 4, 5]) == pytest.approx((3, 2.776 * 0.5**0.5))
    assert tables.cell([0.80, 0.84]) == "82.0 ± 25.4" and tables.cell([0.8]) == "80.0"
    assert tables.cell([]) == "" and tables.cell([-0.01, 0.03], sign="+") == "+1.0 ± 25.4"


def test_rank_correlation_by_hand():
    assert tables.spearman([0.1, 0.5, 0.9], [7, 8, 100]) == pytest.approx(1)
    # d = 0, 1, -1, 0: 1 - 6 * 2 / (4 * 15) = 0.8
    assert tables.spearman([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)
    # a tie shares its rank: ranks 0.5, 0.5, 2 and 0, 1, 2 have correlation 1.5 / sqrt(1.5 * 2)
    assert tables.spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(0.75**0.5)
    assert np.isnan(tables.spearman([1, 1], [1, 2]))


def test_filters_are_compared_over_shared_seeds_and_paired():
    """BW is 2 and 4 points ahead of random2; a seed that only one of them has does not count."""
    records = [record("random2", 0, 0.70), record("random2", 1, 0.80), record("random2", 2, 0.1)]
    records += [record("bw", 0, 0.72), record("bw", 1, 0.84)]
    records += [record("grpo_bw", 0, 0.5), record("bw", 0, 0.5, "tests")]
    text = tables.comparison([("mine", records, "main", ""), ("grpo", records, "main", "grpo_")])
    greedy, sampled = cells(text, "mine")
    # Differences of 2 and 4 points: 3 ± 12.706. Filters that have run nowhere have no column.
    assert "| random2 | bw | bw − random2 |" in text
    assert greedy == ["greedy", "2", "75.0 ± 63.5", "78.0 ± 76.2", "+3.0 ± 12.7"]
    assert sampled[:2] == ["sampled", "2"] and sampled[-1] == "-3.0 ± 12.7"
    assert cells(text, "grpo")[0] == ["greedy", "1", "", "50.0", ""]


def test_the_end_of_training_is_the_mean_of_three_iterations_and_of_the_seeds():
    """An iteration 0 has a validation alone."""
    curves = {"score": [None, 9, 1, 2, 3], "kl_per_response": [None, 9, 0, 0, 0.3]}
    curves["pass_rate"] = [None, 9, 0.1, 0.2, 0.3]
    other = {name: [9, *(x + 1 for x in values[2:])] for name, values in curves.items()}
    records = [record("bw", s, 0.5) | {"curves": c} for s, c in enumerate((curves, other))]
    text = tables.rollout_table([("mine", records, "main", "")])
    assert "| score / pass rate / KL at the end | bw |" in text
    assert cells(text, "mine") == [["2.50 / 0.70 / 0.60"]]


def test_prediction_ranks_the_filters_of_a_setting():
    """Greedy scores rise with R2, and so sampled ones (1 - greedy) fall."""
    r2 = {m: 0.1 * k for k, m in enumerate(tables.FILTERS)}
    records = [record(m, 0, 0.5 + 0.02 * k, "profile_low") for k, m in enumerate(tables.FILTERS)]
    settings = [("low", records + [measured(r2, "profile_low", "r2")], "profile_low", "")]
    settings.append(("high", records, "profile_high", ""))  # not run: left out
    text = tables.prediction_table(settings)
    row = cells(text, "low")[0]
    assert row[:3] == ["0.800", "0.00 / -1.00", "0.10 / -0.90"]
    assert row[-4:] == ["+1.00", "+1.00", "-1.00", "-1.00"] == cells(text, "mean")[0][-4:]
    assert not cells(text, "high")
    few = [r for r in settings[0][1] if r["method"] in ("random2", "br", "bw", "r2")]
    text = tables.prediction_table([("low", few, "profile_low", "")])
    assert len(cells(text, "low")[0]) == 4 and "Spearman" not in text  # ranks of three


def test_show_writes_tables_and_figures_of_whole_pipelines_and_of_pipeline_0(tmp_path, monkeypatch):
    """Seed 0 belongs to both; a whole pipeline with seed 1 is no PPO seed of pipeline 0."""
    monkeypatch.chdir(tmp_path)
    tables.RESULTS.parent.mkdir()
    filters = [*tables.FILTERS, *tables.OTHER_FILTERS]
    r2 = {m: 0.05 * k for k, m in enumerate(filters)}
    records = [measured(r2) | {"pipeline": s, "seed": s} for s in range(2)]
    along = {"r2": measured(r2)["r2"]}
    for k, method in enumerate(filters):
        records.append(record(method, 0, 0.5 + 0.01 * k) | along)
        records.append(record(method, 1, 0.6 + 0.01 * k) | along)  # seed 1 of pipeline 0
        records.append(record(method, 1, 0.8 + 0.01 * k, pipeline=1) | along)
    records += [record("sft", s, 0.4 + 0.2 * s, pipeline=s) for s in range(2)]
    records += [record("none", s, 0.5 + 0.1 * s, pipeline=tables.SWEEPS) for s in range(2)]
    records.append(record("none", 0, 0.7, "kl_0.1", pipeline=tables.SWEEPS))
    records += [record(m, 5, 0.1, pipeline=tables.SWEEPS) for m in ("sft", "rm")]
    tables.show(records)
    text = (tmp_path / "results/tables.md").read_text()
    assert cells(text, "`none`")[0][:2] == ["2", "65.0 ± 190.6"]  # whole pipelines: 50 and 80
    assert cells(text, "`sft`")[0][:2] == ["2", "50.0 ± 127.1"]
    assert len(cells(text, "`top`")) == 2  # Tables 2 and 3: it has run on pipeline 0 alone
    assert cells(text, "pipeline 1")[0][-4:] == ["+1.00", "+1.00", "-1.00", "-1.00"]
    assert cells(text, "mean")[0][2] == "0.05 ± 0.00 / -0.95 ± 0.00"  # R2 of random2
    assert cells(text, "KL 0.3")[0][2] == "55.0 ± 63.5"  # 50 and 60
    assert cells(text, "KL 0.1")[0][:3] == ["greedy", "1", "70.0"]
    assert "By reward and advantage" not in text  # nothing but the default has run
    # Table 1: R2 of none, bon, br, bw is 0, 0.2, 0.1 and 0.15 in both pipelines
    before = [row[:4] for row in cells(text, "`none`") if row[0] == "SFT"]
    assert before == [["SFT", "0.000 ± 0.000", "0.200 ± 0.000", "0.100 ± 0.000"]]
    row = cells(text, "`bw`")
    assert [r for r in row if r[-1] == "82.4 / 76.2 / 30.4"][0][-5:-1] == ["6,000"] * 2 + [
        "2,400"
    ] * 2
    assert cells(text, "all filters")[0][:4] == ["+1.00", "+1.00", "-1.00", "-1.00"]
    for name in ("prediction.png", "filters.png"):
        assert (tmp_path / "results" / name).read_bytes()[:4] == b"\x89PNG"


def test_every_run_of_the_plan_is_a_command_that_its_script_takes():
    """Names and outputs are unique, what a run needs comes before it, and no run reads what a
    reader's own stages wrote. One run of each kind goes through its script's flags.
    """
    names, outputs, kinds = {None}, set(), set()
    for run in tables.plan():
        assert run["name"] not in names and run["needs"] in names
        names.add(run["name"])
        for script, *flags in run["commands"]:
            out = flags[flags.index("--out") + 1]
            assert out not in outputs
            outputs.add(out)
            kind = (script, run["group"], run["method"], run["pipeline"] > 0)
            if kind in kinds:
                continue
            kinds.add(kind)
            cfg = tyro.cli(load_script(script).Config, args=flags, use_underscores=True)
            assert (cfg.out, cfg.seed) == (out, run["seed"])
            for value in vars(cfg).values() if "--rescore" not in flags else ():
                for path in value if isinstance(value, list) else [value]:
                    own = str(path).startswith(("data/", "out/"))
                    assert not own or path.startswith(("data/tables/", "out/tables/"))
    assert len(names) > 200 and {kind[0] for kind in kinds} >= {"07_plum.py", "06_baselines.py"}


def test_runs_are_carried_out_recorded_and_not_repeated(pipeline, monkeypatch, tmp_path, capsys):
    """A run that fails is named, what needs it waits, and the others go on."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pipeline["folder"] / "data/tiny", "data/tables/0")
    for stage in ("sft", "rm"):
        shutil.copytree(pipeline["folder"] / "out" / stage, f"out/tables/main/0/{stage}/0")
    monkeypatch.setattr(tables, "ALONG", {"SFT": (1,), "final": (4,)})
    runs = {run["name"]: run | {"needs": None} for run in tables.plan()}
    broken, after, good = (runs[f"main/0/{m}/0"] for m in ("br", "bon", "bw"))
    broken["commands"][0] += ["--data", "nowhere.jsonl"]
    after["needs"] = broken["name"]
    good["commands"][0] += map(str, PPO_FLAGS)
    monkeypatch.setattr(tables, "plan", lambda: [broken, after, good])
    left = tmp_path / "out/tables/main/0/bw/0/rollouts"  # of a run that cannot be resumed
    left.mkdir(parents=True)

    with pytest.raises(SystemExit, match="failed: main/0/br/0"):
        tables.run_all(tables.Config("run", jobs=1))
    said = capsys.readouterr().err
    assert "main/0/br/0: exit code 2" in said and "br/0.log" in said and said.count("\n") == 1
    assert "nowhere.jsonl" in (tmp_path / "out/tables/main/0/br/0.log").read_text()
    done = tables.read_results()
    assert [run["name"] for run in done] == ["main/0/bw/0"]
    # 4 iterations of 8 x 5 samples, two of five kept; in the first one only the critic learns
    cost = {"samples": 160, "rm_passes": 160, "policy_rows": 3 * 16, "critic_rows": 4 * 16}
    assert done[0]["cost"] == cost
    rows = json.loads((tmp_path / "out/tables/main/0/bw/0/eval/results.json").read_text())
    means = [rows[0][name]["mean"] for name in ("greedy pass@1", "pass@1")]
    assert list(done[0]["test"].values()) == means and rows[0]["policy"].endswith("bw/0/last")
    assert len(done[0]["r2"]) == 2 and done[0]["r2"][0]["pooled"].keys() >= set(tables.FILTERS)
    assert len(done[0]["curves"]["validation_pass_at_1"]) == 5

    monkeypatch.setattr(tables, "plan", lambda: [good])  # it is done: nothing runs again
    monkeypatch.setattr(tables, "carry_out", None)
    tables.run_all(tables.Config("run", jobs=1))
    assert tables.read_results() == done


def test_what_a_run_needs_is_made_again_where_its_files_are_gone(tmp_path, monkeypatch):
    """results.jsonl is in the repository, models and data are not."""
    monkeypatch.chdir(tmp_path)
    recorded = {f"main/0/{method}/0" for method in ("data", "sft", "rm", "none", "random2")}
    names = [run["name"] for run in tables.to_do(recorded, "main/0/br")]
    made_again = ["main/0/data/0", "main/0/sft/0", "main/0/rm/0"]
    assert names[:4] == [*made_again, "main/0/br/0"] and len(names) == 3 + len(tables.SEEDS)
    for folder in ("data/tables/0", "out/tables/main/0/rm/0"):
        (tmp_path / folder).mkdir(parents=True)
    names = [run["name"] for run in tables.to_do(recorded, "main/0/br")]
    assert names[:2] == ["main/0/sft/0", "main/0/br/0"]


@pytest.mark.parametrize("score", [0.5, 0.6])
def test_a_run_made_again_that_differs_from_its_record_is_refused(
    score, tmp_path, monkeypatch, capsys
):
    """On another processor a model may come out otherwise, and runs with it would be unlike."""
    monkeypatch.chdir(tmp_path)
    recorded = record("sft", 0, 0.5)
    tables.RESULTS.parent.mkdir()
    tables.sandbox.write_jsonl(tables.RESULTS, [recorded])
    runs = {run["name"]: run for run in tables.plan()}
    runs["main/0/sft/0"]["needs"] = None
    runs["main/0/rm/0"]["needs"] = "main/0/sft/0"
    monkeypatch.setattr(tables, "plan", lambda: [runs["main/0/sft/0"], runs["main/0/rm/0"]])
    made = {"sft": record("sft", 0, score), "rm": record("rm", 0, 0.7)}
    monkeypatch.setattr(tables, "carry_out", lambda run: made[run["method"]])
    with contextlib.nullcontext() if score == 0.5 else pytest.raises(SystemExit, match="sft/0"):
        tables.run_all(tables.Config("run"))
    names = [run["name"] for run in tables.read_results()]
    assert names == ["main/0/sft/0", "main/0/rm/0"][: 2 if score == 0.5 else 1]
    assert ("differs from its record" in capsys.readouterr().err) == (score == 0.6)


@pytest.mark.parametrize(
    "flags, words", [(("show",), "tables.py run"), (("run", 1, 0), "--jobs 0")]
)
def test_what_cannot_be_done_is_refused(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        tables.main(tables.Config(*flags))
    assert error.value.code == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
