"""All errors that may leave a component, with a stable reason each.

PacelineError
├── InvalidRequestError      the caller's input is wrong; names the field
├── UnauthenticatedError     no or wrong key
├── PermissionDeniedError    known caller, not allowed
├── NotFoundError            no such model
├── AlreadyExistsError       a running request has this id
├── PreconditionError        not as things stand; the same call may succeed once they changed
├── ExhaustedError           a queue or quota is full; says when to retry
├── UnavailableError         nobody can serve it now; retryable
├── DeadlineError            the deadline passed or cannot be met
├── RequestCancelledError    ended by the caller
├── CorruptDraftError        bytes of a draft are not those that its digest names
├── UnimplementedError       known to the contract, not offered by this build
└── InternalError            a bug of ours; the text never reaches a client

`reason` is lower-kebab and appears as the gRPC ErrorInfo reason, the metric label and the
log field. rpc/interceptors.py holds the one table from these classes to gRPC codes.
"""

from __future__ import annotations


class PacelineError(Exception):
    """Base of all errors that are part of the contract."""

    reason: str = "internal"

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if reason is not None:
            self.reason = reason


class InvalidRequestError(PacelineError):
    """The caller's input is wrong; `field` is the path of the offending field."""

    reason = "invalid-argument"

    def __init__(self, field: str, message: str, *, reason: str | None = None) -> None:
        super().__init__(message, reason=reason)
        self.field = field


class UnauthenticatedError(PacelineError):
    """No key, or a key nobody has."""

    reason = "unauthenticated"


class PermissionDeniedError(PacelineError):
    """The caller is known and may not do this."""

    reason = "permission-denied"


class NotFoundError(PacelineError):
    """The named model is not served here, or not visible to the caller."""

    reason = "model-not-found"


class AlreadyExistsError(PacelineError):
    """A running request has this id."""

    reason = "duplicate-request-id"


class PreconditionError(PacelineError):
    """Something about this side must change first; trying again alone does not help."""

    reason = "failed-precondition"


class ExhaustedError(PacelineError):
    """A bounded queue or quota is full."""

    reason = "queue-full"

    def __init__(
        self, message: str, *, retry_after_s: float = 1.0, reason: str | None = None
    ) -> None:
        super().__init__(message, reason=reason)
        self.retry_after_s = retry_after_s


class UnavailableError(PacelineError):
    """Nobody can serve it now; the same call may succeed later."""

    reason = "no-ready-worker"

    def __init__(
        self, message: str, *, retry_after_s: float = 1.0, reason: str | None = None
    ) -> None:
        super().__init__(message, reason=reason)
        self.retry_after_s = retry_after_s


class DeadlineError(PacelineError):
    """The deadline passed, or cannot be met."""

    reason = "deadline-exceeded"


class RequestCancelledError(PacelineError):
    """The caller ended the request."""

    reason = "cancelled"


class CorruptDraftError(PacelineError):
    """The bytes of a draft are not those that its digest names."""

    reason = "corrupt-draft"


class UnimplementedError(PacelineError):
    """Known to the contract, not offered by this build."""

    reason = "unimplemented"


class InternalError(PacelineError):
    """A bug of ours; clients get a fixed text and the request id."""

    reason = "internal"
