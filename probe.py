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

import copy
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from blockwise import Blockwise, load
from data import (
    Gratings,
    Parser,
    Scenes,
    Videos,
    check_output,
    evaluation_loader,
    number,
    pick_device,
    program,
)

# ---- measurements: plain tensors in, numbers out ----


def logistic_probe(train_x, train_y, test_x, *, C=1.0):
    """Multinomial logistic regression, the linear probe (Sec. 4). Returns class probabilities (m, classes).

    Minimises sum of log-losses + |W|^2 / (2 C) to convergence, intercept free. Of two classes the authors and
    scikit-learn penalise one weight vector, w1 - w0; so does this. Features are standardised with the training
    mean and deviation; one that is constant in training is left out. A class that is not in training has
    probability 0.

    train_x (n, D), test_x (m, D): float. train_y (n,): class numbers; (n, L), of L targets, gives a list of L. Raises ValueError if a feature is not finite.
    """
    if not (torch.isfinite(train_x).all() and torch.isfinite(test_x).all()):
        raise ValueError("Features are not finite (NaN or infinite); this run's checkpoint cannot be probed.")
    train_x, test_x = train_x.double(), test_x.double()
    mean, std = train_x.mean(dim=0), train_x.std(dim=0, unbiased=False)
    varies = std > 1e-7 * (1 + mean.abs())
    x, test = (((a - mean) / std)[:, varies] for a in (train_x, test_x))
    # W = scale * V on the principal axes, where scale makes the objective about equally curved everywhere, so
    # that L-BFGS needs few steps: at equal probabilities the log-losses are curved by X'X / classes.
    values, axes = torch.linalg.eigh(x.T @ x)
    x, test = (F.pad(a @ axes, (0, 1), value=1.0) for a in (x, test))  # the last feature is the intercept's
    values = F.pad(values.clamp(min=0), (0, 1), value=len(x))
    columns, found = x.T.contiguous(), []  # twice as fast as x.T
    unit = 1e6 / len(x)  # the loss is counted in millionths per clip: L-BFGS ignores curvature below 1e-10
    options = {"max_iter": 2000, "max_eval": 4000, "tolerance_grad": 3e-4, "tolerance_change": 0.0}
    for y in train_y.reshape(len(train_y), -1).T:
        present = y.unique()
        wanted = (y == present.unsqueeze(1)).double()  # (classes present, n)
        penalty = F.pad(torch.full_like(values[:-1], (2 if len(present) == 2 else 1) / C), (0, 1))
        scale = (values / len(present) + penalty).rsqrt()
        V = torch.zeros(len(present), x.shape[1], dtype=torch.float64)  # (classes present, D + 1)
        optimizer = torch.optim.LBFGS([V], line_search_fn="strong_wolfe", **options)

        def objective(V=V, scale=scale, penalty=penalty, wanted=wanted):
            W = scale * V
            logs = (W @ columns).log_softmax(dim=0)  # (classes present, n)
            V.grad = unit * scale * ((logs.exp() - wanted) @ x + penalty * W)  # the derivative, written out
            return unit * ((penalty * W.square()).sum() / 2 - (logs * wanted).sum())

        with torch.no_grad():
            optimizer.step(objective)
        probabilities = torch.zeros(len(test), int(y.max()) + 1, dtype=torch.float64)
        probabilities[:, present] = (test @ (scale * V).T).softmax(dim=1)
        found.append(probabilities)
    return found if train_y.ndim > 1 else found[0]


def accuracies(predicted, true):
    """(accuracy, balanced accuracy): the latter is the mean over the true classes of the share found."""
    found = (predicted == true).double()
    return found.mean().item(), torch.stack([found[true == c].mean() for c in true.unique()]).mean().item()


def knn(train_x, train_y, test_x, *, k=20):
    """Class numbers by majority of the k nearest training clips in cosine; the lowest of a tie.

    train_x (n, D), test_x (m, D). train_y (n,) gives (m,); (n, L), of L targets, gives (m, L). Of fewer than k
    training clips all are asked.
    """
    similarity = F.normalize(test_x.double(), dim=1) @ F.normalize(train_x.double(), dim=1).T  # (m, n)
    nearest = similarity.topk(min(k, len(train_y)), dim=1).indices  # (m, k)
    return train_y[nearest].mode(dim=1).values


