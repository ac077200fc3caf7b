import errno
import fcntl
import io
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from program import TIMEOUT
from refusals import refused

from reid.data.store import UnreadableImageError, build_store, decode, open_store, store_file
from reid.errors import DataError, WorldError

GOLDEN = Path(__file__).parents[1] / "golden" / "val_transform.npz"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = (32, 16)

# Builds a store in a child process, `python -c CHILD LIMIT FILE IMAGE...`, and prints the outcome.
CHILD = f"""
import json, resource, sys
from pathlib import Path
from reid.data.store import build_store
limit = int(sys.argv[1])  # bytes per file, -1 for none
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
file, *paths = map(Path, sys.argv[2:])
try:
    build_store(file, paths, {SIZE}, num_threads=2)
    answer = ["built", ""]
except Exception as error:
    answer = [type(error).__name__, str(error)]
print(json.dumps(answer))
"""


def write_images(folder: Path, num_images: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(num_images)
    paths = [folder / f"{i:04d}_c1.jpg" for i in range(num_images)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (24, 12, 3), dtype=np.uint8)).save(path)
    return paths


def built(cache_dir: Path, paths: list[Path], size=SIZE, name="train") -> Path:
    file = store_file(cache_dir, name, paths, size)
    build_store(file, paths, size)
    return file


def expected(paths: list[Path], size=SIZE) -> np.ndarray:
    """Return the pixels that reid-strong-baseline's dataset and Resize give, by way of arrays."""
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(np.array(image.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)))
    return np.stack(images)


def start_child(file: Path, paths: list[Path], limit=resource.RLIM_INFINITY) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(limit), str(file), *map(str, paths)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def answer_of(child: subprocess.Popen) -> list[str]:
    out, _ = child.communicate(timeout=TIMEOUT)
    assert child.returncode == 0
    return json.loads(out)


@contextmanager
def stuck_build(file: Path, paths: list[Path]):
    """Start a build in another process that has written its first chunk and waits for an empty pipe."""
    pipe = paths[0].with_name("pipe.jpg")
    os.mkfifo(pipe)
    with start_child(file, [*paths, pipe]) as child:
        try:
            deadline = time.monotonic() + TIMEOUT
            while not any(any(partial.read_bytes()[128:]) for partial in partials(file.parent)):
                assert time.monotonic() < deadline
                assert child.poll() is None
                time.sleep(0.01)
            yield child
        finally:
            child.kill()
    pipe.unlink()


