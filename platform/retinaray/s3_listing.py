"""What lies below an S3 prefix: walked page by page, or split where several can walk at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from retinaray.s3_failures import explain_s3_failures
from retinaray.s3_objects import S3Objects, split_s3_uri

# URI, length in bytes, and seconds since 1970 UTC of the last writing.
Entry = tuple[str, int, float]


def list_entries(objects: S3Objects, uri: str) -> Iterator[Entry]:
    """Walk the objects below a prefix, page by page; see `Storage.list_entries`."""
    bucket, key = split_s3_uri(uri)
    with explain_s3_failures(uri, "list"):
        client = objects.client()
        if key and not key.endswith("/"):
            # An object of exactly this name sorts before all that it is a prefix of.
            first = client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
            entries = first.get("Contents", [])
            if [entry["Key"] for entry in entries] == [key]:
                yield _describe(bucket, entries[0])
                return
            key += "/"
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
        for page in pages:
            yield from _describe_all(bucket, page)


def list_level(objects: S3Objects, uri: str) -> list[Entry | str] | None:
    """Objects and prefixes right below a prefix, sorted as all objects below it would be.

    Args:
        objects: The store.
        uri: The prefix, with or without a slash at its end.

    Returns:
        Entries, and URIs of prefixes with a slash at their end; none where one answer does not hold
        them all: thousands of small prefixes are walked sooner in one go.
    """
    bucket, key = split_s3_uri(uri)
    key = f"{key}/" if key and not key.endswith("/") else key
    with explain_s3_failures(uri, "list"):
        page = objects.client().list_objects_v2(Bucket=bucket, Prefix=key, Delimiter="/")
    if page.get("IsTruncated"):
        return None
    prefixes = [f"s3://{bucket}/{item['Prefix']}" for item in page.get("CommonPrefixes", [])]
    found: list[Entry | str] = [*_describe_all(bucket, page), *prefixes]
    # S3 sorts by bytes, and all below a prefix begin with it.
    return sorted(found, key=lambda item: (item if isinstance(item, str) else item[0]).encode())


def _describe_all(bucket: str, page: Any) -> Iterator[Entry]:
    for entry in page.get("Contents", []):
        # Keys that end in a slash are the empty markers by which consoles show folders.
        if not entry["Key"].endswith("/"):
            yield _describe(bucket, entry)


def _describe(bucket: str, entry: Any) -> Entry:
    return f"s3://{bucket}/{entry['Key']}", entry["Size"], entry["LastModified"].timestamp()
