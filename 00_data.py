r"""Stage 0: problems in one format, from the built-in generator or from a public problem set.

Writes  data/<dataset>/{sft,rm,ppo,validation,test}.jsonl, as far as the set has these splits;
        data/tiny/plum.jsonl: sft.jsonl, then requests for tests of the same problems (07_plum.py).

A line of data/tiny/sft.jsonl, spread out:

    {"task_id": "tiny/sft/147",
     "prompt": "\"\"\"halve the number rounding down, then take its square.\"\"\"\ndef solve(n):\n",
     "prefix": "def solve(n):\n", "setup": "", "entry_point": "solve",
     "tests": ["assert solve(0) == 0", "assert solve(-4) == 4", "assert solve(53) == 676",
               "assert solve(-16) == 64", "assert solve(36) == 324", "assert solve(25) == 144"],
     "solution": "    n = n % 2\n    return n * n\n", "source": "tiny",
     "steps": ["half", "squared"], "flaw": [1]}

`prefix + solution` is the program. `setup` runs after it, before the tests. Only the tiny set has
`steps`, and only its sft.jsonl has `flaw`: the numbers of the wrong steps, null for none.

The tiny set stands in for the paper's setting (arXiv 2409.06957, section 4: programs scored by
tests) on a laptop. A problem chains one to five steps on a list, a text or a number. Some SFT
solutions are wrong, as scraped code is: correct ones alone would leave nothing for PPO to learn,
since a small model then solves a problem or miscopies digits, which no reward model can see.

Run     python 00_data.py
        python 00_data.py --dataset mbpp --file mbpp.jsonl.gz     without --file: from the hub

Simplified against the paper: it collects 130k SFT examples, 7k prompts for the reward model and
3k for PPO; ours are generated, or are the training files of public sets, cut into shares.
"""

import ast
import base64
import contextlib
import dataclasses
import functools
import io
import json
import logging
import os
import pickle
import random
import re
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import tyro

import sandbox

SPLITS = ("sft", "rm", "ppo", "validation", "test")


@dataclasses.dataclass
class Config:
    dataset: str = "tiny"  # which problems: tiny, or a public set (docs/datasets.md has the table)
    # local files of a public set (.jsonl, .gz, .json, .parquet)
    file: list[str] = dataclasses.field(default_factory=list)
    out: str = ""  # output folder; empty: data/<dataset>
    seed: int = 0  # seed of everything random
    show_one_test: bool = False  # MBPP: one test in the prompt instead of all; for --reward tests
    sft: int = 6000  # tiny: problems with flawed solutions, for fine-tuning; paper: 130k
    rm: int = 2000  # tiny: prompts for the reward model; paper: 7k
    ppo: int = 1000  # tiny: prompts for PPO; paper: 3k
    validation: int = 300  # tiny: problems that choose the best checkpoint
    test: int = 500  # tiny: problems that choose nothing; 95% interval of pass@1: about 4 points
    # tiny: weights of problems of 1, 2, .. steps
    lengths: list[float] = dataclasses.field(default_factory=lambda: [5, 30, 35, 20, 10])
    hard_share: float = 0.21  # tiny: share of the kinds of step that are mostly wrong


# ---- main ----


def main(cfg):
    """Make the problems, then put the finished folder in place."""
    check_config(cfg)
    out = Path(cfg.out or f"data/{cfg.dataset}")
    if sandbox.finished(cfg, out):
        return
    started = time.perf_counter()
    files = tiny_splits(cfg) if cfg.dataset == "tiny" else public_splits(cfg)
    if cfg.dataset == "tiny":
        files["plum"] = files["sft"] + plum_records(files["sft"], cfg.seed)
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, records in files.items():
        sandbox.write_jsonl(temporary / f"{name}.jsonl", records)
    sandbox.save_config(cfg, temporary)
    os.rename(temporary, out)
    counts = ", ".join(f"{len(records)} {name}" for name, records in files.items())
    print(f"{out}: {counts} in {time.perf_counter() - started:.0f} s")


def check_config(cfg):
    """Refuse settings that cannot work, in one line."""
    if cfg.dataset not in ("tiny", *SETS):
        sandbox.fail(f"--dataset {cfg.dataset}: choose one of tiny, {', '.join(SETS)}")
    if cfg.file and cfg.dataset == "tiny":
        sandbox.fail("--file goes with a public set; add --dataset humaneval, for example")
    for split in SPLITS:
        if getattr(cfg, split) < 1:
            sandbox.fail(f"--{split} {getattr(cfg, split)}: a split needs at least one problem")
    finite = 0 < sum(cfg.lengths) < float("inf")
    if not (finite and len(cfg.lengths) <= 8 and min(cfg.lengths) >= 0):
        sandbox.fail("--lengths needs one to eight weights, none below 0 and one above")
    if not 0 <= cfg.hard_share < 1:
        sandbox.fail("--hard_share must be at least 0 and below 1")


# ---- the tiny set: kinds of step ----

