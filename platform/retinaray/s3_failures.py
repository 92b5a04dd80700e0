"""What went wrong with S3, in words that say what to do.

Knows the answers of AWS and of servers that imitate it; sends no request itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from retinaray.errors import MissingFileError, StorageError, UnreadableFileError

logger = logging.getLogger(__name__)

_CREDENTIALS = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, the profile or the instance role"
SERVER_ADVICE = (
    "check that the server runs, endpoint_url or AWS_ENDPOINT_URL, AWS_REGION and the proxy"
)
_PERMISSION = (
    "allow this identity the action on this bucket (without s3:ListBucket a missing object also "
    "answers so), and " + _CREDENTIALS
)
_REGION = "set AWS_REGION to the bucket's region"
_LOGIN = "log in again, or unset AWS_SESSION_TOKEN"
_REASONS = {
    "NoSuchBucket": ("no such bucket", "correct the name or create the bucket"),
    "403": ("access denied, or a wrong key or secret", _PERMISSION),
    "AccessDenied": ("access denied", _PERMISSION),
    "SignatureDoesNotMatch": ("wrong secret (the signature does not match)", _CREDENTIALS),
    "InvalidAccessKeyId": ("unknown access key", _CREDENTIALS),
    "ExpiredToken": ("the session token has expired", _LOGIN),
    "InvalidToken": ("the session token is not valid", _LOGIN),
    "RequestTimeTooSkewed": ("the clock of this machine is off", "set its time"),
    "PermanentRedirect": ("the bucket is in another region", _REGION),
    "AuthorizationHeaderMalformed": ("the bucket is in another region", _REGION),
    "301": ("the bucket is in another region", _REGION),
    "400": ("the server refuses the request without a reason", f"{_CREDENTIALS}; {_REGION}"),
    "PreconditionFailed": ("the object changed meanwhile", "run again when nobody writes it"),
    "InvalidRange": ("the object ends before these bytes", "list it again: it changed meanwhile"),
    "SlowDown": ("the server asks for fewer requests", "use fewer workers or more key prefixes"),
}
# About the object that was asked for, not about the server or the whole identity.
_FOR_GOOD = frozenset(["403", "AccessDenied", "InvalidObjectState", "KeyTooLongError"])


@contextmanager
def explain_s3_failures(uri: str, verb: str) -> Iterator[None]:
    """Turn botocore's failures inside the block into one sentence: URI, cause, remedy.

    Botocore's traceback goes to the debug log only.

    Raises:
        MissingFileError: If the server says that the object is not there.
        StorageError: For every other failure that botocore reports.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        logger.debug("S3 refused to %s %s", verb, uri, exc_info=True)
        raise _explain_refusal(uri, verb, error.response["Error"]) from None
    except BotoCoreError as error:
        logger.debug("S3 failed to %s %s", verb, uri, exc_info=True)
        raise StorageError(f"cannot {verb} {uri}: {error}; {_advise(error)}") from None


def _explain_refusal(uri: str, verb: str, answer: Any) -> StorageError:
    code, message = str(answer.get("Code", "")), answer.get("Message", "")
    if code in ("NoSuchKey", "404", "NotFound"):
        return MissingFileError(
            f"cannot {verb} {uri}: no such object; check the bucket and the key"
        )
    reason, advice = _REASONS.get(code, (message, "see the reason, or ask who runs the server"))
    kind = UnreadableFileError if code in _FOR_GOOD else StorageError
    return kind(f"cannot {verb} {uri}: {reason} ({code}); {advice}")


def _advise(error: Exception) -> str:
    from botocore import exceptions

    if "Credential" in type(error).__name__ or isinstance(error, exceptions.ProfileNotFound):
        return _CREDENTIALS
    if isinstance(error, exceptions.SSLError):
        return "check AWS_CA_BUNDLE, or write http:// if the server has no certificate"
    if isinstance(error, exceptions.ParamValidationError):
        return "correct the bucket's name"
    return SERVER_ADVICE
