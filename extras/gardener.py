"""Which layers of a masked video transformer matter? Entropy says it without data, a probe by removing them.

Gardener: Xiang, Wu & Bai, "Entropy Reveals Block Importance in Masked Self-Supervised Vision Transformers",
arXiv 2602.03918. The importance of a layer is the entropy of its weights; the lowest go first.

    python gardener.py RUN                           # seconds; or a VideoMAE, timm or Hugging Face checkpoint
    python gardener.py CHECKPOINT --pattern 'trunk\\.{}\\.(qkv|proj|fc1|fc2)\\.weight'   # another transformer
    python gardener.py RUN RUN --prune --plot        # without 1, 3, 5, ... least important layers: prune.json

Shapes: B batch, N tokens, P values in one tubelet, D width.
"""

import copy
import functools
import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from analyze import draw_band, pyplot, save_figure, to_json
from blockwise import read_checkpoint, unwrap
from data import check_output, pick_device, program
from probe import extract, open_data, parser, print_table, probe_accuracy, read_runs, split, subjects

# ---- importance without data ----

# Where a state_dict keeps the four matrices of an encoder layer, as regular expressions; {} is a number.
WEIGHTS = {
    "this project": r"blocks\.block{}\.layers\.{}\.(qkv|proj|fc1|fc2)\.weight",  # block and layer
    "VideoMAE, timm": r"(module\.)?(encoder\.)?blocks\.{}\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.weight",
    "Hugging Face": r"(module\.)?(videomae\.)?encoder\.layer\.{}\.(attention\.attention\.(query|key|value)"
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
        names, found = [f"number{i}" for i in range(one.count("{}"))], defaultdict(list)
        for name in names:  # so that other groups of the pattern are not taken for numbers
            one = one.replace("{}", rf"(?P<{name}>\d+)", 1)
        try:
            numbered = re.compile(one)
        except re.error as error:
            raise ValueError(f"--pattern {pattern} is not a regular expression: {error}.") from None
        for key, value in state.items():
            if match := numbered.fullmatch(key):
                found[tuple(int(match[name]) for name in names if match[name])].append(value)
        if found:
            return dict(sorted(found.items()))
    some = ", ".join(key for key in state if key.endswith("weight"))[:400]
    example = r"--pattern 'blocks\.{}\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.weight'"
    raise ValueError(f"No key fits {pattern or 'a known naming'}; give one, like {example}, for: {some} ...")


def read_state(path):
    """The state_dict in a run folder or in a checkpoint, also if it is nested as model, module or state_dict.

    Raises ValueError if there is none.
    """
    path, checkpoint = read_checkpoint(path)
    found = {key: value for key, value in unwrap(checkpoint).items() if isinstance(value, torch.Tensor)}
    if not found:
        raise ValueError(f"{path} holds no state_dict: no tensors by name.")
    return found


# ---- importance by removing ----


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
        blocks, patches = list(self.model.blocks.values()), self.model.patches(video)  # (B, N, P)
        places = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)  # (B, N)
        tokens = dict.fromkeys(self.removed, blocks[0].embedding(patches, places))  # (B, N, D)
        for number, layer in enumerate((layer for block in blocks for layer in block.layers), start=1):
            done = {}
            for removed, h in tokens.items():
                if number not in removed:
                    if h not in done:  # the same tensor, not only an equal one
                        done[h] = layer(h)
                    tokens[removed] = done[h]
        norm = blocks[-1].norm or torch.nn.Identity()
        return {removed: norm(h) for removed, h in tokens.items()}


def spearman(a, b):
    """Spearman's rank correlation of two sequences; equal values share a rank. nan if one is constant."""

    def ranks(values):
        _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[group]

    a, b = ranks(a), ranks(b)
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else math.nan


def least_important(importance, sizes):
    """The sets of the 0, 1, 3, ... least important layers; of equal ones, the earlier first."""
    order = np.argsort(importance, kind="stable") + 1
    return [frozenset(order[:size].tolist()) for size in sizes]


def probe_pruned(args, model, sources, removed):
    """Linear probe of the last block without some layers: {frozenset: share of targets right, by clip}.

    Differs from paper, which fine-tunes.
    """
    models = {"": Pruned(model, removed)}
    features, targets, _, labels, sizes = extract(models, sources, args.batch, args.workers, args.device)
    folds = split(targets, labels, sizes, sources[0][0])
    probed = tqdm(features.items(), "probes", leave=False)
    return {choice: probe_accuracy(x, targets, folds)["correct"].mean(axis=0) for (_, choice), x in probed}