def partials(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.partial"))


def test_round_trip(tmp_path):
    paths = write_images(tmp_path / "images", 150)
    file = built(tmp_path / "new" / "cache", paths)
    images = open_store(file, 150, SIZE)
    assert isinstance(images, np.memmap)
    assert images.shape == (150, 32, 16, 3)
    assert images.dtype == np.uint8
    assert not images.flags.writeable
    np.testing.assert_array_equal(images, expected(paths))
    np.testing.assert_array_equal(np.load(file, mmap_mode="r"), images)
    assert list(file.parent.iterdir()) == [file]


def test_the_file_is_what_numpy_would_save(tmp_path):
    paths = write_images(tmp_path / "images", 3)
    file = built(tmp_path, paths)
    stream = io.BytesIO()
    np.save(stream, expected(paths))
    assert file.read_bytes() == stream.getvalue()


def test_agrees_with_the_recorded_transform(tmp_path):
    golden = np.load(GOLDEN)
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(golden[f"image_{i}"]).save(paths[-1])
    images = open_store(built(tmp_path, paths, (256, 128)), 3, (256, 128))
    for i in range(3):
        scaled = (images[i] / 255.0 - MEAN) / STD
        np.testing.assert_allclose(scaled.transpose(2, 0, 1), golden[f"tensor_{i}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_threads", [1, 2, 7])
@pytest.mark.parametrize("num_images", [1, 64, 65])
def test_the_number_of_threads_does_not_matter(tmp_path, num_threads, num_images):
    paths = write_images(tmp_path / "images", num_images)
    file = tmp_path / "store.npy"
    build_store(file, paths, SIZE, num_threads=num_threads)
    np.testing.assert_array_equal(open_store(file, num_images, SIZE), expected(paths))


@pytest.mark.parametrize("mode", ["L", "LA", "1", "RGB", "RGBA", "P", "CMYK"])
def test_every_color_mode_becomes_rgb(tmp_path, mode):
    picture = Image.new("RGB", (20, 40), (200, 30, 60))
    ImageDraw.Draw(picture).rectangle((3, 3, 12, 30), fill=(10, 220, 90))
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    picture.convert(mode).save(path)
    image = open_store(built(tmp_path, [path]), 1, SIZE)[0]
    np.testing.assert_array_equal(image, expected([path])[0])


def test_palette_with_transparency(tmp_path):
    # PIL warns when it is converted to RGB at once; warnings are errors here.
    picture = Image.new("P", (20, 40), 1)
    picture.putpalette([0, 0, 0, 200, 30, 60])
    picture.save(tmp_path / "image.png", transparency=b"\x00\x80")
    assert np.unique(np.frombuffer(decode(tmp_path / "image.png", SIZE), np.uint8)).tolist() == [30, 60, 200]


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    picture = Image.fromarray(np.arange(24 * 12 * 3, dtype=np.uint8).reshape(24, 12, 3))
    picture.save(tmp_path / "plain.png")
    picture.save(tmp_path / "rotated.png", exif=exif)
    assert decode(tmp_path / "rotated.png", SIZE) == decode(tmp_path / "plain.png", SIZE)


def test_complete_store_is_not_rebuilt(tmp_path):
    paths = write_images(tmp_path / "images", 5)
    file = built(tmp_path, paths)
    before = file.stat()
    assert built(tmp_path, paths) == file
    after = file.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_file_name_contains_split_size_and_hash(tmp_path):
    paths = write_images(tmp_path / "images", 2)
    file = store_file(tmp_path, "market1501-train", paths, (256, 128))
    assert file.parent == tmp_path
    assert re.fullmatch(r"market1501-train-256x128-[0-9a-f]{16}\.npy", file.name)


def test_any_change_asks_for_another_store(tmp_path):
    paths = write_images(tmp_path / "images", 5)
    files = [built(tmp_path, paths)]
    files.append(built(tmp_path, paths, (16, 32)))
    files.append(built(tmp_path, paths[::-1]))
    files.append(built(tmp_path, paths[:-1]))

    added = write_images(tmp_path / "images", 6)
    os.utime(paths[0], ns=(1, 1))
    files.append(built(tmp_path, added))
    os.utime(paths[0], ns=(1, 2))  # touched, one nanosecond later
    files.append(built(tmp_path, added))
    with paths[0].open("ab") as stream:  # longer, at the same time
        stream.write(b"\0")
    os.utime(paths[0], ns=(1, 2))
    files.append(built(tmp_path, added))
    paths[0].rename(tmp_path / "images" / "0000_c2.jpg")
    files.append(built(tmp_path, [tmp_path / "images" / "0000_c2.jpg", *added[1:]]))
    assert len(set(files)) == len(files)


def test_a_moved_data_set_keeps_its_store(tmp_path):
    paths = write_images(tmp_path / "images", 3)
    file = store_file(tmp_path, "train", paths, SIZE)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    assert store_file(tmp_path, "train", [tmp_path / "elsewhere" / path.name for path in paths], SIZE) == file


def test_images_of_one_name_in_other_folders_are_other_images(tmp_path):
    for folder in "abc":
        for path in write_images(tmp_path / folder, 2):
            os.utime(path, ns=(1, 1))  # as an archive without times is unpacked
    names = [path.name for path in sorted((tmp_path / "a").iterdir())]
    files = {
        store_file(tmp_path, "train", [tmp_path / one / names[0], tmp_path / other / names[1]], SIZE)
        for one, other in ("ab", "ba", "bc", "aa")
    }
    assert len(files) == 4
    (tmp_path / "away").mkdir()
    first = store_file(tmp_path, "train", [tmp_path / "a" / names[0], tmp_path / "b" / names[0]], SIZE)
    for folder in "ab":
        (tmp_path / folder).rename(tmp_path / "away" / folder)
    moved = [tmp_path / "away" / folder / names[0] for folder in "ab"]
    assert store_file(tmp_path, "train", moved, SIZE) == first


def test_reason_of_decode_equals_reason_in_build_error(tmp_path):
    (cut,) = write_images(tmp_path / "images", 1)
    cut.write_bytes(cut.read_bytes()[:-100])
    for path in (cut, tmp_path / "images" / "absent.jpg", tmp_path / "images"):
        with pytest.raises(UnreadableImageError) as raised:
            decode(path, SIZE)
        with refused(DataError, "DATASETS.ROOT_DIR", f"{path} ({raised.value})"):
            built(tmp_path, [path])


def test_open_images_are_decoded_as_their_files(tmp_path):
    intact, cut = write_images(tmp_path / "images", 2)
    cut.write_bytes(cut.read_bytes()[:-100])
    with Image.open(intact) as image:
        assert decode(image, SIZE) == decode(intact, SIZE)
    with Image.open(cut) as image, pytest.raises(UnreadableImageError, match="truncated"):
        decode(image, SIZE)


def test_a_replaced_image_is_decoded_again(tmp_path):
    paths = write_images(tmp_path / "images", 3)
    first = built(tmp_path, paths)
    Image.new("RGB", (12, 24), (9, 9, 9)).save(paths[1])
    second = built(tmp_path, paths)
    assert second != first
    np.testing.assert_array_equal(open_store(second, 3, SIZE), expected(paths))


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda content: content[:-1], "7,807 of 7,808 bytes"),
        (lambda content: content + b"\0", "7,809 of 7,808 bytes"),
        (lambda content: content[:50], "5 images of 32x16"),
        (lambda content: b"", "5 images of 32x16"),
        (lambda content: b"x" * len(content), "5 images of 32x16"),
    ],
)
def test_a_damaged_store_is_rejected_and_rebuilt(tmp_path, damage, fault):
    paths = write_images(tmp_path / "images", 5)
    file = built(tmp_path, paths)
    content = file.read_bytes()
    file.write_bytes(damage(content))
    with refused(WorldError, "DATASETS.CACHE_DIR", "DATASETS.CACHE_DIR", str(file), fault):
        open_store(file, 5, SIZE)
    build_store(file, paths, SIZE)
    assert file.read_bytes() == content


