"""A part of a tensor read from its own bytes, against the whole tensor sliced by torch."""

import os
from pathlib import Path

import pytest
import torch

from bulkedge import CheckpointError
from bulkedge.checkpoint import BlockFp8, Plain, StoredMatrix, read_header
from bulkedge.checkpoint.elements import read_elements
from helpers import save, weights

COUNTER = Path("/proc/self/io")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def stored(tmp_path, tensor, **more):
    infos, _ = read_header(save(tmp_path / "x.safetensors", {"w": tensor} | more))
    return infos


def bytes_read():
    return int(COUNTER.read_text().partition("rchar:")[2].split()[0])


def matrix_of(tmp_path, tensor, **part):
    return StoredMatrix(Plain(stored(tmp_path, tensor, other=weights(3))["w"]), **part)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_and_parts(dtype, tmp_path):
    W = weights(6, 4, 5, dtype=dtype)
    cases = {
        "w": ({}, W.reshape(6, 20)),
        "w[2]": ({"expert": 2}, W[2]),
        "w[2, 1:3]": ({"expert": 2, "rows": (1, 3)}, W[2, 1:3]),
        "w[1:3]": ({"rows": (1, 3)}, W.reshape(6, 20)[1:3]),
    }
    for name, (part, expected) in cases.items():
        for transposed in (False, True):
            if transposed and "rows" in part:
                whole = W[2] if "expert" in part else W.reshape(6, 20)
                expected = whole[:, 1:3]
            found = matrix_of(tmp_path, W, transposed=transposed, **part)
            assert found.name == name
            assert found.dtype in ("F64", "F32", "F16", "BF16")
            assert (found.shape, found.size) == (tuple(expected.shape), expected.numel())
            assert found.nbytes == expected.numel() * W.element_size()
            acts = expected.mT if transposed else expected
            assert found.acts_as == tuple(acts.shape)
            assert torch.equal(found.read(), acts)


def test_a_layer_that_shares_the_tensor_has_a_name_of_its_own(tmp_path):
    assert matrix_of(tmp_path, weights(3, 4), alias="lm_head").name == "w[as lm_head]"


@pytest.mark.skipif(not COUNTER.exists(), reason="no count of the bytes read")
def test_only_the_bytes_of_a_part_are_read(tmp_path):
    W = weights(50, 100, 300)
    matrix = StoredMatrix(Plain(stored(tmp_path, W)["w"]), expert=7, rows=(10, 90))
    matrix.read()  # what is imported for the first time is read, too
    before = bytes_read()
    assert torch.equal(matrix.read(), W[7, 10:90])
    assert matrix.nbytes <= bytes_read() - before < matrix.nbytes + 20_000 < W.nbytes / 50


@pytest.mark.parametrize(
    "part", [{}, {"expert": 1}, {"expert": 1, "rows": (3, 9)}, {"rows": (3, 9)}], ids=str
)
@pytest.mark.parametrize("transposed", [False, True])
def test_block_scales(part, transposed, tmp_path):
    """Each block times its scale, the last ones cut off, against one element after the other."""
    stack = "expert" in part
    shape = (2, 11, 10) if stack else (11, 10)
    W = weights(*shape).to(torch.float8_e4m3fn)
    scales = weights(*shape[:-2], 3, 4, seed=1)
    infos = stored(tmp_path, W, s=scales)
    whole, table = (W[1], scales[1]) if stack else (W, scales)
    expected = torch.tensor(
        [[float(whole[i, j]) * float(table[i // 4, j // 3]) for j in range(10)] for i in range(11)]
    )
    expected = expected.mT if transposed else expected
    if "rows" in part:
        expected = expected[3:9]
    matrix = StoredMatrix(BlockFp8(infos["w"], infos["s"], (4, 3)), transposed, **part)
    found = matrix.read()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_one_scale_for_all(tmp_path):
    W = weights(5, 4).to(torch.float8_e4m3fn)
    infos = stored(tmp_path, W, s=torch.tensor(0.5))
    found = StoredMatrix(BlockFp8(infos["w"], infos["s"])).read()
    assert torch.equal(found, 0.5 * W.float())


def test_a_file_that_was_cut_meanwhile(tmp_path):
    info = stored(tmp_path, weights(4, 5, 6))["w"]
    os.truncate(info.file, info.file.stat().st_size - 8)
    assert len(read_elements(info, 0, 10)) == 10
    with pytest.raises(CheckpointError, match=r"tensor 'w' ends too early; the file was changed"):
        StoredMatrix(Plain(info), expert=3).read()
    info.file.unlink()
    with pytest.raises(
        CheckpointError, match=r"'w' cannot be read \(No such file.*; was the file changed"
    ):
        StoredMatrix(Plain(info), expert=3).read()
