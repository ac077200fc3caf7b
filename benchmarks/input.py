"""Cost of the input, from image files to normalized, augmented batches: CPU seconds and memory.

    uv run python benchmarks/input.py [--quick] [--folder FOLDER]

Images of 256x128, batches of 64, one thread. "store": decoding and resizing JPEG files of 128x64 once, against decoding
alone. "gather": a batch out of the memory-mapped store, against a copy of as many bytes. "draw" and "augment": flip,
pad, crop, normalize and erase, against a conversion to float32 alone. "batch": all of them. "PIL": the same from files,
image by image, as reid-strong-baseline does it every epoch, reimplemented here (resize, flip, pad, crop, to tensor,
normalize, erase). "waits": how long a trainer waits for each batch, loaded in line or by the thread, with the store in
the page cache (warm) or only on the disk (cold), during steps of 30 ms that sleep, multiply matrices, or launch many
small operations. Where there is a GPU: copies to it, and augmentation of images in its memory. FOLDER is on the disk to
be used.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from measuring import Cost, costs_in_turn, device
from PIL import Image, ImageOps
from tables import machine, print_line, table
from torch import Tensor

from reid.data import augment
from reid.data.loaders import Batch, BatchLoader, StoredImages
from reid.data.samplers import PlannedBatch
from reid.data.store import build_store, open_store

SIZE, FILE_SIZE = (256, 128), (128, 64)  # H and W
BATCH, PADDING = 64, 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPE = augment.Recipe(SIZE, flip_probability=0.5, padding=PADDING, erasing_probability=0.5, seed=0)
NUM_BYTES = 3 * SIZE[0] * SIZE[1]
PER_GPU, NUM_GPUS = 4_000, 8  # images per second that a GPU trains on
RSB = 912  # images per CPU second of the pipeline of reid-strong-baseline on a faster machine, see RESULTS.md
TARGETS = {"gather": 50_000.0, "store": 1_500.0}  # images per CPU second
ROUNDS = 3
STEP = 0.03  # seconds of a trainer's step
WAYS: dict[str, Callable[[StoredImages, list[PlannedBatch]], Iterable[Batch]]] = {
    "in line": lambda images, plans: BatchLoader(images, plans, prefetch=False, pin_memory=False),
    "thread": lambda images, plans: BatchLoader(images, plans, prefetch=True, pin_memory=False),
}


def write_files(folder: Path, num_images: int) -> list[Path]:
    """Write JPEG files with about as many bytes as photographs of people have."""
    generator = np.random.default_rng(0)
    height, width = FILE_SIZE
    paths = []
    for number in range(num_images):
        coarse = Image.fromarray(generator.integers(0, 256, (16, 8, 3), dtype=np.uint8))
        paths.append(folder / f"{number:05d}.jpg")
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def planned(num_images: int) -> list[PlannedBatch]:
    order = np.random.default_rng(0).permutation(num_images)
    starts = range(0, num_images - BATCH + 1, BATCH)
    return [PlannedBatch(1, order[i : i + BATCH], np.arange(i, i + BATCH)) for i in starts]


def pil_batch(paths: list[Path], generator: random.Random) -> Tensor:
    return torch.stack([pil_image(path, generator) for path in paths])


def pil_image(path: Path, generator: random.Random) -> Tensor:
    """Return [3, H, W], as the transforms of the original give it."""
    height, width = SIZE
    with Image.open(path) as file:
        image = file.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    if generator.random() < RECIPE.flip_probability:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    padded = ImageOps.expand(image, PADDING)
    left, top = (generator.randrange(2 * PADDING + 1) for _ in range(2))
    pixels = torch.from_numpy(np.array(padded.crop((left, top, left + width, top + height))))
    result = pixels.permute(2, 0, 1).contiguous().float().div_(255)
    result.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])
    if generator.random() < RECIPE.erasing_probability:
        erase(result, generator)
    return result


def erase(image: Tensor, generator: random.Random) -> None:
    height, width = SIZE
    for _ in range(100):
        area, ratio = generator.uniform(0.02, 0.4) * height * width, generator.uniform(0.3, 1 / 0.3)
        h, w = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if h < height and w < width:
            top, left = generator.randrange(height - h + 1), generator.randrange(width - w + 1)
            image[:, top : top + h, left : left + w] = torch.tensor(MEAN)[:, None, None]
            return


def each(work: Callable[[int], object], num_batches: int) -> Callable[[], object]:
    """Return a function that does the work for every batch, one after the other."""

    def all_of_them() -> None:
        for number in range(num_batches):
            work(number)

    return all_of_them


def on_the_cpu(paths: list[Path], store: np.ndarray) -> dict[str, Cost]:
    """Return the cost of each part for all images, and print the table."""
    dataset = StoredImages([store], np.zeros(len(store), dtype=np.int64), None)
    plans = planned(len(store))
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    images = torch.from_numpy(dataset.images(plans[0].sample_ids))
    drawn = [augment.draw(RECIPE, 1, plan.positions) for plan in plans]
    kept, generator = torch.empty_like(images), random.Random(0)

    def batch(number: int) -> Tensor:
        fresh = torch.from_numpy(dataset.images(plans[number].sample_ids))
        return augment.augment(fresh, augment.draw(RECIPE, 1, plans[number].positions), PADDING, mean, std)

    works: dict[str, Callable[[int], object]] = {
        "copy of as many bytes (limit)": lambda number: kept.copy_(images),
        "gather": lambda number: dataset.images(plans[number].sample_ids),
        "to float32 alone (limit)": lambda number: images.permute(0, 3, 1, 2).contiguous().float(),
        "draw": lambda number: augment.draw(RECIPE, 1, plans[number].positions),
        "augment": lambda number: augment.augment(images, drawn[number], PADDING, mean, std),
        "batch: gather, draw, augment": batch,
        "PIL, from files": lambda number: pil_batch([paths[i] for i in plans[number].sample_ids], generator),
    }
    costs = costs_in_turn({name: each(work, len(plans)) for name, work in works.items()}, ROUNDS)
    limits = {"gather": "copy of as many bytes (limit)", "augment": "to float32 alone (limit)"}
    num_images, rows = len(plans) * BATCH, list[list[object]]()
    for name, cost in costs.items():
        limit = costs[limits[name]].cpu if name in limits else None
        pil = costs["PIL, from files"].cpu / cost.cpu if "batch" in name or "PIL" in name else None
        ratios = [blank(cost.cpu / limit if limit else None), blank(pil), blank(TARGETS.get(name))]
        rows.append([name, num_images / cost.cpu, *ratios, cost.memory])
    table(
        f"{num_images:,} images, {len(plans)} batches of {BATCH}; {NUM_BYTES:,} bytes an image in the store, four "
        f"times as "
        f"many as float32; median of {ROUNDS}",
        ["what", "images per CPU s", "CPU to its limit", "times PIL's", "target", "GB above"],
        rows,
    )
    return costs


def blank(value: float | None) -> object:
    return "" if value is None else value


def building(folder: Path, paths: list[Path]) -> None:
    def decode() -> None:
        for path in paths:
            with Image.open(path) as image:
                image.load()

    def build() -> None:
        file = folder / "built.npy"
        build_store(file, paths, SIZE, num_threads=1)
        file.unlink()

    costs = costs_in_turn({"decoding alone (limit)": decode, "store": build}, ROUNDS)
    limit = costs["decoding alone (limit)"].cpu
    rows = [[name, len(paths) / c.cpu, c.cpu / limit, blank(TARGETS.get(name)), c.memory] for name, c in costs.items()]
    size = sum(path.stat().st_size for path in paths) / len(paths)
    table(
        f"The store of {len(paths):,} JPEG files of {FILE_SIZE[0]}x{FILE_SIZE[1]}, {size:,.0f} bytes on average",
        ["what", "images per CPU s", "CPU to the limit", "target", "GB above"],
        rows,
    )


def needs(costs: dict[str, Cost], num_images: int) -> None:
    """Print the number of CPU cores that the GPUs of a node keep busy."""
    wanted = PER_GPU * NUM_GPUS
    ways = {
        "all images in GPU memory: draw": ("draw",),
        "gather, draw; the rest on the GPU": ("gather", "draw"),
        "all on CPUs": ("batch: gather, draw, augment",),
        "PIL": ("PIL, from files",),
    }
    rows = [[name, wanted / num_images * sum(costs[part].cpu for part in parts)] for name, parts in ways.items()]
    rows.append([f"reid-strong-baseline, {RSB} images per CPU s elsewhere", wanted / RSB])
    table(f"Cores for {NUM_GPUS} GPUs at {PER_GPU:,} images/s each: {wanted:,} images/s", ["way", "cores"], rows)


def repeated(work: Callable[[], object]) -> Callable[[], object]:
    """Return the work, done as often as fills one step."""
    work()
    start, number = time.perf_counter(), 0
    while time.perf_counter() < start + 10 * STEP:
        work()
        number += 1
    return each(lambda _: work(), max(number // 10, 1))


def drop_from_page_cache(file: Path) -> None:
    """Remove the file from the page cache; no process may map it."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def waits(file: Path, num_images: int) -> None:
    matrix, few = torch.rand(512, 512), torch.zeros(16)
    steps = {
        "sleep": lambda: time.sleep(STEP),
        "matrix products": repeated(lambda: matrix @ matrix),
        "small operations": repeated(lambda: few.add_(1)),
    }
    measured: dict[tuple[str, str, str], list[tuple[list[float], list[float]]]] = {}
    for _ in range(ROUNDS):
        for cache in ("warm", "cold"):
            for name, step in steps.items():
                for way in WAYS:
                    measured.setdefault((cache, name, way), []).append(epoch(file, num_images, cache, step, way))
    rows: list[list[object]] = []
    for key, rounds in measured.items():
        waited, worked = ([1e3 * t for part in rounds for t in part[i][1:]] for i in (0, 1))
        first = statistics.median(1e3 * waited[0] for waited, _ in rounds)
        rows.append([*key, first, *map(float, (statistics.median(waited), statistics.mean(waited), max(waited)))])
        rows[-1].append(statistics.median(worked))
    table(
        f"Waits for batches of {BATCH}, ms, {ROUNDS} epochs of {num_images // BATCH} batches; steps of about 30 ms",
        ["page cache", "step", "loading", "first wait", "median wait", "mean wait", "longest wait", "median step"],
        rows,
    )


