"""Time, arithmetic and memory of a training step, by regime and by number of blocks.

    python -m extras.bench --size tiny --batch 16          # about 3 minutes on 2 CPU cores
    python -m extras.bench --size tiny --batch 16 --peer   # compare with Hugging Face's VideoMAE

The clips are noise. The steps of all rows alternate, so that each row sees the same load of the machine.
saved MB: peak of the activations that autograd saves for backward. state MB: weights, gradients and AdamW's two
moments. peak MB, on CUDA: of the allocator. utilisation: FLOP/s as a share of those of a large matrix product.

The second table compares, for every K, the saved activations of a simultaneous step with those of one backward
pass through the sum of all local losses.
"""

import contextlib
import math
import time
import weakref
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from blockwise import REGIMES, Blockwise, autocast, local_loss, make_optimizers, train_step
from data import check_writable, keep_freed_memory, pick_device, user_errors, write_json
from model import SIZES, gather_tokens, normalized_targets
from train import Config, default_slices, step_masks

MB = 2**20
DTYPES = {"fp32": None, "bf16": torch.bfloat16}  # as train_step() takes them


def train_config(args, **more):
    """The settings of train.py that the command line describes."""
    names = ("size", "batch", "device", "decoder_depth", "decode_ratio")
    return Config(**{name: getattr(args, name) for name in names}, **more)


def noise_batch(args, model):
    """A batch of noise and its masks: (video, visible, masked)."""
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(256, (args.batch, *model.video, 3), dtype=torch.uint8, generator=generator)
    return video.to(args.device), *step_masks(train_config(args), model, 0)


def blockwise_case(args, regime, blocks):
    """(model, optimizers, a training step without arguments); sequential: its last stage, the most expensive."""
    torch.manual_seed(0)
    shape = train_config(args, regime=regime, blocks=blocks).model_arguments()
    model = Blockwise(**shape).to(args.device).train()
    optimizers = make_optimizers(model, stage=model.stages - 1)
    batch, options = noise_batch(args, model), {"dtype": DTYPES[args.dtype], "slices": args.decoder_slices}
    return model, optimizers, lambda: train_step(model, optimizers, *batch, **options)


