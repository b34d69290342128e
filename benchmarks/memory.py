"""Peak memory: the paper's table and others predicted, levers added one at a time, and predictions against measurements.

python benchmarks/memory.py predict            # tables of predictions; about 50 minutes on one core, no GPU
python benchmarks/memory.py slices             # the default beside LoRA, predicted; about 5 minutes, no GPU
python benchmarks/memory.py ranks              # several processes: what each holds and sends, predicted; 10 minutes, no GPU
python benchmarks/memory.py measure            # real steps with random weights, on the GPU if there is one, beside their forecasts

``measure`` runs each case in a process of its own: two optimizer steps, and the peak of the second. On a GPU it is
``torch.cuda.max_memory_allocated``, on a CPU the sum of what PyTorch's allocator gave out and took back, as its profiler
reports it, and beside it what the process had resident more than before the model was made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from results import SHAPES, markdown, write_page

from lisatune import UserError
from lisatune.assemble import make_learner
from lisatune.memory.measure import PeakMeter, allocated_peak, state_bytes, tensor_bytes
from lisatune.plan.fake_processes import fake_processes
from lisatune.plan.forecast import Plan, model_config, plan_config, plan_run

GB = 10**9
KEPT = Path("runs/memory-measured.jsonl")
# arXiv:2403.17919, first version, GB for a GPU: full, LoRA r128, r256, r512, LISA E+H, +2 layers, +4 layers
PAPER: dict[str, tuple[float | None, ...]] = {
    "gpt2-small": (3.8, 3.3, 3.5, 3.7, 3.3, 3.3, 3.4),
    "tinyllama-1.1b": (13, 7.9, 8.6, 10, 7.4, 8.0, 8.3),
    "phi-2": (28, 14.3, 15.5, 18, 13.5, 14.6, 15),
    "mistral-7b": (59, 23, 26, 28, 21, 23, 24),
    "llama-2-7b": (59, 23, 26, 28, 21, 23, 24),
    "llama-2-70b": (None, 79, None, None, 71, 75, 79),
}
COLUMNS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    **{f"LoRA r{rank}": {"method": "lora", "lora_r": rank} for rank in (128, 256, 512)},
    **{
        f"LISA {name}": {"recipe": "paper", "num_active": gamma}
        for name, gamma in (("E+H", 0), ("E+H+2L", 2), ("E+H+4L", 4))
    },
}
LEVERS: tuple[dict[str, Any], ...] = (
    {},
    {"gradient_checkpointing": True},
    {"optim": "adamw_8bit"},
    {"vocabulary_blocks": True},
    {"optimizer_in_backward": True, "max_grad_norm": 0},
    {"activation_offloading": True},
    {"offload_optimizer": True},
    {"offload_frozen": True},
)
SLICES = {"sampled_unit": "slices", "train_norms": True}  # one of 15, in each step
FEW_BITS: tuple[dict[str, Any], ...] = (
    {"frozen_bits": 8, "offload_frozen": False},
    {"frozen_bits": 4, "offload_frozen": False},
    {"frozen_bits": 4, "offload_frozen": True},
)
LAYERS = {"recipe": "paper"}  # two layers, for 20 steps
MOST = LAYERS | {
    "gradient_checkpointing": True, "optim": "adamw_8bit", "vocabulary_blocks": True, "optimizer_in_backward": True,
    "max_grad_norm": 0, "activation_offloading": True, "offload_optimizer": True,
}  # fmt: skip
LLAMA_CASES: tuple[dict[str, Any], ...] = (
    LAYERS,
    LAYERS | {"gradient_checkpointing": True},
    LAYERS | {"gradient_checkpointing": True, "optim": "adamw_8bit", "vocabulary_blocks": True},
    {"method": "lora", "gradient_checkpointing": True},
    SLICES | {"gradient_checkpointing": True},
    SLICES | {"gradient_checkpointing": True, "optimizer_in_backward": True, "max_grad_norm": 0},
    SLICES | {"gradient_checkpointing": True, "frozen_bits": 4},
    SLICES | {"gradient_checkpointing": True, "offload_frozen": True},
    MOST,
    MOST | {"offload_frozen": True},
    MOST | {"frozen_bits": 8},
    MOST | {"frozen_bits": 4},
    MOST | {"frozen_bits": 4, "offload_frozen": True},
    {"method": "lora", "gradient_checkpointing": True, "frozen_bits": 4},
)


def plan_of(shape: str, rows: int, tokens: int, device: str = "cuda", **settings: Any) -> Plan:
    """The forecast of a case; gamma may be 0, which no run takes."""
    gamma = settings.pop("num_active", None)
    settings |= {"per_device_train_batch_size": rows, "max_length": tokens}
    config = plan_config(settings, device)
    if gamma is not None:
        config = config.model_copy(update={"num_active": gamma})
    return plan_run(config, model_config(str(SHAPES / f"{shape}.json")), device)


def paper_table(shapes: tuple[str, ...]) -> str:
    """One row a model: predicted GB, and the paper's figure in brackets where it has one."""
    rows = []
    for shape in shapes:
        cells = []
        for (_, settings), theirs in zip(COLUMNS.items(), PAPER.get(shape, (None,) * len(COLUMNS)), strict=True):
            plan = plan_of(shape, 1, 1024, optim="adamw_16bit", **settings)
            cells.append(f"{plan.peak_bytes / GB:.1f}" + (f" ({theirs:g})" if theirs is not None else ""))
            print(shape, settings, cells[-1], flush=True)
        rows.append([shape, *cells])
    return markdown(["model", *COLUMNS], rows)


