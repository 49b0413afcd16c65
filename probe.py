"""What can be read from block k? Linear probe, retrieval and k-NN on the mean-pooled tokens of every block.

Römer & Dickscheid, arXiv 2601.09040, Sec. 4. Masking is off, and one pass over the clips gives all blocks'
features.

    python probe.py runs/nano-simultaneous-4                        # generated clips, their five labels
    python probe.py RUN RUN RUN --data gratings                             # the paper's stimuli
    python probe.py RUN --data VIDEOS --train-list train.txt --test-list test.txt --stride 2 --short repeat
    python probe.py RUN --data VIDEOS --features out.npz            # features, labels and paths, no probe

Two baselines stand beside every run: the same architecture at random initialisation, and pixels.
Shapes: B batch, N tokens, D width, K blocks; here n clips and L targets.
"""

import argparse
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from blockwise import Blockwise, load
from data import Gratings, Scenes, Videos, evaluation_loader, fail

# ---- measurements: plain tensors in, numbers out ----


def logistic_probe(train_x, train_y, test_x, *, C=1.0, classes=None):
    """Multinomial logistic regression, the linear probe (Sec. 4). Returns class probabilities (m, classes).

    Features are standardised with the training mean and deviation; a feature that is constant in training is
    left out. Minimised to convergence: sum of log-losses + |W|^2 / (2 C), intercept free. Full-batch L-BFGS
    runs in preconditioned coordinates, first in float32 and then in float64: same optimum, far less time.

    train_x (n, D), test_x (m, D): float; train_y (n,): class numbers 0..classes-1.
    Raises ValueError if a feature is not finite.
    """
    if not (torch.isfinite(train_x).all() and torch.isfinite(test_x).all()):
        raise ValueError("Features are not finite (NaN or infinite); this run's checkpoint cannot be probed.")
    train_x, test_x = train_x.double(), test_x.double()
    classes = classes or int(train_y.max()) + 1
    mean, std = train_x.mean(dim=0), train_x.std(dim=0, unbiased=False)
    varies = std > 1e-7 * (1 + mean.abs())
    x, z = (((a - mean) / std)[:, varies] for a in (train_x, test_x))
    # Coordinates V, W = vectors * scale @ V, in which the objective is about equally curved everywhere:
    # at equal probabilities the log-losses are curved by the Gram matrix / classes, the penalty by 1 / C.
    values, vectors = torch.linalg.eigh(x.T @ x)
    scale = (values.clamp(min=0) / classes + 1 / C).rsqrt()
    one = (classes / len(x)) ** 0.5  # the intercept's feature, of the same curvature
    x, z = (F.pad(a @ (vectors * scale), (0, 1), value=one) for a in (x, z))
    penalty = F.pad(scale.square() / C, (0, 1)).unsqueeze(1)
    V = torch.zeros(x.shape[1], classes)
    for dtype, tolerance in ((torch.float32, 1e-7), (torch.float64, 3e-9)):
        V = minimise(V.to(dtype), x.to(dtype), train_y, penalty.to(dtype), tolerance)
    return (z @ V).softmax(dim=1)


def minimise(V, x, y, penalty, tolerance):
    """The V (D, classes) that minimises the log-losses of x (n, D) @ V and sum of penalty (D, 1) * V^2 / 2.

    From the given V until no derivative, per clip, exceeds tolerance. The gradient is written out:
    X'(P - Y) + penalty V.
    """
    unit = 1e6 / len(x)  # the loss is counted in millionths per clip: L-BFGS ignores curvature below 1e-10
    options = {"max_iter": 2000, "max_eval": 4000, "tolerance_grad": 1e6 * tolerance, "tolerance_change": 0.0}
    optimizer = torch.optim.LBFGS([V], line_search_fn="strong_wolfe", **options)
    clips = torch.arange(len(x))

    def objective():
        logs = (x @ V).log_softmax(dim=1)  # (n, classes)
        loss = (penalty * V.square()).sum() / 2 - logs[clips, y].sum(dtype=torch.float64)
        error = logs.exp_()
        error[clips, y] -= 1
        V.grad = unit * (x.T @ error + penalty * V)
        return unit * loss

    with torch.no_grad():
        optimizer.step(objective)
    return V