# Each kind: the variables that it reads and makes (xs: list of ints, s: text, n: number), what the
# prompt may call it, correct lines and wrong ones. The first right and the first wrong are usual.
# A kind has one constant, if any: with several, a model of 0.9M parameters miscopied most of them.
STEP_TABLE = """
keep_above xs -> xs
    say    keep the numbers above 3 | keep only numbers greater than 3 | drop the numbers up to 3
    right  [x for x in xs if x > 3]
    wrong  [x for x in xs if x >= 3] | [x for x in xs if x < 3]
keep_at_least xs -> xs
    say    keep the numbers of at least 4 | drop the numbers below 4 | keep numbers from 4 up
    right  [x for x in xs if x >= 4]
    wrong  [x for x in xs if x > 4] | [x for x in xs if x <= 4]
keep_positive xs -> xs
    say    keep the positive numbers | drop zeros and negative numbers
    say    keep numbers greater than zero
    right  [x for x in xs if x > 0]
    wrong  [x for x in xs if x >= 0] | [x for x in xs if x < 0]
keep_odd xs -> xs
    say    keep the odd numbers | drop the even numbers | keep only what is odd
    right  [x for x in xs if x % 2 == 1] | [x for x in xs if x % 2 != 0]
    wrong  [x for x in xs if x % 2 == 0] | [x for x in xs if x // 2 == 1]
keep_repeated xs -> xs
    say    keep numbers that occur more than once | drop numbers that occur once
    say    keep the repeated numbers
    right  [x for x in xs if xs.count(x) > 1]
    wrong  [x for x in xs if xs.count(x) == 1] | [x for x in xs if xs.count(x) > 2]
drop_largest xs -> xs
    say    drop the largest number | remove every copy of the maximum
    say    throw away the highest number
    right  [x for x in xs if x != max(xs)] | [x for x in xs if x < max(xs)]
    wrong  [x for x in xs if x != min(xs)] | [x for x in xs if x == max(xs)]
reverse xs -> xs
    say    reverse the list | put the list in reverse order | turn the list around
    right  xs[::-1] | list(reversed(xs))
    wrong  sorted(xs, reverse=True) | xs[-2::-1]
sort_down xs -> xs
    say    sort from large to small | put the list in descending order | sort downwards
    right  sorted(xs, reverse=True) | sorted(xs)[::-1]
    wrong  sorted(xs) | xs[::-1]
unique xs -> xs
    say    drop duplicates | keep the first of equal numbers | remove repeated numbers
    right  list(dict.fromkeys(xs))
    wrong  sorted(set(xs)) | [x for x in xs if xs.count(x) == 1]
square xs -> xs
    say    square each number | replace numbers by their squares | multiply each number by itself
    right  [x * x for x in xs] | [x ** 2 for x in xs]
    wrong  [x * 2 for x in xs] | [x ** 3 for x in xs]
negate xs -> xs
    say    negate each number | flip the sign of every number | swap plus and minus
    right  [-x for x in xs]
    wrong  [abs(x) for x in xs] | [-abs(x) for x in xs]
absolute xs -> xs
    say    take absolute values | drop the signs | make negative numbers positive
    right  [abs(x) for x in xs]
    wrong  [-x for x in xs] | [max(x, 0) for x in xs]
cap xs -> xs
    say    lower numbers above 5 to 5 | cap each number at 5 | limit the numbers to at most 5
    right  [min(x, 5) for x in xs]
    wrong  [max(x, 5) for x in xs] | [x for x in xs if x <= 5]
last xs -> xs
    say    take the last 2 numbers | keep the last 2 | keep 2 numbers at the end
    right  xs[-2:]
    wrong  xs[:2] | xs[2:]
drop_tail xs -> xs
    say    drop the last number | leave out the last number | remove the tail of the list
    right  xs[:-1]
    wrong  xs[1:] | xs[:-2]
running_sums xs -> xs
    say    take running sums | replace the list by its partial sums | sum up to each number
    right  [sum(xs[:i + 1]) for i in range(len(xs))]
    wrong  [sum(xs[:i]) for i in range(len(xs))] | [sum(xs[i:]) for i in range(len(xs))]
differences xs -> xs
    say    take differences of neighbours | subtract each number from the next
    say    list the steps between neighbours
    right  [b - a for a, b in zip(xs, xs[1:])]
    wrong  [a - b for a, b in zip(xs, xs[1:])] | [b + a for a, b in zip(xs, xs[1:])]
mirror xs -> xs
    say    append the reversed list | add a mirrored copy | follow the list by its reverse
    right  xs + xs[::-1]
    wrong  xs + xs | xs[::-1] + xs
count xs -> n
    say    count the numbers | take the length of the list | say how many numbers there are
    right  len(xs)
    wrong  len(xs) - 1 | sum(xs)
smallest xs -> n
    say    take the smallest number | find the minimum | pick the lowest number
    right  min(xs)
    wrong  max(xs) | min(xs, key=abs)
count_above xs -> n
    say    count the numbers above 4 | say how many numbers exceed 4 | count what is greater than 4
    right  sum(x > 4 for x in xs) | len([x for x in xs if x > 4])
    wrong  sum(x >= 4 for x in xs) | sum(x < 4 for x in xs)
count_distinct xs -> n
    say    count the distinct numbers | say how many different numbers there are
    say    count the numbers without duplicates
    right  len(set(xs))
    wrong  len(xs) | len(set(xs)) - 1
reverse_text s -> s
    say    reverse the text | spell the text backwards | turn the text around
    right  s[::-1]
    wrong  ' '.join(s.split()[::-1]) | s[-2::-1]
swap_case s -> s
    say    swap upper and lower case | flip the case of each letter
    say    exchange capital and small letters
    right  s.swapcase()
    wrong  s.upper() | s.lower()
drop_vowels s -> s
    say    drop the vowels | remove all vowels | throw away vowels
    right  ''.join(c for c in s if c.lower() not in 'aeiou')
    wrong  ''.join(c for c in s if c not in 'aeiou') | ''.join(c for c in s if c.lower() in 'aeiou')
drop_spaces s -> s
    say    remove the spaces | drop all spaces | close the gaps between words
    right  s.replace(' ', '')
    wrong  s.strip() | s.replace(' ', '-')
reverse_words s -> s
    say    reverse the order of words | put the words in reverse order | turn the word order around
    right  ' '.join(s.split()[::-1])
    wrong  s[::-1] | ' '.join(s.split()[1:])
sort_letters s -> s
    say    sort the characters | put the characters in order | order all characters
    right  ''.join(sorted(s))
    wrong  ''.join(sorted(s, reverse=True)) | ''.join(sorted(set(s)))
every_second_letter s -> s
    say    take every second character from the first | keep characters at even positions
    say    skip every other character
    right  s[::2]
    wrong  s[1::2] | s[::3]
unique_letters s -> s
    say    drop repeated characters | keep the first of equal characters
    say    remove duplicate characters
    right  ''.join(dict.fromkeys(s))
    wrong  ''.join(sorted(set(s))) | ''.join(c for c in s if s.count(c) == 1)
word_lengths s -> xs
    say    list the lengths of the words | measure each word | replace words by their lengths
    right  [len(w) for w in s.split()]
    wrong  [len(w) - 1 for w in s.split()] | [len(w) for w in s]
vowel_places s -> xs
    say    list the positions of vowels | find where the vowels are | locate each vowel
    right  [i for i, c in enumerate(s) if c.lower() in 'aeiou']
    wrong  [i for i, c in enumerate(s, 1) if c.lower() in 'aeiou']
    wrong  [i for i, c in enumerate(s) if c in 'aeiou']
count_words s -> n
    say    count the words | say how many words there are | take the number of words
    right  len(s.split())
    wrong  s.count(' ') | len(s)
count_capitals s -> n
    say    count the capital letters | say how many capitals there are | count upper case letters
    right  sum(c.isupper() for c in s)
    wrong  sum(c.islower() for c in s) | sum(w.istitle() for w in s.split())
squared n -> n
    say    square the number | multiply it by itself | take its square
    right  n * n | n ** 2
    wrong  n * 2 | n ** 3
minus n -> n
    say    subtract 2 from the number | decrease it by 2 | go 2 down
    right  n - 2
    wrong  2 - n | n + 2
half n -> n
    say    halve the number rounding down | divide it by 2 rounding down
    say    take half of it rounded down
    right  n // 2
    wrong  (n + 1) // 2 | n % 2
digit_sum n -> n
    say    add up its digits | take the digit sum | sum the digits of the number
    right  sum(int(d) for d in str(n))
    wrong  len(str(n)) | sum(int(d) ** 2 for d in str(n))
count_up n -> xs
    say    list the numbers from 1 to it | count from 1 up to the number
    say    write all numbers from 1 to the result
    right  list(range(1, n + 1))
    wrong  list(range(1, n)) | list(range(n))
digits n -> xs
    say    list its digits | split the number into digits | write its digits as a list
    right  [int(d) for d in str(n)]
    wrong  [int(d) for d in str(n)[::-1]] | sorted(int(d) for d in str(n))
"""


