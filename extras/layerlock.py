"""LayerLock: a video masked autoencoder whose layers freeze one after the other, shallow ones first.

Erdogan et al., "LayerLock: Non-collapsing Representation Learning with Progressive Freezing", ICCV 2025, arXiv
2509.10156. Layers converge shallow-first. So: some steps of end-to-end training with pixel targets; then, every
few steps, freeze the next layer and predict, instead of pixels, what the newest frozen layer makes of the whole
clip; stop at two thirds of the layers. Sequential blockwise training (blockwise.py) is the other end of this
axis: blocks of many layers, all epochs for each before it is frozen, a fresh decoder for each, pixels
throughout.

    python layerlock.py                          # 12 blocks of one layer each, latent targets
    python layerlock.py --target pixels          # freezing alone: cheaper, the target stays pixels
    python layerlock.py --freeze-start -1        # the control: nothing frozen; the paper's collapses
    python layerlock.py --help                   # train.py's settings and those of the schedule

Shapes as in model.py: B batch, N tokens, V visible, M masked, D width, K blocks.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import train
from blockwise import autocast, decoder_backward, optimizer_step, trainable
from model import gather_tokens, normalized_targets
from train import option


def layerlock_step(
    model, optimizer, video, visible, masked, *, frozen, target, dtype=None, clip=None, slices=1, reduce=None
):
    """One step of an e2e model whose blocks 1..frozen are fixed, towards the output of block `target`.

    target: 0 for pixels. Frozen blocks build no graph. The other arguments, and what is returned: train_step()'s.
    """
    patches, names = model.patches(video), list(model.blocks)  # (B, N, P)
    if target:
        wanted = latent_target(model, patches, masked, target, dtype)  # (B, M, D)
    else:
        wanted = normalized_targets(gather_tokens(patches, masked))[0]  # (B, M, P)
    h = gather_tokens(patches, visible)  # (B, V, P)
    for k, name in enumerate(names):
        with torch.set_grad_enabled(k >= frozen), autocast(h, dtype):
            h = model.blocks[name](h, visible)  # (B, V, D)
    decoder = model.decoders[name]
    loss, gradient = decoder_backward(decoder, h, visible, masked, wanted, slices=slices, dtype=dtype)
    h.backward(gradient)
    return {name: loss}, optimizer_step(model, names[frozen:], optimizer, clip=clip, reduce=reduce)


@torch.no_grad()
def latent_target(model, patches, masked, target, dtype=None):
    """What block `target` makes of the whole clip, at the masked positions: (B, M, D), without a gradient.

    patches: (B, N, P). Squared error to it is the loss; a single target is as good as several.
    """
    # Paper does not say: whether the target is normalised. Ours is, token by token, as no two layers have the
    # same scale. Nor that no gradient reaches it.
    h, everything = patches, torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)
    with autocast(patches, dtype):
        for name in list(model.blocks)[:target]:
            h = model.blocks[name](h, everything)  # (B, N, D)
    return gather_tokens(F.layer_norm(h.float(), h.shape[-1:]), masked)  # (B, M, D)


def freeze_schedule(step, *, start, every, until):
    """How many blocks are frozen at a step: none before `start`, then one more every `every` steps.

    until: the most. start -1: none ever. every 0: all at once.
    """
    if start < 0 or step < start:
        return 0
    return min(until, 1 + (step - start) // every) if every else until


def freeze_blocks(model, optimizer, *, frozen, target=0):
    """Fix blocks 1..frozen from now on, and make the decoder fit to predict the output of block `target`.

    What still learns keeps its AdamW state; that of the frozen blocks is freed. When the target changes from
    pixels to a block's output, the decoder gets a new head of that width, drawn from torch's random state.
    """
    # Paper does not say: where the new head comes from.
    width, names = model.config["width"], list(model.blocks)
    decoder = model.decoders[names[-1]]
    if target and model.config["decoder_values"] is None:
        device = decoder.head.weight.device
        decoder.head = nn.Linear(model.config["decoder_width"], width)
        nn.init.xavier_uniform_(decoder.head.weight)
        nn.init.zeros_(decoder.head.bias)
        decoder.head.to(device)
        model.config["decoder_values"] = width
    learning = [p for name in names[frozen:] for p in trainable(model, name)]
    matrices, vectors = optimizer.param_groups
    matrices["params"] = [p for p in learning if p.ndim > 1]
    vectors["params"] = [p for p in learning if p.ndim <= 1]
    for p in optimizer.state.keys() - set(learning):
        del optimizer.state[p]


# ---- the program: train.py's loop with another learner ----


@dataclass
class Config(train.Config):
    """train.py's settings, and the schedule."""

    program: ClassVar[str] = "-m extras.layerlock"
    regime: Literal["layerlock"] = option("layerlock", "the only one here")
    blocks: int = option(12, "K, what is frozen at a time; the paper's is one layer", least=2, most=1000)
    target: Literal["latent", "pixels"] = option(
        "latent", "once a block is frozen: its output, or still pixels"
    )
    freeze_start: int | None = option(
        None, "steps before block 1 freezes; -1: none ever (1/3 of all)", least=-1
    )
    freeze_every: int | None = option(None, "steps to the next; 0: all at once (so that all fit)", least=0)
    freeze_until: int | None = option(None, "blocks frozen in the end (2/3 of K, if they fit)", least=1)

    def folder(self):
        """Runs of another target have another name."""
        unfrozen = "-unfrozen" if self.freeze_start == -1 else ""
        return super().folder().replace("-layerlock-", f"-layerlock-{self.target}{unfrozen}-")

    def model_arguments(self):
        """The network is that of end-to-end training."""
        return super().model_arguments() | {"regime": "e2e"}


