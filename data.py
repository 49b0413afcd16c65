"""Clips to train on: generated moving scenes (no download), or any folder of videos, read with PyAV.

Römer & Dickscheid, arXiv 2601.09040, Sec. 3.2: 16 frames at stride 4; random crop and flip for training,
centre crop for evaluation; videos that are too short are dropped.

    source = Scenes("train")                          # or Videos("UCF-101", list_file="trainlist01.txt")
    for batch in loader(source, batch=32, last=1500):
        batch["video"]                                # (B, T, H, W, C) uint8

    python data.py SRC DST      # once: pack a folder of videos, so that clips are read several times as fast
    python data.py SRC          # only say how fast clips are read

Sample k of the endless training stream is a pure function of (seed, k): order, start, crop and flip keep no
random state. So the number of workers, stopping and resuming change nothing, and any step's batch can be made
again.

Shapes: B batch, T frames, H W pixels, C channels.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import stat
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch.utils.data import DataLoader
from tqdm import tqdm

# ---- generated clips: moving scenes ----

COLOURS = {"red": (0.85, 0.3, 0.3), "green": (0.3, 0.8, 0.3), "blue": (0.3, 0.4, 0.9)}
RADII = {"small": 0.32, "large": 0.54}  # of the disc of equal area, in half frames
MOTIONS = {  # over one clip: x shift in half frames, y shift, turns, log-scale in cycles
    "left": (-1, 0, 0, 0),
    "right": (1, 0, 0, 0),
    "up": (0, -1, 0, 0),
    "down": (0, 1, 0, 0),
    "clockwise": (0, 0, 0.4, 0),
    "counter-clockwise": (0, 0, -0.4, 0),
    "grow": (0, 0, 0, 0.6),
    "shrink": (0, 0, 0, -0.6),
}


SCENE_LABELS = {  # low, middle, middle, high, high
    "colour": tuple(COLOURS),
    "shape": ("disc", "ring", "cross"),
    "size": tuple(RADII),
    "motion": tuple(MOTIONS),
    "agreement": ("no", "yes"),
}


class Scenes:
    """Generated clips of one textured object that moves over a moving background, with five balanced labels.

    low: `colour` of the object; middle: its `shape` and `size`; high: its `motion`, and `agreement`: does the
    background share that motion? All 288 combinations come once in every 288 clips, in random order. Clip i
    of a split is a pure function of (seed, split, i). Masked tubes can be predicted from the few visible
    ones, because the content is smooth and dominated by low frequencies, as in natural images.

    A single frame says nothing about the motion: place (on a torus), angle and log-scale (on a circle) are
    uniform at every frame, whatever the motion. So an object that has grown to its largest size goes on from
    its smallest.

    split: "train" or "test". clips: how many make one epoch. video: (T, H, W).
    """

    def __init__(self, split="train", *, clips=20000, video=(16, 64, 64), seed=0):
        self.split = ("train", "test").index(split)
        self.clips, self.video, self.seed, self.labels = clips, tuple(video), seed, SCENE_LABELS

    def __len__(self):
        return self.clips

    def name(self, index):
        """What to call clip `index` in a message."""
        return f"generated clip {index}"

    @property
    def fingerprint(self):
        """As in Videos."""
        return f"scenes {self.clips}"

    def check_broken(self, found=()):
        """As in Videos; generated clips do not break."""
        return {}

    def targets(self, index):
        """The class number of clip `index` in each of `labels`."""
        sizes = [len(values) for values in self.labels.values()]
        combinations = int(np.prod(sizes))
        rounds, place = divmod(index, combinations)
        order = np.random.default_rng((self.seed, self.split, 0, rounds)).permutation(combinations)
        return tuple(int(number) for number in np.unravel_index(order[place], sizes))

    def read(self, index, rng=None):
        """Clip `index`, (T, H, W, C) uint8. Nothing is random: rng is unused."""
        rng = np.random.default_rng((self.seed, self.split, 1, index))
        colour, shape, size, motion, agreement = (
            values[number] for values, number in zip(self.labels.values(), self.targets(index))
        )
        others = [name for name in MOTIONS if name != motion]
        backdrop = motion if agreement == "yes" else others[rng.integers(len(others))]
        frames = draw_background(rng, self.video, motion=backdrop)
        draw_object(frames, rng, colour=colour, shape=shape, size=size, motion=motion)
        return (frames.clip(0, 1) * 255 + 0.5).astype(np.uint8).transpose(0, 1, 3, 2).copy()  # (T, H, W, C)


def axes(video):
    """Share of the clip passed (T, 1), and pixel centres x (1, W) and y (1, H) in half frames, -1..1."""
    T, H, W = video
    x, y = ((np.arange(size)[None] + 0.5) * 2 / size - 1 for size in (W, H))
    return np.arange(T)[:, None] / T, x, y


def plane_waves(x, y, frequency, angle, phase, weight):
    """Sum of n plane waves per frame: x (T, W), y (T, H), frequency, angle, phase (T, n), weight (T, n, C).

    cos(a + b) = cos a cos b - sin a sin b makes the whole sum a product of small matrices.
    Returns (T, H, C, W) float32; columns come last because numpy is fast along its last axis.
    """
    kx, ky = 2 * np.pi * frequency * np.cos(angle), 2 * np.pi * frequency * np.sin(angle)
    a = (kx[:, :, None] * x[:, None] + phase[:, :, None]).astype(np.float32)[:, :, None]  # (T, n, 1, W)
    b = (ky[:, None] * y[:, :, None]).astype(np.float32)  # (T, H, n)
    weight = weight.astype(np.float32)[..., None]  # (T, n, C, 1)
    columns = np.concatenate([np.cos(a) * weight, np.sin(a) * -weight], axis=1)  # (T, 2n, C, W)
    rows = np.concatenate([np.cos(b), np.sin(b)], axis=2)  # (T, H, 2n)
    T, _, C, W = columns.shape
    return (rows @ columns.reshape(T, -1, C * W)).reshape(T, -1, C, W)


def draw_background(rng, video, *, motion, waves=3, speed=0.6, lowest=0.1, octaves=3, contrast=0.28):
    """Smooth colours in motion, (T, H, C, W) float32: the sum of a few plane waves in each colour channel.

    lowest: frequency in cycles per half frame; the waves lie up to `octaves` above. A wave fades out at both
    ends of that range, so that the background zooms for ever without a seam. speed: shift over the clip, in
    half frames.
    """
    time, x, y = axes(video)
    right, down, turns, zoom = MOTIONS[motion]
    n = 3 * waves
    scale = (rng.random(n) - zoom * time) % 1  # (T, n)
    frequency = lowest * 2 ** (octaves * scale)
    angle = 2 * np.pi * (rng.random(n) + turns * time)
    shift = speed * time * (right * np.cos(angle) + down * np.sin(angle))
    phase = 2 * np.pi * (rng.random(n) - frequency * shift)
    weight = contrast * np.sin(np.pi * scale)[..., None] ** 2 * np.tile(np.eye(3), (waves, 1))  # (T, n, C)
    level = (0.35 + 0.3 * rng.random((3, 1))).astype(np.float32)
    return (
        plane_waves(x.repeat(len(time), 0), y.repeat(len(time), 0), frequency, angle, phase, weight) + level
    )


def draw_object(frames, rng, *, colour, shape, size, motion, speed=1.2, contrast=0.12):
    """Paint one object over frames (T, H, C, W), in place. speed: shift over the clip, in half frames."""
    T, H, _, W = frames.shape
    time, x, y = axes((T, H, W))
    right, down, turns, zoom = MOTIONS[motion]
    place = 2 * rng.random(2)
    x = (x - place[0] - speed * right * time) % 2 - 1  # (T, W): from the object's centre, on a torus
    y = (y - place[1] - speed * down * time) % 2 - 1  # (T, H)
    radius = RADII[size] * 1.25 ** ((rng.random() + zoom * time) % 1)  # (T, 1)
    tilt = 2 * np.pi * (rng.random() + turns * time)  # (T, 1)

    frequency = (0.2 + 0.3 * rng.random(2)) / radius  # (T, 2)
    phase = np.tile(2 * np.pi * rng.random(2), (T, 1))
    grey = plane_waves(x, y, frequency, tilt + 2 * np.pi * rng.random(2), phase, np.full((T, 2, 1), contrast))
    texture = grey + np.array(COLOURS[colour], np.float32)[:, None]  # (T, H, C, W)

    x, y, radius, tilt = (
        a.astype(np.float32) for a in (x[:, None], y[..., None], radius[..., None], tilt[..., None])
    )
    # The reach of each shape gives it the area of a disc of the same radius.
    if shape == "cross":  # of two bars, three times as long as wide
        across, along = (abs(np.cos(t) * x + np.sin(t) * y) for t in (tilt, tilt + np.float32(np.pi / 2)))
        distance = np.maximum(np.maximum(across, along), 3 * np.minimum(across, along))  # (T, H, W)
        reach = radius * math.sqrt(9 * math.pi / 20)
    else:
        distance, reach = np.sqrt(x * x + y * y), radius  # (T, H, W), (T, 1, 1)
        if shape == "ring":  # with a hole of .55 of its reach
            reach = radius / math.sqrt(1 - 0.55**2)
            distance = np.maximum(distance, 1.55 * reach - distance)
    edge = ((reach - distance) * (W / 3) + 0.5).clip(0, 1)  # soft over 1.5 pixels
    texture -= frames
    texture *= edge[:, :, None]
    frames += texture


# ---- generated clips: the paper's gratings ----

ANGLES = tuple(range(0, 360, 30))
HUES = {"gray": (1, 1, 1), "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "orange": (1, 0.5, 0)}
SINGLE = {  # values of each stimulus parameter, in the paper's product order: the last one changes fastest
    "sf": (4, 8, 12, 16, 20, 24),  # spatial frequency, cycles per width
    "theta": ANGLES,  # degrees
    "tf": (0.5, 1, 2, 4, 6, 8),  # Hz; at 6.25 frames per second, 4, 6 and 8 Hz alias
    "contrast": (0.2, 0.4, 0.6, 0.8, 1.0),
    "colour": tuple(HUES),
}
DOUBLE = {
    "sf_left": (4, 10, 16),
    "sf_right": (4, 10, 16),
    "theta_left": ANGLES,
    "delta": (0, 45, 90, 135),  # theta_right = theta_left + delta
    "tf": (2, 5, 8),
    "contrast": (0.33, 0.67, 1.0),
    "colour": ("gray", "red", "green", "blue"),
}


def drifting_grating(*, sf, theta, tf, contrast, colour, video=(16, 128, 128), rate=6.25):
    """A drifting grating (Sec. 4): (T, H, W, 3) float32, values -1..1 times the colour vector.

    Frame i = contrast * sin(2 pi (sf / 2) x' + 2 pi tf / rate * i), x' = x cos(theta) + y sin(theta), with x
    and y from -1 to 1 over the frame. sf in cycles per width, theta in degrees, tf in Hz, rate in frames per
    second.
    """
    T, H, W = video
    x, y = np.linspace(-1, 1, W)[None, None], np.linspace(-1, 1, H)[None, :, None]
    along = x * math.cos(math.radians(theta)) + y * math.sin(math.radians(theta))
    time = np.arange(T)[:, None, None] / rate
    wave = contrast * np.sin((np.pi * sf * along + 2 * np.pi * tf * time).astype(np.float32))
    return wave[..., None].astype(np.float32) * np.array(HUES[colour], np.float32)


class Gratings:
    """The paper's stimuli (Sec. 4): 10,800 drifting gratings, or 15,552 with one in each half of the frame.

    Differs from paper: contrast and colour labels are the true ones. The released evaluation truncates
    contrasts to integers and mixes up colours, so that its means end near 84 %.
    """

    def __init__(self, *, double=False, video=(16, 128, 128)):
        self.double, self.video = double, tuple(video)
        self.parameters = DOUBLE if double else SINGLE
        self.labels = dict(SINGLE)
        if double:
            sides = {"sf_left": DOUBLE["sf_left"], "sf_right": DOUBLE["sf_right"]}
            sides |= {"sf_difference": (-12, -6, 0, 6, 12), "higher_side": ("left", "right", "equal")}
            angles = {"theta_left": ANGLES, "theta_right": tuple(range(0, 360, 15)), "delta": DOUBLE["delta"]}
            self.labels = sides | {"sf_match": ("no", "yes")} | angles | {"theta_match": ("no", "yes")}

    def __len__(self):
        return math.prod(map(len, self.parameters.values()))

    def name(self, index):
        """What to call clip `index`: its parameters."""
        return ", ".join(f"{name} {value}" for name, value in self.stimulus(index).items())

    def check_broken(self, found=()):
        """As in Videos; generated clips do not break."""
        return {}

    def stimulus(self, index):
        """Parameters of clip `index`, by name."""
        numbers = np.unravel_index(index, [len(values) for values in self.parameters.values()])
        return {name: values[number] for (name, values), number in zip(self.parameters.items(), numbers)}

    def targets(self, index):
        """The class number of clip `index` in each of `labels`."""
        of = self.stimulus(index)
        if self.double:
            left, right, delta = of["sf_left"], of["sf_right"], of["delta"]
            of |= {"sf_difference": right - left, "theta_right": (of["theta_left"] + delta) % 360}
            of["higher_side"] = "equal" if left == right else "left" if left > right else "right"
            of |= {"sf_match": "yes" if left == right else "no", "theta_match": "yes" if delta == 0 else "no"}
        return tuple(values.index(of[name]) for name, values in self.labels.items())

    def read(self, index, rng=None):
        """Clip `index`, (T, H, W, C) uint8: values -1..1 become 0..255. Nothing is random: rng is unused."""
        of = self.stimulus(index)
        if self.double:
            same = {"tf": of["tf"], "contrast": of["contrast"], "colour": of["colour"], "video": self.video}
            frames = drifting_grating(sf=of["sf_left"], theta=of["theta_left"], **same)
            right = drifting_grating(sf=of["sf_right"], theta=(of["theta_left"] + of["delta"]) % 360, **same)
            half = self.video[2] // 2
            frames[:, :, half:] = right[:, :, half:]
        else:
            frames = drifting_grating(**of, video=self.video)
        return np.rint((frames + 1) * 127.5).astype(np.uint8)


# ---- video files ----

EXTENSIONS = (
    "3g2|3gp|apng|asf|avi|divx|dv|f4v|flv|gif|h264|hevc|m2ts|m2v|m4v|mjpeg|mkv|mov|mp4|mpe|mpeg|mpg|mpv|mts|"
    "mxf|ogm|ogv|qt|rm|rmvb|ts|vob|webm|wmv|y4m"
)
READ_ERRORS = (OSError, ValueError, av.FFmpegError)  # what a broken file raises, also from inside FFmpeg
OPENING = {  # a video file is one file: no playlists, no network
    "format_whitelist": ",".join(sorted(av.formats_available - {"concat"})),
    "protocol_whitelist": "file",
}
MAX_PIXELS = 2**25  # of a frame; 8K has a little less
MAX_DECODED = 2**36  # pixels that are decoded for one clip; 22 minutes of 1920 x 1080 at 25 frames per second
MAX_REORDER = 16  # frames that a frame may come early, at most (H.264, A.3.1)
HAVE_B_FRAMES = ("h264", "mpeg4", "mpeg2video", "mpeg1video")
MAX_BROKEN = 0.05  # more broken files than this share (and more than one) end a run


class BrokenVideos(ValueError):
    """Too many of the videos cannot be read; the message names them."""


class Videos:
    """All videos below a folder, or those that a list names; the label is the parent folder, or in the list.

    folder: searched by file extension. list_file: one `path [label]` per line, relative to folder; paths may
    hold spaces.
    video: (T, H, W) of a clip. stride: take every stride-th frame.
    short: what happens to videos of fewer than T * stride frames: "drop" (the paper's rule) leaves them out,
    "repeat" repeats their last frame.
    `broken` {path: reason} names the files that cannot be read, `dropped` {path: frames} the short ones.
    Raises ValueError if no usable video is left, BrokenVideos if more than MAX_BROKEN of the files are
    broken.
    """

    def __init__(self, folder, *, list_file=None, video=(16, 128, 128), stride=4, short="drop"):
        self.folder, self.video, self.stride, self.short = Path(folder), tuple(video), stride, short
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is not a folder; --data wants the folder that your videos are in.")
        entries, self.classes = read_list(self.folder, list_file) if list_file else walk(self.folder)
        if not entries:
            looked = EXTENSIONS.replace("|", " ")
            raise ValueError(f"No videos in {list_file or folder} (looked for {looked}).")
        self.labels, self.total = {"class": self.classes}, len(entries)
        self.files, self.broken, self.dropped = [], {}, {}
        for (path, label), count in zip(entries, look_at(self.folder, [path for path, _ in entries])):
            if isinstance(count, str):
                self.broken[path] = count
            elif short == "drop" and count < self.video[0] * stride:
                self.dropped[path] = count
            else:
                self.files.append((path, label))
        if self.dropped and not self.files:
            fits, needed = (
                max(self.dropped.values()) // self.video[0],
                f"{self.video[0]} frames x stride {stride}",
            )
            fix = f"--stride {fits} would fit the longest, " if fits else ""
            raise ValueError(
                f"All {len(self.dropped)} videos have fewer than {needed} = {self.video[0] * stride} frames; "
                f"{fix}--short repeat fits all."
            )
        self.check_broken()

    def __len__(self):
        return len(self.files)

    def name(self, index):
        """Path of video `index`, relative to the folder."""
        return self.files[index][0]

    @property
    def fingerprint(self):
        """Names the videos and their order: a run can only be resumed on the same ones."""
        return hashlib.sha256("\n".join(path for path, _ in self.files).encode()).hexdigest()

    def targets(self, index):
        """Class number of video `index`, as a tuple of one."""
        return (self.classes.index(self.files[index][1]),)

    def read(self, index, rng=None):
        """One clip of video `index`, (T, H, W, C) uint8. Raises READ_ERRORS if that cannot be had.

        rng: random start, crop and flip, for training (Sec. 3.2); None: all in the middle.
        """
        start, top, left, mirror = (0.5, 0.5, 0.5, 0.0) if rng is None else rng.random(4)
        how = {"start": start, "crop": (top, left), "short": self.short}
        clip = read_clip(self.folder / self.name(index), video=self.video, stride=self.stride, **how)
        return np.ascontiguousarray(clip[:, :, ::-1]) if mirror > 0.5 else clip

    def check_broken(self, found=()):
        """Add files found broken in reading, {path: reason}; returns new ones. BrokenVideos if too many."""
        new = {path: why for path, why in dict(found).items() if path not in self.broken}
        self.broken.update(new)
        none_left = all(path in self.broken for path, _ in self.files)
        if none_left or len(self.broken) > max(1, MAX_BROKEN * self.total):
            which = "; ".join(f"{path} ({why})" for path, why in list(self.broken.items())[:10])
            more = f" and {len(self.broken) - 10} more" if len(self.broken) > 10 else ""
            raise BrokenVideos(
                f"{len(self.broken)} of {self.total} videos cannot be read, at most {MAX_BROKEN:.0%} may be: "
                f"{which}{more}. Repair them, move them away, or leave them out with --list."
            )
        return new


def walk(folder):
    """All videos below a folder, by extension in any case, sorted: ([(path, label)], class names)."""
    video = re.compile(rf"[^.].*\.({EXTENSIONS})", re.IGNORECASE)  # no hidden files
    found = [
        Path(root, file) for root, _, files in os.walk(folder) for file in files if video.fullmatch(file)
    ]
    paths = sorted(path.relative_to(folder) for path in found)
    entries = [(path.as_posix(), path.parent.name or folder.resolve().name) for path in paths]
    return entries, tuple(sorted({label for _, label in entries}, key=str.lower))


def read_list(folder, list_file):
    """Entries of a list file, `path [label]` per line: ([(path, label)], class names in order).

    Without a label it is the parent folder. UCF101's trainlist files work as they are: where the labels are
    numbers that stand one to one for parent folders, the folder names are the classes, in the order of the
    numbers (its classInd.txt).
    """
    try:
        lines = [line.strip() for line in Path(list_file).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Cannot read the list {list_file}: {reason(error)}.") from None
    entry = re.compile(rf"(.*\.(?:{EXTENSIONS}))(?:\s+(.*))?", re.IGNORECASE)
    entries = [m.groups() if (m := entry.fullmatch(line)) else (line, None) for line in lines if line]
    parents = [Path(path).parent.name or folder.resolve().name for path, _ in entries]
    numbered = {(given, parent) for (_, given), parent in zip(entries, parents)}
    one_to_one = len(numbered) == len({given for given, _ in numbered}) == len(set(parents))
    if one_to_one and all(given and given.isdigit() for given, _ in numbered):
        classes = tuple(parent for _, parent in sorted(numbered, key=lambda pair: int(pair[0])))
        return [(path, parent) for (path, _), parent in zip(entries, parents)], classes
    entries = [(path, given or parent) for (path, given), parent in zip(entries, parents)]
    return entries, tuple(sorted({label for _, label in entries}, key=str.lower))


def reason(error):
    """The short form of an error from Python or FFmpeg."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


@contextlib.contextmanager
def open_video(path):
    """(container, video stream) of a file, closed at the end. ValueError if there is none to decode."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("is not a regular file")  # reading a pipe could wait for ever
    # "file:" because a name may hold a colon, as in 12:30.mp4, and must not be taken for an address.
    with av.open(f"file:{path}", options=OPENING, metadata_errors="replace") as container:
        stream = container.streams.best("video")
        if stream is None:
            raise ValueError("has no video stream")
        if stream.codec_context is None:
            raise ValueError("its codec has no decoder here")
        if stream.width * stream.height > MAX_PIXELS:
            raise ValueError(
                f"claims frames of {stream.width} x {stream.height} pixels, at most {MAX_PIXELS} can be"
            )
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # the size may change on the way
        stream.codec_context.thread_count = 1  # the workers are the parallelism
        yield container, stream


def packets(container, stream, most=None):
    """Packets up to the end of the file, or to damage of the container; the last one is empty, as a flush.

    ValueError if there are more than `most`. More than there are bytes in the file, there cannot be.
    """
    with contextlib.suppress(av.FFmpegError):
        for number, packet in enumerate(itertools.islice(container.demux(stream), container.size)):
            if most is not None and number > most:
                raise ValueError(
                    f"needs more than {most} frames decoded for one clip; mend it with python data.py SRC DST"
                )
            yield packet


def frames_of(codec, packet):
    """Frames that a packet brings out of the decoder, None all that are left; none where it is damaged."""
    try:
        return codec.decode(packet)
    except av.FFmpegError:
        return []


def all_frames(container, stream, most=None):
    """Decoded frames up to the end of the file, passing over damaged packets."""
    for packet in packets(container, stream, most):
        yield from frames_of(stream.codec_context, packet)


def count_packets(container, stream):
    """Frames of a stream by its packets, to the end of the file; nothing is decoded."""
    return sum(packet.size > 0 for packet in packets(container, stream))


def count_or_reason(path):
    """Number of frames that a file promises, or the reason (a str) why it is no video."""
    try:
        with open_video(path) as (container, stream):
            # Matroska, WebM, MPEG and others do not store the count.
            return max(stream.frames, 0) or count_packets(container, stream) or "holds no frames"
    except READ_ERRORS as error:
        return reason(error)


def look_at(folder, names):
    """count_or_reason() of videos in a folder, in their order, several at a time."""
    with ThreadPoolExecutor(8) as pool:
        counts = pool.map(lambda name: count_or_reason(folder / name), names)
        return list(tqdm(counts, "look at videos", len(names), leave=False))


def read_clip(path, *, video=(16, 128, 128), stride=4, start=0.5, crop=(0.5, 0.5), short="repeat"):
    """Read T frames of a video file, every stride-th, from a place given as a fraction: (T, H, W, C) uint8.

    start: 0 is the earliest possible start, 1 the latest. crop: (vertical, horizontal) place of the crop,
    0..1.
    short: with too few frames, "repeat" repeats the last one, "drop" raises ValueError. Rotation by metadata
    is applied (phones film sideways); non-square pixels and HDR are not converted. Stride counts frames, not
    seconds. Damaged packets are passed over.
    Raises READ_ERRORS if nothing can be read.
    """
    # Differs from paper: it names a random 128 x 128 crop only; here the shorter side is first resized to
    # that.
    T, how = video[0], {"video": video, "stride": stride, "crop": crop}
    with open_video(path) as (container, stream):
        begin, seconds, count = extent(container, stream)
        target = begin + start * seconds * max(0.0, 1 - T * stride / count)
        place = {"time": target, "seek": target > begin}
        quick = seconds and stream.codec_context.name in HAVE_B_FRAMES and stream.codec_context.has_b_frames
        frames = (decode_needed if quick else decode)(container, stream, **place, **how) if seconds else []
    if quick and len(frames) < T:
        with open_video(path) as (container, stream):
            frames = decode(container, stream, **place, **how)
    if len(frames) < T and (target > begin or not seconds):
        # The header has no duration or a wrong one, or the seek came out late: count, and skip from the
        # beginning.
        with open_video(path) as (container, stream):
            room = max(0, count_packets(container, stream) - T * stride)
        for skip in (int(start * room), 0):
            with open_video(path) as (container, stream):
                frames = max(frames, decode(container, stream, skip=skip, **how), key=len)
            if len(frames) == T or skip == 0:
                break
    if not frames:
        raise ValueError("no frame can be decoded")
    if len(frames) < T and short == "drop":
        raise ValueError(f"ends after {len(frames)} of {T} frames, earlier than its header says")
    return np.stack(frames + frames[-1:] * (T - len(frames)))  # (T, H, W, C)


def frame_rate(stream):
    """Frames per second, as far as the header tells."""
    return float(stream.average_rate or stream.guessed_rate or 25)


def extent(container, stream):
    """(begin in seconds, duration in seconds, frames) by the header; duration 0 where it has none."""
    begin = float((stream.start_time or 0) * stream.time_base)
    duration = (
        stream.duration * stream.time_base if stream.duration else (container.duration or 0) / av.time_base
    )
    return begin, float(duration), max(1.0, stream.frames or float(duration) * frame_rate(stream))


def seek_before(container, stream, time):
    """Go to the key frame before a time in seconds; a format that cannot seek stays at its beginning."""
    with contextlib.suppress(av.FFmpegError, OverflowError):
        container.seek(int(time / stream.time_base), stream=stream)


def decode(container, stream, *, video, stride, crop, time=None, seek=False, skip=0):
    """Up to T frames, every stride-th after `skip` frames or from `time` seconds on, each (H, W, C) uint8."""
    if seek:
        seek_before(container, stream, time)
    first = -math.inf if time is None else time - 0.5 / frame_rate(stream)  # time stamps are rounded
    reformatter, kept, passed = VideoReformatter(), [], -skip
    for frame in all_frames(container, stream, MAX_DECODED // (stream.width * stream.height or 1)):
        if frame.time is not None and frame.time < first:
            continue
        if passed >= 0 and passed % stride == 0:
            kept.append(upright_crop(frame, reformatter, video[1], video[2], crop))
            if len(kept) == video[0]:
                break
        passed += 1
    return kept


def decode_needed(container, stream, *, video, stride, crop, time, seek):
    """The T frames that decode() gives, without decoding frames that are neither kept nor referred to.

    Those are B-frames. Packets are read ahead, and their times say which frames are wanted; that can be
    trusted if packets come in another order than their times, as they must where there are B-frames. [] in
    any other case.
    """
    codec, span = stream.codec_context, video[0] * stride
    if seek:
        seek_before(container, stream, time)
    first, tick = time - 0.5 / frame_rate(stream), stream.time_base
    times, ahead = [], []  # of all packets; packets from the first wanted one on
    for packet in packets(container, stream, MAX_DECODED // (stream.width * stream.height or 1)):
        if packet.pts is None:
            if packet.size:
                return []
            break  # the empty last one
        times.append(packet.pts)
        if ahead or packet.pts * tick.numerator / tick.denominator >= first:
            ahead.append(packet)
        else:
            codec.skip_frame = "NONREF"
            frames_of(codec, packet)
        if len(ahead) == span + MAX_REORDER:
            break
    shown = sorted(pts for pts in times if pts * tick.numerator / tick.denominator >= first)
    wanted = shown[:span:stride]
    if len(wanted) < video[0] or times == sorted(times) or len(set(times)) < len(times):
        return []
    while ahead[-1].pts not in wanted:
        ahead.pop()
    reformatter, kept = VideoReformatter(), {}
    for packet in [*ahead, None]:
        codec.skip_frame = "DEFAULT" if packet and packet.pts in wanted else "NONREF"
        for frame in frames_of(codec, packet):
            if frame.interlaced_frame:  # may be two packets
                return []
            if frame.pts in wanted:
                kept[frame.pts] = upright_crop(frame, reformatter, video[1], video[2], crop)
    return [kept[pts] for pts in wanted] if len(kept) == video[0] else []


def upright_crop(frame, reformatter, H, W, crop):
    """One decoded frame, scaled so that it just covers H x W, turned upright and cropped: (H, W, C) uint8."""
    turns = round(frame.rotation / 90) % 4  # counter-clockwise quarter turns that show it upright
    height, width = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)  # upright
    scale = max(H / height, W / width)
    height, width = max(H, round(height * scale)), max(W, round(width * scale))
    if height * width > MAX_PIXELS:
        raise ValueError(f"its frames of {frame.width} x {frame.height} pixels are too narrow")
    stored = {"width": height, "height": width} if turns % 2 else {"width": width, "height": height}
    scaled = reformatter.reformat(frame, format="rgb24", interpolation="BILINEAR", threads=1, **stored)
    top, left = (min(int(place * (room + 1)), room) for place, room in zip(crop, (height - H, width - W)))
    return np.rot90(scaled.to_ndarray(), turns)[top : top + H, left : left + W]


# ---- command lines: what all programs share ----


def fail(message, code=2):
    """End the program with one sentence; exit code 2 is for a mistake that the user can mend."""
    if os.environ.get("RANK", "0") != "0":  # torchrun's process 0 says the same, which ends this one
        time.sleep(2)
    tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """argparse with the file's docstring as manual, whose errors are one sentence."""

    def __init__(self, description):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, allow_abbrev=False)

    def error(self, message):
        """One sentence, exit code 2."""
        fail(f"{message} (--help lists all settings)")

    def parse_args(self, *arguments):
        """As argparse's; an empty text is a mistake, a shell variable that is not set for example."""
        found = super().parse_args(*arguments)
        for name, value in vars(found).items():
            if value == "" or value == [""]:
                self.error(f"--{name.replace('_', '-')} is empty; leave it out, or say which")
        return found


def number(kind=int, *, least=None, most=None, above=None, below=None):
    """A type for argparse: an int or a finite float inside the limits that are given."""
    limits = {"at least": least, "more than": above, "at most": most, "below": below}
    limits = " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'an integer' if kind is int else 'a number'}")
        inside = (least is None or value >= least) and (most is None or value <= most)
        inside = inside and (above is None or value > above) and (below is None or value < below)
        if not (inside and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} must be {limits or 'finite'}")
        return value

    return convert


