"""tools/tables.py: a run becomes a record, and the tables say what the records say."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PPO_FLAGS, ROOT, load_script, run_script

sys.path.insert(0, str(ROOT / "tools"))
import tables  # noqa: E402


def record(method, seed, last, best=None, group="main", rows=2400):
    test = {"best": {"greedy": best or last, "sampled": 0.4}, "last": {"greedy": last, "sampled": 1 - last},
            "equal": {"greedy": last - 0.1, "sampled": 0.2}}
    columns = {"iteration": [0, 1, 2], "rm_score": [None, 0.1, 0.2], "pass_rate": [None, 0.3, 0.3], "kl_per_response": [None, 0.1, 0.2]}
    cost = {"samples": 6000, "policy_rows": rows, "critic_rows": rows, "seconds": 100.0, "seconds_train": 40.0}
    return {"group": group, "method": method, "seed": seed, "iterations": columns, "cost": cost, "test": test}


RECORDS = [record("bw", 0, 0.80), record("bw", 1, 0.84), record("random2", 0, 0.78), record("random2", 1, 0.80),
           record("none", 0, 0.81), record("none", 1, 0.81), record("none", 2, 0.84)]


def test_intervals_by_hand():
    # 80 and 84: mean 82, standard error 2, times t(0.975, 1 degree of freedom) = 12.706
    assert tables.interval([80, 84]) == pytest.approx((82, 25.412), abs=1e-2)
    assert tables.cell([0.80, 0.84]) == "82.0 ± 25.4" and tables.cell([0.8]) == "80.0" and tables.cell([]) == ""
    assert tables.cell([-0.01], sign=True) == "-1.0" and tables.cell([0.5], percent=False) == "0.500"


def test_differences_are_paired_by_seed():
    pairs = tables.paired(RECORDS, "main", "bw", "none", tables.test("last", "greedy"))
    assert pairs == pytest.approx([-0.01, 0.03])  # seed 2 has no partner


def test_table_1_has_the_pairs_of_each_policy():
    r2 = {name: {"r2": {"mean": 0.5 + 0.1 * k}, "r2_within": {"mean": 0.2}, "pass_rate": {"mean": 0.4}}
          for k, name in enumerate(("none", "random2", "bon", "br", "bw"))}
    records = [{"group": "r2", "method": "none", "seed": seed, "r2": {"sft": r2, "middle": r2, "final": r2},
                "pair_accuracy": {"sft": 0.9, "middle": 0.8, "final": 0.7 + 0.02 * seed}} for seed in (0, 1)]
    records.append({"group": "rm_anew", "method": "rm", "seed": 0,
                    "accuracy": {"all pairs": {"pairs": 50, "accuracy": 0.8, "low": 0.75, "high": 0.85}}})
    assert "RM trained anew" not in tables.table_1(records)
    records.append(records[0] | {"group": "rm_anew", "pair_accuracy": {"sft": 0.5, "middle": 0.6, "final": 0.75}})
    text = tables.table_1(records)
    assert "| final, RM trained anew | pooled R² | 0.500 | 0.600 | 0.700 | 0.800 | 0.900 | 0.750 |" in text
    assert "| final | pooled R² | 0.500 ± 0.000 | 0.600 ± 0.000 | 0.700 ± 0.000 | 0.800 ± 0.000 | 0.900 ± 0.000 | 0.710 ± 0.127 |" in text
    assert "| final | R² within prompts | 0.200" in text and "| final | paper's R² | 0.876 |" in text and "| final | pass rate | 0.400" in text
    assert "puts 0.800 of the 50 held-out pairs in the right order (0.750 to 0.850)" in text


def test_table_2_has_a_row_a_method():
    lines = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in tables.table_2(RECORDS).splitlines()}
    assert list(lines)[2:] == ["`none`", "`random2`", "`bw`"]
    assert lines["`bw`"] == ["2", "82.0 ± 25.4", "82.0 ± 25.4", "18.0 ± 25.4", "2,400", "72.0 ± 25.4", "+3.0 ± 12.7", "+1.0 ± 25.4",
                             "-3.0 ± 12.7", "-1.0 ± 25.4", "82.4 / 76.2 / 30.4"]


def test_table_3_ranks_the_strategies():
    """Four strategies whose final score rises with pooled R2 and falls with the one within prompts."""
    strategies = ("bon", "bw", "none", "random2")
    r2 = {s: {"r2": {"mean": 0.5 + 0.1 * k}, "r2_within": {"mean": 0.9 - 0.1 * k}} for k, s in enumerate(strategies)}
    records = [record(s, seed, 0.6 + 0.05 * k + 0.001 * seed) for k, s in enumerate(strategies) for seed in range(3)]
    records.append(record("bon", 3, 0.99))  # a seed that the others lack: its score is in the table, not in the correlation
    text = tables.table_3(records + [{"group": "r2", "method": "none", "seed": seed, "r2": {"sft": r2}} for seed in range(4)])
    assert "seeds 0, 1, 2, which all strategies have" in text  # and sampled pass@1 falls where the greedy one rises
    assert "| 4, all | greedy | +1.00 (+1.00 to +1.00) | -1.00 (-1.00 to -1.00) |" in text
    assert "| 4, all | sampled | -1.00 (-1.00 to -1.00) | +1.00 (+1.00 to +1.00) |" in text
    assert "| 3, without BoN and `top`, which keep high rewards only | greedy | +1.00 (+1.00 to +1.00) |" in text


def test_r2_predicts_within_a_profile():
    """Scores of five filters fall with pooled R2 and rise with the one within prompts; a profile without BoN is left out."""
    methods, group = tables.FILTERS[:5], "profile_low_hash"
    r2 = {m: {"r2": {"mean": -0.1 * k}, "r2_within": {"mean": 0.1 * k}} for k, m in enumerate(methods)}
    records = [record(m, seed, 0.5 + 0.02 * k, group=group) for k, m in enumerate(methods) for seed in range(2)]
    records.append({"group": group, "method": "r2", "seed": 0, "r2": {"sft": r2}})
    records += [{**r, "group": "profile_high_hash"} for r in records if r["method"] != "bon"]
    lines = [line for line in tables.prediction(records, "profile_", "profile", methods).splitlines() if line.startswith("|")]
    assert lines[2:] == ["| low_hash | -1.00 | +1.00 | +1.00 | -1.00 |", "| mean | -1.00 | +1.00 | +1.00 | -1.00 |"]
    records.append(record("bw", 2, 0.99, group=group))  # a seed that the others do not have: left out
    greedy, sampled = tables.sweep_table(records, tables.settings("profile_"), "profile", tables.FILTERS[:5]).split("Sampled pass@1")
    row = {part: [c.strip() for c in line.split("|")[2:-1]] for part, text in (("greedy", greedy), ("sampled", sampled))
           for line in text.splitlines() if line.startswith("| low_hash")}
    assert row["sampled"][:5] == ["2", "50.0 ± 0.0", "48.0 ± 0.0", "46.0 ± 0.0", "44.0 ± 0.0"]  # PPO-M, random2, BW, BR: 1 - greedy
    assert row["greedy"][6:10] == ["50.0 ± 0.0", "52.0 ± 0.0", "54.0 ± 0.0", "56.0 ± 0.0"] and row["greedy"][-3:] == ["+4.0 ± 0.0", "+2.0 ± 0.0", "+4.0 ± 0.0"]
    assert row["sampled"][-3:] == ["-4.0 ± 0.0", "-2.0 ± 0.0", "-4.0 ± 0.0"]
    assert "RM accuracy" not in greedy  # empty in every row
    assert "| -0.40 / 0.40 |" in tables.sweep_table(records, tables.settings("profile_"), "profile", tables.FILTERS[:5]) and tables.prediction([], "profile_", "profile", methods) == ""


def test_the_mean_of_a_sweep_is_taken_within_seeds():
    """BW is 4 points ahead in one profile, 2 behind in the other, whatever the seed adds: 1 point, without an interval's width."""
    records = [record(m, seed, 0.5 + lead + 0.1 * seed, group=f"profile_{profile}_hash") for seed in range(3)
               for profile, leads in (("low", (0, 0.04)), ("high", (0, -0.02))) for m, lead in zip(("random2", "bw"), leads)]
    records.append(record("bw", 3, 0.99, group="profile_low_hash"))  # not in the other row, nor of random2
    lines = tables.sweep_table(records, tables.settings("profile_"), "profile", ("random2", "bw")).splitlines()
    mean = [[c.strip() for c in line.split("|")[2:-1]] for line in lines if line.startswith("| mean")]
    assert mean == [["3", "60.0 ± 24.8", "61.0 ± 24.8", "+1.0 ± 0.0"], ["3", "40.0 ± 24.8", "39.0 ± 24.8", "-1.0 ± 0.0"]]
    assert "| mean" not in tables.sweep_table(records, tables.settings("profile_"), "profile", ("random2", "bw"), mean=False)


