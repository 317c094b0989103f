"""What a node did since it started; counted where it happens, reported by GetStats and metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class NodeCounters:
    """Blocks and bytes since start."""

    committed_blocks: int = 0
    """Committed by workers."""
    acquired_blocks: int = 0
    """Handed to workers."""
    acquired_bytes: int = 0
    missed_blocks: int = 0
    """Asked for by workers and not to be had."""
    pulled_blocks: int = 0
    """Received from other nodes."""
    pulled_bytes: int = 0
    served_blocks: int = 0
    """Sent to other nodes."""
    promised_blocks: int = 0
    """That the index promised to another node and that were not there."""
    corrupt_blocks: int = 0
    """Whose bytes did not match their checksum."""
    failed_pulls: int = 0
    """Fetches that ended with an error or too late."""
