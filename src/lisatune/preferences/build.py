"""A run of a task of TRL, built from a config and checked: model, rows, forecast, trainer and optimizer."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from transformers import PrinterCallback

from lisatune.assemble import make_groups, make_optimizer_over, make_task
from lisatune.callback import LisaCallback
from lisatune.common.amounts import gib
from lisatune.common.files import CHECKPOINTS
from lisatune.data.examples import HeldOut, Rows
from lisatune.data.render import plain_template, with_date, writes_date
from lisatune.errors import UserError
from lisatune.layers import Layers, find_layers
from lisatune.levers.gradient_checkpointing import checkpoint_layers
from lisatune.memory.measure import PeakMeter, tensor_bytes
from lisatune.methods.lora import lora_config, task_type
from lisatune.models.attention import set_attention
from lisatune.models.load import check_positions, load_model
from lisatune.plan.forecast import Plan, plan_run
from lisatune.plan.ladder import climb, pulled
from lisatune.preferences.rows import as_dataset, identity_of, in_one_place, tell_rows
from lisatune.processes.collectives import barrier, check_alike, num_ranks, together
from lisatune.run.build import settle, settle_template, what_must_be_alike
from lisatune.run.determinism import be_deterministic
from lisatune.run.schedule import make_schedule
from lisatune.run.trackers import check_trackers
from lisatune.settings import LAYERWISE, TrainConfig
from lisatune.tasks.base import Task
from lisatune.trainer.forecast import longest_row

OF_CALLBACK = (
    "num_active", "interval_steps", "seed", "state_policy", "decoder_name", "train_embedding", "train_head", "sampler",
    "sampler_options", "sampled_unit",
)  # fmt: skip
OF_SLICES = ("num_slices", "train_norms", "slices_of")


@dataclass
class TaskRun:
    """All the parts of a run, built and checked, before its first step.

    Args:
        config: The settings.
        task: What is learned.
        tokenizer: The model's, with the template as it is saved.
        trainer: TRL's.
        lisa: LISA, if the method samples.
        layers: The parts of the model.
        plan: The forecast.
        meter: Of memory.
        device: Where the model computes.
        num_steps: Optimizer steps of the whole run.
        names: The sets held out, by name.
        identity: What the rows are recognised by.
        template: The chat template to save.
    """

    config: TrainConfig
    task: Task
    tokenizer: Any
    trainer: Any
    lisa: LisaCallback | None
    layers: Layers
    plan: Plan
    meter: PeakMeter
    device: torch.device
    num_steps: int
    names: list[str]
    identity: dict[str, str]
    num_rows: int
    template: Any

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.config.output)

    def weights(self) -> list[torch.Tensor]:
        """Weights and buffers of the model and of its reference."""
        reference = getattr(self.trainer, "ref_model", None)
        models = [self.trainer.model, *([reference] if reference is not None else [])]
        return [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]


class Told(LisaCallback):
    """``LisaCallback`` whose sentences go to the run's console; the memory is forecast and measured by the run itself."""

    def __init__(self, console: Console, **settings: Any) -> None:
        super().__init__(**settings)
        self._console = console

    def predict(self, model: Any, args: Any, optimizer: Any, rows: Any) -> tuple[str, int]:
        """Nothing: the run has its own forecast."""
        return "", 0

    def tell(self, lines: list[str]) -> None:
        """Print what is sampled."""
        if self.engine is not None and self.engine.drawn is None:
            for line in lines[1:2]:
                self._console.print(line, highlight=False, soft_wrap=True)