@dataclasses.dataclass(eq=False)
class Step:
    """One kind of step."""

    kind: str
    takes: str
    gives: str
    say: list = dataclasses.field(default_factory=list)
    right: list = dataclasses.field(default_factory=list)
    wrong: list = dataclasses.field(default_factory=list)


def read_steps(table):
    steps = []
    for line in table.strip().splitlines():
        if line.startswith(" "):
            field, text = line.split(maxsplit=1)
            getattr(steps[-1], field).extend(text.split(" | "))
        else:
            kind, takes, _, gives = line.split()
            steps.append(Step(kind, takes, gives))
    return steps


STEPS = read_steps(STEP_TABLE)
HARD_FLAWS = (0.62, 0.7)  # lowest and highest flaw probability of the hard kinds
EASY_FLAWS = (0.05, 0.3)  # the same of the others; higher ones lower the sampled SFT accuracy
USUAL_FLAW = 0.85  # share of flaws that are their kind's usual one: greedy decoding picks it
MISSING_STEP = 0.025  # share of flaws that leave the step out; at 0.25 an RM learns length alone


def flaw_rates(hard_share):
    """{kind: probability that an SFT solution gets such a step wrong}.

    Kinds that are mostly wrong in the data are wrong under greedy decoding. Sampling gives right
    and wrong programs for a prompt, so the reward model can learn which is which.

    Multiples of the golden ratio modulo 1 are evenly spread over each stretch of the table, so that
    every type has its share of hard kinds: those with the largest multiples.
    """
    rates = {}
    for number, step in enumerate(STEPS, 1):
        place = number * 0.6180339887 % 1
        if place < 1 - hard_share:
            (low, high), place = EASY_FLAWS, place / (1 - hard_share)
        else:
            (low, high), place = HARD_FLAWS, (place - 1 + hard_share) / hard_share
        rates[step.kind] = low + (high - low) * place
    return rates


# ---- the tiny set: problems and their tests ----

MIN_TESTS = 6  # tests of a problem, at least
POOL_SIZE = 60  # inputs of each type that tests are chosen from
MIN_USABLE = 30  # of these, inputs on which every step is defined and small
MIN_OUTCOMES = 4  # different results over the pool, at least; fewer would reward a constant
MAX_NUMBER = 999  # largest absolute value of a number in a computation
MAX_LENGTH = 40  # longest list or text in a computation
MAX_PROGRAM = 160  # characters of a solution; the longest response sets the time of a rollout
MAX_REDRAWS = 20  # of flaws that cancel each other (two reversals) before a problem is given up
SAME_LENGTH = 200  # rejected problems before another length is drawn: long ones are rejected more
MAX_DRAWS = 2000  # rejected problems before we conclude that there are no more


