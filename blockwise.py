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

import argparse
import contextlib
import json
import os
import pickle
import re
import zipfile
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
    # One forward pass, K local losses, each block learns from its own only.
    "simultaneous": Regime(stop_gradient=True, local_decoders=True, staged=False),
    # Stage k trains block k on top of the frozen blocks 1..k-1.
    "sequential": Regime(stop_gradient=True, local_decoders=True, staged=True),
    # End-to-end backpropagation, the baseline: one loss at block K trains everything.
    "e2e": Regime(stop_gradient=False, local_decoders=False, staged=False),
    # Differs from paper: ours, the control that it lacks. K losses, but gradients cross the boundaries.
    "deep-supervision": Regime(stop_gradient=False, local_decoders=True, staged=False),
}


# ---- the method ----


def train_step(model, optimizers, video, visible, masked, *, dtype=None, clip=None, slices=1, reduce=None):
    """One training step of any regime (Sec. 3.1): detach, block, local loss, backward, its optimizer step.

    model.groups lists the sets of blocks that one backward trains: each block by itself if the regime stops
    the gradient, else all of them. At most one group's graph is alive at any time.

    optimizers: one per group, from make_optimizers(); None: the group is frozen. The forward pass ends where
    the list ends: a sequential stage does not run the blocks after its own.
    video: (B, T, H, W, C) uint8. visible (B, V), masked (B, M): indices from tube_mask(), for all blocks.
    dtype: torch.bfloat16 for autocast. clip: largest gradient norm, of each group by itself; None: none.
    slices: parts of the batch that a decoder runs in. reduce: averages gradients over processes.
    Returns (losses, norms), each {block name: 0-d tensor}: L_k of every block that trains with a decoder, and
    the gradient norm of every block that trains, decoder included.
    """
    patches, losses, norms = model.patches(video), {}, {}  # (B, N, P)
    target = normalized_targets(gather_tokens(patches, masked))[0]  # (B, M, P)
    h = gather_tokens(patches, visible)  # (B, V, P)
    for group, optimizer in zip(model.groups, optimizers):
        h = h.detach()  # stop-gradient: h_k = f_k(sg(h_{k-1}))
        outputs, gradients = [], []
        for name in group:
            with torch.set_grad_enabled(optimizer is not None), autocast(h, dtype):
                h = model.blocks[name](h, visible)  # (B, V, D)
            if name in model.decoders and optimizer is not None:
                local = (model.decoders[name], h, visible, masked, target)
                # L_k and dL_k / dh_k:
                losses[name], gradient = decoder_backward(*local, slices=slices, dtype=dtype)
                outputs, gradients = [*outputs, h], [*gradients, gradient]
        if optimizer is not None:
            torch.autograd.backward(outputs, gradients)  # at once: this graph is gone before the next one
            norms |= optimizer_step(model, group, optimizer, clip=clip, reduce=reduce)  # of this group alone
    return losses, norms


def decoder_backward(decoder, h, visible, masked, target, *, slices=1, dtype=None):
    """Local loss L_k and its gradient dL_k / dh_k, by forward and backward of one decoder; fills its p.grad.

    L_k is the mean squared error over the masked tokens only (Sec. 3.1). The decoder runs in slices of the
    batch: it sees N tokens per clip where the encoder sees V, so most of the memory would be its graph's.
    h: (B, V, D) tokens after block k. target: (B, M, P). Returns a 0-d tensor and (B, V, D).
    """
    loss, gradients, slices = torch.zeros((), device=h.device), [], min(slices, len(h))
    parts = (tensor.detach().tensor_split(slices) for tensor in (h, visible, masked, target))
    for tokens, places, masked_places, wanted in zip(*parts):
        tokens.requires_grad_()  # (B / slices, V, D)
        with autocast(h, dtype):
            predicted = decoder(tokens, places, masked_places)  # (B / slices, M, P)
        part_of_loss = F.mse_loss(predicted.float(), wanted) * (len(tokens) / len(h))
        part_of_loss.backward()
        loss += part_of_loss.detach()
        gradients.append(tokens.grad)
    return loss, torch.cat(gradients)  # (B, V, D)


