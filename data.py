"""Clips to train on: generated moving scenes (no download), or any folder of videos, read with PyAV.

Römer & Dickscheid, arXiv 2601.09040, Sec. 3.2: 16 frames at stride 4; random 128x128 crop and horizontal flip
for training, centre crop for evaluation; videos that are too short are dropped.

    source = Scenes("train")                                        # or Videos("UCF-101",
    list_file="trainlist01.txt") for batch in loader(source, batch=32, first=0, last=1500): ...  #
    batch["video"]: (B, T, H, W, C) uint8

Sample k of the endless training stream is a pure function of (seed, k): order, start, crop and flip keep no
random state. So the number of workers, stopping and resuming change nothing, and any step's batch can be made
again.

Shapes: B batch, T frames, H W pixels, C channels.
"""

import functools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from tqdm import tqdm

# ---- generated clips: moving scenes ----

COLOURS = {"red": (0.85, 0.3, 0.3), "green": (0.3, 0.8, 0.3), "blue": (0.3, 0.4, 0.9)}
RADII = {"small": 0.24, "large": 0.44}  # of the disc of equal area, in half frames
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


class Scenes:
    """Endless generated clips of one textured object that moves over a moving background, with five balanced
    labels.

    low: `colour` of the object; middle: its `shape` and `size`; high: its `motion`, and `agreement`: does the
    background share that motion? All 288 combinations come once in every 288 clips, in random order. Clip i
    of a split is a pure function of (seed, split, i). Masked tubes can be predicted from few visible ones,
    because the content is smooth and dominated by low frequencies, as in natural images.

    A single frame says nothing about the motion: place (on a torus), angle and log-scale (on a circle) are
    uniform at every frame, whatever the motion is. For the object, the circle makes a growing one fall back
    to its smallest size.

    split: "train" or "test". clips: how many make one epoch. video: (T, H, W).
    """

    labels = {
        "shape": ("disc", "square", "triangle"),
        "colour": tuple(COLOURS),
        "size": tuple(RADII),
        "motion": tuple(MOTIONS),
        "agreement": ("no", "yes"),
    }

    def __init__(self, split="train", *, clips=20000, video=(16, 64, 64), seed=0):
        self.split, self.clips, self.video, self.seed = (
            ("train", "test").index(split),
            clips,
            tuple(video),
            seed,
        )

    def __len__(self):
        return self.clips

    def name(self, index):
        """What to call clip `index` in a message."""
        return f"generated clip {index}"

    def check_broken(self, found=()):
        """Generated clips do not break."""
        return {}

    def targets(self, index):
        """The labels of clip `index`, one class number for each entry of `labels`."""
        sizes = [len(values) for values in self.labels.values()]
        rounds, place = divmod(index, int(np.prod(sizes)))
        order = np.random.default_rng((self.seed, self.split, 0, rounds)).permutation(int(np.prod(sizes)))
        return tuple(int(j) for j in np.unravel_index(order[place], sizes))

    def read(self, index, rng=None):
        """Clip `index`: (T, H, W, C) uint8. There is nothing to augment: a flip would change the motion; rng
        is unused.
        """
        rng = np.random.default_rng((self.seed, self.split, 1, index))
        targets = self.targets(index)
        shape, colour, size, motion, agreement = (v[j] for v, j in zip(self.labels.values(), targets))
        others = [name for name in MOTIONS if name != motion]
        backdrop = motion if agreement == "yes" else others[rng.integers(len(others))]
        frames = draw_background(rng, self.video, motion=backdrop)
        draw_object(frames, rng, shape=shape, colour=colour, size=size, motion=motion)
        return np.rint(frames.clip(0, 1) * 255).astype(np.uint8)


def axes(video):
    """Fraction of the clip passed (T, 1), and the pixel centres' places: x (1, W) and y (1, H) in half
    frames, -1..1.
    """
    T, H, W = video
    return (
        np.arange(T)[:, None] / T,
        (np.arange(W)[None] + 0.5) * 2 / W - 1,
        (np.arange(H)[None] + 0.5) * 2 / H - 1,
    )


