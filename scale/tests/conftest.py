"""Shared by the tests of both engines: stage 4 as a module. Run by scale/test.sh."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCALE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(SCALE), str(SCALE.parent)]


@pytest.fixture(scope="session")
def ppo():
    spec = importlib.util.spec_from_file_location("ppo", SCALE.parent / "04_pf_ppo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["ppo"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module
