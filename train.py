"""Train a video vision transformer block by block, on generated clips or on a folder of videos.

    python train.py --blocks 4                                           # generated clips, minutes on a CPU
    python train.py --blocks 4 --data VIDEOS --stride 2 --short repeat   # your own videos
    python train.py --size tiny --data UCF-101 --list trainlist01.txt    # the paper's recipe, for a GPU
    torchrun --nproc-per-node 2 train.py ...                             # batches shared by two processes
    python train.py --help                                               # every setting

Römer & Dickscheid, arXiv 2601.09040, Sec. 3. The method is train_step() in blockwise.py; this file feeds it.
A run writes into its folder: config.json, log.jsonl, recon_*.png, recon.mp4 and the checkpoint last.pt.
"""

import json
import math
import os
import shlex
import signal
import sys
import time
import types
import typing
from argparse import SUPPRESS, BooleanOptionalAction
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
from blockwise import REGIMES, Blockwise, count_parameters, load, make_optimizers, save, train_step
from model import SIZES, gather_tokens, normalized_targets, tube_mask, unpatchify

# tiny and small: the paper's recipe (Sec. 3.2, 3.4). Paper does not say: batch size. nano and base are ours.
RECIPES = {
    "nano": {"steps": 3000, "batch": 16, "lr": 1e-3},
    "tiny": {"epochs": 150, "batch": 128, "lr": 1e-4},
    "small": {"epochs": 300, "batch": 128, "lr": 1e-4},
    "base": {"epochs": 300, "batch": 128, "lr": 1e-4},
}
FIXED_CLIPS = 32  # that the pictures and eval_loss are of
SAVE_SECONDS = 60  # between checkpoints, which come with a line of the log


# ---- settings ----


def option(default, help, **limits):
    """A setting: its default, its line in --help, and the limits of its value, as in data.number()."""
    return field(default=default, metadata={"help": help, "limits": limits})


@dataclass
class Config:
    """All settings of a run. Each field is a flag of its name; None leaves it to size or machine."""

    program: ClassVar[str] = "train.py"

    size: Literal[tuple(SIZES)] = option("nano", "model: tiny and small are the paper's, nano suits a laptop")
    blocks: int = option(4, "K, blocks of the encoder; of e2e only where it is read", least=1, most=1000)
    regime: Literal[tuple(REGIMES)] = option("simultaneous", "who learns from which loss (Sec. 3.1)")
    decoder_depth: int | None = option(None, "layers of each local decoder (paper: 4; nano: 1)", least=1)
    frames: int | None = option(None, "frames of a clip (paper: 16)", least=1)
    pixels: int | None = option(None, "height and width of a clip (paper: 128; nano: 64)", least=1)
    tubelet: tuple[int, int, int] | None = option(
        None, "frames, rows, columns of one token (paper: 8 16 16; nano: 8 8 8)", least=1
    )
    mask: float = option(0.9, "share of the tubes that is masked", above=0, below=1)
    decode_ratio: float = option(1.0, "share of masked tokens to predict, at random", above=0, most=1)

    data: str | None = option(None, "folder of videos; without it, clips are generated")
    list: str | None = option(None, "file of lines `path [label]`, relative to --data: use these videos only")
    stride: int = option(4, "take every stride-th frame of a video", least=1)
    short: Literal["drop", "repeat"] = option("drop", "videos of < frames x stride, or repeat the last frame")

    epochs: float | None = option(None, "passes over the data (paper: 150, 300), in each stage", above=0)
    steps: int | None = option(None, "optimizer steps instead, in each stage (nano: 3000)", least=1)
    batch: int | None = option(None, "clips in one optimizer step (tiny, small: 128; nano: 16)", least=1)
    decoder_slices: int | None = option(None, "parts of a batch in a decoder, to save memory", least=1)
    lr: float | None = option(None, "highest learning rate (paper: 1e-4; nano: 1e-3)", above=0)
    min_lr: float = option(1e-6, "learning rate at the end of the cosine", least=0)
    warmup: float = option(0.1, "share of the steps with rising learning rate", least=0, below=1)
    weight_decay: float = option(0.05, "AdamW's, on weight matrices only", least=0)
    beta1: float = option(0.9, "AdamW's, of the mean gradient", least=0, below=1)
    beta2: float = option(0.95, "AdamW's, of the mean squared gradient", least=0, below=1)
    clip: float = option(0.0, "largest gradient norm, of each isolated block by itself; 0: no limit", least=0)
    seed: int = option(0, "of the weights, the data order and the masks", least=0, below=2**32)

    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "fp32", "bf16"] = option("auto", "bf16: autocast; auto is bf16 on cuda, else fp32")
    compile: bool = option(False, "torch.compile the blocks and decoders")
    graph: bool = option(False, "on an NVIDIA GPU: replay each step as one CUDA graph; small models gain")
    workers: int | None = option(None, "processes that read clips (default: by the cores)", least=0, most=256)
    out: str | None = option(None, "folder of the run (default: runs/NAME, named after the settings)")
    resume: bool = option(False, "go on with the run in --out, from its checkpoint, with its settings")

    def folder(self):
        """Default for --out: named after size, regime, K, data and seed."""
        data = f"-{Path(self.data).resolve().name}" if self.data else ""
        seed = f"-seed{self.seed}" if self.seed else ""
        return f"runs/{self.size}-{self.regime}-{self.blocks}{data}{seed}"

    def model_arguments(self):
        """Arguments of Blockwise."""
        size = dict(SIZES[self.size], blocks=self.blocks, regime=self.regime)
        T, H, W = size["video"]
        size["video"] = (self.frames or T, self.pixels or H, self.pixels or W)
        size["tubelet"] = self.tubelet or size["tubelet"]
        return size | ({"decoder_depth": self.decoder_depth} if self.decoder_depth else {})