def measure_pruning(args, model, sources, draws=5):
    """Accuracy of a model without its 1, 3, 5, ... least important layers, for every ranking (prune.json).

    Rankings: entropy; random, several draws; last, the last layers first; magnitude; and the oracle, which
    removes first what costs least when it alone is removed, on the very clips that it is then tested on.
    """
    weights = layer_weights(model.state_dict()).values()
    entropies, shares = zip(*(layer_entropy(w) for w in weights))
    # Ours, beside the paper's controls: the mean |w| of the same four matrices.
    magnitude = [torch.cat([part.flatten() for part in w]).abs().mean().item() for w in weights]
    depth, rng = len(weights), np.random.default_rng(0)
    rankings = {  # {name: [importance of layer 1..depth, of each draw]}
        "entropy": [entropies],
        "random": [rng.permutation(depth) for _ in range(draws)],
        "last": [-np.arange(depth)],
        "magnitude": [magnitude],
    }
    sizes, single = [0, *range(1, depth, 2)], [frozenset([number]) for number in range(1, depth + 1)]

    def choices(rankings):
        return {c for of_draws in rankings for draw in of_draws for c in least_important(draw, sizes)}

    right = probe_pruned(args, model, sources, choices(rankings.values()).union(single))
    without = [right[choice].mean() for choice in single]
    rankings["oracle"] = [np.negative(without)]
    if missing := choices([rankings["oracle"]]) - right.keys():
        right |= probe_pruned(args, model, sources, missing)
    accuracy, rank_correlation = {}, {}
    for name, of_draws in rankings.items():
        accuracy[name] = [[right[c].mean() for c in least_important(draw, sizes)] for draw in of_draws]
        rank_correlation[name] = [spearman(draw, rankings["oracle"][0]) for draw in of_draws]
    full = right[frozenset()]
    return {
        "layers": {"entropy": entropies, "/ ln N": shares, "mean |w|": magnitude, "without it": without},
        "removed": sizes,
        "accuracy": accuracy,
        "spearman": rank_correlation,
        "two standard errors": 2 * full.std(ddof=1) / math.sqrt(len(full)),
    }


def draw_pruning(axis, title, result):
    """Accuracy against layers removed, a line per ranking; random: ±1 sd of draws."""
    for name, draws in result["accuracy"].items():
        draw_band(axis, result["removed"], draws, name)
    what = {"xlabel": "layers removed", "ylabel": "linear probe, last block"}
    axis.set(title=title, xticks=result["removed"], **what)


# ---- command line ----


@program()
def main(arguments=None):
    """Rank the layers of every checkpoint by entropy, or probe the runs with layers removed."""
    flags = parser(__doc__)
    add = flags.add_argument
    add("--prune", action="store_true", help="probe with layers removed, in several orders")
    add("--pattern", help="without --prune: regular expression of the weights' keys, {} = layer")
    add("--out", default="runs/analysis", help="folder for prune.json [runs/analysis]")
    add("--plot", action="store_true", help="draw figure_prune.png")
    args = flags.parse_args(arguments)
    if args.prune and args.pattern:
        raise ValueError("--pattern is for checkpoints of other programs, which --prune cannot probe.")
    if args.prune:
        print_pruning(args)
        return
    for name, value in vars(args).items():
        if name not in ("runs", "pattern") and value != flags.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} is for --prune; give both, or leave it out.")
    for path in args.runs:
        print_entropies(path, args.pattern)


def print_entropies(path, pattern):
    """The ranking of one checkpoint: a row per layer, and per block where the keys have two numbers."""
    rows, blocks = {}, defaultdict(list)
    for numbers, weights in layer_weights(read_state(path), pattern).items():
        rows[layer_title(numbers)] = [[value] for value in layer_entropy(weights)]
        if len(numbers) > 1:
            blocks[f"block{numbers[0]}, all"] += weights
    lowest = ", ".join(sorted(rows, key=lambda name: rows[name][0]))
    rows |= {name: [[value] for value in layer_entropy(weights)] for name, weights in blocks.items()}
    print_table(str(path), ["entropy", "/ ln N"], rows)
    print(f"lowest first: {lowest}")


def layer_title(numbers):
    """Name of a layer by the numbers in its keys."""
    first, *rest = numbers
    return f"block{first} layers.{'.'.join(map(str, rest))}" if rest else f"layer {first}"


def print_pruning(args):
    """The tables of --prune, prune.json and figure_prune.png."""
    if args.plot:
        pyplot()
    args.device = pick_device(args.device)
    folder, runs, results = Path(args.out), read_runs(args.runs, args.blocks), {}
    check_output(folder, folder=True)
    models, sources = subjects(runs, args.before_norm), open_data(args, runs[0])
    for run in runs:
        results[run.title] = result = measure_pruning(args, models[run.title], sources)
        names = [layer_title(numbers) for numbers in layer_weights(run.model.state_dict())]
        rows = {n: [[v] for v in values] for n, values in zip(names, zip(*result["layers"].values()))}
        print_table(run.title, result["layers"], rows)
        rows = {n: [*zip(*draws), result["spearman"][n]] for n, draws in result["accuracy"].items()}
        columns = [*(f"n = {size}" for size in result["removed"]), "Spearman"]
        print_table("linear probe without n layers", columns, rows)
        print(f"Two standard errors over the test clips, n = 0: {result['two standard errors']:.3f}")
    (folder / "prune.json").write_text(to_json(results))
    print(f"\n{folder}/prune.json")
    if args.plot:
        panels = [functools.partial(draw_pruning, title=t, result=result) for t, result in results.items()]
        save_figure(folder / "figure_prune.png", panels)
        print(f"{folder}/figure_prune.png")


if __name__ == "__main__":
    main()