def lever_table(shape: str) -> str:
    """Levers added one at a time: slices, two layers and LoRA r16 with the same levers, as far as a method has them."""
    contenders: dict[str, dict[str, Any]] = {
        "slices": SLICES, "two layers": {"recipe": "paper"}, "LoRA r16": {"method": "lora"},
    }  # fmt: skip
    head = ["levers", *(f"{name}, {where}" for name in contenders for where in ("GiB", "in host memory"))]
    rows = []
    pulled: dict[str, dict[str, Any]] = {name: {} for name in contenders}
    for lever, alone in [(lever, False) for lever in LEVERS] + [(lever, True) for lever in FEW_BITS]:
        cells = []
        for contender, settings in contenders.items():
            now = pulled[contender] | lever
            try:
                plan = plan_of(shape, 2, 2048, **settings, **now)
            except UserError as error:  # the method has no such lever, which is said on the page
                print(error, flush=True)
                cells += ["-", "-"]
                continue
            cells += [_gib(plan.peak_bytes), _gib(plan.host_bytes)]
            pulled[contender] = pulled[contender] if alone else now
        name = " ".join(f"{k}={str(v).lower()}" for k, v in lever.items()) or "none"
        rows.append([("all above, but " if alone else "+ " if lever else "") + f"`{name}`", *cells])
        print(*rows[-1], sep=" | ", flush=True)
    return markdown(head, rows)


def predict() -> None:
    """Tables (a), (b) and (c)."""
    started = time.perf_counter()
    text = [
        "## The paper's models\nPredicted GB (10^9) for a batch of 1 x 1024 tokens. Weights, gradients and moments are bfloat16. Nothing is "
        "checkpointed. LoRA is on all linear layers, and its adapters are bfloat16. In brackets is the paper's figure, from its first "
        "version. Theirs are GB for a GPU, and the 70B ran on several. The paper's LoRA has adapters on embedding and head too. Its "
        "script adds up stages instead of taking a peak.\n",
        paper_table(tuple(PAPER)),
        "\n## Larger vocabularies\nThe same.\n",
        paper_table(("llama-3.1-8b", "qwen2.5-7b", "llama-3.2-3b")),
    ]
    for shape in ("llama-3.1-8b", "llama-2-7b", "llama-3.1-70b"):
        text += [
            f"\n## Levers added one at a time: {shape}\nPredicted GiB (2^30) for a batch of 2 x 2048 tokens. Weights are "
            "bfloat16, and moments float32 to begin with. The loss is always in chunks. Slices: one of 15, norms train. Two layers: embedding and head train too. "
            "A dash is a lever that the method does not have.\n",
            lever_table(shape),
        ]
    text.append(f"\nEvery figure is a prediction; all {time.perf_counter() - started:.0f} s of it ran without a GPU.")
    print(write_page("memory-predicted", "\n".join(text), __doc__ or ""))