def plane_waves(x, y, frequency, angle, phase, colour):
    """Sum of n plane waves per frame: x (T, W), y (T, H), frequency, angle, phase (T, n), colour (T, n, 3).

    cos(a + b) = cos a cos b - sin a sin b makes the whole sum one product of small matrices. Returns (T, H,
    W, 3) float32.
    """
    kx, ky = 2 * np.pi * frequency * np.cos(angle), 2 * np.pi * frequency * np.sin(angle)
    a = (kx[:, :, None] * x[:, None, :] + phase[:, :, None]).astype(np.float32)  # (T, n, W)
    b = (y[:, :, None] * ky[:, None, :]).astype(np.float32)  # (T, H, n)
    columns = np.concatenate([np.cos(a), np.sin(a)], axis=1)[..., None]  # (T, 2n, W, 1)
    weights = np.concatenate([colour, -colour], axis=1).astype(np.float32)[:, :, None]  # (T, 2n, 1, 3)
    rows = np.concatenate([np.cos(b), np.sin(b)], axis=2)  # (T, H, 2n)
    T, H, W = len(a), y.shape[1], x.shape[1]
    return (rows @ (columns * weights).reshape(T, -1, 3 * W)).reshape(T, H, W, 3)


def draw_background(rng, video, *, motion, waves=3, speed=0.6, lowest=0.1, octaves=3, contrast=0.28):
    """Smooth colours in motion: (T, H, W, 3) float32.

    waves: plane waves per colour channel, of `lowest` cycles per half frame up to `octaves` above. A wave
    fades out at both ends of that range, so that the background zooms for ever without a seam. speed: shift
    over the clip, in half frames.
    """
    time, x, y = axes(video)
    right, down, turns, zoom = MOTIONS[motion]
    n, T = 3 * waves, len(time)
    scale = (rng.random(n) - zoom * time) % 1  # (T, n)
    frequency = lowest * 2 ** (octaves * scale)
    angle = 2 * np.pi * (rng.random(n) + turns * time)
    shift = speed * time * (right * np.cos(angle) + down * np.sin(angle))
    phase = 2 * np.pi * (rng.random(n) - frequency * shift)
    fade = contrast * np.sin(np.pi * scale) ** 2  # (T, n)
    channel = np.tile(np.eye(3), (waves, 1))  # (n, 3): each wave belongs to one colour channel
    frames = plane_waves(x.repeat(T, 0), y.repeat(T, 0), frequency, angle, phase, fade[..., None] * channel)
    return frames + (0.35 + 0.3 * rng.random(3)).astype(np.float32)


def draw_object(frames, rng, *, shape, colour, size, motion, speed=1.2, contrast=0.12):
    """Paint one textured object over the frames (T, H, W, 3), in place. speed: shift over the clip, in half
    frames.
    """
    time, x, y = axes(frames.shape[:3])
    right, down, turns, zoom = MOTIONS[motion]
    place = 2 * rng.random(2)
    x = (x - place[0] - speed * right * time) % 2 - 1  # (T, W) from the object's centre, on a torus
    y = (y - place[1] - speed * down * time) % 2 - 1  # (T, H)
    radius = RADII[size] * 1.4 ** ((rng.random() + zoom * time) % 1)  # (T, 1)
    tilt = 2 * np.pi * (rng.random() + turns * time)  # (T, 1)

    frequency = (0.2 + 0.3 * rng.random(2)) / radius  # (T, 2)
    phase = 2 * np.pi * rng.random(2) + np.zeros_like(time)
    grey = np.full((len(time), 2, 3), contrast)
    texture = plane_waves(x, y, frequency, tilt + 2 * np.pi * rng.random(2), phase, grey)  # (T, H, W, 3)
    texture += np.array(COLOURS[colour], np.float32)

    x, y = x[:, None, :].astype(np.float32), y[:, :, None].astype(np.float32)
    c, s = (f(tilt)[:, :, None].astype(np.float32) for f in (np.cos, np.sin))
    across, along = c * x + s * y, c * y - s * x  # (T, H, W), in the object's own frame
    if shape == "disc":
        distance, inner = np.hypot(x, y), 1.0
    elif shape == "square":
        distance, inner = np.maximum(abs(across), abs(along)), np.sqrt(np.pi) / 2
    else:  # an equilateral triangle; inner radii are such that all three shapes have the disc's area
        distance, inner = (
            np.maximum(np.sqrt(0.75) * abs(across) + along / 2, -along),
            np.sqrt(np.pi / np.sqrt(27)),
        )
    edge = (inner * radius[:, :, None] - distance) * frames.shape[2] / 3 + 0.5  # soft over 1.5 pixels
    frames += edge.clip(0, 1).astype(np.float32)[..., None] * (texture - frames)


