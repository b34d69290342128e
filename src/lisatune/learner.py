"""A model together with all that changes it: what one optimizer step is.

Training and the memory forecast both run this file, so the forecast forecasts what is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lisatune.adapters import add_adapters
from lisatune.config import LAYERWISE, OUR_OPTIMS, TrainConfig
from lisatune.correction import InverseChance, active_chances
from lisatune.data.loader import Batch
from lisatune.distributed import Sharded, local, num_ranks, over_shards, total
from lisatune.engine import LisaEngine
from lisatune.errors import UserError
from lisatune.evaluate import batch_loss
from lisatune.inactive import InactiveUpdates
from lisatune.layers import Layers, find_layers
from lisatune.memory.backward_step import StepInBackward
from lisatune.memory.checkpointing import checkpoint_layers
from lisatune.memory.row_gradient import RowGradients, watch_embedding
from lisatune.memory.streaming import HostLayers, rest_to_device
from lisatune.modules import split_layers
from lisatune.optim.adamw import AdamW
from lisatune.optim.library import make_library_optimizer
from lisatune.optim.moments import StateBits
from lisatune.optim.suited import move_state
from lisatune.samplers import make_sampler
from lisatune.slices.blocks import whole_of
from lisatune.slices.engine import SliceEngine
from lisatune.zeroth_order import ZerothOrder

STATE_BITS: dict[str, StateBits] = {"adamw": 32, "adamw_16bit": 16, "adamw_8bit": 8, "sign": 32}  # sign has none


class Outcome(NamedTuple):
    """Of an optimizer step: loss and global gradient norm before clipping, scalars in float32; ``bad`` if either is not
    finite or the norm is beyond the limit, and nothing was updated (unless in the backward pass)."""

    loss: Tensor
    norm: Tensor
    bad: bool


@dataclass
class Learner:
    """Takes optimizer steps.

    Args:
        model: The whole model, adapters included.
        layers: Its parts.
        linear_head: ``layers.head_is_linear()``.
        optimizer: Over all parameters that ever train.
        engine: Of LISA; None if the same parameters train in every step.
        max_grad_norm: Global norm that gradients are clipped to; 0 does not clip.
        row_gradients: Where gradients of embedding and head lie, if they are made a block at a time.
        in_backward: If the optimizer steps inside the backward pass.
        host_layers: If frozen layers are kept in host memory.
        device: Where the model computes.
        bad_grad_norm: A larger gradient norm makes a step bad.
        correction: If updates of drawn layers are divided by their chance.
        inactive: If frozen layers take small steps; their rate is ``inactive_ratio`` of the optimizer's.
        zeroth_order: If losses alone are looked at; the norm of a step is then that of the slopes.
        sharded: If the weights lie in shards among several processes.
    Attributes:
        touched: The parts that have trained since somebody, who saves them, last emptied this set.
    """

    model: Any
    layers: Layers
    linear_head: bool
    optimizer: torch.optim.Optimizer
    engine: LisaEngine | SliceEngine | None
    max_grad_norm: float
    row_gradients: RowGradients | None
    in_backward: StepInBackward | None
    host_layers: HostLayers | None
    device: torch.device
    bad_grad_norm: float = math.inf
    correction: InverseChance | None = None
    zeroth_order: ZerothOrder | None = None
    inactive: InactiveUpdates | None = None
    inactive_ratio: float = 0.0
    sharded: Sharded | None = None
    touched: set[str] = field(default_factory=set)

    def step(self, number: int, micro_batches: Iterable[Batch], num_labelled: int) -> Outcome:
        """Optimizer step ``number`` (from 0), at the learning rate that is set: one divisor for all its micro-batches."""
        if self.engine and self.engine.begin_step(number, self.optimizer):
            self.follow_engine()
        if self.inactive:
            self.inactive.number = number
            group = self.optimizer.param_groups[0]
            self.inactive.lr = self.inactive_ratio * group["lr"] / group.get("lr_ratio", 1.0)
        if self.zeroth_order:
            loss, norm = self.zeroth_order.probe(number, micro_batches, num_labelled)
        else:
            loss = self._backward(micro_batches, num_labelled)
        scores = self.engine.scores() if self.engine else {}
        if self.in_backward:
            self.optimizer.step()
            norm = self.in_backward.grad_norm()
            bad = self._is_bad(loss, norm)
        else:
            if not self.zeroth_order:
                norm = clip_gradients(self.optimizer, self.max_grad_norm, self.row_gradients)
            bad = self._is_bad(loss, norm)
            if not bad:
                self.optimizer.step()
        if self.engine and not bad:
            self.engine.observe(number, scores)
        self.optimizer.zero_grad()
        self.touched |= self.trained_parts
        return Outcome(loss, norm, bad)

    def _backward(self, micro_batches: Iterable[Batch], num_labelled: int) -> Tensor:
        """Gradients of all micro-batches; returns the step's loss."""
        losses: list[Tensor] = []
        if self.sharded:
            micro_batches = list(micro_batches)
        for micro in micro_batches:
            if self.sharded:
                self.sharded.set_last(micro is micro_batches[-1])  # type: ignore[index]
            loss = self.call(
                batch_loss, self.layers, micro, num_labelled, linear_head=self.linear_head,
                row_gradients=self.row_gradients,
            )  # fmt: skip
            loss.backward()
            losses.append(loss.detach())
        loss = torch.stack(losses).sum()
        return total(loss) if self.sharded else loss

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)``, which runs the model: its weights have to be at hand."""
        return self.sharded.call(function, *args, **kwargs) if self.sharded else function(*args, **kwargs)

    def follow_engine(self) -> None:
        """Let all that depends on which layers train know what the engine has set."""
        if self.host_layers:
            self.host_layers.place()
        if self.correction and self.engine and self.engine.drawn is not None:
            chances = self.engine.sampler.inclusion(self.engine.interval)  # type: ignore[attr-defined]
            self.correction.set(active_chances(self.layers, self.engine.pool, self.engine.drawn, chances))

    @property
    def trained_parts(self) -> set[str]:
        """The parts that change in a step now."""
        if self.engine is None:
            return self._always_trained
        if self.engine.drawn is None:
            return set()
        moved = {part for part in self.layers.parts() if part.startswith("layers.")} if self.inactive else set()
        return self.engine.trained_parts(self.engine.drawn) | moved

    @cached_property
    def _always_trained(self) -> set[str]:
        return {part for part, own in self.layers.parts().items() if any(p.requires_grad for p in own.values())}

    def place_state(self, parameter: torch.nn.Parameter, saved: dict[str, Any]) -> None:
        """Copy saved optimizer state to where the optimizer and the engine hold that of ``parameter``."""
        if isinstance(self.optimizer, AdamW):
            self.optimizer.place_state(parameter, saved)
        else:
            _check_shapes(self.optimizer, parameter, saved)
            fused = any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)
            here, counter = parameter.device, parameter.device if fused else torch.device("cpu")
            self.optimizer.state[parameter] = {
                key: value.to(here if value.ndim else counter, copy=True) if isinstance(value, Tensor) else value
                for key, value in saved.items()
            }
        if not parameter.requires_grad:
            move_state(self.optimizer, parameter, torch.device("cpu"))  # state_policy=keep

    def _is_bad(self, loss: Tensor, norm: Tensor) -> bool:
        if loss.is_meta:
            return False  # there are no values
        return not (math.isfinite(loss.item()) and math.isfinite(norm.item()) and norm.item() <= self.bad_grad_norm)


def _check_shapes(optimizer: torch.optim.Optimizer, parameter: Tensor, saved: dict[str, Any]) -> None:
    """Refuse saved state of another parameter, or half of one; of an optimizer but PyTorch's AdamW nothing is known."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    if saved.keys() != {"step", "exp_avg", "exp_avg_sq"}:
        raise UserError(f"the saved state of a parameter holds {', '.join(sorted(saved))[:200]}, which is not AdamW's")
    for name, value in saved.items():
        shape = torch.Size() if name == "step" else parameter.shape
        if not isinstance(value, Tensor) or value.shape != shape:
            raise UserError(f"the saved {name[:80]} is not of the shape {tuple(shape)}, so it is of another parameter")


