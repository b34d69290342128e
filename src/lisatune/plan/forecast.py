"""The peak of a run, predicted: its own step, run on the meta device, with every byte booked.

No weight is loaded and no GPU is needed. The model is built on PyTorch's meta device, where tensors have shapes and no
data; the levers, the optimizer and LISA are put on as for training; two optimizer steps are taken, and a ``Ledger``
follows each storage as autograd, checkpoints and the optimizer make it and let it go.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.assemble import make_learner, make_method, make_task
from lisatune.common.amounts import gib
from lisatune.data.loader import Batch
from lisatune.errors import UserError
from lisatune.learner import Learner
from lisatune.memory.blocks import whole_of
from lisatune.memory.ledger import CUDA_GRANULARITY, GATHERED, Ledger
from lisatune.models.names import check_model_name
from lisatune.optim import OPTIMS
from lisatune.plan.fake_processes import fake_processes
from lisatune.plan.wire import Wire
from lisatune.processes.collectives import num_ranks
from lisatune.processes.tensors import local
from lisatune.settings import LAYERWISE, TrainConfig, build_config, check_num_ranks
from lisatune.tasks import PAIRS, TASKS
from lisatune.tasks.base import kernels_on_meta

PARTS = ("decoder", "embedding", "head")
REFERENCE = "reference"
TEMPORARIES = ("loss", "backward", "step", "other")
WHERE = {"activations": "in the forward pass", GATHERED: "in the forward pass", "loss": "at the loss", "backward": "in the backward pass",
         "step": "in the optimizer's step", "other": "between the passes"}  # fmt: skip
LEFT_OUT = {
    "cuda": "not counted: the CUDA context (about 0.5 GiB), libraries' workspaces, and what fragmentation wastes; "
    "--gpu-memory and --fit keep 1 GiB free for these",
    "cpu": "not counted: Python, its libraries, and memory that the allocator keeps for later",
    "mps": "not counted: Metal's own memory. Attention is counted as on CUDA. No forecast was compared with a Mac yet",
}
FORMULA = (
    "weights, gradients and optimizer state counted; activations by the formula of Korthikanti et al. (arXiv:2205.05198, "
    "34 bytes a token, unit of width and layer in 16 bits), loss by 12 bytes a token and vocabulary entry"
)


@dataclass(frozen=True)
class Plan:
    """The predicted peak of a run, in bytes, and what it consists of at that moment.

    ``bytes_of`` has the keys ``weights``, ``gradients`` and ``state`` for each of ``decoder`` (with the norm and all that
    is not a vocabulary matrix), ``embedding`` and ``head``, as in ``weights/head``, then ``gathered`` (weights that other
    processes hold, while they are needed), ``reference`` (a preference task's second copy), ``activations`` and ``temporaries`` (of the loss, the backward pass and the
    step). A tied pair counts as ``embedding``. ``host_bytes`` is the most in host memory, where pinned blocks are rounded up to
    a power of two: frozen layers with their exact weights, optimizer state and inputs of layers, as far as levers put them there. Of several processes these are the first one's, which has the largest
    shards, and ``sent_bytes_of`` what it sends the others in a step: ``weights`` and ``gradients``, if they stand in a ring.
    """

    method: str
    rows: int
    tokens: int
    num_layers: int
    num_parameters: int
    num_trained: int
    peak_bytes: int
    bytes_of: dict[str, int]
    drawn: tuple[int, ...] = ()
    host_bytes: int = 0
    peak_at: str = ""
    device: str = "cuda"
    settings: dict[str, Any] = field(default_factory=dict)
    remark: str = ""
    num_ranks: int = 1
    sent_bytes_of: dict[str, int] = field(default_factory=dict)

    def total(self, kind: str) -> int:
        """Bytes of ``weights``, ``gradients``, ``state``, ``gathered``, ``activations`` or ``temporaries``."""
        return sum(size for name, size in self.bytes_of.items() if name.partition("/")[0] == kind)

    def sent(self) -> str:
        """What a process sends in a step, in words."""
        return ", ".join(f"{gib(size)} of {kind}" for kind, size in self.sent_bytes_of.items() if size) or "nothing"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """Three lines for people."""
        share = 100 * self.num_trained / self.num_parameters
        kinds = {"weights": "weights", "gradients": "gradients", "state": "optimizer state", "gathered": "gathered weights",
                 "reference": "reference model", "activations": "activations", "temporaries": "temporaries"}  # fmt: skip
        often = ("weights", "gradients", "state", "activations", "temporaries")
        sizes = " + ".join(
            f"{name} {gib(self.total(kind))}" for kind, name in kinds.items() if kind in often or self.total(kind)
        )
        each = f" of each of {self.num_ranks} processes" if self.num_ranks > 1 else ""
        host = f"; {gib(self.host_bytes)} in host memory" if self.host_bytes else ""
        return (
            f"{self.method} on {self.device}, weights and gradients {self.settings.get('dtype')}, optimizer state "
            f"{OPTIMS[self.settings.get('optim', 'adamw')].state_bits} bits: trains {self.num_trained:,} of "
            f"{self.num_parameters:,} parameters at a time ({share:.1f}%)\n"
            f"predicted peak{each} {gib(self.peak_bytes)} {self.peak_at}, batch {self.rows} x {self.tokens} tokens: {sizes}{host}\n"
            + (f"each sends {self.sent()} in a step\n" if self.num_ranks > 1 else "")
            + (f"{self.remark}; " if self.remark else "")
            + LEFT_OUT[self.device]
        )

    def __str__(self) -> str:
        return self.describe()


def plan_memory(model: str | Any, *, device: str = "cuda", nproc: int = 1, **settings: Any) -> Plan:
    """Predict the peak memory of a run, of each process if there are several.

    Args:
        model: A Hugging Face folder, a ``config.json``, a hub name, or a transformers config.
        device: ``cuda``, ``mps`` or ``cpu``: whose attention kernel and whose allocator to think of.
        nproc: Processes that train together; ``dp_shard_size`` of them share each weight.
        settings: Those of ``lisatune train``, by name: ``method``, ``num_active``, ``max_length``, ... Weights are
            bfloat16 on ``cuda`` unless ``dtype`` says otherwise.
    Returns: The plan of the draw of layers that needs most, all tokens labelled, rows full.
    Raises: UserError for settings that cannot be.
    Cost: 1 to 7 seconds, whatever the size of the model.
    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2)
        >>> plan = plan_memory(config, num_active=1, max_length=8, per_device_train_batch_size=1)
        >>> plan.num_trained, plan.total("gradients") <= 2 * plan.num_trained + 512 * 20
        (4656, True)
    """
    with fake_processes(nproc):
        return plan_run(plan_config(settings, device), model_config(model), device)


def plan_config(settings: dict[str, Any], device: str = "cuda") -> TrainConfig:
    """``settings`` as those of a run on ``device`` whose model, data and output do not matter."""
    if device not in LEFT_OUT:
        raise UserError(f"device={device}: choose cuda, mps or cpu")
    config = build_config({"model": "-", "data": "-", "output": "-", "device": device} | settings)
    check_num_ranks(config, num_ranks())
    return config


def model_config(model: str | Any, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a folder, a ``config.json``, a hub name; any other object is taken for one."""
    if not isinstance(model, str):
        return model
    from transformers import AutoConfig

    path = Path(model).expanduser()
    if not (path.is_file() and path.suffix == ".json"):
        check_model_name(model)
    if path.suffix == ".gguf":
        raise UserError(f"{model}: not a model that can be planned; give a folder, a config.json or a hub name")
    try:
        return AutoConfig.from_pretrained(path if path.exists() else model, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds, none of them ours
        raise UserError(
            f"{model}: no config.json of a model can be read ({' '.join(str(error).split())[:200]}); check the name and the connection, or give "
            "a folder or a config.json"
        ) from error


def plan_run(
    config: TrainConfig, hf_config: Any, device: str = "cuda", *, rows: int | None = None, tokens: int | None = None
) -> Plan:
    """Predict the peak of the run ``config`` of a model with ``hf_config``; see ``plan_memory``.

    It is that of this process among those that there are, inside training as inside ``fake_processes``.

    Args:
        config: The run.
        hf_config: The model's transformers config.
        device: ``cuda``, ``mps`` or ``cpu``.
        rows: Rows of a micro-batch; by default as in ``config``.
        tokens: Tokens of a row; by default ``max_length``.
    """
    dtype = "bfloat16" if device == "cuda" else "float32" if config.dtype == "auto" else config.dtype
    config = config.model_copy(update={"dtype": dtype})
    rows, tokens = rows or config.per_device_train_batch_size, tokens or config.max_length
    draws = make_method(config).largest_draws(_meta_model(hf_config, config, device))
    with fake_processes(num_ranks()):
        plans = [_plan_draw(config, hf_config, device, rows, tokens, drawn) for drawn in draws]
    plan = max(plans, key=lambda plan: plan.peak_bytes)
    compiled = (
        "forecast as if no layer were compiled" if config.torch_compile else ""
    )  # what a kernel keeps, the compiler decides
    return replace(plan, remark="; ".join(filter(None, (plan.remark, compiled, _beyond_context(hf_config, tokens)))))


def _beyond_context(hf_config: Any, tokens: int) -> str:
    """What to tell of rows that are longer than the model was made for. It can run on them: its positions are computed."""
    context = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(context, int) or tokens <= context:
        return ""
    return f"rows of {tokens:,} tokens are longer than the {context:,} that the model was made for (max_position_embeddings)"


def _meta_model(hf_config: Any, config: TrainConfig, device: str, *, masked: bool = False) -> nn.Module:
    import transformers

    from lisatune.plan.meta_kernels import ATTENTION, MASKED, register_attention

    register_attention(device)
    task = make_task(config)
    auto_class = getattr(transformers, task.auto_class if task else "AutoModelForCausalLM")
    own = copy.deepcopy(hf_config)
    for name, value in (task.model_options if task else {}).items():
        setattr(own, name, value)

    def build(attention: str | None) -> nn.Module:
        with torch.device("meta"):
            model: nn.Module = auto_class.from_config(
                copy.deepcopy(own), dtype=getattr(torch, config.dtype), attn_implementation=attention,
                trust_remote_code=config.trust_remote_code,
            )  # fmt: skip
        return model

    try:
        try:
            if config.attn_implementation == "eager":
                return build("eager")
            return build(MASKED if masked else ATTENTION)
        except KeyError:  # an older class (Falcon) has a table of its own of attentions
            return build(None)
    except Exception as error:  # transformers raises many kinds, none of them ours
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"no causal language model can be built from this {type(hf_config).__name__}: {reason}"
        ) from error


