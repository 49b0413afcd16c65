import numpy as np
import torch

# ---- generated clips: moving scenes -------------------------------------------------------------------------------

COLOURS = {"red": (0.85, 0.3, 0.3), "green": (0.3, 0.8, 0.3), "blue": (0.3, 0.4, 0.9)}
SHAPES = ("disc", "square", "triangle")
SIZES = {"small": 0.24, "large": 0.44}  # radius of the disc of equal area, in half frames
MOTIONS = {  # what one clip adds to (x shift in half frames, y shift, angle in turns, log-scale in cycles)
    "left": (-1, 0, 0, 0),
    "right": (1, 0, 0, 0),
    "up": (0, -1, 0, 0),
    "down": (0, 1, 0, 0),
    "clockwise": (0, 0, 0.4, 0),
    "counter-clockwise": (0, 0, -0.4, 0),
    "grow": (0, 0, 0, 0.6),
    "shrink": (0, 0, 0, -0.6),
}
LABELS = {  # low, middle, middle, high, high
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "motion": tuple(MOTIONS),
    "agreement": ("no", "yes"),
}


def waves(x, y, frequency, angle, phase, amplitude):
    kx, ky = 2 * np.pi * frequency * np.cos(angle), 2 * np.pi * frequency * np.sin(angle)  # (T, n)
    ax = kx[:, :, None] * x[:, None, :] + phase[:, :, None]  # (T, n, W)
    ay = ky[:, None, :] * y[:, :, None]  # (T, H, n)
    columns = np.concatenate([np.cos(ax), np.sin(ax)], 1)[..., None] * np.concatenate([amplitude, amplitude], 1)[:, :, None]
    rows = np.concatenate([np.cos(ay), -np.sin(ay)], 2)  # (T, H, 2n)
    T, H, W = len(x), y.shape[1], x.shape[1]
    return (rows.astype(np.float32) @ columns.astype(np.float32).reshape(T, -1, 3 * W)).reshape(T, H, W, 3)


N_BG = 3
BG_F = (0.1, 8.0)
def scene(rng, video, colour, shape, size, motion, backdrop):
    T, H, W = video
    time = np.arange(T)[:, None] / T
    x, y = (np.arange(W) + 0.5) * 2 / W - 1, (np.arange(H) + 0.5) * 2 / H - 1
    # background
    dx, dy, turn, zoom = MOTIONS[backdrop]
    n = N_BG * 3
    u = (rng.random(n) - zoom * time) % 1
    f = BG_F[0] * BG_F[1] ** u
    angle = 2 * np.pi * (rng.random(n) + turn * time)
    phase = 2 * np.pi * (rng.random(n) - BG_SPEED * f * (np.cos(angle) * dx + np.sin(angle) * dy) * time)
    strength = (np.sin(np.pi * u) ** 2)[:, :, None] * np.tile(np.eye(3), (N_BG, 1)) * 0.28
    frame = waves(np.tile(x, (T, 1)), np.tile(y, (T, 1)), f, angle, phase, strength) + (0.35 + 0.3 * rng.random(3)).astype(np.float32)
    # object
    dx, dy, turn, zoom = MOTIONS[motion]
    cx, cy = 2 * rng.random(2) - 1
    ox = (x - cx - OBJ_SPEED * dx * time + 1) % 2 - 1  # (T, W)
    oy = (y - cy - OBJ_SPEED * dy * time + 1) % 2 - 1
    r = SIZES[size] * 1.4 ** ((rng.random() + zoom * time) % 1)  # (T, 1)
    tilt = 2 * np.pi * (rng.random() + turn * time)  # (T, 1)
    f = (0.2 + 0.3 * rng.random(2)) / r
    phase = 2 * np.pi * rng.random(2) + 0 * time
    strength = np.tile(np.array([[0.12]] * 2) * np.ones(3), (T, 1, 1))
    texture = waves(ox, oy, f, tilt + 2 * np.pi * rng.random(2), phase, strength) + np.array(COLOURS[colour], np.float32)
    ox, oy = ox.astype(np.float32)[:, None, :], oy.astype(np.float32)[:, :, None]
    c, s = np.cos(tilt).astype(np.float32)[:, :, None], np.sin(tilt).astype(np.float32)[:, :, None]
    if shape == "disc":
        d, k = np.sqrt(ox**2 + oy**2), 1.0
    elif shape == "square":
        d, k = np.maximum(abs(c * ox + s * oy), abs(c * oy - s * ox)), 0.886
    else:
        a, b = c * ox + s * oy, c * oy - s * ox
        d, k = np.maximum(np.maximum(0.866 * a, -0.866 * a) + 0.5 * b, -b), 0.778
    mask = np.clip((r[:, :, None].astype(np.float32) * k - d) * (W / 2) / 1.5 + 0.5, 0, 1)[..., None]
    frame += mask * (texture - frame)
    return (np.clip(frame, 0, 1) * 255 + 0.5).astype(np.uint8)


OBJ_SPEED, BG_SPEED = 1.2, 0.6


class Scenes(torch.utils.data.Dataset):
    def __init__(self, split="train", seed=0, video=(16, 64, 64)):
        self.split, self.seed, self.video = ("train", "test").index(split), seed, video
        self.n = [len(v) for v in LABELS.values()]

    def __getitem__(self, i):
        total = int(np.prod(self.n))
        round, place = divmod(i, total)
        combination = np.random.default_rng((self.seed, self.split, round)).permutation(total)[place]
        labels = np.array(np.unravel_index(combination, self.n))
        rng = np.random.default_rng((self.seed, self.split, i, 1))
        names = [list(v)[j] for v, j in zip(LABELS.values(), labels)]
        backdrop = names[3] if names[4] == "yes" else list(MOTIONS)[(labels[3] + rng.integers(1, 8)) % 8]
        return scene(rng, self.video, *names[:4], backdrop), labels