def accuracies(predicted, true):
    """(accuracy, balanced accuracy): the latter is the mean over the true classes of the share found."""
    found = (predicted == true).double()
    return found.mean().item(), torch.stack([found[true == c].mean() for c in true.unique()]).mean().item()


def knn(train_x, train_y, test_x, *, k=20):
    """Class numbers by majority of the k nearest training clips in cosine; the lowest of a tie.

    train_x (n, D), test_x (m, D). train_y (n,) gives (m,); (n, L), of L targets, gives (m, L).
    """
    similarity = F.normalize(test_x.double(), dim=1) @ F.normalize(train_x.double(), dim=1).T  # (m, n)
    nearest = similarity.topk(min(k, len(train_y)), dim=1).indices  # (m, k)
    return train_y[nearest].mode(dim=1).values


def retrieval(x, labels, *, ks=(1, 5, 10)):
    """Leave-one-out retrieval by cosine of raw features (Sec. 4): "map", "top1", "top5", "top10", "queries".

    Top-k: share of queries with a clip of their class among the k nearest. Average precision is exact with
    ties: clips of equal similarity share one rank. A query without another clip of its class is left out of
    all means ("queries" counts the others); without any query the means are nan.
    x: (n, D); labels: (n,).
    """
    z, labels = F.normalize(x.double(), dim=1), labels.unique(return_inverse=True)[1]
    members = [(labels == label).nonzero().flatten() for label in labels.unique()]
    members = torch.nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=len(z))  # (classes, P)
    precision, nearer = [], []
    for queries in torch.arange(len(z)).split(256):
        distance = F.pad(-z[queries] @ z.T, (0, 1), value=torch.inf)  # (q, n + 1), the last for the padding
        distance[torch.arange(len(queries)), queries] = torch.inf  # a query does not find itself
        found = distance.gather(1, members[labels[queries]]).sort(dim=1).values  # (q, P), of the same class
        rank = torch.zeros(len(queries), found.shape[1] + 1)  # clips that are at least as similar
        rank.scatter_add_(1, torch.searchsorted(found, distance), torch.ones(1).expand(distance.shape))
        rank = rank.cumsum(dim=1)[:, :-1]  # (q, P)
        of_class = torch.searchsorted(found, found, right=True)
        true = found.isfinite()
        some = true.any(dim=1)
        precision.append(((of_class / rank.double()).where(true, 0).sum(dim=1) / true.sum(dim=1))[some])
        nearer.append((distance < found[:, :1]).sum(dim=1)[some])
    precision, nearer = torch.cat(precision), torch.cat(nearer)
    means = {"map": precision.mean().item()}
    means |= {f"top{k}": (nearer < k).double().mean().item() for k in ks}
    return means | {"queries": len(precision)}


def stratified_folds(labels, folds=3, seed=0):
    """[(train indices, test indices)] with every class spread evenly over the folds, drawn from seed."""
    labels = np.asarray(labels)
    fold = np.empty(len(labels), int)
    rng, start = np.random.default_rng(seed), 0
    for value in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == value))
        fold[members] = (np.arange(len(members)) + start) % folds
        start += len(members)  # so that small classes do not all begin at the first fold
    return [tuple(torch.from_numpy(np.flatnonzero(m)) for m in (fold != f, fold == f)) for f in range(folds)]


# ---- features ----


