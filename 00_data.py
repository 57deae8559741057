r"""Stage 0: problems in one format, from the built-in generator or from a public data set.

Reads   nothing, a data set of the Hugging Face hub, or a local copy of its records (`--file`).
Writes  data/<dataset>/{sft,rm,ppo,validation,test}.jsonl, those splits that the data set has, and stage_config.json;
        data/tiny/plum.jsonl: the SFT problems once more, with the task to write tests (for 07_plum.py).

A line of data/tiny/sft.jsonl, spread out:

    {"task_id": "tiny/sft/460",
     "prompt": "\"\"\"take half of it rounded down, then multiply it by itself.\"\"\"\ndef solve(n):\n",
     "prefix": "def solve(n):\n",
     "setup": "",
     "entry_point": "solve",
     "tests": ["assert solve(0) == 0", "assert solve(4) == 4", "assert solve(-16) == 64",
               "assert solve(25) == 144", "assert solve(-2) == 1", "assert solve(-28) == 196"],
     "solution": "    n = n // 2\n    return n * 2\n",
     "source": "tiny",
     "steps": ["half", "squared"],
     "flaw": [{"step": 2, "kind": "squared", "flaw": "wrong operator"}]}

`prefix + solution` is the program; `setup` runs after it and before the tests. Only the tiny set has `steps`, and only
its sft.jsonl has `flaw` (null for a correct solution).

The tiny set stands in for the paper's setting (arXiv 2409.06957, section 4: code, scored by unit tests) on a laptop. A
problem chains one to five steps on a list, a text or a number. Its SFT solutions are flawed as scraped code is: a step
is wrong with a probability that depends on its kind. Clean solutions would leave nothing to learn, since a small model
then either solves everything or fails by miscopied digits, which no reward model sees. Here sampling gives right and
wrong programs for the same prompt; kinds that are mostly wrong in the data are wrong under greedy decoding too; and a
reward model can learn which is which. The other splits have correct solutions, for reading and for testing the
sandbox: no stage trains on them.

Run     python 00_data.py                                       tiny set: 10 s on one core, 40 MB
        python 00_data.py --dataset humaneval                   from the hub
        python 00_data.py --dataset mbpp --file mbpp.jsonl.gz   from a local copy, plain or gzipped

Simplified against the paper: it collects 7k prompts for the reward model and 3k for PPO, ours are generated or, with
--dataset mbpp, the halves of MBPP's training split; a held-out problem has two steps or more.
"""

import argparse
import ast
import dataclasses
import functools
import gzip
import inspect
import json
import logging
import os
import random
import re
import shutil
import sys
import time
import typing
import zlib
from pathlib import Path

DATASETS = ("tiny", "humaneval", "mbpp", "mbpp_sanitized", "leetcode", "magicoder", "evol")
SPLITS = ("sft", "rm", "ppo", "validation", "test")


def shares(*numbers):
    """A default of a Config field that is a list."""
    return dataclasses.field(default_factory=lambda: list(numbers))


@dataclasses.dataclass
class Config:
    dataset: typing.Literal[DATASETS] = "tiny"  # which problems to write
    file: str = ""  # local copy of the data set's records (.jsonl, .jsonl.gz, or a .json list); "": from the hub
    out: str = ""  # output folder; "": data/<dataset>
    seed: int = 0  # seed of everything random here
    sft: int = 6000  # tiny: problems with flawed solutions for fine-tuning; paper: 130k
    rm: int = 3000  # tiny: prompts for the reward model; paper: 7k
    ppo: int = 1000  # tiny: prompts for PPO; paper: 3k
    validation: int = 300  # tiny: problems that choose the best checkpoint
    test: int = 500  # tiny: problems that nothing is chosen by; 500 give a 95% interval of about 4 points
    lengths: list[float] = shares(5, 30, 35, 20, 10)  # tiny: shares of problems with 1, 2, .. steps; longer is harder
    kinds: int = 40  # tiny: kinds of step in use, of 72; with more, a kind is seen more rarely and all stages need longer
    hard_share: float = 0.21  # tiny: share of step kinds that are mostly wrong; more lowers greedy SFT accuracy
    hard_flaws: list[float] = shares(0.62, 0.7)  # tiny: range of their flaw probabilities
    easy_flaws: list[float] = shares(0.05, 0.3)  # tiny: range of the others'; more lowers sampled SFT accuracy
    usual_flaw: float = 0.85  # tiny: share of flaws that are their kind's usual one; high, so that greedy picks it
    missing_step: float = 0.025  # tiny: share of missing steps among flaws of steps that keep the type; at 0.25 the RM learns length alone


# ---- helpers (same name, same code in every stage) ----


def fail(message):
    """Bad input: one line that says what to do, exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_config(config_class, description):
    """Read the command line into a `config_class`: every field is a flag, its comment the flag's help."""
    source = inspect.getsource(config_class)
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    for setting in dataclasses.fields(config_class):
        comment = re.search(rf"^    {setting.name}: [^#]*  # (.*)$", source, re.MULTILINE)
        options = {"default": getattr(config_class(), setting.name), "help": comment[1].replace("%", "%%")}
        if setting.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(setting.type) is typing.Literal:
            options["choices"] = typing.get_args(setting.type)
        elif typing.get_origin(setting.type) is list:
            options.update(nargs="+", type=typing.get_args(setting.type)[0])
        else:
            options["type"] = setting.type
        parser.add_argument(f"--{setting.name}", **options)
    values = vars(parser.parse_args())
    for name, value in values.items():
        if name.endswith("batch_size") and value < 1:
            fail(f"--{name} {value}: it must be at least 1")
    return config_class(**values)


