from paceline.v1 import samples_pb2 as _samples_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DraftStage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DRAFT_STAGE_UNSPECIFIED: _ClassVar[DraftStage]
    DRAFT_STAGE_CANDIDATE: _ClassVar[DraftStage]
    DRAFT_STAGE_REFUSED: _ClassVar[DraftStage]
    DRAFT_STAGE_CANARY: _ClassVar[DraftStage]
    DRAFT_STAGE_ACTIVE: _ClassVar[DraftStage]
    DRAFT_STAGE_RETIRED: _ClassVar[DraftStage]
    DRAFT_STAGE_ROLLED_BACK: _ClassVar[DraftStage]
DRAFT_STAGE_UNSPECIFIED: DraftStage
DRAFT_STAGE_CANDIDATE: DraftStage
DRAFT_STAGE_REFUSED: DraftStage
DRAFT_STAGE_CANARY: DraftStage
DRAFT_STAGE_ACTIVE: DraftStage
DRAFT_STAGE_RETIRED: DraftStage
DRAFT_STAGE_ROLLED_BACK: DraftStage

class AttendRequest(_message.Message):
    __slots__ = ("worker_id", "model_digest", "machine", "slack", "outcomes", "state")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    SLACK_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    model_digest: str
    machine: str
    slack: Slack
    outcomes: _containers.RepeatedCompositeFieldContainer[_samples_pb2.SequenceOutcome]
    state: DraftState
    def __init__(self, worker_id: _Optional[str] = ..., model_digest: _Optional[str] = ..., machine: _Optional[str] = ..., slack: _Optional[_Union[Slack, _Mapping]] = ..., outcomes: _Optional[_Iterable[_Union[_samples_pb2.SequenceOutcome, _Mapping]]] = ..., state: _Optional[_Union[DraftState, _Mapping]] = ...) -> None: ...

class Slack(_message.Message):
    __slots__ = ("num_running", "num_waiting", "threads", "predicted_step_s", "last_step_s", "itl_target_s")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_STEP_S_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_S_FIELD_NUMBER: _ClassVar[int]
    ITL_TARGET_S_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    threads: int
    predicted_step_s: float
    last_step_s: float
    itl_target_s: float
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., threads: _Optional[int] = ..., predicted_step_s: _Optional[float] = ..., last_step_s: _Optional[float] = ..., itl_target_s: _Optional[float] = ...) -> None: ...

class DraftState(_message.Message):
    __slots__ = ("held", "num_swaps", "max_swap_stall_s", "error")
    HELD_FIELD_NUMBER: _ClassVar[int]
    NUM_SWAPS_FIELD_NUMBER: _ClassVar[int]
    MAX_SWAP_STALL_S_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    held: _containers.RepeatedCompositeFieldContainer[HeldDraft]
    num_swaps: int
    max_swap_stall_s: float
    error: str
    def __init__(self, held: _Optional[_Iterable[_Union[HeldDraft, _Mapping]]] = ..., num_swaps: _Optional[int] = ..., max_swap_stall_s: _Optional[float] = ..., error: _Optional[str] = ...) -> None: ...

class HeldDraft(_message.Message):
    __slots__ = ("drafter", "version")
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    drafter: str
    version: str
    def __init__(self, drafter: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class AttendResponse(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[DraftEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[DraftEntry, _Mapping]]] = ...) -> None: ...

class DraftEntry(_message.Message):
    __slots__ = ("drafter", "active", "canary", "canary_share")
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    CANARY_FIELD_NUMBER: _ClassVar[int]
    CANARY_SHARE_FIELD_NUMBER: _ClassVar[int]
    drafter: str
    active: DraftFile
    canary: DraftFile
    canary_share: float
    def __init__(self, drafter: _Optional[str] = ..., active: _Optional[_Union[DraftFile, _Mapping]] = ..., canary: _Optional[_Union[DraftFile, _Mapping]] = ..., canary_share: _Optional[float] = ...) -> None: ...

