"""Train a video vision transformer block by block, on generated clips or on a folder of videos.

    python train.py --blocks 4                                           # generated clips, minutes on a CPU
    python train.py --blocks 4 --data VIDEOS --stride 2 --short repeat   # your own videos
    python train.py --size tiny --data UCF-101 --list trainlist01.txt    # the paper's recipe, for a GPU
    torchrun --nproc-per-node 2 train.py ...                             # each batch split over two processes
    python train.py --resume --out runs/NAME                             # go on with a stopped run

Römer & Dickscheid, arXiv 2601.09040, Sec. 3. The method is train_step() in blockwise.py; train() feeds it.
"""

import contextlib
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import traceback
import types
import typing
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import ClassVar, Literal

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
from blockwise import (
    REGIMES,
    Blockwise,
    copy_weights,
    count_parameters,
    load,
    local_loss,
    make_optimizers,
    objective,
    save,
    train_step,
)
from model import SIZES, gather_tokens, normalized_targets, tube_mask, unpatchify

# tiny and small: the paper's recipe (Sec. 3.2, 3.4). Paper does not say: batch size. nano and base are ours.
RECIPES = {
    "nano": {"steps": 3000, "batch": 16, "lr": 1e-3},
    "tiny": {"epochs": 150, "batch": 128, "lr": 1e-4},
    "small": {"epochs": 300, "batch": 128, "lr": 1e-4},
    "base": {"epochs": 300, "batch": 128, "lr": 1e-4},
}
EVAL_CLIPS = 32  # used for eval_loss and the pictures
UNFINISHED = ("last.pt.tmp", "frames.json")  # of a run that has not begun to train

MANUAL = """
What a run writes into its folder:
  config.json   all settings
  log.jsonl     a line every few steps: step, epoch, lr, and by block loss and grad_norm of this batch (the
                gradient norm of a block and its decoder); at step 1 and ten times more also eval_loss, the
                loss by block on fixed clips (eval_clips says which; in fp32, all masked tokens), and mean_loss,
                the loss of predicting the target's mean everywhere; clips_per_s; wait, the fraction of time
                spent waiting for clips; memory_mb, the most memory of the GPU used so far
  recon_*.png   one of these clips at the same steps; from the top: input, visible tubelets, target, what every
                decoder predicts, and the last prediction with the true mean and contrast of each tubelet
  last.pt       the checkpoint: read it with blockwise.load()
  frames.json   frames of every video, so that --resume, probe.py and analyze.py need not look at the files again

If something goes wrong:
  The loss stays near mean_loss: normal for the first 700 to 1,000 steps of the default run, on videos longer.
  Stopped, killed, disk full: --resume goes on from the last checkpoint (--save-every: a minute).
  Slow on a CPU that other programs use: set OMP_NUM_THREADS=1 and --workers 0.
  Not enough memory: more --decoder-slices, a smaller --batch, fewer --workers.
  High wait in the log: more --workers.
  Two runs of one seed are equal on a CPU, for any number of workers and stops. They may differ between
  machines, numbers of threads or processes, versions of torch, and on a GPU.
"""


# ---- settings ----


def option(default, help, **limits):
    """A setting: its default, its line in --help, and the limits of its value (least, most, above, below)."""
    return field(default=default, metadata={"help": help, "limits": limits})


