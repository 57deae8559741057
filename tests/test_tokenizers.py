"""Tokenizers as they come with real models, built here: where a prompt ends, BOS once, EOS once, a pad that is not EOS.

The second half takes three of them, each with another architecture, through every stage.
"""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

DEVICE = torch.device("cpu")
PROMPT = "def f(xs):\n"
RESPONSES = ["    return xs\n", "return [x for x in xs]", "\n\n    return 1\n", "\treturn xs", "```python\nx = 1\n```", "x = 'Zürich ☃'"]
CHAT = "{% for m in messages %}<|user|>\n{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"

# name: options of `make_tokenizer`, the number of BOS in an encoded prompt
KINDS = {
    "plain": ({"pad_token": "<pad>"}, 0),
    "chat": ({"pad_token": "<pad>", "chat_template": CHAT}, 0),
    "chat_without_pad": ({"chat_template": CHAT}, 0),
    "no_pad": ({}, 0),
    "pad_is_eos": ({"pad_token": "</s>"}, 0),
    "all_one": ({"bos_token": "</s>", "pad_token": "</s>", "unk_token": "</s>"}, 0),  # GPT-2: one token for everything
    "no_bos": ({"pad_token": "<pad>", "bos_token": None}, 0),
    "adds_bos": ({"pad_token": "<pad>", "adds": "<s> $A"}, 1),
    "bos_of_template_and_tokenizer": ({"pad_token": "<pad>", "adds": "<s> $A", "chat_template": "{{ bos_token }}" + CHAT}, 1),
    "bos_of_tokenizer_not_of_template": ({"pad_token": "<pad>", "adds": "<s> $A", "chat_template": CHAT}, 0),
    "appends_eos": ({"pad_token": "<pad>", "adds": "$A </s>"}, 0),
    "adds_bos_appends_eos_pads_with_eos": ({"pad_token": "</s>", "adds": "<s> $A </s>"}, 1),
    "sentencepiece": ({"style": "metaspace", "adds": "<s> $A"}, 1),  # Llama 2, CodeLlama and Mistral in transformers 5
    "sentencepiece_legacy": ({"style": "prepend", "adds": "<s> $A"}, 1),  # and their tokenizer.json before
    "sentencepiece_chat": ({"style": "metaspace", "adds": "<s> $A", "chat_template": "{{ bos_token }}" + CHAT}, 1),
}


def make_tokenizer(folder, style="byte_level", adds=None, chat_template=None, **options):
    """Save a small BPE tokenizer with tokens <s> and </s>; `adds`: what its post-processor puts around a text."""
    from transformers import PreTrainedTokenizerFast

    sentencepiece = style != "byte_level"
    texts = [PROMPT, "    return xs return [x for x in xs] x = 1 x = 2 x = 3" if sentencepiece else "\n".join(RESPONSES)] * 5
    tokenizer = Tokenizer(models.BPE(byte_fallback=sentencepiece))
    if style == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif style == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=120 if sentencepiece else 320, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=[] if sentencepiece else pre_tokenizers.ByteLevel.alphabet()))
    if sentencepiece:  # a character that is no token, and the line break is none, comes as its bytes
        state = json.loads(tokenizer.to_str())
        vocabulary = {token: i for token, i in state["model"]["vocab"].items() if "\n" not in token}
        state["model"]["merges"] = [merge for merge in state["model"]["merges"] if "\n" not in "".join(merge)]
        names = [*vocabulary, *(f"<0x{byte:02X}>" for byte in range(256))]
        state["model"]["vocab"] = {token: i for i, token in enumerate(names)}
        tokenizer = Tokenizer.from_str(json.dumps(state))
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                               decoders.Strip(" ", 1, 0)])
    if adds:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=adds, special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"bos_token": "<s>", "eos_token": "</s>", **options})
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(params=KINDS)
def kind(request, ppo, tmp_path):
    """(tokenizer as a stage loads it, its number of BOS, whether it has a chat template)"""
    options, bos = KINDS[request.param]
    make_tokenizer(tmp_path / "tokenizer", **options)
    return ppo.load_tokenizer(str(tmp_path / "tokenizer")), bos, "chat_template" in options


def test_a_prompt_has_one_bos_or_none_and_ends_where_the_response_begins(ppo, kind):
    tokenizer, bos, chat = kind
    ids = ppo.encode_prompt(tokenizer, PROMPT)
    assert ids.count(1) == bos and (not bos or ids[0] == 1)  # <s> has id 1
    assert tokenizer.eos_token_id == 2 and 2 not in ids
    text = tokenizer.decode(ids[bos:])
    assert text == (f"<|user|>\n{PROMPT}\n<|assistant|>\n" if chat else PROMPT)


