"""Filters on a Chroma server: the part of them that Chroma evaluates, and the part that is left to us.

Chroma's `where` compares values that a row has; `$ne` and `$nin` hold for a row without the key, as here. It knows
neither parts of texts nor headings, paths by patterns or front matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from epic_rag_chroma.search.conditions import NUMERIC_KEYS, Combination, Comparison, Condition

__all__ = ["to_where"]

Where = dict[str, Any]

_OPERATORS: Mapping[str, str] = {
    "==": "$eq", "!=": "$ne", ">": "$gt", ">=": "$gte", "<": "$lt", "<=": "$lte", "in": "$in", "nin": "$nin",
}  # fmt: skip
# With these, a row that lacks the key is on the other side, as it must be.
_NEGATED: Mapping[str, Any] = {"==": "!=", "!=": "==", "in": "nin", "nin": "in"}
_COMPUTED = ("file_path", "file_name")


def to_where(conditions: tuple[Condition, ...]) -> tuple[Where | None, tuple[Condition, ...]]:
    """Split conditions, all of which must hold.

    Args:
        conditions: The conditions.

    Returns:
        What Chroma takes as `where`, None for no condition; and the conditions that it cannot evaluate.
    """
    translated, rest = [], []
    for condition in _flat(conditions):
        where = _translated(condition)
        if where is None:
            rest.append(condition)
        else:
            translated.append(where)
    return _joined("$and", translated), tuple(rest)


def _flat(conditions: tuple[Condition, ...]) -> list[Condition]:
    """Return the conditions with those of an inner `and` beside the others."""
    found: list[Condition] = []
    for condition in conditions:
        if isinstance(condition, Combination) and condition.condition == "and":
            found += _flat(condition.parts)
        else:
            found.append(condition)
    return found


def _translated(condition: Condition) -> Where | None:
    if isinstance(condition, Combination):
        negate = condition.condition == "not"
        parts = [_negated(part) if negate else part for part in condition.parts]
        wheres = [None if part is None else _translated(part) for part in parts]
        if not wheres or None in wheres:
            return None
        return _joined("$or" if condition.condition == "or" else "$and", [each for each in wheres if each is not None])
    operator = _OPERATORS.get(condition.operator)
    if operator is None or condition.of_front_matter or condition.key in _COMPUTED:
        return None
    value = condition.value
    values: list[Any] = list(value) if isinstance(value, tuple) else [value]
    if condition.key in NUMERIC_KEYS:
        # Stored as whole numbers, which Chroma compares with whole numbers only.
        if not all(isinstance(each, (int, float)) and float(each).is_integer() for each in values):
            return None
        values = [int(each) for each in values]
    elif not all(isinstance(each, str) and each.isascii() for each in values):
        return None  # equal in Unicode's composed form, which rows need not have
    if not values:
        return None
    return {condition.key: {operator: values if isinstance(value, tuple) else values[0]}}


def _negated(condition: Condition) -> Condition | None:
    if isinstance(condition, Combination) or condition.operator not in _NEGATED:
        return None
    return Comparison(condition.key, _NEGATED[condition.operator], condition.value)


def _joined(operator: str, parts: list[Where]) -> Where | None:
    if len(parts) < 2:
        return parts[0] if parts else None
    return {operator: parts}
