"""A learner from settings: method, levers and optimizer, in the one order that works."""

from __future__ import annotations

import math
from typing import Any

import torch

from lisatune.engine import LisaEngine
from lisatune.errors import UserError
from lisatune.layers import Layers, find_layers
from lisatune.learner import Learner
from lisatune.levers.frozen_steps import InactiveUpdates
from lisatune.levers.gradient_checkpointing import checkpoint_layers
from lisatune.levers.inverse_chance import InverseChance
from lisatune.levers.offload_frozen import HostLayers, rest_to_device
from lisatune.levers.optimizer_in_backward import StepInBackward
from lisatune.methods.lora import add_adapters
from lisatune.methods.mezo import ZerothOrder
from lisatune.optim.adamw import AdamW
from lisatune.optim.build import make_optimizer, parameter_groups
from lisatune.optim.row_gradients import RowGradients, watch_embedding
from lisatune.pieces import split_layers
from lisatune.processes.collectives import num_ranks
from lisatune.processes.sharded import Sharded
from lisatune.samplers import make_sampler
from lisatune.settings import LAYERWISE, TrainConfig
from lisatune.slices.engine import SliceEngine


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
            layers, parameter_groups(config, layers, model), lr=config.learning_rate, epsilon=config.mezo_epsilon,
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


def _slice_engine(config: TrainConfig, layers: Layers) -> SliceEngine:
    sampler = make_sampler(
        config.sampler, num_layers=config.num_slices, num_active=config.num_active,
        interval_steps=config.interval_steps, seed=config.seed, **config.sampler_options,
    )  # fmt: skip
    return SliceEngine(
        layers, sampler, config.interval_steps, config.state_policy, train_embedding=config.train_embedding,
        train_head=config.train_head, train_norms=config.train_norms,
    )  # fmt: skip