class LayerLock(train.Learner):
    """An e2e model, of which the schedule freezes one block after the other."""

    def __init__(self, config, model, steps, checkpoint=None):
        if config.graph:
            raise ValueError("layerlock.py changes what it trains, which a graph cannot; leave out --graph.")
        resolve_schedule(config, steps)
        self.now = (0, 0)  # blocks frozen, and the block whose output is the target; 0: pixels
        super().__init__(config, model, steps, checkpoint)

    def frozen(self, step):
        """Blocks that are frozen at a step."""
        c = self.config
        return freeze_schedule(step, start=c.freeze_start, every=c.freeze_every, until=c.freeze_until)

    def make_ready(self, step):
        """Freeze, and change the target, as the schedule says for a step."""
        super().make_ready(step)
        frozen = target = self.frozen(step)
        if self.config.freeze_start == -1:  # the control. Paper does not say: its target, and from when on.
            target = self.config.freeze_until
        if self.config.target == "pixels":
            target = 0
        if (frozen, target) != self.now:
            torch.manual_seed(self.config.seed)  # of the new head: the same after resuming
            freeze_blocks(self.model, self.optimizers[0], frozen=frozen, target=target)
            self.now = (frozen, target)

    def learning_rate(self, step):
        """With a short warm-up after each switch."""
        # Paper does not say: how long that warm-up is, and whether freezing alone has one. Ours has; it is the
        # same share as at the start.
        c, frozen = self.config, self.frozen(step)
        warm = round(c.warmup * (c.freeze_every or self.steps - c.freeze_start))
        since = step - c.freeze_start - c.freeze_every * (frozen - 1)
        return super().learning_rate(step) * (min(1, (since + 1) / warm) if frozen and warm else 1)

    def step(self, video, visible, masked):
        """As in train.Learner."""
        frozen, target = self.now
        batch = (video.to(self.config.device), visible, masked)
        settings = self.step_settings() | {"frozen": frozen, "target": target}
        return layerlock_step(self.model, self.optimizers[0], *batch, **settings)


def resolve_schedule(config, steps):
    """Fill in what was left open of the schedule, and print it. ValueError if it does not fit the run."""
    # Scaled from the paper's ViT-G: 160K steps of pixels, then 32 of 48 layers, one every 10K steps.
    if config.freeze_start is None:
        config.freeze_start = steps // 3
    if config.freeze_until is None:
        fit = math.ceil((steps - config.freeze_start) / (config.freeze_every or 1))
        config.freeze_until = max(1, min(round(2 / 3 * config.blocks), fit))
    if config.freeze_every is None:
        every = max(1, (steps - config.freeze_start) // config.freeze_until)
        config.freeze_every = every if config.freeze_start >= 0 else 0
    start, every, until = config.freeze_start, config.freeze_every, config.freeze_until
    last = start + every * (until - 1)
    if until >= config.blocks:
        fix = "lower --freeze-until or raise --blocks"
        raise ValueError(f"{config.blocks} blocks cannot freeze {until} and learn; {fix}.")
    if start >= 0 and last >= steps:
        fix = "lower --freeze-start or --freeze-every"
        raise ValueError(f"The last block would freeze at step {last}, after the run's {steps}; {fix}.")
    if start == -1 and every:
        raise ValueError("With --freeze-start -1 nothing ever freezes; leave out --freeze-every.")
    if start == -1 and config.target == "pixels":
        fix = "leave out --freeze-start or --target"
        raise ValueError(f"Pixel targets with nothing frozen are train.py --regime e2e; {fix}.")
    how = f"every {every} steps" if every else "all at once"
    when = f"from step {start} on, {how}, until {until} are frozen" if start >= 0 else "never"
    if train.processes()[0] == 0:
        tqdm.write(f"blocks freeze {when}; target: {config.target}")


def main(arguments=None):
    """Train as the command line says."""
    train.main(arguments, Config=Config, Learner=LayerLock, manual=__doc__)


if __name__ == "__main__":
    main()
