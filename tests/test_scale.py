"""The plug-ins in scale/ carry stage 4's filter along: the same rows, from the same random numbers.

Their engines are not needed here. scale/test.sh tests the plug-ins in them.
"""

import ast
import re
from pathlib import Path

import pytest
import torch

SCALE = Path(__file__).resolve().parent.parent / "scale"
FIXED_NUMBER = ("bw", "br", "bon", "random2", "none")


def select_fixed_number(name):
    """The function's source in a file of scale/, and the function itself."""
    tree = ast.parse((SCALE / name).read_text(encoding="utf-8"))
    (node,) = (n for n in tree.body if getattr(n, "name", None) == "select_fixed_number")
    scope = {"torch": torch}
    exec(compile(ast.Module([node], []), name, "exec"), scope)
    return ast.unparse(node), scope["select_fixed_number"]


def test_both_engines_have_the_same_filter():
    assert select_fixed_number("pf_trl.py")[0] == select_fixed_number("pf_verl.py")[0]


@pytest.mark.parametrize("strategy", FIXED_NUMBER)
def test_it_keeps_what_stage_4_keeps(ppo, strategy):
    """The same rows from the same random numbers, with ties and with any number of responses."""
    _, select = select_fixed_number("pf_trl.py")
    generator = torch.Generator().manual_seed(0)
    for responses in (2, 3, 5, 8):
        scores = torch.randn(40, responses, generator=generator)
        scores[::2] = scores[::2].round()  # ties in every second prompt
        scores[0] = 0.0
        kept = [
            f(scores, strategy, torch.Generator().manual_seed(responses))
            for f in (select, ppo.select_responses)
        ]
        for ours, theirs in zip(*kept):
            assert ours.tolist() == theirs.tolist()
        numbers = kept[0][0].bincount(minlength=40)
        assert numbers.unique().numel() == 1  # equally many of each prompt


def test_strategies_of_unequal_numbers_are_refused_by_name(ppo):
    _, select = select_fixed_number("pf_trl.py")
    others = [s for s in ppo.Strategy.__args__ if s not in (*FIXED_NUMBER, "single")]
    assert {"top", "top_random", "top_bottom", "pow_1"} <= set(others)
    for strategy in others:
        with pytest.raises(ValueError, match=f"'{strategy}'"):
            select(torch.zeros(2, 5), strategy, torch.Generator())


@pytest.mark.parametrize("engine", ["verl", "trl"])
def test_one_version_everywhere(engine):
    """The hooks are internals: file, README and test environment name one version of the engine."""
    script = (SCALE / "test.sh").read_text(encoding="utf-8")
    (version,) = set(re.findall(rf"\b{engine}==([\d.]*\d)", script))
    assert f"{engine}=={version}" in (SCALE / "README.md").read_text(encoding="utf-8")
    for kind in ("pf", "reward"):
        docstring = (SCALE / f"{kind}_{engine}.py").read_text(encoding="utf-8").split('"""')[1]
        assert re.search(rf"{engine} {re.escape(version)}\b", docstring, re.IGNORECASE)
