"""The KV store: a node that keeps KV blocks in shared memory, its clients, and the index.

    client.py values.py arena.py index.py     what workers and the gateway use
    server.py -> node.py                      calls, and what they do
    store.py shelves.py slots.py policy/      the books: pure, no bytes
    arena_file.py                             the bytes, and their recovery
    puller.py transport/                      blocks from other nodes
    publisher.py -> index.py                  the books' shadow in Redis

Nothing is imported here: the engine's process uses arena.py without gRPC.
"""