@dataclass
class Config:
    """All settings of a run. Each field is a flag of the same name; None: chosen by size or machine."""

    program: ClassVar[str] = "train.py"

    size: Literal[tuple(SIZES)] = option("nano", "model: tiny and small are the paper's, nano suits a laptop")
    blocks: int = option(
        4, "K, blocks of the encoder; in e2e: only where features are read", least=1, most=1000
    )
    regime: Literal[tuple(REGIMES)] = option("simultaneous", "which loss trains which block (Sec. 3.1)")
    decoder_depth: int | None = option(None, "layers of each local decoder (paper: 4; nano: 1)", least=1)
    frames: int | None = option(None, "frames of a clip (paper: 16)", least=1)
    pixels: int | None = option(None, "height and width of a clip (paper: 128; nano: 64)", least=1)
    tubelet: tuple[int, int, int] | None = option(
        None, "frames, rows, columns of one token (paper: 8 16 16; nano: 8 8 8)", least=1
    )
    mask: float = option(0.9, "fraction of the tubes that is masked", above=0, below=1)
    decode_ratio: float = option(
        1.0, "fraction of the masked tokens to predict in training, at random", above=0, most=1
    )

    data: str | None = option(None, "folder of videos; without it, clips are generated")
    list: str | None = option(None, "file of lines `path [label]`, relative to --data: train on these only")
    eval_list: str | None = option(None, "such a file of held-out videos, for eval_loss and the pictures")
    stride: int = option(4, "take every stride-th frame of a video", least=1)
    short: Literal["drop", "repeat"] = option(
        "drop", "videos shorter than frames x stride: leave them out, or repeat their last frame"
    )
    flip: bool = option(True, "mirror half of the clips left to right; not for labels with a direction")

    epochs: float | None = option(None, "passes over the data (paper: 150, 300), in each stage", above=0)
    steps: int | None = option(None, "optimizer steps instead, in each stage (nano: 3000)", least=1)
    batch: int | None = option(None, "clips in one optimizer step (tiny, small: 128; nano: 16)", least=1)
    decoder_slices: int | None = option(
        None, "a decoder runs on so many slices of a batch, to save memory", least=1
    )
    lr: float | None = option(None, "highest learning rate (paper: 1e-4; nano: 1e-3)", above=0)
    min_lr: float = option(1e-6, "learning rate at the end of the cosine", least=0)
    warmup: float = option(0.1, "fraction of the steps with rising learning rate", least=0, below=1)
    weight_decay: float = option(0.05, "AdamW's, of weight matrices only", least=0)
    beta1: float = option(0.9, "AdamW's, of the mean gradient", least=0, below=1)
    beta2: float = option(0.95, "AdamW's, of the mean squared gradient", least=0, below=1)
    grad_clip: float = option(0.0, "largest gradient norm of each isolated block; 0: no limit", least=0)
    seed: int = option(0, "of weights, data order and masks", least=0, below=2**32)

    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "fp32", "bf16"] = option("auto", "bf16: autocast; auto is bf16 on cuda, else fp32")
    compile: bool = option(False, "torch.compile blocks and decoders")
    workers: int | None = option(None, "processes that read clips (default: by the cores)", least=0, most=256)
    init: str | None = option(None, "run folder or checkpoint whose weights a new run starts from")
    save_every: float = option(1.0, "minutes between checkpoints", least=0)
    keep: bool = option(False, "keep the weights of each evaluation, as step_000300.pt and so on")
    out: str | None = option(None, "folder of the run (default: runs/NAME, named after the settings)")
    resume: bool = option(False, "go on with the run in --out, from its checkpoint, with its settings")

    def folder(self):
        """Default of --out: named after size, regime, K, data and seed."""
        videos = f"-{Path(self.data).resolve().name}" if self.data else ""
        seed = f"-seed{self.seed}" if self.seed else ""
        return f"runs/{self.size}-{self.regime}-{self.blocks}{videos}{seed}"

    def model_arguments(self):
        """Arguments of Blockwise."""
        size = dict(SIZES[self.size], blocks=self.blocks, regime=self.regime)
        T, H, W = size["video"]
        size["video"] = (self.frames or T, self.pixels or H, self.pixels or W)
        size["tubelet"] = self.tubelet or size["tubelet"]
        return size | ({"decoder_depth": self.decoder_depth} if self.decoder_depth else {})


# Settings that may change when a run is resumed: they say where it runs and where its files are.
MAY_CHANGE = {
    "resume",
    "out",
    "device",
    "workers",
    "save_every",
    "data",
    "list",
    "eval_list",
    "decoder_slices",
}


