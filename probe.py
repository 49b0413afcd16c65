"""What can be read from block k? Linear probe and retrieval on the mean-pooled tokens of every block.

Römer & Dickscheid, arXiv 2601.09040, Sec. 4. Nothing is masked; one pass over the clips gives all features.

    python probe.py runs/nano-simultaneous-4                        # generated clips, their five labels
    python probe.py RUN RUN RUN --data gratings --json scores.json  # the paper's stimuli; scores in a file, too
    python probe.py RUN --data VIDEOS --train-list train.txt --test-list test.txt --stride 2 --short repeat
    python probe.py RUN --data VIDEOS --features out.npz            # features, labels and paths, no probe

Two baselines stand in every table: the same architecture at random initialisation, and pixels.
Shapes: B batch, N tokens, D width, K blocks; here n clips and L targets.
"""

import argparse
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
from blockwise import Blockwise, load

# ---- measurements: plain tensors in, numbers out ----


def logistic_probe(train_x, train_y, test_x, *, C=1.0):
    """Multinomial logistic regression, the linear probe (Sec. 4). Returns class probabilities (m, classes).

    Minimises sum of log-losses + |W|^2 / (2 C) to convergence; the intercept is not penalised. For two classes
    the authors and scikit-learn penalise one weight vector, w1 - w0; so does this. Features are standardised with
    the training mean and deviation; constant ones are left out. A class without training clip has probability 0.

    train_x (n, D), test_x (m, D): float. train_y (n,): class numbers; (n, L), for L targets, gives L results.
    Raises ValueError if a feature is not finite.
    """
    if not (torch.isfinite(train_x).all() and torch.isfinite(test_x).all()):
        raise ValueError("Features are not finite (NaN or infinite); this run's checkpoint cannot be probed.")
    train_x, test_x = train_x.double(), test_x.double()
    mean, std = train_x.mean(dim=0), train_x.std(dim=0, unbiased=False)
    varies = std > 1e-7 * mean.abs()
    x, test = (((a - mean) / std)[:, varies] for a in (train_x, test_x))
    # W = scale * V on the principal axes. scale makes the curvature of the objective about equal in all
    # directions, so that L-BFGS needs few steps: at equal probabilities it is X'X / classes.
    values, axes = torch.linalg.eigh(x.T @ x)
    x, test = (F.pad(a @ axes, (0, 1), value=1.0) for a in (x, test))  # the last feature is the intercept's
    values = F.pad(values.clamp(min=0), (0, 1), value=len(x))
    columns, results = x.T.contiguous(), []  # twice as fast as x.T
    unit = 1e6 / len(x)  # the loss is counted in millionths per clip: L-BFGS ignores curvature below 1e-10
    options = {"max_iter": 2000, "max_eval": 4000, "tolerance_grad": 3e-4, "tolerance_change": 0.0}
    for y in train_y.reshape(len(train_y), -1).T:
        present = y.unique()
        one_hot = (y == present.unsqueeze(1)).double()  # (classes present, n)
        penalty = F.pad(torch.full_like(values[:-1], (2 if len(present) == 2 else 1) / C), (0, 1))
        scale = (values / len(present) + penalty).rsqrt()
        V = torch.zeros(len(present), x.shape[1], dtype=torch.float64)  # (classes present, D + 1)
        optimizer = torch.optim.LBFGS([V], line_search_fn="strong_wolfe", **options)

        def objective(V=V, scale=scale, penalty=penalty, one_hot=one_hot):
            W = scale * V
            logs = (W @ columns).log_softmax(dim=0)  # (classes present, n)
            V.grad = unit * scale * ((logs.exp() - one_hot) @ x + penalty * W)  # the gradient in V
            return unit * ((penalty * W.square()).sum() / 2 - (logs * one_hot).sum())

        with torch.no_grad():
            optimizer.step(objective)
        probabilities = torch.zeros(len(test), int(y.max()) + 1, dtype=torch.float64)
        probabilities[:, present] = (test @ (scale * V).T).softmax(dim=1)
        results.append(probabilities)
    return results if train_y.ndim > 1 else results[0]