def flag(name):
    """Field name to command-line flag."""
    return "--" + name.replace("_", "-")


def parse(Config, manual, arguments=None):
    """Command line to (Config, names of the settings given); exit with one sentence where it makes no sense."""
    parser, kinds = data.Parser(manual), typing.get_type_hints(Config)
    for f in fields(Config):
        kind = kinds[f.name]
        if isinstance(kind, types.UnionType):  # X | None
            kind = kind.__args__[0]
        several = typing.get_args(kind)
        if kind is bool:
            argument = {"action": BooleanOptionalAction}
        elif typing.get_origin(kind) is Literal:
            argument = {"choices": several}
        elif kind is str:
            argument = {"metavar": "TEXT"}
        else:
            argument = {"type": data.number(several[0] if several else kind, **f.metadata["limits"])}
            argument["metavar"], argument["nargs"] = "N", len(several) or None
        help = f.metadata["help"] + (f" [{f.default}]" if f.default is not None else "")
        parser.add_argument(flag(f.name), default=SUPPRESS, help=help.replace("%", "%%"), **argument)
    given = vars(parser.parse_args(arguments))
    if "tubelet" in given:
        given["tubelet"] = tuple(given["tubelet"])
    if {"steps", "epochs"} <= set(given):
        data.fail("--steps and --epochs both say how long to train; give one of them.")
    return Config(**given), set(given)


