"""The promises of this project, each as a test: python -m pytest -q

First the ten that the rest is built on; then the other ones, in the order of the files; README.md last.
"""

import faulthandler
import functools
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import wave
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tqdm import tqdm

import analyze
import blockwise
import data
import probe
import train
from blockwise import REGIMES, Blockwise, count_parameters, load, make_optimizers, save, train_step
from data import Scenes, Videos, read_clip
from model import (
    SIZES,
    Decoder,
    Layer,
    TubeletEmbedding,
    gather_tokens,
    normalized_targets,
    patchify,
    tube_mask,
    unpatchify,
)

torch.set_num_threads(1)  # the models below are so small that more threads only wait for each other

TOY = {"video": (8, 32, 32), "tubelet": (4, 8, 8), "width": 24, "depth": 4, "heads": 2}
TOY |= {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}  # grid 2x4x4, 32 tokens


def toy(regime="simultaneous", blocks=2, seed=0, **changes):
    torch.manual_seed(seed)
    return Blockwise(**(TOY | changes), blocks=blocks, regime=regime)


def clips(count=4, video=TOY["video"], seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, *video, 3), dtype=torch.uint8, generator=generator)


def batch(model, seed=0, count=4, ratio=0.75):
    """(video, visible, masked) of some clips of noise."""
    generator = torch.Generator().manual_seed(seed)
    return clips(count, model.video, seed), *tube_mask(count, model.grid, ratio, generator)


def learn(model, steps=3, *, stage=0, lr=1e-2, **settings):
    """Train on a few batches; returns the losses and gradient norms of the last step."""
    optimizers = make_optimizers(model, stage=stage, lr=lr)
    for step in range(steps):
        found = train_step(model, optimizers, *batch(model, step), **settings)
    return found


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def summed_loss(model, video, visible, masked):
    """The sum of all local losses in one graph: the obvious way, which train_step() must equal."""
    patches, total = patchify(video, model.tubelet), 0.0
    h, target = gather_tokens(patches, visible), normalized_targets(gather_tokens(patches, masked))[0]
    for name, block in model.blocks.items():
        h = block(h.detach() if REGIMES[model.config["regime"]].stop_gradient else h, visible)
        if name in model.decoders:
            total = total + F.mse_loss(model.decoders[name](h, visible, masked), target)
    return total


def standardized(video):
    """Pixels as published models take them: less ImageNet's mean, over its standard deviation."""
    return (video.float() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])


def picked(tokens, index):
    """What gather_tokens() does, one clip after the other."""
    return torch.stack([of_clip[places] for of_clip, places in zip(tokens, index)])


def differing(before, after):
    """Names of the entries that are not equal bit for bit."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def call(program, *arguments):
    """The exit code of a program in this process, which keeps its signal handlers."""
    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGCHLD", signal.SIGTERM)}
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        program.main([*map(str, arguments)])
        return 0
    except SystemExit as end:
        return end.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run(program, *arguments, code=0):
    """A program in this process, which must end with this exit code: (what it printed, its errors)."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
        found = call(program, *arguments)
    assert found == code, errors.getvalue()
    return out.getvalue(), errors.getvalue()


def refused(program, *arguments):
    """The one sentence with which a program refuses a call; argparse has its usage before it."""
    *usage, sentence = run(program, *arguments, code=2)[1].rstrip("\n").split("\n")  # bars end with \r
    assert not usage or usage[0].startswith("usage: ")
    return sentence


def start(function, *arguments, log=os.devnull, **environment):
    """Call a function in another process, which leads a group of its own; returns the process's number."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.setsid()
            # Where tests run in the background, Ctrl-C may be ignored; and tqdm's lock is shared with this process,
            # so that a kill might leave it locked.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            tqdm.set_lock(threading.RLock())
            os.environ |= {name: str(value) for name, value in environment.items()}
            with open(log, "w") as text, redirect_stdout(text), redirect_stderr(text):
                faulthandler.dump_traceback_later(60, exit=True, file=text)  # a hang ends
                code = function(*arguments) or 0
        finally:
            os._exit(code)
    return process


def raises(words, function, *arguments, **settings):
    """The call raises a ValueError with these words, which is returned."""
    with pytest.raises(ValueError, match=words) as error:
        function(*arguments, **settings)
    return error.value


def exit_code(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def wait_for(condition):
    patience = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < patience
        time.sleep(0.002)


# ---- ten promises ----


def test_masks_hide_57_of_64_tubes():
    visible, masked = tube_mask(100, (2, 8, 8), 0.9, torch.Generator().manual_seed(5))
    assert visible.shape == (100, 14) and masked.shape == (100, 114)
    assert torch.equal(torch.cat([visible, masked], dim=1).sort().values, torch.arange(128).expand(100, -1))
    first, second = visible[:, :7], visible[:, 7:]
    assert torch.equal(first + 64, second)  # a tube: the same places in both time slots
    assert len({tuple(places) for places in first.tolist()}) == 100  # a mask of its own for every clip
    assert torch.bincount(first.flatten(), minlength=64).min() > 0  # every place can be seen
    assert same((visible, masked), tube_mask(100, (2, 8, 8), 0.9, torch.Generator().manual_seed(5)))
    raises("at least one must be masked.* and one visible", tube_mask, 1, (2, 8, 8), 1.0)


def test_targets_have_mean_0_and_variance_1_by_tubelet_and_channel():
    x = clips(2)
    patches = patchify(x, (4, 8, 8))
    target, mean, std = normalized_targets(patches)
    values = x[1, 4:, 24:, 24:].flatten(0, 2).double() / 255  # the last tubelet by hand: (pixels, channels)
    expected = (values - values.mean(dim=0)) / (values.std(dim=0) + 1e-6)
    torch.testing.assert_close(target[1, -1].view(-1, 3).double(), expected, rtol=0, atol=1e-5)
    again = target.unflatten(-1, (-1, 3)) * std + mean
    torch.testing.assert_close(again, patches.unflatten(-1, (-1, 3)) / 255)
    flat = normalized_targets(torch.full((1, 1, 192), 7, dtype=torch.uint8))[0]
    assert torch.equal(flat, torch.zeros_like(flat))  # a tubelet of one colour: defined, and 0


@pytest.mark.parametrize("slices", [1, 3, 9])
@pytest.mark.parametrize("regime", ["simultaneous", "e2e", "deep-supervision"])
def test_isolated_gradients_are_those_of_the_detached_sum(regime, slices):
    model = toy(regime, blocks=4)
    parameters, optimizers = list(model.parameters()), make_optimizers(model)
    expected = torch.autograd.grad(summed_loss(model, *batch(model)), parameters)
    found = gradients_at_step(model, optimizers)
    train_step(model, optimizers, *batch(model), slices=slices)
    for p, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found[p], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("grad_clip", [None, 0.01])
def test_one_simultaneous_block_is_e2e_bit_for_bit(grad_clip):
    one, e2e = toy("simultaneous", blocks=1), toy("e2e", blocks=1)
    assert learn(one, 5, grad_clip=grad_clip) == learn(e2e, 5, grad_clip=grad_clip)
    assert not differing(weights(one), weights(e2e))


def test_sequential_training_leaves_frozen_blocks_bit_equal():
    model, simultaneous = toy("sequential", blocks=4), toy("simultaneous", blocks=4)
    assert model.stages == 4
    for stage in range(4):
        before = weights(model)
        losses, norms = learn(model, 2, stage=stage)
        assert list(losses) == list(norms) == [f"block{stage + 1}"]
        changed = differing(before, weights(model))
        assert changed and all(f".block{stage + 1}." in name for name in changed)
    learn(simultaneous, 2)  # in which block 1 learns the same
    assert not any(".block1." in name for name in differing(weights(model), weights(simultaneous)))


@pytest.mark.parametrize("blocks", [1, 4, 6])
@pytest.mark.parametrize("size,width,millions", [("tiny", 192, 6.5), ("small", 384, 23.7)])
def test_parameters_are_the_papers_count(size, width, millions, blocks):
    def layer(D):
        return (3 * D * D + 3 * D) + (D * D + D) + (4 * D * D + 4 * D) + (4 * D * D + D) + 4 * D

    encoder = 6144 * width + width + 12 * layer(width) + 2 * width
    decoder = width * 192 + 192 + 4 * layer(192) + 2 * 192 + 192 * 6144 + 6144
    assert round(encoder / 1e6, 1) == millions and round(decoder / 1e6, 1) == 3.0
    for regime, decoders in (("simultaneous", blocks), ("e2e", 1)):
        with torch.device("meta"):
            model = Blockwise(**SIZES[size], blocks=blocks, regime=regime)
        assert sum(count_parameters(model).values()) == encoder + decoders * decoder
        assert sum(p.numel() for p in model.parameters()) == encoder + decoders * decoder


@pytest.mark.parametrize("regime,stop", [*((r, 3) for r in REGIMES), ("sequential", 4)])
def test_resuming_equals_never_having_stopped(tmp_path, monkeypatch, regime, stop):
    steps = 2 if regime == "sequential" else 6  # sequential: per stage, so step 4 ends a stage
    command = [*TINY_RUN, "--regime", regime, "--steps", steps, "--seed", 3]
    check_resuming(tmp_path, monkeypatch, train, command, stop)


def test_linear_probe_equals_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    for noise in (1.5, 6.0):
        x, y = clusters(noise=noise)
        x[:, 0] *= 1e-9  # a feature of any scale counts
        targets = torch.stack([y, y % 2], dim=1)  # of two classes scikit-learn penalises one weight vector
        results = probe.logistic_probe(x[:200], targets[:200], x[200:])
        alone = probe.logistic_probe(x[:200], y[:200], x[200:])
        torch.testing.assert_close(results[0], alone, rtol=0, atol=1e-6)
        mean, std = x[:200].double().mean(0), x[:200].double().std(0, unbiased=False)
        fit, test = ((a.double() - mean) / std for a in (x[:200], x[200:]))
        for probabilities, target in zip(results, targets.T):
            reference = linear_model.LogisticRegression(C=1.0, tol=1e-12, max_iter=10000)
            expected = reference.fit(fit, target[:200]).predict_proba(test)
            np.testing.assert_allclose(probabilities.numpy(), expected, rtol=0, atol=1e-6)


def test_linear_cka_by_its_gram_matrices():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=generator) + 3, torch.randn(40, 9, generator=generator) - 1
    centre = torch.eye(40).double() - 1 / 40
    k, l = (centre @ a.double() @ a.double().T @ centre for a in (x, y))
    expected = ((k * l).sum() / (k.norm() * l.norm())).item()
    assert analyze.linear_cka(x, y) == pytest.approx(expected, rel=1e-6)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    assert analyze.linear_cka(5 * x @ rotation + 2, y) == pytest.approx(expected, rel=1e-5)
    assert analyze.linear_cka(x, x) == pytest.approx(1) and np.isnan(analyze.linear_cka(x, torch.ones(40, 2)))


def test_the_snippet_in_the_readme_is_train_step_bit_for_bit():
    parts = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    [code] = [part for part in parts if "decoder_backward" in part]
    plain, condensed = toy(blocks=4), toy(blocks=4)
    learn(plain)
    names = {"model": condensed, "optimizers": make_optimizers(condensed, lr=1e-2)}
    names |= {"gather_tokens": gather_tokens, "normalized_targets": normalized_targets}
    names["decoder_backward"] = blockwise.decoder_backward
    for step in range(3):
        video, visible, masked = batch(condensed, step)
        patches = patchify(video, condensed.tubelet)
        exec(code, names | {"patches": patches, "visible": visible, "masked": masked})  # noqa: S102
    assert not differing(weights(plain), weights(condensed))


# ---- model.py ----


@pytest.mark.parametrize("video,tubelet", [((6, 12, 20), (2, 3, 5)), ((4, 8, 8), (4, 8, 8))])
def test_unpatchify_inverts_patchify(video, tubelet):
    x, (p, q, r) = clips(2, video), tubelet
    patches = patchify(x, tubelet)
    assert torch.equal(unpatchify(patches, video, tubelet), x)
    assert torch.equal(patches[:, 0], x[:, :p, :q, :r].flatten(1))
    assert torch.equal(patches[:, -1], x[:, -p:, -q:, -r:].flatten(1))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_layer_equals_torch_multihead_attention(dtype, tolerance):
    torch.manual_seed(0)
    layer, x = Layer(width=24, heads=3), torch.randn(2, 10, 24)
    reference = torch.nn.MultiheadAttention(24, 3, batch_first=True)
    with torch.no_grad():
        state = {"in_proj_weight": layer.qkv.weight, "in_proj_bias": layer.qkv.bias.normal_()}
        state |= {"out_proj.weight": layer.proj.weight, "out_proj.bias": layer.proj.bias}
        reference.load_state_dict(state)
        y = layer.norm1(x)
        expected = x + reference(y, y, y)[0]
        expected = expected + layer.fc2(F.gelu(layer.fc1(layer.norm2(expected))))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = layer(x)
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


def test_embedding_is_a_strided_convolution():
    torch.manual_seed(0)
    embedding = TubeletEmbedding(tokens=32, values=4 * 8 * 8 * 3, width=24)
    x, (visible, _) = clips(3), tube_mask(3, (2, 4, 4), 0.75)
    kernel = embedding.linear.weight.view(24, 4, 8, 8, 3).permute(0, 4, 1, 2, 3)
    pixels = standardized(x).permute(0, 4, 1, 2, 3)
    plain = F.conv3d(pixels, kernel, embedding.linear.bias, stride=(4, 8, 8))
    expected = picked(plain.flatten(2).transpose(1, 2) + embedding.positions, visible)
    found = embedding(gather_tokens(patchify(x, (4, 8, 8)), visible), visible)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_decoder_equals_one_with_all_tokens_in_place():
    torch.manual_seed(0)
    layers = [Layer(width=16, heads=2) for _ in range(2)]
    decoder = Decoder(layers=layers, tokens=32, values=60, encoder_width=24, width=16)
    h, (visible, masked) = torch.randn(3, 8, 24), tube_mask(3, (2, 4, 4), 0.75)
    full = decoder.mask_token.expand(3, 32, 16).clone()
    for i in range(3):
        full[i, visible[i]] = decoder.embed(h[i])
    full = full + decoder.positions
    for layer in decoder.layers:
        full = layer(full)
    expected = picked(decoder.head(decoder.norm(full)), masked)  # head on every token
    torch.testing.assert_close(decoder(h, visible, masked), expected, rtol=1e-4, atol=1e-5)


# ---- blockwise.py ----


def test_one_seed_gives_one_encoder_at_every_K_and_regime():
    for regime, blocks in itertools.product(REGIMES, (1, 2, 4)):
        tokens = toy(regime, blocks).encode(clips(2))
        assert list(tokens) == [f"block{k + 1}" for k in range(blocks)]
        assert all(h.shape == (2, 32, 24) for h in tokens.values())
        assert torch.equal(tokens[f"block{blocks}"], toy().encode(clips(2))["block2"])


def test_e2e_does_not_depend_on_K():
    first, *others = models = [toy("e2e", blocks=blocks) for blocks in (1, 2, 4)]
    for model in models:
        learn(model)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def gradients_at_step(model, optimizers):
    """{parameter: gradient} that fills as the optimizers step; no parameter of another one has a gradient then."""
    found = {}

    def capture(optimizer, *_):
        own = {p for group in optimizer.param_groups for p in group["params"]}
        assert {p for p in model.parameters() if p.grad is not None} == own
        found.update({p: p.grad.clone() for p in own})

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(capture)
    return found


@pytest.mark.parametrize("regime", list(REGIMES))
def test_every_regime_lowers_every_loss_on_one_batch(regime):
    model = toy(regime)
    video, *masks = batch(model)
    video[:] = torch.linspace(0, 200, 32).byte().view(1, 1, 1, 32, 1)  # something that can be predicted
    for stage in range(model.stages):
        optimizers = make_optimizers(model, stage=stage, lr=3e-3)
        history = [train_step(model, optimizers, video, *masks)[0] for _ in range(30)]
        assert all(history[-1][name] < 0.9 * loss for name, loss in history[0].items())


def test_gradients_are_clipped_by_block():
    model = toy()
    optimizers = make_optimizers(model)
    found = gradients_at_step(model, optimizers)
    _, norms = train_step(model, optimizers, *batch(model), grad_clip=1e-3)
    for [name] in model.groups:
        assert norms[name] > 1e-3  # as it was before clipping
        clipped = torch.cat([found[p].flatten() for p in blockwise.block_params(model, name)]).norm()
        torch.testing.assert_close(clipped, torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_bf16_trains_and_stays_near_fp32():
    models = [toy(), toy()]
    (fp32, _), (bf16, _) = (learn(m, 5, lr=1e-3, dtype=d) for m, d in zip(models, (None, torch.bfloat16)))
    torch.testing.assert_close(bf16, fp32, rtol=0.02, atol=0)
    assert bf16 != fp32
    assert all(p.dtype == torch.float32 for p in models[1].parameters())


def test_weight_decay_is_of_matrices_only():
    model = toy()
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in make_optimizers(model, weight_decay=0.05):
        decayed, plain = optimizer.param_groups
        assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
        assert all(names[p].endswith("weight") and "norm" not in names[p] for p in decayed["params"])
        assert all(re.search("bias|norm|mask_token", names[p]) for p in plain["params"])


# ---- data.py: generated clips ----


def test_generated_clips_by_seed_split_and_index_with_balanced_labels():
    a, b = Scenes("train"), Scenes("train")
    for index in (0, 7, 12345):
        assert np.array_equal(a.read(index), b.read(index)) and a.targets(index) == b.targets(index)
    assert a.read(0).shape == (16, 64, 64, 3) and a.read(0).dtype == np.uint8
    for other in (Scenes("test").read(0), Scenes("train", seed=1).read(0), a.read(1)):
        assert not np.array_equal(a.read(0), other)
    combinations = {a.targets(index) for index in range(288, 576)}
    assert len(combinations) == 288 == math.prod(map(len, a.labels.values()))


# ---- data.py: video files ----


def write_frames(path, images, codec="mpeg4", pixels="yuv420p", times=None, coding=None, **options):
    """A video file of images (n, H, W, C) uint8, 25 per second or at `times` in milliseconds."""
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg cannot write {codec}")
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=25, options=coding)
        stream.height, stream.width, stream.pix_fmt = *images.shape[1:3], pixels
        stream.gop_size, stream.bit_rate = 12, 2_000_000
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = int(times[number]), stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_numbered(path, frames=40, size=(64, 64), **kwargs):
    """A video whose mean grey level says the frame number: level 5 * number + 10, with a little noise."""
    noise = np.random.default_rng(0).integers(-8, 9, (frames, size[1], size[0], 1))
    grey = 5 * np.arange(frames).reshape(-1, 1, 1, 1) + 10 + noise
    return write_frames(path, grey.clip(0, 255).repeat(3, axis=3).astype(np.uint8), **kwargs)


def write_copies(folder, names, **kwargs):
    """One numbered video by several names in a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = write_numbered(folder / "first.mp4", **kwargs).read_bytes()
    (folder / "first.mp4").unlink()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(raw)
    return folder


