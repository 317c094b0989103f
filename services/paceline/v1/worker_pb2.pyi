from paceline.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerationSpec(_message.Message):
    __slots__ = ("request_id", "cache_salt", "prompt_token_ids", "sampling", "max_tokens", "stop_token_ids", "ignore_eos", "logprobs", "n", "priority", "speculation", "is_seed_drawn", "domain", "allow_training")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    IS_SEED_DRAWN_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    ALLOW_TRAINING_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    cache_salt: bytes
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _inference_pb2.SamplingParams
    max_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    logprobs: int
    n: int
    priority: int
    speculation: str
    is_seed_drawn: bool
    domain: str
    allow_training: bool
    def __init__(self, request_id: _Optional[str] = ..., cache_salt: _Optional[bytes] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_inference_pb2.SamplingParams, _Mapping]] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., logprobs: _Optional[int] = ..., n: _Optional[int] = ..., priority: _Optional[int] = ..., speculation: _Optional[str] = ..., is_seed_drawn: _Optional[bool] = ..., domain: _Optional[str] = ..., allow_training: _Optional[bool] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("spec", "kv_sources")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    KV_SOURCES_FIELD_NUMBER: _ClassVar[int]
    spec: GenerationSpec
    kv_sources: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, spec: _Optional[_Union[GenerationSpec, _Mapping]] = ..., kv_sources: _Optional[_Iterable[str]] = ...) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("published_keys", "published_tokens", "local_hit_tokens", "store_hit_tokens", "is_last")
    PUBLISHED_KEYS_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STORE_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_FIELD_NUMBER: _ClassVar[int]
    published_keys: _containers.RepeatedScalarFieldContainer[bytes]
    published_tokens: int
    local_hit_tokens: int
    store_hit_tokens: int
    is_last: bool
    def __init__(self, published_keys: _Optional[_Iterable[bytes]] = ..., published_tokens: _Optional[int] = ..., local_hit_tokens: _Optional[int] = ..., store_hit_tokens: _Optional[int] = ..., is_last: _Optional[bool] = ...) -> None: ...

class ResumedOutput(_message.Message):
    __slots__ = ("index", "token_ids")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("spec", "kv_sources", "resumed", "finished_indices")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    KV_SOURCES_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_INDICES_FIELD_NUMBER: _ClassVar[int]
    spec: GenerationSpec
    kv_sources: _containers.RepeatedScalarFieldContainer[str]
    resumed: _containers.RepeatedCompositeFieldContainer[ResumedOutput]
    finished_indices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, spec: _Optional[_Union[GenerationSpec, _Mapping]] = ..., kv_sources: _Optional[_Iterable[str]] = ..., resumed: _Optional[_Iterable[_Union[ResumedOutput, _Mapping]]] = ..., finished_indices: _Optional[_Iterable[int]] = ...) -> None: ...

class TokenChunk(_message.Message):
    __slots__ = ("index", "token_ids", "logprobs", "finish_reason", "target_steps", "drafted_tokens", "accepted_tokens", "draft_version")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    TARGET_STEPS_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_VERSION_FIELD_NUMBER: _ClassVar[int]
    index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenLogprobs]
    finish_reason: _inference_pb2.FinishReason
    target_steps: int
    drafted_tokens: int
    accepted_tokens: int
    draft_version: str
    def __init__(self, index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_inference_pb2.TokenLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., target_steps: _Optional[int] = ..., drafted_tokens: _Optional[int] = ..., accepted_tokens: _Optional[int] = ..., draft_version: _Optional[str] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("chunks", "local_hit_tokens", "store_hit_tokens")
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STORE_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    chunks: _containers.RepeatedCompositeFieldContainer[TokenChunk]
    local_hit_tokens: int
    store_hit_tokens: int
    def __init__(self, chunks: _Optional[_Iterable[_Union[TokenChunk, _Mapping]]] = ..., local_hit_tokens: _Optional[int] = ..., store_hit_tokens: _Optional[int] = ...) -> None: ...

class StopSequenceRequest(_message.Message):
    __slots__ = ("request_id", "index")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    index: int
    def __init__(self, request_id: _Optional[str] = ..., index: _Optional[int] = ...) -> None: ...

class StopSequenceResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckIntegrityRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckIntegrityResponse(_message.Message):
    __slots__ = ("violations", "num_requests", "num_held_blocks", "num_streams")
    VIOLATIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_STREAMS_FIELD_NUMBER: _ClassVar[int]
    violations: _containers.RepeatedScalarFieldContainer[str]
    num_requests: int
    num_held_blocks: int
    num_streams: int
    def __init__(self, violations: _Optional[_Iterable[str]] = ..., num_requests: _Optional[int] = ..., num_held_blocks: _Optional[int] = ..., num_streams: _Optional[int] = ...) -> None: ...
