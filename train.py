"""Train a video vision transformer block by block, on generated clips or on a folder of videos.

    python train.py --blocks 4                                           # generated clips, minutes on a CPU
    python train.py --blocks 4 --data VIDEOS --stride 2 --short repeat   # your own videos
    python train.py --size tiny --data UCF-101 --list trainlist01.txt    # the paper's recipe, for a GPU
    torchrun --nproc-per-node 2 train.py ...                             # batches shared by two processes
    torchrun --nproc-per-node 4 train.py --blocks 4 --parallel blocks    # a process for each block
    python train.py --help                                               # every setting

Römer & Dickscheid, arXiv 2601.09040, Sec. 3. The method is train_step() in blockwise.py; this file feeds it.
A run writes into its folder: config.json, log.jsonl, recon_*.png, recon.mp4 and the checkpoint last.pt.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
import traceback
import types
import typing
import weakref
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.compiler import set_stance
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from analyze import plot_memory, spectrum
from blockwise import (
    REGIMES,
    Alone,
    Blockwise,
    Pipeline,
    Replicas,
    autocast,
    count_parameters,
    frozen_blocks,
    load,
    load_optimizers,
    make_optimizers,
    save,
    switch,
    train_step,
)
from data import READ_ERRORS, BrokenVideos, Scenes, Videos, loader, tile, write_picture, write_video
from model import SIZES, normalized_targets, patchify, gather_tokens, tube_mask, unpatchify

# tiny and small: the paper's recipe (Sec. 3.2, 3.4). Paper does not say: batch size. nano: ours, for a CPU.
RECIPES = {
    "nano": {"steps": 3000, "batch": 16, "lr": 1e-3},
    "tiny": {"epochs": 150, "batch": 128, "lr": 1e-4},
    "small": {"epochs": 300, "batch": 128, "lr": 1e-4},
    "base": {"epochs": 300, "batch": 128, "lr": 1e-4},
}


def option(default, help, least=None, below=None):
    """A setting: its default, its line in --help, and the range that its value must lie in."""
    return field(default=default, metadata={"help": help, "least": least, "below": below})


@dataclass
class Config:
    """All settings of a run. Each field is a flag of the same name; None is filled in from the size or the
    machine.
    """

    size: Literal["nano", "tiny", "small", "base"] = option(
        "nano", "model: tiny and small are the paper's, nano suits a laptop"
    )
    blocks: int = option(
        4, "K, blocks of the encoder; for e2e, where its representation is read (layerlock: 12)", 1
    )
    regime: Literal[tuple(REGIMES)] = option("simultaneous", "who learns from which loss (Sec. 3.1)")
    decoder_depth: int | None = option(None, "layers of each local decoder (paper: 4; nano: 1)", 1)
    frames: int | None = option(None, "frames of a clip (paper: 16)", 1)
    pixels: int | None = option(None, "height and width of a clip (paper: 128; nano: 64)", 1)
    tubelet: tuple[int, int, int] | None = option(
        None, "frames, rows, columns of one token (paper: 8 16 16; nano: 8 8 8)"
    )
    mask: float = option(0.9, "share of the tubes that is masked", 0, 1)
    decode_ratio: float = option(
        1.0, "share of the masked tokens that the decoders see and predict, drawn at random (paper: 1)"
    )

    target: Literal["latent", "pixels"] = option(
        "latent", "layerlock: what is predicted once a block is frozen, its output or still pixels"
    )
    freeze_start: int | None = option(
        None, "layerlock: steps before the first block is frozen; -1: none ever (default: 1/3 of all)", -1
    )
    freeze_every: int | None = option(
        None, "layerlock: steps from one block to the next; 0: all at once (default: up to the end)", 0
    )
    freeze_until: int | None = option(None, "layerlock: blocks frozen in the end (default: 2/3 of K)", 1)

    data: str | None = option(None, "folder of videos; without it, clips are generated")
    list: str | None = option(None, "file of lines `path [label]`, relative to --data: use these videos only")
    stride: int = option(4, "take every stride-th frame of a video", 1)
    short: Literal["drop", "repeat"] = option(
        "drop", "videos of fewer than frames x stride: drop, or repeat the last frame"
    )

    epochs: float | None = option(
        None, "passes over the data (paper: tiny 150, small 300), per stage in sequential", 0
    )
    steps: int | None = option(
        None, "optimizer steps, instead of --epochs, per stage in sequential (nano: 3000)", 1
    )
    batch: int | None = option(None, "clips in one optimizer step (tiny, small: 128; nano: 16)", 1)
    accumulate: int = option(1, "parts that a batch is computed in, to save memory", 1)
    decoder_slices: int | None = option(
        None,
        "parts of the batch that a decoder runs in, to save memory (default: 2 clips each; on a GPU 1 part)",
        1,
    )
    lr: float | None = option(None, "highest learning rate (paper: 1e-4; nano: 1e-3)", 0)
    min_lr: float = option(1e-6, "learning rate at the end of the cosine", 0)
    warmup: float = option(0.1, "share of the steps with rising learning rate", 0, 1)
    weight_decay: float = option(0.05, "AdamW's, on weight matrices only", 0)
    beta1: float = option(0.9, "AdamW's, of the mean gradient", 0, 1)
    beta2: float = option(0.95, "AdamW's, of the mean squared gradient", 0, 1)
    clip: float = option(
        0.0,
        "largest gradient norm, of each isolated block by itself; 0: no clipping",
        0,
    )
    seed: int = option(0, "of the weights, the data order and the masks", 0)

    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "fp32", "bf16"] = option("auto", "bf16: autocast; auto is bf16 on cuda, else fp32")
    compile: bool = option(False, "torch.compile the blocks and decoders")
    workers: int | None = option(None, "processes that read clips (default: from the number of cores)", 0)
    parallel: Literal["data", "blocks"] = option(
        "data", "what several processes of torchrun share: every batch, or the blocks, one each"
    )
    out: str | None = option(None, "folder of the run (default: runs/NAME, named after the settings)")
    resume: bool = option(
        False, "go on with the run in --out, from its last checkpoint and with its settings"
    )
    benchmark: bool = option(
        False,
        "train nothing: time and memory of a step, of --regime or of all but layerlock; for that one, what a "
        "run of --steps costs phase by phase; written to --out/benchmark.json",
    )


# ---- settings ----


RANK, PROCESSES = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))


def fail(message, code=2):
    """End the program with one sentence; exit code 2 is for a mistake that the user can mend."""
    time.sleep(min(RANK, 1) * 2)  # if rank 0 fails too, torchrun ends the others before they repeat it
    tqdm.write(f"train.py{f', process {RANK}' if RANK else ''}: {message}", file=sys.stderr)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence."""

    def error(self, message):
        fail(f"{message} (python train.py --help lists all settings)")


