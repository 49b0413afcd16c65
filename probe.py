"""What can be read from block k? Linear probe, retrieval and k-NN on the mean-pooled tokens of every block.

Römer & Dickscheid, arXiv 2601.09040, Sec. 4. Masking is off, and one pass over the clips gives all blocks' features.

    python probe.py runs/nano-simultaneous-4                                # generated clips, their five labels
    python probe.py RUN RUN RUN --data gratings                             # the paper's stimuli
    python probe.py RUN --data VIDEOS --train-list train.txt --test-list test.txt --stride 2 --short repeat
    python probe.py RUN --data VIDEOS --features out.npz                    # features, labels and paths, no probe

Two baselines stand beside every run: the same architecture at random initialisation, and pixels.
Shapes: B batch, N tokens, D width, K blocks; here n clips and L targets.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from blockwise import Blockwise, load
from data import Gratings, Scenes, Videos, evaluation_loader

# ---- measurements: plain tensors in, numbers out ----


def logistic_probe(train_x, train_y, test_x, *, C=1.0, classes=None):
    """Multinomial logistic regression, the linear probe (Sec. 4). Returns class probabilities (m, classes).

    Features are standardised with the training mean and deviation; a feature that is constant in training is left
    out. Minimised to convergence: sum of log-losses + |W|^2 / (2 C), intercept free.
    Full-batch L-BFGS runs on whitened features, with the penalty carried over: same optimum, far fewer iterations.

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
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    keep = values > values.max() * 1e-12 if len(values) else values > 0
    white = vectors[:, keep] / values[keep].sqrt()  # W = white @ V, so |W|^2 = sum of |V_i|^2 / value_i
    x, z, penalty = x @ white, z @ white, (0.5 / C / values[keep]).unsqueeze(1)

    V = torch.zeros(x.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    options = {"max_iter": 2000, "history_size": 20, "tolerance_grad": 1e-6, "tolerance_change": 0.0}
    optimizer = torch.optim.LBFGS([V, bias], line_search_fn="strong_wolfe", **options)

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ V + bias, train_y, reduction="sum") + (penalty * V.square()).sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return (z @ V + bias).softmax(dim=1).detach()


def accuracies(predicted, true):
    """(accuracy, balanced accuracy): the latter is the mean over the true classes of the share found."""
    found = (predicted == true).double()
    return found.mean().item(), torch.stack([found[true == c].mean() for c in true.unique()]).mean().item()


def knn(train_x, train_y, test_x, *, k=20):
    """Class numbers (m,) by majority of the k nearest training clips in cosine; ties go to the lowest number."""
    similarity = F.normalize(test_x.double(), dim=1) @ F.normalize(train_x.double(), dim=1).T  # (m, n)
    nearest = train_y[similarity.topk(min(k, len(train_y)), dim=1).indices]  # (m, k)
    return F.one_hot(nearest, int(train_y.max()) + 1).sum(dim=1).argmax(dim=1)


def retrieval(x, labels, *, ks=(1, 5, 10)):
    """Leave-one-out retrieval by cosine of raw features (Sec. 4): {"map", "top1", "top5", "top10", "queries"}.

    Top-k: share of queries with a clip of their class among the k nearest. Average precision is exact with ties:
    clips of equal similarity share one rank. A query without another clip of its class is left out of all means
    ("queries" counts the others); without any query the means are nan.
    x: (n, D); labels: (n,).
    """
    z, labels = F.normalize(x.double(), dim=1), labels.numpy()
    precision, hits = [], []
    for first in range(0, len(z), 512):
        for query, similarity in enumerate((z[first : first + 512] @ z.T).numpy(), start=first):
            distance = np.delete(-similarity, query)
            found = np.sort(distance[np.delete(labels == labels[query], query)])
            if len(found):
                ranked = np.sort(distance)
                rank = np.searchsorted(ranked, found, side="right")  # clips at least as similar
                precision.append(np.mean(np.searchsorted(found, found, side="right") / rank))
                hits.append([np.searchsorted(ranked, found[0]) < k for k in ks])
    means = [np.mean(precision), *np.mean(hits, axis=0)] if hits else [np.nan] * (1 + len(ks))
    return dict(zip(["map", *(f"top{k}" for k in ks)], map(float, means)), queries=len(hits))


