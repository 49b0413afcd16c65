"""Blockwise self-supervised learning: the encoder in K blocks, a local decoder and an AdamW for each, and the regimes.

Römer & Dickscheid, arXiv 2601.09040, Sec. 3.1. The method is train_step() below; REGIMES says how its variants differ.

    model = Blockwise(blocks=4, regime="simultaneous")          # ViT-Tiny, the paper's default
    optimizers = make_optimizers(model, lr=1e-4)
    visible, masked = tube_mask(len(video), model.grid, 0.9)
    losses, norms = train_step(model, optimizers, video, visible, masked)
    tokens = model.encode(video)["block2"]                      # (B, N, D), nothing masked

Shapes as in model.py: B batch, N tokens, V visible, M masked, P values in one tubelet, D width, K blocks.
"""

import contextlib
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import Decoder, Layer, TubeletEmbedding, normalized_targets, patchify, take

# regime: (does the gradient stop at every block boundary?, does every block have a decoder?, is one block trained at a time?)
REGIMES = {
    "simultaneous": (True, True, False),  # one forward pass, K local losses, each block from its own loss only
    "sequential": (True, True, True),  # stage k trains block k on top of frozen blocks 1..k-1: K passes over the data
    "e2e": (False, False, False),  # the baseline: one loss at block K reaches everything
    "deep-supervision": (False, True, False),  # ours, the control the paper lacks: K losses, but no stop-gradient
}


class Block(nn.Module):
    """Block k of the encoder: f_k in h_k = f_k(sg(h_{k-1})) (Sec. 3.1).

    Block 1 owns the tubelet embedding, block K the output LayerNorm; there is no LayerNorm at inner boundaries.
    """

    def __init__(self, layers, *, embedding=None, norm=None):
        super().__init__()
        self.embedding, self.layers, self.norm = embedding, nn.ModuleList(layers), norm

    def forward(self, h, index):
        """h: (B, V, D) tokens of the block before, or (B, V, P) pixels for block 1; index: (B, V). Returns (B, V, D)."""
        if self.embedding is not None:
            h = self.embedding(h, index)  # (B, V, D)
        for layer in self.layers:
            h = layer(h)
        return h if self.norm is None else self.norm(h)