def flag(name):
    """Field name to command-line flag."""
    return "--" + name.replace("_", "-")


def parse(Config, manual, arguments=None):
    """Command line to (Config, names of the settings given)."""
    parser = ArgumentParser(
        description=manual,
        epilog=MANUAL,
        usage="%(prog)s [--SETTING VALUE ...]",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = typing.get_type_hints(Config)
    for f in fields(Config):
        kind = kinds[f.name]
        if isinstance(kind, types.UnionType):  # X | None
            kind = kind.__args__[0]
        choices = typing.get_args(kind)
        if kind is bool:
            argument = {"action": BooleanOptionalAction}
        elif typing.get_origin(kind) is Literal:
            argument = {"choices": choices}
        else:
            argument = {"type": choices[0] if choices else kind, "nargs": len(choices) or None}
            argument["metavar"] = "TEXT" if kind is str else "N"
        help = f.metadata["help"] + (f" [{f.default}]" if f.default is not None else "")
        parser.add_argument(flag(f.name), default=SUPPRESS, help=help, **argument)
    given = vars(parser.parse_args(arguments))
    for f in fields(Config):
        values = given.get(f.name)
        for value in values if isinstance(values, list) else [values]:
            check_limits(flag(f.name), value, **f.metadata["limits"])
    if "tubelet" in given:
        given["tubelet"] = tuple(given["tubelet"])
    if {"steps", "epochs"} <= given.keys():
        raise ValueError("--steps and --epochs both say how long to train; give one of them.")
    return Config(**given), set(given)


def check_limits(name, value, *, least=-math.inf, most=math.inf, above=-math.inf, below=math.inf):
    """ValueError with the limits, if a number lies outside of them, is infinite or nan."""
    if value is None or isinstance(value, (str, bool)):
        return
    if not (math.isfinite(value) and least <= value <= most and above < value < below):
        limits = {"at least": least, "at most": most, "more than": above, "less than": below}
        words = [f"{word} {limit}" for word, limit in limits.items() if math.isfinite(limit)]
        raise ValueError(f"{name} {value} must be {' and '.join(words) or 'a finite number'}.")


# ---- the start of a run ----


def set_up(config, given, source=None, world_size=None):
    """All that comes before training: (config, model, source, checkpoint or None).

    source: clips of your own in place of --data, see data.py. world_size: processes that split a batch,
    those of torchrun if None. Raises ValueError, one sentence with the fix.
    """
    config.out, model, checkpoint = config.out or config.folder(), None, None
    if config.resume:
        config, model, checkpoint = resume(config, given)
    out = Path(config.out)
    if not config.resume and out.is_dir() and any(f.name not in UNFINISHED for f in out.iterdir()):
        fix = "go on with its run by --resume, or " if (out / "last.pt").is_file() else ""
        raise ValueError(f"{out} is not empty; {fix}name another --out.")
    for name in ("list", "eval_list", "stride", "short"):
        if name in given and not config.data:
            raise ValueError(f"{flag(name)} is for videos; leave it out, or name their folder with --data.")
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    resolve_defaults(config, world_size or processes)
    if processes > 1:
        backend = "cpu:gloo,cuda:nccl" if config.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    if model is None:
        torch.manual_seed(config.seed)
        model = Blockwise(**config.model_arguments())
        if config.init:
            copied, new = copy_weights(load(config.init)[0], model)
            print(f"from {config.init}: {', '.join(copied)}; new: {', '.join(new) or 'nothing'}")
    tube_mask(1, model.grid, config.mask)  # raises if the ratio does not fit the grid
    if source is None and not config.data:
        source = data.Scenes(video=model.video)
    if source is None:
        if rank > 0:
            dist.barrier()  # until process 0 has looked at the files, and written frames.json
        source = open_videos(config, model, config.list)
        if rank == 0 and processes > 1:
            dist.barrier()
    if checkpoint and checkpoint["data"] != source.fingerprint:
        raise ValueError(f"{out} was started on other clips; restore them, or name another --out.")
    return config, model.to(config.device).train(), source, checkpoint


def resume(config, given):
    """(settings, model, checkpoint) of the run in --out. Only the settings of MAY_CHANGE may differ."""
    model, checkpoint = load(config.out)
    saved = checkpoint["settings"]
    if saved.get("program") != config.program:
        fix = f"resume it with: python {saved['program']}" if "program" in saved else "start a new run"
        raise ValueError(f"{config.out} is not a run of {config.program}; {fix}.")
    for name in given - MAY_CHANGE:
        if getattr(config, name) not in (saved[name], "auto"):
            raise ValueError(
                f"{config.out} was started with {flag(name)} {saved[name]}, not {getattr(config, name)}; "
                f"leave it out, or start another run with --out (--init {config.out}: from its weights)."
            )
    if checkpoint["objective"] != objective():
        raise ValueError(f"{config.out} was started with another loss or target; name another --out.")
    settings = {name: value for name, value in saved.items() if name not in ("program", "source")}
    settings["device"], settings["workers"] = config.device, config.workers
    settings |= {name: getattr(config, name) for name in MAY_CHANGE & given}
    return type(config)(**settings), model, checkpoint


def resolve_defaults(config, world_size=1):
    """Fill in the settings that were left open: device, dtype, workers, the recipe of the size."""
    config.device = data.pick_device(config.device)
    if config.device == "cuda" and "LOCAL_RANK" in os.environ:  # of torchrun
        config.device = f"cuda:{os.environ['LOCAL_RANK']}"
    cuda = config.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(torch.device(config.device).index or 0)
    if config.dtype == "auto":  # Paper does not say: the precision.
        config.dtype = "bf16" if cuda else "fp32"
    if config.workers is None:
        config.workers = data.default_workers()
        if not (cuda and config.data):  # the training step needs the cores as well
            config.workers = max(1, config.workers // 2)
    length_given = config.steps or config.epochs
    for name, value in RECIPES[config.size].items():
        if getattr(config, name) is None and not (name in ("steps", "epochs") and length_given):
            setattr(config, name, value)
    if config.min_lr > config.lr:
        raise ValueError(f"--min-lr {config.min_lr} is more than --lr {config.lr}; lower it.")
    if config.batch % world_size:
        raise ValueError(
            f"{config.batch} clips cannot be split equally over {world_size} processes; change --batch."
        )
    if config.decoder_slices is None:
        config.decoder_slices = default_slices(config.batch // world_size, config.device)


def default_slices(clips, device):
    """Slices of eight clips on a CPU, the fastest there, fp32 and bf16; a GPU's memory is seldom short."""
    return math.ceil(clips / 8) if device == "cpu" else 1


def open_videos(config, model, list_file):
    """The videos of --data, or those that a list names."""
    rules = {"stride": config.stride, "short": config.short, "flip": config.flip}
    counts_file = Path(config.out) / "frames.json"
    return data.Videos(config.data, list_file=list_file, video=model.video, counts_file=counts_file, **rules)


def steps_per_stage(config, source):
    """Optimizer steps of a run; in the sequential regime, of each stage."""
    return config.steps or max(1, math.ceil(config.epochs * len(source) / config.batch))


def describe(config, model, source, length):
    """Print what is trained, on what, where and for how long."""
    cuda = config.device.startswith("cuda")
    hardware = torch.cuda.get_device_name() if cuda else f"CPU threads: {torch.get_num_threads()}"
    print(f"{config.out}: {config.size}, {config.regime}, K = {config.blocks}")
    print(f"device: {config.device} ({hardware}), {config.dtype}")
    videos = isinstance(source, data.Videos)
    print(source.summary() if videos else f"data: {len(source)} clips of {type(source).__name__}")
    counts = ", ".join(f"{name} {count:,}" for name, count in count_parameters(model).items())
    print(f"parameters: {counts}")
    print(length, flush=True)


# ---- what a step needs ----


def learning_rate(config, step, steps):
    """Cosine (Sec. 3.4) over the steps of a stage, after a linear warm-up."""
    # Paper does not say: warm-up and final rate. Both are ours.
    warmup_steps = round(config.warmup * steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))
    return config.min_lr + (config.lr - config.min_lr) * cosine


def step_masks(config, model, step):
    """Tube masks of one step's batch, a pure function of (seed, step): indices (B, V) and (B, M)."""
    seed = int(np.random.SeedSequence((config.seed, 2, step)).generate_state(1)[0])
    generator = torch.Generator().manual_seed(seed)
    visible, masked = tube_mask(config.batch, model.grid, config.mask, generator)
    if config.decode_ratio < 1:
        # Differs from paper: VideoMAE V2's saving (arXiv 2303.16727); decoders get and predict only these.
        count = max(1, round(config.decode_ratio * masked.shape[1]))
        kept = torch.rand(masked.shape, generator=generator).argsort(dim=1)[:, :count]
        masked = masked.gather(1, kept.sort(dim=1).values)
    return visible.to(config.device), masked.to(config.device)


def average(tensors):
    """Replace tensors by their mean over the processes, in one message."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(mean.view_as(tensor))


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


def stage_optimizers(config, model, stage=0, states=None):
    """Optimizers of a stage: new ones, or with the states of a checkpoint."""
    betas = (config.beta1, config.beta2)
    optimizers = make_optimizers(
        model, stage=stage, lr=config.lr, betas=betas, weight_decay=config.weight_decay
    )
    for optimizer, state in zip(optimizers, states, strict=True) if states else ():
        if optimizer is not None:
            optimizer.load_state_dict(state)
    return optimizers


def due(step, total, stopping):
    """What is done after a step: (is it the last one, evaluate and draw, log)."""
    last_step = step == total or stopping
    should_evaluate = last_step or step == 1 or step % max(1, total // 10) == 0
    return last_step, should_evaluate, should_evaluate or step % min(50, max(1, total // 100)) == 0


# ---- the training loop ----


def train(config, model, source, checkpoint=None, step_function=None):
    """Train from the checkpoint, or from the beginning, to the last step, or to Ctrl-C or SIGTERM.

    The other arguments are what set_up() returns. step_function: called in place of train_step(), with its
    arguments and, by name, config, step and steps.
    """
    # Processes: under torchrun, each computes one slice of every batch, and averages the gradients of a block.
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    distributed, is_main = world_size > 1, rank == 0
    cuda = config.device.startswith("cuda")
    steps = steps_per_stage(config, source)
    step, total = checkpoint["step"] if checkpoint else 0, steps * model.stages
    first_step, out, signals = step, Path(config.out), catch_signals()
    step_settings = {
        "dtype": torch.bfloat16 if config.dtype == "bf16" else None,
        "grad_clip": config.grad_clip,
        "slices": config.decoder_slices,
        "reduce": average if distributed else None,
    }

    if step == total:
        if is_main:
            print(f"{out} is finished: {step} of {total} steps")
        return

    # The folder of the run, with a checkpoint of step 0: from here on it can be resumed.
    saved = checkpoint_entries(config, source, total)
    if is_main:
        split = f", split over {world_size} processes" if distributed else ""
        describe(config, model, source, f"{total - step} steps of {config.batch} clips{split}")
        clips = eval_clips(config, model, source)
        log = open_folder(out, model, step, saved, new=checkpoint is None)
    if config.compile:
        for module in [*model.blocks.values(), *model.decoders.values()]:
            module.compile()

    loader_settings = {"workers": config.workers, "rank": rank, "world_size": world_size, "pin_memory": cuda}
    batches = data.train_loader(
        source, batch=config.batch, first=step, last=total, seed=config.seed, **loader_settings
    )
    batches, skipped = iter(batches), data.Skipped(source)
    last_save, last_log, last_log_step, waited = time.monotonic(), time.perf_counter(), step, 0.0
    stopping, saving = False, None
    bar = tqdm(total=total, initial=step, unit=" steps", mininterval=1, disable=not is_main)
    with bar, ThreadPoolExecutor(1) as writer:
        while step < total and not stopping:
            # Stage and optimizers: new ones at the beginning of every stage, else those of the checkpoint.
            if step == first_step or step % steps == 0:
                states = checkpoint["optimizers"] if step % steps else None
                optimizers = stage_optimizers(config, model, step // steps, states)

            # Learning rate: the same for all blocks.
            lr = learning_rate(config, step % steps, steps)
            for optimizer in filter(None, optimizers):
                for params in optimizer.param_groups:
                    params["lr"] = lr

            # Batch: this process's slice; videos that cannot be read are named once.
            start = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - start
            for message in skipped.update(batch):
                bar.write(message)
            video = batch["video"].to(config.device, non_blocking=True)  # (B, T, H, W, C)

            # Masks: one per clip, shared by all blocks.
            visible, masked = (
                index.tensor_split(world_size)[rank] for index in step_masks(config, model, step)
            )

            # Step: the method, in blockwise.py.
            if step_function is None:
                losses, norms = train_step(model, optimizers, video, visible, masked, **step_settings)
            else:
                progress = {"config": config, "step": step, "steps": steps}
                losses, norms = step_function(
                    model, optimizers, video, visible, masked, **progress, **step_settings
                )
            step += 1
            bar.update()

            # Stop? A signal to one process stops all.
            stopping = bool(signals)
            if distributed:
                signalled = torch.tensor(int(stopping))
                dist.all_reduce(signalled, op=dist.ReduceOp.MAX)
                stopping = bool(signalled)

            # What is due after this step. Looking at a number waits for a GPU, so only then.
            last_step, should_evaluate, should_log = due(step, total, stopping)
            should_save = is_main and (last_step or time.monotonic() - last_save > 60 * config.save_every)
            if should_log or should_save or config.device == "cpu":
                losses, norms = ({name: x.item() for name, x in values.items()} for values in (losses, norms))
                check_finite(losses, norms, step, [source.name(index) for index in batch["index"]])
            if should_log and distributed:  # losses of the whole batch
                means = torch.tensor(list(losses.values()), dtype=torch.float64)
                average([means])
                losses = dict(zip(losses, means.tolist()))

            # Log and picture.
            if should_log and is_main:
                record = {"step": step, "epoch": round(step * config.batch / len(source), 4)}
                record |= {"lr": optimizers[-1].param_groups[0]["lr"], "loss": losses, "grad_norm": norms}
                record |= rates(config.batch * (step - last_log_step), time.perf_counter() - last_log, waited)
                if should_evaluate:
                    trained = [name for group in model.groups[: len(optimizers)] for name in group]
                    record |= evaluate(model, clips, out / f"recon_{step:06d}.png", trained)
                log.write(json.dumps(record) + "\n")
                log.flush()
                last_log, last_log_step, waited = time.perf_counter(), step, 0.0

            # Checkpoint: after the log, before anything is printed. It is written while training goes on.
            if should_save:
                if saving:
                    saving.result()  # raises what went wrong
                saving = save(out / "last.pt", model, optimizers, step=step, writer=writer, **saved)
                last_save = time.monotonic()
            if should_evaluate and is_main:
                if config.keep:
                    save(out / f"step_{step:06d}.pt", model, [], step=step, **saved)
                bar.write(summary_line(record))
            if should_log:
                bar.set_postfix_str("loss " + " ".join(f"{loss:.3f}" for loss in losses.values()))

    # The end.
    if is_main:
        saving.result()
    if distributed:
        dist.barrier()
        if cuda:
            dist.destroy_process_group()
    if stopping and is_main:
        command = f"python {config.program}" if world_size == 1 else f"torchrun ... {config.program}"
        print(
            f"stopped and saved; go on with: {command} --resume --out {shlex.quote(config.out)}", flush=True
        )
    if stopping:
        sys.exit(128 + (signals[0] if signals else signal.SIGTERM))
    if is_main:
        print(f"next, what the blocks represent: python probe.py {shlex.quote(config.out)}")


def check_finite(losses, norms, step, clips):
    """Raise FloatingPointError if a loss or gradient norm is not finite."""
    for name, norm in norms.items():
        loss = losses.get(name, 0.0)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"{name} is not finite at step {step} or before: loss {loss}, gradient norm {norm}, clips "
                f"{', '.join(clips)}. Start anew with a lower --lr, --grad-clip 1 or --dtype fp32."
            )


def rates(clips, seconds, waited):
    """What the log says of the speed since its last line, and of memory."""
    speed = {"clips_per_s": round(clips / seconds, 1), "wait": round(waited / seconds, 4)}
    cuda = torch.cuda.is_available()
    return speed | ({"memory_mb": round(torch.cuda.max_memory_allocated() / 2**20)} if cuda else {})


def checkpoint_entries(config, source, total):
    """What every checkpoint of a run says of its settings, clips and length: arguments of save()."""
    own = {"source": type(source).__name__} if not isinstance(source, (data.Videos, data.Scenes)) else {}
    settings = asdict(config) | {"program": config.program} | own
    return {"settings": settings, "data": source.fingerprint, "total": total}


def open_folder(out, model, step, saved, *, new):
    """Make the folder of a run, a new one with a checkpoint of step 0; returns its log, to append to."""
    out.mkdir(parents=True, exist_ok=True)
    if new:
        save(out / "last.pt", model, [], step=0, **saved)
    (out / "config.json").write_text(json.dumps(saved["settings"], indent=1) + "\n")
    return open_log(out / "log.jsonl", step)


def open_log(path, step):
    """log.jsonl, to append to, without the lines after `step`: a resumed run writes them again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    numbers = [re.match(r'\{"step": (\d+),', line) for line in lines]
    kept = [line for line, number in zip(lines, numbers) if number and int(number[1]) <= step]
    data.write_file(path, lambda file: file.write("".join(kept).encode()))
    return open(path, "a")


def summary_line(record):
    """What the screen says of a line of the log that has an evaluation."""
    clips = f"on {record['eval_clips']} (mean predictor {record['mean_loss']:.3f})"
    if not record["eval_loss"]:  # no decoder predicts pixels
        clips = "of the batch"
    losses = record["eval_loss"] or record["loss"]
    words = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    speed = f"{record['clips_per_s']:.0f} clips/s, {record['wait']:.0%} of the time waiting for clips"
    return f"step {record['step']}: loss {clips}: {words}; lr {record['lr']:.1e}; {speed}"


# ---- evaluation during training, and pictures ----


def eval_clips(config, model, source):
    """(video, visible, masked, their name) of fixed clips: held out if they are generated or of --eval-list."""
    name = "held-out clips"
    if isinstance(source, data.Scenes):
        source = data.Scenes("test", video=model.video)
    elif config.eval_list:
        training, source = source, open_videos(config, model, config.eval_list)
        if shared := source.shared(training):
            raise ValueError(
                f"{len(shared)} videos of --eval-list are trained on, as {shared[0]}; take others."
            )
    else:
        name = "training clips"
    indices = np.linspace(0, len(source) - 1, min(EVAL_CLIPS, len(source))).astype(int).tolist()
    [batch] = data.eval_loader(source, indices=indices, batch=len(indices))
    if not batch["index"]:  # videos that cannot be read are named as soon as training meets them
        raise ValueError(f"None of {len(indices)} videos that were tried can be read.")
    count = len(batch["index"])
    generator = torch.Generator().manual_seed(config.seed)
    masks = tube_mask(count, model.grid, config.mask, generator)
    return *(tensor.to(config.device) for tensor in (batch["video"], *masks)), f"{count} {name}"


@torch.no_grad()
def evaluate(model, clips, path, trained):
    """What the log says of fixed clips; the middle one is drawn into the file `path`. trained: block names.

    Returns eval_loss by block ({} if decoders predict something else than pixels), eval_clips, and mean_loss, the
    loss of predicting the target's mean everywhere.
    """
    video, visible, masked, clips_name = clips
    target, mean, std = normalized_targets(gather_tokens(model.patches(video), masked))  # (B, M, P)
    predictions = model.reconstruct(video, visible, masked)
    predictions = {name: predictions[name] for name in trained if name in predictions}
    losses = {name: local_loss(prediction, target).item() for name, prediction in predictions.items()}
    mean_loss = local_loss(target.mean().expand_as(target), target).item()
    if predictions:
        i = slice(len(video) // 2, len(video) // 2 + 1)
        clip = (video[i], visible[i], masked[i], target[i], mean[i], std[i])
        write_png(path, picture(model, *clip, [prediction[i] for prediction in predictions.values()]))
    return {"eval_loss": losses, "eval_clips": clips_name, "mean_loss": mean_loss}


def picture(model, video, visible, masked, target, mean, std, predictions):
    """Rows of frames of one clip, as an image (height, width, C) uint8. Small frames are enlarged.

    From the top: input, visible tubelets, target, prediction of every decoder, and the last prediction once more
    with the true mean and contrast of each tubelet. The rows before it are of normalised values, as in the loss.
    """
    patches = model.patches(video)  # (1, N, P)
    dark = torch.full_like(patches, 24)

    def frames(tokens, index, background=dark):
        tokens = tokens.float().clamp(0, 255).to(background.dtype)
        filled = background.scatter(1, index.unsqueeze(-1).expand_as(tokens), tokens)
        return unpatchify(filled, model.video, model.tubelet)[
            0, :: max(1, model.video[0] // 8)
        ]  # (n, H, W, C)

    last = predictions[-1].float().unflatten(-1, (-1, 3)) * std + mean  # (1, M, P/3, 3)
    rows = [video[0, :: max(1, model.video[0] // 8)], frames(gather_tokens(patches, visible), visible)]
    rows += [frames(127.5 + 50 * tokens, masked) for tokens in (target, *predictions)]
    rows += [frames(255 * last.flatten(2), masked, patches)]
    zoom = max(1, 128 // model.video[1])
    rows = [row.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2) for row in rows]
    rows = [F.pad(row, (0, 0, 0, 4, 0, 4)).permute(1, 0, 2, 3).flatten(1, 2) for row in rows]  # 4: the gap
    return torch.cat(rows).cpu().numpy()


def write_png(path, image):
    """Write an image (H, W, C) uint8 as a PNG file."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = frame.width, frame.height, "rgb24", 1
    Path(path).write_bytes(b"".join(bytes(packet) for packet in codec.encode(frame) + codec.encode(None)))


# ---- command line ----


@contextlib.contextmanager
def error_hint(config):
    """Around training: an error prints its traceback, and then one line that says how to resume."""
    try:
        yield
    except Exception as error:
        if data.is_user_error(error):
            raise
        traceback.print_exc()
        if (Path(config.out) / "last.pt").is_file():
            command = f"python {config.program} --resume --out {shlex.quote(config.out)}"
            print(f"Go on from the last checkpoint with: {command}", file=sys.stderr)
        sys.exit(1)


@data.user_errors()
def main(arguments=None, *, source=None, step_function=None):
    """Train as the command line says.

    source: clips of your own in place of --data, see data.py. step_function: as for train().
    """
    data.keep_freed_memory()
    config, given = parse(Config, __doc__, arguments)
    config, model, source, checkpoint = set_up(config, given, source)
    with error_hint(config):
        train(config, model, source, checkpoint, step_function)


if __name__ == "__main__":
    main()
