"""All the parts of a run, built from a config and checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lisatune.assemble import make_learner, settle_rate
from lisatune.common.amounts import gib
from lisatune.data.ahead import Ahead
from lisatune.data.examples import HeldOut, Rows
from lisatune.data.loader import Batch, Position
from lisatune.data.render import find_template, writes_date
from lisatune.errors import UserError
from lisatune.evaluation.tasks.check import data_folder
from lisatune.evaluation.tasks.harness import task_names
from lisatune.evaluation.tasks.score import numbers
from lisatune.evaluation.tasks.scorer import Scorer
from lisatune.layers import find_layers
from lisatune.learner import Learner, Outcome
from lisatune.loss import router_coefficient
from lisatune.memory.measure import PeakMeter, tensor_bytes
from lisatune.models.attention import FLASH, check_attention, set_attention
from lisatune.models.load import check_positions, is_stored_as_held, load_model, pick_device, stop_at
from lisatune.models.packed import check_packing
from lisatune.plan.forecast import Plan, plan_run
from lisatune.plan.ladder import climb, explain_out_of_memory, pulled
from lisatune.processes.collectives import check_alike, gathered, num_ranks, together
from lisatune.processes.group import local_device
from lisatune.run.coverage import describe_coverage, describe_rate
from lisatune.run.data import Data, prepare_data
from lisatune.run.determinism import be_deterministic
from lisatune.run.faster_type import advice
from lisatune.run.held_out import held_out_loss
from lisatune.run.progress import Evaluation, Progress
from lisatune.run.schedule import check_schedule
from lisatune.settings import ROWS, TrainConfig, build_config, used_settings


@dataclass
class Run:
    """All the parts of a run, built and checked, before its first step."""

    config: TrainConfig
    tokenizer: Any
    learner: Learner
    data: Data
    plan: Plan
    meter: PeakMeter
    device: torch.device
    scorer: Scorer | None
    is_first_step: bool = True
    counted: int = 0  # tokens of the widest batch whose step's tensors were counted

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.config.output)

    def batches(self, progress: Progress) -> Iterator[tuple[int, Batch, Position]]:
        """The steps that are left: number (from 0), batch, and where the data goes on after it.

        The loop asks for one when the step before is over, checkpoint included. Whoever wants to be there between two
        steps wraps this function. Meanwhile the next one is made ready in another thread. Not so with ``early_stopping``: then
        nobody knows whether there is a next step, and of a stream no row must be read that is not trained on.
        """
        batches = self.data.loader.batches(progress.position)
        with Ahead((self._ready(batch), position) for batch, position in batches) as ahead:
            while not self.is_over(progress):
                batch, position = ahead.take()
                if progress.step + 1 < self.data.num_steps and self.config.early_stopping is None:
                    ahead.begin()
                yield progress.step, batch, position

    def is_over(self, progress: Progress) -> bool:
        """Whether no step is left: all are done, or ``early_stopping`` ends the run."""
        patience = self.config.early_stopping
        return progress.step >= self.data.num_steps or (patience is not None and progress.since_best >= patience)

    def micro_batches(self, batch: Batch) -> Iterator[Batch]:
        """This process's share of ``batch``, a micro-batch at a time, on the device."""
        return (
            micro.to(self.device) for micro in batch.micro_batches or self._split(self.learner.placement.share(batch))
        )

    def _ready(self, batch: Batch) -> Batch:
        """``batch`` with its micro-batches, in pinned memory if a GPU wants them."""
        micros = tuple(self._split(self.learner.placement.share(batch)))
        every = [micro for number in range(num_ranks()) for micro in self._split(batch.share(number, num_ranks()))]
        computed, tokens = sum(micro.input_ids.numel() for micro in every), sum(micro.num_tokens for micro in every)
        ready = tuple(map(Batch.pinned, micros)) if self.device.type == "cuda" else micros
        return replace(batch, micro_batches=ready, computed=computed, padding=computed - tokens)

    def _split(self, share: Batch) -> Iterator[Batch]:
        all_tokens = router_coefficient(self.learner.layers.model) > 0  # an evaluation may be under way
        return share.split(self.config.per_device_train_batch_size, all_tokens=all_tokens)

    def step(self, number: int, batch: Batch) -> Outcome:
        """Optimizer step ``number`` (from 0) on all micro-batches of ``batch``.

        On a CPU the tensors of a few steps are counted, those that come nearest to the one that is forecast: after the first,
        which makes optimizer state, each whose batch is wider than all that were counted, and nearly as the longest row.
        """
        work = partial(self.learner.step, number, self.micro_batches(batch), batch.num_labelled)
        is_first, self.is_first_step = self.is_first_step, False
        width = batch.input_ids.shape[1]
        if (
            self.device.type != "cpu"
            or num_ranks() > 1
            or self.config.torch_compile  # whose kernels' tensors nobody sees
            or is_first
            or width <= max(self.counted, 0.8 * self.data.longest)
        ):
            return work()
        self.counted = width
        model: torch.nn.Module = self.learner.model
        states = self.learner.optimizer.state.values()
        state = [value for of in states for value in of.values() if isinstance(value, torch.Tensor)]
        with self.meter.counting([*model.parameters(), *model.buffers(), *state]):
            return work()

    def evaluate(self, step: int) -> Evaluation:
        """What is due after ``step`` steps: all before the first and after the last, else as the two periods say."""
        config, all_due = self.config, step in (0, self.data.num_steps)
        losses_due = all_due or is_due(config.eval_steps, step)
        scores_due = all_due or is_due(config.eval_tasks_steps, step)
        return Evaluation(self.held_out_losses() if losses_due else None, self.task_scores() if scores_due else None)

    def completed(self, evaluation: Evaluation) -> Evaluation:
        """``evaluation`` of the model as it is now, with what it lacks."""
        losses, scores = evaluation
        return Evaluation(
            self.held_out_losses() if losses is None else losses, self.task_scores() if scores is None else scores
        )

    def task_scores(self) -> dict[str, float] | None:
        """Scores on ``eval_tasks``, if there are any; the run goes on as if it had not been asked.

        Each of several processes scores its copy, so that none waits; the scores of rank 0 count.
        """
        if self.scorer is None:
            return None
        scores: dict[str, float] = gathered(numbers(self.scorer(self.learner.model, self.tokenizer)))[0]
        return scores

    def held_out_losses(self) -> dict[str, float]:
        """Loss on the held-out rows, by the name that ``eval_data`` gives them; empty if there are none."""
        learner = self.learner
        return {
            name: held_out_loss(learner.layers, batches, linear_head=learner.linear_head, placement=learner.placement)
            for name, batches in self.data.held_out.items()
        }