class Blockwise(nn.Module):
    """A video ViT in K blocks, with the decoders that its regime needs. The defaults are the paper's ViT-Tiny, K = 4.

    blocks: K, which must divide depth. regime: a key of REGIMES. video: (T, H, W) of a clip; tubelet: the size of one
    token in the same order; depth: encoder layers in all. The other arguments are transformer widths, layers and heads.
    `blocks` and `decoders` are keyed "block1".."blockK"; `groups` are the runs of blocks inside which gradients flow.
    Raises ValueError where sizes do not divide.
    """

    def __init__(
        self,
        *,
        blocks=4,
        regime="simultaneous",
        video=(16, 128, 128),
        tubelet=(8, 16, 16),
        width=192,
        depth=12,
        heads=3,
        decoder_width=192,
        decoder_depth=4,
        decoder_heads=3,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}  # all builtins: for save()
        check_sizes(self.config)
        self.video, self.tubelet = tuple(video), tuple(tubelet)
        self.grid = tuple(size // part for size, part in zip(video, tubelet))
        tokens, values = torch.Size(self.grid).numel(), torch.Size(tubelet).numel() * 3

        # The layers are made before the decoders, so that one seed gives one encoder at every K and in every regime.
        embedding = TubeletEmbedding(tokens=tokens, values=values, width=width)
        layers = [Layer(width=width, heads=heads) for _ in range(depth)]
        norm = nn.LayerNorm(width, eps=1e-6)
        names = [f"block{k}" for k in range(1, blocks + 1)]
        self.blocks = nn.ModuleDict()
        for k, name in enumerate(names):
            self.blocks[name] = Block(
                layers[k * depth // blocks : (k + 1) * depth // blocks],
                embedding=embedding if k == 0 else None,
                norm=norm if k == blocks - 1 else None,
            )

        isolated, decoder_everywhere, _ = REGIMES[regime]
        self.groups = [[name] for name in names] if isolated else [names]
        decoder = dict(width=decoder_width, depth=decoder_depth, heads=decoder_heads)
        self.decoders = nn.ModuleDict()
        for name in names if decoder_everywhere else names[-1:]:
            self.decoders[name] = Decoder(tokens=tokens, values=values, encoder_width=width, **decoder)

    @property
    def stages(self):
        """How many times the training goes through the data: K in the sequential regime, once in the others."""
        return len(self.groups) if REGIMES[self.config["regime"]][2] else 1

    def encode(self, video):
        """Representation after every block, nothing masked (Sec. 4): {"block1": (B, N, D), ..., "blockK": ...}.

        video: (B, T, H, W, C) uint8, or float in 0..1.
        """
        h = patchify(video, self.tubelet)  # (B, N, P)
        everything = torch.arange(h.shape[1], device=h.device).expand(len(h), -1)  # (B, N)
        tokens = {}
        for name, block in self.blocks.items():
            h = tokens[name] = block(h, everything)  # (B, N, D)
        return tokens

    def reconstruct(self, video, visible, masked):
        """Every decoder's prediction of the normalised masked tubelets: {"block1": (B, M, P), ...}."""
        h, predictions = take(patchify(video, self.tubelet), visible), {}  # (B, V, P)
        for name, block in self.blocks.items():
            h = block(h, visible)  # (B, V, D)
            if name in self.decoders:
                predictions[name] = self.decoders[name](h, visible, masked)
        return predictions


def train_step(model, optimizers, video, visible, masked, *, dtype=None, clip=None, share=1.0, update=True):
    """One training step of any regime (Sec. 3.1). At most one group of blocks has a graph alive at any time.

    optimizers: one per group of model.groups, from make_optimizers(). None: that group is frozen, it runs without a graph;
    the list ends where the forward pass may end.
    video: (B, T, H, W, C) uint8; visible (B, V), masked (B, M): indices from tube_mask(), shared by all blocks.
    dtype: torch.bfloat16 for autocast. clip: largest gradient norm, of each group by itself.
    share, update: for gradient accumulation: this part's share of the batch, and whether the batch is now complete.
    Returns (losses, norms): each {block name: 0-d tensor}, of the trained blocks that have a decoder, and of all trained.
    """
    patches = patchify(video, model.tubelet)  # (B, N, P)
    target = normalized_targets(take(patches, masked))[0]  # (B, M, P)
    h = take(patches, visible)  # (B, V, P)
    autocast = torch.autocast(video.device.type, dtype) if dtype else contextlib.nullcontext()
    losses, norms = {}, {}
    for group, optimizer in zip(model.groups, optimizers):
        trained = optimizer is not None
        h = h.detach()  # stop-gradient: h_k = f_k(sg(h_{k-1}))
        with torch.set_grad_enabled(trained), autocast:
            for name in group:
                h = model.blocks[name](h, visible)  # (B, V, D)
                if trained and name in model.decoders:
                    prediction = model.decoders[name](h, visible, masked)  # (B, M, P)
                    losses[name] = F.mse_loss(prediction.float(), target)  # L_k: over masked tokens only
        if trained:
            (share * sum(losses[name] for name in group if name in losses)).backward()  # at once: frees this graph
            if update:
                norms |= update_group(model, group, optimizer, clip)
    return {name: loss.detach() for name, loss in losses.items()}, norms


def update_group(model, group, optimizer, clip=None):
    """The optimizer step of one group of blocks, after its backward. Returns {block name: gradient norm}."""
    norms = {}
    for name in group:
        gradients = [p.grad for p in trainable(model, name) if p.grad is not None]
        norms[name] = torch.nn.utils.get_total_norm(gradients)
    if clip:
        total = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        parameters = [p for name in group for p in trainable(model, name)]
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, total)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norms


def trainable(model, name):
    """Parameters of one block and of its decoder, if it has one."""
    decoder = model.decoders[name].parameters() if name in model.decoders else ()
    return [*model.blocks[name].parameters(), *decoder]


def make_optimizers(model, *, stage=0, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05):
    """A fresh AdamW (Sec. 3.4) for every group of blocks that is trained; None for the frozen ones.

    stage: 0-based, only for the sequential regime: blocks before it are frozen, blocks after it are not reached.
    Paper does not say: betas, and that biases, norms and mask tokens have no weight decay; both are VideoMAE's.
    """
    optimizers = []
    one_at_a_time = REGIMES[model.config["regime"]][2]
    for g, group in enumerate(model.groups[: stage + 1] if one_at_a_time else model.groups):
        if one_at_a_time and g < stage:
            optimizers.append(None)
            continue
        parameters = [p for name in group for p in trainable(model, name)]
        optimizers.append(
            torch.optim.AdamW(
                [
                    {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
                    {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
                ],
                lr=lr,
                betas=betas,
                fused=parameters[0].device.type in ("cpu", "cuda"),
            )
        )
    return optimizers


def check_sizes(config):
    pass