def write_jsonl(path, records):
    """Write records to a JSONL file, whole or not at all: a temporary file takes its place when it is complete."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def finished(cfg, directory):
    """True if `directory` holds this stage's output, made with the same settings; made with others, an error.

    `stage_config.json` is the last file that a stage writes, so it marks the output as complete.
    """
    path = Path(directory) / "stage_config.json"
    if not path.is_file():
        if Path(directory).exists():
            fail(f"{directory} exists but holds no finished run; delete it or choose another --out")
        return False
    old, new = json.loads(path.read_text(encoding="utf-8")), dataclasses.asdict(cfg)
    changed = [f"{name} was {old.get(name)!r}, now {new[name]!r}" for name in new if old.get(name) != new[name]]
    if changed:
        fail(f"{directory} holds a run with other settings ({'; '.join(changed)}); delete it or choose another --out")
    print(f"{directory} is finished; delete it to run this stage again")
    return True


def save_config(cfg, directory):
    """Save the resolved settings next to the output, as the mark that it is complete."""
    path = Path(directory) / "stage_config.json"
    path.with_suffix(".tmp").write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n", encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


# ---- the tiny set: kinds of step ----


@dataclasses.dataclass(frozen=True)
class Step:
    """One kind of step: what the prompt may call it, the line that does it, and lines that get it wrong."""
    kind: str    # name in the records
    takes: str   # type of value it works on: list (of ints), text or number
    gives: str   # type of value it makes
    words: str   # wordings, separated by " | "
    right: str   # correct expressions, separated by " | "; the first is the usual one
    wrong: dict  # {flaw: expression}; the first is the usual one


VARIABLE = {"list": "xs", "text": "s", "number": "n"}  # the argument of solve(), by type of value

# A kind has one constant, if any. With four constants for each, a model of 0.9M parameters got the digit wrong in more
# than half of such lines after 500 steps: an error that no reward model sees and that hides all others.
STEPS = [
    # list -> list
    Step("keep_above", "list", "list",
         "keep the numbers above 3 | keep only numbers greater than 3 | drop the numbers up to 3",
         "[x for x in xs if x > 3]",
         {"loosened comparison": "[x for x in xs if x >= 3]", "swapped comparison": "[x for x in xs if x < 3]"}),
    Step("keep_at_least", "list", "list",
         "keep the numbers of at least 4 | drop the numbers below 4 | keep numbers from 4 up",
         "[x for x in xs if x >= 4]",
         {"tightened comparison": "[x for x in xs if x > 4]", "swapped comparison": "[x for x in xs if x <= 4]"}),
    Step("keep_below", "list", "list",
         "keep the numbers below 5 | keep only numbers less than 5 | drop the numbers from 5 up",
         "[x for x in xs if x < 5]",
         {"swapped comparison": "[x for x in xs if x > 5]", "loosened comparison": "[x for x in xs if x <= 5]"}),
    Step("keep_positive", "list", "list",
         "keep the positive numbers | drop zeros and negative numbers | keep numbers greater than zero",
         "[x for x in xs if x > 0]",
         {"loosened comparison": "[x for x in xs if x >= 0]", "swapped comparison": "[x for x in xs if x < 0]"}),
    Step("keep_even", "list", "list", "keep the even numbers | drop the odd numbers | keep only what is even",
         "[x for x in xs if x % 2 == 0]",
         {"wrong parity": "[x for x in xs if x % 2 == 1]", "wrong operator": "[x for x in xs if x // 2 == 0]"}),
    Step("keep_odd", "list", "list", "keep the odd numbers | drop the even numbers | keep only what is odd",
         "[x for x in xs if x % 2 == 1] | [x for x in xs if x % 2 != 0]",
         {"wrong parity": "[x for x in xs if x % 2 == 0]", "wrong operator": "[x for x in xs if x // 2 == 1]"}),
    Step("drop_equal", "list", "list", "drop every 2 | remove all numbers equal to 2 | throw away each 2",
         "[x for x in xs if x != 2]",
         {"swapped comparison": "[x for x in xs if x == 2]", "loosened comparison": "[x for x in xs if x > 2]"}),
    Step("keep_repeated", "list", "list",
         "keep numbers that occur more than once | drop numbers that occur once | keep the repeated numbers",
         "[x for x in xs if xs.count(x) > 1]",
         {"swapped comparison": "[x for x in xs if xs.count(x) == 1]",
          "off by one": "[x for x in xs if xs.count(x) > 2]"}),
    Step("drop_smallest", "list", "list",
         "drop the smallest number | remove every copy of the minimum | throw away the lowest number",
         "[x for x in xs if x != min(xs)] | [x for x in xs if x > min(xs)]",
         {"wrong aggregate": "[x for x in xs if x != max(xs)]",
          "swapped comparison": "[x for x in xs if x == min(xs)]"}),
    Step("drop_largest", "list", "list",
         "drop the largest number | remove every copy of the maximum | throw away the highest number",
         "[x for x in xs if x != max(xs)] | [x for x in xs if x < max(xs)]",
         {"wrong aggregate": "[x for x in xs if x != min(xs)]",
          "swapped comparison": "[x for x in xs if x == max(xs)]"}),
    Step("reverse", "list", "list", "reverse the list | put the list in reverse order | turn the list around",
         "xs[::-1] | list(reversed(xs))", {"wrong direction": "sorted(xs, reverse=True)", "off by one": "xs[-2::-1]"}),
    Step("sort_up", "list", "list", "sort the list | sort from small to large | put the list in ascending order",
         "sorted(xs)", {"wrong direction": "sorted(xs, reverse=True)", "duplicates lost": "sorted(set(xs))"}),
    Step("sort_down", "list", "list", "sort from large to small | put the list in descending order | sort downwards",
         "sorted(xs, reverse=True) | sorted(xs)[::-1]", {"wrong direction": "sorted(xs)", "not sorted": "xs[::-1]"}),
    Step("sort_by_size", "list", "list",
         "sort by absolute value | order the numbers by distance from zero | sort the numbers ignoring signs",
         "sorted(xs, key=abs)", {"wrong key": "sorted(xs)", "sign lost": "sorted(abs(x) for x in xs)"}),
    Step("unique", "list", "list", "drop duplicates | keep the first of equal numbers | remove repeated numbers",
         "list(dict.fromkeys(xs))",
         {"order lost": "sorted(set(xs))", "all copies lost": "[x for x in xs if xs.count(x) == 1]"}),
    Step("double", "list", "list", "double each number | multiply every number by 2 | make each number twice as large",
         "[x * 2 for x in xs] | [x + x for x in xs]",
         {"wrong operator": "[x + 2 for x in xs]", "squared": "[x * x for x in xs]"}),
    Step("square", "list", "list",
         "square each number | replace numbers by their squares | multiply each number by itself",
         "[x * x for x in xs] | [x ** 2 for x in xs]",
         {"wrong operator": "[x * 2 for x in xs]", "cubed": "[x ** 3 for x in xs]"}),
    Step("add", "list", "list", "add 3 to each number | increase every number by 3 | raise all numbers by 3",
         "[x + 3 for x in xs]", {"wrong direction": "[x - 3 for x in xs]", "wrong operator": "[x * 3 for x in xs]"}),
    Step("negate", "list", "list", "negate each number | flip the sign of every number | swap plus and minus",
         "[-x for x in xs]", {"wrong operator": "[abs(x) for x in xs]", "one sign only": "[-abs(x) for x in xs]"}),
    Step("absolute", "list", "list", "take absolute values | drop the signs | make negative numbers positive",
         "[abs(x) for x in xs]", {"wrong operator": "[-x for x in xs]", "zero instead": "[max(x, 0) for x in xs]"}),
    Step("halve", "list", "list",
         "halve each number rounding down | divide every number by 2 rounding down | floor half of each number",
         "[x // 2 for x in xs]",
         {"wrong operator": "[x % 2 for x in xs]", "rounded to zero": "[int(x / 2) for x in xs]"}),
    Step("cap", "list", "list", "lower numbers above 5 to 5 | cap each number at 5 | limit the numbers to at most 5",
         "[min(x, 5) for x in xs]",
         {"wrong aggregate": "[max(x, 5) for x in xs]", "dropped instead": "[x for x in xs if x <= 5]"}),
    Step("first", "list", "list", "take the first 3 numbers | keep the first 3 | cut the list after 3 numbers",
         "xs[:3]", {"wrong end": "xs[-3:]", "off by one": "xs[:4]"}),
    Step("last", "list", "list", "take the last 2 numbers | keep the last 2 | keep 2 numbers at the end",
         "xs[-2:]", {"wrong end": "xs[:2]", "wrong side": "xs[2:]"}),
    Step("drop_head", "list", "list", "drop the first number | skip the first number | remove the head of the list",
         "xs[1:]", {"wrong end": "xs[:-1]", "off by one": "xs[2:]"}),
    Step("drop_tail", "list", "list", "drop the last number | leave out the last number | remove the tail of the list",
         "xs[:-1]", {"wrong end": "xs[1:]", "off by one": "xs[:-2]"}),
    Step("every_second", "list", "list",
         "take every second number from the first | keep numbers at even positions | skip every other number",
         "xs[::2]", {"off by one": "xs[1::2]", "wrong step": "xs[::3]"}),
    Step("running_sums", "list", "list",
         "take running sums | replace the list by its partial sums | sum up to each number",
         "[sum(xs[:i + 1]) for i in range(len(xs))]",
         {"off by one": "[sum(xs[:i]) for i in range(len(xs))]",
          "wrong side": "[sum(xs[i:]) for i in range(len(xs))]"}),
    Step("differences", "list", "list",
         "take differences of neighbours | subtract each number from the next | list the steps between neighbours",
         "[b - a for a, b in zip(xs, xs[1:])]",
         {"wrong direction": "[a - b for a, b in zip(xs, xs[1:])]",
          "wrong operator": "[b + a for a, b in zip(xs, xs[1:])]"}),
    Step("rotate_left", "list", "list",
         "move the first number to the end | rotate the list to the left | put the head of the list last",
         "xs[1:] + xs[:1]", {"wrong direction": "xs[-1:] + xs[:-1]", "off by one": "xs[2:] + xs[:2]"}),
    Step("mirror", "list", "list", "append the reversed list | add a mirrored copy | follow the list by its reverse",
         "xs + xs[::-1]", {"wrong direction": "xs + xs", "wrong order": "xs[::-1] + xs"}),
    # list -> number
    Step("total", "list", "number", "add up the numbers | take the sum | compute the total",
         "sum(xs)", {"wrong aggregate": "len(xs)", "sign lost": "sum(abs(x) for x in xs)"}),
    Step("count", "list", "number", "count the numbers | take the length of the list | say how many numbers there are",
         "len(xs)", {"off by one": "len(xs) - 1", "wrong aggregate": "sum(xs)"}),
    Step("largest", "list", "number", "take the largest number | find the maximum | pick the highest number",
         "max(xs)", {"wrong aggregate": "min(xs)", "wrong key": "max(xs, key=abs)"}),
    Step("smallest", "list", "number", "take the smallest number | find the minimum | pick the lowest number",
         "min(xs)", {"wrong aggregate": "max(xs)", "wrong key": "min(xs, key=abs)"}),
    Step("spread", "list", "number",
         "subtract the smallest from the largest | take the range of the numbers | find the gap between the extremes",
         "max(xs) - min(xs)", {"wrong direction": "min(xs) - max(xs)", "wrong operator": "max(xs) + min(xs)"}),
    Step("count_above", "list", "number",
         "count the numbers above 4 | say how many numbers exceed 4 | count what is greater than 4",
         "sum(x > 4 for x in xs) | len([x for x in xs if x > 4])",
         {"loosened comparison": "sum(x >= 4 for x in xs)", "swapped comparison": "sum(x < 4 for x in xs)"}),
    Step("count_distinct", "list", "number",
         "count the distinct numbers | say how many different numbers there are | count the numbers without duplicates",
         "len(set(xs))", {"duplicates counted": "len(xs)", "off by one": "len(set(xs)) - 1"}),
    Step("sum_squares", "list", "number", "add up the squares | take the sum of squares | sum each number times itself",
         "sum(x * x for x in xs) | sum(x ** 2 for x in xs)",
         {"wrong operator": "sum(x * 2 for x in xs)", "wrong order": "sum(xs) ** 2"}),
    # text -> text
    Step("reverse_text", "text", "text", "reverse the text | spell the text backwards | turn the text around",
         "s[::-1]", {"words only": "' '.join(s.split()[::-1])", "off by one": "s[-2::-1]"}),
    Step("upper", "text", "text",
         "make all letters capital | write the text in upper case | turn letters into capitals",
         "s.upper()", {"first letter only": "s.capitalize()", "wrong direction": "s.lower()"}),
    Step("swap_case", "text", "text",
         "swap upper and lower case | flip the case of each letter | exchange capital and small letters",
         "s.swapcase()", {"one way only": "s.upper()", "other way only": "s.lower()"}),
    Step("title", "text", "text", "capitalize each word | start every word with a capital | use title case",
         "s.title()", {"first word only": "s.capitalize()", "all letters": "s.upper()"}),
    Step("drop_vowels", "text", "text", "drop the vowels | remove all vowels | throw away vowels",
         "''.join(c for c in s if c.lower() not in 'aeiou')",
         {"capitals missed": "''.join(c for c in s if c not in 'aeiou')",
          "swapped comparison": "''.join(c for c in s if c.lower() in 'aeiou')"}),
    Step("keep_letters", "text", "text", "keep only letters | drop what is not a letter | remove all but the letters",
         "''.join(c for c in s if c.isalpha())",
         {"digits kept": "''.join(c for c in s if c.isalnum())",
          "swapped comparison": "''.join(c for c in s if not c.isalpha())"}),
    Step("drop_spaces", "text", "text", "remove the spaces | drop all spaces | close the gaps between words",
         "s.replace(' ', '')", {"ends only": "s.strip()", "wrong replacement": "s.replace(' ', '-')"}),
    Step("reverse_words", "text", "text",
         "reverse the order of words | put the words in reverse order | turn the word order around",
         "' '.join(s.split()[::-1])", {"letters too": "s[::-1]", "wrong end": "' '.join(s.split()[1:])"}),
    Step("sort_words", "text", "text",
         "sort the words | put the words in alphabetical order | order the words from a to z",
         "' '.join(sorted(s.split()))",
         {"wrong direction": "' '.join(sorted(s.split(), reverse=True))",
          "wrong key": "' '.join(sorted(s.split(), key=len))"}),
    Step("sort_letters", "text", "text", "sort the characters | put the characters in order | order all characters",
         "''.join(sorted(s))",
         {"wrong direction": "''.join(sorted(s, reverse=True))", "duplicates lost": "''.join(sorted(set(s)))"}),
    Step("first_letters", "text", "text",
         "take the first 4 characters | cut the text after 4 characters | keep 4 characters at the front",
         "s[:4]", {"wrong end": "s[-4:]", "off by one": "s[:5]"}),
    Step("every_second_letter", "text", "text",
         "take every second character from the first | keep characters at even positions | skip every other character",
         "s[::2]", {"off by one": "s[1::2]", "wrong step": "s[::3]"}),
    Step("double_letters", "text", "text",
         "write each character twice | double every character | repeat each character",
         "''.join(c + c for c in s)", {"whole text": "s + s", "off by one": "''.join(c * 3 for c in s)"}),
    Step("unique_letters", "text", "text",
         "drop repeated characters | keep the first of equal characters | remove duplicate characters",
         "''.join(dict.fromkeys(s))",
         {"order lost": "''.join(sorted(set(s)))", "all copies lost": "''.join(c for c in s if s.count(c) == 1)"}),
    Step("initials", "text", "text",
         "take the first letter of each word | keep the initials of the words | shorten each word to its first letter",
         "''.join(w[0] for w in s.split())",
         {"wrong end": "''.join(w[-1] for w in s.split())", "off by one": "''.join(w[:2] for w in s.split())"}),
    # text -> list
    Step("word_lengths", "text", "list",
         "list the lengths of the words | measure each word | replace words by their lengths",
         "[len(w) for w in s.split()]",
         {"off by one": "[len(w) - 1 for w in s.split()]", "wrong unit": "[len(w) for w in s]"}),
    Step("vowel_places", "text", "list", "list the positions of vowels | find where the vowels are | locate each vowel",
         "[i for i, c in enumerate(s) if c.lower() in 'aeiou']",
         {"off by one": "[i for i, c in enumerate(s, 1) if c.lower() in 'aeiou']",
          "capitals missed": "[i for i, c in enumerate(s) if c in 'aeiou']"}),
    # text -> number
    Step("text_length", "text", "number",
         "count the characters | take the length of the text | say how long the text is",
         "len(s)", {"wrong unit": "len(s.split())", "off by one": "len(s) - 1"}),
    Step("count_words", "text", "number", "count the words | say how many words there are | take the number of words",
         "len(s.split())", {"spaces instead": "s.count(' ')", "wrong unit": "len(s)"}),
    Step("count_vowels", "text", "number",
         "count the vowels | say how many vowels there are | take the number of vowels",
         "sum(c in 'aeiou' for c in s.lower())",
         {"capitals missed": "sum(c in 'aeiou' for c in s)",
          "swapped comparison": "sum(c not in 'aeiou' for c in s.lower())"}),
    Step("count_capitals", "text", "number",
         "count the capital letters | say how many capitals there are | count upper case letters",
         "sum(c.isupper() for c in s)",
         {"wrong case": "sum(c.islower() for c in s)", "wrong unit": "sum(w.istitle() for w in s.split())"}),
    # number -> number
    Step("times_two", "number", "number", "double the number | multiply it by 2 | take it twice",
         "n * 2 | n + n", {"wrong operator": "n + 2", "squared": "n * n"}),
    Step("squared", "number", "number", "square the number | multiply it by itself | take its square",
         "n * n | n ** 2", {"wrong operator": "n * 2", "cubed": "n ** 3"}),
    Step("plus", "number", "number", "add 5 to the number | increase it by 5 | go 5 up",
         "n + 5", {"wrong direction": "n - 5", "off by one": "n + 6"}),
    Step("minus", "number", "number", "subtract 2 from the number | decrease it by 2 | go 2 down",
         "n - 2", {"wrong direction": "2 - n", "wrong operator": "n + 2"}),
    Step("half", "number", "number",
         "halve the number rounding down | divide it by 2 rounding down | take half of it rounded down",
         "n // 2", {"rounded up": "(n + 1) // 2", "wrong operator": "n % 2"}),
    Step("remainder", "number", "number",
         "take the remainder by 5 | reduce it modulo 5 | find what is left after dividing by 5",
         "n % 5", {"wrong operator": "n // 5", "off by one": "n % 6"}),
    Step("digit_sum", "number", "number", "add up its digits | take the digit sum | sum the digits of the number",
         "sum(int(d) for d in str(n))",
         {"wrong aggregate": "len(str(n))", "squares": "sum(int(d) ** 2 for d in str(n))"}),
    Step("reverse_digits", "number", "number",
         "reverse its digits | read its digits backwards | turn the digits around",
         "int(str(n)[::-1])", {"sorted instead": "int(''.join(sorted(str(n))))", "last digit only": "int(str(n)[-1])"}),
    # number -> list
    Step("count_up", "number", "list",
         "list the numbers from 1 to it | count from 1 up to the number | write all numbers from 1 to the result",
         "list(range(1, n + 1))", {"off by one": "list(range(1, n))", "wrong start": "list(range(n))"}),
    Step("count_down", "number", "list",
         "count down from it to 1 | list the numbers from it down to 1 | write all numbers from the result to 1",
         "list(range(n, 0, -1))", {"wrong direction": "list(range(1, n + 1))", "off by one": "list(range(n, 1, -1))"}),
    Step("digits", "number", "list", "list its digits | split the number into digits | write its digits as a list",
         "[int(d) for d in str(n)]",
         {"wrong order": "[int(d) for d in str(n)[::-1]]", "sorted instead": "sorted(int(d) for d in str(n))"}),
    Step("divisors", "number", "list",
         "list its divisors | find all divisors of the number | list the numbers that divide it",
         "[d for d in range(1, n + 1) if n % d == 0]",
         {"off by one": "[d for d in range(1, n) if n % d == 0]",
          "wrong start": "[d for d in range(2, n + 1) if n % d == 0]"}),
]


# ---- the tiny set: steps and programs ----

MIN_TESTS = 6      # tests of a problem, at least
POOL_SIZE = 60     # inputs of each type that tests are chosen from
MIN_USABLE = 30    # of them, those on which every step of a problem is defined and small
MIN_OUTCOMES = 4   # different results over the pool, at least; fewer would reward a constant
MAX_NUMBER = 999   # largest absolute value of a number in a computation
MAX_LENGTH = 40    # longest list or text in a computation
MAX_PROGRAM = 160  # characters of a solution, about 70 tokens; the longest response sets the time of a rollout
MAX_REDRAWS = 20   # of flaws that cancel each other (two reversals) before the problem is given up
SAME_LENGTH = 200  # problems rejected in a row before another length is drawn: long ones are rejected more often
MAX_DRAWS = 2000   # problems rejected in a row before we conclude that there are no more


@functools.cache
def compiled(expression, variable):
    """The expression as a function; our own templates only, never a model's output."""
    return eval(f"lambda {variable}: {expression}")


