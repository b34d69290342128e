"""LISA inside ``transformers.Trainer`` and whatever is built on it, such as TRL's ``SFTTrainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lisatune.engine import LisaEngine, StatePolicy
from lisatune.errors import UserError
from lisatune.layers import Trains, find_layers
from lisatune.memory.blocks import SliceOf
from lisatune.processes.collectives import num_ranks
from lisatune.slices.engine import SliceEngine
from lisatune.slices.modules import ReadWhole
from lisatune.trainer.after_backward import AfterBackward
from lisatune.trainer.checks import (
    check_adapters,
    check_alone,
    check_causal,
    check_checkpointing,
    router_remark,
)
from lisatune.trainer.forecast import predicted
from lisatune.trainer.processes import (
    TOO_LATE,
    Copies,
    check_processes,
    check_settings,
    prepare_shards,
    trainer_that_resumes,
)
from lisatune.trainer.record import Record, write_report
from lisatune.trainer.settings import LisaSettings


class LisaCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """``Trainer(..., callbacks=[LisaCallback()])`` trains with LISA.

    Freezing begins after the Trainer has made its optimizer, so the optimizer holds all layers. Layers change at the
    beginning of an optimizer step, never between the micro-batches of one step. When training ends, ``requires_grad`` is
    as before. At the start the callback prints what trains and what does not.

    The settings are kept in the Trainer's checkpoint. A resumed run needs the same.

    Args:
        num_active: Decoder layers that train at a time, next to embedding and head (the paper's gamma). Default: 2 layers,
            or 1 slice.
        interval_steps: Optimizer steps between draws (the paper's K). Default: 20, with slices 1.
        seed: Seed of the draws; equal seeds draw equal layers here, in ``LisaEngine`` and in ``lisatune train``.
        state_policy: See ``LisaEngine``.
        decoder_name: Dotted path of the decoder layers, where ``find_layers`` does not recognise them.
        train_embedding: See ``LisaEngine``. Default: True, with slices ``sampled``.
        train_head: See ``LisaEngine``. Default: True, with slices ``sampled``.
        sampler: Name of the sampler, as ``make_sampler`` knows it. Default: ``uniform``, with slices ``sweep``.
        sampler_options: Options of that sampler.
        sampled_unit: ``layers``, pieces of them (``halves``, ``modules``), or ``slices``: a block of every matrix.
        num_slices: Only for slices: blocks that each matrix is cut into. Default: 15, or half of the number of decoder
            layers if that is less.
        train_norms: Only for slices: see ``SliceEngine``. Default: False.
        slices_of: Only for slices: ``rows`` or ``columns``, see ``SliceEngine``. Default: rows.
        train_outside: Train what is outside the text model too: a vision tower and its projector, in every step.
        report: Write ``report.html`` into the Trainer's ``output_dir`` at the end; needs matplotlib.
    Raises: UserError, when training begins, for a model that has adapters, a bidirectional model with a next-token loss,
        two of these callbacks, and a checkpoint made with other settings.
    Example: see examples/hf_trainer.py
    """

    def __init__(
        self,
        num_active: int | None = None,
        interval_steps: int | None = None,
        seed: int = 0,
        state_policy: StatePolicy = "reset_layers",
        decoder_name: str | None = None,
        *,
        train_embedding: Trains | None = None,
        train_head: Trains | None = None,
        sampler: str | None = None,
        sampler_options: dict[str, Any] | None = None,
        sampled_unit: str = "layers",
        num_slices: int | None = None,
        train_norms: Trains | None = None,
        slices_of: SliceOf | None = None,
        train_outside: bool = False,
        report: bool = False,
    ) -> None:
        if sampled_unit == "slices" and train_outside:
            raise UserError("train_outside has no effect with sampled_unit='slices': leave it out")
        of_slices = {"num_slices": num_slices, "train_norms": train_norms, "slices_of": slices_of}
        if sampled_unit != "slices" and (given := [name for name, value in of_slices.items() if value is not None]):
            raise UserError(f"{given[0]} has no effect without sampled_unit='slices': leave it out")
        self.settings = LisaSettings.usual(
            num_active=num_active, interval_steps=interval_steps, seed=seed, state_policy=state_policy,
            decoder_name=decoder_name, train_embedding=train_embedding, train_head=train_head, sampler=sampler,
            sampler_options=sampler_options, sampled_unit=sampled_unit, train_outside=train_outside, **of_slices,
        )  # fmt: skip
        self.engine: LisaEngine | SliceEngine | None = None
        self._copies: Copies | None = None
        self._sharded = False
        self._resumed = False
        self._after_backward: AfterBackward | None = None
        self._read_whole: ReadWhole | None = None
        self._scores: dict[int, float] = {}
        self.report = report
        self._record: Record | None = None

    def state(self) -> dict[str, Any]:
        """What the Trainer's checkpoint keeps of this callback."""
        return {"args": self.settings.as_saved(), "attributes": {"report": self.report}}

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Prepare for several processes, before the Trainer wraps the model."""
        from accelerate.state import AcceleratorState  # an extra, but the Trainer has it

        self._sharded = check_processes(AcceleratorState())
        if num_ranks() == 1 or model is None:
            return
        checkpointed = getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing
        finds_unused = not checkpointed if args.ddp_find_unused_parameters is None else args.ddp_find_unused_parameters
        check_settings(self.settings, sharded=self._sharded, finds_unused=finds_unused)
        layers = find_layers(model, self.settings.decoder_name)
        if self._sharded:
            check_causal(layers)
            model.register_load_state_dict_post_hook(self._weights_are_loaded)
        else:
            self._copies = Copies(layers)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Find the layers; freeze nothing yet."""
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        check_alone(saved)
        self.settings.check_saved(saved["args"])
        check_adapters(model)
        check_checkpointing(model, self.settings.train_embedding, num_ranks())
        if not self._resumed:
            self._join(model)
            self.engine = self.settings.engine(model)
        assert self.engine is not None
        unchecked = check_causal(self.engine.layers) if not self._sharded else ""
        if self._copies or self.engine.sampler.learns:
            self._after_backward = AfterBackward(model, self._gradients_are_there)
        checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        if self.settings.train_embedding is not True and checkpointed:
            model.disable_input_require_grads()  # else the backward pass would go on below the lowest active layer
        if isinstance(self.engine, SliceEngine) and self.engine.layers.head is not None:
            self._read_whole = ReadWhole(self.engine.layers.head)
        self._record = Record(self.engine, optimizer)
        rows = getattr(train_dataloader, "dataset", None)
        if state.is_world_process_zero:
            more, self._record.predicted_bytes = self.predict(model, args, optimizer, rows)
            self._record.expected += more and f"; {more}"
        if state.is_world_process_zero:
            remarks = [unchecked, router_remark(model, args.gradient_accumulation_steps)]
            self.tell([*describe(self.engine, self.settings), self._record.expected, *filter(None, remarks)])

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Called by the Trainer once for each optimizer step, before its first forward."""
        assert self.engine is not None
        if self.engine.begin_step(state.global_step, optimizer) and self._after_backward:
            self._after_backward.follow()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Called by the Trainer when the optimizer has made its step."""
        assert self.engine is not None
        assert self._record is not None
        self.engine.observe(state.global_step, self._scores)
        self._record.step_is_done(optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set ``requires_grad`` as before, and print the measured peak."""
        assert self.engine is not None
        assert self._record is not None
        if state.is_world_process_zero:
            self.tell([self._record.measured()])
            if self.report:
                told = [*describe(self.engine, self.settings), self._record.expected, self._record.measured()]
                name = type(self.engine.layers.model).__name__
                write_report(Path(args.output_dir) / "report.html", name, told, self.engine, state.log_history)
        self.engine.release()
        if self._read_whole:
            self._read_whole.remove()
        self._resumed = False
        if self._after_backward:
            self._after_backward.remove()

    def predict(self, model: Any, args: Any, optimizer: Any, rows: Any) -> tuple[str, int]:
        """The peak to expect, in words and bytes."""
        return predicted(model, self.settings, args, optimizer, rows)

    def tell(self, lines: list[str]) -> None:
        """Print lines for the user."""
        print(*(f"LISA: {line}" for line in lines), sep="\n")

    def _join(self, model: Any) -> None:
        """Join the other processes, if there are any."""
        if self._sharded:
            prepare_shards(model)
        elif num_ranks() > 1:
            if self._copies is None or self._copies.model is not model:
                raise UserError(TOO_LATE)
            self._copies.begin()

    def _weights_are_loaded(self, model: Any, _keys: Any) -> None:
        """Freeze what was frozen when the checkpoint was made, before its optimizer state is read."""
        trainer = trainer_that_resumes()
        if trainer is None or trainer.state.global_step == 0 or self._resumed:
            return
        prepare_shards(model)
        self.engine = self.settings.engine(model)
        step = trainer.state.global_step
        drawn = self.engine.sampler((step - 1) // self.settings.interval_steps)
        self.engine.resume(step, drawn, trainer.optimizer)
        self._resumed = True

    def _gradients_are_there(self) -> None:
        assert self.engine is not None
        if self._copies:
            self._copies.average()
        self._scores = self.engine.scores()


def describe(engine: LisaEngine | SliceEngine, settings: LisaSettings) -> list[str]:
    """What was found, what trains and what does not."""
    if isinstance(engine, SliceEngine):
        return [engine.layers.describe(), f"{engine.describe()}, sampled by {settings.sampler}"]
    pool = engine.pool
    always = sorted(engine.trained_parts(()))
    never = sorted({"embedding", "head"} - set(always) - set(pool) - ({"head"} if engine.layers.tied else set()))
    text = f"{settings.num_active} of {len(pool)} {settings.sampled_unit} train at a time"
    text += f", sampled by {settings.sampler} every {settings.interval_steps} steps"
    sampled = [part for part in ("embedding", "head") if part in pool]
    text += f" ({' and '.join(sampled)} with them)" if sampled else ""
    text += f"; {', '.join(always)} train in every step"
    return [engine.layers.describe(), text + (f"; {', '.join(never)} never" if never else "")]