# ---- video files ----

EXTENSIONS = [
    "3g2",
    "3gp",
    "apng",
    "asf",
    "avi",
    "divx",
    "f4v",
    "flv",
    "gif",
    "h264",
    "hevc",
    "m2ts",
    "m2v",
    "m4v",
    "mjpeg",
    "mkv",
    "mov",
    "mp4",
    "mpe",
    "mpeg",
    "mpg",
    "mpv",
    "mts",
    "mxf",
    "ogm",
    "ogv",
    "qt",
    "rm",
    "rmvb",
    "ts",
    "vob",
    "webm",
    "wmv",
    "y4m",
]
READ_ERRORS = (OSError, ValueError, av.FFmpegError)  # what a broken file raises, also from inside FFmpeg
MAX_BROKEN = 0.05  # more broken files than this share (and more than one) end a run


class Videos:
    """All videos below a folder, or those that a list names. The label of a video is its parent folder, or in
    the list.

    folder: searched by file extension. list_file: one `path [label]` per line, relative to folder; paths may
    hold spaces. video: (T, H, W) of a clip. stride: take every stride-th frame. short: what happens to videos
    of fewer than T * stride frames: "drop" (the paper's rule) leaves them out, "repeat" repeats their last
    frame.
    `broken` {path: reason} names the files that cannot be read, `dropped` {path: frames} those that are too
    short. Raises ValueError if no usable video is left, or if more than MAX_BROKEN of the files are broken.
    """

    def __init__(self, folder, *, list_file=None, video=(16, 128, 128), stride=4, short="drop"):
        self.folder, self.video, self.stride, self.short = Path(folder), tuple(video), stride, short
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is not a folder; --data wants the folder that your videos are in.")
        entries, self.classes = read_list(self.folder, list_file) if list_file else walk(self.folder)
        if not entries:
            raise ValueError(f"No videos in {list_file or folder} (looked for {' '.join(EXTENSIONS)}).")
        self.files, self.broken, self.dropped, self.total = [], {}, {}, len(entries)
        with ThreadPoolExecutor(8) as pool:
            counts = pool.map(lambda entry: count_or_reason(self.folder / entry[0]), entries)
            for (path, label), count in tqdm(zip(entries, counts), "look at videos", self.total, leave=False):
                if isinstance(count, str):
                    self.broken[path] = count
                elif short == "drop" and count < self.video[0] * stride:
                    self.dropped[path] = count
                else:
                    self.files.append((path, label))
        self.check_broken()
        if not self.files:
            fits = max(self.dropped.values()) // self.video[0]
            fix = (
                f"--stride {fits} would fit the longest, --short repeat fits all"
                if fits
                else "--short repeat fits all"
            )
            raise ValueError(
                f"All {len(self.dropped)} videos have fewer than {self.video[0]} frames x stride {stride} = "
                f"{self.video[0] * stride} frames; {fix}."
            )
        self.labels = {"class": self.classes}

    def __len__(self):
        return len(self.files)

    def name(self, index):
        """Path of video `index`, relative to the folder."""
        return self.files[index][0]

    def targets(self, index):
        """Class number of video `index`, as a tuple of one."""
        return (self.classes.index(self.files[index][1]),)

    def read(self, index, rng=None):
        """One clip of video `index`, (T, H, W, C) uint8. rng: random start, crop and flip (Sec. 3.2); None:
        all in the middle.

        Raises OSError or ValueError if the file cannot be read, or turns out shorter than its header says.
        """
        start, top, left, mirror = (0.5, 0.5, 0.5, 0.0) if rng is None else rng.random(4)
        how = {"start": start, "crop": (top, left), "short": self.short}
        clip = read_clip(self.folder / self.name(index), video=self.video, stride=self.stride, **how)
        return np.ascontiguousarray(clip[:, :, ::-1]) if mirror > 0.5 else clip

    def check_broken(self, found=()):
        """Add files found broken while reading ({path: reason}); returns the new ones. ValueError if they are
        too many.
        """
        new = {path: reason for path, reason in dict(found).items() if path not in self.broken}
        self.broken.update(new)
        if len(self.broken) > max(1, MAX_BROKEN * self.total):
            which = "; ".join(f"{path} ({why})" for path, why in list(self.broken.items())[:10])
            more = f" and {len(self.broken) - 10} more" if len(self.broken) > 10 else ""
            raise ValueError(
                f"{len(self.broken)} of {self.total} videos cannot be read, more than {MAX_BROKEN:.0%}: {which}{more}. "
                "Repair them, move them away, or leave them out with --list (its paths are relative to --data)."
            )
        return new


