r"""Stage 0: problems in one format, from the built-in generator or from a public problem set.

Reads   nothing, a problem set of the Hugging Face hub, or local copies of its files (`--file`).

Writes  data/<dataset>/{sft,rm,ppo,validation,test}.jsonl, as far as the set has these splits;
        data/tiny/plum.jsonl: the SFT problems again, with the task to write tests (07_plum.py).

A line of data/tiny/sft.jsonl, spread out:

    {"task_id": "tiny/sft/622",
     "prompt": "\"\"\"decrease it by 2, then square the number.\"\"\"\ndef solve(n):\n",
     "prefix": "def solve(n):\n", "setup": "", "entry_point": "solve",
     "tests": ["assert solve(0) == 4", "assert solve(-20) == 484", "assert solve(3) == 1",
               "assert solve(-23) == 625", "assert solve(5) == 9", "assert solve(-17) == 361"],
     "solution": "    n = n - 2\n    return n * 2\n", "source": "tiny",
     "steps": ["minus", "squared"], "flaw": [{"step": 2, "kind": "squared", "flaw": "wrong operator"}]}

`prefix + solution` is the program. `setup` runs after it, before the tests. Only the tiny set has
`steps`, and only its sft.jsonl has `flaw` (null: the solution is correct).

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
import contextlib
import gzip
import logging
import dataclasses
import functools
import json
import os
import random
import shutil
import time
import zlib
from pathlib import Path
from typing import Literal

import tyro

import sandbox

Dataset = Literal["tiny", "humaneval", "mbpp", "mbpp_sanitized", "leetcode", "magicoder", "evol"]
SPLITS = ("sft", "rm", "ppo", "validation", "test")


@dataclasses.dataclass
class Config:
    dataset: Dataset = "tiny"  # which problems to write
    file: str = ""  # local copy of the records (.jsonl, .jsonl.gz, .json); empty: from the hub
    out: str = ""  # output folder; empty: data/<dataset>
    seed: int = 0  # seed of everything random
    sft: int = 6000  # tiny: problems with flawed solutions, for fine-tuning; paper: 130k
    rm: int = 3000  # tiny: prompts for the reward model; paper: 7k
    ppo: int = 1000  # tiny: prompts for PPO; paper: 3k
    validation: int = 300  # tiny: problems that choose the best checkpoint
    test: int = (
        500  # tiny: problems that choose nothing; 95% interval of a pass rate: about 4 points
    )
    lengths: list[float] = dataclasses.field(
        default_factory=lambda: [5, 30, 35, 20, 10]
    )  # tiny: shares of problems with 1, 2, .. steps; longer is harder
    hard_share: float = 0.21  # tiny: share of step kinds that are mostly wrong; lowers greedy SFT


# ---- settings of a finished stage (same name, same code in every stage) ----

# Flags that change no result: a finished stage may be run again with other values of these.
FREE_FLAGS = {
    "gradient_checkpointing",
    "micro_batch_size",
    "resume",
    "score_batch_size",
    "threads",
    "workers",
}


def finished(cfg, directory):
    """True if `directory` holds this stage's output, made with the same settings; others are refused.

    `stage_config.json` is the last file that a stage writes, so it marks the output as complete.
    """
    path = Path(directory) / "stage_config.json"
    if not path.is_file():
        return False
    old, new = json.loads(path.read_text(encoding="utf-8")), dataclasses.asdict(cfg)
    changed = [
        f"{name} was {old.get(name)!r}, now {new[name]!r}"
        for name in new
        if name not in FREE_FLAGS and old.get(name) != new[name]
    ]
    if changed:
        sandbox.fail(
            f"{directory} was made with other settings ({'; '.join(changed)}); "
            "delete it or choose another --out"
        )
    print(f"{directory} is finished; delete it to run this stage again")
    return True


def save_config(cfg, directory):
    """Save the settings beside the output, as the mark that it is complete."""
    text = json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"
    temporary = Path(directory) / "stage_config.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(Path(directory) / "stage_config.json")


# ---- the tiny set: kinds of step ----

# Each kind: the variables that it reads and makes (xs: list of ints, s: text, n: number), what the
# prompt may call it, correct lines and wrong ones. The first right and the first wrong are usual.
# A kind has one constant, if any: with several, a model of 0.9M parameters miscopied most of them.
STEP_TABLE = """
keep_above xs -> xs
    say    keep the numbers above 3 | keep only numbers greater than 3 | drop the numbers up to 3
    right  [x for x in xs if x > 3]
    wrong  [x for x in xs if x >= 3]  # loosened comparison
    wrong  [x for x in xs if x < 3]  # swapped comparison
