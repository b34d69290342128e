"""Where things are that tests start or read."""

from pathlib import Path

HELPERS = Path(__file__).parent
CHECKOUT = HELPERS.parents[1]
SHARED = CHECKOUT.parent / "shared"  # real data and models, next to a checkout; not everybody has them
