"""LayerLock: a video masked autoencoder whose layers freeze one after the other, shallow ones first.

Erdogan et al., "LayerLock: Non-collapsing Representation Learning with Progressive Freezing", ICCV 2025, arXiv
2509.10156. Layers converge shallow-first. So: some steps of end-to-end training with pixel targets; then, every
few steps, freeze the next layer and predict, instead of pixels, the output of the newest frozen layer for the
whole clip; stop at two thirds of the layers. Sequential blockwise training (blockwise.py) is the limit of this:
blocks of several layers, each trained to the end before it is frozen, a new decoder for each, pixel targets.

    python -m extras.layerlock                          # 12 blocks of one layer each, latent targets
    python -m extras.layerlock --target pixels          # freezing alone: cheaper, the target stays pixels
    python -m extras.layerlock --freeze-start -1        # the control: nothing frozen; the paper's collapses
    python -m extras.layerlock --help                   # train.py's settings and those of the schedule

Shapes as in model.py: B batch, N tokens, V visible, M masked, P values in one tubelet, D width, K blocks.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

import data
import train
from blockwise import autocast, block_params, decoder_backward, optimizer_step
from model import gather_tokens, normalized_targets
from train import option

# ---- the method ----


def masked_step(
    model, optimizer, video, visible, masked, *, frozen, target, dtype, grad_clip, slices, reduce
):
    """One step of an e2e model whose blocks 1..frozen are fixed, towards the output of block `target`.

    target: 0 for pixels. Frozen blocks build no graph. The other arguments, and the result, are train_step()'s.
    """
    patches, names = model.patches(video), list(model.blocks)  # (B, N, P)
    if target:
        targets = latent_target(model, patches, masked, target, dtype)  # (B, M, D)
    else:
        targets = normalized_targets(gather_tokens(patches, masked))[0]  # (B, M, P)
    h = gather_tokens(patches, visible)  # (B, V, P)
    for k, name in enumerate(names):
        with torch.set_grad_enabled(k >= frozen), autocast(h, dtype):
            h = model.blocks[name](h, visible)  # (B, V, D)
    decoder = model.decoders[name]
    loss, gradient = decoder_backward(decoder, h, visible, masked, targets, slices=slices, dtype=dtype)
    h.backward(gradient)
    norms = optimizer_step(model, names[frozen:], optimizer, grad_clip=grad_clip, reduce=reduce)
    return {name: loss}, norms


@torch.no_grad()
def latent_target(model, patches, masked, target, dtype=None):
    """The output of block `target` for the whole clip, at the masked positions: (B, M, D), without a gradient.

    patches: (B, N, P). The loss is the squared error to it; a single target is as good as several.
    """
    # Paper does not say: whether the target is normalised. Ours is, token by token, as no two layers have the
    # same scale. Nor that no gradient reaches it.
    h, places = patches, torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)
    with autocast(patches, dtype):
        for name in list(model.blocks)[:target]:
            h = model.blocks[name](h, places)  # (B, N, D)
    return gather_tokens(F.layer_norm(h.float(), h.shape[-1:]), masked)  # (B, M, D)


def frozen_blocks(step, *, start, every, until):
    """Number of frozen blocks at a step: 0 before `start`, then one more every `every` steps, at most `until`.

    start -1: none ever. every 0: all at once.
    """
    if start < 0 or step < start:
        return 0
    return min(until, 1 + (step - start) // every) if every else until


def latent_head(model, optimizer, seed):
    """Give the decoder a new head that predicts D values, for latent targets, in place of the pixels' head."""
    # Paper does not say: where the new head comes from. Ours is drawn from the seed, initialised like the old one.
    names, width = list(model.blocks), model.config["width"]
    decoder = model.decoders[names[-1]]
    device = decoder.head.weight.device
    for p in decoder.head.parameters():
        optimizer.state.pop(p, None)
    torch.manual_seed(seed)
    decoder.head = nn.Linear(model.config["decoder_width"], width)
    nn.init.xavier_uniform_(decoder.head.weight)
    nn.init.zeros_(decoder.head.bias)
    decoder.head.to(device)
    model.config["decoder_values"] = width
    params = [p for name in names for p in block_params(model, name)]
    matrices, vectors = optimizer.param_groups
    matrices["params"] = [p for p in params if p.ndim > 1]
    vectors["params"] = [p for p in params if p.ndim <= 1]


