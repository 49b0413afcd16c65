"""What do some runs say to the paper's claims C1 to C7? A verdict on each, from what analyze.py wrote.

Römer & Dickscheid, arXiv 2601.09040, Sec. 4.

    python analyze.py RUN RUN RUN RUN --out runs/analysis     # measures: minutes
    python -m extras.claims runs/analysis                     # prints the verdicts, writes claims.json: seconds

Runs whose folders differ only in -seed1, -seed2 are one group. A claim says in which range a difference between
two groups lies, for example: sequential - e2e, in accuracy after the last block. It is confirmed if the 95 %
intervals of all its differences lie in their ranges, refuted if one lies outside; this takes two seeds or more.
Groups are compared only if they share architecture, recipe, clips, target and loss, and progress.

Test. Two runs of one seed share initialisation, clips and masks. A paired t over the seeds of both groups uses
that, but has only n - 1 degrees of freedom, Welch's t about 2 (n - 1). Of 2 or 3 pairs its interval is the wider
one unless runs of one seed correlate by more than .9 or .6, which so few cannot show; of 4 or more, .4 suffices.
So: a paired t if two groups share 4 seeds or more, over these; otherwise Welch's t over all, which errs on the
safe side if runs of one seed are alike. The rule looks at the number of seeds only, never at the results.
"""

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import user_errors, write_json

# Shares of what training gains over the untrained network after the last block. Differs from paper, which names
# no limits but a CKA of .98: CLOSE is the largest loss that is still close (the paper's own losses are 1 to 15 %,
# if an untrained network has 13 %), NO_GAIN the largest gain of the last block that is none.
CLOSE, NO_GAIN, CKA_SATURATED = 0.3, 0.1, 0.98
LEAST_PAIRS = 4  # seeds for a paired t
# Simulated with the paper's numbers for Tiny (guesses where it has none), three seeds and 1,100 clips confirm each
# claim in 65 to 95 % of cases if accuracy differs by .005 to .01 over seeds, but C4 in 10 to 20 %: the paper's CKA of
# .983 is too near its limit. Four seeds confirm C4 in 20 to 50 %.


# ---- groups of runs ----


class Group(NamedTuple):
    """The runs that differ in their seed only, in the order of their seeds; or one untrained network."""

    name: str
    regime: str
    K: int
    shared: dict  # what two groups must share to be compared
    seeds: tuple
    values: list  # of every seed {measurement: [K]}
    by_clip: list  # of every seed {measurement: (K, test clips)}
    untrained: "Group | None" = None

    def after(self, name, block=-1):
        """A measurement after one block, by seed: (seeds,) and (seeds, test clips)."""
        by_seed = np.array([values[name][block] for values in self.values], float)
        return by_seed, np.stack([clips[name][block] for clips in self.by_clip])

    def only(self, seeds):
        """The group of these seeds."""
        places = [i for i, seed in enumerate(self.seeds) if seed in seeds]
        values, by_clip = ([items[i] for i in places] for items in (self.values, self.by_clip))
        return self._replace(seeds=tuple(self.seeds[i] for i in places), values=values, by_clip=by_clip)


def read_groups(folder):
    """The groups in analysis.json and analysis.npz of a folder, in the order of the runs."""
    try:
        analysis = json.loads((folder / "analysis.json").read_text())
        with np.load(folder / "analysis.npz") as file:
            arrays = dict(file)
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no analysis.json and .npz; write them with analyze.py.") from None

    def by_clip(title):
        return {key[len(title) + 1 :]: a for key, a in arrays.items() if key.startswith(f"{title}/")}

    members = {}  # {group: [(seed, title, run)]}
    for title, run in analysis["runs"].items():
        members.setdefault(run["group"], []).append((run["seed"], title, run))
    groups = []
    for name, of_group in members.items():
        seeds, titles, runs = zip(*sorted(of_group, key=lambda member: member[0]))
        blank, about = runs[0]["untrained"], (runs[0]["K"], runs[0]["shared"])
        values = [analysis["untrained"][blank]["values"]]
        untrained = Group(blank, "untrained", *about, (0,), values, [by_clip(blank)])
        values = [run["values"] for run in runs]
        clips = [by_clip(title) for title in titles]
        groups.append(Group(name, runs[0]["regime"], *about, seeds, values, clips, untrained))
    return groups