def test_every_run_of_the_plan_is_a_command_that_its_script_takes(monkeypatch):
    plan = tables.plan()
    assert len({tables.key(run) for run in plan}) == len(plan)
    seen = set()
    for run in plan:
        command = run["command"] or []
        if not command or tuple(command) in seen or not (ROOT / command[0]).is_file():
            continue
        seen.add(tuple(command))
        name, flags = command[0], command[1:]
        if name == "tools/controlled.py":
            name, flags = ("03_r2_analysis.py" if flags[0] == "r2" else "04_pf_ppo.py"), command[command.index("--") + 1:]
        script = load_script(name)
        monkeypatch.setattr(sys, "argv", [name, *flags])
        script.parse_config(script.Config, script.__doc__)


def test_a_run_is_trained_tested_and_recorded(pipeline, monkeypatch, tmp_path):
    monkeypatch.chdir(pipeline["folder"])
    monkeypatch.setattr(tables, "EQUAL_PASSES", 32)  # two iterations of 16 kept responses
    run = {"group": "main", "method": "bw", "seed": 1, "command": ["04_pf_ppo.py", "--strategy", "bw", *map(str, PPO_FLAGS),
                                                                    "--iterations", "6"]}
    out = tables.WORK / "main/bw/1"
    out.mkdir(parents=True)
    done = tables.train_and_test(run, out)
    assert done["cost"]["samples"] == 6 * 40 and done["cost"]["critic_rows"] == 6 * 16 and done["cost"]["policy_rows"] == 5 * 16
    assert done["checkpoints"]["last"] == 6 and done["checkpoints"]["equal"] == 5  # the first saved one after two iterations
    rows = {Path(row["policy"]).name: row for row in json.loads((out / "eval/results.json").read_text())}
    at, folders = done["checkpoints"], {"best": "best", "last": "last", "equal": "iteration_5"}
    assert rows.keys() == {folders[name] for name in folders if name == "last" or at[name] != at["last"]}  # each one once
    for name, folder in folders.items():
        row = rows.get(folder, rows["last"])
        assert done["test"][name] == {"greedy": row["greedy pass@1"]["mean"], "sampled": row["pass@1"]["mean"]}
    shutil.rmtree(out / "eval")
    sweep = tables.train_and_test({**run, "group": "kl_0.1"}, out)  # the finished run, as one of a sweep
    assert sweep["test"] == {"last": done["test"]["last"]} and sweep["checkpoints"] == at
    assert done["iterations"]["iteration"] == list(range(7)) and done["iterations"]["rm_score"][0] is None and not list(out.glob("train/iteration_*"))
    tables.RESULTS.mkdir()
    (tables.RESULTS / "results.jsonl").write_text(json.dumps(done) + "\n")
    assert "| `bw` | 1 |" in run_script("tools/tables.py", "show", cwd=pipeline["folder"]).stdout
    assert not (tables.RESULTS / "frontier.png").exists()  # no line through one KL coefficient
    (tables.RESULTS / "results.jsonl").write_text(json.dumps(done) + "\n" + json.dumps({**done, "group": "kl_0.1"}) + "\n")
    run_script("tools/tables.py", "show", cwd=pipeline["folder"])
    for name in ("training.png", "frontier.png"):
        assert (tables.RESULTS / name).read_bytes()[:4] == b"\x89PNG"


def test_a_run_that_fails_is_named_and_no_other_starts(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [{"group": "main", "method": "bw", "seed": seed, "command": ["04_pf_ppo.py", "--data", "nowhere.jsonl"], "needs": None}
            for seed in (0, 1)]
    monkeypatch.setattr(tables, "plan", lambda: runs)
    with pytest.raises(SystemExit) as error:
        tables.run_all(SimpleNamespace(budget_minutes=1, jobs=1, only=None, methods=None))
    said = capsys.readouterr().err
    assert error.value.code == 1 and said.count("\n") == 1 and "exit code 2" in said and "bw/0/log.txt" in said
    assert "nowhere.jsonl" in (tmp_path / "out/tables/main/bw/0/log.txt").read_text() and not (tmp_path / "results/results.jsonl").exists()


def test_nothing_to_show(tmp_path):
    done = run_script("tools/tables.py", "show", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "tables.py run" in done.stderr and not list(tmp_path.iterdir())
