"""A worker changes what its engine drafts with, across the process border."""

from __future__ import annotations

import asyncio
import shutil
import time
from contextlib import suppress
from pathlib import Path

from paceline.domain.drafts import DraftState, HeldDraft, StagedDraft
from paceline.domain.request import GenerationSpec, SamplingParams
from paceline.engine.options import EngineOptions
from paceline.process.metrics import Metrics
from paceline.worker.bridge import EngineBridge
from tests.checkpoints import random_checkpoint
from tests.waiting import until


async def test_a_running_worker_gets_drafts_and_loses_them(tmp_path: Path) -> None:
    target = random_checkpoint("llama", tmp_path / "target", initializer_range=1.0)
    other = shutil.copytree(target, tmp_path / "other")
    options = EngineOptions(str(target), num_kv_blocks=64, drafters=("trie", "model"))
    bridge = EngineBridge(Metrics("test"), max_requests=4)
    states: list[DraftState] = []
    bridge.on_draft_state = states.append
    await bridge.start(options.to_json())
    running = asyncio.create_task(bridge.run(60.0))
    try:
        assert (bridge.drafters, bridge.draft_version) == (("trie",), "")

        async def change(*drafts: StagedDraft) -> DraftState:
            count = len(states)
            bridge.change_drafts(drafts)
            await until(lambda: len(states) > count, 30)
            return states[-1]

        # Nothing runs: the engine must not wait for a request.
        state = await change(
            StagedDraft("model", "v1", str(target), 1.0),
            StagedDraft("model:code", "c1", str(other), 1.0),
        )
        assert state.held == (HeldDraft("model", "v1"), HeldDraft("model:code", "c1"))
        assert (state.num_swaps, state.error) == (1, "")
        await until(lambda: bridge.draft_version == "v1+c1", 10)
        assert set(bridge.drafters) == {"trie", "model", "trie+model", "model:code"}

        versions = await _versions_used(bridge, "model:code")
        assert versions == {"c1"}
        failed = await change(StagedDraft("model", "v2", str(tmp_path / "none"), 1.0))
        assert failed.error and failed.held == state.held
        assert (await change()).held == ()
        await until(lambda: bridge.drafters == ("trie",), 10)
        assert bridge.draft_version == ""
        assert await _versions_used(bridge, "model:code") == set()
    finally:
        await bridge.close()
        with suppress(Exception):
            await running


async def _versions_used(bridge: EngineBridge, drafter: str) -> set[str]:
    """Run a request and return the versions that drafted for it."""
    spec = GenerationSpec(
        f"r{time.monotonic()}",
        tuple(range(10, 30)),
        SamplingParams(temperature=0.0),
        max_tokens=12,
        ignore_eos=True,
        speculation=drafter,
    )
    async with asyncio.timeout(30):
        updates = [u async for u in bridge.decode(spec, (), {}, frozenset())]
    chunks = [chunk for update in updates for chunk in update.chunks]
    assert sum(len(chunk.token_ids) for chunk in chunks) == 12
    return {chunk.draft_version for chunk in chunks if chunk.drafted_tokens}