@functools.cache
def compiled(expression, variable):
    """The expression as a function. Our own templates only, never a model's output."""
    return eval(f"lambda {variable}: {expression}")


def small(value):
    """Keep numbers short and programs fast: range() of a squared square would be neither."""
    if isinstance(value, int):
        return abs(value) <= MAX_NUMBER
    if len(value) > MAX_LENGTH:
        return False
    return isinstance(value, str) or max(map(abs, value), default=0) <= MAX_NUMBER


def trace(functions, value):
    """All values of a chain of functions, from `value` to the result; None if one is not small.

    An exception of a function passes through.
    """
    values = [value]
    for function in functions:
        values.append(function(values[-1]))
        if not small(values[-1]):
            return None
    return values


def input_pool(seed):
    """{variable: inputs for the tests}, edge cases first."""
    rng = random.Random(f"pool {seed}")  # a string seed does not depend on PYTHONHASHSEED
    words = "a I to an cat Dog red Blue apple Orange tree stone Egg over UNDER zebra kiwi"
    words = [*words.split(" "), "x2", "7up", "b12", "no.", "hey!", "it's"]
    xs = [[], [0], [4], [-2], [3, 3], [5, 4, 3, 2, 1], [2, 3, 4, 5], [-1, -3, -2], [2, 2, 2]]
    s = ["", "a", "Z", "I", " a b ", "12 3", "aa aa", "b a b", "two  gaps", "UP up Up"]
    pool = {"xs": [*xs, [0, 5, 0, 5, -5]], "s": s, "n": [0, 1, 2, 3, 4, 5, 6, 7, 10, 12]}
    for variable, values in pool.items():
        while len(values) < POOL_SIZE:
            if variable == "xs":
                length = rng.randint(3, 9)
                new = [rng.choice([rng.randint(-4, 9), rng.randint(2, 6)]) for _ in range(length)]
            elif variable == "s":
                new = " ".join(rng.choice(words) for _ in range(rng.randint(1, 4)))
            else:
                new = rng.choice([rng.randint(0, 40), rng.randint(0, 250), rng.randint(-30, 0)])
            if new not in values:
                values.append(new)
    return pool


def draw_chain(length, rng):
    """`length` different kinds of step, each of which takes what the one before gives."""
    variable, chain = rng.choices(["xs", "s", "n"], [45, 35, 20])[0], []
    for _ in range(length):
        possible = [step for step in STEPS if step.takes == variable and step not in chain]
        chain.append(rng.choice(possible))
        variable = chain[-1].gives
    return chain


def home(chain):
    """The only splits that may have this chain of kinds: "validation", "test" or "training".

    One chain of two or more steps in ten is held out: 3 of 8 for validation, the rest for test.
    A single step is always training: what its words mean cannot be guessed.
    """
    place = zlib.crc32(" ".join(step.kind for step in chain).encode()) % 80
    if len(chain) == 1 or place % 10:
        return "training"
    return "validation" if place < 30 else "test"


def differs(functions, values, start):
    """True if `functions` in place of the chain's steps from `start` on give another result.

    Args:
        values: the trace of the correct chain, input first, result last.
    An exception is a difference, since a test would fail; a value that is not small is none.
    """
    try:
        other = trace(functions, values[start])
    except Exception:
        return True
    return other is not None and other[-1] != values[-1]


def choose_tests(chain, pool, rng):
    """Choose inputs on which every mutation of the chain, and every run of steps left out, fails.

    A mutation that no input of the pool shows is dropped.

    Returns: (traces of the chosen inputs, traces of the others, [wrong lines of each step]), or
        None for a poor problem: few usable inputs, few different results, a step without a mutation
        that shows, or a run of steps that might as well be left out.
    """
    right = [compiled(step.right[0], step.takes) for step in chain]
    usable = []
    for value in pool[chain[0].takes]:
        with contextlib.suppress(Exception):  # not defined there: the minimum of an empty list
            usable.append(trace(right, value))
    usable = [values for values in usable if values]
    if len(usable) < MIN_USABLE or len({repr(values[-1]) for values in usable}) < MIN_OUTCOMES:
        return None
    others = rng.sample(usable[1:], len(usable) - 1)
    chosen = [usable[0]]  # an edge case

    def told_apart(functions, start):
        """True if a chosen input shows the difference, or another one, which is then chosen."""
        if any(differs(functions, values, start) for values in chosen):
            return True
        for number, values in enumerate(others):
            if differs(functions, values, start):
                chosen.append(others.pop(number))
                return True
        return False

    for start, first in enumerate(chain):
        for end, last in enumerate(chain[start:], start + 1):
            if first.takes == last.gives and not told_apart(right[end:], start):
                return None
    mutations = []
    for start, step in enumerate(chain):
        rest = right[start + 1 :]
        shown = [w for w in step.wrong if told_apart([compiled(w, step.takes), *rest], start)]
        if not shown:
            return None
        mutations.append(shown)
    while len(chosen) < MIN_TESTS:  # fill up, with new results where there are any
        results = [values[-1] for values in chosen]
        new = (number for number, values in enumerate(others) if values[-1] not in results)
        chosen.append(others.pop(next(new, 0)))
    return chosen, others, mutations


def draw_solution(chain, mutations, rates, rng):
    """Draw one line per step, right or wrong by its kind's rate; an empty line leaves the step out.

    A step that has two right lines gets the rarer one a quarter of the time.
    """
    lines = []
    for step, possible in zip(chain, mutations):
        usual, rare = step.wrong[0], [line for line in possible if line != step.wrong[0]]
        if rng.random() >= rates[step.kind]:
            lines.append(None)
        elif step.takes == step.gives and rng.random() < MISSING_STEP:
            lines.append("")
        elif usual in possible and (not rare or rng.random() < USUAL_FLAW):
            lines.append(usual)
        else:
            lines.append(rng.choice(rare))
    for number, step in enumerate(chain):
        if lines[number] is None:
            lines[number] = step.right[-1 if rng.random() < 0.25 else 0]
    return lines


