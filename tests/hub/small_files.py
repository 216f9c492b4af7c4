"""Files of the kinds that are published, as small as they can be."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save


def safetensors(metadata: dict) -> bytes:
    return save({"x": torch.zeros(1)}, metadata=metadata)


def parquet(**columns) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def write_results(folder, **fields):
    folder.mkdir(exist_ok=True)
    results = {
        "schema_version": 1,
        "benchmark": "POPE: adversarial",
        "primary_score": "accuracy",
        "model": {"name": "my-llava", "adapter": "/home/someone/adapter"},
        "samples": {"total": 3000, "scored": 3000},
        "complete": True,
        "scores": {"accuracy": {"value": 85.51234, "interval": [84.2, 86.8], "count": 3000}},
        **fields,
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "results.png").write_bytes(b"PNG")
    return folder