def small(value):
    """Keeps numbers short and programs fast: a squared square, or range() of it, would be neither."""
    if isinstance(value, (list, str)):
        return len(value) <= MAX_LENGTH and (isinstance(value, str) or all(abs(x) <= MAX_NUMBER for x in value))
    return abs(value) <= MAX_NUMBER


def trace(functions, value):
    """All values that a chain of functions goes through, from `value` to the result.

    Returns None when one of them is not small; an exception of a function passes through.
    """
    values = [value]
    for function in functions:
        if not small(values[-1]):
            return None
        values.append(function(values[-1]))
    return values if small(values[-1]) else None


def flaw_rates(cfg):
    """{kind: probability that an SFT solution gets such a step wrong}.

    Multiples of the golden ratio modulo 1 are spread evenly, also over each stretch of the table, so that every type of
    step has its share of hard kinds. The largest of them become the hard kinds.
    """
    rates = {}
    for number, step in enumerate(used_steps(cfg.kinds), 1):
        place = number * 0.6180339887 % 1
        if place < 1 - cfg.hard_share:
            (low, high), place = cfg.easy_flaws, place / (1 - cfg.hard_share)
        else:
            (low, high), place = cfg.hard_flaws, (place - 1 + cfg.hard_share) / cfg.hard_share
        rates[step.kind] = low + (high - low) * place
    return rates