def is_due(period: int | None, step: int) -> bool:
    """Whether something that happens every ``period`` steps happens after ``step`` steps; never without a period."""
    return period is not None and period > 0 and step % period == 0


def build(
    config: TrainConfig,
    examples: Sequence[Rows],
    held_out: HeldOut,
    *,
    console: Console,
    loaded: tuple[Any, Any] | None = None,
    memory_bytes: int | None = None,
    host_bytes: int | None = None,
) -> Run:
    """Load the model (or take ``loaded``, a model and its tokenizer), encode the data, and set the method up.

    With ``memory_bytes``, levers are pulled until the run fits into a device of that size, and into ``host_bytes`` of host memory.
    """
    # the model, whole and on the CPU
    with together():
        asked, (config, device) = config, settle(config)
        if config.full_determinism:
            be_deterministic(device)
        check_schedule(config)
        scorer = _scorer(config)
        model, tokenizer = loaded or load_model(
            config.model, getattr(torch, config.dtype), trust_remote_code=config.trust_remote_code,
            as_stored=_is_converted_later(config, device),
        )  # fmt: skip
        if not config.attn_implementation.startswith(FLASH):  # which is put on when the model is on the GPU
            without_mask = config.packing and not config.torch_compile  # compiled layers have no loop over documents
            set_attention(model, config.attn_implementation, packing=without_mask)
    torch.manual_seed(config.seed)  # seeds LoRA's adapters
    layers = find_layers(model, config.decoder_name)
    console.print(layers.describe(), highlight=False)
    config = settle_rate(config, model)
    if num_ranks() > 1 and config.dp_shard_size > 1:
        is_stored_as_held(model, layers.parts())  # refuses what could not be saved
    if not layers.says_causal() and not layers.is_causal():
        raise UserError(
            f"every token of {type(model).__name__} sees later tokens, so a next-token loss teaches nothing: set "
            '"is_decoder": true in the config.json of the model'
        )

    # the data, which all processes must have alike
    with together():
        config = settle_template(config, tokenizer)
        num_embeddings: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        data = prepare_data(config, tokenizer, examples, held_out, console, num_embeddings)
        check_positions(model, data.longest)
    stop_at(model, data.ends())
    if num_ranks() > 1:
        with together():
            check_alike(what_must_be_alike(config, data.identity, model))

    # the forecast; with memory_bytes, of the levers that make the run fit
    if memory_bytes is None:
        plan = plan_run(config, model.config, device.type, tokens=data.longest)
    else:
        with console.status("looking for what fits"), together():
            rungs = climb(config, model.config, memory_bytes, device.type, tokens=data.longest, host_bytes=host_bytes)
        config, plan = rungs[-1].config, rungs[-1].plan
        levers = pulled(rungs[0], rungs[-1]) or "no lever is needed"
        console.print(f"to fit into {gib(memory_bytes)}: {levers}", highlight=False)
    for line in filter(None, (plan.describe(), advice(asked, device, model.config), describe_rate(asked, config))):
        console.print(line, highlight=False)

    # the method and the levers, put on the model, which goes to the device
    meter = PeakMeter(device, own_bytes=tensor_bytes(model.parameters()))
    with explain_out_of_memory(config, model.config, device.type, data.longest), together():
        learner = make_learner(config, model, device)
        set_attention(learner.layers.model, config.attn_implementation)
    for line in describe_coverage(config, learner, data.num_steps):
        console.print(line, highlight=False)
    if config.packing:
        learner.call(check_packing, learner.layers, device)
    return Run(config, tokenizer, learner, data, plan, meter, device, scorer)


