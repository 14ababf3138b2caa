"""Streaming of a task's images: rows per second and peak memory of a selection from Parquet files of growing length.

    python benchmarks/streaming.py                  # 10 thousand, 100 thousand and a million tiny rows
    python benchmarks/streaming.py --rows 10000 50000

Each length runs in a separate process, whose peak resident memory the operating system reports; `bare` is the memory of that
process before the first row. The file is written in row groups of a thousand 8x8 PNGs with captions.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ground import machine, save_lines
from unlearning import RESULTS

GROUP = 1000


def write(path: Path, rows: int) -> None:
    """A Parquet file of `rows` tiny pictures; every hundredth caption names a fox."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    schema = pa.schema([("image", pa.binary()), ("caption", pa.string())])
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(path, schema) as out:
        for start in range(0, rows, GROUP):
            images = []
            for pixels in rng.integers(0, 256, (min(GROUP, rows - start), 8, 8, 3), dtype=np.uint8):
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                images.append(buffer.getvalue())
            captions = ["a fox" if i % 100 == 0 else "a field" for i in range(start, start + len(images))]
            out.write_table(pa.table({"image": images, "caption": captions}, schema=schema))


def select(path: Path) -> dict[str, float]:
    """One pass: sorts rows into two samples of bounded size, as a task does."""
    from raysweep.tasks.records import Tally
    from raysweep.tasks.sampling import Sample, pixels
    from raysweep.tasks.selecting import Selection
    from raysweep.tasks.sources import ParquetSource

    source, wanted = ParquetSource(parquet=str(path), caption="caption"), Selection(captions=("fox",))
    forget, retain = Sample(1000, 0, repeats=True), Sample(2000, 0)
    rows = pixels(source, (3, 8, 8), Tally())
    record, x = next(rows)
    bare, started, count = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), 1
    (forget if wanted.holds(record) else retain).add(x, None, record.caption)
    for record, x in rows:
        (forget if wanted.holds(record) else retain).add(x, None, record.caption)
        count += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "rows": count,
        "rows_per_s": count / (time.perf_counter() - started),
        "bare_mb": bare / 1024,
        "peak_mb": peak / 1024,
        "forget": len(forget.images()),
        "retain": len(retain.images()),
    }


def main() -> None:
    """Measures each length in a separate process, prints a line for each, and saves them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(select(Path(args.one))))
        return
    print(machine())
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for rows in args.rows:
            path = Path(folder) / "rows.parquet"
            write(path, rows)
            size = path.stat().st_size / 1e6
            out = subprocess.run(
                [sys.executable, __file__, "--one", str(path)], check=True, capture_output=True, text=True
            )
            results.append(json.loads(out.stdout) | {"file_mb": size})
            f = results[-1]
            print(
                f"{f['rows']:>9,} rows ({size:,.0f} MB): {f['rows_per_s']:,.0f} rows/s, peak {f['peak_mb']:.0f} MB, "
                f"{f['peak_mb'] - f['bare_mb']:.0f} MB above the bare process"
            )
    save_lines(RESULTS / "streaming.json", [json.dumps({"about": machine(), "results": results}, indent=1)])


if __name__ == "__main__":
    main()
