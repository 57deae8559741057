"""The memory that stage 4 needs, from the models' configs alone: `python 04_pf_ppo.py --plan` and its other flags.

For each role the parameters and the bytes of weights, gradients and optimiser, for each phase of an iteration its peak, and
whether it fits the card. Nothing is downloaded but configs. `stage` is 04_pf_ppo.py as a module: its own functions build the
models, without memory, so the plan follows what the stage does.

Run     python 04_pf_ppo.py --plan --policy out/sft-7b --reward_model out/rm-7b --lora_rank 16 --card_gb 80
"""

import math
import os

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification)
from transformers.pytorch_utils import Conv1D


def tensor_bytes(tensors):
    """Bytes of the distinct tensors among `tensors`; tied weights count once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def activation_bytes(model, rows, length, in_bf16):
    """Bytes that autograd keeps for the backward pass of one pass of (rows, length) tokens through the blocks of `model`.

    The pass runs for real, on tensors that have a shape and a type but no memory, so any architecture is counted as it is,
    and so are the copies of weights that autocast makes. `model` is on the meta device, and of no use afterwards.
    """
    kept, fake = {}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode():
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None and id(tensor) not in fake:
                        fake[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
                        if isinstance(tensor, torch.nn.Parameter):
                            fake[id(tensor)] = torch.nn.Parameter(fake[id(tensor)], requires_grad=tensor.requires_grad)
                    table[name] = fake.get(id(tensor), tensor)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        ids = torch.ones(rows, length, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
                torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            model.eval().base_model(input_ids=ids, attention_mask=ids, position_ids=ids.cumsum(-1) - 1, use_cache=False)
    return sum(kept.values())


def empty_models(stage, cfg, gpu, layers=None):
    """{role: model} as the stage has them, on the meta device: shapes, no memory. layers: number of blocks, None: all."""
    def empty(model_class, path, frozen, **options):
        stage.check_model_path(path)
        try:
            config = AutoConfig.from_pretrained(path, **options)
        except (OSError, ValueError) as error:
            stage.fail(f"no config at {path}; run the stage that writes it first ({str(error).splitlines()[0]})")
        if layers:
            config.num_hidden_layers = layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:layers]
        config.reward_mean, config.reward_std = 0.0, 1.0  # an RM yet to be trained has none
        try:
            model = model_class.from_config(config, dtype=getattr(torch, cfg.dtype))
        except ValueError:
            stage.fail(f"transformers has no {model_class.__name__} of the architecture of {path}, {config.model_type}")
        return stage.freeze(model, gpu) if frozen else model

    with torch.device("meta"):
        models = {"policy": empty(AutoModelForCausalLM, cfg.policy, cfg.lora_rank > 0)}
        models["reward model"] = empty(AutoModelForSequenceClassification, cfg.reward_model, True, num_labels=1)
        if cfg.lora_rank:
            stage.add_adapters(models["policy"], cfg.lora_rank, getattr(torch, cfg.dtype), cfg.seed)
        else:
            models["reference"] = empty(AutoModelForCausalLM, cfg.policy, True)
        if cfg.advantage == "gae":
            models["critic"] = stage.load_critic(cfg, models["reward model"], torch.device("meta")) if cfg.lora_rank else \
                empty(AutoModelForTokenClassification, cfg.reward_model, False, num_labels=1)
    return models


def memory_plan(stage, cfg):
    """Peak memory of each phase, bytes -> {"roles": {role: {...}}, "phases": {phase: bytes}, "parts": {part: bytes}}.

    Weights, gradients and optimiser states are exact; activations are those of full-length rows; what is short-lived
    (logits, masks, the passes without gradients) is an estimate. Of one process, and --shard is not in it.
    """
    gpu = cfg.card_gb > 0 or torch.cuda.is_available()
    models = empty_models(stage, cfg, gpu)
    config = models["policy"].config
    width, vocabulary, layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    size = 2 if gpu or cfg.dtype == "bfloat16" else 4  # bytes of a number in a matrix product
    length = cfg.prompt_tokens + cfg.max_new_tokens
    prompts, per_prompt = stage.rollout_shape(cfg)
    rollouts = prompts * per_prompt
    checked = 0  # validation: one response to each problem, whose file may not be there yet
    if os.path.isfile(cfg.validation):
        with open(cfg.validation, encoding="utf-8") as file:
            checked = min(cfg.generate_batch_size, sum(1 for line in file if line.strip()))
    rows = {"generate": max(checked, min(cfg.generate_batch_size, rollouts)), "score": min(cfg.score_batch_size, rollouts),
            "train": min(cfg.micro_batch_size, cfg.minibatch_size)}

    roles, counted = {}, set()
    for role, model in models.items():
        tensors = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in counted]  # LoRA shares the blocks
        counted |= {id(t) for t in tensors}
        learned = [p for p in model.parameters() if p.requires_grad and role in ("policy", "critic")]
        roles[role] = {"parameters": sum(p.numel() for p in model.parameters()), "learned": sum(p.numel() for p in learned),
                       "weights": tensor_bytes(tensors), "gradients": tensor_bytes(learned),
                       "optimiser": 2 * tensor_bytes(learned) + 4 * len(learned)}  # AdamW: two moments, and a step count
    held = sum(role["weights"] + role["optimiser"] for role in roles.values())

    # Autocast keeps a bf16 copy of the float32 matrices that learn; `activation_bytes` has seen it.
    copies = sum(2 * m.weight.numel() for m in models["policy"].modules() if gpu and isinstance(m, (torch.nn.Linear, Conv1D))
                 and m.weight.requires_grad and m.weight.dtype == torch.float32)
    parts = {"KV cache": 2 * layers * heads * head * rows["generate"] * length * size,
             "generate: logits": 16 * rows["generate"] * vocabulary, "bf16 copies": copies}

    def logits(count):
        """Bytes of the logits of so many rows and their gradients: four float32 each, or three of a part in `target_logprobs`."""
        part = cfg.logits_mb * 2**18 / vocabulary if cfg.logits_mb else math.inf
        return int(vocabulary * min(16 * count * cfg.max_new_tokens, 12 * part))

    def without_gradients(count, tokens):
        """A block's largest tensors, and the mask of padded batches: bool and its float form."""
        return count * tokens * (3 * inner + 4 * width) * size + 3 * count * tokens**2

    parts["prefill"] = without_gradients(max(1, checked, rows["generate"] // per_prompt), cfg.prompt_tokens)
    phases = {"generate": held + sum(parts.values()),
              "score": held + copies + without_gradients(rows["score"], length) + logits(rows["score"])}
    for role in (r for r in ("critic", "policy") if r in models):
        if cfg.gradient_checkpointing:  # one block's activations at a time, and what goes into each
            kept = activation_bytes(empty_models(stage, cfg, gpu, layers=1)[role], rows["train"], length, gpu)
            kept += copies + layers * rows["train"] * length * width * (2 if cfg.dtype == "bfloat16" else 4)
        else:
            kept = activation_bytes(models[role], rows["train"], length, gpu)
        parts[f"train {role}: activations"] = kept
        parts[f"train {role}: logits"] = logits(rows["train"]) if role == "policy" else 0
        phases[f"train {role}"] = held + roles[role]["gradients"] + kept + parts[f"train {role}: logits"]
    return {"roles": roles, "phases": phases, "parts": parts}


def print_plan(stage, cfg):
    """--plan: a table of what the flags need, and whether it fits."""
    planned = memory_plan(stage, cfg)
    print(f"{'GB':<28}{'parameters':>12}{'learned':>12}{'weights':>10}{'gradients':>11}{'optimiser':>11}")
    for role, row in planned["roles"].items():
        print(f"{role:<28}{row['parameters'] / 1e6:>10.1f} M{row['learned'] / 1e6:>10.1f} M{row['weights'] / 2**30:>10.2f}"
              f"{row['gradients'] / 2**30:>11.2f}{row['optimiser'] / 2**30:>11.2f}")
    for name, size in {**planned["parts"], **{f"peak, {phase}": size for phase, size in planned["phases"].items()}}.items():
        print(f"{name:<28}{size / 2**30:>12.2f}")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if cfg.card_gb:
        memory = cfg.card_gb * 2**30
    elif torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    phase = max(planned["phases"], key=planned["phases"].get)
    peak, room = planned["phases"][phase], 0.95 * memory - 2**30  # less up to 1 GB for the driver, and gaps between blocks
    advice = {"generate": "--generate_batch_size", "score": "--score_batch_size"}.get(phase, "--micro_batch_size")
    if not cfg.gradient_checkpointing and advice == "--micro_batch_size":
        advice += ", or take --gradient_checkpointing"
    if sum(row["weights"] + row["gradients"] + row["optimiser"] for row in planned["roles"].values()) > 0.8 * room:
        advice = "nothing: weights and optimiser are too large; take --lora_rank 16" if not cfg.lora_rank else "the model"
    verdict = "it fits" if peak <= room else f"it does NOT fit; lower {advice}"
    print(f"largest: {phase}, {peak / 2**30:.1f} GB; of {memory / 2**30:.1f} GB there {room / 2**30:.1f} can be used: {verdict}")