def stratified_folds(labels, folds=3, seed=0):
    """[(train indices, test indices)] with every class spread evenly over the folds, in an order drawn from seed."""
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
    """The baseline that sees no network: 16 x 16 pixels of the middle frame, and the mean change from frame to frame."""

    def encode(self, video):
        """video (B, T, H, W, C) uint8 to {"middle frame": (B, 1, 768), "frame changes": (B, 1, 768)}."""
        x = video.permute(0, 1, 4, 2, 3).float() / 255  # (B, T, C, H, W)
        parts = {"middle frame": x[:, x.shape[1] // 2], "frame changes": x.diff(dim=1).abs().mean(dim=1)}
        return {name: F.adaptive_avg_pool2d(part, 16).flatten(1).unsqueeze(1) for name, part in parts.items()}


@torch.no_grad()
def extract(models, source, *, batch=32, workers=0, device="cpu", measure=None):
    """One pass over a source through several models, masking off, fp32, eval mode: (features, targets, names).

    models: {title: model with encode()}. features: {(title, "block1"): (n, D), ...}, the mean over the tokens after
    every block (Sec. 4), on the CPU. targets: (n, L) class numbers in source.labels. names: of the n clips.
    measure: also collect this function of a block's tokens (B, N, D), a (B,) tensor, as {(title, "block1", "measure")}.
    Broken files are named and left out. Raises ValueError if no clip is left.
    """
    models = {title: model.eval().to(device) for title, model in models.items()}
    features, indices = defaultdict(list), []
    bar = tqdm(total=len(source), desc="features", unit=" clips", leave=False, mininterval=1)
    for clips in evaluation_loader(source, batch=batch, workers=workers):
        for path, reason in source.check_broken(clips["broken"]).items():
            bar.write(f"broken, left out: {path} ({reason})")
        for title, model in models.items() if clips["index"] else ():
            for name, tokens in model.encode(clips["video"].to(device)).items():
                features[title, name].append(tokens.float().mean(dim=1).cpu())  # (B, D)
                if measure is not None:
                    features[title, name, "measure"].append(measure(tokens).cpu())  # (B,)
        indices += clips["index"]
        bar.update(len(clips["index"]) + len(clips["broken"]))
    bar.close()
    if not indices:
        raise ValueError("There is no clip to read in this data.")
    targets = torch.tensor([source.targets(index) for index in indices])
    return {key: torch.cat(parts) for key, parts in features.items()}, targets, [source.name(i) for i in indices]


def untrained(checkpoint):
    """The network of a run before its first step: the same architecture, at random initialisation."""
    torch.manual_seed(checkpoint["settings"]["seed"])
    return Blockwise(**checkpoint["config"])


def score(x, targets, folds, *, k=20):
    """All scores of one set of features: a dict of floats, and "targets": the test accuracy of each target.

    x: (n, D). targets: (n, L). folds: [(train indices, test indices)]; accuracies are means over the folds, and over the
    targets (Sec. 4). Retrieval is among the test clips of all folds, on the first target.
    """
    results = defaultdict(list)
    for column in targets.T:
        scores = []
        for train, test in folds:
            classes = int(column.max()) + 1
            both = logistic_probe(x[train], column[train], x[torch.cat([train, test])], classes=classes).argmax(dim=1)
            accuracy, balanced = accuracies(both[len(train) :], column[test])
            neighbours = accuracies(knn(x[train], column[train], x[test], k=k), column[test])[0]
            scores.append((accuracy, balanced, accuracies(both[: len(train)], column[train])[0], neighbours))
        for name, value in zip(("targets", "balanced", "train", "knn"), np.mean(scores, axis=0)):
            results[name].append(float(value))
    tested = torch.cat([test for _, test in folds])
    means = {name: float(np.mean(values)) for name, values in results.items()}
    accuracy = {"accuracy": means.pop("targets"), "targets": results["targets"]}
    return accuracy | means | retrieval(x[tested], targets[tested, 0])


def chance(targets, folds):
    """Accuracy of always answering the most frequent training class, for every target: [L]."""
    shares = [
        [(column[test] == column[train].mode().values).double().mean().item() for train, test in folds]
        for column in targets.T
    ]
    return np.mean(shares, axis=1).tolist()


# ---- command line ----


def fail(message):
    """End the program for a mistake that the user can mend: one sentence, exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def parser(description):
    """The flags that say which runs to look at, on which clips; analyze.py has them too."""
    flags = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flags.add_argument("runs", nargs="+", metavar="RUN", help="run folder that train.py has written, or a checkpoint")
    flags.add_argument("--data", help="folder of videos, gratings, or double-gratings [generated moving scenes]")
    flags.add_argument("--train-list", help="videos to fit on; without lists: 3 stratified folds")
    flags.add_argument("--test-list", help="videos to test on")
    flags.add_argument("--stride", type=int, default=4, help="take every stride-th frame of a video [4]")
    flags.add_argument("--short", choices=("drop", "repeat"), default="drop", help="rule for short videos [drop]")
    flags.add_argument("--clips", type=int, help="take this many clips, spread over the data [3000 of the scenes; else all]")
    flags.add_argument("--batch", type=int, default=32, help="clips at a time [32]")
    flags.add_argument("--workers", type=int, default=max(1, torch.get_num_threads() // 2), help="reading processes")
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps")
    return flags
