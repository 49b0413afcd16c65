"""What a training step costs: time, arithmetic and memory, by regime and by number of blocks.

    python bench.py --size tiny --batch 16          # about 3 minutes on 2 CPU cores
    python bench.py --size tiny --batch 16 --peer   # beside Hugging Face's VideoMAE on the same clips

The steps of all cases take turns in one process, so that all see the same machine; clips are noise. Where a
decoder runs in slices, e2e comes once more with all clips at once. Memory is counted, not sampled: activations
that autograd saves for backward, at their peak; and weights, gradients and AdamW's two moments (state). On a
GPU the allocator's peak stands beside them. Then, for every K, the saved activations of a simultaneous step and
of the obvious way, which sums the local losses and goes backward once.
"""

import contextlib
import json
import math
import time
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.compiler import set_stance
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from blockwise import REGIMES, Blockwise, autocast, make_optimizers, train_step
from data import Parser, check_output, number, pick_device, program
from model import SIZES, gather_tokens, normalized_targets
from train import Config, Graph, default_slices, masks_of_step


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


def summed_loss(model, video, visible, masked):
    """The sum of all local losses in one graph: the obvious way, which train_step() is compared with."""
    patches, total = model.patches(video), 0.0  # (B, N, P)
    target = normalized_targets(gather_tokens(patches, masked))[0]  # (B, M, P)
    h, isolated = gather_tokens(patches, visible), REGIMES[model.config["regime"]].stop_gradient  # (B, V, P)
    for name, block in model.blocks.items():
        h = block(h.detach() if isolated else h, visible)  # (B, V, D)
        if name in model.decoders:
            total = total + F.mse_loss(model.decoders[name](h, visible, masked), target)
    return total


def precision(args):
    """What train_step() takes as dtype."""
    return torch.bfloat16 if args.dtype == "bf16" else None


def noise(args, model):
    """A batch to compute on: (video, visible, masked)."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch, *model.video, 3)
    video = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return [video.to(args.device), *masks_of_step(settings(args), model, 0)]


def settings(args, **more):
    """train.py's settings of what is timed."""
    names = ("size", "batch", "device", "decoder_depth", "decode_ratio")
    return Config(**{name: getattr(args, name) for name in names}, **more)


def case(args, regime, blocks, slices):
    """(model, its training step as a function without arguments) of one row of the table."""
    torch.manual_seed(0)
    shape = settings(args, regime=regime, blocks=blocks).model_arguments()
    model = Blockwise(**shape).to(args.device).train()
    optimizers = make_optimizers(model, stage=model.stages - 1)  # sequential: its last stage, the dearest
    batch = noise(args, model)
    if args.compile:
        for part in [*model.blocks.values(), *model.decoders.values()]:
            part.compile()

    options = {"dtype": precision(args), "slices": slices}

    def step():
        train_step(model, optimizers, *batch, **options)

    step.learning, step.timed = learning(optimizers), step
    if args.graph:
        graph = Graph(model, optimizers, **options)
        for _ in range(4):  # the fourth is recorded
            graph.step(*batch)
        step.timed = lambda: graph.step(*batch)
    return model, step


def learning(optimizers):
    """Number of weights that optimizers train."""
    groups = [group for optimizer in filter(None, optimizers) for group in optimizer.param_groups]
    return sum(p.numel() for group in groups for p in group["params"])


def peer_case(args):
    """case() for Hugging Face's VideoMAE in the shape of --size: the peer that people train today."""
    try:
        from transformers import VideoMAEConfig, VideoMAEForPreTraining
    except ImportError:
        raise ValueError("--peer needs transformers; install it with: pip install transformers") from None
    ours = Blockwise(**settings(args, regime="e2e").model_arguments())
    c, (video, _, masked) = ours.config, noise(args, ours)
    theirs = {"tubelet_size": ours.tubelet[0], "patch_size": ours.tubelet[1]}
    theirs |= {"num_frames": ours.video[0], "image_size": ours.video[1]}
    for part in ("", "decoder_"):
        width, heads, depth = (c[f"{part}{name}"] for name in ("width", "heads", "depth"))
        theirs |= {f"{part}hidden_size": width, f"{part}intermediate_size": 4 * width}
        theirs |= {f"{part}num_attention_heads": heads, f"{part}num_hidden_layers": depth}
    model = VideoMAEForPreTraining(VideoMAEConfig(**theirs)).to(args.device).train()
    mask = torch.zeros(args.batch, math.prod(ours.grid), dtype=torch.bool, device=args.device)
    mask.scatter_(1, masked, True)
    pixels = video.permute(0, 1, 4, 2, 3).float() / 255  # (B, T, C, H, W)
    pixels = (pixels - 0.45) / 0.225
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with autocast(pixels, precision(args)):
            loss = model(pixels, bool_masked_pos=mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step.learning, step.timed = learning([optimizer]), step
    return model, step


def time_in_turn(steps, rounds, device):
    """Seconds of every step, {name: [rounds]}; two more rounds come first, to warm up."""
    seconds = {name: [] for name in steps}
    for _ in tqdm(range(2 + rounds), "rounds", leave=False):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device != "cpu":
                getattr(torch, device.partition(":")[0]).synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[2:] for name, values in seconds.items()}


