"""Speak with a model in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lisatune.models.load import load_model, pick_device


def model_of(run: str) -> str:
    """The model's folder in a run's folder, or ``run`` itself if it is a model or a hub name."""
    inside = Path(run).expanduser() / "model"
    return str(inside) if (inside / "config.json").is_file() else run


class Chat:
    """A conversation that remembers its turns.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer; without a chat template the text is continued as it is.
        system: A system prompt, or None for what the template has.
        max_new_tokens: Tokens of an answer at most.
        temperature: 0 always takes the likeliest token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []

    @torch.no_grad()
    def ask(self, prompt: str, streamer: Any = None) -> str:
        """The answer to ``prompt``; ``streamer`` gets it as it is made."""
        self.messages.append({"role": "user", "content": prompt})
        if self.tokenizer.chat_template is None:
            inputs = self.tokenizer(prompt, return_tensors="pt")
        else:
            inputs = self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        inputs = inputs.to(self.model.device)
        options: dict[str, Any] = {"do_sample": self.temperature > 0}
        if self.temperature > 0:
            options["temperature"] = self.temperature
        out = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
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
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    device: str = "auto",
) -> None:
    """Answer ``prompt`` once on standard output, or talk until the input ends.

    Raises: UserError if ``run`` holds no model.
    """
    from transformers import TextStreamer

    model, tokenizer = load_model(model_of(run))
    model.to(pick_device(device))
    partner = Chat(model, tokenizer, system=system, max_new_tokens=max_new_tokens, temperature=temperature)
    if prompt is not None:
        print(partner.ask(prompt))
        return
    console = Console()
    console.print("Type a message; an empty line or Ctrl-D ends the chat.", style="dim")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    while line := _read_line(console):
        partner.ask(line, streamer)


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