def check_output(path, *, folder=False):
    """ValueError if a file, or files in a folder, cannot be written: said before the work, not after it."""
    path = Path(path)
    try:
        (path if folder else path.parent).mkdir(parents=True, exist_ok=True)
        probe = path / ".writable" if folder else path
        new = not probe.exists()
        probe.open("ab").close()
        if new:
            probe.unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({reason(error)}); name another place.") from None


def pick_device(name="auto"):
    """(device, why it was chosen) of a --device; ValueError if it does not work here."""
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda", torch.cuda.get_device_name()
        if torch.backends.mps.is_available():
            return "mps", "Apple GPU"
        return "cpu", f"no GPU found; {torch.get_num_threads()} threads"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"--device {name} does not work here ({why:.200}); try --device cpu.") from None
    return name, "as asked"


@contextlib.contextmanager
def program():
    """Around the main() of every program: what ends it ends it with one sentence and without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ValueError as error:
        fail(error)
    except OSError as error:  # a full disk, for example
        fail(f"{error.filename or 'a file'}: {reason(error)}", code=1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        fail("out of memory; try a smaller --batch.", code=1)


# ---- batches ----


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, clips):
    """The random order of one epoch."""
    return np.random.default_rng((seed, 0, epoch)).permutation(clips)


class Stream(torch.utils.data.Dataset):
    """The endless stream of training samples: sample k is a pure function of (seed, k).

    A broken file is replaced by the next good one of the source, and reported with the sample.
    """

    def __init__(self, source, *, seed=0):
        self.source, self.seed = source, seed

    def __getitem__(self, k):
        clips, broken = len(self.source), {}
        epoch, place = divmod(k, clips)
        first = int(epoch_order(self.seed, epoch, clips)[place])
        rng = np.random.default_rng((self.seed, 1, epoch, first))
        for index in [*range(first, clips), *range(first)]:
            try:
                return {
                    "video": torch.from_numpy(self.source.read(index, rng)),
                    "index": index,
                    "broken": broken,
                }
            except READ_ERRORS as error:
                broken[self.source.name(index)] = reason(error)
        return {"video": None, "index": first, "broken": broken}  # none is left: check_broken() ends the run


class Ordered(torch.utils.data.Dataset):
    """The clips of a source in order, read as for evaluation. A broken file gives only its reason."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, index):
        try:
            return {"video": torch.from_numpy(self.source.read(index)), "index": index, "broken": {}}
        except READ_ERRORS as error:
            return {"video": None, "index": index, "broken": {self.source.name(index): reason(error)}}


