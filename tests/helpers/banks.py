"""Demonstration banks for tests."""

from __future__ import annotations

from epic_rag import DemonstrationBank, EpicEncoder


def embedded(bank: DemonstrationBank, *encoders: EpicEncoder) -> DemonstrationBank:
    """Embed a bank in place and return it."""
    bank.embed(*encoders)
    return bank
