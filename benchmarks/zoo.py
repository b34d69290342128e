"""Every causal, image-text and sequence-to-sequence model type of transformers, small and random, trained with LISA.

python benchmarks/zoo.py [--only llama,t5] [--out zoo.jsonl] [--page]

Each type is a process of its own, for at most two minutes of processor time. Results go to a file of JSON lines; a type that is there already
is not tried again, so the same command goes on after a stop. ``--page`` writes results/<date>-zoo.md from the file.

What is tried: that the list found is one that runs; that everything with a gradient in full training trains; six steps of LISA,
in which only what is active may move and frozen weights hold no optimizer state; that the loss is that of the model's
logits; that no token sees a later one, or the model is refused; that a plan can be made.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from results import write_page
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from zoo_configs import shrink

from lisatune import LisaEngine, UniformSampler, UserError, find_layers, plan_memory
from lisatune.data.loader import Batch
from lisatune.loss import batch_loss
from lisatune.trainer.checks import check_causal

MOST_PARAMETERS = 60_000_000
SECONDS = 120
CAUSAL = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IMAGES = {
    **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
}
FAMILIES = {
    "causal": CAUSAL,
    "image-text": {name: kind for name, kind in IMAGES.items() if name not in CAUSAL},
    "seq2seq": dict(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
}
TOKENS = {"reformer": 64, "xlstm": 16}  # of a row, where a model takes no other number; 8 elsewhere
VERDICTS = {
    "right": "all checks pass",
    "found": "the list is found; no pass of text alone is possible here, so it was not trained",
    "refused": "with a sentence that says what to do",
    "wrong": "something is wrong and nobody is told",
    "error": "stopped by an error that is no sentence for a user",
    "not built": "no small model could be made by this script",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="model types, with commas")
    parser.add_argument("--out", type=Path, default=Path("zoo.jsonl"))
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    done = {(row["type"], row["family"]) for row in read(options.out)}
    wanted = options.only.split(",") if options.only else None
    for family, names in FAMILIES.items():
        for name in sorted(names):
            if (wanted is None or name in wanted) and (name, family) not in done:
                in_its_own_process(name, family, options.out)
    if options.page:
        print(write_page("zoo", page(read(options.out)), __doc__ or ""))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()] if path.exists() else []


def in_its_own_process(name: str, family: str, path: Path) -> None:
    row: dict[str, Any] = {"type": name, "family": family, "verdict": "error", "note": "the process died"}
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        signal.signal(signal.SIGPROF, _too_slow)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its own time, so that it may wait for other work
        start = time.monotonic()
        try:
            row |= judge(name, family)
        except BaseException as error:
            row |= {"verdict": "error", "note": short(error)}
        row["seconds"] = round(time.monotonic() - start, 1)
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(row))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    with path.open("a") as file:
        file.write((told or json.dumps(row)) + "\n")
    print(name, json.loads(told or json.dumps(row))["verdict"], flush=True)


def _too_slow(*_: Any) -> None:
    raise TimeoutError(f"took more than {SECONDS} seconds of processor time")


def short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def judge(name: str, family: str) -> dict[str, Any]:
    """The verdict on a type, and why."""
    try:
        config, model = build(name, family)
    except Exception as error:
        return {"verdict": "not built", "note": short(error)}
    try:
        layers = find_layers(model)
        check_causal(layers)
    except UserError as error:
        return {"verdict": "refused", "note": str(error)}
    row = {"layers": f"{layers.decoder_name} {len(layers.decoder)}", "plan": plan(config, model, layers, family)}
    if model.device.type == "meta":
        return row | {"verdict": "found", "note": "too large for this script"}
    ids = torch.randint(5, 90, (2, TOKENS.get(name, 8)), generator=torch.Generator().manual_seed(1))
    try:
        ran, graded = full_training(model, ids)
    except Exception as error:
        return row | {"verdict": "found", "note": short(error)}
    faults = stack_faults(layers, ran) + never_trained(layers, graded) + steps(model, layers, ids)
    if not model.config.is_encoder_decoder:
        faults += loss_faults(model, layers, ids)
    if isinstance(row["plan"], str) and row["plan"].startswith("error"):
        faults.append(f"plan: {row['plan']}")
    return row | {"verdict": "wrong" if faults else "right", "note": "; ".join(faults)[:400]}


def build(name: str, family: str) -> tuple[Any, Any]:
    """The small model; on the meta device where it is not small enough."""
    config = shrink(CONFIG_MAPPING[name])
    if getattr(config, "is_encoder_decoder", False):
        for token in ("decoder_start_token_id", "pad_token_id"):
            if getattr(config, token, None) is None:
                setattr(config, token, 0)
    config.use_cache = False  # as in training; some caches count the layers of the other stack
    kind = FAMILIES[family][name]
    kind = getattr(transformers, kind[0] if isinstance(kind, list | tuple) else kind)

    def make() -> Any:
        own = copy.deepcopy(config)
        return AutoModelForCausalLM.from_config(own) if family == "causal" else kind(own)

    with torch.device("meta"):
        model = make()
    if sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS:
        return config, model
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not torch.isfinite(parameter).all():
                parameter.normal_(0, 0.02)  # some are made with torch.empty
    return config, model


def full_training(model: Any, ids: torch.Tensor) -> tuple[set[int], set[str]]:
    """The modules that ran in a pass of text alone, and the parameters that got a gradient."""
    ran: set[int] = set()
    hooks = [m.register_forward_hook(lambda module, _args, _out: ran.add(id(module))) for m in model.modules()]
    model.train()
    loss(model, ids).backward()
    for hook in hooks:
        hook.remove()
    graded = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    return ran, graded


def loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def stack_faults(layers: Any, ran: set[int]) -> list[str]:
    idle = [i for i, layer in enumerate(layers.decoder) if not any(id(m) in ran for m in layer.modules())]
    return [f"layers {idle} did not run"] if len(idle) == len(layers.decoder) else []


def never_trained(layers: Any, graded: set[str]) -> list[str]:
    """What full training trains and LISA never would."""
    lost = sorted(set(layers.parts()["outside"]) & graded)
    return [f"never trained: {', '.join(lost[:3])} ({len(lost)})"] if lost else []


def steps(model: Any, layers: Any, ids: torch.Tensor) -> list[str]:
    """Six steps of LISA with two of the layers, and what they did wrong."""
    faults = []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.is_floating_point()], lr=1e-3, weight_decay=0.1)
    num_layers = len(layers.decoder)
    engine = LisaEngine(layers, UniformSampler(num_layers, min(2, num_layers), seed=3), interval_steps=2)
    for step in range(6):
        engine.begin_step(step, optimizer)
        assert engine.drawn is not None
        parts, wanted = layers.parts(), engine.trained_parts(engine.drawn)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        for part, own in parts.items():
            if part not in wanted and any(not torch.equal(before[name], p) for name, p in own.items()):
                faults.append(f"step {step}: frozen {part} moved")
        trained = {id(p) for part in wanted for p in parts[part].values()}
        if any(id(p) not in trained for p in optimizer.state):
            faults.append(f"step {step}: optimizer state of frozen weights is kept")
    engine.release()
    return faults


def loss_faults(model: Any, layers: Any, ids: torch.Tensor) -> list[str]:
    """Where lisatune's loss is not that of the model's logits."""
    model.eval()
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    positions = torch.arange(ids.shape[1]).repeat(2, 1)
    batch = Batch(ids, labels, positions, torch.ones_like(ids, dtype=torch.bool))
    with torch.no_grad():
        ours = batch_loss(layers, batch, 2 * (ids.shape[1] - 1), linear_head=layers.head_is_linear())
        logits = model(input_ids=ids).logits.float()
        if logits.shape[:2] != ids.shape:
            return []
        theirs = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return [] if abs(ours - theirs) < 1e-4 else [f"loss {ours:.4f}, of the logits {theirs:.4f}"]


def plan(config: Any, model: Any, layers: Any, family: str) -> str:
    """``run``, ``formula``, a refusal or an error."""
    if family != "causal":
        return ""
    try:
        told = plan_memory(config, device="cpu", num_active=min(2, len(layers.decoder)), max_length=8)
    except UserError as error:
        return f"refused: {error}"[:200]
    except Exception as error:
        return f"error {short(error)}"
    return "formula" if "formula" in told.remark else "run"


def page(rows: list[dict[str, Any]]) -> str:
    """Counts, then what is not right, then all."""
    kinds = {family: [row for row in rows if row["family"] == family] for family in FAMILIES}
    counts = {family: collections.Counter(row["verdict"] for row in own) for family, own in kinds.items()}
    lines = [f"| | {' | '.join(FAMILIES)} | |", "| --- | --- | --- | --- | --- |"]
    for verdict, about in VERDICTS.items():
        lines.append(f"| {verdict} | {' | '.join(str(counts[family][verdict]) for family in FAMILIES)} | {about} |")
    seen = {(row["type"], row["family"]) for row in rows}
    missing = {
        family: sorted(name for name in names if (name, family) not in seen) for family, names in FAMILIES.items()
    }
    lines.append(f"| not reached | {' | '.join(str(len(missing[family])) for family in FAMILIES)} | not tried yet |")
    plans = collections.Counter(row.get("plan", "").partition(":")[0] for row in kinds["causal"])
    lines += [
        "",
        f"Plans of causal models: {plans['run']} by a run on the meta device, {plans['formula']} by a formula.",
        "",
    ]
    for verdict in ("wrong", "error", "refused", "found", "not built"):
        told = [row for row in rows if row["verdict"] == verdict]
        if told:
            lines += [f"## {verdict}", "", "| type | |", "| --- | --- |"]
            lines += [f"| {row['type']} | {row['note'].replace('|', '/')[:230]} |" for row in told] + [""]
    right = sorted(row["type"] for row in rows if row["verdict"] == "right")
    left = [f"- {family}: {', '.join(names)}" for family, names in missing.items() if names]
    lines += ["## right", "", ", ".join(right), ""]
    return "\n".join(lines + (["## not reached", "", *left] if left else []))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    sys.exit(main())
