"""Clips to train on: generated moving scenes (no download), or any folder of videos, read with PyAV.

Römer & Dickscheid, arXiv 2601.09040, Sec. 3.2, 3.3: 16 frames at stride 4; random crop and flip for
training, centre crop for evaluation; videos that are too short are dropped.

    source = Scenes("train")                          # or Videos("UCF-101", list_file="trainlist01.txt")
    for batch in train_loader(source, batch=32, last=1500):
        batch["video"]                                # (B, T, H, W, C) uint8

Shapes: B batch, T frames, H W pixels, C channels.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import torch
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import VideoReformatter
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# A clip source is any class with
#     __len__()               number of clips
#     name(index)             what messages call a clip
#     labels                  {target: (class, ...)}
#     targets(index)          class number of a clip for each target, a tuple
#     read(index, rng=None)   the clip, (T, H, W, C) uint8; random start, crop and flip if there is an rng;
#                             raises READ_ERRORS if it cannot be read
#     fingerprint             a text that is the same for the same clips: a run is only resumed on those

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

    A single frame says nothing about the motion: position (on a torus), angle and log-scale (on a circle) are
    uniform at every frame. So an object that has grown to its largest size goes on from its smallest.

    split: "train" or "test". clips: how many make one epoch. video: (T, H, W).
    """

    # Differs from paper: ours, so that the first run needs no download.

    def __init__(self, split="train", *, clips=20000, video=(16, 64, 64), seed=0):
        self.split = ("train", "test").index(split)
        self.clips, self.video, self.seed, self.labels = clips, tuple(video), seed, SCENE_LABELS
        self.combinations = list(itertools.product(*SCENE_LABELS.values()))
        self.fingerprint = f"scenes {clips} {seed}"

    def __len__(self):
        return self.clips

    def name(self, index):
        return f"generated clip {index}"

    def combination(self, index):
        """Colour, shape, size, motion and agreement of clip `index`."""
        rounds, position = divmod(index, len(self.combinations))
        rng = np.random.default_rng((self.seed, self.split, 0, rounds))
        return self.combinations[rng.permutation(len(self.combinations))[position]]

    def targets(self, index):
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
    """Fraction of the clip passed (T, 1), and pixel centres x (1, W) and y (1, H) in half frames, -1..1."""
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
    position = 2 * rng.random(2)
    x = (x - position[0] - 1.2 * right * time) % 2 - 1  # (T, W): from the object's centre, on a torus
    y = (y - position[1] - 1.2 * down * time) % 2 - 1  # (T, H)
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
        self.fingerprint = "double gratings" if double else "gratings"

    def __len__(self):
        return len(self.combinations)

    def name(self, index):
        return ", ".join(f"{name} {value}" for name, value in self.stimulus(index).items())

    def stimulus(self, index):
        """Parameters of clip `index`, by name."""
        return dict(zip(self.parameters, self.combinations[index]))

    def targets(self, index):
        values = self.stimulus(index)
        if self.double:
            left, right = values["sf_left"], values["sf_right"]
            values["sf_difference"] = right - left
            values["higher_side"] = "equal" if left == right else "left" if left > right else "right"
            values["sf_match"] = "yes" if left == right else "no"
            values["theta_right"] = (values["theta_left"] + values["delta"]) % 360
            values["theta_match"] = "yes" if values["delta"] == 0 else "no"
        return tuple(classes.index(values[target]) for target, classes in self.labels.items())

    def read(self, index, rng=None):
        """Clip `index`, (T, H, W, C) uint8. Nothing is random: rng is unused."""
        # Paper does not say: how values -1..1 enter the model. Ours become 0..255, like any video.
        values = self.stimulus(index) | {"video": self.video}
        if self.double:
            left = {"sf": values.pop("sf_left"), "theta": values.pop("theta_left")}
            right = {"sf": values.pop("sf_right"), "theta": (left["theta"] + values.pop("delta")) % 360}
            half = self.video[2] // 2
            frames = drifting_grating(**left, **values)
            frames[:, :, half:] = drifting_grating(**right, **values)[:, :, half:]
        else:
            frames = drifting_grating(**values)
        return np.rint((frames + 1) * 127.5).astype(np.uint8)