def test_the_tokenizers_are_what_they_say(tmp_path):
    """Without our helpers they do the harm that the other tests are about."""
    def plain(name):
        tokenizer = make_tokenizer(tmp_path / name, **KINDS[name][0])
        return tokenizer, tokenizer(PROMPT).input_ids

    tokenizer, _ = plain("bos_of_template_and_tokenizer")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True)
    assert tokenizer(chat).input_ids[:2] == [1, 1]
    assert plain("appends_eos")[1][-1] == 2 and plain("adds_bos")[1][0] == 1 and plain("no_bos")[0].bos_token_id is None
    assert plain("no_pad")[0].pad_token_id is None and plain("pad_is_eos")[0].pad_token_id == 2
    tokenizer, _ = plain("sentencepiece")
    assert tokenizer.decode(tokenizer("    return xs", add_special_tokens=False).input_ids) == "   return xs"


@pytest.mark.parametrize("text", RESPONSES)
def test_a_response_has_one_eos_and_comes_back_as_it_was(ppo, sft, kind, text):
    tokenizer, _, _ = kind
    ids = sft.encode_response(tokenizer, text)
    assert ids[-1] == 2 and ids.count(2) == 1 and 1 not in ids
    assert ppo.decode_response(tokenizer, ids) == text
    assert ppo.decode_response(tokenizer, ids[:-1]) == text  # truncated: nothing is taken off the end


def test_a_response_continues_its_prompt(ppo, sft, kind):
    """Prompt and response decoded together are prompt + response: no space of SentencePiece's between them."""
    tokenizer, bos, chat = kind
    for text in RESPONSES:
        together = ppo.encode_prompt(tokenizer, PROMPT)[bos:] + sft.encode_response(tokenizer, text)[:-1]
        assert tokenizer.decode(together).endswith(("<|assistant|>\n" if chat else PROMPT) + text)


def test_pad_is_not_eos_and_stays_the_same_when_saved(ppo, kind, tmp_path):
    tokenizer, _, _ = kind
    assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id == 2
    tokenizer.save_pretrained(tmp_path / "saved")
    again = ppo.load_tokenizer(str(tmp_path / "saved"))
    assert (again.pad_token_id, again.eos_token_id, len(again)) == (tokenizer.pad_token_id, 2, len(tokenizer))
    assert ppo.encode_prompt(again, PROMPT) == ppo.encode_prompt(tokenizer, PROMPT)


# ----------------------------------------------------------------------- templates that close a turn with another token

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA_3 = ("{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
           "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
           "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
GEMMA = ("{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n{{ m['content'] | trim }}"
         "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
PHI_3 = ("{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}")
DEEPSEEK = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n{% else %}"
            "### Response:\n{{ m['content'] }}\n<|EOT|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}")
TURNS = {  # name: template, its special tokens, the one that closes a turn, options of `make_tokenizer`
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>", {"pad_token": "</s>"}),  # Qwen: pad is the base model's EOS
    "llama_3": (LLAMA_3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>", {"adds": "<s> $A"}),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", {"pad_token": "<pad>", "style": "metaspace", "adds": "<s> $A"}),
    "phi_3": (PHI_3, ["<|user|>", "<|assistant|>", "<|end|>"], "<|end|>", {"pad_token": "<|end|>"}),  # a pad that would be the new EOS
    "deepseek": (DEEPSEEK, ["<|EOT|>"], "<|EOT|>", {"pad_token": "<pad>"}),  # a line break before it
    "mistral": ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}"
                " {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}", [], "</s>", {"pad_token": "<pad>"}),
}