def processes():
    """(rank of this process, number of processes), as torchrun tells it; (0, 1) without torchrun."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        return 0, 1
    told = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if not count.isdigit() or not all(os.environ.get(name) for name in told):
        raise ValueError(
            f"WORLD_SIZE is {count!r}, not by torchrun: unset WORLD_SIZE, or start with torchrun "
            "--nproc-per-node 2 train.py ..."
        )
    return int(os.environ["RANK"]), int(count)


def resolve_defaults(config):
    """Fill in what was left open: device, dtype, workers, the recipe of the size."""
    config.device = data.pick_device(config.device)
    if config.device == "cuda" and processes()[1] > 1:
        config.device = data.pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
    cuda = config.device.startswith("cuda")
    if config.graph and not (cuda and processes()[1] == 1):
        raise ValueError("--graph is for one process on an NVIDIA GPU; leave it out.")
    if cuda:
        torch.cuda.set_device(torch.device(config.device).index or 0)
    if config.dtype == "auto":  # Paper does not say: the precision.
        config.dtype = "bf16" if cuda else "fp32"
    if config.workers is None:
        cores = torch.get_num_threads()
        config.workers = min(8, cores if cuda and config.data else max(1, cores // 2))
    length_given = config.steps or config.epochs
    for name, value in RECIPES[config.size].items():
        if getattr(config, name) is None and not (name in ("steps", "epochs") and length_given):
            setattr(config, name, value)
    if config.min_lr > config.lr:
        raise ValueError(f"--min-lr {config.min_lr} is more than --lr {config.lr}; lower it.")


def resumed(Config, config, given):
    """Settings, model and checkpoint of the run in --out. It may run elsewhere, but not otherwise."""
    if processes()[0] == 0 and (Path(config.out) / "last.pt").exists():
        lock_folder(Path(config.out))
    model, checkpoint = load(config.out)
    saved = checkpoint.get("settings", {})
    odd = sorted(saved.keys() ^ {f.name for f in fields(Config)})
    if odd or not checkpoint.keys() >= {"optimizers", "data"}:
        which = f"settings {', '.join(odd[:9])}" if odd else "no optimizers"
        raise ValueError(f"The checkpoint in {config.out} was not written by {config.program} ({which}).")
    elsewhere, moved = {"resume", "out", "device", "workers", "graph"}, {"data", "list", "decoder_slices"}
    for name in given - elsewhere - moved:
        value = getattr(config, name)
        if value not in (saved[name], "auto"):
            raise ValueError(
                f"{config.out} was started with {flag(name)} {saved[name]}, not {value}; leave it out, or "
                "start another run with --out."
            )
    here = {name: getattr(config, name) for name in elsewhere | (moved & given)}
    return Config(**(saved | here)), model, checkpoint


def lock_folder(out):
    """Keep other processes out of a run's folder until this one ends; ValueError if one is in it already.

    The lock is the operating system's: a killed process leaves none behind. It is on a file that nothing else
    opens, because it would end as soon as this process closed the file anywhere.
    """
    try:
        import fcntl  # not on Windows: there is no lock there
    except ImportError:
        return
    file = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{out} is in use by another process; wait for its end.") from None
    except OSError:
        pass  # a file system without locks


def steps_of_stage(config, source):
    """Optimizer steps of a run, in the sequential regime of one stage."""
    return config.steps or max(1, math.ceil(config.epochs * len(source) / config.batch))


def set_up(Config, config, given):
    """All that comes before training. ValueError, one sentence with the fix, for what the user can mend."""
    config.out, model, checkpoint = config.out or config.folder(), None, None
    if config.resume:
        config, model, checkpoint = resumed(Config, config, given)
    else:
        out = Path(config.out)
        # A start that was killed may leave empty files and half a checkpoint.
        if out.is_dir() and any(f.stat().st_size and f.name != "last.pt.tmp" for f in out.iterdir()):
            go_on = "go on with its run by --resume, or " if (out / "last.pt").is_file() else ""
            raise ValueError(f"{out} is not empty; {go_on}name another --out.")
    for name in ("list", "stride", "short"):
        if name in given and not config.data:
            raise ValueError(f"{flag(name)} is for videos; leave it out, or say in which folder with --data.")
    resolve_defaults(config)
    if model is None:
        torch.manual_seed(config.seed)
        model = Blockwise(**config.model_arguments())
    tube_mask(1, model.grid, config.mask)  # raises if the ratio does not fit the grid
    source = data.Scenes("train", video=model.video)
    if config.data:
        rules = {"list_file": config.list, "stride": config.stride, "short": config.short}
        source = data.Videos(config.data, video=model.video, **rules)
    if checkpoint:
        step, most = checkpoint.get("step"), steps_of_stage(config, source) * model.stages
        if source.fingerprint != checkpoint["data"]:
            raise ValueError(
                f"{config.out} was started on other videos; restore them, or name another --out."
            )
        if not isinstance(step, int) or not 0 <= step <= most:
            raise ValueError(f"{config.out}/last.pt is of step {step}, outside of the run's 0 to {most}.")
    return config, model.to(config.device).train(), source, checkpoint


# ---- what is trained, by one process or several ----


class Learner:
    """A model, its optimizers and one step of them, in one process or data parallel in those of torchrun.

    Data parallel, every process holds the whole model and computes its part of every batch; the gradients of
    a block are averaged as soon as its own backward is done, before its optimizer step. What trains in
    another way is a subclass that main() is given.

    steps: of the run, in the sequential regime of one stage. checkpoint: to go on from, or None.
    """

    def __init__(self, config, model, steps, checkpoint=None):
        self.config, self.model, self.steps, self.optimizers = config, model, steps, []
        self.rank, self.processes = processes()
        parts = self.part[1]
        if config.batch % parts:
            raise ValueError(f"{parts} processes cannot share {config.batch} clips equally; change --batch.")
        if config.decoder_slices is None:
            config.decoder_slices = default_slices(config.batch // parts, config.device)
        if checkpoint and checkpoint["step"] % steps:  # else a stage begins, with fresh optimizers
            self.make_ready(checkpoint["step"] - 1)
            self.load_optimizers(checkpoint["optimizers"])
        if self.processes > 1:
            cuda = config.device.startswith("cuda")
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")

    @property
    def part(self):
        """(number, count): which of how many equal parts of every batch this process computes."""
        return self.rank, self.processes

    def make_ready(self, step):
        """Optimizers for a step of the run: fresh ones at the beginning of every stage."""
        c, stage = self.config, step // self.steps
        if step % self.steps == 0 or not self.optimizers:
            settings = {"lr": c.lr, "betas": (c.beta1, c.beta2), "weight_decay": c.weight_decay}
            self.optimizers = make_optimizers(self.model, stage=stage, **settings)
            self.graph = None  # of a step with these

    def load_optimizers(self, states):
        """Go on with the state that a checkpoint holds."""
        try:
            for optimizer, state in zip(self.optimizers, states, strict=True):
                if optimizer is not None:
                    optimizer.load_state_dict(state)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"The optimizers in the checkpoint do not fit its model: {error}") from None

    def begin(self, step):
        """Make ready for a step of the run, and set its learning rate, which is returned."""
        self.make_ready(step)
        lr = self.learning_rate(step % self.steps)
        for optimizer in filter(None, self.optimizers):
            for group in optimizer.param_groups:
                group["lr"] = lr
        return lr

    def learning_rate(self, step):
        """Cosine (Sec. 3.4), after a linear warm-up."""
        # Paper does not say: warm-up and final rate. Both are ours.
        c, warm = self.config, round(self.config.warmup * self.steps)
        if step < warm:
            return c.lr * (step + 1) / warm
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))
        return c.min_lr + (c.lr - c.min_lr) * cosine

    def batches(self, source, first, last):
        """Batches of the steps first..last - 1, this process's part of each."""
        c, (part, parts) = self.config, self.part
        share = {"part": part, "parts": parts, "pin_memory": c.device.startswith("cuda")}
        which = {"batch": c.batch, "first": first, "last": last, "seed": c.seed}
        return iter(data.loader(source, **which, **share, workers=c.workers))

    def step(self, video, visible, masked):
        """One step on this process's part of a batch: (losses, gradient norms), as train_step()."""
        batch = (video.to(self.config.device, non_blocking=True), visible, masked)
        if not self.config.graph:
            return train_step(self.model, self.optimizers, *batch, **self.step_settings())
        if self.graph is None:
            self.graph = Graph(self.model, self.optimizers, **self.step_settings())
        return self.graph.step(*batch)

    def step_settings(self):
        """What a step takes from the settings."""
        c, reduce = self.config, average if self.processes > 1 else None
        dtype = torch.bfloat16 if c.dtype == "bf16" else None
        return {"dtype": dtype, "clip": c.clip, "slices": c.decoder_slices, "reduce": reduce}

    def agree(self, stop, due):
        """What all processes do after a step, (stop?, save?): one that was told to stop stops all."""
        if self.processes > 1:
            told = torch.tensor(int(stop))
            dist.all_reduce(told, op=dist.ReduceOp.MAX)
            stop = bool(told)
        return stop, due

    def collect(self, losses, norms):
        """Losses and norms, {name: float}, of the whole batch and model."""
        if self.processes > 1:
            mean = torch.tensor(list(losses.values()), dtype=torch.float64)
            average([mean])
            losses = dict(zip(losses, mean.tolist()))
        return losses, norms

    def whole(self):
        """(model, optimizers) in one piece, on rank 0."""
        return self.model, self.optimizers

    def close(self):
        """End together: no process leaves while another one still wants to hear from it."""
        if self.processes > 1:
            with suppress(RuntimeError):  # one that is through already may close its end
                dist.barrier()
            if torch.cuda.is_available():  # NCCL asks for it; gloo's can hang where another process has left
                dist.destroy_process_group()


