from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetScaleRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetScaleResponse(_message.Message):
    __slots__ = ("pools",)
    POOLS_FIELD_NUMBER: _ClassVar[int]
    pools: _containers.RepeatedCompositeFieldContainer[PoolScale]
    def __init__(self, pools: _Optional[_Iterable[_Union[PoolScale, _Mapping]]] = ...) -> None: ...

class PoolScale(_message.Message):
    __slots__ = ("role", "replicas", "member_ids", "ending_ids")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    MEMBER_IDS_FIELD_NUMBER: _ClassVar[int]
    ENDING_IDS_FIELD_NUMBER: _ClassVar[int]
    role: str
    replicas: int
    member_ids: _containers.RepeatedScalarFieldContainer[str]
    ending_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, role: _Optional[str] = ..., replicas: _Optional[int] = ..., member_ids: _Optional[_Iterable[str]] = ..., ending_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class SetScaleRequest(_message.Message):
    __slots__ = ("role", "replicas", "victims")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    VICTIMS_FIELD_NUMBER: _ClassVar[int]
    role: str
    replicas: int
    victims: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, role: _Optional[str] = ..., replicas: _Optional[int] = ..., victims: _Optional[_Iterable[str]] = ...) -> None: ...

class SetScaleResponse(_message.Message):
    __slots__ = ("pool",)
    POOL_FIELD_NUMBER: _ClassVar[int]
    pool: PoolScale
    def __init__(self, pool: _Optional[_Union[PoolScale, _Mapping]] = ...) -> None: ...