keep_at_least xs -> xs
    say    keep the numbers of at least 4 | drop the numbers below 4 | keep numbers from 4 up
    right  [x for x in xs if x >= 4]
    wrong  [x for x in xs if x > 4]  # tightened comparison
    wrong  [x for x in xs if x <= 4]  # swapped comparison
keep_positive xs -> xs
    say    keep the positive numbers | drop zeros and negative numbers
    say    keep numbers greater than zero
    right  [x for x in xs if x > 0]
    wrong  [x for x in xs if x >= 0]  # loosened comparison
    wrong  [x for x in xs if x < 0]  # swapped comparison
keep_odd xs -> xs
    say    keep the odd numbers | drop the even numbers | keep only what is odd
    right  [x for x in xs if x % 2 == 1]
    right  [x for x in xs if x % 2 != 0]
    wrong  [x for x in xs if x % 2 == 0]  # wrong parity
    wrong  [x for x in xs if x // 2 == 1]  # wrong operator
keep_repeated xs -> xs
    say    keep numbers that occur more than once | drop numbers that occur once
    say    keep the repeated numbers
    right  [x for x in xs if xs.count(x) > 1]
    wrong  [x for x in xs if xs.count(x) == 1]  # swapped comparison
    wrong  [x for x in xs if xs.count(x) > 2]  # off by one
drop_largest xs -> xs
    say    drop the largest number | remove every copy of the maximum
    say    throw away the highest number
    right  [x for x in xs if x != max(xs)]
    right  [x for x in xs if x < max(xs)]
    wrong  [x for x in xs if x != min(xs)]  # wrong aggregate
    wrong  [x for x in xs if x == max(xs)]  # swapped comparison
reverse xs -> xs
    say    reverse the list | put the list in reverse order | turn the list around
    right  xs[::-1]
    right  list(reversed(xs))
    wrong  sorted(xs, reverse=True)  # wrong direction
    wrong  xs[-2::-1]  # off by one
sort_down xs -> xs
    say    sort from large to small | put the list in descending order | sort downwards
    right  sorted(xs, reverse=True)
    right  sorted(xs)[::-1]
    wrong  sorted(xs)  # wrong direction
    wrong  xs[::-1]  # not sorted
unique xs -> xs
    say    drop duplicates | keep the first of equal numbers | remove repeated numbers
    right  list(dict.fromkeys(xs))
    wrong  sorted(set(xs))  # order lost
    wrong  [x for x in xs if xs.count(x) == 1]  # all copies lost
square xs -> xs
    say    square each number | replace numbers by their squares | multiply each number by itself
    right  [x * x for x in xs]
    right  [x ** 2 for x in xs]
    wrong  [x * 2 for x in xs]  # wrong operator
    wrong  [x ** 3 for x in xs]  # cubed
negate xs -> xs
    say    negate each number | flip the sign of every number | swap plus and minus
    right  [-x for x in xs]
    wrong  [abs(x) for x in xs]  # wrong operator
    wrong  [-abs(x) for x in xs]  # one sign only
absolute xs -> xs
    say    take absolute values | drop the signs | make negative numbers positive
    right  [abs(x) for x in xs]
    wrong  [-x for x in xs]  # wrong operator
    wrong  [max(x, 0) for x in xs]  # zero instead
cap xs -> xs
    say    lower numbers above 5 to 5 | cap each number at 5 | limit the numbers to at most 5
    right  [min(x, 5) for x in xs]
    wrong  [max(x, 5) for x in xs]  # wrong aggregate
    wrong  [x for x in xs if x <= 5]  # dropped instead
last xs -> xs
    say    take the last 2 numbers | keep the last 2 | keep 2 numbers at the end
    right  xs[-2:]
    wrong  xs[:2]  # wrong end
    wrong  xs[2:]  # wrong side
drop_tail xs -> xs
    say    drop the last number | leave out the last number | remove the tail of the list
    right  xs[:-1]
    wrong  xs[1:]  # wrong end
    wrong  xs[:-2]  # off by one
running_sums xs -> xs
    say    take running sums | replace the list by its partial sums | sum up to each number
    right  [sum(xs[:i + 1]) for i in range(len(xs))]
    wrong  [sum(xs[:i]) for i in range(len(xs))]  # off by one
    wrong  [sum(xs[i:]) for i in range(len(xs))]  # wrong side
differences xs -> xs
    say    take differences of neighbours | subtract each number from the next
    say    list the steps between neighbours
    right  [b - a for a, b in zip(xs, xs[1:])]
    wrong  [a - b for a, b in zip(xs, xs[1:])]  # wrong direction
    wrong  [b + a for a, b in zip(xs, xs[1:])]  # wrong operator
mirror xs -> xs
    say    append the reversed list | add a mirrored copy | follow the list by its reverse
    right  xs + xs[::-1]
    wrong  xs + xs  # wrong direction
    wrong  xs[::-1] + xs  # wrong order
count xs -> n
    say    count the numbers | take the length of the list | say how many numbers there are
    right  len(xs)
    wrong  len(xs) - 1  # off by one
    wrong  sum(xs)  # wrong aggregate
smallest xs -> n
    say    take the smallest number | find the minimum | pick the lowest number
    right  min(xs)
    wrong  max(xs)  # wrong aggregate
    wrong  min(xs, key=abs)  # wrong key
count_above xs -> n
    say    count the numbers above 4 | say how many numbers exceed 4 | count what is greater than 4
    right  sum(x > 4 for x in xs)
    right  len([x for x in xs if x > 4])
    wrong  sum(x >= 4 for x in xs)  # loosened comparison
    wrong  sum(x < 4 for x in xs)  # swapped comparison
count_distinct xs -> n
    say    count the distinct numbers | say how many different numbers there are
    say    count the numbers without duplicates
    right  len(set(xs))
    wrong  len(xs)  # duplicates counted
    wrong  len(set(xs)) - 1  # off by one
reverse_text s -> s
    say    reverse the text | spell the text backwards | turn the text around
    right  s[::-1]
    wrong  ' '.join(s.split()[::-1])  # words only
    wrong  s[-2::-1]  # off by one
swap_case s -> s
    say    swap upper and lower case | flip the case of each letter
    say    exchange capital and small letters
    right  s.swapcase()
    wrong  s.upper()  # one way only
    wrong  s.lower()  # other way only
drop_vowels s -> s
    say    drop the vowels | remove all vowels | throw away vowels
    right  ''.join(c for c in s if c.lower() not in 'aeiou')
    wrong  ''.join(c for c in s if c not in 'aeiou')  # capitals missed
    wrong  ''.join(c for c in s if c.lower() in 'aeiou')  # swapped comparison
drop_spaces s -> s
    say    remove the spaces | drop all spaces | close the gaps between words
    right  s.replace(' ', '')
    wrong  s.strip()  # ends only
    wrong  s.replace(' ', '-')  # wrong replacement
reverse_words s -> s
    say    reverse the order of words | put the words in reverse order | turn the word order around
    right  ' '.join(s.split()[::-1])
    wrong  s[::-1]  # letters too
    wrong  ' '.join(s.split()[1:])  # wrong end
sort_letters s -> s
    say    sort the characters | put the characters in order | order all characters
    right  ''.join(sorted(s))
    wrong  ''.join(sorted(s, reverse=True))  # wrong direction
    wrong  ''.join(sorted(set(s)))  # duplicates lost
every_second_letter s -> s
    say    take every second character from the first | keep characters at even positions
    say    skip every other character
    right  s[::2]
    wrong  s[1::2]  # off by one
    wrong  s[::3]  # wrong step
unique_letters s -> s
    say    drop repeated characters | keep the first of equal characters
    say    remove duplicate characters
    right  ''.join(dict.fromkeys(s))
    wrong  ''.join(sorted(set(s)))  # order lost
    wrong  ''.join(c for c in s if s.count(c) == 1)  # all copies lost
word_lengths s -> xs
    say    list the lengths of the words | measure each word | replace words by their lengths
    right  [len(w) for w in s.split()]
    wrong  [len(w) - 1 for w in s.split()]  # off by one
    wrong  [len(w) for w in s]  # wrong unit
vowel_places s -> xs
    say    list the positions of vowels | find where the vowels are | locate each vowel
    right  [i for i, c in enumerate(s) if c.lower() in 'aeiou']
    wrong  [i for i, c in enumerate(s, 1) if c.lower() in 'aeiou']  # off by one
    wrong  [i for i, c in enumerate(s) if c in 'aeiou']  # capitals missed
count_words s -> n
    say    count the words | say how many words there are | take the number of words
    right  len(s.split())
    wrong  s.count(' ')  # spaces instead
    wrong  len(s)  # wrong unit
count_capitals s -> n
    say    count the capital letters | say how many capitals there are | count upper case letters
    right  sum(c.isupper() for c in s)
    wrong  sum(c.islower() for c in s)  # wrong case
    wrong  sum(w.istitle() for w in s.split())  # wrong unit
squared n -> n
    say    square the number | multiply it by itself | take its square
    right  n * n
    right  n ** 2
    wrong  n * 2  # wrong operator
    wrong  n ** 3  # cubed
minus n -> n
    say    subtract 2 from the number | decrease it by 2 | go 2 down
    right  n - 2
    wrong  2 - n  # wrong direction
    wrong  n + 2  # wrong operator
half n -> n
    say    halve the number rounding down | divide it by 2 rounding down
    say    take half of it rounded down
    right  n // 2
    wrong  (n + 1) // 2  # rounded up
    wrong  n % 2  # wrong operator
digit_sum n -> n
    say    add up its digits | take the digit sum | sum the digits of the number
    right  sum(int(d) for d in str(n))
    wrong  len(str(n))  # wrong aggregate
    wrong  sum(int(d) ** 2 for d in str(n))  # squares
count_up n -> xs
    say    list the numbers from 1 to it | count from 1 up to the number
    say    write all numbers from 1 to the result
    right  list(range(1, n + 1))
    wrong  list(range(1, n))  # off by one
    wrong  list(range(n))  # wrong start
digits n -> xs
    say    list its digits | split the number into digits | write its digits as a list
    right  [int(d) for d in str(n)]
    wrong  [int(d) for d in str(n)[::-1]]  # wrong order
    wrong  sorted(int(d) for d in str(n))  # sorted instead
"""


@dataclasses.dataclass
class Step:
    """One kind of step."""

    kind: str
    takes: str
    gives: str
    words: list = dataclasses.field(default_factory=list)
    right: list = dataclasses.field(default_factory=list)
    wrong: dict = dataclasses.field(default_factory=dict)  # {flaw: expression}


def read_steps(table):
    steps = []
    for line in table.strip().splitlines():
        field, text = line[:11].strip(), line[11:]
        if line[0] != " ":
            kind, takes, _, gives = line.split()
            steps.append(Step(kind, takes, gives))
        elif field == "say":
            steps[-1].words += text.split(" | ")
        elif field == "right":
            steps[-1].right.append(text)
        else:
            expression, flaw = text.split("  # ")
            steps[-1].wrong[flaw] = expression
    return steps


STEPS = read_steps(STEP_TABLE)
HARD_FLAWS = (0.62, 0.7)  # lowest and highest flaw probability of the hard kinds
EASY_FLAWS = (0.05, 0.3)  # the same of the others; higher ones lower the sampled SFT accuracy
USUAL_FLAW = (
    0.85  # share of flaws that are their kind's usual one, so that greedy decoding picks it
)
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
    return len(value) <= MAX_LENGTH and (
        isinstance(value, str) or all(abs(x) <= MAX_NUMBER for x in value)
    )


def trace(functions, value):
    """All values of a chain of functions, from `value` to the result; None if one is not small.

    An exception of a function passes through.
    """
    values = [value]
    for function in functions:
        if not small(values[-1]):
            return None
        values.append(function(values[-1]))
    return values if small(values[-1]) else None


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

    One chain of two or more steps in ten is held out; validation gets 3 of 8 of these, test the rest.
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

    Returns: (traces of the chosen inputs, traces of the others, [{flaw: expression} per step]), or
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
        mutations.append({})
        for flaw, line in step.wrong.items():
            if told_apart([compiled(line, step.takes), *right[start + 1 :]], start):
                mutations[-1][flaw] = line
        if not mutations[-1]:
            return None
    while len(chosen) < MIN_TESTS:  # fill up, with new results where there are any
        results = [values[-1] for values in chosen]
        new = (number for number, values in enumerate(others) if values[-1] not in results)
        chosen.append(others.pop(next(new, 0)))
    return chosen, others, mutations


def draw_flaws(chain, mutations, rates, rng):
    """What is wrong with each step: None (nothing), "missing step" or the name of a mutation."""
    flaws = []
    for step, possible in zip(chain, mutations):
        usual = next(iter(step.wrong))
        rare = [flaw for flaw in possible if flaw != usual]
        if rng.random() >= rates[step.kind]:
            flaws.append(None)
        elif step.takes == step.gives and rng.random() < MISSING_STEP:
            flaws.append("missing step")
        elif usual in possible and (not rare or rng.random() < USUAL_FLAW):
            flaws.append(usual)
        else:
            flaws.append(rng.choice(rare))
    return flaws


def solution_lines(chain, mutations, flaws, rng=None):
    """[(step, expression)] of a solution with these flaws. A missing step has no line.

    With `rng`, a step that has two correct lines gets the rarer one a quarter of the time.
    """
    lines = []
    for step, possible, flaw in zip(chain, mutations, flaws):
        if flaw is None:
            lines.append((step, step.right[-1 if rng and rng.random() < 0.25 else 0]))
        elif flaw != "missing step":
            lines.append((step, possible[flaw]))
    return lines


def body(variable, lines):
    """The body of solve(variable). One line per step, so that programs compare line by line."""
    text = "".join(f"    {step.gives} = {expression}\n" for step, expression in lines[:-1])
    return text + f"    return {lines[-1][1] if lines else variable}\n"


def tiny_problem(task_id, chain, prompt, pool, rates, rng):
    """The record of a chain of steps, or None if it makes a poor problem (see choose_tests).

    Args:
        rates: {kind: probability that the solution gets it wrong}; None for a correct solution.
    """
    variable, flaws = chain[0].takes, [None] * len(chain)
    found = choose_tests(chain, pool, rng)
    if found is None:
        return None
    chosen, others, mutations = found
    lines = solution_lines(chain, mutations, flaws)
    if rates:
        for _ in range(MAX_REDRAWS):
            flaws = draw_flaws(chain, mutations, rates, rng)
            lines = solution_lines(chain, mutations, flaws, rng)
            functions = [compiled(expression, step.takes) for step, expression in lines]
            telling = [values for values in chosen + others if differs(functions, values, 0)]
            if telling or not any(flaws):
                break
        else:
            return None
        if telling and telling[0] in others:
            chosen.append(telling[0])
    record = {
        "task_id": task_id,
        "prompt": prompt,
        "prefix": f"def solve({variable}):\n",
        "setup": "",
        "entry_point": "solve",
        "tests": [f"assert solve({values[0]!r}) == {values[-1]!r}" for values in chosen],
        "solution": body(variable, lines),
        "source": "tiny",
        "steps": [step.kind for step in chain],
    }
    if rates:
        record["flaw"] = [
            {"step": number, "kind": step.kind, "flaw": flaw}
            for number, (step, flaw) in enumerate(zip(chain, flaws), 1)
            if flaw
        ] or None
    return record if len(record["solution"]) <= MAX_PROGRAM else None


def tiny_splits(cfg):
    """{split: problems}. No prompt occurs twice; `home` says which split may have a chain."""
    pool, rates = input_pool(cfg.seed), flaw_rates(cfg.hard_share)
    sizes = dict(zip(SPLITS, (cfg.sft, cfg.rm, cfg.ppo, cfg.validation, cfg.test)))
    splits, prompts = {}, set()
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
            words = ", then ".join(rng.choice(step.words) for step in chain)
            prompt = f'"""{words}."""\ndef solve({chain[0].takes}):\n'
            if prompt in prompts or home(chain) != place:
                continue
            task_id, flaws = f"tiny/{split}/{len(records)}", rates if split == "sft" else None
            record = tiny_problem(task_id, chain, prompt, pool, flaws, rng)
            if record:
                records.append(record)
                prompts.add(prompt)
                draws = 0
        splits[split] = records
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


# ---- public data sets ----

HUB = {  # name and configuration on the Hugging Face hub
    "humaneval": ("openai/openai_humaneval", None),
    "mbpp": ("google-research-datasets/mbpp", "full"),
    "mbpp_sanitized": ("google-research-datasets/mbpp", "sanitized"),
    "leetcode": ("TechxGenus/LeetCode-Contest", None),
    "magicoder": ("ise-uiuc/Magicoder-OSS-Instruct-75K", None),
    "evol": ("theblackcat102/evol-codealpaca-v1", None),
}
FIELDS = {  # what their records must have
    "humaneval": {
        "task_id": str,
        "prompt": str,
        "entry_point": str,
        "canonical_solution": str,
        "test": str,
    },
    "mbpp": {"task_id": int, "text": str, "code": str, "test_list": list, "test_setup_code": str},
    "mbpp_sanitized": {
        "task_id": int,
        "prompt": str,
        "code": str,
        "test_list": list,
        "test_imports": list,
    },
    "leetcode": {"task_id": str, "prompt": str, "test": str},
    "magicoder": {"problem": str, "solution": str},
    "evol": {"instruction": str, "output": str},
}
LEETCODE_PREAMBLE = "\n".join(
    [  # what LeetCode imports for its users; numpy, in the authors' list too, is left out
        "import math",
        "import re",
        "import sys",
        "import copy",
        "import datetime",
        "import itertools",
        "import collections",
        "import heapq",
        "import functools",
        "import hashlib",
        "import string",
        "import bisect",
        "from typing import *",
        "from collections import *",
        "from functools import *",
        "",
    ]
)


def hub_records(dataset):
    """The records of a data set of the hub, as [(place, record)]; the place names a record in an error message."""
    name, configuration = HUB[dataset]
    try:
        import datasets  # here, since the tiny set must not wait for it
    except ImportError:
        sandbox.fail(
            "the package datasets is missing; run `pip install datasets`, or pass a local copy with --file"
        )
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # without a network it warns of each of six attempts
    print(f"loading {name} from the hub", flush=True)
    try:
        splits = datasets.load_dataset(name, configuration)
    except (
        Exception
    ) as error:  # no network, no such data set, no access: the library has a dozen types for it
        reason = str(error).strip().partition("\n")[0]
        sandbox.fail(
            f"cannot load {name} from the hub ({reason}); without a network pass a local copy with --file"
        )
    return [
        (f"{name}, split {split}, record {number}", record)
        for split in splits
        for number, record in enumerate(splits[split], 1)
    ]


def file_records(path):
    """The records of a local file, as [(place, record)]: JSON lines, gzipped or not, or one JSON list."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except (
        OSError,
        EOFError,
        UnicodeDecodeError,
    ) as error:  # EOFError: a gzip file that was cut off
        sandbox.fail(
            f"cannot read {path} ({getattr(error, 'strerror', None) or error}); give a .jsonl or .jsonl.gz file"
        )
    if text.startswith("["):  # MBPP's authors publish the sanitized part so
        try:
            return [
                (f"{path}, record {number}", record)
                for number, record in enumerate(json.loads(text), 1)
            ]
        except ValueError as error:
            sandbox.fail(f"{path}: not a JSON list ({error}); download it again")
    records = []
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # splitlines() would also split at U+2028 inside a string
        if line.strip():
            try:
                records.append((f"{path}, line {number}", json.loads(line)))
            except ValueError as error:
                sandbox.fail(
                    f"{path}, line {number}: not JSON ({error}); repair or delete the line"
                )
    return records


