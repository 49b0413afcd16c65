"""Simultaneous blockwise training with a process for each block.

No gradient crosses a block boundary (arXiv 2601.09040, Sec. 3.1), so nothing ever comes back: process k works on
a batch while process k - 1 works on the next one. The numbers are those of one process, bit for bit on a CPU
with as many threads.

    torchrun --nproc-per-node 4 pipeline.py --blocks 4          # train.py's settings
    torchrun --nproc-per-node 4 pipeline.py --resume --out RUN  # or train.py, in one process

Process 0 reads the clips, trains block 1 and writes the run's files; clips and tokens flow down from it.
Shapes as in model.py: B batch, T frames, H W pixels, C channels, V visible, D width.
"""

import collections
import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist

import train
from blockwise import autocast, decoder_backward, make_optimizers, optimizer_step
from model import gather_tokens, normalized_targets

TOKENS, VIDEO, CODE = 1, 2, 3  # kinds of message


@dataclass
class Config(train.Config):
    """train.py's settings."""

    program: ClassVar[str] = "-m extras.pipeline"


class Pipeline(train.Learner):
    """Rank k - 1 trains block k with its decoder and AdamW, on tokens that rank k - 2 sends."""

    def __init__(self, config, model, steps, checkpoint=None):
        count = train.processes()[1]
        if config.regime != "simultaneous" or config.blocks == 1 or config.compile or config.graph:
            raise ValueError("pipeline.py is for --regime simultaneous, K > 1, no --compile and no --graph.")
        if count != config.blocks:
            raise ValueError(
                f"pipeline.py wants a process for each of {config.blocks} blocks, not {count}; start it by: "
                f"torchrun --nproc-per-node {config.blocks} pipeline.py --blocks {config.blocks} ..."
            )
        super().__init__(config, model, steps, checkpoint)
        self.last, self.sent = count - 1, collections.deque()

    @property
    def part(self):
        """Batches are not shared out."""
        return 0, 1

    def load_optimizers(self, states):
        """Keep this rank's state only."""
        super().load_optimizers(states)
        self.optimizers = [o if k == self.rank else None for k, o in enumerate(self.optimizers)]

    def batches(self, source, first, last):
        """Only rank 0 reads clips."""
        if self.rank == 0:
            return super().batches(source, first, last)
        return itertools.repeat({"video": None, "index": [], "missing": 0, "broken": {}})

    def step(self, video, visible, masked):
        """Receive h_{k-1}, compute h_k, send it on; then the local loss and the optimizer step of block k."""
        c, name, dtype = self.config, f"block{self.rank + 1}", self.step_settings()["dtype"]
        shape = (c.batch, *self.model.video, 3)
        video = video.to(c.device) if self.rank == 0 else self.receive(shape, torch.uint8, VIDEO)
        self.send(video, VIDEO)
        patches = self.model.patches(video)  # (B, N, P)
        target = normalized_targets(gather_tokens(patches, masked))[0]  # (B, M, P)
        if self.rank == 0:
            h = gather_tokens(patches, visible)  # (B, V, P)
        else:
            h = self.receive((*visible.shape, self.model.config["width"]), torch.float32, TOKENS)  # (B, V, D)
        with autocast(h, dtype):
            h = self.model.blocks[name](h, visible)  # (B, V, D)
        self.send(h.detach(), TOKENS)
        local = (self.model.decoders[name], h, visible, masked, target)
        loss, gradient = decoder_backward(*local, slices=c.decoder_slices, dtype=dtype)
        h.backward(gradient)
        return {name: loss}, optimizer_step(self.model, [name], self.optimizers[self.rank], clip=c.clip)

    def agree(self, stop, due):
        """Rank 0 decides; the others hear of it after the same step."""
        code = torch.tensor([stop, due], dtype=torch.uint8)
        if self.rank > 0:
            code = self.receive((2,), torch.uint8, CODE)
        self.send(code, CODE)
        return tuple(map(bool, code))

    def collect(self, losses, norms):
        """Those of all blocks, on rank 0."""
        found = self.gather((losses, norms))
        return [{name: value for part in found for name, value in part[i].items()} for i in range(2)]

    def whole(self):
        """For pictures and checkpoints, rank 0 takes in what the others have learned."""
        model, mine = self.model, f"block{self.rank + 1}"
        parts = (model.blocks[mine], model.decoders[mine], self.optimizers[self.rank])
        found = self.gather([part.state_dict() for part in parts])
        if not found:
            return model, None
        optimizers = make_optimizers(model)
        for name, optimizer, states in zip(model.blocks, optimizers, found):
            for part, state in zip((model.blocks[name], model.decoders[name], optimizer), states):
                part.load_state_dict(state)
        return model, optimizers

    def close(self):
        """Wait until everything sent has arrived, and for all."""
        for work, _ in self.sent:
            work.wait()
        super().close()

    # ---- messages ----

    def send(self, tensor, kind):
        """Start sending to the next process. At most a few messages are under way: a fast process waits."""
        if self.rank < self.last:
            tensor = tensor.contiguous()
            self.sent.append((dist.isend(tensor, self.rank + 1, tag=kind), tensor))
            while len(self.sent) > 6:
                self.sent.popleft()[0].wait()

    def receive(self, shape, dtype, kind):
        """Wait for a tensor from the process before."""
        tensor = torch.empty(shape, dtype=dtype, device="cpu" if kind == CODE else self.config.device)
        dist.recv(tensor, self.rank - 1, tag=kind)
        return tensor

    def gather(self, value):
        """What all ranks give, on rank 0; [] elsewhere."""
        found = [None] * (self.last + 1) if self.rank == 0 else None
        dist.gather_object(value, found)
        return found or []


def main(arguments=None):
    """Train as the command line says."""
    train.main(arguments, Config=Config, Learner=Pipeline, manual=__doc__)


if __name__ == "__main__":
    main()
