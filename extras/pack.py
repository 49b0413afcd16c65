"""Small copies of a folder of videos; if those are large, clips are read several times as fast.

    python pack.py SRC DST      # once; then train with --data DST
    python pack.py SRC          # only say how fast clips are read

A copy keeps its name to the letter, so that lists of videos stay valid, but holds MP4, whatever the name says:
FFmpeg looks at the content. An interrupted run goes on where it was.
"""

import errno
import itertools
import json
import math
import os
import shlex
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import numpy as np
from av.video.reformatter import VideoReformatter
from tqdm import tqdm

import data
from data import READ_ERRORS, Parser, number, printable, reason
from train import lock_folder

# MPEG-4 is decoded in half the time of H.264 of the same size and quality, and every FFmpeg can write it.
# g: a key frame every 8 frames. bf: no B-frames.
CODEC = {"g": "8", "bf": "0", "qmin": "4", "qmax": "4", "b": "8M", "threads": "1"}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the copies' fault, not the videos'


def pack_video(source, target, partial, *, side, every, stop):
    """Write every `every`-th frame of a video to `target`, upright, its shorter side scaled down to `side`.

    The file appears when it is complete; until then it is `partial`. The frame rate is the source's, divided
    by `every`. stop: an Event that gives up. Raises READ_ERRORS if nothing can be read or written.
    """
    with data.open_video(source) as (container, stream):
        frames = itertools.islice(data.all_frames(container, stream, limit=False), 0, None, every)
        first = next(frames, None)
        if first is None:
            raise ValueError("no frame can be decoded")
        scale = min(1, side / min(first.height, first.width))
        H, W = (max(2, math.ceil(round(size * scale) / 2) * 2) for size in (first.height, first.width))
        if round(first.rotation / 90) % 2:
            H, W = W, H
        rate = min(max(data.frame_rate(stream) / every, 0.1), 1000)
        rate = Fraction(rate).limit_denominator(min(1001, int(65535 / rate)))  # MPEG-4 counts time in 16 bits
        reformatter = VideoReformatter()

        def images():
            for frame in itertools.chain([first], frames):
                if stop.is_set():
                    raise InterruptedError("stopped")
                yield data.upright_crop(frame, reformatter, H, W, (0.5, 0.5))

        data.write_video(partial, images(), rate=rate, codec="mpeg4", options=CODEC)
        if left := data.count_packets(container, stream):
            tqdm.write(f"damaged: {printable(source.name)} (its last {left} frames are not in the copy)")
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(partial, target)


def pack(source, target, *, side=128, every=1, workers=None):
    """Pack all videos below a folder into another one, by the same names; returns broken ones {path: reason}.

    Files that are there already are skipped, so an interrupted run can be repeated. Raises ValueError for
    folders that must not be mixed, or that cannot be written; OSError if the disk is full.
    """
    source, target = Path(source).resolve(), Path(target).resolve()
    if target.is_relative_to(source):
        raise ValueError(f"{target} lies in {source}: videos would be packed twice; name another folder.")
    settings = json.dumps({"source": str(source), "side": side, "every": every})
    note, partial = target / "pack.json", target / ".partial"
    data.check_output(target, folder=True)
    if note.exists():
        if note.read_text(encoding="utf-8") != settings:
            raise ValueError(f"{target} was packed with other settings ({note}); name another folder.")
    elif any(target.iterdir()):
        raise ValueError(f"{target} exists and was not packed by this program; name another folder.")
    note.write_text(settings, encoding="utf-8")
    lock_folder(target)
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir()

    stop, how = threading.Event(), {"side": side, "every": every}

    def why_not(path):
        """Pack one video; the reason where that cannot be."""
        copy = partial / f"{threading.get_ident()}.mp4"
        try:
            pack_video(source / path, target / path, copy, **how, stop=stop)
        except READ_ERRORS as error:
            if getattr(error, "errno", None) in DISK_FULL:
                raise
            return reason(error)

    todo = [path for path in data.walk(source) if not (target / path).exists()]
    pool = ThreadPoolExecutor(workers or os.cpu_count())  # FFmpeg works outside of Python's lock
    try:
        reasons = list(tqdm(pool.map(why_not, todo), "pack videos", len(todo)))
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(partial, ignore_errors=True)
    return {path: why for path, why in zip(todo, reasons) if why}


def time_reading(folder, names, *, stride, pixels):
    """Median milliseconds to read a random clip of 16 frames in one process; None if none can be read."""
    rng, times = np.random.default_rng(0), []
    for name in rng.choice(names, 60):
        start, *crop = rng.random(3)
        begin = time.perf_counter()
        with suppress(*READ_ERRORS):
            path, video = Path(folder) / name, (16, pixels, pixels)
            data.read_clip(path, video=video, stride=stride, start=start, crop=crop)
            times.append(1000 * (time.perf_counter() - begin))
    return float(np.median(times)) if times else None


@data.program()
def main(arguments=None):
    """Pack SRC into DST, if that is given; then say how long the videos of each take to read."""
    parser, count = Parser(__doc__), number(least=1)
    add = parser.add_argument
    add("source", metavar="SRC", help="folder of videos")
    add("target", metavar="DST", nargs="?", help="folder for the copies, by the same names")
    add("--side", type=number(least=16), default=128, help="shorter side that larger videos are scaled to")
    add("--every", type=count, default=1, help="keep every EVERY-th frame; train with as much less --stride")
    add("--stride", type=count, default=4, help="stride to time the reading with, in SRC's frames")
    add("--workers", type=count, default=os.cpu_count(), help="videos packed at a time")
    args = parser.parse_args(arguments)
    if not os.path.isdir(args.source):
        raise ValueError(f"{args.source!r} is not a folder; SRC is the folder that your videos are in.")
    if args.target == "":
        raise ValueError("DST is an empty name; name the folder for the copies, or leave it out.")
    if args.every > 1 and not args.target:
        raise ValueError("--every wants a folder for the copies: python pack.py SRC DST --every 4.")
    if args.stride % args.every:
        raise ValueError(f"--stride {args.stride} must be a multiple of --every {args.every}, as 4 is of 2.")
    places, names = {args.source: args.stride}, data.walk(args.source)
    if args.target:
        places[args.target] = args.stride // args.every
        try:
            broken = pack(args.source, args.target, side=args.side, every=args.every, workers=args.workers)
        except KeyboardInterrupt:
            print("\nStopped. The same command goes on from here.", file=sys.stderr)
            raise
    else:
        counts = data.look_at(Path(args.source), names)
        broken = {path: why for path, why in counts.items() if isinstance(why, str)}
    for path, why in broken.items():
        print(f"broken: {printable(path)} ({why})")
    names = [path for path in names if path not in broken]
    for folder, stride in places.items():
        ms = time_reading(folder, names, stride=stride, pixels=args.side) if names else None
        if ms is None:
            raise ValueError(f"No videos in {folder} can be read.")
        size = sum((Path(folder) / path).stat().st_size for path in names) / 1e6
        print(f"{printable(folder)}: {len(names)} videos, {size:.1f} MB, ", end="")
        print(f"{ms:.2f} ms to read a clip at --stride {stride}")
    print(f"{len(broken)} broken")
    if args.target:
        print(f"Train with --data {shlex.quote(printable(args.target))} --stride {stride}")


if __name__ == "__main__":
    main()
