"""The paper's Figures 2 to 5 of your own runs, their training curves, and how their layers learn.

Römer & Dickscheid, arXiv 2601.09040, Sec. 4. Needs matplotlib.

    python analyze.py RUN RUN RUN RUN --out runs/analysis          # measures: minutes
    python -m extras.figures runs/analysis                         # draws: seconds
    python analyze.py RUN/step_*.pt RUN/step_*.pt --out runs/steps # snapshots of --keep
    python -m extras.figures runs/steps                            # draws dynamics.png
    python -m extras.figures --curves RUN RUN --out curves.png     # draws their log.jsonl

Reads analysis.json (and gardener.py's prune.json, if there is one) of every folder, and writes PNG and PDF files
beside it: figure2_probe, figure3_loss, figure4_cka, figure5_tokens, figure_prune. If a run is there at several
steps, dynamics takes the place of figures 2 to 5: the linear probe by layer against the step, and each layer's
CKA with its own last snapshot. Lines are means over seeds, bands ±1 standard deviation. A colour is a regime,
lighter for larger K; in dynamics and curves a colour is a depth, darker for deeper.
"""

import argparse
import functools
import itertools
import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import user_errors

COLOURS = {
    "e2e": "#000000",
    "simultaneous": "#0072b2",
    "sequential": "#d55e00",
    "deep-supervision": "#009e73",
    "layerlock": "#aa4499",
}
OTHER_COLOURS = ("#8c564b", "#b8a000", "#17a0b4", "#e377c2", "#5c5c9e", "#6b8e23")  # of a user's own regimes
MARKERS = "osD^vP*X"  # one for each K
GRAY = "0.45"
DOTS = {"marker": "o", "markersize": 4, "linestyle": ""}
LABELS = {  # {measurement: (title of a panel, label of its y axis)}
    "reconstruction loss": ("reconstruction loss", "mean squared error"),
    "mAP": ("retrieval", "mean average precision"),
    "patch similarity": ("patch similarity", "mean cosine of a clip's tokens"),
    "OccDrop": ("OccDrop", "share of the accuracy lost"),
    "effective_rank": ("effective rank", "dimensions"),
    "participation_ratio": ("participation ratio", "dimensions"),
    "dimensions90": ("90 % of the variance", "dimensions"),
    "uniformity": ("uniformity", "log mean exp(-2 distance²)"),
}