RANKS = (  # shape, active layers, processes, processes that share each weight
    ("llama-3.1-8b", 2, 8, 1), ("llama-3.1-8b", 2, 8, 2), ("llama-3.1-8b", 2, 8, 8),
    ("llama-2-70b", 4, 4, 4), ("llama-3.1-70b", 4, 8, 8), ("llama-3.1-70b", 4, 16, 8), ("llama-3.1-405b", 4, 64, 64),
)  # fmt: skip


PARTS: tuple[tuple[str, dict[str, Any]], ...] = (  # none, some and all of the levers that slices have
    ("none", {}),
    ("`gradient_checkpointing=true`", {"gradient_checkpointing": True}),
    ("+ `optimizer_in_backward=true max_grad_norm=0`",
     {"gradient_checkpointing": True, "optimizer_in_backward": True, "max_grad_norm": 0}),
    ("+ `activation_offloading=true`",
     {"gradient_checkpointing": True, "optimizer_in_backward": True, "max_grad_norm": 0, "activation_offloading": True}),
    ("`gradient_checkpointing=true frozen_bits=8`", {"gradient_checkpointing": True, "frozen_bits": 8}),
    ("`gradient_checkpointing=true frozen_bits=4`", {"gradient_checkpointing": True, "frozen_bits": 4}),
    ("`gradient_checkpointing=true offload_frozen=true`", {"gradient_checkpointing": True, "offload_frozen": True}),
    ("+ `frozen_bits=4 optimizer_in_backward=true max_grad_norm=0 activation_offloading=true`",
     {"gradient_checkpointing": True, "offload_frozen": True, "frozen_bits": 4, "optimizer_in_backward": True, "max_grad_norm": 0,
      "activation_offloading": True}),
)  # fmt: skip


def slices(shapes: list[str]) -> None:
    """The default, slices with frozen norms, beside LoRA r16 with the same levers; of ``shapes`` alone if there are some."""
    contenders: dict[str, dict[str, Any]] = {
        "slices": {},
        "slices, norms train": SLICES,
        "slices of 30": {"num_slices": 30},
        "slices of rows": {"slices_of": "rows"},
        "slices of rows, norms train": SLICES | {"slices_of": "rows"},
        "LoRA r16": {"method": "lora"},
    }
    rows = []
    for shape, batch, tokens in (
        ("llama-3.1-8b", 2, 2048), ("llama-2-7b", 2, 2048), ("llama-3.1-70b", 2, 2048), ("llama-2-7b", 1, 1024),
    ):  # fmt: skip
        for name, levers in PARTS if not shapes or shape in shapes else ():
            peaks = [plan_of(shape, batch, tokens, **own, **levers).peak_bytes for own in contenders.values()]
            rows.append([shape, f"{batch} x {tokens}", name, *(f"{peak / GB:.2f}" for peak in peaks)])
            print(*rows[-1], sep=" | ", flush=True)
    about = (
        "Predicted GB (10^9) on a GPU with bfloat16 weights, loss in chunks. Slices are one of 15, as `lisatune train` has them by "
        "default: of columns, or of rows with `frozen_bits`. LoRA is on all linear layers. ChunkFT publishes 13.72 GB for 1 x 1024 tokens with Llama-2-7B "
        "(arXiv:2605.21177). Nothing here was measured."
    )
    head = ["model", "batch", "levers", *(f"{name}, GB" for name in contenders)]
    print(write_page("-".join(["memory-slices", *shapes]), about + "\n\n" + markdown(head, rows), __doc__ or ""))


