"""Networks in files: EDM's published pickles, our own files, and foreign ones that pose as either."""

import copy
import json
import os
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_unet import small_net
from torch import nn

import fgm
from images import published
from images.data import load_images
from images.published import load_edm, load_network, load_teacher
from images.unet import Conv, EDMVelocity

# ---- Published pickles -------------------------------------------------------------------------------------


class Persistent:
    """Pickles as EDM's persistent classes do: a call of torch_utils.persistence with source and state."""

    def __init__(self, class_name, state):
        source = "raise SystemExit('embedded source was executed')"
        self.meta = dict(type="class", version=6, module_src=source, class_name=class_name, state=state)

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def persistent(module, class_name=None):
    if isinstance(module, nn.ModuleDict):
        container = nn.ModuleDict()
        container._modules = OrderedDict((name, persistent(child)) for name, child in module.items())
        return container
    names = ("training", "dropout", "in_channels")
    state = {name: module.__dict__[name] for name in names if name in module.__dict__}
    state["_parameters"] = module._parameters
    buffers = ((name, value) for name, value in module._buffers.items() if name != "frequencies")
    state["_buffers"] = OrderedDict(buffers)
    children = {name: child for name, child in module.named_children() if not isinstance(child, nn.Identity)}
    state["_modules"] = OrderedDict((name, persistent(child)) for name, child in children.items())
    return Persistent(class_name or type(module).__name__, state)


@pytest.fixture
def edm_pickle(monkeypatch, tmp_path):
    """Write a network as EDM publishes it; returns the path."""
    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("embedded source was executed")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", package)
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)

    def write(net, sigma_data=0.5, **extra):
        net = copy.deepcopy(net)
        channels, resolution = net.input_shape[:2]
        state = dict(
            img_resolution=resolution, img_channels=channels, label_dim=net.label_dim, use_fp16=False,
            sigma_min=0, sigma_max=float("inf"), sigma_data=sigma_data, _parameters={}, _buffers={},
            _modules=OrderedDict(model=persistent(net, "SongUNet")),
        )
        path = tmp_path / "network.pkl"
        path.write_bytes(pickle.dumps({"ema": Persistent("EDMPrecond", state), **extra}))
        return path

    return write


CONDITIONAL = dict(label_dim=10, augment_dim=9, channel_mult=(2, 2), num_blocks=2, attn_resolutions=(8, 4))


@pytest.mark.parametrize("arguments", [CONDITIONAL, dict(attn_resolutions=())])
def test_published_pickle_round_trip(edm_pickle, arguments):
    net = small_net(**arguments)
    loaded = load_edm(edm_pickle(net, sigma_data=np.float64(0.5)))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.9])
    cond = {"class_labels": torch.eye(10)[:2]} if net.label_dim else {}
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, t, **cond), EDMVelocity(net)(x, t, **cond), rtol=0, atol=0)


def test_other_precisions_and_layouts_are_read(edm_pickle):
    net = small_net().half().to(memory_format=torch.channels_last)
    state, expected = load_edm(edm_pickle(net)).net.state_dict(), net.float().state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def refusal(load, path):
    """The one line with which a file is refused."""
    with pytest.raises(fgm.InputError) as refused:
        load(path)
    message = str(refused.value)
    assert message.isprintable() and len(message) < 700 and str(path) in message
    return message


class Attack:
    def __init__(self, call, argument):
        self.call, self.argument = call, argument

    def __reduce__(self):
        return self.call, (self.argument,)


def test_nothing_in_a_pickle_is_executed(edm_pickle, tmp_path):
    ran = tmp_path / "ran"
    attacks = [Attack(os.system, f"touch {ran}"), Attack(eval, f"open({str(ran)!r}, 'w')")]
    for attack in attacks:
        message = refusal(load_edm, edm_pickle(small_net(), hidden=attack))
        assert f"{attack.call.__module__}.{attack.call.__name__}, which no EDM network needs" in message
    storage = Attack(torch.storage._load_from_bytes, pickle.dumps(attacks[0]))  # in a tensor's bytes
    assert "Weights only load failed" in refusal(load_edm, edm_pickle(small_net(), hidden=storage))
    assert not ran.exists()