def make_learner(config: TrainConfig, model: Any, device: torch.device) -> Learner:
    """Set ``model`` up for the method and the levers of ``config``, in the one order that works, and move it to ``device``.

    Adapters first, since they add parameters; the optimizer before anything is frozen, since it has to hold every
    parameter that will ever train; checkpoints before streaming, which goes inside of them.
    """
    layers = find_parts(config, model)
    if config.method == "lora":
        model = add_adapters(
            model, rank=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout,
            targets=config.lora_target_modules, use_rslora=config.lora_use_rslora, use_dora=config.lora_use_dora,
        )  # fmt: skip
        layers = find_layers(layers.model, config.decoder_name)  # a head that got an adapter is another module now
    if config.gradient_checkpointing:
        count = None if config.gradient_checkpointing is True else config.gradient_checkpointing
        checkpoint_layers(layers.decoder, count, offload=config.activation_offloading)
    host_layers, sharded = None, None
    if num_ranks() > 1:
        linear_head = layers.head_is_linear()  # needs whole weights; the device never sees them all
        sharded = Sharded(layers, config.dp_shard_size, device)
    elif config.offload_frozen:
        rest_to_device(model, layers.decoder, device)
        host_layers = HostLayers(layers.decoder, device)
    else:
        model.to(device)
    if sharded is None:
        linear_head = layers.head_is_linear()
    rows = _row_gradients(config, layers, linear_head=linear_head)
    engine = make_engine(config, layers) if config.method in LAYERWISE else None
    zeroth_order = None
    if config.method == "mezo":
        zeroth_order = ZerothOrder(
            layers, _groups(config, layers, model), lr=config.learning_rate, epsilon=config.mezo_epsilon,
            num_directions=config.mezo_directions, seed=config.seed, linear_head=linear_head,
        )  # fmt: skip
        optimizer: torch.optim.Optimizer = zeroth_order.optimizer
    else:
        optimizer = make_optimizer(config, layers, model, rows)
    if isinstance(engine, SliceEngine):
        engine.adopt(optimizer)
    in_backward = None
    if config.optimizer_in_backward:
        assert isinstance(optimizer, AdamW)
        in_backward = StepInBackward(optimizer)
    inactive, ratio = None, 0.0
    if config.inactive_learning_rate:
        inactive = InactiveUpdates(layers.decoder, config.inactive_learning_rate, config.seed)
        ratio = config.inactive_learning_rate / config.learning_rate
    if host_layers and engine is None:
        host_layers.place()  # LISA does so at its first step, when most layers are frozen
    return Learner(
        model, layers, linear_head, optimizer, engine, config.max_grad_norm, rows, in_backward, host_layers, device,
        config.bad_grad_norm or math.inf, InverseChance(optimizer) if config.inverse_chance else None, zeroth_order,
        inactive, ratio, sharded,
    )  # fmt: skip