def test_sound_and_folders_are_no_videos(tmp_path):
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))  # mono, 16 bits
        sound.writeframes(bytes(1600))
    raises("has no video stream", read_clip, tmp_path / "sound.wav")
    (tmp_path / "folder.mp4").mkdir()
    raises("No videos in", Videos, tmp_path)
    for nothing in (tmp_path / "nowhere", "", tmp_path / "sound.wav"):
        raises("is not a folder", Videos, nothing)


def frame_numbers(frames):
    return [round((float(frame.mean()) - 10) / 5) for frame in frames]


def clip_numbers(path, start=0.5, frames=4, stride=3, **kwargs):
    """Numbers of the frames in a clip of a numbered video."""
    return frame_numbers(read_clip(path, video=(frames, 32, 32), stride=stride, start=start, **kwargs))


def in_steps(numbers, stride=3):
    return numbers == [numbers[0] + stride * i for i in range(len(numbers))]


B_FRAMES = {  # how to encode: a key frame every 12 frames, two B-frames between others
    "mpeg4": {"bf": "2", "b_strategy": "0", "sc_threshold": "1000000000"},
    "mpeg2video": {"bf": "2", "b_strategy": "0", "sc_threshold": "1000000000"},
    "libx264": {"bf": "2", "b-adapt": "0", "sc_threshold": "0", "x264-params": "open-gop=1:keyint=12"},
}


def copy_packets(source, path, change):
    """Copy a video without decoding it; change() makes a list of (bytes, is key frame) from such a list."""
    with av.open(str(source)) as container, av.open(str(path), "w") as copy:
        video = container.streams.video[0]
        stream = copy.add_stream_from_template(video)
        packets = [packet for packet in container.demux(video) if packet.size]
        changed = change([(bytes(packet), packet.is_keyframe) for packet in packets])
        for packet, (raw, is_key) in zip(packets, changed, strict=True):
            new = av.Packet(raw)
            new.stream, new.time_base, new.pts, new.dts = stream, packet.time_base, packet.pts, packet.dts
            new.is_keyframe = is_key
            copy.mux(new)
    return path


def share_packets(packets):
    """Each B-frame of MPEG-4 into the packet of the frame before it, as DivX and XviD do for AVI."""
    shared = []
    for raw, is_key in packets:
        at = raw.index(b"\0\0\1\xb6")  # a frame begins, and says of which kind it is
        if raw[at + 4] >> 6 == 2:
            shared[-1] = (shared[-1][0] + raw, shared[-1][1])
            shared.append((b"\0\0\1\xb6\x50\x00\x7f", False))  # a frame like the last, to hold the place
        else:
            shared.append((raw[:at] + b"\0\0\1\xb2DivX503b1393p" * is_key + raw[at:], is_key))
    return shared


def check_frames(path, late=3):
    """Clips of a numbered video at strides 1, 2, 4: frames `stride` apart, from nearly the right place on."""
    for stride, start in itertools.product((1, 2, 4), (0.0, 0.2, 0.31, 0.5, 0.66, 0.77, 0.9, 1.0)):
        numbers = clip_numbers(path, start, 8, stride)
        assert in_steps(numbers, stride), (path.name, stride, start)
        assert abs(numbers[0] - start * (40 - 8 * stride)) <= late


@pytest.mark.parametrize("codec,coding", [("mpeg4", None), *B_FRAMES.items()])
@pytest.mark.parametrize("format", ["avi", "mp4", "mkv", "mov", "ts"])
def test_clips_hold_every_stride_th_frame_from_their_start(tmp_path, codec, coding, format):
    late = 3 if coding or format == "ts" else 1.5  # MPEG-TS has no index: seeking may land late
    check_frames(write_numbered(tmp_path / f"a.{format}", codec=codec, coding=coding), late)


def test_packed_b_frames_in_avi(tmp_path):
    path = write_numbered(tmp_path / "plain.avi", coding=B_FRAMES["mpeg4"] | {"bf": "1"})
    check_frames(copy_packets(path, tmp_path / "shared.avi", share_packets))


@pytest.mark.parametrize("codec", B_FRAMES)
def test_index_with_false_key_frames(tmp_path, codec):
    path = write_numbered(tmp_path / "right.mov", codec=codec, coding=B_FRAMES[codec])
    check_frames(
        copy_packets(path, tmp_path / "wrong.mov", lambda packets: [(raw, True) for raw, _ in packets])
    )