@pytest.mark.parametrize("opcodes, message", [
    (b"}.", "KeyError: 'ema'"),
    (b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8tR.", "numbers of a type that no EDM network has"),
])
def test_hostile_pickles_are_refused(opcodes, message, tmp_path):
    path = tmp_path / "hostile.pkl"
    path.write_bytes(b"\x80\x04" + opcodes)
    assert message in refusal(load_edm, path)


@pytest.mark.parametrize("outer, attributes, child, message", [
    ("VPPrecond", {}, "UNetBlock", "it has VPPrecond, which is not supported"),
    ("EDMPrecond", dict(num_heads=4, eps=1e-5), "UNetBlock", "num_heads other than 1, eps other"),
    ("EDMPrecond", {}, "FourierEmbedding", "the Fourier embedding of NCSN"),
])
def test_networks_that_compute_otherwise_are_refused(outer, attributes, child, message):
    child = published.Module(child, {"_modules": {}})
    network = published.Module("SongUNet", {"_modules": {"child": child}, **attributes})
    with pytest.raises(fgm.InputError, match=message):
        published.check_variant(published.Module(outer), network)


def test_layers_and_numbers_that_would_be_wrong_are_refused(edm_pickle):
    net = small_net()
    net.dec["8x8_aux_skip"] = Conv(16, 1, 3)
    assert "connections of NCSN++ between resolutions" in refusal(load_edm, edm_pickle(net))

    net = small_net().double()
    net.map_layer1.weight.data[3, 4] = 1e300
    assert "map_layer1.weight in it holds numbers that are not finite" in refusal(load_edm, edm_pickle(net))


# ---- Network files -----------------------------------------------------------------------------------------

NETWORK = dict(
    img_resolution=8, in_channels=1, out_channels=1, label_dim=0, model_channels=16, channel_mult=[1, 2],
    num_blocks=1, attn_resolutions=[4], dropout=0.0,
)
GENERATOR = dict(t_star=0.9, c_in=1.0, c_skip=0, c_out=0.9)


def network_file(path, tensors=None, generator=None, classes=(), class_counts=(), **changes):
    """A network file of ours, with changes to the description of its network."""
    about = {"network": NETWORK | changes, "data": "digits", "classes": classes, "class_counts": class_counts}
    if generator is not None:
        about["generator"] = generator
    save_file(tensors or small_net().state_dict(), path, {"about": json.dumps(about)})
    return path


@pytest.mark.parametrize("changes", [
    dict(colour=3), dict(in_channels=10**9, out_channels=10**9), dict(tensors={"x": torch.ones(1)}),
    dict(generator=GENERATOR | {"c_in": "1"}),
], ids=str)
def test_hostile_network_files_are_refused(changes, tmp_path):
    refusal(load_network, network_file(tmp_path / "hostile.safetensors", **changes))


def test_classes_and_their_counts_must_fit(tmp_path):
    net, path = small_net(label_dim=2), tmp_path / "file.safetensors"
    for classes, counts, message in ((["a", "b"], [1, 0.5], "class_counts"), (["a"], [1, 2], "its classes")):
        network_file(path, net.state_dict(), label_dim=2, classes=classes, class_counts=counts)
        assert message in refusal(load_network, path)


def test_what_is_no_network_file_is_refused(tmp_path):
    path = tmp_path / "file.safetensors"
    for metadata in (None, {"about": "[" * 10**5}):
        save_file(small_net().state_dict(), path, metadata)
        assert "no network file of cifar.py" in refusal(load_network, path)
    for load in (load_edm, load_network):
        assert f"cannot read {tmp_path}: it is a folder" in refusal(load, tmp_path)
        assert "cannot read" in refusal(load, tmp_path / "missing")


def test_a_teacher_must_fit_the_data(tmp_path):
    real, path = load_images("digits"), tmp_path / "teacher.safetensors"
    description = dict(label_dim=10, classes=real.classes, class_counts=[1] * 10)
    network_file(path, small_net(label_dim=10).state_dict(), **description)
    assert load_teacher(path, real, cond=True)[1]["label_dim"] == 10

    with pytest.raises(fgm.InputError, match=r"has the classes \['0', '1', .* the data \['9'"):
        load_teacher(path, real._replace(classes=real.classes[::-1]), cond=True)
    with pytest.raises(fgm.InputError, match="conditional on 10 classes, asked for is 0"):
        load_teacher(path, real, cond=False)
    with pytest.raises(fgm.InputError, match=r"shape \[1, 8, 8\], the data has \[3, 8, 8\]"):
        load_teacher(path, real._replace(pixels=real.pixels.expand(-1, 3, -1, -1)), cond=True)
    network_file(path, small_net(label_dim=10).state_dict(), generator=GENERATOR, **description)
    with pytest.raises(fgm.InputError, match="one-step generator, no teacher"):
        load_teacher(path, real, cond=True)