def find_parts(config: TrainConfig, model: torch.nn.Module) -> Layers:
    """``find_layers``, and in pieces if ``config`` draws pieces of decoder layers."""
    layers = find_layers(model, config.decoder_name)
    if config.sampled_unit == "layers" or config.sampled_unit == "slices":
        return layers
    return split_layers(layers, config.sampled_unit)


def make_engine(config: TrainConfig, layers: Layers) -> LisaEngine | SliceEngine:
    """LISA as ``config`` says."""
    if config.sampled_unit == "slices":
        return _slice_engine(config, layers)
    pool = layers.pool(train_embedding=config.train_embedding, train_head=config.train_head)
    if taken := config.sampler_options.keys() & {"name", "num_layers", "num_active", "interval_steps", "seed"}:
        raise UserError(f"sampler_options: {min(taken)} is none of them, give it as a setting of its own or not at all")
    options = config.sampler_options | ({"names": pool} if config.sampler == "weighted" else {})
    sampler = make_sampler(
        config.sampler, num_layers=len(pool), num_active=config.num_active, interval_steps=config.interval_steps,
        seed=config.seed, **options,
    )  # fmt: skip
    return LisaEngine(
        layers, sampler, config.interval_steps, config.state_policy,
        train_embedding=config.train_embedding, train_head=config.train_head,
    )  # fmt: skip


def _slice_engine(config: TrainConfig, layers: Layers) -> SliceEngine:
    sampler = make_sampler(
        config.sampler, num_layers=config.num_slices, num_active=config.num_active,
        interval_steps=config.interval_steps, seed=config.seed, **config.sampler_options,
    )  # fmt: skip
    return SliceEngine(
        layers, sampler, config.interval_steps, config.state_policy, train_embedding=config.train_embedding,
        train_head=config.train_head, train_norms=config.train_norms,
    )  # fmt: skip


