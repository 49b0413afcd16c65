"""Fine-tuning: a classifier after block k, trained together with the encoder of a run, on labelled clips.

    python -m extras.finetune RUN                      # generated clips, minutes on a CPU
    python -m extras.finetune RUN --data VIDEOS --train-list train.txt --test-list test.txt
    python -m extras.finetune RUN ... --scratch        # the same from random weights
    python -m extras.finetune RUN ... --frozen         # the classifier alone
    python -m extras.finetune RUN ... --block 2        # blocks 1 and 2 only
    python -m extras.finetune RUN ... --remove 3,5,7   # without three layers, as Gardener (arXiv 2602.03918) prunes

The classifier is a linear layer on LayerNorm(mean of tokens). This LayerNorm replaces the encoder's output LayerNorm,
as in MAE and VideoMAE. The recipe is theirs, too: AdamW with layer-wise learning-rate decay, warm-up and cosine, random
crop and flip, label smoothing. Mixup, drop path and RandAugment are left out.

What is written into --out:
  last.pt         the encoder, a run for probe.py and analyze.py; load_classifier() also reads the classifier
  finetune.json   settings; train loss and test accuracy of every epoch; in the end, test accuracy of every class

The test is of one clip in the middle of every video; in the end, of --views clips over its time. The result is the last
epoch's: the best epoch, chosen by test accuracy, would look better than it is.

Shapes: B batch, T frames, H W pixels, C channels, N tokens, D width.
"""

import math
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
from blockwise import Blockwise, autocast, load, save
from train import learning_rate

# ---- the classifier ----


class Classifier(nn.Module):
    """A linear classifier on LayerNorm(mean of tokens) after the last block of an encoder, with that encoder."""

    def __init__(self, encoder, classes):
        super().__init__()
        width = encoder.config["width"]
        self.encoder = encoder
        self.head = nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes))
        nn.init.trunc_normal_(self.head[1].weight, std=0.02)
        nn.init.zeros_(self.head[1].bias)

    def forward(self, video):
        """Clips (B, T, H, W, C) to logits (B, classes); bf16 on an NVIDIA GPU."""
        with autocast(video, torch.bfloat16 if video.is_cuda else None):
            *_, tokens = self.encoder.encode(video).values()  # (B, N, D)
            logits = self.head(tokens.mean(dim=1))  # (B, classes)
        return logits.float()


def cut_encoder(model, block, removed=()):
    """A copy of blocks 1 to `block`, without some layers, and without output LayerNorm and decoders.

    removed: numbers of layers, counted from 1 through all blocks. The residual stream passes in their place. The
    other layers then form one block, so that blockwise.load() can read the copy.
    """
    depth = block * model.config["depth"] // model.config["blocks"]
    if not set(removed) <= set(range(1, depth + 1)):
        raise ValueError(
            f"--remove {removed}: blocks 1 to {block} have layers 1 to {depth}; choose from these."
        )
    layers = [x for number, x in enumerate(model.layers[:depth], start=1) if number not in removed]
    sizes = {"blocks": 1 if removed else block, "depth": len(layers), "regime": "e2e"}
    encoder = Blockwise(**model.config | sizes | {"output_norm": False, "decoders": False})
    encoder.blocks["block1"].embedding.load_state_dict(model.blocks["block1"].embedding.state_dict())
    for new, old in zip(encoder.layers, layers, strict=True):
        new.load_state_dict(old.state_dict())
    return encoder


def parameter_groups(classifier, *, layer_decay, weight_decay):
    """Groups for AdamW; "scale" is the share of the learning rate that a group gets.

    It is 1 for the classifier, layer_decay for the last layer, layer_decay**2 for the layer before, and so on down to
    the embedding. Biases and norms have no weight decay. Parameters that need no gradient are left out.
    """
    embedding, groups = classifier.encoder.blocks["block1"].embedding, []
    parts = [classifier.head, *reversed(classifier.encoder.layers), embedding]
    for distance, part in enumerate(parts):
        params = [p for p in part.parameters() if p.requires_grad]
        matrices, vectors = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
        for members, decay in ((matrices, weight_decay), (vectors, 0.0)):
            if members:
                groups.append({"params": members, "weight_decay": decay, "scale": layer_decay**distance})
    return groups