class Graph:
    """train_step() as a CUDA graph: recorded after three usual steps, from then on replayed.

    A replay runs the same kernels, and so computes the same numbers, without Python and the launch of each, which
    cost a GPU more time than the arithmetic of small models. settings: as train_step(). Shapes must not change.
    """

    def __init__(self, model, optimizers, **settings):
        torch.cuda.synchronize()  # the graph of another stage may still be running
        self.model, self.optimizers, self.settings = model, optimizers, settings
        self.groups = [group for optimizer in filter(None, optimizers) for group in optimizer.param_groups]
        self.usual, self.graph, self.lr = 3, None, torch.zeros((), device=next(model.parameters()).device)

    def step(self, *batch):
        """train_step() on a batch (video, visible, masked) of the GPU; what it returns is good until the next."""
        if self.usual:  # they allocate what lasts; on a stream of their own, as recording wants it
            self.usual, stream = self.usual - 1, torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found = train_step(self.model, self.optimizers, *batch, **self.settings)
            torch.cuda.current_stream().wait_stream(stream)
            return found
        lr = self.groups[0]["lr"]
        if self.graph is None:
            self.graph, self.batch = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in batch]
            for group in self.groups:
                group.update(lr=self.lr, capturable=True)
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.found = train_step(self.model, self.optimizers, *self.batch, **self.settings)
            for group in self.groups:  # as before, for checkpoints
                group.update(lr=lr, capturable=False)
        self.lr.fill_(lr)
        for place, tensor in zip(self.batch, batch):
            place.copy_(tensor)
        self.graph.replay()
        return self.found