class DraftFile(_message.Message):
    __slots__ = ("version", "digest", "num_bytes")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    version: str
    digest: str
    num_bytes: int
    def __init__(self, version: _Optional[str] = ..., digest: _Optional[str] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class FetchDraftRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: str
    def __init__(self, version: _Optional[str] = ...) -> None: ...

class FetchDraftResponse(_message.Message):
    __slots__ = ("file", "data")
    FILE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    file: str
    data: bytes
    def __init__(self, file: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class DraftScore(_message.Message):
    __slots__ = ("domain", "num_positions", "acceptance", "incumbent_acceptance", "difference_low", "difference_high")
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    NUM_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTANCE_FIELD_NUMBER: _ClassVar[int]
    INCUMBENT_ACCEPTANCE_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_LOW_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_HIGH_FIELD_NUMBER: _ClassVar[int]
    domain: str
    num_positions: int
    acceptance: float
    incumbent_acceptance: float
    difference_low: float
    difference_high: float
    def __init__(self, domain: _Optional[str] = ..., num_positions: _Optional[int] = ..., acceptance: _Optional[float] = ..., incumbent_acceptance: _Optional[float] = ..., difference_low: _Optional[float] = ..., difference_high: _Optional[float] = ...) -> None: ...

class DraftDecision(_message.Message):
    __slots__ = ("at_s", "stage", "reason", "detail")
    AT_S_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    at_s: float
    stage: DraftStage
    reason: str
    detail: str
    def __init__(self, at_s: _Optional[float] = ..., stage: _Optional[_Union[DraftStage, str]] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class DraftRecord(_message.Message):
    __slots__ = ("version", "digest", "number", "drafter", "parent", "created_s", "stage", "is_floor", "is_pinned", "num_bytes", "num_samples", "num_tokens", "scores", "decisions", "rank")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    CREATED_S_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    IS_FLOOR_FIELD_NUMBER: _ClassVar[int]
    IS_PINNED_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    version: str
    digest: str
    number: int
    drafter: str
    parent: str
    created_s: float
    stage: DraftStage
    is_floor: bool
    is_pinned: bool
    num_bytes: int
    num_samples: int
    num_tokens: int
    scores: _containers.RepeatedCompositeFieldContainer[DraftScore]
    decisions: _containers.RepeatedCompositeFieldContainer[DraftDecision]
    rank: int
    def __init__(self, version: _Optional[str] = ..., digest: _Optional[str] = ..., number: _Optional[int] = ..., drafter: _Optional[str] = ..., parent: _Optional[str] = ..., created_s: _Optional[float] = ..., stage: _Optional[_Union[DraftStage, str]] = ..., is_floor: _Optional[bool] = ..., is_pinned: _Optional[bool] = ..., num_bytes: _Optional[int] = ..., num_samples: _Optional[int] = ..., num_tokens: _Optional[int] = ..., scores: _Optional[_Iterable[_Union[DraftScore, _Mapping]]] = ..., decisions: _Optional[_Iterable[_Union[DraftDecision, _Mapping]]] = ..., rank: _Optional[int] = ...) -> None: ...

class ListDraftsRequest(_message.Message):
    __slots__ = ("drafter",)
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    drafter: str
    def __init__(self, drafter: _Optional[str] = ...) -> None: ...

class ListDraftsResponse(_message.Message):
    __slots__ = ("drafts",)
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    drafts: _containers.RepeatedCompositeFieldContainer[DraftRecord]
    def __init__(self, drafts: _Optional[_Iterable[_Union[DraftRecord, _Mapping]]] = ...) -> None: ...

class GetDraftRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: str
    def __init__(self, version: _Optional[str] = ...) -> None: ...

class GetDraftResponse(_message.Message):
    __slots__ = ("draft",)
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    draft: DraftRecord
    def __init__(self, draft: _Optional[_Union[DraftRecord, _Mapping]] = ...) -> None: ...

class OfferDraftRequest(_message.Message):
    __slots__ = ("drafter", "is_forced", "file", "data")
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    IS_FORCED_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    drafter: str
    is_forced: bool
    file: str
    data: bytes
    def __init__(self, drafter: _Optional[str] = ..., is_forced: _Optional[bool] = ..., file: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class OfferDraftResponse(_message.Message):
    __slots__ = ("draft",)
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    draft: DraftRecord
    def __init__(self, draft: _Optional[_Union[DraftRecord, _Mapping]] = ...) -> None: ...

class RollbackDraftRequest(_message.Message):
    __slots__ = ("drafter", "version")
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    drafter: str
    version: str
    def __init__(self, drafter: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class RollbackDraftResponse(_message.Message):
    __slots__ = ("draft",)
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    draft: DraftRecord
    def __init__(self, draft: _Optional[_Union[DraftRecord, _Mapping]] = ...) -> None: ...

class PinDraftRequest(_message.Message):
    __slots__ = ("drafter", "version")
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    drafter: str
    version: str
    def __init__(self, drafter: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class PinDraftResponse(_message.Message):
    __slots__ = ("draft",)
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    draft: DraftRecord
    def __init__(self, draft: _Optional[_Union[DraftRecord, _Mapping]] = ...) -> None: ...

class RemoveDrafterRequest(_message.Message):
    __slots__ = ("drafter",)
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    drafter: str
    def __init__(self, drafter: _Optional[str] = ...) -> None: ...

class RemoveDrafterResponse(_message.Message):
    __slots__ = ("draft",)
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    draft: DraftRecord
    def __init__(self, draft: _Optional[_Union[DraftRecord, _Mapping]] = ...) -> None: ...
