"""A learner from settings: method, placement, levers and optimizer, in the one order that works."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, TypeVar

import torch

from lisatune.layers import Layers, find_layers
from lisatune.learner import Learner
from lisatune.levers import LEVERS
from lisatune.levers.base import Lever
from lisatune.methods import method_of
from lisatune.methods.base import Method
from lisatune.optim import OPTIMS, make_optimizer
from lisatune.optim.build import parameter_groups
from lisatune.placement import choose_placement
from lisatune.settings import TrainConfig
from lisatune.slices.engine import usual_num_slices
from lisatune.tasks import task_of
from lisatune.tasks.base import Task

Kind = TypeVar("Kind")


def make_learner(config: TrainConfig, model: Any, device: torch.device) -> Learner:
    """Set ``model`` up for the method and the levers of ``config``, in the one order that works, and move it to ``device``.

    The method comes first, since LoRA adds parameters. Checkpoints come before weights are placed, since frozen layers
    are streamed inside of them. The optimizer comes before anything is frozen, since it has to hold every parameter that
    will ever train.
    """
    config = settle_rate(config, model)
    # the model: adapters first, then the levers that change modules, then it goes to its place
    method, levers = make_method(config), make_levers(config)
    model, layers = method.prepare(model)
    for lever in levers:
        lever.on_model(layers)
    placement = choose_placement(
        offload_frozen=config.offload_frozen, shard_size=config.dp_shard_size, alone=config.task != "sft",  # TRL's trainer joins them
        frozen_bits=config.frozen_bits, sums_in_float32=config.reduce_dtype == "float32",
    )  # fmt: skip
    linear_head = placement.place(model, layers, device, type_to_be(config, model))
    method.start(layers, linear_head=linear_head)

    # the optimizer, over all that will ever train
    groups = make_groups(config, layers, model)
    optimizer = method.make_optimizer(groups)
    if optimizer is None:
        optimizer = make_optimizer_over(config, groups, layers, ours=any(lever.needs_our_adamw for lever in levers))
    method.adopt(optimizer)

    # the learner, and what the other levers hang on it
    learner = Learner(
        model=model, method=method, optimizer=optimizer, levers=levers, placement=placement,
        max_grad_norm=config.max_grad_norm, bad_grad_norm=config.bad_grad_norm or math.inf,
    )  # fmt: skip
    for lever in levers:
        lever.put_on(learner)
    if method.engine is None:
        learner.after_switch()  # LISA does so at its first step, when most layers are frozen
    return learner


def type_to_be(config: TrainConfig, model: Any) -> torch.dtype | None:
    """The type that the weights of ``model`` get on their way to their place, if they are all of another; else None."""
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return None if config.dtype == "auto" or len(types) > 1 else getattr(torch, config.dtype)


def settle_rate(config: TrainConfig, model: Any) -> TrainConfig:
    """``config`` with the learning rate that is usual for its method and ``model``, to two digits, if it has none of its own.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lisatune.settings import build_config
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=32,
        ...                                      num_hidden_layers=6, num_attention_heads=2))
        >>> needed = {"model": "m", "data": "d", "output": "o"}
        >>> [settle_rate(build_config(needed | more), model).peak_rate
        ...  for more in ({}, {"num_slices": 15}, {"method": "full"}, {"recipe": "paper"}, {"learning_rate": 1e-3})]
        [0.0028, 0.014, 0.00094, 5e-05, 0.001]
    """
    if config.learning_rate is not None:
        return config
    rate = make_method(config).usual_learning_rate(find_layers(model, config.decoder_name))
    return config.model_copy(update={"learning_rate": float(f"{rate:.2g}")})


def make_method(config: TrainConfig) -> Method:
    """The method of ``config``."""
    return from_settings(method_of(config.method, config.sampled_unit), config)


def make_task(config: TrainConfig) -> Task | None:
    """The task of ``config``; None for ``sft``, which is this package's own."""
    return None if config.task == "sft" else from_settings(task_of(config.task), config)


def make_levers(config: TrainConfig) -> list[Lever]:
    """The levers that ``config`` puts on, in their order."""
    return [from_settings(kind, config) for name, kind in LEVERS.items() if getattr(config, name)]


def make_optimizer_over(
    config: TrainConfig, groups: list[dict[str, Any]], layers: Layers, *, ours: bool = False
) -> torch.optim.Optimizer:
    """The optimizer of ``config`` over ``groups``; ``ours`` if a lever needs this package's AdamW."""
    parts = layers.parts()
    ours = ours or config.slices_of == "columns"  # torch's fused one takes them for contiguous
    return make_optimizer(
        config.optim, groups, **vars(config), lr=config.peak_rate, betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon, vocabulary=[*parts["embedding"].values(), *parts["head"].values()], ours=ours,
    )  # fmt: skip


def make_groups(config: TrainConfig, layers: Layers, model: Any) -> list[dict[str, Any]]:
    """The optimizer's groups of parameters."""
    optim = OPTIMS[config.optim]
    # no slice trains for longer than a step, so Adam has nothing to remember of it; TRL's optimizer is made before the slices
    changes = (
        config.task == "sft"
        and config.num_active < (config.num_slices or usual_num_slices(len(layers.decoder)))
        and config.sampler != "fixed"
        and config.interval_steps == 1
    )
    return parameter_groups(
        layers, model, weight_decay=config.weight_decay, embedding_lr_ratio=config.embedding_lr_ratio,
        head_lr_ratio=config.head_lr_ratio, norm_lr_ratio=config.norm_lr_ratio, stateless=optim.stateless,
        factored=optim.factored, stateless_slices=not optim.factored and optim.in_blocks and changes and config.state_policy != "keep", spectral=optim.spectral,
    )  # fmt: skip


def from_settings(kind: type[Kind], config: TrainConfig) -> Kind:
    """A ``kind``, a dataclass, each of whose arguments is the setting of that name."""
    return kind(**{field.name: getattr(config, field.name) for field in fields(kind) if field.init})  # type: ignore[arg-type]