def average(tensors):
    """Replace tensors by their mean over the processes, in one message."""
    together = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(together)
    together /= dist.get_world_size()
    for tensor, mean in zip(tensors, together.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(mean.view_as(tensor))


def default_slices(clips, device):
    """Of eight clips on a CPU, the fastest there, fp32 and bf16; a GPU's memory is seldom short."""
    return math.ceil(clips / 8) if device == "cpu" else 1


def masks_of_step(config, model, step):
    """The tube masks of one step's batch, a pure function of (seed, step): indices (B, V) and (B, M)."""
    seed = int(np.random.SeedSequence((config.seed, 2, step)).generate_state(1)[0])
    generator = torch.Generator().manual_seed(seed)
    visible, masked = tube_mask(config.batch, model.grid, config.mask, generator)
    if config.decode_ratio < 1:
        # Differs from paper: VideoMAE V2's saving (arXiv 2303.16727); decoders get and predict only these.
        count = max(1, round(config.decode_ratio * masked.shape[1]))
        some = torch.rand(masked.shape, generator=generator).argsort(dim=1)[:, :count]
        masked = masked.gather(1, some.sort(dim=1).values)
    return visible.to(config.device), masked.to(config.device)


# ---- what a run shows ----


def describe(config, model, source, steps):
    """Print what runs and on what."""
    cuda = config.device.startswith("cuda")
    where = torch.cuda.get_device_name() if cuda else f"CPU threads: {torch.get_num_threads()}"
    print(f"{config.out}: {config.size}, {config.regime}, K = {config.blocks}")
    print(f"device: {config.device} ({where}), {config.dtype}")
    if config.data:
        of = f"{source.total} videos in {config.data}"
        print(f"data: {len(source)} of {of}, classes: {len(source.classes)}")
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
    if config.device == "cpu" and config.size != "nano":
        print("the paper's sizes want a GPU; to see it run in minutes, leave out --size")
    print(f"{steps} steps of {config.batch} clips, processes: {processes()[1]}", flush=True)


class Log:
    """log.jsonl and the progress bar, with clips per second and the share of time spent waiting for clips.

    path: None for neither file nor bar. done: steps that the checkpoint holds; what a stopped run has logged
    after them is cut off.
    """

    def __init__(self, path, done, total):
        self.path, self.clips, self.waited, self.since = path, 0, 0.0, time.perf_counter()
        self.bar = tqdm(total=total, initial=done, unit=" steps", mininterval=1, disable=path is None)
        if path is not None and path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            steps = [self.step_of(line) for line in lines]
            if None in steps:
                self.bar.write(f"{path}: {steps.count(None)} damaged line(s) left out")
            kept = [line for line, step in zip(lines, steps) if step is not None and step <= done]
            temporary = path.with_name("log.jsonl.tmp")  # a kill leaves the old log or the new one
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, path)

    @staticmethod
    def step_of(line):
        """The step that a line is of; None if it is damaged."""
        try:
            step = json.loads(line.decode())["step"]
        except (ValueError, TypeError, LookupError, RecursionError):
            return None
        return step if line.endswith(b"\n") and type(step) is int else None

    def next(self, batches, source):
        """The next batch, on the clock; broken videos are named."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        found = source.check_broken(batch["broken"], none_left=batch["missing"] > 0)
        for path, reason in found.items():
            self.bar.write(f"left out, the next good video takes its place: {path} ({reason})")
        return batch

    def rates(self):
        """Speed of the steps since the last line, and memory."""
        seconds = time.perf_counter() - self.since
        rates = {"clips_per_s": round(self.clips / seconds, 1), "wait": round(self.waited / seconds, 4)}
        return rates | {"memory_mb": round(peak_memory())}

    def write(self, record):
        """Write one line, which also goes to the screen if it has an eval_loss, and restart the clock."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.bar.set_postfix_str("loss " + " ".join(f"{loss:.3f}" for loss in record["loss"].values()))
        if "eval_loss" in record:
            which = "eval_loss" if record["eval_loss"] else "loss"  # no decoder predicts pixels: of the batch
            losses = ", ".join(f"{name} {loss:.3f}" for name, loss in record[which].items())
            speed = f"{record['clips_per_s']:.0f} clips/s, {record['wait']:.0%} waiting for clips"
            self.bar.write(f"step {record['step']}: {which} of {losses}; lr {record['lr']:.1e}; {speed}")
        self.clips, self.waited, self.since = 0, 0.0, time.perf_counter()


