"""Blockwise self-supervised learning: an encoder in K blocks, a local decoder and an AdamW for each block.

Römer & Dickscheid, arXiv 2601.09040, Sec. 3.1. The method is train_step(); REGIMES says how its variants
differ.

    model = Blockwise(blocks=4, regime="simultaneous")          # ViT-Tiny, the paper's default
    optimizers = make_optimizers(model, lr=1e-4)
    visible, masked = tube_mask(len(video), model.grid, 0.9)
    losses, norms = train_step(model, optimizers, video, visible, masked)
    tokens = model.encode(video)["block2"]                      # (B, N, D), nothing masked

Shapes as in model.py: B batch, N tokens, V visible, M masked, P values in one tubelet, D width, K blocks.
"""

import collections
import contextlib
import os
import pickle
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from model import Decoder, Layer, TubeletEmbedding, init_weights, normalized_targets, patchify, take


class Regime(NamedTuple):
    """What makes a training regime (Sec. 3.1)."""

    stop_gradient: bool  # at every block boundary: no block learns from another block's loss
    local_decoders: bool  # a decoder and a loss for every block, not only for block K
    staged: bool  # one block at a time, on top of frozen ones: K passes over the data
    freezing: bool = False  # blocks are frozen one after the other in a single pass, see switch()


REGIMES = {
    # One forward pass, K local losses, each block learns from its own only.
    "simultaneous": Regime(stop_gradient=True, local_decoders=True, staged=False),
    # Stage k trains block k on top of the frozen blocks 1..k-1.
    "sequential": Regime(stop_gradient=True, local_decoders=True, staged=True),
    # End-to-end backpropagation, the baseline: one loss at block K trains everything.
    "e2e": Regime(stop_gradient=False, local_decoders=False, staged=False),
    # Ours, the control that the paper lacks: K losses as in simultaneous, but gradients cross the boundaries.
    "deep-supervision": Regime(stop_gradient=False, local_decoders=True, staged=False),
    # e2e whose blocks freeze from below, and whose target moves up behind them (arXiv 2509.10156).
    "layerlock": Regime(stop_gradient=False, local_decoders=False, staged=False, freezing=True),
}


def train_step(
    model,
    optimizers,
    video,
    visible,
    masked,
    *,
    dtype=None,
    clip=None,
    slices=1,
    share=1.0,
    complete=True,
    reduce=None,
):
    """One training step of any regime (Sec. 3.1): detach, block, local loss, backward, its optimizer step.

    model.groups lists the sets of blocks that one backward trains: each block by itself if the regime stops
    the gradient, else all of them. At most one group's graph is alive at any time.

    optimizers: one per group, from make_optimizers(). None: that group is frozen and runs without a graph.
    The forward pass ends where the list ends: a sequential stage does not run the blocks after its own.
    video: (B, T, H, W, C) uint8. visible (B, V), masked (B, M): indices from tube_mask(), for all blocks.
    dtype: torch.bfloat16 for autocast. clip: largest gradient norm, of each group by itself; None: none.
    slices: parts of the batch in which a decoder runs, to save memory; the gradients stay the same.
    share, complete: for gradient accumulation, this part's share of the batch and whether it is the last.
    reduce: called with a group's parameters when their gradients are complete; Replicas sums over processes.
    Returns (losses, norms), each {block name: 0-d tensor}: L_k of every block that trains with a decoder, and
    the gradient norm of every block that trains, decoder included.
    """
    patches = patchify(video, model.tubelet)  # (B, N, P)
    h, losses, norms = take(patches, visible), {}, {}  # (B, V, P)
    latent = model.config["target"]  # LayerLock's: the block whose output is predicted; 0, for pixels, else
    # (B, M, D) of that block, or (B, M, P) of the video.
    target = latent_target(model, patches, masked, dtype) if latent else take(patches, masked)
    how = {"normalize": not latent, "dtype": dtype, "slices": slices, "share": share}
    for group, optimizer in zip(model.groups, optimizers):
        h, tokens = h.detach(), {}  # stop-gradient: h_k = f_k(sg(h_{k-1}))
        with torch.set_grad_enabled(optimizer is not None), autocast(h, dtype):
            for name in group:
                h = tokens[name] = model.blocks[name](h, visible)  # (B, V, D)
        if optimizer is not None:
            local = {
                name: local_loss(model.decoders[name], tokens[name], visible, masked, target, **how)
                for name in group
                if name in model.decoders
            }
            losses |= {name: loss for name, (loss, _) in local.items()}  # L_k
            # At once: this graph is freed before the next is built.
            torch.autograd.backward([tokens[name] for name in local], [grad for _, grad in local.values()])
            if complete:
                # The optimizer step of this group alone.
                norms |= update(model, group, optimizer, clip, reduce)
    return losses, norms