def retrieval(x, labels, *, ks=(1, 5, 10)):
    """Leave-one-out retrieval by cosine of raw features (Sec. 4): "mAP", "top1", "top5", "top10", "queries".

    Top-k: share of queries with a clip of their class among the k nearest. Clips whose cosines agree to 12
    decimals are tied: they share one rank in the average precision, and top-k is its expected value over
    their random order. A query without another clip of its class is left out of all means ("queries" counts
    the others); without any query the means are nan.
    x: (n, D). labels: (n,) gives floats; (n, L), of L targets, gives lists.
    """
    z, labels_of = F.normalize(x.double(), dim=1), labels.reshape(len(labels), -1).T  # (n, D), (L, n)
    found = [[] for _ in labels_of]  # of every target: [(queries, 1 + len(ks))]
    for queries in torch.arange(len(z)).split(256):
        distance = (-z[queries] @ z.T).round(decimals=12)  # (q, n)
        distance[torch.arange(len(queries)), queries] = (
            torch.inf
        )  # a query comes last and does not find itself
        distance, order = distance.sort(dim=1)
        distance, order = distance[:, :-1], order[:, :-1]  # (q, n - 1)
        # Among sorted distances a group of ties begins where they grow: `nearer` clips stand before the group of a
        # clip, `rank` clips up to its end.
        grows = F.pad(distance.diff(dim=1) > 0, (1, 1), value=True)  # (q, n)
        place = torch.arange(len(z))
        nearer = (place * grows)[:, :-1].cummax(dim=1).values  # (q, n - 1)
        rank = place.where(grows, len(z))[:, 1:].flip(1).cummin(dim=1).values.flip(1)
        for y, of_target in zip(labels_of, found):
            same = y[order] == y[queries].unsqueeze(1)  # (q, n - 1)
            some = same.any(dim=1)
            hits = same.cumsum(dim=1).gather(1, rank - 1)  # of the class, at least as near
            columns = [(same * hits / rank.double()).sum(dim=1) / same.sum(dim=1)]  # average precision
            first = same.int().argmax(dim=1, keepdim=True)  # the nearest of the class, among ties of which
            start, end, good = (a.gather(1, first).flatten() for a in (nearer, rank, hits))  # `good` are hits
            miss = torch.ones(len(queries), dtype=torch.float64)
            for place in range(max(ks)):
                drawn = (start <= place) & (place < end)  # one of the tied clips that are left
                miss = torch.where(drawn, miss * (end - good - place) / (end - place), miss)
                if place + 1 in ks:
                    columns.append(1 - miss)
            of_target.append(torch.stack(columns, dim=1)[some])
    found = [torch.cat(parts) for parts in found]
    means = torch.stack([part.mean(dim=0) for part in found], dim=1).tolist()  # (1 + len(ks), L)
    means = dict(zip(["mAP", *(f"top{k}" for k in ks)], means)) | {"queries": [len(part) for part in found]}
    return means if labels.ndim > 1 else {name: values[0] for name, values in means.items()}


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
        parts = {"middle frame": x[:, x.shape[1] // 2]}
        if x.shape[1] > 1:
            parts["frame changes"] = x.diff(dim=1).abs().mean(dim=1)
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
    """All scores of one set of features x (n, D): ({name: [value of each of the L targets]}, correct).

    targets: (n, L). folds: [(train indices, test indices)]; accuracies are means over the folds. Retrieval is
    among the test clips of all folds. "all" is one value: the share of test clips with every target right.
    correct: as in probe_accuracy().
    """
    found, correct = probe_accuracy(x, targets, folds)
    near = [(knn(x[train], targets[train], x[test], k=k) == targets[test]).double() for train, test in folds]
    found["knn"] = torch.stack([part.mean(dim=0) for part in near]).mean(dim=0).tolist()
    found["all"] = [float(correct.all(axis=0).mean())]
    tested = torch.cat([test for _, test in folds])
    return found | retrieval(x[tested], targets[tested]), correct


def probe_accuracy(x, targets, folds):
    """Linear probe of every target: ({"accuracy": [L], "balanced": [L], "train": [L]}, correct).

    The scores are means over folds. correct: (L, m) of 0 and 1, which of the m test clips were right.
    """
    scores, correct = [], []
    for train, test in folds:
        probabilities = logistic_probe(x[train], targets[train], x[torch.cat([train, test])])
        predicted = torch.stack([p.argmax(dim=1) for p in probabilities], dim=1)  # (n + m, L)
        fitted, tested = predicted[: len(train)], predicted[len(train) :]
        of_fold = zip(tested.T, targets[test].T, fitted.T, targets[train].T)
        scores.append([(*accuracies(a, b), accuracies(c, d)[0]) for a, b, c, d in of_fold])
        correct.append(tested == targets[test])
    means = np.mean(scores, axis=0).T.tolist()  # (3, L)
    return dict(zip(("accuracy", "balanced", "train"), means)), torch.cat(correct).T.double().numpy()


def chance(targets, folds):
    """Accuracy of always answering the most frequent training class, for every target: [L]."""
    right = [targets[test] == targets[train].mode(dim=0).values for train, test in folds]  # [(m, L)]
    return torch.stack([part.double().mean(dim=0) for part in right]).mean(dim=0).tolist()


# ---- runs and clips, as the command line names them ----


def parser(description):
    """The flags that say which runs to look at and on which clips: those of all programs that read runs."""
    flags = Parser(description)
    add, workers = flags.add_argument, max(1, torch.get_num_threads() // 2)
    count = number(least=1, most=10**6)
    add("runs", nargs="+", metavar="RUN", help="run folder of train.py, or a checkpoint of VideoMAE")
    add("--blocks", type=count, default=4, help="K that a checkpoint of VideoMAE is cut into [4]")
    add("--data", help="folder of videos, gratings, or double-gratings [generated moving scenes]")
    add("--train-list", help="videos to fit on, as in train.py --list; without: 3 stratified folds")
    add("--test-list", help="videos to test on")
    add("--stride", type=count, default=4, help="take every stride-th frame of a video [4]")
    add("--short", choices=("drop", "repeat"), default="drop", help="rule for short videos [drop]")
    add("--clips", type=count, help="take only this many, drawn at random [scenes: 3000]")
    add("--before-norm", action="store_true", help="read the last block before the output LayerNorm")
    add("--batch", type=count, default=32, help="clips at a time [32]")
    add("--workers", type=number(least=0, most=1000), default=workers, help=f"that read clips [{workers}]")
    add("--device", default="auto", help="cpu, cuda or mps [the fastest here]")
    return flags


def flags():
    """The command line of this script."""
    found = parser(__doc__)
    found.add_argument("--k", type=number(least=1, most=10**6), default=20, help="neighbours of k-NN [20]")
    text = "write features, labels and names to exactly this file; no probe"
    found.add_argument("--features", metavar="FILE.npz", help=text)
    return found


class Run(NamedTuple):
    """A trained run: its folder's name, that name without the seed, the model, the checkpoint."""

    title: str
    group: str
    model: torch.nn.Module
    checkpoint: dict

    @property
    def regime(self):
        """What trained it: not always the regime in the model's config, which only says its shape."""
        return self.checkpoint["settings"].get("regime")


def read_runs(paths, blocks=4):
    """Runs from their folders. ValueError where they cannot be looked at together."""
    runs = []
    for path in map(Path, paths):
        title = path.resolve().parent.name if path.name == "last.pt" else path.resolve().name
        run = Run(title, re.sub(r"-seed\d+$", "", title), *load(path, blocks=blocks))
        for other in runs:
            if title == other.title:
                raise ValueError(f"Two runs are called {title}; rename one of the folders.")
            if run.model.video != other.model.video:
                raise ValueError(f"{other.title} and {title} take clips of different sizes; one at a time.")
            if run.group == other.group and setting(run) != setting(other):
                raise ValueError(
                    f"{other.title} and {title} look like seeds of one run but differ; rename one."
                )
        runs.append(run)
    return runs


def setting(run):
    """What the seeds of one run have in common."""
    return run.checkpoint["config"], run.regime, run.checkpoint["step"]


def untrained(run):
    """(title, network) of a run before its first step: the same architecture, at random initialisation."""
    width, blocks, tubelet = (run.model.config[name] for name in ("width", "blocks", "tubelet"))
    torch.manual_seed(run.checkpoint["settings"].get("seed", 0))
    title = f"untrained, {width} wide, {'x'.join(map(str, tubelet))}, K = {blocks}"
    return title, Blockwise(**run.checkpoint["config"])


def subjects(runs, before_norm=False):
    """All that is measured: {title: model} of the pixels, of each architecture untrained, and of the runs.

    before_norm: the last block of every network ends before the output LayerNorm.
    """
    models = dict(untrained(run) for run in runs)
    models |= {run.title: copy.deepcopy(run.model) for run in runs}
    if before_norm:
        for model in models.values():
            list(model.blocks.values())[-1].norm = None
    return {"pixels": Pixels()} | models


def open_data(args, video):
    """[(source, indices)] of the clips that the flags name: all in one, or training list and test list."""
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
    """Features of all clips from open_data(), as extract() gives them: (features, targets, names, labels, sizes).

    names: of the clips. labels: {target: class names}. sizes: clips from each source.
    """
    features, targets, names, sizes = defaultdict(list), [], [], []
    labels = dict(data[0][0].labels)
    for source, indices in data:
        at_once = {"batch": args.batch, "workers": args.workers, "device": args.device}
        found, numbers, taken = extract(models, source, indices=indices, measure=measure, **at_once)
        if "class" in labels:  # the test list may hold other classes, or in another order
            classes = source.labels["class"]
            labels["class"] += tuple(name for name in classes if name not in labels["class"])
            numbers = torch.tensor([labels["class"].index(name) for name in classes])[numbers]
        for key, value in found.items():
            features[key].append(value)
        targets.append(numbers)
        names += [source.name(index) for index in taken]
        sizes.append(len(taken))
    return (
        {key: torch.cat(parts) for key, parts in features.items()},
        torch.cat(targets),
        names,
        labels,
        sizes,
    )


def split(targets, labels, sizes):
    """[(train indices, test indices)]: of the two lists, or 3 folds stratified on the first target (Sec. 4).

    ValueError where a probe would only seem to measure something.
    """
    if len(sizes) == 2:
        folds = [torch.arange(len(targets)).split(sizes)]
    else:
        folds = stratified_folds(targets[:, 0])
    for train, test in folds:
        if min(len(train), len(test)) == 0:
            raise ValueError(
                f"{len(targets)} clips are too few to fit and to test on; take more with --clips or more videos."
            )
        for name, y in zip(labels, targets.T):
            fitted, tested = set(y[train].tolist()), set(y[test].tolist())
            if len(fitted) == 1:
                only = labels[name][min(fitted)]
                raise ValueError(
                    f"All clips to fit on have {name} {only}; a probe needs two classes or more."
                )
            if not fitted & tested:
                raise ValueError(
                    f"The clips to fit and to test on have no {name} in common; with folds a class needs two "
                    "clips or more, and two lists need labels of the same kind."
                )
    return folds


# ---- command line ----


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
    with program():
        probe(flags().parse_args(arguments))


def probe(args):
    """The tables, or the features file."""
    args.device, _ = pick_device(args.device)
    if args.features:
        check_output(args.features)
    runs = read_runs(args.runs, args.blocks)
    models = subjects(runs, args.before_norm)
    data = open_data(args, runs[0].model.video)
    if args.features:
        write_features(args, {run.title: models[run.title] for run in runs}, data)
        return
    features, targets, _, labels, sizes = collect(args, models, data)
    folds = split(targets, labels, sizes)
    groups, scores = {run.title: run.group for run in runs}, defaultdict(list)
    for (title, name), x in tqdm(features.items(), "probes", leave=False):
        scores[f"{groups.get(title, title)} {name}"].append(score(x, targets, folds, k=args.k)[0])
    print_scores(args, scores, chance(targets, folds), folds, list(labels))


def write_features(args, models, data):
    """The file of --features."""
    features, targets, names, labels, _ = collect(args, models, data)
    arrays = {(name if len(models) == 1 else f"{title}/{name}"): x for (title, name), x in features.items()}
    for (target, values), numbers in zip(labels.items(), targets.T):
        arrays[target] = np.array(values)[numbers]
    with open(args.features, "wb") as file:  # np.savez would add .npz to a name without it
        np.savez(file, names=np.array(names), **arrays)
    print(f"{args.features}: {', '.join(arrays)}, names; {len(names)} clips")


def print_scores(args, scores, guess, folds, labels):
    """The tables of scores {row: [score() of each seed]}; guess: chance() of every target."""
    train, test = folds[0]
    print(
        f"{args.data or 'moving scenes'}: {len(train)} clips to fit, {len(test)} to test, folds: {len(folds)}"
    )
    rows = {"chance": [[np.mean(guess)], *([value] for value in guess)]}
    for row, seeds in scores.items():
        rows[row] = [[np.mean(s["accuracy"]) for s in seeds], *zip(*(s["accuracy"] for s in seeds))]
    print_table("linear probe, test accuracy", ["mean", *labels], rows)
    names = ["accuracy", "balanced", "train", "knn", "all", "mAP", "top1", "top5", "top10"]
    rows = {row: [[np.mean(s[name]) for s in seeds] for name in names] for row, seeds in scores.items()}
    print_table("mean of targets (all: every one right)", names, rows)
    if len(labels) > 1:
        names.remove("all")
        rows = {row: [[s[name][0] for s in seeds] for name in names] for row, seeds in scores.items()}
        print_table(f"{labels[0]} alone", names, rows)


if __name__ == "__main__":
    main()