def _plan_draw(
    config: TrainConfig, hf_config: Any, device: str, rows: int, tokens: int, drawn: tuple[int, ...], masked: bool = False
) -> Plan:  # fmt: skip
    from lisatune.plan.meta_kernels import ATTENTION, MASKED, experts_on_meta, masks_on_meta

    model = _meta_model(hf_config, config, device, masked=masked)
    ledger = Ledger(CUDA_GRANULARITY if device == "cuda" else 1, one_memory=device == "cpu", pinned=device == "cuda")
    remark = ""
    if getattr(model.config, "_attn_implementation", None) not in (ATTENTION, MASKED, config.attn_implementation):
        remark = f"{type(model).__name__} has an attention of its own, planned as PyTorch's unfused one, which keeps all scores"

    # the run's own learner takes two steps on the meta device, and the ledger books every tensor
    cannot_run, sent = False, dict[str, int]()
    with ledger, experts_on_meta(), masks_on_meta():
        learner = make_learner(config, model, torch.device("meta"))
        parts = {p: _part(name) for name, parameters in learner.layers.parts().items() for p in parameters.values()}
        _book_weights(ledger, learner, parts)
        learner.method.draw_always(drawn)
        _watch(ledger, learner, parts)
        _learn_task(ledger, learner, config, hf_config, device, rows, tokens)
        try:
            with kernels_on_meta(device) if config.task != "sft" else nullcontext():
                sent = _two_steps(ledger, learner, config, rows, tokens)
        except UserError:
            raise
        except Exception as error:  # whatever a model's own code does that needs data
            cannot_run = True
            remark = f"{type(model).__name__} cannot run on the meta device ({' '.join(str(error).split())[:120]}): {FORMULA}"

    if cannot_run and not masked:  # a model may work on the mask itself, which a fused kernel needs not
        return _plan_draw(config, hf_config, device, rows, tokens, drawn, masked=True)

    # what it booked; for a model that cannot run there, a formula's numbers
    trained = [p for p in learner.model.parameters() if p.requires_grad]
    plan = Plan(
        method=config.method, rows=rows, tokens=tokens, device=device, num_layers=len(learner.layers.decoder), drawn=drawn,
        num_parameters=sum(p.numel() for p in parts), num_trained=sum(p.numel() for p in trained),
        peak_bytes=ledger.peak_bytes, bytes_of=_bytes_of(ledger.peak), host_bytes=ledger.host_peak_bytes,
        peak_at=WHERE.get(ledger.peak_label, ""), settings=config.model_dump(exclude={"model", "data", "output"}),
        remark=remark, num_ranks=num_ranks(), sent_bytes_of=sent,
    )  # fmt: skip
    return _formula(plan, config, hf_config, learner, parts) if cannot_run else plan


