"""Published VideoMAE weights become a run folder, and a run becomes a folder of Hugging Face transformers.

VideoMAE: Tong et al., arXiv 2203.12602. A run folder made here is read by every program that reads runs.

    python -m extras.videomae import pytorch_model.bin runs/videomae-base          # seconds; also a folder
    python probe.py runs/videomae-base --data VIDEOS --train-list train.txt --test-list test.txt
    python -m extras.videomae export RUN hf/run                # for VideoMAEModel.from_pretrained("hf/run")
    python -m extras.videomae export RUN hf/run-2 --until 2    # blocks 1 and 2 with the decoder of block 2

Shapes: D width, P values in one tubelet of (t, p, p) pixels.
"""

import argparse
import importlib
import json
import pickle
import re
from pathlib import Path

import torch

from blockwise import Blockwise, load, save
from data import check_writable, user_errors

# (regular expression for a name of the authors or of Hugging Face, name here), applied in this order. It gives
# a flat name: embedding.linear.weight, layers.0.q.bias, norm.weight, decoder.layers.0.fc1.weight, ...
NAMES = (
    (r"^(module\.|model\.|videomae\.)+", ""),
    (r"^(embeddings\.patch_embeddings\.projection|(encoder\.)?patch_embed\.proj)\.", "embedding.linear."),
    (r"^(encoder\.)?(blocks|layer)\.", "layers."),
    (r"^decoder\.(blocks|decoder_layers)\.", "decoder.layers."),
    (r"^(encoder\.norm|layernorm)\.", "norm."),
    (r"^encoder_to_decoder\.", "decoder.embed."),
    (r"^mask_token$", "decoder.mask_token"),
    (r"\.attn\.qkv\.", ".qkv."),
    (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".\1."),
    (r"\.(attention\.attention|attn)\.(q|k|v)_bias$", r".\2.bias"),
    (r"\.(attention\.output\.dense|attn\.proj)\.", ".proj."),
    (r"\.(intermediate\.dense|mlp\.fc1)\.", ".fc1."),
    (r"\.(output\.dense|mlp\.fc2)\.", ".fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)
# Flat names that only a fine-tuned model has: the classifier after the mean over tokens is not imported.
CLASSIFIER = ("fc_norm.", "head.", "classifier.")


def flat_name(name):
    """The flat name of a published weight, see NAMES."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def model_name(name, layers_per_block, last):
    """The name in a Blockwise model of a flat name. last: "block4", which has output norm and decoder."""
    if match := re.match(r"layers\.(\d+)\.", name):
        block, layer = divmod(int(match[1]), layers_per_block)
        return f"blocks.block{block + 1}.layers.{layer}.{name[match.end() :]}"
    for start, owner in (("embedding.", "blocks.block1."), ("norm.", f"blocks.{last}.")):
        if name.startswith(start):
            return owner + name
    return re.sub(r"^decoder\.", f"decoders.{last}.", name)


# ---- import ----


def read_videomae(path, blocks=4):
    """A published VideoMAE as an e2e model, its encoder cut into blocks.

    path: a file, or a folder of Hugging Face. Sizes are those of the tensors. Clip size and heads come from a
    config.json beside the file; without it clips are 16 x 224 x 224, and heads 64 wide (80 in ViT-H), as
    published. Raises ValueError that names the weights which do not fit.
    """
    path, state = read_state(path)
    weights = {flat_name(name): value for name, value in state.items()}
    weights = {name: value for name, value in weights.items() if not name.startswith(CLASSIFIER)}
    kernel = weights.get("embedding.linear.weight")
    if kernel is None or kernel.ndim != 5:
        raise ValueError(f"{path} is no VideoMAE; it holds {', '.join(state)[:200]}.")
    file = path.with_name("config.json")
    published = json.loads(file.read_text()) if file.exists() else {}
    size, width = published.get("image_size", 224), len(kernel)
    config = {
        "blocks": blocks,
        "regime": "e2e",
        "video": (published.get("num_frames", 16), *(size if isinstance(size, list) else (size, size))),
        "tubelet": tuple(kernel.shape[2:]),
        "width": width,
        "depth": count_layers(weights, "layers"),
        "heads": published.get("num_attention_heads", max(1, width // (80 if width == 1280 else 64))),
        "output_norm": "norm.weight" in weights,
        "decoders": "decoder.embed.weight" in weights,
    }
    if config["decoders"]:
        width = config["decoder_width"] = len(weights["decoder.embed.weight"])
        config["decoder_depth"] = count_layers(weights, "decoder.layers")
        config["decoder_heads"] = published.get("decoder_num_attention_heads", max(1, width // 64))
        weights["decoder.mask_token"] = weights["decoder.mask_token"].flatten()
    weights["embedding.linear.weight"] = kernel.permute(0, 2, 3, 4, 1).flatten(1)  # (D, P), as in patchify()

    model = Blockwise(**config)
    per_block, last = config["depth"] // blocks, f"block{blocks}"
    state = {model_name(name, per_block, last): value for name, value in join_qkv(weights).items()}
    expected = {name: value.shape for name, value in model.state_dict().items()}
    wrong = [name for name in expected if name not in state or state[name].shape != expected[name]]
    unknown = [name for name in state if name not in expected]
    if wrong or unknown:
        names = f"missing or of another shape: {', '.join(wrong[:9])}; unknown: {', '.join(unknown[:9])}"
        raise ValueError(f"{path} is no VideoMAE that fits: {names}.")
    model.load_state_dict(state)
    return model


def read_state(path):
    """(file, {name: tensor}) of a checkpoint of torch or safetensors, read as data: no code in it is run."""
    path = Path(path)
    if path.is_dir():
        file = path / "model.safetensors"
        path = file if file.exists() else path / "pytorch_model.bin"
    if not path.is_file():
        raise ValueError(f"There is no file {path}; name a checkpoint of VideoMAE.")
    try:
        if path.suffix == ".safetensors":
            return path, optional("safetensors.torch").load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the authors' files hold their settings
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged, or holds more than data, which is not read.") from error
    for name in ("model", "module", "state_dict"):  # the state_dict may be nested
        state = state[name] if isinstance(state.get(name), dict) else state
    return path, {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def count_layers(weights, start):
    """Number of transformer layers whose flat names begin with `start`."""
    return sum(re.fullmatch(rf"{start}\.\d+\.fc1\.weight", name) is not None for name in weights)


def join_qkv(weights):
    """Queries, keys and values of each layer in one matrix and one bias, as in model.py.

    A published layer has no key bias, or no bias at all (qkv_bias=False): here they are zero, which is exact.
    """
    joined = dict(weights)
    for layer in [name.removesuffix(".fc1.weight") for name in weights if name.endswith(".fc1.weight")]:
        zero = torch.zeros(weights[f"{layer}.fc1.weight"].shape[1])
        if not any(f"{layer}.{part}.bias" in weights for part in ("q", "v", "qkv")):
            joined[f"{layer}.qkv.bias"] = zero.repeat(3)
        joined.setdefault(f"{layer}.k.bias", zero)
        for kind in ("weight", "bias"):
            parts = [joined.pop(f"{layer}.{part}.{kind}", None) for part in "qkv"]
            if not any(part is None for part in parts):
                joined[f"{layer}.qkv.{kind}"] = torch.cat(parts)
    return joined


def import_run(args):
    """Write a run folder: config.json and last.pt."""
    model = read_videomae(args.checkpoint, args.blocks)
    out = new_folder(args.out)
    settings = {"regime": "e2e", "seed": 0, "blocks": args.blocks, "imported": args.checkpoint}
    (out / "config.json").write_text(json.dumps(settings | model.config, indent=1) + "\n")
    save(out / "last.pt", model, [], step=0, settings=settings)
    print(f"{out}: {model.config['depth']} layers {model.config['width']} wide in {args.blocks} blocks")


# ---- export ----


def to_transformers(model, until):
    """Blocks 1..until of a Blockwise model as a model of Hugging Face transformers.

    It is a VideoMAEForPreTraining if block `until` has a decoder that predicts pixels, else a VideoMAEModel.
    VideoMAE has no key bias; without it tokens are the same, as softmax cancels it.
    """
    c = model.config
    if not 1 <= until <= c["blocks"]:
        raise ValueError(f"There is no block {until}; choose --until from 1 to {c['blocks']}.")
    (frames, height, width), (t, p, q) = model.video, model.tubelet
    if p != q:
        raise ValueError(f"VideoMAE has square patches, this run {p} x {q} pixels; it cannot be exported.")
    transformers, last, per_block = optional("transformers"), f"block{until}", c["depth"] // c["blocks"]
    config = transformers.VideoMAEConfig(
        image_size=height if height == width else [height, width],
        patch_size=p,
        num_frames=frames,
        tubelet_size=t,
        hidden_size=c["width"],
        num_hidden_layers=until * per_block,
        num_attention_heads=c["heads"],
        intermediate_size=4 * c["width"],
        decoder_hidden_size=c["decoder_width"],
        decoder_num_hidden_layers=c["decoder_depth"],
        decoder_num_attention_heads=c["decoder_heads"],
        decoder_intermediate_size=4 * c["decoder_width"],
        layer_norm_eps=1e-6,
        use_mean_pooling=model.blocks[last].norm is None,  # if True, a VideoMAEModel has no layernorm
    )
    has_decoder = last in model.decoders and c["decoder_values"] is None
    kind = transformers.VideoMAEForPreTraining if has_decoder else transformers.VideoMAEModel
    exported, state, weights = kind(config), model.state_dict(), {}
    for name, value in exported.state_dict().items():  # names as the installed version has them
        flat, _, part = re.sub(r"\.([qkv])\.(weight|bias)$", r".qkv.\2 \1", flat_name(name)).partition(" ")
        weight = state[model_name(flat, per_block, last)]
        if part:
            weight = weight.chunk(3)["qkv".index(part)]
        if flat == "embedding.linear.weight":
            weight = weight.unflatten(1, (t, p, p, 3)).permute(0, 4, 1, 2, 3)  # (D, 3, t, p, p)
        weights[name] = weight.reshape(value.shape).contiguous()
    exported.load_state_dict(weights)
    return exported


def export_run(args):
    """Write a folder of transformers: config.json, model.safetensors, preprocessor_config.json, README.md."""
    model, checkpoint = load(args.run)
    settings, K = checkpoint["settings"], model.config["blocks"]
    until = K if args.until is None else args.until
    out = new_folder(args.out)
    exported = to_transformers(model, until)
    decoder = f"with the decoder of block {until}"
    if not hasattr(exported, "decoder"):
        decoder = f"encoder only, as block {until} has no decoder of pixels"
    stride = f"stride {settings['stride']}" if settings.get("data") else "not of videos, or of unknown stride"
    height, width = model.video[1:]
    layers = exported.config.num_hidden_layers
    preprocessor = {
        "image_processor_type": "VideoMAEImageProcessor",
        "size": {"shortest_edge": min(height, width)},
        "crop_size": {"height": height, "width": width},
        "resample": 2,  # bilinear
        "image_mean": [0.485, 0.456, 0.406],  # ImageNet's, as in model.py
        "image_std": [0.229, 0.224, 0.225],
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True),
    }
    exported.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1) + "\n")
    (out / "README.md").write_text(f"""# {out.resolve().name}
A video transformer trained as a masked autoencoder: {layers} layers, blocks 1 to {until} of {K},
{decoder}. Regime {settings.get("regime")}, seed {settings.get("seed")}, {checkpoint["step"]} steps.
Clips: {model.video} (frames, height, width), {stride}; tubelets {model.tubelet}.
This folder was written by

    python -m extras.videomae export {args.run} {args.out} --until {until}

- Features: `VideoMAEModel.from_pretrained(folder)`, then the mean of last_hidden_state over tokens.
- Fine-tuning:
  `VideoMAEForVideoClassification.from_pretrained(folder, use_mean_pooling=True, num_labels=...)`.
  Without use_mean_pooling=True the classifier may read the first token alone.
""")
    print(f"{out}: {type(exported).__name__}, blocks 1 to {until}, {decoder}")


# ---- command line ----


def optional(module):
    """A module of a package that the rest of the project does without."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ValueError(f"{package} is not installed: run pip install {package} first.") from None


def new_folder(path):
    """A folder to write into, made here. ValueError if it holds anything."""
    check_writable(path, folder=True)
    if any(Path(path).iterdir()):
        raise ValueError(f"{path} is not empty; name another folder.")
    return Path(path)


@user_errors()
def main(arguments=None):
    """Import a VideoMAE as a run folder, or export a run for transformers."""
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    flags = argparse.ArgumentParser(description=__doc__, **style)
    commands = flags.add_subparsers(required=True, metavar="import|export")
    command = commands.add_parser("import", help="a published VideoMAE becomes a run folder")
    command.set_defaults(function=import_run)
    command.add_argument("checkpoint", help="file of the authors or of Hugging Face, or a folder with one")
    command.add_argument("out", help="run folder to write")
    command.add_argument("--blocks", type=int, default=4, help="K that the encoder is cut into [4]")
    command = commands.add_parser("export", help="a run becomes a folder for from_pretrained()")
    command.set_defaults(function=export_run)
    command.add_argument("run", help="run folder of train.py")
    command.add_argument("out", help="folder to write")
    command.add_argument("--until", type=int, help="last block that is exported [K]")
    args = flags.parse_args(arguments)
    args.function(args)


if __name__ == "__main__":
    main()
