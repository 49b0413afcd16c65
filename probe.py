"""What can be read from block k? Linear probe, retrieval and k-NN on the mean-pooled tokens of every block.

Römer & Dickscheid, arXiv 2601.09040, Sec. 4. Nothing is masked; one pass over the clips gives all features.

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

import data
from blockwise import CHECKPOINTS, Blockwise, load

# ---- measurements: plain tensors in, numbers out ----


def logistic_probe(train_x, train_y, test_x, *, C=1.0):
    """Multinomial logistic regression, the linear probe (Sec. 4). Returns class probabilities (m, classes).

    Minimises sum of log-losses + |W|^2 / (2 C) to convergence, intercept free. Of two classes the authors and
    scikit-learn penalise one weight vector, w1 - w0; so does this. Features are standardised with mean and
    deviation in training; one that is constant there is left out. A class not seen there has probability 0.

    train_x (n, D), test_x (m, D): float. train_y (n,): class numbers; (n, L), of L targets, gives L results.
    Raises ValueError if a feature is not finite.
    """
    if not (torch.isfinite(train_x).all() and torch.isfinite(test_x).all()):
        raise ValueError("Features are not finite (NaN or infinite); this run's checkpoint cannot be probed.")
    train_x, test_x = train_x.double(), test_x.double()
    mean, std = train_x.mean(dim=0), train_x.std(dim=0, unbiased=False)
    varies = std > 1e-7 * mean.abs()
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
    """Class numbers by majority of the k (or all) nearest training clips in cosine; the lowest of a tie. Ours.

    train_x (n, D), test_x (m, D). train_y (n,) gives (m,); (n, L), of L targets, gives (m, L).
    """
    similarity = F.normalize(test_x.double(), dim=1) @ F.normalize(train_x.double(), dim=1).T  # (m, n)
    nearest = similarity.topk(min(k, len(train_y)), dim=1).indices  # (m, k)
    return train_y[nearest].mode(dim=1).values


def retrieval(x, labels, *, ks=(1, 5, 10)):
    """Leave-one-out retrieval by cosine of raw features (Sec. 4): "mAP", "top1", "top5", "top10", "queries".

    Top-k: share of queries with a clip of their class among the k nearest. Clips whose cosines agree to 12
    decimals are tied: they share one rank in the average precision, and top-k is its expected value over
    their random order. A query without another clip of its class is left out of the average precision's mean,
    and here of the others, too ("queries" counts the rest); without any query the means are nan.
    x: (n, D), of two clips or more. labels: (n,) gives floats; (n, L), of L targets, gives lists.
    """
    ks = sorted(ks)
    z, labels_of = F.normalize(x.double(), dim=1), labels.reshape(len(labels), -1).T  # (n, D), (L, n)
    found = [[] for _ in labels_of]  # of every target: [(queries, 1 + len(ks))]
    for queries in torch.arange(len(z)).split(256):
        distance = (-z[queries] @ z.T).round(decimals=12)  # (q, n)
        distance.scatter_(1, queries.unsqueeze(1), torch.inf)  # a query comes last and does not find itself
        order = torch.from_numpy(np.argsort(distance.numpy(), axis=1))[:, :-1]  # faster than torch's sort
        distance = distance.gather(1, order)  # (q, n - 1)
        # A group of ties begins where sorted distances grow: `nearer` clips stand before the group of a clip,
        # `rank` clips up to its end.
        grows = F.pad(distance.diff(dim=1) > 0, (1, 1), value=True)  # (q, n)
        place = torch.arange(len(z))
        nearer = (place * grows)[:, :-1].cummax(dim=1).values  # (q, n - 1)
        rank = place.where(grows, len(z))[:, 1:].flip(1).cummin(dim=1).values.flip(1)
        last, divisor = rank - 1, rank.double()
        for y, of_target in zip(labels_of, found):
            same = y[order] == y[queries].unsqueeze(1)  # (q, n - 1)
            hits = same.cumsum(dim=1, dtype=torch.int32)  # of the class, up to here
            count = hits[:, -1]
            hits = hits.gather(1, last)  # at least as near
            columns = [(same * hits / divisor).sum(dim=1) / count]  # average precision
            first = same.int().argmax(dim=1, keepdim=True)  # the nearest of the class, among ties of which
            start, end, good = (a.gather(1, first).flatten() for a in (nearer, rank, hits))  # `good` are hits
            miss = torch.ones(len(queries), dtype=torch.float64)
            for drawn in range(max(ks)):
                tied = (start <= drawn) & (drawn < end)  # the next clip is one of those that are left
                miss = torch.where(tied, miss * (end - good - drawn) / (end - drawn), miss)
                if drawn + 1 in ks:
                    columns.append(1 - miss)
            of_target.append(torch.stack(columns, dim=1)[count > 0])
    found = [torch.cat(parts) for parts in found]
    means = torch.stack([part.mean(dim=0) for part in found], dim=1).tolist()  # (1 + len(ks), L)
    means = dict(zip(["mAP", *(f"top{k}" for k in ks)], means)) | {"queries": [len(part) for part in found]}
    return means if labels.ndim > 1 else {name: values[0] for name, values in means.items()}


def stratified_folds(labels, folds=3, seed=0):
    """[(train indices, test indices)] with every class spread evenly over the folds, drawn from seed.

    seed: None for folds of neighbours in each class, which keep apart what is alike because it is near.
    """
    labels = np.asarray(labels)
    fold = np.empty(len(labels), int)
    rng, start = np.random.default_rng(seed), 0
    for value in np.unique(labels):
        members = np.flatnonzero(labels == value)
        of_members = (np.arange(len(members)) + start) % folds
        start += len(members)  # so that small classes do not all begin at the first fold
        if seed is None:
            of_members.sort()
        else:
            members = rng.permutation(members)
        fold[members] = of_members
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
def extract(models, sources, batch=32, workers=0, device="cpu", measure=None):
    """One pass over clips through several models, nothing masked, fp32.

    models: {title: model with encode()}. sources: [(source, indices)]. Broken files are named and left out.
    measure: also collect this function of a block's tokens (B, N, D), which returns (B,) or (B, m).
    Returns features {(title, "block1"): (n, D), ...}, the mean over tokens after every block (Sec. 4), and
    {(title, "block1", "measure"): (n,), ...}; targets (n, L), class numbers in labels; names of the clips;
    labels {target: classes}; sizes, how many clips each source gave. Raises ValueError if it is none.
    """
    models = {title: model.eval().to(device) for title, model in models.items()}
    features, targets, names, labels, sizes = {}, [], [], {}, []
    total = sum(len(indices) for _, indices in sources)
    bar = tqdm(total=total, desc="features", unit=" clips", leave=False)
    for source, indices in sources:
        for target, classes in source.labels.items():  # a test list may hold others, or in another order
            labels[target] = tuple(dict.fromkeys([*labels.get(target, ()), *classes]))
        for clips in data.evaluation_loader(source, indices=indices, batch=batch, workers=workers):
            for path, reason in source.check_broken(clips["broken"]).items():
                bar.write(f"broken, left out: {path} ({reason})")
            for title, model in models.items() if clips["index"] else ():
                for name, tokens in model.encode(clips["video"].to(device)).items():
                    found = {(title, name): tokens.float().mean(dim=1)}  # (B, D)
                    if measure is not None:
                        found[title, name, "measure"] = measure(tokens)  # (B,)
                    for key, x in found.items():
                        if key not in features:  # whole: small pieces, kept, would split the memory of tokens
                            features[key] = torch.empty(total, *x.shape[1:], dtype=x.dtype)
                        features[key][len(names) : len(names) + len(x)] = x
            for index in clips["index"]:
                of_clip = zip(source.labels.items(), source.targets(index))
                targets.append([labels[target].index(classes[n]) for (target, classes), n in of_clip])
                names.append(source.name(index))
            bar.update(len(clips["index"]) + len(clips["broken"]))
        sizes.append(len(names) - sum(sizes))
    bar.close()
    if not names:
        raise ValueError("There is no clip to read in this data.")
    features = {key: x[: len(names)] for key, x in features.items()}
    return features, torch.tensor(targets), names, labels, sizes


def score(x, targets, folds, *, k=20):
    """All scores of features x (n, D): those of probe_accuracy(), k-NN and retrieval by name, [L] each.

    targets: (n, L). folds: [(train indices, test indices)]; accuracies are means over them, retrieval is
    among all their test clips. "all" is one value: the share of test clips with every target right. k: at most
    as many neighbours as a class has clips to fit, on average; of more, k-NN would know only the majority.
    """
    found = probe_accuracy(x, targets, folds)
    few = min(k, max(1, min(len(train) for train, _ in folds) // (int(targets.max()) + 1)))
    parts = [(x[train], targets[train], x[test], targets[test]) for train, test in folds]
    near = [(knn(*fitted, k=few) == true).double() for *fitted, true in parts]
    found["knn"] = torch.stack([part.mean(dim=0) for part in near]).mean(dim=0).tolist()
    found["all"] = [float(found["correct"].all(axis=0).mean())]
    tested = torch.cat([test for _, test in folds])
    return found | retrieval(x[tested], targets[tested])


def probe_accuracy(x, targets, folds):
    """Linear probe of every target: {"accuracy": [L], "balanced": [L], "train": [L], "correct": (L, m)}.

    The scores are means over folds. correct: 0 or 1, whether each of the m test clips was right.
    """
    scores, correct = [], []
    for train, test in folds:
        probabilities = logistic_probe(x[train], targets[train], x[torch.cat([train, test])])
        predicted = torch.stack([p.argmax(dim=1) for p in probabilities], dim=1)  # (n + m, L)
        fitted, tested = predicted[: len(train)], predicted[len(train) :]
        of_fold = zip(tested.T, targets[test].T, fitted.T, targets[train].T)
        scores.append([(*accuracies(a, b), accuracies(c, d)[0]) for a, b, c, d in of_fold])
        correct.append(tested == targets[test])
    found = dict(zip(("accuracy", "balanced", "train"), np.mean(scores, axis=0).T.tolist()))
    return found | {"correct": torch.cat(correct).T.double().numpy()}


# ---- runs and clips, as the command line names them ----


def parser(description):
    """The flags that say which runs to look at and on which clips: those of all programs that read runs."""
    flags, workers = data.Parser(description), max(1, torch.get_num_threads() // 2)
    add, count, most = flags.add_argument, data.number(least=1, most=10**6), data.number(least=0, most=1000)
    add("runs", nargs="+", metavar="RUN", help="run folder of train.py, or a checkpoint of VideoMAE")
    add("--blocks", type=count, help="K that a checkpoint of VideoMAE is cut into [4]")
    add("--data", help="folder of videos, gratings, or double-gratings [generated moving scenes]")
    add("--train-list", help="videos to fit on, as train.py --list [3 folds, of neighbours by name]")
    add("--test-list", help="videos to test on")
    add("--stride", type=count, help="take every stride-th frame of a video [as the first run, else 4]")
    add("--short", choices=("drop", "repeat"), help="rule for short videos [as the first run, else drop]")
    add("--clips", type=count, help="take this many, drawn at random; of scenes the first [scenes: 3000]")
    add("--before-norm", action="store_true", help="read the last block before the output LayerNorm")
    add("--batch", type=count, default=32, help="clips at a time [32]")
    add("--workers", type=most, default=workers, help=f"processes that read clips [{workers}]")
    add("--device", default="auto", help="cpu, cuda or mps [the fastest here]")
    return flags


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

    @property
    def seed(self):
        """What its weights, data order and masks are drawn from."""
        return self.checkpoint["settings"].get("seed", 0)

    @property
    def setting(self):
        """What runs share that differ only in regime, K and seed: architecture, recipe, data, progress."""
        of, other = self.checkpoint, {"regime", "blocks", "decoder_values", "seed", "out", "resume", "device"}
        other |= {"workers", "compile", "graph", "data", "list", "decoder_slices", "frames", "pixels"}
        both = {**of["settings"], **of["config"]}
        setting = {key: value for key, value in both.items() if key not in other}
        total = of.get("total") or of["step"] or 1
        return setting | {"videos": of.get("data"), "progress": of["step"] / total}

    @property
    def norm(self):
        """The output LayerNorm; None where there is none, as in a fine-tuned VideoMAE."""
        return list(self.model.blocks.values())[-1].norm

    @property
    def untrained(self):
        """Title of the same architecture at random initialisation."""
        c, bare = self.model.config, "" if self.norm else ", no norm"
        shape = f"{c['depth']} layers {c['width']} wide, heads: {c['heads']}"
        return f"untrained, {shape}, {'x'.join(map(str, c['tubelet']))}, K = {c['blocks']}{bare}"


def read_runs(paths, blocks=None):
    """Runs from their folders. ValueError where they cannot be looked at together.

    blocks: K that a VideoMAE is cut into, 4 if None; a run has its own.
    """
    runs = []
    for path in map(Path, paths):
        title = (path.resolve().parent if path.name in CHECKPOINTS else path.resolve()).name
        run = Run(title, re.sub(r"-seed\d+$", "", title), *load(path, blocks=blocks or 4))
        for other in runs:
            if title == other.title:
                raise ValueError(f"Two runs are called {title}; rename one of them.")
            both = f"{other.title} and {title}"
            if run.model.video != other.model.video:
                raise ValueError(f"{both} take clips of different sizes; one at a time.")
            alike = run.setting == other.setting and run.model.config == other.model.config
            if run.group == other.group and not (alike and run.regime == other.regime):
                raise ValueError(f"{both} look like seeds of one run but differ; rename one.")
            if run.group == other.group and run.seed == other.seed:
                raise ValueError(f"{both} look like two seeds but both have {run.seed}; rename one.")
        step, total = run.checkpoint["step"], run.checkpoint.get("total", 0)
        if step < total:
            tqdm.write(f"{title} is not finished: step {step} of {total}")
        runs.append(run)
    if blocks and all("model" in run.checkpoint for run in runs):  # which that of a VideoMAE does not hold
        raise ValueError("--blocks cuts a VideoMAE; the K of a run was chosen in training. Leave it out.")
    return runs


def subjects(runs, before_norm=False):
    """The networks that are measured: {title: model} of each architecture untrained, and of the runs.

    The untrained weights are of seed 0. before_norm: every last block ends before the output LayerNorm.
    """
    untrained, trained = {}, {}
    for run in runs:
        torch.manual_seed(0)
        pair = Blockwise(**run.checkpoint["config"]), copy.deepcopy(run.model)
        for model in pair:
            if before_norm or run.norm is None:
                list(model.blocks.values())[-1].norm = None
        untrained[run.untrained], trained[run.title] = pair
    return untrained | trained


def open_data(args, run, probed=True):
    """[(source, indices)] of the clips that the flags name: all in one, or training list and test list.

    run: whose clips these are like, in size, and in stride where the flags leave it open.
    probed: videos of one class are refused, before they are read.
    """
    if bool(args.train_list) != bool(args.test_list):
        raise ValueError("--train-list and --test-list go together; without both, 3 folds are drawn.")
    if (args.train_list or args.stride or args.short) and args.data in (None, "gratings", "double-gratings"):
        raise ValueError("Lists, --stride and --short are for videos; say in which folder with --data.")
    video, settings = run.model.video, run.checkpoint["settings"]
    if args.data is None:
        sources = [data.Scenes("test", clips=args.clips or 3000, video=video)]
    elif args.data in ("gratings", "double-gratings"):
        sources = [data.Gratings(double=args.data == "double-gratings", video=video)]
    else:
        both = args.train_list, args.test_list
        rules = {"video": video, "stride": args.stride or settings.get("stride", 4)}
        rules["short"] = args.short or settings.get("short", "drop")
        pairs = [both, both[::-1]] if args.train_list else [both]  # of which there is none
        sources = [data.Videos(args.data, list_file=a, beside=b, **rules) for a, b in pairs]
        shared = set.intersection(*({path for path, _ in source.files} for source in sources))
        if args.train_list and probed and shared:
            example = data.printable(min(shared))
            raise ValueError(f"{len(shared)} videos are in both lists, as {example}; test on other ones.")
        classes = {name for source in sources for name in source.classes}
        if probed and len(classes) == 1:
            fix = "sort them into folders, name labels in lists, or take probe.py's --features"
            raise ValueError(f"All videos have the class {classes.pop()}; a probe needs two or more: {fix}.")
    rng = np.random.default_rng(0)
    return [(source, sorted(rng.permutation(len(source))[: args.clips].tolist())) for source in sources]


def split(targets, labels, sizes, source):
    """[(train indices, test indices)]: of the two lists, or 3 folds stratified on the first target (Sec. 4).

    Differs from paper, which tests on a fixed 30 % of UCF101's test split: the whole list is tested on.
    Videos without lists are not drawn into folds at random: parts of one recording, whose names begin alike,
    would be fitted and tested on, and what tells recordings apart would pass for what tells classes apart.
    Between neighbours that happens only where a fold ends inside a recording.

    ValueError where a probe would only seem to measure something.
    """
    seed = None if isinstance(source, data.Videos) else 0
    folds = [torch.arange(len(targets)).split(sizes)]
    if len(sizes) == 1:
        folds = stratified_folds(targets[:, 0], seed=seed)
    one = sum(len(test) for _, test in folds) == 1  # which has nothing to be retrieved
    for train, test in folds:
        if min(len(train), len(test)) == 0 or one:
            raise ValueError(f"{len(targets)} clips are too few to fit and to test on; take more.")
        for name, y in zip(labels, targets.T):
            fitted, tested = set(y[train].tolist()), set(y[test].tolist())
            if len(fitted) == 1:
                only = f"{name} {labels[name][min(fitted)]}"
                raise ValueError(f"All clips to fit on have {only}; a probe needs two classes or more.")
            if not fitted & tested:
                advice = "take two clips or more of a class, or two lists with labels of the same kind"
                raise ValueError(f"The clips to fit and to test on have no {name} in common; {advice}.")
    return folds


# ---- command line ----


def print_table(title, columns, rows):
    """Print rows {name: [[value of each seed], ...]} under their columns."""
    cells = {title: columns} | {name: [spread(value) for value in values] for name, values in rows.items()}
    first, width = max(map(len, cells)), max(len(cell) for line in cells.values() for cell in line)
    print()
    for name, line in cells.items():
        print(f"{name:{first}}  " + "  ".join(f"{cell:>{width}}" for cell in line))


def spread(values):
    """Mean over seeds, ± their standard deviation if there are several; - where there is no value."""
    if np.isnan(values).all():
        return "-"
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ±{np.std(values, ddof=1):.3f}"


def flags():
    """The command line of this script."""
    found = parser(__doc__)
    count = data.number(least=1, most=10**6)
    found.add_argument("--k", type=count, default=20, help="of k-NN, at most the clips per class [20]")
    text = "write features, labels and names to exactly this file; no probe"
    found.add_argument("--features", metavar="FILE.npz", help=text)
    return found


@data.program()
def main(arguments=None):
    """Print what can be read from every block, or write the features file."""
    args = flags().parse_args(arguments)
    device = data.pick_device(args.device)
    if args.features:
        data.check_output(args.features)
    runs = read_runs(args.runs, args.blocks)
    models = {"raw pixels:": Pixels()} | subjects(runs, args.before_norm)
    sources = open_data(args, runs[0], probed=not args.features)
    if args.features:
        models = {run.title: models[run.title] for run in runs}
    features, targets, names, labels, sizes = extract(models, sources, args.batch, args.workers, device)
    if args.features:
        write_features(args.features, features, targets, names, labels)
        return

    folds = split(targets, labels, sizes, sources[0][0])
    groups, scores = {run.title: run.group for run in runs}, defaultdict(list)  # {row: [score() by seed]}
    for (title, name), x in tqdm(features.items(), "probes", leave=False):
        scores[f"{groups.get(title, title)} {name}"].append(score(x, targets, folds, k=args.k))
    train, test = folds[0]
    clips = f"{len(train)} clips to fit, {len(test)} to test"
    print(f"{args.data or 'moving scenes'}: {clips}, folds: {len(folds)}")
    right = [targets[test] == targets[train].mode(dim=0).values for train, test in folds]  # [(m, L)]
    chance = torch.stack([part.double().mean(dim=0) for part in right]).mean(dim=0).tolist()
    names = ["accuracy", "balanced", "train", "knn", "mAP", "top1", "top5", "top10"]
    if len(labels) > 1:
        rows = {"chance": [[np.mean(chance)], *([value] for value in chance)]}
        for row, seeds in scores.items():
            rows[row] = [[np.mean(s["accuracy"]) for s in seeds], *zip(*(s["accuracy"] for s in seeds))]
        print_table("linear probe, test accuracy", ["mean", *labels], rows)
        every = [*names, "all"]
        rows = {row: [[np.mean(s[name]) for s in seeds] for name in every] for row, seeds in scores.items()}
        print_table("mean of targets (all: every one right)", every, rows)
    rows = {"chance": [[chance[0]], *([np.nan] for _ in names[1:])]}
    rows |= {row: [[s[name][0] for s in seeds] for name in names] for row, seeds in scores.items()}
    print_table(f"{next(iter(labels))}: linear probe, k-NN, retrieval", names, rows)


def write_features(path, features, targets, names, labels):
    """The file of --features, from what extract() returned."""
    alone = len({title for title, _ in features}) == 1
    arrays = {(name if alone else f"{title}/{name}"): x for (title, name), x in features.items()}
    for (target, classes), numbers in zip(labels.items(), targets.T):
        arrays[target] = np.array(classes)[numbers]
    with open(path, "wb") as file:  # np.savez would add .npz to a name without it
        np.savez(file, names=np.array(names), **arrays)
    print(f"{path}: {', '.join(arrays)}, names; {len(names)} clips")


if __name__ == "__main__":
    main()