def autocast(tensor, dtype):
    """Mixed precision where `tensor` lives; off for dtype None."""
    return torch.autocast(tensor.device.type, dtype, enabled=dtype is not None)


def local_loss(decoder, h, visible, masked, target, *, normalize=True, dtype=None, slices=1, share=1.0):
    """L_k and its gradient with respect to h_k, by forward and backward of one decoder; fills its p.grad.

    L_k is the mean squared error over the masked tokens only (Sec. 3.1). The decoder runs in slices of the
    batch: it sees N tokens per clip where the encoder sees V, so most of the memory would be its graph's.
    h: (B, V, D) tokens after block k. target: (B, M, P) masked tubelets, which are normalised if `normalize`
    says so. Others: as in train_step().
    Returns (L_k, share * gradient): 0-d tensor and (B, V, D).
    """
    loss, gradients = torch.zeros((), device=h.device), []
    slices = min(slices, len(h))
    for part, seen, hidden, x in zip(
        *(a.detach().tensor_split(slices) for a in (h, visible, masked, target))
    ):
        part.requires_grad_()  # (B / slices, V, D)
        with autocast(h, dtype):
            prediction = decoder(part, seen, hidden)  # (B / slices, M, P)
        x = normalized_targets(x)[0] if normalize else x
        local = F.mse_loss(prediction.float(), x) * (len(part) / len(h))
        (share * local).backward()
        loss += local.detach()
        gradients.append(part.grad)
    return loss, torch.cat(gradients)  # (B, V, D)


def update(model, group, optimizer, clip=None, reduce=None):
    """The optimizer step of one group of blocks, after its backward. Returns {block name: gradient norm}."""
    norms = {}
    if reduce:
        reduce([p for name in group for p in trainable(model, name)])
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
    """A fresh AdamW (Sec. 3.4) for every group of blocks that trains, as train_step() wants them.

    stage: 0-based, for the sequential regime only: the blocks before it are frozen, those after it are not
    reached.
    """
    # Paper does not say: betas, and that biases, norms and mask tokens have no weight decay. Both are
    # VideoMAE's.
    staged = REGIMES[model.config["regime"]].staged
    frozen = stage if staged else int(model.config["frozen"] > 0)  # groups, the first ones
    optimizers = [None] * frozen
    for group in model.groups[frozen : frozen + 1] if staged else model.groups[frozen:]:
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


def load_optimizers(optimizers, states):
    """Give every optimizer its state from a checkpoint."""
    for optimizer, state in zip(optimizers, states, strict=True):
        if optimizer is not None:
            optimizer.load_state_dict(state)


class Block(nn.Module):
    """Block k of the encoder: f_k in h_k = f_k(sg(h_{k-1})) (Sec. 3.1).

    Block 1 owns the tubelet embedding, block K the output LayerNorm; inner boundaries have no LayerNorm.
    """

    def __init__(self, layers, *, embedding=None, norm=None):
        super().__init__()
        self.embedding, self.layers, self.norm = embedding, nn.ModuleList(layers), norm

    def forward(self, h, index):
        """h: (B, V, D) tokens of the block before, for block 1 (B, V, P) pixels; index: (B, V), their
        places.
        """
        if self.embedding is not None:
            h = self.embedding(h, index)  # (B, V, D)
        for layer in self.layers:
            h = layer(h)
        return h if self.norm is None else self.norm(h)