def _is_converted_later(config: TrainConfig, device: torch.device) -> bool:
    """Whether weights get their type when they go to their place, so that no process converts the whole model in host memory.

    Adapters are made in the type of the weights, which therefore have it from the beginning.
    """
    split = num_ranks() > 1 and config.dp_shard_size > 1
    return config.method != "lora" and (split or device.type != "cpu")


def _scorer(config: TrainConfig) -> Scorer | None:
    if not config.eval_tasks:
        return None
    scorer = Scorer(task_names(config.eval_tasks), data_dir=data_folder(config), limit=config.eval_limit)
    if (config.keep_best or config.early_stopping) and (lower := scorer.lower_is_better()):
        raise UserError(
            f"eval_tasks names {lower[0]}, whose score is better when lower, so it cannot be averaged with the others: "
            "leave it out of eval_tasks"
        )
    return scorer


def settle(config: TrainConfig) -> tuple[TrainConfig, torch.device]:
    """``config`` with what ``auto`` stands for on this machine, and the device.

    Raises: UserError for a device that is not there, or a lever that has no effect on it or cannot work there.
    """
    device = local_device(pick_device(config.device))
    if device.type == "mps" and (config.method == "mezo" or config.norm_steps):
        asked = "method=mezo" if config.method == "mezo" else "norm_steps"
        raise UserError(f"{asked} needs float64, which MPS does not have: set device=cpu")
    name = str(device) if num_ranks() == 1 else device.type  # each process has a GPU of its own
    settings = config.model_dump(exclude_unset=True) | {"device": name}
    if config.dtype == "auto":
        settings["dtype"] = "bfloat16" if device.type == "cuda" else "float32"
    check_attention(config.attn_implementation, device, settings.get("dtype", config.dtype))
    return build_config(settings), device


def settle_template(config: TrainConfig, tokenizer: Any) -> TrainConfig:
    """Give the tokenizer the chat template that is asked for; ``config`` with the day that the template writes.

    Raises: UserError if there is no such template.
    """
    if config.chat_template is not None:
        tokenizer.chat_template = find_template(config.chat_template, tokenizer)
    if config.template_date is None and writes_date(tokenizer.chat_template):
        return config.model_copy(update={"template_date": date.today().isoformat()})
    return config


def what_must_be_alike(config: TrainConfig, identity: Mapping[str, str], model: torch.nn.Module) -> dict[str, Any]:
    """What all processes have to be given: settings, rows by their ``identity``, versions and weights."""
    settings = {name: value for name, value in used_settings(config).items() if not ROWS[name].place}
    versions = {f"the version of {package}": version(package) for package in ("torch", "transformers")}
    weights = {"the sum of the model's weights": _exact_sum(model)}
    return settings | {f"the {name} data": value for name, value in identity.items()} | versions | weights


def _exact_sum(model: torch.nn.Module) -> int:
    """Sum of the weights' bits as whole numbers, which no order of adding changes."""
    whole = {2: torch.int16, 4: torch.int32}
    return sum(int(p.detach().view(whole[p.element_size()]).sum(dtype=torch.int64)) for p in model.parameters())