def body(chain, lines):
    """The body of solve(). One line per step, so that programs compare line by line."""
    kept = [(step.gives, line) for step, line in zip(chain, lines) if line]
    text = "".join(f"    {variable} = {line}\n" for variable, line in kept[:-1])
    return text + f"    return {kept[-1][1] if kept else chain[0].takes}\n"


def tiny_problem(task_id, chain, prompt, pool, rates, rng):
    """The record of a chain of steps, or None if it makes a poor problem (see choose_tests).

    Args:
        rates: {kind: probability that the solution gets it wrong}; None for a correct solution.
    """
    found = choose_tests(chain, pool, rng)
    if found is None:
        return None
    chosen, others, mutations = found
    lines, wrong = [step.right[0] for step in chain], []
    if rates:
        for _ in range(MAX_REDRAWS):
            lines = draw_solution(chain, mutations, rates, rng)
            wrong = [n for n, line in enumerate(lines, 1) if line not in chain[n - 1].right]
            functions = [compiled(line, step.takes) for step, line in zip(chain, lines) if line]
            telling = [values for values in chosen + others if differs(functions, values, 0)]
            if telling or not wrong:
                break
        else:
            return None
        if telling and telling[0] in others:  # each flaw fails a test, all together may not
            chosen.append(telling[0])
    solution = body(chain, lines)
    if len(solution) > MAX_PROGRAM:
        return None
    record = {
        "task_id": task_id,
        "prompt": prompt,
        "prefix": f"def solve({chain[0].takes}):\n",
        "setup": "",
        "entry_point": "solve",
        "tests": [f"assert solve({values[0]!r}) == {values[-1]!r}" for values in chosen],
        "solution": solution,
        "source": "tiny",
        "steps": [step.kind for step in chain],
    }
    return record | {"flaw": wrong or None} if rates else record


def tiny_splits(cfg):
    """{split: problems}. No prompt occurs twice; `home` says which split may have a chain."""
    pool, rates = input_pool(cfg.seed), flaw_rates(cfg.hard_share)
    sizes = dict(zip(SPLITS, (cfg.sft, cfg.rm, cfg.ppo, cfg.validation, cfg.test)))
    splits, prompts = {}, set()
    bar = sandbox.progress_bar(sum(sizes.values()), "problems")
    for split, size in sizes.items():
        rng = random.Random(f"{split} {cfg.seed}")
        place = split if split in ("validation", "test") else "training"
        patience = 1 if place == "training" else 25  # held-out chains are rare: one in 16 or 27
        records, draws = [], 0
        while len(records) < size:
            if draws % (SAME_LENGTH * patience) == 0:
                length = rng.choices(range(1, len(cfg.lengths) + 1), cfg.lengths)[0]
            draws += 1
            if draws > MAX_DRAWS * patience:
                sandbox.fail(
                    f"found only {len(records)} problems for --{split} {size}; "
                    "ask for fewer, or for longer ones (--lengths)"
                )
            chain = draw_chain(length, rng)
            words = ", then ".join(rng.choice(step.say) for step in chain)
            prompt = f'"""{words}."""\ndef solve({chain[0].takes}):\n'
            if prompt in prompts or home(chain) != place:
                continue
            task_id, flaws = f"tiny/{split}/{len(records)}", rates if split == "sft" else None
            record = tiny_problem(task_id, chain, prompt, pool, flaws, rng)
            if record:
                records.append(record)
                prompts.add(prompt)
                draws = 0
                bar.update()
        splits[split] = records
    bar.close()
    return splits


# ---- the tiny set: the task of writing tests, for 07_plum.py ----

ASK_FOR_TESTS = "{prompt}# tests\n"  # --ask of 07_plum.py has the same default
SHORT_WORDS = ["a", "I", "cat", "Dog", "Egg", "b12", "no.", "up"]
LINES_OF_TESTS = 3  # tests of a response
MAX_TEST_LINE = 60  # characters of a test; nobody writes longer ones by hand


def short_input(variable, rng):
    """An input, shorter than those of the true tests: a small model can work out its result."""
    if variable == "xs":
        return [rng.randint(-2, 9) for _ in range(rng.randint(1, 4))]
    if variable == "s":
        return " ".join(rng.choice(SHORT_WORDS) for _ in range(rng.randint(1, 2)))
    return rng.randint(0, 30)


def plum_records(problems, seed):
    """Instructions that ask for tests, with tests as scraped code would have them.

    Whoever wrote a flawed solution took the expected outputs from it.

    Returns: [{"task_id", "prompt", "solution"}], where the solution is a few lines
        `assert solve(input) == output`.
    """
    rng, takes = random.Random(f"plum {seed}"), {step.kind: step.takes for step in STEPS}
    records = []
    for number, problem in enumerate(problems):
        names, lines = {}, {}
        exec(problem["prefix"] + problem["solution"], names)  # our own templates
        for _ in range(10 * LINES_OF_TESTS):
            value = short_input(takes[problem["steps"][0]], rng)
            with contextlib.suppress(Exception):  # not defined there
                line = f"assert solve({value!r}) == {names['solve'](value)!r}\n"
                if len(line) <= MAX_TEST_LINE:
                    lines[repr(value)] = line
            if len(lines) == LINES_OF_TESTS:
                break
        if lines:
            prompt = ASK_FOR_TESTS.replace("{prompt}", problem["prompt"])
            solution = "".join(lines.values())
            record = {"task_id": f"tiny/plum/{number}", "prompt": prompt, "solution": solution}
            records.append(record)
    return records


