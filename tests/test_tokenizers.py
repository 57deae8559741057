"""Tokenizers as they come with real models: where a prompt ends, one BOS, one EOS, another pad."""

import json

import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

import sandbox

DEVICE = torch.device("cpu")
PROMPT = "def f(xs):\n"
RESPONSES = [
    "    return xs\n",
    "return [x for x in xs]",
    "\n\n    return 1\n",
    "\treturn xs",
    "```python\nx = 1\n```",
    "x = 'Zürich ☃'",
]
# ruff: noqa: E501 (templates)
CHAT = "{% for m in messages %}<|user|>\n{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"

# name: options of `make_tokenizer`, the number of BOS in an encoded prompt
KINDS = {
    "plain": ({"pad_token": "<pad>"}, 0),
    "chat": ({"pad_token": "<pad>", "chat_template": CHAT}, 0),
    "chat_without_pad": ({"chat_template": CHAT}, 0),
    "no_pad": ({}, 0),
    "pad_is_eos": ({"pad_token": "</s>"}, 0),
    "all_one": (
        {"bos_token": "</s>", "pad_token": "</s>", "unk_token": "</s>"},
        0,
    ),  # GPT-2: one token for everything
    "no_bos": ({"pad_token": "<pad>", "bos_token": None}, 0),
    "adds_bos": ({"pad_token": "<pad>", "adds": "<s> $A"}, 1),
    "bos_of_template_and_tokenizer": (
        {"pad_token": "<pad>", "adds": "<s> $A", "chat_template": "{{ bos_token }}" + CHAT},
        1,
    ),
    "bos_of_tokenizer_not_of_template": (
        {"pad_token": "<pad>", "adds": "<s> $A", "chat_template": CHAT},
        0,
    ),
    "appends_eos": ({"pad_token": "<pad>", "adds": "$A </s>"}, 0),
    "adds_bos_appends_eos_pads_with_eos": ({"pad_token": "</s>", "adds": "<s> $A </s>"}, 1),
    "sentencepiece": (
        {"style": "metaspace", "adds": "<s> $A"},
        1,
    ),  # Llama 2, CodeLlama and Mistral in transformers 5
    "sentencepiece_legacy": (
        {"style": "prepend", "adds": "<s> $A"},
        1,
    ),  # and their tokenizer.json before
    "sentencepiece_chat": (
        {"style": "metaspace", "adds": "<s> $A", "chat_template": "{{ bos_token }}" + CHAT},
        1,
    ),
}


def save_beside_config(tokenizer, folder):
    """A folder without config.json would be refused: it holds no model."""
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text("{}")


def make_tokenizer(folder, style="byte_level", adds=None, chat_template=None, **options):
    """Save a small BPE tokenizer with <s> and </s>; `adds`: what it puts around a text."""
    from transformers import PreTrainedTokenizerFast

    sentencepiece = style != "byte_level"
    texts = [
        PROMPT,
        "    return xs return [x for x in xs] x = 1 x = 2 x = 3"
        if sentencepiece
        else "\n".join(RESPONSES),
    ] * 5
    tokenizer = Tokenizer(models.BPE(byte_fallback=sentencepiece))
    if style == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif style == "prepend":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=120 if sentencepiece else 320,
            special_tokens=["<pad>", "<s>", "</s>"],
            show_progress=False,
            initial_alphabet=[] if sentencepiece else pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if (
        sentencepiece
    ):  # a character that is no token, and the line break is none, comes as its bytes
        state = json.loads(tokenizer.to_str())
        vocabulary = {token: i for token, i in state["model"]["vocab"].items() if "\n" not in token}
        state["model"]["merges"] = [
            merge for merge in state["model"]["merges"] if "\n" not in "".join(merge)
        ]
        names = [*vocabulary, *(f"<0x{byte:02X}>" for byte in range(256))]
        state["model"]["vocab"] = {token: i for i, token in enumerate(names)}
        tokenizer = Tokenizer.from_str(json.dumps(state))
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    if adds:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=adds,
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"bos_token": "<s>", "eos_token": "</s>", **options}
    )
    tokenizer.chat_template = chat_template
    save_beside_config(tokenizer, folder)
    return tokenizer


@pytest.fixture(params=KINDS)
def kind(request, ppo, tmp_path):
    """(tokenizer as a stage loads it, its number of BOS, whether it has a chat template)"""
    options, bos = KINDS[request.param]
    make_tokenizer(tmp_path / "tokenizer", **options)
    return sandbox.load_tokenizer(str(tmp_path / "tokenizer")), bos, "chat_template" in options


