"""Where things are that tests start or read."""

import os
from pathlib import Path

HELPERS = Path(__file__).parent
CHECKOUT = HELPERS.parents[1]
SHARED = CHECKOUT.parent / "shared"  # real data and models, next to a checkout; not everybody has them
# a checkout of llama.cpp; `make .venv/.dev` puts its converter alone there
LLAMA_CPP = Path(os.environ.get("LLAMA_CPP", CHECKOUT / ".venv" / "llama.cpp"))
