"""Clips to train on: generated moving scenes (no download), or any folder of videos, read with PyAV.

Römer & Dickscheid, arXiv 2601.09040, Sec. 3.2, 3.3: 16 frames at stride 4; random crop and flip for
training, centre crop for evaluation; videos that are too short are dropped.

    source = Scenes("train")                          # or Videos("UCF-101", list_file="trainlist01.txt")
    for batch in loader(source, batch=32, last=1500):
        batch["video"]                                # (B, T, H, W, C) uint8

Shapes: B batch, T frames, H W pixels, C channels.
"""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import itertools
import math
import os
import re
import signal
import stat
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# ---- generated clips: moving scenes ----

COLOURS = {"red": (0.85, 0.3, 0.3), "green": (0.3, 0.8, 0.3), "blue": (0.3, 0.4, 0.9)}
RADII = {"small": 0.32, "large": 0.54}  # of the disc of equal area, in half frames
MOTIONS = {  # over one clip: direction in x and y, turns, log-scale in cycles
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
    uniform at every frame. So an object that has grown to its largest size goes on from its smallest.

    split: "train" or "test". clips: how many make one epoch. video: (T, H, W).
    """

    # Differs from paper: ours, so that the first run needs no download.

    def __init__(self, split="train", *, clips=20000, video=(16, 64, 64), seed=0):
        self.split = ("train", "test").index(split)
        self.clips, self.video, self.seed, self.labels = clips, tuple(video), seed, SCENE_LABELS
        self.combinations = list(itertools.product(*SCENE_LABELS.values()))
        self.fingerprint = f"scenes {clips}"  # as in Videos

    def __len__(self):
        return self.clips

    def name(self, index):
        """What to call clip `index` in a message."""
        return f"generated clip {index}"

    def check_broken(self, found, none_left=False):
        """As in Videos; generated clips do not break."""
        return {}

    def combination(self, index):
        """Colour, shape, size, motion and agreement of clip `index`."""
        rounds, place = divmod(index, len(self.combinations))
        rng = np.random.default_rng((self.seed, self.split, 0, rounds))
        return self.combinations[rng.permutation(len(self.combinations))[place]]

    def targets(self, index):
        """The class number of clip `index` in each of `labels`."""
        pairs = zip(self.labels.values(), self.combination(index))
        return tuple(classes.index(value) for classes, value in pairs)

    def read(self, index, rng=None):
        """Clip `index`, (T, H, W, C) uint8. Nothing is random: rng is unused."""
        rng = np.random.default_rng((self.seed, self.split, 1, index))
        colour, shape, size, motion, agreement = self.combination(index)
        others = [name for name in MOTIONS if name != motion]
        backdrop = motion if agreement == "yes" else others[rng.integers(len(others))]
        frames = draw_background(rng, self.video, backdrop)
        draw_object(frames, rng, colour, shape, size, motion)
        pixels = (frames.clip(0, 1) * 255 + 0.5).astype(np.uint8)  # (T, H, C, W)
        return np.stack([pixels[:, :, c] for c in range(3)], axis=-1)  # faster than a transposed copy


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


def draw_background(rng, video, motion):
    """Smooth colours in motion, (T, H, C, W) float32: the sum of three plane waves in each colour channel.

    A wave fades out at both ends of its range of frequencies, so that zooming goes on without a seam.
    """
    time, x, y = axes(video)
    right, down, turns, zoom = MOTIONS[motion]
    scale = (rng.random(9) - zoom * time) % 1  # (T, n)
    frequency = 0.1 * 2 ** (3 * scale)  # from .1 cycles per half frame on, over three octaves
    angle = 2 * np.pi * (rng.random(9) + turns * time)
    shift = 0.6 * time * (right * np.cos(angle) + down * np.sin(angle))  # in half frames
    phase = 2 * np.pi * (rng.random(9) - frequency * shift)
    weight = 0.28 * np.sin(np.pi * scale)[..., None] ** 2 * np.tile(np.eye(3), (3, 1))  # (T, n, C)
    level = (0.35 + 0.3 * rng.random((3, 1))).astype(np.float32)
    return plane_waves(x, y, frequency, angle, phase, weight) + level


def draw_object(frames, rng, colour, shape, size, motion):
    """Paint one object over frames (T, H, C, W), in place. It shifts by 1.2 half frames over the clip."""
    T, H, _, W = frames.shape
    time, x, y = axes((T, H, W))
    right, down, turns, zoom = MOTIONS[motion]
    place = 2 * rng.random(2)
    x = (x - place[0] - 1.2 * right * time) % 2 - 1  # (T, W): from the object's centre, on a torus
    y = (y - place[1] - 1.2 * down * time) % 2 - 1  # (T, H)
    radius = RADII[size] * 1.25 ** ((rng.random() + zoom * time) % 1)  # (T, 1)
    tilt = 2 * np.pi * (rng.random() + turns * time)  # (T, 1)

    frequency = (0.2 + 0.3 * rng.random(2)) / radius  # (T, 2)
    phase = np.tile(2 * np.pi * rng.random(2), (T, 1))
    grey = plane_waves(x, y, frequency, tilt + 2 * np.pi * rng.random(2), phase, np.full((T, 2, 1), 0.12))
    texture = grey + np.array(COLOURS[colour], np.float32)[:, None]  # (T, H, C, W)

    x, y = x[:, None].astype(np.float32), y[..., None].astype(np.float32)  # (T, 1, W), (T, H, 1)
    radius, tilt = radius[..., None].astype(np.float32), tilt[..., None].astype(np.float32)  # (T, 1, 1)
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
DOUBLE_LABELS = {
    "sf_left": DOUBLE["sf_left"],
    "sf_right": DOUBLE["sf_right"],
    "sf_difference": (-12, -6, 0, 6, 12),
    "higher_side": ("left", "right", "equal"),
    "sf_match": ("no", "yes"),
    "theta_left": ANGLES,
    "theta_right": tuple(range(0, 360, 15)),
    "delta": DOUBLE["delta"],
    "theta_match": ("no", "yes"),
}


def drifting_grating(*, sf, theta, tf, contrast, colour, video=(16, 128, 128)):
    """A drifting grating (Sec. 4): (T, H, W, 3) float32, values -1..1 times the colour vector.

    Frame i = contrast * sin(2 pi (sf / 2) x' + 2 pi tf / 6.25 * i), x' = x cos(theta) + y sin(theta), with
    x and y from -1 to 1 over the frame. sf in cycles per width, theta in degrees, tf in Hz.
    """
    T, H, W = video
    x, y = np.linspace(-1, 1, W)[None, None], np.linspace(-1, 1, H)[None, :, None]
    along = x * math.cos(math.radians(theta)) + y * math.sin(math.radians(theta))
    time = np.arange(T)[:, None, None] / 6.25  # seconds
    wave = contrast * np.sin((np.pi * sf * along + 2 * np.pi * tf * time).astype(np.float32))
    return wave[..., None].astype(np.float32) * np.array(HUES[colour], np.float32)


class Gratings:
    """The paper's stimuli (Sec. 4): 10,800 drifting gratings, or 15,552 with one in each half of the frame.

    Differs from paper: contrast and colour labels are the true ones. The released evaluation truncates
    contrasts to integers and mixes up colours, so that its means end near 84 %.
    """

    def __init__(self, *, double=False, video=(16, 128, 128)):
        self.double, self.video = double, tuple(video)
        self.parameters, self.labels = (DOUBLE, DOUBLE_LABELS) if double else (SINGLE, SINGLE)
        self.combinations = list(itertools.product(*self.parameters.values()))

    def __len__(self):
        return len(self.combinations)

    def name(self, index):
        """What to call clip `index`: its parameters."""
        return ", ".join(f"{name} {value}" for name, value in self.stimulus(index).items())

    check_broken = Scenes.check_broken

    def stimulus(self, index):
        """Parameters of clip `index`, by name."""
        return dict(zip(self.parameters, self.combinations[index]))

    def targets(self, index):
        """The class number of clip `index` in each of `labels`."""
        of = self.stimulus(index)
        if self.double:
            left, right = of["sf_left"], of["sf_right"]
            of["sf_difference"] = right - left
            of["higher_side"] = "equal" if left == right else "left" if left > right else "right"
            of["sf_match"] = "yes" if left == right else "no"
            of["theta_right"] = (of["theta_left"] + of["delta"]) % 360
            of["theta_match"] = "yes" if of["delta"] == 0 else "no"
        return tuple(values.index(of[name]) for name, values in self.labels.items())

    def read(self, index, rng=None):
        """Clip `index`, (T, H, W, C) uint8. Nothing is random: rng is unused."""
        # Paper does not say: how values -1..1 enter the model. Ours become 0..255, like any video.
        of = self.stimulus(index) | {"video": self.video}
        if self.double:
            left = {"sf": of.pop("sf_left"), "theta": of.pop("theta_left")}
            right = {"sf": of.pop("sf_right"), "theta": (left["theta"] + of.pop("delta")) % 360}
            half = self.video[2] // 2
            frames = drifting_grating(**left, **of)
            frames[:, :, half:] = drifting_grating(**right, **of)[:, :, half:]
        else:
            frames = drifting_grating(**of)
        return np.rint((frames + 1) * 127.5).astype(np.uint8)


# ---- videos: a folder of them ----

EXTENSIONS = (
    "3g2|3gp|apng|asf|avi|divx|dv|f4v|flv|gif|h264|hevc|m2ts|m2v|m4v|mjpeg|mkv|mov|mp4|mpe|mpeg|mpg|mpv|mts|"
    "mxf|ogm|ogv|qt|rm|rmvb|ts|vob|webm|wmv|y4m"
)
READ_ERRORS = (OSError, ValueError, av.FFmpegError)  # what a broken file raises, also from inside FFmpeg
MAX_BROKEN = 0.05  # more broken files than this share (and more than one) end a run


class Videos:
    """All videos below a folder, or those that a list names; the label is the parent folder, or in the list.

    folder: searched by file extension.
    list_file: one `path [label]` per line, relative to folder; paths may hold spaces. beside: another list, whose
    labels are of the same kind.
    video: (T, H, W) of a clip. stride: take every stride-th frame.
    short: what happens to videos of fewer than T * stride frames: "drop" (the paper's rule) leaves them out,
    "repeat" repeats their last frame.
    `broken` {name: reason} are the files that cannot be read, `dropped` {name: frames} those that are short, or
    were where they were read: damage may have ended a clip.
    Raises ValueError if no usable video is left, or if more than MAX_BROKEN of them are broken.
    """

    def __init__(self, folder, *, list_file=None, beside=None, video=(16, 128, 128), stride=4, short="drop"):
        self.folder, self.video, self.stride, self.short = Path(folder), tuple(video), stride, short
        if not os.path.isdir(folder):
            raise ValueError(f"{str(folder)!r} is not a folder; --data wants the folder your videos are in.")
        found = read_list(list_file, folder) if list_file else [(path, None) for path in walk(folder)]
        if not found:
            looked = EXTENSIONS.replace("|", " ")
            raise ValueError(f"No videos in {list_file or folder} (looked for {looked}).")
        counts = look_at(self.folder, [path for path, _ in found])
        found, classes = label_videos(self.folder, found, read_list(beside, folder) if beside else ())
        self.total = len({printable(path) for path in counts})
        self.files, self.broken, self.dropped, left_out = [], {}, {}, {}
        for path, label in found:
            count = counts[path]
            if isinstance(count, int) and (short == "repeat" or count >= self.video[0] * stride):
                self.files.append((path, label))
            else:
                left_out[printable(path)] = count
        self.check_broken(left_out, none_left=not self.files)
        kept = {label for _, label in self.files}
        self.classes = tuple(label for label in classes if label in kept)
        self.labels = {"class": self.classes}
        # Names the videos and their order: a run can only be resumed on the same ones.
        paths = "\n".join(path for path, _ in self.files)
        self.fingerprint = hashlib.sha256(paths.encode("utf-8", "surrogatepass")).hexdigest()

    def __len__(self):
        return len(self.files)

    def name(self, index):
        """Path of video `index` relative to the folder, as it can be printed."""
        return printable(self.files[index][0])

    def targets(self, index):
        """Class number of video `index`, as a tuple of one."""
        return (self.classes.index(self.files[index][1]),)

    def read(self, index, rng=None):
        """One clip of video `index`, (T, H, W, C) uint8. Raises READ_ERRORS if that cannot be had.

        rng: random start, crop and flip, for training (Sec. 3.2); None: all in the middle.
        """
        # Paper does not say: where in the video a clip starts.
        start, top, left, mirror = (0.5, 0.5, 0.5, 0.0) if rng is None else rng.random(4)
        path, rules = self.folder / self.files[index][0], {"stride": self.stride, "short": self.short}
        clip = read_clip(path, video=self.video, start=start, crop=(top, left), **rules)
        return np.ascontiguousarray(clip[:, :, ::-1]) if mirror > 0.5 else clip

    def check_broken(self, found, none_left=False):
        """Note videos that turned out broken {name: reason} or short {name: frames}.

        none_left: all others have been tried in vain, too. Returns the new ones {name: reason}. ValueError if
        too many are broken, or none is left.
        """
        new = {}
        for name, what in found.items():
            if name not in self.broken and name not in self.dropped:
                short = isinstance(what, int)
                (self.dropped if short else self.broken)[name] = what
                new[name] = f"ends, or is damaged, after {what} frames" if short else what
        if none_left and self.dropped:
            fits = max(self.dropped.values()) // self.video[0]
            fix = f"--stride {fits} would fit the longest, " if fits else ""
            raise ValueError(
                f"All {len(self.dropped)} videos that can be read have fewer than {self.video[0]} frames "
                f"x stride {self.stride}; {fix}--short repeat fits all."
            )
        if none_left or len(self.broken) > max(1, MAX_BROKEN * self.total):
            which = "; ".join(f"{name} ({why})" for name, why in itertools.islice(self.broken.items(), 10))
            raise ValueError(
                f"{len(self.broken)} of {self.total} videos cannot be read, at most {MAX_BROKEN:.0%} may be: "
                f"{which}. Repair them, move them away, or leave them out with --list."
            )
        return new


def printable(name):
    """A file's name for messages: bytes that are no UTF-8, line breaks and the like as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def walk(folder):
    """Paths of all videos below a folder, relative to it, by extension in any case, sorted; none hidden.

    Links to folders are followed, after all real folders; no folder is read twice, so loops of links end.
    """
    video = re.compile(rf"[^.].*\.({EXTENSIONS})", re.IGNORECASE | re.DOTALL)
    found, known, todo = [], set(), [folder]
    for start in todo:  # which grows by the links that are met
        for root, folders, files in os.walk(start):
            if os.path.realpath(root) in known:
                folders.clear()
                continue
            known.add(os.path.realpath(root))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            todo += [Path(root, name) for name in folders if Path(root, name).is_symlink()]
            found += [Path(root, file).relative_to(folder) for file in files if video.fullmatch(file)]
    return [path.as_posix() for path in sorted(found)]


def read_list(list_file, folder):
    """[(path relative to folder, label or None)] of a list file, `path [label]` per line; each video once."""
    try:
        text = Path(list_file).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ValueError(f"Cannot read the list {list_file}: {reason(error)}.") from None
    if "\0" in text:
        raise ValueError(f"Cannot read the list {list_file}: it is no text in UTF-8; save it as such.")
    entry = re.compile(rf"(.*\.(?:{EXTENSIONS}))(?:\s+(.*))?", re.IGNORECASE)
    root, found = Path(os.path.abspath(folder)), {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, label = match.groups() if (match := entry.fullmatch(line)) else (line, None)
        path = Path(name)  # in one spelling: no ./ and no //
        path = (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
        if found.setdefault(path, label) != label:
            raise ValueError(f"{list_file} names {printable(path)} with several labels; keep one of them.")
    return list(found.items())


def label_videos(folder, found, beside=()):
    """([(path, label)], class names in order) of [(path, label or None)]: None becomes the parent folder.

    UCF101's trainlist files work as they are: where all labels are numbers that stand one to one for parent
    folders, the folder names are the classes, in the order of the numbers (its classInd.txt).
    beside: more such pairs, of a list whose labels must be of the same kind.
    """

    def parent(path):
        return printable(Path(path).parent.name or folder.resolve().name)

    pairs = {(given, parent(path)) for path, given in [*found, *beside] if given}
    numbers, parents = {given for given, _ in pairs}, {name for _, name in pairs}
    if len(pairs) == len(numbers) == len(parents) and all(map(str.isdecimal, numbers)):
        place = {name: int(number) for number, name in pairs}
        found = [(path, parent(path)) for path, _ in found]
    else:
        place, found = {}, [(path, printable(given or parent(path))) for path, given in found]
    order = {name: (place.get(name, math.inf), name.lower(), name) for _, name in found}
    return found, tuple(sorted(order, key=order.get))


def look_at(folder, names):
    """{name: frames that a file promises, or the reason (a str) why it is no video}; several at a time."""

    def count_or_reason(name):
        try:
            with open_video(folder / name) as (container, stream):
                # Matroska, WebM, MPEG and others do not store the count.
                return max(stream.frames, 0) or count_packets(container, stream) or "holds no frames"
        except READ_ERRORS as error:
            return reason(error)

    with ThreadPoolExecutor(8) as pool:
        counts = tqdm(pool.map(count_or_reason, names), "look at videos", len(names), leave=False)
        return dict(zip(names, counts))


# ---- videos: the frames of a file ----

OPENING = {  # a video file is one file: no playlists, no network
    "format_whitelist": ",".join(sorted(av.formats_available - {"concat"})),
    "protocol_whitelist": "file",
}
MAX_PIXELS = 2**25  # of a frame; 8K has a little less
MAX_DECODED = 2**36  # pixels that are decoded for one clip; 22 minutes of 1920 x 1080 at 25 frames per second


class TooShort(ValueError):
    """A video turned out to have too few frames; `frames` says how many."""

    def __init__(self, frames):
        super().__init__(f"ends after {frames} frames, earlier than its header says")
        self.frames = frames


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
            raise ValueError(f"claims frames of {stream.width} x {stream.height}, over {MAX_PIXELS} pixels")
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # the size may change on the way
        stream.codec_context.thread_count = 1  # the workers are the parallelism
        yield container, stream


def packets(container, stream):
    """Packets up to the end of the file, or to damage of the container; the last one is empty, as a flush."""
    with contextlib.suppress(av.FFmpegError):  # there cannot be more than there are bytes
        yield from itertools.islice(container.demux(stream), container.size)


def count_packets(container, stream):
    """Frames of a stream by its packets, to the end of the file; nothing is decoded."""
    return sum(packet.size > 0 for packet in packets(container, stream))


def all_frames(container, stream, *, limit=True):
    """Decoded frames in display order, up to the end of the file or the first damage after a good frame.

    They end at damage because frames are missing there: no clip may lead across it.
    limit: for one clip, no more than MAX_DECODED.
    """
    most, good = MAX_DECODED // (stream.width * stream.height or 1) if limit else math.inf, False
    for number, packet in enumerate(packets(container, stream)):
        if number > most:
            raise ValueError(f"one clip needs over {most} frames decoded; encode it with more key frames")
        try:
            frames = stream.codec_context.decode(packet)
        except av.FFmpegError:
            if good:
                return
            continue
        good = good or len(frames) > 0
        yield from frames


def frames_from(container, stream, time, *, back):
    """Frames in display order from `time` (in seconds) on, decoded from the key frame before `time - back`.

    They end, or do not begin, where they could be wrong: if the first key frame shows too late, because the
    format has no index or orders its frames otherwise, or if a decoder says that it misses some reference.
    """
    with contextlib.suppress(av.FFmpegError, OverflowError):  # what cannot seek stays at its beginning
        container.seek(int((time - back) / stream.time_base), stream=stream)
    half = 0.5 / frame_rate(stream)  # time stamps are rounded
    key = reached = False
    for frame in all_frames(container, stream):
        if not (key or frame.key_frame):
            continue  # refers to frames before the key frame, which were not decoded
        if frame.is_corrupt or frame.time is None or (not key and frame.time > time + half):
            return
        key, reached = True, reached or frame.time >= time - half
        if reached:
            yield frame


def frame_rate(stream):
    """Frames per second, as far as the header tells."""
    return float(stream.average_rate or stream.guessed_rate or 25)


def read_clip(path, *, video=(16, 128, 128), stride=4, start=0.5, crop=(0.5, 0.5), short="repeat"):
    """Read T frames of a video file, every stride-th, from a place given as a fraction: (T, H, W, C) uint8.

    start: 0 is the earliest possible start, 1 the latest. crop: its (vertical, horizontal) place, 0..1.
    short: with too few frames, "repeat" repeats the last one, "drop" raises TooShort.
    Rotation by metadata is applied (phones film sideways); non-square pixels and HDR are not converted.
    Time stamps only choose where a clip starts; from there on frames are counted, also by the stride.
    Raises READ_ERRORS if nothing can be read.
    Differs from paper, which names a random 128 x 128 crop only: the shorter side is first resized to that.
    """
    T, H, W = video
    span, reformatter = T * stride, VideoReformatter()

    def take(found, skip=0):
        """Up to T frames, every stride-th after the first `skip`, each (H, W, C), and how many went by."""
        kept, passed = [], 0
        for passed, frame in enumerate(found, 1):
            if passed > skip and (passed - skip - 1) % stride == 0:
                kept.append(upright_crop(frame, reformatter, H, W, crop))
                if len(kept) == T:
                    break
        return kept, passed

    with open_video(path) as (container, stream):
        begin = float((stream.start_time or 0) * stream.time_base)
        seconds = float((stream.duration or 0) * stream.time_base) or (container.duration or 0) / av.time_base
        by_time = seconds * frame_rate(stream)  # fewer than stored if an edit list hides some
        count = min(stream.frames or by_time, by_time) or count_packets(container, stream)
        time = begin + start * seconds * max(0.0, 1 - span / max(1.0, count))
        if time > begin and container.format.name != "mxf":  # whose time stamps may be wrong after a seek
            for back in (0, 2):  # seconds: the key frame before `time` in the file may show after it
                frames, _ = take(frames_from(container, stream, time, back=back))
                if len(frames) == T:
                    return np.stack(frames)  # (T, H, W, C)
    # Where seeking fails, and at the very beginning: decode from there, and count. That tells how many frames
    # there really are; if the header has promised more, choose the place again.
    for _ in range(2):
        skip = int(start * max(0, count - span))
        with open_video(path) as (container, stream):
            frames, count = take(all_frames(container, stream), skip)
        if len(frames) == T or skip == 0:
            break
    if not frames:
        raise ValueError("no frame can be decoded")
    if len(frames) < T and short == "drop":
        raise TooShort(count)
    return np.stack(frames + frames[-1:] * (T - len(frames)))  # (T, H, W, C)


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
        for action in self._actions:
            if action.option_strings and getattr(found, action.dest, None) == "":
                self.error(f"{action.option_strings[0]} is empty; leave it out, or say which")
        return found


def number(kind=int, *, least=-math.inf, most=math.inf, above=-math.inf, below=math.inf):
    """A type for argparse: an int or a finite float inside the limits that are given."""
    limits = {"at least": least, "more than": above, "at most": most, "below": below}
    wanted = "an integer" if kind is int else "a finite number"
    wanted += "".join(f", {word} {limit}" for word, limit in limits.items() if abs(limit) != math.inf)

    def convert(text):
        try:
            value, shown = kind(text), text
        except ValueError:
            value, shown = math.nan, repr(text)
        if least <= value <= most and above < value < below:  # nan never is
            return value
        raise argparse.ArgumentTypeError(f"{shown:.40} must be {wanted}")

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
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        raise ValueError(f"{path} cannot be written ({reason(error)}); name another place.") from None


def pick_device(name="auto"):
    """A --device, of which auto is the fastest here; ValueError if it does not work here."""
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"--device {name} does not work here ({why:.200}); try --device cpu.") from None
    return name


def free_workers(error):
    """Let go of a loader that failed. Python would wait for ever for its workers, which ignore signals."""
    if hasattr(signal, "SIGCHLD"):  # not on Windows; torch's handler would raise again meanwhile
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    traceback.clear_frames(error.__traceback__)


def out_of_memory(error):
    """Is there too little memory, of the machine or of a GPU?"""
    lacks = "out of memory" in str(error) or "allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and lacks)


@contextlib.contextmanager
def program():
    """Around the main() of every program: what ends it ends it with one sentence and without a traceback."""
    with contextlib.suppress(AttributeError, TypeError, OSError):  # elsewhere than on Linux with glibc
        # Keep what is freed: giving large buffers back at every step costs up to a third of a CPU's time.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: larger ones still come from the system
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        free_workers(error)
        if isinstance(error, BrokenPipeError):  # | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        if isinstance(error, ValueError):
            fail(error)
        if isinstance(error, OSError):  # a full disk, for example
            fail(f"{error.filename or 'a file'}: {reason(error)}", code=1)
        if out_of_memory(error):
            fail("out of memory; try a smaller --batch.", code=1)
        raise


# ---- batches ----


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, clips):
    """The random order of one epoch."""
    return np.random.default_rng((seed, 0, epoch)).permutation(clips)


def read_sample(source, index, rng=None):
    """A sample; its video is None where `broken` {name: reason, or frames, if too short} says why."""
    video, broken = None, {}
    try:
        video = torch.from_numpy(source.read(index, rng))
    except READ_ERRORS as error:
        broken[source.name(index)] = error.frames if isinstance(error, TooShort) else reason(error)
    return {"video": video, "index": index, "broken": broken}


class Ordered(Dataset):
    """The clips of a source in order, read as for evaluation. A broken file gives only its reason."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, index):
        return read_sample(self.source, index)


class Stream(Dataset):
    """The endless stream of training samples: sample k is a pure function of (seed, k).

    No random state is kept: (seed, 0, epoch) draws the order, (seed, 1, epoch, clip) start, crop and flip, and
    (seed, 2, step) the masks in train.py. So workers, stopping and resuming change nothing. A broken or short
    file is replaced by the next good one of the source, and reported with the sample.
    """

    def __init__(self, source, seed):
        self.source, self.seed = source, seed

    def __getitem__(self, k):
        clips, broken = len(self.source), {}
        epoch, place = divmod(k, clips)
        first = int(epoch_order(self.seed, epoch, clips)[place])
        rng = np.random.default_rng((self.seed, 1, epoch, first))
        for tried in range(max(clips, 100)):  # of few, each again from another start: damage may end a clip
            sample = read_sample(self.source, (first + tried) % clips, rng)
            broken |= sample["broken"]
            if sample["video"] is not None:
                break
        return sample | {"broken": broken}  # without a video, if none is left


def collate(samples):
    """A batch: video (B, T, H, W, C) uint8 or None, index [B], how many clips are missing, broken files."""
    read = [sample for sample in samples if sample["video"] is not None]
    return {
        "video": torch.stack([sample["video"] for sample in read]) if read else None,
        "index": [sample["index"] for sample in read],
        "missing": len(samples) - len(read),
        "broken": {name: why for sample in samples for name, why in sample["broken"].items()},
    }


def leave_signals_to_main(_):
    """Workers end with the main process: Ctrl-C and SIGTERM reach it too, and it wants its last batch."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def loader(source, *, batch, first=0, last, seed=0, workers=0, part=0, parts=1, pin_memory=False):
    """Batches of training steps first..last-1, the same for any first and any number of workers.

    part, parts: read only this one of equal parts of every batch, for several processes.
    """
    size = batch // parts
    starts = range(first * batch + part * size, last * batch, batch)
    which = [range(start, start + size) for start in starts]
    how = {"num_workers": workers, "worker_init_fn": leave_signals_to_main, "pin_memory": pin_memory}
    return DataLoader(Stream(source, seed), batch_sampler=which, collate_fn=collate, **how)


def evaluation_loader(source, *, indices=None, batch=32, workers=0):
    """Batches of every clip once and in order, or of some; broken files are reported and left out."""
    which = range(len(source)) if indices is None else indices
    how = {"num_workers": workers, "worker_init_fn": leave_signals_to_main}
    return DataLoader(Ordered(source), batch_size=batch, sampler=which, collate_fn=collate, **how)


# ---- pictures ----

# A 3x5 pixel font: one octal digit per row of a letter.
GLYPHS = (
    "A25755 B65656 C34443 D65556 E74647 F74644 G34553 H55755 I72227 J11152 K55655 L44447 M57755 N65555 "
    "O25552 P65644 Q25563 R65655 S34216 T72222 U55557 V55552 W55775 X55255 Y55222 Z71247 075557 126227 "
    "271747 371717 455711 574717 674757 771111 875757 975717 .00002 -00700 +02720 :02020 /11244 %51245 "
    "(24442 )21112"
)
FONT = {glyph[0]: [int(row) for row in glyph[1:]] for glyph in GLYPHS.split()}


def tile(rows):
    """One image (H, W, C) from rows of pictures, {title: (n, H, W, C) uint8}. Small ones are enlarged."""
    zoom = max(1, 128 // next(iter(rows.values())).shape[1])
    margin = 8 * max(map(len, rows)) + 16
    strips = []
    for title, pictures in rows.items():
        picture = np.concatenate(list(pictures), axis=1).repeat(zoom, 0).repeat(zoom, 1)
        strip = np.zeros((picture.shape[0] + 4, margin + picture.shape[1], 3), np.uint8)
        strip[:-4, margin:] = picture
        letters = np.array([FONT.get(letter, [0] * 5) for letter in title.upper()])  # (letters, 5)
        bits = letters[..., None] >> np.array([2, 1, 0, 3]) & 1  # (letters, 5, 4): bit 3, the gap, is 0
        text = bits.transpose(1, 0, 2).reshape(5, -1).repeat(2, 0).repeat(2, 1)  # 8 x 10 pixels a letter
        top = picture.shape[0] // 2 - 5
        strip[top : top + 10, 8 : 8 + text.shape[1]] = 255 * text[..., None]
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
    options = options or {"preset": "ultrafast"}  # which only libx264 heeds
    with av.open(f"file:{path}", "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        H, W = (size // 2 * 2 for size in first.shape[:2])  # both codecs want even sizes
        stream.height, stream.width, stream.pix_fmt = H, W, "yuv420p"
        for image in itertools.chain([first], images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:H, :W]), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
