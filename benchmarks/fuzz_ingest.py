"""Does a mutated NIfTI header crash the ingest gate, hang it, fill the memory, or pass with voxels not its own?

Sound files of several types (NIfTI-1 and 2, plain and gzip, qform and sform, extensions, channels) are mutated: single
bits, bytes, whole fields set to extremes, headers cut, spliced or in the wrong byte order, bits of the gzip stream.
Each goes through ``transforms.ingest.read_image`` under an alarm and a memory ceiling. What is accepted is judged:

- mutated where nothing has a meaning for voxels or grid (NEUTRAL): voxels and affine must be those of the sound file;
- mutated elsewhere: the header says something else and says it consistently, so voxels and affine must be what a
  decoder of its own, written here from the standard with ``struct`` alone, makes of these very bytes.

Anything else is a failure, and the script ends with status 1. Reproduce one file with ``--first SEED --files 1``.

    .venv/bin/python benchmarks/fuzz_ingest.py --files 10000
"""

from __future__ import annotations

import argparse
import gzip
import math
import re
import resource
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import nibabel as nib
import numpy as np

from transforms.errors import DataError
from transforms.ingest import Budget, ImageFile, read_image

SECONDS, MEMORY = 10, 512 * 2**20
BUDGET = Budget(voxels=2**22, voxel_bytes=2**24)
EXTREMES = (0, 1, -1, 2, 3, 7, 8, 127, 255, 348, 352, 32767, -32768, 65535, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1e-45, 1e-6, -1.0, 0.5, 352.5, 1e6, 3e38, -3e38, math.inf, -math.inf, math.nan, 1e300)
NEUTRAL = {
    "data_type",
    "db_name",
    "extents",
    "session_error",
    "regular",
    "dim_info",
    "intent_p1",
    "intent_p2",
    "intent_p3",
    "intent_code",
    "slice_start",
    "slice_end",
    "slice_code",
    "slice_duration",
    "toffset",
    "glmax",
    "glmin",
    "cal_max",
    "cal_min",
    "descrip",
    "aux_file",
    "intent_name",
    "unused_str",
}
TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
Mutation = Callable[[bytearray, int, np.random.Generator], bytearray]


def sound_files() -> list[bytes]:
    """Return uncompressed NIfTI files that differ in everything that a header can say."""
    rng = np.random.default_rng(0)
    c, s = np.cos(0.4), np.sin(0.4)
    turned = np.array([[c, -s, 0, -40], [s, c, 0, 10], [0, 0, 1, 5], [0, 0, 0, 1]]) @ np.diag([0.7, 1.1, 3, 1])
    files = []
    for kind, dtype, shape, order in (
        (nib.Nifti1Image, "int16", (6, 7, 5), "<"),
        (nib.Nifti1Image, "float32", (6, 7, 5), "<"),
        (nib.Nifti1Image, "uint8", (4, 9, 3), "<"),
        (nib.Nifti1Image, "int16", (6, 7, 5), ">"),
        (nib.Nifti1Image, "float64", (3, 4, 5, 2), "<"),
        (nib.Nifti2Image, "int16", (6, 7, 5), "<"),
        (nib.Nifti2Image, "float32", (6, 7, 5), ">"),
    ):
        for code in ("sform", "qform"):
            header = kind.header_class(endianness=order)
            header.set_data_dtype(dtype)
            image = kind((rng.normal(size=shape) * 60 + 100).astype(dtype), turned, header)
            image.set_sform(turned, 1 if code == "sform" else 0)
            image.set_qform(turned, 0 if code == "sform" else 1)
            if kind is nib.Nifti1Image and dtype == "int16":
                image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"made by a script"))
            files.append(image.to_bytes())
    return files


def fields_of(content: bytes | bytearray) -> np.dtype:
    """Return the fields of the header, in its byte order."""
    kind = nib.Nifti2Header if bytes(content[:4]) in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nib.Nifti1Header
    big = content[:2] == b"\0\0"
    return kind.template_dtype.newbyteorder(">" if big else "<")


def one_bit(content: bytearray, length: int, rng: np.random.Generator) -> bytearray:
    """Flip a bit."""
    content[int(rng.integers(length))] ^= 1 << int(rng.integers(8))
    return content


def some_bits(content: bytearray, length: int, rng: np.random.Generator) -> bytearray:
    """Flip up to 16 bits."""
    for _ in range(int(rng.integers(2, 17))):
        one_bit(content, length, rng)
    return content


