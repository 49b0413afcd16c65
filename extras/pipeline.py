"""Simultaneous blockwise training with a process for each block.

No gradient crosses a block boundary (arXiv 2601.09040, Sec. 3.1), so nothing ever comes back: process k works on
a batch while process k - 1 works on the next one. The numbers are those of one process, bit for bit on a CPU
with as many threads.

    torchrun --nproc-per-node 4 -m extras.pipeline --blocks 4          # train.py's settings
    torchrun --nproc-per-node 4 -m extras.pipeline --resume --out RUN  # or train.py --resume, in one process

Process 0 reads the clips, trains block 1 and writes the run's files; clips and tokens are sent on from it.
Shapes as in model.py: B batch, T frames, H W pixels, C channels, V visible, D width.
"""

import collections
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import train
from blockwise import autocast, decoder_backward, make_optimizers, optimizer_step, save
from model import gather_tokens, normalized_targets

TOKENS, VIDEO, DECISION = 1, 2, 3  # kinds of message


class Neighbours:
    """Messages from the process before and to the process after this one."""

    def __init__(self, rank, count, device):
        self.rank, self.last, self.device, self.sent = rank, count - 1, device, collections.deque()

    def send(self, tensor, kind):
        """Start sending to the next process. A few messages may be under way, then a fast process waits."""
        if self.rank < self.last:
            tensor = tensor.contiguous()
            self.sent.append((dist.isend(tensor, self.rank + 1, tag=kind), tensor))
            while len(self.sent) > 6:
                self.sent.popleft()[0].wait()

    def receive(self, shape, dtype, kind):
        """Wait for a tensor from the process before."""
        tensor = torch.empty(shape, dtype=dtype, device="cpu" if kind == DECISION else self.device)
        dist.recv(tensor, self.rank - 1, tag=kind)
        return tensor

    def gather(self, value):
        """The values of all processes on process 0; [] elsewhere."""
        values = [None] * (self.last + 1) if self.rank == 0 else None
        dist.gather_object(value, values)
        return values or []

    def close(self):
        """Wait until everything sent has arrived, and for all processes."""
        for work, _ in self.sent:
            work.wait()
        dist.barrier()


def block_step(config, model, optimizer, neighbours, video, visible, masked):
    """Receive h_{k-1}, compute h_k, send it on; then the local loss and the optimizer step of block k = rank + 1.

    video: on rank 0, (B, T, H, W, C); None elsewhere. Returns (losses, norms) as train_step(), of this block.
    """
    rank, name = neighbours.rank, f"block{neighbours.rank + 1}"
    dtype = torch.bfloat16 if config.dtype == "bf16" else None
    if rank > 0:
        video = neighbours.receive((config.batch, *model.video, 3), torch.uint8, VIDEO)
    neighbours.send(video, VIDEO)
    patches = model.patches(video)  # (B, N, P)
    target = normalized_targets(gather_tokens(patches, masked))[0]  # (B, M, P)
    if rank == 0:
        h = gather_tokens(patches, visible)  # (B, V, P)
    else:
        h = neighbours.receive((*visible.shape, model.config["width"]), torch.float32, TOKENS)  # (B, V, D)
    with autocast(h, dtype):
        h = model.blocks[name](h, visible)  # (B, V, D)
    neighbours.send(h.detach(), TOKENS)
    loss, gradient = decoder_backward(
        model.decoders[name], h, visible, masked, target, slices=config.decoder_slices, dtype=dtype
    )
    h.backward(gradient)
    return {name: loss}, optimizer_step(model, [name], optimizer, grad_clip=config.grad_clip)


def whole_optimizers(model, optimizer, neighbours):
    """On process 0, take in what the other processes have learned: all optimizers. None elsewhere."""
    own = f"block{neighbours.rank + 1}"
    parts = (model.blocks[own], model.decoders[own], optimizer)
    states = neighbours.gather([part.state_dict() for part in parts])
    if not states:
        return None
    optimizers = make_optimizers(model)
    for name, block_optimizer, block_states in zip(model.blocks, optimizers, states):
        parts = (model.blocks[name], model.decoders[name], block_optimizer)
        for part, state in zip(parts, block_states):
            part.load_state_dict(state)
    return optimizers