def build_task(
    config: TrainConfig,
    examples: Sequence[Rows],
    held_out: HeldOut,
    *,
    console: Console,
    memory_bytes: int | None = None,
    host_bytes: int | None = None,
) -> TaskRun:
    """Load the model and the rows, and set the trainer up.

    With ``memory_bytes``, levers are pulled until the run fits into a device of that size, and into ``host_bytes`` of host memory.
    """
    with together():
        check_trackers(config)
        config, device = settle(config)
        task = make_task(config)
        assert task is not None
        task.classes()  # says at once if TRL is missing
        if config.full_determinism:
            be_deterministic(device)
        model, tokenizer, layers = load(config, task, console)
        config = settle_chat(config, tokenizer, console)
    identity = identity_of(examples[0], held_out)
    if num_ranks() > 1:
        with together():
            check_alike(what_must_be_alike(config, identity, model))
    if memory_bytes is not None:
        with together():
            config = fitted(config, model.config, device.type, memory_bytes, host_bytes, console)

    meter = PeakMeter(device, own_bytes=tensor_bytes(model.parameters()))
    lisa = Told(console, **of_callback(config)) if config.method in LAYERWISE else None
    if config.gradient_checkpointing:
        checkpoint_layers(
            layers.decoder, None if config.gradient_checkpointing is True else config.gradient_checkpointing
        )
    template = tokenizer.chat_template
    if config.template_date is not None:
        tokenizer.chat_template = with_date(template, date.fromisoformat(config.template_date))
    with together():
        trainer = make_trainer(config, task, model, tokenizer, examples[0], held_out, lisa, device)
        tell_rows("train", examples[0], len(trainer.train_dataset), console)
        for name, rows in held_out.items():
            kept = trainer.eval_dataset[name] if isinstance(trainer.eval_dataset, dict) else trainer.eval_dataset
            tell_rows(f"held out, {name}" if name else "held out", rows, len(kept), console)
        longest = longest_row(trainer.train_dataset, config.max_length)
        check_positions(model, longest)
    plan = plan_run(config, model.config, device.type, tokens=longest)
    console.print(plan.describe(), highlight=False)
    layers = find_layers(layers.model, config.decoder_name)  # with adapters, if there are any now
    num_steps = set_up_steps(config, trainer, layers)
    return TaskRun(
        config, task, tokenizer, trainer, lisa, layers, plan, meter, device, num_steps, list(held_out),
        identity, len(trainer.train_dataset), template,
    )  # fmt: skip


def load(config: TrainConfig, task: Task, console: Console) -> tuple[Any, Any, Layers]:
    """The model, its tokenizer, and the parts of the model.

    Raises: UserError for a model that would write text and sees later tokens.
    """
    torch.manual_seed(config.seed)  # seeds the score head and the adapters
    model, tokenizer = load_model(
        config.model, getattr(torch, config.dtype), trust_remote_code=config.trust_remote_code, auto_class=task.auto_class,
        **task.model_options,
    )  # fmt: skip
    set_attention(model, config.attn_implementation)
    layers = find_layers(model, config.decoder_name)
    console.print(layers.describe(), highlight=False)
    if task.writes_text and not layers.says_causal() and not layers.is_causal():
        raise UserError(
            f"every token of {type(model).__name__} sees later tokens, so a next-token loss teaches nothing: set "
            '"is_decoder": true in the config.json of the model'
        )
    return model, tokenizer, layers


def settle_chat(config: TrainConfig, tokenizer: Any, console: Console) -> TrainConfig:
    """Give the tokenizer a chat template, and the config the day that it writes."""
    config = settle_template(config, tokenizer)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = plain_template(tokenizer)
        console.print("the tokenizer has no chat template: a plain one is used, and saved with the model")
    if not writes_date(tokenizer.chat_template):
        return config.model_copy(update={"template_date": None})
    return config


def fitted(
    config: TrainConfig, hf_config: Any, device: str, memory_bytes: int, host_bytes: int | None, console: Console
) -> TrainConfig:
    """``config`` with the levers that make it fit, with rows of ``max_length``."""
    with console.status("looking for what fits"):
        rungs = climb(config, hf_config, memory_bytes, device, host_bytes=host_bytes)
    levers = pulled(rungs[0], rungs[-1]) or "no lever is needed"
    console.print(f"to fit into {gib(memory_bytes)}: {levers}", highlight=False)
    return rungs[-1].config


def of_callback(config: TrainConfig) -> dict[str, Any]:
    """The settings of the callback."""
    names = (*OF_CALLBACK, *(OF_SLICES if config.sampled_unit == "slices" else ()))
    return {name: getattr(config, name) for name in names}