def check_record(place, record, dataset):
    """Stop with one line at a record that has not the fields of its data set."""
    for name, kind in FIELDS[dataset].items():
        value = record.get(name) if isinstance(record, dict) else None
        if (
            not isinstance(value, kind)
            or kind is list
            and not all(isinstance(item, str) for item in value)
        ):
            sandbox.fail(
                f"{place}: field '{name}' is missing or has the wrong type; is this the data set {dataset}?"
            )


def humaneval_problem(record):
    """HumanEval: the response goes on where the prompt ends, and `check` calls the function."""
    # The same label every time, but by a seed that the response cannot know: it could foretell the tests' random inputs.
    seed = (
        f"import random\nrandom.seed({zlib.crc32(record['test'].encode())})\n"
        if "random" in record["test"]
        else ""
    )
    # A few tests call helpers that the prompt defines, such as `poly`: they are the tests' own, so that a response which
    # defines them anew, and wrongly, does not judge itself.
    helpers = record["prompt"][: record["prompt"].rindex(f"def {record['entry_point']}(")]
    return {
        "task_id": record["task_id"],
        "prompt": record["prompt"],
        "prefix": record["prompt"],
        "setup": seed + helpers + record["test"],
        "entry_point": record["entry_point"],
        "tests": [f"check({record['entry_point']})"],
        "solution": record["canonical_solution"],
        "source": "humaneval",
    }


