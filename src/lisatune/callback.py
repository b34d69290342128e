"""LISA inside ``transformers.Trainer`` and whatever is built on it, such as TRL's ``SFTTrainer``."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from lisatune.distributed import num_ranks
from lisatune.engine import LisaEngine, StatePolicy
from lisatune.errors import UserError
from lisatune.layers import Trains, find_layers
from lisatune.sampling import UniformSampler


class LisaCallback(TrainerCallback):  # type: ignore[misc]
    """``Trainer(..., callbacks=[LisaCallback()])`` trains with LISA.

    Nothing is frozen before the Trainer has made its optimizer, which would otherwise never hold the layers drawn
    later. Layers are set at the beginning of an optimizer step, so never inside an accumulation window.

    Args:
        num_active: Decoder layers that train at a time, beside embedding and head (the paper's gamma).
        interval_steps: Optimizer steps between draws (the paper's K).
        seed: Of the draws; equal seeds draw equal layers here, in ``LisaEngine`` and in ``lisatune train``.
        state_policy: See ``LisaEngine``.
        decoder_name: Dotted path of the decoder layers, where ``find_layers`` does not recognise them.
        train_embedding: See ``LisaEngine``.
        train_head: See ``LisaEngine``.
    Raises: UserError, when training begins, on several processes, or for a model that has adapters.
    Example: see examples/hf_trainer.py
    """

    def __init__(
        self,
        num_active: int = 2,
        interval_steps: int = 20,
        seed: int = 0,
        state_policy: StatePolicy = "reset_layers",
        decoder_name: str | None = None,
        *,
        train_embedding: Trains = True,
        train_head: Trains = True,
    ) -> None:
        if num_active < 1:
            raise UserError("num_active is 0, so no decoder layer would ever train: choose at least 1")
        if interval_steps < 1:
            raise UserError(f"interval_steps is {interval_steps}: a set of layers lives at least 1 step")
        self.num_active = num_active
        self.interval_steps = interval_steps
        self.seed = seed
        self.state_policy: StatePolicy = state_policy
        self.decoder_name = decoder_name
        self.train_embedding = train_embedding
        self.train_head = train_head
        self.engine: LisaEngine | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Find the layers; freeze nothing yet."""
        if num_ranks() > 1:  # args.world_size is 1 on processes of a CPU, though the Trainer joins them
            raise UserError(
                f"LisaCallback works on one process, not on {num_ranks()}: start the script without torchrun and "
                f"accelerate launch, or train with lisatune train --nproc {num_ranks()}"
            )
        if hasattr(model, "peft_config"):
            raise UserError(
                "LisaCallback trains weights, but this model has adapters: pass the model without peft_config"
            )
        layers = find_layers(model, self.decoder_name)
        options = {"train_embedding": self.train_embedding, "train_head": self.train_head}
        sampler = UniformSampler(len(layers.pool(**options)), self.num_active, self.seed)
        self.engine = LisaEngine(layers, sampler, self.interval_steps, self.state_policy, **options)
        if self.train_embedding is not True and args.gradient_checkpointing:
            model.disable_input_require_grads()  # else the backward pass would go on below the lowest active layer

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Called by the Trainer once for each optimizer step, before its first forward."""
        assert self.engine is not None
        self.engine.begin_step(state.global_step, optimizer)
