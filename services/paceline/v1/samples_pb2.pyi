from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Sample(_message.Message):
    __slots__ = ("tenant", "domain", "draft_version", "temperature", "first_position", "token_ids", "num_context", "top", "top_ids", "top_probs", "tail_mass", "origins", "hidden")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    DRAFT_VERSION_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_PROBS_FIELD_NUMBER: _ClassVar[int]
    TAIL_MASS_FIELD_NUMBER: _ClassVar[int]
    ORIGINS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    tenant: bytes
    domain: str
    draft_version: str
    temperature: float
    first_position: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_context: int
    top: int
    top_ids: bytes
    top_probs: bytes
    tail_mass: bytes
    origins: bytes
    hidden: bytes
    def __init__(self, tenant: _Optional[bytes] = ..., domain: _Optional[str] = ..., draft_version: _Optional[str] = ..., temperature: _Optional[float] = ..., first_position: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., num_context: _Optional[int] = ..., top: _Optional[int] = ..., top_ids: _Optional[bytes] = ..., top_probs: _Optional[bytes] = ..., tail_mass: _Optional[bytes] = ..., origins: _Optional[bytes] = ..., hidden: _Optional[bytes] = ...) -> None: ...

class SequenceOutcome(_message.Message):
    __slots__ = ("drafter", "draft_version", "tenant", "domain", "num_rounds", "num_tried", "num_accepted", "num_emitted")
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    DRAFT_VERSION_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    NUM_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    NUM_TRIED_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    NUM_EMITTED_FIELD_NUMBER: _ClassVar[int]
    drafter: str
    draft_version: str
    tenant: bytes
    domain: str
    num_rounds: int
    num_tried: int
    num_accepted: int
    num_emitted: int
    def __init__(self, drafter: _Optional[str] = ..., draft_version: _Optional[str] = ..., tenant: _Optional[bytes] = ..., domain: _Optional[str] = ..., num_rounds: _Optional[int] = ..., num_tried: _Optional[int] = ..., num_accepted: _Optional[int] = ..., num_emitted: _Optional[int] = ...) -> None: ...