def _part(name: str) -> str:
    return name if name in PARTS else "decoder"


def _book_weights(ledger: Ledger, learner: Learner, parts: Mapping[Any, str]) -> None:
    for p, part in parts.items():
        ledger.book(p, f"weights/{part}")
    for tensor in (*learner.model.buffers(), *learner.placement.copies()):
        if tensor.is_meta:
            ledger.book(tensor, "weights/decoder")


def _learn_task(
    ledger: Ledger, learner: Learner, config: TrainConfig, hf_config: Any, device: str, rows: int, tokens: int
) -> None:
    """Give a preference task its own loss and its reference model."""
    task = make_task(config)
    if task is None:
        return
    held: dict[str, Any] = {REFERENCE: None}
    if task.needs_reference and config.method != "lora":
        held[REFERENCE] = _meta_model(hf_config, config, device).requires_grad_(False).eval()
        for tensor in (*held[REFERENCE].parameters(), *held[REFERENCE].buffers()):
            ledger.book(tensor, REFERENCE)
    if num_ranks() > 1 and config.method not in LAYERWISE:  # DistributedDataParallel reserves all that it sends
        held["buckets"] = torch.empty(_gradient_bytes(learner), dtype=torch.uint8, device="meta")
        ledger.book(held["buckets"], "gradients/decoder")
    learner.loss = lambda *_args, **_kwargs: task.step_loss(learner.model, held[REFERENCE], rows, tokens)