def retrieval(x, labels, *, ks=(1, 5, 10)):
    """Leave-one-out retrieval by cosine of raw features (Sec. 4): "mAP", "top1", "top5", "top10".

    Top-k: fraction of queries with a clip of their class among the k nearest. Ties (cosines equal to 12 decimals)
    share their last rank, as in scikit-learn's average precision; top-k takes clips of other classes first.
    A query without another clip of its class is skipped; if all are, the scores are nan.
    x: (n, D), two clips or more. labels: (n,) gives floats; (n, L), for L targets, gives lists.
    """
    z, targets = F.normalize(x.double(), dim=1), labels.reshape(len(labels), -1).T  # (n, D), (L, n)
    scores = [[] for _ in targets]  # by target: [(queries, 1 + len(ks))]
    for queries in torch.arange(len(z)).split(256):
        distance = (-z[queries] @ z.T).round(decimals=12)  # (q, n); equal clips differ in the last bits
        distance.scatter_(1, queries.unsqueeze(1), torch.inf)  # the query itself comes last, and is cut off
        order = torch.from_numpy(np.argsort(distance.numpy(), axis=1))[:, :-1]  # faster than torch's sort
        distance = distance.gather(1, order)  # (q, n - 1), nearest first
        # The rank of a clip: how many are at least as near: its position in the order, or the last one tied with it.
        last = F.pad(distance.diff(dim=1) > 0, (0, 1), value=True)  # (q, n - 1): of its ties
        rank = torch.arange(1, len(z)).where(last, len(z)).flip(1).cummin(dim=1).values.flip(1)
        for y, rows in zip(targets, scores):
            same = y[order] == y[queries].unsqueeze(1)  # (q, n - 1): of the query's class
            hits = same.cumsum(dim=1, dtype=torch.int32)
            count = hits[:, -1]
            hits = hits.gather(1, rank - 1)  # clips of the class that are at least as near
            precision = (same * hits / rank.double()).sum(dim=1) / count
            first = same.int().argmax(dim=1, keepdim=True)  # the nearest clip of the class
            others = (rank - hits).gather(1, first).flatten()  # clips of other classes at least as near
            columns = torch.stack([precision, *(others < k for k in ks)], dim=1)
            rows.append(columns[count > 0])
    means = torch.stack([torch.cat(rows).mean(dim=0) for rows in scores], dim=1).tolist()  # [1 + len(ks)][L]
    result = dict(zip(["mAP", *(f"top{k}" for k in ks)], means))
    return result if labels.ndim > 1 else {name: values[0] for name, values in result.items()}


def stratified_folds(labels, folds=3, seed=0):
    """[(train indices, test indices)]: every class is spread evenly over the folds, at random from seed.

    seed: None for contiguous folds in each class: similar clips that are neighbours stay in one fold.
    """
    labels = np.asarray(labels)
    fold = np.empty(len(labels), int)
    rng, start = np.random.default_rng(seed), 0
    for value in np.unique(labels):
        members = np.flatnonzero(labels == value)
        member_folds = (np.arange(len(members)) + start) % folds
        start += len(members)  # so that small classes do not all begin at the first fold
        if seed is None:
            member_folds.sort()
        else:
            members = rng.permutation(members)
        fold[members] = member_folds
    return [tuple(torch.from_numpy(np.flatnonzero(m)) for m in (fold != f, fold == f)) for f in range(folds)]


# ---- features ----


