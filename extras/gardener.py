"""Which layers of a masked video transformer matter? Entropy ranks them without data; a probe tests removal.

Gardener: Xiang, Wu & Bai, "Entropy Reveals Block Importance in Masked Self-Supervised Vision Transformers",
arXiv 2602.03918. The importance of a layer is the entropy of its weights; the lowest go first.

    python -m extras.gardener RUN                    # seconds; or a VideoMAE, timm or Hugging Face checkpoint
    python -m extras.gardener CHECKPOINT --pattern 'trunk\\.{}\\.(qkv|proj|fc1|fc2)\\.weight'   # other names
    python -m extras.gardener RUN RUN --prune        # accuracy without 1, 3, 5, ... layers: prune.json

Layers are counted from 1 through the whole encoder.
Shapes: B batch, N tokens, P values in one tubelet, D width.
"""

import argparse
import copy
import math
import pickle
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from blockwise import Blockwise, load
from data import check_writable, pick_device, user_errors, write_json
from probe import extract, load_runs, networks, open_data, parser, print_table, probe_accuracy, split

# ---- importance without data ----

# Names of the matrices of an encoder layer, as regular expressions in which {} is the number of the layer;
# and how many matrices a layer has.
PATTERNS = {
    # VideoMAE's authors, timm
    r"(module\.)?(encoder\.)?blocks\.{}\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.weight": 4,
    # Hugging Face
    r"(module\.)?(videomae\.)?encoder\.layer\.{}\.(attention\.attention\.(query|key|value)"
    r"|(attention\.output|intermediate|output)\.dense)\.weight": 6,
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


def model_weights(model):
    """The four matrices of every encoder layer of a Blockwise model: {"block1 layer 1": [tensors], ...}."""
    layers = [(name, layer) for name, block in model.blocks.items() for layer in block.layers]
    return {
        f"{name} layer {number}": [m.weight for m in (layer.qkv, layer.proj, layer.fc1, layer.fc2)]
        for number, (name, layer) in enumerate(layers, start=1)
    }


def checkpoint_weights(state, pattern=None):
    """The matrices of every encoder layer in any state_dict: {"layer 1": [tensors], ...}.

    pattern: regular expression for their names, with {} where the number of the layer stands, which counts
    from 0; None: the first of PATTERNS that fits. Raises ValueError if no name fits.
    """
    if pattern and "{}" not in pattern:
        raise ValueError(f"--pattern {pattern} has no {{}}, which stands for the number of the layer.")
    for form, matrices in {pattern: 4}.items() if pattern else PATTERNS.items():
        layers, expression = defaultdict(list), re.compile(form.replace("{}", r"(?P<layer>\d+)", 1))
        for name, value in state.items():
            if match := expression.fullmatch(name):
                layers[int(match["layer"]) + 1].append(value)
        expected = max(matrices, *map(len, layers.values()), 0)
        for number in sorted(layers):
            if len(layers[number]) < expected:
                have = f"{len(layers[number])} of {expected} matrices"
                print(f"Warning: layer {number} has only {have}; its entropy does not compare.")
        if layers:
            return {f"layer {number}": layers[number] for number in sorted(layers)}
    some = ", ".join(name for name in state if name.endswith("weight"))[:400]
    example = r"--pattern 'blocks\.{}\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.weight'"
    raise ValueError(f"No name fits {pattern or 'a known form'}; give one, like {example}, for: {some} ...")


def read_weights(path, pattern=None):
    """The matrices of every layer of a checkpoint, and of an untrained network of the same shape.

    path: a file, or the folder of a run or of Hugging Face. It is read as data: no code in it is run.
    Returns two dicts {layer: [tensors]}; the second is empty where the checkpoint is no run.
    """
    path = Path(path)
    names = ("last.pt", "model.safetensors", "pytorch_model.bin") if path.is_dir() else ("",)
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise ValueError(f"There is no checkpoint {path / names[0]}; name a run folder or a file.")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return checkpoint_weights(load_file(file), pattern), {}
        with torch.serialization.safe_globals([argparse.Namespace]):  # VideoMAE's files hold their settings
            state = torch.load(file, map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError(f"{file} needs safetensors: run pip install safetensors first.") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is damaged, or holds more than data, which is not read.") from error
    if "config" in state:
        model, _ = load(file)
        torch.manual_seed(0)
        return model_weights(model), model_weights(Blockwise(**model.config))
    for name in ("model", "module", "state_dict"):  # the state_dict may be nested
        state = state[name] if isinstance(state.get(name), dict) else state
    return checkpoint_weights(state, pattern), {}


# ---- importance by removing ----


def prune(model, layers):
    """A copy of a Blockwise model without some encoder layers, counted from 1 through all blocks.

    A removed layer becomes nn.Identity: the residual stream passes, and the names of the other weights stay.
    To load a saved one: prune(Blockwise(**config), layers).load_state_dict(state).
    """
    depth = model.config["depth"]
    if not set(layers) <= set(range(1, depth + 1)):
        raise ValueError(f"Layers {sorted(layers)} cannot be removed; there are 1 to {depth}.")
    model = copy.deepcopy(model)
    places = [(block.layers, i) for block in model.blocks.values() for i in range(len(block.layers))]
    for number in set(layers):
        block_layers, i = places[number - 1]
        block_layers[i] = torch.nn.Identity()
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
        for number, layer in enumerate(self.model.layers, start=1):
            outputs = {}  # {input: output}; inputs are compared as objects, not by value
            for removed, h in tokens.items():
                if number not in removed:
                    if h not in outputs:
                        outputs[h] = layer(h)
                    tokens[removed] = outputs[h]
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
    features, targets, _, labels, sizes = extract(
        {"": Pruned(model, removed)}, sources, batch=args.batch, workers=args.workers, device=args.device
    )
    folds = split(targets, labels, sizes, sources[0][0])
    probed = tqdm(features.items(), "probes", leave=False)
    return {layers: probe_accuracy(x, targets, folds)["correct"].mean(axis=0) for (_, layers), x in probed}


def measure_pruning(args, model, sources, draws=5):
    """Accuracy of a model without its 1, 3, 5, ... least important layers, for every ranking (prune.json).

    Rankings: entropy; random, several draws; last, the last layers first; magnitude; and the oracle, which
    removes first what costs least when it alone is removed, on the very clips that it is then tested on.
    """
    weights = model_weights(model).values()
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
    removed = {s for ranking in rankings.values() for draw in ranking for s in least_important(draw, sizes)}
    correct = probe_pruned(args, model, sources, removed.union(single))
    without = [correct[layers].mean() for layers in single]
    rankings["oracle"] = [np.negative(without)]
    if missing := set(least_important(rankings["oracle"][0], sizes)) - correct.keys():
        correct |= probe_pruned(args, model, sources, missing)
    accuracy, rank_correlation = {}, {}
    for name, ranking in rankings.items():
        accuracy[name] = [[correct[s].mean() for s in least_important(draw, sizes)] for draw in ranking]
        rank_correlation[name] = [spearman(draw, rankings["oracle"][0]) for draw in ranking]
    full = correct[frozenset()]
    return {
        "layers": {"entropy": entropies, "/ ln N": shares, "mean |w|": magnitude, "without it": without},
        "removed": sizes,
        "accuracy": accuracy,
        "spearman": rank_correlation,
        "two standard errors": 2 * full.std(ddof=1) / math.sqrt(len(full)),
    }


# ---- command line ----


@user_errors()
def main(arguments=None):
    """Rank the layers of every checkpoint by entropy, or probe the runs with layers removed."""
    flags = parser(__doc__)
    flags.add_argument("--prune", action="store_true", help="probe with layers removed, in several orders")
    flags.add_argument("--pattern", help="without --prune: regular expression of matrices, {} = layer")
    flags.add_argument("--out", default="runs/analysis", help="folder for prune.json [runs/analysis]")
    args = flags.parse_args(arguments)
    if not args.prune:
        for path in args.runs:
            print_entropies(path, args.pattern)
        return
    args.device = pick_device(args.device)
    file, runs, results = Path(args.out) / "prune.json", load_runs(args.runs), {}
    check_writable(file.parent, folder=True)
    models, sources = networks(runs, args.before_norm), open_data(args, runs[0])
    for run in runs:
        results[run.title] = measure_pruning(args, models[run.title], sources)
        write_json(file, results)
        print_pruning(run.title, results[run.title], models[run.title], models[run.untrained])
    print(f"\n{file}")


def print_entropies(path, pattern):
    """The ranking of one checkpoint: a row per layer, and per block of a run."""
    weights, untrained = read_weights(path, pattern)
    rows, columns = entropy_rows(weights), ["entropy", "/ ln N"]
    if untrained:
        columns, base = [*columns, "untrained"], entropy_rows(untrained)
        rows = {title: (*row, base[title][0]) for title, row in rows.items()}
    print_table(str(path), columns, {title: [[value] for value in row] for title, row in rows.items()})
    print(f"lowest first: {', '.join(sorted(weights, key=lambda title: rows[title][0]))}")
    if untrained:
        print_ranges([rows[title][0] for title in weights], [rows[title][2] for title in weights])


def entropy_rows(weights):
    """{title: (entropy, entropy / ln N)} of every layer, then of every block where titles name one."""
    blocks = defaultdict(list)
    for title, matrices in weights.items():
        if title.startswith("block"):
            blocks[f"{title.split()[0]}, all"] += matrices
    return {title: layer_entropy(matrices) for title, matrices in {**weights, **blocks}.items()}


def print_ranges(entropies, untrained):
    """How far apart the layers are, beside an untrained network, whose order means nothing."""
    run, chance = np.ptp(entropies), np.ptp(untrained)
    print(f"Largest - smallest entropy: {run:.3f}; of an untrained network of this shape: {chance:.3f}")


def print_pruning(title, result, model, untrained):
    """The two tables of one run: its layers, and its accuracy without some."""
    base = [layer_entropy(weights)[0] for weights in model_weights(untrained).values()]
    columns = result["layers"] | {"untrained": base}
    values = zip(*columns.values())
    print_table(title, columns, {name: [[v] for v in row] for name, row in zip(model_weights(model), values)})
    print_ranges(result["layers"]["entropy"], base)
    rows = {name: [*zip(*draws), result["spearman"][name]] for name, draws in result["accuracy"].items()}
    columns = [*(f"n = {size}" for size in result["removed"]), "Spearman"]
    print_table("linear probe without n layers", columns, rows)
    print(f"Two standard errors over the test clips, n = 0: {result['two standard errors']:.3f}")


if __name__ == "__main__":
    main()
