"""Channels to workers and KV nodes: one per address, open while the address is of use.

A channel under a running call is never closed, also when its process has left the fleet: the
call ends by itself, or fails by itself. fleet.py owns the one object.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from contextlib import contextmanager

import grpc

from paceline.rpc.channel import open_channel


class Channels:
    """Open channels by address."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._num_users: Counter[str] = Counter()

    @contextmanager
    def use(self, address: str) -> Iterator[grpc.aio.Channel]:
        """Lend the channel to an address, opened on first use, for the time of one call."""
        if address not in self._channels:
            self._channels[address] = open_channel(address)
        self._num_users[address] += 1
        try:
            yield self._channels[address]
        finally:
            self._num_users[address] -= 1
            if not self._num_users[address]:
                del self._num_users[address]

    def connect(self, address: str) -> bool:
        """Tell whether a connection to an address stands; start it if it does not."""
        with self.use(address) as channel:
            state = channel.get_state(try_to_connect=True)
        return state is grpc.ChannelConnectivity.READY

    async def retain(self, addresses: Container[str]) -> None:
        """Close the unused channels to all addresses but these."""
        for address in list(self._channels):
            if address not in addresses and address not in self._num_users:
                await self._channels.pop(address).close()

    async def close(self) -> None:
        """Close all channels; running calls are cancelled."""
        while self._channels:
            _, channel = self._channels.popitem()
            await channel.close()
