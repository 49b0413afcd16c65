"""Blockwise self-supervised learning: an encoder in K blocks, a local decoder and an AdamW for each block.

Römer & Dickscheid, arXiv 2601.09040, Sec. 3.1. The method is train_step(); REGIMES lists its variants.

    model = Blockwise(blocks=4, regime="simultaneous")          # ViT-Tiny, the paper's default
    optimizers = make_optimizers(model, lr=1e-4)
    visible, masked = tube_mask(len(video), model.grid, 0.9)
    losses, norms = train_step(model, optimizers, video, visible, masked)
    tokens = model.encode(video)["block2"]                      # (B, N, D), nothing masked

Shapes as in model.py: B batch, N tokens, V visible, M masked, P values in one tubelet, D width, K blocks.
"""

import io
import os
import pickle
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model import Decoder, Layer, TubeletEmbedding, gather_tokens, normalized_targets, patchify


class Regime(NamedTuple):
    """What makes a training regime (Sec. 3.1)."""

    stop_gradient: bool  # at every block boundary: no block learns from another block's loss
    local_decoders: bool  # a decoder and a loss for every block, not only for block K
    staged: bool  # one block at a time, on top of frozen ones: K times the passes over the data


REGIMES = {
    # One forward pass, K local losses; each block learns from its own loss only.
    "simultaneous": Regime(stop_gradient=True, local_decoders=True, staged=False),
    # Stage k trains block k on top of the frozen blocks 1..k-1.
    "sequential": Regime(stop_gradient=True, local_decoders=True, staged=True),
    # End-to-end backpropagation, the baseline: one loss at block K trains everything.
    "e2e": Regime(stop_gradient=False, local_decoders=False, staged=False),
    # Differs from paper: ours, the control that it lacks. K losses, but gradients cross the boundaries.
    "deep-supervision": Regime(stop_gradient=False, local_decoders=True, staged=False),
}


# ---- the method ----


def train_step(
    model, optimizers, video, visible, masked, *, dtype=None, grad_clip=None, slices=1, reduce=None
):
    """One training step of any regime (Sec. 3.1): detach, block, local loss, backward, its optimizer step.

    model.groups lists the sets of blocks that one backward trains: each block by itself if the regime stops
    the gradient, else all of them. At most one group's graph is alive at any time.

    optimizers: one per group, from make_optimizers(); None: the group is frozen. The forward pass ends where
    the list ends: a sequential stage does not run the blocks after its own.
    video: (B, T, H, W, C) uint8. visible (B, V), masked (B, M): indices from tube_mask(), for all blocks.
    dtype: torch.bfloat16 for autocast. grad_clip: largest gradient norm of each group; None or 0: no limit.
    slices: how many slices of the batch a decoder runs on, one after the other. reduce: averages gradients over processes.
    Returns (losses, norms), each {block name: 0-d tensor}: L_k of every block that trains with a decoder, and
    the gradient norm of every block that trains, decoder included.
    """
    patches, losses, norms = model.patches(video), {}, {}  # (B, N, P)
    target = normalized_targets(gather_tokens(patches, masked))[0]  # (B, M, P)
    h = gather_tokens(patches, visible)  # (B, V, P)
    for group, optimizer in zip(model.groups, optimizers):
        h = h.detach()  # stop-gradient: h_k = f_k(sg(h_{k-1})); e2e has one group, and no gradient to stop
        frozen, outputs, gradients = optimizer is None, [], []
        for name in group:
            with torch.set_grad_enabled(not frozen), autocast(h, dtype):
                h = model.blocks[name](h, visible)  # (B, V, D)
            if name in model.decoders and not frozen:
                decoder = model.decoders[name]
                # L_k and dL_k / dh_k:
                losses[name], gradient = decoder_backward(
                    decoder, h, visible, masked, target, slices=slices, dtype=dtype
                )
                outputs.append(h)
                gradients.append(gradient)
        if not frozen:
            torch.autograd.backward(outputs, gradients)  # at once: this graph is gone before the next one
            norms |= optimizer_step(model, group, optimizer, grad_clip=grad_clip, reduce=reduce)
    return losses, norms


def local_loss(prediction, target):
    """L_k (Sec. 3.1): mean squared error over the masked tokens only. (B, M, P) each; returns a 0-d tensor."""
    return F.mse_loss(prediction.float(), target)


