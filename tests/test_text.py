"""About the text of the project: copied helpers stay equal, flags are read, named things exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("[0-9]*.py"))
PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md")]


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def definitions(path):
    """{name: syntax tree without positions} of the functions and classes at the top of a file."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: ast.dump(node) for node in parsed(path).body if isinstance(node, kinds)}


def config_fields(path):
    config = next(n for n in parsed(path).body if getattr(n, "name", "") == "Config")
    return [node for node in config.body if isinstance(node, ast.AnnAssign)]


def test_same_name_same_code():
    seen, shared = {}, 0
    for path in SCRIPTS:
        for name, code in definitions(path).items():
            if name in ("main", "Config"):
                continue
            first, first_code = seen.setdefault(name, (path.name, code))
            shared += first != path.name
            assert code == first_code, f"{name} differs between {first} and {path.name}"
    assert shared > 30  # the helpers are there, and compared


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_config_field_is_read_and_explained(path):
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in config_fields(path):
        name = node.target.id
        assert re.search(rf"\bcfg\.{name}\b", text), f"{name} is a flag that nobody reads"
        above, own = lines[node.lineno - 2].strip(), lines[node.end_lineno - 1]
        assert " # " in own or above.startswith("# "), f"{name} has no comment"


def test_04_has_at_most_45_flags_and_its_loop_before_the_middle():
    assert len(config_fields(ROOT / "04_pf_ppo.py")) <= 45
    for path in SCRIPTS:
        main = next(node for node in parsed(path).body if getattr(node, "name", "") == "main")
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert path.name.startswith("00") or main.lineno < lines / 2, path.name


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_import_nothing_of_ours_but_the_sandbox(path):
    ours = {file.stem for file in ROOT.rglob("*.py") if ".venv" not in str(file)}
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not (set(names) & ours) - {"sandbox"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_nothing_runs_at_import(path):
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)
    for number, node in enumerate(parsed(path).body):
        docstring = number == 0 and isinstance(node, ast.Expr)
        guard = ast.unparse(node).startswith("if __name__ == '__main__':")
        assert docstring or guard or isinstance(node, allowed)


def test_readme_fits_on_a_few_screens():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 100 and "http" not in line] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_name_files_flags_and_functions_that_exist(page):
    text = page.read_text(encoding="utf-8")
    made = re.compile(r"^(out|data)/|^(curves|reliability|r2)\.png$")
    for name in sorted(set(re.findall(r"\b(?:[\w]+/)*[\w]+\.(?:py|sh|png|md|txt|toml)\b", text))):
        places = (ROOT / name, page.parent / name, ROOT / "results" / name, ROOT / "docs" / name)
        assert (
            made.search(name)
            or any(place.exists() for place in places)
            or (name in ("table.txt", "train.py"))
        ), f"{page.name} names {name}"
    known = {"help", "index-url"} | {n.target.id for path in SCRIPTS for n in config_fields(path)}
    files = [ROOT / "sandbox.py", *ROOT.glob("runs/*.sh"), *ROOT.glob("tools/*.py")]
    files += [*ROOT.glob("scale/*.py"), *ROOT.glob("scale/*.md")]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    for flag in sorted(set(re.findall(r"(?<![\w-])--([a-z][a-z_-]+)\b", text)) - known):
        assert f"--{flag}" in source or f'"{flag}"' in source, f"{page.name} names --{flag}"


def test_the_equations_of_the_readme_are_where_it_says():
    """Rows such as | GAE | `gae` | `04_pf_ppo.py` |: each function is in the file."""
    rows = re.findall(
        r"^\|.*\| ((?:`\w+`(?:, )?)+) \| ((?:`0\d_\w+\.py`(?:, )?)+) \|$",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(rows) > 5
    for functions, files in rows:
        for file in re.findall(r"0\d_\w+\.py", files):
            defined = definitions(ROOT / file)
            assert all(name in defined for name in re.findall(r"`(\w+)`", functions)), functions
