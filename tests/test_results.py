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
