"""01_sft.py: the loss, batches, resume, LoRA, chat templates, and what it refuses."""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import tiny_config

import sandbox

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL = {"hidden_size": 32, "layers": 1, "vocab_size": 300, "threads": 1}


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


@pytest.fixture
def world(tmp_path, monkeypatch):
    """The current folder, with problems.jsonl; solutions of other lengths than their prompts."""
    monkeypatch.chdir(tmp_path)
    records = [
        {"task_id": f"t/{i}", "prompt": "xs " * (i % 4) + "x\n", "solution": f"x = {i % 3}\n" * 2}
        for i in range(24)
    ]
    Path("problems.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path


@pytest.fixture
def base(world, sft):
    """A random Qwen2 in the folder `base` whose tokenizer has a chat template and no pad token."""
    tokenizer = sft.build_tokenizer(["xs x x = 0 x = 1 x = 2"] * 9, 300)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template, tokenizer.pad_token = CHATML, None
    tokenizer.save_pretrained("base")
    config = tiny_config("qwen2")
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    sft.AutoModelForCausalLM.from_config(config).save_pretrained("base")
    return world / "base"


def refused(capsys, sft, *words, **settings):
    """The stage ends with exit code 2 and one line that holds all words; the folder stays."""
    before = sorted(Path(".").rglob("*"))
    with pytest.raises(SystemExit) as stop:
        sft.main(sft.Config(**{"data": "problems.jsonl", "out": "o", **SMALL, **settings}))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    assert all(word in lines[0] for word in words), lines
    assert sorted(Path(".").rglob("*")) == before


# ------------------------------------------------------------------------------ loss and batches


def test_the_loss_is_on_response_tokens_and_eos_only(sft):
    torch.manual_seed(0)
    input_ids, labels = sft.collate([([5, 6, 7], [8, 9, 1]), ([5], [6, 1])], pad_id=0)
    assert input_ids.tolist() == [[5, 6, 7, 8, 9, 1], [5, 6, 1, 0, 0, 0]]
    assert labels.tolist() == [[-100, -100, -100, 8, 9, 1], [-100, 6, 1, -100, -100, -100]]
    logits = torch.randn(2, 6, 20)
    # Position t predicts token t + 1: 8, 9, 1 from 2, 3, 4 and 6, 1 from 0, 1.
    places = [(0, 2, 8), (0, 3, 9), (0, 4, 1), (1, 0, 6), (1, 1, 1)]
    expected = -sum(torch.log_softmax(logits[row, t], -1)[token] for row, t, token in places)
    assert sft.response_loss(logits, labels).item() == pytest.approx(expected.item(), abs=1e-4)


def test_padding_changes_no_loss(sft, model_folder):
    """Without an attention mask: a row beside a longer one has the loss that it has alone."""
    model = sft.AutoModelForCausalLM.from_pretrained(model_folder).eval()
    short, long = ([5, 6], [7, 1]), ([5, 6, 7, 8, 9, 10, 11], [12, 13, 1])
    with torch.no_grad():
        together = sft.batch_loss(model, [short, long], 0)
        alone = sft.batch_loss(model, [short], 0) + sft.batch_loss(model, [long], 0)
    assert together.item() == pytest.approx(alone.item(), rel=1e-4)


def test_batches_hold_every_example_once_and_group_lengths(sft):
    rng = random.Random(0)
    lengths = [rng.randrange(10, 100) for _ in range(500)]
    batches = sft.length_grouped_batches(lengths, 32, rng)
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    spreads = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
    assert sum(spreads) / len(spreads) < 10  # random batches of 32 would spread over about 84


def test_the_scratch_tokenizer_gives_text_back_exactly(sft):
    texts = ["def f(xs):\n    return [x for x in xs if x % 2 == 0]\n", '"""Keep 3 even ones."""\n']
    tokenizer = sft.build_tokenizer(texts * 20, 300)
    for text in texts + ["never seen: \t Zürich \u2603 \U0001f600\n\n"]:
        ids = sandbox.encode_response(tokenizer, text)
        assert ids[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id
        assert tokenizer.decode(ids[:-1]) == text


# -------------------------------------------------------------------------------------- training


@pytest.fixture
def train(world, sft):
    """Trains into a folder -> its metrics. 3 epochs of 3 batches."""

    def run(out, **settings):
        defaults = {"data": "problems.jsonl", "epochs": 3, "batch_size": 8, "lr": 1e-2}
        sft.main(sft.Config(**{**defaults, "out": out, "log_every": 2, **SMALL, **settings}))
        return read(f"{out}/metrics.jsonl")

    return run


def test_it_learns_and_saves_an_ordinary_folder(train):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    metrics = train("o", epochs=20)
    assert [m["step"] for m in metrics][-2:] == [58, 60]
    assert metrics[-1]["validation_loss"] < 0.5 * metrics[0]["validation_loss"]
    assert metrics[-1]["lr"] < 1e-4 < 1e-2 == pytest.approx(max(m["lr"] for m in metrics), rel=0.1)
    model, tokenizer = (c.from_pretrained("o") for c in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert not Path("o/state.pt").exists()


def test_micro_batches_and_checkpointing_change_nothing(train):
    whole = train("whole")
    for metrics in (train("parts", micro_batch_size=3), train("less", gradient_checkpointing=True)):
        for a, b in zip(whole, metrics, strict=True):
            assert a == pytest.approx(b, rel=1e-3)


def test_bf16_is_autocast_over_float32_weights(train, sft):
    metrics = train("bf16", bf16="on")
    assert metrics != train("float32", bf16="off")
    model = sft.AutoModelForCausalLM.from_pretrained("bf16", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_resumed_it_ends_as_the_unbroken_run(train, sft, base, monkeypatch, capsys, lora_rank):
    """Broken off after a save and once more later, it goes on from the last save."""
    settings = {}
    if lora_rank:
        pytest.importorskip("peft")
        settings = {"model": "./base", "lora_rank": lora_rank}
    metrics = train("unbroken", **settings)
    saves = []
    save_state = sft.save_state

    def killed(*args, **progress):
        save_state(*args, **progress)
        saves.append(progress["step"])
        if progress["step"] in (2, 6):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sft, "save_state", killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                train("killed", resume=True, **settings)
    assert saves == [2, 4, 6] and not Path("killed/stage_config.json").exists()
    assert train("killed", resume=True, micro_batch_size=8, **settings) == metrics
    assert "resuming killed after step 6 of 9" in capsys.readouterr().out
    assert weights("killed") == weights("unbroken")


@pytest.mark.parametrize("mark", ["state_config.json", "stage_config.json"])
def test_killed_while_it_saves_it_can_be_called_again(train, killed_at, mark):
    """At the first state, and at the end, before the folder is marked as complete."""
    metrics = train("unbroken")
    Path("killed.tmp").mkdir()
    Path("killed.tmp/dust").touch()  # of an older call
    killed_at(mark, lambda: train("killed", resume=True), times=2)
    assert train("killed", resume=True) == metrics
    assert weights("killed") == weights("unbroken")
    names = [{path.name for path in Path(out).iterdir()} for out in ("killed", "unbroken")]
    assert names[0] == names[1] and "state.pt" not in names[0]


def test_a_state_that_cannot_be_written_leaves_the_one_before(train, monkeypatch):
    save = torch.save

    def full(state, path):
        if state["step"] == 4:
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError):
            train("o")
    assert torch.load("o/state.pt")["step"] == 2
    assert train("o", resume=True)[-1]["step"] == 9


def test_a_gradient_that_is_not_finite_stops_before_its_step(train, sft, monkeypatch):
    """The loss is fine, its gradient is nan (cuDNN's attention made some): nothing is saved."""
    build_model = sft.build_model

    def with_a_hook(*args):
        model = build_model(*args)
        next(model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
        return model

    monkeypatch.setattr(sft, "build_model", with_a_hook)
    with pytest.raises(RuntimeError, match="non-finite"):
        train("o")
    assert not Path("o").exists()


# ------------------------------------------------------------------------------ pretrained models


def test_lora_trains_few_weights_and_saves_a_merged_model(train, base, sft):
    pytest.importorskip("peft")
    metrics = train("o", model="./base", lora_rank=2)
    assert metrics[-1]["validation_loss"] < metrics[0]["validation_loss"]
    assert not list(Path("o").glob("adapter*"))
    ours, theirs = (
        sft.AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("o", "base")
    )
    moved = {
        name for name in theirs if not torch.equal(ours[name][: len(theirs[name])], theirs[name])
    }
    assert moved and all("proj" in name and name.endswith("weight") for name in moved)


def test_a_chat_model_learns_its_end_of_turn(train, base, sft):
    """Every response ends with the template's <|im_end|>; a server that reads the folder agrees."""
    from transformers import GenerationConfig

    metrics = train("o", model="./base", epochs=30)
    assert metrics[-1]["validation_loss"] < 0.3
    tokenizer = sandbox.load_tokenizer("o")
    closing = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = sft.AutoModelForCausalLM.from_pretrained("o").eval()
    prompt = sandbox.encode_prompt(tokenizer, "x\n")
    assert tokenizer.decode(prompt) == "<|im_start|>user\nx\n<|im_end|>\n<|im_start|>assistant\n"
    ids = prompt + sandbox.encode_response(tokenizer, "x = 1\n" * 2)
    with torch.no_grad():
        after = model(torch.tensor([ids[:-1]])).logits[0, -1].argmax().item()
    assert ids[-1] == after == closing
    assert model.config.eos_token_id == closing
    assert GenerationConfig.from_pretrained("o").eos_token_id == closing
    # The pad token that was missing has a row of its own.
    assert tokenizer.pad_token_id == len(tokenizer) - 1 == len(model.lm_head.weight) - 1


def test_plain_leaves_the_chat_template_out_for_good(train, base, sft):
    train("o", model="./base", epochs=1, plain=True)
    tokenizer = sandbox.load_tokenizer("o")
    assert tokenizer.chat_template is None and tokenizer.eos_token == "<eos>"
    assert tokenizer.decode(sandbox.encode_prompt(tokenizer, "x\n")) == "x\n"


# ---------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"data": "nowhere.jsonl"}, ["nowhere.jsonl does not exist"]),
        ({"batch_size": 0}, ["--batch_size 0", "above 0"]),
        ({"log_every": 0}, ["--log_every 0"]),
        ({"max_length": 3}, ["at most 3 tokens"]),
        ({"hidden_size": 48, "model": "scratch"}, ["--hidden_size 48", "multiple of 32"]),
        ({"warmup": 2.0}, ["--warmup 2.0", "from 0 to 1"]),
        ({"lora_rank": 8}, ["--lora_rank", "--model"]),
        ({"model": "out/none"}, ["no model at out/none"]),
        ({"model": "./adapters"}, ["./adapters", "merge"]),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_line(world, sft, capsys, settings, words):
    Path("adapters").mkdir()
    Path("adapters/adapter_config.json").write_text("{}")
    refused(capsys, sft, *words, **settings)


def test_a_record_without_a_solution_is_named(world, sft, capsys):
    with open("problems.jsonl", "a") as file:
        file.write('{"task_id": "t", "prompt": "x", "solution": null}\n')
    refused(capsys, sft, "line 25", "solution")


def test_what_is_there_is_neither_lost_nor_mixed_with_another(train, sft, capsys, monkeypatch):
    Path("o").mkdir()
    Path("o/dear").write_text("mine")
    for resume in (False, True):
        refused(capsys, sft, "o holds no finished run", "delete it", resume=resume)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sft, "save_model", killed)
        with pytest.raises(KeyboardInterrupt):
            train("p")
    same = {"out": "p", "epochs": 3, "batch_size": 8, "lr": 1e-2, "log_every": 2}
    refused(capsys, sft, "add --resume", **same)
    refused(capsys, sft, "lr was", **{**same, "lr": 1e-3, "resume": True})
    train("p", resume=True)
    saved = weights("p")
    train("p", micro_batch_size=2)  # changes no result
    assert "p is finished" in capsys.readouterr().out and weights("p") == saved
    refused(capsys, sft, "lr was 0.01, now 0.001", **{**same, "lr": 1e-3})