def input_pool(seed):
    """Inputs for the tests by type: edge cases first, then random values."""
    rng = random.Random(f"pool {seed}")  # a string seed does not depend on PYTHONHASHSEED
    words = ("a I to an cat Dog red Blue apple Orange tree stone Egg over UNDER zebra kiwi "
             "x2 7up b12 no. hey! it's").split()
    pool = {
        "list": [[], [0], [4], [-2], [3, 3], [5, 4, 3, 2, 1], [2, 3, 4, 5], [-1, -3, -2], [2, 2, 2], [0, 5, 0, 5, -5]],
        "text": ["", "a", "Z", "I", " a b ", "12 3", "aa aa", "b a b", "two  gaps", "UP up Up"],
        "number": [0, 1, 2, 3, 4, 5, 6, 7, 10, 12],
    }
    for values in pool.values():
        while len(values) < POOL_SIZE:
            if values is pool["list"]:
                new = [rng.choice([rng.randint(-4, 9), rng.randint(2, 6)]) for _ in range(rng.randint(3, 9))]
            elif values is pool["text"]:
                new = " ".join(rng.choice(words) for _ in range(rng.randint(1, 4)))
            else:
                new = rng.choice([rng.randint(0, 40), rng.randint(0, 250), rng.randint(-30, 0)])
            if new not in values:
                values.append(new)
    return pool