def decoder_backward(decoder, h, visible, masked, target, *, slices=1, dtype=None):
    """Local loss L_k and its gradient dL_k / dh_k, by forward and backward of one decoder; fills its p.grad.

    The decoder runs in slices of the batch: it sees N tokens per clip where the encoder sees V, so most of the
    memory would be its graph's.
    h: (B, V, D) tokens after block k. target: (B, M, P). Returns a 0-d tensor and (B, V, D).
    """
    loss, gradients, slices = torch.zeros((), device=h.device), [], min(slices, len(h))
    sliced = (tensor.detach().tensor_split(slices) for tensor in (h, visible, masked, target))
    for h_slice, visible_slice, masked_slice, target_slice in zip(*sliced):
        h_slice.requires_grad_()  # (B / slices, V, D)
        with autocast(h, dtype):
            prediction = decoder(h_slice, visible_slice, masked_slice)  # (B / slices, M, P)
        loss_slice = local_loss(prediction, target_slice) * (len(h_slice) / len(h))
        loss_slice.backward()
        loss += loss_slice.detach()
        gradients.append(h_slice.grad)
    return loss, torch.cat(gradients)  # (B, V, D)


def optimizer_step(model, group, optimizer, *, grad_clip=None, reduce=None):
    """Step the AdamW of one group of blocks after its backward. Returns {block name: gradient norm}."""
    gradients = {name: [p.grad for p in block_params(model, name) if p.grad is not None] for name in group}
    if reduce:
        reduce([gradient for block in gradients.values() for gradient in block])
    norms = {name: torch.nn.utils.get_total_norm(block) for name, block in gradients.items()}
    if grad_clip:
        params = [p for name in group for p in block_params(model, name) if p.grad is not None]
        total = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        torch.nn.utils.clip_grads_with_norm_(params, grad_clip, total)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norms


def autocast(tensor, dtype):
    """Mixed precision on the device of `tensor`; off for dtype None."""
    return torch.autocast(tensor.device.type, dtype, enabled=dtype is not None)


def block_params(model, name):
    """Parameters of one block and of its decoder, if it has one."""
    decoder = model.decoders[name].parameters() if name in model.decoders else ()
    return [*model.blocks[name].parameters(), *decoder]


def make_optimizers(model, *, stage=0, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05):
    """A new AdamW (Sec. 3.4) for every group of blocks that trains, in the form train_step() takes.

    stage: 0-based, for the sequential regime only: the blocks before it are frozen (None), those after it are
    left out. lr: train.py sets it before every step, the same in all groups.
    """
    # Paper does not say: betas, and that biases, norms and mask tokens do not decay. Both are VideoMAE's.
    # And that a sequential stage begins with a new AdamW and schedule: ours.
    groups, optimizers = model.groups, []
    if REGIMES[model.config["regime"]].staged:
        groups, optimizers = groups[stage : stage + 1], [None] * stage
    for group in groups:
        params = [p for name in group for p in block_params(model, name)]
        # A parameter that you add decays if it has two dimensions or more.
        matrices = {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay}
        vectors = {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}
        fused = params[0].device.type in ("cpu", "cuda")
        optimizers.append(torch.optim.AdamW([matrices, vectors], lr=lr, betas=betas, fused=fused))
    return optimizers


# ---- the encoder in blocks ----


class Block(nn.Module):
    """Block k of the encoder: f_k in h_k = f_k(sg(h_{k-1})) (Sec. 3.1).

    Block 1 owns the tubelet embedding, block K the output LayerNorm; inner boundaries have no LayerNorm.
    """

    def __init__(self, layers, *, embedding=None, norm=None):
        super().__init__()
        self.embedding, self.layers, self.norm = embedding, nn.ModuleList(layers), norm

    def forward(self, h, index):
        """h: (B, V, D) tokens of the block before, for block 1 (B, V, P) pixels; index: (B, V), their positions."""
        if self.embedding is not None:
            h = self.embedding(h, index)  # (B, V, D)
        for layer in self.layers:
            h = layer(h)
        return h if self.norm is None else self.norm(h)