def test_a_prompt_has_one_bos_or_none_and_ends_where_the_response_begins(ppo, kind):
    tokenizer, bos, chat = kind
    ids = sandbox.encode_prompt(tokenizer, PROMPT)
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
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer(chat).input_ids[:2] == [1, 1]
    assert (
        plain("appends_eos")[1][-1] == 2
        and plain("adds_bos")[1][0] == 1
        and plain("no_bos")[0].bos_token_id is None
    )
    assert plain("no_pad")[0].pad_token_id is None and plain("pad_is_eos")[0].pad_token_id == 2
    tokenizer, _ = plain("sentencepiece")
    assert (
        tokenizer.decode(tokenizer("    return xs", add_special_tokens=False).input_ids)
        == "   return xs"
    )


@pytest.mark.parametrize("text", RESPONSES)
def test_a_response_has_one_eos_and_comes_back_as_it_was(ppo, sft, kind, text):
    tokenizer, _, _ = kind
    ids = sandbox.encode_response(tokenizer, text)
    assert ids[-1] == 2 and ids.count(2) == 1 and 1 not in ids
    assert sandbox.decode_response(tokenizer, ids) == text
    assert (
        sandbox.decode_response(tokenizer, ids[:-1]) == text
    )  # truncated: nothing is taken off the end


def test_a_response_continues_its_prompt(ppo, sft, kind):
    """Decoded together they are prompt + response: no space of SentencePiece's between them."""
    tokenizer, bos, chat = kind
    for text in RESPONSES:
        together = (
            sandbox.encode_prompt(tokenizer, PROMPT)[bos:]
            + sandbox.encode_response(tokenizer, text)[:-1]
        )
        assert tokenizer.decode(together).endswith(("<|assistant|>\n" if chat else PROMPT) + text)


def test_pad_is_not_eos_and_stays_the_same_when_saved(ppo, kind, tmp_path):
    tokenizer, _, _ = kind
    assert (
        tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id == 2
    )
    save_beside_config(tokenizer, tmp_path / "saved")
    again = sandbox.load_tokenizer(str(tmp_path / "saved"))
    assert (again.pad_token_id, again.eos_token_id, len(again)) == (
        tokenizer.pad_token_id,
        2,
        len(tokenizer),
    )
    assert sandbox.encode_prompt(again, PROMPT) == sandbox.encode_prompt(tokenizer, PROMPT)


# ----------------------------------------------------------------------- templates that close a
# turn with another token

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n{% else %}"
    "### Response:\n{{ m['content'] }}\n<|EOT|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
)
TURNS = {  # name: template, its special tokens, the one that closes a turn, options of `make_tokenizer`
    "chatml": (
        CHATML,
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
        {"pad_token": "</s>"},
    ),  # Qwen: pad is the base model's EOS
    "llama_3": (
        LLAMA_3,
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
        {"adds": "<s> $A"},
    ),
    "gemma": (
        GEMMA,
        ["<start_of_turn>", "<end_of_turn>"],
        "<end_of_turn>",
        {"pad_token": "<pad>", "style": "metaspace", "adds": "<s> $A"},
    ),
    "phi_3": (
        PHI_3,
        ["<|user|>", "<|assistant|>", "<|end|>"],
        "<|end|>",
        {"pad_token": "<|end|>"},
    ),  # a pad that would be the new EOS
    "deepseek": (
        DEEPSEEK,
        ["<|EOT|>"],
        "<|EOT|>",
        {"pad_token": "<pad>"},
    ),  # a line break before it
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}"
        " {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
        [],
        "</s>",
        {"pad_token": "<pad>"},
    ),
}