def pyplot():
    """matplotlib.pyplot, drawing to files."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("Figures need matplotlib: run pip install matplotlib first.") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


# ---- groups of runs ----


class Group(NamedTuple):
    """The runs that differ in their seed only."""

    name: str  # of their folders
    regime: str
    K: int
    depth: int
    runs: list  # of every seed {measurement: [K]}
    label: str = ""  # regime and K, in words
    colour: tuple = ()
    marker: str = "o"

    @property
    def layers(self):
        """Encoder layers before each of the K readings."""
        return [self.depth * k // self.K for k in range(1, self.K + 1)]

    def values(self, name):
        """(seeds, K) of a measurement."""
        return np.array([run[name] for run in self.runs], float)


def read_groups(analysis):
    """The groups in analysis.json, in the order of regime and K, with their looks."""
    groups = {}
    for run in analysis["runs"].values():
        group = Group(run["group"], run["regime"] or "other", run["K"], run["depth"], [])
        groups.setdefault(run["group"], group).runs.append(run["values"])
    groups = sorted(groups.values(), key=lambda g: (g.regime, g.K, g.name))
    colours, Ks = regime_colours([g.regime for g in groups]), sorted({g.K for g in groups})
    looks = []
    for g in groups:
        alike = [other for other in groups if other.regime == g.regime]
        twins = [other for other in alike if other.K == g.K]
        label = f"{g.regime}, K = {g.K}" + (f" ({g.name})" if len(twins) > 1 else "")
        lightness = 0.6 * alike.index(g) / max(1, len(alike) - 1)
        colour = tuple(c + (1 - c) * lightness for c in colours[g.regime])
        looks.append(g._replace(label=label, colour=colour, marker=MARKERS[Ks.index(g.K) % len(MARKERS)]))
    return looks


def regime_colours(regimes):
    """A colour for every regime: {regime: (red, green, blue)}, 0 to 1. No two regimes share one."""
    others = sorted({*regimes} - {*COLOURS})
    codes = COLOURS | dict(zip(others, itertools.cycle(OTHER_COLOURS)))
    return {regime: tuple(int(codes[regime][i : i + 2], 16) / 255 for i in (1, 3, 5)) for regime in regimes}


def read_snapshots(analysis):
    """The runs that are there at two steps or more: {name without the seed: [{step: run}] of every seed}."""
    runs, groups = defaultdict(dict), defaultdict(list)
    for run in analysis["runs"].values():
        runs[run.get("run")][run.get("step")] = run
    for name, snapshots in runs.items():
        if len(snapshots) > 1:
            groups[re.sub(r"-seed\d+$", "", name)].append(snapshots)
    return groups


def read_log(run):
    """(name, [line]) of the log of a run; run: its folder, or the file."""
    path = run / "log.jsonl" if run.is_dir() else run
    lines = path.read_text().splitlines() if path.is_file() else []
    if not lines:
        raise ValueError(f"There is no line of a log in {path}.")
    name = path.resolve().parent.name if path.name == "log.jsonl" else path.stem
    return name, [json.loads(line) for line in lines]


# ---- panels ----


def depth_colours(count):
    """Colours of blocks or layers, from the first to the last."""
    return pyplot().colormaps["viridis"](np.linspace(0.8, 0, count))


def draw_band(axis, x, values, label, **looks):
    """A line of means over the rows of values (rows, len(x)), with a band of ±1 standard deviation."""
    mean = np.mean(values, axis=0)
    [line] = axis.plot(x, mean, markersize=4, label=label, **looks)
    if len(values) > 1:
        sd = np.std(values, axis=0, ddof=1)
        axis.fill_between(x, mean - sd, mean + sd, alpha=0.2, linewidth=0, color=line.get_color())
    axis.grid(alpha=0.3)


def draw_lines(axis, groups, analysis, name, title):
    """One measurement against the encoder layers before the reading, so that all K share an axis.

    Accuracies and mAP with the untrained network, dashed, and chance, dotted, where it is known.
    """
    for g in groups:
        draw_band(axis, g.layers, g.values(name), g.label, color=g.colour, marker=g.marker)
    if "accuracy" in name or name == "mAP":
        most = max(blank["K"] for blank in analysis["untrained"].values())
        finest = [blank for blank in analysis["untrained"].values() if blank["K"] == most]
        for blank in finest:  # the same weights are read at fewer layers if K is smaller
            layers = [blank["depth"] * k // most for k in range(1, most + 1)]
            axis.plot(layers, blank["values"][name], ".--", color=GRAY, label="untrained")
    if name in analysis["chance"]:
        axis.axhline(analysis["chance"][name], linestyle=":", color=GRAY, label="chance")
    axis.set(title=title, xlabel="encoder layer", ylabel=LABELS.get(name, ("", "accuracy"))[1])
    axis.set_xticks(range(1, max(g.depth for g in groups) + 1))
    low, high = axis.get_ylim()
    if high - low < 0.02:  # differences of no size are not drawn large
        axis.set_ylim((low + high) / 2 - 0.01, (low + high) / 2 + 0.01)


def draw_gains(axis, groups, name):
    """Gain of every transition (the paper's Figure 4c, in mAP, or in accuracy) against the CKA of its blocks."""
    for g in groups:
        cka = np.diagonal(np.mean([run["linear CKA"] for run in g.runs], axis=0), 1)
        gain = np.diff(g.values(name).mean(axis=0))
        looks = {"color": g.colour, "marker": g.marker, "linestyle": ""}
        axis.plot(cka, gain, label=g.label, **looks)
        axis.plot(cka[:1], gain[:1], fillstyle="none", markersize=11, **looks)
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.margins(0.1)
    words = {"xlabel": "linear CKA of the two blocks", "ylabel": f"gain in {name}"}
    axis.set(title="gain by transition (outlined: block 1 to 2)", **words)
    axis.grid(alpha=0.3)


def draw_heat(axis, g):
    """Linear CKA of all pairs of blocks of one group."""
    cka, ticks = np.mean([run["linear CKA"] for run in g.runs], axis=0), range(1, g.K + 1)
    axis.imshow(cka, vmin=0, vmax=1, cmap="viridis", origin="lower", extent=(0.5, g.K + 0.5) * 2)
    for i, j in itertools.product(range(g.K), repeat=2):
        colour = "white" if cka[i, j] < 0.6 else "black"
        looks = {"ha": "center", "va": "center", "color": colour, "fontsize": 9 if g.K <= 6 else 6}
        axis.text(j + 1, i + 1, f"{100 * cka[i, j]:.0f}", **looks)
    axis.set(title=f"linear CKA, %: {g.label}", xlabel="block", ylabel="block", xticks=ticks, yticks=ticks)


def draw_curves(axis, title, log, blocks):
    """Loss of every block against the step: of the batches as lines, of the fixed clips (eval_loss) as dots."""
    for block, colour in zip(blocks, depth_colours(len(blocks))):
        for key, looks in (("loss", {"linewidth": 0.8, "label": block}), ("eval_loss", DOTS)):
            points = [(line["step"], line[key][block]) for line in log if block in line.get(key, {})]
            axis.plot(*np.reshape(points, (-1, 2)).T, color=colour, **looks)
    axis.plot([], [], color=GRAY, label="eval_loss", **DOTS)
    # The mean predictor's loss is that of pixels, as eval_loss is; LayerLock's latent targets have no eval_loss.
    means = [(line["step"], line["mean_loss"]) for line in log if line.get("eval_loss")]
    axis.plot(*np.reshape(means, (-1, 2)).T, "--", color=GRAY, label="mean predictor")
    axis.set(title=title, xlabel="step", ylabel="loss")
    axis.grid(alpha=0.3)


def draw_dynamics(axis, title, seeds, layers, name, untrained):
    """One measurement of some layers against the step. seeds: [{step: run}]; steps that all of them have."""
    steps = sorted(set.intersection(*map(set, seeds)))
    run = seeds[0][steps[0]]
    before = untrained[run["untrained"]]["values"].get(name) if "untrained" in run else None
    for layer, colour, marker in zip(layers, depth_colours(len(layers)), MARKERS):
        k = layer * run["K"] // run["depth"] - 1
        values = [[snapshots[step]["values"][name][k] for step in steps] for snapshots in seeds]
        draw_band(axis, steps, np.array(values, float), f"layer {layer}", color=colour, marker=marker)
        if before:
            axis.axhline(before[k], linestyle=":", color=colour)
    if before:
        axis.plot([], [], ":", color=GRAY, label="untrained")
    words = "accuracy of the linear probe" if name == "accuracy" else name
    axis.set(title=f"{run['regime']}, K = {run['K']}\n{title}", xlabel="step", ylabel=words)


def draw_pruning(axis, title, result):
    """Accuracy against the number of removed layers, a line for each ranking of gardener.py."""
    for i, (name, draws) in enumerate(result["accuracy"].items()):
        draw_band(axis, result["removed"], draws, name, color=f"C{i}", marker=MARKERS[i])
    words = {"xlabel": "removed layers", "ylabel": "accuracy of the linear probe, last block"}
    axis.set(title=title, xticks=result["removed"], **words)


# ---- files ----


def save_figure(path, panels, columns=None, **sharing):
    """Write a PNG and a PDF of several panels, functions that draw on an axis. sharing: as of pyplot.subplots."""
    columns = columns or (len(panels) if len(panels) in (1, 2, 4) else 3)
    rows = -(-len(panels) // columns)
    figure = pyplot().figure(figsize=(max(6, 4.2 * columns), 3.5 * rows + 0.8))
    figure.set_layout_engine("constrained", w_pad=0.1)
    axes = figure.subplots(rows, columns, squeeze=False, **sharing).flatten()
    for axis, draw in zip(axes, panels):
        draw(axis)
        axis.tick_params(labelbottom=True, labelleft=True)
    for axis in axes[len(panels) :]:
        axis.remove()
    legend = {}
    for axis in figure.axes:
        legend |= dict(zip(*axis.get_legend_handles_labels()[::-1]))
    figure.legend(
        legend.values(), legend.keys(), loc="outside lower center", ncols=2 * columns, frameon=False
    )
    for suffix in (".png", ".pdf"):
        figure.savefig(path.with_suffix(suffix), dpi=150)
        print(path.with_suffix(suffix))
    pyplot().close(figure)


def probe_panels(groups):
    """{accuracy: title of its panel}; of accuracies that are equal everywhere, the last, which is of one target."""
    names = {}
    for name in groups[0].runs[0]:
        if "accuracy" in name:
            names[json.dumps([run[name] for g in groups for run in g.runs])] = name
    words = {name: name.removeprefix("accuracy: ").removesuffix(" accuracy") for name in names.values()}
    return {name: f"linear probe: {'all targets' if name == 'accuracy' else words[name]}" for name in words}


def draw_analysis(folder, analysis):
    """Figures 2 to 5 of one folder; of snapshots, dynamics instead."""
    if snapshots := read_snapshots(analysis):
        return draw_snapshots(folder, analysis, snapshots)
    groups = read_groups(analysis)
    lines = {
        "figure2_probe": probe_panels(groups),
        "figure3_loss": ("reconstruction loss", "mAP"),
        "figure5_tokens": [name for name in LABELS if name not in ("reconstruction loss", "mAP")],
    }
    for file, names in lines.items():
        titles = names if isinstance(names, dict) else {name: LABELS[name][0] for name in names}
        draw = functools.partial(draw_lines, groups=groups, analysis=analysis)
        save_figure(folder / file, [functools.partial(draw, name=n, title=t) for n, t in titles.items()])
    panels = [functools.partial(draw_gains, groups=groups, name=name) for name in ("mAP", "accuracy")]
    panels += [functools.partial(draw_heat, g=g) for g in groups]
    save_figure(folder / "figure4_cka", panels)


def draw_snapshots(folder, analysis, groups):
    """Linear probe, and CKA with the last snapshot, against the step: a column for every group."""
    readings = [{r["depth"] * k // r["K"] for k in range(1, r["K"] + 1)} for r in analysis["runs"].values()]
    layers = sorted(set.intersection(*readings), reverse=True)
    layers = layers[:: math.ceil(len(layers) / 4)][::-1]  # four lines are read, twelve are not
    draw = functools.partial(draw_dynamics, layers=layers, untrained=analysis["untrained"])
    names = ("accuracy", "linear CKA with the last snapshot")
    places = [(name, title) for name in names for title in groups]
    panels = [functools.partial(draw, title=t, seeds=groups[t], name=name) for name, t in places]
    save_figure(folder / "dynamics", panels, len(groups), sharex="col", sharey="row")


def draw_logs(path, runs):
    """Training curves, a panel for every run."""
    logs = [read_log(run) for run in runs]
    blocks = {block for _, log in logs for line in log for block in line["loss"]}
    blocks = sorted(blocks, key=lambda block: int(block.removeprefix("block")))
    panels = [functools.partial(draw_curves, title=t, log=log, blocks=blocks) for t, log in logs]
    save_figure(path, panels, sharex=True, sharey=True)


def draw_prune(folder, results):
    """A panel for every pruned run."""
    panels = [functools.partial(draw_pruning, title=t, result=result) for t, result in results.items()]
    save_figure(folder / "figure_prune", panels)


@user_errors()
def main(arguments=None):
    """Draw the figures of every folder, and the training curves."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flags.add_argument("folders", metavar="DIR", nargs="*", type=Path, help="with analysis.json, prune.json")
    flags.add_argument("--curves", metavar="RUN", nargs="+", type=Path, help="run folders or log.jsonl files")
    flags.add_argument("--out", default="curves.png", type=Path, help="file of --curves [curves.png]")
    args = flags.parse_args(arguments)
    if not args.folders and not args.curves:
        flags.error("Name a folder with analysis.json, or runs after --curves.")
    if args.curves:
        draw_logs(args.out, args.curves)
    drawings = {"analysis.json": draw_analysis, "prune.json": draw_prune}
    for folder in args.folders:
        present = [name for name in drawings if (folder / name).is_file()]
        if not present:
            raise ValueError(f"{folder} holds no analysis.json; write it with analyze.py --out {folder}.")
        for name in present:
            drawings[name](folder, json.loads((folder / name).read_text()))


if __name__ == "__main__":
    main()