def make_trainer(
    config: TrainConfig, task: Task, model: Any, tokenizer: Any, train: Rows, held_out: HeldOut, lisa: Any, device: torch.device
) -> Any:  # fmt: skip
    """TRL's trainer, which has taken its rows.

    Raises: UserError for what TRL refuses.
    """
    trainer_class, arguments_class = task.classes()
    if device.type == "cuda" and device.index and num_ranks() == 1:
        raise UserError(
            f"device={device}: TRL takes the first GPU: set CUDA_VISIBLE_DEVICES={device.index}, and device=cuda"
        )
    more: dict[str, Any] = {}
    if task.needs_reference and config.method != "lora":
        more["ref_model"] = copy.deepcopy(model).requires_grad_(False)
    if config.method == "lora":
        more["peft_config"] = lora_config(
            r=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout, targets=config.lora_target_modules,
            use_rslora=config.lora_use_rslora, use_dora=config.lora_use_dora, task_type=task_type(config.task),
        )  # fmt: skip
    rows = as_dataset(train, config.task)
    if (
        config.shuffle and config.task == "kto"
    ):  # which pairs rows with their neighbours, so that an epoch cannot shuffle
        rows = rows.shuffle(seed=config.seed)
    held = {name: as_dataset(rows, config.task) for name, rows in held_out.items()}
    try:
        with quiet_trl(), TemporaryDirectory() as nowhere:  # nothing is written before the run holds its folder
            if num_ranks() > 1 and config.precompute_ref_log_probs:
                rows = in_one_place(rows, nowhere, "train")
                held = {name: in_one_place(own, nowhere, f"held-out-{name}") for name, own in held.items()}
            arguments = arguments_class(output_dir=nowhere, **arguments_of(config, device), **task.options())
            arguments._n_gpu = min(1, arguments.n_gpu)  # one, however many are there
            trainer = trainer_class(
                model=model, args=arguments, train_dataset=rows, processing_class=tokenizer,
                eval_dataset=held.get("", held) or None, callbacks=[lisa] if lisa else [], **more,
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)  # the journal shows the steps
            arguments.output_dir = str(Path(config.output) / CHECKPOINTS)
            barrier()  # others may still read what lies there
    except (ValueError, TypeError, NotImplementedError) as error:  # with any of these TRL refuses settings or rows
        if isinstance(error, UserError):
            raise
        raise UserError(f"task={config.task}: TRL refuses this run: {' '.join(str(error).split())[:400]}") from error
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, config.dtype))  # adapters, which peft makes float32
    return trainer


def arguments_of(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """The trainer's arguments. When it evaluates and saves, the journal says."""
    rows = config.per_device_train_batch_size
    return {
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": rows, "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "learning_rate": config.peak_rate, "max_grad_norm": config.max_grad_norm, "max_length": config.max_length,
        "logging_steps": 1, "logging_nan_inf_filter": False, "save_strategy": "no", "eval_strategy": "no",
        "save_total_limit": config.save_total_limit, "seed": config.seed, "data_seed": config.seed, "report_to": [],
        "use_cpu": device.type == "cpu", "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
        "dataset_num_proc": config.dataset_num_proc, "dataloader_pin_memory": device.type == "cuda",
        "train_sampling_strategy": "random" if config.shuffle and config.task != "kto" else "sequential",
        # with layers, DistributedDataParallel looks after one norm, which every pass uses
        "ddp_find_unused_parameters": False if config.method in LAYERWISE and config.sampled_unit != "slices" else None,
        "trust_remote_code": config.trust_remote_code, "remove_unused_columns": config.task != "orpo",
    }  # fmt: skip


def set_up_steps(config: TrainConfig, trainer: Any, layers: Layers) -> int:
    """Give the trainer this package's optimizer and schedule. Returns the number of optimizer steps."""
    a_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * num_ranks()
    num_steps = config.max_steps or math.ceil(config.num_train_epochs * math.ceil(len(trainer.train_dataset) / a_step))
    optimizer = make_optimizer_over(config, make_groups(config, layers, trainer.model), layers)
    for group in optimizer.param_groups:
        group["lr"] = config.peak_rate * group.get("lr_ratio", 1.0)
    rate_at, rate = make_schedule(config, num_steps), config.peak_rate
    trainer.args.max_steps = num_steps
    trainer.optimizer = optimizer
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step) / rate)
    return num_steps


@contextmanager
def quiet_trl() -> Iterator[None]:
    """Keep the bars, notes and coming changes of TRL and of what it uses to themselves."""
    import datasets

    was = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        if was:
            datasets.enable_progress_bars()