class Blockwise(nn.Module):
    """A video ViT in K blocks, with the decoders that its regime needs. Defaults: the paper's ViT-Tiny, K =
    4.

    blocks: K, which must divide depth. regime: a key of REGIMES. video: (T, H, W) of a clip. tubelet: the
    size of one token, in the same order. depth: encoder layers in all. The others are transformer widths,
    layers and heads. frozen, target: LayerLock's, see switch().
    `blocks` and `decoders` are keyed "block1".."blockK"; `groups` lists the sets of names that one backward
    trains.
    Raises ValueError where sizes do not fit together.
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
        frozen=0,
        target=0,
    ):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_sizes(self.config)
        self.video, self.tubelet = tuple(video), tuple(tubelet)
        self.grid = tuple(size // part for size, part in zip(video, tubelet))  # (t, h, w)
        tokens, values = torch.Size(self.grid).numel(), torch.Size(tubelet).numel() * 3
        names = [f"block{k}" for k in range(1, blocks + 1)]

        # The encoder is made before the decoders, so that one seed gives the same one at every K and in every
        # regime.
        embedding = TubeletEmbedding(tokens=tokens, values=values, width=width)
        layers = [Layer(width=width, heads=heads) for _ in range(depth)]
        norm = nn.LayerNorm(width, eps=1e-6)
        self.blocks = nn.ModuleDict()
        for k, name in enumerate(names):
            self.blocks[name] = Block(
                layers[k * depth // blocks : (k + 1) * depth // blocks],
                embedding=embedding if k == 0 else None,
                norm=norm if k == blocks - 1 else None,
            )
        decoder = {"width": decoder_width, "depth": decoder_depth, "heads": decoder_heads}
        self.decoders = nn.ModuleDict()
        for name in names if REGIMES[regime].local_decoders else names[-1:]:
            self.decoders[name] = Decoder(tokens=tokens, values=values, encoder_width=width, **decoder)
            if target:
                self.decoders[name].head = latent_head(decoder_width, width)

    @property
    def groups(self):
        """The sets of names that one backward trains; LayerLock's frozen blocks are one set of their own."""
        names, frozen = list(self.blocks), self.config["frozen"]
        if REGIMES[self.config["regime"]].stop_gradient:
            return [[name] for name in names]
        return [names[:frozen], names[frozen:]] if frozen else [names]

    @property
    def stages(self):
        """Stages of the training, each over all epochs: K in the sequential regime, else 1."""
        return len(self.groups) if REGIMES[self.config["regime"]].staged else 1

    def encode(self, video):
        """Representation after every block, nothing masked (Sec. 4): {"block1": (B, N, D), ..., "blockK":
        ...}.

        video: (B, T, H, W, C) uint8, or float in 0..1.
        """
        h, tokens = patchify(video, self.tubelet), {}  # (B, N, P)
        everything = torch.arange(h.shape[1], device=h.device).expand(len(h), -1)  # (B, N)
        for name, block in self.blocks.items():
            h = tokens[name] = block(h, everything)  # (B, N, D)
        return tokens

    def reconstruct(self, video, visible, masked):
        """Every decoder's prediction of the normalised masked tubelets: {"block1": (B, M, P), ...}.

        Empty if the decoder predicts the output of a block instead.
        """
        if self.config["target"]:
            return {}
        h, predictions = take(patchify(video, self.tubelet), visible), {}  # (B, V, P)
        for name, block in self.blocks.items():
            h = block(h, visible)  # (B, V, D)
            if name in self.decoders:
                predictions[name] = self.decoders[name](h, visible, masked)
        return predictions


