"""Asks the index which KV nodes hold leading blocks of the request's tokens."""

from __future__ import annotations

import logging

from paceline.domain.blocks import chain_keys, salt_key
from paceline.domain.errors import UnavailableError
from paceline.gateway.context import RequestContext
from paceline.kvstore.index import BlockIndex
from paceline.process.spans import span

logger = logging.getLogger(__name__)


class LookupStep:
    """Longest stored prefix per node, in one round trip."""

    def __init__(self, index: BlockIndex) -> None:
        self._index = index

    async def __call__(self, ctx: RequestContext) -> None:
        """Fill `holders`; without Redis nobody holds anything."""
        spec, model = ctx.tokens(), ctx.card()
        longest = max((o.token_ids for o in ctx.outputs), key=len, default=[])
        # The last token is always computed, so a block that it completes is of no use.
        token_ids = [*spec.prompt_token_ids, *longest][:-1]
        key = salt_key(spec.cache_salt)
        keys = list(chain_keys(key, model.kv_root, token_ids, model.block_size))
        if not keys:
            ctx.holders = {}
            return
        with span("lookup", {"paceline.blocks": len(keys)}) as looking:
            try:
                ctx.holders = await self._index.lookup(model.kv_root, keys)
            except UnavailableError as error:
                ctx.holders = {}
                looking.fail(error.reason)
                logger.debug("lookup-failed", extra={"fields": {"error": error.message}})
            found = max(ctx.holders.values(), default=0)
            looking.set({"paceline.holders": len(ctx.holders), "paceline.found_blocks": found})
