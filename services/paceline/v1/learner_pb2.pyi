from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LearnerCommand(_message.Message):
    __slots__ = ("command_id", "feed", "grant", "pause", "judge", "export", "reset", "save", "specialise")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    FEED_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    PAUSE_FIELD_NUMBER: _ClassVar[int]
    JUDGE_FIELD_NUMBER: _ClassVar[int]
    EXPORT_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    SAVE_FIELD_NUMBER: _ClassVar[int]
    SPECIALISE_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    feed: FeedSamples
    grant: GrantTraining
    pause: PauseTraining
    judge: JudgeDrafts
    export: ExportDraft
    reset: ResetLearner
    save: SaveLearner
    specialise: SpecialiseDraft
    def __init__(self, command_id: _Optional[int] = ..., feed: _Optional[_Union[FeedSamples, _Mapping]] = ..., grant: _Optional[_Union[GrantTraining, _Mapping]] = ..., pause: _Optional[_Union[PauseTraining, _Mapping]] = ..., judge: _Optional[_Union[JudgeDrafts, _Mapping]] = ..., export: _Optional[_Union[ExportDraft, _Mapping]] = ..., reset: _Optional[_Union[ResetLearner, _Mapping]] = ..., save: _Optional[_Union[SaveLearner, _Mapping]] = ..., specialise: _Optional[_Union[SpecialiseDraft, _Mapping]] = ...) -> None: ...

class LearnerEvent(_message.Message):
    __slots__ = ("ready", "progress", "judged", "exported", "done", "failed")
    READY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    JUDGED_FIELD_NUMBER: _ClassVar[int]
    EXPORTED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    ready: LearnerReady
    progress: LearnerProgress
    judged: DraftsJudged
    exported: DraftExported
    done: LearnerDone
    failed: LearnerFailed
    def __init__(self, ready: _Optional[_Union[LearnerReady, _Mapping]] = ..., progress: _Optional[_Union[LearnerProgress, _Mapping]] = ..., judged: _Optional[_Union[DraftsJudged, _Mapping]] = ..., exported: _Optional[_Union[DraftExported, _Mapping]] = ..., done: _Optional[_Union[LearnerDone, _Mapping]] = ..., failed: _Optional[_Union[LearnerFailed, _Mapping]] = ...) -> None: ...

class FeedSamples(_message.Message):
    __slots__ = ("samples",)
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    samples: _containers.RepeatedCompositeFieldContainer[StreamedSample]
    def __init__(self, samples: _Optional[_Iterable[_Union[StreamedSample, _Mapping]]] = ...) -> None: ...

class StreamedSample(_message.Message):
    __slots__ = ("sample", "stream_id")
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    sample: bytes
    stream_id: str
    def __init__(self, sample: _Optional[bytes] = ..., stream_id: _Optional[str] = ...) -> None: ...