def test_open_refuses_a_missing_store_and_another_shape(tmp_path):
    file = tmp_path / "store.npy"
    with refused(WorldError, "DATASETS.CACHE_DIR", str(file), "No such file"):
        open_store(file, 5, SIZE)
    build_store(file, write_images(tmp_path / "images", 5), SIZE)
    for num_images, size in ((4, SIZE), (5, (16, 32)), (5, (32, 17))):
        with refused(WorldError, "DATASETS.CACHE_DIR", f"{num_images} images of {size[0]}x{size[1]}"):
            open_store(file, num_images, size)
    np.save(file, np.zeros((5, 32, 16, 3), np.int8))
    with refused(WorldError, "DATASETS.CACHE_DIR", "5 images of 32x16"):
        open_store(file, 5, SIZE)


def test_all_bad_images_are_named_in_one_error(tmp_path):
    paths = write_images(tmp_path / "images", 200)
    content = paths[3].read_bytes()
    paths[3].write_bytes(content[: len(content) * 9 // 10])
    paths[70].write_bytes(b"")
    paths[90].write_bytes(b"no image at all")
    paths[199].unlink()
    paths[100].unlink()
    paths[100].mkdir()
    cache_dir = tmp_path / "cache"
    keywords = [
        "5 of 200",
        f"{paths[3]} (image file is truncated",
        f"{paths[70]} (empty or not an image)",
        f"{paths[90]} (empty or not an image)",
        f"{paths[100]} (Is a directory)",
        f"{paths[199]} (No such file or directory)",
        "copy them again",
    ]
    with refused(DataError, "DATASETS.ROOT_DIR", *keywords):
        built(cache_dir, paths)
    assert list(cache_dir.iterdir()) == []


def test_a_long_list_of_bad_images_is_cut(tmp_path):
    paths = write_images(tmp_path / "images", 100)
    for path in paths[:75]:
        path.write_bytes(b"")
    with refused(DataError, "DATASETS.ROOT_DIR", "75 of 100", f"{paths[19]} (empty or not an image) and 55 more"):
        built(tmp_path / "cache", paths)


def test_repaired_images_are_built(tmp_path):
    paths = write_images(tmp_path / "images", 3)
    content = paths[1].read_bytes()
    paths[1].write_bytes(b"")
    with refused(DataError, "DATASETS.ROOT_DIR", str(paths[1])):
        built(tmp_path / "cache", paths)
    paths[1].write_bytes(content)
    np.testing.assert_array_equal(open_store(built(tmp_path / "cache", paths), 3, SIZE), expected(paths))


def test_no_images(tmp_path):
    with refused(DataError, "DATASETS.ROOT_DIR", "got none"):
        build_store(tmp_path / "store.npy", [], SIZE)


@pytest.mark.parametrize("cache_dir", ["/proc", "/proc/cache", "FILE", "FILE/cache"])
def test_a_cache_folder_that_cannot_be_written(tmp_path, cache_dir):
    # Not even root can make a file in /proc.
    (tmp_path / "file").touch()
    folder = Path(cache_dir.replace("FILE", str(tmp_path / "file")))
    paths = write_images(tmp_path / "images", 2)
    with refused(WorldError, "DATASETS.CACHE_DIR", "DATASETS.CACHE_DIR", f"{folder}/store.npy"):
        build_store(folder / "store.npy", paths, SIZE)


def check_full(message: str, file: Path, num_bytes: int) -> None:
    for keyword in ("DATASETS.CACHE_DIR", str(file), f"{num_bytes:,} bytes", "bytes are free"):
        assert keyword in message, message
    assert list(file.parent.iterdir()) == []


@contextmanager
def small_disk(folder: Path):
    """Mount a disk of 64 KiB at `folder`; yield False if this process may not."""
    folder.mkdir()
    command = [shutil.which("mount") or "false", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(tmp_path):
    paths = write_images(tmp_path / "images", 100)
    with small_disk(tmp_path / "disk") as mounted:
        file = tmp_path / "disk" / "store.npy"
        # Without the right to mount, a limit on the length of a file makes the kernel refuse at the same point.
        kind, message = answer_of(start_child(file, paths, resource.RLIM_INFINITY if mounted else 65536))
        assert kind == "WorldError"
        check_full(message, file, 128 + 100 * 32 * 16 * 3)
        build_store(file, paths[:20], SIZE)
        np.testing.assert_array_equal(open_store(file, 20, SIZE), expected(paths[:20]))


def test_limited_file_size(tmp_path):
    paths = write_images(tmp_path / "images", 100)
    file = tmp_path / "cache" / "store.npy"
    kind, message = answer_of(start_child(file, paths, 65536))
    assert kind == "WorldError"
    check_full(message, file, 128 + 100 * 32 * 16 * 3)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_the_disk_fills_up_while_building(tmp_path, monkeypatch, call, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    paths = write_images(tmp_path / "images", 3)
    file = tmp_path / "cache" / "store.npy"
    monkeypatch.setattr(f"reid.process.files.os.{call}", refuse)
    needed = f"{128 + 3 * 32 * 16 * 3:,} bytes"
    with refused(WorldError, "DATASETS.CACHE_DIR", str(file), needed, "bytes are free", os.strerror(number)):
        build_store(file, paths, SIZE)
    assert list(file.parent.iterdir()) == []


def test_short_writes_are_continued(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr("reid.process.files.os.pwrite", lambda fd, data, offset: pwrite(fd, data[:100], offset))
    paths = write_images(tmp_path / "images", 3)
    np.testing.assert_array_equal(open_store(built(tmp_path, paths), 3, SIZE), expected(paths))


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    paths = write_images(tmp_path / "images", 3)
    monkeypatch.setattr("reid.process.files.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path / "cache", paths)
    assert list((tmp_path / "cache").iterdir()) == []


def test_processes_that_build_the_same_store(tmp_path):
    paths = write_images(tmp_path / "images", 400)
    file = store_file(tmp_path / "cache", "train", paths, SIZE)
    children = [start_child(file, paths) for _ in range(3)]
    assert [answer_of(child) for child in children] == [["built", ""]] * 3
    assert list(file.parent.iterdir()) == [file]
    np.testing.assert_array_equal(open_store(file, 400, SIZE), expected(paths))


def test_a_killed_build_is_cleared_away(tmp_path):
    paths = write_images(tmp_path / "images", 70)
    file = tmp_path / "cache" / "store.npy"
    with stuck_build(file, paths) as child:
        child.kill()
        child.wait()
    assert len(partials(file.parent)) == 1
    assert not file.exists()
    build_store(file, paths, SIZE)
    assert list(file.parent.iterdir()) == [file]
    np.testing.assert_array_equal(open_store(file, 70, SIZE), expected(paths))


def test_leftovers_of_killed_build_of_another_store_are_removed(tmp_path):
    # A data set that was changed since then has a store of another name.
    paths = write_images(tmp_path / "images", 2)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "other.npy.0123.partial").write_bytes(b"x")
    (tmp_path / "cache" / "notes.partial").write_bytes(b"not ours")
    file = built(tmp_path / "cache", paths)
    assert sorted(file.parent.iterdir()) == sorted([file, tmp_path / "cache" / "notes.partial"])


def test_a_living_build_is_left_alone(tmp_path):
    paths = write_images(tmp_path / "images", 70)
    file = tmp_path / "cache" / "store.npy"
    with stuck_build(file, paths) as child:
        (living,) = partials(file.parent)
        build_store(file, paths, SIZE)
        assert child.poll() is None
        assert partials(file.parent) == [living]
    np.testing.assert_array_equal(open_store(file, 70, SIZE), expected(paths))


def test_partial_file_removed_before_lock_is_created_again(tmp_path, monkeypatch):
    flock, stolen = fcntl.flock, []

    def steal_then_lock(descriptor, operation):
        if not stolen:
            stolen.extend(partials(tmp_path / "cache"))
            stolen[0].unlink()
        flock(descriptor, operation)

    monkeypatch.setattr("reid.process.files.fcntl.flock", steal_then_lock)
    paths = write_images(tmp_path / "images", 2)
    file = built(tmp_path / "cache", paths)
    assert len(stolen) == 1
    np.testing.assert_array_equal(open_store(file, 2, SIZE), expected(paths))


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("reid.process.files.fcntl.flock", refuse)
    paths = write_images(tmp_path / "images", 2)
    (tmp_path / "cache").mkdir()
    other = tmp_path / "cache" / "other.npy.0123.partial"
    other.touch()
    file = built(tmp_path / "cache", paths)
    assert sorted(file.parent.iterdir()) == sorted([file, other])  # it may be alive


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "progress", "bar"),
    [(Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)],
)
def test_progress(tmp_path, monkeypatch, caplog, stream, progress, bar):
    paths = write_images(tmp_path / "images", 3)
    file = tmp_path / "store.npy"
    monkeypatch.setattr(sys, "stderr", stream)
    with caplog.at_level(logging.INFO, logger="reid"):
        build_store(file, paths, SIZE, num_threads=2, progress=progress)
    assert ("3/3" in stream.getvalue()) == bar
    first, last = (record.getMessage() for record in caplog.records)
    assert first == f"{file}: decoding 3 images with 2 threads, 0.0 MB"
    assert re.fullmatch(rf"{re.escape(str(file))}: 3 images in \d+\.\d s, 0\.0 MB", last)