def optimizer_step(model, group, optimizer, *, clip=None, reduce=None):
    """Step the AdamW of one group of blocks after its backward. Returns {block name: gradient norm}."""
    parameters = {name: [p for p in trainable(model, name) if p.grad is not None] for name in group}
    everything = [p for of_block in parameters.values() for p in of_block]
    if reduce:
        reduce([p.grad for p in everything])
    norms = {name: torch.nn.utils.get_total_norm([p.grad for p in ps]) for name, ps in parameters.items()}
    if clip:
        total = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        torch.nn.utils.clip_grads_with_norm_(everything, clip, total)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norms


def autocast(tensor, dtype):
    """Mixed precision where `tensor` lives; off for dtype None."""
    return torch.autocast(tensor.device.type, dtype, enabled=dtype is not None)


def trainable(model, name):
    """Parameters of one block and of its decoder, if it has one."""
    decoder = model.decoders[name].parameters() if name in model.decoders else ()
    return [*model.blocks[name].parameters(), *decoder]


def make_optimizers(model, *, stage=0, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05):
    """A fresh AdamW (Sec. 3.4) for every group of blocks that trains, as train_step() wants them.

    stage: 0-based, for the sequential regime only: the blocks before it are frozen, those after it are not
    reached. lr: train.py sets it anew before every step, the same in all groups.
    """
    # Paper does not say: betas, and that biases, norms and mask tokens do not decay. Both are VideoMAE's.
    # And that a sequential stage begins with a fresh AdamW and schedule: ours.
    groups, optimizers = model.groups, []
    if REGIMES[model.config["regime"]].staged:
        groups, optimizers = groups[stage : stage + 1], [None] * stage
    for group in groups:
        parameters = [p for name in group for p in trainable(model, name)]
        # Also what you add, a table of positions for example, decays if it has two dimensions or more.
        matrices = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay}
        vectors = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
        fused = parameters[0].device.type in ("cpu", "cuda")
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
        """h: (B, V, D) tokens of the block before, for block 1 (B, V, P) pixels; index: (B, V), their places."""
        if self.embedding is not None:
            h = self.embedding(h, index)  # (B, V, D)
        for layer in self.layers:
            h = layer(h)
        return h if self.norm is None else self.norm(h)