def load_classifier(path):
    """Read a folder that this program has written: (classifier in eval mode, class names)."""
    encoder, checkpoint = load(path)
    classifier = Classifier(encoder, len(checkpoint["classes"]))
    classifier.head.load_state_dict(checkpoint["head"])
    return classifier.eval(), checkpoint["classes"]


# ---- clips ----


class Views:
    """Several clips of every video, at even steps of its time, with centre crop: a clip source, see data.py."""

    def __init__(self, videos, views):
        self.videos, self.views = videos, views

    def __len__(self):
        return self.views * len(self.videos)

    def name(self, index):
        """Path of the video of clip `index`."""
        return self.videos.name(index // self.views)

    def read(self, index, rng=None):
        """Clip `index`, (T, H, W, C) uint8; rng is not used."""
        videos, (video, view) = self.videos, divmod(index, self.views)
        rules = {"video": videos.video, "stride": videos.stride, "short": videos.short}
        path = Path(videos.folder, videos.files[video][0])
        return data.read_clip(path, start=(view + 0.5) / self.views, **rules)


def open_sources(args, model):
    """(training clips, test clips) of the command line, printed."""
    if args.data is None:
        if args.train_list or args.test_list or args.views > 1:
            raise ValueError("Lists and --views are for videos; name their folder with --data.")
        print(f"generated clips: {args.clips} to train on, a third as many to test on")
        clips = {"train": args.clips, "test": math.ceil(args.clips / 3)}
        return [data.Scenes(split, clips=count, video=model.video) for split, count in clips.items()]
    if not (args.train_list and args.test_list):
        need = "--train-list and --test-list, files of lines `path [label]`"
        raise ValueError(f"The videos in {args.data} need {need}; --data scenes takes generated clips.")
    rules = {"video": model.video, "stride": args.stride, "short": args.short, "flip": args.flip}
    if Path(args.run).is_dir():
        rules["counts_file"] = Path(args.run) / "frames.json"
    train = data.Videos(args.data, list_file=args.train_list, paired_list=args.test_list, **rules)
    test = data.Videos(args.data, list_file=args.test_list, paired_list=args.train_list, **rules)
    print(f"{train.summary()}\n{test.summary()}")
    if shared := train.shared(test):
        raise ValueError(f"{len(shared)} videos are in both lists, as {shared[0]}; test on other ones.")
    return train, test


def class_names(label, train, test):
    """Classes of the training clips. Raises ValueError if nothing can be learned from them or tested."""
    if label not in train.labels:
        raise ValueError(f"There is no --label {label}; choose from {', '.join(train.labels)}.")
    classes = list(train.labels[label])
    if len(classes) < 2:
        raise ValueError(f"All training clips have the class {classes[0]}; a classifier needs two or more.")
    if unknown := sorted(set(test.labels[label]) - set(classes)):
        raise ValueError(f"No training clip has the class {unknown[0]} of the test list; leave it out there.")
    return classes


def class_numbers(source, label, classes):
    """The class of every clip, as its number in `classes`: (n,)."""
    column, names = list(source.labels).index(label), source.labels[label]
    return torch.tensor([classes.index(names[source.targets(i)[column]]) for i in range(len(source))])


# ---- training ----


def finetune(args, classifier, train, test, classes):
    """Train on the clips of one source, and test on those of another after every epoch.

    The parameters that need a gradient are trained. Writes both files; returns the content of finetune.json.
    """
    train_target, test_target = (class_numbers(source, args.label, classes) for source in (train, test))
    groups = parameter_groups(classifier, layer_decay=args.layer_decay, weight_decay=args.weight_decay)
    optimizer = torch.optim.AdamW(groups)
    epoch_steps = math.ceil(len(train) / args.batch)
    total = args.epochs * epoch_steps
    batches = data.train_loader(train, batch=args.batch, last=total, seed=args.seed, workers=args.workers)
    batches, skipped, skipped_test = iter(batches), data.Skipped(train), data.Skipped(test)
    result = {"settings": vars(args), "epochs": []}
    with tqdm(total=total, unit=" steps", mininterval=1) as bar:
        for epoch in range(1, args.epochs + 1):
            classifier.train()
            loss_sum = 0.0
            for step in range((epoch - 1) * epoch_steps, epoch * epoch_steps):
                # Learning rate: warm-up and cosine, less for lower layers.
                for group in optimizer.param_groups:
                    group["lr"] = group["scale"] * learning_rate(args, step, total)

                # Batch: random start, crop and flip; videos that cannot be read are named once.
                batch = next(batches)
                for message in skipped.update(batch):
                    bar.write(message)
                video = batch["video"].to(args.device)  # (B, T, H, W, C)
                target = train_target[batch["index"]].to(args.device)  # (B,)

                # Step.
                loss = F.cross_entropy(classifier(video), target, label_smoothing=args.smoothing)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                loss_sum += loss.item()
                bar.update()

            # Test: the clip in the middle of every video; at the end, also several clips.
            scores = evaluate(args, classifier, test, test_target, classes, skipped_test)
            record = {"epoch": epoch, "train_loss": loss_sum / epoch_steps}
            record |= {"accuracy": scores["accuracy"], "balanced": scores["balanced"]}
            result["epochs"].append(record)
            if args.views > 1 and epoch == args.epochs:
                views = Views(test, args.views)
                scores = evaluate(args, classifier, views, test_target, classes, skipped_test)
            result["test"] = scores

            # Files, then the screen.
            progress = {"step": step + 1, "total": total, "data": train.fingerprint}
            write_files(Path(args.out), classifier, classes, result, progress)
            loss, accuracy, balanced = (
                f"{record[name]:.3f}" for name in ("train_loss", "accuracy", "balanced")
            )
            bar.write(
                f"epoch {epoch}: train loss {loss}, test accuracy {accuracy}, mean of classes {balanced}"
            )
    return result


@torch.no_grad()
def evaluate(args, classifier, source, target, classes, skipped):
    """Accuracy, its mean over classes ("balanced"), and accuracy and number of clips of every class.

    source: clips, or Views of videos, whose mean probability counts then. target: (n,), class numbers. Clips that
    cannot be read are left out.
    """
    views = source.views if isinstance(source, Views) else 1
    probabilities = torch.zeros(len(target), len(classes))
    classifier.eval()
    batches = data.eval_loader(source, batch=args.batch, workers=args.workers)
    for batch in tqdm(batches, "test", leave=False, unit=" batches"):
        for message in skipped.update(batch):
            tqdm.write(message)
        if batch["index"]:
            logits = classifier(batch["video"].to(args.device))  # (B, classes)
            videos = torch.tensor(batch["index"]) // views
            probabilities.index_add_(0, videos, logits.softmax(dim=1).cpu() / views)
    if not probabilities.isfinite().all():
        raise ValueError(f"The classifier's output is not finite; lower --lr {args.lr}.")
    readable = probabilities.sum(dim=1) > 0
    predicted, target = probabilities.argmax(dim=1)[readable], target[readable]
    by_class = {}
    for number in target.unique().tolist():
        correct = (predicted[target == number] == number).double()
        by_class[classes[number]] = {"accuracy": correct.mean().item(), "clips": len(correct)}
    balanced = sum(scores["accuracy"] for scores in by_class.values()) / len(by_class)
    accuracy = (predicted == target).double().mean().item()
    return {"accuracy": accuracy, "balanced": balanced, "classes": by_class}


def write_files(out, classifier, classes, result, progress):
    """Write last.pt, which also holds the classifier, and finetune.json."""
    settings = result["settings"] | {"regime": "fine-tuning"}
    settings |= {"list": settings["train_list"], "eval_list": settings["test_list"]}
    head = {"head": classifier.head.state_dict(), "classes": classes}
    save(out / "last.pt", classifier.encoder, [], settings=settings, **progress, **head)
    data.write_json(out / "finetune.json", result)


# ---- command line ----


def parse(arguments=None):
    """The settings. Those that are None depend on the run."""
    layout = {"formatter_class": RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = ArgumentParser(description=__doc__, **layout)
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder of train.py, or a checkpoint in it")
    add("--data", help="folder of videos, or scenes: generated clips [as the run]")
    add("--train-list", help="file of lines `path [label]`, relative to --data: videos to train on")
    add("--test-list", help="such a file of videos to test on")
    add("--stride", type=int, help="take every stride-th frame of a video [as the run]")
    add("--short", choices=("drop", "repeat"), help="rule for short videos [as the run]")
    add("--no-flip", dest="flip", action="store_false", help="no mirrored clips: for labels with a direction")
    add("--clips", type=int, default=576, help="generated clips to train on [576]")
    add("--label", help="of generated clips: colour, shape, size, motion or agreement [motion]")
    add("--block", type=int, help="k, the block that the classifier follows [the last]")
    add("--remove", type=layer_numbers, default=[], metavar="N,N,N", help="layers to leave out, from 1")
    add("--scratch", action="store_true", help="start from random weights")
    add("--frozen", action="store_true", help="train the classifier alone")
    add("--epochs", type=int, default=15, help="passes over the training clips [15]")
    add("--batch", type=int, default=16, help="clips in one optimizer step [16]")
    add("--lr", type=float, help="highest learning rate, of the classifier [0.001; --frozen: 0.03]")
    add("--min-lr", type=float, default=1e-6, help="learning rate at the end of the cosine [1e-6]")
    add("--warmup", type=float, default=0.1, help="share of the steps with rising learning rate [0.1]")
    add("--weight-decay", type=float, default=0.05, help="AdamW's, of weight matrices only [0.05]")
    add("--layer-decay", type=float, help="learning rate of a layer over the next one's [0.75; --scratch: 1]")
    add("--smoothing", type=float, default=0.1, help="share of a label that is spread over all classes [0.1]")
    add("--views", type=int, default=1, help="clips per video, evenly in time, at the end [1]")
    add("--seed", type=int, default=0, help="of new weights and data order [0]")
    add("--device", default="auto", help="cpu, cuda or mps [the fastest here]")
    add("--workers", type=int, default=data.default_workers(), help="processes that read [the cores]")
    add("--out", help="folder of the result [runs/RUN-finetune]")
    return parser.parse_args(arguments)


def layer_numbers(text):
    """Layer numbers of the command line: "3,5,7" to [3, 5, 7]."""
    return [int(number) for number in text.split(",")]


@data.user_errors()
def main(arguments=None):
    """Fine-tune as the command line says."""
    data.keep_freed_memory()
    args = parse(arguments)
    model, checkpoint = load(args.run)
    settings, folder = checkpoint["settings"], Path(args.run).resolve()
    args.data = None if args.data == "scenes" else args.data or settings.get("data")
    args.stride = args.stride or settings.get("stride", 4)
    args.short = args.short or settings.get("short", "drop")
    args.block = args.block or len(model.blocks)
    if args.lr is None:  # a linear classifier alone bears a higher one
        args.lr = 0.03 if args.frozen else 0.001
    if args.layer_decay is None:  # lower layers of a trained encoder need small changes, random ones do not
        args.layer_decay = 1.0 if args.scratch else 0.75
    args.label = args.label or ("class" if args.data else "motion")
    args.device = data.pick_device(args.device)
    args.out = args.out or f"runs/{(folder.parent if folder.is_file() else folder).name}-finetune"
    if args.block > len(model.blocks):
        raise ValueError(
            f"--block {args.block}: the run has blocks 1 to {len(model.blocks)}; choose from these."
        )
    if Path(args.out).is_dir() and any(Path(args.out).iterdir()):
        raise ValueError(f"{args.out} is not empty; name another --out.")

    torch.manual_seed(args.seed)
    if args.scratch:
        model = Blockwise(**model.config)
    encoder = cut_encoder(model, args.block, args.remove).requires_grad_(not args.frozen)
    train, test = open_sources(args, model)
    classes = class_names(args.label, train, test)
    torch.manual_seed(args.seed)
    classifier = Classifier(encoder, len(classes)).to(args.device)
    data.check_writable(args.out, folder=True)

    start, state = "random weights" if args.scratch else args.run, "frozen, " if args.frozen else ""
    print(
        f"{args.out}: {len(encoder.layers)} layers, {state}from {start}; device: {args.device}",
        flush=True,
    )
    result = finetune(args, classifier, train, test, classes)["test"]
    print(f"\nTest accuracy, clips per video: {args.views}")
    for name, of_class in result["classes"].items():
        print(f"  {name:20} {of_class['accuracy']:.3f} of {of_class['clips']} clips")
    print(f"  {'all':20} {result['accuracy']:.3f}\n  {'mean of classes':20} {result['balanced']:.3f}")
    print(f"{args.out}: finetune.json, last.pt")


if __name__ == "__main__":
    main()