def ranks() -> None:
    """What each of several processes holds and sends."""
    head = ["model", "processes", "`dp_shard_size`", "method", "peak GiB of each", "weights", "gradients", "state", "gathered",
            "activations, temporaries", "sends GiB a step: weights", "gradients"]  # fmt: skip
    rows = []
    for shape, gamma, count, shard_size in RANKS:
        methods: dict[str, dict[str, Any]] = {
            "slices": {}, f"LISA, {gamma} layers": {"recipe": "paper", "num_active": gamma}, "LoRA r16": {"method": "lora"}, "full": {"method": "full"},
        }  # fmt: skip
        for name, settings in methods.items():
            levers = {} if name == "slices" else {"optim": "adamw_16bit"}  # slices hold no moments
            with fake_processes(count):
                plan = plan_of(
                    shape,
                    1,
                    2048,
                    **levers,
                    gradient_checkpointing=True,
                    dp_shard_size=shard_size,
                    **settings,
                )
            sizes = [plan.peak_bytes, *(plan.total(kind) for kind in ("weights", "gradients", "state", "gathered"))]
            sizes += [plan.total("activations") + plan.total("temporaries"), *plan.sent_bytes_of.values()]
            rows.append([shape, count, shard_size, name, *map(_gib, sizes)])
            print(*rows[-1], sep=" | ", flush=True)
    about = (
        "Predicted GiB (2^30) for a batch of 1 x 2048 tokens on each process. Weights and moments are bfloat16, and layers are checkpointed. "
        "Gradients are summed in float32. What a process sends is that of a ring. Peaks are of the first process, whose shards are the largest."
    )
    print(write_page("memory-ranks", about + "\n\n" + markdown(head, rows), __doc__ or ""))


def measure(rounds: int, minutes: float) -> None:
    """Table (d)."""
    cuda = torch.cuda.is_available()
    small = (
        {}, {"method": "lora"}, {"method": "full"}, {"gradient_checkpointing": True},
        LAYERS | {"gradient_checkpointing": True, "optim": "adamw_8bit", "vocabulary_blocks": True},
        {"gradient_checkpointing": True, "optimizer_in_backward": True, "max_grad_norm": 0},
        {"dtype": "bfloat16"}, LAYERS, LAYERS | {"train_embedding": False, "train_head": False},
        LAYERS | {"gradient_checkpointing": True, "frozen_bits": 8}, {"gradient_checkpointing": True, "frozen_bits": 4},
        {"method": "lora", "gradient_checkpointing": True, "frozen_bits": 4},
    )  # fmt: skip
    cases: list[tuple[str, int, int, dict[str, Any]]] = [("smollm2-135m", 4, 256, case) for case in small]
    cases += [("qwen2.5-0.5b", 2, 256, case) for case in ((small[0], small[1], small[4]) if not cuda else ())]
    cases += [("gpt2-small", 4, 256, case) for case in (small[:4] if not cuda else ())]
    if cuda:
        large = [("llama-3.1-8b", 2, 2048, case) for case in LLAMA_CASES]
        large.append(("llama-2-7b", 1, 1024, LLAMA_CASES[5]))
        large += [("llama-2-7b", 2, 2048, case) for case in LLAMA_CASES[:5]]
        large.append(
            ("llama-2-7b", 1, 1024, {"method": "full", "optim": "adamw_16bit", "gradient_checkpointing": True})
        )
        cases = [*large, *cases]
    head = [
        "model",
        "batch",
        "settings",
        "predicted GiB",
        "measured GiB",
        "predicted/measured",
        "resident GiB more",
        "tokens/s",
    ]
    table = []
    end, kept = time.monotonic() + 60 * minutes, {}
    if KEPT.exists():
        kept = {line["key"]: line for line in map(json.loads, KEPT.read_text().splitlines())}
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    for shape, rows, tokens, settings in cases:
        words = [f"{k}={str(v).lower()}" for k, v in settings.items()]
        command = [sys.executable, __file__, "case", shape, str(rows), str(tokens), json.dumps(settings), str(rounds)]
        key = f"{torch.cuda.get_device_name() if cuda else 'CPU'} {' '.join(command[2:])}"
        if key not in kept and time.monotonic() < end:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                kept[key] = {"key": key, "failed": done.stderr.splitlines()[-1][:120]}
            else:
                kept[key] = {"key": key} | json.loads(done.stdout.splitlines()[-1])
            with KEPT.open("a") as file:
                file.write(json.dumps(kept[key]) + "\n")
        if key not in kept:
            continue  # the time is over; the same command goes on
        got = kept[key]
        if "failed" in got:
            table.append(
                [shape, f"{rows} x {tokens}", " ".join(words) or "lisa", "", f"failed: {got['failed']}", "", "", ""]
            )
            continue
        table.append([
            shape, f"{rows} x {tokens}", f"`{' '.join(words) or 'method=lisa'}`", _gib(got["predicted"]),
            _gib(got["measured"]), f"{got['predicted'] / got['measured']:.3f}", _gib(got["resident"]),
            f"{got['tokens_per_second']:.0f}",
        ])  # fmt: skip
        print(*table[-1], sep=" | ", flush=True)
    what = "torch.cuda.max_memory_allocated" if cuda else "bytes that PyTorch's CPU allocator had given out"
    print(
        write_page(
            "memory-measured",
            f"Measured: {what}. Random weights; defaults of `lisatune train` (float32 on a CPU, bfloat16 on a GPU).\n\n"
            + markdown(head, table),
            __doc__ or "",
        )
    )