def _gradient_bytes(learner: Learner) -> int:
    return sum(p.numel() * p.element_size() for p in learner.model.parameters() if p.requires_grad)


def _watch(ledger: Ledger, learner: Learner, parts: dict[nn.Parameter, str]) -> None:
    """Tell the ledger what is being done, and which tensors are gradients."""

    def doing(label: str) -> Any:
        def hook(*_: Any) -> None:
            ledger.label = label

        return hook

    def gradient(p: Tensor) -> None:
        if p.grad is not None:
            ledger.book(p.grad, f"gradients/{parts[whole_of(p)]}")  # type: ignore[index]

    learner.placement.watch(
        learner.layers, gathering=doing(GATHERED), computing=doing("activations"), backward=doing("backward")
    )
    learner.layers.trunk_module.register_forward_pre_hook(doing("activations"))
    learner.layers.trunk_module.register_forward_hook(doing("loss"))
    learner.optimizer.register_step_pre_hook(doing("step"))
    learner.optimizer.register_step_post_hook(doing("other"))
    for p in learner.model.parameters():
        if p.is_floating_point():
            asked = p.requires_grad
            p.requires_grad_(True)
            p.register_post_accumulate_grad_hook(gradient)  # type: ignore[no-untyped-call]
            p.requires_grad_(asked)


def _book_state(ledger: Ledger, learner: Learner, parts: Mapping[Any, str]) -> None:
    """A function of its own, whose names hold nothing when the next step drops it."""
    for p, state in learner.optimizer.state.items():
        for value in state.values():
            if isinstance(value, Tensor) and value.is_meta:
                ledger.book(value, f"state/{parts[whole_of(p)]}")


def _batches(ledger: Ledger, rows: int, tokens: int, count: int) -> Iterator[Batch]:
    for _ in range(count):
        ledger.label = "other"
        yield _meta_batch(rows, tokens)


