"""How does the representation develop with depth? The paper's measurements, block by block, and its claims.

Römer & Dickscheid, arXiv 2601.09040, Sec. 4. The probe and retrieval are in probe.py.

    python analyze.py runs/nano-e2e-4 runs/nano-simultaneous-4 runs/nano-sequential-4 --plot
    python analyze.py RUN RUN --data VIDEOS --train-list train.txt --test-list test.txt

Prints one table per measurement and what the runs say to the paper's claims C1-C7; writes analysis.json and
figures. Which layers matter (Gardener, Xiang et al., arXiv 2602.03918), without data and by removing them:

    python analyze.py RUN --entropy                 # or a VideoMAE checkpoint instead of a run
    python analyze.py RUN RUN --prune --plot        # writes prune.json, figure_prune.png

Shapes: B batch, N tokens, D width, K blocks, M masked tokens, P values in one tubelet; here n clips.
"""

import argparse
import copy
import itertools
import json
import math
import pickle
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import evaluation_loader, fail
from model import gather_tokens, normalized_targets, patchify, tube_mask
from probe import (
    collect,
    open_data,
    parser,
    print_table,
    probe_accuracy,
    read_runs,
    score,
    subjects,
)

# ---- measurements: plain tensors in, numbers out ----


def linear_cka(x, y):
    """Linear centred kernel alignment (Sec. 4): |X'Y|^2 / (|X'X| |Y'Y|), columns centred.

    x (n, D), y (n, E): the same n clips. Returns 0..1; nan if x or y is constant. In float64.
    """
    x, y = (a.double() - a.double().mean(dim=0) for a in (x, y))
    return ((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())).item()


def rbf_cka(x, y):
    """CKA with Gaussian kernels exp(-gamma * distance^2), gamma = 1 / (2 * median distance^2) (Sec. 4).

    x (n, D), y (n, E): the same n clips; the median is over pairs of different clips. Returns 0..1; nan if
    constant. In float64; takes memory for three n x n matrices.
    """

    def kernel(a):
        a = a.double() - a.double().mean(dim=0)
        norms = a.square().sum(dim=1)
        k = (a @ a.T).mul_(-2).add_(norms).add_(norms.unsqueeze(1)).clamp_(min=0)  # squared distances
        k.fill_diagonal_(0)
        pairs = len(k) * (len(k) - 1) // 2  # each stands in k twice, after the zeros of the diagonal
        k.div_(-2 * k.flatten().kthvalue(len(k) + pairs).values).exp_()
        mean = k.mean(dim=0)
        return k.sub_(mean).sub_(mean.unsqueeze(1)).add_(mean.mean())

    k, l = kernel(x), kernel(y)
    return (torch.dot(k.flatten(), l.flatten()) / (k.norm() * l.norm())).item()


def patch_similarity(tokens):
    """Mean cosine between the different tokens of a clip (Sec. 4). (B, N, D) to (B,).

    Tokens go through LayerNorm without affine first (eps 1e-12).
    """
    z = F.normalize(F.layer_norm(tokens.float(), tokens.shape[-1:], eps=1e-12), dim=-1)
    pairs = z.sum(dim=1).square().sum(dim=-1) - z.square().sum(dim=(1, 2))  # of all ordered pairs
    return pairs / (z.shape[1] * (z.shape[1] - 1))


def spectrum(x):
    """Shape of the covariance eigenvalues (Sec. 4) of features x (n, D): a dict.

    effective_rank exp(-sum p log p); participation_ratio (sum l)^2 / sum l^2; anisotropy, largest / mean
    eigenvalue; dimensions90, the fewest with 90 % of the variance. All nan if x is constant.
    """
    x = x.double() - x.double().mean(dim=0)
    eigenvalues = torch.linalg.svdvals(x).square()  # up to a factor that cancels
    eigenvalues = F.pad(eigenvalues, (0, x.shape[1] - len(eigenvalues)))
    total = eigenvalues.sum()
    if total <= 0:
        return dict.fromkeys(
            ("effective_rank", "participation_ratio", "anisotropy", "dimensions90"), math.nan
        )
    p = eigenvalues / total
    return {
        "effective_rank": torch.special.entr(p).sum().exp().item(),
        "participation_ratio": (1 / p.square().sum()).item(),
        "anisotropy": (p.max() * len(p)).item(),
        "dimensions90": int((p.cumsum(dim=0) < 0.9 - 1e-12).sum()) + 1,
    }


