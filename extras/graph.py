"""train.py with each step recorded once as a CUDA graph and replayed from then on: less time for small models.

A replay runs the same kernels, and so computes the same numbers, without Python and the launch of each kernel, which
take a GPU longer than the arithmetic of small models.

    python -m extras.graph --size tiny --data VIDEOS    # train.py's settings; one process, an NVIDIA GPU

After TIMED steps of either kind, it prints the time of a step without and with the graph.
"""

import time

import torch
from tqdm import tqdm

import data
import train
from blockwise import train_step

WARMUP, TIMED = 3, 20  # steps without the graph: before they are timed, and timed


class GraphStep:
    """train_step() as a CUDA graph, in place of train_step() in train.train(). Shapes must not change."""

    def __init__(self):
        self.optimizers = None

    def __call__(self, model, optimizers, video, visible, masked, *, config, step, steps, **settings):
        """As train_step(). What it returns is overwritten by the next call."""
        if optimizers is not self.optimizers:  # the first step of a run or of a stage
            torch.cuda.synchronize()  # the graph of the stage before may still be running
            self.optimizers, self.graph, self.count = optimizers, None, 0
            self.groups = [group for o in filter(None, optimizers) for group in o.param_groups]
            self.lr, self.start = torch.zeros((), device=video.device), None
        self.count += 1
        if self.count in (WARMUP + 1, WARMUP + TIMED + 1, WARMUP + 2 * TIMED + 1):
            self.print_time()
        if self.count <= WARMUP + TIMED:
            return self.usual_step(model, video, visible, masked, **settings)
        if self.graph is None:
            self.record(model, video, visible, masked, **settings)
        self.lr.fill_(self.groups[0]["lr"])
        for tensor, value in zip(self.batch, (video, visible, masked)):
            tensor.copy_(value)
        self.graph.replay()
        return self.result

    def usual_step(self, model, *batch, **settings):
        """One step without the graph. It allocates what lasts, on a stream of its own, as recording needs it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = train_step(model, self.optimizers, *batch, **settings)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def record(self, model, *batch, **settings):
        """Record the graph. AdamW reads its learning rate from a tensor then; afterwards it is as before."""
        lr, self.graph = self.groups[0]["lr"], torch.cuda.CUDAGraph()
        self.batch = [tensor.clone() for tensor in batch]
        for group in self.groups:
            group.update(lr=self.lr, capturable=True)
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.result = train_step(model, self.optimizers, *self.batch, **settings)
        for group in self.groups:  # as checkpoints hold it
            group.update(lr=lr, capturable=False)
        self.start = time.perf_counter()  # recording is not timed

    def print_time(self):
        """Print the mean time of the last TIMED steps."""
        torch.cuda.synchronize()
        if self.start is not None:
            kind = "with" if self.graph else "without"
            tqdm.write(
                f"{1000 * (time.perf_counter() - self.start) / TIMED:.2f} ms per step {kind} the graph"
            )
        self.start = time.perf_counter()


@data.user_errors()
def main(arguments=None):
    """Train as the command line says."""
    data.keep_freed_memory()
    config, given = train.parse(train.Config, __doc__, arguments)
    config, model, source, checkpoint = train.set_up(config, given)
    if not config.device.startswith("cuda") or torch.distributed.is_torchelastic_launched():
        raise ValueError("extras.graph needs an NVIDIA GPU and one process; use train.py.")
    with train.error_hint(config):
        train.train(config, model, source, checkpoint, GraphStep())


if __name__ == "__main__":
    main()