def test_palette_of_the_first_frame_holds_for_all(tmp_path):
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("rawvideo", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "pal8"
        palette = np.arange(255, -1, -1, dtype=np.uint8)[:, None].repeat(4, 1)  # not the default one
        for number in range(40):
            image = np.full((64, 64), 245 - 5 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray((image, palette), format="pal8")))
    check_frames(tmp_path / "a.avi", late=0.5)


def test_packets_without_a_picture_are_no_damage(tmp_path):
    metadata = itertools.cycle([b"\0\0\0\6\6\5\2AB\x80", b"\0\0\0\2\x09\xf0"])  # H.264: SEI, delimiter
    path = write_numbered(tmp_path / "plain.mp4", codec="libx264", coding=B_FRAMES["libx264"])

    def without_b_frames(packets):
        return [(raw if is_key or raw[4] >> 5 else next(metadata), is_key) for raw, is_key in packets]

    copy_packets(path, tmp_path / "new.mp4", without_b_frames)
    # An empty chunk in an AVI file stands for the frame before.
    raw = bytearray(write_numbered(tmp_path / "a.avi").read_bytes())
    at = raw.index(b"00dc", raw.index(b"00dc", raw.index(b"movi")) + 4)
    size = struct.unpack_from("<I", raw, at + 4)[0]
    struct.pack_into("<I4sI", raw, at + 4, 0, b"JUNK", size - 8)
    (tmp_path / "a.avi").write_bytes(raw)
    for name, count in (("new.mp4", range(10, 30)), ("a.avi", [39])):
        with data.open_video(tmp_path / name) as (container, stream):
            frames = [frame.to_ndarray(format="gray") for frame in data.all_frames(container, stream)]
        numbers = frame_numbers(frames)
        assert len(numbers) in count and numbers[0] == 0 and numbers[-1] == 39


def test_starts_are_uniform_in_frames_where_a_recording_was_paused(tmp_path):
    for name, codec, paused in itertools.product(("a.mp4", "a.mkv"), ("libx264", "mpeg4"), (1, 20, 39)):
        times = np.cumsum([100_000 if number == paused else 40 for number in range(40)])
        path = write_numbered(tmp_path / name, codec=codec, times=times)
        starts = [clip_numbers(path, place / 32, 8, 1)[0] for place in range(33)]
        assert np.abs(np.array(starts) - np.arange(33)).max() <= 1


@pytest.mark.parametrize("flags", ["frag_keyframe", "frag_keyframe+empty_moov+default_base_moof+global_sidx"])
def test_mp4_in_fragments_has_all_its_frames(tmp_path, flags):
    path = write_numbered(tmp_path / "a.mp4", options={"movflags": flags})
    assert data.frame_counts(tmp_path, ["a.mp4"]) == {"a.mp4": 40}
    check_frames(path)


def write_damaged(path, *, frames=40, g=40):
    """A video with a key frame every g frames, whose packet 20 is damaged."""

    def spoil(packets):
        return [(b"\0\0\1\xb0" if i == 20 else raw, is_key) for i, (raw, is_key) in enumerate(packets)]

    coding = B_FRAMES["mpeg4"] | {"bf": "0", "g": str(g)}
    good = write_numbered(path.with_name(f"good {path.name}"), frames=frames, coding=coding)
    copy_packets(good, path, spoil)
    good.unlink()
    return path


def test_no_clip_crosses_damage(tmp_path):
    bad = write_damaged(tmp_path / "bad.mp4")
    for start in (0.0, 0.5, 1.0):
        numbers = clip_numbers(bad, start)
        assert in_steps(numbers) and numbers[-1] < 20


