"""About the text of the project: copied helpers stay equal, every flag is read, what the README names exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("[0-9]*.py"))


def definitions(path):
    """{name: syntax tree without positions} of the functions and classes at the top of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: ast.dump(node) for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_same_name_same_code():
    seen = {}
    shared = 0
    for path in SCRIPTS + [ROOT / "sandbox.py"]:
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
    config = next(node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == "Config")
    lines = text.splitlines()
    for node in config.body:
        if isinstance(node, ast.AnnAssign):
            name = node.target.id
            assert re.search(rf"\bcfg\.{name}\b", text), f"{name} is a flag that nobody reads"
            assert " # " in lines[node.end_lineno - 1], f"{name} has no comment"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_import_nothing_of_ours_but_the_sandbox(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert not (ROOT / f"{alias.name}.py").exists() or alias.name == "sandbox"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_nothing_runs_at_import(path):
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for number, node in enumerate(ast.parse(path.read_text(encoding="utf-8")).body):
        docstring = number == 0 and isinstance(node, ast.Expr)
        assert docstring or isinstance(node, allowed) or ast.unparse(node).startswith("if __name__ == '__main__':")


def test_readme_names_files_and_flags_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files = set(re.findall(r"\b(?:[\w/]+/)?[\w]+\.(?:py|sh|png)\b", text))
    made = re.compile(r"^(out|data)/|^(curves|reliability|r2)\.png$")
    missing = [name for name in sorted(files) if not (ROOT / name).exists() and not made.search(name)]
    assert not missing, f"README.md names {missing}"
    flags = set(re.findall(r"(?<![\w-])--([a-z][a-z_]+)\b", text))
    known = {"help"}
    for path in SCRIPTS:
        config = next(n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef) and n.name == "Config")
        known |= {node.target.id for node in config.body if isinstance(node, ast.AnnAssign)}
    source = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "sandbox.py", *ROOT.glob("runs/*.sh"), *ROOT.glob("tools/*.py")])
    unknown = [flag for flag in sorted(flags - known) if f"--{flag}" not in source]
    assert not unknown, f"README.md names flags {unknown}"