def some_bytes(content: bytearray, length: int, rng: np.random.Generator) -> bytearray:
    """Overwrite a run of up to 24 bytes by random ones, or by zeros, or by 255."""
    start, count = int(rng.integers(length)), int(rng.integers(1, 25))
    kind = int(rng.integers(3))
    run = rng.bytes(count) if kind == 0 else bytes([0 if kind == 1 else 255]) * count
    end = min(start + count, length)
    content[start:end] = run[: end - start]
    return content


def one_field(content: bytearray, length: int, rng: np.random.Generator) -> bytearray:
    """Set an entry of a field to an extreme of its type."""
    dtype = fields_of(content)
    name = str(rng.choice(list(dtype.names)))
    base, offset = dtype.fields[name][0], dtype.fields[name][1]
    item = base.base
    if item.kind == "S":
        return some_bytes(content, length, rng)
    at = offset + item.itemsize * int(rng.integers(max(1, math.prod(base.shape))))
    value = rng.choice(FLOATS) if item.kind == "f" else int(rng.choice(len(EXTREMES)))
    with np.errstate(all="ignore"):
        number = float(value) if item.kind == "f" else EXTREMES[int(value)] & (2 ** (8 * item.itemsize) - 1)
        raw = (
            np.array(number, dtype=item).tobytes()
            if item.kind == "f"
            else number.to_bytes(item.itemsize, "big" if item.byteorder == ">" else "little")
        )
    content[at : at + item.itemsize] = raw
    return content


def two_fields(content: bytearray, length: int, rng: np.random.Generator) -> bytearray:
    """Set two fields."""
    return one_field(one_field(content, length, rng), length, rng)


def cut(content: bytearray, length: int, rng: np.random.Generator) -> bytearray:
    """End the file early, mostly inside the header."""
    end = length if rng.random() < 0.7 else len(content)
    return content[: int(rng.integers(end))]


def spliced(content: bytearray, length: int, rng: np.random.Generator) -> bytearray:
    """Take a part of the header from another file."""
    other = SOUND[int(rng.integers(len(SOUND)))]
    start, end = sorted(int(n) for n in rng.integers(length, size=2))
    content[start:end] = other[start:end]
    return content


def swapped(content: bytearray, length: int, rng: np.random.Generator) -> bytearray:
    """Reverse the bytes of a field, as a writer with the wrong byte order does."""
    dtype = fields_of(content)
    name = str(rng.choice(list(dtype.names)))
    base, offset = dtype.fields[name][0], dtype.fields[name][1]
    for at in range(offset, offset + base.itemsize, base.base.itemsize):
        content[at : at + base.base.itemsize] = content[at : at + base.base.itemsize][::-1]
    return content


MUTATIONS: tuple[Mutation, ...] = (one_bit, some_bits, some_bytes, one_field, two_fields, cut, spliced, swapped)
SOUND = sound_files()