def called_name(code, tests):
    """The function that MBPP wants, which no field names: the first call in the tests of a name that `code` defines."""
    defined = {
        node.name
        for node in ast.parse(code).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    for test in tests:
        for node in ast.walk(ast.parse(test)):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in defined
            ):
                return node.func.id
    return None


def mbpp_problem(record, dataset):
    """MBPP: the prompt shows the tests, since the text does not name the function; the response is a whole program."""
    code = record["code"].replace("\r\n", "\n").rstrip() + "\n"
    tests = [test.strip() for test in record["test_list"]]
    text = record["text" if dataset == "mbpp" else "prompt"]
    setup = record["test_setup_code"] if dataset == "mbpp" else "\n".join(record["test_imports"])
    return {
        "task_id": f"{dataset}/{record['task_id']}",
        "prompt": f"{text.strip()} Your code should pass these tests:\n\n"
        + "\n".join(tests)
        + "\n",
        "prefix": "",
        "setup": setup.replace("\r\n", "\n"),
        "entry_point": called_name(code, tests),
        "tests": tests,
        "solution": code,
        "source": dataset,
    }


def leetcode_problem(record):
    """LeetCode contest: the response completes a method. Each test becomes one assert that stands alone.

    The file has pairs of `test_input = {...}` and `assert my_solution.method(**test_input) == value`, after
    `my_solution = Solution()` and, for linked lists, two helpers; these go to the setup.
    """
    lines, setup, tests, test_input = record["test"].split("\n"), [], [], "{}"
    for node in ast.parse(record["test"]).body:
        source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        if isinstance(node, ast.Assert):
            tests.append(source.replace("**test_input", f"**{test_input}"))
        elif source.startswith("test_input = "):
            test_input = source.removeprefix("test_input = ")
        else:
            setup.append(source)
    # The file's prompt ends in the open indent of the body. A model would have to go on from blanks, which it never saw.
    return {
        "task_id": record["task_id"],
        "prompt": record["prompt"].rstrip(" "),
        "prefix": LEETCODE_PREAMBLE + record["prompt"],
        "setup": "\n".join(setup) + "\n",
        "entry_point": "Solution",
        "tests": tests,
        "solution": None,
        "source": "leetcode",
    }