# ---- estimates ----


class Estimate(NamedTuple):
    """A number, its standard error (nan if there is one seed only), and the error's degrees of freedom."""

    value: float
    error: float
    freedom: float

    def margin(self, outside=0.05):
        """Half of the interval that misses the truth with probability `outside`."""
        return student_t(1 - outside / 2, self.freedom) * self.error

    def share_of(self, gain):
        """As a share of what training gains, taken as exact; nan if it is not certain to gain anything."""
        learned = gain.value > 0 and not gain.value <= gain.margin()
        return Estimate(*(x / gain.value if learned else math.nan for x in self[:2]), self.freedom)

    def words(self, unit="", scale=1.0):
        """The number with its 95 % interval."""
        if math.isnan(self.value):
            return "unknown (training has no certain gain)"
        decimals, margin = 3 if scale == 1 else 1, scale * self.margin()
        words = f"{scale * self.value:+.{decimals}f}"
        return f"{words}{unit}" if math.isnan(margin) else f"{words} ± {margin:.{decimals}f}{unit}"


def student_t(probability, freedom):
    """The quantile of Student's t: the number below which it lies with this probability; of nan, nan."""
    # Of the angle in t = sqrt(freedom) * tan(angle), the density is cos(angle)^(freedom - 1).
    freedom, steps = min(freedom, 1e3), 2000  # above 1000 it is normal
    angle = np.arange(steps + 1) / steps * math.pi - math.pi / 2
    below = np.cumsum(np.cos((angle[1:] + angle[:-1]) / 2) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(np.interp(probability * below[-1], below, angle[1:]))


def sum_of_means(samples, by_clip=()):
    """Estimate of the sum of the means of independent samples over seeds [(seeds,)] (Welch, Satterthwaite).

    by_clip: [(seeds, test clips)], the same by clip, whose mean is uncertain, too. The effect of the clips on
    a single run counts in both, so that the error is rather too large.
    """
    value = float(sum(map(np.mean, samples)))
    if min(map(len, samples)) < 2:
        return Estimate(value, math.nan, math.nan)
    samples = [*samples, *([sum(clips.mean(axis=0) for clips in by_clip)] if by_clip else [])]
    variances = [np.var(sample, ddof=1) / len(sample) + 1e-30 for sample in samples]
    freedom = sum(variances) ** 2 / sum(v**2 / (len(sample) - 1) for v, sample in zip(variances, samples))
    return Estimate(value, math.sqrt(sum(variances)), freedom)


def pairs_of(a, b):
    """The seeds that two groups share, in which they can be compared in pairs."""
    return [seed for seed in a.seeds if seed in b.seeds]


def difference(a, b, name, block_a=-1, block_b=-1):
    """Estimate of b - a in one measurement after one block of each, on the same test clips."""
    seeds = pairs_of(a, b)
    paired = a.regime != "untrained" and len(seeds) >= LEAST_PAIRS
    if paired:
        a, b = a.only(seeds), b.only(seeds)
    (x, x_clips), (y, y_clips) = a.after(name, block_a), b.after(name, block_b)
    if a.regime == "untrained":  # a single network, with which all seeds are compared
        samples = [y - x.mean()]
    else:
        samples = [y - x] if paired else [y, -x]
    return sum_of_means(samples, [y_clips, -x_clips])


# ---- claims ----


class Part(NamedTuple):
    """A part of a claim: the true value of an estimate lies in low..high."""

    estimate: Estimate
    low: float
    high: float
    words: str
    test: str


def verdict(parts):
    """confirmed, refuted, or why neither.

    Confirmed: every 95 % interval lies inside its range. Refuted: one lies outside as a whole, of intervals so
    wide that all hold at the same time with 95 % (Bonferroni). So either is wrong in at most 5 % of cases, if
    the gain of training is exact. Parts of one seed decide nothing.
    """
    several = [p for p in parts if math.isnan(p.estimate.value) or not math.isnan(p.estimate.freedom)]
    if not parts:
        return "nothing to compare"
    if not several:
        return "one seed: cannot tell"
    inside, outside = [], []
    for estimate, low, high, *_ in several:
        margin, wider = estimate.margin(), estimate.margin(0.05 / len(several))
        inside.append(low <= estimate.value - margin and estimate.value + margin <= high)
        outside.append(estimate.value + wider < low or estimate.value - wider > high)
    if all(inside):
        return "confirmed"
    return "refuted" if any(outside) else "cannot tell"


def last_block(a, b, name, high=math.inf):
    """Part: after its last block, b loses at most CLOSE of what training gains in a. high: its largest gain."""
    change, gain = difference(a, b, name), difference(a.untrained, a, name)
    share, (before, after) = change.share_of(gain), (g.after(name)[0].mean() for g in (a, b))
    words = f"{name}, last block: {a.name} {before:.3f}, {b.name} {after:.3f}, change "
    words += f"{change.words(' points', 100)}; as a share of what training gains in {a.name} "
    words += f"({100 * gain.value:+.1f} points): {share.words(' %', 100)}"
    return Part(share, -CLOSE, high, words, test_name(a, b))


def first_block(a, b, name):
    """Part: after block 1 of b, b has more than a."""
    block = a.K // b.K - 1  # of a, after the same layer
    change, (before, after) = difference(a, b, name, block, 0), (a.after(name, block)[0], b.after(name, 0)[0])
    unit = (" points", 100) if "accuracy" in name else ()
    words = f"{name}, block 1 of {b.name}: {a.name} {before.mean():.3f}, {b.name} {after.mean():.3f}, change "
    return Part(change, 0.0, math.inf, words + change.words(*unit), test_name(a, b))


def saturation(groups):
    """Parts: gain of the last block, and its linear CKA with the block before; means over the groups.

    Each compares two blocks of the same run. Runs of one seed are no independent samples, so that the mean over
    the groups is taken seed by seed, of the seeds that all groups have (of several seeds, if there are any).
    """
    groups = [g for g in groups if len(g.seeds) > 1] or groups
    seeds = set.intersection(*(set(g.seeds) for g in groups)) if groups else ()
    if not seeds:
        return []
    shares, share_clips, ckas, words = [], [], [], []
    for g in (group.only(seeds) for group in groups):
        gain = difference(g.untrained, g, "accuracy")
        unit = Estimate(1.0, 0.0, 1.0).share_of(gain).value  # nan if training gains nothing
        (last, last_clips), (before, before_clips) = g.after("accuracy"), g.after("accuracy", -2)
        ckas.append(np.array([values["linear CKA"][-2][-1] for values in g.values]))
        shares.append(unit * (last - before))
        share_clips.append(unit * (last_clips - before_clips))
        words.append(f"{g.name} {100 * (last - before).mean():+.2f} points, CKA {ckas[-1].mean():.3f}")
    share = sum_of_means([np.mean(shares, axis=0)], [np.mean(share_clips, axis=0)])
    cka = sum_of_means([np.mean(ckas, axis=0)])
    test = "t over seeds, between blocks of one run"
    gains = f"last block - block before, as a share of what training gains: {share.words(' %', 100)}; "
    cka_words = f"linear CKA of the last block and the block before: {cka.words().lstrip('+')}"
    return [
        Part(share, -NO_GAIN, NO_GAIN, gains + "; ".join(words), test),
        Part(cka, CKA_SATURATED, math.inf, cka_words, test),
    ]


def test_name(a, b):
    """The test that difference() uses."""
    return "paired t" if len(pairs_of(a, b)) >= LEAST_PAIRS else "Welch's t"


def claims(groups):
    """The parts of every claim: {claim: [Part]}."""
    blockwise = [g for g in groups if g.regime in ("simultaneous", "sequential")]
    pairs = [(a, b) for a in groups for b in blockwise if a.shared == b.shared]
    ends = [(a, b) for a, b in pairs if a.regime == "e2e"]
    orders = [(a, b) for a, b in pairs if (a.regime, b.regime, a.K) == ("simultaneous", "sequential", b.K)]
    # Block 1 of sequential training is that of simultaneous training: the same weights would count twice.
    twins = [b.name for a, b in orders if set(b.seeds) <= set(a.seeds)]
    # a is read after b's block 1 only if its K is a multiple of b's.
    starts = [(a, b) for a, b in ends if b.K > 1 and a.K % b.K == 0 and b.name not in twins]
    finer = [(a, b) for a, b in pairs if a.regime == b.regime and a.K < b.K]
    paper = [(a, b) for a, b in finer if (a.K, b.K) == (4, 6)]
    coarsest = [(a, b) for a, b in finer if a.K == min(c.K for c, other in finer if other is b)]
    high, low = ({f"{level}-level accuracy"} & groups[0].values[0].keys() for level in ("high", "low"))
    mixing = ("patch similarity", "OccDrop")  # paper does not say how OccDrop moves; ours: up, with mixing
    return {
        "C1 blockwise training ends close to end-to-end": [last_block(a, b, "accuracy") for a, b in ends],
        "C2 sequential is like simultaneous": [last_block(a, b, "accuracy", high=CLOSE) for a, b in orders],
        "C3 high-level targets are decodable earlier": [
            first_block(a, b, n) for n in high for a, b in starts
        ],
        "C4 late blocks saturate": saturation([g for g in blockwise if g.K > 1]),
        "C5 low-level targets lose little": [last_block(a, b, n) for n in low for a, b in ends],
        "C6 tokens mix earlier": [first_block(a, b, n) for n in mixing for a, b in starts],
        "C7 finer blocks cost little, K = 4 to 6 as in the paper": [
            last_block(a, b, "accuracy") for a, b in paper
        ],
        "C7 finer blocks cost little, from the smallest K": [
            last_block(a, b, "accuracy") for a, b in coarsest
        ],
    }


# ---- command line ----


@user_errors()
def main(arguments=None):
    """Print the verdicts with the numbers that decide, and write claims.json."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flags.add_argument("folder", metavar="DIR", type=Path, help="folder of analysis.json and analysis.npz")
    folder = flags.parse_args(arguments).folder
    groups = read_groups(folder)
    verdicts = {}
    for claim, parts in claims(groups).items():
        tests = dict.fromkeys(
            part.test for part in parts if part.estimate.freedom > 0
        )  # nan: one seed, no test
        answer = {
            "verdict": verdict(parts),
            "test": ", ".join(tests),
            "numbers": [part.words for part in parts],
        }
        verdicts[claim] = answer
    file = folder / "claims.json"
    write_json(file, verdicts)

    print("The paper's claims; ± is a 95 % interval over seeds and test clips")
    for g in groups[1:]:
        names = sorted(g.shared.keys() | groups[0].shared.keys())
        if others := [name for name in names if g.shared.get(name) != groups[0].shared.get(name)]:
            print(f"{g.name} is not compared with {groups[0].name}: they differ in {', '.join(others)}")
    for claim, answer in verdicts.items():
        print(f"{claim}: {answer['verdict']}" + (f" ({answer['test']})" if answer["test"] else ""))
        for words in answer["numbers"]:
            print(f"    {words}")
    print(f"\n{file}")


if __name__ == "__main__":
    main()