def peak_memory():
    """Largest memory used so far, in MB: of the GPU if in use, else of this process; 0 where unknown."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def fixed_clips(config, model, source):
    """Clips and masks for the pictures and eval_loss: of the test split, or, of videos, those trained on."""
    source = source if config.data else data.Scenes("test", video=model.video)
    some = np.linspace(0, len(source) - 1, min(FIXED_CLIPS, len(source))).astype(int).tolist()
    [clips] = data.evaluation_loader(source, indices=some, batch=len(some))
    if not clips["index"]:  # broken videos are named as soon as training meets them
        raise ValueError(f"None of {len(some)} videos that were tried can be read.")
    generator = torch.Generator().manual_seed(config.seed)
    masks = tube_mask(len(clips["index"]), model.grid, config.mask, generator)
    return [tensor.to(config.device) for tensor in (clips["video"], *masks)]


@torch.no_grad()
def draw(model, clips, path, blocks):
    """Write what the decoders of some blocks make of fixed clips; returns their losses, {block name: float}.

    clips: (video, visible, masked). path: .png shows some frames of the middle clip, .mp4 moves 6 clips. A
    prediction is of normalised tubelets, without mean and contrast: it is shown as the loss sees it. Only the
    last row, which says so, is painted with each tubelet's true ones. No decoder predicts pixels: {}.
    """
    video, visible, masked = clips
    predictions = model.reconstruct(video, visible, masked)
    predictions = {name: prediction for name, prediction in predictions.items() if name in blocks}
    if not predictions:
        return {}
    patches = model.patches(video).float()  # (B, N, P)
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
    name, last = list(predictions.items())[-1]
    last = last.float().unflatten(-1, (-1, 3))  # (B, M, P/3, 3)
    true = (last * std + mean).flatten(2)  # (B, M, P)
    rows[f"{name} + true mean/std"] = paint(255 * true, masked, patches)

    T = video.shape[1]
    if path.suffix == ".png":
        middle, every = len(video) // 2, max(1, T // 8)
        data.write_picture(path, data.tile({title: row[middle, ::every] for title, row in rows.items()}))
    else:
        frames = [data.tile({title: row[:6, t] for title, row in rows.items()}) for t in range(T)]
        data.write_video(path, frames * 3)
    return losses


@torch.no_grad()
def evaluate(model, clips, out, step, blocks):
    """What the log says of fixed clips: {"eval_loss": by block, "features": {...}}; draws them into `out`.

    features: do those of clips still differ after the last of `blocks`? Their standard deviation over clips,
    mean over dimensions, and their effective rank; both fall when a representation collapses.
    """
    x = model.encode(clips[0])[blocks[-1]].mean(dim=1).cpu()  # (B, D)
    if not torch.isfinite(x).all():
        raise FloatingPointError(f"The features are not finite, first noticed at step {step}")
    share = torch.linalg.svdvals(x.double() - x.double().mean(dim=0)).square()
    share = share / share.sum()
    spread = {
        "std": x.std(dim=0, correction=min(1, len(x) - 1)).mean().item(),  # 0 for a single clip
        "effective_rank": torch.special.entr(share.nan_to_num()).sum().exp().item(),
    }
    return {"eval_loss": draw(model, clips, out / f"recon_{step:06d}.png", blocks), "features": spread}


# ---- training ----


def train(config, model, source, checkpoint, Learner):
    """The training loop, from the checkpoint to the end or to a signal. Returns the signal, or None."""
    signals, out = catch_signals(), Path(config.out)
    steps, done = steps_of_stage(config, source), checkpoint["step"] if checkpoint else 0
    total, saved, ends = steps * model.stages, time.monotonic(), False
    if done == total:
        if processes()[0] == 0:
            print(f"{out} is finished: {done} of {total} steps")
            show_end(model, fixed_clips(config, model, source), out / "recon.mp4")
        return None
    learner = Learner(config, model, steps, checkpoint)
    leads = learner.rank == 0
    if leads:
        describe(config, model, source, total - done)
        clips = fixed_clips(config, model, source)
        belongs = {"settings": asdict(config), "data": source.fingerprint, "total": total}
        start_folder(out, model, new=checkpoint is None, **belongs)
    if config.compile:
        for part in [*model.blocks.values(), *model.decoders.values()]:
            part.compile()
    batches = learner.batches(source, done, total)

    log = Log(out / "log.jsonl" if leads else None, done, total)
    with log.bar:
        while not ends:
            lr = learner.begin(done)
            batch = log.next(batches, source)
            part, parts = learner.part
            masks = [index.tensor_split(parts)[part] for index in masks_of_step(config, model, done)]
            losses, norms = learner.step(batch["video"], *masks)
            done, log.clips = done + 1, log.clips + config.batch
            log.bar.update()
            stop, due = learner.agree(bool(signals), time.monotonic() - saved > SAVE_SECONDS)
            ends = done == total or stop
            draws = ends or done == 1 or done % max(1, total // 10) == 0
            logs = draws or done % min(50, max(1, total // 100)) == 0
            if logs or config.device == "cpu":  # on a GPU, looking at a number waits for it
                losses, norms = ({name: x.item() for name, x in values.items()} for values in (losses, norms))
                check_finite(losses, norms, done, lr, [source.name(index) for index in batch["index"]])
            if not logs:
                continue
            losses, norms = learner.collect(losses, norms)
            whole, optimizers = learner.whole() if draws or due else (None, None)
            if leads:
                epoch = round(done * config.batch / len(source), 4)
                record = {"step": done, "epoch": epoch, "lr": lr, "loss": losses, "grad_norm": norms}
                record |= log.rates()
                if draws:
                    trained = [name for group in whole.groups[: len(optimizers)] for name in group]
                    record.update(evaluate(whole, clips, out, done, trained))
                log.write(record)
                if ends or due:
                    save(out / "last.pt", whole, optimizers, step=done, **belongs)
                    saved = time.monotonic()
    if done == total and leads:
        show_end(whole, clips, out / "recon.mp4")
    learner.close()
    return (signals[0] if signals else signal.SIGTERM) if stop else None


def check_finite(losses, norms, step, lr, clips):
    """FloatingPointError that names the block, if a loss or gradient norm is not finite."""
    for name, norm in norms.items():
        loss = losses.get(name, 0.0)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"{name} is not finite, first noticed at step {step}: loss {loss}, gradient norm {norm}, lr "
                f"{lr}, clips {', '.join(clips)}"
            )


def catch_signals():
    """Ctrl-C and SIGTERM let the step finish and save; a second one ends at once. Returns those caught."""
    caught = []

    def catch(number, _):
        if caught:
            sys.exit(128 + number)
        caught.append(number)

    signal.signal(signal.SIGINT, catch)
    signal.signal(signal.SIGTERM, catch)
    return caught


def start_folder(out, model, *, new, **belongs):
    """Make the folder of a new run, with a checkpoint of step 0: from here on it can be resumed."""
    if new:
        data.check_output(out, folder=True)
        lock_folder(out)
        if (out / "last.pt").exists():
            raise ValueError(f"{out} is in use by a run that has just started; choose another --out.")
        save(out / "last.pt", model, [], step=0, **belongs)
    (out / "config.json").write_text(json.dumps(belongs["settings"], indent=1) + "\n")


def show_end(model, clips, path):
    """Write the video of a finished run and print its losses, if its decoders predict pixels."""
    losses = draw(model, clips, path, model.blocks)
    if losses:
        words = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        print(f"reconstruction loss by block, on {len(clips[0])} fixed clips: {words}")
        video, _, masked = clips
        target = normalized_targets(gather_tokens(model.patches(video), masked))[0]  # (B, M, P)
        mean = target.square().mean()  # near 1, but for flat tubelets
        print(f"  (predicting the mean of every tubelet gives {mean:.3f}; {path} shows it)")


def explain(error, config):
    """A sentence on an error in training that a user can do something about; else None."""
    kept = "No checkpoint was written"
    if (Path(config.out) / "last.pt").is_file():
        kept = f"The last checkpoint is kept; go on with --resume --out {shlex.quote(config.out)}"
    if isinstance(error, FloatingPointError):
        return f"{error}. Start anew with a lower --lr, --clip 1 or --dtype fp32. {kept}."
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error)):
        return f"Another process has ended, so all end. {kept}."
    if isinstance(error, (ConnectionError, EOFError)) or "DataLoader worker (pid" in str(error):
        fewer = f"--workers {config.workers // 2}"
        return f"A process that reads clips died, out of memory perhaps. {kept} {fewer}."
    if data.out_of_memory(error):
        return f"Out of memory. {kept} and more --decoder-slices, or start anew with a smaller --batch."
    if isinstance(error, OSError):  # a full disk, for example
        return f"{error}. {kept}."
    return None


@data.program()
def main(arguments=None, *, Config=Config, Learner=Learner, manual=__doc__):
    """Train as the command line says. Another Config and Learner train in another way, in the same loop."""
    config, given = parse(Config, manual, arguments)
    config, model, source, checkpoint = set_up(Config, config, given)
    try:
        stopped = train(config, model, source, checkpoint, Learner)
    except Exception as error:
        data.free_workers(error)
        if sentence := explain(error, config):
            data.fail(sentence, code=1)
        raise
    rank, count = processes()
    if rank == 0 and stopped:
        start = "python" if count == 1 else f"torchrun --nproc-per-node {count}"
        again = f"{start} {config.program} --resume --out {shlex.quote(config.out)}"
        print(f"stopped and saved; go on with: {again}", flush=True)
    elif rank == 0:
        command = ["python", "probe.py", config.out]
        if config.data:
            command += ["--data", config.data]
        if config.list:
            command += ["--train-list", config.list, "--test-list", "LIST"]
        elif config.data and len(source.classes) == 1:  # nothing to tell apart
            command += ["--features", "features.npz"]
        print(f"next, what can be read from the blocks: {shlex.join(command)}")
    if stopped:
        sys.exit(128 + stopped)


if __name__ == "__main__":
    main()