def make_optimizer(
    config: TrainConfig, layers: Layers, model: torch.nn.Module, row_gradients: RowGradients | None = None
) -> torch.optim.Optimizer:
    """The optimizer of ``config`` over all parameters that ask for a gradient now; weight decay on matrices alone.

    Of AdamW PyTorch's own where float32 and no lever is asked for, ours for the rest.
    """
    groups, parts = _groups(config, layers, model), layers.parts()
    vocabulary = [*parts["embedding"].values(), *parts["head"].values()]  # which are no hidden matrices
    if config.optim not in OUR_OPTIMS:
        return make_library_optimizer(
            config.optim, groups, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon, momentum=config.momentum, adapt_vectors=config.adapt_vectors, vocabulary=vocabulary,
            seed=config.seed,
        )  # fmt: skip
    trained = groups[0]["params"]
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    levers = config.offload_optimizer or config.optimizer_in_backward or config.vocabulary_blocks
    levers = levers or any(group["stateless"] for group in groups)
    if config.optim == "adamw" and not levers and trained[0].dtype == torch.float32:
        return MetaAdamW(groups, **options) if trained[0].is_meta else torch.optim.AdamW(groups, **options, fused=True)
    return AdamW(
        groups, **options, seed=config.seed, state_bits=STATE_BITS[config.optim], offload_state=config.offload_optimizer,
        row_gradients=row_gradients,
    )  # fmt: skip


def _groups(config: TrainConfig, layers: Layers, model: torch.nn.Module) -> list[dict[str, Any]]:
    """Parameters that ask for a gradient, together as far as weight decay, rate and state are alike; matrices first."""
    parts = layers.parts()
    part_of = {p: part for part in ("embedding", "head") for p in parts[part].values()}
    head_ratio = config.embedding_lr_ratio if config.head_lr_ratio is None and layers.tied else config.head_lr_ratio
    if layers.tied and head_ratio != config.embedding_lr_ratio:
        raise UserError("embedding and head are one tensor in this model: leave head_lr_ratio out")
    ratios = {"embedding": config.embedding_lr_ratio, "head": 1.0 if head_ratio is None else head_ratio}
    groups: dict[tuple[bool, bool, float], list[Tensor]] = {}
    trained = [p for p in model.parameters() if p.requires_grad and whole_of(p) is p]
    for p in sorted(trained, key=lambda p: p.ndim < 2):
        ratio = ratios.get(part_of.get(p, ""), 1.0) if p.ndim >= 2 else config.norm_lr_ratio
        stateless = config.optim == "sign" or (hasattr(p, "cut_into") and _forgets(config))
        groups.setdefault((p.ndim < 2, stateless, ratio), []).append(p)
    return [
        {
            "params": own,
            "weight_decay": 0.0 if vector else config.weight_decay,
            "lr_ratio": ratio,
            "stateless": stateless,
        }
        for (vector, stateless, ratio), own in groups.items()
    ]


def _forgets(config: TrainConfig) -> bool:
    """Whether no slice trains for longer than a step, so that Adam has nothing to remember of it."""
    changes = config.num_active < config.num_slices and config.sampler != "fixed"
    return config.optim in STATE_BITS and config.interval_steps == 1 and changes and config.state_policy != "keep"


class MetaAdamW(torch.optim.AdamW):
    """What PyTorch's fused AdamW holds, for a forecast: two moments and no temporaries; it does not run on meta."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the moments of whatever has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def _row_gradients(config: TrainConfig, layers: Layers, *, linear_head: bool) -> RowGradients | None:
    if not config.vocabulary_blocks:
        return None
    if not linear_head:
        raise UserError(
            f"vocabulary_blocks: the logits of {type(layers.model).__name__} are more than a product with its head, so "
            "the head's gradient cannot be made in blocks: leave vocabulary_blocks out"
        )
    rows = RowGradients()
    watch_embedding(layers.embedding, rows)
    return rows


def clip_gradients(
    optimizer: torch.optim.Optimizer, max_norm: float, row_gradients: RowGradients | None = None
) -> Tensor:
    """Scale all gradients down to the global norm ``max_norm`` (0: leave them); returns the norm before, a scalar."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # in float32, whatever the gradients are: torch's get_total_norm would round the norm to bfloat16
    norms: list[Tensor] = [torch.linalg.vector_norm(local(p.grad), dtype=torch.float32) for p in parameters]
    if row_gradients is not None:
        norms += [row_gradients.sq_norm(p).sqrt() for p in row_gradients.parameters()]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    if num_ranks() > 1:
        norm = over_shards(norm.square(), parameters[0]).sqrt()
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        if row_gradients is not None:
            row_gradients.scale((max_norm / (norm + 1e-6)).clamp(max=1.0))  # as torch does
    return norm