def mutated(seed: int) -> tuple[bytes, bytes, bytes, str]:
    """Return the sound content, the mutated one, the bytes of the file as it is written, and its ending."""
    rng = np.random.default_rng(seed)
    sound = SOUND[int(rng.integers(len(SOUND)))]
    length = 348 if sound[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c") else 540
    content = bytes(MUTATIONS[seed % len(MUTATIONS)](bytearray(sound), length, rng))
    if rng.random() < 0.5:
        return sound, content, content, ".nii"
    stream = bytearray(gzip.compress(content, mtime=0))
    if rng.random() < 0.2:
        one_bit(stream, len(stream), rng)
    return sound, content, bytes(stream), ".nii.gz"


def decode(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels and affine by the NIfTI standard, with ``struct`` alone; for files that are complete."""
    order = "<" if content[:4] in (b"\x5c\x01\0\0", b"\x1c\x02\0\0") else ">"
    second = struct.unpack(order + "i", content[:4])[0] == 540
    real, large = ("d", "q") if second else ("f", "h")
    at = dict(zip(("dim", "pix", "off", "slope", "q", "quat", "srow"), (16, 104, 168, 176, 344, 352, 400), strict=True))
    if not second:
        at = dict(zip(at, (40, 76, 108, 112, 252, 256, 280), strict=True))

    def read(layout: str, offset: int) -> tuple:
        return struct.unpack_from(order + layout, content, offset)

    dim = read(f"8{large}", at["dim"])
    code = read("h", 12 if second else 70)[0]
    pixdim = read(f"8{real}", at["pix"])
    offset = read("q" if second else "f", at["off"])[0]
    slope, inter = read(f"2{real}", at["slope"])
    qform, sform = read("2i" if second else "2h", at["q"])
    shape = dim[1 : 1 + dim[0]]
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    dtype = np.dtype(order + TYPES[code])
    flat = np.frombuffer(content, dtype, math.prod(shape), int(offset))
    voxels = flat.reshape(shape, order="F").astype(np.float64)
    with np.errstate(all="ignore"):
        if slope != 0 and math.isfinite(slope):
            voxels = voxels * slope + inter
    affine = np.eye(4)
    if sform > 0:
        affine[:3] = np.array(read(f"12{real}", at["srow"]), float).reshape(3, 4)
    elif qform > 0:
        b, c, d, x, y, z = read(f"6{real}", at["quat"])
        a = math.sqrt(max(0.0, 1 - b * b - c * c - d * d))
        turn = np.array(
            [
                [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
                [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
                [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
            ]
        )
        handed = -1 if pixdim[0] < 0 else 1
        affine[:3, :3] = turn * (pixdim[1], pixdim[2], pixdim[3] * handed)
        affine[:3, 3] = x, y, z
    else:
        raise ValueError("no orientation")
    return voxels, affine


def changed_fields(sound: bytes, content: bytes) -> set[str]:
    """Return the names of the header's fields in which two files differ."""
    dtype = fields_of(sound)
    names = set()
    for name, (base, offset, *_) in dtype.fields.items():
        if sound[offset : offset + base.itemsize] != content[offset : offset + base.itemsize]:
            names.add(name)
    if sound[dtype.itemsize :] != content[dtype.itemsize :]:
        names.add("behind the header")
    return names


def verdict(sound: bytes, content: bytes, image: ImageFile) -> str:
    """Return what an accepted file is, or a text that begins with FAILURE."""
    changed = changed_fields(sound, content)
    try:
        same_voxels, same_affine = decode(sound)
        voxels, affine = decode(content)
    except (struct.error, KeyError, ValueError) as error:
        return f"FAILURE: accepted, and no decoder of the standard can read it ({error!r}); changed: {sorted(changed)}"
    if changed <= NEUTRAL:
        voxels, affine = same_voxels, same_affine
        accepted = "accepted: the same image"
    else:
        accepted = "accepted: another image, as its header says"
    # Reading in float32 or float64, as nibabel chooses, rounds differently.
    equal = image.voxels.shape == voxels.shape and np.allclose(image.voxels, voxels, rtol=1e-6, atol=0)
    fits = np.allclose(image.affine, affine, rtol=1e-5, atol=1e-5)
    if not equal or not fits:
        return f"FAILURE: accepted with other {'affine' if equal else 'voxels'}; changed: {sorted(changed)}"
    return accepted


def outcome(seed: int, folder: Path) -> tuple[str, float]:
    """Return what the gate makes of one mutated file, and the seconds it took."""
    sound, content, stream, ending = mutated(seed)
    path = folder / f"file{ending}"
    path.write_bytes(stream)
    start = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        image = read_image(path, budget=BUDGET)
    except DataError as error:
        words = re.sub(r"\[[^]]*\]|b'[^']*'|0x[0-9a-f]+|[-+]?\d[\d.e+-]*|\bnan\b|\binf\b", "#", error.why)
        text = f"refused: {words[:76]}"
    except TimeoutError:
        text = f"FAILURE: more than {SECONDS} s"
    except BaseException as error:
        text = f"FAILURE: {type(error).__name__}: {error}"
    else:
        text = verdict(sound, content, image)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return text, time.perf_counter() - start


def alarm(signum: int, frame: FrameType | None) -> None:
    """End the file that is read."""
    raise TimeoutError


def memory_in_use() -> int:
    """Return the address space of this process in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> int:
    """Run the files and print the classes of outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first file")
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, alarm)
    outcomes: Counter[str] = Counter()
    examples: dict[str, int] = {}
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        outcome(options.first, Path(name))  # imports and caches are not the file's
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resource.setrlimit(resource.RLIMIT_AS, (memory_in_use() + MEMORY, resource.RLIM_INFINITY))
        for seed in range(options.first, options.first + options.files):
            text, seconds = outcome(seed, Path(name))
            outcomes[text] += 1
            examples.setdefault(text, seed)
            slowest = max(slowest, seconds)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    for text, count in sorted(outcomes.items(), key=lambda item: (not item[0].startswith("FAIL"), -item[1])):
        print(f"{count:7d}  {text}  (seed {examples[text]})")
    failures = sum(count for text, count in outcomes.items() if text.startswith("FAILURE"))
    print(
        f"{options.files} files: {failures} failures; slowest {slowest:.3f} s (limit {SECONDS} s); peak memory grew by "
        f"{grown / 1024:.1f} MiB (ceiling {MEMORY // 2**20} MiB)"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
