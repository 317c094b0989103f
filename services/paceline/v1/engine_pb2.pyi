from paceline.v1 import drafts_pb2 as _drafts_pb2
from paceline.v1 import kvstore_pb2 as _kvstore_pb2
from paceline.v1 import samples_pb2 as _samples_pb2
from paceline.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EngineCommand(_message.Message):
    __slots__ = ("submit", "cancel", "kv_load", "kv_grant", "arena", "check_integrity", "ping", "drafts")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    KV_LOAD_FIELD_NUMBER: _ClassVar[int]
    KV_GRANT_FIELD_NUMBER: _ClassVar[int]
    ARENA_FIELD_NUMBER: _ClassVar[int]
    CHECK_INTEGRITY_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    submit: SubmitRequest
    cancel: CancelRequest
    kv_load: KvLoad
    kv_grant: KvGrant
    arena: ArenaChange
    check_integrity: CheckIntegrity
    ping: Ping
    drafts: DraftChange
    def __init__(self, submit: _Optional[_Union[SubmitRequest, _Mapping]] = ..., cancel: _Optional[_Union[CancelRequest, _Mapping]] = ..., kv_load: _Optional[_Union[KvLoad, _Mapping]] = ..., kv_grant: _Optional[_Union[KvGrant, _Mapping]] = ..., arena: _Optional[_Union[ArenaChange, _Mapping]] = ..., check_integrity: _Optional[_Union[CheckIntegrity, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., drafts: _Optional[_Union[DraftChange, _Mapping]] = ...) -> None: ...

class EngineEvent(_message.Message):
    __slots__ = ("ready", "step", "kv_lookup", "kv_loaded", "kv_saved", "failed", "integrity", "pong", "learnings", "drafts")
    READY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    KV_LOOKUP_FIELD_NUMBER: _ClassVar[int]
    KV_LOADED_FIELD_NUMBER: _ClassVar[int]
    KV_SAVED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    INTEGRITY_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    LEARNINGS_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    ready: EngineReady
    step: StepOutput
    kv_lookup: KvLookup
    kv_loaded: KvLoaded
    kv_saved: KvSaved
    failed: RequestFailed
    integrity: IntegrityReport
    pong: Pong
    learnings: Learnings
    drafts: _drafts_pb2.DraftState
    def __init__(self, ready: _Optional[_Union[EngineReady, _Mapping]] = ..., step: _Optional[_Union[StepOutput, _Mapping]] = ..., kv_lookup: _Optional[_Union[KvLookup, _Mapping]] = ..., kv_loaded: _Optional[_Union[KvLoaded, _Mapping]] = ..., kv_saved: _Optional[_Union[KvSaved, _Mapping]] = ..., failed: _Optional[_Union[RequestFailed, _Mapping]] = ..., integrity: _Optional[_Union[IntegrityReport, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ..., learnings: _Optional[_Union[Learnings, _Mapping]] = ..., drafts: _Optional[_Union[_drafts_pb2.DraftState, _Mapping]] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("spec", "is_prefill_only", "resumed", "finished_indices", "fleet_request_id", "is_traced")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    IS_PREFILL_ONLY_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_INDICES_FIELD_NUMBER: _ClassVar[int]
    FLEET_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    IS_TRACED_FIELD_NUMBER: _ClassVar[int]
    spec: _worker_pb2.GenerationSpec
    is_prefill_only: bool
    resumed: _containers.RepeatedCompositeFieldContainer[_worker_pb2.ResumedOutput]
    finished_indices: _containers.RepeatedScalarFieldContainer[int]
    fleet_request_id: str
    is_traced: bool
    def __init__(self, spec: _Optional[_Union[_worker_pb2.GenerationSpec, _Mapping]] = ..., is_prefill_only: _Optional[bool] = ..., resumed: _Optional[_Iterable[_Union[_worker_pb2.ResumedOutput, _Mapping]]] = ..., finished_indices: _Optional[_Iterable[int]] = ..., fleet_request_id: _Optional[str] = ..., is_traced: _Optional[bool] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("request_id", "index")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    index: int
    def __init__(self, request_id: _Optional[str] = ..., index: _Optional[int] = ...) -> None: ...

class KvLookup(_message.Message):
    __slots__ = ("lookup_id", "request_id", "keys", "tail_key")
    LOOKUP_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TAIL_KEY_FIELD_NUMBER: _ClassVar[int]
    lookup_id: int
    request_id: str
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    tail_key: bytes
    def __init__(self, lookup_id: _Optional[int] = ..., request_id: _Optional[str] = ..., keys: _Optional[_Iterable[bytes]] = ..., tail_key: _Optional[bytes] = ...) -> None: ...

class KvLoad(_message.Message):
    __slots__ = ("lookup_id", "blocks")
    LOOKUP_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    lookup_id: int
    blocks: _containers.RepeatedCompositeFieldContainer[_kvstore_pb2.AcquiredBlock]
    def __init__(self, lookup_id: _Optional[int] = ..., blocks: _Optional[_Iterable[_Union[_kvstore_pb2.AcquiredBlock, _Mapping]]] = ...) -> None: ...

class KvLoaded(_message.Message):
    __slots__ = ("lookup_id", "corrupt_keys", "num_blocks", "num_bytes", "started_s", "ended_s")
    LOOKUP_ID_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_KEYS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    STARTED_S_FIELD_NUMBER: _ClassVar[int]
    ENDED_S_FIELD_NUMBER: _ClassVar[int]
    lookup_id: int
    corrupt_keys: _containers.RepeatedScalarFieldContainer[bytes]
    num_blocks: int
    num_bytes: int
    started_s: float
    ended_s: float
    def __init__(self, lookup_id: _Optional[int] = ..., corrupt_keys: _Optional[_Iterable[bytes]] = ..., num_blocks: _Optional[int] = ..., num_bytes: _Optional[int] = ..., started_s: _Optional[float] = ..., ended_s: _Optional[float] = ...) -> None: ...

class KvGrant(_message.Message):
    __slots__ = ("slots",)
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedCompositeFieldContainer[_kvstore_pb2.KvSlot]
    def __init__(self, slots: _Optional[_Iterable[_Union[_kvstore_pb2.KvSlot, _Mapping]]] = ...) -> None: ...

class KvSaved(_message.Message):
    __slots__ = ("request_id", "blocks", "started_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STARTED_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    blocks: _containers.RepeatedCompositeFieldContainer[_kvstore_pb2.CommittedBlock]
    started_s: float
    def __init__(self, request_id: _Optional[str] = ..., blocks: _Optional[_Iterable[_Union[_kvstore_pb2.CommittedBlock, _Mapping]]] = ..., started_s: _Optional[float] = ...) -> None: ...

class ArenaChange(_message.Message):
    __slots__ = ("path", "num_bytes")
    PATH_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    path: str
    num_bytes: int
    def __init__(self, path: _Optional[str] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class EngineReady(_message.Message):
    __slots__ = ("layout", "model_digest", "max_context_tokens", "vocab_size", "num_kv_blocks", "step_cost", "pid", "drafters", "draft_version")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STEP_COST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DRAFTERS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_VERSION_FIELD_NUMBER: _ClassVar[int]
    layout: _kvstore_pb2.KvLayout
    model_digest: str
    max_context_tokens: int
    vocab_size: int
    num_kv_blocks: int
    step_cost: StepCost
    pid: int
    drafters: _containers.RepeatedScalarFieldContainer[str]
    draft_version: str
    def __init__(self, layout: _Optional[_Union[_kvstore_pb2.KvLayout, _Mapping]] = ..., model_digest: _Optional[str] = ..., max_context_tokens: _Optional[int] = ..., vocab_size: _Optional[int] = ..., num_kv_blocks: _Optional[int] = ..., step_cost: _Optional[_Union[StepCost, _Mapping]] = ..., pid: _Optional[int] = ..., drafters: _Optional[_Iterable[str]] = ..., draft_version: _Optional[str] = ...) -> None: ...

class StepCost(_message.Message):
    __slots__ = ("base_s", "row_s", "token_s", "context_s", "curves", "floor_s")
    BASE_S_FIELD_NUMBER: _ClassVar[int]
    ROW_S_FIELD_NUMBER: _ClassVar[int]
    TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_S_FIELD_NUMBER: _ClassVar[int]
    CURVES_FIELD_NUMBER: _ClassVar[int]
    FLOOR_S_FIELD_NUMBER: _ClassVar[int]
    base_s: float
    row_s: float
    token_s: float
    context_s: float
    curves: StepCurves
    floor_s: float
    def __init__(self, base_s: _Optional[float] = ..., row_s: _Optional[float] = ..., token_s: _Optional[float] = ..., context_s: _Optional[float] = ..., curves: _Optional[_Union[StepCurves, _Mapping]] = ..., floor_s: _Optional[float] = ...) -> None: ...

class StepCurves(_message.Message):
    __slots__ = ("tokens", "rows", "contexts", "prefill_row_s", "prefill_context_s", "prefill_read_s", "nodes", "node_context_s")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ROW_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_CONTEXT_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_READ_S_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    NODE_CONTEXT_S_FIELD_NUMBER: _ClassVar[int]
    tokens: Curve
    rows: Curve
    contexts: Curve
    prefill_row_s: float
    prefill_context_s: float
    prefill_read_s: float
    nodes: Curve
    node_context_s: float
    def __init__(self, tokens: _Optional[_Union[Curve, _Mapping]] = ..., rows: _Optional[_Union[Curve, _Mapping]] = ..., contexts: _Optional[_Union[Curve, _Mapping]] = ..., prefill_row_s: _Optional[float] = ..., prefill_context_s: _Optional[float] = ..., prefill_read_s: _Optional[float] = ..., nodes: _Optional[_Union[Curve, _Mapping]] = ..., node_context_s: _Optional[float] = ...) -> None: ...

class Curve(_message.Message):
    __slots__ = ("counts", "seconds")
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    counts: _containers.RepeatedScalarFieldContainer[int]
    seconds: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, counts: _Optional[_Iterable[int]] = ..., seconds: _Optional[_Iterable[float]] = ...) -> None: ...

class RequestOutput(_message.Message):
    __slots__ = ("request_id", "chunks", "local_hit_tokens", "store_hit_tokens", "computed_tokens", "is_finished", "rounds")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STORE_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    chunks: _containers.RepeatedCompositeFieldContainer[_worker_pb2.TokenChunk]
    local_hit_tokens: int
    store_hit_tokens: int
    computed_tokens: int
    is_finished: bool
    rounds: _containers.RepeatedCompositeFieldContainer[DraftRound]
    def __init__(self, request_id: _Optional[str] = ..., chunks: _Optional[_Iterable[_Union[_worker_pb2.TokenChunk, _Mapping]]] = ..., local_hit_tokens: _Optional[int] = ..., store_hit_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., is_finished: _Optional[bool] = ..., rounds: _Optional[_Iterable[_Union[DraftRound, _Mapping]]] = ...) -> None: ...

class DraftRound(_message.Message):
    __slots__ = ("drafter", "num_drafted", "num_accepted")
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFTED_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    drafter: str
    num_drafted: int
    num_accepted: int
    def __init__(self, drafter: _Optional[str] = ..., num_drafted: _Optional[int] = ..., num_accepted: _Optional[int] = ...) -> None: ...

class StepOutput(_message.Message):
    __slots__ = ("outputs", "load", "started_s", "ended_s")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    STARTED_S_FIELD_NUMBER: _ClassVar[int]
    ENDED_S_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[RequestOutput]
    load: EngineLoad
    started_s: float
    ended_s: float
    def __init__(self, outputs: _Optional[_Iterable[_Union[RequestOutput, _Mapping]]] = ..., load: _Optional[_Union[EngineLoad, _Mapping]] = ..., started_s: _Optional[float] = ..., ended_s: _Optional[float] = ...) -> None: ...

class EngineLoad(_message.Message):
    __slots__ = ("num_waiting", "num_running", "num_pending_prefill_tokens", "num_free_blocks", "num_total_blocks", "last_step_s", "num_preemptions", "num_steps", "num_context_tokens", "num_evictions", "speculation", "num_cached_blocks")
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_PENDING_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_S_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_waiting: int
    num_running: int
    num_pending_prefill_tokens: int
    num_free_blocks: int
    num_total_blocks: int
    last_step_s: float
    num_preemptions: int
    num_steps: int
    num_context_tokens: int
    num_evictions: int
    speculation: SpeculationReport
    num_cached_blocks: int
    def __init__(self, num_waiting: _Optional[int] = ..., num_running: _Optional[int] = ..., num_pending_prefill_tokens: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., num_total_blocks: _Optional[int] = ..., last_step_s: _Optional[float] = ..., num_preemptions: _Optional[int] = ..., num_steps: _Optional[int] = ..., num_context_tokens: _Optional[int] = ..., num_evictions: _Optional[int] = ..., speculation: _Optional[_Union[SpeculationReport, _Mapping]] = ..., num_cached_blocks: _Optional[int] = ...) -> None: ...

class SpeculationReport(_message.Message):
    __slots__ = ("drafters", "decisions", "predicted_rate", "off_rate", "draft_version")
    DRAFTERS_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_RATE_FIELD_NUMBER: _ClassVar[int]
    OFF_RATE_FIELD_NUMBER: _ClassVar[int]
    DRAFT_VERSION_FIELD_NUMBER: _ClassVar[int]
    drafters: _containers.RepeatedCompositeFieldContainer[DrafterReport]
    decisions: _containers.RepeatedCompositeFieldContainer[SpeculationDecision]
    predicted_rate: float
    off_rate: float
    draft_version: str
    def __init__(self, drafters: _Optional[_Iterable[_Union[DrafterReport, _Mapping]]] = ..., decisions: _Optional[_Iterable[_Union[SpeculationDecision, _Mapping]]] = ..., predicted_rate: _Optional[float] = ..., off_rate: _Optional[float] = ..., draft_version: _Optional[str] = ...) -> None: ...

class DrafterReport(_message.Message):
    __slots__ = ("name", "version", "rounds", "drafted", "accepted", "emitted", "draft_s", "tried_by_depth", "accepted_by_depth", "state_bytes", "state_nodes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    EMITTED_FIELD_NUMBER: _ClassVar[int]
    DRAFT_S_FIELD_NUMBER: _ClassVar[int]
    TRIED_BY_DEPTH_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_BY_DEPTH_FIELD_NUMBER: _ClassVar[int]
    STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STATE_NODES_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    rounds: int
    drafted: int
    accepted: int
    emitted: int
    draft_s: float
    tried_by_depth: _containers.RepeatedScalarFieldContainer[int]
    accepted_by_depth: _containers.RepeatedScalarFieldContainer[int]
    state_bytes: int
    state_nodes: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., rounds: _Optional[int] = ..., drafted: _Optional[int] = ..., accepted: _Optional[int] = ..., emitted: _Optional[int] = ..., draft_s: _Optional[float] = ..., tried_by_depth: _Optional[_Iterable[int]] = ..., accepted_by_depth: _Optional[_Iterable[int]] = ..., state_bytes: _Optional[int] = ..., state_nodes: _Optional[int] = ...) -> None: ...

class SpeculationDecision(_message.Message):
    __slots__ = ("drafter", "reason", "count")
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    drafter: str
    reason: str
    count: int
    def __init__(self, drafter: _Optional[str] = ..., reason: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class RequestFailed(_message.Message):
    __slots__ = ("request_id", "reason", "message")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    reason: str
    message: str
    def __init__(self, request_id: _Optional[str] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class CheckIntegrity(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class IntegrityReport(_message.Message):
    __slots__ = ("violations", "num_requests", "num_held_blocks")
    VIOLATIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    violations: _containers.RepeatedScalarFieldContainer[str]
    num_requests: int
    num_held_blocks: int
    def __init__(self, violations: _Optional[_Iterable[str]] = ..., num_requests: _Optional[int] = ..., num_held_blocks: _Optional[int] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Pong(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DraftChange(_message.Message):
    __slots__ = ("drafts",)
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    drafts: _containers.RepeatedCompositeFieldContainer[StagedDraft]
    def __init__(self, drafts: _Optional[_Iterable[_Union[StagedDraft, _Mapping]]] = ...) -> None: ...

class StagedDraft(_message.Message):
    __slots__ = ("drafter", "version", "directory", "share")
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    drafter: str
    version: str
    directory: str
    share: float
    def __init__(self, drafter: _Optional[str] = ..., version: _Optional[str] = ..., directory: _Optional[str] = ..., share: _Optional[float] = ...) -> None: ...

class Learnings(_message.Message):
    __slots__ = ("samples", "outcomes", "capture_s")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_S_FIELD_NUMBER: _ClassVar[int]
    samples: _containers.RepeatedCompositeFieldContainer[_samples_pb2.Sample]
    outcomes: _containers.RepeatedCompositeFieldContainer[_samples_pb2.SequenceOutcome]
    capture_s: float
    def __init__(self, samples: _Optional[_Iterable[_Union[_samples_pb2.Sample, _Mapping]]] = ..., outcomes: _Optional[_Iterable[_Union[_samples_pb2.SequenceOutcome, _Mapping]]] = ..., capture_s: _Optional[float] = ...) -> None: ...
