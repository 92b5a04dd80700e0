"""A Parquet file from somebody else runs no code, whichever types this process has registered."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retinaray.errors import DatasetError, StorageError
from retinaray.inference.manifest_tables import list_table
from retinaray.inference.parquet_parts import (
    decode_parquet,
    encode_parquet,
    list_extension_columns,
    make_schema,
)
from retinaray.storage import Storage

KIND = "retinaray.tests.pickled"
CATEGORIES = ({"id": 1, "name": "a"},)


class PickledType(pa.ExtensionType):  # type: ignore[misc]
    """What Ray Data registers for Python objects: its values are unpickled when looked at."""

    def __init__(self) -> None:
        super().__init__(pa.large_binary(), KIND)

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: bytes) -> PickledType:
        return cls()

    def __arrow_ext_scalar_class__(self) -> type:
        return PickledScalar


class PickledScalar(pa.ExtensionScalar):  # type: ignore[misc]
    def as_py(self, **_: Any) -> Any:
        return pickle.loads(self.value.as_py())


class _Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        from os import mkdir

        return mkdir, (str(self.place),)


@pytest.fixture(params=["registered", "unknown"])
def is_registered(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether the type is known here; importing Ray Data registers such types for good."""
    if request.param == "unknown":
        yield False
        return
    pa.register_extension_type(PickledType())
    yield True
    pa.unregister_extension_type(KIND)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A folder that is there when something was unpickled."""
    return tmp_path / "canary"


def write_table(columns: dict[str, Any], kinds: dict[str, str], metadata: Any = None) -> bytes:
    """A Parquet file; `kinds` are extension types of columns, as a foreign writer marks them."""
    fields = [
        pa.field(
            name,
            values.type,
            metadata={b"ARROW:extension:name": kinds[name].encode()} if name in kinds else None,
        )
        for name, values in columns.items()
    ]
    sink = io.BytesIO()
    schema = pa.schema(fields, metadata=metadata)
    pq.write_table(pa.Table.from_arrays(list(columns.values()), schema=schema), sink)
    return sink.getvalue()


def pickled(canary: Path) -> Any:
    return pa.array([pickle.dumps(_Bomb(canary))], pa.large_binary())


@pytest.mark.parametrize("column", ["x", "uri", "image_id"])
def test_list_table_refuses_pickled_columns_and_runs_no_code(
    tmp_path: Path, canary: Path, is_registered: bool, column: str
) -> None:
    columns = {"uri": pa.array(["a.jpg"])} | {column: pickled(canary)}
    (tmp_path / "all.parquet").write_bytes(write_table(columns, {column: KIND}))
    text = rf"all\.parquet: expected plain columns, found extension types in '{column}' \({KIND}\)"
    with pytest.raises(DatasetError, match=text):
        list(list_table(str(tmp_path / "all.parquet"), Storage()))
    assert not canary.exists()


def test_list_table_refuses_pickled_values_inside_structs(
    tmp_path: Path, canary: Path, is_registered: bool
) -> None:
    inner = pa.field("y", pa.large_binary(), metadata={b"ARROW:extension:name": KIND.encode()})
    values = pa.StructArray.from_arrays([pickled(canary)], fields=[inner])
    content = write_table({"uri": pa.array(["a.jpg"]), "x": values}, {})
    (tmp_path / "all.parquet").write_bytes(content)
    with pytest.raises(DatasetError, match=rf"extension types in 'x' \({KIND}\)"):
        list(list_table(str(tmp_path / "all.parquet"), Storage()))
    assert not canary.exists()


def test_decode_parquet_refuses_pickled_columns_in_a_part_and_runs_no_code(
    canary: Path, is_registered: bool
) -> None:
    schema = make_schema(has_integer_ids=True, categories=CATEGORIES)
    row = {"image_id": 1, "uri": "a", "height": 1, "width": 1, "detections": []}
    table = pq.read_table(pa.BufferReader(encode_parquet([row], schema, "none")))
    columns = dict(
        zip(table.column_names, (c.combine_chunks() for c in table.columns), strict=True)
    )
    good = write_table(columns, {}, table.schema.metadata)
    assert [found["image_id"] for found in decode_parquet(good, "x")] == [1]
    # The metadata of a part of ours are no proof that it is one.
    bad = write_table(
        columns | {"columns": pickled(canary)}, {"columns": KIND}, table.schema.metadata
    )
    with pytest.raises(StorageError, match=rf"x: .*extension types in 'columns' \({KIND}\)"):
        list(decode_parquet(bad, "x"))
    assert not canary.exists()


def test_pickled_type_unpickles_when_nobody_refuses_it(canary: Path) -> None:
    """The type of these tests does what Ray's does, or they would prove nothing."""
    values = pa.ExtensionArray.from_storage(PickledType(), pickled(canary))
    assert values.to_pylist() == [None]
    assert canary.exists()


def test_list_extension_columns_passes_plain_types() -> None:
    plain = pa.schema(
        [
            ("a", pa.string()),
            ("b", pa.dictionary(pa.int32(), pa.string())),
            ("c", pa.list_(pa.struct([("d", pa.float64())]))),
            ("e", pa.map_(pa.string(), pa.int64())),
        ]
    )
    assert list_extension_columns(plain) == []
    assert list_extension_columns(pa.schema([("a", pa.list_(pa.uuid()))])) == ["'a' (arrow.uuid)"]