class Pixels(torch.nn.Module):
    """The baseline without a network: 16 x 16 pixels of the middle frame, and of the changes between frames."""

    def encode(self, video):
        """video (B, T, H, W, C) uint8 to {"middle frame": (B, 1, 768), "frame changes": (B, 1, 768)}."""
        x = video.permute(0, 1, 4, 2, 3).float() / 255  # (B, T, C, H, W)
        pictures = {"middle frame": x[:, x.shape[1] // 2]}
        if x.shape[1] > 1:
            pictures["frame changes"] = x.diff(dim=1).abs().mean(dim=1)
        return {name: F.adaptive_avg_pool2d(p, 16).flatten(1).unsqueeze(1) for name, p in pictures.items()}


@torch.no_grad()
def extract(models, sources, *, batch=32, workers=0, device="cpu", measure=None):
    """Features of clips after every block of several models, in one pass; nothing masked, fp32.

    models: {title: model with encode()}. sources: [(source, indices)]. Broken videos are named and left out.
    measure: a function of a block's tokens (B, N, D) that returns (B,) or (B, m); its values are collected too.
    Returns features {(title, "block1"): (n, D), ...}, the mean over tokens after every block (Sec. 4), and
    {(title, "block1", "measure"): (n,), ...}; targets (n, L), class numbers in labels; names of the clips;
    labels {target: classes}; sizes, the number of clips from each source. Raises ValueError without any clip.
    """
    models = {title: model.eval().to(device) for title, model in models.items()}
    features, targets, names, labels, sizes = {}, [], [], {}, []
    total = sum(len(indices) for _, indices in sources)
    bar = tqdm(total=total, desc="features", unit=" clips", leave=False)
    for source, indices in sources:
        for target, classes in source.labels.items():  # two sources may have other classes, or another order
            labels[target] = tuple(dict.fromkeys([*labels.get(target, ()), *classes]))
        skipped = data.Skipped(source)
        for clips in data.eval_loader(source, indices=indices, batch=batch, workers=workers):
            for message in skipped.update(clips):
                bar.write(f"left out: {message}")
            for title, model in models.items() if clips["index"] else ():
                for name, tokens in model.encode(clips["video"].to(device)).items():
                    values = {(title, name): tokens.float().mean(dim=1)}  # (B, D)
                    if measure is not None:
                        values[title, name, "measure"] = measure(tokens)  # (B,)
                    for key, x in values.items():
                        if key not in features:  # at full size: many small tensors would fragment the memory
                            features[key] = torch.empty(total, *x.shape[1:], dtype=x.dtype)
                        features[key][len(names) : len(names) + len(x)] = x
            for index in clips["index"]:
                pairs = zip(source.labels.items(), source.targets(index))
                targets.append([labels[target].index(classes[number]) for (target, classes), number in pairs])
                names.append(source.name(index))
            bar.update(len(clips["index"]) + len(clips["skipped"]))
        sizes.append(len(names) - sum(sizes))
    bar.close()
    if not names:
        raise ValueError("There is no clip to read in this data.")
    features = {key: x[: len(names)] for key, x in features.items()}
    return features, torch.tensor(targets), names, labels, sizes


def score(x, targets, folds):
    """Linear probe and retrieval of features x (n, D): those of probe_accuracy() and retrieval().

    targets: (n, L). folds: [(train indices, test indices)]; retrieval is among all their test clips.
    """
    tested = torch.cat([test for _, test in folds])
    return probe_accuracy(x, targets, folds) | retrieval(x[tested], targets[tested])


def probe_accuracy(x, targets, folds):
    """Linear probe of every target: {"accuracy": [L], the mean over folds, "correct": (L, m)}.

    correct: 1 where one of the m test clips is classified rightly, else 0.
    """
    correct = []  # by fold: (test clips, L)
    for train, test in folds:
        probabilities = logistic_probe(x[train], targets[train], x[test])  # [L]
        predicted = torch.stack([p.argmax(dim=1) for p in probabilities], dim=1)
        correct.append(predicted == targets[test])
    return {"accuracy": mean_of_folds(correct), "correct": torch.cat(correct).T.double().numpy()}


def chance_accuracy(targets, folds):
    """Accuracy [L] of always naming the commonest class of the training clips."""
    return mean_of_folds([targets[test] == targets[train].mode(dim=0).values for train, test in folds])


def mean_of_folds(correct):
    """[(test clips, L)] of every fold to [L]."""
    return torch.stack([fold.double().mean(dim=0) for fold in correct]).mean(dim=0).tolist()


# ---- runs and clips, as the command line names them ----

GENERATED = ("scenes", "gratings", "double-gratings")


def parser(description):
    """The command line of all programs that read runs: which runs, on which clips."""
    style, workers = argparse.RawDescriptionHelpFormatter, data.default_workers()
    flags = argparse.ArgumentParser(description=description, formatter_class=style, allow_abbrev=False)
    add = flags.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folder of train.py")
    add("--data", help=f"folder of videos, or {', '.join(GENERATED)} [as the first run]")
    add("--train-list", help="videos to fit on, as train.py --list [3 folds, of neighbours by name]")
    add("--test-list", help="videos to test on")
    add("--stride", type=int, help="take every stride-th frame of a video [as the first run, else 4]")
    add("--short", choices=("drop", "repeat"), help="rule for short videos [as the first run, else drop]")
    add("--clips", type=int, help="use this many, drawn at random; of scenes the first [scenes: 3000]")
    add("--before-norm", action="store_true", help="read the last block before the output LayerNorm")
    add("--batch", type=int, default=32, help="clips at a time [32]")
    add("--workers", type=int, default=workers, help=f"processes that read clips [{workers}]")
    add("--device", default="auto", help="cpu, cuda or mps [the fastest here]")
    return flags


class Run(NamedTuple):
    """A trained run, or a snapshot of one."""

    folder: Path
    title: str  # the folder's name, and the step of a snapshot
    group: str  # the title without the seed
    regime: str  # of the training; that of the model's config only sets its shape
    seed: int  # of the weights, the data order and the masks
    model: torch.nn.Module
    checkpoint: dict

    @property
    def untrained(self):
        """Title of the same architecture at random initialisation."""
        c = self.model.config
        norm = "" if c["output_norm"] else ", no norm"
        shape = f"{c['depth']} layers {c['width']} wide, heads: {c['heads']}"
        return f"untrained, {shape}, {'x'.join(map(str, c['tubelet']))}, K = {c['blocks']}{norm}"


def load_runs(paths):
    """Runs from their folders, or snapshots of a run. Raises ValueError if they cannot stand in one table."""
    runs = []
    for path in map(Path, paths):
        folder = path.resolve().parent if path.is_file() else path.resolve()
        snapshot = path.name.startswith("step_")  # kept by train.py --keep
        title = f"{folder.name} {path.stem.replace('_', ' ')}" if snapshot else folder.name
        group = re.sub(r"-seed\d+(?= |$)", "", title)
        model, checkpoint = load(path)
        regime, seed = checkpoint["settings"].get("regime"), checkpoint["settings"].get("seed", 0)
        for other in runs:
            if title == other.title or (group, seed) == (other.group, other.seed):
                raise ValueError(f"{other.title} and {title} have one name or seed ({seed}); rename one.")
            if model.video != other.model.video:
                raise ValueError(f"{other.title} and {title} take clips of different sizes; read them apart.")
        step, total = checkpoint["step"], checkpoint.get("total", 0)
        if step < total and not snapshot:
            print(f"{title} is not finished: step {step} of {total}")
        runs.append(Run(folder, title, group, regime, seed, model, checkpoint))
    return runs


def networks(runs, before_norm=False):
    """The networks to measure: {title: model} of each architecture untrained, then of the runs.

    The untrained weights are of seed 0. before_norm: every last block ends before the output LayerNorm.
    """
    untrained, trained = {}, {}
    for run in runs:
        torch.manual_seed(0)
        untrained[run.untrained] = Blockwise(**run.checkpoint["config"])
        trained[run.title] = copy.deepcopy(run.model)
    models = untrained | trained
    for model in models.values() if before_norm else ():
        list(model.blocks.values())[-1].norm = None
    return models


def open_data(args, run, probed=True):
    """Open and print the clips that the flags name: [(source, indices)], one source, or a training and a test list.

    run: gives the size of the clips. What the flags leave open is as in its training: the folder with its lists,
    stride, rule for short videos. probed: refuse videos that cannot be probed.
    """
    settings, name = run.checkpoint["settings"], args.data
    if name is None and settings.get("source"):
        fix = "give them to probe.main(sources=...), or take --data"
        raise ValueError(f"{run.title} was trained on clips of its own source, {settings['source']}; {fix}.")
    if name is None and settings.get("data"):
        print(f"videos and rules as in the training of {run.title} (--data names others):")
        sources = open_videos(settings["data"], args, run, probed)
    elif name is None or name in GENERATED:
        sources = [open_generated(name or "scenes", args.clips, run.model.video)]
    else:
        sources = open_videos(name, args, run, probed)
    rng = np.random.default_rng(0)
    return [(source, sorted(rng.permutation(len(source))[: args.clips].tolist())) for source in sources]


def open_generated(name, clips, video):
    """The generated clips of this name: a source."""
    if name == "scenes":
        source = data.Scenes("test", clips=clips or 3000, video=video)
    else:
        source = data.Gratings(double=name == "double-gratings", video=video)
    print(f"generated {name}: {len(source)} clips")
    return source


def open_videos(folder, args, run, probed):
    """The videos of a folder, or those of the training and of the test list: [one or two sources]."""
    settings, lists = run.checkpoint["settings"], [args.train_list, args.test_list]
    if args.data is None and not any(lists) and settings.get("list"):
        lists = [settings["list"], settings.get("eval_list")]
    lists = [path for path in lists if path] or [None]
    stride, short = args.stride or settings.get("stride", 4), args.short or settings.get("short", "drop")
    sources, rules = [], {"video": run.model.video, "stride": stride, "short": short}
    rules["counts_file"] = run.folder / "frames.json"
    for list_file, paired_list in zip(lists, reversed(lists)):
        sources.append(data.Videos(folder, list_file=list_file, paired_list=paired_list, **rules))
        print(sources[-1].summary())
        print(f"  list: {list_file or 'none'}, stride {stride}, short videos: {short}")
    shared = sources[0].shared(sources[1]) if len(sources) == 2 else []
    if probed and shared:
        raise ValueError(f"{len(shared)} videos are in both lists, as {shared[0]}; test on other ones.")
    if probed and len(sources[0].classes) == 1:
        fix = "sort them into folders, name labels in lists, or take probe.py's --features"
        raise ValueError(f"The videos have one class, {sources[0].classes[0]}; a probe needs two: {fix}.")
    return sources


def split(targets, labels, sizes, source):
    """[(train indices, test indices)]: of the two lists, or 3 folds stratified on the first target (Sec. 4).

    Differs from paper, which tests on a fixed 30 % of UCF101's test split: the whole list is tested on.
    Videos without lists get contiguous folds. In random ones, clips of one recording, which have similar names,
    would be trained and tested on, and the probe would recognise recordings instead of classes.
    Prints classes that no training clip has.
    """
    if len(sizes) == 2:
        folds = [torch.arange(len(targets)).split(sizes)]
    else:
        folds = stratified_folds(targets[:, 0], seed=None if isinstance(source, data.Videos) else 0)
    for (name, classes), y in zip(labels.items(), targets.T):
        unseen = set().union(*(set(y[test].tolist()) - set(y[train].tolist()) for train, test in folds))
        if unseen:
            names = ", ".join(str(classes[number]) for number in sorted(unseen))
            print(f"{name} of test clips that no training clip has, always counted as wrong: {names}")
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


def build_parser():
    """The command line of this program."""
    result = parser(__doc__)
    output = result.add_mutually_exclusive_group()
    output.add_argument("--json", metavar="FILE.json", help="write all scores of all runs to this file, too")
    output.add_argument("--features", metavar="FILE.npz", help="write features, labels and names; no probe")
    return result


@data.user_errors()
def main(arguments=None, *, sources=None):
    """Print what can be read from every block, or write the features file.

    sources: [(source, indices)], clips of your own in place of --data: one source, or one to fit and one to test.
    """
    args = build_parser().parse_args(arguments)
    data.keep_freed_memory()
    device = data.pick_device(args.device)
    for path, suffix in ((args.json, ".json"), (args.features, ".npz")):
        if path and Path(path).suffix != suffix:
            raise ValueError(f"{path} must end in {suffix}.")
        if path:
            data.check_writable(path)
    runs = load_runs(args.runs)
    sources = sources or open_data(args, runs[0], probed=not args.features)
    models = {"raw pixels:": Pixels()} | networks(runs, args.before_norm)
    if args.features:
        models = {run.title: models[run.title] for run in runs}
    options = {"batch": args.batch, "workers": args.workers, "device": device}
    features, targets, names, labels, sizes = extract(models, sources, **options)
    if args.features:
        write_features(args.features, features, targets, names, labels)
        return

    folds = split(targets, labels, sizes, sources[0][0])
    scores = {("chance", ""): {"accuracy": chance_accuracy(targets, folds)}}
    for key, x in tqdm(features.items(), "probes", leave=False):
        scores[key] = score(x, targets, folds)
    if args.json:
        write_scores(args.json, scores, labels)
    print(f"{len(folds[0][0])} clips to fit, {len(folds[0][1])} to test, folds: {len(folds)}")
    print_scores(scores, labels, {run.title: run.group for run in runs})


def print_scores(scores, labels, groups):
    """Print the tables of {(title, block): score()}; the seeds of a group {title: group} share a row."""
    rows = defaultdict(list)
    for (title, block), values in scores.items():
        rows[f"{groups.get(title, title)} {block}".strip()].append(values)
    accuracy = {}
    for row, seeds in rows.items():
        accuracy[row] = [[np.mean(s["accuracy"]) for s in seeds], *zip(*(s["accuracy"] for s in seeds))]
    print_table("linear probe, accuracy", ["mean", *labels], accuracy)
    del rows["chance"]
    names = ("mAP", "top1", "top5", "top10")
    means = {row: [[np.mean(s[name]) for s in seeds] for name in names] for row, seeds in rows.items()}
    print_table("retrieval, mean of targets", names, means)


def write_scores(path, scores, labels):
    """Write the file of --json: {title: {block: {score: {target: value or null}}}}."""
    content = defaultdict(dict)
    for (title, block), values in scores.items():
        by_name = {name: dict(zip(labels, by_target)) for name, by_target in values.items()}
        content[title][block] = {name: value for name, value in by_name.items() if name != "correct"}
    data.write_json(path, content)


def write_features(path, features, targets, names, labels):
    """Write the file of --features, from what extract() returned."""
    one_run = len({title for title, _ in features}) == 1
    arrays = {(name if one_run else f"{title}/{name}"): x for (title, name), x in features.items()}
    for (target, classes), numbers in zip(labels.items(), targets.T):
        arrays[target] = np.array(classes)[numbers]
    data.write_file(path, lambda file: np.savez(file, names=np.array(names), **arrays))
    print(f"{path}: {', '.join(arrays)}, names; {len(names)} clips")


if __name__ == "__main__":
    main()