def walk(folder):
    """Every video below a folder, by extension in any case: ([(relative path, parent folder)], class names),
    sorted.
    """
    endings = tuple("." + extension for extension in EXTENSIONS)
    paths = [
        Path(root, file).relative_to(folder)
        for root, _, files in os.walk(folder)
        for file in files
        if file.lower().endswith(endings) and not file.startswith(".")
    ]
    entries = sorted((path.as_posix(), path.parent.name or folder.resolve().name) for path in paths)
    return entries, tuple(sorted({label for _, label in entries}, key=str.lower))


def read_list(folder, list_file):
    """Entries of a list file, `path [label]` per line: ([(path, label)], class names in order).

    Without a label it is the parent folder. UCF101's trainlist files work as they are: where the labels are
    numbers that stand one to one for parent folders, the folder names are the classes, in the order of the
    numbers (its classInd.txt).
    """
    try:
        lines = [
            line.strip() for line in Path(list_file).read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Cannot read the list {list_file}: {reason(error)}.") from None
    pattern = re.compile(rf"(.*\.(?:{'|'.join(EXTENSIONS)}))(?:\s+(.*))?", re.IGNORECASE)
    entries = [(m.group(1), m.group(2)) if (m := pattern.fullmatch(line)) else (line, None) for line in lines]
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


def count_or_reason(path):
    """Number of frames that a file promises, or the reason (a str) why it is no video. Nothing is decoded."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                return "has no video stream"
            stream = container.streams.video[0]
            # Matroska, WebM, MPEG and others do not store the count; their packets must be counted.
            return (
                stream.frames
                or sum(packet.size > 0 for packet in container.demux(stream))
                or "holds no frames"
            )
    except READ_ERRORS as error:
        return reason(error)


def read_clip(path, *, video=(16, 128, 128), stride=4, start=0.5, crop=(0.5, 0.5), short="repeat"):
    """Read T frames of a video file, every stride-th, from a place given as a fraction: (T, H, W, C) uint8.

    start: 0 is the earliest possible start, 1 the latest. The shorter side is resized to H x W, keeping the
    shape, and the longer one cut; crop: (vertical, horizontal) place of the cut, 0..1. Rotation by metadata
    is applied (phones film sideways); non-square pixels and HDR are not converted. Stride counts frames, not
    seconds. Damaged packets are passed over; a file that ends early is read once more from its beginning.
    short: with too few frames, "repeat" repeats the last one, "drop" raises ValueError. Raises OSError or
    ValueError (FFmpeg's errors are of these kinds) if nothing can be read.
    """
    T = video[0]
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("has no video stream")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # the workers are the parallelism
        begin, seconds, count = extent(container, stream)
        target = begin + start * seconds * max(0.0, 1 - T * stride / count)
        frames = decode(
            container, stream, target if target > begin else None, stride=stride, video=video, crop=crop
        )
        if len(frames) < T and target > begin:  # headers lie, and seeking may overshoot
            again = decode(container, stream, begin, stride=stride, video=video, crop=crop)
            frames = max(frames, again, key=len)
    if not frames:
        raise ValueError("no frame can be decoded")
    if len(frames) < T and short == "drop":
        raise ValueError(
            f"ends after {len(frames)} of {T} frames at stride {stride}, earlier than its header says"
        )
    return np.stack(frames + frames[-1:] * (T - len(frames)))  # (T, H, W, C)


def extent(container, stream):
    """(begin in seconds, duration in seconds, number of frames) as far as the headers tell; duration 0 if
    they do not.
    """
    begin = float((stream.start_time or 0) * stream.time_base)
    if stream.duration:
        seconds = float(stream.duration * stream.time_base)
    else:
        seconds = (container.duration or 0) / av.time_base
    rate = stream.average_rate or stream.guessed_rate or 25
    return begin, seconds, max(1.0, stream.frames or seconds * float(rate))


def decode(container, stream, target, *, stride, video, crop):
    """Up to T frames, every stride-th from `target` seconds on (None: from the first), each (H, W, C)
    uint8.
    """
    T, H, W = video
    if target is not None:  # to the key frame before it, then roll forward
        try:
            container.seek(int(target / stream.time_base), stream=stream)
        except av.FFmpegError:
            pass  # no seeking in this format: roll forward from the first frame
        target -= 0.5 / float(stream.average_rate or stream.guessed_rate or 25)  # time stamps are rounded
    reformatter, kept, passed = VideoReformatter(), [], 0
    packets = container.demux(stream)
    while len(kept) < T:
        try:
            packet = next(packets, None)
            frames = [] if packet is None else packet.decode()
        except av.FFmpegError:
            continue  # a damaged packet; damage to the container itself ends the packets
        if packet is None:
            break
        for frame in frames:
            if target is not None and frame.time is not None and frame.time < target:
                continue
            if passed % stride == 0 and len(kept) < T:
                kept.append(upright_crop(frame, reformatter, H, W, crop))
            passed += 1
    return kept


def upright_crop(frame, reformatter, H, W, crop):
    """One decoded frame, scaled so that it just covers H x W, turned upright and cut: (H, W, C) uint8."""
    turns = round(frame.rotation / 90) % 4  # counter-clockwise quarter turns that show it upright
    height, width = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)  # upright
    scale = max(H / height, W / width)
    height, width = max(H, round(height * scale)), max(W, round(width * scale))
    size = (
        {"width": height, "height": width} if turns % 2 else {"width": width, "height": height}
    )  # as stored
    image = reformatter.reformat(
        frame, format="rgb24", interpolation="BILINEAR", threads=1, **size
    ).to_ndarray()
    top, left = (int(place * (room + 0.999)) for place, room in zip(crop, (height - H, width - W)))
    return np.rot90(image, turns)[top : top + H, left : left + W].copy()


# ---- the stream of training batches ----


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, clips):
    """The random order of one epoch."""
    return np.random.default_rng((seed, 0, epoch)).permutation(clips)


class Stream(torch.utils.data.Dataset):
    """The endless stream of training samples: sample k is a pure function of (seed, k).

    Broken files are replaced by the next good one of the folder, and reported with the sample as {path:
    reason}.
    """

    def __init__(self, source, *, seed=0):
        self.source, self.seed = source, seed

    def __getitem__(self, k):
        clips, broken = len(self.source), {}
        epoch, place = divmod(k, clips)
        index = int(epoch_order(self.seed, epoch, clips)[place])
        rng = np.random.default_rng((self.seed, 1, epoch, index))
        for attempt in range(int(MAX_BROKEN * clips) + 2):
            at = (index + attempt) % clips
            try:
                return {"video": torch.from_numpy(self.source.read(at, rng)), "index": at, "broken": broken}
            except READ_ERRORS as error:
                broken[self.source.name(at)] = reason(error)
        # More files than a run may lose: Videos.check_broken() ends it, so nothing is trained on this.
        return {
            "video": torch.zeros(*self.source.video, 3, dtype=torch.uint8),
            "index": index,
            "broken": broken,
        }


def collate(samples):
    """Samples to a batch: video (B, T, H, W, C) uint8, index [B], broken {path: reason}."""
    return {
        "video": torch.stack([sample["video"] for sample in samples]),
        "index": [sample["index"] for sample in samples],
        "broken": {path: why for sample in samples for path, why in sample["broken"].items()},
    }


def loader(source, *, batch, first=0, last, seed=0, workers=0, pin_memory=False):
    """Batches of training steps first..last-1. Any step can be the first, and the number of workers changes
    nothing.
    """
    return torch.utils.data.DataLoader(
        Stream(source, seed=seed),
        batch_size=batch,
        sampler=range(first * batch, last * batch),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
    )


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
    zoom = max(1, 96 // next(iter(rows.values())).shape[1])
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


def write_video(path, images, *, rate=8):
    """Write images (H, W, C) uint8 as a video file: H.264 where this FFmpeg can write it, else MPEG-4."""
    height, width = (size // 2 * 2 for size in images[0].shape[:2])  # both codecs want even sizes
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for image in images:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