def layerlock_step(model, optimizers, video, visible, masked, *, config, step, steps, **settings):
    """One step of the schedule, in place of train_step() in train.train().

    A frozen block gets no gradient, so AdamW leaves it alone; its AdamW state is freed.
    """
    [optimizer] = optimizers
    start, every, until = config.freeze_start, config.freeze_every, config.freeze_until
    frozen = target = frozen_blocks(step, start=start, every=every, until=until)
    if start == -1:  # the control. Paper does not say: its target, and from what step on.
        target = until
    if config.target == "pixels":
        target = 0
    if target and model.config["decoder_values"] is None:
        latent_head(model, optimizer, config.seed)
    for name in list(model.blocks)[:frozen]:
        for p in model.blocks[name].parameters():
            optimizer.state.pop(p, None)
    # A short warm-up after each switch. Paper does not say: how long it is, and whether freezing alone has one.
    # Ours has; it is the same share of steps as at the start.
    warmup_steps = round(config.warmup * (every or steps - start))
    if frozen and warmup_steps:
        since = step - start - every * (frozen - 1)
        for group in optimizer.param_groups:
            group["lr"] *= min(1, (since + 1) / warmup_steps)
    return masked_step(model, optimizer, video, visible, masked, frozen=frozen, target=target, **settings)


# ---- the program: train.py's loop with another step ----


@dataclass
class Config(train.Config):
    """train.py's settings, and the schedule."""

    program: ClassVar[str] = "-m extras.layerlock"
    regime: Literal["layerlock"] = option("layerlock", "the only one here")
    blocks: int = option(
        12, "K, blocks that freeze one by one; the paper's are of one layer", least=2, most=1000
    )
    target: Literal["latent", "pixels"] = option(
        "latent", "once a block is frozen: its output, or still pixels"
    )
    freeze_start: int | None = option(None, "steps before block 1 freezes; -1: never (1/3 of all)", least=-1)
    freeze_every: int | None = option(None, "steps to the next; 0: all at once (so that all fit)", least=0)
    freeze_until: int | None = option(None, "blocks frozen in the end (2/3 of K, if they fit)", least=1)

    def folder(self):
        """Runs of another target have another name."""
        unfrozen = "-unfrozen" if self.freeze_start == -1 else ""
        return super().folder().replace("-layerlock-", f"-layerlock-{self.target}{unfrozen}-")

    def model_arguments(self):
        """The network is that of end-to-end training."""
        return super().model_arguments() | {"regime": "e2e"}


def resolve_schedule(config, steps):
    """Fill in the settings of the schedule that were left open. ValueError if it does not fit the run."""
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


def describe_schedule(config):
    """The schedule in words."""
    if config.freeze_start == -1:
        return f"no block freezes; target: output of block {config.freeze_until}"
    pace = f"every {config.freeze_every} steps" if config.freeze_every else "all at once"
    frozen = f"from step {config.freeze_start} on, {pace}, until {config.freeze_until} are frozen"
    return f"blocks freeze {frozen}; target: {config.target}"


@data.user_errors()
def main(arguments=None):
    """Train as the command line says."""
    data.keep_freed_memory()
    config, given = train.parse(Config, __doc__, arguments)
    config, model, source, checkpoint = train.set_up(config, given)
    resolve_schedule(config, train.steps_per_stage(config, source))
    print(describe_schedule(config))
    with train.error_hint(config):
        train.train(config, model, source, checkpoint, layerlock_step)


if __name__ == "__main__":
    main()