def flag(name):
    """Field name to command-line flag."""
    return "--" + name.replace("_", "-")


def parse(arguments=None):
    """Command line to (Config, names of the settings given). ValueError for values that make no sense."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for f, kind in zip(fields(Config), typing.get_type_hints(Config).values()):
        if isinstance(kind, types.UnionType):  # X | None
            kind = kind.__args__[0]
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is Literal:
            how = {"choices": kind.__args__}
        elif typing.get_origin(kind) is tuple:
            how = {"type": int, "nargs": len(kind.__args__), "metavar": "N"}
        else:
            how = {"type": kind, "metavar": kind.__name__.upper()}
        help = f.metadata["help"] + (f" [{f.default}]" if f.default is not None else "")
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=help.replace("%", "%%"), **how)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(arguments)).items()}

    for f in fields(Config):
        least, below, value = f.metadata["least"], f.metadata["below"], given.get(f.name)
        if None not in (value, least) and not least <= value < (below or math.inf):
            limit = f" and below {below}" if below else ""
            raise ValueError(f"{flag(f.name)} {value} must be at least {least}{limit}.")
    for name in ("lr", "mask", "epochs"):
        if given.get(name) == 0:
            raise ValueError(f"--{name} must be more than 0.")
    if not 0 < given.get("decode_ratio", 1) <= 1:
        raise ValueError(f"--decode-ratio {given['decode_ratio']} must be more than 0 and at most 1.")
    if {"steps", "epochs"} <= set(given):
        raise ValueError("--steps and --epochs both say how long to train; give one of them.")
    if given.get("regime") != "layerlock" and not given.get("resume"):
        for name in given.keys() & {"target", "freeze_start", "freeze_every", "freeze_until"}:
            raise ValueError(f"{flag(name)} is for --regime layerlock.")
    if "list" in given and "data" not in given:
        raise ValueError("--list names videos relative to a folder; say which folder with --data.")
    if given.get("regime") == "layerlock":  # one layer at a time
        return Config(**({"blocks": 12} | given)), set(given)
    return Config(**given), set(given)


def complete(config):
    """Fill in what was left open: device, dtype, workers, the recipe of the size. Returns where it runs."""
    wanted, why = config.device, "as asked"
    if wanted == "auto":
        if torch.cuda.is_available():
            config.device, why = "cuda", torch.cuda.get_device_name()
        elif torch.backends.mps.is_available():
            config.device, why = "mps", "Apple GPU"
        else:
            config.device, why = "cpu", f"no GPU found; {torch.get_num_threads()} threads"
    cuda = config.device.startswith("cuda")
    if config.device == "cuda" and PROCESSES > 1:
        config.device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=config.device)
        if cuda:
            torch.cuda.set_device(torch.device(config.device).index or 0)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {wanted} does not work here ({reason}); try --device cpu.") from None
    if config.dtype == "auto":
        config.dtype = "bf16" if cuda else "fp32"
    if config.workers is None:
        cores = torch.get_num_threads()
        config.workers = min(8, cores if cuda and config.data else max(1, cores // 2))
    recipe = dict(RECIPES[config.size])
    if config.steps or config.epochs:
        recipe = {name: value for name, value in recipe.items() if name not in ("steps", "epochs")}
    for name, value in recipe.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    check_processes(config)
    clips = clips_here(config)
    if config.accumulate > clips:
        raise ValueError(
            f"--accumulate {config.accumulate} is more parts than the batch has clips in a process, {clips}."
        )
    if config.decoder_slices is None:
        config.decoder_slices = default_slices(config)
    return f"{config.device} ({why}), {config.dtype}"


def clips_here(config):
    """Clips of every batch that this process computes."""
    return config.batch // (PROCESSES if config.parallel == "data" else 1)


def default_slices(config):
    """Of two clips: that keeps the buffers small, which makes a CPU faster too."""
    return math.ceil(clips_here(config) / config.accumulate / 2) if config.device == "cpu" else 1


def check_processes(config):
    """ValueError, if the settings do not suit the number of processes."""
    if config.parallel == "data" and config.batch % PROCESSES:
        raise ValueError(
            f"{PROCESSES} processes cannot share a batch of {config.batch} equally; change --batch."
        )
    if config.parallel == "blocks":
        if config.regime != "simultaneous" or config.compile:
            raise ValueError("--parallel blocks is for --regime simultaneous, without --compile.")
        if PROCESSES != config.blocks:
            start = f"torchrun --nproc-per-node {config.blocks} train.py"
            raise ValueError(
                f"--parallel blocks wants a process for each of {config.blocks} blocks, not {PROCESSES}; "
                f"start it by: {start} --blocks {config.blocks} --parallel blocks ..."
            )


def default_folder(config):
    """Folder of a run that is not given one: named after what sets runs apart."""
    data = f"-{Path(config.data).resolve().name}" if config.data else ""
    seed = f"-seed{config.seed}" if config.seed else ""
    regime = config.regime
    if regime == "layerlock":
        regime += f"-{config.target}" + ("-unfrozen" if config.freeze_start == -1 else "")
    return f"runs/{config.size}-{regime}-{config.blocks}{data}{seed}"


def command(config, **changes):
    """The command that starts a run with these settings and some changes."""
    plain = asdict(Config()) | RECIPES[config.size] | {"decoder_slices": default_slices(config)}
    plain["dtype"] = "bf16" if config.device.startswith("cuda") else "fp32"
    parts = ["python", "train.py"]
    for name, value in (asdict(config) | changes).items():
        here = name in ("device", "workers", "parallel", "out", "resume")
        if not here and value is not None and value != plain[name]:
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            parts += [flag(name), *map(str, values)]
    return shlex.join(parts)


def resumed(config, given):
    """Settings, model and checkpoint of the run in --out. It may run elsewhere, but not otherwise."""
    model, checkpoint = load(config.out)
    saved = checkpoint["settings"]
    elsewhere = {"resume", "out", "device", "workers", "parallel", "data", "list"}
    for name in given - elsewhere:
        value = getattr(config, name)
        if value not in (saved[name], "auto"):
            raise ValueError(
                f"{config.out} was started with {flag(name)} {saved[name]}, not {value}; leave it out to go "
                "on with that run, or start another one with --out."
            )
    here = {"out": config.out, "resume": True}
    here |= {name: getattr(config, name) for name in ("device", "workers", "parallel")}
    here |= {name: getattr(config, name) for name in {"data", "list"} & given}
    return Config(**(saved | here)), model, checkpoint


def model_arguments(config):
    """Arguments of Blockwise for these settings."""
    size = dict(SIZES[config.size], blocks=config.blocks, regime=config.regime)
    T, H, W = size["video"]
    size["video"] = (config.frames or T, config.pixels or H, config.pixels or W)
    size["tubelet"] = config.tubelet or size["tubelet"]
    return size | ({"decoder_depth": config.decoder_depth} if config.decoder_depth else {})


def steps_of_stage(config, source):
    """Optimizer steps of a run, in the sequential regime of one stage."""
    return config.steps or max(1, math.ceil(config.epochs * len(source) / config.batch))


def set_up(config, given):
    """All that comes before training. ValueError, one sentence with the fix, for what the user can mend."""
    config.out = config.out or default_folder(config)
    out, model, checkpoint = Path(config.out), None, None
    if config.resume:
        config, model, checkpoint = resumed(config, given)
    elif out.exists() and (not out.is_dir() or any(path.name != "last.pt.tmp" for path in out.iterdir())):
        raise ValueError(
            f"{out} is in use; go on with that run by --resume, or choose another folder with --out."
        )
    where = complete(config)
    if model is None:
        torch.manual_seed(config.seed)
        model = Blockwise(**model_arguments(config))
    tube_mask(1, model.grid, config.mask)  # raises if the ratio does not fit the grid
    if config.data:
        rules = {"stride": config.stride, "short": config.short}
        source = Videos(config.data, list_file=config.list, video=model.video, **rules)
    else:
        source = Scenes("train", video=model.video)
    if checkpoint and source.fingerprint != checkpoint["data"]:
        raise ValueError(
            f"{config.out} was started on other videos; restore them, or start another run with --out."
        )
    if REGIMES[config.regime].freezing:
        freezing(config, steps_of_stage(config, source))  # fills in the schedule
    return config, model.to(config.device).train(), source, checkpoint, where


# ---- what a run shows ----


def describe(config, model, source, where, done, total):
    """Print what runs, on what, and on a CPU for how long."""
    print(f"{config.out}: {config.size}, {config.regime}, K = {config.blocks}, on {where}")
    if config.data:
        print(
            f"data: {len(source)} of {source.total} videos in {config.data}, classes: {len(source.classes)}"
        )
        if source.dropped:
            frames = f"{source.video[0]} frames x stride {source.stride}"
            print(f"  {len(source.dropped)} dropped, shorter than {frames}; --short repeat keeps them")
        for path, reason in source.broken.items():
            print(f"  broken: {path} ({reason})")
    else:
        print(f"data: {len(source)} generated clips (--data FOLDER trains on your own videos)")
    counts = count_parameters(model)
    listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    print(f"parameters: {listed}; in all {sum(counts.values()):,}")
    if REGIMES[config.regime].freezing:
        every = f"then every {config.freeze_every} steps" if config.freeze_every else "all at once"
        when = f"from step {config.freeze_start}, {every}, until {config.freeze_until} are"
        print(f"blocks freeze {when}" if config.freeze_start >= 0 else "no block freezes")
    if PROCESSES > 1:
        each = "part of every batch" if config.parallel == "data" else "block"
        print(f"{total - done} steps in {PROCESSES} processes, a {each} in each")
    elif config.device == "cpu":
        minutes = estimate(config, model, total - done) / 60
        duration = f"{minutes:.0f} minutes" if minutes < 100 else f"{minutes / 60:.0f} hours"
        print(f"{total - done} steps, about {duration} here")
        if minutes >= 100:
            data = f" --data {shlex.quote(config.data)}" if config.data else ""
            print(f"  to see it run in minutes: python train.py --blocks {config.blocks}{data} (size nano)")
    sys.stdout.flush()


def estimate(config, model, total):
    """Seconds that `total` steps will take, from small steps on noise that leave every weight as it is."""
    count = min(config.batch, 32)
    video = torch.randint(256, (count, *model.video, 3), dtype=torch.uint8)
    visible, masked = (index[:count] for index in masks_of_step(config, model, 0))
    optimizers = make_optimizers(model, lr=0.0, weight_decay=0.0)
    for _ in range(2):  # the second one counts
        start = time.perf_counter()
        how = {"dtype": autocast_dtype(config), "slices": math.ceil(count / 2)}
        train_step(model, optimizers, video, visible, masked, **how)
    return (time.perf_counter() - start) * config.batch / count * total


class Log:
    """log.jsonl and the progress bar, with clips per second and the share of time spent waiting for clips."""

    def __init__(self, path, done, total):
        """done: steps that the checkpoint holds. What a stopped run has logged after them is cut off.

        path: None for neither file nor bar.
        """
        self.path, self.clips, self.waited, self.since = path, 0, 0.0, time.perf_counter()
        self.bar = tqdm(total=total, initial=done, unit=" steps", mininterval=1, disable=path is None)
        if path is None:
            return
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # the last one may be torn
        temporary = path.with_name("log.jsonl.tmp")  # a kill at any moment leaves the old log or the new one
        temporary.write_text("".join(line for line in whole if json.loads(line)["step"] <= done))
        os.replace(temporary, path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def next(self, batches, source):
        """The next batch, on the clock; broken videos are named."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        for path, reason in source.check_broken(batch["broken"]).items():
            self.bar.write(f"broken, the next good video takes its place: {path} ({reason})")
        return batch

    def step(self, clips):
        """One optimizer step on so many clips."""
        self.clips += clips
        self.bar.update()

    def write(self, record):
        """Write one line; it also goes to the screen if it has an eval_loss."""
        seconds = time.perf_counter() - self.since
        record |= {"clips_per_s": round(self.clips / seconds, 1), "wait": round(self.waited / seconds, 4)}
        record |= {"memory_mb": round(peak_memory())}
        self.clips, self.waited, self.since = 0, 0.0, self.since + seconds
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        losses = " ".join(f"{loss:.3f}" for loss in record["loss"].values())
        self.bar.set_postfix_str(f"loss {losses}")
        if "eval_loss" in record:
            speed = f"{record['clips_per_s']:.0f} clips/s, {record['wait']:.0%} waiting for clips"
            self.bar.write(f"step {record['step']}: loss by block {losses}, lr {record['lr']:.1e}, {speed}")