def uniformity(x):
    """Uniformity on the sphere (Sec. 4) of x (n, D): log mean exp(-2 |z_i - z_j|^2) of pairs; float64."""
    z, total = F.normalize(x.double(), dim=1), 0.0
    for part in z.split(1024):
        cosine = part @ z.T  # |z_i - z_j|^2 = 2 - 2 cosine
        total += cosine.sub_(1).mul_(4).exp_().sum().item()
    return math.log((total - len(z)) / (len(z) * (len(z) - 1)))  # without the pairs (i, i)


def occlusion_drop(accuracy, occluded):
    """OccDrop (Sec. 4): share of a probe's accuracy that is lost when retrained on occluded clips."""
    return (accuracy - occluded) / accuracy if accuracy else math.nan


def occlude(video, patch=(16, 16), *, halves=False, blank=0, generator=None):
    """All `blank` but for one random patch on the grid, the same in all frames (Sec. 4), of (T, H, W, C).

    halves: keep one patch in the left and one in the right half, as for double gratings.
    """
    _, H, W, _ = video.shape
    kept = torch.full_like(video, blank)
    sides = [(0, W // patch[1] // 2), (W // patch[1] // 2, W // patch[1])] if halves else [(0, W // patch[1])]
    for first, last in sides:
        top = int(torch.randint(H // patch[0], (), generator=generator)) * patch[0]
        left = int(torch.randint(first, last, (), generator=generator)) * patch[1]
        window = (slice(None), slice(top, top + patch[0]), slice(left, left + patch[1]))
        kept[window] = video[window]
    return kept


@torch.no_grad()
def reconstruction_losses(model, videos, *, ratio=0.9, seed=0):
    """Local loss by block on masked clips (Sec. 4): {"block1": float, ...}; e2e has block K's only.

    videos: an iterable of (B, T, H, W, C) uint8. The masks are drawn from seed, the same for every model.
    """
    generator, sums, count = torch.Generator().manual_seed(seed), defaultdict(float), 0
    device = next(model.parameters()).device
    for video in videos:
        masks = (index.to(device) for index in tube_mask(len(video), model.grid, ratio, generator))
        visible, masked = masks
        video = video.to(device)
        target = normalized_targets(gather_tokens(patchify(video, model.tubelet), masked))[0]  # (B, M, P)
        for name, prediction in model.reconstruct(video, visible, masked).items():
            sums[name] += F.mse_loss(prediction, target).item() * len(video)
        count += len(video)
    if not count:
        raise ValueError("There is no clip to read in this data.")
    return {name: total / count for name, total in sums.items()}


# ---- which layers matter: Gardener, arXiv 2602.03918 ----

# Where a state_dict keeps the four matrices of an encoder layer, as regular expressions; {} is a number.
WEIGHTS = {
    "this project": r"blocks\.block{}\.layers\.{}\.(qkv|proj|fc1|fc2)\.weight",  # block and layer
    "VideoMAE, timm": r"(encoder\.)?blocks\.{}\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.weight",
    "Hugging Face": r"(videomae\.)?encoder\.layer\.{}\.(attention\.attention\.(query|key|value)"
    r"|(attention\.output|intermediate|output)\.dense)\.weight",
}


def layer_entropy(weights):
    """Importance of a layer without data: (entropy, entropy / ln N), in nats, of its N weights' exact values.

    H = -sum p log p over the distinct float16 values. weights: tensors, those of qkv, attention projection,
    fc1 and fc2 together; no biases, no norms. No binning: bins of equal width can reverse the order.
    """
    values = torch.cat([w.detach().cpu().half().flatten() for w in weights]) + 0.0  # -0 becomes 0
    counts = torch.bincount(values.view(torch.int16).int() + 2**15).double()  # by the 16 bits of a value
    entropy = torch.special.entr(counts / len(values)).sum().item()
    return entropy, entropy / math.log(len(values)) if len(values) > 1 else 0.0


def layer_weights(state, pattern=None):
    """The weights of every encoder layer in a state_dict: {(layer,) or (block, layer): [tensors]}, in order.

    pattern: regular expression of the keys, with {} for each number; None: the first of WEIGHTS that fits.
    Raises ValueError if no key fits.
    """
    if pattern and "{}" not in pattern:
        raise ValueError(f"--pattern {pattern} lacks {{}}, which stands for the number of the layer.")
    for one in [pattern] if pattern else WEIGHTS.values():
        try:
            numbered, found = re.compile(one.replace("{}", r"(\d+)")), defaultdict(list)
        except re.error as error:
            raise ValueError(f"--pattern {pattern} is not a regular expression: {error}.") from None
        for key, value in state.items():
            if match := numbered.fullmatch(key):
                numbers = tuple(int(part) for part in match.groups() if part and part.isdigit())
                found[numbers].append(value)
        if found:
            return dict(sorted(found.items()))
    some = ", ".join(key for key in state if key.endswith("weight"))[:400]
    example = r"'blocks\.{}\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.weight'"
    raise ValueError(
        f"No key fits {pattern or 'a known naming'}; give --pattern, like {example}, for: {some} ..."
    )


def read_state(path):
    """The state_dict in a run folder or in a checkpoint, also if it is nested as model, module or state_dict.

    Raises ValueError if there is none.
    """
    path = Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"There is no checkpoint {path}; name a run folder or the file of a state_dict.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # VideoMAE's hold their arguments
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a checkpoint that torch.load() reads safely: {why}") from None
    for name in ("model", "module", "state_dict"):
        state = state.get(name, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state_dict: no tensors by name.")
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def prune(model, layers):
    """A copy of a Blockwise model without some encoder layers, numbered 1..depth through all blocks.

    A removed layer becomes nn.Identity: the residual stream passes, and the keys of the others keep their
    numbers. To load a saved one: prune(Blockwise(**config), layers).load_state_dict(state).
    """
    depth = model.config["depth"]
    if not set(layers) <= set(range(1, depth + 1)):
        raise ValueError(f"Layers {sorted(layers)} cannot be removed; there are 1 to {depth}.")
    model = copy.deepcopy(model)
    places = [(block.layers, i) for block in model.blocks.values() for i in range(len(block.layers))]
    for number in set(layers):
        of_block, i = places[number - 1]
        of_block[i] = torch.nn.Identity()
    return model


class Pruned(torch.nn.Module):
    """Many pruned copies of one model in one pass: each different input of a layer goes through it once.

    removed: frozensets of layer numbers, as for prune().
    """

    def __init__(self, model, removed):
        super().__init__()
        self.model, self.removed = model, removed

    def encode(self, video):
        """video (B, T, H, W, C) to {frozenset: (B, N, D)}, the tokens after the last block of every copy."""
        blocks, patches = list(self.model.blocks.values()), patchify(video, self.model.tubelet)  # (B, N, P)
        places = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)  # (B, N)
        tokens = dict.fromkeys(self.removed, blocks[0].embedding(patches, places))  # (B, N, D)
        for number, layer in enumerate((layer for block in blocks for layer in block.layers), start=1):
            done = {}
            for removed, h in tokens.items():
                if number not in removed:
                    if h not in done:  # the same tensor, not only an equal one
                        done[h] = layer(h)
                    tokens[removed] = done[h]
        return {removed: blocks[-1].norm(h) for removed, h in tokens.items()}


def spearman(a, b):
    """Spearman's rank correlation of two sequences; equal values share a rank. nan if one is constant."""

    def ranks(values):
        _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[group]

    a, b = ranks(a), ranks(b)
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else math.nan


def probe_pruned(args, model, removed):
    """Linear probe of the last block without some layers: {frozenset: share of targets right, by clip}."""
    data = open_data(args, model.video)
    features, targets, _, _, folds = collect(args, {"": Pruned(model, removed)}, data)
    probed = tqdm(features.items(), "probes", leave=False)
    return {choice: probe_accuracy(x, targets, folds)[3].mean(axis=0) for (_, choice), x in probed}


def measure_pruning(args, run, draws=5):
    """Accuracy of a run without its 1, 3, 5, ... least important layers, for every ranking (prune.json).

    Rankings: entropy; random, several draws; last, the last layers first; magnitude; and the oracle, which
    removes first what costs least when it alone is removed.
    """
    weights = layer_weights(run.model.state_dict()).values()
    entropies, shares = zip(*(layer_entropy(w) for w in weights))
    # Paper does not say: which magnitude. The mean |w| of the same four matrices.
    magnitude = [torch.cat([part.flatten() for part in w]).abs().mean().item() for w in weights]
    depth, rng = len(weights), np.random.default_rng(0)
    rankings = {  # {name: [importance of layer 1..depth, of each draw]}
        "entropy": [entropies],
        "random": [rng.permutation(depth) for _ in range(draws)],
        "last": [-np.arange(depth)],
        "magnitude": [magnitude],
    }
    sizes, single = [0, *range(1, depth, 2)], [frozenset([number]) for number in range(1, depth + 1)]

    def choices(importance):
        order = np.argsort(importance, kind="stable") + 1
        return [frozenset(order[:size].tolist()) for size in sizes]

    wanted = {choice for draw in itertools.chain(*rankings.values()) for choice in choices(draw)}
    right = probe_pruned(args, run.model, wanted | set(single))
    without = [right[choice].mean() for choice in single]
    rankings["oracle"] = [np.negative(without)]
    missing = set(choices(rankings["oracle"][0])) - right.keys()
    right |= probe_pruned(args, run.model, missing) if missing else {}
    full = right[frozenset()]
    return {
        "layers": {"entropy": entropies, "/ ln N": shares, "mean |w|": magnitude, "without it": without},
        "removed": sizes,
        "accuracy": {
            name: [[right[c].mean() for c in choices(i)] for i in r] for name, r in rankings.items()
        },
        "spearman": {name: [spearman(i, rankings["oracle"][0]) for i in r] for name, r in rankings.items()},
        "two standard errors": 2 * full.std(ddof=1) / math.sqrt(len(full)),
    }


# ---- all measurements of some runs ----


class Occluded:
    """A source whose clips are occluded; which patch is left is drawn from (seed, number of the clip)."""

    def __init__(self, source, patch, *, halves=False, blank=0, seed=0):
        self.source, self.patch, self.halves, self.blank, self.seed = source, patch, halves, blank, seed
        self.labels, self.name, self.targets = source.labels, source.name, source.targets
        self.check_broken = source.check_broken

    def __len__(self):
        return len(self.source)

    def read(self, index, rng=None):
        """Clip `index` of the source, occluded."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        video = torch.from_numpy(self.source.read(index))
        how = {"halves": self.halves, "blank": self.blank, "generator": generator}
        return occlude(video, self.patch, **how).numpy()


def measure(args, runs):
    """Everything about every run and its untrained network, on the test clips: (results, values by clip).

    results: {"runs": {title: {measurement: [value by block]}}, "linear CKA across runs": ...}.
    values by clip: {title: {measurement: (K, test clips)}}.
    """
    model, models = runs[0].model, subjects(runs)
    del models["pixels"]
    data = open_data(args, model.video)
    features, targets, _, labels, folds = collect(args, models, data, measure=patch_similarity)
    # The patch is a tubelet's, 16 x 16 in the paper. Blank is 0, which in gratings (-1..1) is mid-grey.
    how = {
        "halves": args.data == "double-gratings",
        "blank": 128 if args.data in ("gratings", "double-gratings") else 0,
    }
    covered = [(Occluded(source, model.tubelet[1:], **how), indices) for source, indices in data]
    occluded = collect(args, models, covered)[0]
    results, by_clip, tested = {}, {}, torch.cat([test for _, test in folds])
    shuffled = torch.randperm(len(tested), generator=torch.Generator().manual_seed(0))
    some = tested[shuffled]  # its first 1000 or 5000 serve what is quadratic in the clips
    for title in tqdm(models, "measurements", leave=False):
        names = list(models[title].blocks)
        x = [features[title, name] for name in names]
        scores = [score(z, targets, folds) for z in x]
        hidden = [np.mean(probe_accuracy(occluded[title, name], targets, folds)[0]) for name in names]
        spectra = [spectrum(z[tested]) for z in x]
        mixing = [features[title, name, "measure"][tested].numpy() for name in names]
        correct = np.stack([s["correct"] for s in scores])  # (K, L, test clips)
        by_clip[title] = {"accuracy": correct.mean(axis=1), "patch similarity": np.stack(mixing)}
        by_clip[title] |= {f"accuracy: {name}": correct[:, i] for i, name in enumerate(labels)}
        results[title] = {
            "accuracy": [s["accuracy"] for s in scores],
            **{f"accuracy: {name}": [s["targets"][i] for s in scores] for i, name in enumerate(labels)},
            "mAP": [s["map"] for s in scores],
            "patch similarity": [float(values.mean()) for values in mixing],
            "OccDrop": [occlusion_drop(s["accuracy"], h) for s, h in zip(scores, hidden)],
            "linear CKA": [[linear_cka(a[tested], b[tested]) for b in x] for a in x],
            "RBF CKA": [[rbf_cka(a[some[:1000]], b[some[:1000]]) for b in x] for a in x],
            **{name: [s[name] for s in spectra] for name in spectra[0]},
            "uniformity": [uniformity(z[some[:5000]]) for z in x],
        }
    source, indices = data[-1]
    few = sorted(np.random.default_rng(0).permutation(indices)[:1000].tolist())
    for run in tqdm(runs, "reconstruction", leave=False):
        batches = evaluation_loader(source, indices=few, batch=args.batch, workers=args.workers)
        losses = reconstruction_losses(run.model, (clips["video"] for clips in batches if clips["index"]))
        results[run.title]["reconstruction loss"] = [losses.get(name, math.nan) for name in run.model.blocks]
    across = {}
    for a, b in itertools.combinations(runs, 2):
        pairs = [(features[a.title, i], features[b.title, j]) for i in a.model.blocks for j in b.model.blocks]
        values = np.array([linear_cka(x[tested], y[tested]) for x, y in pairs]).reshape(
            len(a.model.blocks), -1
        )
        across[f"{a.title} | {b.title}"] = values.tolist()
    return {"runs": results, "linear CKA across runs": across}, by_clip


def convergence(runs, results):
    """LayerLock's observation, shallow layers converge first, on runs that froze some: {title: [numbers]}.

    Of every run of regime layerlock with pixel targets: the step of the first freezing, steps between blocks,
    blocks frozen in the end, final reconstruction loss, and how much more that is than of e2e runs of the
    same architecture; nan without one. results: {title: {"reconstruction loss": [by block]}}.
    """

    def same(run):
        unlike = ("regime", "blocks", "frozen", "target")
        return {name: value for name, value in run.model.config.items() if name not in unlike}

    rows = {}
    for run in runs:
        settings, loss = run.checkpoint["settings"], results[run.title]["reconstruction loss"][-1]
        if (settings["regime"], settings.get("target")) == ("layerlock", "pixels"):
            ends = [r for r in runs if r.model.config["regime"] == "e2e" and same(r) == same(run)]
            plain = np.mean([results[r.title]["reconstruction loss"][-1] for r in ends]) if ends else math.nan
            schedule = [settings[f"freeze_{name}"] for name in ("start", "every", "until")]
            rows[run.title] = [*schedule, loss, loss - plain]
    return rows


# ---- the paper's claims ----

HIGH = ("motion", "agreement", "class", "delta", "higher_side", "sf_difference", "sf_match", "theta_match")
LOW = ("colour", "contrast", "sf", "sf_left", "sf_right")
# Differs from paper: it names no thresholds. Ours, in accuracy: what counts as close, and as no gain.
CLOSE, NO_GAIN, CKA_SATURATED = 0.03, 0.01, 0.98


class Group:
    """The runs of one setting that differ in their seed: means by block, and how sure they are."""

    def __init__(self, runs, results, by_clip):
        config = dict(runs[0].model.config)
        self.regime, self.K, self.name = config.pop("regime"), config.pop("blocks"), runs[0].group
        for name in ("frozen", "target"):
            config.pop(name)
        self.config = config  # of the architecture, K aside: only groups of the same one are compared
        self.results = [results[run.title] for run in runs]
        self.by_clip = [by_clip[run.title] for run in runs]

    def values(self, name):
        """(seeds, K) of a measurement."""
        return np.array([result[name] for result in self.results])

    def mean(self, name, block=-1):
        """Mean over seeds after one block."""
        return float(self.values(name)[:, block].mean())

    def clips(self, name, block=-1):
        """(test clips,) of a measurement, mean over seeds."""
        return np.mean([values[name][block] for values in self.by_clip], axis=0)

    def seed_variance(self, name, block=-1):
        """Variance of the mean over seeds; 0 if there is one, so that only clips make it uncertain."""
        values = self.values(name)[:, block]
        return values.var(ddof=1) / len(values) if len(values) > 1 else 0.0


def standard_error(a, b, name, block_a=-1, block_b=-1):
    """Of the difference of two means: spread over seeds, and of the paired differences over test clips."""
    gap = a.clips(name, block_a) - b.clips(name, block_b)
    seeds = a.seed_variance(name, block_a) + b.seed_variance(name, block_b)
    return math.sqrt(seeds + gap.var(ddof=1) / len(gap))


def verdict(value, error, limit):
    """Is value below limit? "confirmed", "refuted", or within two errors, and for nan, "cannot tell"."""
    if math.isnan(value) or abs(value - limit) <= 2 * error:
        return "cannot tell"
    return "confirmed" if value < limit else "refuted"


def overall(parts):
    """One verdict from several: refuted if one is, confirmed if all are."""
    parts = list(parts)
    if not parts:
        return "cannot tell"
    return "refuted" if "refuted" in parts else "confirmed" if set(parts) == {"confirmed"} else "cannot tell"


def difference(a, b, name, limit, block=-1):
    """(verdict that a - b is below limit, the numbers in words)."""
    error = standard_error(a, b, name, block, block)
    numbers = f"{a.regime} K={a.K} {a.mean(name, block):.3f}, {b.regime} K={b.K} {b.mean(name, block):.3f}"
    words = f"{name}: {numbers}; two standard errors {2 * error:.3f}"
    return verdict(a.mean(name, block) - b.mean(name, block), error, limit), words


def claims(groups):
    """What some groups of runs say to the paper's claims: {claim: (verdict, [numbers that decide])}.

    An accuracy differs, or a limit is passed, if it does by two standard errors: those of seeds and of test
    clips.
    """
    e2e = [g for g in groups if g.regime == "e2e"]
    blockwise = [g for g in groups if g.regime in ("simultaneous", "sequential")]
    simultaneous, sequential = (
        [g for g in blockwise if g.regime == r] for r in ("simultaneous", "sequential")
    )
    ends = [(a, b) for a in e2e for b in blockwise if a.config == b.config]
    pairs = [(a, b) for a, b in ends if a.K == b.K > 1]  # whose blocks can be compared
    orders = [(a, b) for a in simultaneous for b in sequential if (a.config, a.K) == (b.config, b.K)]
    finer = [(a, b) for a in blockwise for b in blockwise if (a.config, a.regime) == (b.config, b.regime)]
    finer = [(a, b) for a, b in finer if a.K < b.K]
    targets = [
        name.removeprefix("accuracy: ") for name in groups[0].results[0] if name.startswith("accuracy: ")
    ]
    high, low = ([f"accuracy: {t}" for t in targets if t in names] for names in (HIGH, LOW))

    tests = {
        "C1 blockwise training ends close to end-to-end": [
            difference(a, b, "accuracy", CLOSE) for a, b in ends
        ],
        "C2 sequential is like simultaneous": [
            difference(x, y, "accuracy", CLOSE) for a, b in orders for x, y in ((a, b), (b, a))
        ],
        "C3 high-level targets are decodable earlier (block 1)": [
            difference(a, b, name, 0.0, block=0) for a, b in pairs for name in high
        ],
        "C4 late blocks saturate": [saturation(b) for b in blockwise if b.K > 1],
        "C5 low-level targets lose little": [difference(a, b, name, CLOSE) for a, b in ends for name in low],
        "C6 tokens mix earlier (patch similarity of block 1)": [
            difference(a, b, "patch similarity", 0.0, block=0) for a, b in pairs
        ],
        "C7 finer blocks cost little": [difference(a, b, "accuracy", CLOSE) for a, b in finer],
    }
    return {
        claim: (overall(v for v, _ in found), [words for _, words in found]) for claim, found in tests.items()
    }


def saturation(group):
    """C4 for one group: the last block gains nothing, and its features are nearly the ones before."""
    gain, error = (
        group.mean("accuracy") - group.mean("accuracy", -2),
        standard_error(group, group, "accuracy", -1, -2),
    )
    cka = float(group.values("linear CKA")[:, -2, -1].mean())
    parts = [verdict(gain, error, NO_GAIN), verdict(CKA_SATURATED - cka, 0.0, 0.0)]
    words = f"{group.regime} K={group.K}: last gain {gain:+.3f}, CKA {cka:.3f}; two errors {2 * error:.3f}"
    return overall(parts), words


# ---- figures ----


def pyplot():
    """matplotlib.pyplot, which only figures need; called before the measurements, not to lose them."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib; install it with: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot(groups, folder):
    """Draw the paper's Figures 2-5 as PNG files: lines are means, bands ±1 sd over seeds."""
    plt = pyplot()
    colours = {g.name: colour for g, colour in zip(groups, itertools.cycle(plt.get_cmap("tab10").colors))}
    probes = [name for name in groups[0].results[0] if name.startswith("accuracy")]
    tokens = (
        "patch similarity",
        "OccDrop",
        "effective_rank",
        "participation_ratio",
        "dimensions90",
        "uniformity",
    )
    figures = {
        "figure2_probe": [(draw_lines, name) for name in probes],
        "figure3_loss": [(draw_lines, "reconstruction loss"), (draw_lines, "mAP")],
        "figure4_cka": [(draw_gains, None), *((draw_heat, g) for g in groups)],
        "figure5_tokens": [(draw_lines, name) for name in tokens],
    }
    for name, panels in figures.items():
        columns = len(panels) if len(panels) in (2, 4) else 3
        rows = -(-len(panels) // columns)
        size = (4.2 * columns, 3.4 * rows + 0.6)
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        for axis, (panel, what) in zip(axes.flat, panels):
            panel(axis, what, groups, colours)
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        handles, titles = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, titles, loc="outside lower center", ncols=min(4, len(titles)), frameon=False)
        figure.savefig(folder / f"{name}.png", dpi=150)
        plt.close(figure)


def draw_lines(axis, name, groups, colours):
    """One measurement by block."""
    for g in groups:
        values, blocks = g.values(name), np.arange(1, g.K + 1)
        mean, sd = values.mean(axis=0), values.std(axis=0, ddof=len(values) > 1)
        axis.plot(blocks, mean, marker="o", label=g.name, color=colours[g.name])
        axis.fill_between(blocks, mean - sd, mean + sd, color=colours[g.name], alpha=0.2)
    axis.set(title=name.replace("accuracy", "linear probe").replace("_", " "), xlabel="block")
    axis.set_xticks(range(1, max(g.K for g in groups) + 1))
    axis.grid(alpha=0.3)


def draw_gains(axis, _, groups, colours):
    """Gain in accuracy of every transition against the CKA of its two blocks (the paper's Figure 4c)."""
    for g in groups:
        cka = g.values("linear CKA").mean(axis=0).diagonal(1)
        gain = np.diff(g.values("accuracy").mean(axis=0))
        axis.plot(cka, gain, "o", color=colours[g.name], label=g.name)
        for k, place in enumerate(zip(cka, gain), start=1):
            axis.annotate(f"{k}→{k + 1}", place, textcoords="offset points", xytext=(5, 4), fontsize=8)
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.margins(x=0.12)
    axis.set(title="gain by transition", xlabel="linear CKA", ylabel="gain in accuracy")
    axis.grid(alpha=0.3)


def draw_heat(axis, g, groups, colours):
    """Linear CKA of all pairs of blocks of one group."""
    cka, ticks = g.values("linear CKA").mean(axis=0), range(1, g.K + 1)
    axis.imshow(cka, vmin=0, vmax=1, cmap="viridis", origin="lower", extent=(0.5, g.K + 0.5) * 2)
    for i, j in itertools.product(range(g.K), repeat=2):
        colour = "white" if cka[i, j] < 0.6 else "black"
        axis.text(j + 1, i + 1, f"{cka[i, j]:.2f}", ha="center", va="center", color=colour)
    axis.set(title=f"linear CKA, {g.name}", xlabel="block", ylabel="block", xticks=ticks, yticks=ticks)


def plot_pruning(results, folder):
    """Draw accuracy against layers removed, a panel per run (figure_prune.png); random: ±1 sd of draws."""
    plt = pyplot()
    size = (4.2 * len(results), 3.8)
    figure, axes = plt.subplots(
        1, len(results), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (title, result) in zip(axes.flat, results.items()):
        for name, draws in result["accuracy"].items():
            mean, sd = np.mean(draws, axis=0), np.std(draws, axis=0, ddof=len(draws) > 1)
            axis.plot(result["removed"], mean, marker="o", label=name)
            axis.fill_between(result["removed"], mean - sd, mean + sd, alpha=0.2)
        axis.set(title=title, xlabel="layers removed", xticks=result["removed"])
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("linear probe, last block")
    handles, titles = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, titles, loc="outside lower center", ncols=len(titles), frameon=False)
    figure.savefig(folder / "figure_prune.png", dpi=150)
    plt.close(figure)


def plot_memory(saved, path, *, title=""):
    """Draw the saved activations of a training step against K. saved: {K: {way: megabytes}}."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for way in next(iter(saved.values())):
        axis.plot(list(saved), [row[way] for row in saved.values()], marker="o", label=way)
    axis.set(yscale="log", xticks=list(saved), xlabel="blocks K", ylabel="saved activations, MB", title=title)
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- command line ----


def flags():
    """The command line of this script."""
    found = parser(__doc__)
    found.add_argument("--out", default="analysis", help="folder for the .json and the figures [analysis]")
    found.add_argument(
        "--plot", action=argparse.BooleanOptionalAction, default=False, help="draw the figures"
    )
    what = found.add_mutually_exclusive_group()
    what.add_argument(
        "--entropy", action="store_true", help="only rank the layers by entropy; RUN may be any checkpoint"
    )
    what.add_argument(
        "--prune", action="store_true", help="only probe with layers removed, in several orders"
    )
    found.add_argument(
        "--pattern", help="with --entropy: regular expression of the weights' keys, {} = layer"
    )
    return found


def main(arguments=None):
    """Print the tables and the verdicts, write analysis.json, draw the figures."""
    args = flags().parse_args(arguments)
    try:
        analyze(args)
    except ValueError as error:
        fail(error)


def analyze(args):
    """What the flags ask for, of the runs that they name."""
    if args.pattern and not args.entropy:
        raise ValueError("--pattern says where --entropy finds the weights; give both.")
    if args.entropy:
        for path in args.runs:
            print_entropies(path, args.pattern)
        return
    if args.plot:
        pyplot()
    runs = read_runs(args.runs)
    if args.prune:
        print_pruning(args, runs)
        return
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    found, by_clip = measure(args, runs)
    by_name = defaultdict(list)
    for run in runs:
        by_name[run.group].append(run)
    groups = [Group(members, found["runs"], by_clip) for members in by_name.values()]
    for name in groups[0].results[0]:
        if "CKA" not in name:
            rows = {g.name: g.values(name).T.tolist() for g in groups}
            print_table(name, [f"block{k}" for k in range(1, max(g.K for g in groups) + 1)], rows)
    for name in ("linear CKA", "RBF CKA"):
        rows = {g.name: [g.values(name)[:, k, k + 1].tolist() for k in range(g.K - 1)] for g in groups}
        print_table(
            f"{name} of consecutive blocks",
            [f"{k}-{k + 1}" for k in range(1, max(g.K for g in groups))],
            rows,
        )

    for title, (start, every, until, loss, more) in convergence(runs, found["runs"]).items():
        when = f"{until} blocks frozen from step {start} on, one every {every}"
        print(f"\n{title}, {when}: reconstruction loss {loss:.3f}, {more:+.3f} against e2e")
    print("\nThe paper's claims, by two standard errors over seeds and test clips:")
    if max(len(members) for members in by_name.values()) == 1:
        print("(one seed each: the spread over seeds is unknown and not counted)")
    verdicts = claims(groups)
    for claim, (answer, numbers) in verdicts.items():
        print(
            f"{claim}: {answer}"
            + "".join(f"\n    {words}" for words in numbers or ["no runs or no targets to compare"])
        )
    text = json.dumps(found | {"claims": verdicts}, indent=1).replace("NaN", "null")
    (folder / "analysis.json").write_text(text + "\n")
    if args.plot:
        plot(groups, folder)
    print(
        f"\n{folder}/analysis.json"
        + (f" and {folder}/figure2_probe.png to figure5_tokens.png" if args.plot else "")
    )


def print_entropies(path, pattern):
    """The table of --entropy: a row per layer, and per block where the keys have two numbers."""
    layers = layer_weights(read_state(path), pattern)
    rows, blocks = {}, defaultdict(list)
    for numbers, weights in layers.items():
        rows[layer_title(numbers)] = [[value] for value in layer_entropy(weights)]
        blocks[numbers[0]] += weights
    lowest = ", ".join(sorted(rows, key=lambda name: rows[name][0]))
    if len(next(iter(layers))) > 1:
        rows |= {f"block{k}, all": [[value] for value in layer_entropy(w)] for k, w in blocks.items()}
    print_table(str(path), ["entropy", "/ ln N"], rows)
    print(f"lowest first: {lowest}")


def layer_title(numbers):
    """Name of a layer by the numbers in its keys."""
    return "layer {}".format(*numbers) if len(numbers) == 1 else "block{} layers.{}".format(*numbers)


def print_pruning(args, runs):
    """The tables of --prune, prune.json and figure_prune.png."""
    folder, results = Path(args.out), {}
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        results[run.title] = result = measure_pruning(args, run)
        names = [layer_title(numbers) for numbers in layer_weights(run.model.state_dict())]
        rows = {n: [[v] for v in values] for n, values in zip(names, zip(*result["layers"].values()))}
        print_table(run.title, result["layers"], rows)
        rows = {n: [*zip(*draws), result["spearman"][n]] for n, draws in result["accuracy"].items()}
        columns = [*(f"n = {size}" for size in result["removed"]), "Spearman"]
        print_table("linear probe without n layers", columns, rows)
        print(f"Two standard errors over the test clips, n = 0: {result['two standard errors']:.3f}")
    (folder / "prune.json").write_text(json.dumps(results, indent=1).replace("NaN", "null") + "\n")
    if args.plot:
        plot_pruning(results, folder)
    print(f"\n{folder}/prune.json" + (f" and {folder}/figure_prune.png" if args.plot else ""))


if __name__ == "__main__":
    main()
