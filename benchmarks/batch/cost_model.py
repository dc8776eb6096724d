"""Whether the cost model holds: images an hour, predicted from a few images and measured on a folder.

A few JPEG photographs of one size give milliseconds a megapixel; the prediction is for a folder of photographs of other
sizes, which one worker then does in this process, and, with --ray, on the Ray cluster that is found or made here:

    python benchmarks/batch/cost_model.py --ray
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from cost import Cost

from fastden.batch.denoiser import BatchDenoiser
from fastden.batch.manifest import Record
from fastden.batch.plan import Job
from fastden.batch.ray import connect, distribute, files_at_once, plan_rows
from fastden.bench.tables import write
from fastden.images.codec import ImageFile, write_image
from fastden.info import collect
from fastden.network.onednn import keep_freed_memory

RESULTS = Path(__file__).resolve().parent.parent / "results" / "batch"


def photographs(folder: Path, sizes: list[tuple[int, int]]) -> float:
    """Write noisy JPEG files, the demo's photograph repeated to each size; returns their mean megapixels."""
    from skimage import data

    random = np.random.default_rng(0)
    photograph = data.astronaut()
    folder.mkdir()
    for index, (height, width) in enumerate(sizes):
        repeats = (-(-height // photograph.shape[0]), -(-width // photograph.shape[1]), 1)
        clean = np.tile(photograph, repeats)[:height, :width].astype(np.float32)
        noisy = np.clip(clean + random.normal(0, 15, clean.shape).astype(np.float32), 0, 255).astype(np.uint8)
        write_image(folder / f"{index:04}.jpg", ImageFile(noisy))
    return statistics.mean(height * width / 1e6 for height, width in sizes)


def row(predicted: float, images: int, seconds: float) -> dict[str, float]:
    measured = 3600 * images / seconds
    return {
        "images": images,
        "seconds": round(seconds, 2),
        "predicted_images_an_hour": round(predicted, 1),
        "measured_images_an_hour": round(measured, 1),
        "prediction_over_measurement": round(predicted / measured, 3),
    }


def done(records: list[Record]) -> list[Record]:
    failed = [record for record in records if record.status != "done"]
    if failed:
        raise SystemExit(f"{failed[0].input}: {failed[0].error}")
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16, help="of the folder")
    parser.add_argument("--side", type=int, default=1200, help="shorter side of the images that calibrate")
    parser.add_argument("--device", help="cpu, cuda, ...")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--ray", action="store_true", help="the Ray engine too")
    parser.add_argument("--workers-per-device", type=int, default=1, help="of the Ray engine")
    parser.add_argument("--json", type=Path, default=RESULTS / "cost_model.json")
    arguments = parser.parse_args()
    keep_freed_memory()
    settings = {"model": "color", "sigma": 15.0, "device": arguments.device, "dtype": arguments.dtype}
    batch = BatchDenoiser(**settings)

    def denoise(items: list[dict[str, str]]) -> list[Record]:
        Path(items[0]["output"]).parent.mkdir()
        return [batch.one(Job(Path(item["input"]), Path(item["output"]))) for item in items]

    side = arguments.side
    step = side // 10
    sizes = [(side + step * (index % 5 - 2), side * 3 // 2 + step * (index % 3)) for index in range(arguments.images)]
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        photographs(top / "few", [(side, side * 3 // 2)] * 4)
        megapixels = photographs(top / "folder", sizes)
        rows = plan_rows([str(top / "few")], str(top / "few-out"))
        few = done(denoise(rows))
        # The first image loads the network and packs its weights.
        cost = Cost.of(few[1:])
        rows = plan_rows([str(top / "folder")], str(top / "out"))
        start = time.perf_counter()
        done(denoise(rows))
        seconds = time.perf_counter() - start
        document: dict[str, Any] = {
            "machine": collect(paths=False),
            "settings": {**settings, "side": side, "mean_megapixels": round(megapixels, 3)},
            "ms_a_megapixel": {name: round(value, 1) for name, value in vars(cost).items()},
            "one_process": row(cost.images_an_hour(megapixels), len(rows), seconds),
        }
        print(json.dumps({key: document[key] for key in ("ms_a_megapixel", "one_process")}, indent=1))
        if arguments.ray:
            together = arguments.workers_per_device
            rows = plan_rows([str(top / "folder")], str(top / "ray"))
            start, ended = time.perf_counter(), []
            pool = connect(None, together, arguments.device)
            for record in distribute(rows, settings, pool):
                done([record])
                ended.append(time.perf_counter())
            # The first record ends the start of Ray and of its workers, which hardly counts in a long run.
            predicted = cost.images_an_hour(
                megapixels, together, files_at_once=files_at_once(pool), cores=None if pool.gpus else int(pool.cpus)
            )
            steady = row(predicted, len(rows) - 1, ended[-1] - ended[0])
            document["ray"] = {**steady, "workers_per_device": together, "start_seconds": round(ended[0] - start, 1)}
            print(json.dumps(document["ray"], indent=1))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    write(arguments.json, document)
    print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