def collate(samples):
    """Samples to a batch: video (B, T, H, W, C) uint8 or None, index [B], broken {path: reason}."""
    read = [sample for sample in samples if sample["video"] is not None]
    return {
        "video": torch.stack([sample["video"] for sample in read]) if read else None,
        "index": [sample["index"] for sample in read],
        "broken": {path: why for sample in samples for path, why in sample["broken"].items()},
    }


def leave_signals_to_main(_):
    """Workers end with the main process: Ctrl-C and SIGTERM reach it too, and it wants its last batch."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def loader(source, *, batch, first=0, last, seed=0, workers=0, part=0, parts=1, pin_memory=False):
    """Batches of training steps first..last-1, the same for any first and any number of workers.

    part, parts: read only this one of equal parts of every batch, for several processes.
    """
    how = {"collate_fn": collate, "worker_init_fn": leave_signals_to_main, "pin_memory": pin_memory}
    size = batch // parts
    starts = range(first * batch + part * size, last * batch, batch)
    batches = [range(start, start + size) for start in starts]
    return DataLoader(Stream(source, seed=seed), batch_sampler=batches, num_workers=workers, **how)


def evaluation_loader(source, *, indices=None, batch=32, workers=0):
    """Batches of every clip once and in order, or of some; broken files are reported and left out."""
    which = range(len(source)) if indices is None else indices
    how = {"collate_fn": collate, "num_workers": workers}
    return DataLoader(Ordered(source), batch_size=batch, sampler=which, **how)


# ---- pictures ----

# A 3x5 pixel font: one octal digit per row of a letter.
GLYPHS = (
    "A25755 B65656 C34443 D65556 E74647 F74644 G34553 H55755 I72227 J11152 K55655 L44447 M57755 N65555 "
    "O25552 P65644 Q25563 R65655 S34216 T72222 U55557 V55552 W55775 X55255 Y55222 Z71247 075557 126227 "
    "271747 371717 455711 574717 674757 771111 875757 975717 .00002 -00700 +02720 :02020 /11244 %51245 "
    "(24442 )21112 "
)
FONT = {glyph[0]: [int(row) for row in glyph[1:]] for glyph in GLYPHS.split()}


def draw_text(image, text, *, top, left, scale=2):
    """Write a line of text into an image (H, W, C), in place, in white; letters are 4 x 6 pixels times
    scale.
    """
    for i, letter in enumerate(text.upper()):
        bits = np.array([[row >> 2 & 1, row >> 1 & 1, row & 1] for row in FONT.get(letter, [0] * 5)], bool)
        bits = bits.repeat(scale, 0).repeat(scale, 1)
        place = image[top : top + 5 * scale, left + 4 * scale * i : left + 4 * scale * i + 3 * scale]
        place[bits[: place.shape[0], : place.shape[1]]] = 255


def tile(rows):
    """One image (H, W, C) from rows of pictures, {title: (n, H, W, C) uint8}. Small ones are enlarged."""
    zoom = max(1, 128 // next(iter(rows.values())).shape[1])
    margin = 8 * max(map(len, rows)) + 16
    strips = []
    for title, pictures in rows.items():
        picture = np.concatenate(list(pictures), axis=1).repeat(zoom, 0).repeat(zoom, 1)
        strip = np.zeros((picture.shape[0] + 4, margin + picture.shape[1], 3), np.uint8)
        strip[:-4, margin:] = picture
        draw_text(strip, title, top=picture.shape[0] // 2 - 5, left=8)
        strips.append(strip)
    return np.concatenate(strips)


def write_picture(path, image):
    """Write an image (H, W, C) uint8 as a PNG file."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = frame.width, frame.height, "rgb24", 1
    Path(path).write_bytes(b"".join(bytes(packet) for packet in codec.encode(frame) + codec.encode(None)))


