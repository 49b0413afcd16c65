"""How does the representation develop with depth? The paper's measurements of every block of some runs.

Römer & Dickscheid, arXiv 2601.09040, Sec. 4. The linear probe and retrieval are in probe.py.

    python analyze.py runs/nano-e2e-4 runs/nano-simultaneous-4 runs/nano-sequential-4
    python analyze.py RUN RUN --data VIDEOS --train-list train.txt --test-list test.txt
    python analyze.py RUN/step_*.pt    # snapshots (train.py --keep): also their CKA with the last one

Prints one table per measurement. Writes analysis.json (all values, by run and block) and analysis.npz (some of
them by test clip). Runs whose folders differ only in -seed1, -seed2 are seeds of one group: one row, mean ± sd.
Shapes: B batch, N tokens, D width, K blocks, M masked tokens, P values in one tubelet, L targets; here n clips.
"""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import probe
from blockwise import local_loss
from model import gather_tokens, normalized_targets, tube_mask

# ---- measurements: plain tensors in, numbers out ----


def linear_cka(x, y):
    """Linear centred kernel alignment (Sec. 4): |X'Y|^2 / (|X'X| |Y'Y|), columns centred.

    x (n, D), y (n, E): the same n clips. Returns 0..1; nan if x or y is constant. In float64. Of fewer clips
    than some times D it is too high, also between features that have nothing in common.
    """
    x, y = (a.double() - a.double().mean(dim=0) for a in (x, y))
    return ((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())).item()


def rbf_cka(x, y):
    """CKA with Gaussian kernels exp(-gamma * distance^2), gamma = 1 / (2 * median distance^2) (Sec. 4).

    x (n, D), y (n, E): the same n clips. The median is over pairs of different clips, the lower one of two.
    Returns 0..1; nan if half of the pairs or more are equal. In float64; takes three n x n matrices.
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

    effective_rank exp(-sum p log p); participation_ratio (sum l)^2 / sum l^2; anisotropy, largest / mean of
    all D eigenvalues; dimensions90, the fewest with 90 % of the variance. All nan if x is constant.
    """
    x = x.double() - x.double().mean(dim=0)
    eigenvalues = torch.linalg.svdvals(x).square()  # up to a factor that cancels
    eigenvalues = F.pad(eigenvalues, (0, x.shape[1] - len(eigenvalues)))
    total = eigenvalues.sum()
    p = eigenvalues / total  # nan if x is constant
    return {
        "effective_rank": torch.special.entr(p).sum().exp().item(),
        "participation_ratio": (1 / p.square().sum()).item(),
        "anisotropy": (p.max() * len(p)).item(),
        "dimensions90": int((p.cumsum(dim=0) < 0.9 - 1e-12).sum()) + 1 if total > 0 else math.nan,
    }


def uniformity(x):
    """Uniformity on the sphere (Sec. 4) of x (n, D): log mean exp(-2 |z_i - z_j|^2) of pairs; float64."""
    distance = torch.pdist(F.normalize(x.double(), dim=1))  # of every pair
    return distance.square_().mul_(-2).exp_().mean().log().item()


@torch.no_grad()
def reconstruction_losses(model, videos, *, ratio=0.9, seed=0):
    """Local loss by block on masked clips (Sec. 4): {"block1": float, ...}; e2e has block K's only.

    videos: an iterable of (B, T, H, W, C) uint8. The masks are drawn from seed, the same for every model, also
    for one that was trained with another ratio.
    """
    generator, sums, count = torch.Generator().manual_seed(seed), defaultdict(float), 0
    device = next(model.parameters()).device
    for video in videos:
        visible, masked = (index.to(device) for index in tube_mask(len(video), model.grid, ratio, generator))
        video = video.to(device)
        target = normalized_targets(gather_tokens(model.patches(video), masked))[0]  # (B, M, P)
        for name, prediction in model.reconstruct(video, visible, masked).items():
            sums[name] += local_loss(prediction, target).item() * len(video)
        count += len(video)
    return {name: total / count for name, total in sums.items()}


# ---- OccDrop: the accuracy that a probe loses if a clip shows one patch only (Sec. 4) ----