class Blockwise(nn.Module):
    """A video ViT in K blocks, with the decoders that its regime needs. Defaults: ViT-Tiny in 4 blocks.

    blocks: K, which must divide depth. regime: a key of REGIMES. video: (T, H, W) of a clip. tubelet: size of
    one token, in the same order. depth: encoder layers in all. The others are transformer widths, layers and
    heads. decoder_values: values that a decoder predicts per token; None: the tubelet's pixels.
    output_norm, decoders: False for an encoder without its last LayerNorm, without decoders.
    `blocks` and `decoders` are keyed "block1".."blockK". Raises ValueError where sizes do not fit together.
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
        decoder_values=None,
        output_norm=True,
        decoders=True,
    ):
        super().__init__()
        # The arguments; no other local variable may stand above.
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_sizes(self.config)
        self.video, self.tubelet = tuple(video), tuple(tubelet)
        self.grid = tuple(size // step for size, step in zip(video, tubelet))  # (t, h, w)
        tokens, values = torch.Size(self.grid).numel(), torch.Size(tubelet).numel() * 3
        names = [f"block{k}" for k in range(1, blocks + 1)]

        # The encoder comes before the decoders: one seed gives the same one at every K and in every regime.
        embedding = TubeletEmbedding(tokens=tokens, values=values, width=width)
        layers = [Layer(width=width, heads=heads) for _ in range(depth)]
        norm = nn.LayerNorm(width, eps=1e-6) if output_norm else None
        self.blocks = nn.ModuleDict()
        for k, name in enumerate(names):
            self.blocks[name] = Block(
                layers[k * depth // blocks : (k + 1) * depth // blocks],
                embedding=embedding if k == 0 else None,
                norm=norm if k == blocks - 1 else None,
            )
        self.decoders = nn.ModuleDict()
        decoded = names if REGIMES[regime].local_decoders else names[-1:]
        for name in decoded if decoders else ():
            self.decoders[name] = Decoder(
                layers=(Layer(width=decoder_width, heads=decoder_heads) for _ in range(decoder_depth)),
                tokens=tokens,
                values=decoder_values or values,
                encoder_width=width,
                width=decoder_width,
            )

    @property
    def layers(self):
        """The layers of all blocks, in order."""
        return [layer for block in self.blocks.values() for layer in block.layers]

    @property
    def groups(self):
        """The sets of names that one backward trains: each block alone if the gradient stops between them."""
        names = list(self.blocks)
        return [[name] for name in names] if REGIMES[self.config["regime"]].stop_gradient else [names]

    @property
    def stages(self):
        """Stages of the training, each over all epochs: K in the sequential regime, else 1."""
        return len(self.groups) if REGIMES[self.config["regime"]].staged else 1

    def patches(self, video):
        """Tubelets (B, N, P) of clips (B, T, H, W, C), uint8 or float in 0..1. Raises ValueError for other clips."""
        if tuple(video.shape[1:4]) != self.video:
            raise ValueError(f"Clips of {tuple(video.shape[1:4])} for a model of (T, H, W) = {self.video}.")
        if video.is_floating_point() and video.max() > 1:
            raise ValueError(f"Float clips must be in 0..1, not up to {video.max():.3g}; divide them by 255.")
        return patchify(video, self.tubelet)

    def encode(self, video):
        """Representation after every block, nothing masked (Sec. 4): {"block1": (B, N, D), ...}.

        video: (B, T, H, W, C) uint8, or float in 0..1. Raises ValueError if its size is not the model's.
        """
        h, tokens = self.patches(video), {}  # (B, N, P)
        index = torch.arange(h.shape[1], device=h.device).expand(len(h), -1)  # (B, N)
        for name, block in self.blocks.items():
            h = tokens[name] = block(h, index)  # (B, N, D)
        return tokens

    def reconstruct(self, video, visible, masked):
        """Every decoder's prediction of the normalised masked tubelets: {"block1": (B, M, P), ...}.

        Empty if the decoders predict something else than pixels.
        """
        if self.config["decoder_values"] is not None:
            return {}
        h, predictions = gather_tokens(self.patches(video), visible), {}  # (B, V, P)
        for name, block in self.blocks.items():
            h = block(h, visible)  # (B, V, D)
            if name in self.decoders:
                predictions[name] = self.decoders[name](h, visible, masked)
        return predictions


def check_sizes(config):
    """Raise ValueError with the fix if the arguments of Blockwise do not fit together."""
    blocks, depth, regime = config["blocks"], config["depth"], config["regime"]
    if regime not in REGIMES:
        raise ValueError(f"There is no regime {regime!r}; choose from {', '.join(REGIMES)}.")
    if blocks < 1 or depth % blocks:
        fits = ", ".join(str(k) for k in range(1, depth + 1) if depth % k == 0)
        raise ValueError(
            f"{depth} layers cannot be cut into {blocks} equal blocks; choose --blocks from {fits}."
        )
    axes = ("frames", "pixels in height", "pixels in width")
    for axis, size, step in zip(axes, config["video"], config["tubelet"]):
        if step < 1 or size < step or size % step:
            near = max(1, step, size // max(1, step) * step)
            fix = f"try {near} or {near + step}"
            raise ValueError(f"{size} {axis} is not a multiple of the tubelet's {step}; {fix}.")
    if torch.Size(config["tubelet"]).numel() < 2:
        raise ValueError("A tubelet of one pixel has no contrast to predict; take a larger --tubelet.")
    for width, heads in (("width", "heads"), ("decoder_width", "decoder_heads")):
        if config[width] % (2 * config[heads]):
            raise ValueError(f"{width} {config[width]} is not an even multiple of {heads} {config[heads]}.")


def count_parameters(model):
    """Parameters {"block1": n, ..., "decoder of block1": n, ...}: P_enc + K * P_dec (Sec. 3.3)."""
    modules = dict(model.blocks.items()) | {f"decoder of {name}": d for name, d in model.decoders.items()}
    return {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}


def objective():
    """A number that changes with local_loss() and normalized_targets(): runs with others are not compared."""
    noise = torch.rand(2, 4, 96, generator=torch.Generator().manual_seed(0))
    return round(local_loss(noise, normalized_targets(noise)[0]).item(), 4)


def save(path, model, optimizers, *, step, settings, data="", total=0, writer=None, **more):
    """Write a checkpoint after `step` of `total` steps.

    settings: a dict of builtins. data: a fingerprint of the clips that the run is trained on. more: other entries.
    writer: an executor of concurrent.futures that writes the file while training goes on; its future is returned.
    A new file is written and then replaces the old one: a kill at any moment leaves a whole file.
    """
    checkpoint = {
        "config": model.config,  # arguments of Blockwise
        "model": model.state_dict(),
        "optimizers": [None if optimizer is None else optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "total": total,
        "settings": settings,
        "data": data,
        "objective": objective(),
        **more,
    }
    content = io.BytesIO()
    torch.save(checkpoint, content)  # a copy: training may go on
    return write_whole(path, content) if writer is None else writer.submit(write_whole, path, content)


def write_whole(path, content):
    """Write a BytesIO to a new file, which then replaces the old one."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:  # where the disk is full
        temporary.unlink(missing_ok=True)