def case(shape: str, rows: int, tokens: int, settings: dict[str, Any], rounds: int) -> None:
    """Take real steps, and print what was predicted and what was measured as JSON."""
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = plan_of(shape, rows, tokens, device.type, **settings)
    config = plan_config(settings | {"per_device_train_batch_size": rows, "max_length": tokens}, device.type)
    dtype = getattr(torch, str(plan.settings["dtype"]))
    meter = PeakMeter(device)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(model_config(str(SHAPES / f"{shape}.json")), dtype=dtype)
    learner = make_learner(config, model, device)
    if config.sampled_unit != "slices":
        learner.method.draw_always(plan.drawn)  # as in the forecast
    learner.model.train()
    batch = _batch(rows, tokens).to(device)
    learner.step(0, [batch], batch.num_labelled)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        learner.step(1, [batch], batch.num_labelled)
        measured = torch.cuda.max_memory_allocated()
    else:
        measured = _peak_of_allocator(learner, batch)
    started = time.perf_counter()
    for number in range(2, 2 + rounds):
        learner.step(number, [batch], batch.num_labelled)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    print(json.dumps({"predicted": plan.peak_bytes, "measured": measured, "resident": meter.bytes() - meter.base_bytes,
                      "tokens_per_second": rounds * rows * tokens / seconds}))  # fmt: skip


def _batch(rows: int, tokens: int) -> Any:
    from lisatune.data.loader import Batch

    ids = torch.randint(3, 1000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return Batch(ids, ids.roll(-1, 1), torch.arange(tokens).repeat(rows, 1), torch.ones_like(ids, dtype=torch.bool))


def _peak_of_allocator(learner: Any, batch: Any) -> int:
    """What lies there before the second step, and the most that the step adds."""
    parameters, buffers = learner.model.parameters(), learner.model.buffers()
    held = tensor_bytes([*parameters, *buffers, *learner.placement.copies()]) + state_bytes(learner.optimizer)
    return held + allocated_peak(lambda: learner.step(1, [batch], batch.num_labelled))


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="what", required=True)
    kinds.add_parser("predict")
    kinds.add_parser("slices").add_argument("shapes", nargs="*", help="all by default")
    kinds.add_parser("ranks")
    measured = kinds.add_parser("measure")
    measured.add_argument("--rounds", type=int, default=3)
    measured.add_argument(
        "--minutes", type=float, default=1e6, help="start no case after so many; the same command goes on"
    )
    one = kinds.add_parser("case")
    for name in ("shape", "rows", "tokens", "settings", "rounds"):
        one.add_argument(name)
    options = parser.parse_args()
    if options.what == "predict":
        predict()
    elif options.what == "slices":
        slices(options.shapes)
    elif options.what == "ranks":
        ranks()
    elif options.what == "measure":
        measure(options.rounds, options.minutes)
    else:
        case(options.shape, int(options.rows), int(options.tokens), json.loads(options.settings), int(options.rounds))


if __name__ == "__main__":
    main()
