"""A recorded stream: serialized samples in the order of time, each behind its length.

The lengths are protobuf's usual varints (parseDelimitedFrom of other languages reads the file).
recording.py writes it, or anybody who listens to the samples of a fleet; compare.py reads it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path

from google.protobuf.message import DecodeError
from google.protobuf.proto import parse_length_prefixed, serialize_length_prefixed

from paceline.domain.learnings import Sample
from paceline.rpc.draft_codec import sample_from_proto, sample_to_proto
from paceline.v1 import samples_pb2


def write_stream(path: Path, samples: Iterable[Sample]) -> int:
    """Write samples and return their number.

    Raises:
        OSError: the file cannot be written.
    """
    count, data = 0, BytesIO()
    for sample in samples:
        serialize_length_prefixed(sample_to_proto(sample), data)
        count += 1
    path.write_bytes(data.getbuffer())
    return count


def read_stream(path: Path) -> Iterator[Sample]:
    """Yield the samples.

    Raises:
        ValueError: the file is damaged; says where.
        OSError: it cannot be read.
    """
    data = BytesIO(path.read_bytes())
    for number in itertools.count(1):
        try:
            message = parse_length_prefixed(samples_pb2.Sample, data)
            if message is None:
                return
            sample = sample_from_proto(message)
        except (DecodeError, ValueError) as error:
            raise ValueError(f"{path}: sample {number}: {error}") from error
        yield sample