def instruction_problem(record, dataset, number):
    """Magicoder and evol-codealpaca: an instruction and an answer in Markdown, without tests: for SFT only."""
    instruction, answer = (record[name] for name in FIELDS[dataset])
    return {
        "task_id": f"{dataset}/{number}",
        "prompt": instruction.rstrip() + "\n",
        "prefix": "",
        "setup": "",
        "entry_point": None,
        "tests": [],
        "solution": answer.rstrip() + "\n",
        "source": dataset,
    }


def mbpp_splits(records, problems, seed):
    """MBPP's usual splits by number: 11-510 test, 511-600 validation, 601-974 training, halved into rm and ppo.

    1-10 are left out: they are the examples that few-shot prompts show.
    """
    splits = {"rm": [], "ppo": [], "validation": [], "test": []}
    training = [problem for record, problem in zip(records, problems) if record["task_id"] > 600]
    random.Random(f"mbpp {seed}").shuffle(training)
    splits["rm"], splits["ppo"] = training[: len(training) // 2], training[len(training) // 2 :]
    for record, problem in zip(records, problems):
        if 10 < record["task_id"] <= 600:
            splits["test" if record["task_id"] <= 510 else "validation"].append(problem)
    return splits


def public_splits(cfg):
    """{split: problems} of a public data set; splits without problems are left out."""
    places_and_records = file_records(cfg.file) if cfg.file else hub_records(cfg.dataset)
    problems = []
    for number, (place, record) in enumerate(places_and_records):
        check_record(place, record, cfg.dataset)
        try:
            if cfg.dataset == "humaneval":
                problems.append(humaneval_problem(record))
            elif cfg.dataset == "leetcode":
                problems.append(leetcode_problem(record))
            elif cfg.dataset in ("mbpp", "mbpp_sanitized"):
                problems.append(mbpp_problem(record, cfg.dataset))
            else:
                problems.append(instruction_problem(record, cfg.dataset, number))
        except (SyntaxError, ValueError) as error:
            sandbox.fail(
                f"{place}: code that Python cannot parse ({error}); repair or delete the record"
            )
    if cfg.dataset in ("mbpp", "mbpp_sanitized"):
        splits = mbpp_splits([record for _, record in places_and_records], problems, cfg.seed)
    else:
        splits = {"test" if cfg.dataset in ("humaneval", "leetcode") else "sft": problems}
    splits = {split: records for split, records in splits.items() if records}
    if not splits:
        sandbox.fail(
            f"{cfg.file or HUB[cfg.dataset][0]} has no problems; give a file with at least one record"
        )
    return splits


# ---- main ----


def check_config(cfg):
    """Refuse settings that cannot work, in one line."""
    for split in SPLITS:
        if getattr(cfg, split) < 1:
            sandbox.fail(f"--{split} {getattr(cfg, split)}: a split needs at least one problem")
    if not 1 <= len(cfg.lengths) <= 8 or min(cfg.lengths) < 0 or max(cfg.lengths) <= 0:
        sandbox.fail("--lengths needs one to eight weights, none below 0 and one above")
    if not 0 <= cfg.hard_share < 1:
        sandbox.fail("--hard_share must be at least 0 and below 1")


def main(cfg):
    """Make the problems, then put the finished folder in place."""
    check_config(cfg)
    out = Path(cfg.out or f"data/{cfg.dataset}")
    if finished(cfg, out):
        return
    if out.exists():
        sandbox.fail(
            f"{out} exists but was not made by this stage; delete it or choose another --out"
        )
    started = time.perf_counter()
    files = tiny_splits(cfg) if cfg.dataset == "tiny" else public_splits(cfg)
    if cfg.dataset == "tiny":
        files["plum"] = plum_records(files["sft"], cfg.seed)
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, records in files.items():
        sandbox.write_jsonl(temporary / f"{name}.jsonl", records)
    save_config(cfg, temporary)
    os.rename(temporary, out)
    counts = ", ".join(f"{len(records)} {name}" for name, records in files.items())
    print(f"{out}: {counts} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