# ---- videos: a folder of them ----

EXTENSIONS = (
    "264|265|266|3g2|3gp|3gpp|apng|asf|avi|divx|dv|f4v|flv|gif|h263|h264|h265|h266|hevc|ivf|m1v|m2p|m2t|m2ts|m2v|"
    "m4v|mjpeg|mjpg|mk3d|mkv|mov|mp4|mpe|mpeg|mpg|mpv|mts|mxf|nut|obu|ogg|ogm|ogv|ogx|qt|rm|rmvb|tod|tp|trp|ts|"
    "vob|webm|wmv|wtv|y4m"
)
READ_ERRORS = (OSError, ValueError, av.FFmpegError)  # what a broken file raises, also from inside FFmpeg
MAX_BROKEN = 0.05  # more broken files than this fraction (and more than one) end a run


class Videos:
    """All videos below a folder, or those of a list, with one label each: the parent folder, or the list's.

    folder: searched by file extension.
    list_file: one `path [label]` per line, relative to folder; paths may hold spaces.
    paired_list: the test list beside a training list, or the reverse. The lists' labels are used if every line
    of both has one, otherwise the parent folders. UCF101's trainlist files work as they are.
    video: (T, H, W) of a clip. stride: take every stride-th frame.
    short: the rule for videos of fewer than T * stride frames: "drop" (the paper's) leaves them out, "repeat"
    repeats their last frame.
    flip: mirror half of the training clips left-right. False for labels with a direction, as "left".
    counts_file: where the number of frames of every file is kept, so that the files are looked at once.
    Attributes: files [(path, label)], classes, total (files before any is left out), broken {name: reason}:
    files that cannot be read, too_short {name: frames}.
    """

    def __init__(
        self,
        folder,
        *,
        list_file=None,
        paired_list=None,
        video=(16, 128, 128),
        stride=4,
        short="drop",
        flip=True,
        counts_file=None,
    ):
        self.folder, self.video, self.stride = Path(folder), tuple(video), stride
        self.short, self.flip = short, flip
        if not os.path.isdir(folder):
            raise ValueError(f"{folder} is not a folder; --data names the folder of the videos.")
        labels = read_list(list_file, self.folder) if list_file else dict.fromkeys(video_files(self.folder))
        paired = read_list(paired_list, self.folder) if paired_list else {}
        if not labels:
            raise ValueError(f"No videos in {list_file or self.folder}, by their extension: {EXTENSIONS}.")
        if not all([*labels.values(), *paired.values()]):
            labels = {path: Path(path).parent.name or self.folder.resolve().name for path in labels}
        counts = frame_counts(self.folder, list(labels), counts_file)
        least = 1 if short == "repeat" else self.video[0] * stride
        left_out = {path: n for path, n in counts.items() if not isinstance(n, int) or n < least}
        self.files = [(path, label) for path, label in labels.items() if path not in left_out]
        self.total = len(labels)
        skipped = Skipped(self)
        skipped.update({"skipped": left_out, "missing": not self.files})
        self.broken, self.too_short = skipped.broken, skipped.too_short
        names = {label for _, label in self.files}
        self.classes = tuple(sorted(names, key=lambda name: (name.lower(), name)))
        self.labels = {"class": self.classes}
        paths = "\n".join(path for path, _ in self.files)
        self.fingerprint = hashlib.sha256(paths.encode("utf-8", "surrogatepass")).hexdigest()

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return self.files[index][0]

    def targets(self, index):
        return (self.classes.index(self.files[index][1]),)

    def read(self, index, rng=None):
        """One clip of video `index`, (T, H, W, C) uint8. Raises READ_ERRORS if it cannot be read.

        rng: random start, crop and flip, for training (Sec. 3.2); None: start and crop in the middle, no flip.
        """
        # Paper does not say: where in the video a clip starts.
        start, top, left, mirror = (0.5, 0.5, 0.5, 0.0) if rng is None else rng.random(4)
        path, rules = self.folder / self.files[index][0], {"stride": self.stride, "short": self.short}
        clip = read_clip(path, video=self.video, start=start, crop=(top, left), **rules)
        return np.ascontiguousarray(clip[:, :, ::-1]) if self.flip and mirror > 0.5 else clip

    def summary(self):
        """How many videos are used, and which are left out: lines to print."""
        lines = [f"data: {len(self)} of {self.total} videos in {self.folder}, classes: {len(self.classes)}"]
        if self.too_short:
            count = len(self.too_short)
            lines.append(f"  {count} left out, shorter than frames x stride; --short repeat keeps them")
        lines += [f"  broken: {name} ({reason})" for name, reason in self.broken.items()]
        return "\n".join(lines)

    def shared(self, other):
        """Names of the videos that `other` holds too, also under another spelling or through a link."""
        paths = {os.path.realpath(other.folder / path) for path, _ in other.files}
        return [path for path, _ in self.files if os.path.realpath(self.folder / path) in paths]