# ---- public problem sets: from a record to a problem ----

LEETCODE_PREAMBLE = """\
import math, re, sys, copy, datetime, itertools, collections
import heapq, functools, hashlib, string, bisect
from typing import *
from collections import *
from functools import *
"""  # what LeetCode imports for its users; numpy, in the authors' list too, is left out


def humaneval_problem(record, split, cfg):
    """HumanEval(+): the response continues the prompt, and `check` calls the function."""
    entry_point, test = record["entry_point"], record["test"]
    # Tests with random inputs get a seed, so that a verdict can be repeated. The response cannot
    # know it: it could foretell the inputs.
    seed = f"import random\nrandom.seed({zlib.crc32(test.encode())})\n" if "random" in test else ""
    # Some tests call helpers that the prompt defines. The tests have their own copy, or a response
    # that redefines `poly` would judge itself.
    helpers = record["prompt"][: record["prompt"].rindex(f"def {entry_point}(")]
    return {
        "task_id": record["task_id"],
        "prompt": record["prompt"],
        "prefix": record["prompt"],
        "setup": seed + helpers + test,
        "entry_point": entry_point,
        "tests": [f"check({entry_point})"],
        "solution": record["canonical_solution"],
    }


def called_name(code, tests):
    """The function that MBPP asks for: the first name that the tests call and `code` defines."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    defined = {node.name for node in ast.parse(code).body if isinstance(node, kinds)}
    for node in ast.walk(ast.parse("\n".join(tests))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in defined:
            return node.func.id
    return None


def mbpp_problem(record, split, cfg):
    """MBPP, its sanitized part and MBPP+. The prompt shows tests: the text names no function."""
    code = record["code"].replace("\r\n", "\n").rstrip() + "\n"
    asserts = [test.strip() for test in record["test_list"]]
    setup = record.get("test_setup_code") or "\n".join(record.get("test_imports") or [])
    text = record.get("text") or record["prompt"]
    shown = asserts[:1] if cfg.show_one_test else asserts
    return {
        "task_id": f"{cfg.dataset}/{record['task_id']}",
        "prompt": "\n".join([f"{text.strip()} Your code should pass these tests:\n", *shown, ""]),
        "setup": setup.replace("\r\n", "\n"),
        "entry_point": called_name(code, asserts),
        "tests": [record["test"]] if cfg.dataset == "mbpp_plus" else asserts,
        "solution": code,
    }


def statements(source, tree):
    """[(node, text)] of the statements of a parsed module or function."""
    lines = source.split("\n")
    return [(n, "\n".join(lines[n.lineno - 1 : n.end_lineno]).strip()) for n in tree.body]


def leetcode_problem(record, split, cfg):
    """LeetCode contest: `test_input = {...}` and an assert that uses it become one test."""
    setup, tests, test_input = [], [], "{}"
    for node, text in statements(record["test"], ast.parse(record["test"])):
        if isinstance(node, ast.Assert):
            tests.append(text.replace("**test_input", f"**{test_input}"))
        elif text.startswith("test_input = "):
            test_input = text.removeprefix("test_input = ")
        else:
            setup.append(text)
    return {
        "task_id": record["task_id"],
        # The file's prompt ends in the open body's blanks. No model has learned to go on there.
        "prompt": record["prompt"].rstrip(" "),
        "prefix": LEETCODE_PREAMBLE + record["prompt"],
        "setup": "\n".join(setup) + "\n",
        "entry_point": "Solution",
        "tests": tests,
    }


def leetcodedataset_problem(record, split, cfg):
    """LeetCodeDataset: each assert of `check(candidate)` becomes a test with its own Solution()."""
    prompt, setup = record["prompt"], ""
    check = ast.parse(record["test"]).body[-1]
    tests = []
    for node, text in statements(record["test"], check):
        if not isinstance(node, ast.Assert):
            raise ValueError("its check function is not a list of asserts")
        tests.append(text.replace("candidate(", f"{record['entry_point']}(", 1))
    if "is_same_" in record["test"]:
        # The tests build the expected list or tree with classes of their own: those of the response
        # could make any two lists equal.
        setup = re.sub(r"\b(ListNode|TreeNode|list_node|tree_node)\b", r"expected_\1", prompt)
        last = re.compile(r"(.*, )(list_node|tree_node)\(", re.S)
        tests = [last.sub(r"\1expected_\2(", test, count=1) for test in tests]
    return {
        "task_id": f"leetcodedataset/{record['task_id']}",
        "prompt": record["query"].rstrip() + "\n",
        "prefix": prompt + "\n",
        "setup": setup,
        "entry_point": record["entry_point"].partition("(")[0],
        "tests": tests,
        # A worked answer, as a chat model would give it, is what SFT should learn.
        "solution": record["response" if split == "train" else "completion"],
    }


def program_problem(question, starter_code, name, tests, solution):
    """A problem of a judge: a function or method `name`, or a program with stdin and stdout."""
    in_class = "class Solution" in starter_code
    if starter_code.strip():
        task = f"Complete this code:\n\n```python\n{starter_code.rstrip()}\n```"
    elif name:
        task = f"Write a Python function `{name}`."
    else:
        task = "Write a Python program that reads standard input and writes standard output."
    return {
        "prompt": f"{question.strip()}\n\n{task}\n",
        "prefix": LEETCODE_PREAMBLE if in_class else "",
        "entry_point": "Solution" if in_class else name,
        "tests": tests,
        "solution": solution,
    }


def call_test(name, starter_code, arguments, expected, comparison="=="):
    """An assert that calls a function, or a method of a new Solution."""
    call = f"Solution().{name}" if "class Solution" in starter_code else name
    return f"assert {call}({', '.join(map(repr, arguments))}) {comparison} {expected!r}"


def joined(value):
    """Input or output of a program: some records have a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def input_output_problem(record, split, cfg):
    """APPS and TACO: `input_output` is JSON, with `fn_name` where a function is asked for."""
    data = json.loads(record["input_output"] or "{}")
    starter_code, name = record.get("starter_code") or "", data.get("fn_name")
    solutions = json.loads(record.get("solutions") or "[]")
    tests = []
    for given, expected in zip(data.get("inputs", ()), data.get("outputs", ()), strict=True):
        if not name:
            tests.append({"input": joined(given), "output": joined(expected)})
        elif not isinstance(given, list):
            raise ValueError("the arguments of a call are not a list")
        elif isinstance(expected, list) and len(expected) == 1:
            # Their own judge takes x for [x], since some records wrap each result in a list.
            tests.append(call_test(name, starter_code, given, [expected, *expected], "in"))
        else:
            tests.append(call_test(name, starter_code, given, expected))
    solution = solutions[0] if solutions else None
    return program_problem(record["question"], starter_code, name, tests, solution)