class GrantTraining(_message.Message):
    __slots__ = ("threads", "seconds")
    THREADS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    threads: int
    seconds: float
    def __init__(self, threads: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class PauseTraining(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class JudgeDrafts(_message.Message):
    __slots__ = ("incumbent", "candidate", "domain", "is_own")
    INCUMBENT_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    IS_OWN_FIELD_NUMBER: _ClassVar[int]
    incumbent: str
    candidate: str
    domain: str
    is_own: bool
    def __init__(self, incumbent: _Optional[str] = ..., candidate: _Optional[str] = ..., domain: _Optional[str] = ..., is_own: _Optional[bool] = ...) -> None: ...

class ExportDraft(_message.Message):
    __slots__ = ("directory",)
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    directory: str
    def __init__(self, directory: _Optional[str] = ...) -> None: ...

class ResetLearner(_message.Message):
    __slots__ = ("directory",)
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    directory: str
    def __init__(self, directory: _Optional[str] = ...) -> None: ...

class SpecialiseDraft(_message.Message):
    __slots__ = ("base", "domain", "rank", "num_steps", "directory")
    BASE_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    base: str
    domain: str
    rank: int
    num_steps: int
    directory: str
    def __init__(self, base: _Optional[str] = ..., domain: _Optional[str] = ..., rank: _Optional[int] = ..., num_steps: _Optional[int] = ..., directory: _Optional[str] = ...) -> None: ...

class SaveLearner(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LearnerReady(_message.Message):
    __slots__ = ("pid", "stream_id", "progress")
    PID_FIELD_NUMBER: _ClassVar[int]
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    pid: int
    stream_id: str
    progress: LearnerProgress
    def __init__(self, pid: _Optional[int] = ..., stream_id: _Optional[str] = ..., progress: _Optional[_Union[LearnerProgress, _Mapping]] = ...) -> None: ...

class LearnerProgress(_message.Message):
    __slots__ = ("is_training", "num_micro_steps", "num_steps", "num_tokens", "loss", "trained_s", "last_micro_step_s", "max_micro_step_s", "samples_by_domain", "num_samples", "num_corrupt", "num_skipped", "num_restored", "replay_bytes", "stream_id")
    class SamplesByDomainEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    IS_TRAINING_FIELD_NUMBER: _ClassVar[int]
    NUM_MICRO_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TRAINED_S_FIELD_NUMBER: _ClassVar[int]
    LAST_MICRO_STEP_S_FIELD_NUMBER: _ClassVar[int]
    MAX_MICRO_STEP_S_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_BY_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    NUM_CORRUPT_FIELD_NUMBER: _ClassVar[int]
    NUM_SKIPPED_FIELD_NUMBER: _ClassVar[int]
    NUM_RESTORED_FIELD_NUMBER: _ClassVar[int]
    REPLAY_BYTES_FIELD_NUMBER: _ClassVar[int]
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    is_training: bool
    num_micro_steps: int
    num_steps: int
    num_tokens: int
    loss: float
    trained_s: float
    last_micro_step_s: float
    max_micro_step_s: float
    samples_by_domain: _containers.ScalarMap[str, int]
    num_samples: int
    num_corrupt: int
    num_skipped: int
    num_restored: int
    replay_bytes: int
    stream_id: str
    def __init__(self, is_training: _Optional[bool] = ..., num_micro_steps: _Optional[int] = ..., num_steps: _Optional[int] = ..., num_tokens: _Optional[int] = ..., loss: _Optional[float] = ..., trained_s: _Optional[float] = ..., last_micro_step_s: _Optional[float] = ..., max_micro_step_s: _Optional[float] = ..., samples_by_domain: _Optional[_Mapping[str, int]] = ..., num_samples: _Optional[int] = ..., num_corrupt: _Optional[int] = ..., num_skipped: _Optional[int] = ..., num_restored: _Optional[int] = ..., replay_bytes: _Optional[int] = ..., stream_id: _Optional[str] = ...) -> None: ...

class DraftsJudged(_message.Message):
    __slots__ = ("command_id", "domains", "new_samples")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    DOMAINS_FIELD_NUMBER: _ClassVar[int]
    NEW_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    domains: _containers.RepeatedCompositeFieldContainer[JudgedDomain]
    new_samples: _containers.RepeatedCompositeFieldContainer[JudgedSample]
    def __init__(self, command_id: _Optional[int] = ..., domains: _Optional[_Iterable[_Union[JudgedDomain, _Mapping]]] = ..., new_samples: _Optional[_Iterable[_Union[JudgedSample, _Mapping]]] = ...) -> None: ...

class JudgedDomain(_message.Message):
    __slots__ = ("domain", "samples")
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    domain: str
    samples: _containers.RepeatedCompositeFieldContainer[JudgedSample]
    def __init__(self, domain: _Optional[str] = ..., samples: _Optional[_Iterable[_Union[JudgedSample, _Mapping]]] = ...) -> None: ...

class JudgedSample(_message.Message):
    __slots__ = ("temperature", "num_positions", "candidate", "incumbent", "domain")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    NUM_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    INCUMBENT_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    num_positions: int
    candidate: JudgedScore
    incumbent: JudgedScore
    domain: str
    def __init__(self, temperature: _Optional[float] = ..., num_positions: _Optional[int] = ..., candidate: _Optional[_Union[JudgedScore, _Mapping]] = ..., incumbent: _Optional[_Union[JudgedScore, _Mapping]] = ..., domain: _Optional[str] = ...) -> None: ...

class JudgedScore(_message.Message):
    __slots__ = ("num_agreed", "overlap")
    NUM_AGREED_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_FIELD_NUMBER: _ClassVar[int]
    num_agreed: int
    overlap: float
    def __init__(self, num_agreed: _Optional[int] = ..., overlap: _Optional[float] = ...) -> None: ...

class DraftExported(_message.Message):
    __slots__ = ("command_id", "directory", "num_samples", "num_tokens")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    directory: str
    num_samples: int
    num_tokens: int
    def __init__(self, command_id: _Optional[int] = ..., directory: _Optional[str] = ..., num_samples: _Optional[int] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class LearnerDone(_message.Message):
    __slots__ = ("command_id",)
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    def __init__(self, command_id: _Optional[int] = ...) -> None: ...

class LearnerFailed(_message.Message):
    __slots__ = ("command_id", "reason", "message")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    reason: str
    message: str
    def __init__(self, command_id: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...