def video_files(folder):
    """Sorted paths of all videos below a folder, relative to it, by extension in any case; none hidden.

    Links to folders are followed; no folder is read twice. A folder that holds a run (last.pt) is skipped: its
    files are results, not data.
    """
    video = re.compile(rf"[^.].*\.({EXTENSIONS})", re.IGNORECASE | re.DOTALL)
    paths, visited = [], set()
    for root, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in visited or "last.pt" in files:
            folders.clear()
            continue
        visited.add(os.path.realpath(root))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [Path(root, file).relative_to(folder) for file in files if video.fullmatch(file)]
    return [path.as_posix() for path in sorted(paths)]


def read_list(list_file, folder):
    """{path relative to folder: label or None} of a list file."""
    try:
        text = Path(list_file).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ValueError(f"Cannot read the list {list_file}: {error_reason(error)}.") from None
    entry, labels = re.compile(rf"(.*\.(?:{EXTENSIONS}))(?:\s+(.*))?", re.IGNORECASE), {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, label = match.groups() if (match := entry.fullmatch(line)) else (line, None)
        path = Path(os.path.relpath(folder / name, folder)).as_posix()
        if labels.setdefault(path, label) != label:
            raise ValueError(f"{list_file} names {path} with several labels; keep one of them.")
    return labels


def frame_counts(folder, paths, counts_file=None):
    """{path: number of frames, or the reason (a str) why it cannot be read}; several files at a time.

    counts_file: a JSON file of the counts of this folder. Files that it lacks are looked at, and added to it.
    """
    counts, root = {}, os.path.realpath(folder)
    if counts_file and Path(counts_file).is_file():
        content = json.loads(Path(counts_file).read_text())
        counts = content["frames"] if content["folder"] == root else {}
    unknown = [path for path in paths if path not in counts]

    def count_or_reason(path):
        try:
            with open_video(folder / path) as (container, stream):
                return frame_times(container, stream)[0] or "holds no frames"
        except READ_ERRORS as error:
            return error_reason(error)

    with ThreadPoolExecutor(8) as pool:
        bar = tqdm(pool.map(count_or_reason, unknown), "look at videos", len(unknown), leave=False)
        counts |= zip(unknown, bar)
    if counts_file and unknown:
        readable = {path: count for path, count in counts.items() if isinstance(count, int)}
        content = json.dumps({"folder": root, "frames": readable}).encode()
        with contextlib.suppress(OSError):  # of a run that another user owns
            Path(counts_file).parent.mkdir(parents=True, exist_ok=True)
            write_file(counts_file, lambda file: file.write(content))
    return {path: counts[path] for path in paths}


class Skipped:
    """The skipped clips of a run: `broken` {name: reason}, `too_short` {name: frames}; at first, the source's."""

    def __init__(self, source):
        self.total = getattr(source, "total", len(source))
        self.broken = dict(getattr(source, "broken", {}))
        self.too_short = dict(getattr(source, "too_short", {}))

    def update(self, batch):
        """Add those of a batch; returns a message for each new one. ValueError if too many are broken, or all."""
        messages = []
        for name, reason in batch["skipped"].items():
            if name in self.broken or name in self.too_short:
                continue
            if isinstance(reason, int):
                self.too_short[name] = reason
                messages.append(f"{name} is skipped: ends, or is damaged, after {reason} frames")
            else:
                self.broken[name] = reason
                messages.append(f"{name} is skipped: {reason}")
        none_left = batch["missing"] and len(self.broken) + len(self.too_short) >= self.total
        if none_left and self.too_short:
            longest = max(self.too_short.values())
            raise ValueError(
                f"All videos that can be read are too short, the longest has {longest} frames; "
                "use a smaller --stride, or --short repeat."
            )
        if none_left or len(self.broken) > max(1, MAX_BROKEN * self.total):
            examples = "; ".join(f"{name} ({reason})" for name, reason in [*self.broken.items()][:10])
            raise ValueError(
                f"{len(self.broken)} of {self.total} videos cannot be read, at most {MAX_BROKEN:.0%} may be: "
                f"{examples}. Repair them, move them away, or leave them out with a list."
            )
        return messages


# ---- videos: the frames of a file ----


class TooShort(ValueError):
    """A video turned out to have too few frames; `frames` says how many."""

    def __init__(self, frames):
        super().__init__(f"ends after {frames} frames, earlier than its header says")
        self.frames = frames


def error_reason(error):
    """The message of an error from Python or FFmpeg, without its number and file name."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


@contextlib.contextmanager
def open_video(path):
    """(container, video stream) of a file, closed at the end. ValueError if it has none that can be decoded."""
    if not Path(path).is_file():
        raise ValueError("is not a file")  # reading a pipe could wait for ever
    # "file:" because a name may hold a colon, as in 12:30.mp4, and must not be taken for an address.
    with av.open(f"file:{path}", metadata_errors="replace") as container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise ValueError("has no video stream that can be decoded here")
        stream.codec_context.options = {"max_pixels": str(2**25)}  # of a frame; 8K has a little less
        stream.codec_context.thread_count = 1  # the workers are the parallelism
        yield container, stream


def packets(container, stream):
    """Packets to the end of the file, then an empty one to flush the decoder; or up to damage of the container."""
    with contextlib.suppress(av.FFmpegError):
        for packet in itertools.islice(container.demux(stream), container.size):  # no more packets than bytes
            if packet.size or packet.dts is None:  # an empty packet with a time stamp holds no picture
                yield packet


@functools.lru_cache(maxsize=20_000)  # files
def packet_times(path, size):
    """Sorted time stamps of a file's packets; all nan if one has none. size: bytes, tells a changed file."""
    with open_video(path) as (container, stream):
        shown = (packet for packet in packets(container, stream) if packet.size and not packet.is_discard)
        times = [packet.dts if packet.pts is None else packet.pts for packet in shown]
    return np.array([np.nan] * len(times) if None in times else sorted(times))


def frame_times(container, stream):
    """(number of frames, function that gives the time stamp of frame k in display order), nothing decoded.

    MP4 and AVI have an index of all frames. Where there is none, or where it does not tell all (the rest of an MP4
    may be in fragments, or an edit list hides frames), all packets are read. A time stamp may be None.
    """
    index, count = stream.index_entries, stream.frames
    if count > 0 and len(index) == count and 2 * index[count - 1].timestamp >= (stream.duration or 0):
        delay = (stream.start_time or 0) - index[0].timestamp  # of display after decoding, for B-frames
        if not (index[0].is_discard or index[count - 1].is_discard):
            return count, lambda k: index[k].timestamp + delay
    times = packet_times(container.name.removeprefix("file:"), container.size)
    return len(times), lambda k: None if np.isnan(times[k]) else int(times[k])


def holds_picture(packet, stream):
    """Whether a packet that the decoder refuses holds a picture; in H.264 it may be metadata. It is used up."""
    if stream.codec_context.name != "h264":
        return True
    try:  # what is left without metadata, as SEI, and parameter sets
        return bool(BitStreamFilterContext("filter_units=remove_types=6-13", stream).filter(packet))
    except av.FFmpegError:
        return True


def all_frames(container, stream):
    """Decoded frames in display order, up to the end of the file or the first damage after a good frame.

    They end at damage because frames are missing there: no clip may cross it. After damage at the beginning they
    start at the next key frame.
    """
    good = wait = flagged = False
    for packet in packets(container, stream):
        frames, damaged = [], packet.is_corrupt or flagged
        flagged = packet.is_corrupt  # what was lost may belong to the next packet, too
        if not damaged:
            try:
                frames = stream.codec_context.decode(packet)
            except av.FFmpegError:
                damaged = holds_picture(packet, stream)
        for frame in frames:
            wait = wait and not frame.key_frame
            if not wait and not frame.is_corrupt:
                good = True
                yield frame
            elif good:
                return
        if damaged and good:
            return
        if damaged:
            stream.codec_context.flush_buffers()  # frames from before, which it holds back
            wait = True


def frames_from(container, stream, time, *, preroll):
    """Frames in display order from `time` (in stream.time_base) on, decoded from an earlier key frame.

    preroll: look for the key frame this many seconds before `time`.
    Gives none if the key frame is displayed after `time`: the format has no index, or orders its frames otherwise.
    """
    with contextlib.suppress(av.FFmpegError, OverflowError):  # a file that cannot seek stays where it is
        container.seek(int(time - preroll / stream.time_base), stream=stream)
    key = reached = False
    for frame in all_frames(container, stream):
        if not (key or frame.key_frame):
            continue  # refers to frames before the key frame, which were not decoded
        if frame.pts is None or (not key and frame.pts > time):
            return
        key, reached = True, reached or frame.pts >= time
        if reached:
            yield frame


def read_clip(path, *, video=(16, 128, 128), stride=4, start=0.5, crop=(0.5, 0.5), short="repeat"):
    """Read T frames of a video file, every stride-th, from a position given as a fraction: (T, H, W, C) uint8.

    start: 0 is the first possible frame, 1 the last. crop: its (vertical, horizontal) position, 0..1.
    short: with too few frames, "repeat" repeats the last one, "drop" raises TooShort.
    Rotation and mirroring by metadata are applied (phones film sideways); non-square pixels and HDR are not.
    Time stamps only choose where a clip starts; from there on frames are counted, also by the stride.
    Raises READ_ERRORS if nothing can be read.
    Differs from paper, which names a random 128 x 128 crop only: the shorter side is first resized to that.
    """
    T, H, W = video
    span, reformatter = T * stride, VideoReformatter()

    def take(frames, skip=0):
        """Up to T frames, every stride-th after the first `skip`, each (H, W, C), and how many went by."""
        kept, passed = [], 0
        for passed, frame in enumerate(frames, 1):
            if passed > skip and (passed - skip - 1) % stride == 0:
                kept.append(upright_crop(frame, reformatter, H, W, crop))
                if len(kept) == T:
                    break
        return kept, passed

    with open_video(path) as (container, stream):
        count, time = frame_times(container, stream)
        first = round(start * max(0, count - span))
        # No seek: a palette comes once, with the first frame; MXF's time stamps may be wrong.
        seekable = stream.codec_context.pix_fmt != "pal8" and container.format.name != "mxf"
        if first > 0 and seekable and time(first) is not None:
            # Seconds: a key frame may be displayed later than its position in the file says.
            for preroll in (0, 2):
                frames, _ = take(frames_from(container, stream, time(first), preroll=preroll))
                if len(frames) == T:
                    return np.stack(frames)  # (T, H, W, C)
    # Otherwise decode from the beginning, and count. That tells how many frames there really are; if the header
    # has promised more, choose the position again.
    for _ in range(2):
        with open_video(path) as (container, stream):
            frames, count = take(all_frames(container, stream), first)
        if len(frames) == T or first == 0:
            break
        first = round(start * max(0, count - span))
    if not frames:
        raise ValueError("no frame can be decoded")
    if len(frames) < T and short == "drop":
        raise TooShort(count)
    return np.stack(frames + frames[-1:] * (T - len(frames)))  # (T, H, W, C)


def orientation(frame):
    """(transpose, flip rows, flip columns) that show a frame upright, by its display matrix.

    The matrix shows pixel (x, y) at (a x + c y, b x + d y). Right angles only: others leave the frame as stored.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]
        if a and d and not b and not c:
            return False, d < 0, a < 0
        if b and c and not a and not d:
            return True, b < 0, c < 0
    return False, False, False


def upright_crop(frame, reformatter, H, W, crop):
    """One decoded frame, scaled so that it just covers H x W, turned upright and cropped: (H, W, C) uint8."""
    transpose, flip_rows, flip_columns = orientation(frame)
    height, width = (frame.width, frame.height) if transpose else (frame.height, frame.width)  # upright
    scale = max(H / height, W / width)
    height, width = max(H, round(height * scale)), max(W, round(width * scale))
    stored = {"width": height, "height": width} if transpose else {"width": width, "height": height}
    scaled = reformatter.reformat(frame, format="rgb24", interpolation="BILINEAR", threads=1, **stored)
    rooms = (height - H, width - W)
    top, left = (min(int(fraction * (room + 1)), room) for fraction, room in zip(crop, rooms))
    pixels = scaled.to_ndarray().transpose(1, 0, 2) if transpose else scaled.to_ndarray()
    pixels = pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    return pixels[top : top + H, left : left + W]


# ---- batches ----


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, clips):
    """The random order of one epoch."""
    return np.random.default_rng((seed, 0, epoch)).permutation(clips)


def read_sample(source, index, rng=None):
    """A sample; its video is None where `skipped` {name: reason, or frames if too short} says why."""
    video, skipped = None, {}
    try:
        video = torch.from_numpy(source.read(index, rng))
    except READ_ERRORS as error:
        skipped[source.name(index)] = error.frames if isinstance(error, TooShort) else error_reason(error)
    return {"video": video, "index": index, "skipped": skipped}


class EvalDataset(Dataset):
    """The clips of a source in order, read as for evaluation. A broken file gives only its reason."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, index):
        return read_sample(self.source, index)


class TrainDataset(Dataset):
    """The endless stream of training samples: sample k is a pure function of (seed, k).

    No random state is kept: (seed, 0, epoch) draws the order, (seed, 1, epoch, clip) start, crop and flip, and
    (seed, 2, step) the masks in train.py. So workers, stopping and resuming change nothing. A broken or short
    file is replaced by the next good one of the source, and reported with the sample.
    """

    def __init__(self, source, seed):
        self.source, self.seed = source, seed

    def __getitem__(self, k):
        clips, skipped = len(self.source), {}
        epoch, position = divmod(k, clips)
        first = int(epoch_order(self.seed, epoch, clips)[position])
        rng = np.random.default_rng((self.seed, 1, epoch, first))
        for attempt in range(max(clips, 100)):  # few are tried again from other starts: damage may end one
            sample = read_sample(self.source, (first + attempt) % clips, rng)
            skipped |= sample["skipped"]
            if sample["video"] is not None:
                break
        return sample | {"skipped": skipped}  # without a video, if none is left


def collate(samples):
    """A batch: video (B, T, H, W, C) uint8 or None, index [B], number of missing clips, skipped files."""
    read = [sample for sample in samples if sample["video"] is not None]
    return {
        "video": torch.stack([sample["video"] for sample in read]) if read else None,
        "index": [sample["index"] for sample in read],
        "missing": len(samples) - len(read),
        "skipped": {name: why for sample in samples for name, why in sample["skipped"].items()},
    }


def ignore_signals(_):
    """Workers end with the main process: Ctrl-C and SIGTERM reach it too, and it wants its last batch."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def check_shared_memory(source, workers, batch, batches):
    """ValueError if the batches that workers prepare do not fit into /dev/shm: the loader would wait for ever."""
    clip = read_sample(source, 0)["video"] if workers and os.path.isdir("/dev/shm") and batches else None
    if clip is not None:
        need = min(batches, 2 * workers + 1) * batch * clip.nbytes / 1e6  # each worker prepares two
        free = shutil.disk_usage("/dev/shm").free / 1e6
        if need > free:
            raise ValueError(
                f"{workers} workers need {need:.0f} MB of shared memory, /dev/shm has {free:.0f} MB free; "
                f"use --workers 0, or start the container with more of it (--shm-size {math.ceil(need / 500)}g)."
            )


def train_loader(source, *, batch, first=0, last, seed=0, workers=0, rank=0, world_size=1, pin_memory=False):
    """Batches of training steps first..last-1, the same for any first and any number of workers.

    rank, world_size: one of several processes reads its own slice of every batch.
    """
    size = batch // world_size
    starts = range(first * batch + rank * size, last * batch, batch)
    check_shared_memory(source, workers, size, len(starts))
    indices = [range(start, start + size) for start in starts]
    loader_kwargs = {"num_workers": workers, "worker_init_fn": ignore_signals, "pin_memory": pin_memory}
    return DataLoader(TrainDataset(source, seed), batch_sampler=indices, collate_fn=collate, **loader_kwargs)


def eval_loader(source, *, indices=None, batch=32, workers=0):
    """Batches of every clip once and in order, or of some; broken files are reported and left out."""
    indices = range(len(source)) if indices is None else indices
    check_shared_memory(source, workers, min(batch, len(indices)), math.ceil(len(indices) / batch))
    loader_kwargs = {"num_workers": workers, "worker_init_fn": ignore_signals, "collate_fn": collate}
    return DataLoader(EvalDataset(source), batch_size=batch, sampler=indices, **loader_kwargs)


# ---- for all programs ----


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


def default_workers():
    """Processes that read clips: the cores that this process may use, divided by torchrun's processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def keep_freed_memory():
    """Keep large buffers that are freed: giving them back at every step costs up to a third of a CPU's time."""
    with contextlib.suppress(AttributeError, TypeError, OSError):  # elsewhere than on Linux with glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: larger ones still come from the system
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def check_writable(path, folder=False):
    """ValueError if a file, or files in a folder, cannot be written: said before the work, not after it."""
    folder = Path(path) if folder else Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error_reason(error)}); name another one.") from None


def write_file(path, write):
    """Call write(file) on a new file, which then replaces `path`: a full disk or a kill leaves the old one."""
    with open(f"{path}.tmp", "wb") as file:
        write(file)
    os.replace(f"{path}.tmp", path)


def write_json(path, values):
    """Write a JSON file as write_file() does; nan, which JSON does not know, becomes null."""
    values = json.loads(json.dumps(values), parse_constant=lambda _: None)
    text = json.dumps(values, indent=1) + "\n"
    write_file(path, lambda file: file.write(text.encode()))


def is_user_error(error):
    """Whether this project itself has raised a ValueError: its text tells the user what to mend."""
    if not isinstance(error, ValueError):
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return frame.line.startswith("raise ValueError") and Path(__file__).parent in Path(frame.filename).parents


@contextlib.contextmanager
def user_errors():
    """Around the main() of every program: an error of the user's is printed as one sentence, exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a console may lack the letters of a file's name
    try:
        yield
    except ValueError as error:
        if not is_user_error(error):
            raise
        tqdm.write(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    finally:  # workers that are left ignore SIGTERM, and Python would wait for them
        workers = multiprocessing.active_children()
        if workers and hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
        for worker in workers:
            worker.kill()