class Blockwise(nn.Module):
    """A video ViT in K blocks, with the decoders that its regime needs. Defaults: ViT-Tiny in 4 blocks.

    blocks: K, which must divide depth. regime: a key of REGIMES. video: (T, H, W) of a clip. tubelet: size of
    one token, in the same order. depth: encoder layers in all. The others are transformer widths, layers and
    heads. decoder_values: how many a decoder predicts per token; None: the tubelet's pixels.
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
    ):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_sizes(self.config)
        self.video, self.tubelet = tuple(video), tuple(tubelet)
        self.grid = tuple(size // part for size, part in zip(video, tubelet))  # (t, h, w)
        tokens, values = torch.Size(self.grid).numel(), torch.Size(tubelet).numel() * 3
        names = [f"block{k}" for k in range(1, blocks + 1)]

        # The encoder comes before the decoders: one seed gives the same one at every K and in every regime.
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
        self.decoders = nn.ModuleDict()
        for name in names if REGIMES[regime].local_decoders else names[-1:]:
            self.decoders[name] = Decoder(
                layers=(Layer(width=decoder_width, heads=decoder_heads) for _ in range(decoder_depth)),
                tokens=tokens,
                values=decoder_values or values,
                encoder_width=width,
                width=decoder_width,
            )

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
        """Tubelets (B, N, P) of clips (B, T, H, W, C). Raises ValueError if their size is not the model's."""
        if tuple(video.shape[1:4]) != self.video:
            raise ValueError(f"Clips of {tuple(video.shape[1:4])} for a model of (T, H, W) = {self.video}.")
        return patchify(video, self.tubelet)

    def encode(self, video):
        """Representation after every block, nothing masked (Sec. 4): {"block1": (B, N, D), ...}.

        video: (B, T, H, W, C) uint8, or float in 0..1. Raises ValueError if its size is not the model's.
        """
        h, tokens = self.patches(video), {}  # (B, N, P)
        everything = torch.arange(h.shape[1], device=h.device).expand(len(h), -1)  # (B, N)
        for name, block in self.blocks.items():
            h = tokens[name] = block(h, everything)  # (B, N, D)
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
            near = max(1, part, size // max(1, part) * part)
            fix = f"try {near} or {near + part}"
            raise ValueError(f"{size} {what} is not a multiple of the tubelet's {part}; {fix}.")
    if torch.Size(config["tubelet"]).numel() < 2:
        raise ValueError("A tubelet of one pixel has no contrast to predict; take a larger --tubelet.")
    for width, heads in (("width", "heads"), ("decoder_width", "decoder_heads")):
        if config[width] % (2 * config[heads]):
            raise ValueError(f"{width} {config[width]} is not an even multiple of {heads} {config[heads]}.")


def count_parameters(model):
    """Parameters by part, {"block1": n, ..., "decoder of block1": n, ...}: P_enc + K * P_dec (Sec. 3.3)."""
    parts = dict(model.blocks.items()) | {f"decoder of {name}": d for name, d in model.decoders.items()}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def save(path, model, optimizers, *, step, settings, data="", total=0):
    """Write a checkpoint after `step` of `total` steps.

    settings: a dict of builtins. data: a fingerprint of what the run is trained on.
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
        "total": total,
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


def load(path, *, blocks=4):
    """Read a run: (model in eval mode, checkpoint). path: a run folder, whose last.pt is read, or a checkpoint.

    The checkpoint's other entries are as given to save(). A published VideoMAE is read as well, and cut into
    so many `blocks`: see load_videomae(). Raises ValueError if there is nothing to read.
    """
    path, checkpoint = read_checkpoint(path)
    try:
        if "config" not in checkpoint:
            return load_videomae(path, checkpoint, blocks=blocks)
        model = Blockwise(**checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
    except (LookupError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a checkpoint that fits, or is damaged: {summary(error)}") from None
    return model.eval(), checkpoint


CHECKPOINTS = ("last.pt", "model.safetensors", "pytorch_model.bin")  # names of these files in a folder


def read_checkpoint(path):
    """(file, the dict in it) of a checkpoint of torch or safetensors, read as data: no code in it is run.

    path: a file, or a folder of train.py or Hugging Face. Raises ValueError with the reason.
    """
    files = [Path(path) / name for name in CHECKPOINTS] if Path(path).is_dir() else [Path(path)]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise ValueError(f"There is no checkpoint {files[0]}; name a folder that train.py has written.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return path, load_file(path)
        if zipfile.is_zipfile(path):  # torch.load() does not look at the checksums that it wrote
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("its checksums do not fit; it was damaged on disk")
        with torch.serialization.safe_globals([argparse.Namespace]):  # VideoMAE's hold their arguments
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise TypeError(f"it holds a {type(checkpoint).__name__}")
    except ImportError:
        raise ValueError(f"{path} needs safetensors; install it with: pip install safetensors") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is not a checkpoint, or holds more than data, which is not read.") from None
    except Exception as error:  # noqa: BLE001, whatever a damaged file makes of three readers
        raise ValueError(f"{path} is not a checkpoint of train.py, or is damaged: {summary(error)}") from None
    return path, checkpoint


def unwrap(checkpoint):
    """The state_dict in a checkpoint, which may be nested as model, module or state_dict."""
    for name in ("model", "module", "state_dict"):
        checkpoint = checkpoint[name] if isinstance(checkpoint.get(name), dict) else checkpoint
    return checkpoint


def summary(error):
    """The beginning of what an error says."""
    return " ".join(str(error).split())[:300] or type(error).__name__


# ---- published checkpoints of VideoMAE (arXiv 2203.12602) ----

# (how its authors or Hugging Face begin or end a name, how it is called here), in this order.
RENAMED = (
    (r"^(module\.|model\.|videomae\.)+", ""),
    (r"^(embeddings\.patch_embeddings\.projection|(encoder\.)?patch_embed\.proj)\.", "embedding.linear."),
    (r"^(encoder\.)?(blocks|layer)\.", "layers."),
    (r"^decoder\.(blocks|decoder_layers)\.", "decoder.layers."),
    (r"^(encoder\.norm|layernorm)\.", "norm."),
    (r"^encoder_to_decoder\.", "decoder.embed."),
    (r"^mask_token$", "decoder.mask_token"),
    (r"\.attn\.qkv\.", ".qkv."),
    (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".\1."),
    (r"\.(attention\.attention|attn)\.(q|k|v)_bias$", r".\2.bias"),
    (r"\.(attention\.output\.dense|attn\.proj)\.", ".proj."),
    (r"\.(intermediate\.dense|mlp\.fc1)\.", ".fc1."),
    (r"\.(output\.dense|mlp\.fc2)\.", ".fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)
# Of a fine-tuned one, under the new names: what comes after the mean over tokens is no part of the encoder.
CLASSIFIER = ("fc_norm.", "head.", "classifier.")


def load_videomae(path, state, *, blocks=4):
    """A VideoMAE in e2e form, its encoder cut into blocks: (model in eval mode, checkpoint as of save()).

    state: what was read from the file `path`. Sizes are those of its tensors; what these do not tell comes from
    a config.json beside it, else clips are 16 x 224 x 224 and heads 64 wide (in ViT-H 80), as published. A
    backbone has no decoder, and so no reconstruction; one without output LayerNorm has none here.
    Raises ValueError that names the weights which do not fit.
    """
    found = state = unwrap(state)
    for pattern, ours in RENAMED:
        found = {re.sub(pattern, ours, key): value for key, value in found.items()}
    found = {key: value for key, value in found.items() if not key.startswith(CLASSIFIER)}
    kernel = found.get("embedding.linear.weight")
    if kernel is None or kernel.ndim != 5:
        raise ValueError(f"neither of VideoMAE; it holds {', '.join(map(str, state))[:200]}")
    settings = path.with_name("config.json")
    settings = json.loads(settings.read_text()) if settings.exists() else {}
    pixels, width, decoder = settings.get("image_size", 224), len(kernel), "decoder.embed.weight" in found
    config = {"blocks": blocks, "regime": "e2e", "tubelet": tuple(kernel.shape[2:]), "width": width}
    config["video"] = (settings.get("num_frames", 16), pixels, pixels)
    config["heads"] = settings.get("num_attention_heads", max(1, width // (80 if width == 1280 else 64)))
    config["depth"] = sum(bool(re.match(r"layers\..*\.fc1\.bias", key)) for key in found)
    if decoder:
        width = config["decoder_width"] = len(found["decoder.embed.weight"])
        config["decoder_heads"] = settings.get("decoder_num_attention_heads", max(1, width // 64))
        config["decoder_depth"] = sum(bool(re.match(r"decoder\.layers\..*\.fc1\.bias", key)) for key in found)
        found["decoder.mask_token"] = found["decoder.mask_token"].flatten()
    found["embedding.linear.weight"] = kernel.permute(0, 2, 3, 4, 1).flatten(1)  # (D, P), as in patchify()
    model, last = Blockwise(**config), f"block{blocks}"
    model.blocks[last].norm = model.blocks[last].norm if "norm.weight" in found else None
    model.decoders = model.decoders if decoder else nn.ModuleDict()

    def place(key):
        """Where a weight stands in the model."""
        if match := re.match(r"layers\.(\d+)\.", key):
            k, layer = divmod(int(match[1]), config["depth"] // blocks)
            return f"blocks.block{k + 1}.layers.{layer}.{key[match.end() :]}"
        first, _, rest = key.partition(".")
        owner = {"embedding": "blocks.block1", "norm": f"blocks.{last}"}.get(first)
        return f"decoders.{last}.{rest}" if first == "decoder" else f"{owner}.{key}" if owner else key

    fitted = join_qkv({place(key): value for key, value in found.items()})
    missing, unexpected = model.load_state_dict(fitted, strict=False)
    if missing or unexpected:
        which = f"without {', '.join(missing[:9])}; not known: {', '.join(unexpected[:9])}"
        raise ValueError(f"no VideoMAE: {which}")
    settings = {"regime": "e2e", "seed": 0}
    return model.eval(), {"config": config, "settings": settings, "step": 0}


def join_qkv(state):
    """Queries, keys and values in one matrix and one bias per layer; an absent key bias is zero."""
    joined = {key: value for key, value in state.items() if not re.search(r"\.[qkv]\.(weight|bias)$", key)}
    for key, query in state.items():
        if key.endswith((".q.weight", ".q.bias")):
            layer, kind = key[: key.rindex(".q.")], key.rpartition(".")[2]
            value = state.get(f"{layer}.v.{kind}")
            parts = [query, state.get(f"{layer}.k.{kind}", torch.zeros_like(query)), value]
            joined[f"{layer}.qkv.{kind}"] = torch.cat(parts)
    return joined