@pytest.mark.parametrize("name", TURNS)
def test_a_response_ends_where_the_template_closes_a_turn(sft, rm, r2, ppo, evaluation, baselines, tmp_path, name):
    template, tokens, closing, options = TURNS[name]
    saved = make_tokenizer(tmp_path / "base", chat_template=template, extra_special_tokens=tokens, **options)
    assert saved.eos_token == "</s>"
    for stage in (sft, rm, r2, ppo, evaluation, baselines):
        tokenizer = stage.load_tokenizer(str(tmp_path / "base"))
        assert tokenizer.eos_token == closing and tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    ids = ppo.encode_prompt(tokenizer, PROMPT) + sft.encode_response(tokenizer, "x = 1")
    text = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "x = 1"}], tokenize=False)
    assert ids[-1] == tokenizer.convert_tokens_to_ids(closing)
    if name not in ("deepseek", "mistral"):  # one puts a line break before the token, the other a space before the answer
        assert text.startswith(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    assert ppo.decode_response(tokenizer, sft.encode_response(tokenizer, "x = 1")) == "x = 1"
    tokenizer.save_pretrained(tmp_path / "saved")  # as a stage does: the next one reads the same
    again = ppo.load_tokenizer(str(tmp_path / "saved"))
    assert (again.eos_token, again.pad_token, len(again)) == (closing, tokenizer.pad_token, len(tokenizer))
    plain = ppo.load_tokenizer(str(tmp_path / "base"), plain=True)
    assert plain.eos_token == "</s>" and plain.chat_template is None
    assert plain.decode(ppo.encode_prompt(plain, PROMPT)).endswith(PROMPT)


def test_a_template_that_writes_the_date_gives_the_same_prompt_on_any_day(sft, ppo, tmp_path):
    """Llama 3.2 takes the day from a clock of transformers unless it is given one."""
    template = ("{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
                "Today is {{ date_string }}\n" + CHATML)
    make_tokenizer(tmp_path / "base", chat_template=template, extra_special_tokens=["<|im_start|>", "<|im_end|>"], pad_token="<pad>")
    for stage in (sft, ppo):
        tokenizer = stage.load_tokenizer(str(tmp_path / "base"))
        text = tokenizer.decode(stage.encode_prompt(tokenizer, PROMPT))
        assert "Today is 26 Jul 2024\n" in text and PROMPT in text


def test_a_chat_model_learns_its_end_of_turn_and_stops_there(sft, ppo, tmp_path, monkeypatch):
    """Trained by 01_sft.py, sampled by 04_pf_ppo.py's `generate`; a server that reads the folder finds the same end."""
    from conftest import tiny_config
    from transformers import AutoModelForCausalLM, GenerationConfig

    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer(tmp_path / "base", chat_template=CHATML, extra_special_tokens=["<|im_start|>", "<|im_end|>"], pad_token="<pad>")
    config = tiny_config("qwen2")
    config.vocab_size, config.eos_token_id = len(tokenizer), 2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained("base")
    (tmp_path / "problems.jsonl").write_text((json.dumps({**PROBLEM, "task_id": "t", "prompt": PROMPT, "solution": "x = 1\n"}) + "\n") * 40)
    sft.main(sft.Config(model="./base", data="problems.jsonl", out="out", epochs=20, batch_size=8, lr=1e-2, max_length=64))
    tokenizer = ppo.load_tokenizer("out")
    policy = ppo.load_model(AutoModelForCausalLM, "out", DEVICE, len(tokenizer)).eval()
    (ids,), = ppo.generate(policy, tokenizer, [ppo.encode_prompt(tokenizer, PROMPT)], 1, 30, 0.0, None, 1)
    closing = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids[-1] == closing == policy.config.eos_token_id == GenerationConfig.from_pretrained("out").eos_token_id
    assert 2 not in ids and ppo.decode_response(tokenizer, ids) == "x = 1\n"


# ------------------------------------------------------------------------------------------- a base model in every stage


STAGE_KINDS = {"sentencepiece": "llama", "all_one": "gpt2", "chat_without_pad": "qwen2"}  # each gets a new pad token
PROBLEM = {"prompt": "", "prefix": "", "setup": "", "entry_point": None, "tests": ["assert x == 1"], "source": "test"}


@pytest.fixture(scope="module", params=STAGE_KINDS, ids=lambda name: f"{STAGE_KINDS[name]}-{name}")
def base(request, tmp_path_factory):
    """A folder with problems and a random base model that has no row for a pad token: {folder, tokenizer, problems}."""
    from conftest import tiny_config
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = make_tokenizer(folder / "base", **KINDS[request.param][0])
    config = tiny_config(STAGE_KINDS[request.param])
    config.vocab_size, config.eos_token_id, config.pad_token_id = len(tokenizer), 2, None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    # Half of the solutions are wrong, so that the policy passes sometimes and the reward model gets its pairs.
    problems = [{**PROBLEM, "task_id": f"t/{i}", "prompt": "xs " * (i % 4) + "x\n", "solution": f"x = {1 + i // 4 % 2}\n"}
                for i in range(48)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return {"folder": folder, "tokenizer": tokenizer, "problems": problems}


@pytest.fixture(scope="module")
def tuned(base, sft):
    """`base` after 01_sft.py, as a reader runs it on a model of his own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base["folder"])
        sft.main(sft.Config(model=str(base["folder"] / "base"), data="problems.jsonl", epochs=40, batch_size=16, lr=1e-2,
                            log_every=10, max_length=64))
    return {**base, "policy": str(base["folder"] / "out/sft")}


def test_sft_with_a_new_pad_token_trains_and_saves(base, tuned, ppo):
    from transformers import AutoModelForCausalLM

    metrics = [json.loads(line) for line in (base["folder"] / "out/sft/metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["validation_loss"] < 0.5 < metrics[0]["train_loss"]
    tokenizer, model = ppo.load_tokenizer(tuned["policy"]), AutoModelForCausalLM.from_pretrained(tuned["policy"])
    pad = tokenizer.pad_token_id
    assert pad == len(base["tokenizer"]) == model.config.pad_token_id  # the new row is the last
    assert model.get_input_embeddings().num_embeddings == model.get_output_embeddings().weight.shape[0] == pad + 1


def test_a_model_without_a_row_for_pad_gets_the_mean(base, ppo):
    """Loaded twice, policy and reference, it is the same model, and the logits of its own tokens are what they were."""
    from transformers import AutoModelForCausalLM

    path = str(base["folder"] / "base")
    tokens = len(ppo.load_tokenizer(path))
    one, two = (ppo.load_model(AutoModelForCausalLM, path, DEVICE, tokens) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    for layer in (one.get_input_embeddings(), one.get_output_embeddings()):
        assert torch.allclose(layer.weight[-1], layer.weight[:-1].mean(0)) and len(layer.weight) == tokens
    ids = torch.tensor([[5, 6, 7]])
    before = AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits
    assert torch.allclose(one.eval()(ids).logits[..., :-1], before, atol=1e-5)


def test_helpers_of_every_stage_read_the_folder_alike(tuned, sft, rm, r2, ppo, evaluation):
    prompts = [problem["prompt"] for problem in tuned["problems"][:6]]
    seen = []
    for stage in (sft, rm, r2, ppo, evaluation):
        tokenizer = stage.load_tokenizer(tuned["policy"])
        policy = stage.load_model(stage.AutoModelForCausalLM, tuned["policy"], DEVICE, len(tokenizer)).eval()
        ids = [stage.encode_prompt(tokenizer, prompt) for prompt in prompts]
        texts = []
        if stage is not sft:
            groups = stage.generate(policy, tokenizer, ids, 1, 12, 0.0, None, 64)
            alone = [stage.generate(policy, tokenizer, [prompt], 1, 12, 0.0, None, 64)[0] for prompt in ids]
            assert groups == alone  # padding on the left changes nothing
            texts = [stage.decode_response(tokenizer, group[0]) for group in groups]
            assert {"x = 1\n", "x = 2\n"} >= set(texts)
        seen.append((ids, tokenizer.pad_token_id, texts))
    assert all(s[:2] == seen[0][:2] for s in seen) and all(s[2] == seen[1][2] for s in seen[1:])


def test_rows_with_the_new_pad_token_are_scored_as_if_alone(tuned, ppo):
    tokenizer = ppo.load_tokenizer(tuned["policy"])
    prompts = [ppo.encode_prompt(tokenizer, problem["prompt"]) for problem in tuned["problems"][:4]]
    responses = [[5, 2], [6, 7, 8, 2], [9, 2], [5, 6, 7]]
    policy = ppo.load_model(ppo.AutoModelForCausalLM, tuned["policy"], DEVICE)
    reward_model = ppo.load_model(ppo.AutoModelForSequenceClassification, tuned["policy"], DEVICE, num_labels=1)
    batch = ppo.make_batch(prompts, responses, tokenizer.pad_token_id)
    logprobs = ppo.response_logprobs(policy, *ppo.model_inputs(batch), 4, 1.0)
    scores = ppo.score_responses(reward_model, [p + r for p, r in zip(prompts, responses)], tokenizer.pad_token_id, 4)
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        alone = ppo.response_logprobs(policy, *ppo.model_inputs(ppo.make_batch([prompt], [response], 0)), len(response), 1.0)
        assert torch.allclose(logprobs[i, :len(response)], alone[0], atol=1e-4)
        assert torch.allclose(scores[i], reward_model(torch.tensor([prompt + response])).logits[0, 0], atol=1e-4)


def test_all_stages_run_on_it(tuned, rm, r2, ppo, evaluation, monkeypatch):
    monkeypatch.chdir(tuned["folder"])
    shared = {"workers": 1, "max_new_tokens": 12}
    rm.main(rm.Config(data="problems.jsonl", epochs=4, lr=3e-3, batch_size=8, **shared))
    r2.main(r2.Config(data="problems.jsonl", responses_per_prompt=4, repeats=1, bins=4, **shared))
    ppo.main(ppo.Config(data="problems.jsonl", validation="problems.jsonl", iterations=3, prompts_per_iteration=8,
                        critic_warmup=1, minibatch_size=8, **shared))
    evaluation.main(evaluation.Config(policies=["out/sft", "out/ppo_bw/last"], problems=["problems.jsonl"], samples=2, ks=[1],
                                      **shared))
    results = json.loads((tuned["folder"] / "out/eval/results.json").read_text())
    assert 0.1 < results[0]["pass@1"]["mean"] < 0.9  # half of the solutions were wrong
    last = json.loads((tuned["folder"] / "out/ppo_bw/metrics.jsonl").read_text().splitlines()[-1])
    assert last["policy_ratio"] == pytest.approx(1.0, abs=0.2) and last["kept"] == 16


def test_a_base_model_is_evaluated_as_it_is(base, evaluation, monkeypatch):
    """Without stage 1: no row for a pad token in its embedding, prompts of different lengths in a batch."""
    monkeypatch.chdir(base["folder"])
    evaluation.main(evaluation.Config(policies=[str(base["folder"] / "base")], problems=["problems.jsonl"], samples=0,
                                      max_new_tokens=4, workers=1, out="out/eval_base"))
    assert json.loads((base["folder"] / "out/eval_base/results.json").read_text())[0]["problems"] == 48


# ------------------------------------------------------------------------------------------------------ loading, saving


def test_every_dropout_is_off_whatever_its_name(ppo, tmp_path):
    """Starcoder2 calls it residual_dropout, GPT-2 resid_pdrop, OPT dropout."""
    from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig, Starcoder2Config

    for name, config in (("starcoder2", Starcoder2Config(vocab_size=20, hidden_size=16, num_hidden_layers=1, intermediate_size=16,
                                                         num_attention_heads=2, num_key_value_heads=1, residual_dropout=0.5)),
                         ("gpt2", GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5)),
                         ("opt", OPTConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2,
                                           word_embed_proj_dim=16, dropout=0.5))):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        ids = torch.tensor([[5, 6, 7, 8]])
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name).train()
        assert not torch.equal(theirs(ids).logits, theirs(ids).logits)  # or this test shows nothing
        ours = ppo.load_model(AutoModelForCausalLM, tmp_path / name, DEVICE).train()
        assert torch.equal(ours(ids).logits, ours(ids).logits)


def test_saving_goes_on_where_a_kill_left_an_old_folder(ppo, base, tmp_path):
    """Killed after the new checkpoint got its name and before the old one was deleted: the next save is not in its way."""
    path = str(base["folder"] / "base")
    model, tokenizer = ppo.load_model(ppo.AutoModelForCausalLM, path, DEVICE), ppo.load_tokenizer(path)
    for name in ("best", "best.old", "best.tmp"):
        ppo.save_model(model, tokenizer, tmp_path / name)
    ppo.save_model(model, tokenizer, tmp_path / "best")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("best")] == ["best"]


# ------------------------------------------------------------------------------- base models: stop strings, plain prompts

PAPER = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]


@pytest.mark.parametrize("text, cut", [
    ("    return 1\n\n\ndef g():\n    ret", "    return 1\n\n"),
    ("    return 1\nprint(f(2))\nclass A:", "    return 1"),  # the first in the text, not the first of the list
    ("    if x:\n        return 1\n    # why\n    return 2\n", "    if x:\n        return 1\n    # why\n    return 2\n"),  # indented
    ("\ndef f(x):", ""),
    ("def f(x):\n    return x\n# next", "def f(x):\n    return x"),
    ("", ""),
])
def test_text_is_cut_at_the_first_stop_string(evaluation, text, cut):
    assert evaluation.cut_at_stop(text, PAPER) == cut
    assert evaluation.cut_at_stop(text, []) == text


def test_a_base_model_that_goes_on_passes_with_stop_strings_only(base, sft, evaluation, monkeypatch):
    """It answers, goes on with a program of its own, and never emits EOS."""
    monkeypatch.chdir(base["folder"])
    ids = sft.encode_response(base["tokenizer"], "x = 1\nprint(x\n\nx x x")[:-1]  # a syntax error, and no end
    monkeypatch.setattr(evaluation, "generate", lambda *arguments, **options: [[ids]] * len(base["problems"]))
    for number, stop in enumerate(([], ["\nclass", "\nprint"])):
        evaluation.main(evaluation.Config(policies=[str(base["folder"] / "base")], problems=["problems.jsonl"], samples=0,
                                          max_new_tokens=20, workers=1, out=f"out/eval_stop_{number}", stop=stop))
        results = json.loads((base["folder"] / f"out/eval_stop_{number}/results.json").read_text())
        sample = json.loads((base["folder"] / f"out/eval_stop_{number}/samples.jsonl").read_text().splitlines()[0])
        assert results[0]["greedy pass@1"]["mean"] == number
        assert sample["response"] == ("x = 1" if stop else "x = 1\nprint(x\n\nx x x") and sample["truncated"] == (not stop)


@pytest.mark.parametrize("look_every", [1, 7])
def test_generation_ends_at_stop_strings(base, evaluation, look_every):
    """Cut at the stop string the texts are those of unbroken generation, and the model has run no further than it had to."""
    path = str(base["folder"] / "base")
    tokenizer = evaluation.load_tokenizer(path)
    policy = evaluation.load_model(evaluation.AutoModelForCausalLM, path, DEVICE, len(tokenizer), frozen=True).eval()
    prompts = [evaluation.encode_prompt(tokenizer, problem["prompt"]) for problem in base["problems"]][:6]
    passes = []
    policy.register_forward_hook(lambda *_: passes.append(1))

    def sample(stop):
        passes.clear()
        groups = evaluation.generate(policy, tokenizer, prompts, 1, 40, 0.0, None, 64, look_every=look_every, stop=stop)
        return [evaluation.decode_response(tokenizer, ids) for ids, in groups], len(passes)

    unbroken, all_passes = sample([])
    stop = [text[len(text) // 3:len(text) // 3 + 5] for text in unbroken if len(text) > 15]  # across tokens, as it falls
    texts, passes_made = sample(stop)
    assert stop and passes_made < all_passes
    assert [evaluation.cut_at_stop(text, stop) for text in texts] == [evaluation.cut_at_stop(text, stop) for text in unbroken]


def test_stop_strings_from_the_command_line(evaluation, monkeypatch):
    monkeypatch.setattr("sys.argv", ["05_eval.py", "--stop", *PAPER])
    assert evaluation.parse_config(evaluation.Config, "").stop == PAPER
    monkeypatch.setattr("sys.argv", ["05_eval.py"])
    assert evaluation.parse_config(evaluation.Config, "").stop == []


def test_plain_leaves_the_chat_template_out_for_good(sft, ppo, evaluation, tmp_path, monkeypatch):
    from conftest import tiny_config
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    config = tiny_config("llama")
    config.vocab_size, config.eos_token_id = len(make_tokenizer(tmp_path / "base", **KINDS["chat"][0])), 2
    AutoModelForCausalLM.from_config(config).save_pretrained("base")
    (tmp_path / "problems.jsonl").write_text((json.dumps({**PROBLEM, "task_id": "t", "prompt": PROMPT, "solution": "x"}) + "\n") * 4)
    seen = []
    monkeypatch.setattr(evaluation, "generate", lambda model, tokenizer, prompts, *_, **options: seen.append(prompts[0]) or [[[5]]] * 4)
    for plain in (False, True):
        sft.main(sft.Config(model="./base", data="problems.jsonl", out=f"out/{plain}", epochs=1, max_length=64, plain=plain))
        evaluation.main(evaluation.Config(policies=["./base"], problems=["problems.jsonl"], samples=0, max_new_tokens=4,
                                          workers=1, out=f"out/eval_{plain}", plain=plain))
        tokenizer = ppo.load_tokenizer(f"out/{plain}")
        expected = PROMPT if plain else f"<|user|>\n{PROMPT}\n<|assistant|>\n"
        assert tokenizer.decode(ppo.encode_prompt(tokenizer, PROMPT)) == tokenizer.decode(seen[-1]) == expected
