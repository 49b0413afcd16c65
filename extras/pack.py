"""Small copies of a folder of videos; where the originals are large, clips are read several times as fast.

    python -m extras.pack SRC DST                # once; then train with --data DST
    python -m extras.pack SRC DST --every 4      # every 4th frame only; then train with --stride 1

A copy has the name of its original, so that lists of videos stay valid, and holds MP4, whatever the extension says:
FFmpeg looks at the content. The shorter side is scaled down to --side; metadata rotation is applied.
The same command goes on after a stop. A killed run may leave a hidden folder .pack-* in DST: delete it.
"""

import itertools
import json
import math
import os
import shlex
import sys
import threading
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
from tqdm import tqdm

import data
from data import READ_ERRORS, VideoReformatter, error_reason

# MPEG-4 is decoded in half the time of H.264 of the same size and quality, and every FFmpeg can write it.
# g: a key frame every 8 frames. bf: no B-frames.
CODEC_OPTIONS = {"g": "8", "bf": "0", "qmin": "4", "qmax": "4", "b": "8M", "threads": "1"}


def write_video(path, images, rate, size):
    """Write images (H, W, C) uint8 as an MP4 file; size: (H, W), even."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate, options=CODEC_OPTIONS)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for image in images:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@contextmanager
def source_errors():
    """Turn errors of reading into ValueError, so that an OSError is always one of writing."""
    try:
        yield
    except READ_ERRORS as error:
        raise ValueError(error_reason(error)) from error


def pack_video(source, temporary, *, side, every, stop):
    """Write every `every`-th frame of a video to the file `temporary`, upright and scaled down to `side`.

    stop: a threading.Event that ends it. Raises ValueError if the video cannot be read, OSError if the copy
    cannot be written.
    """
    with ExitStack() as stack:
        with source_errors():
            container, stream = stack.enter_context(data.open_video(source))
            frames = itertools.islice(data.all_frames(container, stream), 0, None, every)
            first = next(frames, None)
        if first is None:
            raise ValueError("no frame can be decoded")
        scale = min(1, side / min(first.height, first.width))
        H, W = (max(1, math.ceil(round(size * scale) / 2)) * 2 for size in (first.height, first.width))
        if data.orientation(first)[0]:  # transposed
            H, W = W, H
        rate = min(max(float(stream.average_rate or stream.guessed_rate or 25) / every, 0.1), 1000)
        rate = Fraction(rate).limit_denominator(min(1001, int(65535 / rate)))  # MPEG-4 counts time in 16 bits
        reformatter = VideoReformatter()

        def images():
            with source_errors():
                for frame in itertools.chain([first], frames):
                    if stop.is_set():
                        raise InterruptedError("stopped")
                    yield data.upright_crop(frame, reformatter, H, W, (0.5, 0.5))

        write_video(temporary, images(), rate, (H, W))
        if left := sum(packet.size > 0 for packet in data.packets(container, stream)):
            tqdm.write(f"damaged: {source} (its last {left} frames are not in the copy)")


def read_settings(path):
    """The settings in a pack.json; None if there is none, or if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def pack(source, target, names, *, side=128, every=1, workers=None):
    """Copy the named videos of one folder into another; returns those that cannot be read, {name: reason}.

    Names that the target has already are skipped. Every file is written under a temporary name of this process
    and then renamed, so that a kill leaves no torn file, and two runs at once do not disturb each other.
    Raises ValueError if the target cannot be written, or holds something else.
    """
    source, target = Path(source).resolve(), Path(target).resolve()
    if target.is_relative_to(source):
        raise ValueError(f"{target} lies in {source}: videos would be packed twice; name another folder.")
    data.check_writable(target, folder=True)
    settings, path = {"source": str(source), "side": side, "every": every}, target / "pack.json"
    if not path.exists() and any(not file.name.startswith(".") for file in target.iterdir()):
        raise ValueError(f"{target} is not empty and was not packed by this program; name another folder.")
    if read_settings(path) not in (None, settings):
        raise ValueError(f"{target} was packed with other settings ({path}); name another folder.")
    stop = threading.Event()

    def pack_one(name):
        """Pack one video; returns the reason if it cannot be read, else None."""
        copy = Path(temporary, f"{threading.get_ident()}.mp4")
        try:
            if not (target / name).exists():
                pack_video(source / name, copy, side=side, every=every, stop=stop)
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(copy, target / name)
        except ValueError as error:
            return error_reason(error)

    try:
        with TemporaryDirectory(prefix=".pack-", dir=target) as temporary:
            Path(temporary, "pack.json").write_text(json.dumps(settings), encoding="utf-8")
            os.replace(Path(temporary, "pack.json"), path)
            pool = ThreadPoolExecutor(workers)  # FFmpeg runs outside of Python's lock
            try:
                reasons = list(tqdm(pool.map(pack_one, names), "pack videos", len(names)))
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)
    except OSError as error:
        raise ValueError(f"{target} cannot be written: {error}.") from error
    return {name: reason for name, reason in zip(names, reasons) if reason}


def time_reading(folder, names, *, stride, pixels):
    """Median milliseconds to read a random clip of 16 frames in one process."""
    rng, times = np.random.default_rng(0), []
    for name in rng.choice(names, 60):
        start, *crop = rng.random(3)
        begin = time.perf_counter()
        with suppress(*READ_ERRORS):
            video = (16, pixels, pixels)
            data.read_clip(Path(folder, name), video=video, stride=stride, start=start, crop=crop)
            times.append(1000 * (time.perf_counter() - begin))
    return float(np.median(times)) if times else math.nan


@data.user_errors()
def main(arguments=None):
    """Pack SRC into DST; then print how long a clip of each takes to read."""
    layout = {"formatter_class": RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = ArgumentParser(description=__doc__, **layout)
    add = parser.add_argument
    add("source", metavar="SRC", help="folder of videos")
    add("target", metavar="DST", help="folder of the copies")
    add("--side", type=int, default=128, help="shorter side that larger videos are scaled to [128]")
    add("--every", type=int, default=1, help="keep every EVERY-th frame [1]")
    add("--stride", type=int, default=4, help="stride of the clips that are timed, in frames of SRC [4]")
    add("--workers", type=int, default=os.cpu_count(), help="videos packed at a time [all cores]")
    args = parser.parse_args(arguments)
    data.keep_freed_memory()
    if not os.path.isdir(args.source):
        raise ValueError(f"{args.source!r} is not a folder; SRC is the folder that your videos are in.")
    if min(args.side, args.every, args.stride, args.workers) < 1 or args.stride % args.every:
        raise ValueError("All numbers must be at least 1, and --stride a multiple of --every, as 4 is of 2.")
    names = data.video_files(args.source)
    try:
        broken = pack(args.source, args.target, names, side=args.side, every=args.every, workers=args.workers)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        sys.exit(130)
    for name, reason in broken.items():
        print(f"broken: {name} ({reason})")
    print(f"{len(broken)} broken")
    names = [name for name in names if name not in broken]
    if not names:
        raise ValueError(f"No videos in {args.source} can be read.")
    for folder, stride in ((args.source, args.stride), (args.target, args.stride // args.every)):
        ms = time_reading(folder, names, stride=stride, pixels=args.side)
        size = sum(Path(folder, name).stat().st_size for name in names) / 1e6
        print(f"{folder}: {len(names)} videos, {size:.1f} MB, {ms:.2f} ms a clip at --stride {stride}")
    print(f"Train with --data {shlex.quote(args.target)} --stride {stride}")


if __name__ == "__main__":
    main()