def code_contests_problem(record, split, cfg):
    """CodeContests: programs with stdin and stdout; 3 is its number for Python 3."""
    tests = []
    for name in ("public_tests", "private_tests", "generated_tests"):
        pairs = zip(record[name]["input"], record[name]["output"], strict=True)
        tests += [{"input": given, "output": expected} for given, expected in pairs]
    solutions = zip(record["solutions"]["language"], record["solutions"]["solution"])
    solution = next((code for language, code in solutions if language == 3), None)
    return program_problem(record["description"], "", None, tests, solution)


class StringUnpickler(pickle.Unpickler):
    """Loads plain data alone: a pickle that names a class or a function could run anything."""

    def find_class(self, module, name):
        raise ValueError(f"the private tests ask for {module}.{name}")


def private_tests(text):
    """LiveCodeBench's private tests: JSON, or a pickled JSON string, compressed, in base64."""
    if not text.startswith("["):
        text = StringUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load()
        if not isinstance(text, str):
            raise ValueError("the pickle of the private tests holds no string")
    return json.loads(text)


def livecodebench_problem(record, split, cfg):
    """LiveCodeBench: tests of methods have one JSON argument per line; the others use stdin."""
    starter_code, tests = record["starter_code"], []
    name = json.loads(record["metadata"]).get("func_name")
    public = json.loads(record["public_test_cases"])
    for test in public + private_tests(record["private_test_cases"]):
        if test["testtype"] == "functional":
            arguments = [json.loads(line) for line in test["input"].split("\n")]
            tests.append(call_test(name, starter_code, arguments, json.loads(test["output"])))
        else:
            tests.append({"input": test["input"], "output": test["output"]})
    problem = program_problem(record["question_content"], starter_code, name, tests, None)
    return {"task_id": f"livecodebench/{record['question_id']}", **problem}


def instruction_problem(record, split, cfg):
    """Magicoder and evol-codealpaca: an instruction and an answer in Markdown, for SFT alone."""
    names = ("problem", "solution") if cfg.dataset == "magicoder" else ("instruction", "output")
    instruction, answer = (record[name].rstrip() + "\n" for name in names)
    return {"prompt": instruction, "solution": answer}


# ---- public problem sets: the table, and how it is read ----


@dataclasses.dataclass
class ProblemSet:
    """Where a set is, and how its records become problems."""

    hub: str  # name on the Hugging Face hub
    convert: Callable  # (record, split of its file, cfg) -> problem
    splits: str  # all of it "test" or "sft", "number": MBPP's usual split, "file": as the files say
    hub_name: str | None = None  # configuration on the hub
    hub_files: dict | None = None  # {split: files}, where the repository has a loading script
    incomplete: bool = False  # records without usable tests are known, and are left out by name


LCB_FILES = {"test": "test*.jsonl"}
APPS_FILES = {"train": "train.jsonl", "test": "test.jsonl"}
TACO_FILES = {"train": "train/*.arrow", "test": "test/*.arrow"}
MBPP = "google-research-datasets/mbpp"
SETS = {
    "humaneval": ProblemSet("openai/openai_humaneval", humaneval_problem, "test"),
    "humaneval_plus": ProblemSet("evalplus/humanevalplus", humaneval_problem, "test"),
    "mbpp": ProblemSet(MBPP, mbpp_problem, "number", "full"),
    "mbpp_sanitized": ProblemSet(MBPP, mbpp_problem, "number", "sanitized"),
    "mbpp_plus": ProblemSet("evalplus/mbppplus", mbpp_problem, "test"),
    "leetcode": ProblemSet("TechxGenus/LeetCode-Contest", leetcode_problem, "test"),
    "leetcodedataset": ProblemSet("newfacade/LeetCodeDataset", leetcodedataset_problem, "file"),
    "livecodebench": ProblemSet(
        "livecodebench/code_generation_lite", livecodebench_problem, "test", hub_files=LCB_FILES
    ),
    "apps": ProblemSet("codeparrot/apps", input_output_problem, "file", None, APPS_FILES, True),
    "taco": ProblemSet("BAAI/TACO", input_output_problem, "file", None, TACO_FILES, True),
    "code_contests": ProblemSet(
        "deepmind/code_contests", code_contests_problem, "file", incomplete=True
    ),
    "magicoder": ProblemSet("ise-uiuc/Magicoder-OSS-Instruct-75K", instruction_problem, "sft"),
    "evol": ProblemSet("theblackcat102/evol-codealpaca-v1", instruction_problem, "sft"),
}
SHARES = {  # of training problems
    "number": {"rm": 0.5, "ppo": 0.5},
    "file": {"sft": 0.4, "rm": 0.3, "ppo": 0.2, "validation": 0.1},
}
CONTEST_IDS = range(2811, 3311)  # LeetCode's question ids, from first to last of set `leetcode`


