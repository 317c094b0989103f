from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvLayout(_message.Message):
    __slots__ = ("kv_root", "layout_version", "dtype", "block_size", "num_layers", "num_kv_heads", "head_dim", "block_bytes")
    KV_ROOT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_VERSION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    kv_root: bytes
    layout_version: int
    dtype: str
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_bytes: int
    def __init__(self, kv_root: _Optional[bytes] = ..., layout_version: _Optional[int] = ..., dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_bytes: _Optional[int] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("worker_id", "layout")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    layout: KvLayout
    def __init__(self, worker_id: _Optional[str] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("session_id", "node_id", "arena_path", "arena_bytes", "epoch")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ARENA_PATH_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    node_id: str
    arena_path: str
    arena_bytes: int
    epoch: int
    def __init__(self, session_id: _Optional[str] = ..., node_id: _Optional[str] = ..., arena_path: _Optional[str] = ..., arena_bytes: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class KvSlot(_message.Message):
    __slots__ = ("offset", "generation")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    offset: int
    generation: int
    def __init__(self, offset: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("session_id", "num_slots")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    num_slots: int
    def __init__(self, session_id: _Optional[str] = ..., num_slots: _Optional[int] = ...) -> None: ...

class ReserveResponse(_message.Message):
    __slots__ = ("slots",)
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedCompositeFieldContainer[KvSlot]
    def __init__(self, slots: _Optional[_Iterable[_Union[KvSlot, _Mapping]]] = ...) -> None: ...

class CommittedBlock(_message.Message):
    __slots__ = ("key", "slot", "checksum", "num_tokens", "is_request_scoped")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IS_REQUEST_SCOPED_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    slot: KvSlot
    checksum: int
    num_tokens: int
    is_request_scoped: bool
    def __init__(self, key: _Optional[bytes] = ..., slot: _Optional[_Union[KvSlot, _Mapping]] = ..., checksum: _Optional[int] = ..., num_tokens: _Optional[int] = ..., is_request_scoped: _Optional[bool] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("session_id", "blocks")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    blocks: _containers.RepeatedCompositeFieldContainer[CommittedBlock]
    def __init__(self, session_id: _Optional[str] = ..., blocks: _Optional[_Iterable[_Union[CommittedBlock, _Mapping]]] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("readable_keys",)
    READABLE_KEYS_FIELD_NUMBER: _ClassVar[int]
    readable_keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, readable_keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class AcquireRequest(_message.Message):
    __slots__ = ("session_id", "keys", "sources", "tail_key")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    TAIL_KEY_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    sources: _containers.RepeatedScalarFieldContainer[str]
    tail_key: bytes
    def __init__(self, session_id: _Optional[str] = ..., keys: _Optional[_Iterable[bytes]] = ..., sources: _Optional[_Iterable[str]] = ..., tail_key: _Optional[bytes] = ...) -> None: ...

class AcquiredBlock(_message.Message):
    __slots__ = ("key", "slot", "checksum", "num_tokens")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    slot: KvSlot
    checksum: int
    num_tokens: int
    def __init__(self, key: _Optional[bytes] = ..., slot: _Optional[_Union[KvSlot, _Mapping]] = ..., checksum: _Optional[int] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class AcquireResponse(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[AcquiredBlock]
    def __init__(self, blocks: _Optional[_Iterable[_Union[AcquiredBlock, _Mapping]]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("session_id", "keys", "corrupt_keys", "unused_slots")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_KEYS_FIELD_NUMBER: _ClassVar[int]
    UNUSED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    corrupt_keys: _containers.RepeatedScalarFieldContainer[bytes]
    unused_slots: _containers.RepeatedCompositeFieldContainer[KvSlot]
    def __init__(self, session_id: _Optional[str] = ..., keys: _Optional[_Iterable[bytes]] = ..., corrupt_keys: _Optional[_Iterable[bytes]] = ..., unused_slots: _Optional[_Iterable[_Union[KvSlot, _Mapping]]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("layout", "keys", "source")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    layout: KvLayout
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    source: str
    def __init__(self, layout: _Optional[_Union[KvLayout, _Mapping]] = ..., keys: _Optional[_Iterable[bytes]] = ..., source: _Optional[str] = ...) -> None: ...

class PullResponse(_message.Message):
    __slots__ = ("num_readable",)
    NUM_READABLE_FIELD_NUMBER: _ClassVar[int]
    num_readable: int
    def __init__(self, num_readable: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("layout", "keys")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    layout: KvLayout
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, layout: _Optional[_Union[KvLayout, _Mapping]] = ..., keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("key", "checksum", "num_tokens", "is_request_scoped", "data")
    KEY_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IS_REQUEST_SCOPED_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    checksum: int
    num_tokens: int
    is_request_scoped: bool
    data: bytes
    def __init__(self, key: _Optional[bytes] = ..., checksum: _Optional[int] = ..., num_tokens: _Optional[int] = ..., is_request_scoped: _Optional[bool] = ..., data: _Optional[bytes] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("node_id", "num_blocks", "used_bytes", "capacity_bytes", "num_pinned_blocks", "num_reserved_slots", "committed_blocks", "acquired_blocks", "acquired_bytes", "pulled_blocks", "pulled_bytes", "evicted_blocks", "corrupt_blocks", "num_sessions")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_PINNED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_RESERVED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ACQUIRED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ACQUIRED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PULLED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PULLED_BYTES_FIELD_NUMBER: _ClassVar[int]
    EVICTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    num_blocks: int
    used_bytes: int
    capacity_bytes: int
    num_pinned_blocks: int
    num_reserved_slots: int
    committed_blocks: int
    acquired_blocks: int
    acquired_bytes: int
    pulled_blocks: int
    pulled_bytes: int
    evicted_blocks: int
    corrupt_blocks: int
    num_sessions: int
    def __init__(self, node_id: _Optional[str] = ..., num_blocks: _Optional[int] = ..., used_bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., num_pinned_blocks: _Optional[int] = ..., num_reserved_slots: _Optional[int] = ..., committed_blocks: _Optional[int] = ..., acquired_blocks: _Optional[int] = ..., acquired_bytes: _Optional[int] = ..., pulled_blocks: _Optional[int] = ..., pulled_bytes: _Optional[int] = ..., evicted_blocks: _Optional[int] = ..., corrupt_blocks: _Optional[int] = ..., num_sessions: _Optional[int] = ...) -> None: ...