def write_video(path, images, *, rate=8, codec=None, options=None):
    """Write images (H, W, C) uint8, one or more, as an MP4 file: H.264 where this FFmpeg can, else MPEG-4."""
    images = iter(images)
    first = next(images)
    codec = codec or ("libx264" if "libx264" in av.codecs_available else "mpeg4")
    height, width = (size // 2 * 2 for size in first.shape[:2])  # both codecs want even sizes
    with av.open(f"file:{path}", "w", format="mp4") as container:
        quick = {"preset": "ultrafast"} if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=rate, options=options or quick)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for image in itertools.chain([first], images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


# ---- packing a folder, once, for quick reading ----

# MPEG-4 is decoded in half the time of H.264 of the same size and quality, and every FFmpeg can write it.
# g: a key frame every 8 frames. bf: no B-frames.
PACKED = {"g": "8", "bf": "0", "qmin": "4", "qmax": "4", "b": "8M", "threads": "1"}


def pack_video(source, target, partial, *, side=128, every=1, stop=None):
    """Write every `every`-th frame of a video to `target`, upright, its shorter side scaled down to `side`.

    The file appears when it is complete; until then it is `partial`. The frame rate is the source's, divided
    by `every`. stop: an Event that gives up. Raises READ_ERRORS if nothing can be read or written.
    """
    with open_video(source) as (container, stream):
        frames = itertools.islice(all_frames(container, stream), 0, None, every)
        first = next(frames, None)
        if first is None:
            raise ValueError("no frame can be decoded")
        sizes = first.height, first.width
        scale = min(1, side / min(sizes))
        H, W = (max(2, math.ceil(round(size * scale) / 2) * 2) for size in sizes)  # codecs want even sizes
        if round(first.rotation / 90) % 2:
            H, W = W, H
        rate = min(max(frame_rate(stream) / every, 0.1), 1000)
        rate = Fraction(rate).limit_denominator(min(1001, int(65535 / rate)))  # MPEG-4 counts time in 16 bits
        reformatter = VideoReformatter()

        def images():
            for frame in itertools.chain([first], frames):
                if stop and stop.is_set():
                    raise InterruptedError("stopped")
                yield upright_crop(frame, reformatter, H, W, (0.5, 0.5))

        write_video(partial, images(), rate=rate, codec="mpeg4", options=PACKED)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(partial, target)


def pack(source, target, *, side=128, every=1, workers=None):
    """Pack all videos below a folder into another one, by the same names; returns broken ones {path: reason}.

    A file keeps its name to the letter, so that lists of videos stay valid, but holds MP4, whatever the name
    says: FFmpeg looks at the content. Files that are there already are skipped, so an interrupted run can be
    repeated. Raises ValueError for folders that must not be mixed.
    """
    source, target = Path(source).resolve(), Path(target).resolve()
    if target.is_relative_to(source):
        raise ValueError(
            f"{target} lies in {source}, whose videos would be packed twice; name another folder."
        )
    settings = {"source": str(source), "side": side, "every": every}
    note, partial = target / "pack.json", target / ".partial"
    if note.exists():
        if note.read_text(encoding="utf-8") != json.dumps(settings):
            raise ValueError(f"{target} was packed with other settings ({note}); name another folder.")
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and was not packed by this program; name another folder.")
    target.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(settings), encoding="utf-8")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir()

    broken, stop = {}, threading.Event()
    todo = [path for path, _ in walk(source)[0] if not (target / path).exists()]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:  # FFmpeg works outside of Python's lock
        jobs = {}
        for number, path in enumerate(todo):
            names = source / path, target / path, partial / f"{number}.mp4"
            jobs[pool.submit(pack_video, *names, side=side, every=every, stop=stop)] = path
        try:
            for job in tqdm(as_completed(jobs), "pack videos", len(jobs)):
                try:
                    job.result()
                except READ_ERRORS as error:
                    broken[jobs[job]] = reason(error)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            shutil.rmtree(partial, ignore_errors=True)
    return dict(sorted(broken.items()))