def hub_records(dataset):
    """Yield (split, place, record) from the hub; the place names a record in an error message."""
    import datasets  # not at the top: it takes seconds, and the tiny set does not need it

    row = SETS[dataset]
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of every failed attempt
    try:
        if row.hub_files:
            loader = "arrow" if ".arrow" in row.hub_files["test"] else "json"
            root = f"hf://datasets/{row.hub}/"
            files = {split: root + pattern for split, pattern in row.hub_files.items()}
            splits = datasets.load_dataset(loader, data_files=files)
        else:
            splits = datasets.load_dataset(row.hub, row.hub_name)
    except Exception as error:  # no network, no such set, no access: a dozen types
        reason = str(error).strip().partition("\n")[0]
        sandbox.fail(f"cannot load {row.hub} ({reason}); pass a local copy with --file")
    for split in splits:
        for number, record in enumerate(splits[split], 1):
            yield split, f"{row.hub}, split {split}, record {number}", record


def file_records(dataset, path):
    """Yield (split, place, record) from a local file. Its name says which split it is."""
    name = Path(path).name
    found = re.search(r"(?<![a-z])(train|test|valid)", name.lower())
    if SETS[dataset].splits == "file" and not found:
        sandbox.fail(f"--file {path}: its name must tell the split: train, valid or test")
    if name.endswith((".jsonl", ".jsonl.gz")):
        records = sandbox.read_jsonl(path, {})
    elif name.endswith((".json", ".parquet")):
        try:
            if name.endswith(".json"):
                records = list(json.loads(Path(path).read_text(encoding="utf-8")))
            else:
                import pyarrow.parquet  # comes with datasets

                records = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError, TypeError, RecursionError) as error:
            sandbox.fail(f"--file {path} cannot be read ({error})")
    else:
        sandbox.fail(f"--file {path}: .jsonl, .jsonl.gz, .json or .parquet is needed")
    for number, record in enumerate(records, 1):
        yield found and found[1], f"{path}, record {number}", record


def split_of(dataset, split, record):
    """Where a problem goes: a split, "training" (to be divided) or None (nowhere)."""
    rule = SETS[dataset].splits
    if rule == "number":  # 1 to 10 are the examples of few-shot prompts
        limits = ((10, None), (510, "test"), (600, "validation"))
        return next((name for limit, name in limits if record["task_id"] <= limit), "training")
    if rule != "file":
        return rule
    if dataset == "leetcodedataset" and split == "train":
        number = record["question_id"] if "question_id" in record else record["meta"]["question_id"]
        if int(number) in CONTEST_IDS:  # so that no problem of `leetcode` is trained on
            return None
    return {"train": "training", "test": "test"}.get(split, "validation")


def public_splits(cfg):
    """{split: problems} of a public set, and left_out: the records that cannot be tested."""
    row, splits, left_out, places = SETS[cfg.dataset], {"training": []}, [], {}
    splits |= {split: [] for split in SPLITS}
    if cfg.file:
        sources = [item for path in cfg.file for item in file_records(cfg.dataset, path)]
    else:
        sources = hub_records(cfg.dataset)
    for number, (source, place, record) in enumerate(sources):
        problem = {"task_id": f"{cfg.dataset}/{number}", "prompt": "", "prefix": "", "setup": ""}
        problem |= {"entry_point": None, "tests": [], "solution": None, "source": cfg.dataset}
        try:
            problem |= row.convert(record, source, cfg)
            json.dumps(problem, ensure_ascii=False).encode()  # half of a surrogate pair fails here
            if not problem["tests"] and row.splits != "sft":
                raise ValueError("it has no tests")
            split = split_of(cfg.dataset, source, record)
        except Exception as error:  # records can be wrong in a dozen ways
            reason = f"{type(error).__name__}: {error}"
            if not row.incomplete:
                sandbox.fail(f"{place}: it cannot become a problem of {cfg.dataset} ({reason})")
            left_out.append({"place": place, "reason": reason})
            continue
        if places.setdefault(problem["task_id"], place) != place:
            first = places[problem["task_id"]]
            sandbox.fail(f"{place}: task_id {problem['task_id']!r} repeats that of {first}")
        if split:
            splits[split].append(problem)
    training = splits.pop("training")
    random.Random(f"{cfg.dataset} {cfg.seed}").shuffle(training)
    start = end = 0.0
    for split, share in SHARES.get(row.splits, {}).items():
        start, end = end, end + share
        splits[split] += training[round(start * len(training)) : round(end * len(training))]
    if row.splits == "file":  # SFT needs solutions, the reward model needs tests alone
        splits["rm"] += [problem for problem in splits["sft"] if not problem["solution"]]
        splits["sft"] = [problem for problem in splits["sft"] if problem["solution"]]
    splits = {split: problems for split, problems in splits.items() if problems}
    if not splits:
        sandbox.fail(f"{cfg.dataset}: no record can be used; the first one: {left_out[:1]}")
    return splits | ({"left_out": left_out} if left_out else {})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
