"""Scores of a model on tasks of lm-evaluation-harness, with standard errors, leaving the model as it was."""

from __future__ import annotations

import copy
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lisatune.errors import UserError
from lisatune.evaluation.tasks.harness import ASKED, load_tasks, quiet_harness
from lisatune.evaluation.tasks.score import Score

EXAMPLES_SEED = 1234  # the harness' own default, for the examples before a question
RESAMPLES = 1000  # bootstrap resamples, for standard errors that have no formula
Progress = Callable[[int, int], None]


class Scorer:
    """Tasks with their data, ready to score models.

    Args:
        tasks: Names, as the harness has them.
        data_dir: Folder of local data; None is the hub.
        limit: Documents of each task at most, the first; of a group, of each of its tasks. None is all.
        num_fewshot: Examples shown before each document; None is what the task says.
        chat_template: Whether prompts are written as chats, by the tokenizer's template.
    Attributes:
        num_cut: Prompts of the last call whose beginning was left out, because they exceed the model's context.
    Raises: UserError as ``load_tasks``.
    Example:
        >>> scorer = Scorer(["winogrande"], data_dir=Path("data"), limit=32)       # doctest: +SKIP
        >>> scorer(model, tokenizer)["winogrande"].value                            # doctest: +SKIP
        0.53125
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        data_dir: Path | None = None,
        limit: int | None = None,
        num_fewshot: int | None = None,
        chat_template: bool = False,
    ) -> None:
        self.limit = limit
        self.chat_template = chat_template
        self.num_cut = 0
        with _as_they_were():  # the harness draws where one would not think so, as in a task's name
            self._group = load_tasks(tasks, data_dir)
            self._tasks = {task.task_name: task for task in self._group.get_all_tasks()}
        for task in self._tasks.values():
            # the harness does the same: a task that says 0 keeps it, and one that says nothing has 0
            of_task = task.get_config("num_fewshot")
            if of_task is None or (num_fewshot is not None and of_task != 0):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)

    def __call__(
        self, model: Any, tokenizer: Any, *, batch_size: int = 1, progress: Progress | None = None
    ) -> dict[str, Score]:
        """The scores of ``model``, by task, in the order asked for.

        Neither the model (mode, ``requires_grad``) nor the state of any random generator is changed.

        Args:
            model: A causal language model of transformers, on its device.
            tokenizer: Its tokenizer.
            batch_size: Prompts in one forward pass.
            progress: Called with what is done and what there is, in prompts and answers to score.
        Raises: UserError if the model's context is too short for a task, or memory runs out.
        """
        if self.chat_template and tokenizer.chat_template is None:
            raise UserError("the tokenizer has no chat template: leave --apply-chat-template out")
        from lm_eval.evaluator import evaluate

        with _as_they_were(), _mode_of(model), quiet_harness():
            lm = _language_model(model, tokenizer, batch_size, progress)
            self._check_context(lm)
            groups = [self._group, *self._group.get_all_groups()]
            for task in self._tasks.values():
                task.set_fewshot_seed(seed=EXAMPLES_SEED)
            try:
                found = evaluate(
                    lm,
                    {"tasks": self._tasks, "groups": {group.name: group for group in groups}},
                    limit=self.limit,
                    bootstrap_iters=RESAMPLES,
                    apply_chat_template=self.chat_template,
                    fewshot_as_multiturn=self.chat_template,
                )
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"scoring ran out of memory at {batch_size} prompts at a time: lower --batch-size, or --num-fewshot"
                ) from error
            self.num_cut = lm.num_cut
            return {name: score for child in self._group for name, score in _scores_of(child, found)}

    def lower_is_better(self) -> list[str]:
        """The tasks with a metric that is the better the lower, as a perplexity."""
        return [name for name, task in self._tasks.items() if False in task.higher_is_better().values()]

    def _check_context(self, lm: Any) -> None:
        for name, task in self._tasks.items():
            if task.OUTPUT_TYPE != "generate_until":
                continue
            answer = (task.config.generation_kwargs or {}).get("max_gen_toks", lm.max_gen_toks)
            if lm.max_length <= answer:
                raise UserError(
                    f"task '{name}' takes answers of up to {answer:,} tokens, which leaves no room for a question in the "
                    f"model's context of {lm.max_length:,}: leave the task out"
                )


@contextmanager
def _as_they_were() -> Iterator[None]:
    """Put the random generators back, whatever was drawn."""
    import numpy

    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)


@contextmanager
def _mode_of(model: Any) -> Iterator[None]:
    """Put the model back into training or evaluation mode."""
    training = model.training
    try:
        yield
    finally:
        model.train(training)


def _language_model(model: Any, tokenizer: Any, batch_size: int, progress: Progress | None) -> Any:
    """``model`` as the harness takes it, which tells how far it is."""
    from lm_eval.models.huggingface import HFLM

    class Told(HFLM):  # type: ignore[misc]
        done = total = num_cut = 0

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            self.total += len(requests)
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> Any:
            self.num_cut += sum(len(prompt) + len(answer) > self.max_length + 1 for _, prompt, answer in requests)
            return super()._loglikelihood_tokens(requests, **options)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            self.total += len(requests)
            for prompt, options in (request.args for request in requests):
                room = self.max_length - options.get("max_gen_toks", self.max_gen_toks)
                self.num_cut += len(self.tok_encode(prompt)) > room
            return super().generate_until(requests, disable_tqdm=True)

        def add_partial(self, *_: Any) -> None:
            """The harness calls this with each answer, meant for a cache of answers."""
            self.done += 1
            if progress is not None:
                progress(self.done, self.total)

    # a copy, because the harness sets the side on which it pads
    lm = Told(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    lm.set_cache_hook(lm)
    return lm


def _scores_of(item: Any, found: Mapping[str, Any], metric: str | None = None) -> Iterator[tuple[str, Score]]:
    """A task's or a group's score, in ``metric`` if it has that; of a group that has none, those of what is in it."""
    if not hasattr(item, "get_all_tasks"):
        yield item.task_name, _score(item.task_name, found, {}, metric)
        return
    has_score = item.name != ASKED and item.has_aggregation
    metric = metric or (item.aggregate_metric_list[0].metric if has_score else None)
    parts = {name: score for child in item for name, score in _scores_of(child, found, metric)}
    if has_score:
        yield item.name, _score(item.name, found, parts, metric)
    else:
        yield from parts.items()


def _score(name: str, found: Mapping[str, Any], parts: dict[str, Score], wanted: str | None) -> Score:
    results = found["results"][name]
    metrics = {
        key: float(value)
        for key, value in results.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    if not metrics:
        raise UserError(f"task '{name}' gives no number: leave it out")
    first = next((key for key in metrics if key.partition(",")[0] == wanted), next(iter(metrics)))
    metric, _, filtered = first.partition(",")
    stderr = results.get(f"{metric}_stderr,{filtered}")
    if parts:
        values = tuple(value for part in parts.values() for value in part.values)
        # only a mean over documents can be compared document by document
        if not values or not math.isclose(math.fsum(values) / len(values), metrics[first], abs_tol=1e-9):
            values = ()
    else:
        rows = [row for row in found["samples"][name] if row["filter"] == filtered]
        plain = all(isinstance(row.get(metric), int | float) for row in rows)
        values = tuple(float(row[metric]) for row in sorted(rows, key=lambda row: row["doc_id"])) if plain else ()
    if not isinstance(stderr, int | float) or not math.isfinite(stderr):
        # the harness pools the errors of a group's tasks; where each has one document there are none to pool
        stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Score(
        metric if filtered == "none" else f"{metric}, {filtered}",
        metrics[first],
        stderr,
        int(results["sample_len"]),
        int(found["n-shot"].get(name) or 0),
        {key.replace(",none", "").replace(",", ", "): value for key, value in metrics.items() if key != first},
        parts,
        values,
    )