def peak_memory():
    """Largest memory used so far, in MB: of the GPU if in use, else of this process; 0 where unknown."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@torch.no_grad()
def draw(model, clips, path, blocks):
    """Write what the decoders of some blocks make of fixed clips; returns their losses, {block name: float}.

    clips: (video, visible, masked). path: .png shows 8 frames of the middle clip, .mp4 moves 6 clips. A
    prediction is of normalised tubelets: it has no mean and contrast of its own. So target and predictions
    are shown as the loss sees them. Only the last row, which says so, is painted with each tubelet's true
    statistics.
    """
    video, visible, masked = clips
    predictions = model.reconstruct(video, visible, masked)
    predictions = {name: prediction for name, prediction in predictions.items() if name in blocks}
    if not predictions:
        return {}  # the decoder predicts no pixels: there is nothing to see
    patches = patchify(video, model.tubelet).float()  # (B, N, P)
    target, mean, std = normalized_targets(gather_tokens(patches, masked) / 255)  # (B, M, P)
    losses = {name: F.mse_loss(prediction.float(), target).item() for name, prediction in predictions.items()}

    def paint(tokens, index, canvas):
        filled = canvas.scatter(1, index.unsqueeze(-1).expand_as(tokens), tokens)
        return unpatchify(filled, model.video, model.tubelet).clamp(0, 255).byte().cpu().numpy()

    dark = torch.full_like(patches, 24)
    rows = {"input": video.cpu().numpy()}  # (B, T, H, W, C)
    rows["visible"] = paint(gather_tokens(patches, visible), visible, dark)
    rows["target"] = paint(127.5 + 50 * target, masked, dark)
    for name, prediction in predictions.items():
        rows[f"{name} {losses[name]:.3f}"] = paint(127.5 + 50 * prediction.float(), masked, dark)
    last = prediction.float().unflatten(-1, (-1, 3))  # (B, M, P/3, 3)
    true = (last * std + mean).flatten(2)  # (B, M, P)
    rows[f"{name} + true mean/std"] = paint(255 * true, masked, patches)

    T = video.shape[1]
    if path.suffix == ".png":
        middle, every = len(video) // 2, max(1, T // 8)
        write_picture(path, tile({title: row[middle, ::every] for title, row in rows.items()}))
    else:
        write_video(path, [tile({title: row[:6, t] for title, row in rows.items()}) for t in range(T)] * 3)
    return losses


def look(model, clips, path, blocks):
    """What the log says of fixed clips: {"eval_loss": by block, "features": ..., "frozen": n}; as draw().

    features: do the final features of clips still differ? Their standard deviation over clips, mean over
    dimensions, and their effective rank; both fall when a representation collapses.
    """
    with torch.no_grad():
        x = list(model.encode(clips[0]).values())[-1].mean(dim=1)  # (B, D)
    spread = {"std": x.std(dim=0).mean().item(), "effective_rank": spectrum(x)["effective_rank"]}
    losses, frozen = draw(model, clips, path, blocks), model.config["frozen"]
    return {"eval_loss": losses, "features": spread, "frozen": frozen}


def show_end(model, clips, path):
    """Write the video of a finished run and print its losses; LayerLock's latent targets have neither."""
    losses = draw(model, clips, path, model.blocks)
    if losses:
        words = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        print(f"reconstruction loss by block: {words}")
        print(f"  (predicting the mean of every tubelet gives 1.0; {path} shows it)")


