"""What went wrong with S3, in words that say what to do and repeat no secret.

Knows the answers of AWS and of servers that imitate it; sends no request itself.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from retinaray.errors import ConfigError, MissingFileError, StorageError, UnreadableFileError

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
_FOR_GOOD = frozenset(
    ["403", "AccessDenied", "InvalidObjectState", "InvalidRange", "KeyTooLongError"]
)

_HIDDEN = "(hidden)"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PORT_OR_NONE = re.compile(r"[^:@]*(:\d*)?|\[[0-9A-Fa-f:.]*\](:\d*)?")
# Of AWS's signatures 4 and 2. Of URLs that nobody reads here, any query may be one.
_SIGNED = re.compile(
    r"[?&](X-Amz-(Signature|Credential|Security-Token)|AWSAccessKeyId)=", re.IGNORECASE
)
_FOREIGN_QUERY = re.compile(r"(?<=\?).")
_OWN_SCHEMES = ("s3://", "file://")


def find_secret(uri: str) -> str:
    """Say which secret stands in a URI, empty if none: such a URI must not be stored or shown.

    A secret is a name or password before the host (`s3://KEY:SECRET@bucket/x`), also one that holds
    a slash, or the query of a presigned URL. `@`, `:` and `?` elsewhere are parts of names.
    """
    scheme = _SCHEME.match(uri)
    if scheme and not _PORT_OR_NONE.fullmatch(_host(uri, scheme)):
        return "a key or password before the place"
    return "the query of a presigned URL" if _find_query(uri) else ""


def _host(uri: str, scheme: re.Match[str]) -> str:
    return uri[scheme.end() :].partition("/")[0].partition("?")[0]


def _find_query(uri: str) -> re.Match[str] | None:
    is_foreign = _SCHEME.match(uri) and not uri.startswith(_OWN_SCHEMES)
    return (_FOREIGN_QUERY if is_foreign else _SIGNED).search(uri)


def hide_secret(uri: str) -> str:
    """A URI for people to read: what `find_secret` finds is left out, all else stays."""
    if not find_secret(uri):
        return uri
    query = _find_query(uri)
    shown = f"{uri[: query.start() + 1].partition('?')[0].rstrip('&')}?{_HIDDEN}" if query else uri
    scheme = _SCHEME.match(shown)
    if scheme and not _PORT_OR_NONE.fullmatch(_host(shown, scheme)):
        # Up to the last @: a secret may hold the sign itself.
        _, sign, place = shown[scheme.end() :].rpartition("@")
        shown = f"{scheme.group()}{_HIDDEN}{sign}{place if sign else ''}"
    return shown


def expect_plain_endpoint(endpoint_url: str, name: str) -> None:
    """Refuse a server's address that holds a secret: logs, messages and records repeat it.

    Args:
        endpoint_url: Empty for none.
        name: The setting or variable that it comes from.

    Raises:
        ConfigError: If it holds one; the text does not.
    """
    secret = find_secret(endpoint_url)
    if secret:
        raise ConfigError(
            f"{name}={hide_secret(endpoint_url)} holds {secret}: expected http://host:port, and "
            "credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


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
        return (
            "if its certificate is from an authority of your own, set AWS_CA_BUNDLE to the PEM "
            "file of that authority; if the server speaks no TLS, write http://"
        )
    if isinstance(error, exceptions.ParamValidationError):
        return "correct the bucket's name"
    return SERVER_ADVICE