def train_pipeline(config, model, source, checkpoint):
    """The loop of train.train(), of one block."""
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    is_main, out, signals = rank == 0, Path(config.out), train.catch_signals()
    neighbours = Neighbours(rank, count, config.device)
    total, first_step = train.steps_per_stage(config, source), checkpoint["step"] if checkpoint else 0
    states = checkpoint["optimizers"] if first_step else None
    optimizer = train.stage_optimizers(config, model, states=states)[rank]
    saved = train.checkpoint_entries(config, source, total)
    if is_main:
        length = f"{total - first_step} steps of {config.batch} clips, a process for each block"
        train.describe(config, model, source, length)
        clips, skipped = train.eval_clips(config, model, source), data.Skipped(source)
        log = train.open_folder(out, model, first_step, saved, new=checkpoint is None)
        batches = iter(
            data.train_loader(
                source,
                batch=config.batch,
                first=first_step,
                last=total,
                seed=config.seed,
                workers=config.workers,
            )
        )
    last_save, last_log, last_log_step, waited = time.monotonic(), time.perf_counter(), first_step, 0.0
    step, stopping, video, names = first_step, False, None, []
    with tqdm(total=total, initial=first_step, unit=" steps", mininterval=1, disable=not is_main) as bar:
        while step < total and not stopping:
            lr = train.learning_rate(config, step, total)
            for params in optimizer.param_groups:
                params["lr"] = lr
            if is_main:
                start = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - start
                for message in skipped.update(batch):
                    bar.write(message)
                video = batch["video"].to(config.device)  # (B, T, H, W, C)
                names = [source.name(index) for index in batch["index"]]
            visible, masked = train.step_masks(config, model, step)
            losses, norms = block_step(config, model, optimizer, neighbours, video, visible, masked)
            step += 1
            bar.update()

            # Process 0 decides whether to stop and save; the others hear of it after the same step.
            decision = torch.tensor(
                [bool(signals), time.monotonic() - last_save > 60 * config.save_every]
            ).byte()
            if not is_main:
                decision = neighbours.receive((2,), torch.uint8, DECISION)
            neighbours.send(decision, DECISION)
            stopping, save_due = map(bool, decision)

            last_step, should_evaluate, should_log = train.due(step, total, stopping)
            losses, norms = ({name: x.item() for name, x in values.items()} for values in (losses, norms))
            train.check_finite(losses, norms, step, names)
            if not should_log:
                continue
            blocks = neighbours.gather((losses, norms))
            if should_evaluate or save_due:
                optimizers = whole_optimizers(model, optimizer, neighbours)
            if is_main:
                record = {"step": step, "epoch": round(step * config.batch / len(source), 4), "lr": lr}
                for key, number in (("loss", 0), ("grad_norm", 1)):
                    record[key] = {name: value for block in blocks for name, value in block[number].items()}
                seconds = time.perf_counter() - last_log
                record |= train.rates(config.batch * (step - last_log_step), seconds, waited)
                if should_evaluate:
                    record |= train.evaluate(model, clips, out / f"recon_{step:06d}.png", list(model.blocks))
                log.write(json.dumps(record) + "\n")
                log.flush()
                if last_step or save_due:
                    save(out / "last.pt", model, optimizers, step=step, **saved)
                    last_save = time.monotonic()
                if should_evaluate:
                    if config.keep:
                        save(out / f"step_{step:06d}.pt", model, [], step=step, **saved)
                    bar.write(train.summary_line(record))
            last_log, last_log_step, waited = time.perf_counter(), step, 0.0
    neighbours.close()
    if is_main and not stopping:
        print(f"next, what the blocks represent: python probe.py {config.out}")
    if stopping:
        if is_main:
            command = f"torchrun --nproc-per-node {count} -m extras.pipeline --resume --out {config.out}"
            print(f"stopped and saved; go on with: {command}", flush=True)
        sys.exit(128 + (signals[0] if signals else 15))


@data.user_errors()
def main(arguments=None):
    """Train as the command line says."""
    data.keep_freed_memory()
    config, given = train.parse(train.Config, __doc__, arguments)
    # Every process computes whole batches.
    config, model, source, checkpoint = train.set_up(config, given, world_size=1)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if config.regime != "simultaneous" or config.blocks == 1 or config.compile:
        raise ValueError("extras.pipeline is for --regime simultaneous, K > 1 and no --compile.")
    if count != config.blocks:
        raise ValueError(
            f"extras.pipeline needs a process for each of {config.blocks} blocks, not {count}; start it with: "
            f"torchrun --nproc-per-node {config.blocks} -m extras.pipeline --blocks {config.blocks} ..."
        )
    with train.error_hint(config):
        train_pipeline(config, model, source, checkpoint)


if __name__ == "__main__":
    main()