class Pixels(torch.nn.Module):
    """The baseline without a network: 16 x 16 pixels of the middle frame, and of frame changes."""

    def encode(self, video):
        """video (B, T, H, W, C) uint8 to {"middle frame": (B, 1, 768), "frame changes": (B, 1, 768)}."""
        x = video.permute(0, 1, 4, 2, 3).float() / 255  # (B, T, C, H, W)
        parts = {"middle frame": x[:, x.shape[1] // 2], "frame changes": x.diff(dim=1).abs().mean(dim=1)}
        return {name: F.adaptive_avg_pool2d(part, 16).flatten(1).unsqueeze(1) for name, part in parts.items()}


@torch.no_grad()
def extract(models, source, *, indices=None, batch=32, workers=0, device="cpu", measure=None):
    """One pass over a source through several models, masking off, fp32: (features, targets, indices).

    models: {title: model with encode()}. indices: clips to take; None: all. Broken files are named and left
    out.
    measure: also collect this function of a block's tokens (B, N, D), which returns (B,).
    Returns features {(title, "block1"): (n, D), ...}, the mean over the tokens after every block (Sec. 4),
    and {(title, "block1", "measure"): (n,), ...}; targets (n, L), class numbers in source.labels; the clips
    taken.
    Raises ValueError if no clip can be read.
    """
    models = {title: model.eval().to(device) for title, model in models.items()}
    indices = range(len(source)) if indices is None else indices
    features, taken = defaultdict(list), []
    bar = tqdm(total=len(indices), desc="features", unit=" clips", leave=False, mininterval=1)
    for clips in evaluation_loader(source, indices=indices, batch=batch, workers=workers):
        for path, reason in source.check_broken(clips["broken"]).items():
            bar.write(f"broken, left out: {path} ({reason})")
        for title, model in models.items() if clips["index"] else ():
            for name, tokens in model.encode(clips["video"].to(device)).items():
                features[title, name].append(tokens.float().mean(dim=1).cpu())  # (B, D)
                if measure is not None:
                    features[title, name, "measure"].append(measure(tokens).cpu())  # (B,)
        taken += clips["index"]
        bar.update(len(clips["index"]) + len(clips["broken"]))
    bar.close()
    if not taken:
        raise ValueError("There is no clip to read in this data.")
    targets = torch.tensor([source.targets(index) for index in taken])
    return {key: torch.cat(parts) for key, parts in features.items()}, targets, taken


def score(x, targets, folds, *, k=20):
    """All scores of one set of features: floats by name, and "targets" and "correct" from probe_accuracy().

    x: (n, D). targets: (n, L). folds: [(train indices, test indices)]; accuracies are means over the folds
    and over the targets (Sec. 4). Retrieval is among the test clips of all folds, on the first target.
    """
    tested = torch.cat([test for _, test in folds])
    test, balanced, fitted, correct = probe_accuracy(x, targets, folds)
    near = [(knn(x[a], targets[a], x[b], k=k) == targets[b]).double().mean().item() for a, b in folds]
    means = {"accuracy": test, "balanced": balanced, "train": fitted, "knn": near}
    means = {name: float(np.mean(values)) for name, values in means.items()}
    return means | {"targets": list(test), "correct": correct} | retrieval(x[tested], targets[tested, 0])


def probe_accuracy(x, targets, folds):
    """Linear probe of every target: ([test accuracy], [balanced], [training], correct), means over folds.

    correct: (L, m) of 0 and 1, which of the m test clips of all folds were right.
    """
    found, correct = [], []
    for y in targets.T:
        of_folds, right = [], []
        for train, test in folds:
            both = torch.cat([train, test])
            predicted = logistic_probe(x[train], y[train], x[both], classes=int(y.max()) + 1).argmax(dim=1)
            fitted = accuracies(predicted[: len(train)], y[train])[0]
            of_folds.append((*accuracies(predicted[len(train) :], y[test]), fitted))
            right.append(predicted[len(train) :] == y[test])
        found.append(np.mean(of_folds, axis=0).tolist())
        correct.append(torch.cat(right))
    return *zip(*found), torch.stack(correct).double().numpy()


def chance(targets, folds):
    """Accuracy of always answering the most frequent training class, for every target: [L]."""
    shares = [
        [(column[test] == column[train].mode().values).double().mean().item() for train, test in folds]
        for column in targets.T
    ]
    return np.mean(shares, axis=1).tolist()


# ---- command line ----


def parser(description):
    """The flags that say which runs to look at and on which clips; analyze.py has them too."""
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    flags = argparse.ArgumentParser(description=description, **style)
    flags.error = fail
    flags.add_argument("runs", nargs="+", metavar="RUN", help="run folder that train.py has written")
    flags.add_argument(
        "--data", help="folder of videos, gratings, or double-gratings [generated moving scenes]"
    )
    flags.add_argument(
        "--train-list", help="videos to fit on, as in train.py --list; without: 3 stratified folds"
    )
    flags.add_argument("--test-list", help="videos to test on")
    flags.add_argument("--stride", type=int, default=4, help="take every stride-th frame of a video [4]")
    flags.add_argument(
        "--short", choices=("drop", "repeat"), default="drop", help="rule for short videos [drop]"
    )
    flags.add_argument("--clips", type=int, help="take only this many, drawn at random [scenes: 3000]")
    flags.add_argument("--batch", type=int, default=32, help="clips at a time [32]")
    workers = max(1, torch.get_num_threads() // 2)
    flags.add_argument("--workers", type=int, default=workers, help=f"processes that read clips [{workers}]")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flags.add_argument("--device", default=device, help=f"cpu, cuda or mps [{device}]")
    return flags


def flags():
    """The command line of this script."""
    found = parser(__doc__)
    found.add_argument("--k", type=int, default=20, help="neighbours of k-NN [20]")
    found.add_argument("--features", metavar="FILE.npz", help="write features, labels and names; no probe")
    return found


class Run(NamedTuple):
    """A trained run: its folder's name, that name without the seed, the model, the checkpoint."""

    title: str
    group: str
    model: torch.nn.Module
    checkpoint: dict


def read_runs(paths):
    """Runs from their folders. ValueError where they cannot be looked at together."""
    runs = []
    for path in paths:
        title = Path(path).resolve().name if Path(path).is_dir() else Path(path).resolve().parent.name
        run = Run(title, re.sub(r"-seed\d+$", "", title), *load(path))
        for other in runs:
            if title == other.title:
                raise ValueError(f"Two runs are called {title}; rename one of the folders.")
            if run.model.video != other.model.video:
                raise ValueError(
                    f"{other.title} and {title} take clips of different sizes; look at each by itself."
                )
            if run.group == other.group and run.checkpoint["config"] != other.checkpoint["config"]:
                raise ValueError(
                    f"{other.title} and {title} look like seeds of one run but differ; rename one."
                )
        runs.append(run)
    return runs


def untrained(run):
    """The network of a run before its first step: the same architecture, at random initialisation."""
    torch.manual_seed(run.checkpoint["settings"]["seed"])
    return Blockwise(**run.checkpoint["config"])


def subjects(runs):
    """All that is measured: {title: model} of the runs, of each architecture untrained, and of the pixels."""
    fresh = {}
    for run in runs:
        width, blocks, tubelet = (run.model.config[name] for name in ("width", "blocks", "tubelet"))
        fresh[f"untrained, {width} wide, {'x'.join(map(str, tubelet))}, K = {blocks}"] = run
    fresh = {title: untrained(run) for title, run in fresh.items()}
    return {"pixels": Pixels()} | fresh | {run.title: run.model for run in runs}


def open_data(args, video):
    """[(source, indices)] of the clips that the flags name: all in one, or training list and test list."""
    if args.clips is not None and args.clips < 1:
        raise ValueError(f"--clips {args.clips} must be at least 1.")
    if bool(args.train_list) != bool(args.test_list):
        raise ValueError("--train-list and --test-list go together; without both, 3 folds are drawn.")
    if args.train_list and args.data in (None, "gratings", "double-gratings"):
        raise ValueError("--train-list and --test-list name videos; say in which folder with --data.")
    rules = {"video": video, "stride": args.stride, "short": args.short}
    if args.train_list:
        sources = [Videos(args.data, list_file=name, **rules) for name in (args.train_list, args.test_list)]
    elif args.data is None:
        sources = [Scenes("test", clips=args.clips or 3000, video=video)]
    elif args.data in ("gratings", "double-gratings"):
        sources = [Gratings(double=args.data == "double-gratings", video=video)]
    else:
        sources = [Videos(args.data, **rules)]
    rng = np.random.default_rng(0)
    return [(source, sorted(rng.permutation(len(source))[: args.clips].tolist())) for source in sources]


def collect(args, models, data, measure=None):
    """Features of all clips from open_data(): (features, targets, names, labels, folds), see extract().

    labels: {target: class names}. folds: [(train indices, test indices)]: of the two lists, or 3 folds
    stratified on the first target (Sec. 4).
    """
    how = {"batch": args.batch, "workers": args.workers, "device": args.device, "measure": measure}
    features, targets, names, sizes = defaultdict(list), [], [], []
    labels = dict(data[0][0].labels)
    for source, indices in data:
        found, numbers, taken = extract(models, source, indices=indices, **how)
        if "class" in labels:  # the test list may hold other classes, or in another order
            classes = source.labels["class"]
            labels["class"] += tuple(name for name in classes if name not in labels["class"])
            numbers = torch.tensor([labels["class"].index(name) for name in classes])[numbers]
        for key, value in found.items():
            features[key].append(value)
        targets.append(numbers)
        names += [source.name(index) for index in taken]
        sizes.append(len(taken))
    targets = torch.cat(targets)
    folds = stratified_folds(targets[:, 0])
    if len(data) == 2:
        folds = [tuple(torch.arange(len(targets)).split(sizes))]
        if not set(targets[: sizes[0], 0].tolist()) & set(targets[sizes[0] :, 0].tolist()):
            raise ValueError("The two lists have no class in common; are their labels of the same kind?")
    if min(len(part) for fold in folds for part in fold) == 0:
        raise ValueError(f"{len(targets)} clips are too few to fit and to test on.")
    return {key: torch.cat(parts) for key, parts in features.items()}, targets, names, labels, folds


def print_table(title, columns, rows):
    """Print rows {name: [[value of each seed], ...]} under their columns."""
    width = max([len(name) for name in rows] + [len(title)])
    print(f"\n{title:{width}}  " + "  ".join(f"{column:>11}" for column in columns))
    for name, values in rows.items():
        print(f"{name:{width}}  " + "  ".join(f"{spread(value):>11}" for value in values))


def spread(values):
    """Mean over seeds, ± their standard deviation if there are several; - where there is no value."""
    if np.isnan(values).all():
        return "-"
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ±{np.std(values, ddof=1):.3f}"


def main(arguments=None):
    """Print what can be read from every block."""
    args = flags().parse_args(arguments)
    try:
        probe(args)
    except ValueError as error:
        fail(error)


def probe(args):
    """The tables, or the features file."""
    runs = read_runs(args.runs)
    models = {run.title: run.model for run in runs} if args.features else subjects(runs)
    data = open_data(args, runs[0].model.video)
    features, targets, names, labels, folds = collect(args, models, data)
    if args.features:
        arrays = {(name if len(runs) == 1 else f"{title}/{name}"): x for (title, name), x in features.items()}
        arrays |= {
            target: np.array(values)[targets[:, i]] for i, (target, values) in enumerate(labels.items())
        }
        np.savez(args.features, names=np.array(names), **arrays)
        print(f"{args.features}: {', '.join(arrays)}, names; {len(names)} clips")
        return

    groups, scores = {run.title: run.group for run in runs}, defaultdict(list)
    for (title, name), x in tqdm(features.items(), "probes", leave=False):
        scores[f"{groups.get(title, title)} {name}"].append(score(x, targets, folds, k=args.k))
    train, test = folds[0]
    print(
        f"{args.data or 'moving scenes'}: {len(train)} clips to fit, {len(test)} to test, folds: {len(folds)}"
    )
    guess = chance(targets, folds)
    rows = {"chance": [[np.mean(guess)], *([value] for value in guess)]}
    for name, results in scores.items():
        rows[name] = [[r["accuracy"] for r in results], *zip(*(r["targets"] for r in results))]
    print_table("linear probe, test accuracy", ["mean", *labels], rows)
    others = ["accuracy", "balanced", "train", "knn", "map", "top1", "top5", "top10"]
    rows = {name: [[r[other] for r in results] for other in others] for name, results in scores.items()}
    print_table(f"mean of targets; retrieval of {next(iter(labels))}", others, rows)


if __name__ == "__main__":
    main()