def hugging_face_case(args):
    """The same as blockwise_case() for Hugging Face's VideoMAE in the shape of --size."""
    try:
        from transformers import VideoMAEConfig, VideoMAEForPreTraining
    except ImportError:
        raise ValueError("--peer needs transformers: run pip install transformers first.") from None
    e2e = Blockwise(**train_config(args, regime="e2e").model_arguments())
    shape = {"tubelet_size": e2e.tubelet[0], "patch_size": e2e.tubelet[1]}
    shape |= {"num_frames": e2e.video[0], "image_size": e2e.video[1]}
    for part in ("", "decoder_"):
        width, heads, depth = (e2e.config[f"{part}{name}"] for name in ("width", "heads", "depth"))
        shape |= {f"{part}hidden_size": width, f"{part}intermediate_size": 4 * width}
        shape |= {f"{part}num_attention_heads": heads, f"{part}num_hidden_layers": depth}
    model = VideoMAEForPreTraining(VideoMAEConfig(**shape)).to(args.device).train()
    video, _, masked = noise_batch(args, e2e)
    mask = torch.zeros(args.batch, math.prod(e2e.grid), dtype=torch.bool, device=args.device)  # (B, N)
    mask.scatter_(1, masked, True)
    pixels = (video.permute(0, 1, 4, 2, 3) / 255 - 0.45) / 0.225  # (B, T, C, H, W)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with autocast(pixels, DTYPES[args.dtype]):
            loss = model(pixels, bool_masked_pos=mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, [optimizer], step


@contextlib.contextmanager
def saved_bytes(model):
    """Count the bytes of tensors that autograd saves for backward, without weights: {"now": n, "peak": n}.

    Tensors that share a storage count once.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    count, references = {"now": 0, "peak": 0}, Counter()  # references: to a storage, by its address

    class Saved:
        """Holds a tensor until autograd releases it."""

    def release(address, size):
        references[address] -= 1
        count["now"] -= 0 if references[address] else size

    def pack(tensor):
        saved, storage = Saved(), tensor.untyped_storage()
        saved.tensor, address, size = tensor.detach(), storage.data_ptr(), storage.nbytes()
        if address not in weights:
            count["now"] += 0 if references[address] else size
            references[address] += 1
            count["peak"] = max(count["peak"], count["now"])
            weakref.finalize(saved, release, address, size)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield count


def time_steps(steps, rounds, device):
    """Seconds of every step in every round, {name: (rounds,)}, after two rounds of warm-up."""
    seconds = {name: [] for name in steps}
    for _ in tqdm(range(2 + rounds), "rounds", leave=False):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device != "cpu":
                getattr(torch, device.partition(":")[0]).synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values[2:]) for name, values in seconds.items()}


def step_costs(model, optimizers, step, device):
    """GFLOP and memory of one step, by column of the table."""
    # FLOPs are counted in matrix products, which fused attention would hide.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    with saved_bytes(model) as saved:
        step()
    groups = [group for optimizer in optimizers if optimizer for group in optimizer.param_groups]
    trained = sum(p.numel() for group in groups for p in group["params"])
    state = 4 * (sum(p.numel() for p in model.parameters()) + 3 * trained)
    costs = {"GFLOP": counter.get_total_flops() / 1e9, "saved MB": saved["peak"] / MB, "state MB": state / MB}
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        step()
        costs["peak MB"] = torch.cuda.max_memory_allocated() / MB
    return costs


def measure_steps(args, cases):
    """The first table, {name: {column: value}}, and the GFLOP/s of a matrix product."""
    a = torch.randn(2048, 2048, device=args.device, dtype=DTYPES[args.dtype] or torch.float32)
    steps = {name: step for name, (*_, step) in cases.items()} | {"product": lambda: a @ a}
    seconds = time_steps(steps, args.rounds, args.device)
    speed = 2 * len(a) ** 3 / 1e9 / float(np.median(seconds["product"]))
    rows = {}
    for name, case in cases.items():
        ms = 1e3 * float(np.median(seconds[name]))
        rows[name] = {"ms": ms, "time / e2e": float(np.median(seconds[name] / seconds["e2e"]))}
        rows[name] |= {"clips/s": 1e3 * args.batch / ms} | step_costs(*case, args.device)
        rows[name]["utilisation"] = rows[name]["GFLOP"] / ms * 1e3 / speed
    return rows, speed


def summed_loss(model, video, visible, masked):
    """The sum of all local losses in one graph, whose gradients are those of train_step()."""
    patches, total = model.patches(video), 0.0  # (B, N, P)
    target = normalized_targets(gather_tokens(patches, masked))[0]  # (B, M, P)
    h = gather_tokens(patches, visible)  # (B, V, P)
    for name, block in model.blocks.items():
        h = block(h.detach() if REGIMES[model.config["regime"]].stop_gradient else h, visible)  # (B, V, D)
        if name in model.decoders:
            total = total + local_loss(model.decoders[name](h, visible, masked), target)
    return total


def measure_blocks(args):
    """The second table, saved MB by K: {K: {"summed loss": value, "block by block": value}}."""
    rows = {}
    for blocks in tqdm((1, 2, 3, 4, 6, 12), "memory by K", leave=False):
        model, _, step = blockwise_case(args, "simultaneous", blocks)
        clips = min(4, args.batch)  # the sum's memory is proportional to them
        with saved_bytes(model) as summed, autocast(next(model.parameters()), DTYPES[args.dtype]):
            summed_loss(model, *(tensor[:clips] for tensor in noise_batch(args, model)))
        with saved_bytes(model) as stepwise:
            step()
        rows[blocks] = {"summed loss": summed["peak"] / MB * args.batch / clips}
        rows[blocks]["block by block"] = stepwise["peak"] / MB
    return rows


@user_errors()
def main(arguments=None):
    """Measure, write bench.json, print the tables."""
    layout = {"formatter_class": RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = ArgumentParser(description=__doc__, **layout)
    add = parser.add_argument
    add("--size", choices=SIZES, default="nano", help="model [nano]")
    add("--blocks", type=int, default=4, help="K [4]")
    add("--batch", type=int, default=16, help="clips in a step [16]")
    add("--decoder-depth", type=int, help="as in train.py")
    add("--decoder-slices", type=int, help="as in train.py")
    add("--decode-ratio", type=float, default=1.0, help="as in train.py [1]")
    add("--dtype", choices=DTYPES, default="fp32", help="bf16: autocast [fp32]")
    add("--device", default="auto", help="auto, cpu, cuda [auto]")
    add("--rounds", type=int, default=15, help="timed steps of each row [15]")
    add("--peer", action="store_true", help="compare e2e with Hugging Face's VideoMAE, nothing else")
    add("--out", type=Path, default=Path("runs/bench"), help="folder of bench.json [runs/bench]")
    args = parser.parse_args(arguments)
    keep_freed_memory()
    args.device = pick_device(args.device)
    args.decoder_slices = args.decoder_slices or default_slices(args.batch, args.device)
    if args.peer and args.decode_ratio < 1:
        raise ValueError("Hugging Face's VideoMAE predicts all masked tokens; leave out --decode-ratio.")
    check_writable(args.out, folder=True)

    cases = {"e2e": blockwise_case(args, "e2e", args.blocks)}
    for name, regime in REGIMES.items():
        if name != "e2e" and not args.peer:
            cases[f"{name}, last stage" if regime.staged else name] = blockwise_case(args, name, args.blocks)
    if args.peer:
        cases["Hugging Face"] = hugging_face_case(args)
    rows, speed = measure_steps(args, cases)
    by_blocks = {} if args.peer else measure_blocks(args)
    arguments = vars(args) | {"out": str(args.out)}
    results = {"arguments": arguments, "torch": torch.__version__, "steps": rows, "saved MB by K": by_blocks}
    write_json(args.out / "bench.json", results)

    print(f"{args.size}, K = {args.blocks}, batch {args.batch}, {args.device}, {args.dtype}")
    print(f"torch {torch.__version__}; a large matrix product runs at {speed:.0f} GFLOP/s")
    print(f"{'':22}" + "".join(f"{column:>12}" for column in rows["e2e"]))
    for name, row in rows.items():
        print(f"{name:22}" + "".join(f"{value:12.{2 if value < 10 else 0}f}" for value in row.values()))
    if by_blocks:
        print("\nsaved MB by K " + "".join(f"{blocks:>9}" for blocks in by_blocks))
        for method in ("summed loss", "block by block"):
            print(f"{method:14}" + "".join(f"{row[method]:9.1f}" for row in by_blocks.values()))
    print(f"\n{args.out}/bench.json")


if __name__ == "__main__":
    main()
