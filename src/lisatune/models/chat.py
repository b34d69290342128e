"""Speak with a model in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console

from lisatune.errors import UserError
from lisatune.models.load import end_tokens, load_trained, pick_device


class Chat:
    """A conversation that remembers its turns.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer; without a chat template the text is continued as it is.
        system: A system prompt, or None for what the template has.
        tools: Functions that the model may call, as JSON schemas.
        max_new_tokens: Tokens of an answer at most.
        temperature: 0 always takes the likeliest token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        system: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ) -> None:
        self.tools = tools
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []

    def encode(self, prompt: str, *, role: str = "user") -> Any:
        """Add ``prompt`` to the conversation. Returns the tokens of all of it; without a template those of ``prompt``."""
        self.messages.append({"role": role, "content": prompt})
        if self.tokenizer.chat_template is None:
            return _without_end(self.tokenizer(prompt, return_tensors="pt"), self.tokenizer.eos_token_id)
        return self.tokenizer.apply_chat_template(
            self.messages, tools=self.tools, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

    @torch.no_grad()
    def ask(self, prompt: str, streamer: Any = None, *, role: str = "user") -> str:
        """The answer to ``prompt``; ``streamer`` gets it as it is made. ``role`` is ``tool`` for a tool's reply."""
        inputs = self.encode(prompt, role=role).to(self.model.device)
        check_ids(self.model, self.tokenizer, inputs["input_ids"])
        options: dict[str, Any] = {"do_sample": self.temperature > 0}
        if self.temperature > 0:
            options["temperature"] = self.temperature
        out = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=end_tokens(self.model, self.tokenizer) or None,
            streamer=streamer,
            **options,
        )
        answer: str = self.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.messages.append({"role": "assistant", "content": answer})
        return answer


def chat(
    run: str,
    prompt: str | None = None,
    *,
    system: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Answer ``prompt`` once on standard output, or talk until the input ends.

    Raises: UserError if ``run`` holds no model.
    """
    from transformers import TextStreamer

    model, tokenizer = load_trained(run, trust_remote_code=trust_remote_code)
    model.to(pick_device(device))
    partner = Chat(model, tokenizer, system=system, tools=tools, max_new_tokens=max_new_tokens, temperature=temperature)
    if prompt is not None:
        print(partner.ask(prompt))
        return
    console = Console()
    hint = " A line that begins with /tool is a tool's reply." if tools else ""
    console.print(f"Type a message; an empty line or Ctrl-D ends the chat.{hint}", style="dim", markup=False)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    while line := _read_line(console):
        is_reply = bool(tools) and line.startswith("/tool ")
        partner.ask(line.removeprefix("/tool ") if is_reply else line, streamer, role="tool" if is_reply else "user")


def _without_end(inputs: Any, end: int | None) -> Any:
    """``inputs`` without an end-of-text token that the tokenizer has added, after which nothing would follow."""
    if end is not None and inputs["input_ids"].shape[1] > 1 and inputs["input_ids"][0, -1] == end:
        for name in inputs:
            inputs[name] = inputs[name][:, :-1]
    return inputs


def check_ids(model: Any, tokenizer: Any, ids: torch.Tensor) -> None:
    """Refuse a token that the tokenizer has, but the model has no embedding for.

    Raises: UserError naming it.
    """
    largest, limit = int(ids.max()), model.get_input_embeddings().num_embeddings
    if largest >= limit:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"the model has no embedding for the token '{token}' ({largest} of {limit:,}): remove it from your message"
        )


def _read_line(console: Console) -> str:
    try:
        return console.input("[bold]you:[/bold] ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int = 64) -> Iterator[str]:
    """The model's greedy answers to ``prompts``, each a chat of one question."""
    training = model.training
    model.eval()
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        out = model.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        yield tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    model.train(training)