# ---- training ----

FIXED_CLIPS = 32  # that the pictures and eval_loss are of
SAVE_SECONDS = 60  # between checkpoints: what a kill loses, at most


def compile_parts(model):
    """torch.compile every block and decoder, in place."""
    for part in [*model.blocks.values(), *model.decoders.values()]:
        part.compile()


def learning_rate(config, step, steps):
    """Linear warm-up, then cosine (Sec. 3.4)."""
    # Paper does not say: length of the warm-up and final rate. Both are ours.
    warm = round(config.warmup * steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    return config.min_lr + (config.lr - config.min_lr) * cosine


def freezing(config, steps):
    """LayerLock's schedule, the arguments of frozen_blocks(); settings left open are filled in.

    steps: of the whole run. ValueError for a schedule that does not fit the run.
    """
    # Scaled from the paper's ViT-G: 160K steps of pixels, then 32 of 48 layers, one every 10K steps.
    if config.freeze_until is None:
        config.freeze_until = max(1, round(2 / 3 * config.blocks))
    if config.freeze_start is None:
        config.freeze_start = steps // 3
    if config.freeze_every is None:
        config.freeze_every = max(0, (steps - max(0, config.freeze_start)) // config.freeze_until)
    start, every, until = config.freeze_start, config.freeze_every, config.freeze_until
    if until >= config.blocks:
        raise ValueError(
            f"{config.blocks} blocks cannot freeze {until} and learn; lower --freeze-until, "
            "or raise --blocks."
        )
    last = start + every * (until - 1)
    if last >= steps:
        raise ValueError(
            f"The last block would freeze at step {last}, after the run's {steps}; lower --freeze-start or "
            "--freeze-every."
        )
    if start == -1 and config.target == "pixels":
        raise ValueError(
            "Pixel targets with nothing frozen are --regime e2e; leave out --freeze-start or --target."
        )
    return {"start": start, "every": every, "until": until}


def phase(config, step, schedule):
    """What LayerLock does at a step: (blocks frozen, block whose output is the target, 0 for pixels)."""
    frozen = frozen_blocks(step, **schedule)
    if config.target == "pixels":
        return frozen, 0
    return frozen, schedule["until"] if schedule["start"] == -1 else frozen  # -1: the control


def follow(schedule, config, model, optimizers, step, hyper):
    """LayerLock: switch to what the schedule says for a step. Returns (optimizers, did anything change?)."""
    if schedule is None:
        return optimizers, False
    frozen, target = phase(config, step, schedule)
    if (frozen, target) == (model.config["frozen"], model.config["target"]):
        return optimizers, False
    torch.manual_seed(config.seed)  # of the new head: the same after resuming
    return switch(model, optimizers, frozen=frozen, target=target, **hyper), True


def set_learning_rate(config, optimizers, step, steps, schedule):
    """The learning rate of a step, given to all optimizers."""
    lr = learning_rate(config, step, steps)
    if schedule is not None:
        # Paper does not say: how long the warm-up after a switch is. Ours is the same share as at the start.
        frozen, length = frozen_blocks(step, **schedule), schedule["every"] or steps - schedule["start"]
        warm = round(config.warmup * length)
        since = step - schedule["start"] - schedule["every"] * (frozen - 1)
        lr *= min(1, (since + 1) / warm) if frozen and warm else 1
    for group in [group for optimizer in optimizers if optimizer for group in optimizer.param_groups]:
        group["lr"] = lr
    return lr


def masks_of_step(config, model, step):
    """The tube masks of one step's batch, a pure function of (seed, step): indices (B, V) and (B, M)."""
    seed = int(np.random.SeedSequence((config.seed, 2, step)).generate_state(1)[0])
    generator = torch.Generator().manual_seed(seed)
    visible, masked = tube_mask(config.batch, model.grid, config.mask, generator)
    if config.decode_ratio < 1:
        # Differs from paper: VideoMAE V2's saving (arXiv 2303.16727); decoders see and predict only these.
        count = max(1, round(config.decode_ratio * masked.shape[1]))
        some = torch.rand(masked.shape, generator=generator).argsort(dim=1)[:, :count]
        masked = masked.gather(1, some.sort(dim=1).values)
    return visible.to(config.device), masked.to(config.device)


def fixed_clips(config, model, source):
    """Clips and masks for the pictures and eval_loss: of the test split, or, of videos, those trained on."""
    source, videos = source if config.data else Scenes("test", video=model.video), []
    count = FIXED_CLIPS
    for index in np.linspace(0, len(source) - 1, min(count, len(source))).astype(int):
        try:
            videos.append(torch.from_numpy(source.read(int(index))))
        except READ_ERRORS:
            pass  # named as soon as training meets it
    if not videos:
        raise BrokenVideos(f"None of {count} videos that were tried can be read.")
    visible, masked = tube_mask(
        len(videos), model.grid, config.mask, torch.Generator().manual_seed(config.seed)
    )
    return [tensor.to(config.device) for tensor in (torch.stack(videos), visible, masked)]


def autocast_dtype(config):
    """--dtype as train_step() wants it."""
    return torch.bfloat16 if config.dtype == "bf16" else None


def step_in_parts(config, model, optimizers, video, visible, masked, reduce=None):
    """train_step() on a batch computed in --accumulate parts. Returns its losses and gradient norms."""
    losses, count = {}, config.accumulate
    for part, tensors in enumerate(zip(*(x.tensor_split(count) for x in (video, visible, masked))), start=1):
        how = {"dtype": autocast_dtype(config), "clip": config.clip, "slices": config.decoder_slices}
        how["reduce"] = reduce
        share = len(tensors[0]) / config.batch
        last = part == count
        of_part, norms = train_step(model, optimizers, *tensors, share=share, complete=last, **how)
        losses = {name: losses.get(name, 0.0) + share * loss for name, loss in of_part.items()}
    return losses, norms


def check_finite(losses, norms, step, lr, clips):
    """FloatingPointError that names the block, if a loss or gradient norm is not finite."""
    for name, norm in norms.items():
        loss = losses.get(name, 0.0)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"{name} is not finite at step {step}: loss {loss}, gradient norm {norm}, lr {lr}, clips "
                f"{', '.join(clips)}; the last checkpoint is kept. Try a lower --lr, --clip 1, --dtype fp32."
            )


def catch_signals():
    """Ctrl-C and SIGTERM let the step finish and save; a second one ends at once. Returns those caught."""
    caught = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number) if caught else caught.append(number))
    return caught