@pytest.mark.parametrize("codec", ["mpeg2video", "libx264"])
def test_no_clip_crosses_lost_packets_of_a_transport_stream(tmp_path, codec):
    rng = np.random.default_rng(0)
    raw = write_numbered(tmp_path / "a.ts", codec=codec, coding=B_FRAMES[codec]).read_bytes()
    for number in range(8):
        first, lost = 188 * int(rng.integers(10, len(raw) // 188 - 20)), 188 * int(rng.integers(1, 15))
        path = tmp_path / f"{number}.ts"
        path.write_bytes(raw[:first] + raw[first + lost :])
        for start in (0.0, 0.3, 0.5, 0.7, 1.0):
            assert in_steps([*dict.fromkeys(clip_numbers(path, start, stride=1))], 1)


def test_videos_damaged_in_one_place_are_read_in_others(tmp_path):
    names = ["a.mp4", "b.mp4"]
    for name in names:
        write_damaged(tmp_path / name, frames=96, g=8)
    videos, messages = Videos(tmp_path, video=(8, 16, 16), stride=4), []
    skipped = data.Skipped(videos)
    for batch in data.train_loader(videos, batch=2, last=20):
        assert len(batch["index"]) == 2 and not batch["missing"]
        messages += skipped.update(batch)
    assert sorted(messages) == [f"{name} is skipped: ends, or is damaged, after 20 frames" for name in names]
    raises("All videos that can be read are too short", skipped.update, {"skipped": {}, "missing": 2})


def mutated(raw, rng):
    """A file's bytes with one kind of damage."""
    at, size = int(rng.integers(len(raw))), int(rng.choice([4, 200, 3000]))
    flipped = np.frombuffer(raw, np.uint8).copy()
    places = rng.integers(rng.choice([len(raw), 1000]), size=rng.choice([1, 8, 200]))  # all over, or headers
    flipped[places % len(raw)] ^= rng.integers(1, 256, len(places), np.uint8)
    huge, again = b"\x7f\xff\xff\xff", raw[at // 2 : at // 2 + size]  # a size or count; something twice
    kinds = [flipped.tobytes(), raw[:at], raw[:at] + bytes(size) + raw[at + size :]]
    return (kinds + [raw[:at] + huge + raw[at + 4 :], raw[:at] + again + raw[at:]])[rng.integers(5)]


def read_all(folder, report):
    """Read every video of a folder; the last line of the report names the culprit, or says how many clips are whole."""
    whole = 0
    for name in os.listdir(folder):
        print(name, file=report, flush=True)
        faulthandler.dump_traceback_later(20, exit=True)
        data.frame_counts(folder, [name])
        for settings in ({"start": 1.0, "stride": 1}, {"start": 0.6, "short": "drop"}):
            with suppress(*data.READ_ERRORS):
                whole += read_clip(folder / name, video=(4, 16, 16), **settings).shape == (4, 16, 16, 3)
    print(whole, file=report, flush=True)


def test_damaged_files_neither_crash_nor_hang_the_reader(tmp_path):
    bad, rng, files = tmp_path / "bad", np.random.default_rng(0), []
    bad.mkdir()
    codecs = {"mpg": "mpeg2video", "flv": "flv", "webm": "libvpx-vp9", "vp8.webm": "libvpx"}
    codecs |= {"h264.mp4": "libx264"}  # with B-frames
    for name in ("mp4", "mkv", "avi", "ts", "mov", *codecs):
        if (codec := codecs.get(name, "mpeg4")) in av.codecs_available:
            files.append(write_numbered(tmp_path / f"a.{name}", frames=20, size=(48, 32), codec=codec))
    for number, path in zip(range(320), itertools.cycle(files)):
        (bad / f"{number}{path.suffix}").write_bytes(mutated(path.read_bytes(), rng))
    with open(tmp_path / "report", "w") as report:
        code = exit_code(start(read_all, bad, report))
    last = (tmp_path / "report").read_text().splitlines()[-1]
    assert code == 0, f"at {last}"
    assert 320 < int(last) < 640


def test_directory_entries_of_all_kinds(tmp_path):
    folder = tmp_path / "odd"
    names = ["a b.mp4", "ü 日本.mp4", "12:30 %d.mp4", "-x.mp4", "file:y.mp4", "'\".mp4"]
    write_copies(folder, [*names, *(f"{number}.mp4" for number in range(40))], frames=16)
    (folder / "folder.mp4").mkdir()
    (folder / "link.mp4").symlink_to(folder / "a b.mp4")
    (folder / "loop.mp4").symlink_to("loop.mp4")
    os.mkfifo(folder / "pipe.mp4")
    videos = Videos(folder, video=(4, 16, 16))
    assert len(videos) == 47 and {*names, "link.mp4"} <= {name for name, _ in videos.files}
    assert videos.broken == dict.fromkeys(("loop.mp4", "pipe.mp4"), "is not a file")
    assert all(videos.read(index).shape == (4, 16, 16, 3) for index in range(len(videos)))
    raises("folder.mp4 .is not a file", Videos, folder, list_file=listed(tmp_path, "folder.mp4"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts files and threads in /proc")
def test_reading_leaves_no_file_or_thread_open(tmp_path):
    raw = write_numbered(tmp_path / "good.avi", frames=16, size=(16, 16)).read_bytes()
    (tmp_path / "cut.avi").write_bytes(raw[: len(raw) // 2])
    (tmp_path / "bad.avi").write_bytes(raw[:40])
    names = ["good.avi", "cut.avi", "bad.avi"]

    def count():
        return [len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task")]

    data.frame_counts(tmp_path, names)  # tqdm keeps a thread, one for all bars
    before = count()
    for name in names * 100:
        with suppress(*data.READ_ERRORS):
            read_clip(tmp_path / name, video=(4, 16, 16), short="drop")
    data.frame_counts(tmp_path, names * 100)
    wait_for(lambda: count() == before)  # on a busy machine a joined thread stays in /proc for a moment


def test_files_without_duration_or_with_variable_frame_rate(tmp_path):
    path = write_numbered(tmp_path / "raw.m4v", format="m4v")
    with av.open(str(path)) as container:
        assert not container.streams.video[0].duration
    check_frames(path, late=1)  # counted
    times = np.cumsum([0] + [20] * 30 + [400] * 9)  # ms: the header's mean rate is wrong nearly everywhere
    path = write_numbered(tmp_path / "vfr.mkv", times=times)
    assert all(in_steps(clip_numbers(path, start)) for start in (0.0, 0.3, 0.7, 1.0))


def test_crop_covers_the_shorter_side_and_moves_along_the_longer(tmp_path):
    image = np.arange(0, 240, 2, dtype=np.uint8).reshape(1, 120, 1).repeat(40, 0).repeat(3, 2)
    path = write_frames(tmp_path / "wide.avi", np.stack([image] * 8), codec="ffv1", pixels="bgr0")
    for place, left in ((0.0, 0), (0.5, 40), (1.0, 80)):
        clip = read_clip(path, video=(4, 40, 40), stride=1, crop=(0.5, place))
        assert clip.shape == (4, 40, 40, 3)
        np.testing.assert_allclose(clip[0, 20, :, 0], image[0, left : left + 40, 0], atol=3)
    assert read_clip(path, video=(4, 80, 80), stride=1).shape == (4, 80, 80, 3)


def test_display_matrices_at_right_angles_are_applied(tmp_path):
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:16, :32], stored[:16, 32:], stored[16:, :32] = 200, 120, 60
    raw = write_frames(tmp_path / "a.mp4", np.stack([stored] * 4)).read_bytes()
    at = raw.index(b"tkhd") + 44  # the display matrix of the track
    assert struct.unpack(">9i", raw[at : at + 36])[8] == 1 << 30
    y, x = np.mgrid[:32, :64]
    for a, b, c, d in itertools.product((-1, 0, 1), repeat=4):
        matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
        (tmp_path / "a.mp4").write_bytes(raw[:at] + matrix + raw[at + 36 :])
        upright = stored
        if (a * a, b * b, c * c, d * d) in ((1, 0, 0, 1), (0, 1, 1, 0)):
            columns, rows = a * x + c * y, b * x + d * y  # where a pixel is shown
            columns, rows = columns - columns.min(), rows - rows.min()
            upright = np.zeros((rows.max() + 1, columns.max() + 1, 3), np.uint8)
            upright[rows, columns] = stored
        clip = read_clip(tmp_path / "a.mp4", video=(2, *upright.shape[:2]), stride=1)
        assert np.abs(clip[0].astype(float) - upright).mean() < 6


@pytest.fixture
def folder(tmp_path):
    """A folder of twenty videos, in two folders by turns."""
    return write_copies(tmp_path / "my videos", FOLDER)


FOLDER = [f"{'walk' if number % 2 else 'Run'}/clip {number:02d}.MP4" for number in range(20)]


def listed(folder, *lines, name="list.txt"):
    """A list file of these lines."""
    (folder / name).write_text("\n".join(lines))
    return folder / name


def test_a_folders_videos_have_parent_folders_as_labels(folder):
    (folder / "notes.txt").write_text("no video")
    (folder / "walk" / "._clip.mp4").write_text("a resource fork")
    write_copies(folder / "run", ["recon.mp4", "last.pt"])  # what a run has written
    write_copies(folder, [".Trash/old.mp4"])
    videos = Videos(folder, video=(4, 32, 32))
    assert len(videos) == 20 and videos.labels == {"class": ("Run", "walk")}
    assert videos.name(0) == "Run/clip 00.MP4" and videos.targets(0) == (0,) and videos.targets(19) == (1,)
    assert videos.read(3).shape == (4, 32, 32, 3)


def test_lists_give_labels_if_every_line_has_one(folder, tmp_path):
    video = {"video": (4, 32, 32)}
    (folder / "link.MP4").symlink_to(folder / "walk" / "clip 01.MP4")
    again = ["./walk/clip 01.MP4", f"{folder}/walk/clip 01.MP4", "Run/../walk/clip 01.MP4"]
    walks = [f"{path} fast walk\n" for path in ("walk/clip 01.MP4", *again)]
    lines = listed(tmp_path, *walks, "Run/clip 00.MP4  b")
    videos = Videos(folder, list_file=lines, **video)
    assert videos.files == [("walk/clip 01.MP4", "fast walk"), ("Run/clip 00.MP4", "b")]
    paired = listed(tmp_path, "Run/clip 02.MP4 b", "link.MP4", name="paired.txt")
    other = Videos(folder, list_file=paired, paired_list=lines, **video)
    assert other.files[0] == ("Run/clip 02.MP4", "Run")
    assert other.shared(videos) == ["link.MP4"] and videos.shared(other) == ["walk/clip 01.MP4"]
    assert Videos(folder, list_file=lines, paired_list=paired, **video).classes == ("Run", "walk")
    lines = listed(tmp_path, "walk/clip 01.MP4 1", "walk/clip 01.MP4 2")
    raises("clip 01.MP4 with several labels", Videos, folder, list_file=lines)
    raises("Cannot read the list", Videos, folder, list_file=tmp_path / "missing.txt")
    lines = listed(tmp_path, "walk/clip 01.MP4,walk", "walk/clip 2.MP4")
    raises("2 of 2 videos cannot be read.*clip 01.MP4,walk .*clip 2", Videos, folder, list_file=lines)


def test_short_videos(folder):
    write_numbered(folder / "walk" / "short.mp4", frames=5)
    videos = Videos(folder, video=(4, 32, 32), stride=4)
    assert videos.too_short == {"walk/short.mp4": 5} and len(videos) == 20
    lines = listed(folder, "walk/short.mp4 stride", "Run/clip 00.MP4 run")
    assert Videos(folder, list_file=lines, video=(4, 32, 32), stride=4).labels == {"class": ("run",)}
    videos = Videos(folder, video=(4, 32, 32), stride=4, short="repeat")
    assert not videos.too_short and len(videos) == 21
    index = videos.files.index(("walk/short.mp4", "walk"))
    assert frame_numbers(videos.read(index)) == [0, 4, 4, 4]
    raises("the longest has 40 frames; .*--short repeat", Videos, folder, video=(4, 32, 32), stride=20)


def test_a_file_that_ends_early_is_used_from_its_beginning(tmp_path):
    raw, cut = write_numbered(tmp_path / "whole.avi", frames=48).read_bytes(), tmp_path / "cut.avi"
    cut.write_bytes(raw[: len(raw) // 2])
    assert in_steps(clip_numbers(cut, 1.0, stride=4), 4)
    short = raises("earlier than its header says", clip_numbers, cut, frames=16, short="drop")
    with data.open_video(cut) as (container, stream):
        good = [frame for frame in container.decode(stream) if not frame.is_corrupt]  # the last one is cut
    assert short.frames == len(good)
    padded = clip_numbers(cut, frames=16)
    assert padded[-1] == padded[-2] > padded[0]


def test_videos_that_reading_finds_too_short_are_not_broken(folder):
    write_damaged(folder / "walk" / "cut 0.mp4", frames=48, g=48)
    names = [f"walk/cut {number}.mp4" for number in range(5)]  # 5 of 25 would be too many broken
    for name in names[1:]:
        shutil.copy(folder / names[0], folder / name)
    videos = Videos(folder, video=(10, 16, 16), stride=4)
    assert len(videos) == 25 and not videos.too_short
    [batch], skipped = data.train_loader(videos, batch=25, last=1), data.Skipped(videos)
    assert len(batch["index"]) == 25 and len(skipped.update(batch)) == 5
    assert skipped.too_short == dict.fromkeys(names, 20) and not skipped.broken
    for batch in data.eval_loader(videos):
        assert skipped.update(batch) == [] and len(batch["index"]) == 20


def test_links_to_folders_are_followed_once(folder, tmp_path):
    elsewhere = write_copies(tmp_path / "elsewhere", ["deep/far.mp4"])
    (folder / "jump").symlink_to(elsewhere)
    (folder / "zzz").symlink_to(folder / "walk")
    (elsewhere / "back").symlink_to(folder)
    (folder / "walk" / "loop").symlink_to(".")
    videos = Videos(folder, video=(4, 16, 16))
    assert len(videos) == 21 and ("jump/deep/far.mp4", "deep") in videos.files
    assert videos.classes == ("deep", "Run", "walk")


def test_broken_files_are_named_and_skipped_unless_they_are_many_or_all(folder):
    (folder / "Run" / "garbage.mp4").write_bytes(os.urandom(5000))
    videos = Videos(folder, video=(4, 32, 32))
    assert list(videos.broken) == ["Run/garbage.mp4"] and len(videos) == 20 and videos.total == 21
    (folder / "Run" / "empty.mkv").touch()
    raises(r"2 of 22 videos cannot be read.*empty.mkv.*garbage.mp4", Videos, folder, video=(4, 32, 32))
    few = write_copies(folder.parent / "few", ["b.mp4"])
    (few / "a.mp4").write_bytes(b"garbage")
    videos = Videos(few, video=(4, 32, 32))
    assert len(videos) == 1 and list(videos.broken) == ["a.mp4"]
    (few / "b.mp4").unlink()
    raises("1 of 1 videos cannot be read", Videos, few, video=(4, 32, 32))
    [batch] = data.train_loader(videos, batch=2, last=1)
    assert batch["missing"] == 2
    raises("2 of 2 videos cannot be read", data.Skipped(videos).update, batch)


def test_files_are_looked_at_once(folder, tmp_path, monkeypatch):
    settings = {"video": (4, 32, 32), "counts_file": tmp_path / "run" / "frames.json"}
    (folder / "Run" / "garbage.mp4").write_bytes(b"garbage")
    first, opened, plain = Videos(folder, **settings), [], data.open_video
    monkeypatch.setattr(data, "open_video", lambda path: opened.append(path.name) or plain(path))
    assert Videos(folder, **settings).fingerprint == first.fingerprint and opened == ["garbage.mp4"]
    write_copies(folder, ["walk/new.mp4"])
    assert len(Videos(folder, **settings)) == 21 and opened[1:] == ["garbage.mp4", "new.mp4"]
    moved = folder.rename(tmp_path / "moved")
    assert len(Videos(moved, **settings)) == 21 and len(opened) == 3 + 22  # another folder: other files


def test_a_file_that_breaks_later_is_replaced_and_named_once(folder):
    videos = Videos(folder, video=(4, 32, 32))
    (folder / "Run" / "clip 04.MP4").write_bytes(b"gone")
    batches, skipped = list(data.train_loader(videos, batch=20, last=2)), data.Skipped(videos)
    assert len(batches[0]["index"]) == 20 and 2 not in batches[0]["index"]
    [message] = skipped.update(batches[0])
    assert message.startswith("Run/clip 04.MP4 is skipped: ") and skipped.update(batches[1]) == []
    for number in range(6, 12, 2):
        (folder / "Run" / f"clip {number:02d}.MP4").unlink()
    [batch] = data.train_loader(videos, batch=20, last=1)
    raises("4 of 20 videos cannot be read", skipped.update, batch)


def test_no_flip_keeps_left_and_right(tmp_path):
    images = np.zeros((8, 32, 32, 3), np.uint8)
    images[:, :, :16] = 200  # bright on the left
    write_frames(tmp_path / "a.mp4", images)
    for flip, expected in ((True, {True, False}), (False, {True})):
        videos = Videos(tmp_path, video=(2, 32, 32), stride=1, flip=flip)
        clips = [videos.read(0, np.random.default_rng(seed)) for seed in range(12)]
        assert {bool(clip[:, :, :12].mean() > 150) for clip in clips} == expected


def test_workers_and_first_step_change_nothing_and_every_clip_comes_once_in_an_epoch(folder):
    (folder / "Run" / "clip 04.MP4").write_bytes(b"gone")  # a replacement is part of the order
    for source in (Videos(folder, video=(4, 32, 32)), Scenes("train", clips=12, video=(4, 32, 32))):
        alone = list(data.train_loader(source, batch=3, last=9, seed=1))
        helped = list(data.train_loader(source, batch=3, last=9, seed=1, workers=2))
        later = list(data.train_loader(source, batch=3, first=5, last=9, seed=1))
        assert same(alone, helped) and same(alone, alone[:5] + later)
        another = next(iter(data.train_loader(source, batch=3, last=9, seed=2)))
        assert not torch.equal(alone[0]["video"], another["video"])
    order = [index for found in alone for index in found["index"]]
    assert sorted(order[:12]) == sorted(order[12:24]) == list(range(12)) and order[:12] != order[12:24]


SPAWN = """
import sys, torch, train, probe
if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn")
    run, *settings = sys.argv[1:]
    train.main([*settings, "--workers", "2", "--out", run])
    probe.main([run, "--workers", "2"])
"""


def test_training_and_probe_with_workers_under_spawn(folder, tmp_path):
    (tmp_path / "spawn.py").write_text(SPAWN)
    settings = [*TINY_RUN, "--blocks", "2", "--steps", "2", "--data", str(folder), "--stride", "1"]
    command = [sys.executable, str(tmp_path / "spawn.py"), str(tmp_path / "run"), *settings]
    environment = os.environ | {"PYTHONPATH": str(Path(data.__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "linear probe" in done.stdout, done.stderr


def test_too_little_shared_memory_is_said(monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: SimpleNamespace(free=64_000_000))
    scenes, words = Scenes(video=(16, 224, 224)), "workers need [0-9]+ MB .* 64 MB free; use --workers 0"
    raises(words, data.train_loader, scenes, batch=16, last=9, workers=1)  # 2.4 MB a clip
    raises(words, data.eval_loader, scenes, workers=1)
    data.train_loader(scenes, batch=16, last=1, workers=1)  # one batch fits


def test_ends_of_programs(tmp_path):
    """A mistake of the user's: one sentence, code 2; a bug: its traceback. Workers that are left end, too."""
    program = """
import data
with data.user_errors():
    print("caf\\udce9 \\u65e5")  # a console may lack these letters
    batches = iter(data.train_loader(data.Scenes(clips=99, video=(4, 16, 16)), batch=2, last=999, workers=1))
    next(batches)
"""
    for line, end in (
        ("data.Videos('nowhere')", "-c: nowhere is not a folder; .*\n"),
        ("int(float('nan'))", "Traceback .*ValueError: cannot convert float NaN to integer\n"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", f"{program}    {line}"],
            cwd=Path(data.__file__).parent,
            env=os.environ | {"PYTHONIOENCODING": "cp1252"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == (1 if "Traceback" in end else 2) and done.stdout == "caf\\udce9 \\u65e5\n"
        assert re.fullmatch(end, done.stderr, re.DOTALL)


# ---- train.py ----

train.EVAL_CLIPS = 2  # so that the runs below are quick

TINY_RUN = ["--frames", "8", "--pixels", "16", "--batch", "4", "--workers", "0", "--device", "cpu"]


def log_lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def state_of(out):
    """Everything in a checkpoint that later training depends on."""
    _, checkpoint = load(out)
    return {key: checkpoint[key] for key in ("model", "optimizers", "step", "data", "config")}


def same(a, b):
    """Are two nested structures equal, tensors bit for bit?"""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def numbers(out):
    """The log, without what depends on the machine's speed."""
    speed = {"clips_per_s", "wait", "memory_mb"}
    return [{key: value for key, value in line.items() if key not in speed} for line in log_lines(out)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that is finished after 12 steps, with what it printed in printed.txt."""
    out = tmp_path_factory.mktemp("finished")
    text, _ = run(train, *TINY_RUN, "--steps", 12, "--out", out)
    (out / "printed.txt").write_text(text)
    return out


def test_a_run_writes_log_pictures_and_checkpoint(finished):
    first, *_ = lines = log_lines(finished)
    assert [line["step"] for line in lines] == list(range(1, 13))
    names = "step epoch lr loss grad_norm eval_loss eval_clips mean_loss clips_per_s wait"
    assert set(first) - {"memory_mb"} == set(names.split())
    assert set(first["loss"]) == set(first["grad_norm"]) == {"block1", "block2", "block3", "block4"}
    with av.open(str(finished / "recon_000012.png")) as picture:
        frame = next(picture.decode(video=0))
    assert frame.height == 8 * (128 + 4)  # input, visible, target, four blocks, true mean and contrast
    model, checkpoint = load(finished)
    assert checkpoint["step"] == 12 and not model.training and not list(finished.glob("*.tmp"))
    text = (finished / "printed.txt").read_text()
    assert "block4" in text and text.rstrip().endswith(f"python probe.py {finished}")


def after_call(monkeypatch, owner, name, number, act):
    """From now on, act(its result) follows one call of a function, of those in this process."""
    plain, calls = getattr(owner, name), itertools.count(1)

    def called(*arguments, **settings):
        result = plain(*arguments, **settings)
        if next(calls) == number:
            act(result)
        return result

    monkeypatch.setattr(owner, name, called)


def stop_at(monkeypatch, step):
    """From now on, the given step of a run in this process gets a SIGTERM."""
    after_call(monkeypatch, train, "step_masks", step, lambda _: os.kill(os.getpid(), signal.SIGTERM))


def check_resuming(tmp_path, monkeypatch, program, command, stop):
    """A run that is stopped and resumed ends as one that never stopped: weights, optimizers and log."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(program, *command, "--out", whole)
    with monkeypatch.context() as patch:
        stop_at(patch, stop)
        text, _ = run(program, *command, "--out", parts, code=143)
    assert f"--resume --out {parts}" in text and load(parts)[1]["step"] == stop
    run(program, "--resume", "--out", parts)
    assert same(state_of(whole), state_of(parts))
    logs = [{line.pop("step"): line for line in numbers(out)} for out in (whole, parts)]
    for log in logs:  # stopping evaluates once more
        for name in ("eval_loss", "eval_clips", "mean_loss"):
            log[stop].pop(name, None)
    assert logs[0] == logs[1]


def test_a_run_killed_six_times_equals_one_that_never_stopped(tmp_path):
    settings = [*TINY_RUN, "--blocks", 1, "--steps", 60, "--save-every", 0]
    out, rng = tmp_path / "killed", np.random.default_rng(0)
    run(train, *settings, "--out", tmp_path / "whole")
    log, reached = out / "log.jsonl", []
    for _ in range(6):
        more = ["--resume"] if (out / "last.pt").exists() else settings
        before = log.stat().st_size if log.exists() else 0
        process = start(call, train, *more, "--out", out)
        steps, patience = rng.integers(0, 6), time.monotonic() + 20
        while steps and time.monotonic() < patience:  # a kill at any moment, also before the first step
            time.sleep(0.001)
            if log.exists() and log.stat().st_size != before:
                before, steps = log.stat().st_size, steps - 1
        time.sleep(rng.uniform(0, 0.05))
        os.kill(process, signal.SIGKILL)
        exit_code(process)
        reached.append(load(out)[1]["step"] if (out / "last.pt").exists() else 0)  # readable at any moment
    assert reached == sorted(reached) and 2 < len(set(reached))
    run(train, "--resume", "--out", out)
    assert same(state_of(out), state_of(tmp_path / "whole")) and numbers(out) == numbers(tmp_path / "whole")


def test_ctrl_c_saves_also_if_the_screen_has_ended(tmp_path):
    out, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    settings = [*TINY_RUN, "--workers", "2", "--steps", "5000", "--out", str(out)]
    with subprocess.Popen(
        [sys.executable, "-u", "train.py", *settings],
        cwd=Path(train.__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        wait_for(lambda: log.exists() and len(log_lines(out)) > 1)
        process.stdout.close()  # as tee does, which the same Ctrl-C ends first
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 1
    assert load(out)[1]["step"] == log_lines(out)[-1]["step"] >= 1


def test_an_error_prints_its_traceback_and_how_to_resume(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        after_call(patch, os, "fsync", 2, full)  # the first checkpoint is of step 0
        _, errors = run(train, *TINY_RUN, "--steps", 2, "--out", out, code=1)
    *_, error, hint = errors.splitlines()
    assert error.endswith("No space left on device")
    assert hint.endswith(f"python train.py --resume --out {out}") and not list(out.glob("*.tmp"))
    assert load(out)[1]["step"] == 0
    run(train, "--resume", "--out", out)
    assert load(out)[1]["step"] == 2


def test_a_dead_worker_ends_the_run_at_once(folder, tmp_path, monkeypatch):
    after_call(monkeypatch, train, "train_step", 3, lambda _: multiprocessing.active_children()[0].kill())
    settings = ["--steps", 500, "--out", tmp_path / "run", "--data", folder, "--stride", 1, "--workers", 2]
    _, errors = run(train, *TINY_RUN, *settings, code=1)
    assert "Traceback" in errors and "Go on from the last checkpoint" in errors.splitlines()[-1]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        after_call(patch, train, "train_step", 3, lambda result: result[0]["block2"].fill_(math.nan))
        _, errors = run(train, *TINY_RUN, "--steps", 6, "--out", tmp_path / "run", code=1)
    assert "block2 is not finite at step 3" in errors and "generated clip" in errors
    assert load(tmp_path / "run")[1]["step"] == 0


def test_a_damaged_checkpoint_or_one_with_code_is_refused(tmp_path):
    torch.save({"config": SimpleNamespace()}, tmp_path / "evil.pt")
    save(tmp_path / "good.pt", toy(), [], step=0, settings={})
    (tmp_path / "half.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:-5000])
    torch.save({"config": {"blocks": 3}, "model": {}}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    for name in ("evil", "half", "other", "text"):
        raises(f"{name}.pt is damaged, or not a checkpoint", load, tmp_path / f"{name}.pt")
    assert load(tmp_path / "good.pt")[1]["step"] == 0


def test_a_run_is_resumed_only_as_it_was_started(folder, finished, tmp_path):
    before = contents(finished)
    assert "is finished: 12 of 12 steps" in run(train, "--resume", "--out", finished)[0]
    message = refused(train, "--resume", "--lr", 0.5, "--out", finished)
    assert "was started with --lr 0.001, not 0.5" in message
    assert before == contents(finished)
    for change, sentence in (
        ({"objective": 0.5}, "was started with another loss or target"),
        ({"settings": {"program": "-m other"}}, "is not a run of train.py; resume it with: python -m other"),
    ):
        other = shutil.copytree(finished, tmp_path / "other", dirs_exist_ok=True)
        torch.save(torch.load(other / "last.pt") | change, other / "last.pt")
        assert sentence in refused(train, "--resume", "--out", other)
    out = tmp_path / "run"
    run(train, *TINY_RUN, "--steps", 2, "--out", out, "--data", folder, "--stride", 1)
    moved = folder.rename(tmp_path / "moved")
    run(train, "--resume", "--out", out, "--data", moved)
    (moved / "walk" / "clip 01.MP4").unlink()
    assert "was started on other clips" in refused(train, "--resume", "--out", out, "--data", moved)


def test_eval_loss_is_of_held_out_videos_with_eval_list_and_says_so(folder, tmp_path):
    lists = {name: listed(tmp_path, *FOLDER[part], name=name) for name, part in SPLIT.items()}
    settings = [
        *TINY_RUN,
        "--steps",
        1,
        "--stride",
        1,
        "--data",
        folder,
        "--list",
        lists["train.txt"],
        "--out",
    ]
    for more, name in (([], "2 training clips"), (["--eval-list", lists["test.txt"]], "2 held-out clips")):
        text, _ = run(train, *settings, tmp_path / name, *more)
        [line] = log_lines(tmp_path / name)
        assert line["eval_clips"] == name and f"loss on {name}" in text
    message = refused(train, *settings, tmp_path / "same", "--eval-list", lists["train.txt"])
    assert "13 videos of --eval-list are trained on" in message


SPLIT = {"train.txt": slice(0, 13), "test.txt": slice(13, 20)}


def test_mean_loss_is_the_loss_of_the_mean_predictor():
    model, (video, visible, masked) = toy().eval(), batch(toy(), count=2)
    pixels = math.prod(model.tubelet)
    for flat in (0, 1, 2):  # clips of one colour
        video[:flat] = 7
        record = train.evaluate(model, (video, visible, masked, "clips"), Path(os.devnull), ["block1"])
        expected = (1 - flat / 2) * (1 - 1 / pixels)  # the variance is the unbiased one
        assert record["mean_loss"] == pytest.approx(expected, abs=1e-4)


def test_init_copies_the_encoder_at_any_K_and_keep_keeps_its_snapshots(finished, tmp_path):
    start_from = [*TINY_RUN, "--init", finished, "--out"]
    other = ["--regime", "e2e", "--blocks", 12, "--steps", 2, "--keep"]
    text, _ = run(train, *start_from, tmp_path / "e2e", *other)
    assert "decoder after layer 12; new: nothing" in text
    old, new = load(finished)[0], load(tmp_path / "e2e" / "step_000001.pt")[0]
    video = clips(2, old.video)
    arguments = [*map(str, start_from), str(tmp_path / "new"), "--blocks", "6"]
    config, given = train.parse(train.Config, "", arguments)
    model = train.set_up(config, given)[1]
    assert torch.equal(model.encode(video)["block6"], old.encode(video)["block4"])
    first, last = probe.load_runs(sorted((tmp_path / "e2e").glob("step_*.pt")))
    assert (first.title, last.group, last.checkpoint["step"]) == ("e2e step 000001", "e2e step 000002", 2)
    assert not torch.equal(new.encode(video)["block12"], old.encode(video)["block4"])
    first, last = log_lines(tmp_path / "e2e")[0], log_lines(finished)[-1]
    assert first["loss"]["block12"] == pytest.approx(
        last["loss"]["block4"], rel=0.05
    )  # goes on at the old loss
    assert "embedding differs in shape" in refused(train, *start_from, tmp_path / "x", "--tubelet", 4, 8, 8)


def test_a_target_of_ones_own_changes_the_objective(monkeypatch):
    before = blockwise.objective()
    monkeypatch.setattr(blockwise, "normalized_targets", lambda patches: (patches.float(), 0.0, 1.0))
    assert blockwise.objective() != before


class Flat:
    """A source of clips of ones own, of one grey each."""

    labels, fingerprint = {"half": ("dark", "bright")}, "flat"
    __len__ = lambda self: 12
    name = lambda self, index: f"clip {index}"
    targets = lambda self, index: (index % 2,)
    read = lambda self, index, rng=None: np.full((8, 16, 16, 3), 99 * (index % 2), np.uint8)


def test_clips_and_a_step_of_ones_own(tmp_path):
    def step_function(*arguments, config, step, steps, **settings):
        calls.append((step, steps, config.batch))
        return train_step(*arguments, **settings)

    calls, out = [], tmp_path / "run"
    settings = [*TINY_RUN, "--steps", "3", "--out"]
    with suppress(SystemExit):
        train.main([*settings, str(out)], source=Flat(), step_function=step_function)
    assert (
        calls == [(0, 3, 4), (1, 3, 4), (2, 3, 4)] and log_lines(out)[-1]["eval_clips"] == "2 training clips"
    )
    assert "was trained on clips of its own source, Flat" in refused(probe, out)


def test_every_setting_is_a_flag_that_is_used():
    text, _ = run(train, "--help")
    shown = set(re.findall(r"^  (--[a-z0-9-]+)", text, re.MULTILINE))
    assert shown == {train.flag(f.name) for f in fields(train.Config)}
    code = Path(train.__file__).read_text()
    for f in fields(train.Config):
        assert re.search(rf"(config|self)\.{f.name}\b", code), f"--{f.name} does nothing"


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        ("--blocks 5", "choose --blocks from 1, 2, 3, 4, 6, 12"),
        ("--pixels 60", "60 pixels in height is not a multiple of the tubelet's 8; try 56 or 64"),
        ("--tubelet 0 0 0", "--tubelet 0 must be at least 1"),
        ("--mask 0.001", "at least one must be masked"),
        ("--mask 1", "--mask 1.0 must be more than 0 and less than 1"),
        ("--lr nan", "--lr nan must be more than 0"),
        ("--lr 0", "--lr 0.0 must be more than 0"),
        ("--batch 0", "--batch 0 must be at least 1"),
        ("--seed 99999999999999999999", "--seed 99999999999999999999 must be at least 0 and less than"),
        ("--steps 3 --epochs 2", "give one of them"),
        ("--device warp", "try --device cpu"),
        ("--data nowhere", "nowhere"),
        ("--list some.txt", "name their folder with --data"),
        ("--learning-rate 1", "unrecognized arguments: --learning-rate"),
        ("--resume --out nowhere", "There is no checkpoint nowhere"),
        ("--out full", "full is not empty; name another --out"),
    ],
)
def test_likely_mistakes_get_one_sentence_with_the_fix(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("it started to train"))
    assert sentence in refused(train, *arguments.split()) and os.listdir(tmp_path) == ["full"]


def test_decode_ratio_takes_a_random_part_of_the_masked_tokens():
    config = train.Config(decode_ratio=0.5, batch=8, device="cpu")
    model = Blockwise(**SIZES["nano"], blocks=4)
    visible, part = train.step_masks(config, model, 3)
    same_visible, whole = train.step_masks(replace(config, decode_ratio=1.0), model, 3)
    assert torch.equal(visible, same_visible) and part.shape == (8, 57) and whole.shape == (8, 114)
    assert all(set(a.tolist()) < set(b.tolist()) for a, b in zip(part, whole))
    assert (part.diff(dim=1) > 0).all() and not torch.equal(part, train.step_masks(config, model, 4)[1])


@pytest.mark.parametrize("size,epochs", [("tiny", 150), ("small", 300)])
def test_the_papers_sizes_take_the_papers_recipe(size, epochs, tmp_path):
    config, _ = train.parse(train.Config, "", ["--size", size, "--data", str(tmp_path)])
    train.resolve_defaults(config)
    assert (config.epochs, config.steps, config.batch, config.lr) == (epochs, None, 128, 1e-4)
    assert (config.beta1, config.beta2, config.weight_decay) == (0.9, 0.95, 0.05)
    assert (config.warmup, config.min_lr, config.grad_clip) == (0.1, 1e-6, 0.0)
    assert (config.stride, config.short, config.flip, config.mask) == (4, "drop", True, 0.9)
    arguments = config.model_arguments()
    assert arguments["video"] == (16, 128, 128) and arguments["tubelet"] == (8, 16, 16)


def test_learning_rate_warms_up_linearly_and_ends_at_the_minimum():
    config = train.Config(lr=1e-3, min_lr=1e-6, warmup=0.1)
    rates = [train.learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == pytest.approx(1e-3) == max(rates)
    assert all(a > b for a, b in itertools.pairwise(rates[10:])) and 1e-6 < rates[-1] < 2e-6


def test_compiled_training_is_plain_training(tmp_path, monkeypatch):
    compiled = functools.partialmethod(
        torch.nn.Module.compile, backend="eager"
    )  # the same kernels, in a graph
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        run(train, *TINY_RUN, "--blocks", 2, "--steps", 1, "--out", tmp_path / name, *more)
    assert numbers(tmp_path / "plain") == numbers(tmp_path / "compiled")


# ---- train.py, in several processes ----


def several(program, count, log, *arguments, kill_when=None):
    """A program in several processes, as torchrun starts them: their exit codes. The last one may be killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    processes = []
    for rank in range(count):
        place |= {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
        processes.append(start(call, program, *arguments, log=f"{log}{rank}.txt", **place))
    if kill_when:
        wait_for(kill_when)
        os.kill(processes[-1], signal.SIGKILL)
    return [exit_code(process) for process in processes]


@pytest.mark.parametrize("regime", ["simultaneous", "e2e"])
def test_two_processes_learn_what_one_learns_also_after_resuming(folder, tmp_path, monkeypatch, regime):
    one, two, log = (tmp_path / name for name in ("one", "two", "log"))
    videos = ["--data", folder, "--stride", 1] if regime == "e2e" else []
    settings = [*TINY_RUN, *videos, "--regime", regime, "--steps", 5, "--out"]
    run(train, *settings, one)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert several(train, 2, log, *settings, two) == [143, 143]
    assert load(two)[1]["step"] == 3
    assert several(train, 4, log, "--resume", "--out", two) == [0] * 4
    for a, b in zip(numbers(one), numbers(two), strict=True):
        for values in ("loss", "grad_norm"):
            assert a[values] == pytest.approx(b[values], rel=1e-5)


def check_death(tmp_path, program):
    """A process that dies ends all and loses nothing."""
    out, log = tmp_path / "run", tmp_path / "log"
    settings = [*TINY_RUN, "--blocks", 2, "--steps", 5000, "--out", out]
    codes = several(program, 2, log, *settings, kill_when=lambda: (out / "log.jsonl").exists())
    assert codes == [1, -signal.SIGKILL]
    hint = (tmp_path / "log0.txt").read_text().splitlines()[-1]
    assert "Go on from the last checkpoint" in hint and f"--resume --out {out}" in hint
    assert load(out)[1]["step"] == 0


def test_a_process_that_dies_ends_all_and_loses_nothing(tmp_path):
    check_death(tmp_path, train)


# ---- probe.py ----


def clusters(count=300, classes=5, width=12, noise=1.5, seed=0):
    """Features (count, width) around class centres, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (count,), generator=generator)
    centres = 3 * torch.randn(classes, width, generator=generator)
    scale = torch.logspace(-2, 2, width)  # features of very different size
    return (centres[y] + noise * torch.randn(count, width, generator=generator)) * scale, y


def test_linear_probe_with_constant_missing_and_infinite_values():
    x, y = clusters()
    plain = probe.logistic_probe(x, y, x)
    constant = torch.cat([x, torch.full((len(x), 2), 7.0)], dim=1)
    torch.testing.assert_close(probe.logistic_probe(constant, y, constant), plain)
    shares = probe.logistic_probe(torch.ones(10, 4), torch.tensor([0] * 7 + [1] * 3), torch.ones(2, 4))
    torch.testing.assert_close(shares, torch.tensor([[0.7, 0.3]] * 2).double(), atol=1e-6, rtol=0)
    gap = probe.logistic_probe(x, 2 * y, x)  # no clip of classes 1, 3, 5, 7
    torch.testing.assert_close(gap[:, ::2], plain)
    assert gap.shape == (300, 9) and (gap[:, 1::2] == 0).all()
    assert (probe.logistic_probe(x, torch.ones(len(x), dtype=torch.long), x)[:, 1] == 1).all()
    x[3, 2] = float("nan")
    raises("not finite", probe.logistic_probe, x, y, x)


def test_average_precision_equals_scikit_learn_also_with_ties():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    x, y = clusters(count=80, noise=6.0)
    x[40:60] = x[:20]  # equal similarities
    z, values = F.normalize(x.double(), dim=1), []
    for i in range(80):
        others = torch.arange(80) != i
        values.append(metrics.average_precision_score(y[others] == y[i], (z @ z[i])[others]))
    assert probe.retrieval(x, y)["mAP"] == pytest.approx(np.mean(values), rel=1e-6)


def test_retrieval_equals_its_definition():
    x, y = clusters(count=50, width=3, noise=6.0)
    similarity = F.normalize(x.double(), dim=1) @ F.normalize(x.double(), dim=1).T
    y[49] = 9  # alone in its class: no query
    precision, first = [], []
    for i in range(49):
        others = sorted(set(range(50)) - {i}, key=lambda j: -similarity[i, j])
        places = [rank for rank, j in enumerate(others, start=1) if y[j] == y[i]]
        precision.append(np.mean([hit / rank for hit, rank in enumerate(places, start=1)]))
        first.append(places[0])
    result = probe.retrieval(x, y)
    assert result["mAP"] == pytest.approx(np.mean(precision))
    for k in (1, 5, 10):
        assert result[f"top{k}"] == pytest.approx(np.mean(np.array(first) <= k))
    pairs = probe.retrieval(x, torch.stack([y, y % 2], dim=1))
    assert [values[0] for values in pairs.values()] == list(result.values())
    assert [values[1] for values in pairs.values()] == list(probe.retrieval(x, y % 2).values())
    assert np.isnan(probe.retrieval(x, torch.arange(50))["mAP"])


def test_collapsed_features_retrieve_nothing():
    y = torch.tensor([0] * 30 + [1] * 10)
    result = probe.retrieval(torch.ones(40, 6), y)
    assert result["top1"] == result["top10"] == 0.0
    assert result["mAP"] == pytest.approx((30 * 29 + 10 * 9) / 40 / 39)  # as for a random order
    twins = torch.eye(4).repeat(2, 1)  # tied clips of the query's own class are hits
    assert probe.retrieval(twins, torch.arange(8) % 4)["top1"] == 1.0


def test_folds_are_stratified_and_disjoint():
    labels = torch.tensor([0] * 30 + [1] * 7 + [2])
    folds = probe.stratified_folds(labels)
    assert sorted(torch.cat([test for _, test in folds]).tolist()) == list(range(38))
    for fit, test in folds:
        assert not set(fit.tolist()) & set(test.tolist()) and len(fit) + len(test) == 38
        assert (labels[test] == 0).sum() == 10 and (labels[test] == 1).sum() in (2, 3)
    of_neighbours = [test.tolist() for _, test in probe.stratified_folds(labels, seed=None)]
    assert of_neighbours[0] == [*range(10), 30, 31, 32] and of_neighbours[1] == [*range(10, 20), 33, 34, 37]


def test_a_split_is_that_of_two_lists_and_names_unseen_classes(capsys):
    labels = {"class": ("a", "b", "c")}
    [(train, test)] = probe.split(torch.tensor([[0], [1], [1], [0], [1], [0]]), labels, [4, 2], None)
    assert train.tolist() == [0, 1, 2, 3] and test.tolist() == [4, 5] and not capsys.readouterr().out
    probe.split(torch.tensor([[0], [1], [1], [0], [1], [2]]), labels, [4, 2], None)
    assert capsys.readouterr().out.endswith("counted as wrong: c\n")


def test_chance_names_the_commonest_class_of_the_training_clips():
    targets, folds = torch.tensor([[0], [1], [1], [1], [0], [0]]), [(torch.arange(4), torch.arange(3, 6))]
    assert probe.chance_accuracy(targets, folds) == [pytest.approx(1 / 3)]


def test_features_are_the_mean_tokens_of_every_block():
    model, source = toy().eval(), Scenes("test", clips=10, video=TOY["video"])
    sources = [(source, [1, 5, 6, 7, 9])]
    features, targets, names, labels, sizes = probe.extract({"run": model}, sources, batch=4)
    assert names == [source.name(index) for index in sources[0][1]] and labels == source.labels
    assert sizes == [5] and targets.shape == (5, 5) and tuple(targets[1]) == source.targets(5)
    video = torch.from_numpy(source.read(7)).unsqueeze(0)
    tokens = model.encode(video)
    for name in ("block1", "block2"):
        torch.testing.assert_close(features["run", name][3], tokens[name][0].mean(dim=0))
    run = probe.Run("run", "run", "run", "e2e", 0, model, {"config": model.config})
    bare = probe.networks([run], before_norm=True)["run"].encode(video)
    assert torch.equal(bare["block1"], tokens["block1"]) and not torch.equal(bare["block2"], tokens["block2"])
    torch.testing.assert_close(model.blocks["block2"].norm(bare["block2"]), tokens["block2"])


@pytest.mark.parametrize("double,count", [(False, 10800), (True, 15552)])
def test_gratings_are_the_papers(double, count):
    source, turns = data.Gratings(double=double), range(0, 360, 30)
    hues = {"gray": (1, 1, 1), "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "orange": (1, 0.5, 0)}
    values = [range(4, 25, 4), turns, (0.5, 1, 2, 4, 6, 8), (0.2, 0.4, 0.6, 0.8, 1.0), list(hues)]
    if double:
        values = [(4, 10, 16), (4, 10, 16), turns, (0, 45, 90, 135), (2, 5, 8), (0.33, 0.67, 1.0)]
        values.append(list(hues)[:4])
    product = list(itertools.product(*values))
    assert len(source) == len(product) == count
    x, y = np.linspace(-1, 1, 128)[None, :], np.linspace(-1, 1, 128)[:, None]
    i = 9  # one frame
    for index in (0, count - 1, 1234, 7777):
        assert tuple(source.stimulus(index).values()) == product[index]
        *places, tf, contrast, colour = product[index]
        halves = [places]
        if double:
            sf_left, sf_right, theta, delta = places
            halves = [(sf_left, theta), (sf_right, theta + delta)]
        expected = np.zeros((128, 128))
        for side, (sf, theta) in enumerate(halves):
            along = x * np.cos(np.deg2rad(theta)) + y * np.sin(np.deg2rad(theta))
            wave = contrast * np.sin(2 * np.pi * sf / 2 * along + 2 * np.pi * tf / 6.25 * i)
            expected[:, 64 * side :] = wave[:, 64 * side :]
        frame = source.read(index)[i] / 127.5 - 1
        np.testing.assert_allclose(frame, expected[..., None] * np.array(hues[colour]), atol=0.005)


def test_double_grating_labels():
    source = data.Gratings(double=True)
    for index in (0, 999, 15551):
        of, numbers = source.stimulus(index), source.targets(index)
        named = {name: values[number] for (name, values), number in zip(source.labels.items(), numbers)}
        assert len(named) == 9 and named["sf_difference"] == of["sf_right"] - of["sf_left"]
        assert named["theta_right"] == (of["theta_left"] + of["delta"]) % 360
        assert named["sf_match"] == ("yes" if of["sf_left"] == of["sf_right"] else "no")
        assert (named["higher_side"] == "equal") == (named["sf_match"] == "yes")
        assert (named["theta_match"] == "yes") == (of["delta"] == 0)


# ---- analyze.py ----


def test_rbf_cka_by_its_definition():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 6, generator=generator), torch.randn(30, 9, generator=generator)
    centre, kernels = np.eye(30) - 1 / 30, []
    for a in (x, y):
        squared = np.array([[((p - q) ** 2).sum() for q in a.double().numpy()] for p in a.double().numpy()])
        pairs = np.sort(squared[np.triu_indices(30, 1)])
        median = pairs[(len(pairs) - 1) // 2]  # torch's median is the lower of two
        kernels.append(centre @ np.exp(-squared / (2 * median)) @ centre)
    expected = (kernels[0] * kernels[1]).sum() / np.sqrt((kernels[0] ** 2).sum() * (kernels[1] ** 2).sum())
    assert analyze.rbf_cka(x, y) == pytest.approx(expected, rel=1e-6)
    assert analyze.rbf_cka(3 * x, x) == pytest.approx(1)


def test_patch_similarity_by_all_pairs():
    tokens = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(0)) * 4 + 1
    z = F.normalize(F.layer_norm(tokens.double(), (10,), eps=1e-12), dim=-1)
    expected = [np.mean([z[b, i] @ z[b, j] for i in range(7) for j in range(7) if i != j]) for b in range(2)]
    for same in (tokens, 9 * tokens.flip(1)):
        assert analyze.patch_similarity(same).tolist() == pytest.approx(expected, abs=1e-6)
    assert analyze.patch_similarity(tokens[:, :1].expand(2, 7, 10)).tolist() == pytest.approx([1, 1])


def test_spectrum_of_known_eigenvalues():
    rows = torch.cat([torch.eye(4), -torch.eye(4)])  # covariance proportional to the identity
    names = ("effective_rank", "participation_ratio", "anisotropy", "dimensions90")
    assert analyze.spectrum(rows) == pytest.approx(dict(zip(names, (4, 4, 1, 4))))
    values = torch.tensor([8.0, 1.0, 1.0, 0.0])
    p = values[:3] / 10
    expected = (math.exp(-(p * p.log()).sum()), 100 / 66, 8 / 2.5, 2)
    found = analyze.spectrum(rows * values.sqrt() + 5)
    assert found == pytest.approx(dict(zip(names, expected)), rel=1e-5)
    assert all(np.isnan(value) for value in analyze.spectrum(torch.ones(5, 3)).values())


def test_uniformity_by_all_pairs():
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    x[3] = 0.0  # no direction: it stays at the centre
    z = F.normalize(x.double(), dim=1)
    pairs = [np.exp(-2 * ((z[i] - z[j]) ** 2).sum().item()) for i in range(12) for j in range(i)]
    assert analyze.uniformity(x) == pytest.approx(np.log(np.mean(pairs)), rel=1e-6)
    assert analyze.uniformity(torch.ones(4, 3)) == pytest.approx(0, abs=1e-12)


def test_occlusion_drop_and_the_effect_of_each_clip():
    x, y = clusters()
    y, folds = y.unsqueeze(1), [(torch.arange(200), torch.arange(200, 300))]
    blank = x.clone()
    blank[:, :9] = 0
    whole, occluded = (probe.probe_accuracy(features, y, folds) for features in (x, blank))
    [drop], [effect] = analyze.occlusion_drops([whole], [occluded])
    assert drop == pytest.approx(1 - occluded["accuracy"][0] / whole["accuracy"][0]) and 0.1 < drop < 0.9
    correct, still_correct = whole["correct"][0], occluded["correct"][0]
    without = [1 - np.delete(still_correct, i).mean() / np.delete(correct, i).mean() for i in range(100)]
    assert np.std(effect) == pytest.approx(99 * np.std(without), rel=0.02)  # the jackknife


@pytest.mark.parametrize("halves", [False, True])
def test_occlusion_leaves_one_patch_of_the_grid(halves):
    video, seen = clips(1, (4, 64, 64))[0].clamp(min=1), set()
    whole = patchify(video.unsqueeze(0), (4, 16, 16))[0]
    for seed in range(30):
        kept = analyze.occlude(video, halves=halves, generator=torch.Generator().manual_seed(seed))
        patches = patchify(kept.unsqueeze(0), (4, 16, 16))[0]
        left = patches.any(dim=1).nonzero().flatten().tolist()
        assert len(left) == 1 + halves and torch.equal(patches[left], whole[left])
        assert not halves or sorted(place % 4 // 2 for place in left) == [0, 1]
        seen.update(left)
    assert len(seen) > 12  # of 16 places


def test_reconstruction_losses_are_the_training_losses():
    model = toy().eval()
    video, *masks = batch(model, seed=7)
    expected, _ = train_step(model, make_optimizers(model, lr=0.0, weight_decay=0.0), video, *masks)
    found = analyze.reconstruction_losses(model, [video], ratio=0.75, seed=7)
    assert found == pytest.approx({name: loss.item() for name, loss in expected.items()}, rel=1e-6)


PASTED = {  # every piece of the model and every metric, alone in an empty module, does these calls
    tube_mask: "f(2, (2, 4, 4), 0.75)",
    patchify: "f(video, (4, 8, 8))",
    unpatchify: "f(torch.rand(2, 32, 768), (8, 32, 32), (4, 8, 8))",
    gather_tokens: "f(torch.rand(2, 32, 24), places)",
    normalized_targets: "f(torch.rand(2, 8, 768)); f(video.view(2, -1, 768))",
    Layer: "f(width=24, heads=2)(torch.rand(2, 8, 24))",
    TubeletEmbedding: "f(tokens=32, values=768, width=24)(torch.rand(2, 8, 768), places)",
    Decoder: "f(layers=[], tokens=32, encoder_width=24, width=16)(torch.rand(2, 8, 24), places, places)",
    probe.logistic_probe: "f(x, y, x); f(x, torch.stack([y, y], dim=1), x, C=2.0)",
    probe.retrieval: "f(x, y)",
    probe.stratified_folds: "f(y)",
    analyze.linear_cka: "f(x, x[:, :3])",
    analyze.rbf_cka: "f(x, x)",
    analyze.patch_similarity: "f(torch.randn(2, 7, 10))",
    analyze.spectrum: "f(x); f(torch.ones(3, 4))",
    analyze.uniformity: "f(x)",
    analyze.occlude: "f(torch.ones(4, 32, 32, 3)); f(torch.ones(4, 32, 32, 3), halves=True)",
}


@pytest.mark.parametrize("thing,calls", PASTED.items(), ids=[thing.__name__ for thing in PASTED])
def test_pasted_alone_it_works(thing, calls):
    place = {"torch": torch, "nn": torch.nn, "F": F, "math": math, "np": np}  # all that it may need
    exec(inspect.getsource(thing), place)  # noqa: S102
    names = {"f": place[thing.__name__], "torch": torch, "x": torch.randn(40, 6), "y": torch.arange(40) % 3}
    exec(calls, names | {"video": clips(2), "places": torch.arange(8).expand(2, -1)})  # noqa: S102


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory):
    """Three tiny runs: e2e, and two seeds of simultaneous."""
    root = tmp_path_factory.mktemp("runs")
    for name, more in (("e2e-2", "--regime e2e"), ("sim-2", ""), ("sim-2-seed1", "--seed 1")):
        run(train, *TINY_RUN, "--blocks", 2, "--steps", 2, *more.split(), "--out", root / name)
    return root


def nearest_mean(x, targets, test, **_):
    """In place of logistic_probe(), to be quick: -1 times the distance from the mean of every class."""
    distances = []
    for y in targets.T:
        means = torch.stack([x[y == c].mean(dim=0) for c in range(int(y.max()) + 1)])
        distances.append(-torch.cdist(test, means).nan_to_num(torch.inf))
    return distances


def test_probe_tables_hold_runs_seeds_chance_and_baselines(three_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "logistic_probe", nearest_mean)
    runs = [three_runs / name for name in ("e2e-2", "sim-2", "sim-2-seed1")]
    text, _ = run(probe, *runs, "--clips", 36, "--workers", 0, "--json", tmp_path / "table.json")
    accuracy, retrieval = text.split("\n\n")[1:]
    for row in ("chance", "raw pixels: middle frame", "raw pixels: frame changes", "untrained, 12 layers"):
        assert re.search(f"^{row}", accuracy, re.MULTILINE), row
    for table, words in ((accuracy, ["mean", *Scenes().labels]), (retrieval, ["mAP", "top10"])):
        assert all(word in table.splitlines()[0] for word in words)
        assert re.search("^sim-2 block2 .*±", table, re.MULTILINE)
        assert re.search("^e2e-2 block2 [^±]*$", table, re.MULTILINE)  # one seed
    scores = json.loads((tmp_path / "table.json").read_text())
    seeds = [list(scores[title]["block2"]["mAP"].values()) for title in ("sim-2", "sim-2-seed1")]
    means = np.mean(seeds, axis=1)
    assert f" {means.mean():.3f} ±{np.std(means, ddof=1):.3f}" in retrieval
    assert scores["chance"][""]["accuracy"].keys() == Scenes().labels.keys()


def test_features_file(three_runs, tmp_path):
    for name, more in (("out.npz", []), ("bare.npz", ["--before-norm"])):
        command = ["--clips", 9, "--workers", 0, "--features", tmp_path / name]
        run(probe, three_runs / "sim-2", *command, *more)
    with np.load(tmp_path / "out.npz") as file, np.load(tmp_path / "bare.npz") as bare:
        assert file["block1"].shape == file["block2"].shape == (9, 96)
        assert len(file["names"]) == 9 and set(file["shape"]) <= {"disc", "ring", "cross"}
        assert (file["block1"] == bare["block1"]).all() and not np.allclose(file["block2"], bare["block2"])


def test_probe_takes_clips_of_ones_own(three_runs, monkeypatch):
    monkeypatch.setattr(probe, "logistic_probe", nearest_mean)

    with redirect_stdout(io.StringIO()) as text:
        probe.main([str(three_runs / "sim-2"), "--workers", "0"], sources=[(Flat(), range(12))])
    assert "8 clips to fit, 4 to test, folds: 3" in text.getvalue()
    assert re.search("^raw pixels: middle frame +1.000 ", text.getvalue(), re.MULTILINE)


def test_untrained_network_is_the_same_for_all_seeds(three_runs):
    runs = probe.load_runs([three_runs / "sim-2", three_runs / "sim-2-seed1" / "last.pt"])
    title = runs[0].untrained
    assert not differing(*(probe.networks(order)[title].state_dict() for order in (runs, runs[::-1])))
    deeper = runs[1]._replace(model=Blockwise(**runs[0].model.config | {"depth": 4}))
    assert deeper.untrained != title


def test_unfinished_runs_are_read_and_named(three_runs, tmp_path, capsys):
    other = shutil.copytree(three_runs / "sim-2", tmp_path / "other")
    probe.load_runs([other])
    assert not capsys.readouterr().out
    checkpoint = load(other)[1]
    torch.save(checkpoint | {"step": 1}, other / "last.pt")
    probe.load_runs([other])
    assert f"other is not finished: step 1 of {checkpoint['step']}" in capsys.readouterr().out


def test_a_run_on_videos_is_probed_on_its_own_videos(folder, tmp_path, capsys):
    train, test = (str(listed(tmp_path, *FOLDER[part], name=name)) for name, part in SPLIT.items())
    settings = {"data": str(folder), "stride": 2, "short": "repeat"}

    def open_data(*flags, **changes):
        checkpoint = {"settings": settings | changes}
        model = SimpleNamespace(video=(8, 16, 16))
        own = SimpleNamespace(title="mine", folder=tmp_path, model=model, checkpoint=checkpoint)
        sources = probe.open_data(probe.build_parser().parse_args(["RUN", *flags]), own)
        return [source for source, _ in sources], capsys.readouterr().out

    [source], text = open_data()
    assert (len(source), source.stride, source.short) == (20, 2, "repeat")
    assert text.startswith("videos and rules as in the training of mine")
    [source], text = open_data("--stride", "1", "--short", "drop", list=train)
    assert (len(source), source.stride, source.short) == (13, 1, "drop") and train in text
    for sources, _ in (
        open_data(list=train, eval_list=test),
        open_data("--train-list", train, "--test-list", test),
    ):
        assert [len(source) for source in sources] == [13, 7]
    raises("gratings is not a folder", open_data, data="gratings")  # the run's videos: not the stimuli
    [source], text = open_data("--data", "scenes")
    assert isinstance(source, Scenes) and text.endswith("generated scenes: 3000 clips\n")
    [source], text = open_data("--data", "double-gratings")
    assert isinstance(source, data.Gratings) and text.startswith("generated double-gratings")


def test_likely_mistakes_in_a_probe_get_one_sentence(three_runs, folder, tmp_path):
    base = [three_runs / "sim-2", "--workers", 0]
    videos = [*base, "--data", folder, "--stride", 1]
    fit = ["--train-list", listed(tmp_path, *FOLDER[:13], name="train.txt"), "--test-list"]
    test, link = listed(tmp_path, *FOLDER[13:]), folder / "again.MP4"
    assert "13 clips to fit, 7 to test" in run(probe, *videos, *fit, test)[0]
    link.symlink_to(folder / FOLDER[0])
    seed5 = shutil.copytree(three_runs / "sim-2", tmp_path / "sim-2-seed5")
    other = tmp_path / "sim"
    run(train, *TINY_RUN, "--pixels", 24, "--steps", 1, "--out", other)
    for arguments, sentence in (
        ([tmp_path], "There is no checkpoint"),
        ([seed5, *base], "have one name or seed (0)"),
        ([other, *base], "clips of different sizes"),
        ([*base, "--data", "nowhere"], "nowhere is not a folder"),
        ([*base, "--data="], "is not a folder"),
        ([*base, "--device", "meta"], "does not work here"),
        ([*videos, *fit, listed(tmp_path, name="empty.txt")], "No videos in"),
        ([*videos, *fit, fit[1]], "13 videos are in both lists"),
        ([*videos, *fit, listed(tmp_path, "again.MP4", name="link.txt")], "1 videos are in both lists"),
        ([*base, "--data", folder / "walk", "--stride", 1], "The videos have one class, walk"),
        ([*base, "--features", three_runs / "sim-2" / "last.pt"], "must end in .npz"),
        ([*base, "--features", test / "x.npz"], "cannot be written"),
    ):
        assert sentence in refused(probe, *arguments)


def test_analysis_files_and_tables(three_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "logistic_probe", nearest_mean)
    names = ["e2e-2", "sim-2", "sim-2-seed1"]
    runs = [three_runs / name for name in names]
    text, _ = run(analyze, *runs, "--clips", 36, "--workers", 0, "--out", tmp_path)
    analysis = json.loads((tmp_path / "analysis.json").read_text())
    assert list(analysis["runs"]) == names and analysis["settings"]["clips"] == 36
    seed1, e2e = (analysis["runs"][name] for name in ("sim-2-seed1", "e2e-2"))
    assert (seed1["group"], seed1["regime"], seed1["K"], seed1["seed"]) == ("sim-2", "simultaneous", 2, 1)
    assert (seed1["run"], seed1["step"]) == ("sim-2-seed1", 2) and seed1["shared"] == e2e["shared"]
    assert e2e["values"]["reconstruction loss"][0] is None and len(e2e["values"]["linear CKA"]) == 2  # nan
    with np.load(tmp_path / "analysis.npz") as file:
        for title, of_run in {**analysis["runs"], **analysis["untrained"]}.items():
            for name in ("accuracy", "patch similarity"):
                expected = of_run["values"][name]
                assert file[f"{title}/{name}"].mean(axis=1) == pytest.approx(expected, abs=1e-6)
    tables = {table.split("  ")[0]: table for table in text.split("\n\n")}
    rows = [line.split("  ")[0] for line in tables["accuracy"].splitlines()]
    assert rows == ["accuracy", "chance", "untrained, K = 2", "e2e-2", "sim-2"]
    assert "linear CKA with the block before" in tables and "untrained" in tables["mAP"]
    assert "linear CKA with the last snapshot" not in tables
    assert "untrained" not in tables["reconstruction loss"] and "-" in tables["reconstruction loss"]


def test_snapshots_are_compared_with_the_last_one_of_their_run(three_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "logistic_probe", nearest_mean)
    name, titles = "linear CKA with the last snapshot", ["mine step 000001", "mine step 000002"]
    run(train, *TINY_RUN, "--blocks", 2, "--steps", 2, "--lr", 0.01, "--keep", "--out", tmp_path / "mine")
    paths = [tmp_path / "mine" / f"step_{step:06d}.pt" for step in (2, 1)]
    text, _ = run(analyze, three_runs / "sim-2", *paths, "--clips", 36, "--workers", 0, "--out", tmp_path)
    runs = json.loads((tmp_path / "analysis.json").read_text())["runs"]
    assert [(runs[title]["run"], runs[title]["step"]) for title in titles] == [("mine", 1), ("mine", 2)]
    first, last = (runs[title]["values"][name] for title in titles)
    assert last == pytest.approx([1, 1]) and all(0 < value < 0.9999 for value in first)
    assert name not in runs["sim-2"]["values"]
    [table] = [table for table in text.split("\n\n") if table.startswith(name)]
    assert [line.split("  ")[0] for line in table.splitlines()] == [name, *reversed(titles)]


def test_likely_mistakes_in_an_analysis_get_one_sentence(three_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "extract", None)  # refused before the measurements
    base = [three_runs / "sim-2", "--workers", 0]
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(analyze, *base, "--out", tmp_path / "file" / "x")
    other = shutil.copytree(three_runs / "sim-2-seed1", tmp_path / "sim-2-seed5")
    checkpoint = load(other)[1]
    changes = {"lr": {"settings": checkpoint["settings"] | {"lr": 0.5}}, "clips": {"data": "others"}}
    for name, change in (changes | {"objective": {"objective": 2.0}, "progress": {"step": 1}}).items():
        torch.save(checkpoint | change, other / "last.pt")
        sentence = refused(analyze, other, *base, "--out", tmp_path / "out")
        assert f"sim-2-seed5 and sim-2 look like seeds of one run but differ in {name}" in sentence


def test_runs_share_all_settings_that_change_weights():
    shape = {"size", "tubelet", "decoder_depth", "frames", "pixels"}  # stand in the model's config
    elsewhere = {"out", "resume", "keep", "device", "workers", "compile", "decoder_slices"}
    elsewhere |= {"save_every", "data", "list", "eval_list"}  # the clips' fingerprint stands for them
    compared = {"regime", "blocks", "seed"}
    names = {field.name for field in fields(train.Config)}
    assert names == set(analyze.RECIPE) | shape | elsewhere | compared


# ---- README.md ----


README = Path(__file__).with_name("README.md")


def test_the_commands_in_the_readme_exist():
    def commands(script):
        calls = re.findall(rf"(?:python|torchrun .*?)\s{script}\.py([^\n`#|&)]*)", README.read_text())
        assert calls, script
        return [[word for word in call.split() if word != "..."] for call in calls]

    for command in commands("train"):
        train.parse(train.Config, "", command)  # exits on what it does not know
    for script, build in (("probe", probe.build_parser), ("analyze", analyze.build_parser)):
        for command in commands(script):
            build().parse_args(command)


def test_the_files_name_nothing_beyond_the_core():
    for name in ("model", "blockwise", "data", "train", "probe", "analyze"):
        code = Path(__file__).with_name(f"{name}.py").read_text()
        assert not re.search("extras|layerlock|gardener|pipeline|finetune", code, re.IGNORECASE), name


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