def costs(model, step, device):
    """FLOPs, megabytes of saved activations, of state, and of a GPU's peak for one step."""
    # Fused attention and compiled code would hide FLOPs from the counter.
    with sdpa_kernel(SDPBackend.MATH), set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        step()
    with saved_bytes(model) as saved:
        step()
    found = {"GFLOP": counter.get_total_flops() / 1e9, "saved MB": saved["peak"] / 2**20}
    weights = sum(p.numel() for p in model.parameters())
    found["state MB"] = 4 * (weights + 3 * step.learning) / 2**20
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        step()
        found["peak MB"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def saved_by_blocks(args):
    """Megabytes of saved activations for every K: {K: {"summed": of the obvious way, "block by block": ours}}."""
    found = {}
    for blocks in tqdm((1, 2, 3, 4, 6, 12), "memory by K", leave=False):
        model, step = case(args, "simultaneous", blocks, args.slices)
        few = min(4, args.batch)  # what the obvious way saves grows with the clips
        with saved_bytes(model) as summed, autocast(torch.empty(0, device=args.device), precision(args)):
            summed_loss(model, *(x[:few] for x in noise(args, model)))
        with saved_bytes(model) as stepwise:
            step()
        found[blocks] = {"summed": summed["peak"] / 2**20 * args.batch / few}
        found[blocks]["block by block"] = stepwise["peak"] / 2**20
    return found


def benchmark(args):
    """Print the tables; write bench.json."""
    cases = {"e2e": case(args, "e2e", args.blocks, args.slices)}
    if args.peer:
        cases["Hugging Face"] = peer_case(args)
    else:
        if args.slices > 1:
            cases["e2e, decoder at once"] = case(args, "e2e", args.blocks, 1)
        for name, regime in REGIMES.items():
            title = f"{name}, last stage" if regime.staged else name
            cases[title] = case(args, name, args.blocks, args.slices)
    a = torch.randn(2048, 2048, device=args.device, dtype=precision(args) or torch.float32)
    steps = {name: step.timed for name, (_, step) in cases.items()} | {"product": lambda: a @ a}
    seconds = time_in_turn(steps, args.rounds, args.device)
    rate = 2 * len(a) ** 3 / 1e9 / float(np.median(seconds["product"]))  # the machine's own
    print(f"{args.size}, K = {args.blocks}, batch {args.batch}, {args.device}, {args.dtype}")
    print(f"torch {torch.__version__}; a large matrix product runs at {rate:.0f} GFLOP/s")
    found, e2e = {}, np.array(seconds["e2e"])
    for name, (model, step) in cases.items():
        ms = 1e3 * float(np.median(seconds[name]))
        found[name] = {"ms": ms, "time / e2e": float(np.median(np.array(seconds[name]) / e2e))}
        found[name]["clips/s"] = 1e3 * args.batch / ms
        found[name].update(costs(model, step, args.device))
        found[name]["of the rate"] = found[name]["GFLOP"] / ms * 1e3 / rate
    print(f"{'':22}" + "".join(f"{column:>12}" for column in found["e2e"]))
    for name, row in found.items():
        print(f"{name:22}" + "".join(f"{value:12.{2 if value < 10 else 0}f}" for value in row.values()))
    written = {"arguments": vars(args), "torch": torch.__version__, "steps": found}
    if not args.peer:
        with set_stance("force_eager"):  # compiling pays for what is timed
            written["saved MB by K"] = saved_by_blocks(args)
        print("\nsaved MB by K" + "".join(f"{blocks:>9}" for blocks in written["saved MB by K"]))
        for way in ("summed", "block by block"):
            rows = written["saved MB by K"].values()
            print(f"{way:14}" + "".join(f"{row[way]:9.1f}" for row in rows))
    (args.out / "bench.json").write_text(json.dumps(written, indent=1, default=str) + "\n")
    print(f"\n{args.out}/bench.json")


@program()
def main(arguments=None):
    """Measure what the command line says."""
    flags = Parser(__doc__)
    flags.add_argument("--size", choices=SIZES, default="nano", help="model [nano]")
    flags.add_argument("--blocks", type=number(least=1), default=4, help="K [4]")
    flags.add_argument("--batch", type=number(least=1), default=16, help="clips in a step [16]")
    flags.add_argument("--decoder-depth", type=number(least=1), help="as train.py [of the size]")
    share = number(float, above=0, most=1)
    flags.add_argument("--decode-ratio", type=share, default=1.0, help="as train.py [1]")
    flags.add_argument("--slices", type=number(least=1), help="of the batch in a decoder [as train.py]")
    flags.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast [fp32]")
    flags.add_argument("--device", default="auto", help="auto, cpu, cuda [auto]")
    flags.add_argument("--compile", action="store_true", help="torch.compile blocks and decoders")
    flags.add_argument("--graph", action="store_true", help="time train.py --graph, on an NVIDIA GPU")
    flags.add_argument("--rounds", type=number(least=1), default=15, help="timed steps of each [15]")
    flags.add_argument("--peer", action="store_true", help="beside Hugging Face's VideoMAE instead")
    flags.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder [runs/bench]")
    args = flags.parse_args(arguments)
    args.device = pick_device(args.device)
    args.slices = args.slices or default_slices(args.batch, args.device)
    if args.graph and not args.device.startswith("cuda"):
        raise ValueError("--graph is for an NVIDIA GPU; leave it out.")
    if args.peer and (args.decode_ratio < 1 or args.compile or args.graph):
        raise ValueError("With --peer, leave out --decode-ratio, --compile and --graph.")
    check_output(args.out, folder=True)
    benchmark(args)


if __name__ == "__main__":
    main()