def body(takes, steps):
    """The body of solve() for a chain of (type, expression): one line a step, so that programs compare line by line."""
    lines = [f"    {VARIABLE[gives]} = {expression}\n" for gives, expression in steps[:-1]]
    return "".join(lines) + f"    return {steps[-1][1] if steps else VARIABLE[takes]}\n"


# ---- the tiny set: problems and their tests ----


def used_steps(count):
    """`count` kinds of step, evenly from the whole table, so that every type of step keeps its share."""
    return [STEPS[number * len(STEPS) // count] for number in range(count)]


def draw_chain(length, steps, rng):
    """A well-typed chain of `length` different kinds of step."""
    value, chain = rng.choices(["list", "text", "number"], [45, 35, 20])[0], []
    for _ in range(length):
        possible = [step for step in steps if step.takes == value and step not in chain]
        if not possible:
            fail(f"no step of --kinds {len(steps)} is left that takes a {value}; raise --kinds, or ask for shorter chains (--lengths)")
        chain.append(rng.choice(possible))
        value = chain[-1].gives
    return chain


def held_out(chain):
    """True for one chain in ten, of two or more steps, however it is worded: those that no training split has.

    Each single step is in training: what a wording means cannot be guessed.
    """
    return len(chain) > 1 and zlib.crc32(" ".join(step.kind for step in chain).encode()) % 10 == 0


def differs(functions, values, start):
    """True if `functions`, in place of the chain's steps from `start` on, give another result than the chain.

    Args:
        values: what the correct chain goes through, input first, result last.
    Returns True for an exception, since a test would fail, and False where a value is no longer small: unknown.
    """
    try:
        other = trace(functions, values[start])
    except Exception:
        return True
    return other is not None and other[-1] != values[-1]


def choose_tests(chain, pool, rng):
    """Choose inputs that tell the chain from each of its single-step mutations, and collect those mutations.

    Returns (traces of the chosen inputs, traces of the other usable ones, [{flaw: expression} for each step]). A
    mutation that no input of the pool tells apart is left out of the third. Returns None for a poor problem: too few
    inputs on which it is defined, too few different results, a step without a mutation that shows, or a run of
    steps that might as well be left out.
    """
    right = [compiled(step.right.split(" | ")[0], VARIABLE[step.takes]) for step in chain]
    usable = []
    for value in pool[chain[0].takes]:
        try:
            usable.append(trace(right, value))
        except Exception:  # not defined there: the maximum of an empty list
            continue
    usable = [values for values in usable if values]
    if len(usable) < MIN_USABLE or len({repr(values[-1]) for values in usable}) < MIN_OUTCOMES:
        return None
    others = usable[:1] + rng.sample(usable[1:], len(usable) - 1)  # the first is an edge case
    chosen = [others.pop(0)]

    def told_apart(functions, start):
        """True if a chosen input shows the difference, or one of the others, which is then chosen too."""
        if any(differs(functions, values, start) for values in chosen):
            return True
        for number, values in enumerate(others):
            if differs(functions, values, start):
                chosen.append(others.pop(number))
                return True
        return False

    types = [chain[0].takes] + [step.gives for step in chain]
    for start in range(len(chain)):
        for end in range(start + 1, len(chain) + 1):
            if types[start] == types[end] and not told_apart(right[end:], start):
                return None
    mutations = []
    for start, step in enumerate(chain):
        mutations.append({flaw: line for flaw, line in step.wrong.items()
                          if told_apart([compiled(line, VARIABLE[step.takes]), *right[start + 1:]], start)})
        if not mutations[-1]:
            return None
    while len(chosen) < MIN_TESTS:  # fill up, with results that are not among the tests yet where there are any
        results = [values[-1] for values in chosen]
        chosen.append(others.pop(next((n for n, values in enumerate(others) if values[-1] not in results), 0)))
    return chosen, others, mutations


def draw_flaws(cfg, chain, mutations, rates, rng):
    """Draw what is wrong with each step: None (nothing), "missing step" or the name of one of its mutations."""
    flaws = []
    for step, possible in zip(chain, mutations):
        usual = next(iter(step.wrong))
        rare = [flaw for flaw in possible if flaw != usual]
        if rng.random() >= rates[step.kind]:
            flaws.append(None)
        elif step.takes == step.gives and rng.random() < cfg.missing_step:
            flaws.append("missing step")
        elif usual in possible and (not rare or rng.random() < cfg.usual_flaw):
            flaws.append(usual)
        else:
            flaws.append(rng.choice(rare))
    return flaws


def write_solution(chain, mutations, flaws, rng):
    """The lines of a solution with the given flaws, as [(step, expression)]; a missing step has none.

    With a generator, a step that can be written in two ways is written in the rarer one a quarter of the time.
    """
    lines = []
    for step, possible, flaw in zip(chain, mutations, flaws):
        if flaw is None:
            ways = step.right.split(" | ")
            lines.append((step, ways[-1] if rng and rng.random() < 0.25 else ways[0]))
        elif flaw != "missing step":
            lines.append((step, possible[flaw]))
    return lines


def tiny_problem(cfg, task_id, chain, prompt, pool, rates, rng):
    """The record of a chain of steps, or None if it makes a poor problem (see choose_tests).

    Args:
        rates: {kind: probability that the solution gets the step wrong}; None for a correct solution.
    """
    takes, kinds, flaws = chain[0].takes, [step.kind for step in chain], [None] * len(chain)
    found = choose_tests(chain, pool, rng)
    if found is None:
        return None
    chosen, others, mutations = found
    lines = write_solution(chain, mutations, flaws, None)
    if rates:
        for _ in range(MAX_REDRAWS):
            flaws = draw_flaws(cfg, chain, mutations, rates, rng)
            lines = write_solution(chain, mutations, flaws, rng)
            functions = [compiled(expression, VARIABLE[step.takes]) for step, expression in lines]
            telling = [values for values in chosen + others if differs(functions, values, 0)]
            if telling or not any(flaws):
                break
        else:
            return None
        if telling and telling[0] in others:
            chosen.append(telling[0])
    solution = body(takes, [(step.gives, expression) for step, expression in lines])
    if len(solution) > MAX_PROGRAM:
        return None
    record = {
        "task_id": task_id, "prompt": prompt, "prefix": f"def solve({VARIABLE[takes]}):\n", "setup": "",
        "entry_point": "solve", "tests": [f"assert solve({values[0]!r}) == {values[-1]!r}" for values in chosen],
        "solution": solution, "source": "tiny", "steps": kinds,
    }
    if rates:
        record["flaw"] = [{"step": number, "kind": kind, "flaw": flaw}
                          for number, (kind, flaw) in enumerate(zip(kinds, flaws), 1) if flaw] or None
    return record


def sizes(cfg):
    """{split: its number of problems}."""
    return dict(zip(SPLITS, (cfg.sft, cfg.rm, cfg.ppo, cfg.validation, cfg.test)))


def tiny_splits(cfg):
    """Generate {split: problems}: no prompt occurs twice, no chain both in a training and in a held-out split."""
    pool, steps, rates = input_pool(cfg.seed), used_steps(cfg.kinds), flaw_rates(cfg)
    splits, prompts = {}, set()
    for split in SPLITS:
        rng = random.Random(f"{split} {cfg.seed}")
        records, size, draws = [], sizes(cfg)[split], 0
        while len(records) < size:
            if draws % SAME_LENGTH == 0:
                length = rng.choices(range(1, len(cfg.lengths) + 1), cfg.lengths)[0]
            draws += 1
            if draws > MAX_DRAWS:
                fail(f"found only {len(records)} problems for --{split} {size}; ask for fewer, or longer (--lengths)")
            chain = draw_chain(length, steps, rng)
            words = ", then ".join(rng.choice(step.words.split(" | ")) for step in chain)
            prompt = f'"""{words}."""\ndef solve({VARIABLE[chain[0].takes]}):\n'
            if prompt in prompts or held_out(chain) != (split in ("validation", "test")):
                continue
            record = tiny_problem(cfg, f"tiny/{split}/{len(records)}", chain, prompt, pool,
                                  rates if split == "sft" else None, rng)
            if record:
                records.append(record)
                prompts.add(prompt)
                draws = 0
        splits[split] = records
    return splits


# ---- the tiny set: the task of writing tests, for 07_plum.py ----

ASK_FOR_TESTS = "{prompt}# tests\n"  # --ask of 07_plum.py has the same default
SHORT_WORDS = "a I cat Dog Egg b12 no. up".split()
LINES_OF_TESTS = 3  # tests of a response
MAX_TEST_LINE = 60  # characters of a test; nobody writes longer ones by hand


def short_input(takes, rng):
    """An input whose result a small model may be able to work out: the 60 inputs of the true tests are longer."""
    if takes == "list":
        return [rng.randint(-2, 9) for _ in range(rng.randint(1, 4))]
    if takes == "text":
        return " ".join(rng.choice(SHORT_WORDS) for _ in range(rng.randint(1, 2)))
    return rng.randint(0, 30)


def solution_functions(problem):
    """The lines of a solution of ours as functions, each of the line before's value."""
    variable, functions = problem["prefix"].removeprefix("def solve(").removesuffix("):\n"), []
    for line in problem["solution"].splitlines():
        target, _, expression = line.strip().removeprefix("return ").rpartition(" = ")
        functions.append(compiled(expression, variable))
        variable = target
    return functions


def plum_records(problems, seed):
    """Instructions that ask for tests, with responses as scraped code would have them: who wrote a flawed solution took the
    expected outputs of the tests from it. The prompts and solutions are those of the SFT problems.

    Returns [{"task_id", "prompt", "solution"}]; the solution is a few lines `assert solve(input) == output`.
    """
    rng, takes, records = random.Random(f"plum {seed}"), {step.kind: step.takes for step in STEPS}, []
    for number, problem in enumerate(problems):
        functions, lines = solution_functions(problem), {}
        for _ in range(10 * LINES_OF_TESTS):  # a step may not be defined on an input: the maximum of an empty list
            value = short_input(takes[problem["steps"][0]], rng)
            try:
                values = trace(functions, value)
            except Exception:
                continue
            line = f"assert solve({value!r}) == {values[-1]!r}\n" if values else None
            if line and len(line) <= MAX_TEST_LINE:
                lines[repr(value)] = line
            if len(lines) == LINES_OF_TESTS:
                break
        if lines:
            records.append({"task_id": f"tiny/plum/{number}", "prompt": ASK_FOR_TESTS.replace("{prompt}", problem["prompt"]),
                            "solution": "".join(lines.values())})
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
    "humaneval": {"task_id": str, "prompt": str, "entry_point": str, "canonical_solution": str, "test": str},
    "mbpp": {"task_id": int, "text": str, "code": str, "test_list": list, "test_setup_code": str},
    "mbpp_sanitized": {"task_id": int, "prompt": str, "code": str, "test_list": list, "test_imports": list},
    "leetcode": {"task_id": str, "prompt": str, "test": str},
    "magicoder": {"problem": str, "solution": str},
    "evol": {"instruction": str, "output": str},
}
LEETCODE_PREAMBLE = "\n".join([  # what LeetCode imports for its users; numpy, in the authors' list too, is left out
    "import math", "import re", "import sys", "import copy", "import datetime", "import itertools",
    "import collections", "import heapq", "import functools", "import hashlib", "import string", "import bisect",
    "from typing import *", "from collections import *", "from functools import *", ""])


def hub_records(dataset):
    """The records of a data set of the hub, as [(place, record)]; the place names a record in an error message."""
    name, configuration = HUB[dataset]
    try:
        import datasets  # here, since the tiny set must not wait for it
    except ImportError:
        fail("the package datasets is missing; run `pip install datasets`, or pass a local copy with --file")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # without a network it warns of each of six attempts
    print(f"loading {name} from the hub", flush=True)
    try:
        splits = datasets.load_dataset(name, configuration)
    except Exception as error:  # no network, no such data set, no access: the library has a dozen types for it
        reason = str(error).strip().partition("\n")[0]
        fail(f"cannot load {name} from the hub ({reason}); without a network pass a local copy with --file")
    return [(f"{name}, split {split}, record {number}", record)
            for split in splits for number, record in enumerate(splits[split], 1)]


def file_records(path):
    """The records of a local file, as [(place, record)]: JSON lines, gzipped or not, or one JSON list."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:  # EOFError: a gzip file that was cut off
        fail(f"cannot read {path} ({getattr(error, 'strerror', None) or error}); give a .jsonl or .jsonl.gz file")
    if text.startswith("["):  # MBPP's authors publish the sanitized part so
        try:
            return [(f"{path}, record {number}", record) for number, record in enumerate(json.loads(text), 1)]
        except ValueError as error:
            fail(f"{path}: not a JSON list ({error}); download it again")
    records = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also split at U+2028 inside a string
        if line.strip():
            try:
                records.append((f"{path}, line {number}", json.loads(line)))
            except ValueError as error:
                fail(f"{path}, line {number}: not JSON ({error}); repair or delete the line")
    return records


def check_record(place, record, dataset):
    """Stop with one line at a record that has not the fields of its data set."""
    for name, kind in FIELDS[dataset].items():
        value = record.get(name) if isinstance(record, dict) else None
        if not isinstance(value, kind) or kind is list and not all(isinstance(item, str) for item in value):
            fail(f"{place}: field '{name}' is missing or has the wrong type; is this the data set {dataset}?")


def humaneval_problem(record):
    """HumanEval: the response goes on where the prompt ends, and `check` calls the function."""
    # The same label every time, but by a seed that the response cannot know: it could foretell the tests' random inputs.
    seed = f"import random\nrandom.seed({zlib.crc32(record['test'].encode())})\n" if "random" in record["test"] else ""
    # A few tests call helpers that the prompt defines, such as `poly`: they are the tests' own, so that a response which
    # defines them anew, and wrongly, does not judge itself.
    helpers = record["prompt"][:record["prompt"].rindex(f"def {record['entry_point']}(")]
    return {"task_id": record["task_id"], "prompt": record["prompt"], "prefix": record["prompt"],
            "setup": seed + helpers + record["test"], "entry_point": record["entry_point"],
            "tests": [f"check({record['entry_point']})"], "solution": record["canonical_solution"],
            "source": "humaneval"}


def called_name(code, tests):
    """The function that MBPP wants, which no field names: the first call in the tests of a name that `code` defines."""
    defined = {node.name for node in ast.parse(code).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for test in tests:
        for node in ast.walk(ast.parse(test)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in defined:
                return node.func.id
    return None


def mbpp_problem(record, dataset):
    """MBPP: the prompt shows the tests, since the text does not name the function; the response is a whole program."""
    code = record["code"].replace("\r\n", "\n").rstrip() + "\n"
    tests = [test.strip() for test in record["test_list"]]
    text = record["text" if dataset == "mbpp" else "prompt"]
    setup = record["test_setup_code"] if dataset == "mbpp" else "\n".join(record["test_imports"])
    return {"task_id": f"{dataset}/{record['task_id']}",
            "prompt": f"{text.strip()} Your code should pass these tests:\n\n" + "\n".join(tests) + "\n",
            "prefix": "", "setup": setup.replace("\r\n", "\n"), "entry_point": called_name(code, tests), "tests": tests,
            "solution": code, "source": dataset}


def leetcode_problem(record):
    """LeetCode contest: the response completes a method. Each test becomes one assert that stands alone.

    The file has pairs of `test_input = {...}` and `assert my_solution.method(**test_input) == value`, after
    `my_solution = Solution()` and, for linked lists, two helpers; these go to the setup.
    """
    lines, setup, tests, test_input = record["test"].split("\n"), [], [], "{}"
    for node in ast.parse(record["test"]).body:
        source = "\n".join(lines[node.lineno - 1:node.end_lineno])
        if isinstance(node, ast.Assert):
            tests.append(source.replace("**test_input", f"**{test_input}"))
        elif source.startswith("test_input = "):
            test_input = source.removeprefix("test_input = ")
        else:
            setup.append(source)
    # The file's prompt ends in the open indent of the body. A model would have to go on from blanks, which it never saw.
    return {"task_id": record["task_id"], "prompt": record["prompt"].rstrip(" "), "prefix": LEETCODE_PREAMBLE + record["prompt"],
            "setup": "\n".join(setup) + "\n", "entry_point": "Solution", "tests": tests, "solution": None,
            "source": "leetcode"}


def instruction_problem(record, dataset, number):
    """Magicoder and evol-codealpaca: an instruction and an answer in Markdown, without tests: for SFT only."""
    instruction, answer = (record[name] for name in FIELDS[dataset])
    return {"task_id": f"{dataset}/{number}", "prompt": instruction.rstrip() + "\n", "prefix": "", "setup": "",
            "entry_point": None, "tests": [], "solution": answer.rstrip() + "\n", "source": dataset}


def mbpp_splits(records, problems, seed):
    """MBPP's usual splits by number: 11-510 test, 511-600 validation, 601-974 training, halved into rm and ppo.

    1-10 are left out: they are the examples that few-shot prompts show.
    """
    splits = {"rm": [], "ppo": [], "validation": [], "test": []}
    training = [problem for record, problem in zip(records, problems) if record["task_id"] > 600]
    random.Random(f"mbpp {seed}").shuffle(training)
    splits["rm"], splits["ppo"] = training[:len(training) // 2], training[len(training) // 2:]
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
            fail(f"{place}: code that Python cannot parse ({error}); repair or delete the record")
    if cfg.dataset in ("mbpp", "mbpp_sanitized"):
        splits = mbpp_splits([record for _, record in places_and_records], problems, cfg.seed)
    else:
        splits = {"test" if cfg.dataset in ("humaneval", "leetcode") else "sft": problems}
    splits = {split: records for split, records in splits.items() if records}
    if not splits:
        fail(f"{cfg.file or HUB[cfg.dataset][0]} has no problems; give a file with at least one record")
    return splits


def check_config(cfg):
    """Stop with one line at settings that cannot work."""
    if cfg.file and cfg.dataset == "tiny":
        fail("--file goes with a public data set, the tiny one is generated; add --dataset humaneval, say")
    for split in SPLITS:
        if sizes(cfg)[split] < 1:
            fail(f"--{split} is {sizes(cfg)[split]}: a split needs at least one problem")
    if not 1 <= cfg.kinds <= len(STEPS):
        fail(f"--kinds {cfg.kinds} is not between 1 and the {len(STEPS)} of the table")
    if min(cfg.lengths) < 0 or max(cfg.lengths) <= 0:
        fail("--lengths needs a weight of 0 or more for each number of steps, and one above 0")
    for name, limits in (("easy_flaws", cfg.easy_flaws), ("hard_flaws", cfg.hard_flaws)):
        if len(limits) != 2:
            fail(f"--{name} needs two probabilities, the lowest and the highest")
    for name, chances in (("hard_share", [cfg.hard_share]), ("usual_flaw", [cfg.usual_flaw]),
                          ("missing_step", [cfg.missing_step]), ("easy_flaws", cfg.easy_flaws),
                          ("hard_flaws", cfg.hard_flaws)):
        if not all(0 <= chance <= 1 for chance in chances):
            fail(f"--{name} must be between 0 and 1")


def main(cfg):
    """Make the problems, then put the finished folder in place."""
    check_config(cfg)
    out = Path(cfg.out or f"data/{cfg.dataset}")
    if finished(cfg, out):
        return
    started = time.perf_counter()
    splits = tiny_splits(cfg) if cfg.dataset == "tiny" else public_splits(cfg)
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for split, records in splits.items():
        write_jsonl(temporary / f"{split}.jsonl", records)
    if cfg.dataset == "tiny":
        write_jsonl(temporary / "plum.jsonl", plum_records(splits["sft"], cfg.seed))
    save_config(cfg, temporary)
    os.rename(temporary, out)
    counts = ", ".join(f"{split} {len(records)}" for split, records in splits.items())
    print(f"{out}: {counts} problems in {time.perf_counter() - started:.1f} s")
    if cfg.dataset == "tiny":
        flawed = sum(record["flaw"] is not None for record in splits["sft"])
        hard = [kind for kind, rate in flaw_rates(cfg).items() if rate > 0.5]
        chains = {tuple(record["steps"]) for record in splits["validation"]}
        shared = sum(tuple(record["steps"]) in chains for record in splits["test"])
        print(f"{shared} of {len(splits['test'])} test problems are a validation problem in other words")
        print(f"{flawed} of {len(splits['sft'])} SFT solutions are flawed; of {cfg.kinds} kinds of step these are "
              f"mostly wrong: {', '.join(hard)}")


if __name__ == "__main__":
    main(parse_config(Config, "Write problems in the format of this project, from a generator or a public data set."))