def time_reading(places, names, *, pixels=128, clips=60):
    """Median milliseconds to read a random clip of 16 frames in one process, in each (folder, stride)."""
    rng, times = np.random.default_rng(0), {place: [] for place in places}
    for name in rng.choice(names, clips):
        start, top, left = rng.random(3)
        for folder, stride in places:
            how = {"video": (16, pixels, pixels), "stride": stride, "start": start, "crop": (top, left)}
            begin = time.perf_counter()
            with contextlib.suppress(*READ_ERRORS):
                read_clip(Path(folder) / name, **how)
                times[folder, stride].append(1000 * (time.perf_counter() - begin))
    return [float(np.median(of)) for of in times.values()]


def main(arguments=None):
    """Pack SRC into DST, if that is given; then say how long the videos of each take to read."""
    parser = Parser("Pack a folder of videos; time how fast clips are read.")
    parser.add_argument("source", metavar="SRC", help="folder of videos")
    parser.add_argument(
        "target", metavar="DST", nargs="?", help="folder to pack them into, by the same names"
    )
    parser.add_argument("--side", type=int, default=128, help="shorter side that larger videos are scaled to")
    parser.add_argument("--every", type=int, default=1, help="keep every EVERY-th frame only")
    parser.add_argument(
        "--stride", type=int, default=4, help="stride to time the reading with, in SRC's frames"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="videos packed at a time")
    args = parser.parse_args(arguments)
    if not Path(args.source).is_dir():
        fail(f"{args.source} is not a folder.")
    if args.side < 16 or args.every < 1 or args.workers < 1:
        fail("--side must be at least 16, --every and --workers at least 1.")
    if args.every > 1 and not args.target:
        fail("--every wants a folder to pack into: python data.py SRC DST --every 4.")
    if args.stride < 1 or args.stride % args.every:
        fail(f"--stride {args.stride} must be a multiple of --every {args.every}, 4 and 2 for example.")
    broken, places = {}, [(args.source, args.stride)]
    if args.target:
        try:
            how = {"side": args.side, "every": args.every, "workers": args.workers}
            broken = pack(args.source, args.target, **how)
        except (ValueError, OSError) as error:
            fail(reason(error))
        except KeyboardInterrupt:
            print("\nStopped. The same command goes on from here.", file=sys.stderr)
            sys.exit(130)
        places.append((args.target, args.stride // args.every))
    names = [path for path, _ in walk(Path(places[-1][0]))[0]]
    if not args.target:
        counts = zip(names, look_at(Path(args.source), names))
        broken = {name: count for name, count in counts if isinstance(count, str)}
    names = [name for name in names if name not in broken and (Path(args.source) / name).exists()]
    for name, why in broken.items():
        print(f"broken: {name} ({why})")
    if not names:
        fail(f"No videos in {args.source} can be read (looked for {EXTENSIONS.replace('|', ' ')}).")
    for (folder, stride), ms in zip(places, time_reading(places, names, pixels=args.side)):
        size = sum((Path(folder) / name).stat().st_size for name in names) / 1e6
        print(
            f"{folder}: {len(names)} videos, {size:.1f} MB, {ms:.2f} ms to read a clip at --stride {stride}"
        )
    print(
        f"{len(broken)} broken" + (f"; train with --data {args.target} --stride {stride}" * bool(args.target))
    )


if __name__ == "__main__":
    main()