def first_optimizers(model, checkpoint, done, steps, hyper):
    """Those that a run begins with, or goes on with inside a stage of so many steps."""
    optimizers = make_optimizers(model, stage=min(done // steps, model.stages - 1), **hyper)
    if done % steps:
        load_optimizers(optimizers, checkpoint["optimizers"])
    return optimizers


def save_run(config, model, optimizers, source, done):
    """Write the run's checkpoint."""
    what = {"step": done, "settings": asdict(config), "data": source.fingerprint}
    save(Path(config.out) / "last.pt", model, optimizers, **what)


def start_folder(config, model, source, checkpoint):
    """Make the folder of a new run, with a checkpoint of step 0: from here on it can be resumed."""
    out = Path(config.out)
    if checkpoint is None:
        out.mkdir(parents=True, exist_ok=True)
        save_run(config, model, [], source, done=0)
    if not (out / "config.json").exists():
        (out / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")


def start_processes(config):
    """This process's part in the run."""
    if PROCESSES == 1:
        return Alone()
    dist.init_process_group("cpu:gloo,cuda:nccl" if config.device.startswith("cuda") else "gloo")
    return Pipeline(batch=config.batch, device=config.device) if config.parallel == "blocks" else Replicas()


def read_batches(config, source, team, done, total):
    """This process's part of every batch, or nothing where another one reads them."""
    if not team.reads:
        return itertools.repeat({"video": None, "index": [], "broken": {}})
    feed = {"batch": config.batch, "seed": config.seed, "workers": config.workers, "parts": team.parts}
    feed |= {"part": team.rank, "pin_memory": config.device.startswith("cuda")}
    return iter(loader(source, first=done, last=total, **feed))


def train(config, model, source, checkpoint, where):
    """The training loop, from the checkpoint to the end or to a signal. Returns the signal, or None."""
    signals, out, team = catch_signals(), Path(config.out), start_processes(config)
    done = checkpoint["step"] if checkpoint else 0
    steps = steps_of_stage(config, source)
    total, leads, saved = steps * model.stages, team.rank == 0, time.monotonic()
    hyper = {"lr": config.lr, "betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}
    schedule = freezing(config, steps) if REGIMES[config.regime].freezing else None
    optimizers = first_optimizers(model, checkpoint, done, steps, hyper)
    if leads:
        describe(config, model, source, where, done, total)
        clips = fixed_clips(config, model, source)
        start_folder(config, model, source, checkpoint)
    if config.compile:
        compile_parts(model)
    whole, (model, optimizers) = model, team.take_part(model, optimizers)
    batches = read_batches(config, source, team, done, total)
    ends, stop = done == total, False

    with Log(out / "log.jsonl" if leads else None, done, total) as log:
        while not ends:
            stage, step = divmod(done, steps)
            if step == 0 and stage > 0:  # sequential: each stage has a fresh optimizer and schedule
                optimizers = make_optimizers(model, stage=stage, **hyper)
            optimizers, switched = follow(schedule, config, model, optimizers, step, hyper)
            lr = set_learning_rate(config, optimizers, step, steps, schedule)
            batch = log.next(batches, source)
            video = team.pass_on(batch["video"]).to(config.device, non_blocking=True)
            masks = [team.share(index) for index in masks_of_step(config, model, done)]
            losses, norms = step_in_parts(config, model, optimizers, video, *masks, team.reduce)
            done += 1
            log.step(config.batch)
            stop, due = team.agree(bool(signals), leads and time.monotonic() - saved > SAVE_SECONDS)
            ends = done == total or stop
            draws = ends or switched or done == 1 or done % max(1, total // 10) == 0
            logs = draws or done % min(50, max(1, total // 100)) == 0
            if logs or config.device == "cpu":  # on a GPU, looking at a number waits for it
                losses, norms = ({name: x.item() for name, x in values.items()} for values in (losses, norms))
                check_finite(losses, norms, done, lr, [source.name(index) for index in batch["index"]])
            if not logs:
                continue
            losses, norms = team.collect(losses, norms)
            if draws or due:
                whole, of_whole = team.whole(model, optimizers)
            if leads:
                epoch = round(done * config.batch / len(source), 4)
                record = {"step": done, "epoch": epoch, "lr": lr, "loss": losses, "grad_norm": norms}
                if draws:
                    reached = [name for group in whole.groups[: len(of_whole)] for name in group]
                    record |= look(whole, clips, out / f"recon_{done:06d}.png", reached)
                log.write(record)
                if ends or due:
                    save_run(config, whole, of_whole, source, done)
                    saved = time.monotonic()
            if not ends:
                whole = of_whole = None  # a pipeline's was put together for this moment only
    if done == total and leads:
        show_end(whole, clips, out / "recon.mp4")
    team.close()
    return (signals[0] if signals else signal.SIGTERM) if stop else None


# ---- benchmark ----


@contextlib.contextmanager
def saved_bytes(model):
    """Count the bytes that autograd keeps for backward, weights aside. Yields {"now": n, "peak": n}."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    count, holders = {"now": 0, "peak": 0}, Counter()

    class Kept:
        pass

    def release(place, size):
        holders[place] -= 1
        count["now"] -= 0 if holders[place] else size

    def pack(tensor):
        kept, storage = Kept(), tensor.untyped_storage()
        kept.tensor, place, size = tensor.detach(), storage.data_ptr(), storage.nbytes()
        if place not in weights:
            count["now"] += 0 if holders[place] else size
            holders[place] += 1
            count["peak"] = max(count["peak"], count["now"])
            weakref.finalize(kept, release, place, size)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        yield count


def summed_loss(model, video, visible, masked, dtype=None):
    """The sum of all local losses in one graph: the obvious way, which train_step() is compared with."""
    patches, total = patchify(video, model.tubelet), 0.0  # (B, N, P)
    h, target = gather_tokens(patches, visible), normalized_targets(gather_tokens(patches, masked))[0]  # (B, V, P), (B, M, P)
    with autocast(video, dtype):
        for name, block in model.blocks.items():
            isolated = REGIMES[model.config["regime"]].stop_gradient
            h = block(h.detach() if isolated else h, visible)  # (B, V, D)
            if name in model.decoders:
                total = total + F.mse_loss(model.decoders[name](h, visible, masked).float(), target)
    return total


def end_with_parent():
    """For a process of its own: leave no orphan behind when the benchmark is killed."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def noise(config, model):
    """A batch to compute on: (video, visible, masked)."""
    shape, generator = (config.batch, *model.video, 3), torch.Generator().manual_seed(0)
    video = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return video.to(config.device), *masks_of_step(config, model, 0)


def write_benchmark(config, found, name):
    """Write benchmark.json into --out or runs/benchmark-NAME; returns the folder."""
    out = Path(config.out or f"runs/benchmark-{config.size}-{name}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "benchmark.json").write_text(json.dumps(found, indent=1) + "\n")
    return out


@functools.cache
def prepared(settings):
    """For a process of its own: (model, a training step of the settings as a function, memory before)."""
    config, before = Config(**dict(settings)), peak_memory()
    complete(config)
    torch.manual_seed(0)
    model = Blockwise(**model_arguments(config)).to(config.device).train()
    optimizers = make_optimizers(model, stage=model.stages - 1)  # sequential: its last stage, the dearest
    batch = noise(config, model)

    def step():
        step_in_parts(config, model, optimizers, *batch)
        if config.device != "cpu":
            getattr(torch, config.device.partition(":")[0]).synchronize()

    if config.compile:
        compile_parts(model)
    return model, step, 0.0 if config.device.startswith("cuda") else before


def time_step(settings):
    """Seconds of one step."""
    _, step, _ = prepared(settings)
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def costs(settings):
    """What a step costs apart from time: FLOPs, bytes of saved activations, megabytes of memory."""
    model, step, before = prepared(settings)
    memory = peak_memory() - before
    return costs_of_step(model, step) | {"memory_mb": memory}


def costs_of_step(model, step):
    """FLOPs and megabytes of saved activations of a training step, a function without arguments."""
    # Fused attention and compiled code would hide FLOPs from the counter.
    with sdpa_kernel(SDPBackend.MATH), set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        step()
    with saved_bytes(model) as saved:
        step()
    return {"flops": counter.get_total_flops(), "saved_mb": saved["peak"] / 2**20}


def benchmark_freezing(config):
    """Print and write what LayerLock costs in each phase, and in all, against e2e in a run as long."""
    steps, where = config.steps or 3000, complete(config)
    print(f"{config.size}, K = {config.blocks}, {steps} steps of {config.batch} clips, {where}")
    control, results = config.freeze_start == -1, {}
    for target in ("latent",) if control else ("pixels", "latent"):
        case = replace(config, target=target)
        schedule = freezing(case, steps)
        phases = [phase(case, step, schedule) for step in range(steps)]
        torch.manual_seed(0)
        model = Blockwise(**model_arguments(config)).to(config.device).train()
        optimizers, found = make_optimizers(model), {}
        batch = noise(config, model)
        for frozen, block in tqdm([(0, 0), *sorted(set(phases) - {(0, 0)})], target, leave=False):
            if (frozen, block) != (0, 0):
                optimizers = switch(model, optimizers, frozen=frozen, target=block)
            learning = sum(p.numel() for group in optimizers[-1].param_groups for p in group["params"])
            found[frozen, block] = costs_of_step(
                model, functools.partial(step_in_parts, config, model, optimizers, *batch)
            )
            found[frozen, block]["state_mb"] = 3 * 4 * learning / 2**20  # gradient and AdamW's two moments
        plain, rows = found[0, 0], [found[one] for one in phases]  # e2e is (0, 0) all along
        for (frozen, block), row in found.items():
            print(
                f"{frozen:2} frozen, target {f'block {block}' if block else 'pixels':8}: "
                f"{phases.count((frozen, block)):5} steps of {row['flops'] / 1e9:6.1f} GFLOP, saved "
                f"activations {row['saved_mb']:6.1f} MB, gradients and optimizer state "
                f"{row['state_mb']:6.1f} MB"
            )
        memory = np.array([row["saved_mb"] + row["state_mb"] for row in rows])
        memory = memory / (plain["saved_mb"] + plain["state_mb"]) - 1
        flops = sum(row["flops"] for row in rows) / (steps * plain["flops"]) - 1
        print(
            f"--target {target}, the whole run against e2e: {flops:+.1%} FLOPs; this memory "
            f"{memory.mean():+.1%} on average, {memory[-1]:+.1%} in the last step"
        )
        results[target] = {"flops": flops, "memory": memory.mean(), "memory in the last step": memory[-1]}
    write_benchmark(config, results, f"layerlock-{config.blocks}")


def benchmark(config, regimes):
    """Print time and memory of a step of some regimes, and saved activations by K; write both as JSON.

    Every case has a process of its own, for its peak memory; steps alternate, so that all see one machine.
    """
    rounds = config.steps or 15  # before the recipe fills in a training run's
    where = complete(config)
    tube_mask(1, Blockwise(**model_arguments(config)).grid, config.mask)  # raises if sizes do not fit
    print(f"{config.size}, K = {config.blocks}, batch {config.batch}, {where}")
    cases = {regime: replace(config, regime=regime) for regime in regimes}
    if config.decoder_slices > 1:
        cases = {"e2e, decoder at once": replace(cases[regimes[0]], regime="e2e", decoder_slices=1)} | cases
    cases = {name: tuple(asdict(case).items()) for name, case in cases.items()}
    found = {}
    with contextlib.ExitStack() as stack:
        new = functools.partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"), end_with_parent)
        processes = {name: stack.enter_context(new()) for name in cases}
        seconds = {name: [] for name in cases}
        for _, name in tqdm(list(itertools.product(range(2 + rounds), cases)), "steps", leave=False):
            seconds[name].append(processes[name].submit(time_step, cases[name]).result())
        for name, settings in cases.items():
            median = float(np.median(seconds[name][2:]))  # two to warm up
            found[name] = {"step_ms": 1e3 * median, "clips_per_s": config.batch / median}
            found[name] |= processes[name].submit(costs, settings).result()
            found[name]["gflops_per_s"] = found[name]["flops"] / median / 1e9
    print(f"{'':22}{'ms/step':>9}{'clips/s':>9}{'GFLOP':>9}{'GFLOP/s':>9}{'saved MB':>10}{'memory MB':>11}")
    for name, row in found.items():
        print(
            f"{name:22}{row['step_ms']:9.0f}{row['clips_per_s']:9.1f}{row['flops'] / 1e9:9.1f}"
            f"{row['gflops_per_s']:9.0f}{row['saved_mb']:10.1f}{row['memory_mb']:11.0f}"
        )
    by_blocks = saved_by_blocks(config)
    print("\nsaved MB by K" + "".join(f"{blocks:>9}" for blocks in by_blocks))
    for name in next(iter(by_blocks.values())):
        print(f"{name:13}" + "".join(f"{row[name]:9.1f}" for row in by_blocks.values()))
    made_with = {"settings": asdict(config), "torch": torch.__version__}
    found = made_with | {"steps": found, "saved_mb_by_blocks": by_blocks}
    out = write_benchmark(config, found, config.blocks)
    with contextlib.suppress(ValueError):  # no matplotlib: no picture of the second table
        plot_memory(by_blocks, out / "memory.png", title=f"{config.size}, batch {config.batch}")
    print(f"\n{out}/benchmark.json" + f", {out}/memory.png" * (out / "memory.png").exists())


def saved_by_blocks(config):
    """Peak megabytes of saved activations, of a simultaneous step and the summed way: {K: {name: float}}."""
    depth, found = 12, {}
    for blocks in tqdm([k for k in range(1, depth + 1) if depth % k == 0], "memory by K", leave=False):
        case = replace(config, blocks=blocks, regime="simultaneous", accumulate=1, compile=False)
        model = Blockwise(**model_arguments(case)).to(case.device).train()
        batch = noise(case, model)
        few = min(4, case.batch)  # what the summed way saves grows with the clips
        with saved_bytes(model) as summed:
            summed_loss(model, *(x[:few] for x in batch), autocast_dtype(case))
        with saved_bytes(model) as stepwise:
            step_in_parts(case, model, make_optimizers(model), *batch)
        found[blocks] = {
            "summed": summed["peak"] / 2**20 * case.batch / few,
            "block by block": stepwise["peak"] / 2**20,
        }
    return found


def explain(error, config):
    """(Sentence, exit code) for an error in training that a user can do something about; else (None, 1)."""
    kept = f"The last checkpoint is kept; go on with --resume --out {shlex.quote(config.out)}"
    if isinstance(error, (BrokenVideos, FloatingPointError)):
        return error, 2 if isinstance(error, BrokenVideos) else 1
    lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))
    if PROCESSES > 1 and lost:
        return f"Another process has ended, so all end. {kept}.", 1
    if isinstance(error, (ConnectionError, EOFError)) or "DataLoader worker (pid" in str(error):
        less = f"{kept} --workers {config.workers // 2}"
        return f"A process that reads clips died, out of memory perhaps. {less}.", 1
    if isinstance(error, OSError):  # a full disk, for example
        return f"{error}. {kept}.", 1
    return None, 1


def main(arguments=None):
    """Train as the command line says."""
    try:
        config, given = parse(arguments)
        if config.benchmark:
            if config.regime == "layerlock":
                return benchmark_freezing(config)
            regimes = [name for name, regime in REGIMES.items() if not regime.freezing]
            return benchmark(config, [config.regime] if "regime" in given else regimes)
        run = set_up(config, given)
    except ValueError as error:
        fail(error)
    config = run[0]
    try:
        stopped = train(*run)
    except Exception as error:
        # Frees the loader, which ends its workers. Python would wait for them for ever: they ignore SIGTERM.
        if hasattr(signal, "SIGCHLD"):  # not on Windows; torch's handler would raise again meanwhile
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        traceback.clear_frames(error.__traceback__)
        sentence, code = explain(error, config)
        if sentence is None:
            raise
        fail(sentence, code)
    if stopped:
        if RANK == 0:
            start = "python" if PROCESSES == 1 else f"torchrun --nproc-per-node {PROCESSES}"
            how = f" --parallel {config.parallel}" * (PROCESSES > 1)
            where = f"--resume --out {shlex.quote(config.out)}{how}"
            print(f"stopped and saved; go on with: {start} train.py {where}", flush=True)
        sys.exit(128 + stopped)
    if RANK > 0:
        return
    other = {"regime": "simultaneous" if config.regime == "e2e" else "e2e", "target": Config.target}
    other |= dict.fromkeys(("freeze_start", "freeze_every", "freeze_until"))
    print("next, to compare:", command(config, **other))


if __name__ == "__main__":
    main()