def load(path):
    """Read a run: (model in eval mode, checkpoint). path: a run folder, whose last.pt is read, or a checkpoint.

    The checkpoint is a dict of what save() was given, read as data: no code in it is run. Raises ValueError if
    there is none, or if it is damaged.
    """
    path = Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"There is no checkpoint {path}; name a folder that train.py has written.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = Blockwise(**checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"{path} is damaged, or not a checkpoint of train.py.") from error
    return model.eval(), checkpoint


def copy_weights(source, target):
    """Copy the encoder of one Blockwise model into another, layer by layer, whatever K and regime of the two.

    A decoder is copied where `source` has one of the same shape after the same layer. Returns the names of the
    modules that are copied, and of the decoders that are not. Raises ValueError if the encoders' shapes differ.
    """

    def modules(model):
        """The modules of a model by names that do not depend on K."""
        last, depth = len(model.blocks), model.config["depth"]
        yield "embedding", model.blocks["block1"].embedding
        yield from ((f"layer {number}", layer) for number, layer in enumerate(model.layers, start=1))
        yield "output norm", model.blocks[f"block{last}"].norm or nn.Identity()
        for name, decoder in model.decoders.items():
            yield f"decoder after layer {depth // last * int(name[5:])}", decoder

    def shapes(module):
        return [p.shape for p in module.parameters()]

    old, copied, new = dict(modules(source)), [], []
    for name, module in modules(target):
        if name in old and shapes(old[name]) == shapes(module):
            module.load_state_dict(old[name].state_dict())
            copied.append(name)
        elif name.startswith("decoder"):
            new.append(name)
        else:
            raise ValueError(f"{name} differs in shape or is missing; choose --size, --tubelet as in --init.")
    return copied, new