def check_sizes(config):
    """ValueError with the fix, if the arguments of Blockwise do not fit together."""
    blocks, depth, regime = config["blocks"], config["depth"], config["regime"]
    if regime not in REGIMES:
        raise ValueError(f"There is no regime {regime!r}; choose from {', '.join(REGIMES)}.")
    if blocks < 1 or depth % blocks:
        fits = ", ".join(str(k) for k in range(1, depth + 1) if depth % k == 0)
        raise ValueError(f"{blocks} blocks cannot share {depth} layers equally; choose --blocks from {fits}.")
    axes = ("frames", "pixels in height", "pixels in width")
    for what, size, part in zip(axes, config["video"], config["tubelet"]):
        if part < 1 or size < part or size % part:
            near = max(1, size // max(part, 1)) * max(part, 1)
            raise ValueError(
                f"{size} {what} is not a multiple of the tubelet's {part}; try {near} or {near + part}."
            )
    for what in ("frozen", "target"):
        if not 0 <= config[what] < blocks or (config[what] and not REGIMES[regime].freezing):
            raise ValueError(
                f"{what} {config[what]} is not possible with {blocks} blocks in regime {regime}."
            )
    for width, heads in (("width", "heads"), ("decoder_width", "decoder_heads")):
        if config[width] % (2 * config[heads]):
            raise ValueError(f"{width} {config[width]} is not an even multiple of {heads} {config[heads]}.")


# ---- LayerLock: progressive freezing (Erdogan et al., arXiv 2509.10156) ----


def frozen_blocks(step, *, start, every, until):
    """How many blocks are frozen at a step: none before `start`, then one more every `every` steps.

    until: the most. start -1: none ever. every 0: all at once. With K = depth, a block is one layer, as in
    LayerLock. Sequential blockwise training is the other end of this axis: blocks of many layers, a full pass
    over the data before each is frozen, a fresh decoder for each, and pixels as target throughout.
    """
    if start < 0 or step < start:
        return 0
    return min(until, 1 + (step - start) // every) if every else until


def switch(model, optimizers, *, frozen, target=0, **hyper):
    """Freeze blocks 1..frozen from now on, and predict the output of block `target`; 0: pixels.

    What still learns keeps its AdamW state; that of the frozen blocks is freed. When the target changes from
    pixels to a block's output, the decoder gets a new head of that width, drawn from torch's random state.
    hyper: as for make_optimizers(). Returns the optimizers for train_step().
    """
    config = model.config
    if target and not config["target"]:
        for decoder in model.decoders.values():
            device = decoder.head.weight.device
            decoder.head = latent_head(config["decoder_width"], config["width"]).to(device)
    config |= {"frozen": frozen, "target": target}
    check_sizes(config)
    old, fresh = optimizers[-1].state, make_optimizers(model, **hyper)
    for p in (p for group in fresh[-1].param_groups for p in group["params"] if p in old):
        fresh[-1].state[p] = old[p]
    return fresh


def latent_head(decoder_width, width):
    """The decoder's last layer, when it predicts tokens."""
    return nn.Linear(decoder_width, width).apply(init_weights)


@torch.no_grad()
def latent_target(model, patches, masked, dtype=None):
    """LayerLock's target: what block `target` makes of the whole clip, at the masked positions: (B, M, D).

    patches: (B, N, P). No gradient goes through it.
    """
    # Paper does not say: whether the target is normalised. Ours is, token by token, as no two layers have the
    # same scale.
    names = list(model.blocks)[: model.config["target"]]
    everything = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)  # (B, N)
    h = patches
    with autocast(patches, dtype):
        for name in names:
            h = model.blocks[name](h, everything)  # (B, N, D)
    return take(F.layer_norm(h.float(), h.shape[-1:]), masked)  # (B, M, D)


def count_parameters(model):
    """Parameters of each part: {"block1": n, ..., "decoder of block1": n, ...}; in all P_enc + K * P_dec
    (Sec. 3.3).
    """
    counts = {name: sum(p.numel() for p in block.parameters()) for name, block in model.blocks.items()}
    decoders = model.decoders.items()
    return counts | {f"decoder of {name}": sum(p.numel() for p in d.parameters()) for name, d in decoders}


def save(path, model, optimizers, *, step, settings, data=""):
    """Write a checkpoint. settings: a dict of builtins; data: a fingerprint of what the run is trained on.

    It is written beside the old one and then takes its place: a kill at any moment leaves a readable file.
    Raises OSError if that fails, for a full disk for example; the old one is then still there.
    """
    checkpoint = {
        "config": model.config,  # arguments of Blockwise
        "model": model.state_dict(),
        "optimizers": [None if optimizer is None else optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "settings": settings,
        "data": data,
    }
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save() turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written ({(error.__context__ or error)!s:.200})") from error


def load(path, device="cpu"):
    """Read a run: (model in eval mode, checkpoint). path: a run folder, whose last.pt is read, or a
    checkpoint.

    The checkpoint's other entries are as given to save(). Raises ValueError if there is none.
    """
    path = Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"There is no checkpoint {path}; name a folder that train.py has written.")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)  # data only: no code is run
        model = Blockwise(**checkpoint["config"]).to(device)
        model.load_state_dict(checkpoint["model"])
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a checkpoint of train.py, or is damaged: {reason:.200}") from None
    return model.eval(), checkpoint


