"""`python tests/teachers/other_readers.py STORE PARQUET [NAME ...]`: what others read of a store.

STORE was written with encoding="plain"; PARQUET is what `Reader.to_parquet` made of it, or of the
same samples in 8 bits. Each of DuckDB, Ray Data, Spark and datasets that is installed reads both,
and must find the rows and columns that pyarrow finds. Run it where they are: fastkd need not be.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds


def tables(store: Path) -> list[pa.Table]:
    """The shards, mapped."""
    files = sorted(store.glob("teacher-*.arrow"))
    return [pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in files]


def duckdb(store: Path, parquet: Path) -> Iterator[tuple[str, Any]]:
    import duckdb

    told = duckdb.sql(f"select count(*), sum(rows) from '{parquet}/*.parquet'").fetchall()
    yield "parquet", told[0]
    connection = duckdb.connect()
    connection.register("shards", pa.concat_tables(tables(store)))
    told = connection.sql("select count(*), sum(rows), sum(list_sum(indices)) from shards")
    told = told.fetchall()
    yield "arrow", told[0]


def ray(store: Path, parquet: Path) -> Iterator[tuple[str, Any]]:
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    data = ray.data.read_parquet(str(parquet))
    yield "parquet", (data.count(), data.sum("rows"))
    data = ray.data.from_arrow(tables(store))
    ids = data.map(lambda row: {"of": sum(row["indices"])}).sum("of")
    yield "arrow", (data.count(), data.sum("rows"), ids)
    ray.shutdown()


def pyspark(store: Path, parquet: Path) -> Iterator[tuple[str, Any]]:
    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"] = sys.executable
    builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    spark = builder.getOrCreate()
    yield (
        "parquet",
        tuple(spark.read.parquet(str(parquet)).selectExpr("count(*)", "sum(rows)").first()),
    )
    data = spark.createDataFrame(pa.concat_tables(tables(store)))
    each = data.selectExpr("rows", "aggregate(indices, 0L, (a, x) -> a + x) as ids")
    yield "arrow", tuple(each.selectExpr("count(*)", "sum(rows)", "sum(ids)").first())
    spark.stop()


def datasets(store: Path, parquet: Path) -> Iterator[tuple[str, Any]]:
    import datasets

    data = datasets.load_dataset("parquet", data_files=f"{parquet}/*.parquet", split="train")
    yield "parquet", (len(data), sum(data["rows"]))
    data = datasets.load_from_disk(str(store))
    yield "arrow", (len(data), sum(data["rows"]), sum(map(sum, data["indices"])))


def main() -> int:
    store, parquet = Path(sys.argv[1]), Path(sys.argv[2])
    table = pa.concat_tables(tables(store))
    counts = (table.num_rows, pc.sum(table["rows"]).as_py())
    expected = {"arrow": (*counts, pc.sum(pc.list_flatten(table["indices"])).as_py())}
    expected["parquet"] = (ds.dataset(parquet).count_rows(), counts[1])
    failed = False
    for reads in (duckdb, ray, pyspark, datasets):
        if reads.__name__ not in (sys.argv[3:] or reads.__name__):
            continue
        try:
            library = __import__(reads.__name__)
        except ImportError:
            print(f"{reads.__name__}: not installed")
            continue
        for what, got in reads(store, parquet):
            same = tuple(map(int, got)) == expected[what]
            failed |= not same
            word = "as pyarrow" if same else f"got {got}, expected {expected[what]}"
            print(f"{reads.__name__} {library.__version__}, {what}: {word}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