@pytest.mark.parametrize("name", TURNS)
def test_a_response_ends_where_the_template_closes_a_turn(sft, ppo, tmp_path, name):
    template, tokens, closing, options = TURNS[name]
    saved = make_tokenizer(
        tmp_path / "base", chat_template=template, extra_special_tokens=tokens, **options
    )
    assert saved.eos_token == "</s>"
    tokenizer = sandbox.load_tokenizer(str(tmp_path / "base"))
    assert tokenizer.eos_token == closing
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    ids = sandbox.encode_prompt(tokenizer, PROMPT) + sandbox.encode_response(tokenizer, "x = 1")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "x = 1"}],
        tokenize=False,
    )
    assert ids[-1] == tokenizer.convert_tokens_to_ids(closing)
    if name not in (
        "deepseek",
        "mistral",
    ):  # one puts a line break before the token, the other a space before the answer
        assert text.startswith(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    assert (
        sandbox.decode_response(tokenizer, sandbox.encode_response(tokenizer, "x = 1")) == "x = 1"
    )
    save_beside_config(tokenizer, tmp_path / "saved")
    again = sandbox.load_tokenizer(str(tmp_path / "saved"))
    assert (again.eos_token, again.pad_token, len(again)) == (
        closing,
        tokenizer.pad_token,
        len(tokenizer),
    )
    plain = sandbox.load_tokenizer(str(tmp_path / "base"), plain=True)
    assert plain.eos_token == "</s>" and plain.chat_template is None
    assert plain.decode(sandbox.encode_prompt(plain, PROMPT)).endswith(PROMPT)


def test_a_template_that_writes_the_date_gives_the_same_prompt_on_any_day(sft, ppo, tmp_path):
    """Llama 3.2 takes the day from a clock of transformers unless it is given one."""
    template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "Today is {{ date_string }}\n" + CHATML
    )
    make_tokenizer(
        tmp_path / "base",
        chat_template=template,
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        pad_token="<pad>",
    )
    tokenizer = sandbox.load_tokenizer(str(tmp_path / "base"))
    text = tokenizer.decode(sandbox.encode_prompt(tokenizer, PROMPT))
    assert "Today is 26 Jul 2024\n" in text and PROMPT in text


@pytest.mark.parametrize(
    "template, words",
    [
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "does not show"),
        (f"{{% if messages[1] is defined %}}{CHAT}{{% endif %}}", "does not show"),
        (CHAT.replace("messages", "messages[:1]"), "does not show"),
        ("{{ messages[0]['content'] }}{{ messages[1]['content'] + '' }}", "refuses"),
        ("{{ raise_exception('a system message comes first') }}", "a system message"),
        ("{{ messages[0]['content'] }}{{ messages['name'] + 1 }}", "refuses"),
    ],
)
def test_a_template_that_cannot_take_a_prompt_is_refused(ppo, tmp_path, capsys, template, words):
    make_tokenizer(tmp_path / "base", chat_template=template, pad_token="<pad>")
    with pytest.raises(SystemExit) as stop:
        sandbox.load_tokenizer(str(tmp_path / "base"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error


def test_templates_without_a_default_are_refused(ppo, tmp_path, capsys):
    tokenizer = make_tokenizer(tmp_path / "base", pad_token="<pad>")
    tokenizer.chat_template = {"tool_use": CHAT, "rag": CHAT}
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(SystemExit) as stop:
        sandbox.load_tokenizer(str(tmp_path / "base"))
    assert stop.value.code == 2 and "chat template" in capsys.readouterr().err


def test_a_model_without_a_row_for_pad_gets_the_mean_and_the_tokenizers_ends(ppo, tmp_path):
    """Loaded twice, as policy and reference, it is the same model; its own logits stay."""
    from conftest import tiny_config
    from transformers import AutoModelForCausalLM

    make_tokenizer(tmp_path / "base", **KINDS["chat_without_pad"][0])
    tokenizer = sandbox.load_tokenizer(str(tmp_path / "base"))
    config = tiny_config("qwen2")
    config.vocab_size, config.eos_token_id = len(tokenizer) - 1, 0
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config)
    plain.save_pretrained(tmp_path / "base")
    one, other = (
        ppo.load_model(AutoModelForCausalLM, str(tmp_path / "base"), tokenizer) for _ in range(2)
    )
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = one(ids).logits
        assert torch.equal(logits, other(ids).logits)
        assert torch.equal(logits[..., :-1], plain(ids).logits)
    pad = tokenizer.pad_token_id
    assert one.get_input_embeddings().num_embeddings == len(tokenizer) == pad + 1
    assert (one.config.eos_token_id, one.config.pad_token_id) == (2, pad)
    one.save_pretrained(tmp_path / "saved")
    from transformers import GenerationConfig

    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (saved.eos_token_id, saved.pad_token_id) == (2, pad)


def test_a_folder_with_adapters_only_is_refused(ppo, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        sandbox.load_tokenizer(str(tmp_path))
    assert stop.value.code == 2 and "merge" in capsys.readouterr().err