# ---- several processes, by torch.distributed ----


class Alone:
    """A run in one process. Replicas and Pipeline say what differs in several: torchrun starts them."""

    rank, parts, reads, reduce = 0, 1, True, None  # parts of every batch; does this process read clips?

    def share(self, tensor):
        """This process's part of a tensor of the whole batch."""
        return tensor

    def take_part(self, model, optimizers):
        """What this process trains of the model, with its optimizers."""
        return model, optimizers

    def pass_on(self, video):
        """The clips of a step, None where they come from another process."""
        return video

    def agree(self, stop, save):
        """What all processes do after a step: (stop?, save?)."""
        return stop, save

    def collect(self, losses, norms):
        """Losses and gradient norms, {name: float}, of the whole batch and model, on rank 0."""
        return losses, norms

    def whole(self, model, optimizers):
        """The whole model and its optimizers, on rank 0."""
        return model, optimizers

    def close(self):
        """End together: no process leaves while another one still wants to hear from it."""


def leave():
    """Wait for all processes, then end the connection to them."""
    with contextlib.suppress(RuntimeError):  # one that is through already may close its end
        dist.barrier()
    if torch.cuda.is_available():  # NCCL asks for it; gloo's can hang where another process has left
        dist.destroy_process_group()


class Replicas(Alone):
    """Data parallel: every process holds the whole model and computes its part of every batch.

    Gradients are sums over the parts, weighted by `share` in train_step(): the batch keeps its meaning. Each
    block's are summed as soon as its own backward is done, before its optimizer step.
    """

    def __init__(self):
        self.rank, self.parts = dist.get_rank(), dist.get_world_size()

    def share(self, tensor):
        """Rows of this process."""
        return tensor.tensor_split(self.parts)[self.rank]

    def reduce(self, parameters):
        """Sum gradients over the processes, in one message."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together)
        for gradient, total in zip(gradients, together.split([g.numel() for g in gradients])):
            gradient.copy_(total.view_as(gradient))

    def agree(self, stop, save):
        """One that was told to stop stops all; rank 0 says when to save."""
        code = torch.tensor([int(stop)])
        dist.all_reduce(code, op=dist.ReduceOp.MAX)
        return bool(code), save

    def close(self):
        """Wait for all."""
        leave()

    def collect(self, losses, norms):
        """Losses are sums over the parts, weighted by their share; the norms are those of the sum."""
        total = torch.tensor(list(losses.values()), dtype=torch.float64)
        dist.all_reduce(total)
        return dict(zip(losses, total.tolist())), norms


class Pipeline(Alone):
    """Simultaneous training with a process for each block: rank k - 1 holds block k, its decoder and AdamW.

    No gradient crosses a boundary (Sec. 3.1), so nothing ever comes back: rank k works on a batch while rank
    k - 1 works on the next one. The numbers are those of one process, bit for bit.
    """

    TOKENS, VIDEO, CODE = 1, 2, 3  # kinds of message

    def __init__(self, *, batch, device="cpu"):
        self.rank, self.last, self.device = dist.get_rank(), dist.get_world_size() - 1, device
        self.batch, self.sent, self.reads = batch, collections.deque(), self.rank == 0

    def send(self, tensor, kind):
        """Start sending to the next process. At most a few messages are under way: a fast process waits."""
        if self.rank < self.last:
            tensor = tensor.contiguous()
            self.sent.append((dist.isend(tensor, self.rank + 1, tag=kind), tensor))
            while len(self.sent) > 6:
                self.sent.popleft()[0].wait()

    def receive(self, shape, dtype, kind):
        """Wait for a tensor from the process before."""
        tensor = torch.empty(shape, dtype=dtype, device="cpu" if kind == self.CODE else self.device)
        dist.recv(tensor, self.rank - 1, tag=kind)
        return tensor

    def take_part(self, model, optimizers):
        """Keep this rank's block only; its forward receives h_{k-1} and sends h_k."""
        self.config, name, width = model.config, list(model.blocks)[self.rank], model.config["width"]
        model.blocks = nn.ModuleDict({name: model.blocks[name]})
        model.decoders = nn.ModuleDict({name: model.decoders[name]})
        if self.rank > 0:
            model.blocks[name].register_forward_pre_hook(
                lambda _, args: (self.receive((*args[1].shape, width), torch.float32, self.TOKENS), args[1])
            )
        model.blocks[name].register_forward_hook(lambda _, args, h: self.send(h.detach(), self.TOKENS))
        return model, optimizers[self.rank : self.rank + 1]

    def pass_on(self, video):
        """Every block's targets are pixels: the clips follow the tokens."""
        if self.rank == 0:
            video = video.to(self.device)
        else:
            video = self.receive((self.batch, *self.config["video"], 3), torch.uint8, self.VIDEO)
        self.send(video, self.VIDEO)
        return video

    def agree(self, stop, save):
        """Rank 0 decides; the others hear of it after the same step."""
        code = torch.tensor([stop, save], dtype=torch.uint8)
        if self.rank > 0:
            code = self.receive((2,), torch.uint8, self.CODE)
        self.send(code, self.CODE)
        return tuple(map(bool, code))

    def collect(self, losses, norms):
        """Those of all blocks."""
        found = self.gather((losses, norms))
        return [{name: value for part in found for name, value in part[i].items()} for i in range(2)]

    def whole(self, model, optimizers):
        """For pictures and checkpoints, rank 0 puts the blocks together, for a moment only."""
        parts = self.gather((model.state_dict(), [optimizer.state_dict() for optimizer in optimizers]))
        if self.rank > 0:
            return None, None
        model = Blockwise(**self.config).to(self.device)
        model.load_state_dict({key: value for state, _ in parts for key, value in state.items()})
        optimizers = make_optimizers(model)
        load_optimizers(optimizers, [state for _, states in parts for state in states])
        return model, optimizers

    def close(self):
        """Wait until everything sent has arrived, and for all."""
        for work, _ in self.sent:
            work.wait()
        leave()

    def gather(self, value):
        """What all ranks give, on rank 0; [] elsewhere."""
        found = [None] * (self.last + 1) if self.rank == 0 else None
        dist.gather_object(value, found)
        return found or []