def _two_steps(ledger: Ledger, learner: Learner, config: TrainConfig, rows: int, tokens: int) -> dict[str, int]:
    """The second step is the one that counts: the optimizer's state is there from its beginning. Returns bytes sent in a step."""
    owner: dict[Tensor, str] = {
        p: _part(name) for name, parameters in learner.layers.parts().items() for p in parameters.values()
    }
    learner.model.train()
    wires = Wire(), Wire()
    for number, count in enumerate((1, min(2, config.gradient_accumulation_steps))):
        ledger.reset_peak()
        ledger.label = "weights/decoder"  # at a switch, slices of streamed layers come to the device
        with wires[number] if num_ranks() > 1 else nullcontext():  # following operations takes time
            learner.step(number, _batches(ledger, rows, tokens, count), rows * tokens)
        _book_weights(ledger, learner, owner)  # again: of streamed layers some have moved to the device
        _book_state(ledger, learner, owner)
    if num_ranks() == 1:
        return {}
    if config.task != "sft":
        return {
            "weights": 0,
            "gradients": 2 * _gradient_bytes(learner) * (num_ranks() - 1) // num_ranks(),
        }  # sent in a ring
    one, two = (wire.sent_bytes_of for wire in wires)
    more = max(0, config.gradient_accumulation_steps - 2)  # micro-batches, each like the second
    sent = {kind: size + more * (size - one[kind]) for kind, size in two.items()}
    return {
        "weights": sent.get("all_gather", 0),
        "gradients": sent.get("reduce_scatter", 0) + sent.get("all_reduce", 0) + _sent_in_blocks(learner, config),
    }


def _sent_in_blocks(learner: Learner, config: TrainConfig) -> int:
    """Bytes of the gradients that are summed a block at a time: for their norm, and again for the update."""
    if learner.rows is None:
        return 0
    modules: list[Any] = [learner.layers.embedding, learner.layers.head]
    elements = sum(p.numel() for p in {module.weight for module in modules} if p.requires_grad)
    times = 1 if config.optimizer_in_backward else 2
    return int(2 * 4 * elements * times * (num_ranks() - 1) / num_ranks())


def _meta_batch(rows: int, tokens: int) -> Batch:
    ids = torch.empty(rows, tokens, dtype=torch.int64, device="meta")
    return Batch(ids, torch.empty_like(ids), torch.empty_like(ids), torch.empty_like(ids, dtype=torch.bool))


def _bytes_of(peak: Any) -> dict[str, int]:
    """Labels of the ledger as the rows of a plan, in their order."""
    names = [f"{kind}/{part}" for kind in ("weights", "gradients", "state") for part in PARTS]
    sizes = {name: peak.get(name, 0) for name in [*names, GATHERED, REFERENCE, "activations"]}
    return sizes | {"temporaries": sum(peak.get(name, 0) for name in TEMPORARIES)}


def _formula(plan: Plan, config: TrainConfig, hf_config: Any, learner: Learner, parts: dict[nn.Parameter, str]) -> Plan:
    """The plan of a model that cannot be run on meta; the levers that it can count are counted."""
    sizes = dict.fromkeys(plan.bytes_of, 0)
    bits = OPTIMS[config.optim].state_bits
    for p, part in parts.items():
        size = local(p).numel() * p.element_size()
        sizes[f"weights/{part}"] += size
        if p.requires_grad:
            sizes[f"gradients/{part}"] += size
            sizes[f"state/{part}"] += 0 if config.offload_optimizer else 2 * bits // 8 * local(p).numel()
    task = make_task(config)
    if task is not None and task.needs_reference and config.method != "lora":
        sizes[REFERENCE] = sum(size for name, size in sizes.items() if name.startswith("weights/"))
    text = hf_config.get_text_config()
    num_layers, width, size = len(learner.layers.decoder), text.hidden_size, torch.finfo(learner.model.dtype).bits // 16
    rows = plan.rows * (2 if PAIRS[0] in TASKS[config.task].columns else 1)
    token_width = rows * plan.tokens * width * size
    checkpointed = num_layers if config.gradient_checkpointing is True else int(config.gradient_checkpointing)
    # a checkpointed layer keeps its input of 2 bytes; one layer at a time is made again
    sizes["activations"] = token_width * (34 * (num_layers - checkpointed + bool(checkpointed)) + 2 * checkpointed)
    sizes["temporaries"] = 12 * rows * plan.tokens * text.vocab_size
    return replace(plan, bytes_of=sizes, peak_bytes=sum(sizes.values()), peak_at="at the loss")