def epoch(
    file: Path, num_images: int, cache: str, step: Callable[[], object], way: str
) -> tuple[list[float], list[float]]:
    """Return the seconds of waiting for each batch, and those of each step."""
    if cache == "cold":
        drop_from_page_cache(file)
    store = open_store(file, num_images, SIZE)
    if cache == "warm":
        store.max()
    batches = iter(WAYS[way](StoredImages([store], np.zeros(num_images, dtype=np.int64), RECIPE), planned(num_images)))
    waited, worked = list[float](), list[float]()
    for _ in range(num_images // BATCH):
        start = time.perf_counter()
        next(batches)
        received = time.perf_counter()
        step()
        waited.append(received - start)
        worked.append(time.perf_counter() - received)
    return waited, worked


def on_the_gpu(store: np.ndarray) -> None:
    """Measure copies from pinned memory, and augmentation of a batch on the GPU."""
    where = device()
    host = torch.from_numpy(np.array(store[:BATCH])).pin_memory()
    images, ids = torch.from_numpy(np.array(store)).to(where), torch.arange(BATCH, device=where)
    drawn = augment.draw(RECIPE, 1, np.arange(BATCH)).to(where)
    mean, std = torch.tensor(MEAN, device=where), torch.tensor(STD, device=where)
    kept, repeats = torch.empty_like(images[:BATCH]), 100
    works: dict[str, Callable[[int], object]] = {
        "copy on the GPU of as many bytes (limit)": lambda number: kept.copy_(images[:BATCH]),
        "copy from pinned memory": lambda number: kept.copy_(host, non_blocking=True),
        "gather on the GPU": lambda number: images.index_select(0, ids),
        "augment": lambda number: augment.augment(kept, drawn, PADDING, mean, std),
    }
    costs = costs_in_turn({name: each(work, repeats) for name, work in works.items()}, ROUNDS)
    rows = [
        [name, 1e3 * cost.seconds / repeats, repeats * BATCH / cost.seconds, cost.memory]
        for name, cost in costs.items()
    ]
    table(f"On the GPU, batches of {BATCH}", ["what", "ms a batch", "images/s", "GB above"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, seconds")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be used; default: the temporary one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print_line(f"input.py{' --quick' if arguments.quick else ''}: {machine()}")
    with tempfile.TemporaryDirectory(prefix="bench_", dir=arguments.folder) as name:
        folder = Path(name)
        paths = write_files(folder, 2 * BATCH if arguments.quick else 2048)
        building(folder, paths)
        file = folder / "store.npy"
        build_store(file, paths, SIZE, num_threads=1)
        waits(file, len(paths))
        store = open_store(file, len(paths), SIZE)
        costs = on_the_cpu(paths, store)
        needs(costs, len(planned(len(store))) * BATCH)
        if torch.cuda.is_available():
            on_the_gpu(store)


if __name__ == "__main__":
    main()
