"""What a run of TRL's trainer writes down, and when it evaluates, saves and stops: one callback."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lisatune.common.bars import Advance, Step
from lisatune.common.loss_names import named_losses
from lisatune.common.run_folder import how_to_resume
from lisatune.common.signals import StopSignal
from lisatune.errors import UserError
from lisatune.memory.measure import state_bytes
from lisatune.preferences.build import TaskRun
from lisatune.processes.collectives import most, num_ranks, rank, total
from lisatune.run.build import is_due
from lisatune.run.journal import sampled_parts
from lisatune.run.metrics import Metrics
from lisatune.run.saving import SaveTimes
from lisatune.run.snapshot import environment
from lisatune.settings import used_settings

STEPS_COUNTED = 3  # only on a CPU, where tensors are counted one by one
NOT_LOGGED = ("epoch", "num_tokens", "num_input_tokens_seen", "total_flos", "train_loss")


class Standing(BaseModel):
    """How far a run has come, and what it began with; the Trainer's checkpoint keeps it.

    Args:
        tokens: Tokens that were trained on.
        train_seconds: Time until the checkpoint.
        eval_before: Held-out losses before the first step, by name.
        eval_after: The newest held-out losses.
        peak_bytes: Largest memory until the checkpoint.
        tensor_peak_bytes: The most that tensors held in a step on a CPU.
        config: The settings.
        identity: What the rows are recognised by.
        environment: What the bits of a sum may depend on.
    """

    model_config = ConfigDict(extra="forbid")

    tokens: int = 0
    train_seconds: float = 0.0
    eval_before: dict[str, float] = {}
    eval_after: dict[str, float] = {}
    peak_bytes: int = 0
    tensor_peak_bytes: int = 0
    config: dict[str, Any] = {}
    identity: dict[str, str] = {}
    environment: dict[str, str] = {}


class TaskJournal(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Writes a line of ``metrics.jsonl`` for a step, shows it, and asks the Trainer to evaluate, to save and to stop.

    Args:
        run: The run, before its first step.
        stop: The signals that ask this process to stop.
        standing: How far the run has come.
    Attributes:
        signal: The one that stops the run, whichever process it was sent to.
    """

    def __init__(self, run: TaskRun, stop: StopSignal, standing: Standing) -> None:
        self.run = run
        self.standing = standing
        self._stop = stop
        self._times = SaveTimes(run.config)
        self.signal = 0
        self._line: dict[str, Any] = {}
        self._tokens = 0
        self._counting, self._left_to_count = ExitStack(), STEPS_COUNTED
        run.trainer.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def begin(self, metrics: Metrics, advance: Advance, first_step: int) -> None:
        """Write from here on; the line of step 0, if this is the beginning."""
        self._metrics, self._advance, self._started = (
            metrics,
            advance,
            time.perf_counter() - self.standing.train_seconds,
        )
        if first_step:
            return
        run = self.run
        self.standing.eval_before = self.standing.eval_after = self.evaluated()
        metrics.write(
            step=0, **named_losses(self.standing.eval_before), layers=run.layers.describe(), plan=run.plan.as_dict(),
            environment=environment(run.device), run={"steps": run.num_steps}, process={"base_bytes": run.meter.base_bytes},
        )  # fmt: skip

    def evaluated(self) -> dict[str, float]:
        """Held-out losses before training, by name."""
        if not self.run.names:
            return {}
        losses = self._losses(self.run.trainer.evaluate())
        # accelerate takes a model that was evaluated for one that is ready, and would train it without its wrapper
        self.run.trainer.model._is_accelerate_prepared = False
        return losses

    def state(self) -> dict[str, Any]:
        """What the Trainer's checkpoint keeps."""
        self._settle()
        return {"args": {}, "attributes": self.standing.model_dump()}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step begins: the line of the one before is whole."""
        self._flush()
        self._begun, self._tokens = time.perf_counter(), 0
        state_of = self.run.trainer.optimizer.state.values()
        if (
            self.run.device.type == "cpu" and num_ranks() == 1 and self._left_to_count and len(state_of)
        ):  # not the first, which makes the state
            self._left_to_count -= 1
            state = [value for of in state_of for value in of.values() if isinstance(value, torch.Tensor)]
            self._counting.enter_context(self.run.meter.counting([*self.run.weights(), *state]))

    def stop_counting(self) -> None:
        """Count tensors no longer; a step may have failed."""
        self._counting.close()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Say what is due after this step."""
        self.stop_counting()
        step, last = state.global_step, state.global_step >= self.run.num_steps
        config = self.run.config
        self._tokens = int(total(torch.tensor(self._tokens)))
        self.standing.tokens += self._tokens
        self.signal, save = most(self._stop.received, rank() == 0 and self._times.due(step))
        engine = self.run.lisa.engine if self.run.lisa else None
        self._line = {
            "active_layers": engine.active if engine else None, "sampled_parts": sampled_parts(engine), "tokens": self._tokens,
            "step_seconds": time.perf_counter() - self._begun, "state_bytes": state_bytes(optimizer),
        }  # fmt: skip
        due = last or is_due(config.eval_steps, step)
        control.should_evaluate = bool(self.run.names) and due
        control.should_save = not last and bool(self.signal or save)
        control.should_training_stop = control.should_training_stop or last or bool(self.signal)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Keep what the Trainer has computed of the step.

        Raises: UserError if the loss is no number.
        """
        logs = logs or {}
        if "loss" not in logs or not self._line:
            return
        if not math.isfinite(logs["loss"]):
            raise UserError(
                f"the loss of step {state.global_step} is not finite: lower learning_rate, or raise warmup_steps; "
                f"then {how_to_resume(self.run.folder)} --allow-changes"
            )
        self._line |= {"step": state.global_step} | {
            name: value for name, value in logs.items() if name not in NOT_LOGGED
        }
        speed = self._line["tokens"] / max(self._line["step_seconds"], 1e-9)
        self._advance(Step(state.global_step, logs["loss"], logs["learning_rate"], speed, self._line["active_layers"]))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Keep the held-out losses; of several sets each comes by itself."""
        found = self._losses(metrics or {})
        if self._line and found:
            self.standing.eval_after = self.standing.eval_after | found
            self._line["evaluated"] = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last line is whole."""
        self._flush()
        self._settle()

    def _losses(self, metrics: dict[str, float]) -> dict[str, float]:
        keys = {name: f"eval_{name}_loss" if name else "eval_loss" for name in self.run.names}
        return {name: metrics[key] for name, key in keys.items() if key in metrics}

    def _flush(self) -> None:
        line, self._line = self._line, {}
        if "step" not in line:
            return
        evaluated = line.pop("evaluated", False)
        if evaluated or is_due(self.run.config.logging_steps, line["step"]):
            losses = named_losses(self.standing.eval_after) if evaluated else {}
            self._metrics.write(**line, **losses, peak_bytes=self.run.meter.bytes())

    def _settle(self) -> None:
        """Bring ``standing`` up to date, and wait until all lines are on the disk: a checkpoint relies on them."""
        self._flush()
        run = self.run
        self.standing.train_seconds = time.perf_counter() - self._started
        self.standing.peak_bytes = max(self.standing.peak_bytes, run.meter.bytes())
        self.standing.tensor_peak_bytes = max(self.standing.tensor_peak_bytes, run.meter.tensor_bytes)
        self.standing.config, self.standing.identity = used_settings(run.config), run.identity
        self.standing.environment = environment(run.device)
        self._metrics.sync()

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not (torch.is_grad_enabled() and module.training):
            return
        mask = kwargs.get("attention_mask")
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._tokens += int(mask.sum()) if mask is not None else ids.numel() if ids is not None else 0
