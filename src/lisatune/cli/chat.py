"""`lisatune chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lisatune.cli.common import ANSWERS, AnswerTokens, AnyDevice, TrustRemoteCode, heavy_imports

CHAT = "Chat"


def chat(
    run: Annotated[str, typer.Argument(help="A run's folder, a model's folder, or a hub name.")],
    prompt: Annotated[str | None, typer.Option(help="Answer this one message and end.", rich_help_panel=CHAT)] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.", rich_help_panel=CHAT)] = None,
    tools: Annotated[
        Path | None,
        typer.Option(help="JSON file with a list of functions that the model may call.", rich_help_panel=CHAT),
    ] = None,
    max_new_tokens: AnswerTokens = 256,
    temperature: Annotated[
        float,
        typer.Option(min=0.0, help="How random answers are. 0: always the likeliest token.", rich_help_panel=ANSWERS),
    ] = 0.0,
    device: AnyDevice = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Chat with a trained model in the terminal.

    It remembers the conversation. An empty line or Ctrl-D ends it.

    Example:
        lisatune chat runs/a
        lisatune chat runs/a --prompt "What is LISA?" --max-new-tokens 64
    """
    from lisatune.data.tools import read_tools
    from lisatune.models.names import check_model_name, model_of

    check_model_name(model_of(run))
    with heavy_imports():
        from lisatune.models.chat import chat

    chat(
        run,
        prompt,
        system=system,
        tools=None if tools is None else read_tools(tools),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        device=device,
        trust_remote_code=trust_remote_code,
    )