def occlude(video, patch=(16, 16), *, halves=False, blank=0, generator=None):
    """All `blank` but for one random patch on the grid, the same in all frames (Sec. 4), of (T, H, W, C).

    halves: keep one patch in the left and one in the right half, as for double gratings.
    """
    _, H, W, _ = video.shape
    kept = torch.full_like(video, blank)
    columns = W // patch[1]
    # Of an odd number of columns, the middle one lies in neither half.
    sides = [(0, columns // 2), ((columns + 1) // 2, columns)] if halves else [(0, columns)]
    for first, last in sides:
        top = int(torch.randint(H // patch[0], (), generator=generator)) * patch[0]
        left = int(torch.randint(first, last, (), generator=generator)) * patch[1]
        window = (slice(None), slice(top, top + patch[0]), slice(left, left + patch[1]))
        kept[window] = video[window]
    return kept


class Occluded:
    """A source of clips (data.py) whose clips are occluded; the number of a clip decides the patch that stays."""

    # Differs from paper: the patch is a tubelet's, which is 16 x 16 as there in its sizes, but 8 x 8 in nano.
    # Blank is 0, which in gratings (-1..1) is mid-grey.

    def __init__(self, source, patch):
        self.source, self.patch = source, patch
        self.labels, self.name, self.targets = source.labels, source.name, source.targets

    def __len__(self):
        return len(self.source)

    def read(self, index, rng=None):
        """Clip `index` of the source, occluded."""
        video, generator = torch.from_numpy(self.source.read(index)), torch.Generator().manual_seed(index)
        stimuli = isinstance(self.source, data.Gratings)
        look = {"halves": stimuli and self.source.double, "blank": 128 if stimuli else 0}
        return occlude(video, self.patch, **look, generator=generator).numpy()


def occlusion_drops(whole, occluded):
    """OccDrop of every block (Sec. 4), the fraction of accuracy that is lost: ([K], (K, test clips)).

    whole, occluded: probe_accuracy() of every block, on whole clips, and retrained and tested on occluded ones.
    The second result is the effect of each test clip on the first.
    """
    a, o = (np.array([[np.mean(s["accuracy"])] for s in probes]) for probes in (whole, occluded))  # (K, 1)
    correct, still_correct = (np.stack([s["correct"].mean(axis=0) for s in p]) for p in (whole, occluded))
    # To first order, a clip changes 1 - o / a by this; a constant is left out, as only the spread is used.
    effects = correct * o / a**2 - still_correct / a
    return ((a - o) / a)[:, 0].tolist(), effects


# ---- all measurements of some runs ----

# Paper does not say: the level of each target. Ours: every parameter of one stimulus is low level; relations
# between two, and what a whole clip shows, are high level. shape and size are neither.
LOW = ("colour", "contrast", "sf", "sf_left", "sf_right", "tf", "theta", "theta_left", "theta_right")
HIGH = ("motion", "agreement", "class", "delta", "higher_side", "sf_difference", "sf_match", "theta_match")
# Differs from paper: of more test clips, a random choice of this many. The first two need memory of n x n.
MOST_CLIPS = {"RBF CKA": 1000, "uniformity": 5000, "reconstruction loss": 1000}


def measure(args, runs, sources):
    """All measurements of all runs and their untrained networks, on the test clips.

    Returns values {title: {measurement: [K]}}, by_clip {title: {measurement: (K, test clips)}}, chance
    {measurement: value}, and the numbers of clips {"read", "tested", "folds"}.
    """
    models = probe.networks(runs, args.before_norm)
    options = {"batch": args.batch, "workers": args.workers, "device": args.device}
    occluded = [(Occluded(source, runs[0].model.tubelet[1:]), indices) for source, indices in sources]
    x, targets, names, labels, sizes = probe.extract(models, sources, **options, measure=patch_similarity)
    folds = probe.split(targets, labels, sizes, sources[0][0])
    occluded_x, _, occluded_names, *_ = probe.extract(models, occluded, **options)
    if occluded_names != names:
        raise ValueError("Some clips could not be read a second time; their disk may be gone.")

    values, by_clip, tested = {}, {}, torch.cat([test for _, test in folds])
    for title, model in tqdm(models.items(), "measurements", leave=False):
        blocks = [(title, name) for name in model.blocks]
        similarity = np.stack([x[(*block, "measure")][tested].numpy() for block in blocks])
        values[title], by_clip[title] = decodability(
            [x[block] for block in blocks], [occluded_x[block] for block in blocks], targets, folds, labels
        )
        by_clip[title]["patch similarity"] = similarity
        values[title]["patch similarity"] = similarity.mean(axis=1).tolist()
        values[title] |= geometry([x[block][tested] for block in blocks])
    source, indices = sources[-1]
    some = np.random.default_rng(0).permutation(indices)[: MOST_CLIPS["reconstruction loss"]]
    loader = data.eval_loader(source, indices=sorted(some.tolist()), batch=args.batch, workers=args.workers)
    for run in tqdm(runs, "reconstruction", leave=False):
        videos = (batch["video"] for batch in loader if batch["index"])
        losses = reconstruction_losses(run.model.to(args.device), videos)
        values[run.title]["reconstruction loss"] = [losses.get(name, math.nan) for name in run.model.blocks]
    for run in runs:
        snapshots = [other for other in runs if other.folder == run.folder]
        last = max(snapshots, key=lambda other: other.checkpoint["step"])
        if len(snapshots) > 1:
            pairs = [(x[run.title, name][tested], x[last.title, name][tested]) for name in run.model.blocks]
            values[run.title]["linear CKA with the last snapshot"] = [linear_cka(*pair) for pair in pairs]
    clips = {"read": len(names), "tested": len(tested), "folds": len(folds)}
    chance = np.array(probe.chance_accuracy(targets, folds))  # (L,)
    chance = {name: chance[columns].mean() for name, columns in accuracy_columns(labels).items()}
    return values, by_clip, chance, clips


def accuracy_columns(labels):
    """Columns of the targets that every accuracy is a mean of: {measurement: [column]}."""
    columns = {"accuracy": list(range(len(labels)))}
    for level, members in (("high-level", HIGH), ("low-level", LOW)):
        columns[f"{level} accuracy"] = [i for i, label in enumerate(labels) if label in members]
    columns |= {f"accuracy: {label}": [i] for i, label in enumerate(labels)}
    return {name: numbers for name, numbers in columns.items() if numbers}


def decodability(x, occluded, targets, folds, labels):
    """Probe, retrieval and OccDrop by block: ({measurement: [K]}, {measurement: (K, test clips)}).

    x, occluded: features [(n, D)] of every block, of the same clips. labels: names of the targets.
    """
    scores = [probe.score(z, targets, folds) for z in x]
    by_target = np.array([s["accuracy"] for s in scores])  # (K, L)
    correct = np.stack([s["correct"] for s in scores])  # (K, L, test clips)
    values, by_clip = {}, {}
    for name, columns in accuracy_columns(labels).items():
        values[name] = by_target[:, columns].mean(axis=1).tolist()
        if ":" not in name:
            by_clip[name] = correct[:, columns].mean(axis=1)
    values["mAP"] = [float(np.mean(s["mAP"])) for s in scores]
    retrained = [probe.probe_accuracy(z, targets, folds) for z in occluded]
    values["OccDrop"], by_clip["OccDrop"] = occlusion_drops(scores, retrained)
    return values, by_clip


def geometry(x):
    """CKA, spectrum and uniformity of the test clips' features [(n, D)] of the blocks: {measurement: [K]}."""
    order = torch.randperm(len(x[0]), generator=torch.Generator().manual_seed(0))
    some, more = (order[: MOST_CLIPS[name]] for name in ("RBF CKA", "uniformity"))
    spectra = [spectrum(z) for z in x]
    return {
        "linear CKA": [[linear_cka(a, b) for b in x] for a in x],
        "RBF CKA": [[rbf_cka(a[some], b[some]) for b in x] for a in x],
        **{name: [s[name] for s in spectra] for name in spectra[0]},
        "uniformity": [uniformity(z[more]) for z in x],
    }


# ---- results: analysis.json, analysis.npz and tables ----

# Settings that compared runs share; the clips' fingerprint stands for data and list, the model's config for size.
RECIPE = "mask decode_ratio stride short flip epochs steps batch lr min_lr warmup weight_decay beta1 beta2"
RECIPE = [*RECIPE.split(), "grad_clip", "dtype", "init"]


def shared_settings(run):
    """What two runs must share to be compared: architecture, recipe, clips, target and loss, progress."""
    checkpoint = run.checkpoint
    shared = {name: value for name, value in checkpoint["config"].items() if name not in ("blocks", "regime")}
    shared |= {name: checkpoint["settings"].get(name) for name in RECIPE}
    shared |= {"clips": checkpoint.get("data"), "objective": checkpoint.get("objective")}
    return shared | {"progress": checkpoint["step"] / (checkpoint.get("total") or checkpoint["step"] or 1)}


def check_groups(runs):
    """ValueError if runs that look like seeds of one group differ in more than their seed."""
    first = {}
    for run in runs:
        other = first.setdefault(run.group, run)
        a, b = ({"regime": r.regime, "K": len(r.model.blocks)} | shared_settings(r) for r in (other, run))
        if names := [name for name in a if a[name] != b[name]]:
            pair = f"{other.title} and {run.title} look like seeds of one run"
            raise ValueError(f"{pair} but differ in {', '.join(names)}; rename one.")


def describe(args, runs, values, chance, clips):
    """The content of analysis.json, from what measure() returned."""
    described, untrained = {}, {}
    for run in runs:
        shape = {"K": run.model.config["blocks"], "depth": run.model.config["depth"]}
        untrained[run.untrained] = shape | {"values": values[run.untrained]}
        about = {"group": run.group, "run": run.folder.name, "step": run.checkpoint["step"]}
        about |= {"regime": run.regime, "seed": run.seed, "untrained": run.untrained}
        about |= shape | {"shared": shared_settings(run)}
        described[run.title] = about | {"values": values[run.title]}
    settings = {"settings": vars(args), "clips": clips, "chance": chance}
    return settings | {"untrained": untrained, "runs": described}


def print_tables(analysis):
    """A table of every measurement; its columns are the encoder layers before the reading, as K may differ.

    Rows: chance, where it is known; every untrained network; every group of runs, mean ± sd over its seeds.
    """
    runs, untrained = analysis["runs"].values(), analysis["untrained"]
    short = len({run["K"] for run in untrained.values()}) == len(untrained)  # K tells them apart
    groups = {(f"untrained, K = {u['K']}" if short else title): [u] for title, u in untrained.items()}
    for run in runs:
        groups.setdefault(run["group"], []).append(run)
    layers = sorted({k * run["depth"] // run["K"] for run in runs for k in range(1, run["K"] + 1)})
    for name in dict.fromkeys(name for run in runs for name in run["values"]):
        chance, between_blocks = analysis["chance"].get(name), name in ("linear CKA", "RBF CKA")
        rows = {} if chance is None else {"chance": [[chance]] * len(layers)}
        for title, members in groups.items():
            values = [run["values"][name] for run in members if name in run["values"]]
            if not values:
                continue
            if between_blocks:  # [seeds][K][K] instead of [seeds][K]
                values = [[math.nan, *np.diagonal(cka, 1)] for cka in values]
            K, depth = members[0]["K"], members[0]["depth"]
            by_layer = {depth * k // K: of_block for k, of_block in enumerate(zip(*values), start=1)}
            rows[title] = [by_layer.get(layer, [math.nan]) for layer in layers]
        title = f"{name} with the block before" if between_blocks else name
        probe.print_table(title, [f"layer {layer}" for layer in layers], rows)


# ---- command line ----


def build_parser():
    """The command line of this script."""
    flags = probe.parser(__doc__)
    flags.add_argument("--out", default="runs/analysis", help="folder of the results [runs/analysis]")
    return flags


@data.user_errors()
def main(arguments=None):
    """Write analysis.json and analysis.npz, then print the tables."""
    args = build_parser().parse_args(arguments)
    args.device = data.pick_device(args.device)
    data.keep_freed_memory()
    folder, runs = Path(args.out), probe.load_runs(args.runs)
    check_groups(runs)
    sources = probe.open_data(args, runs[0])
    data.check_writable(folder, folder=True)
    values, by_clip, chance, clips = measure(args, runs, sources)
    analysis = describe(args, runs, values, chance, clips)
    arrays = {f"{title}/{name}": a for title, of_run in by_clip.items() for name, a in of_run.items()}
    data.write_file(folder / "analysis.npz", lambda file: np.savez_compressed(file, **arrays))
    data.write_json(folder / "analysis.json", analysis)
    print(f"{clips['read']} clips read, {clips['tested']} of them tested on")
    for name, most in MOST_CLIPS.items():
        if most < clips["tested"]:
            print(f"{name}: of {most} test clips, drawn at random")
    print_tables(analysis)
    print(f"\n{folder}/analysis.json, {folder}/analysis.npz")


if __name__ == "__main__":
    main()
