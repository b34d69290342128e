"""Answers to grades: each prompt is asked for once, by a few threads, and what was paid for is kept. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from lisatune.errors import UserError
from lisatune.evaluation.mt_bench.endpoint import BudgetSpent, Endpoint, RequestRefused
from lisatune.evaluation.mt_bench.records import Records, key_of
from lisatune.evaluation.mt_bench.verdicts import Verdict, read_verdict

NUM_THREADS = 4


class Judge:
    """Grades by one model at one endpoint.

    A reply is written to ``replies`` before it counts, and read anew each time, so no prompt is paid for twice; neither are
    those that hold no grade, which a judge at temperature 0 would only repeat. Equal prompts are asked once.

    Args:
        endpoint: The judge.
        replies: Where its replies are kept, under the hash of address, model, prompt and parameters.
        max_tokens: Tokens of a reply at most: a few sentences and the grade; a model that thinks first needs more.
    """

    def __init__(self, endpoint: Endpoint, replies: Records, *, max_tokens: int = 1024) -> None:
        self.endpoint = endpoint
        self.replies = replies
        self.max_tokens = max_tokens

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Those of ``prompts``, each once, to which there is no reply yet."""
        return [prompt for prompt in dict.fromkeys(prompts) if self.replies.get(self._key(prompt)) is None]

    def verdicts(self, prompts: Sequence[str], advance: Callable[[], None] = lambda: None) -> list[Verdict]:
        """One verdict for each of ``prompts``; ``advance`` is called as each missing reply comes.

        A prompt that the judge refuses, while it has answered others, has the verdict ``refused`` and is asked again the
        next time.

        Raises: UserError if the endpoint is of no use, or the budget is spent; replies that have come are kept.
        """
        refused = self._ask(self.missing(prompts), advance)
        return [Verdict(None, "refused") if prompt in refused else self._verdict(prompt) for prompt in prompts]

    def _verdict(self, prompt: str) -> Verdict:
        record = self.replies.get(self._key(prompt))
        assert record is not None
        return read_verdict(record["reply"], cut_off=record["finish_reason"] == "length")

    def _ask(self, prompts: Sequence[str], advance: Callable[[], None]) -> set[str]:
        """Ask for every one of ``prompts``; returns those that were refused. What is under way is waited for and kept."""
        refused: set[str] = set()
        left = iter(prompts)
        running: dict[Future[None], str] = {}
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            try:
                while True:
                    while len(running) < NUM_THREADS and (prompt := next(left, None)) is not None:
                        running[pool.submit(self._ask_one, prompt)] = prompt
                    if not running:
                        return refused
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        prompt = running.pop(done)
                        if self._was_refused(done):
                            refused.add(prompt)
                        advance()
            except BudgetSpent:
                pass
            except BaseException:
                self.endpoint.stop()  # nothing more is sent, and who waits to send need not be waited for
                raise
        num_left = len(self.missing(prompts))
        raise UserError(
            f"the budget of {self.endpoint.budget:,} requests is spent, with {num_left:,} verdicts left: run the same command again. "
            "No request is sent twice"
        )

    def _ask_one(self, prompt: str) -> None:
        self.replies.add(self._key(prompt), {"judge": self.endpoint.model, **self.endpoint.ask(self._body(prompt))})

    def _was_refused(self, done: Future[None]) -> bool:
        try:
            done.result()
        except RequestRefused:
            if not len(self.replies):
                raise  # nothing was ever answered: it is the judge that is wrong, not the prompt
            return True
        return False

    def _body(self, prompt: str) -> dict[str, Any]:
        return {
            "messages": [{"role": "user", "content": prompt}],  # no system message, which some templates refuse
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }

    def _key(self, prompt: str) -> str:
        return key_of(url=self.endpoint.url, model=self.endpoint.model, **self._body(prompt))
