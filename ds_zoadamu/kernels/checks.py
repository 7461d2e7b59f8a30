"""Checks of the numbers that every compiled backend is given; tensors are checked by each, for its own device."""

from .types import SignTable

MAX_DIRECTIONS = 1024
"""Of signs at one step: the Philox counters of more would be those of rounding bits."""


def check_position(key: tuple[int, int], start: int, numel: int) -> None:
    """Raises ValueError for a key that is not two 32-bit words, or flat indices outside 0 <= i < 2**63."""
    if len(key) != 2 or not all(0 <= word < 1 << 32 for word in key):
        raise ValueError(f"key must be two words in 0 <= word < 2**32, got {key}")
    if start < 0 or start + numel > 1 << 63:
        raise ValueError(f"flat indices must be in 0 <= i < 2**63, got start={start} and {numel} elements")


def check_step(step: int) -> None:
    """Raises ValueError for a step that is not one 32-bit word."""
    if not 0 <= step < 1 << 32:
        raise ValueError(f"step must be in 0 <= step < 2**32, got {step}")


def check_direction(direction: int) -> None:
    """Raises ValueError for a direction of signs that there is not."""
    if not 0 <= direction < MAX_DIRECTIONS:
        raise ValueError(f"direction must be in 0 <= direction < {MAX_DIRECTIONS}, got {direction}")


def check_table(table: SignTable) -> None:
    """Raises ValueError for a table that is not of whole rows for the directions there are."""
    if not 1 <= len(table.rows) <= MAX_DIRECTIONS // 8 or any(len(row) != 32 for row in table.rows):
        raise ValueError(f"a table has 1 to {MAX_DIRECTIONS // 8} rows of 32, got {[len(row) for row in table.rows]}")
