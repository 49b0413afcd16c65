"""The video vision transformer: tube masking, encoder layers, masked-autoencoder decoder, its targets.

Römer & Dickscheid, "Depth-Wise Representation Development Under Blockwise Self-Supervised Learning for Video
Vision Transformers", arXiv 2601.09040: masking, decoder and loss are Sec. 3.1, the architecture is Sec. 3.3.
How the encoder is cut into blocks and trained stands in blockwise.py.

Shapes: B batch, T frames, H W pixels, C channels; t h w token grid, N = t*h*w tokens, V visible, M = N - V
masked; P = values in one tubelet, D width, K blocks.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# Keyword arguments of blockwise.Blockwise. tiny and small are the paper's (Sec. 3.3).
PAPER_CLIP = {"video": (16, 128, 128), "tubelet": (8, 16, 16)}
NANO_CLIP = {"video": (16, 64, 64), "tubelet": (8, 8, 8)}
NANO_DECODER = {"decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2}
SIZES = {
    # Differs from paper: ours, for a laptop. 12 layers as in the others: K = 1, 2, 3, 4, 6, 12 all divide.
    "nano": NANO_CLIP | NANO_DECODER | {"width": 96, "heads": 3},
    "tiny": PAPER_CLIP | {"width": 192, "heads": 3},
    "small": PAPER_CLIP | {"width": 384, "heads": 6},
    # Differs from paper: VideoMAE's ViT-Base widths with the paper's clips.
    "base": PAPER_CLIP | {"width": 768, "heads": 12, "decoder_width": 384, "decoder_heads": 6},
}


# ---- tubelets and masks ----


def patchify(video, tubelet):
    """Cut a video into tubelets, the tokens of the model (Sec. 3.3: 8x16x16 pixels of 16x128x128, so 2x8x8).

    video: (B, T, H, W, C) of any dtype. tubelet: (frames, rows, columns), which must divide (T, H, W).
    Returns (B, N, P): tokens in the order time, row, column; values in the order frame, row, column, channel.
    """
    B, T, H, W, C = video.shape
    p, q, r = tubelet
    x = video.reshape(B, T // p, p, H // q, q, W // r, r, C)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(B, -1, p * q * r * C)  # (B, N, P)


def unpatchify(tokens, video, tubelet):
    """Inverse of patchify. tokens: (B, N, P); video: its size (T, H, W). Returns (B, T, H, W, C)."""
    (T, H, W), (p, q, r) = video, tubelet
    x = tokens.reshape(len(tokens), T // p, H // q, W // r, p, q, r, -1)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(len(tokens), T, H, W, -1)  # (B, T, H, W, C)


def tube_mask(batch, grid, ratio=0.9, generator=None):
    """Draw one random tube mask per clip (Sec. 3.1): one spatial mask, repeated over all time slots.

    grid: (t, h, w). Of the h*w places int(ratio * h*w) are masked: at 0.9 and 8x8 that is 57, so 14 of 128
    tokens stay. generator: a CPU torch.Generator, to make the draw reproducible.
    Returns (visible, masked): sorted token indices, (B, V) and (B, M).
    """
    t, h, w = grid
    order = torch.rand(batch, h * w, generator=generator).argsort(dim=1)
    count = int(ratio * h * w)
    if not 0 < count < h * w:
        raise ValueError(
            f"Mask ratio {ratio} masks {count} of the {h} x {w} positions of a clip; at least one must be masked "
            "and one visible: change the ratio, or take larger clips or smaller tubelets."
        )
    slots = torch.arange(t).view(1, t, 1) * (h * w)

    def tubes(positions):
        return (positions.sort(dim=1).values.unsqueeze(1) + slots).flatten(1)

    return tubes(order[:, count:]), tubes(order[:, :count])  # (B, V), (B, M)


def gather_tokens(tokens, index):
    """Select tokens of each clip: (B, N, D) and indices (B, V) give (B, V, D)."""
    offset = torch.arange(len(tokens), device=tokens.device).unsqueeze(1) * tokens.shape[1]
    rows = tokens.flatten(0, 1).index_select(0, (index + offset).flatten())
    return rows.view(*index.shape, tokens.shape[-1])  # (B, V, D)


def normalized_targets(patches):
    """What a decoder must predict: each tubelet and colour channel with mean 0 and variance 1.

    patches: (B, M, P) uint8, or float in 0..1.
    Returns (targets, mean, std): (B, M, P), (B, M, 1, 3), (B, M, 1, 3).
    """
    # Paper does not say: the normalisation. This is VideoMAE's, (x - mean) / (sqrt(unbiased variance) + 1e-6)
    # over one tubelet and channel; the published losses, 0.55 to 0.62, agree with it.
    x = patches / 255 if patches.dtype == torch.uint8 else patches.float()
    x = x.unflatten(-1, (-1, 3))  # (B, M, P/3, 3)
    mean = x.mean(dim=2, keepdim=True)  # (B, M, 1, 3)
    x = x - mean
    std = (x.square().sum(dim=2, keepdim=True) / (x.shape[2] - 1)).sqrt() + 1e-6  # faster here than torch.var
    return (x / std).flatten(2), mean, std  # (B, M, P)


# ---- transformer ----


class Layer(nn.Module):
    """One pre-norm transformer layer (Sec. 3.3): x + attention(norm(x)), then x + mlp(norm(x)); MLP x4."""

    def __init__(self, *, width=192, heads=3):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        # Paper does not say: Xavier-uniform weights and zero biases, as in MAE; LayerNorm keeps 1 and 0.
        for linear in (self.qkv, self.proj, self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def attention(self, x):
        """Multi-head self-attention over all tokens given. (B, N, D) to (B, N, D)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, D/heads) each
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # where the fused form is the slower one
            x = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v  # (B, heads, N, D/heads)
        else:
            x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D/heads)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)

    def forward(self, x):
        """x: (B, N, D). Returns the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TubeletEmbedding(nn.Module):
    """Pixels of a tubelet to a token, plus its fixed position (Sec. 3.3).

    The Linear layer is the map of the usual strided 3-D convolution, but works on visible tubelets alone.
    """

    def __init__(self, *, tokens=128, values=6144, width=192):
        super().__init__()
        self.linear = nn.Linear(values, width)
        # Paper does not say: Xavier-uniform weights and a zero bias, as in MAE.
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        # Fixed sinusoids over the flattened token index, as in VideoMAE.
        rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10000.0) / width))
        angle = torch.arange(tokens, dtype=torch.float64).outer(rate)  # (N, D/2)
        table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()  # (N, D)
        self.register_buffer("positions", table, persistent=False)
        # Paper does not say: input normalisation. ImageNet mean and standard deviation, as in VideoMAE.
        for name, colour in (("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225])):
            self.register_buffer(name, torch.tensor(colour).repeat(values // 3), persistent=False)  # (P,)

    def forward(self, patches, index):
        """patches: (B, V, P) uint8, or float in 0..1; index: (B, V), their positions in the grid."""
        x = patches / 255 if patches.dtype == torch.uint8 else patches.float()
        return self.linear((x - self.mean) / self.std) + self.positions[index]  # (B, V, D)


class Decoder(nn.Module):
    """Masked-autoencoder decoder (Sec. 3.1): predicts the masked tubelets from the visible tokens.

    In the paper every block has its own, of 4 layers, 192 wide, with 3 heads, at every K, size and regime. Paper
    does not say: the inner form. VideoMAE's: Linear without bias, [visible, mask tokens] plus its own sinusoid
    positions, layers, LayerNorm, and a Linear head on the masked tokens only.

    layers: transformer layers of the decoder's width, (B, N, width) to the same; the paper's are
    `[Layer(width=192, heads=3) for _ in range(4)]`. values: predicted per token, P for pixels.
    """

    def __init__(self, *, layers, tokens=128, values=6144, encoder_width=192, width=192):
        super().__init__()
        self.embed = nn.Linear(encoder_width, width, bias=False)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, values)
        # Paper does not say: initialised as in MAE.
        nn.init.xavier_uniform_(self.embed.weight)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        nn.init.normal_(self.mask_token, std=0.02)
        rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10000.0) / width))
        angle = torch.arange(tokens, dtype=torch.float64).outer(rate)  # (N, width/2)
        table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()  # (N, width)
        self.register_buffer("positions", table, persistent=False)

    def forward(self, h, visible, masked):
        """h: (B, V, D) encoder tokens; visible (B, V) and masked (B, M): their indices. Returns (B, M, P)."""
        x = self.embed(h)  # (B, V, decoder width)
        queries = self.mask_token + self.positions[masked]  # (B, M, decoder width)
        x = torch.cat([x + self.positions[visible], queries], dim=1)  # (B, N, decoder width)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, visible.shape[1] :]))  # (B, M, P)
