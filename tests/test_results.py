"""The numbers of README.md and results/README.md are those of the files that scripts wrote."""

import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import tables  # noqa: E402


def read(name):
    """A page without its emphasis, minus signs as in the tables."""
    return (ROOT / name).read_text(encoding="utf-8").replace("**", "").replace("−", "-")


def intervals(text):
    return re.findall(r"[+-]?\d+\.\d+ ± \d+\.\d+", re.sub(r"\s*\n", " ", text))


def test_tables_are_what_the_records_say(tmp_path, monkeypatch):
    written = (ROOT / "results/tables.md").read_text(encoding="utf-8")
    monkeypatch.chdir(ROOT)
    records = tables.read_results()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    tables.show(records)
    assert (tmp_path / "results/tables.md").read_text(encoding="utf-8") == written


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_each_interval_of_a_page_is_in_the_tables(page):
    found, there = intervals(read(page)), set(intervals(read("results/tables.md")))
    there |= {number.lstrip("+-") for number in there}  # "18.8 ± 4.1 points behind"
    assert len(found) > 5 and set(found) - there == set()


def test_what_readme_shows_of_one_run_is_what_tiny_sh_printed():
    section = read("README.md").split("## What you should see")[1].split("\n## ")[0]
    (shown,) = re.findall(r"```text\n(.*?)```", section, re.DOTALL)
    printed = read("results/tiny.txt").splitlines()
    assert len(shown.splitlines()) > 5
    assert set(shown.splitlines()) - set(printed) == {"..."}


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_a_method_has_its_own_numbers(page):
    """A row of the table is the method's row of the whole pipelines, R2 that of their mean."""
    whole = read("results/tables.md").split("## Whole pipelines")[1].split("## ")[0].splitlines()
    (mean,) = [line.split("|")[3:8] for line in whole if line.startswith("| mean |")]
    r2 = dict(zip(tables.FILTERS, map(intervals, mean)))
    shown = {}
    for method in ("sft", *tables.FILTERS):
        name = "SFT" if (method, page) == ("sft", "README.md") else f"`{method}`"
        rows = [line for line in read(page).splitlines() if line.startswith("|") and "±" in line]
        (row,) = [row for row in rows if row.split("|")[1].endswith(f"{name} ")]
        (there,) = [line for line in whole if line.startswith(f"| `{method}` |")]
        shown[method] = intervals(row)
        assert set(shown[method]) <= {*intervals(there), *r2.get(method, [])}
    assert len(shown["bw"]) >= 4
